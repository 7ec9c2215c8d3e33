"""The points of a cell's risk-coverage curve and the bins of its reliability diagram."""

from __future__ import annotations

import numpy as np

from bitquake.metrics import Samples, cluster_draws, reliability_bins, risk_coverage_curve
from bitquake.metrics.calibration import bin_index
from bitquake.metrics.samples import FloatArray, OrderedSamples
from bitquake.reports.entries import LEVEL
from bitquake.reports.schema import BinEntry, CurvePoint

BINS = 15
CURVE_POINTS = 100
_DRAWS_AT_ONCE = 2**21


def curve_points(score: FloatArray, confidence: FloatArray) -> list[CurvePoint]:
    """The risk-coverage curve at about each percent of coverage, the first and the last point included."""
    curve = risk_coverage_curve(score, confidence)
    if curve.coverage.size == 0:
        return []
    grid = np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS
    last = np.searchsorted(curve.coverage, grid + 1e-9, side="right") - 1
    kept = np.unique(np.concatenate([[0], last[last >= 0], [curve.coverage.size - 1]]))
    return [
        CurvePoint(coverage=float(curve.coverage[i]), risk=float(curve.risk[i]), threshold=float(curve.threshold[i]))
        for i in kept
    ]


def reliability_diagram(samples: Samples, replicates: int, seed: int) -> list[BinEntry]:
    """Reliability bins that hold samples, with the clustered bootstrap interval of their mean score."""
    ordered = OrderedSamples(*samples)
    n = ordered.n_present
    if n == 0 or ordered.n_clusters < 2:
        return []
    features = np.zeros((ordered.n, 2 * BINS))
    rows, which = np.arange(n), bin_index(ordered.confidence[:n], BINS)
    features[rows, which] = 1.0
    features[rows, BINS + which] = ordered.score[:n]
    totals = ordered.per_cluster(features)
    at_once = max(1, _DRAWS_AT_ONCE // ordered.n_clusters)
    sums = np.concatenate([c @ totals for c in cluster_draws(ordered.n_clusters, replicates, at_once, seed, stream=0)])
    lower, upper, count, mean_confidence, mean_score, _ = reliability_bins(
        np.asarray(samples.score), np.asarray(samples.confidence), bins=BINS
    )
    entries = []
    for b in np.flatnonzero(count):
        weight = sums[:, b]
        drawn = weight > 0
        limits: list[float] | None = None
        # A bin that many replicates miss has too few images for an interval.
        if drawn.mean() >= LEVEL and count[b] > 1:
            limits = np.quantile(sums[drawn, BINS + b] / weight[drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        entries.append(
            BinEntry(
                lower=float(lower[b]),
                upper=float(upper[b]),
                count=int(count[b]),
                confidence=float(mean_confidence[b]),
                score=float(mean_score[b]),
                lo=limits[0] if limits else None,
                hi=limits[1] if limits else None,
            )
        )
    return entries
