"""What running a plan's cells means, wherever they run: the order, the options, the events, the record of failures.

``local.run_locally`` and ``ray_driver.run_on_ray`` are the two drivers. Both take the same arguments (``Driver``), tell
the same events, and leave the same output folder; what a cell does is ``worker.run_cell`` in both.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, Protocol

from bitquake.suite.store import Store
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

GRACE_SECONDS = 120.0
"""After a cell's time is over, for its worker to notice; then it is killed."""
FULL_DISK = "disk full"
"""The reason after which no further cell is begun: it would fail too."""


class CellError(RuntimeError):
    """A cell that has not finished.

    Attributes:
        reason: in a word or two: ``time``, ``disk full``, ``out of memory``, ``training``, ``not complete``, ``error``,
            ``killed by SIGKILL``. detail: what exactly.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # so that it survives pickling
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class SuiteStopped(RuntimeError):
    """No further cell can be run, and why; what is finished stays."""


@dataclass(frozen=True)
class CellOptions:
    """How a cell is run; nothing of it changes an answer beyond rounding.

    Attributes:
        device: as of lmms-eval; None: an accelerator if there is one.
        noise_cache: folder of the cache of corrupted pictures; "": none; None: in the user's cache folder.
        noise_cache_gb: its bound; None: its own default.
        minutes: after which the cell is given up; None: never.
    """

    device: str | None = None
    noise_cache: str | None = None
    noise_cache_gb: float | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class RunOptions:
    """How a plan is run.

    Attributes:
        scratch: folder of this machine for what is not finished.
        jobs: cells at once on this machine; threads: of each; None: cores shared evenly.
        cell: how each cell is run.
    """

    scratch: Path
    jobs: int = 1
    threads: int | None = None
    cell: CellOptions = field(default_factory=CellOptions)


@dataclass(frozen=True)
class Event:
    """Something happened to a cell.

    Attributes:
        kind: what happened; a cell that waits for another one's training has not started.
        cell: hash of the cell. worker: where it runs, for people.
        done, total: samples, of ``progress``. manifest: of ``finished``. reason, detail: of ``failed``; detail
            also of ``started``, when it is not for the first time.
    """

    kind: Literal["started", "progress", "finished", "failed"]
    cell: str
    worker: str = ""
    done: int = 0
    total: int = 0
    manifest: CellManifest | None = None
    reason: str = ""
    detail: str = ""


Tell = Callable[[Event], None]


@dataclass
class Outcome:
    """What came of the cells that a driver was given: hashes of those finished, and hash -> why of those failed."""

    finished: dict[str, CellManifest] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Driver(Protocol):
    """Runs cells, each hash once, records failures in the output folder, and tells what happens.

    A cell that fails costs no other. KeyboardInterrupt ends the workers and is raised again.

    Raises:
        SuiteStopped: no further cell can succeed (a full disk); the cells that are finished stay.
    """

    def __call__(
        self, plan: SuitePlan, cells: Sequence[PlannedCell], out: str, options: RunOptions, tell: Tell
    ) -> Outcome: ...


def run_order(cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """Cells in the order of their work, one of each hash: controls first, the others as planned.

    Every comparison needs its control, so that whatever finishes next can be compared at once; the controls also fill
    the cache of corrupted pictures. Longest first would pack workers better by less than a cell's time.
    """
    distinct = list({cell.hash: cell for cell in reversed(cells)}.values())[::-1]
    return sorted(distinct, key=lambda cell: bool(cell.twin))


def next_cell(
    waiting: Sequence[PlannedCell], working: Collection[PlannedCell], trained: Callable[[str], bool]
) -> PlannedCell | None:
    """The cell to begin next: the first whose training no cell in work is doing; None when there is none for now.

    Args:
        trained: whether the training of that hash is known to be finished.
    """
    busy = {cell.training_hash for cell in working if cell.training_hash and not trained(cell.training_hash)}
    return next((cell for cell in waiting if cell.training_hash not in busy), None)


def worker_environment(plan: SuitePlan, threads: int) -> dict[str, str]:
    """Environment variables of a worker, beside those of the driver; they must be set before torch is imported."""
    found = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # nothing in the block world is downloaded: a worker must not wait for a network that is not there
    return found | ({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if plan.world == "block" else {})


def threads_of(options: RunOptions) -> int:
    """Threads of each worker."""
    return options.threads or max(1, (os.cpu_count() or 1) // options.jobs)


def record_failure(
    store: Store, cell: PlannedCell, reason: str, detail: str, *, log: str = "", where: str = ""
) -> None:
    """Write ``failures/<hash>.json``: the next run tries the cell again, and says what was wrong until then."""
    before = store.failure(cell.hash)
    told: Mapping[str, Any] = {
        "name": cell.name,
        "hash": cell.hash,
        "reason": reason,
        "detail": detail,
        "log": log,
        "where": where or socket.gethostname(),
        "when": now(),
        "attempts": int(before.get("attempts", 0)) + 1,
    }
    store.write_failure(cell.hash, dict(told))
    store.clear_heartbeat(cell.hash)


def fail(
    store: Store,
    outcome: Outcome,
    tell: Tell,
    cell: PlannedCell,
    error: CellError,
    *,
    log: str,
    worker: str = "",
    host: str = "",
) -> None:
    """Record a failed cell in the output folder and the outcome, and tell it.

    Args:
        log: the end of what its worker printed. worker: where it ran, for people. host: its machine, where that may be
            another one.

    Raises:
        SuiteStopped: for want of room on a disk.
    """
    record_failure(store, cell, error.reason, error.detail, log=log, where=host or worker)
    outcome.failed[cell.hash] = str(error)
    tell(Event("failed", cell.hash, worker, reason=error.reason, detail=error.detail))
    if error.reason == FULL_DISK:
        there = f", or to the disk of {host}" if host else ""
        raise SuiteStopped(
            f"nothing more can be written to {store.url}{there} ({error.detail}). Finished cells are safe; make room "
            "and run the same command again"
        )


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
