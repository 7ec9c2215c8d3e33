"""When a figure may be ranked: selective coverage at a small risk rests on a handful of errors."""

from __future__ import annotations

import numpy as np

from .bootstrap import Estimate
from .registry import METRICS

# A coverage whose interval is wider than this (10 points) orders nothing, however many samples it has.
WIDEST_RANKED_INTERVAL = 0.10


def ranking_caution(key: str, estimate: Estimate) -> str:
    """Why runs must not be ranked by this estimate, or '' if they may.

    C@R needs 100 / R samples (10,000 for C@1%): at 40 % coverage that is about 40 tolerated errors. With fewer, or with
    an interval wider than 10 points, the figure is shown but not ranked. KeyError for an unknown key.
    """
    metric = METRICS[key]
    if not estimate.available:
        return estimate.note or "not available"
    if estimate.n < metric.minimum_n:
        return f"{metric.title} needs at least {metric.minimum_n:,} samples to rank, got {estimate.n:,}"
    width = estimate.hi - estimate.lo
    if metric.minimum_n and not np.isclose(width, WIDEST_RANKED_INTERVAL) and width > WIDEST_RANKED_INTERVAL:
        return f"{metric.title} has an interval {100 * width:.0f} points wide"
    return ""
