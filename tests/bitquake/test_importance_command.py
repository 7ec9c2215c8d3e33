"""``bitquake importance`` on tables whose shares are known by hand, and on everything that is wrong with a table."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitquake import cli

BITS = (2, 3, 4, 16)
VISION = {2: 0.1, 3: 0.7, 4: 0.9, 16: 1.0}
LANGUAGE = {2: 0.0, 3: 0.6, 4: 0.9, 16: 1.0}
Row = Mapping[str, object]


def _rows() -> list[dict[str, object]]:
    """A grid as mmq's: the score is the product of what each part keeps; the connector adds a little."""
    return [
        {"vit": v, "qformer": q, "llm": n, "cider": 1.2 * VISION[v] * LANGUAGE[n] + 0.001 * q, "bpw": v + n + q / 10}
        for v, q, n in itertools.product(BITS, repeat=3)
    ]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, Any]]:
    """Writes rows as CSV and runs the command: exit code, what it printed, and its JSON."""

    def call(rows: Iterable[Row] | str, *options: str, name: str = "grid.csv") -> tuple[int, str, Any]:
        table, told = tmp_path / name, tmp_path / "numbers.json"
        if isinstance(rows, str):
            table.write_text(rows, encoding="utf-8")
        else:
            kept = list(rows)
            lines = [",".join(kept[0]), *(",".join(map(str, row.values())) for row in kept)]
            table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        usual = {"--target": "cider", "--factors": "vit,qformer,llm", "--methods": "anova"}
        filled = [part for key, value in usual.items() if key not in options for part in (key, value)]
        code = cli.main(["importance", str(table), *filled, *options, "--json", str(told)])
        printed = capsys.readouterr()
        return code, printed.err if code else printed.out, json.loads(told.read_text()) if code == 0 else None

    return call


def _shares(told: Any, kind: str = "first") -> dict[str, float]:
    return {name: share["value"] for name, share in told["variance"][kind].items()}


def test_the_shares_of_a_product_are_its_closed_form(run: Callable[..., Any]) -> None:
    """Var(XY) of independent X and Y: E[Y]² Var(X) + E[X]² Var(Y) + Var(X) Var(Y)."""
    code, text, told = run(_rows())
    assert code == 0
    x, y, z = (np.array(list(kept)) for kept in (VISION.values(), LANGUAGE.values(), BITS))
    parts = {
        "vit": 1.44 * y.mean() ** 2 * x.var(), "qformer": 1e-6 * z.var(), "llm": 1.44 * x.mean() ** 2 * y.var(),
        "both": 1.44 * x.var() * y.var(),
    }  # fmt: skip
    total = sum(parts.values())
    (group,) = told["groups"]
    found = group["all"]
    assert _shares(found) == pytest.approx({name: parts[name] / total for name in ("vit", "qformer", "llm")})
    assert found["variance"]["interactions"][0] == {
        "factors": ["vit", "llm"], "value": pytest.approx(parts["both"] / total), "lo": None, "hi": None,
    }  # fmt: skip
    assert found["importance"]["anova"]["vit"]["value"] == pytest.approx((parts["vit"] + parts["both"] / 2) / total)
    assert group["balanced"] and group["n"] == group["cells"] == 64
    assert f"{100 * parts['llm'] / total:.1f}" in text and "64 of 64 cells (4 x 4 x 4)" in text
    rest = group["without_lowest"]
    assert rest["levels"] == {"vit": 2, "qformer": 2, "llm": 2} and rest["n"] == 27
    x, y = x[1:], y[1:]
    assert _shares(rest)["vit"] / _shares(rest)["llm"] == pytest.approx(
        y.mean() ** 2 * x.var() / (x.mean() ** 2 * y.var())
    )
    assert len(group["without_one_level"]) == 12


def test_all_ways_with_intervals_and_their_agreement(run: Callable[..., Any]) -> None:
    code, text, told = run(
        _rows(), "--methods", "anova,forest,shap", "--bootstrap", "3", "--trees", "20", "--drop", "qformer=16"
    )
    assert code == 0
    found = told["groups"][0]["all"]
    assert list(found["importance"]) == ["anova", "impurity", "permutation", "shap"]
    assert len(found["agreement"]) == 6 and sum(
        share["value"] for share in found["consensus"].values()
    ) == pytest.approx(1)
    assert found["importance"]["anova"]["vit"]["lo"] is None and "exact for these values" in text
    for way in ("impurity", "permutation", "shap"):
        share = found["importance"][way]["vit"]
        assert share["lo"] <= share["value"] <= share["hi"]
    assert told["groups"][0]["levels"]["qformer"] == [2, 3, 4]


