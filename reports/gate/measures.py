"""The quantity that a rule asks for, on two runs and a task, with its bounds; or why it cannot be had.

The two runs must be a pair: one model in two states (a quantization against full precision, or against the one in the
field) under the same settings, on the same samples. Whatever is not whole is not measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bitquake.metrics import (
    METRICS,
    Metric,
    OrderedSamples,
    Samples,
    apply_thresholds,
    fit_thresholds,
    interval,
    replicate,
)
from bitquake.metrics import Run as Resampling
from bitquake.metrics.samples import FloatArray
from bitquake.metrics.transfer import exact_interval
from bitquake.reports.evaluation import samples_of
from bitquake.reports.gate.rules import TAG, Rule, TransferRule
from bitquake.reports.pairing import cell_differences, made_from, model_differences, run_name
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell, Inputs, Run
from bitquake.reports.schema import Unit

_ROUNDING = 1e-12


Bounds = Callable[[float], tuple[float, float, str]]
"""(lo, hi, note) of a quantity at a chance of error on each side."""


class Measured(NamedTuple):
    """A quantity and its bounds; candidate, baseline: what it is made of."""

    value: float
    bounds: Bounds
    n: int
    n_images: int
    unit: Unit = "percent"
    candidate: float | None = None
    baseline: float | None = None


@dataclass
class Asked:
    """A rule on a task; measured, or the reason why it cannot be."""

    index: int
    rule: Rule
    task: str
    reason: str = ""
    measured: Measured | None = None

    @property
    def limit(self) -> float:
        rule = self.rule
        if rule.flips is not None:
            return rule.flips.rate_at_most / 100
        if rule.transfer is not None:
            at_most, at_least = rule.transfer.realised_at_most, rule.transfer.coverage_at_least
            return (at_most if at_most is not None else at_least or 0.0) / 100
        return -rule.limit if rule.criterion == "may_fall" else rule.limit

    @property
    def bad(self) -> Literal["low", "high"]:
        """On which side of the limit values are bad."""
        rule = self.rule
        if rule.transfer is not None:
            return "low" if rule.transfer.realised_at_most is None else "high"
        return "low" if rule.criterion in ("may_fall", "at_least") else "high"

    @property
    def room(self) -> float:
        """From the limit to the best that the quantity can be (of a difference: to 0)."""
        rule = self.rule
        if rule.transfer is not None:
            return self.limit if self.bad == "high" else 1 - self.limit
        if rule.flips is not None or rule.criterion.startswith("may_"):
            return abs(self.limit)
        low, high = rule.of_metric.bounds
        return high - self.limit if self.bad == "low" else self.limit - low

    def within(self, bound: float) -> bool:
        """Whether a value lies within the limit."""
        slack = _ROUNDING if self.bad == "high" else -_ROUNDING
        return bound <= self.limit + slack if self.bad == "high" else bound >= self.limit + slack

    def fails_at(self, alpha: float) -> bool:
        """Whether the bound on the better side lies beyond the limit, at this chance of error."""
        assert self.measured is not None
        lo, hi, _ = self.measured.bounds(alpha)
        return not self.within(lo if self.bad == "high" else hi)


@dataclass
class GateRuns:
    """The two runs, and what is measured on them."""

    candidate_inputs: Inputs
    baseline_inputs: Inputs | None
    common_samples: bool
    replicates: int
    seed: int

    def __post_init__(self) -> None:
        self.candidate, self.candidate_problem = _only_run(self.candidate_inputs, "candidate")
        self.baseline: Run | None = None
        self.baseline_problem = ""
        if self.baseline_inputs is not None:
            self.baseline, self.baseline_problem = _only_run(self.baseline_inputs, "baseline")

    @property
    def names(self) -> list[str]:
        """Of the candidate and of the baseline."""
        return ["" if run is None else run_name(run) for run in (self.candidate, self.baseline)]

    @cached_property
    def no_pair(self) -> str:
        """Why the two models are no pair, or ""."""
        run, twin = self.candidate, self.baseline
        if self.candidate_problem or self.baseline_problem or run is None or twin is None:
            return self.candidate_problem or self.baseline_problem or "there is no baseline"
        for one, role in ((run, "candidate"), (twin, "baseline")):
            if one.card is None:
                what = "is missing" if one.card_hash else "was never written"
                return f"no pair: the {role}'s quant card {what}, so what ran is not known"
        assert run.card is not None and twin.card is not None
        if not made_from(run.card, twin.card) and not made_from(twin.card, run.card):
            return f"no pair: the candidate is made from {run.label}, the baseline from {twin.label}"
        differences = model_differences(run, twin)
        return f"no pair: candidate and baseline differ in {'; '.join(differences)}" if differences else ""

    def problems(self) -> list[Problem]:
        """What was wrong with the files, but for the cells, which are judged by themselves."""
        found = []
        for inputs in (self.candidate_inputs, self.baseline_inputs):
            if inputs is not None:
                cells = {cell.source for run in inputs.runs for cell in run.cells.values()}
                found += [p for p in inputs.problems if p.level == "error" and p.where not in cells]
        return sorted(set(found))

    def tasks(self, rule: Rule, tags: Mapping[str, Sequence[str]]) -> list[str]:
        """The tasks that a rule is about: named ones whether they are there or not, and those that match a pattern."""
        runs = [run for run in (self.candidate, self.baseline) if run is not None]
        there = sorted({task for run in runs for task, cell in run.cells.items() if not cell.is_threshold})
        found: dict[str, None] = {}
        for name in rule.tasks:
            if name.startswith(TAG):
                found |= dict.fromkeys(tags.get(name.removeprefix(TAG), ()))
            elif any(sign in name for sign in "*?["):
                found |= dict.fromkeys(task for task in there if fnmatchcase(task, name))
            else:
                found[name] = None
        return list(found)

    def measure(self, asked: Sequence[Asked]) -> None:
        """Measure what can be measured; bootstraps are shared by all rules on one task and confidence."""
        together: dict[tuple[str, str], list[Asked]] = {}
        for one in asked:
            together.setdefault((one.task, one.rule.confidence_name), []).append(one)
        for (task, confidence), ones in together.items():
            with_pair = [one for one in ones if one.rule.needs_baseline]
            alone = [one for one in ones if not one.rule.needs_baseline]
            self.measure_pair(task, confidence, with_pair)
            self.measure_alone(task, confidence, alone)

    def measure_alone(self, task: str, confidence: str, ones: Sequence[Asked]) -> None:
        if not ones:
            return
        cell, reason = _whole(self.candidate, task, "candidate", self.candidate_problem, self.common_samples)
        if cell is None:
            _refuse(ones, reason)
            return
        fitting: Samples | None = None
        no_fitting = ""
        if any(one.rule.of_metric.needs_threshold_split for one in ones):
            fitting, no_fitting = self.fitting(self.candidate, cell, confidence, "candidate")
        self.metrics(ones, [samples_of(cell, confidence)], [fitting], no_fitting)

    def measure_pair(self, task: str, confidence: str, ones: Sequence[Asked]) -> None:
        if not ones:
            return
        reason = self.no_pair
        cells: list[Cell] = []
        for run, role in ((self.candidate, "candidate"), (self.baseline, "baseline")):
            if not reason:
                cell, reason = _whole(run, task, role, "", self.common_samples)
                cells += [cell] if cell is not None else []
        if not reason:
            differences = cell_differences(*cells, common_samples=self.common_samples)
            reason = f"no pair on this task: {'; '.join(differences)}" if differences else ""
        if reason:
            _refuse(ones, reason)
            return
        candidate, baseline = _shared(*cells)
        pair = [samples_of(candidate, confidence), samples_of(baseline, confidence)]
        self.flips([one for one in ones if one.rule.flips is not None], *pair)
        self.transfers([one for one in ones if one.rule.transfer is not None], candidate, confidence, pair[0])
        metrics = [one for one in ones if one.rule.metric is not None]
        fitting: list[Samples | None] = [None, None]
        no_fitting = ""
        if any(one.rule.of_metric.needs_threshold_split for one in metrics):
            for i, (run, role) in enumerate(((self.candidate, "candidate"), (self.baseline, "baseline"))):
                if not no_fitting:
                    fitting[i], no_fitting = self.fitting(run, candidate, confidence, role)
            no_fitting = no_fitting or self.fitting_differs(candidate.threshold_task)
        self.metrics(metrics, pair, fitting, no_fitting)

    def fitting(self, run: Run | None, cell: Cell, confidence: str, role: str) -> tuple[Samples | None, str]:
        """A run's samples on the threshold split that belongs to a task, or why they cannot be used."""
        chosen, reason = _whole(run, cell.threshold_task, role, "", self.common_samples)
        if chosen is None:
            return None, f"threshold split: {reason}"
        if chosen.confidence_name != cell.confidence_name:
            return None, f"threshold split: {chosen.task} has another confidence, {chosen.confidence_name}"
        images = {answer.image_id for answer in cell.answers.values()}
        shared = sum(image in images for image in {answer.image_id for answer in chosen.answers.values()})
        if shared:
            return None, f"threshold split: {chosen.task} shares {shared} images with {cell.task}"
        return samples_of(chosen, confidence), ""

    def fitting_differs(self, task: str) -> str:
        assert self.candidate is not None and self.baseline is not None
        cells = self.candidate.cells[task], self.baseline.cells[task]
        differences = cell_differences(*cells, common_samples=self.common_samples)
        return f"threshold split: no pair on {task}: {'; '.join(differences)}" if differences else ""

    def metrics(
        self, ones: Sequence[Asked], samples: Sequence[Samples], fitting: Sequence[Samples | None], no_fitting: str
    ) -> None:
        """Metrics of the candidate, or of candidate and baseline on shared draws."""
        usable = []
        for one in ones:
            split = [each for each in fitting if each is not None and one.rule.of_metric.needs_threshold_split]
            if one.rule.of_metric.needs_threshold_split and no_fitting:
                one.reason = no_fitting
            elif one.rule.of_metric.needs_confidence and (missing := _no_confidence([*samples, *split], one.rule)):
                one.reason = missing
            else:
                usable.append(one)
        if not usable:
            return
        metrics = list(dict.fromkeys(one.rule.metric or "" for one in usable))
        runs = [
            Resampling(OrderedSamples(*each), None if chosen is None else OrderedSamples(*chosen))
            for each, chosen in zip(samples, fitting, strict=True)
        ]
        chosen = [METRICS[name] for name in metrics]
        values, draws = replicate(runs, chosen, replicates=self.replicates, seed=self.seed)
        for one in usable:
            m = metrics.index(one.rule.metric or "")
            one.measured = _measured(chosen[m], values[:, m], draws[:, m], runs[0].samples)
            if one.rule.metric == "accuracy":
                one.measured = _no_narrower(one.measured, [each.score for each in samples])

    def flips(self, ones: Sequence[Asked], candidate: Samples, baseline: Samples) -> None:
        if not ones:
            return
        right = [np.asarray(samples.score) >= 0.5 for samples in (candidate, baseline)]
        flipped = OrderedSamples((right[0] != right[1]).astype(np.float64), None, candidate.cluster)
        rate = METRICS["accuracy"]  # a mean
        values, draws = replicate([Resampling(flipped, None)], [rate], replicates=self.replicates, seed=self.seed)
        for one in ones:
            measured = _measured(rate, values[:, 0], draws[:, 0], flipped)
            one.measured = _no_narrower(measured, [flipped.score])

    def transfers(self, ones: Sequence[Asked], cell: Cell, confidence: str, candidate: Samples) -> None:
        """The baseline's thresholds on the candidate."""
        if not ones:
            return
        fitting, reason = self.fitting(self.baseline, cell, confidence, "baseline")
        for one in ones:
            missing = _no_confidence([candidate, *([fitting] if fitting is not None else [])], one.rule)
            one.reason = reason or missing
            if fitting is None or one.reason:
                continue
            assert one.rule.transfer is not None
            one.measured = self.transfer(one.rule.transfer, fitting, candidate)
            if math.isnan(one.measured.value):
                one.measured, one.reason = None, "nothing is answered: the threshold withholds every answer"

    def transfer(self, rule: TransferRule, fitting: Samples, candidate: Samples) -> Measured:
        chosen = fit_thresholds(fitting, [rule.risk / 100], replicates=self.replicates, seed=self.seed)

        def bounds(alpha: float) -> tuple[float, float, str]:
            found = apply_thresholds(chosen, [candidate], seed=self.seed, level=1 - 2 * alpha)[0][0]
            if rule.realised_at_most is None:
                return found.coverage_lo, found.coverage_hi, found.note
            return found.risk_lo, found.risk_hi, found.note

        found = apply_thresholds(chosen, [candidate], seed=self.seed)[0][0]
        value = found.coverage if rule.realised_at_most is None else found.risk_taken
        images = len(set(np.asarray(candidate.cluster).tolist()))
        return Measured(value, bounds, found.n, images, candidate=value)


