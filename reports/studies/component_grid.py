"""The grids of the components study: which cells belong together, what they answered, and what moved it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bitquake.metrics import (
    METRICS,
    Figure,
    Grid,
    ImportanceExtraError,
    Sensitivity,
    grid,
    sensitivity,
    without_lowest,
)
from bitquake.metrics.importance import lowest_levels
from bitquake.metrics.samples import FloatArray
from bitquake.metrics.sensitivity import SensitivityMethod
from bitquake.reports.conditions import Part
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import Evaluation
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.schema import Unit
from bitquake.reports.scores import headline
from bitquake.reports.studies.joint import Pairs, difference_of, draw_together, value_of
from bitquake.reports.studies.naming import calibration_sources, method_of
from bitquake.reports.studies.study import Study, StudyCell

COMPONENTS = ("vision", "connector", "language")
PLACES = ("component", "third", "layers", "bits")
RELIABILITY = ("ece_15", "aurc")
REFITS = 12
"""Forests behind an interval of this page."""
FEWEST = 16
"""Cells that a forest is fitted to."""


@dataclass(frozen=True)
class Width:
    """Bits per weight over all parameters of the model: of the codes, with scales and zero-points, and as stored."""

    nominal: float
    effective: float
    measured: float


@dataclass(frozen=True)
class Target:
    """A metric of a task. title, unit: as its protocol calls it; task_title: the task in a word or two."""

    task: str
    metric: str
    title: str
    unit: Unit
    task_title: str

    @property
    def name(self) -> str:
        return f"{self.task_title}: {self.title}"

    @property
    def higher_is_better(self) -> bool:
        return bool(METRICS[self.metric].higher_is_better)


@dataclass(frozen=True)
class MethodGrid:
    """Cells that differ in the levels of some factors only. title: the method, and its calibration data where the suite
    varies them."""

    title: str
    factors: tuple[str, ...]
    cells: tuple[StudyCell, ...]


@dataclass
class Outcomes:
    """A model's cells, evaluated on joint draws of each task.

    same: cell name -> the cell that stands for it (cells that do the same to the model are evaluated once).
    """

    model: str
    twin: StudyCell
    cells: list[StudyCell]
    targets: list[Target]
    evaluations: Mapping[str, Evaluation]
    same: Mapping[str, str]

    def has(self, cell: StudyCell, target: Target) -> bool:
        return self.same.get(cell.name) in self.evaluations[target.task].keys

    def value(self, cell: StudyCell, target: Target) -> Figure | None:
        """A cell's metric."""
        if not self.has(cell, target):
            return None
        return value_of(self.evaluations[target.task], self.same[cell.name], target.metric)

    def change(self, cell: StudyCell, target: Target) -> Figure | None:
        """A cell's metric less full precision's."""
        if not self.has(cell, target):
            return None
        evaluation = self.evaluations[target.task]
        return difference_of(evaluation, self.same[cell.name], self.same[self.twin.name], target.metric)

    def arrays(self, cells: Sequence[StudyCell], target: Target) -> tuple[FloatArray, FloatArray | None]:
        """Values of cells that have them, and their (replicates, cells) draws; None where draws are undefined."""
        evaluation = self.evaluations[target.task]
        m = [metric.key for metric in evaluation.metrics].index(target.metric)
        rows = [evaluation.keys.index(self.same[cell.name]) for cell in cells]
        draws = evaluation.draws[rows, m].T
        defined = np.isfinite(draws).all(axis=1)
        enough = evaluation.n_clusters > 1 and defined.mean() >= LEVEL
        return evaluation.values[rows, m], draws[defined] if enough else None


