"""Reads a suite's output folder: its plan, and of each cell the run with its answers, its failure, or that it waits.

Nothing of the suite is read but ``suite.json``, ``cells/*/cell.json``, ``failures/*.json`` and lmms-eval's own output.
Where the plan's Selectors were applied (``applied/<hash>``, once its ``made_from.json`` is there) their copies of the
answers are taken, with the Selectors' confidences beside the model's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bitquake.quant_card import QuantCard
from bitquake.reports.problems import Problem, ReportError, RunError
from bitquake.reports.runs import Cell, InputFile, Run, read_runs
from bitquake.suite_plan import (
    APPLIED,
    CELL_FILE,
    MADE_FROM,
    PLAN_FILE,
    PLAN_VERSION,
    CellManifest,
    PlannedCell,
    SuitePlan,
    made_from,
)

_Model = TypeVar("_Model", bound=BaseModel)
_RERUN = "`bitquake run` on the same suite and folder runs it again"


@dataclass(frozen=True)
class StudyCell:
    """One planned cell and what came of it.

    Attributes:
        plan: what was planned.
        manifest: of the finished cell; None for one that failed or waits.
        run: its answers, task by task, with its quant card; None without them.
        failure: why it has none; "" for one that finished or waits.
    """

    plan: PlannedCell
    manifest: CellManifest | None = None
    run: Run | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def finished(self) -> bool:
        return self.run is not None

    @property
    def waiting(self) -> bool:
        return self.run is None and not self.failure

    @property
    def tasks(self) -> Mapping[str, Cell]:
        """Task -> its answers, of the tasks that are complete."""
        return self.run.cells if self.run else {}

    @property
    def card(self) -> QuantCard | None:
        return self.run.card if self.run else None


@dataclass(frozen=True)
class Study:
    """A suite's output folder, as read.

    Attributes:
        plan: the suite.
        out: its folder.
        cells: all planned cells, in the plan's order.
        problems: what keeps a result off the page, and remarks.
        files: the lmms-eval files that were read, with their hashes.
    """

    plan: SuitePlan
    out: Path
    cells: tuple[StudyCell, ...]
    problems: tuple[Problem, ...] = ()
    files: tuple[InputFile, ...] = field(default=(), repr=False)

    @property
    def finished(self) -> tuple[StudyCell, ...]:
        return tuple(cell for cell in self.cells if cell.finished)

    @property
    def failed(self) -> tuple[StudyCell, ...]:
        return tuple(cell for cell in self.cells if cell.failure)

    @property
    def waiting(self) -> tuple[StudyCell, ...]:
        return tuple(cell for cell in self.cells if cell.waiting)

    def cell(self, name: str) -> StudyCell:
        """The cell of that name. Raises KeyError."""
        for one in self.cells:
            if one.name == name:
                return one
        raise KeyError(f"suite {self.plan.suite!r} has no cell {name!r}")

    def twin(self, cell: StudyCell) -> StudyCell | None:
        """The cell's full-precision control; None for full precision itself."""
        return self.cell(cell.plan.twin) if cell.plan.twin else None

    def tasks(self) -> dict[str, Cell]:
        """Every task that any cell answered, in the plan's order, with its first cell's answers."""
        order = dict.fromkeys(task for cell in self.cells for task in cell.plan.tasks)
        found: dict[str, Cell] = {}
        for cell in self.finished:
            for task, answers in cell.tasks.items():
                found.setdefault(task, answers)
        return {task: found[task] for task in [*order, *sorted(found.keys() - order.keys())] if task in found}


def read_study(out: Path, *, progress: Callable[[str], None] | None = None) -> Study:
    """Read what ``bitquake run`` left in ``out``.

    A cell that cannot be read costs no other: it is named in ``Study.problems`` and stands as failed.

    Raises:
        ReportError: no plan is there, it is of another version, or it cannot be read.
    """
    out = Path(out)
    plan = _plan(out)
    tell = progress or (lambda line: None)
    problems: list[Problem] = []
    files: dict[str, InputFile] = {}
    known: dict[str, StudyCell] = {}
    cells = []
    for planned in plan.cells:
        # Names may share a hash: what does the same to the model is evaluated once.
        if planned.hash not in known:
            tell(f"reading {planned.name}")
            known[planned.hash] = _read_cell(out, plan, planned, problems, files)
        cells.append(dataclasses.replace(known[planned.hash], plan=planned))
    return Study(plan, out, tuple(cells), tuple(sorted(set(problems))), tuple(files.values()))


def _plan(out: Path) -> SuitePlan:
    path = out / PLAN_FILE
    if not path.is_file():
        raise ReportError(f"{out}: holds no {PLAN_FILE}; give the folder that `bitquake run` wrote (--out)")
    told = _mapping(path)
    if told.get("version") != PLAN_VERSION:
        raise ReportError(
            f"{path}: a plan of version {told.get('version')!r}, this Bitquake reads {PLAN_VERSION}; run the suite "
            "with this release into a new folder, or read it with the release that wrote it"
        )
    plan = _parse(SuitePlan, told, path)
    names = [cell.name for cell in plan.cells]
    missing = {cell.twin for cell in plan.cells if cell.twin} - set(names)
    if len(set(names)) < len(names) or missing:
        what = f"names the twin {min(missing)!r} that is no cell" if missing else "names a cell twice"
        raise ReportError(f"{path}: {what}; run the suite again")
    return plan


