"""Answers that flip between right and wrong against full precision, tested over all runs and tasks of a world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from bitquake.metrics import benjamini_hochberg, flips, flips_by_confidence
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import samples_of
from bitquake.reports.runs import Cell
from bitquake.reports.schema import CellEntry, FlipBin, FlipEntry

SIGNIFICANT = 0.05
"""False discovery rate below which flips are said to go one way."""


def flip_entry(cell: Cell, twin: Cell, *, replicates: int, seed: int) -> FlipEntry:
    """Flips of a run against its twin on the same samples; ``adjust`` completes the test over the whole world."""
    candidate, baseline = samples_of(cell), samples_of(twin)
    found = flips(candidate, baseline, replicates=replicates, seed=seed, level=LEVEL)
    levels = flips_by_confidence(candidate, baseline, replicates=replicates, seed=seed, level=LEVEL)
    return FlipEntry(
        n=found.n,
        right_to_wrong=found.right_to_wrong,
        wrong_to_right=found.wrong_to_right,
        rate=found.rate,
        lo=_number(found.lo),
        hi=_number(found.hi),
        p_value=found.p_value,
        p_adjusted=found.p_value,
        n_tests=1,
        odds_ratio=_number(found.odds_ratio),
        effect="tied",
        by_confidence=[
            FlipBin.model_validate({**level._asdict(), "lo": _number(level.lo), "hi": _number(level.hi)})
            for level in levels
        ],
    )


def adjust(cells: Iterable[CellEntry]) -> None:
    """Complete the flips of all cells: Benjamini-Hochberg within each world, and what follows from it."""
    by_world: dict[str, list[FlipEntry]] = {}
    for cell in cells:
        if cell.flips is not None:
            by_world.setdefault(cell.world, []).append(cell.flips)
    for found in by_world.values():
        adjusted = benjamini_hochberg([entry.p_value for entry in found])
        for entry, p in zip(found, adjusted, strict=True):
            entry.p_adjusted, entry.n_tests = float(p), len(found)
            if p < SIGNIFICANT:
                entry.effect = "worse" if entry.right_to_wrong > entry.wrong_to_right else "better"


def flip_entries(cells: Mapping[str, Cell], *, twin: str, replicates: int, seed: int) -> dict[str, FlipEntry]:
    """Run key -> flips against the twin, for paired runs on one task."""
    if twin not in cells:
        return {}
    others = {key: cell for key, cell in cells.items() if key != twin}
    return {key: flip_entry(cell, cells[twin], replicates=replicates, seed=seed) for key, cell in others.items()}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
