"""From groups of runs to numbers: each with its interval, each difference paired on the same samples.

The runs of a group share their bootstrap draws in one pass, which gives what ``bitquake.metrics.evaluate`` and
``compare`` give for each run and pair by themselves, in a fraction of the time; and the draws of a family's conditions,
which are about the same images, can be averaged.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bitquake.metrics import (
    METRICS,
    Estimate,
    Metric,
    Samples,
    expected_ece_if_calibrated,
    ranking_caution,
    reliability_bins,
    risk_coverage_curve,
)
from bitquake.metrics.bootstrap import Run as Resampling
from bitquake.metrics.bootstrap import cluster_draws, interval, replicate
from bitquake.metrics.calibration import bin_index
from bitquake.metrics.samples import FloatArray, OrderedSamples
from bitquake.noise import image_noises, text_noises
from bitquake.reports import scores
from bitquake.reports.cards import card_entry
from bitquake.reports.pairing import Group, quantization_name, run_name
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell, Run, public_name
from bitquake.reports.schema import (
    BinEntry,
    CellEntry,
    CurvePoint,
    DifferenceEntry,
    Effect,
    RunEntry,
    ScoreEntry,
    SummaryEntry,
    ValueEntry,
)

LEVEL = 0.95
BINS = 15
CURVE_POINTS = 100
SUMMARY_METRICS = ("accuracy", "aurc", "ece_15")
PARSE_FAILURES = ""
"""Stands beside the names of further scores, none of which is empty."""
_DRAWS_AT_ONCE = 2**21


@dataclass
class Numbers:
    """Entries of the report, in order."""

    runs: list[RunEntry] = field(default_factory=list)
    cells: list[CellEntry] = field(default_factory=list)
    summaries: list[SummaryEntry] = field(default_factory=list)
    scores: dict[str, ScoreEntry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class _Condition:
    """Paired runs on one task: differences from the twin (runs, metrics) and their replicates, for the summary."""

    runs: list[str]
    delta: FloatArray
    draws: FloatArray
    n_clusters: int


def compare_groups(
    groups: Sequence[Group], *, replicates: int, seed: int, progress: Callable[[str], None] | None = None
) -> Numbers:
    """All numbers of the groups. ``progress`` is told each task before its bootstrap."""
    numbers = Numbers()
    for group in groups:
        _compare_group(group, numbers, replicates, seed, progress)
    return numbers


def run_id(run: Run) -> str:
    """A name that is safe in a file name and in an anchor, and unique."""
    slug = re.sub(r"[^a-z0-9]+", "-", run_name(run).lower()).strip("-")[:60]
    return f"{slug}-{hashlib.blake2b(run.key.encode(errors='replace'), digest_size=4).hexdigest()}"


def _compare_group(
    group: Group, numbers: Numbers, replicates: int, seed: int, progress: Callable[[str], None] | None
) -> None:
    entries: list[CellEntry] = []
    conditions: dict[tuple[str, str], dict[str, _Condition]] = {}
    for task, cells in group.cells.items():
        first = next(iter(cells.values()))
        if first.is_threshold:
            continue
        if progress:
            progress(f"{group.runs[0].label}: {task}")
        paired = [
            run for run in group.runs if run.key in cells and (run.key, task) not in group.unpaired and group.twin
        ]
        alone = [run for run in group.runs if run.key in cells and run not in paired]
        for runs in ([paired] if paired else []) + [[run] for run in alone]:
            chosen = {run.key: cells[run.key] for run in runs}
            fitting, notes = _thresholds(group, chosen, numbers.problems)
            values, condition = _evaluate(chosen, fitting, notes, replicates, seed)
            further = _evaluate_scores(chosen, numbers.scores, replicates, seed)
            for run in runs:
                cell = cells[run.key]
                entries.append(_cell_entry(group, run, cell, values[run.key], further[run.key], replicates, seed))
            if len(runs) > 1 and condition is not None and not _repeats_subset(first, group):
                conditions.setdefault((first.world, first.family), {})[task] = condition
    summaries = [
        summary
        for (world, family), by_task in sorted(conditions.items())
        for summary in _summarise(group, world, family, by_task)
    ]
    order = _order(group, summaries)
    numbers.runs += [_run_entry(group, run) for run in order]
    position = {run_id(run): index for index, run in enumerate(order)}
    numbers.cells += sorted(entries, key=lambda cell: (cell.world, cell.family, cell.task, position[cell.run]))
    numbers.summaries += sorted(summaries, key=lambda s: (s.world, s.family, position[s.run]))


def _repeats_subset(cell: Cell, group: Group) -> bool:
    """A noise on the whole split counts in no mean that holds the same noise on the subset already."""
    return cell.is_full and cell.task.removesuffix("_full") in group.cells


def _order(group: Group, summaries: Sequence[SummaryEntry]) -> list[Run]:
    """The twin, then the best retention of reliability first: by the mean change of AURC, or else of accuracy."""

    def loss(run: Run) -> tuple[float, float]:
        own = [summary.differences for summary in summaries if summary.run == run_id(run)]
        aurc = [d["aurc"].delta for d in own if "aurc" in d]
        accuracy = [-d["accuracy"].delta for d in own if "accuracy" in d]
        bits = run.card.effective_bpw if run.card else 0.0
        return (float(np.mean(aurc or accuracy)) if aurc or accuracy else np.inf, -bits)

    return sorted(group.runs, key=lambda run: (run is not group.twin, *loss(run)))


def _samples(cell: Cell) -> Samples:
    answers = cell.answers.values()
    return Samples(
        np.array([answer.score for answer in answers], dtype=np.float64),
        np.array([np.nan if a.confidence is None else a.confidence for a in answers], dtype=np.float64),
        np.array([answer.image_id for answer in answers], dtype=str),
    )


def _thresholds(
    group: Group, cells: Mapping[str, Cell], problems: list[Problem]
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Each run's samples that its threshold is fitted on, and for the runs without them why."""
    cell = next(iter(cells.values()))
    found = group.cells.get(cell.threshold_task, {})
    images = {answer.image_id for answer in cell.answers.values()}
    fitting: dict[str, Samples] = {}
    notes: dict[str, str] = {}
    for key in cells:
        threshold = found.get(key)
        if threshold is None:
            notes[key] = f"no complete {cell.threshold_task} run"
        elif (threshold.world, threshold.confidence_name) != (cell.world, cell.confidence_name):
            notes[key] = f"{threshold.task} has another confidence: {threshold.confidence_name}"
        elif len(cells) > 1 and (key, threshold.task) in group.unpaired:
            notes[key] = f"{threshold.task} was refused as a pair"
        elif shared := images & {answer.image_id for answer in threshold.answers.values()}:
            notes[key] = f"{threshold.task} shares {len(shared)} images with {cell.task}"
            fix = "a threshold must be fitted on other images; Φ is left out"
            problem = Problem("error", threshold.source, notes[key], fix)
            if problem not in problems:
                problems.append(problem)
        else:
            fitting[key] = _samples(threshold)
    twin = group.twin.key if group.twin else ""
    if len(cells) > 1 and twin in notes:
        notes.update(dict.fromkeys(fitting, f"the full-precision run has none: {notes[twin]}"))
        fitting = {}
    return fitting, notes


