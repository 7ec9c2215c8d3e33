"""The Pareto front against its definition, dominance against the noise, and the cheapest that keeps enough by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.metrics import cheapest, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(POINTS, st.booleans())
def test_without_noise_it_is_the_textbook_front(points: list[tuple[int, int]], higher: bool) -> None:
    cost, value = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    sign = 1 if higher else -1
    places = pareto_front(cost, value, higher_is_better=higher)
    for i, place in enumerate(places):
        beaten = [
            j for j in range(len(points))
            if cost[j] <= cost[i] and sign * value[j] >= sign * value[i] and points[j] != points[i]
        ]  # fmt: skip
        assert (place == "front") == (not beaten)
        if place == "tied":  # as good for less: no difference in value that would count
            assert all(value[j] == value[i] for j in beaten)


def test_a_difference_within_the_noise_does_not_rule_out() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(scale=0.05, size=(2000, 1))
    own = rng.normal(scale=[0.001, 0.001, 0.02, 0.001], size=(2000, 4))
    value = np.array([0.60, 0.70, 0.69, 0.50])
    draws = value + shared + own
    # the third loses to the second by less than its noise; the fourth by much more; what is shared cancels out
    assert pareto_front([3, 4, 5, 5], value, draws=draws) == ["front", "front", "tied", "dominated"]
    assert pareto_front([3, 4, 5, 5], value) == ["front", "front", "dominated", "dominated"]


def test_the_cheapest_that_keeps_enough() -> None:
    cost, value = [16, 4, 3, 5], [0.80, 0.77, 0.70, 0.79]
    found = cheapest(cost, value, 0.8, 0.95)
    assert (found.index, found.kept) == (1, pytest.approx(0.77 / 0.8))
    assert cheapest(cost, value, 0.8, 0.98).index == 3
    assert cheapest(cost, value, 0.9, 0.95).index is None
    assert math.isnan(cheapest(cost, value, 0.8, 0.95).lo)


def test_a_share_that_is_kept_beyond_the_noise() -> None:
    rng = np.random.default_rng(1)
    value = np.array([0.80, 0.765, 0.79])
    draws = value + rng.normal(scale=[0.0, 0.01, 0.002], size=(2000, 3))
    found = cheapest([16, 4, 5], value, 0.8, 0.95, draws=draws, reference_draws=draws[:, 0])
    assert found.index == 1 and found.sure == 2
    assert (found.lo, found.hi) == pytest.approx((0.765 / 0.8 - 0.0245, 0.765 / 0.8 + 0.0245), abs=0.003)


@pytest.mark.parametrize(
    ("cost", "value", "message"),
    [
        ([1, 2], [1], "a cost and a value"),
        ([1, math.inf], [1, 2], "cost of configuration 1"),
        ([1], [math.nan], "value"),
    ],
)
def test_what_has_no_front(cost: list[float], value: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pareto_front(cost, value)


def test_what_nothing_can_be_kept_of() -> None:
    with pytest.raises(ValueError, match="above 0"):
        cheapest([1], [1], 0.0, 0.95)
    with pytest.raises(ValueError, match="neither"):
        cheapest([1], [1], 1.0, 0.95, draws=np.ones((3, 1)))
    with pytest.raises(ValueError, match="shape"):
        pareto_front([1], [1], draws=np.ones((3, 2)))
