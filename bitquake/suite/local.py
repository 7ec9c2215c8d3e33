"""Runs cells in worker processes of this machine: each stays for many cells, for importing torch costs as much as many
a cell. A worker that dies costs its cell, which is recorded, and is replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitquake.suite.driver import (
    GRACE_SECONDS,
    CellError,
    Event,
    Outcome,
    RunOptions,
    SuiteStopped,
    Tell,
    fail,
    next_cell,
    run_order,
    threads_of,
    worker_environment,
)
from bitquake.suite.store import Store, open_store
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

_SHOWN_LINES, _SHOWN_BYTES = 12, 4000
_TERMINATE_SECONDS = 5.0


def run_locally(plan: SuitePlan, cells: Sequence[PlannedCell], out: str, options: RunOptions, tell: Tell) -> Outcome:
    """Run cells in ``options.jobs`` worker processes; see ``driver.Driver``."""
    return _Run(plan, cells, out, options, tell).run()


class _Worker:
    """A worker process, and a thread that passes on what it says; ``None`` is that it has ended."""

    def __init__(self, command: list[str], environment: dict[str, str], said: queue.SimpleQueue[Any]) -> None:
        # of its own session: Ctrl-C in a terminal is the driver's affair
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self.ready = False
        self.cell: PlannedCell | None = None
        self.began = 0.0
        self.overdue = False
        self._said = said
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                self._said.put((self, json.loads(line)))
        self.process.wait()
        self._said.put((self, None))

    def ask(self, cell: PlannedCell, options: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.cell, self.began = cell, time.monotonic()
        request = {"cell": cell.model_dump(mode="json"), "options": options}
        with contextlib.suppress(BrokenPipeError):  # it has died: its thread says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Let an idle worker end by itself."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class _Run:
    def __init__(
        self, plan: SuitePlan, cells: Sequence[PlannedCell], out: str, options: RunOptions, tell: Tell
    ) -> None:
        self.store: Store = open_store(out)
        self.places = self.store.places(options.scratch)
        self.options, self.tell = options, tell
        self.waiting = run_order(cells)
        self.trained: set[str] = set()
        self.workers: list[_Worker] = []
        self.said: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self.outcome = Outcome()
        self.command = [
            *(sys.executable, "-m", "bitquake.suite.worker_process"),
            *(self.store.url, str(options.scratch), str(self.places.logs)),
        ]
        self.environment = {**os.environ, **worker_environment(plan, threads_of(options))}

    def run(self) -> Outcome:
        try:
            self._hand_out()
            while any(worker.cell is not None for worker in self.workers):
                self._kill_overdue()
                try:
                    worker, message = self.said.get(timeout=1.0)
                except queue.Empty:
                    continue
                if message is None:
                    self._died(worker)
                else:
                    self._heard(worker, message)
                self._hand_out()
        finally:
            self._end_workers()
        return self.outcome

    def _hand_out(self) -> None:
        while True:
            working = [worker.cell for worker in self.workers if worker.cell is not None]
            if len(working) >= self.options.jobs:
                return
            cell = next_cell(self.waiting, working, self.trained.__contains__)
            if cell is None:
                return
            self.waiting.remove(cell)
            # one that has died may not have been heard of
            worker = next((one for one in self.workers if one.cell is None and one.process.poll() is None), None)
            if worker is None:
                worker = _Worker(self.command, self.environment, self.said)
                self.workers.append(worker)
            worker.ask(cell, dataclasses.asdict(self.options.cell))
            self.tell(Event("started", cell.hash, str(worker.process.pid)))

    def _heard(self, worker: _Worker, message: dict[str, Any]) -> None:
        cell = worker.cell
        if message["event"] == "ready":
            worker.ready = True
        elif cell is None:
            return
        elif message["event"] == "progress":
            if message["done"] and cell.training_hash:
                self.trained.add(cell.training_hash)
            name = str(worker.process.pid)
            self.tell(Event("progress", cell.hash, name, message["done"], message["total"]))
        elif message["event"] == "finished":
            worker.cell = None
            self.trained.add(cell.training_hash)
            manifest = CellManifest.model_validate(message["manifest"])
            self.outcome.finished[cell.hash] = manifest
            self.tell(Event("finished", cell.hash, manifest=manifest))
        else:
            worker.cell = None
            self._failed(cell, message["reason"], message["detail"])

    def _failed(self, cell: PlannedCell, reason: str, detail: str) -> None:
        log = last_lines(self.places.logs / f"{cell.hash}.log")
        fail(self.store, self.outcome, self.tell, cell, CellError(reason, detail), log=log)

    def _died(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        code = worker.process.returncode
        if worker.cell is None:
            return
        if not worker.ready and code > 0:
            log = last_lines(self.places.logs / f"worker-{worker.process.pid}.log")
            raise SuiteStopped(f"a worker cannot start (exit code {code}):\n{log or 'it printed nothing'}")
        if worker.overdue:
            reason, detail = "time", f"not finished within {self.options.cell.minutes:g} minutes, and stuck"
        elif code < 0:
            name = signal.Signals(-code).name
            reason = f"killed by {name}"
            detail = "by the system for want of memory, perhaps, or by hand" if name == "SIGKILL" else ""
        else:
            reason, detail = "died", f"its worker ended with exit code {code}"
        self._failed(worker.cell, reason, detail)

    def _kill_overdue(self) -> None:
        minutes = self.options.cell.minutes
        for worker in self.workers:
            late = minutes is not None and time.monotonic() - worker.began > 60 * minutes + GRACE_SECONDS
            if worker.cell is not None and late and not worker.overdue:
                worker.overdue = True
                worker.process.kill()

    def _end_workers(self) -> None:
        """Idle workers end by themselves; those with a cell (the driver is interrupted) are ended."""
        for worker in self.workers:
            worker.end()
            if worker.cell is not None:
                worker.process.terminate()
        until = time.monotonic() + _TERMINATE_SECONDS
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            if worker.cell is not None:
                self.store.clear_heartbeat(worker.cell.hash)


def last_lines(log: Path) -> str:
    """The end of a log, for the record of a failure: what was printed last says most."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _SHOWN_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    # of a progress bar, the last state only
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line][-_SHOWN_LINES:])
