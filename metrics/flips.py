"""Flips: answers that are right in one run and wrong in the other, which a small change of accuracy can hide.

Right is a score of at least 0.5. The test is McNemar's, in its exact form; over a grid of runs and conditions the
p-values are adjusted together. It takes samples for independent: where several questions share an image, the clustered
intervals (of the rate here, of the change of accuracy in `compare`) are the figures to trust.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from .bootstrap import DRAWS_AT_ONCE, check_level, check_pair, cluster_draws, interval
from .samples import BoolArray, FloatArray, IntArray, OrderedSamples, Samples, ratio
from .transfer import exact_interval


class Flips(NamedTuple):
    """Flips of n samples: rate is their share, with its interval clustered by image.

    p_value: exact two-sided McNemar test of no direction. odds_ratio: wrong_to_right / right_to_wrong, the matched odds
    ratio; NaN where either is 0. NaN rate for no samples; NaN interval where bootstrap.py gives none.
    """

    n: int
    right_to_wrong: int
    wrong_to_right: int
    rate: float
    lo: float
    hi: float
    p_value: float
    odds_ratio: float


class FlipLevel(NamedTuple):
    """Flips among the samples whose baseline confidence lies in (lower, upper] (0 lies in the first)."""

    lower: float
    upper: float
    n: int
    rate: float
    lo: float
    hi: float
    right_to_wrong: int
    wrong_to_right: int


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact two-sided p-value that flips go either way with probability 1/2; 1 without flips.

    Source: McNemar 1947, with the binomial distribution in place of chi-squared.
    """
    for count in (right_to_wrong, wrong_to_right):
        if count < 0 or count != int(count):
            raise ValueError(f"flips must be whole numbers of at least 0, got {count}")
    total = int(right_to_wrong) + int(wrong_to_right)
    return min(1.0, 2 * float(bdtr(min(right_to_wrong, wrong_to_right), total, 0.5)))


def benjamini_hochberg(p: ArrayLike) -> FloatArray:
    """(k,) p-values adjusted for their number: rejecting those below q keeps the false discovery rate at q.

    NaN (no test was made) stays NaN and counts as no test. Source: Benjamini & Hochberg 1995, step-up procedure.
    ValueError unless one-dimensional and in [0, 1] or NaN.
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not (np.isnan(values) | ((values >= 0) & (values <= 1))).all():
        raise ValueError("p-values must be one-dimensional, each in [0, 1] or NaN")
    out = np.full(values.size, np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    falling = tested[np.argsort(-values[tested], kind="stable")]
    rank = np.arange(falling.size, 0, -1)
    out[falling] = np.minimum(np.minimum.accumulate(values[falling] * falling.size / np.maximum(rank, 1)), 1.0)
    return out


def flips(candidate: Samples, baseline: Samples, *, replicates: int = 2000, seed: int, level: float = 0.95) -> Flips:
    """Flips from baseline to candidate, which answered the same samples in the same order (ValueError otherwise)."""
    samples, lost, gained = _flipped(candidate, baseline)
    bounds = _rates(samples, lost | gained, np.zeros(samples.n, dtype=np.int64), 1, replicates, seed, level)[0]
    n_lost, n_gained = int(lost.sum()), int(gained.sum())
    odds = n_gained / n_lost if n_lost and n_gained else np.nan
    return Flips(samples.n, n_lost, n_gained, *bounds, mcnemar(n_lost, n_gained), odds)


def flips_by_confidence(
    candidate: Samples,
    baseline: Samples,
    bins: int = 5,
    *,
    replicates: int = 2000,
    seed: int,
    level: float = 0.95,
) -> list[FlipLevel]:
    """Flips by the baseline's confidence: do the sure answers flip, too? Least confident first.

    bins: levels of equal mass, by the rank of the confidence; equal confidences share a level (that which holds the
    middle of their mass), so that with ties there may be fewer levels. Samples without a baseline confidence are in
    none. The levels are held fixed in the replicates.
    """
    if not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    samples, lost, gained = _flipped(candidate, baseline)
    present = samples.n_present
    # Samples are sorted from the most confident down; levels count from the least confident up.
    last = samples.level_last[: samples.n_levels]
    size = np.diff(last, prepend=-1)
    twice_above = 2 * (present - 1 - last) + size
    of_level = (twice_above * int(bins)) // max(1, 2 * present)
    which = np.full(samples.n, -1, dtype=np.int64)
    which[:present] = np.repeat(of_level, size)
    used = np.unique(of_level)
    bounds = _rates(samples, lost | gained, which, int(bins), replicates, seed, level)
    out: list[FlipLevel] = []
    for at in used:
        inside = which == at
        upper = 1.0 if at == used[-1] else float(samples.confidence[inside].max())
        lower = out[-1].upper if out else 0.0
        rate, lo, hi = bounds[at]
        n_lost, n_gained = int(lost[inside].sum()), int(gained[inside].sum())
        out.append(FlipLevel(lower, upper, int(inside.sum()), rate, lo, hi, n_lost, n_gained))
    return out


def _flipped(candidate: Samples, baseline: Samples) -> tuple[OrderedSamples, BoolArray, BoolArray]:
    """The baseline's samples by falling confidence, and which of them (n,) went wrong and which came right."""
    check_pair(candidate, baseline, "samples")
    samples = OrderedSamples(*baseline)
    now = OrderedSamples(candidate.score, baseline.confidence, baseline.cluster)  # the same order
    before, after = samples.score >= 0.5, now.score >= 0.5
    return samples, before & ~after, ~before & after


def _rates(
    samples: OrderedSamples, flipped: BoolArray, which: IntArray, bins: int, replicates: int, seed: int, level: float
) -> list[tuple[float, float, float]]:
    """Rate of flips in each bin with its interval (lo, hi), never narrower than the exact binomial one.

    which: (n,) bin of each sample, -1 for none.
    """
    check_level(level)
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")
    features = np.zeros((samples.n, 2 * bins))
    rows = np.flatnonzero(which >= 0)
    features[rows, which[rows]] = 1.0
    features[rows, bins + which[rows]] = flipped[rows]
    totals = samples.per_cluster(features)
    sums = totals.sum(axis=0)
    rate = ratio(sums[bins:], sums[:bins])
    draws = np.full((replicates, bins), np.nan)
    start = 0
    at_once = max(1, DRAWS_AT_ONCE // max(1, samples.n_clusters))
    for counts in cluster_draws(samples.n_clusters, replicates, at_once, seed, stream=0):
        drawn = counts @ totals
        draws[start : start + len(counts)] = ratio(drawn[:, bins:], drawn[:, :bins])
        start += len(counts)
    out = []
    for b in range(bins):
        lo, hi, _ = interval(rate[b], draws[:, b], samples.n_clusters, level, (0.0, 1.0))
        if not np.isnan(lo):
            least, most = exact_interval(float(sums[bins + b]), float(sums[b]), level)
            lo, hi = min(lo, least), max(hi, most)
        out.append((float(rate[b]), lo, hi))
    return out
