"""The arms of a training study: what was trained how, or quantized how, at which width; seeds of one arm together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bitquake.metrics import METRICS, Figure, figure
from bitquake.reports.conditions import Part, shared_parts
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import Evaluation
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.studies.joint import Pairs, draw_together, less, mean, value_of
from bitquake.reports.studies.naming import bits_of, calibration_sources, calibration_title, family_title, task_title
from bitquake.reports.studies.study import Study, StudyCell

SWITCHES = ("distillation", "decoupled", "gate", "controller", "relational")
"""Parts of GRACE that a training may switch off."""


@dataclass(frozen=True)
class Arm:
    """Cells that differ in the seed only.

    Attributes:
        title: ``GRACE``, ``RTN``, ``LoRA, then rtn-int4-g64``.
        bits: of the quantized weights, 16 for full precision.
        kind: ``base`` (nothing done), ``ptq`` (quantized afterwards), ``trained``, ``trained-ptq`` (both).
        twin: name of a full-precision control that was trained the same way; "" without one.
    """

    title: str
    bits: int
    kind: str
    cells: tuple[StudyCell, ...]
    twin: str

    @property
    def key(self) -> str:
        return self.cells[0].name

    @property
    def note(self) -> str:
        seeds = [str(cell.plan.seed) for cell in self.cells]
        return f"mean of seeds {', '.join(seeds)}" if len(seeds) > 1 else ""


@dataclass
class Bench:
    """One public base with everything made from it, on joint draws.

    conditions: title -> tasks (several for the noises of a family). drawn: part -> metrics of cells. parts: noisy task
    -> it and its clean task on the same samples. clean: title of a noise condition -> that of its clean task.
    """

    base: Arm
    arms: list[Arm]
    conditions: dict[str, list[str]]
    drawn: dict[Part, Evaluation]
    parts: dict[str, tuple[Part, Part]] = field(default_factory=dict)
    clean: dict[str, str] = field(default_factory=dict)
    _values: dict[tuple[str, str, str], Figure | None] = field(default_factory=dict, init=False, repr=False)

    @property
    def widths(self) -> list[int]:
        """Bits of the quantized arms, falling."""
        return sorted({arm.bits for arm in self.arms if arm.bits < 16}, reverse=True)

    def twin(self, arm: Arm) -> Arm | None:
        """The arm's own full-precision control; None for one that has none, or is one."""
        return next((one for one in [self.base, *self.arms] if any(c.name == arm.twin for c in one.cells)), None)

    def value(self, arm: Arm, condition: str, metric: str) -> Figure | None:
        """A metric under a condition, mean over seeds and tasks; None where a seed has not got it."""
        key = arm.key, condition, metric
        if key not in self._values:  # headlines and tables ask for the same
            self._values[key] = self._value(arm, condition, metric)
        return self._values[key]

    def _value(self, arm: Arm, condition: str, metric: str) -> Figure | None:
        found = []
        for task in self.conditions[condition]:
            for cell in arm.cells:
                evaluation = self.drawn[Part(task)]
                if cell.name not in evaluation.keys:
                    return None
                found.append(value_of(evaluation, cell.name, metric))
        return mean(found, METRICS[metric].bounds)

    def less(self, arm: Arm, other: Arm | None, condition: str, metric: str) -> Figure | None:
        """An arm's metric less another's."""
        if other is None:
            return None
        own, theirs = (self.value(one, condition, metric) for one in (arm, other))
        return less(own, theirs) if own is not None and theirs is not None else None

    def less_best(self, arm: Arm, others: Sequence[Arm], condition: str, metric: str) -> tuple[Figure, Arm] | None:
        """An arm's metric less the best of others', and which that is.

        The best is chosen on the samples themselves. Held fixed, its luck counts for it and against the arm; chosen
        anew in each replicate, the best of several draws counts against the arm a second time. The interval is the
        union of both, so that neither "better" nor "worse" owes anything to the choice.
        """
        own = self.value(arm, condition, metric)
        found = [(value, one) for one in others if (value := self.value(one, condition, metric)) is not None]
        found = [(value, one) for value, one in found if value.available]
        if own is None or not found:
            return None
        higher = bool(METRICS[metric].higher_is_better)
        best, which = (max if higher else min)(found, key=lambda item: item[0].value)
        every = np.stack([value.draws for value, _ in found])
        fixed = less(own, best)
        anew = figure(fixed.value, own.draws - (every.max(axis=0) if higher else every.min(axis=0)), level=LEVEL)
        wider = max(fixed, anew, key=lambda one: float(np.nanstd(one.draws)))
        return wider._replace(lo=min(fixed.lo, anew.lo), hi=max(fixed.hi, anew.hi)), which

    def effect(self, arm: Arm, other: Arm | None, condition: str, metric: str) -> Figure | None:
        """Difference in differences: (arm - other) in noise less (arm - other) on the clean samples of the same."""
        if other is None:
            return None
        found = []
        for task in self.conditions[condition]:
            there, here = (self.drawn[part] for part in self.parts[task])
            sides = []
            for evaluation in (there, here):
                if not all(c.name in evaluation.keys for one in (arm, other) for c in one.cells):
                    return None
                own, theirs = (mean([value_of(evaluation, c.name, metric) for c in o.cells]) for o in (arm, other))
                sides.append(less(own, theirs))
            found.append(less(*sides))
        return mean(found)


