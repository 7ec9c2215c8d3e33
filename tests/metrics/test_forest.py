"""Importance by forests against exact expectations, brute-force Shapley values and the variance decomposition."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitquake.metrics import Grid, ImportanceExtraError, forest_importance, grid, sensitivity, variance_shares
from bitquake.metrics.forest import _permutation, shap_values

Array = NDArray[Any]


@pytest.fixture(scope="module")
def study() -> tuple[Grid, Array]:
    """A full grid of widths, a curved additive effect and an interaction."""
    rows = np.array(list(itertools.product([2, 3, 4, 6, 8, 16], repeat=3)), dtype=float)
    y = 1.2 * (1 - 0.9 / rows[:, 0] ** 2) * (1 - 3.2 / rows[:, 2] ** 2) - 0.1 / rows[:, 1] ** 2
    return grid({name: list(rows[:, i]) for i, name in enumerate(("vision", "connector", "language"))}), y


class _Known:
    """A tree that knows the function."""

    def predict(self, rows: Array, check_input: bool = True) -> Array:
        return np.asarray(2 * rows[:, 0] + rows[:, 1] * rows[:, 2])


def test_permutation_is_the_mean_over_all_pairs_of_unseen_runs() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 3))
    owner = np.array([0, 1, 1])  # the second factor has two columns, which move together
    tree = _Known()
    y = tree.predict(rows) + 0.3 * rng.normal(size=20)
    unseen = np.array([1, 4, 5, 9, 12, 17])
    forest = SimpleNamespace(estimators_=[tree], estimators_samples_=[np.setdiff1d(np.arange(20), unseen)])
    found, r2 = _permutation(forest, rows, owner, y, 2, seed=3)
    own = ((y - tree.predict(rows)) ** 2)[unseen].mean()
    for factor, columns in enumerate(([0], [1, 2])):
        total = 0.0
        for i, other in itertools.product(unseen, repeat=2):
            moved = rows[[i]].copy()
            moved[0, columns] = rows[other, columns]
            total += float((y[i] - tree.predict(moved)[0]) ** 2)
        assert found[factor] == pytest.approx((total / len(unseen) ** 2 - own) / y.var(), rel=1e-5)
    assert r2 == pytest.approx(1 - own / y.var(), rel=1e-5)


def test_shap_values_are_the_shapley_values_of_the_forest(study: tuple[Grid, Array]) -> None:
    """Local additivity, and the sum over subsets of factors with the others taken from the background."""
    from sklearn.ensemble import RandomForestRegressor

    rng = np.random.default_rng(1)
    rows = rng.integers(0, 4, size=(24, 3)).astype(float)
    y = rows[:, 0] * rows[:, 1] + rows[:, 2]
    forest = RandomForestRegressor(n_estimators=20, random_state=0).fit(rows, y)
    found, base = shap_values(forest, rows)
    assert base == pytest.approx(forest.predict(rows).mean())
    assert base + found.sum(axis=1) == pytest.approx(forest.predict(rows), abs=1e-6)

    def worth(x: Array, known: tuple[int, ...]) -> float:
        mixed = rows.copy()
        mixed[:, list(known)] = x[list(known)]
        return float(forest.predict(mixed).mean())

    for x, values in zip(rows[:3], found[:3], strict=True):
        for i in range(3):
            others = [j for j in range(3) if j != i]
            by_hand = 0.0
            for size in range(3):
                for known in itertools.combinations(others, size):
                    weight = math.factorial(size) * math.factorial(2 - size) / 6
                    by_hand += weight * (worth(x, (*known, i)) - worth(x, known))
            assert values[i] == pytest.approx(by_hand, abs=1e-6)


def test_on_a_full_grid_impurity_and_permutation_are_shares_of_the_variance(study: tuple[Grid, Array]) -> None:
    runs, y = study
    exact = variance_shares(runs, y).importance
    found = forest_importance(runs, y, seed=42, methods=["impurity", "permutation"])
    assert found.r2 > 0.98 and found.notes == ()
    for shares in found.importance.values():
        assert {k: s.value for k, s in shares.items()} == pytest.approx(
            {k: s.value for k, s in exact.items()}, abs=0.04
        )
        assert sum(share.value for share in shares.values()) == pytest.approx(1)


def test_the_ways_agree_on_the_order_and_shap_gives_small_factors_more(study: tuple[Grid, Array]) -> None:
    runs, y = study
    draws = y + np.random.default_rng(5).normal(scale=0.01, size=(3, len(y)))
    found = sensitivity(runs, y, trees=30, draws=draws, refits=3)
    order = ["language", "vision", "connector"]
    for shares in found.importance.values():
        assert sorted(shares, key=lambda name: -shares[name].value) == order
        assert all(share.lo <= share.value <= share.hi for share in shares.values())
    assert all(one.rank_correlation == 1 for one in found.agreement) and len(found.agreement) == 6
    assert found.importance["shap"]["vision"].value > found.importance["permutation"]["vision"].value
    three = [found.importance[way]["vision"].value for way in ("impurity", "permutation", "shap")]
    assert found.consensus["vision"].value == pytest.approx(np.mean(three))
    assert found.consensus["vision"].lo < found.consensus["vision"].value < found.consensus["vision"].hi
    assert found.forest is not None and found.forest.trees == 30


def test_names_of_levels_do_not_matter() -> None:
    """A factor without order is one column a level; the first names sort the other way round."""
    rng = np.random.default_rng(4)
    kind = rng.integers(0, 3, 60)
    bits = rng.choice([2, 4, 8], 60)
    y = np.array([0.2, 0.9, 0.4])[kind] + 0.01 * bits
    one = forest_importance(grid({"m": [("gptq", "awq", "rtn")[k] for k in kind], "b": list(bits)}), y, trees=60)
    two = forest_importance(grid({"m": [("a", "b", "c")[k] for k in kind], "b": list(bits)}), y, trees=60)
    for way, shares in one.importance.items():
        assert shares["m"].value == pytest.approx(two.importance[way]["m"].value, abs=0.03)
        assert shares["m"].value > 0.8
    again = forest_importance(grid({"m": [("a", "b", "c")[k] for k in kind], "b": list(bits)}), y, trees=60)
    assert again == two  # the same seed


def test_a_forest_that_predicts_nothing_says_so() -> None:
    rng = np.random.default_rng(6)
    runs = grid({"a": list(rng.integers(0, 3, 40)), "b": list(rng.integers(0, 3, 40))})
    found = forest_importance(runs, rng.normal(size=40), methods=["permutation"])
    assert found.r2 < 0.3 and "predicts unseen runs badly" in found.notes[0]


@pytest.mark.parametrize(("library", "method"), [("sklearn.ensemble", "impurity"), ("shap", "shap")])
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, study: tuple[Grid, Array], library: str, method: Any
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportanceExtraError, match=r'pip install "bitquake\[importance\]"'):
        forest_importance(*study, methods=[method], trees=10)


def test_what_a_forest_refuses(study: tuple[Grid, Array]) -> None:
    with pytest.raises(ValueError, match="unknown method 'gain'"):
        forest_importance(*study, methods=["gain"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least 8 runs"):
        forest_importance(grid({"a": [1, 2, 3]}), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="shape"):
        forest_importance(*study, draws=np.zeros((2, 3)))
