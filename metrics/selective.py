"""Selective prediction: how much can be answered at how little risk, when the least confident answers are withheld?

Definitions follow Whitehead et al. 2022 (arXiv 2204.13631, "reliable VQA") with these repairs: thresholds lie between
distinct confidences only, "abstain on everything" is a choice, and soft scores keep their full precision.

A sample without a confidence ranks below every other one and no threshold answers it; it stays in every denominator,
so that losing confidences can never improve a figure. Without any confidence at all the metrics are NaN. Values are
fractions, not percentages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .samples import FloatArray, IntArray, Resampled, guarded, plain, ratio

# Two risks or gains that differ by less are equal: the order of a floating-point sum must not decide.
TOLERANCE = 1e-9


class RiskCoverageCurve(NamedTuple):
    """Operating points from the most confident level down, each (levels,).

    threshold: a distinct confidence; answering iff confidence >= threshold gives `coverage` (in (0, 1]) and `risk`.
    """

    threshold: FloatArray
    coverage: FloatArray
    risk: FloatArray


class OperatingPoint(NamedTuple):
    """A threshold and what it does: answered iff confidence >= threshold. Threshold +inf abstains on everything.

    risk: mean of 1 - score over the answered samples; NaN when nothing is answered.
    """

    threshold: float
    coverage: float
    risk: float


def check_risk(risk: float) -> float:
    if not 0 <= risk <= 1:
        raise ValueError(f"risk must be a fraction in [0, 1], got {risk}; 1 % is 0.01")
    return float(risk)


def check_cost(cost: float) -> float:
    if not (np.isfinite(cost) and cost >= 0):
        raise ValueError(f"cost must be a finite number of at least 0, got {cost}")
    return float(cost)


def accuracy_of(block: Resampled) -> FloatArray:
    return block.mean("accuracy", lambda: block.samples.score, block.total)


def auroc_of(block: Resampled) -> FloatArray:
    weight, cumulative = block.level_weight, block.cum_correct
    if block.samples.tied:
        correct = block.of_levels(cumulative)
    else:
        correct = block.weight * (block.samples.score >= 0.5)
    # A wrong sample loses to every correct one above it and shares with those tied.
    wins = np.einsum("ij,ij->i", weight - correct, cumulative - 0.5 * correct)
    positive = cumulative[:, -1]
    return ratio(wins, positive * (block.total - positive))


def aurc_of(block: Resampled) -> FloatArray:
    weight, risk = block.cum_weight, block.cum_risk
    if block.samples.tied:
        level = block.level_weight
        own = np.divide(block.of_levels(risk), level, out=np.zeros_like(level), where=level > 0)[:, 1:]
    else:
        own = (1 - block.samples.score)[1:]
    before = weight[:, :-1]
    log = np.log(np.maximum(weight, np.finfo(np.float64).tiny))
    excess = np.einsum("ij,ij->i", risk[:, :-1] - before * own, np.diff(log, axis=1))
    return ratio(risk[:, -1] + excess, block.total)


def aurc_oracle_of(block: Resampled) -> FloatArray:
    return aurc_of(block.by_score)


def excess_aurc_of(block: Resampled) -> FloatArray:
    return np.maximum(aurc_of(block) - aurc_oracle_of(block), 0.0)  # below 0 by rounding only


def levels_answered(block: Resampled, risk: float) -> IntArray:
    """(r,) number of levels answered at the largest coverage whose risk is at most `risk`."""
    k = block.samples.n_levels
    if k == 0:
        return np.zeros(len(block.counts), dtype=np.int64)
    allowed = block.cum_risk[:, :k] <= (risk + TOLERANCE) * block.cum_weight[:, :k]
    return np.where(allowed.any(axis=1), k - np.argmax(allowed[:, ::-1], axis=1), 0)


def coverage_at_risk_of(block: Resampled, risk: float) -> FloatArray:
    answered = levels_answered(block, risk)
    rows = np.arange(answered.size)
    return ratio(np.where(answered > 0, block.cum_weight[rows, answered - 1], 0.0), block.total)


def phi_threshold_of(block: Resampled, cost: float) -> FloatArray:
    """(r,) threshold with the largest total gain on this block; +inf where abstaining on everything is best."""
    k = block.samples.n_levels
    gain = block.cum_score[:, :k] - cost * block.cum_zero[:, :k]
    best = np.maximum(gain.max(axis=1), 0.0)
    # A level that this replicate did not draw is no candidate: its threshold was never seen.
    chosen = (gain >= (best - TOLERANCE * block.total)[:, None]) & (block.level_weight[:, :k] > 0)
    last = k - 1 - np.argmax(chosen[:, ::-1], axis=1)
    return np.where(chosen.any(axis=1), block.samples.level_confidence[last], np.inf)


def phi_of(block: Resampled, cost: float, threshold: FloatArray) -> FloatArray:
    """(r,) effective reliability with a threshold for each replicate; NaN where the threshold is NaN."""
    levels = block.samples.level_confidence
    answered = np.searchsorted(-levels, -threshold, side="right")
    rows = np.arange(answered.size)
    gain = block.cum_score[rows, answered - 1] - cost * block.cum_zero[rows, answered - 1]
    value = ratio(np.where(answered > 0, gain, 0.0), block.total)
    return np.where(np.isnan(threshold), np.nan, value)


def accuracy(score: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Mean score over all samples, in [0, 1]; NaN for no samples. ValueError for bad shapes or ranges."""
    return float(guarded(accuracy_of, plain(score, None, weights), needs_confidence=False)[0])


