"""Calibration: does a confidence of 0.8 mean a score of 0.8?

A sample without a confidence cannot be binned; these metrics leave it out, and every result that carries an interval
says how many were left out. Values are fractions, not percentages. All take soft scores. NaN for no samples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .samples import FloatArray, IntArray, Resampled, check_confidence, guarded, plain, ratio

# Confidences come from float32 softmax: a probability closer to 0 or 1 than this cannot be told from 0 or 1.
NLL_CLIP = 2.0**-24
# Relative; whole weights lie further apart for any number of samples that fits in memory.
EDGE_TOLERANCE = 1e-10


class ReliabilityBins(NamedTuple):
    """A reliability diagram: `bins` intervals (lower, upper] of [0, 1] (0 itself lies in the first), each (bins,).

    counts: samples (or weight); mean_confidence, mean_score: NaN for an empty bin.
    """

    lower: FloatArray
    upper: FloatArray
    counts: FloatArray
    mean_confidence: FloatArray
    mean_score: FloatArray
    n_missing_confidence: int


def check_bins(bins: int) -> int:
    if not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    return int(bins)


def bin_index(confidence: FloatArray, bins: int) -> IntArray:
    """(n,) equal-width bin of each confidence: (lo, hi], and 0 in bin 0. Callers leave NaN out."""
    # Edges as b/bins, compared as floats: the edge value 0.3 falls where a reader of "(0.2, 0.3]" expects it.
    edges = np.arange(1, bins) / bins
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def binned(block: Resampled, bins: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Per replicate and equal-width bin (r, bins): weight, sum of (score - confidence), sum of its square."""

    def features() -> FloatArray:
        s = block.samples
        out = np.zeros((s.n, 3 * bins))
        rows = np.arange(s.n_present)
        which = bin_index(s.confidence[: s.n_present], bins)
        gap = s.score[: s.n_present] - s.confidence[: s.n_present]
        out[rows, which] = 1.0
        out[rows, bins + which] = gap
        out[rows, 2 * bins + which] = gap**2
        return out

    sums = block.sums(("bins", bins), features)
    return sums[:, :bins], sums[:, bins : 2 * bins], sums[:, 2 * bins :]


def ece_of(block: Resampled, bins: int) -> FloatArray:
    _, gap, _ = binned(block, bins)
    return ratio(np.abs(gap).sum(axis=1), block.present)


def ece_equal_mass_of(block: Resampled, bins: int) -> FloatArray:
    k = block.samples.n_levels
    weight, level = block.cum_weight[:, :k], block.level_weight[:, :k]
    confidence = np.nan_to_num(block.samples.confidence)
    gap = block.cum_score[:, :k] - block.cumulative(confidence)[:, :k]
    # From the most confident down: a level lies in the bin that holds the middle of its mass.
    middle = (weight - level / 2) * bins
    # A middle on an edge lies above it; fractional weights (mixtures) reach an edge with a rounding error.
    wanted = np.arange(1, bins) * (1 - EDGE_TOLERANCE)
    edges = np.zeros((weight.shape[0], bins + 1))
    for row in range(weight.shape[0]):
        position = np.searchsorted(middle[row], wanted * weight[row, -1], side="left")
        edges[row, 1:-1] = np.where(position > 0, gap[row, position - 1], 0.0)
    edges[:, -1] = gap[:, -1]
    return ratio(np.abs(np.diff(edges, axis=1)).sum(axis=1), block.present)


def rmsce_debiased_of(block: Resampled, bins: int) -> FloatArray:
    """(r,) signed roots: below 0 where the noise estimate exceeds the gaps, so that intervals see how far below."""
    weight, gap, square = binned(block, bins)
    usable = weight > 1
    safe = np.where(usable, weight, 2.0)
    mean = gap / safe
    noise = np.maximum(square / safe - mean**2, 0.0) / (safe - 1)
    inside = np.where(usable, weight * (mean**2 - noise), 0.0).sum(axis=1)
    square_error = ratio(inside, block.present)
    return np.sign(square_error) * np.sqrt(np.abs(square_error))


def signed_miscalibration_of(block: Resampled) -> FloatArray:
    s = block.samples
    return block.mean("signed", lambda: s.confidence - s.score, block.present)


def brier_of(block: Resampled) -> FloatArray:
    s = block.samples
    return block.mean("brier", lambda: (s.confidence - s.score) ** 2, block.present)


def nll_of(block: Resampled) -> FloatArray:
    def loss() -> FloatArray:
        c = np.clip(block.samples.confidence, NLL_CLIP, 1 - NLL_CLIP)
        return -(block.samples.score * np.log(c) + (1 - block.samples.score) * np.log1p(-c))

    return block.mean("nll", loss, block.present)


