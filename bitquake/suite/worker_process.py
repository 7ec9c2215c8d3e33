"""A worker of this machine: one process that runs cell after cell, as the driver hands them to it.

    python -m bitquake.suite.worker_process OUT SCRATCH LOGS

It reads a line of JSON for each cell from its standard input, and writes lines of events to what was its standard
output; everything that models and lmms-eval print goes to a log of the cell. When the input ends, the driver is gone:
the worker ends at once, for what was answered is in the journal.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

_DRIVER_IS_GONE = 3
_PROGRESS_SECONDS = 0.3


def main(out: str, scratch: Path, logs: Path) -> NoReturn:
    """Run the cells that come until the input ends, which ends the process."""
    told = os.fdopen(os.dup(1), "wb", buffering=0)
    logs.mkdir(parents=True, exist_ok=True)
    print_to(logs / f"worker-{os.getpid()}.log")
    asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()

    from bitquake.suite.driver import CellError, CellOptions
    from bitquake.suite.worker import prepare, run_cell
    from bitquake.suite_plan import PlannedCell

    prepare()
    _tell(told, {"event": "ready"})
    while True:
        request = asked.get()
        cell, options = PlannedCell.model_validate(request["cell"]), CellOptions(**request["options"])
        print_to(logs / f"{cell.hash}.log")
        last = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            if done in (0, total) or time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                _tell(told, {"event": "progress", "done": done, "total": total})

        try:
            manifest = run_cell(cell, out, scratch, progress, options)
            answer = {"event": "finished", "manifest": manifest.model_dump(mode="json")}
        except CellError as error:
            answer = {"event": "failed", "reason": error.reason, "detail": error.detail}
        _tell(told, answer)


def _listen(asked: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        asked.put(json.loads(line))
    os._exit(_DRIVER_IS_GONE)


def _tell(told: BinaryIO, message: dict[str, Any]) -> None:
    try:
        told.write(json.dumps(message).encode() + b"\n")
    except OSError:  # nobody listens any more
        os._exit(_DRIVER_IS_GONE)


def print_to(log: Path) -> None:
    """Let whatever is printed in this process, by libraries too, go to a file of its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    except OSError:
        number = os.open(os.devnull, os.O_WRONLY)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # the thread that listens may hold the standard input, for which an ordinary exit would wait