def test_a_missing_cell_is_named_and_least_squares_take_over(run: Callable[..., Any]) -> None:
    rows = [row for row in _rows() if (row["vit"], row["qformer"], row["llm"]) != (2, 3, 16)]
    rows[5]["cider"] = "nan"
    code, text, told = run(rows)
    assert code == 0
    (group,) = told["groups"]
    missing = [{"vit": 2, "qformer": 3, "llm": 3}, {"vit": 2, "qformer": 3, "llm": 16}]
    assert group["missing"] == missing and group["n_missing"] == 2 and not group["complete"]
    assert "missing cells: vit=2 qformer=3 llm=3; vit=2 qformer=3 llm=16" in text
    assert "1 of 63 rows have no cider and are left out" in text
    assert group["all"]["variance"]["method"] == "anova type II"
    _, _, whole = run(_rows())
    assert _shares(group["all"]) == pytest.approx(_shares(whole["groups"][0]["all"]), abs=0.08)


def test_a_full_part_of_it_can_be_asked_for(run: Callable[..., Any]) -> None:
    rows = [row for row in _rows() if not (row["llm"] == 2 and row["vit"] in (3, 4))]
    code, text, told = run(rows, "--complete-only")
    assert code == 0
    (group,) = told["groups"]
    assert group["complete"] and group["levels"]["llm"] == [3, 4, 16] and group["n"] == 48
    assert "left out, to have every combination: llm 2; 48 of 56 runs stay" in text
    by_hand = run([row for row in _rows() if row["llm"] != 2])[2]["groups"][0]
    assert _shares(group["all"]) == pytest.approx(_shares(by_hand["all"]))


def test_groups_have_grids_of_their_own(run: Callable[..., Any]) -> None:
    rows = [{"method": m, **row} for m in ("awq", "gptq") for row in _rows()]
    for row in rows[64:]:
        row["cider"] = VISION[int(str(row["vit"]))]
    code, text, told = run(rows, "--group", "method", "--factors", "vit,llm")
    assert code == 0
    awq, gptq = told["groups"]
    assert (awq["group"], gptq["group"]) == ("awq", "gptq") and "method gptq: cider of 64 runs" in text
    assert _shares(gptq["all"]) == pytest.approx({"vit": 1.0, "llm": 0.0})
    # the connector was not a factor: its four runs of a cell are repeats
    within = 1e-6 * np.var(BITS) / awq["all"]["variance"]["variance"]
    assert awq["all"]["variance"]["within"]["value"] == pytest.approx(within)
    assert "16 of 16 cells have several runs" in text