def benches(
    study: Study, problems: list[Problem], metrics: Sequence[str], *, replicates: int, seed: int
) -> list[Bench]:
    """Every public base of a study, with what was quantized and trained from it."""
    pairs = Pairs(problems)
    out = []
    for cell in study.finished:
        if cell.plan.training is not None or cell.plan.spec or cell.plan.twin:
            continue
        base = Arm("public base", 16, "base", (cell,), "")
        made = [
            one
            for one in study.finished
            if one is not cell and one.plan.pretrained == cell.plan.pretrained and (one.plan.training or one.plan.spec)
        ]
        if made:
            out.append(_bench(base, _arms(made), pairs, metrics, replicates, seed))
    return out


def _arms(cells: Sequence[StudyCell]) -> list[Arm]:
    grouped: dict[tuple[str, int, str], list[StudyCell]] = {}
    several = len(calibration_sources(cells)) > 1
    for cell in cells:
        trained, quantized = cell.plan.training is not None, bool(cell.plan.spec)
        kind = "trained-ptq" if trained and quantized else "trained" if trained else "ptq"
        grouped.setdefault((_title(cell, several), bits_of(cell), kind), []).append(cell)
    arms = [Arm(title, bits, kind, tuple(own), own[0].plan.twin) for (title, bits, kind), own in grouped.items()]
    order = {"ptq": 0, "trained-ptq": 1, "trained": 2}
    return sorted(arms, key=lambda arm: (-arm.bits, order[arm.kind]))


def _title(cell: StudyCell, several_sources: bool) -> str:
    plan = cell.plan
    if plan.training is None:
        source = f", {calibration_title(cell)}" if plan.calibration and several_sources else ""
        return f"{plan.quantization}{source}"
    title = str(plan.factors.get("recipe") or recipe_title(plan.training))
    if plan.spec:
        return f"{title}, then {_label(cell)}"
    quant = plan.training.get("quant")
    name = quant.get("name") if isinstance(quant, dict) else quant
    return f"{title} on {name}" if name and name != "full-precision" else title


def _label(cell: StudyCell) -> str:
    """What a cell's name says beside model and seed."""
    return cell.name.removeprefix(f"{cell.plan.model}/").removesuffix(f"/seed{cell.plan.seed}")


def recipe_title(training: dict[str, object]) -> str:
    """What a training is called by its switches, where the suite gives it no name."""
    if training.get("method") == "lora":
        return "LoRA"
    on = [name for name in SWITCHES if training.get(name)]
    if not on:
        return "QAT"
    if len(on) == len(SWITCHES):
        return "GRACE"
    if on == ["distillation"]:
        return "QAT + distillation"
    return f"GRACE without {', '.join(name for name in SWITCHES if name not in on)}"


def _bench(base: Arm, arms: list[Arm], pairs: Pairs, metrics: Sequence[str], replicates: int, seed: int) -> Bench:
    cell = base.cells[0]
    others = [one for arm in arms for one in arm.cells]
    conditions: dict[str, list[str]] = {}
    parts: dict[str, tuple[Part, Part]] = {}
    clean_of: dict[str, str] = {}
    several = len({c.family for c in cell.tasks.values() if not c.is_threshold}) > 1
    for task, own in cell.tasks.items():
        if own.is_threshold or own.noise:
            continue
        title = family_title(own.family) if own.is_clean and several else task_title(own, "" if several else own.family)
        conditions[title if title not in conditions else task] = [task]
    for task, own in cell.tasks.items():
        clean = next((c for c in cell.tasks.values() if own.noise and c.is_clean and c.family == own.family), None)
        both = shared_parts(own, clean) if clean else None
        if not own.noise or clean is None or both is None or own.world != clean.world:
            if own.noise:
                what = f"{task} has no clean task of the same samples"
                pairs.problems.append(Problem("error", cell.name, what, "add the clean task to the suite"))
            continue
        plain = next(title for title, tasks in conditions.items() if tasks == [clean.task])
        title = f"{family_title(own.family)} in noise" if several else "in noise"
        conditions.setdefault(title, []).append(task)
        clean_of[title] = plain
        parts[task] = both
    tasks = [task for own in conditions.values() for task in own]
    cells: dict[str, dict[str, Cell]] = {task: pairs.on(task, cell, others) for task in tasks}
    wanted = {Part(task): cells[task] for task in tasks}
    wanted |= {part: cells[part.task] for both in parts.values() for part in both}
    drawn = draw_together(wanted, replicates=replicates, seed=seed, metrics=metrics)
    return Bench(base, arms, conditions, drawn, parts, clean_of)
