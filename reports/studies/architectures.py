"""Quantizations of one architecture under each of their confidences, in distribution and shifted, on joint draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitquake.metrics import Figure
from bitquake.metrics.samples import OrderedSamples
from bitquake.reports.conditions import Part
from bitquake.reports.evaluation import Evaluation, any_confidence, further_confidences, samples_of
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.studies.joint import Pairs, draw_together, less, value_of
from bitquake.reports.studies.naming import bits_of, family_title, method_of
from bitquake.reports.studies.study import Study, StudyCell

SELECTIVE_METRICS = (
    "accuracy",
    "ece_15",
    "coverage_at_risk_0.5",
    "coverage_at_risk_1",
    "coverage_at_risk_5",
    "aurc",
    "phi_10",
    "phi_100",
)


@dataclass
class Architecture:
    """A full-precision cell and those paired with it, on joint draws; confidences: the primary one first.

    drawn: task -> metrics of ``cell|confidence``.
    """

    twin: StudyCell
    others: list[StudyCell]
    clean: Cell
    shifts: dict[str, Cell]
    cells: dict[str, dict[str, Cell]]
    confidences: list[str]
    drawn: dict[str, Evaluation]

    @property
    def members(self) -> list[StudyCell]:
        return [self.twin, *self.others]

    def title(self, task: str) -> str:
        return family_title(self.cells[task][self.twin.name].family)

    def value(self, name: str, confidence: str, task: str, metric: str) -> Figure | None:
        """A metric of a cell under one of its confidences; None where it has not got it."""
        key = _key(name, confidence)
        evaluation = self.drawn[task]
        return value_of(evaluation, key, metric) if key in evaluation.keys else None

    def change(self, name: str, confidence: str, task: str, metric: str) -> Figure | None:
        """The same less full precision's."""
        own, theirs = (self.value(one, confidence, task, metric) for one in (name, self.twin.name))
        return less(own, theirs) if own is not None and theirs is not None else None

    def beside(self, name: str, confidence: str, task: str, metric: str) -> Figure | None:
        """A Selector's metric less that of the same answers ranked by MaxProb."""
        own, plain = (self.value(name, one, task, metric) for one in (confidence, self.confidences[0]))
        return less(own, plain) if own is not None and plain is not None else None


def _key(name: str, confidence: str) -> str:
    return f"{name}|{confidence}"


def architectures(study: Study, problems: list[Problem], replicates: int, seed: int) -> list[Architecture]:
    pairs = Pairs(problems)
    groups = []
    for twin in study.finished:
        others = sorted(
            (cell for cell in study.finished if cell.plan.twin == twin.name),
            key=lambda cell: (-bits_of(cell), method_of(cell), cell.name),
        )
        clean = _in_distribution_task(twin)
        if clean is None or not others:
            continue
        shifts = {t: c for t, c in twin.tasks.items() if c.shift_from == clean.task and not c.noise}
        cells = {task: pairs.on(task, twin, others) for task in [clean.task, *shifts]}
        known = further_confidences(cell for found in cells.values() for cell in found.values())
        confidences = [clean.confidence_name, *(name for name in known if name.startswith("selector"))]
        splits = _splits(twin, others, clean, confidences, pairs, cells, problems)
        wanted: dict[Part, dict[str, Cell]] = {}
        for task, found in cells.items():
            wanted[Part(task)] = {
                _key(name, confidence): cell
                for name, cell in found.items()
                for confidence in confidences
                if any_confidence(samples_of(cell, confidence))
            } or {_key(name, confidences[0]): cell for name, cell in found.items()}

        drawn = draw_together(
            wanted,
            replicates=replicates,
            seed=seed,
            metrics=SELECTIVE_METRICS,
            samples=lambda key, cell, part: samples_of(cell, key.rpartition("|")[2], part.ids),
            fitting=lambda key, cell, splits=splits: splits.get(key),  # type: ignore[misc]
        )
        by_task = {part.task: evaluation for part, evaluation in drawn.items()}
        groups.append(Architecture(twin, others, clean, shifts, cells, confidences, by_task))
    return groups


def _in_distribution_task(twin: StudyCell) -> Cell | None:
    """The clean task that others are shifted from, or else the first clean one."""
    origins = {cell.shift_from for cell in twin.tasks.values() if cell.shift_from}
    clean = [cell for cell in twin.tasks.values() if cell.is_clean and not cell.shift_from]
    return next((cell for cell in clean if cell.task in origins), clean[0] if clean else None)


def _splits(
    twin: StudyCell,
    others: Sequence[StudyCell],
    clean: Cell,
    confidences: Sequence[str],
    pairs: Pairs,
    cells: Mapping[str, Mapping[str, Cell]],
    problems: list[Problem],
) -> dict[str, OrderedSamples]:
    """``cell|confidence`` -> what its threshold for effective reliability is fitted on."""
    found = pairs.on(clean.threshold_task, twin, others)
    if not found:
        what = f"no complete {clean.threshold_task}: no threshold is fitted, so there is no Φ and no transfer"
        problems.append(Problem("warning", twin.name, what, "add it to the suite's tasks"))
    images = {a.image_id for tasks in cells.values() for cell in tasks.values() for a in cell.answers.values()}
    out = {}
    for name, split in found.items():
        if shared := images & {answer.image_id for answer in split.answers.values()}:
            what = f"{split.task} shares {len(shared)} images with the tasks"
            problems.append(Problem("error", name, what, "a threshold must be fitted on other images; Φ is left out"))
            continue
        for confidence in confidences:
            samples = samples_of(split, confidence)
            if any_confidence(samples):
                out[_key(name, confidence)] = OrderedSamples(*samples)
    return out
