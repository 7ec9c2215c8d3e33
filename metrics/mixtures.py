"""Mixtures of questions in and out of distribution, from the samples of the two: what if a share of them is shifted?

The figures are exact expectations by weights, not those of one random mixture: with share s of shifted questions each
of the n samples in distribution weighs (1 - s) / n, each of the m shifted ones s / m. The published mixtures are single
draws of 45,000:5,000 to 2,500:5,000 questions (Dancette et al. 2023, arXiv 2306.08751); any share can be had here.

Images are drawn anew within each of the two sources, the threshold split too where a threshold is transferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .bootstrap import BLOCK, Estimate, check_level, cluster_draws, interval, without_noise
from .registry import Metric, lookup
from .samples import FloatArray, OrderedSamples, Resampled, Samples, ratio
from .transfer import Thresholds, answered_sums, exact_interval, fit_thresholds, open_test

SHARES = (0.0, 0.1, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 0.9, 1.0)
"""Shares of shifted questions: the published mixtures and the steps between them."""

MIXTURE_METRICS = ("accuracy", "coverage_at_risk_1", "coverage_at_risk_5", "aurc")


class Mixture(NamedTuple):
    """Figures when the share `ood_share` of the questions is shifted, by metric key.

    With a threshold split also `transfer_risk_R` and `transfer_coverage_R` for each tolerated risk of R %: what a
    threshold does that was chosen on that split, as in `transfer`.
    """

    ood_share: float
    metrics: dict[str, Estimate]


def mixture_curve(
    id_samples: Samples,
    ood_samples: Samples,
    shares: Sequence[float] = SHARES,
    metrics: Sequence[str] = MIXTURE_METRICS,
    *,
    fit: Samples | Thresholds | None = None,
    risks: Sequence[float] = (0.01, 0.05, 0.10),
    replicates: int = 2000,
    seed: int,
    level: float = 0.95,
) -> list[Mixture]:
    """One run's figures at each share of shifted questions, with intervals.

    id_samples, ood_samples: the run's samples of the two tasks. fit: the samples on which thresholds at the tolerated
    `risks` are chosen (the run's own, or its full-precision twin's), or thresholds that `fit_thresholds` gave (with as
    many replicates; their risks count). A share of 0 gives the values of `evaluate` for the first samples alone, 1
    those of the second. NaN, with a note, where a source that counts has no samples. ValueError for a share outside
    [0, 1], a metric that needs a threshold split of its own (Phi) or counts samples (rmsce_debiased_15), or images
    that are shared with `fit`.
    """
    check_level(level)
    chosen = _usable(metrics)
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")
    for share in shares:
        if not 0 <= share <= 1:
            raise ValueError(f"a share of shifted questions must be in [0, 1], got {share}")
    thresholds = fit_thresholds(fit, risks, replicates=replicates, seed=seed) if isinstance(fit, Samples) else fit
    if thresholds is not None and thresholds.draws.shape[1] != replicates:
        raise ValueError(f"the thresholds have {thresholds.draws.shape[1]} replicates, not {replicates}")
    sources = [
        OrderedSamples(*s) if thresholds is None else open_test(thresholds, s) for s in (id_samples, ood_samples)
    ]
    merged = _merge(sources)
    targets = thresholds.risks if thresholds else ()
    values = np.full((len(shares), len(chosen) + 2 * len(targets)), np.nan)
    draws = np.full((*values.shape, replicates), np.nan)
    fixed = thresholds.values[:, None] if thresholds else None
    values[:] = _figures(sources, merged, shares, chosen, [np.ones((1, s.n_clusters)) for s in sources], fixed)[..., 0]
    rows, start = max(1, BLOCK // max(1, merged.n)), 0
    streams = [cluster_draws(s.n_clusters, replicates, rows, seed, stream=2 * i) for i, s in enumerate(sources)]
    for counts in zip(*streams, strict=True):
        part = slice(start, start + len(counts[0]))
        refitted = thresholds.draws[:, part] if thresholds else None
        draws[..., part] = _figures(sources, merged, shares, chosen, list(counts), refitted)
        start += len(counts[0])
    for m, metric in enumerate(chosen):
        if metric.noise_layers:
            draws[:, m] = without_noise(values[:, m], draws[:, m], metric.noise_layers)
    out = []
    for share, value, drawn in zip(shares, values, draws, strict=True):
        mix = [(s, weight) for s, weight in zip(sources, (1 - share, share), strict=True) if weight > 0]
        found = {
            metric.key: _estimate(mix, value[m], drawn[m], level, metric.bounds, metric.needs_confidence)
            for m, metric in enumerate(chosen)
        }
        for k, risk in enumerate(targets):
            assert thresholds is not None
            at = float(thresholds.values[k])
            for m, what in enumerate(("risk", "coverage"), start=len(chosen) + 2 * k):
                estimate = _estimate(mix, value[m], drawn[m], level, (0.0, 1.0), True)
                if what == "risk" and estimate.available:
                    least, most = exact_interval(*_effective(mix, at, estimate.value), level)
                    estimate = estimate._replace(lo=min(estimate.lo, least), hi=max(estimate.hi, most))
                if np.isnan(at) and all(s.n_present for s, _ in mix):
                    estimate = estimate._replace(note="no sample of the threshold split has a confidence")
                found[f"transfer_{what}_{100 * risk:g}"] = estimate
        out.append(Mixture(float(share), found))
    return out


class _Mixed(Resampled):
    """A weighted sum of replicates of the same samples, whose cumulative sums are those of its parts."""

    def __init__(self, parts: Sequence[Resampled], weights: Sequence[float]) -> None:
        self.parts = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
        super().__init__(parts[0].samples, self._mix([part.counts for part, _ in self.parts]))

    def _mix(self, values: Sequence[FloatArray]) -> FloatArray:
        weights = [weight for _, weight in self.parts]
        total = weights[0] * values[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            total += weight * value
        return total

    @cached_property
    def cum_weight(self) -> FloatArray:
        return self._mix([part.cum_weight for part, _ in self.parts])

    @cached_property
    def cum_score(self) -> FloatArray:
        return self._mix([part.cum_score for part, _ in self.parts])


def _usable(keys: Sequence[str]) -> list[Metric]:
    metrics = lookup(list(keys))
    for metric in metrics:
        if metric.needs_threshold_split:
            raise ValueError(f"{metric.key} of a mixture is not offered: give `fit` and read the transferred threshold")
        if metric.key.startswith("rmsce_debiased"):
            raise ValueError(f"{metric.key} counts whole samples; weighted ones have no such figure (take ece_15)")
    return metrics


def _merge(sources: Sequence[OrderedSamples]) -> OrderedSamples:
    """Both sources in one order; the clusters of the second come after those of the first."""
    first, second = sources
    return OrderedSamples(
        np.concatenate([first.score, second.score]),
        np.concatenate([first.confidence, second.confidence]),
        np.concatenate([first.cluster, first.n_clusters + second.cluster]),
    )


def _figures(
    sources: Sequence[OrderedSamples],
    merged: OrderedSamples,
    shares: Sequence[float],
    metrics: Sequence[Metric],
    counts: Sequence[FloatArray],
    thresholds: FloatArray | None,
) -> FloatArray:
    """(shares, metrics + transferred risk and coverage of each threshold, r); counts: (r, n_clusters) of each source.

    thresholds: (risks, r).
    """
    rows = len(counts[0])
    totals = [c @ np.bincount(s.cluster, minlength=s.n_clusters) for s, c in zip(sources, counts, strict=True)]
    answered = (
        [answered_sums(s, c, thresholds) for s, c in zip(sources, counts, strict=True)]
        if thresholds is not None
        else []
    )
    parts = []
    for i, (c, total) in enumerate(zip(counts, totals, strict=True)):
        own = [np.zeros_like(other) for other in counts]
        own[i] = c * (merged.n / np.maximum(total, 1))[:, None]
        parts.append(Resampled(merged, np.concatenate(own, axis=1)))
    out = np.full((len(shares), len(metrics) + 2 * (0 if thresholds is None else len(thresholds)), rows), np.nan)
    for i, share in enumerate(shares):
        weights = (1 - share, share)
        if any(weight > 0 and s.n == 0 for s, weight in zip(sources, weights, strict=True)):
            continue
        block = _Mixed(parts, weights)
        for m, metric in enumerate(metrics):
            out[i, m] = metric.compute(block)
        if thresholds is None:
            continue
        # Answered weight and risk of the mixture: NaN where the threshold is.
        mixed = np.zeros((len(thresholds), 2, rows))
        for sums, weight in zip(answered, weights, strict=True):
            if weight > 0:
                mixed += weight * ratio(sums[:, :2], sums[:, 2:])
        for k in range(len(thresholds)):
            out[i, len(metrics) + 2 * k] = ratio(mixed[k, 1], mixed[k, 0])
            out[i, len(metrics) + 2 * k + 1] = mixed[k, 0]
    return out


def _estimate(
    mix: Sequence[tuple[OrderedSamples, float]],
    value: float,
    draws: FloatArray,
    level: float,
    bounds: tuple[float, float],
    needs_confidence: bool,
) -> Estimate:
    """mix: the sources that count, each with its share."""
    lo, hi, note = interval(value, draws, min(s.n_clusters for s, _ in mix), level, bounds)
    if any(s.n == 0 for s, _ in mix):
        note = "no samples of one of the two tasks" if len(mix) > 1 else "no samples"
    elif needs_confidence and all(s.n_present == 0 for s, _ in mix):
        note = "no sample has a confidence"
    n, n_clusters, n_missing = (
        sum(counts) for counts in zip(*((s.n, s.n_clusters, s.n_missing) for s, _ in mix), strict=True)
    )
    return Estimate(float(np.clip(value, *bounds)), lo, hi, n, n_clusters, n_missing, note)


def _effective(mix: Sequence[tuple[OrderedSamples, float]], threshold: float, risk: float) -> tuple[float, float]:
    """(errors, answers): as many equally weighted answers as the answered ones are worth (Kish 1965)."""
    each = [(np.count_nonzero(s.confidence >= threshold), weight / s.n) for s, weight in mix]
    worth = sum(n * w for n, w in each) ** 2 / sum(n * w**2 for n, w in each)
    return risk * worth, worth