def _read_cell(
    out: Path, plan: SuitePlan, planned: PlannedCell, problems: list[Problem], files: dict[str, InputFile]
) -> StudyCell:
    folder = out / "cells" / planned.hash
    if not (folder / CELL_FILE).is_file():
        return StudyCell(planned, failure=_failure(out / "failures" / f"{planned.hash}.json"))
    try:
        manifest = _parse(CellManifest, _mapping(folder / CELL_FILE), folder / CELL_FILE)
        if manifest.version != PLAN_VERSION or manifest.hash != planned.hash:
            raise ReportError(f"{CELL_FILE} is of another cell, or of version {manifest.version}")
        run = _read_run(out, folder, plan, planned, manifest, problems, files)
    except ReportError as error:
        reason = str(error).splitlines()[0]
        problems.append(Problem("error", planned.name, reason, f"remove cells/{planned.hash}; {_RERUN}"))
        return StudyCell(planned, failure=f"cannot be read: {reason}")
    return StudyCell(planned, manifest, run)


def _failure(path: Path) -> str:
    """Why a cell failed; "" when nothing says that it did."""
    if not path.is_file():
        return ""
    try:
        told = _mapping(path)
    except ReportError:
        return "failed; its reason cannot be read"
    reason = " ".join(str(told.get("reason") or "failed without a reason").split())
    detail = " ".join(str(told.get("detail") or "").split())
    return f"{reason}: {detail}" if detail else reason


def _read_run(
    out: Path,
    folder: Path,
    plan: SuitePlan,
    planned: PlannedCell,
    manifest: CellManifest,
    problems: list[Problem],
    files: dict[str, InputFile],
) -> Run:
    artifacts = out / "artifacts"
    run = _one_run(folder / "runs", artifacts, planned, problems, files)
    applied = out / APPLIED / planned.hash
    marker = applied / MADE_FROM
    if applied.is_dir() and not (marker.is_file() and marker.read_bytes() == made_from(plan, planned).encode()):
        what = f"applied/{planned.hash} is not whole or not of this plan's Selectors ({MADE_FROM}): it is left out"
        problems.append(Problem("error", planned.name, what, f"remove applied/{planned.hash}; {_RERUN}"))
    elif applied.is_dir():
        try:
            learned = _one_run(applied, artifacts, planned, problems, files)
        except ReportError as error:
            fix = f"remove applied/{planned.hash}; {_RERUN}"
            problems.append(Problem("error", planned.name, f"its Selectors' confidences cannot be read: {error}", fix))
        else:
            for task, cell in learned.cells.items():
                if task in run.cells and _same_answers(cell, run.cells[task]):
                    run.cells[task] = cell
                elif task in run.cells:
                    what = f"the Selectors were applied to other answers to {task} than the cell's"
                    fix = f"remove applied/{planned.hash}; {_RERUN}"
                    problems.append(Problem("error", planned.name, what, fix))
    for task, n in manifest.samples.items():
        found = len(run.cells[task].answers) if task in run.cells else 0
        if found not in (0, n):
            what = f"{task}: {found} samples, its {CELL_FILE} says {n}"
            problems.append(Problem("error", planned.name, what, f"remove cells/{planned.hash}; {_RERUN}"))
            del run.cells[task]
    for task in planned.tasks:
        if task not in run.cells and not task.endswith("_dev"):
            problems.append(Problem("error", planned.name, f"holds no complete {task}", _RERUN))
    return run


def _one_run(
    folder: Path, artifacts: Path, planned: PlannedCell, problems: list[Problem], files: dict[str, InputFile]
) -> Run:
    """The one model whose answers lie below a folder, with its complete tasks only."""
    inputs = read_runs([folder], artifacts if artifacts.is_dir() else None)
    for problem in inputs.problems:
        problems.append(dataclasses.replace(problem, where=f"{planned.name}, {problem.where}"))
    for file in inputs.files:
        path = f"{folder.name if folder.name == planned.hash else planned.hash}/{file.path}"
        files.setdefault(path, dataclasses.replace(file, path=path))
    runs = [run for run in inputs.runs if any(not cell.damage for cell in run.cells.values())]
    if len(runs) != 1:
        raise RunError(f"answers of {len(runs)} models in one cell ({', '.join(run.key[:16] for run in runs)})")
    run = runs[0]
    run.cells = {task: cell for task, cell in sorted(run.cells.items()) if not cell.damage}
    return run


def _same_answers(cell: Cell, other: Cell) -> bool:
    """Whether two copies hold the same answers, whatever confidences stand beside them."""
    return {k: dataclasses.replace(a, confidences={}) for k, a in cell.answers.items()} == {
        k: dataclasses.replace(a, confidences={}) for k, a in other.answers.items()
    }


def _mapping(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); {_RERUN}") from error
    if not isinstance(told, dict):
        raise ReportError(f"{path}: expected a JSON object, got {type(told).__name__}; {_RERUN}")
    return told


def _parse(model: type[_Model], told: dict[str, Any], path: Path) -> _Model:
    try:
        return model.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ReportError(f"{path}: {where}: {first['msg']}; {_RERUN}") from error
