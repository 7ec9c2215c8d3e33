"""What workers on Ray say of their cells, and the actor that keeps it; imports nothing, to start at once."""

from __future__ import annotations

from typing import NamedTuple


class Beat(NamedTuple):
    """A cell is in work: its try, the worker for people, its machine's id in Ray, samples answered and in all."""

    tries: int
    worker: str
    node: str
    done: int
    total: int


class Mailbox:
    """An actor that keeps the last that was said of each cell until the driver takes it."""

    def __init__(self) -> None:
        self._last: dict[str, Beat] = {}

    def put(self, cell_hash: str, beat: Beat) -> None:
        """Of a cell."""
        self._last[cell_hash] = beat

    def take(self) -> dict[str, Beat]:
        """Hash of a cell -> the last of it; each is told once."""
        last, self._last = self._last, {}
        return last
