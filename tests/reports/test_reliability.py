"""Confidences, recalibration, flips, threshold transfer, interactions and mixtures of a report, computed once more."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Runs, Task, noisy
from scipy import optimize, stats

from bitquake.metrics import Samples, compare, evaluate, transfer
from bitquake.records import SampleRecord
from bitquake.reports import ReportResult, build
from bitquake.reports.confidences import FURTHER_METRICS
from bitquake.reports.figures import Figure, panels
from bitquake.reports.recalibration import RECALIBRATED_METRICS
from bitquake.reports.reliability_csv import to_reliability_csv
from bitquake.reports.schema import CellEntry, DifferenceEntry, TransferEntry, ValueEntry
from bitquake.reports.transfer_views import transfer_sentence

REPLICATES, SEED, N = 200, 5, 120
SELECTORS = ("selector", "selector_transfer")
MODELS = [
    Model(further=(*SELECTORS, "geometric_mean")),
    Model("rtn-int4-g64", 4, 0.25, 0.4, further=(*SELECTORS, "geometric_mean")),
    Model("rtn-int3-g64", 3, 0.7, 0.9, further=("selector", "geometric_mean")),
]
CLEAN, THRESHOLD, SHIFT = "block_vqav2_clean", "block_vqav2_threshold", "block_advqa_clean"
TASKS = [
    Task(variant="threshold", n=N),
    Task(n=N),
    noisy("gaussian_noise", 1, n=N),
    noisy("gaussian_noise", 4, n=N),
    noisy("contrast", 3, n=N),
    Task(family="block_advqa", difficulty=1.1, n=90, shift_from=CLEAN),
]
NOISES = ["block_vqav2_contrast_3", "block_vqav2_gaussian_noise_1", "block_vqav2_gaussian_noise_4"]
Records = dict[str, dict[str, Any]]


def mostly_hard(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
    """Scores of 0 and 1 but for every fifteenth answer, so that thresholds reach small risks."""
    return [r.model_copy(update={"score": float(r.score > 0)}) if i % 15 else r for i, r in enumerate(found)]


class Lab:
    """A report of three models, and the records as a plain reader of the files finds them, by sample id."""

    def __init__(self, root: Path, tasks: list[Task]) -> None:
        runs = Runs(root / "results")
        self.folders = [runs.write(model, tasks, edit=mostly_hard) for model in MODELS]
        self.result: ReportResult = build(
            self.folders, root / "site", artifacts=runs.artifacts, replicates=REPLICATES, seed=SEED
        )
        self.report = self.result.report
        self.names = {run.id: run.quantization for run in self.report.runs}
        self.site = root / "site"
        self.cache: dict[tuple[str, str], Records] = {}

    def records(self, quantization: str, task: str) -> Records:
        place = (quantization, task)
        if place not in self.cache:
            folder = self.folders[0].parent / {"BF16": "full-precision"}.get(quantization, quantization)
            [path] = folder.rglob(f"*_samples_{task}.jsonl")
            found = [json.loads(line)["bitquake"] for line in path.read_text().splitlines()]
            self.cache[place] = {r["sample_id"]: r for r in sorted(found, key=lambda r: r["sample_id"])}
        return self.cache[place]

    def samples(self, quantization: str, task: str, name: str = "joint") -> Samples:
        found = list(self.records(quantization, task).values())
        return Samples(
            np.array([r["score"] for r in found]),
            np.array([r["confidence"][name] for r in found]),
            np.array([r["image_id"] for r in found]),
        )

    def cell(self, quantization: str, task: str) -> CellEntry:
        [cell] = [c for c in self.report.cells if (self.names[c.run], c.task) == (quantization, task)]
        return cell

    def transfer(self, quantization: str, task: str, name: str, risk: float) -> TransferEntry:
        [entry] = [
            t
            for t in self.report.transfers
            if (self.names[t.run], t.task, t.confidence, t.risk_target) == (quantization, task, name, risk)
        ]
        return entry


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("reliability"), TASKS)


def limits(entry: ValueEntry) -> tuple[float | None, float | None, float | None]:
    return entry.value, entry.lo, entry.hi


@pytest.mark.parametrize("task", [CLEAN, "block_vqav2_contrast_3", SHIFT])
def test_every_confidence_stands_beside_the_primary_one(lab: Lab, task: str) -> None:
    """Values as ``evaluate`` gives them; differences as ``compare`` does, of two confidences on the same answers."""
    options: dict[str, Any] = {"metrics": list(FURTHER_METRICS), "replicates": REPLICATES, "seed": SEED}
    for model in MODELS:
        quantization = "BF16" if model.bits == 16 else model.quant
        cell = lab.cell(quantization, task)
        assert [entry.name for entry in cell.confidences] == [
            *sorted(set(model.further) & set(SELECTORS)),
            "geometric_mean",
        ]
        splits = {name: lab.samples(quantization, THRESHOLD, name) for name in ("joint", *model.further)}
        for entry in cell.confidences:
            own, primary = lab.samples(quantization, task, entry.name), lab.samples(quantization, task)
            values = evaluate(*own, threshold=splits[entry.name], **options)
            beside = compare(
                own, primary, candidate_threshold=splits[entry.name], baseline_threshold=splits["joint"], **options
            )
            assert entry.metrics.keys() == set(FURTHER_METRICS)
            for key in FURTHER_METRICS:
                v, b, found = values[key], beside[key], entry.beside[key]
                assert limits(entry.metrics[key]) == pytest.approx((v.value, v.lo, v.hi)), key
                assert (found.delta, found.lo, found.hi) == pytest.approx((b.delta, b.lo, b.hi)), key
            if quantization != "BF16":
                twin = lab.samples("BF16", task, entry.name)
                change = compare(own, twin, metrics=["aurc"], replicates=REPLICATES, seed=SEED)["aurc"]
                difference = entry.metrics["aurc"].difference
                assert difference is not None
                assert (difference.delta, difference.lo) == pytest.approx((change.delta, change.lo))


def nll(score: np.ndarray, z: np.ndarray) -> float:
    return float(np.sum(np.logaddexp(0, z) - score * z))


@pytest.mark.parametrize("source", ["own", "full-precision"])
def test_recalibration_is_the_likeliest_map_of_the_threshold_split(lab: Lab, source: str) -> None:
    quantization, task = "rtn-int3-g64", "block_vqav2_gaussian_noise_4"
    score, confidence, _ = lab.samples(quantization if source == "own" else "BF16", THRESHOLD)
    logit = np.log(confidence) - np.log1p(-np.asarray(confidence))
    temperature = optimize.minimize_scalar(lambda t: nll(score, logit / t), bounds=(0.05, 20), method="bounded").x
    scale, offset = optimize.minimize(lambda b: nll(score, b[0] * logit + b[1]), [1.0, 0.0], method="BFGS").x
    cell = lab.cell(quantization, task)
    found = {entry.method: entry for entry in cell.recalibrated if entry.source == source}
    assert found["temperature"].parameters["temperature"] == pytest.approx(temperature, rel=1e-3)
    assert list(found["platt"].parameters.values()) == pytest.approx([scale, offset], rel=1e-3, abs=1e-3)
    test = lab.samples(quantization, task)
    z = np.log(test.confidence) - np.log1p(-np.asarray(test.confidence))
    for method, mapped in (("temperature", z / temperature), ("platt", scale * z + offset)):
        after = test._replace(confidence=1 / (1 + np.exp(-mapped)))
        chosen: dict[str, Any] = {"metrics": list(RECALIBRATED_METRICS), "replicates": REPLICATES, "seed": SEED}
        values, changes = evaluate(*after, **chosen), compare(after, test, **chosen)
        for key in RECALIBRATED_METRICS:
            entry, v = found[method].metrics[key], values[key]
            assert limits(entry) == pytest.approx((v.value, v.lo, v.hi), rel=5e-3, abs=2e-3), key
            assert entry.difference is not None
            assert entry.difference.delta == pytest.approx(changes[key].delta, rel=5e-3, abs=2e-3)


def test_full_precision_has_its_own_maps_only(lab: Lab) -> None:
    assert {entry.source for entry in lab.cell("BF16", CLEAN).recalibrated} == {"own"}


def test_flips_and_their_tests_over_the_whole_world(lab: Lab) -> None:
    p_values, entries = [], []
    for cell in lab.report.cells:
        if cell.pairing == "twin":
            assert cell.flips is None
            continue
        quantization = lab.names[cell.run]
        now = np.asarray(lab.samples(quantization, cell.task).score) >= 0.5
        before = np.asarray(lab.samples("BF16", cell.task).score) >= 0.5
        lost, gained = int((before & ~now).sum()), int((~before & now).sum())
        assert cell.flips is not None
        found = cell.flips
        assert (found.right_to_wrong, found.wrong_to_right, found.n) == (lost, gained, len(now))
        assert found.rate == pytest.approx((lost + gained) / len(now))
        assert found.p_value == pytest.approx(stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1)
        assert found.odds_ratio == (pytest.approx(gained / lost) if gained and lost else None)
        assert sum(level.n for level in found.by_confidence) == len(now)
        assert sum(level.right_to_wrong for level in found.by_confidence) == lost
        p_values.append(found.p_value)
        entries.append(found)
    adjusted = stats.false_discovery_control(p_values)
    assert [entry.p_adjusted for entry in entries] == pytest.approx(adjusted)
    assert {entry.n_tests for entry in entries} == {len(entries)} == {2 * 5}
    for entry in entries:
        lost_more = entry.right_to_wrong > entry.wrong_to_right
        assert entry.effect == ("tied" if entry.p_adjusted >= 0.05 else "worse" if lost_more else "better")
    assert {entry.effect for entry in entries} >= {"tied", "worse"}


def threshold_by_hand(score: np.ndarray, confidence: np.ndarray, risk: float) -> float:
    """Of all thresholds that answer at most ``risk`` wrongly on average the one that answers most."""
    allowed = [t for t in confidence if np.mean(1 - score[confidence >= t]) <= risk + 1e-9]
    return min(allowed, default=np.inf)


@pytest.mark.parametrize("name", ["joint", "selector", "selector_transfer"])
def test_a_transferred_threshold_takes_the_risk_that_a_plain_count_finds(lab: Lab, name: str) -> None:
    places = itertools.product(["BF16", "rtn-int4-g64"], [CLEAN, NOISES[2], SHIFT], [0.01, 0.05, 0.10])
    seen = set()
    for quantization, task, risk in places:
        entry = lab.transfer(quantization, task, name, risk)
        score, confidence, _ = (np.asarray(part) for part in lab.samples("BF16", THRESHOLD, name))
        chosen = threshold_by_hand(score, confidence, risk)
        test = lab.samples(quantization, task, name)
        answered = np.asarray(test.confidence) >= chosen
        assert entry.threshold == (pytest.approx(chosen) if np.isfinite(chosen) else None)
        assert entry.n_answered == answered.sum()
        assert entry.coverage.value == pytest.approx(answered.mean())
        if answered.any():
            assert entry.risk.value == pytest.approx(np.mean(1 - np.asarray(test.score)[answered]))
        whole = transfer(lab.samples("BF16", THRESHOLD, name), test, risk, replicates=REPLICATES, seed=SEED)
        own = transfer(lab.samples(quantization, THRESHOLD, name), test, risk, replicates=REPLICATES, seed=SEED)
        assert entry.verdict == whole.verdict
        if answered.any():
            assert (entry.risk.lo, entry.risk.hi) == pytest.approx((whole.risk_lo, whole.risk_hi))
        assert (entry.coverage.lo, entry.coverage.hi) == pytest.approx((whole.coverage_lo, whole.coverage_hi))
        assert entry.own_coverage is not None and entry.own_coverage.value == pytest.approx(own.coverage)
        if entry.risk.lo is not None and entry.risk.hi is not None:
            expected = "kept" if entry.risk.hi <= risk else "broken" if entry.risk.lo > risk else "open"
            assert entry.verdict == expected
        seen.add(entry.verdict)
    assert "broken" in seen


def test_transfers_stand_for_each_run_and_task_that_has_the_confidence(lab: Lab) -> None:
    found = {(lab.names[t.run], t.confidence) for t in lab.report.transfers}
    assert found == {
        *itertools.product(["BF16", "rtn-int4-g64", "rtn-int3-g64"], ["joint", "selector"]),
        *itertools.product(["BF16", "rtn-int4-g64"], ["selector_transfer"]),
    }
    assert len(lab.report.transfers) == (3 * 2 + 2) * 5 * 3


def drawn(clusters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    names = np.unique(clusters)
    picked = rng.integers(0, len(names), len(names))
    return np.concatenate([np.flatnonzero(clusters == names[i]) for i in picked])


def test_the_interaction_with_noise_is_a_difference_of_paired_differences(lab: Lab) -> None:
    """Against a plain bootstrap that draws the same images for all four cells."""
    four = [np.asarray(lab.samples(q, task).score) for task in (NOISES[2], CLEAN) for q in ("rtn-int3-g64", "BF16")]
    images = np.asarray(lab.samples("BF16", CLEAN).cluster)
    combined = four[0] - four[1] - four[2] + four[3]
    [entry] = interactions(lab, "rtn-int3-g64", NOISES[2])
    found = entry.differences["accuracy"]
    assert entry.shared
    assert found.delta == pytest.approx(combined.mean())
    rng = np.random.default_rng(1)
    means = [combined[drawn(images, rng)].mean() for _ in range(2000)]
    assert (found.lo, found.hi) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_the_mean_interaction_is_that_of_its_noises(lab: Lab) -> None:
    for quantization in ("rtn-int4-g64", "rtn-int3-g64"):
        [mean] = interactions(lab, quantization, "")
        each = [interactions(lab, quantization, task)[0] for task in NOISES]
        for key, entry in mean.differences.items():
            assert entry.delta == pytest.approx(np.mean([e.differences[key].delta for e in each]))
            widths = [e.differences[key].hi - e.differences[key].lo for e in each]
            assert entry.hi - entry.lo <= max(widths) + 1e-9


def test_the_interaction_with_a_shift_has_the_spread_of_both_sets(lab: Lab) -> None:
    [entry] = interactions(lab, "rtn-int3-g64", SHIFT)
    assert (entry.kind, entry.shared, entry.family) == ("shift", False, "block_vqav2")
    rng = np.random.default_rng(2)
    parts, spreads = [], []
    for task in (SHIFT, CLEAN):
        loss = np.asarray(lab.samples("rtn-int3-g64", task).score) - np.asarray(lab.samples("BF16", task).score)
        images = np.asarray(lab.samples("BF16", task).cluster)
        parts.append(loss.mean())
        spreads.append(np.var([loss[drawn(images, rng)].mean() for _ in range(1000)]))
    found = entry.differences["accuracy"]
    assert found.delta == pytest.approx(parts[0] - parts[1])
    assert (found.hi - found.lo) / 3.92 == pytest.approx(np.sqrt(sum(spreads)), rel=0.25)


def interactions(lab: Lab, quantization: str, task: str) -> list[Any]:
    return [i for i in lab.report.interactions if (lab.names[i.run], i.task) == (quantization, task)]


def test_robustness_by_hand(lab: Lab) -> None:
    def accuracy(quantization: str, task: str) -> float:
        return float(np.mean(lab.samples(quantization, task).score))

    noises = {"contrast": NOISES[:1], "gaussian_noise": NOISES[1:]}
    for quantization in ("BF16", "rtn-int3-g64"):
        found = {r.noise: r for r in lab.report.robustness if lab.names[r.run] == quantization}
        expected = {}
        for noise, tasks in noises.items():
            relative = np.mean([accuracy(quantization, t) / accuracy(quantization, CLEAN) for t in tasks])
            error = sum(1 - accuracy(quantization, t) for t in tasks) / sum(1 - accuracy("BF16", t) for t in tasks)
            expected[noise] = (relative, error)
        expected[""] = tuple(np.mean([expected[noise] for noise in noises], axis=0))
        assert found.keys() == expected.keys()
        for noise, (relative, error) in expected.items():
            assert found[noise].relative.value == pytest.approx(relative)
            assert found[noise].quantization_error.value == pytest.approx(error)
            assert found[noise].relative.lo is not None and found[noise].quantization_error.lo is not None
        assert [found[n].severities for n in ("contrast", "gaussian_noise", "")] == [[3], [1, 4], [1, 3, 4]]
    full = [r for r in lab.report.robustness if lab.names[r.run] == "BF16"]
    assert all(limits(r.quantization_error) == (1, 1, 1) for r in full)


def test_a_noise_on_a_subset_is_compared_on_the_shared_samples(tmp_path: Path) -> None:
    subset = [TASKS[0], TASKS[1], noisy("gaussian_noise", 4, n=60), noisy("contrast", 3, n=N)]
    lab = Lab(tmp_path, subset)
    quantization, task = "rtn-int3-g64", NOISES[2]
    shared = sorted(lab.records("BF16", task))
    assert len(shared) == 60

    def accuracy(q: str, t: str) -> float:
        return float(np.mean([lab.records(q, t)[sample]["score"] for sample in shared]))

    [entry] = interactions(lab, quantization, task)
    expected = accuracy(quantization, task) - accuracy("BF16", task) - accuracy(quantization, CLEAN)
    assert entry.differences["accuracy"].delta == pytest.approx(expected + accuracy("BF16", CLEAN))
    [found] = [r for r in lab.report.robustness if (lab.names[r.run], r.noise) == (quantization, "gaussian_noise")]
    assert found.relative.value == pytest.approx(accuracy(quantization, task) / accuracy(quantization, CLEAN))


def test_mixtures_are_weighted_sums_of_their_two_tasks(lab: Lab) -> None:
    assert {(m.id_task, m.ood_task, m.confidence) for m in lab.report.mixtures} == {
        (CLEAN, SHIFT, "joint"),
        (CLEAN, SHIFT, "selector"),
    }
    for mixture in lab.report.mixtures:
        quantization, name = lab.names[mixture.run], mixture.confidence
        parts = [lab.samples(quantization, task, name) for task in (CLEAN, SHIFT)]
        score = np.concatenate([np.asarray(part.score) for part in parts])
        confidence = np.concatenate([np.asarray(part.confidence) for part in parts])
        fit = [np.asarray(part) for part in lab.samples("BF16", THRESHOLD, name)[:2]]
        chosen = threshold_by_hand(fit[0], fit[1], 0.05)
        assert [round(p.ood_share, 3) for p in mixture.points] == [0, 0.1, 0.25, 0.333, 0.5, 0.667, 0.75, 0.9, 1]
        for point in mixture.points:
            s = point.ood_share
            weight = np.concatenate([np.full(N, (1 - s) / N), np.full(90, s / 90)])
            assert point.metrics["accuracy"].value == pytest.approx(weight @ score)
            reached = [
                weight[confidence >= t].sum()
                for t in confidence
                if weight[confidence >= t] @ (1 - score[confidence >= t])
                <= (0.05 + 1e-9) * weight[confidence >= t].sum()
            ]
            assert point.metrics["coverage_at_risk_5"].value == pytest.approx(max(reached, default=0), abs=1e-9)
            answered = confidence >= chosen
            assert point.metrics["transfer_coverage_5"].value == pytest.approx(weight[answered].sum())
            assert weight[answered].sum() > 0
            taken = weight[answered] @ (1 - score[answered]) / weight[answered].sum()
            assert point.metrics["transfer_risk_5"].value == pytest.approx(taken)
    ends = next(m for m in lab.report.mixtures if (lab.names[m.run], m.confidence) == ("BF16", "joint")).points
    for end, task in ((ends[0], CLEAN), (ends[-1], SHIFT)):
        assert end.metrics["aurc"].value == pytest.approx(lab.cell("BF16", task).metrics["aurc"].value)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split()).replace("&#39;", "'")


def test_the_page_says_the_worst_promise_in_words_and_numbers(lab: Lab) -> None:
    text = text_of((lab.site / "block-vqav2_reliability.html").read_text())
    primary = [t for t in lab.report.transfers if t.confidence == "joint" and t.verdict == "broken"]
    worst = max(primary, key=lambda t: (t.risk.value or 0) - t.risk_target)
    assert worst.risk.value is not None and worst.risk.lo is not None and worst.risk.hi is not None
    numbers = f"{100 * worst.risk.value:.1f} % [{100 * worst.risk.lo:.1f}, {100 * worst.risk.hi:.1f}]"
    assert f"for at most {100 * worst.risk_target:g} % risk: in " in text
    assert f"{lab.names[worst.run]} really takes {numbers}" in text
    assert f"really takes {numbers}" in text_of((lab.site / "index.html").read_text())
    counts = {
        v: sum(t.confidence == "joint" and t.verdict == v for t in lab.report.transfers) for v in ("kept", "open")
    }
    assert f"{counts['kept']} are kept, {len(primary)} broken, {counts['open']} not decided" in text
    for title in (
        "Does a threshold keep its promise?",
        "Does a Selector know better?",
        "What if some of the questions are shifted?",
        "Is the quantized model more fragile?",
        "Which answers flip?",
        "Does recalibration carry over?",
    ):
        assert title in text


def test_a_risk_without_an_interval_is_no_silence(lab: Lab) -> None:
    entry = next(t for t in lab.report.transfers if t.verdict == "broken")
    run = next(run for run in lab.report.runs if run.id == entry.run)
    none = entry.risk.model_copy(update={"value": None, "lo": None, "hi": None})
    told = transfer_sentence(entry.model_copy(update={"risk": none, "verdict": "open"}), run, "fog 3")
    assert "give no interval" in told and "answers nothing" not in told
    assert "answers nothing" in transfer_sentence(
        entry.model_copy(update={"risk": none, "verdict": "empty"}), run, "fog 3"
    )


def test_no_text_of_the_csv_is_a_formula(lab: Lab) -> None:
    named = [t.model_copy(update={"confidence": "=1+1"}) for t in lab.report.transfers[:1]]
    rows = csv.DictReader(io.StringIO(to_reliability_csv(lab.report.model_copy(update={"transfers": named}))))
    assert {row["confidence"] for row in rows if row["about"] == "transfer"} == {"'=1+1"}


def test_every_number_of_the_tables_stands_with_its_interval(lab: Lab) -> None:
    page = (lab.site / "block-vqav2_reliability.html").read_text()
    tables = re.findall(r'<table class="pairs data">.*?</table>', page, re.S)
    assert len(tables) >= 10
    for table in tables:
        for value in re.findall(r"<td[^>]*>(?:(?!</td>).)*<b>(?:(?!</td>).)*</td>", table, re.S):
            if "adjusted" not in table:
                assert re.search(r"<small>\[[^\]]+\]</small>", value), value


def test_the_csv_holds_what_the_json_does(lab: Lab) -> None:
    rows = list(csv.DictReader((lab.site / "reliability.csv").open()))
    report = json.loads((lab.site / "report.json").read_text())
    kinds = {row["about"] for row in rows}
    assert kinds == {
        *("confidence", "beside", "recalibrated", "flips", "transfer"),
        *("interaction", "robustness", "mixture"),
    }
    risks = {(r["run"], r["task"], r["confidence"], r["metric"]): r["value"] for r in rows if r["about"] == "transfer"}
    for entry in report["transfers"]:
        key = (entry["run"], entry["task"], entry["confidence"], f"risk_{100 * entry['risk_target']:g}")
        assert risks[key] == ("" if entry["risk"]["value"] is None else repr(entry["risk"]["value"]))
    flips = {(r["run"], r["task"]): r["value"] for r in rows if (r["about"], r["metric"]) == ("flips", "p_adjusted")}
    for cell in report["cells"]:
        if cell["flips"]:
            assert flips[cell["run"], cell["task"]] == repr(cell["flips"]["p_adjusted"])
    assert sum(row["about"] == "mixture" for row in rows) == sum(
        len(point["metrics"]) for m in report["mixtures"] for point in m["points"]
    )


def test_old_records_have_no_further_confidences(runs: Runs) -> None:
    folders = [runs.write(model, TASKS[:3]) for model in (Model(), Model("rtn-int4-g64", 4, 0.3))]
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20)
    assert not any(cell.confidences for cell in result.report.cells)
    assert {t.confidence for t in result.report.transfers} == {"joint"}
    page = (runs.root / "site" / "block-vqav2_reliability.html").read_text()
    assert "Selector" not in page and "Does a threshold keep its promise?" in page


def test_without_a_threshold_run_the_page_says_why_nothing_was_carried_over(runs: Runs) -> None:
    folders = [runs.write(model, TASKS[1:3]) for model in MODELS[:2]]
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20)
    assert not result.report.transfers and not any(cell.recalibrated for cell in result.report.cells)
    text = text_of((runs.root / "site" / "block-vqav2_reliability.html").read_text())
    assert f"No threshold could be carried over: no complete {THRESHOLD} run." in text
    assert all(c.confidences[0].metrics["phi_10"].note for c in result.report.cells)


def test_without_a_twin_nothing_is_carried_over_or_compared(runs: Runs) -> None:
    result = build([runs.write(MODELS[1], TASKS)], runs.root / "site", artifacts=runs.artifacts, replicates=20)
    report = result.report
    assert not (report.transfers or report.interactions or report.robustness or report.mixtures)
    for cell in report.cells:
        assert cell.flips is None and {entry.name for entry in cell.confidences} == {*SELECTORS, "geometric_mean"}
        assert {entry.source for entry in cell.recalibrated} == {"own"}


def test_a_run_without_a_selector_stands_beside_one_that_has_it(lab: Lab) -> None:
    assert "selector_transfer" not in {e.name for e in lab.cell("rtn-int3-g64", CLEAN).confidences}
    assert "selector_transfer" in {e.name for e in lab.cell("rtn-int4-g64", CLEAN).confidences}


def test_confidences_that_are_none_are_missing(runs: Runs) -> None:
    """NaN, negative and over 1: as if the model had given none; of a failed sample too."""

    def spoil(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        bad = [float("nan"), -0.5, 1.5, None]
        return [
            r.model_copy(update={"confidence": {**r.confidence, "selector": bad[i]}}) if i < 4 else r
            for i, r in enumerate(found)
        ]

    folder = runs.write(MODELS[0], TASKS[1:2], edit=spoil)
    result = build([folder], runs.root / "site", artifacts=runs.artifacts, replicates=20)
    [cell] = result.report.cells
    assert {entry.name: entry.n_missing for entry in cell.confidences}["selector"] == 4


def test_panels_hold_no_more_lines_than_a_reader_can_tell_apart(lab: Lab) -> None:
    one = lab.report.runs[0]
    runs = [one.model_copy(update={"id": f"r{i}", "quantization": f"q{i}"}) for i in range(18)]
    seen: list[list[str]] = []

    def draw(chosen: Any, styles: Any) -> list[Figure]:
        assert sorted(styles.values()) == list(range(len(chosen)))
        seen.append([run.id for run in chosen])
        from markupsafe import Markup

        return [Figure("t", "", Markup("<svg/>"), ["Quantization"], [[run.quantization] for run in chosen])]

    found = panels(runs, draw)
    assert [len(ids) for ids in seen] == [8, 8, 4] and all(ids[0] == "r0" for ids in seen)
    assert sorted({i for ids in seen for i in ids}) == sorted(run.id for run in runs)
    assert all(len(panel.legend) == len(ids) for panel, ids in zip(found, seen, strict=True))


def test_differences_of_equal_runs_are_zero_and_tied(runs: Runs) -> None:
    twin = runs.write(MODELS[0], TASKS)

    def copies(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        [path] = twin.rglob(f"*_samples_{task}.jsonl")
        same = [SampleRecord.model_validate(json.loads(line)["bitquake"]) for line in path.read_text().splitlines()]
        return [
            s.model_copy(update={"model_hash": f.model_hash, "card": f.card}) for s, f in zip(same, found, strict=True)
        ]

    other = runs.write(Model("copy-8", 8, further=MODELS[0].further), TASKS, edit=copies)
    report = build([twin, other], runs.root / "site", artifacts=runs.artifacts, replicates=50).report
    zero: list[DifferenceEntry] = [d for i in report.interactions for d in i.differences.values()]
    for cell in report.cells:
        if cell.flips is not None:
            assert (cell.flips.rate, cell.flips.p_adjusted, cell.flips.effect) == (0, 1, "tied")
            zero += [v.difference for e in cell.confidences for v in e.metrics.values() if v.difference]
    assert len(zero) > 20
    assert all((d.delta, d.lo, d.hi, d.effect) == (0, 0, 0, "tied") for d in zero)
    assert all(limits(r.quantization_error) == (1, 1, 1) for r in report.robustness)