def _measured(metric: Metric, values: FloatArray, draws: FloatArray, samples: OrderedSamples) -> Measured:
    """A metric of one run, or its difference: candidate minus baseline. values: (runs,); draws: (runs, replicates)."""
    own = [float(value) for value in np.clip(values, *metric.bounds)]
    low, high = metric.bounds
    value, spread, limits = own[0], draws[0], (low, high)
    if len(own) > 1:
        value, spread, limits = own[0] - own[1], draws[0] - draws[1], (low - high, high - low)

    def bounds(alpha: float) -> tuple[float, float, str]:
        return interval(value, spread, samples.n_clusters, 1 - 2 * alpha, limits)

    baseline = own[1] if len(own) > 1 else None
    return Measured(value, bounds, samples.n, samples.n_clusters, metric.unit, own[0], baseline)


def _no_narrower(measured: Measured, scores: Sequence[ArrayLike]) -> Measured:
    """A mean score with bounds no narrower than the exact binomial ones of as many independent samples, as in transfer.

    Resampling cannot see the errors that did not happen to occur: of 1 flip in 100 it would say at most 3 %. scores: of
    the run; of a difference those of candidate and baseline, whose losses and gains are bounded each by itself.
    """
    own = np.asarray(scores[0], dtype=np.float64)
    change = own - np.asarray(scores[1], dtype=np.float64) if len(scores) > 1 else own
    gained, lost, n = float(change.clip(min=0).sum()), float(-change.clip(max=0).sum()), change.size

    def bounds(alpha: float) -> tuple[float, float, str]:
        lo, hi, note = measured.bounds(alpha)
        if math.isnan(lo) or math.isnan(hi):
            return lo, hi, note
        least, most = exact_interval(gained, n, 1 - 2 * alpha)
        if len(scores) > 1:
            least, most = gained / n - exact_interval(lost, n, 1 - 2 * alpha)[1], most - lost / n
        return min(lo, least), max(hi, most), note

    return measured._replace(bounds=bounds)


