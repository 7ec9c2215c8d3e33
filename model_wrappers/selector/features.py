"""Hidden states of answered samples on disk: what a Selector is fitted on and applied to (papers.md 1.7).

    <artifacts>/features/<model hash>/shard-<hash of its keys>.safetensors
        image, question, first: float16 (n, d)      has_image: uint8 (n,)
        metadata "bitquake": JSON {"version": 1, "model_hash": "...", "keys": [n keys]}

A row is known by its key, a hash of everything that decides it but its neighbours in the batch (``feature_key``): equal
inputs share a row whatever the order, the batch or the process, and a task of the same prompts adds nothing. Files are
named by their keys and appear whole, so several processes write into one folder without a lock. This module is the only
writer and the only reader; it needs no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..journal import digest

FEATURES_VERSION = 1
SHARD_ROWS = 1024
"""Rows from which on a shard is written, at the end of a batch."""
SHARD_SECONDS = 120.0
"""Seconds after which one is written even when it is not full: more than that a kill does not cost."""
STATES = ("image", "question", "first")
_FOLDER = "features"
_META = "bitquake"
"""The only key of a file's metadata: safetensors writes several in no fixed order."""
_LARGEST = float(np.finfo(np.float16).max)

Halves = npt.NDArray[np.float16]
Singles = npt.NDArray[np.float32]


class FeaturesError(KeyError):
    """Features that are asked for and not there, or that cannot be read."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return str(self.args[0])


class Features(NamedTuple):
    """Hidden states of n samples: of the language model's last layer, before its final norm, over the prompt.

    Attributes:
        image: (n, d), maximum over the positions of image tokens; zeros where there are none.
        question: (n, d), maximum over the positions of the question's own tokens.
        first: (n, d), the prompt's last position: it predicts the first token of the answer.
        has_image: (n,), whether ``image`` is of a picture.
    """

    image: Singles
    question: Singles
    first: Singles
    has_image: npt.NDArray[np.bool_]

    def rows(self, index: Any) -> Features:
        """The rows of an index, slice or mask."""
        return Features(*(array[index] for array in self))


def as_stored(states: Singles) -> tuple[Halves, int]:
    """States rounded to the float16 of the shards, those out of its range set to its ends; and how many were."""
    out = int((np.abs(states) > _LARGEST).sum())
    return np.clip(states, -_LARGEST, _LARGEST).astype(np.float16), out


def rounded(features: Features) -> Features:
    """Features as a store gives them back."""
    image, question, first = (as_stored(states)[0].astype(np.float32) for states in features[:3])
    return Features(image, question, first, features.has_image)


def feature_key(
    model_hash: str, settings: str, prompt_hash: str, question: Sequence[int], pixels: Sequence[str]
) -> str:
    """blake2b-16 hex of what decides a sample's features.

    Args:
        settings: digest of what else changes hidden states (dtype, device, library versions, processor).
        question: begin and end of the question in the prompt; empty where it cannot be told.
        pixels: hash of each picture.
    """
    return digest([FEATURES_VERSION, model_hash, settings, prompt_hash, list(question), list(pixels)])


class FeatureStore:
    """The features of one model on disk: what is there is known when it is opened, what is new comes in shards.

    Attributes:
        clamped: numbers that did not fit float16 and were set to the end of its range.
        unreadable: shards that are damaged; their samples count as not there.
    """

    def __init__(self, artifacts: Path, model_hash: str) -> None:
        self._folder, self._model_hash = features_folder(artifacts, model_hash), model_hash
        self._where: dict[str, tuple[Path, int]] = {}
        self._rows: dict[str, tuple[Halves, Halves, Halves, bool]] = {}
        self._since = time.monotonic()
        self.clamped = 0
        self.unreadable: list[Path] = []
        for path, keys in _shards(self._folder, model_hash, self.unreadable):
            for row, key in enumerate(keys):
                self._where.setdefault(key, (path, row))

    def __contains__(self, key: str) -> bool:
        """True when the sample's features are on disk; those that wait for their shard do not count."""
        return key in self._where

    def put(self, keys: Sequence[str], features: Features) -> Features:
        """Add samples, and return the features that their keys stand for, rounded as they are stored.

        A key that is known keeps the features it has: they may differ in the last bits from those of another batch.

        Raises:
            FeaturesError: a shard that was there is gone or damaged.
        """
        given = []
        for states in features[:3]:
            halves, clamped = as_stored(states)
            given.append(halves)
            self.clamped += clamped
        held = []
        for row, key in enumerate(keys):
            if key in self._where:
                held.append(self._read(key))
                continue
            if not self._rows:
                self._since = time.monotonic()
            new = (given[0][row], given[1][row], given[2][row], bool(features.has_image[row]))
            held.append(self._rows.setdefault(key, new))
        if not held:
            return features
        image, question, first = (np.stack([one[at] for one in held]).astype(np.float32) for at in range(3))
        return Features(image, question, first, np.array([one[3] for one in held]))

    def write(self, *, always: bool = True) -> bool:
        """Bring what waits to the disk, as one shard; True when nothing waits any more.

        Args:
            always: False writes only when a shard is full or has waited for ``SHARD_SECONDS``.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        from safetensors.numpy import save_file

        from bitquake.tasks.sources import replacing

        if not self._rows:
            return True
        if not always and len(self._rows) < SHARD_ROWS and time.monotonic() - self._since < SHARD_SECONDS:
            return False
        keys, rows = list(self._rows), list(self._rows.values())
        tensors: dict[str, Any] = {name: np.stack([row[i] for row in rows]) for i, name in enumerate(STATES)}
        tensors["has_image"] = np.array([row[3] for row in rows], dtype=np.uint8)
        meta = {"version": FEATURES_VERSION, "model_hash": self._model_hash, "keys": keys}
        file = self._folder / f"shard-{digest(keys)}.safetensors"
        with replacing(file) as new:
            save_file(tensors, str(new), metadata={_META: json.dumps(meta)})
        self._where.update((key, (file, row)) for row, key in enumerate(keys))
        self._rows.clear()
        return True

    def _read(self, key: str) -> tuple[Halves, Halves, Halves, bool]:
        path, row = self._where[key]
        with _opened(path) as shard:
            image, question, first = (np.array(shard.get_slice(name)[row : row + 1])[0] for name in STATES)
            return image, question, first, bool(shard.get_slice("has_image")[row : row + 1][0])


def features_folder(artifacts: Path, model_hash: str) -> Path:
    """Folder of a model's shards in an artifacts folder."""
    return Path(artifacts) / _FOLDER / model_hash


