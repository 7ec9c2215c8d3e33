"""Retrieval: the rank of a picture's own caption among others, by the scores that a model gives each of them.

Recall@k-of-n asks whether the own caption is among the k best of n candidates. With n = 100 this is a much easier
question than the usual Flickr30k-1k one (5,000 captions), and is never called by that name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .targets import TargetError

RECALL_AT = (1, 5, 10)


class CandidateError(ValueError):
    """A model's scores of the candidates that cannot be ranked."""


class RetrievalScore(NamedTuple):
    """score: 1 if the own caption is ranked first; rank: from 1; answer: index of the candidate ranked first.

    rank and answer are None where the model gave no scores (then ``parse_failure``: scored 0 and counted).
    """

    score: float
    rank: int | None
    answer: int | None

    @property
    def parse_failure(self) -> bool:
        return self.rank is None

    def scores(self, n: int) -> dict[str, float]:
        """``recall_k_of_n`` for each k below n, and ``reciprocal_rank``, each in [0, 1]; 0 without a rank."""
        recalls = {recall_name(k, n): float(self.rank is not None and self.rank <= k) for k in recalls_of(n)}
        return recalls | {"reciprocal_rank": 0.0 if self.rank is None else 1 / self.rank}


def recalls_of(n: int) -> list[int]:
    """The k of the recalls that mean something among ``n`` candidates."""
    return [k for k in RECALL_AT if k < n]


def recall_name(k: int, n: int) -> str:
    """``recall_5_of_100``."""
    return f"recall_{k}_of_{n}"


def score_retrieval(scores: Sequence[float] | None, target: int | None, n: int) -> RetrievalScore:
    """Rank the own caption; candidates that score the same as it stand before it.

    Args:
        scores: one for each candidate, higher is better; None from a model that answers with text only.
        target: index of the own caption.
        n: number of candidates.

    Raises:
        TargetError: the row has no caption of its own.
        CandidateError: not ``n`` finite numbers.
    """
    if target is None or not 0 <= target < n:
        raise TargetError(f"captions: the row has no caption of its own among its candidates (target {target!r})")
    if scores is None:
        return RetrievalScore(0.0, None, None)
    if len(scores) != n:
        raise CandidateError(f"candidate_scores: expected {n}, one for each candidate, got {len(scores)}")
    if wrong := [score for score in scores if not math.isfinite(score)]:
        raise CandidateError(f"candidate_scores: expected finite numbers, got {wrong[0]!r} ({len(wrong)} of {n})")
    own = scores[target]
    rank = 1 + sum(score >= own for i, score in enumerate(scores) if i != target)
    best = max((i for i in range(n) if i != target or rank == 1), key=lambda i: (scores[i], -i))
    return RetrievalScore(float(rank == 1), rank, best)
