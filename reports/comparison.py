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

from bitquake.metrics import METRICS, Estimate, expected_ece_if_calibrated, interval, replicate
from bitquake.metrics import Run as Resampling
from bitquake.metrics.samples import FloatArray, OrderedSamples
from bitquake.noise import image_noises, text_noises
from bitquake.reports import flips, scores
from bitquake.reports.cards import card_entry
from bitquake.reports.conditions import Conditions
from bitquake.reports.confidences import confidence_entries
from bitquake.reports.diagrams import BINS, curve_points, reliability_diagram
from bitquake.reports.entries import LEVEL, difference_entry, estimate_entry
from bitquake.reports.evaluation import Splits, evaluate_runs, fitting_splits, samples_of
from bitquake.reports.interactions import interaction_entries
from bitquake.reports.mixtures import mixture_entries
from bitquake.reports.pairing import Group, quantization_name, run_name
from bitquake.reports.problems import Problem
from bitquake.reports.recalibration import Maps, recalibrated_entries
from bitquake.reports.robustness import robustness_entries
from bitquake.reports.runs import Cell, Run, public_name
from bitquake.reports.schema import (
    CellEntry,
    InteractionEntry,
    MixtureEntry,
    RobustnessEntry,
    RunEntry,
    ScoreEntry,
    SummaryEntry,
    TransferEntry,
    ValueEntry,
)
from bitquake.reports.transfer import Fitted, transfer_entries

SUMMARY_METRICS = ("accuracy", "aurc", "ece_15")
PARSE_FAILURES = ""
"""Stands beside the names of further scores, none of which is empty."""


@dataclass
class Numbers:
    """Entries of the report, in order."""

    runs: list[RunEntry] = field(default_factory=list)
    cells: list[CellEntry] = field(default_factory=list)
    summaries: list[SummaryEntry] = field(default_factory=list)
    transfers: list[TransferEntry] = field(default_factory=list)
    interactions: list[InteractionEntry] = field(default_factory=list)
    robustness: list[RobustnessEntry] = field(default_factory=list)
    mixtures: list[MixtureEntry] = field(default_factory=list)
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
    flips.adjust(numbers.cells)
    return numbers


def run_id(run: Run) -> str:
    """A name that is safe in a file name and in an anchor, and unique."""
    slug = re.sub(r"[^a-z0-9]+", "-", run_name(run).lower()).strip("-")[:60]
    return f"{slug}-{hashlib.blake2b(run.key.encode(errors='replace'), digest_size=4).hexdigest()}"


def _compare_group(
    group: Group, numbers: Numbers, replicates: int, seed: int, progress: Callable[[str], None] | None
) -> None:
    entries: list[CellEntry] = []
    transfers: list[TransferEntry] = []
    conditions: dict[tuple[str, str], dict[str, _Condition]] = {}
    kept = Conditions(replicates, seed)
    fitted, maps, splits = Fitted(replicates, seed), Maps(), Splits()
    twin = group.twin.key if group.twin else ""
    ids = {run.key: run_id(run) for run in group.runs}
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
            fitting, notes = fitting_splits(group, chosen, numbers.problems)
            samples = {key: samples_of(cell) for key, cell in chosen.items()}
            values, evaluation = evaluate_runs(
                samples, splits.of(fitting), notes, twin=twin, replicates=replicates, seed=seed
            )
            further = _evaluate_scores(chosen, numbers.scores, replicates, seed)
            confidences = confidence_entries(
                chosen, fitting, notes, evaluation, splits, twin=twin, replicates=replicates, seed=seed
            )
            recalibrated = recalibrated_entries(
                chosen, fitting, evaluation, maps, twin=twin, replicates=replicates, seed=seed
            )
            flipped = flips.flip_entries(chosen, twin=twin, replicates=replicates, seed=seed)
            transfers += transfer_entries(chosen, fitting, ids, fitted, twin=twin)
            for run in runs:
                entry = _cell_entry(group, run, cells[run.key], values[run.key], further[run.key], replicates, seed)
                entry.confidences = confidences[run.key]
                entry.recalibrated = recalibrated[run.key]
                entry.flips = flipped.get(run.key)
                entries.append(entry)
            if twin in chosen:
                kept.add(task, chosen, evaluation)
            if len(runs) > 1 and not _repeats_subset(first, group):
                few = evaluation.only(SUMMARY_METRICS)
                delta, spread = few.values[1:] - few.values[:1], few.draws[1:] - few.draws[:1]
                condition = _Condition(few.keys[1:], delta, spread, few.n_clusters)
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
    numbers.transfers += sorted(transfers, key=lambda t: (t.task, position[t.run]))  # stable: confidences, risks
    if len(group.runs) > 1 and progress:
        progress(f"{group.runs[0].label}: noises and shifts together")
    interactions = interaction_entries(kept, ids, twin=twin)
    numbers.interactions += sorted(interactions, key=lambda i: (i.world, i.family, position[i.run], i.kind, i.task))
    robustness = robustness_entries(kept, ids, twin=twin)
    numbers.robustness += sorted(robustness, key=lambda r: (r.world, r.family, position[r.run], r.noise))
    mixtures = mixture_entries(kept, group, fitted, ids, twin=twin)
    numbers.mixtures += sorted(mixtures, key=lambda m: (m.id_task, m.ood_task, position[m.run]))


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
                difference = difference_entry(metric, delta, spread, s.n_clusters)
            out[key][name] = estimate_entry(estimate, "", difference)
    return out


def _further(cell: Cell, name: str) -> list[float]:
    """One further score of each sample: 0 where it failed or has none."""
    if name == PARSE_FAILURES:
        return [float(answer.parse_failure) for answer in cell.answers.values()]
    return [answer.scores.get(name, 0.0) for answer in cell.answers.values()]


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
            if (entry := difference_entry(METRICS[name], float(delta[i]), draws[i], n_clusters))
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
    samples = samples_of(cell)
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
            "kind": "noise" if noise else "clean" if cell.is_clean else "shift",
            "noise": str(noise.get("name", cell.variant)) if noise else "",
            "noise_group": noise_group(str(noise.get("name", ""))) if noise else "",
            "severity": cell.severity,
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
            "curve": curve_points(score, confidence),
            "bins": reliability_diagram(samples, replicates, seed),
            "source": cell.source,
        }
    )


def noise_group(name: str) -> str:
    """``imagenet_c``, ``imagenet_c_extra``, ``camera`` or ``text``; ``other`` for a noise of another release."""
    if name in text_noises():
        return "text"
    known = image_noises().get(name)
    return known.group if known else "other"


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