def load_features(artifacts: Path, model_hash: str, keys: Sequence[str]) -> Features:
    """The features of samples, in the order of their keys (a key may occur several times).

    Args:
        artifacts: the artifacts folder of the run (``artifacts=`` of its ``model_args``).
        model_hash, keys: ``model_hash`` and ``features`` of the samples' records.

    Raises:
        FeaturesError: some are not there; the message says how many, and how to get them.
    """
    folder = features_folder(artifacts, model_hash)
    wanted: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        wanted.setdefault(key, []).append(row)
    damaged: list[Path] = []
    found: Features | None = None
    missing = set(wanted)
    for path, held in _shards(folder, model_hash, damaged):
        rows = [(at, key) for at, key in enumerate(held) if key in missing]
        if not rows:
            continue
        with _opened(path) as shard:
            arrays = [shard.get_tensor(name) for name in STATES]
            has_image = shard.get_tensor("has_image")
        if found is None:
            shape = len(keys), arrays[0].shape[1]
            image, question, first = (np.zeros(shape, np.float32) for _ in STATES)
            found = Features(image, question, first, np.zeros(len(keys), np.bool_))
        for at, key in rows:
            for target, array in zip(found[:3], arrays, strict=True):
                target[wanted[key]] = array[at]
            found.has_image[wanted[key]] = has_image[at]
            missing.discard(key)
    if missing:
        without = f"; {len([key for key in missing if not key])} record no features" if "" in missing else ""
        broken = f"; damaged, and left out: {', '.join(path.name for path in damaged)}" if damaged else ""
        raise FeaturesError(
            f"features: {sum(len(wanted[key]) for key in missing)} of {len(keys)} samples of model {model_hash} have "
            f"none in {folder} (the first key: {min(missing)!r}){without}{broken}. Give the artifacts folder of the "
            "run; or run it again with features=true in model_args: what is there is kept, the rest is computed."
        )
    if found is None:  # no keys: no sample tells d
        nothing = np.zeros((0, 0), np.float32)
        return Features(nothing, nothing, nothing, np.zeros(0, np.bool_))
    return found


def _shards(folder: Path, model_hash: str, damaged: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Each readable shard and its keys, by name; the others go to ``damaged``."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            with safe_open(str(path), framework="numpy") as shard:
                meta = json.loads((shard.metadata() or {})[_META])
                keys, shape = meta["keys"], shard.get_slice("first").get_shape()
            fits = meta["version"] == FEATURES_VERSION and meta["model_hash"] == model_hash and len(keys) == shape[0]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if fits:
            yield path, keys
        else:
            damaged.append(path)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        raise FeaturesError(f"features: {path} cannot be read ({error}); run again with features=true") from error