def test_repeats_give_intervals(run: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    rows = [{**row, "cider": float(str(row["cider"])) + rng.normal(scale=0.05)} for row in _rows() for _ in range(3)]
    code, text, told = run(rows, "--bootstrap", "200")
    assert code == 0
    found = told["groups"][0]["all"]["variance"]["first"]
    assert 0 < found["vit"]["lo"] < found["vit"]["value"] < found["vit"]["hi"] < 1
    assert found["qformer"]["lo"] == 0 and "sampling alone accounts for" in text


def test_single_answers_give_intervals_over_questions(run: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    latent = rng.random(120)
    rows = [
        {"vit": v, "llm": n, "question": f"q{i}", "right": int(u < VISION[v] * LANGUAGE[n] * 0.9 + 0.05)}
        for v, n in itertools.product(BITS, repeat=2)
        for i, u in enumerate(latent)
    ]
    options = ("--target", "right", "--factors", "vit,llm", "--sample", "question", "--bootstrap", "300")
    code, text, told = run(rng.permutation(np.array(rows, dtype=object)).tolist(), *options)
    assert code == 0 and "16 runs of 120 samples each" in text
    means = {}
    for row in rows:
        means.setdefault((row["vit"], row["llm"]), []).append(row["right"])
    cells = np.array([[np.mean(means[v, n]) for n in BITS] for v in BITS])
    found = told["groups"][0]["all"]["variance"]["first"]
    assert found["vit"]["value"] == pytest.approx(cells.mean(axis=1).var() / cells.var())
    assert found["vit"]["lo"] < found["vit"]["value"] < found["vit"]["hi"]
    code, text, _ = run([row for row in rows if (row["vit"], row["question"]) != (3, "q7")], *options)
    assert code == 2 and "answered 119 samples" in text and "not the same ones" in text
    assert "is there twice" in run([*rows, rows[0]], *options)[1]


def test_what_is_enough_for_least_cost(run: Callable[..., Any]) -> None:
    code, text, told = run(_rows(), "--cost", "bpw")
    assert code == 0
    pareto = told["groups"][0]["pareto"]
    assert pareto["reference"] == pytest.approx(1.2 + 0.016)
    by_hand = {
        share: min(
            (row for row in _rows() if float(str(row["cider"])) >= share * 1.216),
            key=lambda row: float(str(row["bpw"])),
        )
        for share in (0.95, 0.98)
    }
    for found in pareto["cheapest"]:
        row = by_hand[found["share"]]
        assert found["levels"] == {name: row[name] for name in ("vit", "qformer", "llm")}
        assert found["cost"] == row["bpw"]
    front = {tuple(one["levels"].values()) for one in pareto["runs"] if one["place"] == "front"}
    rows = _rows()
    assert front == {
        (a["vit"], a["qformer"], a["llm"])
        for a in rows
        if not any(
            float(str(b["bpw"])) <= float(str(a["bpw"])) and float(str(b["cider"])) > float(str(a["cider"]))
            for b in rows
        )
    }
    assert "cheapest with 95% of 1.216 (vit=16 qformer=16 llm=16)" in text


def test_words_are_factors_too_and_semicolons_part_columns(run: Callable[..., Any]) -> None:
    lines = [
        "Method;Bits;Score",
        *(f"{m};{b};{s + b / 100}" for m, s in (("awq", 0.5), ("rtn", 0.1)) for b in (4, 8, 16)),
    ]
    code, text, told = run("\ufeff" + "\n".join(lines), "--target", "Score", "--factors", "Method,Bits")
    assert code == 0
    assert told["groups"][0]["levels"] == {"Method": ["awq", "rtn"], "Bits": [4, 8, 16]}
    assert _shares(told["groups"][0]["all"])["Method"] == pytest.approx(0.04 / (0.04 + np.var([0.04, 0.08, 0.16])))
    assert told["groups"][0]["without_lowest"] is None  # four runs are too few
    assert math.isfinite(told["groups"][0]["all"]["variance"]["variance"]) and "Method" in text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, ["--target", "Cider"], "has no column 'Cider' (did you mean 'cider'?)"),
        (None, ["--factors", "vit,q_former"], "has no column 'q_former' (did you mean 'qformer'?)"),
        (None, ["--factors", "vit,cider"], "'cider' is the --target"),
        (None, ["--factors", "vit,vit"], "'vit' is given twice"),
        (None, ["--factors", ","], "expected names with commas"),
        (None, ["--methods", "anova,shapley"], "unknown method 'shapley' (did you mean 'shap'?)"),
        (None, ["--drop", "vit=5"], "no row has it; vit has 2, 3, 4, 16"),
        (None, ["--drop", "vitt=2"], "no column 'vitt' (did you mean 'vit'"),
        (None, ["--drop", "vit"], "expected COLUMN=VALUE"),
        (None, ["--bootstrap", "-1"], "0 or more"),
        (None, ["--drop", "vit=2", "--drop", "vit=3", "--drop", "vit=4"], "the factor vit is '16' in every row"),
        ("vit,qformer,llm,cider\n", [], "holds no rows"),
        ("", [], "is empty"),
        ("vit,vit,cider\n1,2,3\n", [], "'vit' is there twice"),
        ("vit,qformer,llm,cider\n2,2,2\n", [], "row 2: 3 fields, the header has 4"),
        ("vit,qformer,llm,cider\n2,2,2,bad\n", [], "row 2: cider is no number: 'bad'"),
        ("vit,qformer,llm,cider\n2,2,2,inf\n", [], "row 2: cider is inf"),
        ("vit,qformer,llm,cider\n2,2,,1\n3,3,3,2\n", [], "row 2: llm is empty"),
        ("vit,qformer,llm,cider\n2,2,2,\n3,3,3,\n", [], "no row has a cider"),
        ("vit,llm,cider\n2,2,1\n3,3,1\n2,3,1\n3,2,1\n", ["--factors", "vit,llm"], "is 1 in every run"),
        ('vit,llm,cider\n"2,2,1\n', ["--factors", "vit,llm"], "no table"),
    ],
)
def test_a_table_that_cannot_be_used_gives_one_clear_message(
    run: Callable[..., Any], rows: str | None, options: list[str], message: str
) -> None:
    code, text, _ = run(_rows() if rows is None else rows, *options)
    assert code == 2 and message in text and text.count("\n") == 1


def test_files_that_are_no_table(run: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "ends in .csv or .tsv" in run("x", name="grid.json")[1]
    assert cli.main(["importance", str(tmp_path / "no.csv"), "--target", "a", "--factors", "b"]) == 2
    assert "No such file" in capsys.readouterr().err
