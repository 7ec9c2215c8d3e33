"""Aggregations of lmms-eval's results table: each metric as a number, and ``<metric>_ci`` as its interval.

``!function bitquake.tasks.aggregate.ece_15`` asks for one; the names are the keys of ``bitquake.metrics.METRICS``, a
dot written as ``_``, with ``_ci`` for the 95 % interval of the bootstrap clustered by image. lmms-eval computes
standard errors for its own functions only, and prints what an aggregation returns when it is a text, so the interval is
a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bitquake.metrics import METRICS, Estimate, evaluate

from .scoring.caption import SCALE

NOT_AVAILABLE = "N/A"
"""What lmms-eval itself prints for a number that there is none of."""

REPLICATES = 2000
"""Of the bootstrap behind an interval."""

_KEYS = {key.replace(".", "_"): key for key in METRICS}
"""Name of an aggregation -> metric: a function's name has no dot."""

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


def score_item(value: float | None, failed: bool, image_id: str) -> list[Any]:
    """One sample's value of a protocol's further score: 0 where the sample failed, None where it has no such score."""
    return [0.0 if failed else value, failed, image_id]


def n_scored(records: Sequence[dict[str, Any]]) -> int:
    """Number of sample records without a failure."""
    return sum(record["failure"] is None for record in records)


def total(items: Sequence[Sequence[int]]) -> int:
    """Sum of the counts; each stands in a list so that lmms-eval makes no mean and error of them."""
    return sum(count for (count,) in items)


def share(items: Sequence[Sequence[int]]) -> float | str:
    """Mean of the counts."""
    return total(items) / len(items) if items else NOT_AVAILABLE


def score(items: Sequence[Item]) -> float | str:
    """Mean of a further score; not available where no sample that did not fail has it (``letter`` of plain text)."""
    return _score(items, 1.0, _number)


def score_ci(items: Sequence[Item]) -> str:
    """The interval of :func:`score`."""
    return str(_score(items, 1.0, _bounds))


def cider(items: Sequence[Item]) -> float | str:
    """CIDEr-D as it is published: ten times the mean of the samples' scores, each a tenth of their CIDEr-D."""
    return _score(items, SCALE, _number)


def cider_ci(items: Sequence[Item]) -> str:
    """The interval of :func:`cider`."""
    return str(_score(items, SCALE, _bounds))


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


def _score(items: Sequence[Item], scale: float, shown: Callable[[Estimate, float], float | str]) -> float | str:
    if not any(value is not None for value, failed, _ in items if not failed):
        return NOT_AVAILABLE
    rows = [item(value or 0.0, None, image_id) for value, _, image_id in items]
    return shown(estimate("accuracy", rows, replicates=1 if shown is _number else REPLICATES), scale)


def _number(found: Estimate, scale: float = 1.0) -> float | str:
    return NOT_AVAILABLE if math.isnan(found.value) else scale * found.value


def _bounds(found: Estimate, scale: float = 1.0) -> str:
    return f"[{scale * found.lo:.4f}, {scale * found.hi:.4f}]" if found.available else NOT_AVAILABLE


def _value(key: str) -> Callable[[Sequence[Any]], float | str]:
    def value(items: Sequence[Any]) -> float | str:
        return _number(estimate(key, items, replicates=1))

    return value


def _interval(key: str) -> Callable[[Sequence[Any]], str]:
    def interval(items: Sequence[Any]) -> str:
        return _bounds(estimate(key, items, replicates=REPLICATES))

    return interval


def __getattr__(name: str) -> Callable[[Sequence[Any]], Any]:
    key = _KEYS.get(name.removesuffix("_ci"), "")
    if key not in METRICS or METRICS[key].needs_threshold_split:
        raise AttributeError(f"module {__name__!r} has no aggregation {name!r}")
    function = _interval(key) if name.endswith("_ci") else _value(key)
    function.__name__ = function.__qualname__ = name
    return function
