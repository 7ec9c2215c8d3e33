"""Shares of a grid's variance against functions whose Sobol indices are known, ANOVA by conditional means, and least
squares by projections; intervals against simulated studies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from bitquake.metrics import (
    Grid,
    agreement,
    complete_part,
    consensus,
    decompose,
    grid,
    leave_one_level,
    sensitivity,
    type_two,
    variance_shares,
    without_lowest,
)
from bitquake.metrics.bootstrap import cluster_draws
from bitquake.metrics.importance import nearest, normalised

Array = NDArray[Any]


def _full(levels: list[list[float]], repeats: int = 1) -> tuple[Grid, Array]:
    rows = np.array(list(itertools.product(*levels)) * repeats)
    return grid({f"f{i}": list(rows[:, i]) for i in range(len(levels))}), rows


def _by_conditional_means(cells: Array) -> dict[tuple[int, ...], float]:
    """Textbook ANOVA: the variance of E[y | factors of a set], less what smaller sets hold of it."""
    k = cells.ndim
    found: dict[tuple[int, ...], float] = {}
    for size in range(1, k + 1):
        for chosen in itertools.combinations(range(k), size):
            mean = cells.mean(axis=tuple(i for i in range(k) if i not in chosen))
            smaller = sum(v for other, v in found.items() if set(other) < set(chosen))
            found[chosen] = float(mean.var()) - smaller
    return found


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.integers(0, 2**32))
def test_the_parts_are_those_of_conditional_means_and_add_up(shape: list[int], seed: int) -> None:
    cells = np.random.default_rng(seed).normal(size=(2, *shape))
    parts, masks = decompose(cells, len(shape))
    for one, own in zip(cells, parts, strict=True):
        expected = _by_conditional_means(one)
        got = {tuple(i for i in range(len(shape)) if mask >> i & 1): v for mask, v in zip(masks, own, strict=True)}
        assert got.keys() == expected.keys()
        assert got == pytest.approx(expected, abs=1e-12)
        assert own.sum() == pytest.approx(one.var())


def test_the_ishigami_function_has_its_published_sobol_indices() -> None:
    """Ishigami & Homma 1990 with a = 7, b = 0.1; the closed forms are in Sobol & Levitan 1999."""
    x = (np.arange(60) + 0.5) / 60 * 2 * np.pi - np.pi
    a, b = 7.0, 0.1
    runs, rows = _full([list(x), list(x[::2]), list(x)])
    y = np.sin(rows[:, 0]) + a * np.sin(rows[:, 1]) ** 2 + b * rows[:, 2] ** 4 * np.sin(rows[:, 0])
    pi4 = math.pi**4
    v1 = 0.5 * (1 + b * pi4 / 5) ** 2
    v2, v13 = a**2 / 8, b**2 * math.pi**8 * (1 / 18 - 1 / 50)
    total = v1 + v2 + v13
    found = variance_shares(runs, y)
    expected = {"f0": v1 / total, "f1": v2 / total, "f2": 0.0}
    assert expected == pytest.approx({"f0": 0.3139, "f1": 0.4424, "f2": 0.0}, abs=1e-4)
    assert {k: s.value for k, s in found.first.items()} == pytest.approx(expected, abs=2e-3)
    assert found.interactions["f0", "f2"].value == pytest.approx(v13 / total, abs=2e-3)
    assert found.total["f2"].value == pytest.approx(v13 / total, abs=2e-3)
    assert found.importance["f0"].value == pytest.approx((v1 + v13 / 2) / total, abs=2e-3)
    assert sum(s.value for s in found.importance.values()) == pytest.approx(1)


def test_an_additive_function_has_the_variances_of_its_terms_and_no_interaction() -> None:
    runs, rows = _full([[2, 3, 4, 8], [2, 16], [3, 4, 5]])
    y = 3 * rows[:, 0] - 5 * (rows[:, 1] == 16) + rows[:, 2] ** 2
    own = [9 * np.var([2, 3, 4, 8]), 25 * np.var([0, 1]), np.var([9, 16, 25])]
    found = variance_shares(runs, y)
    assert [s.value for s in found.first.values()] == pytest.approx(np.array(own) / sum(own))
    assert found.interaction == pytest.approx(0, abs=1e-12)
    assert found.variance == pytest.approx(sum(own))
    assert found.within is None and math.isnan(found.noise) and not found.first["f0"].has_interval


def test_runs_of_a_cell_have_a_share_of_their_own() -> None:
    """Cell means 0 and 4 (variance 4), within them deviations of 1 and of 3 (mean variance 5): 4/9 and 5/9."""
    runs = grid({"bits": [4, 4, 8, 8]})
    target = [1.0, -1.0, 7.0, 1.0]
    found = variance_shares(runs, target)
    assert found.within is not None
    assert (found.first["bits"].value, found.within.value) == pytest.approx((4 / 9, 5 / 9))
    assert found.importance["bits"].value == 1
    averaged = variance_shares(runs, target, within=False)
    assert averaged.within is None and averaged.first["bits"].value == pytest.approx(1)


def _projection(columns: list[Array]) -> Array:
    matrix = np.concatenate(columns, axis=1)
    return np.asarray(matrix @ np.linalg.pinv(matrix))


@given(st.integers(0, 2**32))
def test_type_two_sums_of_squares_are_those_of_nested_projections(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = grid({"a": [0, 1, 2, *rng.integers(0, 3, 27)], "b": [0, 1, 1, *rng.integers(0, 2, 27)]})
    y = rng.normal(size=30) + runs.codes[:, 0] * 0.7
    found = type_two(runs, y)
    one = np.ones((30, 1))
    a, b = (np.eye(len(runs.levels[i]))[runs.codes[:, i]] for i in (0, 1))
    ab = (a[:, :, None] * b[:, None, :]).reshape(30, -1)

    def explained(*columns: Array) -> float:
        return float(((_projection([one, *columns]) @ y) ** 2).sum())

    whole = ((y - y.mean()) ** 2).sum()
    base = 30 * y.mean() ** 2
    assert found.first["a"].value == pytest.approx((explained(a, b) - explained(b)) / whole, abs=1e-9)
    assert found.first["b"].value == pytest.approx((explained(a, b) - explained(a)) / whole, abs=1e-9)
    assert found.interactions["a", "b"].value == pytest.approx(
        (explained(a, b, ab) - explained(a, b)) / whole, abs=1e-9
    )
    assert found.total["a"].value == pytest.approx((explained(a, b, ab) - explained(b)) / whole, abs=1e-9)
    assert found.unexplained is not None
    assert found.unexplained.value == pytest.approx(1 - (explained(a, b, ab) - base) / whole, abs=1e-9)
    # Shapley of two: half of what it adds first, half of what it adds last
    credit = ((explained(a) - base) + (explained(a, b, ab) - explained(b))) / 2
    assert found.importance["a"].value == pytest.approx(credit / (explained(a, b, ab) - base), abs=1e-9)


def test_type_two_is_the_exact_decomposition_where_the_grid_is_balanced() -> None:
    runs, rows = _full([[2, 4, 8], [2, 16], [3, 4, 5]], repeats=2)
    y = rows[:, 0] * (rows[:, 1] == 16) + rows[:, 2] + np.random.default_rng(0).normal(size=len(rows))
    exact, fitted = variance_shares(runs, y), type_two(runs, y)
    for name in runs.factors:
        assert fitted.first[name].value == pytest.approx(exact.first[name].value)
    for term in itertools.combinations(runs.factors, 2):
        assert fitted.interactions[term].value == pytest.approx(exact.interactions[term].value)
    assert exact.within is not None and fitted.unexplained is not None
    rest = exact.within.value + exact.interactions[runs.factors].value  # the fit has no interaction of three
    assert fitted.unexplained.value == pytest.approx(rest)


def test_interactions_that_would_explain_every_run_are_left_out() -> None:
    runs = grid({"a": [0, 0, 1, 1, 2], "b": [0, 1, 0, 1, 0]})
    found = type_two(runs, [1.0, 2.0, 3.0, 5.0, 4.0])
    assert not found.interactions and "left out" in found.notes[0]
    with pytest.raises(ValueError, match="do not determine"):
        type_two(grid({"a": [0, 1, 2], "b": [0, 1, 0]}), [1.0, 2.0, 3.0])


@pytest.mark.parametrize("missing", [False, True])
def test_intervals_hold_the_true_shares(missing: bool) -> None:
    """80 simulated studies: 9 cells answer the same 200 questions; 95 % intervals hold in at least 88 % of them."""
    levels = list(itertools.product([0, 1, 2], [0, 1, 2]))[int(missing) :]
    runs = grid({"a": [a for a, _ in levels], "b": [b for _, b in levels]})
    rate = np.array([0.45 + (0, 0.1, 0.25)[a] + (0, 0.06, 0.1)[b] - 0.05 * (a * b == 4) for a, b in levels])
    how: Callable[..., Any] = type_two if missing else variance_shares
    truth = how(runs, rate)
    rng, held = np.random.default_rng(2), []
    for seed in range(80):
        shared = rng.normal(size=200)
        latent = math.sqrt(0.6) * shared + math.sqrt(0.4) * rng.normal(size=(len(levels), 200))
        score = (latent < norm.ppf(rate)[:, None]).astype(float)
        draws = np.concatenate(list(cluster_draws(200, 300, 300, seed, stream=0))) @ score.T / 200
        found = how(runs, score.mean(axis=1), draws=draws)
        assert 0 < found.noise < 0.5
        for name in runs.factors:
            for kind in ("first", "importance"):
                share, true = getattr(found, kind)[name], getattr(truth, kind)[name].value
                assert 0 <= share.lo <= share.value <= share.hi <= 1
                held.append(share.lo <= true <= share.hi)
    assert np.mean(held) > 0.88


def test_intervals_over_runs_have_the_spread_of_the_mean() -> None:
    """Three runs a cell: the share of a factor without effect is noise, and its interval reaches to zero."""
    rng = np.random.default_rng(3)
    runs, rows = _full([[2, 4, 8], [0, 1]], repeats=3)
    y = rows[:, 0] + rng.normal(scale=0.5, size=len(rows))
    found = variance_shares(runs, y, replicates=500, seed=1)
    assert found.first["f1"].lo == pytest.approx(0, abs=1e-6)
    assert found.first["f0"].lo > 0.8 and found.first["f0"].hi < 1
    assert found.within is not None and found.within.lo < found.within.value < found.within.hi
    assert not variance_shares(*_without_repeats()).first["f0"].has_interval


def _without_repeats() -> tuple[Grid, Array]:
    runs, rows = _full([[2, 4, 8], [0, 1]])
    return runs, rows[:, 0] + rows[:, 1]


def test_a_level_can_be_all_there_is_to_an_importance() -> None:
    """Two bits break the model, whatever else: without them the other factor decides."""
    runs, rows = _full([[2, 3, 4], [2, 4, 16]])
    y = np.where(rows[:, 0] == 2, 0.0, 0.8 + 0.01 * rows[:, 0] + 0.02 * np.log2(rows[:, 1]))
    assert variance_shares(runs, y).importance["f0"].value > 0.99
    kept = without_lowest(runs)
    assert rows[kept].min(axis=0).tolist() == [3, 4] and kept.sum() == 4
    found = leave_one_level(runs, y)
    assert set(found) == {("f0", x) for x in (2, 3, 4)} | {("f1", x) for x in (2, 4, 16)}
    part = rows[:, 0] != 2
    by_hand = variance_shares(grid({"f0": list(rows[part, 0]), "f1": list(rows[part, 1])}), y[part])
    assert found["f0", 2.0] == by_hand and by_hand.importance["f1"].value > 0.9


def test_a_full_part_of_a_grid_with_holes() -> None:
    rows = [(a, b) for a in (2, 4, 8) for b in (2, 4, 8) if (a, b) not in ((2, 4), (2, 8))]
    runs = grid({"a": [a for a, _ in rows], "b": [b for _, b in rows]})
    assert runs.missing(9) == [{"a": 2.0, "b": 4.0}, {"a": 2.0, "b": 8.0}] and not runs.complete
    kept = complete_part(runs)
    assert [row for row, keep in zip(rows, kept, strict=True) if keep] == list(itertools.product((4, 8), (2, 4, 8)))
    assert runs.rows(kept).balanced


def test_levels_are_numbers_where_they_all_are() -> None:
    runs = grid({"bits": ["16", "4.0", "4", "8"], "part": ["16", "x", "4", "4"]})
    assert runs.levels == ((4.0, 8.0, 16.0), ("16", "4", "x"))
    assert runs.is_numeric("bits") and not runs.is_numeric("part")
    assert runs.column("bits") == [16.0, 4.0, 4.0, 8.0] and runs.counts.sum() == 4


def test_agreement_and_consensus_by_hand() -> None:
    ways = {"x": {"a": 3.0, "b": 1.0, "c": 0.0}, "y": {"a": 1.0, "b": 2.0, "c": 1.0}}
    assert normalised({"a": 3.0, "b": 1.0, "c": -1.0}) == {"a": 0.75, "b": 0.25, "c": 0.0}
    assert consensus(ways) == {"a": 0.5, "b": 0.375, "c": 0.125}
    (one,) = agreement(ways)
    # ranks (3, 2, 1) against (1.5, 3, 1.5)
    assert one.rank_correlation == pytest.approx(0.0) and one.largest_difference == pytest.approx(0.5)
    assert math.isnan(agreement({"x": ways["x"], "z": dict.fromkeys("abc", 1.0)})[0].rank_correlation)


def test_sensitivity_says_that_cells_are_missing_and_takes_the_means_of_runs() -> None:
    runs, rows = _full([[2, 3, 4], [2, 4, 8]], repeats=2)
    y = rows[:, 0] + 0.1 * rows[:, 1] + np.tile([0.0, 0.01], len(rows) // 2)
    holes = np.arange(len(rows)) % 9 != 4
    found = sensitivity(runs.rows(holes), y[holes], methods=["anova"])
    assert found.variance is not None and found.variance.method == "anova type II"
    assert "1 of 9 cells" in found.notes[0] and found.forest is None and not found.consensus


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "at least one factor"),
        ({"a": []}, "at least one run"),
        ({"a": [1, 2], "b": [1]}, "equally long"),
        ({"a": [1, 2], "b": [4, "4.0"]}, "'b' is 4.0 in every run"),
    ],
)
def test_what_is_no_grid(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(columns)


@pytest.mark.parametrize(
    ("target", "message"),
    [([1.0, 2.0], "each of 4 runs"), ([1.0, 2.0, math.nan, 3.0], "nan in run 2"), ([0.3] * 4, "no variance")],
)
def test_what_is_no_target(target: list[float], message: str) -> None:
    runs = grid({"a": [1, 1, 2, 2], "b": [1, 2, 1, 2]})
    for how in (variance_shares, type_two, sensitivity):
        with pytest.raises(ValueError, match=message):
            how(runs, target)


def test_a_grid_with_a_hole_has_no_exact_decomposition() -> None:
    runs = grid({"a": [1, 1, 2], "b": [1, 2, 1]})
    with pytest.raises(ValueError, match="1 of 4 cells have no run"):
        variance_shares(runs, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="did you mean 'a'"):
        runs.index("aa")
    assert "did you mean 'CIDEr'" in nearest("cider", ["CIDEr", "model_size"])


def test_many_combinations_of_which_few_were_run() -> None:
    """Seven factors of random numbers: 10^14 combinations, of which nothing is listed that was not asked for."""
    rng = np.random.default_rng(8)
    columns = {f"x{i}": list(np.round(rng.normal(size=100), 3)) for i in range(7)}
    runs = grid(columns)
    assert runs.n_cells > 10**13 and runs.n_missing == runs.n_cells - 100 and len(runs.missing(3)) == 3
    y = 3 * np.array(columns["x0"]) + np.array(columns["x1"])
    with pytest.raises(ValueError, match="do not determine"):
        type_two(runs, y)
    with pytest.raises(ValueError, match="no grid with a few holes"):
        complete_part(runs)
    found = sensitivity(runs, y, methods=["forest"], trees=30)
    assert max(found.importance["permutation"], key=lambda name: found.importance["permutation"][name].value) == "x0"
