"""The noise page: planted amplification is found, none is not, and its numbers are those of plain numpy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Task, blake, noisy
from scipy.stats import false_discovery_control, norm

from bitquake.metrics import Figure, figure
from bitquake.reports.studies import build_study, read_study
from bitquake.reports.studies.joint import Pairs, corrected
from bitquake.reports.studies.noise import noise_groups
from bitquake.reports.studies.page import Compared, tell

N = 120
NOISES = [noisy(name, severity, n=N) for name in ("gaussian_noise", "fog") for severity in (1, 5)]
TASKS = [Task(n=N), *NOISES]
REPLICATES = 300


def hurt(task: str, records: list[Any]) -> list[Any]:
    """Every other answer under a noise goes wrong."""
    if task.endswith("clean"):
        return records
    return [r.model_copy(update={"score": 0.0}) if i % 2 else r for i, r in enumerate(records)]


@pytest.fixture
def grown(suite: Any) -> Any:
    suite.page = "noise"
    full = suite.add("m/full-precision", Model(), TASKS)
    suite.add("m/rtn-int8-g64", Model("rtn-int8-g64", 8, 0.02), TASKS, twin=full.name)
    suite.add("m/rtn-int3-g64", Model("rtn-int3-g64", 3, 0.3), TASKS, twin=full.name, edit=hurt)
    return suite


def test_amplified_noise_is_worse_and_a_faithful_model_is_tied(grown: Any, tmp_path: Path) -> None:
    result = build_study(grown.write(), tmp_path / "site", replicates=REPLICATES)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    verdicts = {text.split(":")[0]: f["verdict"] for f in told["findings"] for text in [f["text"]]}
    assert verdicts["rtn-int8-g64"] == "tied"
    assert verdicts["rtn-int3-g64"] in ("worse", "changed")
    assert "rtn-int3-g64" in result.table and re.search(r"accuracy −[^;]*\(amplified\)", result.table)
    assert result.ok and not result.problems


def test_a_headline_names_the_figures_that_stand_where_others_are_tied(suite: Any, tmp_path: Path) -> None:
    def doubted(task: str, records: list[Any]) -> list[Any]:
        """The third of the answers that the model is least sure of goes wrong in noise: only accuracy can tell."""
        if task.endswith("clean"):
            return records
        lowest = sorted(records, key=lambda r: r.confidence["joint"])[: N // 3]
        wrong = {r.sample_id for r in lowest}
        return [r.model_copy(update={"score": 0.0}) if r.sample_id in wrong else r for r in records]

    full = suite.add("m/full-precision", Model(), TASKS)
    suite.add("m/rtn-int3-g64", Model("rtn-int3-g64", 3, 0.02), TASKS, twin=full.name, edit=doubted)
    build_study(suite.write(), tmp_path / "site", replicates=REPLICATES)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    (pooled,) = [t for section in told["sections"] for t in section["tables"] if t["label"].startswith("All noises")]
    verdicts = [cell["verdict"] for cell in pooled["rows"][0]["cells"]]
    assert verdicts == ["worse", "tied", "tied", "tied"]
    (finding,) = told["findings"]
    assert finding["text"] == "rtn-int3-g64: low precision amplifies noise in some figures (accuracy)."
    assert finding["verdict"] == "worse" and "(amplified); ECE" in finding["figures"]


def test_a_whole_headline_names_no_figures() -> None:
    shifted, tied = (figure(shift, shift + np.linspace(-0.1, 0.1, 200)) for shift in (0.3, 0.0))
    whole = tell([Compared("a", shifted, 0.01), Compared("b", shifted, 0.04, note="of two")])
    assert (whole.verdict, whole.in_part) == ("better", []) and "finds" in whole.text and "of two)" in whole.text
    part = tell([Compared("a", shifted, 0.01, False), Compared("b", shifted, 0.06), Compared("c", tied, 0.9)])
    assert (part.verdict, part.in_part) == ("worse", ["a"])
    assert (tell([Compared("c", tied, 0.9)]).verdict, tell([]).verdict) == ("tied", "open")


def test_quantizations_stand_below_a_line_for_each_severity(grown: Any, tmp_path: Path) -> None:
    build_study(grown.write(), tmp_path / "site", replicates=50)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    (shown,) = [t for section in told["sections"] for t in section["tables"] if t["label"] == "By severity"]
    heads = [(row["head"], len(row["cells"])) for row in shown["rows"]]
    below = [("rtn-int8-g64", 4), ("rtn-int3-g64", 4)]
    assert heads == [("Severity 1", 0), *below, ("Severity 5", 0), *below]


def test_differences_in_differences_are_those_of_plain_numpy(
    grown: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    out = grown.write()
    (group,) = noise_groups(read_study(out), [], replicates=REPLICATES, seed=3)
    full, _, low = grown.cells
    effects = []
    spread = np.random.default_rng(0)
    clean_full, clean_low = (answers(out, cell, "block_vqav2_clean") for cell in (full, low))
    images = np.unique(clean_full.image)
    draws = spread.integers(0, images.size, (2000, images.size))
    drawn = []
    for task in NOISES:
        noisy_full, noisy_low = (answers(out, cell, task.name) for cell in (full, low))
        each = (noisy_low.score - clean_low.score) - (noisy_full.score - clean_full.score)
        effects.append(each.mean())
        assert group.effects[low.name][task.name]["accuracy"].value == pytest.approx(effects[-1])
        sums = np.array(
            [[each[clean_full.image == image].sum(), (clean_full.image == image).sum()] for image in images]
        )
        picked = sums[draws].sum(axis=1)
        drawn.append(picked[:, 0] / picked[:, 1])
    pooled = group.pooled(low.name, "accuracy")
    assert pooled is not None and pooled.value == pytest.approx(np.mean(effects))
    lo, hi = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    assert (pooled.lo, pooled.hi) == pytest.approx((lo, hi), abs=0.02)
    # AURC of one condition, by its definition: mean risk over every prefix of the ranking
    task = NOISES[0].name

    def aurc(cell: Any, name: str) -> float:
        found = answers(out, cell, name)
        risk = 1 - found.score[np.argsort(-found.confidence, kind="stable")]
        return float(np.mean(np.cumsum(risk) / np.arange(1, N + 1)))

    expected = (aurc(low, task) - aurc(full, task)) - (aurc(low, "block_vqav2_clean") - aurc(full, "block_vqav2_clean"))
    assert group.effects[low.name][task]["aurc"].value == pytest.approx(expected, abs=0.01)


def test_mqce_is_the_mean_quotient_of_errors(grown: Any, answers: Callable[..., Any], tmp_path: Path) -> None:
    out = grown.write()
    build_study(out, tmp_path / "site", replicates=REPLICATES)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    (table,) = [
        table for section in told["sections"] for table in section["tables"] if table["label"].endswith("(qCE)")
    ]
    full, _, low = grown.cells
    quotients = []
    for noise in ("gaussian_noise", "fog"):
        names = [f"block_vqav2_{noise}_{severity}" for severity in (1, 5)]
        errors = [sum(1 - answers(out, cell, name).score.mean() for name in names) for cell in (low, full)]
        quotients.append(errors[0] / errors[1])
    at = table["columns"].index("rtn-int3-g64") - 1
    assert table["rows"][0]["cells"][at]["value"] == pytest.approx(np.mean(quotients))
    assert table["rows"][0]["cells"][at]["verdict"] == "worse"
    by_noise = {row["head"]: row["cells"][at]["value"] for row in table["rows"]}
    assert [by_noise["gaussian noise"], by_noise["fog"]] == pytest.approx(quotients)


def test_equal_answers_differ_by_nothing(suite: Any, tmp_path: Path) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)

    def same(task: str, records: list[Any]) -> list[Any]:
        from run_folders import records as made

        known = {r.sample_id: r for r in made(Model(), next(t for t in TASKS if t.name == task))}
        keep = ("score", "confidence")
        return [r.model_copy(update={k: getattr(known[r.sample_id], k) for k in keep}) for r in records]

    suite.add("m/rtn-int8-g64", Model("rtn-int8-g64", 8), TASKS, twin=full.name, edit=same)
    (group,) = noise_groups(read_study(suite.write()), [], replicates=50, seed=0)
    for figures in group.effects["m/rtn-int8-g64"].values():
        for found in figures.values():
            assert (found.value, found.lo, found.hi) == (0, 0, 0)
            assert found.p_value() == 1


def test_other_pixels_are_no_pair(suite: Any) -> None:
    def repainted(task: str, records: list[Any]) -> list[Any]:
        if not task.endswith("fog_5"):
            return records
        return [r.model_copy(update={"pixel_hash": [blake("other")]}) for r in records]

    full = suite.add("m/full-precision", Model(), TASKS)
    suite.add("m/rtn-int4-g64", Model("rtn-int4-g64", 4, 0.1), TASKS, twin=full.name, edit=repainted)
    problems: list[Any] = []
    (group,) = noise_groups(read_study(suite.write()), problems, replicates=50, seed=0)
    assert set(group.effects["m/rtn-int4-g64"]) == {task.name for task in NOISES[:-1]}
    (problem,) = problems
    assert problem.level == "error" and f"{N} of {N} samples have other pixels" in problem.what


def test_a_noise_on_the_subset_stands_against_the_clean_answers_of_the_subset(
    suite: Any, answers: Callable[..., Any]
) -> None:
    """The first samples alone are noisy: the clean side of the difference is of those samples only."""
    few = noisy("fog", 5, n=60)
    tasks = [Task(n=N), few]
    full = suite.add("m/full-precision", Model(), tasks)
    low = suite.add("m/rtn-int3-g64", Model("rtn-int3-g64", 3, 0.4), tasks, twin=full.name)
    out = suite.write()
    (group,) = noise_groups(read_study(out), [], replicates=50, seed=0)
    clean = [answers(out, cell, "block_vqav2_clean").score[:60].mean() for cell in (low, full)]
    there = [answers(out, cell, few.name).score.mean() for cell in (low, full)]
    expected = (there[0] - there[1]) - (clean[0] - clean[1])
    assert group.effects[low.name][few.name]["accuracy"].value == pytest.approx(expected)


def test_adapters_and_caches_may_differ_in_a_planned_pair_and_batch_sizes_may_not(suite: Any) -> None:
    full = suite.add("m/full-precision", Model(), [Task()])
    low = suite.add("m/rtn-int4-g64", Model("rtn-int4-g64", 4, 0.1), [Task()], twin=full.name)
    out = suite.write()
    for folder, arguments in (
        (full.hash, "pretrained=x,batch_size=8,noise_cache=/a"),
        (low.hash, "pretrained=x,batch_size=8,noise_cache=/b,adapter=y"),
    ):
        (results,) = (out / "cells" / folder).rglob("*_results.json")
        told = json.loads(results.read_text())
        told["config"]["model_args"] = arguments
        results.write_text(json.dumps(told))
    study = read_study(out)
    assert Pairs([]).refusal(study.cells[1], study.cells[0], "block_vqav2_clean") == ""
    told["config"]["model_args"] = arguments.replace("batch_size=8", "batch_size=1")
    results.write_text(json.dumps(told))
    study = read_study(out)
    problems: list[Any] = []
    assert "batch" in Pairs(problems).refusal(study.cells[1], study.cells[0], "block_vqav2_clean")
    assert len(problems) == 1


def test_corrected_p_values_are_scipys() -> None:
    numbers = np.random.default_rng(1)
    found = [figure(shift, shift + numbers.normal(0, 1, 4000)) for shift in (0.1, 1.0, 2.0, 2.5, 3.0, 4.5)]
    plain = [2 * norm.sf(abs(one.value) / one.draws.std()) for one in found]
    assert [one.p_value() for one in found] == pytest.approx(plain)
    assert corrected(found) == pytest.approx(false_discovery_control(plain))
    assert found[1].p_value(1.0) == 1
    nothing = Figure(np.nan, np.nan, np.nan, np.full(10, np.nan))
    assert np.isnan(corrected([nothing, found[5]])[0]) and corrected([nothing, found[5]])[1] == pytest.approx(plain[5])
