"""What noise costs each quantized cell beyond full precision: groups of cells, and every single effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bitquake.metrics import METRICS, Figure, difference_in_differences
from bitquake.reports.conditions import Part, shared_parts
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import Evaluation
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.studies.joint import STUDY_METRICS, Pairs, draw_together, judged, mean
from bitquake.reports.studies.study import Study, StudyCell

Effects = dict[str, dict[str, Figure]]
"""Task -> metric -> difference in differences."""


@dataclass
class NoiseGroup:
    """A full-precision cell with those paired with it, on a family's clean task and its noises, on joint draws.

    parts: noisy task -> it and the clean task on the samples that both hold. effects: quantized cell -> task -> metric.
    """

    twin: StudyCell
    family: str
    clean: Cell
    noises: dict[str, Cell]
    parts: dict[str, tuple[Part, Part]]
    drawn: dict[Part, Evaluation]
    effects: dict[str, Effects] = field(default_factory=dict)

    def of(self, name: str, keep: Callable[[Cell], bool] = lambda cell: True) -> list[str]:
        """The noisy tasks that a cell has both sides of."""
        return [task for task in self.effects[name] if keep(self.noises[task])]

    def pooled(self, name: str, metric: str, keep: Callable[[Cell], bool] = lambda cell: True) -> Figure | None:
        """Mean difference in differences over noisy tasks; None where the cell has none of them."""
        tasks = self.of(name, keep)
        return mean([self.effects[name][task][metric] for task in tasks]) if tasks else None


def noise_groups(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> list[NoiseGroup]:
    """Every full-precision cell and family with noises, with the cells that the plan compares with it."""
    pairs = Pairs(problems)
    groups = []
    for twin in study.finished:
        others = [cell for cell in study.finished if cell.plan.twin == twin.name]
        if not others:
            continue
        for clean in [cell for cell in twin.tasks.values() if cell.is_clean]:
            noises = {
                task: cell
                for task, cell in twin.tasks.items()
                if cell.noise
                and (cell.world, cell.family) == (clean.world, clean.family)
                and not (cell.is_full and task.removesuffix("_full") in twin.tasks)
            }
            group = _group(twin, others, clean, noises, pairs, replicates, seed)
            if group:
                groups.append(group)
    return groups


def _group(
    twin: StudyCell,
    others: Sequence[StudyCell],
    clean: Cell,
    noises: Mapping[str, Cell],
    pairs: Pairs,
    replicates: int,
    seed: int,
) -> NoiseGroup | None:
    parts = {task: found for task, cell in noises.items() if (found := shared_parts(cell, clean))}
    for task in noises.keys() - parts.keys():
        what = f"{task} shares no sample with {clean.task}"
        pairs.problems.append(Problem("error", twin.name, what, "run both on the same samples"))
    if not parts:
        return None
    cells = {task: pairs.on(task, twin, others) for task in [clean.task, *parts]}
    conditions = {part: cells[part.task] for both in parts.values() for part in both}
    conditions[Part(clean.task)] = cells[clean.task]
    drawn = draw_together(conditions, replicates=replicates, seed=seed)
    group = NoiseGroup(twin, clean.family, clean, {task: noises[task] for task in parts}, parts, drawn)
    metrics = [METRICS[name] for name in STUDY_METRICS]
    for cell in others:
        own: Effects = {}
        for task, (there, here) in parts.items():
            if cell.name in cells[task] and cell.name in cells[clean.task]:
                both = [twin.name, cell.name]
                own[task] = difference_in_differences(
                    drawn[here].of(both), drawn[there].of(both), metrics, candidate=1, level=LEVEL
                )
        if own:
            group.effects[cell.name] = own
    return group if group.effects else None


def noise_name(cell: Cell) -> str:
    return str((cell.noise or {}).get("name", cell.variant))


def single_effects(group: NoiseGroup) -> dict[tuple[str, str, str], tuple[Figure, float]]:
    """(cell, task, metric) -> effect and its p-value, corrected over all of them."""
    every = {
        (name, task, metric): figure
        for name, effects in group.effects.items()
        for task, figures in effects.items()
        for metric, figure in figures.items()
    }
    return judged(every)
