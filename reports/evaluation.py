"""Runs of a group on one task: their samples, their thresholds' samples, and metrics on shared bootstrap draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitquake.metrics import METRICS, Estimate, Metric, Replicates, Samples, interval, ranking_caution, replicate
from bitquake.metrics import Run as Resampling
from bitquake.metrics.samples import FloatArray, OrderedSamples
from bitquake.reports.entries import LEVEL, difference_entry, estimate_entry
from bitquake.reports.pairing import Group
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.schema import ValueEntry


def samples_of(cell: Cell, confidence: str = "", ids: Iterable[str] | None = None) -> Samples:
    """A cell's answers in the order of their ids; confidence: one of the further ones ("" for the primary one); ids:
    only these samples."""
    answers = cell.answers.values() if ids is None else [cell.answers[sample] for sample in ids]
    if confidence and confidence != cell.confidence_name:
        found = [answer.confidences.get(confidence) for answer in answers]
    else:
        found = [answer.confidence for answer in answers]
    return Samples(
        np.array([answer.score for answer in answers], dtype=np.float64),
        np.array([np.nan if value is None else value for value in found], dtype=np.float64),
        np.array([answer.image_id for answer in answers], dtype=str),
    )


def any_confidence(samples: Samples) -> bool:
    """Whether any sample has a confidence."""
    return not np.isnan(np.asarray(samples.confidence, dtype=np.float64)).all()


def further_confidences(cells: Iterable[Cell]) -> list[str]:
    """Names of the confidences beside the primary one that any sample has: the Selectors first."""
    found = {name for cell in cells for answer in cell.answers.values() for name in answer.confidences}
    return sorted(found, key=lambda name: (not name.startswith("selector"), name))


def fitting_splits(
    group: Group, cells: Mapping[str, Cell], problems: list[Problem]
) -> tuple[dict[str, Cell], dict[str, str]]:
    """Each run's cell that its threshold is fitted on, and for the runs without one why."""
    cell = next(iter(cells.values()))
    found = group.cells.get(cell.threshold_task, {})
    images = {answer.image_id for answer in cell.answers.values()}
    fitting: dict[str, Cell] = {}
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
            fitting[key] = threshold
    twin = group.twin.key if group.twin else ""
    if len(cells) > 1 and twin in notes:
        notes.update(dict.fromkeys(fitting, f"the full-precision run has none: {notes[twin]}"))
        fitting = {}
    return fitting, notes


class Splits:
    """Samples of threshold splits by run, task and confidence, each once: they hold what was fitted on them."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], OrderedSamples | None] = {}

    def of(self, fitting: Mapping[str, Cell], confidence: str = "") -> dict[str, OrderedSamples]:
        """By run key, of the runs whose split has the confidence ("": the primary one, there or not)."""
        out = {}
        for key, cell in fitting.items():
            place = (key, cell.task, confidence)
            if place not in self.found:
                samples = samples_of(cell, confidence)
                there = not confidence or any_confidence(samples)
                self.found[place] = OrderedSamples(*samples) if there else None
            if (split := self.found[place]) is not None:
                out[key] = split
        return out


@dataclass(frozen=True)
class Evaluation:
    """Metrics of runs on the same samples of one task and on the same draws.

    The first run is the twin of the others. values: (runs, metrics), cut to the metrics' bounds; draws: (runs,
    metrics, replicates).
    """

    keys: list[str]
    metrics: list[Metric]
    values: FloatArray
    draws: FloatArray
    n_clusters: int

    def only(self, names: Sequence[str]) -> Evaluation:
        """The same for a few metrics."""
        known = [metric.key for metric in self.metrics]
        at = [known.index(name) for name in names]
        chosen = [self.metrics[i] for i in at]
        return Evaluation(self.keys, chosen, self.values[:, at], self.draws[:, at], self.n_clusters)

    def of(self, keys: Sequence[str]) -> Replicates:
        """The values and draws of these runs, in this order."""
        rows = [self.keys.index(key) for key in keys]
        return Replicates(self.values[rows], self.draws[rows])


def evaluate_runs(
    samples: Mapping[str, Samples],
    fitting: Mapping[str, OrderedSamples],
    notes: Mapping[str, str],
    *,
    twin: str,
    replicates: int,
    seed: int,
    names: Sequence[str] = tuple(METRICS),
) -> tuple[dict[str, dict[str, ValueEntry]], Evaluation]:
    """Metrics of runs on the same samples, by run key and metric, each with its difference from the twin's.

    fitting: samples that a run's threshold is fitted on; notes: for the others why there are none. twin: key of the
    full-precision run, if it is among them; then it must be the first.
    """
    keys = list(samples)
    runs = [Resampling(OrderedSamples(*samples[key]), fitting.get(key)) for key in keys]
    metrics = [METRICS[name] for name in names]
    values, draws = replicate(runs, metrics, replicates=replicates, seed=seed)
    clipped = np.stack([np.clip(values[:, m], *metric.bounds) for m, metric in enumerate(metrics)], axis=1)
    out: dict[str, dict[str, ValueEntry]] = {key: {} for key in keys}
    for m, metric in enumerate(metrics):
        for r, key in enumerate(keys):
            s = runs[r].samples
            lo, hi, note = interval(values[r, m], draws[r, m], s.n_clusters, LEVEL, metric.bounds)
            if metric.needs_threshold_split:
                note = notes.get(key, note)
            if metric.needs_confidence and s.n_present == 0:
                note = "no sample has a confidence"
            estimate = Estimate(clipped[r, m], lo, hi, s.n, s.n_clusters, s.n_missing, note)
            difference = None
            if r > 0 and keys[0] == twin:
                delta, spread = clipped[r, m] - clipped[0, m], draws[r, m] - draws[0, m]
                difference = difference_entry(metric, delta, spread, s.n_clusters)
            out[key][metric.key] = estimate_entry(estimate, ranking_caution(metric.key, estimate), difference)
    return out, Evaluation(keys, metrics, clipped, draws, runs[0].samples.n_clusters)
