"""From a value and its replicates to an entry of the report: with an interval, or with the reason for none."""

from __future__ import annotations

from typing import Literal

import numpy as np

from bitquake.metrics import METRICS, Estimate, Metric, interval
from bitquake.metrics.samples import FloatArray
from bitquake.reports.schema import DifferenceEntry, Effect, MetricEntry, ValueEntry

LEVEL = 0.95
Verdict = Literal["tied", "higher", "lower"]


def metric_entries() -> list[MetricEntry]:
    """Every metric with its definition, as reports state them."""
    return [
        MetricEntry(
            key=metric.key,
            title=metric.title,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            definition=metric.definition,
            source=metric.source,
        )
        for metric in METRICS.values()
    ]


def estimate_entry(estimate: Estimate, caution: str = "", difference: DifferenceEntry | None = None) -> ValueEntry:
    """An estimate as it stands in the report; not available, and why, where it has no interval."""
    if not estimate.available:
        return ValueEntry(value=None, lo=None, hi=None, note=estimate.note, difference=difference)
    return ValueEntry(
        value=float(estimate.value),
        lo=float(estimate.lo),
        hi=float(estimate.hi),
        note=estimate.note,
        caution=caution,
        difference=difference,
    )


def difference_entry(metric: Metric, delta: float, draws: FloatArray, n_clusters: int) -> DifferenceEntry | None:
    """A paired difference of a metric with the interval of its (replicates,) draws; None without an interval."""
    width = metric.bounds[1] - metric.bounds[0]
    lo, hi, _ = interval(delta, draws, n_clusters, LEVEL, (-width, width))
    if np.isnan(lo) or np.isnan(hi) or np.isnan(delta):
        return None
    verdict: Verdict = "higher" if lo > 0 else "lower" if hi < 0 else "tied"
    effect = effect_of(verdict, metric.higher_is_better)
    return DifferenceEntry(delta=float(delta), lo=lo, hi=hi, verdict=verdict, effect=effect)


def effect_of(verdict: Verdict, higher_is_better: bool | None) -> Effect:
    """What a verdict means for a quantity; ``changed`` where neither direction is better."""
    if verdict == "tied":
        return "tied"
    if higher_is_better is None:
        return "changed"
    return "better" if (verdict == "higher") == higher_is_better else "worse"