def _evaluate(
    cells: Mapping[str, Cell], fitting: Mapping[str, Samples], notes: Mapping[str, str], replicates: int, seed: int
) -> tuple[dict[str, dict[str, ValueEntry]], _Condition | None]:
    """Every metric of runs on the same samples; the first is the twin of the others."""
    keys = list(cells)
    runs = [
        Resampling(OrderedSamples(*_samples(cells[key])), OrderedSamples(*fitting[key]) if key in fitting else None)
        for key in keys
    ]
    metrics = list(METRICS.values())
    values, draws = replicate(runs, metrics, replicates=replicates, seed=seed)
    clipped = np.stack([np.clip(values[:, m], *metric.bounds) for m, metric in enumerate(metrics)], axis=1)
    out: dict[str, dict[str, ValueEntry]] = {key: {} for key in keys}
    for m, metric in enumerate(metrics):
        for r, key in enumerate(keys):
            samples = runs[r].samples
            lo, hi, note = interval(values[r, m], draws[r, m], samples.n_clusters, LEVEL, metric.bounds)
            if metric.needs_threshold_split:
                note = notes.get(key, note)
            if metric.needs_confidence and samples.n_present == 0:
                note = "no sample has a confidence"
            estimate = Estimate(clipped[r, m], lo, hi, samples.n, samples.n_clusters, samples.n_missing, note)
            difference = None
            if r > 0:
                difference = _difference(
                    metric, clipped[r, m] - clipped[0, m], draws[r, m] - draws[0, m], samples.n_clusters
                )
            out[key][metric.key] = _value(estimate, ranking_caution(metric.key, estimate), difference)
    if len(keys) < 2:
        return out, None
    chosen = [list(METRICS).index(name) for name in SUMMARY_METRICS]
    delta, spread = clipped[1:, chosen] - clipped[:1, chosen], draws[1:, chosen] - draws[:1, chosen]
    return out, _Condition(keys[1:], delta, spread, runs[0].samples.n_clusters)


