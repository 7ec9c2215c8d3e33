"""Answers kept on disk as they come, so that a killed run goes on where it stopped.

lmms-eval holds every answer of a process in memory until the last one is there. The journal is a folder of JSON Lines
files, one per process that wrote (``DIR/<model hash>/<uuid>.jsonl``): ranks need no lock, and a line that a kill cut
short is the last of a file that nobody appends to again. A line is one batch:

    {"key": "5f0c...", "answers": [[response text, input tokens, output tokens], ...]}

The unit is the batch because padding and kernels depend on a sample's neighbours: an answer is only bit-equal within
the same batch. So a key covers the whole batch, and one that is not there complete is computed again as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_SYNC_SECONDS = 1.0
"""Least time between two fsyncs: only a power failure, not a kill, can lose what was written since the last."""


class JournalAnswer(NamedTuple):
    """One response as lmms-eval gets it, and its token counts."""

    text: str
    input_tokens: int
    output_tokens: int


def digest(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """blake2 hex of the canonical JSON of strings, numbers, lists and mappings."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


class Journal:
    """The journal of one model, read once when opened, then written by this process only; a context manager.

    A file appears with the first answer. ``get`` may be called from another thread than ``add``.

    Attributes:
        unreadable: lines that were left out because a kill (or a full disk) cut them short.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._synced = float("-inf")
        self._batches: dict[str, list[JournalAnswer]] = {}
        self.unreadable = 0
        for path in sorted(folder.glob("*.jsonl")):
            with path.open("rb") as lines:
                for line in lines:
                    self._read(line)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key, answers = entry["key"], [JournalAnswer(*answer) for answer in entry["answers"]]
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1
            return
        self._batches[key] = answers

    def get(self, key: str) -> list[JournalAnswer] | None:
        """The answers of a batch, in its order, or None where the journal lacks it."""
        return self._batches.get(key)

    def add(self, key: str, answers: Sequence[JournalAnswer]) -> None:
        """Write a batch: it survives a kill of this process from now on, and a power failure after a second.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / f"{uuid.uuid4().hex}.jsonl").open("xb")
        self._file.write(json.dumps({"key": key, "answers": answers}, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Bring everything to the disk. Does nothing the second time."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