def outcomes(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> list[Outcomes]:
    """Each model's full-precision cell and those that pair with it."""
    pairs = Pairs(problems)
    found = []
    for model in dict.fromkeys(cell.plan.model for cell in study.finished):
        own = [cell for cell in study.finished if cell.plan.model == model]
        twin = next((cell for cell in own if not cell.plan.twin and cell.plan.quantization == "full-precision"), None)
        twin = twin or next((cell for cell in own if not cell.plan.twin), None)
        if twin is None:
            what = "its full-precision cell is missing, so nothing of the model is shown"
            problems.append(Problem("error", model, what, "run it too"))
            continue
        first: dict[str, StudyCell] = {twin.plan.hash: twin}
        for cell in own:
            first.setdefault(cell.plan.hash, cell)
        same = {cell.name: first[cell.plan.hash].name for cell in own}
        answered = [twin.tasks[task] for task in study.tasks() if task in twin.tasks]
        tasks = {cell.task: cell for cell in answered if not cell.is_threshold}
        targets = [target for cell in tasks.values() for target in _targets(cell)]
        evaluations: dict[str, Evaluation] = {}
        for task in tasks:
            wanted = {Part(task): pairs.on(task, twin, first.values())}
            metrics = [target.metric for target in targets if target.task == task]
            evaluations |= {
                part.task: one
                for part, one in draw_together(wanted, replicates=replicates, seed=seed, metrics=metrics).items()
            }
        found.append(Outcomes(model, twin, own, targets, evaluations, same))
    return found


def _targets(cell: Cell) -> list[Target]:
    """A task's headline; of shares of right answers with confidences also what says how far these can be relied on."""
    told = headline(cell.protocol, {name for answer in cell.answers.values() for name in answer.scores})
    titles = {"caption": "captioning", "retrieval": "retrieval", "vqa": "VQA", "choice": "choice", "grounding": "boxes"}
    task_title = titles.get(cell.protocol, cell.family)
    found = [Target(cell.task, "accuracy", told.title, told.unit, task_title)]
    if cell.protocol in ("vqa", "choice") and any(answer.confidence is not None for answer in cell.answers.values()):
        found += [
            Target(cell.task, key, METRICS[key].title.replace(" (15 bins)", ""), METRICS[key].unit, task_title)
            for key in RELIABILITY
        ]
    return found


def width_of(cell: StudyCell) -> Width | None:
    """Bits per weight, from the cell's quant card; None without one."""
    card = cell.card
    if card is None or card.self_declared:
        return None
    n = sum(entry.n_parameters for entry in card.components.values())
    stored = sum(entry.packed_bytes for entry in card.components.values())
    return Width(card.nominal_bpw, card.effective_bpw, 8 * stored / n if n else card.effective_bpw)


def width_grids(cells: Sequence[StudyCell]) -> list[MethodGrid]:
    """Grids over the widths of the components (of at least two), by method."""
    return _grids(cells, [c for c in cells if sum(name in c.plan.factors for name in COMPONENTS) > 1], COMPONENTS)


def place_grids(cells: Sequence[StudyCell]) -> list[MethodGrid]:
    """Grids over thirds and layers of the components, by method."""
    return _grids(cells, [c for c in cells if {"third", "layers"} <= c.plan.factors.keys()], PLACES)


def _grids(every: Sequence[StudyCell], own: Sequence[StudyCell], factors: Sequence[str]) -> list[MethodGrid]:
    sources = calibration_sources(every)
    groups: dict[str, list[StudyCell]] = {}
    for cell in own:
        data = f", calibrated on {cell.plan.calibration}" if cell.plan.calibration and len(sources) > 1 else ""
        groups.setdefault(f"{method_of(cell)}{data}", []).append(cell)
    found = []
    for title, members in groups.items():
        varied = [name for name in factors if len({cell.plan.factors.get(name) for cell in members}) > 1]
        if varied and all(name in cell.plan.factors for cell in members for name in varied):
            found.append(MethodGrid(title, tuple(varied), tuple(members)))
    return found


@dataclass(frozen=True)
class Moved:
    """What moved a target over a method's grid, with all levels and without the lowest of each width.

    lowest: what was left out there ("vision 2, language 2"). why: why there is nothing.
    """

    grid: MethodGrid
    target: Target
    all_levels: Sensitivity | None
    narrow_left_out: Sensitivity | None = None
    lowest: str = ""
    why: str = ""


def what_moved(own: MethodGrid, target: Target, found: Outcomes, problems: list[Problem], *, seed: int) -> Moved:
    """Importance of a grid's factors for a target."""
    cells = [cell for cell in own.cells if found.has(cell, target)]
    if len(cells) < 4:
        return Moved(own, target, None, why=f"only {len(cells)} of {len(own.cells)} cells have answered it")
    values, draws = found.arrays(cells, target)
    if not np.isfinite(values).all():
        return Moved(own, target, None, why="undefined in some cells")
    varied = [name for name in own.factors if len({cell.plan.factors[name] for cell in cells}) > 1]
    try:
        runs = grid({name: [cell.plan.factors[name] for cell in cells] for name in varied})
        every = _moved_by(runs, values, draws, problems, seed)
    except ValueError as error:
        return Moved(own, target, None, why=str(error))
    kept = without_lowest(runs)
    rest = runs.rows(kept)
    part = None
    if not kept.all() and len(rest.factors) > 1 and values[kept].std() > 0:
        try:
            part = _moved_by(rest, values[kept], None if draws is None else draws[:, kept], problems, seed)
        except ValueError:
            part = None  # too little is left to say anything
    lowest = [f"{name} {level:g}" for name, level in lowest_levels(runs).items()]
    return Moved(own, target, every, part, ", ".join(lowest))


def _moved_by(
    runs: Grid, values: FloatArray, draws: FloatArray | None, problems: list[Problem], seed: int
) -> Sensitivity:
    ways: list[SensitivityMethod] = ["anova", "forest", "shap"] if runs.n >= FEWEST else ["anova"]
    try:
        return sensitivity(runs, values, methods=ways, draws=draws, refits=REFITS, seed=seed, level=LEVEL)
    except ImportanceExtraError as error:
        problem = Problem("warning", "importance", "forests and SHAP values are left out", str(error))
        if problem not in problems:
            problems.append(problem)
        return sensitivity(runs, values, methods=["anova"], draws=draws, seed=seed, level=LEVEL)
