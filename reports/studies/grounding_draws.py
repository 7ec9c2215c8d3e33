"""Grounding cells on joint draws: values, changes, effects of shifts, and calibration after scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bitquake.metrics import METRICS, Figure, Samples, difference_in_differences
from bitquake.reports.conditions import Part, shared_parts
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import Evaluation, samples_of
from bitquake.reports.problems import Problem
from bitquake.reports.recalibration import Maps
from bitquake.reports.runs import Cell
from bitquake.reports.studies.joint import STUDY_METRICS, Pairs, difference_of, draw_together, mean, value_of
from bitquake.reports.studies.naming import (
    bits_of,
    method_of,
    task_title,
)
from bitquake.reports.studies.study import Study, StudyCell

NOISES = "noise"
DATA_FREE = ("none", "text", "noise", "self")
"""Calibration without pictures and texts of real use: nothing, text alone, random images, the model's own captions."""
REAL_DATA = ("caption", "in-domain", "corrupted-in-domain")
SCALINGS = ("as it is", "temperature", "Platt")


@dataclass
class Grounding:
    """A full-precision cell and those paired with it, on joint draws.

    conditions: name -> its tasks (several for the noises). scaled: the ECE after each scaling of ``SCALINGS``.
    """

    twin: StudyCell
    family: str
    others: list[StudyCell]
    conditions: dict[str, list[str]]
    titles: dict[str, str]
    parts: dict[str, tuple[Part, Part]]
    drawn: dict[Part, Evaluation]
    scaled: dict[str, dict[Part, Evaluation]] = field(default_factory=dict)

    def value(self, name: str, condition: str, metric: str) -> Figure | None:
        """A metric of a cell under a condition; mean over its tasks."""
        found = [self.drawn[Part(task)] for task in self.conditions[condition]]
        if not all(name in evaluation.keys for evaluation in found):
            return None
        return mean([value_of(evaluation, name, metric) for evaluation in found], METRICS[metric].bounds)

    def change(self, name: str, condition: str, metric: str) -> Figure | None:
        """A cell's metric less full precision's."""
        found = [self.drawn[Part(task)] for task in self.conditions[condition]]
        if not all(name in evaluation.keys for evaluation in found):
            return None
        return mean([difference_of(evaluation, name, self.twin.name, metric) for evaluation in found])

    def effect(self, name: str, condition: str, metric: str) -> Figure | None:
        """Difference in differences: the change under the condition less the change on the clean task."""
        found = []
        for task in self.conditions[condition]:
            there, here = (self.drawn[part] for part in self.parts[task])
            if name not in there.keys or name not in here.keys:
                return None
            both = [self.twin.name, name]
            every = difference_in_differences(here.of(both), there.of(both), here.metrics, candidate=1, level=LEVEL)
            found.append(every[metric])
        return mean(found)

    def miscalibration(self, name: str, condition: str, scaling: str) -> Figure | None:
        """The ECE of a cell's boxes after a scaling of their confidences."""
        drawn = self.scaled.get(scaling, {})
        found = [drawn.get(Part(task)) for task in self.conditions[condition]]
        present = [evaluation for evaluation in found if evaluation is not None and name in evaluation.keys]
        if len(present) < len(found):
            return None
        return mean([value_of(evaluation, name, "ece_15") for evaluation in present], (0.0, 1.0))


def groundings(study: Study, problems: list[Problem], replicates: int, seed: int) -> list[Grounding]:
    pairs = Pairs(problems)
    groups = []
    for twin in study.finished:
        others = sorted((c for c in study.finished if c.plan.twin == twin.name), key=_order)
        for clean in [cell for cell in twin.tasks.values() if cell.is_clean and cell.protocol == "grounding"]:
            if others:
                groups.append(_group(twin, others, clean, pairs, replicates, seed))
    return groups


def _order(cell: StudyCell) -> tuple[int, str, int, str]:
    source = source_of(cell)
    kinds = [*DATA_FREE, *REAL_DATA]
    return -bits_of(cell), method_of(cell), kinds.index(source) if source in kinds else len(kinds), source