def auroc(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> float:
    """P(a right answer has more confidence than a wrong one), ties counting half; right is score >= 0.5.

    In [0, 1]; NaN when all answers are right or all are wrong. Source: Mann-Whitney statistic, Hanley & McNeil 1982.
    """
    return float(guarded(auroc_of, plain(score, confidence, weights))[0])


def risk_coverage_curve(
    score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None
) -> RiskCoverageCurve:
    """Coverage and risk at every distinct confidence; empty for no samples or no confidences.

    The last point's coverage is below 1 when confidences are missing. Source: El-Yaniv & Wiener 2010; C(g) and R(g) of
    arXiv 2204.13631.
    """
    block = plain(score, confidence, weights)
    k = block.samples.n_levels
    if k == 0:
        return RiskCoverageCurve(np.zeros(0), np.zeros(0), np.zeros(0))
    weight, risk = block.cum_weight[0, :k], block.cum_risk[0, :k]
    seen = block.level_weight[0, :k] > 0
    return RiskCoverageCurve(
        block.samples.level_confidence[seen], weight[seen] / block.total[0], risk[seen] / weight[seen]
    )


def aurc(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> float:
    """Area under the risk-coverage curve, integral of the selective risk over coverage 0 to 1; lower is better.

    Within a tie the samples count as answered in random order (accumulated risk grows linearly with coverage), which
    makes the area independent of the order of the samples and of duplicating them all, and gives a constant confidence
    the area 1 - accuracy. (Joining the tie's ends by a straight line would reward coarse confidences.)
    The papers take the trapezoid rule over k/N, k = 1..N, in the order of a stable sort; without ties it differs from
    this by at most (R_1 + 0.2) / N, R_1 being the risk of the most confident sample.
    Missing confidences count as the last tie. Source: Geifman & El-Yaniv 2018 (arXiv 1805.08206); arXiv 2204.13631.
    """
    return float(guarded(aurc_of, plain(score, confidence, weights))[0])


def aurc_oracle(score: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """The smallest AURC that any confidence can reach with these scores: answers ranked by their score."""
    return float(guarded(aurc_oracle_of, plain(score, None, weights), needs_confidence=False)[0])


def excess_aurc(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> float:
    """AURC minus the oracle's AURC, at least 0. Source: E-AURC, arXiv 1805.08206."""
    return float(guarded(excess_aurc_of, plain(score, confidence, weights))[0])


def coverage_at_risk(
    score: ArrayLike, confidence: ArrayLike | None, risk: float, *, weights: ArrayLike | None = None
) -> OperatingPoint:
    """C@R: the largest coverage whose risk is at most `risk` (a fraction), never parting equal confidences.

    Coverage 0 with threshold +inf when no level qualifies; all NaN without samples or confidences. The threshold is
    chosen on the same samples, as in the papers; to see what it does elsewhere, use `operating_point`.
    Source: arXiv 2204.13631, `<=` and the tie rule of its evaluation script.
    """
    check_risk(risk)
    block = plain(score, confidence, weights)
    coverage = float(guarded(lambda b: coverage_at_risk_of(b, risk), block)[0])
    if np.isnan(coverage):
        return OperatingPoint(np.nan, np.nan, np.nan)
    curve = risk_coverage_curve(score, confidence, weights=weights)
    reached = np.flatnonzero(curve.coverage <= coverage * (1 + TOLERANCE))
    if coverage == 0 or reached.size == 0:
        return OperatingPoint(np.inf, 0.0, np.nan)
    return OperatingPoint(float(curve.threshold[reached[-1]]), coverage, float(curve.risk[reached[-1]]))


def operating_point(
    score: ArrayLike, confidence: ArrayLike | None, threshold: float, *, weights: ArrayLike | None = None
) -> OperatingPoint:
    """Coverage and risk really taken by a threshold that was chosen elsewhere; NaN for no samples or confidences."""
    if np.isnan(threshold):
        raise ValueError("threshold must be a number (or +inf to abstain on everything), got NaN")
    block = plain(score, confidence, weights)
    if not guarded(accuracy_of, block)[0] >= 0:
        return OperatingPoint(threshold, np.nan, np.nan)
    answered = block.samples.confidence >= threshold
    w = block.weight[0]
    weight = float(w[answered].sum())
    risk = float((w * (1 - block.samples.score))[answered].sum() / weight) if weight > 0 else np.nan
    return OperatingPoint(threshold, weight / float(w.sum()), risk)


def phi_threshold(
    score: ArrayLike, confidence: ArrayLike | None, cost: float, *, weights: ArrayLike | None = None
) -> float:
    """The threshold that maximises Phi_c on these samples, which must not be those it is evaluated on.

    Candidates are the distinct confidences and +inf (abstain on everything, Phi = 0); of several maxima the one
    with the most coverage. NaN without samples or confidences. Source: arXiv 2204.13631, repaired as said above.
    """
    check_cost(cost)
    return float(guarded(lambda b: phi_threshold_of(b, cost), plain(score, confidence, weights))[0])


def effective_reliability(
    score: ArrayLike, confidence: ArrayLike | None, cost: float, threshold: float, *, weights: ArrayLike | None = None
) -> float:
    """Phi_c, in [-c, 1]: mean over ALL samples of the score if answered and above 0; -c if answered with 0; else 0.

    Answered iff confidence >= threshold. Source: arXiv 2204.13631, effective reliability.
    """
    check_cost(cost)
    if np.isnan(threshold):
        raise ValueError("threshold must be a number (or +inf to abstain on everything), got NaN")
    return float(guarded(lambda b: phi_of(b, cost, np.array([threshold])), plain(score, confidence, weights))[0])