def _evaluate_scores(
    cells: Mapping[str, Cell], known: dict[str, ScoreEntry], replicates: int, seed: int
) -> dict[str, dict[str, ValueEntry]]:
    """Run key -> the further scores of runs on the same samples, and under ``PARSE_FAILURES`` the rate of those.

    Each is a mean over all samples with the intervals of ``accuracy``; the first run is the twin of the others.
    """
    held = {key: {name for answer in cell.answers.values() for name in answer.scores} for key, cell in cells.items()}
    names = [PARSE_FAILURES, *scores.further(set().union(*held.values()))]
    entries = [scores.describe(name) for name in names[1:]]
    known |= {entry.key: entry for entry in entries}
    better = [False, *(entry.higher_is_better for entry in entries)]
    runs = [
        Resampling(OrderedSamples(_further(cell, name), None, [a.image_id for a in cell.answers.values()]), None)
        for name in names
        for cell in cells.values()
    ]
    mean = METRICS["accuracy"]
    values, draws = replicate(runs, [mean], replicates=replicates, seed=seed)
    out: dict[str, dict[str, ValueEntry]] = {key: {} for key in cells}
    for i, name in enumerate(names):
        twin = i * len(cells)
        for at, key in enumerate(cells, start=twin):
            s = runs[at].samples
            lo, hi, note = interval(values[at, 0], draws[at, 0], s.n_clusters, LEVEL, mean.bounds)
            there = name == PARSE_FAILURES or name in held[key]
            estimate = Estimate(
                values[at, 0] if there else np.nan, lo, hi, s.n, s.n_clusters, 0, note if there else "no answer has it"
            )
            difference = None
            if at > twin and there and names[i] in (PARSE_FAILURES, *held[next(iter(cells))]):
                metric = replace(mean, higher_is_better=better[i])
                delta, spread = values[at, 0] - values[twin, 0], draws[at, 0] - draws[twin, 0]
                difference = _difference(metric, delta, spread, s.n_clusters)
            out[key][name] = _value(estimate, "", difference)
    return out


def _further(cell: Cell, name: str) -> list[float]:
    """One further score of each sample: 0 where it failed or has none."""
    if name == PARSE_FAILURES:
        return [float(answer.parse_failure) for answer in cell.answers.values()]
    return [answer.scores.get(name, 0.0) for answer in cell.answers.values()]


def _value(estimate: Estimate, caution: str, difference: DifferenceEntry | None) -> ValueEntry:
    if not estimate.available:
        return ValueEntry(value=None, lo=None, hi=None, note=estimate.note, difference=difference)
    return ValueEntry(
        value=float(estimate.value),
        lo=float(estimate.lo),
        hi=float(estimate.hi),
        note=estimate.note,
        caution=caution,
        difference=difference,
    )