def source_of(cell: StudyCell) -> str:
    """Kind of its calibration data: as loaded, or else as planned; ``none`` where nothing is calibrated."""
    if cell.card is not None and cell.card.calibration.source:
        return cell.card.calibration.source
    return cell.plan.calibration or "none"


def _group(
    twin: StudyCell, others: list[StudyCell], clean: Cell, pairs: Pairs, replicates: int, seed: int
) -> Grounding:
    shifts = {task: cell for task, cell in twin.tasks.items() if cell.shift_from == clean.task and not cell.noise}
    noises = {
        task: cell
        for task, cell in twin.tasks.items()
        if cell.noise and (cell.world, cell.family) == (clean.world, clean.family)
    }
    conditions = {"clean": [clean.task], **{task: [task] for task in shifts}}
    titles = {"clean": "val", **{task: task_title(cell, clean.family) for task, cell in shifts.items()}}
    parts: dict[str, tuple[Part, Part]] = {clean.task: (Part(clean.task), Part(clean.task))}
    for task in shifts:
        parts[task] = (Part(task), Part(clean.task))
    for task, cell in noises.items():
        both = shared_parts(cell, clean)
        if both is None:
            what = f"{task} shares no sample with {clean.task}"
            pairs.problems.append(Problem("error", twin.name, what, "run both on the same samples"))
        elif both[0].ids is not None:
            # the noise alone would stand on more samples than the difference from the clean task
            what = f"{task} holds samples that {clean.task} lacks"
            pairs.problems.append(Problem("error", twin.name, what, "raise the clean task's limit"))
        else:
            parts[task] = both
            conditions.setdefault(NOISES, []).append(task)
    if NOISES in conditions:
        n = len(conditions[NOISES])
        titles[NOISES] = "noise" if n == 1 else f"{n} noises"
    cells = {task: pairs.on(task, twin, others) for task in parts}
    wanted = {part: cells[part.task] for both in parts.values() for part in both}
    drawn = draw_together(wanted, replicates=replicates, seed=seed, metrics=STUDY_METRICS)
    group = Grounding(twin, clean.family, others, conditions, titles, parts, drawn)
    _scale(group, cells, clean, pairs.problems, replicates, seed)
    return group


def _scale(
    group: Grounding,
    cells: Mapping[str, Mapping[str, Cell]],
    clean: Cell,
    problems: list[Problem],
    replicates: int,
    seed: int,
) -> None:
    """ECE before and after maps that each cell's own threshold split was given to fit."""
    splits = {
        cell.name: cell.tasks[clean.threshold_task]
        for cell in [group.twin, *group.others]
        if clean.threshold_task in cell.tasks
    }
    if group.twin.name not in splits:
        fix = "add it to the suite's tasks"
        problems.append(
            Problem("warning", group.twin.name, f"no {clean.threshold_task}: no scaling can be fitted", fix)
        )
    images = {a.image_id for part in cells.values() for cell in part.values() for a in cell.answers.values()}
    for name, split in list(splits.items()):
        if shared := images & {answer.image_id for answer in split.answers.values()}:
            what = f"{split.task} shares {len(shared)} images with the tasks: no scaling is fitted on it"
            problems.append(Problem("error", name, what, "a scaling must be fitted on other images"))
            del splits[name]
    maps = Maps()

    def mapped(at: int) -> Callable[[str, Cell, Part], Samples]:
        def taken(name: str, cell: Cell, part: Part) -> Samples:
            found = samples_of(cell, ids=part.ids)
            fitted = maps.of(name, splits[name])[at]
            return found._replace(confidence=fitted.apply(np.asarray(found.confidence)))

        return taken

    group.scaled[SCALINGS[0]] = {Part(task): group.drawn[Part(task)] for task in cells}
    for at, scaling in enumerate(SCALINGS[1:]):
        own = {
            Part(task): {name: cell for name, cell in found.items() if name in splits} for task, found in cells.items()
        }
        own = {part: found for part, found in own.items() if found}
        if own:
            group.scaled[scaling] = draw_together(
                own, replicates=replicates, seed=seed, metrics=["ece_15"], samples=mapped(at)
            )
