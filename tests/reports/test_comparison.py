"""The numbers of a report, against an independent reading of the sample files and an independent computation."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Runs, Task, noisy, standard_models, standard_tasks

from bitquake.metrics import METRICS, Samples, compare, evaluate
from bitquake.records import SampleRecord
from bitquake.reports import ReportResult, build
from bitquake.reports.schema import CellEntry

REPLICATES, SEED = 200, 3


class Lab:
    """A report of four models, and the samples as a plain reader of the files finds them."""

    def __init__(self, root: Path) -> None:
        runs = Runs(root / "results")
        self.folders = [runs.write(model, standard_tasks(90)) for model in standard_models()]
        self.result: ReportResult = build(
            self.folders, root / "site", artifacts=runs.artifacts, replicates=REPLICATES, seed=SEED
        )
        self.names = {run.id: run.quantization for run in self.result.report.runs}

    def samples(self, quantization: str, task: str) -> Samples:
        folder = {"BF16": "full-precision"}.get(quantization, quantization)
        [path] = (self.folders[0].parent / folder).rglob(f"*_samples_{task}.jsonl")
        found = [json.loads(line)["bitquake"] for line in path.read_text().splitlines()]
        found.sort(key=lambda record: record["sample_id"])
        return Samples(
            np.array([r["score"] for r in found]),
            np.array([r["confidence"]["joint"] for r in found]),
            np.array([r["image_id"] for r in found]),
        )

    def cell(self, quantization: str, task: str) -> CellEntry:
        [cell] = [c for c in self.result.report.cells if (self.names[c.run], c.task) == (quantization, task)]
        return cell


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


PLACES = [
    (quantization, task)
    for quantization in ("BF16", "rtn-int8-g64", "rtn-int3-g64")
    for task in ("block_vqav2_clean", "block_vqav2_contrast_5", "block_advqa_clean")
]


@pytest.mark.parametrize(("quantization", "task"), PLACES)
def test_values_and_differences_are_those_of_the_metrics_room(lab: Lab, quantization: str, task: str) -> None:
    """The shared pass of the report gives what each run and pair give by themselves."""
    samples, twin = lab.samples(quantization, task), lab.samples("BF16", task)
    has_threshold = task.startswith("block_vqav2")
    threshold = lab.samples(quantization, "block_vqav2_threshold") if has_threshold else None
    twin_threshold = lab.samples("BF16", "block_vqav2_threshold") if has_threshold else None
    options: dict[str, Any] = {"replicates": REPLICATES, "seed": SEED}
    values = evaluate(*samples, threshold=threshold, **options)
    differences = compare(samples, twin, candidate_threshold=threshold, baseline_threshold=twin_threshold, **options)
    cell = lab.cell(quantization, task)
    assert cell.metrics.keys() == METRICS.keys()
    for key, entry in cell.metrics.items():
        value = values[key]
        assert (entry.value is not None) == value.available, key
        if entry.value is not None:
            assert (entry.value, entry.lo, entry.hi) == pytest.approx((value.value, value.lo, value.hi)), key
        if quantization == "BF16" or differences[key].verdict == "unavailable":
            assert entry.difference is None
            continue
        assert entry.difference is not None
        expected = differences[key]
        found = entry.difference
        assert (found.delta, found.lo, found.hi) == pytest.approx((expected.delta, expected.lo, expected.hi)), key
        assert found.verdict == expected.verdict


def test_values_by_hand(lab: Lab) -> None:
    """Accuracy, Brier score and risk at a threshold, straight from their definitions."""
    samples = lab.samples("rtn-int3-g64", "block_vqav2_contrast_5")
    score, confidence = np.asarray(samples.score), np.asarray(samples.confidence)
    cell = lab.cell("rtn-int3-g64", "block_vqav2_contrast_5")
    assert cell.metrics["accuracy"].value == pytest.approx(sum(score) / 90)
    assert cell.metrics["brier"].value == pytest.approx(sum((confidence - score) ** 2) / 90)
    assert (cell.n, cell.n_clusters) == (90, 30)
    assert cell.curve[-1].coverage == 1
    for point in cell.curve:
        answered = [s for s, c in zip(score, confidence, strict=True) if c >= point.threshold - 1e-12]
        assert point.coverage == pytest.approx(len(answered) / 90)
        assert point.risk == pytest.approx(1 - sum(answered) / len(answered))


def test_reliability_bins_by_hand(lab: Lab) -> None:
    samples = lab.samples("BF16", "block_vqav2_clean")
    score, confidence = np.asarray(samples.score), np.asarray(samples.confidence)
    bins = lab.cell("BF16", "block_vqav2_clean").bins
    assert sum(b.count for b in bins) == 90
    for b in bins:
        inside = (confidence > b.lower) & (confidence <= b.upper)
        assert inside.sum() == b.count
        assert b.score == pytest.approx(score[inside].mean())
        assert b.confidence == pytest.approx(confidence[inside].mean())
        if b.lo is not None and b.hi is not None:
            assert score[inside].min() <= b.lo <= b.hi <= score[inside].max()
    wide = [b for b in bins if b.lo is not None and b.hi is not None and b.lo < b.score < b.hi]
    assert len(wide) >= 3


def test_bin_intervals_are_those_of_a_plain_cluster_bootstrap(lab: Lab) -> None:
    """Against drawing images with NumPy's own generator: the limits agree within the bootstrap's noise."""
    samples = lab.samples("BF16", "block_vqav2_clean")
    score, confidence, image = (np.asarray(part) for part in (samples.score, samples.confidence, samples.cluster))
    bins = lab.cell("BF16", "block_vqav2_clean").bins
    largest = max(bins, key=lambda b: b.count)
    members = [np.flatnonzero(image == name) for name in np.unique(image)]
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        inside = drawn[(confidence[drawn] > largest.lower) & (confidence[drawn] <= largest.upper)]
        means.append(score[inside].mean())
    lo, hi = np.quantile(means, [0.025, 0.975])
    assert largest.lo == pytest.approx(lo, abs=0.04)
    assert largest.hi == pytest.approx(hi, abs=0.04)


def test_the_mean_over_conditions(lab: Lab) -> None:
    tasks = [task.name for task in standard_tasks(1) if task.family == "block_vqav2" and task.variant != "threshold"]
    for summary in lab.result.report.summaries:
        if summary.family != "block_vqav2":
            continue
        assert summary.n_conditions == len(tasks) == 7
        for key, entry in summary.differences.items():
            deltas = [lab.cell(lab.names[summary.run], task).metrics[key].difference for task in tasks]
            assert entry.delta == pytest.approx(np.mean([d.delta for d in deltas if d]))
            assert entry.lo <= entry.delta <= entry.hi


def test_ranks_follow_the_loss_and_cover_what_cannot_be_told_apart(lab: Lab) -> None:
    ranks = {lab.names[s.run]: (s.rank_lo, s.rank_hi) for s in lab.result.report.summaries if s.family == "block_vqav2"}
    assert ranks["rtn-int3-g64"] == (3, 3)
    for low, high in ranks.values():
        assert low is not None and high is not None
        assert 1 <= low <= high <= 3
    aurc = {
        lab.names[s.run]: s.differences["aurc"].delta for s in lab.result.report.summaries if s.family == "block_vqav2"
    }
    order = [run.quantization for run in lab.result.report.runs]
    assert order == ["BF16", *sorted(aurc, key=lambda name: aurc[name])]


def test_equal_models_tie_and_share_the_first_rank(runs: Runs) -> None:
    tasks = [Task(variant="threshold"), Task(), noisy("fog", 3)]
    twin = runs.write(Model(), tasks)

    def copies(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        [path] = twin.rglob(f"*_samples_{task}.jsonl")
        same = [SampleRecord.model_validate(json.loads(line)["bitquake"]) for line in path.read_text().splitlines()]
        return [
            s.model_copy(update={"model_hash": f.model_hash, "card": f.card}) for s, f in zip(same, found, strict=True)
        ]

    others = [runs.write(Model(f"copy-{bits}", bits), tasks, edit=copies) for bits in (8, 4)]
    result = build([twin, *others], runs.root / "site", artifacts=runs.artifacts, replicates=50)
    paired = [cell for cell in result.report.cells if cell.pairing == "paired"]
    assert len(paired) == 4
    for cell in paired:
        for key, value in cell.metrics.items():
            assert value.difference is not None, key
            assert (value.difference.delta, value.difference.lo, value.difference.hi) == (0, 0, 0)
            assert value.difference.effect == "tied"
    assert {(s.rank_lo, s.rank_hi) for s in result.report.summaries} == {(1, 1)}


@pytest.mark.parametrize("key", ["phi_1", "phi_10", "phi_100"])
def test_effective_reliability_needs_the_threshold_run(lab: Lab, key: str) -> None:
    assert lab.cell("BF16", "block_vqav2_clean").metrics[key].value is not None
    missing = lab.cell("BF16", "block_advqa_clean").metrics[key]
    assert (missing.value, missing.note) == (None, "no complete block_advqa_threshold run")
    assert "block_advqa_threshold" in (lab.result.index.parent / "index.html").read_text()


def test_a_threshold_split_that_shares_images_is_refused(runs: Runs) -> None:
    tasks = [Task(variant="threshold"), Task()]

    def leak(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return [r.model_copy(update={"image_id": r.image_id.replace("threshold", "test")}) for r in found]

    folders = [runs.write(model, tasks, edit=leak) for model in (Model(), Model("rtn-int4-g64", 4))]
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20)
    assert "shares 20 images with block_vqav2_clean" in "\n".join(map(str, result.problems))
    for cell in result.report.cells:
        assert cell.metrics["phi_10"].value is None
        assert cell.metrics["accuracy"].value is not None


def test_failed_samples_score_zero_and_stay_in_the_denominator(runs: Runs) -> None:
    def fail(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        lost = {"failure": "model", "failure_detail": "out of memory", "score": 0.0, "confidence": {"joint": 0.99}}
        return [r.model_copy(update=lost if i < 15 else {"score": 1.0}) for i, r in enumerate(found)]

    result = build(
        [runs.write(Model(), [Task()], edit=fail)], runs.root / "site", artifacts=runs.artifacts, replicates=20
    )
    [cell] = result.report.cells
    assert cell.metrics["accuracy"].value == pytest.approx(45 / 60)
    assert cell.n_missing_confidence == 15  # whatever confidence stood there: a failed sample has none
    assert max(point.coverage for point in cell.curve) == pytest.approx(45 / 60)
    page = result.index.read_text()
    assert "model 15" in page
    assert "out of memory" in page


def test_csv_and_json_hold_the_same_numbers(lab: Lab) -> None:
    site = lab.result.index.parent
    rows = list(csv.DictReader((site / "report.csv").open()))
    report = json.loads((site / "report.json").read_text())
    assert len(rows) == len(report["cells"]) * (len(METRICS) + 1) == 4 * 8 * (len(METRICS) + 1)
    by_place = {(row["run"], row["task"], row["metric"]): row for row in rows}
    for cell, key in itertools.product(report["cells"], METRICS):
        row, entry = by_place[cell["run"], cell["task"], key], cell["metrics"][key]
        assert row["value"] == ("" if entry["value"] is None else repr(entry["value"]))
        assert (int(row["n"]), int(row["n_clusters"])) == (cell["n"], cell["n_clusters"])
        difference = entry["difference"]
        assert row["verdict"] == (difference["verdict"] if difference else "")
        for name in ("delta", "delta_lo", "delta_hi"):
            assert row[name] == ("" if difference is None else repr(difference[name.removeprefix("delta_")]))


def test_the_terminal_table(lab: Lab) -> None:
    table = lab.result.table
    assert max(map(len, table.splitlines())) <= 120, table
    [line] = [line for line in table.splitlines() if "rtn-int3-g64" in line and "3-3" in line]
    difference = lab.cell("rtn-int3-g64", "block_vqav2_clean").metrics["accuracy"].difference
    assert difference is not None
    shown = f"{100 * difference.delta:+.1f} ! [{100 * difference.lo:.1f},{100 * difference.hi:.1f}]".replace("-", "−")
    assert shown in line
