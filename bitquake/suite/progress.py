"""The live view of a run: on a terminal a bar for the suite and one for each cell in work, else lines of events."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from bitquake.suite.driver import Event
from bitquake.suite.estimate import duration
from bitquake.suite_plan import CellManifest, PlannedCell

_FORM = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_NAME_WIDTH = 34


class View:
    """Shows what a driver tells; a context manager. May be told from several threads.

    Args:
        cells: those that are run. finished: hash -> manifest of those that were there before, for the hit rate only.
        stream: where to, default the standard error; bars only on a terminal.
    """

    def __init__(
        self, cells: Sequence[PlannedCell], finished: Mapping[str, CellManifest], stream: IO[str] | None = None
    ) -> None:
        self._cells = {cell.hash: cell for cell in cells}
        self._stream, self._lock = stream or sys.stderr, threading.Lock()
        self._bars: Any = None
        self._of_cell: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._n_finished = self._n_failed = 0
        self._hits = self._misses = 0
        for manifest in finished.values():
            self._count_pictures(manifest)

    def __enter__(self) -> View:
        if self._stream.isatty():
            from tqdm import tqdm

            total = sum(sum(cell.n.values()) for cell in self._cells.values())
            self._bars = tqdm
            self._whole = tqdm(total=total, unit="sample", file=self._stream, bar_format=_FORM, position=0)
            self._describe()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            for bar in self._of_cell.values():
                bar.close()
            self._whole.close()

    def tell(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            {"started": self._started, "progress": self._progress}.get(event.kind, self._ended)(event)
            if self._bars is not None:
                self._describe()

    def _started(self, event: Event) -> None:
        cell = self._cells[event.cell]
        self._began[event.cell] = time.monotonic()
        if self._bars is None:
            self._line(f"started   {cell.name} (worker {event.worker}){f'; {event.detail}' if event.detail else ''}")
            return
        if (bar := self._of_cell.pop(event.cell, None)) is not None:  # it is tried again
            bar.close()
            del self._rows[event.cell]
        row = next(i for i in range(1, len(self._rows) + 2) if i not in self._rows.values())
        self._rows[event.cell] = row
        name = cell.name if len(cell.name) <= _NAME_WIDTH else f"…{cell.name[1 - _NAME_WIDTH :]}"
        self._of_cell[event.cell] = self._bars(
            total=sum(cell.n.values()) or None,
            desc=f"{name:<{_NAME_WIDTH}}",
            file=self._stream,
            position=row,
            leave=False,
            bar_format=_FORM,
        )

    def _progress(self, event: Event) -> None:
        before = self._done.get(event.cell, 0)
        self._done[event.cell] = event.done
        if self._bars is None:
            return
        self._whole.update(event.done - before)
        if (bar := self._of_cell.get(event.cell)) is not None:
            bar.total = event.total or None
            bar.update(event.done - bar.n)

    def _ended(self, event: Event) -> None:
        cell = self._cells[event.cell]
        took = duration(time.monotonic() - self._began.get(event.cell, time.monotonic()))
        if event.kind == "finished":
            self._n_finished += 1
            if event.manifest is not None:
                self._count_pictures(event.manifest)
            told = f"finished  {cell.name} in {took}"
        else:
            self._n_failed += 1
            told = f"failed    {cell.name} after {took}: {event.reason}{f': {event.detail}' if event.detail else ''}"
        if self._bars is None:
            self._line(f"{told}  [{self._summary()}]")
            return
        planned = sum(cell.n.values())
        self._whole.update(planned - self._done.get(event.cell, 0))
        if (bar := self._of_cell.pop(event.cell, None)) is not None:
            bar.close()
            del self._rows[event.cell]
        if event.kind == "failed":
            self._bars.write(told, file=self._stream)

    def _count_pictures(self, manifest: CellManifest) -> None:
        counts = manifest.noise_cache or {}
        self._hits += counts.get("hits", 0)
        self._misses += counts.get("misses", 0)

    def _summary(self) -> str:
        parts = [f"{self._n_finished}/{len(self._cells)} cells"]
        parts += [f"{self._n_failed} failed"] if self._n_failed else []
        pictures = self._hits + self._misses
        parts += [f"noise cache {self._hits / pictures:.0%}"] if pictures else []
        return ", ".join(parts)

    def _describe(self) -> None:
        self._whole.set_description(self._summary())

    def _line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)
