"""Which factor moves a metric, by random forests: impurity, permutation of unseen runs, and SHAP values.

For grids with holes, numbers of any kind, and next to the variance shares of `importance`: arXiv 2601.15287 takes the
mean of these three. Needs scikit-learn, and SHAP values need shap, which come with `bitquake[importance]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from .importance import Grid, Share, check_draws, check_target, normalised
from .samples import FloatArray, IntArray

ForestMethod = Literal["impurity", "permutation", "shap"]
FOREST_METHODS: tuple[ForestMethod, ...] = ("impurity", "permutation", "shap")
SHIFTS = 16
"""Ways in which a tree's unseen runs are permuted."""
REFIT_TREES = 30
"""Most trees of a forest behind an interval: fewer make intervals wider, never narrower, and cost less."""
BACKGROUND = 128
"""Most runs that a SHAP value is an average over."""


class ImportanceExtraError(ValueError):
    """A library of the extra `importance` is not installed."""


@dataclass(frozen=True)
class ForestImportance:
    """Importance of the factors by a random forest.

    scores: method -> factor -> score. ``impurity``: share of the reduction of variance inside the trees;
    ``permutation``: mean increase of the squared error of runs that a tree has not seen when the factor is permuted
    among them, over the target's variance; ``shap``: mean |SHAP value|, in units of the target.
    importance: the same, normalised to a sum of 1, with intervals from refits. r2: of the predictions for unseen runs
    (out of bag); a forest that does not predict (below about 0.5) says little. refitted: method -> the normalised
    scores of each refit.
    """

    factors: tuple[str, ...]
    scores: dict[ForestMethod, dict[str, float]]
    importance: dict[ForestMethod, dict[str, Share]]
    r2: float
    trees: int
    n: int
    refitted: dict[ForestMethod, list[dict[str, float]]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()


def forest_importance(
    runs: Grid,
    target: ArrayLike,
    *,
    methods: Sequence[ForestMethod] = FOREST_METHODS,
    trees: int = 100,
    seed: int = 0,
    draws: ArrayLike | None = None,
    refits: int = 0,
    level: float = 0.95,
) -> ForestImportance:
    """Importance of the factors by a random forest.

    Numeric factors enter as numbers, others as one column for each level (whose importances are added up, and which are
    permuted together).

    Args:
        runs: of any kind: cells may be missing, or have several runs.
        target: (n,) finite value of each run.
        methods: which scores. trees: of the forest. seed: of the forest and the permutations.
        draws: (replicates, n) bootstrap replicates of the values.
        refits: forests behind each interval: of the first replicates where there are `draws`, otherwise of other seeds
            (then it is the spread of the method alone). The interval is normal.
        level: of the intervals.

    Raises:
        ImportanceExtraError: scikit-learn or shap is not installed.
        ValueError: fewer than 8 runs, an unknown method, or a target that `check_target` refuses.
    """
    values = check_target(runs, target)
    replicates = None if draws is None else check_draws(draws, runs.n)
    if unknown := [method for method in methods if method not in FOREST_METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(FOREST_METHODS)}")
    if runs.n < 8:
        raise ValueError(f"a forest needs at least 8 runs, got {runs.n}; use the variance decomposition")
    features, owner = _features(runs)
    fit = _forest_of(trees)
    scores, r2 = _scores(fit, features, owner, values, runs.factors, methods, seed)
    refit = _forest_of(min(trees, REFIT_TREES))
    refitted: dict[ForestMethod, list[dict[str, float]]] = {method: [] for method in methods}
    for again in range(refits if replicates is None else min(refits, len(replicates))):
        drawn = values if replicates is None else replicates[again]
        if np.ptp(drawn) > 0:
            found, _ = _scores(refit, features, owner, drawn, runs.factors, methods, seed + 1 + again)
            for method in methods:
                refitted[method].append(normalised(found[method]))
    importance = {method: with_intervals(normalised(scores[method]), refitted[method], level) for method in methods}
    notes = () if r2 >= 0.5 else (f"the forest predicts unseen runs badly (R² {r2:.2f}): its importances say little",)
    return ForestImportance(runs.factors, scores, importance, r2, trees, runs.n, refitted, notes)


def _forest_of(trees: int) -> Callable[[FloatArray, FloatArray, int], Any]:
    try:
        from sklearn.ensemble import RandomForestRegressor
    except ImportError as error:
        raise ImportanceExtraError(
            'random forests need scikit-learn: pip install "bitquake[importance]" (or use the method anova)'
        ) from error

    def fit(features: FloatArray, values: FloatArray, seed: int) -> Any:
        return RandomForestRegressor(n_estimators=trees, random_state=seed).fit(features, values)

    return fit


def _features(runs: Grid) -> tuple[FloatArray, IntArray]:
    """(n, columns) numbers, and which factor each column belongs to."""
    columns, owner = [], []
    for i, name in enumerate(runs.factors):
        if runs.is_numeric(name):
            columns.append(np.array([float(level) for level in runs.levels[i]])[runs.codes[:, i]])
            owner.append(i)
        else:
            for code in range(len(runs.levels[i])):
                columns.append((runs.codes[:, i] == code).astype(np.float64))
                owner.append(i)
    return np.stack(columns, axis=1), np.array(owner, dtype=np.int64)


def _scores(
    fit: Callable[[FloatArray, FloatArray, int], Any],
    features: FloatArray,
    owner: IntArray,
    values: FloatArray,
    factors: tuple[str, ...],
    methods: Sequence[ForestMethod],
    seed: int,
) -> tuple[dict[ForestMethod, dict[str, float]], float]:
    """Scores of one forest, and its out-of-bag R²."""
    forest = fit(features, values, seed)
    permutation, r2 = _permutation(forest, features, owner, values, len(factors), seed)
    found: dict[ForestMethod, FloatArray] = {}
    for method in methods:
        if method == "impurity":
            weights = np.asarray(forest.feature_importances_, dtype=np.float64)
            found[method] = np.array([weights[owner == i].sum() for i in range(len(factors))])
        elif method == "permutation":
            found[method] = permutation
        else:
            contributions, _ = shap_values(forest, features, seed=seed)
            by_factor = np.stack([contributions[:, owner == i].sum(axis=1) for i in range(len(factors))], axis=1)
            found[method] = np.abs(by_factor).mean(axis=0)
    return {
        method: {name: float(score) for name, score in zip(factors, scores, strict=True)}
        for method, scores in found.items()
    }, r2


def _permutation(
    forest: Any, features: FloatArray, owner: IntArray, values: FloatArray, n_factors: int, seed: int
) -> tuple[FloatArray, float]:
    """Breiman's permutation importance (2001): per tree, on the runs out of its bag; and R² of these predictions.

    Each tree's unseen runs are permuted by up to SHIFTS cyclic shifts of one random order (all of them, where there
    are no more), which has less noise than as many random permutations.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    n = len(values)
    numbers = features.astype(np.float32)  # what the trees see
    increase, used = np.zeros(n_factors), 0
    votes, predicted = np.zeros(n), np.zeros(n)
    for tree, drawn in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        unseen = np.setdiff1d(np.arange(n), drawn)
        if len(unseen) < 2:
            continue
        order = rng.permutation(unseen)
        shifts = rng.permutation(len(order))[:SHIFTS]
        others = order[(np.arange(len(order)) + shifts[:, None]) % len(order)]
        rows = np.broadcast_to(numbers[order], (n_factors + 1, len(shifts), len(order), numbers.shape[1])).copy()
        for i in range(n_factors):
            rows[i][..., owner == i] = numbers[others][..., owner == i]
        found = tree.predict(rows.reshape(-1, numbers.shape[1]), check_input=False).reshape(rows.shape[:3])
        squared = ((values[order] - found) ** 2).mean(axis=(1, 2))
        increase += squared[:-1] - squared[-1]
        votes[order] += 1
        predicted[order] += found[-1, 0]
        used += 1
    seen = votes > 0
    residual = ((values[seen] - predicted[seen] / votes[seen]) ** 2).mean() if seen.any() else math.nan
    return increase / max(used, 1) / values.var(), float(1 - residual / values.var())


def shap_values(forest: Any, features: FloatArray, *, seed: int = 0) -> tuple[FloatArray, float]:
    """Interventional SHAP values of a forest (Lundberg et al. 2020), exact over a background of these runs.

    Args:
        forest: of scikit-learn.
        features: (n, columns); of more than BACKGROUND rows a random draw is the background.

    Returns:
        (n, columns) contributions, and the mean prediction of the background: for each row they add up to the forest's
        prediction.

    Raises:
        ImportanceExtraError: shap is not installed.
    """
    try:
        import shap
    except ImportError as error:
        raise ImportanceExtraError(
            'SHAP values need shap: pip install "bitquake[importance]" (or leave the method shap out)'
        ) from error
    background = features
    if len(features) > BACKGROUND:
        chosen = np.random.Generator(np.random.PCG64([seed, 2])).choice(len(features), BACKGROUND, replace=False)
        background = features[np.sort(chosen)]
    explainer = shap.TreeExplainer(forest, data=background, feature_perturbation="interventional")
    contributions = np.asarray(explainer.shap_values(features), dtype=np.float64)
    return contributions, float(np.ravel(explainer.expected_value)[0])


def with_intervals(
    importance: Mapping[str, float], refitted: Sequence[Mapping[str, float]], level: float
) -> dict[str, Share]:
    """Normal intervals from the spread of refits; none of fewer than two."""
    if len(refitted) < 2:
        return {name: Share(value) for name, value in importance.items()}
    width = float(ndtri((1 + level) / 2))
    found = {}
    for name, value in importance.items():
        half = width * float(np.std([one[name] for one in refitted], ddof=1))
        found[name] = Share(value, max(value - half, 0.0), min(value + half, 1.0))
    return found
