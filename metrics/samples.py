"""Samples, their order by confidence, and the weighted sums that every metric is made of.

A metric here is a function of weighted samples: the plain value has all weights 1, a bootstrap replicate has integer
weights. `OrderedSamples` sorts once; `Resampled` holds a block of replicates and computes each cumulative sum at most
once for all the metrics that need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Samples(NamedTuple):
    """One run's answers, in any order.

    score: (n,) accuracy of each answer in [0, 1] (soft where the benchmark is).
    confidence: (n,) in [0, 1]; NaN where it is missing; None when the run gave none at all.
    cluster: (n,) ids of the image each question is about; None makes every sample its own cluster. Ids are compared
        across splits, so they must name the image, not its row.
    """

    score: ArrayLike
    confidence: ArrayLike | None = None
    cluster: ArrayLike | None = None


def check_score(score: ArrayLike) -> FloatArray:
    """(n,) float64 scores; ValueError unless one-dimensional and all in [0, 1]."""
    array = _vector(score, "score")
    bad = ~((array >= 0) & (array <= 1))
    if bad.any():
        where = int(np.argmax(bad))
        raise ValueError(
            f"score must be in [0, 1] for every sample, got {array[where]} at position {where} "
            f"({int(bad.sum())} such); a failed sample scores 0, and percentages are divided by 100"
        )
    return array


def check_confidence(confidence: ArrayLike | None, n: int) -> FloatArray:
    """(n,) float64 confidences, NaN = missing; ValueError for another length or a number outside [0, 1]."""
    if confidence is None:
        return np.full(n, np.nan)
    array = _vector(confidence, "confidence")
    if array.size != n:
        raise ValueError(f"confidence must have one entry per score ({n}), got {array.size}; NaN where it is missing")
    bad = ~(np.isnan(array) | ((array >= 0) & (array <= 1)))
    if bad.any():
        where = int(np.argmax(bad))
        raise ValueError(
            f"confidence must be in [0, 1] or NaN, got {array[where]} at position {where} ({int(bad.sum())} such); "
            "take exp() of a log-probability"
        )
    return array


def check_cluster(cluster: ArrayLike | None, n: int) -> NDArray[Any]:
    """(n,) cluster ids (numbers or strings); ValueError for another length or a missing id."""
    if cluster is None:
        return np.arange(n)
    ids = np.asarray(cluster)
    if ids.ndim != 1 or ids.size != n:
        raise ValueError(f"cluster must be one-dimensional with one id per score ({n}), got shape {ids.shape}")
    if ids.dtype == object:
        missing = np.array([i is None or i != i for i in ids], dtype=bool)
        text = np.array([str(i) for i in ids], dtype=str) if n else np.zeros(0, dtype=str)
    else:
        missing = np.isnan(ids) if ids.dtype.kind == "f" else np.zeros(n, dtype=bool)
        text = ids
    if missing.any():
        where = int(np.argmax(missing))
        raise ValueError(
            f"cluster id is missing at position {where} ({int(missing.sum())} such); "
            "give a sample without an image an id of its own"
        )
    return text


def check_weights(weights: ArrayLike | None, n: int) -> FloatArray:
    """(n,) weights (None: all 1); ValueError for another length, or one that is negative or not finite."""
    if weights is None:
        return np.ones(n)
    w = _vector(weights, "weights")
    if w.size != n:
        raise ValueError(f"weights must have one entry per score ({n}), got {w.size}")
    if not (np.isfinite(w) & (w >= 0)).all():
        raise ValueError("weights must be finite and not negative")
    return w


def _vector(values: ArrayLike, name: str) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    return array


class OrderedSamples:
    """Checked samples, sorted by confidence (highest first, missing last), with ties grouped into levels.

    A level is a set of samples with one confidence: no threshold can part them. Missing confidences form one last level
    that no threshold reaches.
    """

    def __init__(self, score: ArrayLike, confidence: ArrayLike | None = None, cluster: ArrayLike | None = None) -> None:
        raw_score = check_score(score)
        self.n: int = raw_score.size
        raw_confidence = check_confidence(confidence, self.n)
        self.cluster_ids = check_cluster(cluster, self.n)
        self.distinct_clusters, codes = np.unique(self.cluster_ids, return_inverse=True)
        self.n_clusters: int = self.distinct_clusters.size
        order = np.argsort(-raw_confidence, kind="stable")
        self.score: FloatArray = raw_score[order]
        self.confidence: FloatArray = raw_confidence[order]
        self.cluster: IntArray = codes.reshape(-1).astype(np.int64)[order]
        self.n_missing = int(np.isnan(self.confidence).sum())
        self.n_present = self.n - self.n_missing

    @cached_property
    def level_last(self) -> IntArray:
        """(levels,) position of the last sample of each level."""
        c = self.confidence
        ends = (c[1:] != c[:-1]) & ~(np.isnan(c[1:]) & np.isnan(c[:-1]))
        return np.flatnonzero(np.append(ends, np.ones(min(self.n, 1), dtype=bool)))

    @cached_property
    def n_levels(self) -> int:
        """Levels with a confidence, that is, the thresholds worth trying."""
        return self.level_last.size - (1 if self.n_missing else 0)

    @cached_property
    def level_confidence(self) -> FloatArray:
        """(n_levels,) distinct confidences, falling."""
        return self.confidence[self.level_last[: self.n_levels]]

    @cached_property
    def tied(self) -> bool:
        return self.level_last.size < self.n

    @cached_property
    def binary(self) -> bool:
        return bool(((self.score == 0) | (self.score == 1)).all())

    @cached_property
    def by_score(self) -> OrderedSamples:
        """The same samples as an oracle would rank them: best answers first."""
        oracle = object.__new__(OrderedSamples)
        order = np.argsort(-self.score, kind="stable")
        oracle.n, oracle.n_missing, oracle.n_present = self.n, 0, self.n
        oracle.score = oracle.confidence = self.score[order]
        oracle.cluster, oracle.n_clusters = self.cluster[order], self.n_clusters
        oracle.cluster_ids, oracle.distinct_clusters = self.cluster_ids, self.distinct_clusters
        return oracle

    def per_cluster(self, features: FloatArray) -> FloatArray:
        """(n, k) features of the sorted samples, summed within clusters: (n_clusters, k)."""
        membership = sparse.csr_array((np.ones(self.n), (self.cluster, np.arange(self.n))), (self.n_clusters, self.n))
        return np.asarray(membership @ features)

    @cached_property
    def store(self) -> dict[Any, Any]:
        """Constants that a metric prepares once for all replicates."""
        return {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.store:
            self.store[key] = make()
        return self.store[key]


class Resampled:
    """A block of r replicates: how often each cluster was drawn, and the cumulative sums over falling confidence.

    counts: (r, n_clusters) non-negative weights. Cumulative arrays are (r, levels): entry j sums over all samples with
    a confidence of at least level j's.
    """

    def __init__(self, samples: OrderedSamples, counts: FloatArray) -> None:
        self.samples = samples
        self.counts = counts

    @cached_property
    def digest(self) -> bytes:
        """Tells one block of draws from another."""
        return hashlib.blake2b(np.ascontiguousarray(self.counts).data, digest_size=16).digest()

    @cached_property
    def weight(self) -> FloatArray:
        """(r, n) weight of each sorted sample."""
        return np.take(self.counts, self.samples.cluster, axis=1)

    def cumulative(self, feature: FloatArray | None) -> FloatArray:
        """(r, levels) cumulative weighted sum of an (n,) feature (None: of 1)."""
        total = np.cumsum(self.weight if feature is None else self.weight * feature, axis=1)
        return total[:, self.samples.level_last] if self.samples.tied else total

    def of_levels(self, cumulative: FloatArray) -> FloatArray:
        """(r, levels) sums within each level from their cumulative sums."""
        return np.diff(cumulative, axis=1, prepend=0.0)

    @cached_property
    def level_weight(self) -> FloatArray:
        return self.of_levels(self.cum_weight) if self.samples.tied else self.weight

    @cached_property
    def cum_weight(self) -> FloatArray:
        return self.cumulative(None)

    @cached_property
    def cum_score(self) -> FloatArray:
        return self.cumulative(self.samples.score)

    @cached_property
    def cum_zero(self) -> FloatArray:
        """Weight of the samples with score 0."""
        if self.samples.binary:
            return self.cum_weight - self.cum_score
        return self.cumulative((self.samples.score == 0).astype(np.float64))

    @cached_property
    def cum_correct(self) -> FloatArray:
        """Weight of the samples with score >= 0.5."""
        if self.samples.binary:
            return self.cum_score
        return self.cumulative((self.samples.score >= 0.5).astype(np.float64))

    @cached_property
    def cum_risk(self) -> FloatArray:
        """Weighted sum of 1 - score."""
        return self.cum_weight - self.cum_score

    @cached_property
    def by_score(self) -> Resampled:
        return Resampled(self.samples.by_score, self.counts)

    def sums(self, key: Any, make: Callable[[], FloatArray]) -> FloatArray:
        """(r, k) weighted sums of the (n, k) features that `make` gives; prepared once under `key`."""
        totals: FloatArray = self.samples.once(key, lambda: self.samples.per_cluster(make()))
        return np.asarray(self.counts @ totals)

    @cached_property
    def total(self) -> FloatArray:
        """(r,) weight of all samples."""
        return self.sums("total", lambda: np.ones((self.samples.n, 1)))[:, 0]

    @cached_property
    def present(self) -> FloatArray:
        """(r,) weight of the samples that have a confidence."""
        return self.sums("present", lambda: (~np.isnan(self.samples.confidence))[:, None].astype(np.float64))[:, 0]

    def mean(self, key: str, make: Callable[[], FloatArray], over: FloatArray) -> FloatArray:
        """(r,) weighted sum of an (n,) feature divided by `over`; NaN where that is 0."""
        return ratio(self.sums(key, lambda: np.nan_to_num(make())[:, None])[:, 0], over)


def ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    """above / below, NaN where below is 0."""
    out: FloatArray = np.full(np.broadcast_shapes(above.shape, below.shape), np.nan)
    return np.divide(above, below, out=out, where=below > 0)


def plain(score: ArrayLike, confidence: ArrayLike | None, weights: ArrayLike | None = None) -> Resampled:
    """The samples as they are (weights 1), or each with its own non-negative weight, as one replicate."""
    samples = OrderedSamples(score, confidence)
    return Resampled(samples, check_weights(weights, samples.n)[None, :])


def guarded(
    compute: Callable[[Resampled], FloatArray], block: Resampled, *, needs_confidence: bool = True
) -> FloatArray:
    """(r,) values of a metric, NaN for replicates without samples, or without any confidence where one is needed."""
    rows = block.counts.shape[0]
    if block.samples.n == 0 or (needs_confidence and block.samples.n_present == 0):
        return np.full(rows, np.nan)
    values = compute(block)
    needed = block.present if needs_confidence else block.total
    return np.where(needed > 0, values, np.nan)
