"""Detectable differences against the power of the tests they are about, by formula and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from bitquake import metrics


@pytest.mark.parametrize(("level", "power"), [(0.95, 0.8), (0.9, 0.9), (0.99, 0.5)])
def test_a_difference_of_this_size_is_found_with_this_power(level: float, power: float) -> None:
    error = 0.013
    half = norm.ppf((1 + level) / 2) * error
    least = metrics.minimum_detectable_difference(0.02 - half, 0.02 + half, level=level, power=power)
    # A normal estimate with this mean and error leaves the middle of its null distribution upwards.
    assert norm.sf(half, loc=least, scale=error) == pytest.approx(power)


def test_the_rule_of_thumb_in_the_docstring() -> None:
    assert metrics.minimum_detectable_difference(-0.01, 0.01) == pytest.approx(0.01 * 1.43, rel=1e-3)
    assert metrics.minimum_detectable_difference(0.0, 0.0) == 0
    assert math.isnan(metrics.minimum_detectable_difference(math.nan, math.nan))


@pytest.mark.parametrize(("discordant", "n"), [(0.1, 1000), (0.3, 400), (0.05, 5000)])
def test_mcnemars_test_finds_the_detectable_change(discordant: float, n: int) -> None:
    change = metrics.minimum_detectable_accuracy_change(discordant, n)
    # Connor 1987, forwards: the samples that a change needs.
    needed = (norm.ppf(0.975) * math.sqrt(discordant) + norm.ppf(0.8) * math.sqrt(discordant - change**2)) ** 2
    assert needed / change**2 == pytest.approx(n)
    rng = np.random.default_rng(0)
    shares = [(discordant + change) / 2, (discordant - change) / 2, 1 - discordant]
    lost, gained, _ = rng.multinomial(n, shares, 40_000).T
    found = (lost - gained) / np.sqrt(lost + gained) > norm.ppf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.02)


def test_more_power_or_fewer_samples_need_a_larger_change() -> None:
    changes = [metrics.minimum_detectable_accuracy_change(0.2, n) for n in (100, 1_000, 10_000)]
    assert changes == sorted(changes, reverse=True)
    assert metrics.minimum_detectable_accuracy_change(0.2, 1_000, power=0.95) > changes[1]
    for hopeless in ((0.2, 0), (0.0, 100), (0.2, 3), (0.001, 100)):
        assert metrics.minimum_detectable_accuracy_change(*hopeless) == math.inf


def test_samples_needed_shrink_the_interval_to_what_is_asked() -> None:
    n = metrics.samples_needed(-0.03, 0.05, 500, 0.02)
    shrink = math.sqrt(500 / n)
    assert metrics.minimum_detectable_difference(-0.04 * shrink, 0.04 * shrink) == pytest.approx(0.02, rel=1e-3)
    assert n == math.ceil(n)
    assert math.isnan(metrics.samples_needed(math.nan, 0.1, 500, 0.02))
    assert metrics.samples_needed(0.0, 0.0, 500, 0.02) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.minimum_detectable_difference(0.1, 0.0), "runs from lo to hi"),
        (lambda: metrics.minimum_detectable_difference(0.0, 0.1, level=95), "level must be"),
        (lambda: metrics.minimum_detectable_difference(0.0, 0.1, power=80), "power must be"),
        (lambda: metrics.minimum_detectable_accuracy_change(1.2, 10), "discordant must be"),
        (lambda: metrics.minimum_detectable_accuracy_change(0.2, -1), "n must be"),
        (lambda: metrics.samples_needed(0.0, 0.1, 100, 0.0), "difference must be above 0"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
