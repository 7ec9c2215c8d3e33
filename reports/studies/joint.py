"""Cells of a study side by side: who may be compared with whom, and their metrics on one draw of images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from bitquake.metrics import METRICS, Figure, Samples, benjamini_hochberg, figure, mean_figure, replicate_jointly
from bitquake.metrics import Run as Resampling
from bitquake.metrics.samples import OrderedSamples
from bitquake.reports.conditions import Part
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import Evaluation, samples_of
from bitquake.reports.pairing import cell_differences, model_differences
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.studies.study import StudyCell

STUDY_METRICS = ("accuracy", "ece_15", "coverage_at_risk_5", "aurc")
"""What every study asks: how often right, does it know, how much can it answer at 5 % risk, how well ranked."""

METRIC_WORDS = {"accuracy": "accuracy", "ece_15": "ECE", "coverage_at_risk_5": "C@5%", "aurc": "AURC"}
"""What they are called in a sentence."""

# What a plan says and the two sides of its pairs may differ in: a trained adapter is what is compared.
_PLANNED = ("model argument adapter ", "adapter ")


_Key = TypeVar("_Key", bound=Hashable)


class Pairs:
    """Decides, cell by cell and task by task, whether two cells of a plan answered the same samples the same way."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self._found: dict[tuple[str, str, str], str] = {}

    def refusal(self, cell: StudyCell, baseline: StudyCell, task: str) -> str:
        """Why the two are no pair on a task that both answered, or ""; a refusal is a problem of the page."""
        key = (cell.plan.hash, baseline.plan.hash, task)
        if key not in self._found:
            assert cell.run is not None and baseline.run is not None
            found = cell_differences(cell.tasks[task], baseline.tasks[task])
            if cell.card is not None and baseline.card is not None:
                found = [*model_differences(cell.run, baseline.run), *found]
            self._found[key] = "; ".join(one for one in found if not one.startswith(_PLANNED))
            if self._found[key]:
                what = f"{task} refused as a pair with {baseline.name}: {self._found[key]}"
                fix = "run both again in the same environment, with the same settings and samples"
                self.problems.append(Problem("error", cell.name, what, fix))
        return self._found[key]

    def on(self, task: str, baseline: StudyCell, candidates: Iterable[StudyCell]) -> dict[str, Cell]:
        """Cell name -> answers to a task, the baseline's first, of those that pair with it; empty without it."""
        if task not in baseline.tasks:
            return {}
        found = {baseline.name: baseline.tasks[task]}
        for cell in candidates:
            if cell.name not in found and task in cell.tasks and not self.refusal(cell, baseline, task):
                found[cell.name] = cell.tasks[task]
        return found


def draw_together(
    conditions: Mapping[Part, Mapping[str, Cell]],
    *,
    replicates: int,
    seed: int,
    metrics: Sequence[str] = STUDY_METRICS,
    samples: Callable[[str, Cell, Part], Samples] | None = None,
    fitting: Callable[[str, Cell], OrderedSamples | None] | None = None,
) -> dict[Part, Evaluation]:
    """Metrics of cells on parts of tasks, by cell name, all on one draw of images.

    Any statistic across cells and parts has the right covariance. The cells of one part must hold the same samples.
    samples: gives a cell's samples from its name, its answers and the part (by default its primary confidence's).
    fitting: gives the samples that its threshold is fitted on, by its name and its answers; one object a split.
    """
    chosen = [METRICS[name] for name in metrics]
    taken = samples or (lambda name, cell, part: samples_of(cell, ids=part.ids))
    runs = [
        [
            Resampling(OrderedSamples(*taken(name, cell, part)), fitting(name, cell) if fitting else None)
            for name, cell in cells.items()
        ]
        for part, cells in conditions.items()
    ]
    drawn = replicate_jointly(runs, chosen, replicates=replicates, seed=seed)
    out = {}
    for (part, cells), own, found in zip(conditions.items(), runs, drawn, strict=True):
        values = np.stack([np.clip(found.values[:, m], *metric.bounds) for m, metric in enumerate(chosen)], axis=1)
        n_clusters = min((run.samples.n_clusters for run in own), default=0)
        out[part] = Evaluation(list(cells), chosen, values, found.draws, n_clusters)
    return out


def value_of(evaluation: Evaluation, name: str, metric: str) -> Figure:
    """A metric of one cell."""
    r, m = evaluation.keys.index(name), _index(evaluation, metric)
    return figure(
        float(evaluation.values[r, m]), evaluation.draws[r, m], level=LEVEL, bounds=evaluation.metrics[m].bounds
    )


def difference_of(evaluation: Evaluation, name: str, baseline: str, metric: str) -> Figure:
    """A metric of one cell less that of another on the same samples."""
    return less(value_of(evaluation, name, metric), value_of(evaluation, baseline, metric))


def less(first: Figure, second: Figure) -> Figure:
    """A difference of figures that share their draws."""
    found = figure(first.value - second.value, first.draws - second.draws, level=LEVEL)
    return found._replace(note=found.note or first.note or second.note)


def mean(figures: Sequence[Figure], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Figure:
    """Mean of figures that share their draws, cut to the bounds."""
    return mean_figure(figures, level=LEVEL, bounds=bounds)


def corrected(figures: Sequence[Figure], null: float = 0.0) -> list[float]:
    """p-values that these figures are ``null``, adjusted for their number (Benjamini & Hochberg 1995)."""
    return [float(p) for p in benjamini_hochberg([found.p_value(null) for found in figures])]


def corrected_by_key(figures: Mapping[_Key, Figure], null: float = 0.0) -> dict[_Key, float]:
    """``corrected`` of named figures, by name."""
    return dict(zip(figures, corrected(list(figures.values()), null), strict=True))


def judged(figures: Mapping[_Key, Figure]) -> dict[_Key, tuple[Figure, float]]:
    """Named figures, each with its p-value corrected for all of them."""
    return {key: (figures[key], p) for key, p in corrected_by_key(figures).items()}


def _index(evaluation: Evaluation, metric: str) -> int:
    return [known.key for known in evaluation.metrics].index(metric)
