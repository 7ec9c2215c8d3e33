"""How small a difference these samples can show: a verdict "tied" means little where only 10 points would be seen.

The usual two-sided power calculation for a normal statistic: a true difference of (z_(1-a/2) + z_power) standard errors
is found with the given power. The standard error is read off a difference's interval, which holds the clusters and
the pairing, or, before anything is run, comes from the share of answers that flip.
"""

from __future__ import annotations

import math

from scipy.special import ndtri

from .bootstrap import check_level


def minimum_detectable_difference(lo: float, hi: float, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that a comparison with the interval (lo, hi) at `level` finds with this `power`.

    In the metric's own unit, at least 0. NaN without an interval; 0 for one without width (identical runs).
    With 95 % and 80 % it is 1.43 times half the width.
    """
    _check(level, power)
    if not hi >= lo:  # NaN, too
        if math.isnan(lo) or math.isnan(hi):
            return math.nan
        raise ValueError(f"an interval runs from lo to hi, got ({lo}, {hi})")
    return (hi - lo) / 2 * (1 + float(ndtri(power)) / _two_sided(level))


def minimum_detectable_accuracy_change(discordant: float, n: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true change of accuracy that n paired samples show when the share `discordant` of them flips.

    A fraction, for independent samples (with k questions per image that flip together, take n / k). Infinite where no
    change is found: without samples, or when the change would have to exceed the flips. Source: Connor 1987, sample
    size for McNemar's test, solved for the difference.
    """
    _check(level, power)
    if not 0 <= discordant <= 1:
        raise ValueError(f"discordant must be a share in [0, 1], got {discordant}")
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if n == 0 or discordant == 0:
        return math.inf
    a, b = _two_sided(level), float(ndtri(power))
    # sqrt(n) d = a sqrt(f) + b sqrt(f - d^2), with f the flips: a quadratic in d.
    lead, middle, last = 1 + b**2 / n, a * math.sqrt(discordant), (a**2 - b**2) * discordant
    root = math.sqrt(max(0.0, middle**2 - lead * last))
    change = (middle + math.copysign(root, b)) / lead / math.sqrt(n)
    return change if change <= discordant else math.inf


def samples_needed(
    lo: float, hi: float, n: int, difference: float, *, level: float = 0.95, power: float = 0.8
) -> float:
    """About how many samples would find a true `difference`, if n of them gave the interval (lo, hi).

    Intervals shrink with the root of the number of images. NaN without an interval; ValueError unless difference > 0.
    """
    if not difference > 0:
        raise ValueError(f"difference must be above 0, got {difference}")
    found = minimum_detectable_difference(lo, hi, level=level, power=power)
    return float("nan") if math.isnan(found) else float(math.ceil(n * (found / difference) ** 2))


def _two_sided(level: float) -> float:
    return float(ndtri((1 + level) / 2))


def _check(level: float, power: float) -> None:
    check_level(level)
    if not 0.5 <= power < 1:
        raise ValueError(f"power must be in [0.5, 1), got {power}")
