"""The tasks of a group that belong together (a clean task, its noises, its shifts), on joint bootstrap draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitquake.metrics import METRICS, replicate, replicate_jointly
from bitquake.metrics import Run as Resampling
from bitquake.metrics.samples import FloatArray, OrderedSamples
from bitquake.reports.evaluation import Evaluation, samples_of
from bitquake.reports.runs import Cell

JOINT_METRICS = ("accuracy", "aurc", "ece_15", "coverage_at_risk_1")


@dataclass(frozen=True)
class Condition:
    """The full-precision run (first) and the runs paired with it on one task; all hold the same samples."""

    cells: dict[str, Cell]
    evaluation: Evaluation

    @property
    def twin(self) -> Cell:
        return next(iter(self.cells.values()))


@dataclass(frozen=True)
class Part:
    """A task, or those of its samples that ``ids`` names."""

    task: str
    ids: tuple[str, ...] | None = None


def shared_parts(there: Cell, here: Cell) -> tuple[Part, Part] | None:
    """Two tasks on the samples that they share, about the same images; None when they share none."""
    noisy, plain = there.answers, here.answers
    ids = [sample for sample in noisy if sample in plain]
    if not ids or any(noisy[sample].image_id != plain[sample].image_id for sample in ids):
        return None
    some = tuple(ids)
    return (
        Part(there.task, None if len(ids) == len(noisy) else some),
        Part(here.task, None if len(ids) == len(plain) else some),
    )


def _family(cell: Cell) -> tuple[str, str]:
    return cell.world, cell.family


class Conditions:
    """Every task of a group on which runs are paired; gives their metrics on one draw of images."""

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates, self.seed = replicates, seed
        self.by_task: dict[str, Condition] = {}
        self._of_part: dict[Part, Evaluation] = {}

    def add(self, task: str, cells: Mapping[str, Cell], evaluation: Evaluation) -> None:
        """evaluation: of these cells, the twin's first."""
        few = evaluation.only(JOINT_METRICS)
        self.by_task[task] = Condition(dict(cells), few)
        self._of_part[Part(task)] = few

    def noises_of(self, clean: str) -> list[str]:
        """Noisy tasks of the family whose clean task this is."""
        cell = self.by_task[clean].twin
        if not cell.is_clean:
            return []
        return [t for t, c in self.by_task.items() if c.twin.noise and _family(c.twin) == _family(cell)]

    def shifts_of(self, task: str) -> list[str]:
        """Tasks without noise that are shifted from this one."""
        return [t for t, c in self.by_task.items() if t != task and not c.twin.noise and c.twin.shift_from == task]

    def repeats_subset(self, task: str) -> bool:
        """A noise on the whole split counts in no mean that holds the same noise on the subset already."""
        return self.by_task[task].twin.is_full and task.removesuffix("_full") in self.by_task

    def shared(self, task: str, clean: str) -> tuple[Part, Part] | None:
        """Both tasks on the samples that they share, about the same images; None when they share none."""
        return shared_parts(self.by_task[task].twin, self.by_task[clean].twin)

    def together(self, parts: Sequence[Part]) -> dict[Part, Evaluation]:
        """``JOINT_METRICS`` of the parts, so that any statistic across them has the right covariance."""
        distinct = list(dict.fromkeys(parts))
        images = [self._images(part) for part in distinct]
        metrics = [METRICS[name] for name in JOINT_METRICS]
        if all(found == images[0] for found in images):
            # On equal images each part by itself has the draws that all would have together.
            for part in distinct:
                if part not in self._of_part:
                    values, draws = replicate(self._runs(part), metrics, replicates=self.replicates, seed=self.seed)
                    self._of_part[part] = self._evaluation(part, values, draws)
            return {part: self._of_part[part] for part in distinct}
        joint = replicate_jointly(
            [self._runs(part) for part in distinct], metrics, replicates=self.replicates, seed=self.seed
        )
        return {part: self._evaluation(part, *found) for part, found in zip(distinct, joint, strict=True)}

    def _evaluation(self, part: Part, values: FloatArray, draws: FloatArray) -> Evaluation:
        metrics = [METRICS[name] for name in JOINT_METRICS]
        clipped = np.stack([np.clip(values[:, m], *metric.bounds) for m, metric in enumerate(metrics)], axis=1)
        return Evaluation(list(self.by_task[part.task].cells), metrics, clipped, draws, len(self._images(part)))

    def _images(self, part: Part) -> frozenset[str]:
        answers = self.by_task[part.task].twin.answers
        return frozenset(answers[sample].image_id for sample in (answers if part.ids is None else part.ids))

    def _runs(self, part: Part) -> list[Resampling]:
        cells = self.by_task[part.task].cells.values()
        return [Resampling(OrderedSamples(*samples_of(cell, ids=part.ids)), None) for cell in cells]
