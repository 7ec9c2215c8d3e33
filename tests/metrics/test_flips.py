"""Flips against loops, SciPy's binomial test and false discovery control, and worked examples of the literature."""

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
from scipy.stats import binomtest, false_discovery_control

from bitquake import metrics
from bitquake.metrics import Samples

Array = NDArray[Any]


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert metrics.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-12)
    assert metrics.mcnemar(gained, lost) == metrics.mcnemar(lost, gained)


def test_mcnemar_of_many_flips() -> None:
    assert metrics.mcnemar(5_000, 5_300) == pytest.approx(binomtest(5_000, 10_300).pvalue, rel=1e-9)
    assert metrics.mcnemar(0, 2_000) == 0 or metrics.mcnemar(0, 2_000) < 1e-300


def test_mcnemar_of_a_published_example() -> None:
    """Airway hyper-responsiveness before and after a transplantation: Fagerland, Lydersen & Laake 2013, exact test."""
    assert metrics.mcnemar(1, 7) == pytest.approx(0.070, abs=5e-4)


@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.05, 1.0])), min_size=1, max_size=40))
def test_adjusted_p_values_are_those_of_scipy(p: list[float]) -> None:
    expected = false_discovery_control(p, method="bh")
    assert metrics.benjamini_hochberg(p) == pytest.approx(expected, abs=1e-12)
    with_gaps = np.insert(np.array(p), [0, len(p) // 2, len(p)], math.nan)
    adjusted = metrics.benjamini_hochberg(with_gaps)
    assert (np.isnan(adjusted) == np.isnan(with_gaps)).all()
    assert adjusted[~np.isnan(adjusted)] == pytest.approx(expected, abs=1e-12)


def test_the_worked_example_of_benjamini_and_hochberg() -> None:
    """Fifteen comparisons of a thrombolysis trial (1995, section 3.1): four are rejected at 5 %, Bonferroni: three."""
    p = np.array([0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344])
    p = np.append(p, [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0])
    adjusted = metrics.benjamini_hochberg(p[::-1])[::-1]
    assert (adjusted <= 0.05).sum() == 4
    assert (p * 15 <= 0.05).sum() == 3
    assert adjusted[3] == pytest.approx(0.0095 * 15 / 4)


def pair(rng: np.random.Generator, baseline: Samples) -> Samples:
    """A candidate that answers a fifth of the questions anew."""
    redone = rng.random(np.size(baseline.score)) < 0.2
    score = np.where(redone, rng.choice([0.0, 0.3, 0.6, 1.0], redone.size), baseline.score)
    return Samples(score, rng.random(redone.size), baseline.cluster)


def no_narrower(limits: Array, changed: Array) -> tuple[float, float]:
    """Bootstrap limits, at least as wide as the exact binomial interval."""
    exact = binomtest(int(changed.sum()), changed.size).proportion_ci(0.95, method="exact")
    return min(limits[0], exact.low), max(limits[1], exact.high)


def test_flips_are_counted_and_their_interval_is_that_of_repeated_samples(
    clustered: Callable[..., Samples], drawn_by_hand: Callable[..., Array]
) -> None:
    rng = np.random.default_rng(0)
    baseline = clustered(rng, 40)
    candidate = pair(rng, baseline)
    lost = [a < 0.5 <= b for a, b in zip(candidate.score, baseline.score, strict=True)]
    gained = [b < 0.5 <= a for a, b in zip(candidate.score, baseline.score, strict=True)]
    found = metrics.flips(candidate, baseline, replicates=200, seed=4)
    assert (found.n, found.right_to_wrong, found.wrong_to_right) == (len(lost), sum(lost), sum(gained))
    assert min(sum(lost), sum(gained)) > 0
    assert found.p_value == pytest.approx(binomtest(sum(gained), sum(gained) + sum(lost)).pvalue)
    assert found.odds_ratio == pytest.approx(sum(gained) / sum(lost))
    changed = np.array(lost) | np.array(gained)
    assert found.rate == pytest.approx(changed.mean())
    codes = np.unique(baseline.cluster, return_inverse=True)[1]
    rates = [np.repeat(changed, counts[codes]).mean() for counts in drawn_by_hand(40, 200, 4, 0)]
    assert (found.lo, found.hi) == pytest.approx(no_narrower(np.quantile(rates, [0.025, 0.975]), changed))
    back = metrics.flips(baseline, candidate, replicates=200, seed=4)
    assert (back.right_to_wrong, back.wrong_to_right) == (found.wrong_to_right, found.right_to_wrong)
    assert (back.rate, back.p_value) == (found.rate, found.p_value)


def level_by_loop(confidence: Array, bins: int) -> list[int]:
    """Level of each sample, from the least confident: that of the middle of its tie; -1 without a confidence."""
    present = [c for c in confidence if not math.isnan(c)]
    out = []
    for c in confidence:
        below, equal = sum(other < c for other in present), sum(other == c for other in present)
        out.append(-1 if math.isnan(c) else bins * (2 * below + equal) // (2 * len(present)))
    return out


def test_flips_by_confidence_are_those_of_each_level(
    clustered: Callable[..., Samples], drawn_by_hand: Callable[..., Array]
) -> None:
    rng = np.random.default_rng(1)
    baseline = clustered(rng, 60)
    candidate = pair(rng, baseline)
    found = metrics.flips_by_confidence(candidate, baseline, 4, replicates=150, seed=2)
    which = np.array(level_by_loop(baseline.confidence, 4))
    before, after = baseline.score >= 0.5, candidate.score >= 0.5
    assert len(found) == len(set(which) - {-1}) == 4
    codes = np.unique(baseline.cluster, return_inverse=True)[1]
    draws = drawn_by_hand(60, 150, 2, 0)[:, codes]
    for k, level in enumerate(found):
        inside = which == k
        assert level.n == inside.sum()
        assert level.right_to_wrong == (inside & before & ~after).sum()
        assert level.wrong_to_right == (inside & ~before & after).sum()
        assert level.rate == pytest.approx((before != after)[inside].mean())
        rates = [np.average((before != after)[inside], weights=w[inside]) for w in draws]
        expected = no_narrower(np.quantile(rates, [0.025, 0.975]), (before != after)[inside])
        assert (level.lo, level.hi) == pytest.approx(expected)
        c = baseline.confidence[inside]
        assert ((c > level.lower) | (c == 0)).all() and (c <= level.upper).all()
    assert (found[0].lower, found[-1].upper) == (0.0, 1.0)
    assert all(a.upper == b.lower for a, b in itertools.pairwise(found))
    # Without ties, and with samples that part evenly, the levels are of equal size.
    even = Samples(rng.random(100), rng.permutation(100) / 100, np.arange(100))
    assert [level.n for level in metrics.flips_by_confidence(even, even, replicates=2, seed=0)] == [20] * 5


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=40), st.integers(1, 6))
def test_levels_part_the_flips_and_never_a_tie(rows: list[tuple[int, bool, bool]], bins: int) -> None:
    confidence, before, after = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    baseline, candidate = Samples(before, confidence / 4), Samples(after, None)
    found = metrics.flips_by_confidence(candidate, baseline, bins, replicates=3, seed=0)
    whole = metrics.flips(candidate, baseline, replicates=3, seed=0)
    assert sum(level.n for level in found) == whole.n == len(rows)
    assert sum(level.right_to_wrong for level in found) == whole.right_to_wrong
    assert sum(level.wrong_to_right for level in found) == whole.wrong_to_right
    expected = level_by_loop(confidence / 4, bins)
    assert [level.n for level in found] == [expected.count(k) for k in sorted(set(expected))]
    assert 0 <= whole.rate <= 1 and 0 < whole.p_value <= 1


def test_edges_are_defined() -> None:
    none = metrics.flips(Samples([], [], []), Samples([], [], []), seed=0)
    assert (none.n, none.p_value) == (0, 1.0)
    assert math.isnan(none.rate) and math.isnan(none.lo) and math.isnan(none.odds_ratio)
    assert metrics.flips_by_confidence(Samples([], [], []), Samples([], [], []), seed=0) == []
    same = Samples(np.ones(10), None, np.arange(10) // 2)
    still = metrics.flips(same, same, replicates=20, seed=0)
    assert still[:5] == (10, 0, 0, 0.0, 0.0) and still.p_value == 1.0
    assert still.hi == pytest.approx(0.3084971)  # none in 10: Clopper and Pearson
    assert metrics.flips_by_confidence(same, same, seed=0) == []
    wrong = metrics.flips(same._replace(score=np.zeros(10)), same, replicates=20, seed=0)
    assert wrong[:4] == (10, 10, 0, 1.0) and wrong.hi == 1.0
    assert math.isnan(wrong.odds_ratio)
    one_image = metrics.flips(Samples([0.0, 1.0], None, [1, 1]), Samples([1.0, 1.0], None, [1, 1]), seed=0)
    assert one_image.rate == 0.5 and math.isnan(one_image.lo)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mcnemar(-1, 3), "whole numbers of at least 0, got -1"),
        (lambda: metrics.mcnemar(1.5, 3), "whole numbers of at least 0, got 1.5"),
        (lambda: metrics.benjamini_hochberg([1.2]), r"in \[0, 1\] or NaN"),
        (lambda: metrics.benjamini_hochberg([[0.1]]), "one-dimensional"),
        (lambda: metrics.flips(Samples([1.0]), Samples([1.0, 0.0]), seed=0), "got 1 and 2 samples"),
        (lambda: metrics.flips(Samples([1.0], None, ["a"]), Samples([1.0], None, ["b"]), seed=0), "cluster ids differ"),
        (lambda: metrics.flips_by_confidence(Samples([1.0]), Samples([1.0]), 0, seed=0), "bins must be"),
        (lambda: metrics.flips(Samples([1.0]), Samples([1.0]), replicates=0, seed=0), "at least 1, got 0"),
        (lambda: metrics.flips(Samples([1.0]), Samples([1.0]), level=5, seed=0), "level must be"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