def _refuse(ones: Sequence[Asked], reason: str) -> None:
    for one in ones:
        one.reason = reason


def _no_confidence(samples: Sequence[Samples], rule: Rule) -> str:
    if any(np.isnan(np.asarray(each.confidence)).all() for each in samples):
        return f"no answer has the confidence {rule.confidence_name}" if rule.confidence_name else "no confidence"
    return ""


def _only_run(inputs: Inputs, role: str) -> tuple[Run | None, str]:
    found = [run for run in inputs.runs if any(cell.answers for cell in run.cells.values())]
    if len(found) == 1:
        return found[0], ""
    names = ", ".join(run_name(run) for run in found)
    return None, f"the {role} must be one model, the folders hold {len(found)}: {names or 'none'}"


def _whole(run: Run | None, task: str, role: str, problem: str, common_samples: bool) -> tuple[Cell | None, str]:
    """A run's cell that can be used, or why there is none."""
    if run is None:
        return None, problem or f"there is no {role}"
    cell = run.cells.get(task)
    if cell is None:
        return None, f"the {role} has no result for {task}"
    if cell.damage and not (common_samples and cell.answers):
        return None, f"the {role}'s {task} is incomplete: {cell.damage}"
    return cell, ""


def _shared(candidate: Cell, baseline: Cell) -> tuple[Cell, Cell]:
    """Both cells on the samples that both hold."""
    if candidate.answers.keys() == baseline.answers.keys():
        return candidate, baseline
    shared = sorted(candidate.answers.keys() & baseline.answers.keys())
    restricted = [dataclasses.replace(c, answers={s: c.answers[s] for s in shared}) for c in (candidate, baseline)]
    return restricted[0], restricted[1]