def _difference(metric: Metric, delta: float, draws: FloatArray, n_clusters: int) -> DifferenceEntry | None:
    width = metric.bounds[1] - metric.bounds[0]
    lo, hi, _ = interval(delta, draws, n_clusters, LEVEL, (-width, width))
    if np.isnan(lo) or np.isnan(hi) or np.isnan(delta):
        return None
    verdict = "higher" if lo > 0 else "lower" if hi < 0 else "tied"
    effect: Effect = "tied"
    if verdict != "tied":
        better = metric.higher_is_better
        effect = "changed" if better is None else "better" if (verdict == "higher") == better else "worse"
    return DifferenceEntry.model_validate(
        {"delta": float(delta), "lo": lo, "hi": hi, "verdict": verdict, "effect": effect}
    )


def _summarise(group: Group, world: str, family: str, by_task: Mapping[str, _Condition]) -> list[SummaryEntry]:
    """Mean differences over the conditions; ranks where all runs stand in all conditions."""
    entries = []
    mean_draws: dict[str, FloatArray] = {}
    ids = {run.key: run_id(run) for run in group.runs}
    for run in group.runs:
        own = [(c, c.runs.index(run.key)) for c in by_task.values() if run.key in c.runs]
        if not own:
            continue
        delta = np.mean([c.delta[i] for c, i in own], axis=0)
        draws = np.mean([c.draws[i] for c, i in own], axis=0)
        n_clusters = min(c.n_clusters for c, _ in own)
        differences = {
            name: entry
            for i, name in enumerate(SUMMARY_METRICS)
            if (entry := _difference(METRICS[name], float(delta[i]), draws[i], n_clusters))
        }
        if "aurc" in differences and len(own) == len(by_task):
            mean_draws[ids[run.key]] = draws[SUMMARY_METRICS.index("aurc")]
        found = {"run": ids[run.key], "world": world, "family": family, "n_conditions": len(own)}
        entries.append(SummaryEntry.model_validate({**found, "differences": differences}))
    if len(mean_draws) > 1:
        stacked = np.stack(list(mean_draws.values()))
        # Ties share the better rank: a range then says what cannot be told apart.
        ranks = 1 + (stacked[None, :, :] < stacked[:, None, :]).sum(axis=1)
        low, high = np.quantile(ranks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1, method="inverted_cdf")
        position = {run: index for index, run in enumerate(mean_draws)}
        for summary in entries:
            if summary.run in position:
                at = position[summary.run]
                summary.rank_lo, summary.rank_hi = int(low[at]), int(high[at])
    return entries


def _cell_entry(
    group: Group,
    run: Run,
    cell: Cell,
    metrics: dict[str, ValueEntry],
    further: dict[str, ValueEntry],
    replicates: int,
    seed: int,
) -> CellEntry:
    samples = _samples(cell)
    score, confidence = np.asarray(samples.score), np.asarray(samples.confidence)
    present = confidence[~np.isnan(confidence)]
    noise = cell.noise or {}
    shared = {name for other in group.cells[cell.task].values() for a in other.answers.values() for name in a.scores}
    headline = scores.headline(cell.protocol, sorted(shared))
    reason = group.unpaired.get((run.key, cell.task), "" if group.twin else group.refused)
    return CellEntry.model_validate(
        {
            "run": run_id(run),
            "world": cell.world,
            "family": cell.family,
            "variant": cell.variant,
            "task": cell.task,
            "kind": "noise" if noise else "clean" if cell.variant == "clean" else "shift",
            "noise": str(noise.get("name", cell.variant)) if noise else "",
            "noise_group": noise_group(str(noise.get("name", ""))) if noise else "",
            "severity": _severity(noise),
            "full": cell.is_full,
            "dataset": public_name(cell.dataset),
            "dataset_revision": cell.dataset_revision,
            "split": cell.split,
            "part": cell.part,
            "shift_from": cell.shift_from,
            "threshold_task": cell.threshold_task,
            "protocol": cell.protocol,
            "headline": headline.title,
            "headline_unit": headline.unit,
            "pairing": "twin" if run is group.twin else "unpaired" if reason else "paired",
            "reason": reason,
            "common": group.common.get(cell.task, "") if not reason else "",
            "n": len(score),
            "n_clusters": len(set(np.asarray(samples.cluster).tolist())),
            "n_missing_confidence": int(np.isnan(confidence).sum()),
            "confidence_name": cell.confidence_name,
            "failures": cell.failures,
            "failure_details": cell.failure_details,
            "parse_failures": cell.parse_failures,
            "truncated": cell.truncated,
            "metrics": metrics,
            "scores": {name: value for name, value in further.items() if name != PARSE_FAILURES},
            "parse_failure_rate": further[PARSE_FAILURES],
            "chance_ece": expected_ece_if_calibrated(present, bins=BINS) if present.size else None,
            "curve": _curve(score, confidence),
            "bins": _bins(samples, replicates, seed),
            "source": cell.source,
        }
    )


