"""The bootstrap's draws by hand, and answers to questions about images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from bitquake.metrics import Samples

Array = NDArray[Any]

# No test here is timed: a busy machine must not fail one.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def _drawn_by_hand(clusters: int, replicates: int, seed: int, stream: int) -> Array:
    """The documented draw in Python integers: low half of each raw number first, rows padded to an even length."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, stream]))
    rows = []
    for _ in range(replicates):
        words: list[int] = []
        while len(words) < clusters:
            raw = int(bits.random_raw())
            words += [raw & 0xFFFFFFFF, raw >> 32]
        rows.append(np.bincount([w * clusters >> 32 for w in words[:clusters]], minlength=clusters))
    return np.array(rows)


def _clustered(
    rng: np.random.Generator, images: int, *, prefix: str = "image", soft: bool = True, harm: float = 0.0
) -> Samples:
    """Answers to 1-5 questions per image whose difficulty the questions share; tied and missing confidences.

    harm: by how much the questions are harder than the confidences say.
    """
    sizes = rng.integers(1, 6, images)
    cluster = np.repeat([f"{prefix}-{i}" for i in range(images)], sizes)
    skill = np.repeat(rng.beta(4, 1, images), sizes)
    confidence = np.round(np.clip(skill + rng.normal(0, 0.1, cluster.size), 0, 1), 2)
    score = (rng.random(cluster.size) < skill - harm).astype(float)
    if soft:
        score *= rng.choice([0.3, 0.6, 0.9, 1.0], cluster.size, p=[0.1, 0.1, 0.1, 0.7])
    confidence[rng.random(cluster.size) < 0.03] = math.nan
    order = rng.permutation(cluster.size)
    return Samples(score[order], confidence[order], cluster[order])


def _repeated(samples: Samples, counts: Array) -> tuple[Array, Array]:
    """Score and confidence of a replicate, written out: the samples of each image as often as it was drawn."""
    times = counts[np.unique(samples.cluster, return_inverse=True)[1]]
    return np.repeat(samples.score, times), np.repeat(samples.confidence, times)


@pytest.fixture(scope="session")
def drawn_by_hand() -> Callable[[int, int, int, int], Array]:
    return _drawn_by_hand


@pytest.fixture(scope="session")
def clustered() -> Callable[..., Samples]:
    return _clustered


@pytest.fixture(scope="session")
def repeated() -> Callable[[Samples, Array], tuple[Array, Array]]:
    return _repeated
