"""Random numbers that depend on the sample and the corruption, and on nothing else.

NumPy promises that a bit generator's raw integers never change, and makes no such promise for anything above them
(``Generator.normal`` and its like), so everything here starts from ``PCG64.random_raw``.
Severity is no part of the seed: all severities of one sample share one noise field, which makes severity curves smooth
and comparisons between severities paired.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import NoiseError

U16 = npt.NDArray[np.uint16]


class SampleKey(NamedTuple):
    """Names one sample of a benchmark. Order, rank, batch and process never enter it."""

    dataset: str
    split: str
    sample_id: str


def sample_digest(key: SampleKey) -> int:
    """128-bit blake2b of dataset, split and sample id, each preceded by its length so that no two keys run together.

    Raises:
        NoiseError: the key is not three strings.
    """
    if not isinstance(key, tuple) or len(key) != 3 or not all(isinstance(part, str) for part in key):
        raise NoiseError(
            f"key: a noise needs SampleKey(dataset, split, sample_id), three strings; got {key!r}. "
            "Write numbers as text, as in SampleKey('vqav2', 'validation', '42')."
        )
    digest = hashlib.blake2b(digest_size=16)
    for part in key:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


class RandomStream:
    """The random integers of one (suite seed, sample, corruption), drawn in order.

    Args:
        seed: the suite's seed, at least 0.
        key: the sample.
        noise_id: the corruption's stable id, at least 1.
    """

    def __init__(self, seed: int, key: SampleKey, noise_id: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([seed, sample_digest(key), noise_id]))

    def uint16(self, count: int) -> U16:
        """``count`` independent integers, uniform on 0..65535, shape (count,).

        Four come from each raw 64-bit integer, lowest bits first; a call always starts at a fresh raw integer.
        """
        raw = np.asarray(self._bits.random_raw((count + 3) // 4), dtype="<u8")
        return raw.view("<u2")[:count]