def ece(score: ArrayLike, confidence: ArrayLike | None, *, bins: int = 15, weights: ArrayLike | None = None) -> float:
    """Expected calibration error with equal-width bins, in [0, 1]: sum_b n_b/N * |mean score - mean confidence|.

    Bins are (lo, hi], confidence 0 in the first. Biased upwards: see `expected_ece_if_calibrated`.
    Source: Guo et al. 2017 (arXiv 1706.04599), section 2, with soft scores. ValueError for bad shapes or ranges.
    """
    check_bins(bins)
    return float(guarded(lambda b: ece_of(b, bins), plain(score, confidence, weights))[0])


def ece_equal_mass(
    score: ArrayLike, confidence: ArrayLike | None, *, bins: int = 15, weights: ArrayLike | None = None
) -> float:
    """Expected calibration error with bins of equal mass, in [0, 1]; samples of one confidence are never parted.

    Samples are ranked from the most confident; all samples of one confidence go to bin floor(bins * m / N), where m is
    the rank of the middle of their mass. Without ties, and with N a multiple of `bins`, every bin holds N/bins samples;
    with ties a bin may be larger, or empty. Neither order nor duplicating all samples changes the value.
    Source: Nixon et al. 2019 (arXiv 1904.01685), adaptive calibration error; the tie rule is ours.
    """
    check_bins(bins)
    return float(guarded(lambda b: ece_equal_mass_of(b, bins), plain(score, confidence, weights))[0])


def rmsce_debiased(
    score: ArrayLike, confidence: ArrayLike | None, *, bins: int = 15, weights: ArrayLike | None = None
) -> float:
    """Root-mean-square calibration error over equal-width bins with the sampling noise taken out, in [0, 1].

    sqrt(max(0, sum_b n_b/N * (g_b^2 - v_b/n_b))), where g_b is the mean and v_b the unbiased variance of
    score - confidence in bin b. The sum is unbiased for independent samples and fixed bins; a bin with one sample has
    no variance and is left out. Source: Kumar et al. 2019 (arXiv 1909.10155), with the variance of soft scores.
    """
    check_bins(bins)
    signed = guarded(lambda b: rmsce_debiased_of(b, bins), plain(score, confidence, weights))
    return float(np.maximum(signed, 0.0)[0])


def signed_miscalibration(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> float:
    """Mean confidence minus mean score, in [-1, 1]: above 0 is over-confident."""
    return float(guarded(signed_miscalibration_of, plain(score, confidence, weights))[0])


def brier(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> float:
    """Mean squared difference of confidence and (soft) score, in [0, 1]. Source: Brier 1950."""
    return float(guarded(brier_of, plain(score, confidence, weights))[0])


def nll(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> float:
    """Mean of -(a ln c + (1 - a) ln(1 - c)) in nats; c is kept 2^-24 (float32 resolution) away from 0 and 1."""
    return float(guarded(nll_of, plain(score, confidence, weights))[0])


def reliability_bins(
    score: ArrayLike, confidence: ArrayLike | None, *, bins: int = 15, weights: ArrayLike | None = None
) -> ReliabilityBins:
    """Counts and means of the equal-width bins that `ece` uses, for a reliability diagram; defined for no samples."""
    check_bins(bins)
    block = plain(score, confidence, weights)
    s = block.samples
    w = block.weight[0, : s.n_present]
    which = bin_index(s.confidence[: s.n_present], bins)

    def summed(values: FloatArray) -> FloatArray:
        return np.bincount(which, weights=values, minlength=bins).astype(np.float64)

    counts = summed(w)
    mean_confidence = ratio(summed(w * s.confidence[: s.n_present]), counts)
    mean_score = ratio(summed(w * s.score[: s.n_present]), counts)
    edges = np.arange(bins + 1) / bins
    return ReliabilityBins(edges[:-1], edges[1:], counts, mean_confidence, mean_score, s.n_missing)


def expected_ece_if_calibrated(confidence: ArrayLike, *, bins: int = 15) -> float:
    """ECE (equal width) that a perfectly calibrated model with these confidences shows by chance; NaN for none.

    sqrt(2/pi) / N * sum_b sqrt(sum_{i in b} c_i (1 - c_i)): each bin's gap is close to normal around 0. For right/wrong
    scores and independent samples; soft scores scatter less. An ECE near this value says nothing about the model.
    """
    check_bins(bins)
    array = np.asarray(confidence, dtype=np.float64)
    c = check_confidence(array, array.size)
    c = c[~np.isnan(c)]
    if c.size == 0:
        return float("nan")
    variance = np.bincount(bin_index(c, bins), weights=c * (1 - c), minlength=bins)
    return float(np.sqrt(2 / np.pi) * np.sqrt(variance).sum() / c.size)
