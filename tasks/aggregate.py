"""Aggregations of lmms-eval's results table: each metric as a number, and ``<metric>_ci`` as its interval.

``!function bitquake.tasks.aggregate.ece_15`` asks for one; the names are the keys of ``bitquake.metrics.METRICS``, with
``_ci`` for the 95 % interval of the bootstrap clustered by image. lmms-eval computes standard errors for its own
functions only, and prints what an aggregation returns when it is a text, so the interval is a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bitquake.metrics import METRICS, Estimate, evaluate

NOT_AVAILABLE = "N/A"
"""What lmms-eval itself prints for a number that there is none of."""

Item = Sequence[Any]
"""What a task gives for one sample: [score, confidence or None, image id]."""


def item(score: float, confidence: float | None, image_id: str) -> list[Any]:
    """One sample's value of a metric."""
    return [score, confidence, image_id]


def accuracy_item(score: float, image_id: str) -> dict[str, Any]:
    """One sample's accuracy, in the form from which lmms-eval computes its own clustered standard error.

    The task's ``score_key`` is ``accuracy``, its ``cluster_key`` ``image_id``; ``score`` is what ``--baseline`` reads.
    """
    return {"accuracy": score, "score": score, "image_id": image_id}


def n_scored(records: Sequence[dict[str, Any]]) -> int:
    """Number of sample records without a failure."""
    return sum(record["failure"] is None for record in records)


def total(items: Sequence[Sequence[int]]) -> int:
    """Sum of the counts; each stands in a list so that lmms-eval makes no mean and error of them."""
    return sum(count for (count,) in items)


def estimate(key: str, items: Sequence[Item | dict[str, Any]], replicates: int) -> Estimate:
    """A metric of a task's samples, with its interval."""
    rows = [(i["score"], None, i["image_id"]) if isinstance(i, dict) else tuple(i) for i in items]
    confidences = [math.nan if confidence is None else confidence for _, confidence, _ in rows]
    return evaluate(
        [score for score, _, _ in rows],
        confidences,
        [image_id for _, _, image_id in rows],
        metrics=[key],
        replicates=replicates,
        seed=0,
    )[key]


def _value(key: str) -> Callable[[Sequence[Any]], float | str]:
    def value(items: Sequence[Any]) -> float | str:
        number = estimate(key, items, replicates=1).value
        return NOT_AVAILABLE if math.isnan(number) else number

    return value


def _interval(key: str) -> Callable[[Sequence[Any]], str]:
    def interval(items: Sequence[Any]) -> str:
        found = estimate(key, items, replicates=2000)
        return f"[{found.lo:.4f}, {found.hi:.4f}]" if found.available else NOT_AVAILABLE

    return interval


def __getattr__(name: str) -> Callable[[Sequence[Any]], Any]:
    key = name.removesuffix("_ci")
    if key not in METRICS or METRICS[key].needs_threshold_split:
        raise AttributeError(f"module {__name__!r} has no aggregation {name!r}")
    function = _value(key) if key == name else _interval(key)
    function.__name__ = function.__qualname__ = name
    return function
