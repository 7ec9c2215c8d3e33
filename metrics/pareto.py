"""What a configuration costs against what it is worth: the Pareto front, and the cheapest one that keeps enough.

A number without its interval decides nothing here: a configuration is ruled out only by one that costs no more and is
better beyond the noise of the samples, and those that a cheaper one beats within the noise are kept as tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import check_level
from .samples import BoolArray, FloatArray

Place = Literal["front", "tied", "dominated"]


@dataclass(frozen=True)
class Cheapest:
    """The cheapest configuration that keeps a share of the reference's value.

    index: its place in the arrays, None where none keeps it. kept: its value over the reference's. lo, hi: interval of
    that (NaN without replicates). sure: the place of the cheapest whose whole interval keeps the share, None where none
    does or there are no replicates.
    """

    share: float
    index: int | None
    kept: float
    lo: float
    hi: float
    sure: int | None


def pareto_front(
    cost: ArrayLike,
    value: ArrayLike,
    *,
    draws: ArrayLike | None = None,
    higher_is_better: bool = True,
    level: float = 0.95,
) -> list[Place]:
    """Place of each configuration.

    ``front``: none costs no more and is at least as good (and better in one of the two). ``dominated``: one costs no
    more and is better, with an interval of the difference that excludes 0. ``tied``: one is better, none of them
    beyond the noise. Without draws every difference counts.

    Args:
        cost: (n,) such as bits per weight or bytes.
        value: (n,) of the metric.
        draws: (replicates, n) bootstrap replicates of the values, all configurations on the same draw of samples.
        higher_is_better: of the metric. level: of the intervals.

    Raises:
        ValueError: arrays of different lengths, or a cost or value that is not finite.
    """
    check_level(level)
    costs, values, drawn = _checked(cost, value, draws)
    if not higher_is_better:
        values, drawn = -values, None if drawn is None else -drawn
    places: list[Place] = []
    for i in range(len(costs)):
        no_dearer = costs <= costs[i]
        beats = no_dearer & (values >= values[i]) & ((values > values[i]) | (costs < costs[i]))
        if not beats.any():
            places.append("front")
            continue
        better = beats & (values > values[i])
        places.append("dominated" if _beyond_noise(better, i, values, drawn, level) else "tied")
    return places


def _beyond_noise(better: BoolArray, i: int, values: FloatArray, drawn: FloatArray | None, level: float) -> bool:
    """Whether one of the better ones is so with an interval that excludes 0."""
    if drawn is None:
        return bool(better.any())
    if not better.any():
        return False
    lowest = np.quantile(drawn[:, better] - drawn[:, [i]], (1 - level) / 2, axis=0)
    return bool((lowest > 0).any())


def cheapest(
    cost: ArrayLike,
    value: ArrayLike,
    reference: float,
    share: float,
    *,
    draws: ArrayLike | None = None,
    reference_draws: ArrayLike | None = None,
    level: float = 0.95,
) -> Cheapest:
    """The cheapest configuration with at least `share` of the reference's value (0.95: 95 % of full precision).

    Args:
        cost, value, draws: as in `pareto_front`; more must be better.
        reference: the value that is kept, above 0.
        share: above 0.
        reference_draws: (replicates,) of the reference, on the same draws of samples.
        level: of the intervals.

    Raises:
        ValueError: as in `pareto_front`; a reference or share that is not above 0; draws without the reference's.
    """
    check_level(level)
    costs, values, drawn = _checked(cost, value, draws)
    if not (reference > 0 and math.isfinite(reference) and share > 0):
        raise ValueError(f"the reference and the share of it must be above 0, got {reference} and {share}")
    if (drawn is None) != (reference_draws is None):
        raise ValueError("give replicates of the configurations and of the reference, or of neither")
    order = np.lexsort((-values, costs))
    kept = values / reference
    lo = hi = np.full(len(costs), math.nan)
    if drawn is not None:
        below = np.asarray(reference_draws, dtype=np.float64)
        usable = below > 0
        quotients = drawn[usable] / below[usable][:, None]
        lo, hi = np.quantile(quotients, [(1 - level) / 2, (1 + level) / 2], axis=0)
        lo, hi = np.minimum(lo, kept), np.maximum(hi, kept)
    enough = [int(i) for i in order if kept[i] >= share]
    sure = next((int(i) for i in order if lo[i] >= share), None)
    if not enough:
        return Cheapest(share, None, math.nan, math.nan, math.nan, None)
    first = enough[0]
    return Cheapest(share, first, float(kept[first]), float(lo[first]), float(hi[first]), sure)


def _checked(
    cost: ArrayLike, value: ArrayLike, draws: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    costs, values = (np.asarray(array, dtype=np.float64) for array in (cost, value))
    if costs.ndim != 1 or costs.shape != values.shape:
        raise ValueError(f"each configuration needs a cost and a value, got shapes {costs.shape} and {values.shape}")
    for name, array in (("cost", costs), ("value", values)):
        if not np.isfinite(array).all():
            raise ValueError(f"the {name} of configuration {int(np.argmin(np.isfinite(array)))} is not finite")
    if draws is None:
        return costs, values, None
    drawn = np.asarray(draws, dtype=np.float64)
    if drawn.ndim != 2 or drawn.shape[1] != len(costs):
        raise ValueError(f"draws must have shape (replicates, {len(costs)}), got {drawn.shape}")
    return costs, values, drawn