def noise_group(name: str) -> str:
    """``imagenet_c``, ``imagenet_c_extra``, ``camera`` or ``text``; ``other`` for a noise of another release."""
    if name in text_noises():
        return "text"
    known = image_noises().get(name)
    return known.group if known else "other"


def _severity(noise: Mapping[str, str | int]) -> int:
    try:
        return int(noise.get("severity", 0))
    except ValueError:
        return 0


def _curve(score: FloatArray, confidence: FloatArray) -> list[CurvePoint]:
    """The risk-coverage curve at about each percent of coverage, the first and the last point included."""
    curve = risk_coverage_curve(score, confidence)
    if curve.coverage.size == 0:
        return []
    grid = np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS
    last = np.searchsorted(curve.coverage, grid + 1e-9, side="right") - 1
    kept = np.unique(np.concatenate([[0], last[last >= 0], [curve.coverage.size - 1]]))
    return [
        CurvePoint(coverage=float(curve.coverage[i]), risk=float(curve.risk[i]), threshold=float(curve.threshold[i]))
        for i in kept
    ]


def _bins(samples: Samples, replicates: int, seed: int) -> list[BinEntry]:
    """Reliability bins that hold samples, with the clustered bootstrap interval of their mean score."""
    ordered = OrderedSamples(*samples)
    n = ordered.n_present
    if n == 0 or ordered.n_clusters < 2:
        return []
    features = np.zeros((ordered.n, 2 * BINS))
    rows, which = np.arange(n), bin_index(ordered.confidence[:n], BINS)
    features[rows, which] = 1.0
    features[rows, BINS + which] = ordered.score[:n]
    totals = ordered.per_cluster(features)
    at_once = max(1, _DRAWS_AT_ONCE // ordered.n_clusters)
    sums = np.concatenate([c @ totals for c in cluster_draws(ordered.n_clusters, replicates, at_once, seed, stream=0)])
    lower, upper, count, mean_confidence, mean_score, _ = reliability_bins(
        np.asarray(samples.score), np.asarray(samples.confidence), bins=BINS
    )
    entries = []
    for b in np.flatnonzero(count):
        weight = sums[:, b]
        drawn = weight > 0
        limits: list[float] | None = None
        # A bin that many replicates miss has too few images for an interval.
        if drawn.mean() >= LEVEL and count[b] > 1:
            limits = np.quantile(sums[drawn, BINS + b] / weight[drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        entries.append(
            BinEntry(
                lower=float(lower[b]),
                upper=float(upper[b]),
                count=int(count[b]),
                confidence=float(mean_confidence[b]),
                score=float(mean_score[b]),
                lo=limits[0] if limits else None,
                hi=limits[1] if limits else None,
            )
        )
    return entries


def _run_entry(group: Group, run: Run) -> RunEntry:
    role = "unknown" if run.card is None else "full-precision" if run.is_full_precision else "quantized"
    return RunEntry.model_validate(
        {
            "id": run_id(run),
            "name": run_name(run),
            "label": run.label,
            "quantization": quantization_name(run.card) if run.card else "unknown",
            "role": role,
            "twin": run_id(group.twin) if group.twin and run is not group.twin else None,
            "refused": group.refused,
            "model_hash": run.model_hash,
            "card_hash": run.card_hash,
            "card": card_entry(run.card) if run.card else None,
            "commands": run.commands,
        }
    )
