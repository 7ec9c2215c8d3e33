"""Selectors of a suite: fitted on the dev runs of its cells, and their confidences put beside the models' own.

    OUT/selectors/<hash of what it learns from>.safetensors
    OUT/applied/<hash of the cell>/                          the cell's runs with the further confidences

A finished fit or copy is kept; it is made again when what it is made from changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from bitquake.suite_plan import APPLIED, MADE_FROM, PlannedCell, PlannedFit, SuitePlan, made_from, planned_fits

SELECTORS = "selectors"


def fit_and_apply(
    plan: SuitePlan, finished: Sequence[str], folder: Path, tell: Callable[[str], None] = print
) -> list[str]:
    """Fit every Selector of a plan and add its confidences to the cells that have finished.

    Args:
        finished: hashes of the finished cells.
        folder: the output folder, on this machine.

    Returns:
        What could not be done, a line each: a Selector of cells that have not finished, a fit or a copy that failed.
    """
    problems: list[str] = []
    known = set(finished)
    cells = {cell.hash: cell for cell in reversed(plan.cells) if cell.hash in known}
    for cell in reversed(cells.values()):
        fits = list(planned_fits(plan, cell))
        lacking = sorted({one.name for fit in fits for one in fit.cells if one.hash not in cells})
        if lacking:
            problems.append(f"{cell.name}: no Selectors, for {', '.join(lacking)} has not finished")
            continue
        try:
            files = [_fitted(fit, folder, tell) for fit in fits]
            _apply(cell, files, made_from(plan, cell), folder, tell)
        except (ValueError, OSError) as error:
            problems.append(f"{cell.name}: no Selectors: {' '.join(str(error).split())}")
    return problems


def _fitted(fit: PlannedFit, folder: Path, tell: Callable[[str], None]) -> Path:
    from bitquake import selector_command
    from bitquake.model_wrappers.selector.training import Options

    file = folder / SELECTORS / fit.file
    if not file.is_file():
        tell(f"fitting {fit.name} on {', '.join(cell.name for cell in fit.cells)}")
        file.parent.mkdir(parents=True, exist_ok=True)
        runs = [folder / "cells" / cell.hash / "runs" for cell in fit.cells]
        selector_command.fit(runs, file, Options(), name=fit.name, artifacts=folder / "artifacts")
    return file


def _apply(cell: PlannedCell, files: Sequence[Path], made: str, folder: Path, tell: Callable[[str], None]) -> None:
    from bitquake import selector_command

    target = folder / APPLIED / cell.hash
    marker = target / MADE_FROM
    if marker.is_file() and marker.read_text(encoding="utf-8") == made:
        return
    tell(f"adding the Selectors' confidences to {cell.name}")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    selector_command.apply(files, [folder / "cells" / cell.hash / "runs"], target, artifacts=folder / "artifacts")
    marker.write_text(made, encoding="utf-8")
