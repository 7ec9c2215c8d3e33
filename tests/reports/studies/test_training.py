"""The training page: arms against the public base, their own twins and the best quantization afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Task, noisy

from bitquake.reports.studies import build_study, read_study
from bitquake.reports.studies.arms import SWITCHES, benches, recipe_title
from bitquake.reports.studies.joint import STUDY_METRICS
from bitquake.reports.studies.training import _base_changes, _twin_changes

N = 120
TASKS = [Task(variant="threshold", n=N), Task(n=N), noisy("fog", 3, n=N)]
GRACE = dict.fromkeys(SWITCHES, True)
QAT = dict.fromkeys(SWITCHES, False)


def training(bits: int, switches: dict[str, bool], **changes: Any) -> dict[str, Any]:
    return {"training": {"method": "qat", "bits": bits, "steps": 20, **switches}, **changes}


@pytest.fixture
def grown(suite: Any) -> Any:
    suite.page = "training"
    base = suite.add("m/full-precision", Model(), TASKS)
    for method, loss in (("rtn", 1.6), ("gptq", 1.1)):
        spec = {"method": method, "bits": 3}
        suite.add(f"m/{method}-int3", Model(f"{method}-int3", 3, loss), TASKS, twin=base.name, spec=spec)

    def add(name: str, loss: float, told: dict[str, Any], twin: str, recipe: str, seed: int = 0) -> None:
        factors = {"recipe": recipe}
        path = f"{name}/as-trained{f'/seed{seed}' if seed else ''}"
        model = Model(f"{name}-{seed}", 16, loss)
        told = {**told, "training_hash": f"{len(suite.cells):032x}", "seed": seed, "factors": factors}
        suite.add(path, model, TASKS, twin=twin, **told)

    add("grace-w16", -0.3, training(16, GRACE), "", "GRACE")
    add("grace-w3", 0.1, training(3, GRACE), "grace-w16/as-trained", "GRACE")
    add("grace-w3", 0.15, training(3, GRACE), "grace-w16/as-trained", "GRACE", seed=1)
    add("no-gate-w3", 0.3, training(3, {**GRACE, "gate": False}), "grace-w16/as-trained", "GRACE without the gate")
    add("qat-w16", 0.0, training(16, QAT), "", "QAT")
    add("qat-w3", 1.4, training(3, QAT), "qat-w16/as-trained", "QAT")
    return suite


def numbers(out: Path, site: Path, **options: Any) -> dict[str, Any]:
    build_study(out, site, replicates=200, **options)
    told: dict[str, Any] = json.loads((site / "study.json").read_text())
    return told


def table(told: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = [t for section in told["sections"] for t in section["tables"] if t["label"] == label]
    return dict(found)


def test_an_arm_stands_against_the_base_and_against_its_own_twin(
    grown: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    out = grown.write()
    told = numbers(out, tmp_path / "site")
    cells = {cell.name: cell for cell in grown.cells}

    def accuracy(name: str) -> float:
        return float(answers(out, cells[name], "block_vqav2_clean").score.mean())

    grace = np.mean([accuracy("grace-w3/as-trained"), accuracy("grace-w3/as-trained/seed1")])
    base = {row["head"]: row for row in table(told, "clean: against the public base")["rows"][6:]}
    assert base["GRACE"]["cells"][0]["value"] == pytest.approx(grace)
    assert base["GRACE"]["cells"][0]["change"]["value"] == pytest.approx(grace - accuracy("m/full-precision"))
    assert base["GRACE"]["note"] == "mean of seeds 0, 1"
    twin = {row["head"]: row for row in table(told, "clean: against its own full-precision twin")["rows"]}
    assert twin["GRACE"]["cells"][0]["value"] == pytest.approx(grace - accuracy("grace-w16/as-trained"))
    assert twin["QAT"]["cells"][0]["value"] == pytest.approx(
        accuracy("qat-w3/as-trained") - accuracy("qat-w16/as-trained")
    )
    assert twin["rtn-int3"]["note"] == "twin: public base"


def test_headlines_are_corrected_with_the_tables_that_they_head(grown: Any, tmp_path: Path) -> None:
    out = grown.write()
    told = numbers(out, tmp_path / "site")
    (bench,) = benches(read_study(out), [], STUDY_METRICS, replicates=200, seed=0)
    titles = {arm.key: arm.title for arm in bench.arms}
    for label, judged in (("own full-precision twin", _twin_changes), ("the public base", _base_changes)):
        rows = table(told, f"clean: against {'its ' if 'twin' in label else ''}{label}")["rows"]
        shown = {(row["head"], i): cell.get("change", cell) for row in rows for i, cell in enumerate(row["cells"])}
        found = judged(bench, "clean")
        assert found
        for (key, metric), (_, p) in found.items():
            if sum(title == titles[key] for title in titles.values()) == 1:
                assert shown[titles[key], STUDY_METRICS.index(metric)]["p_adjusted"] == pytest.approx(p)


def test_the_best_quantization_is_the_best_and_its_luck_stands_in_the_interval(
    grown: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    out = grown.write()
    told = numbers(out, tmp_path / "site")
    rows = {
        row["head"]: row["cells"] for row in table(told, "clean, Accuracy: trained less quantized afterwards")["rows"]
    }
    by_name = {cell.name: answers(out, cell, "block_vqav2_clean").score.mean() for cell in grown.cells}
    grace = np.mean([by_name["grace-w3/as-trained"], by_name["grace-w3/as-trained/seed1"]])
    assert rows["GRACE"][1] == "gptq-int3"
    assert rows["GRACE"][0]["value"] == pytest.approx(grace - by_name["m/gptq-int3"])
    assert [rows["GRACE"][i]["value"] for i in (2, 3)] == pytest.approx(
        [grace - by_name["m/rtn-int3"], grace - by_name["m/gptq-int3"]]
    )
    fixed, best = rows["GRACE"][3], rows["GRACE"][0]
    assert best["lo"] <= fixed["lo"] and best["hi"] >= fixed["hi"]
    finding = told["findings"][0]
    assert finding["text"].startswith("GRACE at INT3") and finding["verdict"] == "better"


def test_two_equal_rivals_never_make_an_arm_worse_by_being_two(suite: Any) -> None:
    """Choosing the better of two equal ones anew in each replicate must not count against the arm."""
    suite.page = "training"
    base = suite.add("m/full-precision", Model(), TASKS)

    def turned(task: str, records: list[Any]) -> list[Any]:
        """As many right answers, to other questions."""
        scores = [float(r.score > 0) for r in records]
        return [r.model_copy(update={"score": score}) for r, score in zip(records, scores[::-1], strict=True)]

    def plain(task: str, records: list[Any]) -> list[Any]:
        return [r.model_copy(update={"score": float(r.score > 0)}) for r in records]

    for method, edit in (("rtn", plain), ("gptq", turned)):
        spec = {"method": method, "bits": 3}
        model = Model("rival-int3", 3, 0.9, changes={"spec_name": method})
        suite.add(f"m/{method}-int3", model, TASKS, twin=base.name, spec=spec, edit=edit)
    suite.add("qat-w3/as-trained", Model("qat", 16, 0.5), TASKS, **training(3, QAT), training_hash="1" * 32)
    (bench,) = benches(read_study(suite.write()), [], STUDY_METRICS, replicates=400, seed=0)
    rivals = [arm for arm in bench.arms if arm.kind == "ptq"]
    (trained,) = [arm for arm in bench.arms if arm.kind == "trained"]
    found = bench.less_best(trained, rivals, "clean", "accuracy")
    assert found is not None
    alone = bench.less(trained, found[1], "clean", "accuracy")
    assert alone is not None and found[0].value == alone.value
    assert found[0].lo < alone.lo - 0.005 and found[0].hi == alone.hi


def test_noise_is_compared_with_the_twin_on_the_same_samples(
    grown: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    out = grown.write()
    shown = table(numbers(out, tmp_path / "site"), "in noise: difference in differences")
    cells = {cell.name: cell for cell in grown.cells}

    def less(task: str) -> float:
        pair = ("qat-w3/as-trained", "qat-w16/as-trained")
        low, high = (answers(out, cells[name], task).score.mean() for name in pair)
        return float(low - high)

    row = next(row for row in shown["rows"] if row["head"] == "QAT")
    assert row["cells"][0]["value"] == pytest.approx(less("block_vqav2_fog_3") - less("block_vqav2_clean"))


def test_the_ablation_names_the_part_that_is_missing(grown: Any, tmp_path: Path) -> None:
    shown = table(numbers(grown.write(), tmp_path / "site"), "Parts of the recipe at INT3")
    rows = {row["head"]: row["cells"] for row in shown["rows"]}
    assert rows["GRACE"][:5] == ["✓"] * 5 and rows["QAT"][:5] == ["–"] * 5
    assert rows["GRACE without the gate"][:5] == ["✓", "✓", "–", "✓", "✓"]
    assert "change" not in rows["GRACE"][5] and "change" in rows["QAT"][5]


def test_curves_and_recipes_are_those_of_the_trainings(grown: Any, tmp_path: Path) -> None:
    out = grown.write()
    trained = [cell for cell in grown.cells if cell.training]
    for cell, start in ((trained[0], 2.0), (trained[1], 3.0)):
        folder = out / "models" / cell.training_hash
        folder.mkdir(parents=True)
        lines = [
            {"step": step, "loss": start / step, "rate": 0.1, "seconds": 1.0, "omega": 1.0} for step in range(1, 601)
        ]
        (folder / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    broken = out / "models" / trained[2].training_hash
    broken.mkdir()
    (broken / "curve.jsonl").write_text('{"step": 1, "loss"')
    result = build_study(out, tmp_path / "site", replicates=50)
    assert any("its curve cannot be read" in problem.what for problem in result.problems)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    (section,) = [section for section in told["sections"] if section["id"] == "curves"]
    (loss,) = section["figures"]  # omega never moves
    blocks = [np.mean([3.0 / step for step in range(1 + 10 * b, 11 + 10 * b)]) for b in (0, 59)]
    rows = [row for row in loss["rows"] if row[0] == trained[1].model]
    assert rows == [[trained[1].model, "10", f"{blocks[0]:.4g}"], [trained[1].model, "600", f"{blocks[1]:.4g}"]]
    recipes = table(told, "Recipes")
    assert recipes["columns"] == ["Training", "bits", *SWITCHES]
    assert [row["cells"][0] for row in recipes["rows"]] == ["16", "3", "3", "3", "16", "3"]


@pytest.mark.parametrize(
    ("told", "title"),
    [
        (GRACE, "GRACE"),
        (QAT, "QAT"),
        ({**QAT, "distillation": True}, "QAT + distillation"),
        ({**GRACE, "relational": False}, "GRACE without relational"),
        ({"method": "lora"}, "LoRA"),
    ],
)
def test_a_recipe_without_a_name_goes_by_its_parts(told: dict[str, Any], title: str) -> None:
    assert recipe_title(told) == title


def test_adapters_stand_beside_the_same_base_quantized(suite: Any, answers: Callable[..., Any], tmp_path: Path) -> None:
    suite.page = "training"
    base = suite.add("m/full-precision", Model(), TASKS)
    spec = {"method": "rtn", "bits": 4}
    suite.add("m/rtn-int4-g64", Model("rtn-int4-g64", 4, 0.4), TASKS, twin=base.name, spec=spec)
    lora = {"method": "lora", "rank": 8, "quant": "full-precision"}
    one = {"training": lora, "training_hash": "1" * 32, "factors": {"recipe": "LoRA"}}
    twin = suite.add("lora/as-trained", Model("lora", 16, 0.0), TASKS, **one)
    after = suite.add("lora/rtn-int4-g64", Model("lora4", 4, 0.6), TASKS, twin=twin.name, spec=spec, **one)
    two = {"training": {**lora, "quant": "rtn-int4-g64"}, "training_hash": "2" * 32, "factors": {"recipe": "QLoRA"}}
    qlora = suite.add("qlora/as-trained", Model("qlora", 4, 0.2), TASKS, twin=twin.name, **two)
    out = suite.write()
    told = numbers(out, tmp_path / "site")
    (section,) = [section for section in told["sections"] if section["id"] == "adapter"]
    rows = {row["note"]: row for row in section["tables"][0]["rows"]}
    assert set(rows) == {"less LoRA, then rtn-int4-g64", "less rtn-int4-g64"}
    low, high = (answers(out, cell, "block_vqav2_clean").score.mean() for cell in (qlora, after))
    row = rows["less LoRA, then rtn-int4-g64"]
    assert row["head"] == "QLoRA on rtn-int4-g64" and row["cells"][0]["value"] == pytest.approx(low - high)
    finding = next(f for f in told["findings"] if "against LoRA, then" in f["text"])
    assert finding["text"].startswith("QLoRA on rtn-int4-g64 against LoRA, then rtn-int4-g64, accuracy: clean ")


def test_the_page_says_what_intervals_of_trained_models_leave_out(grown: Any, suite: Any, tmp_path: Path) -> None:
    one, several = "another seed trains another model", "the spread between seeds is not in it"
    told = numbers(grown.write(), tmp_path / "site")
    html = (tmp_path / "site" / "index.html").read_text()
    assert len(told["cautions"]) == 2 and one in html and several in html
    suite.cells[:] = [cell for cell in suite.cells if cell.seed == 0]
    (caution,) = numbers(suite.write(), tmp_path / "site")["cautions"]
    assert one in caution
    suite.cells[:] = [cell for cell in suite.cells if not cell.training]
    assert numbers(suite.write(), tmp_path / "site")["cautions"] == []
