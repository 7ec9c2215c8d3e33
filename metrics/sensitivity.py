"""Every way to say which factor moves a metric, side by side: variance shares, random forest, SHAP, and how they agree.

The ways measure different things. Variance shares (and impurity and permutation) are of squared effects, mean |SHAP| is
of effects as they are, so it gives small factors more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .forest import FOREST_METHODS, ForestImportance, ForestMethod, forest_importance, with_intervals
from .importance import (
    Agreement,
    Grid,
    Share,
    VarianceShares,
    agreement,
    check_target,
    consensus,
    type_two,
    variance_shares,
)

SensitivityMethod = Literal["anova", "forest", "shap"]
SENSITIVITY_METHODS: tuple[SensitivityMethod, ...] = ("anova", "forest", "shap")
REFITS = 20
"""Most forests behind an interval."""


@dataclass(frozen=True)
class Sensitivity:
    """What moves a target over a grid.

    importance: way (``anova``: Shapley effects; ``impurity``, ``permutation``, ``shap``) -> factor -> its part of 1.
    agreement: of each two of them. consensus: factor -> mean of the forest's three ways, as arXiv 2601.15287 takes it;
    empty without all three. variance, forest: what they come from, None where not asked for.
    """

    grid: Grid
    importance: dict[str, dict[str, Share]]
    agreement: list[Agreement]
    consensus: dict[str, Share]
    variance: VarianceShares | None
    forest: ForestImportance | None
    notes: tuple[str, ...]


def sensitivity(
    runs: Grid,
    target: ArrayLike,
    *,
    methods: Sequence[SensitivityMethod] = SENSITIVITY_METHODS,
    draws: ArrayLike | None = None,
    replicates: int = 0,
    refits: int = 0,
    trees: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> Sensitivity:
    """Importance of each factor, each way.

    The exact decomposition is taken where every cell has a run, otherwise least squares. Forests and SHAP values see
    the means of cells that have several runs.

    Args:
        runs, target, draws, replicates: as in `variance_shares`. methods: ``forest`` is impurity and permutation.
        refits: forests behind each of their intervals. trees, seed: of the forests. level: of the intervals.

    Raises:
        ValueError: as `variance_shares`, `type_two` and `forest_importance`; an unknown method.
    """
    values = check_target(runs, target)
    if unknown := [method for method in methods if method not in SENSITIVITY_METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(SENSITIVITY_METHODS)}")
    notes: list[str] = []
    variance: VarianceShares | None = None
    importance: dict[str, dict[str, Share]] = {}
    if "anova" in methods and runs.complete:
        variance = variance_shares(runs, values, draws=draws, replicates=replicates, seed=seed, level=level)
    elif "anova" in methods:
        variance = type_two(runs, values, draws=draws, level=level)
        notes.append(
            f"{runs.n_missing} of {runs.n_cells} cells have no run: type II sums of squares, which need not add up"
        )
    if variance is not None:
        importance["anova"] = variance.importance
        notes += variance.notes
    forest: ForestImportance | None = None
    wanted: list[ForestMethod] = [m for m in FOREST_METHODS if ("shap" if m == "shap" else "forest") in methods]
    if wanted:
        cells, means, drawn = cell_means(runs, values, draws)
        forest = forest_importance(
            cells, means, methods=wanted, trees=trees, seed=seed, draws=drawn, refits=min(refits, REFITS), level=level
        )
        importance |= {str(method): shares for method, shares in forest.importance.items()}
        notes += forest.notes
    plain = {way: {name: share.value for name, share in shares.items()} for way, shares in importance.items()}
    together: dict[str, Share] = {}
    if forest is not None and len(forest.importance) == len(FOREST_METHODS):
        again = list(zip(*forest.refitted.values(), strict=True))
        together = with_intervals(
            consensus(forest.scores),
            [consensus(dict(zip(FOREST_METHODS, one, strict=True))) for one in again],
            level,
        )
    return Sensitivity(
        runs,
        importance,
        agreement(plain),
        together,
        variance,
        forest,
        tuple(notes),
    )


def cell_means(
    runs: Grid, values: ArrayLike, draws: ArrayLike | None = None
) -> tuple[Grid, ArrayLike, ArrayLike | None]:
    """The grid with one run for each cell that has any, its mean value, and the means of the replicates."""
    if int(runs.counts.max()) == 1:
        return runs, values, draws
    weights = np.zeros((runs.n, len(runs.filled)))
    weights[np.arange(runs.n), runs.cell] = 1 / runs.counts[runs.cell]
    means = np.asarray(values, dtype=np.float64) @ weights
    drawn = None if draws is None else np.asarray(draws, dtype=np.float64) @ weights
    return Grid(runs.factors, runs.levels, runs.filled), means, drawn
