"""How far a suite is, for anybody who asks: finished, in work, failed, waiting. Reads the output folder alone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bitquake.suite.driver import run_order
from bitquake.suite.store import Damage, StoreError, open_store
from bitquake.suite_plan import CellManifest

STALE_SECONDS = 60.0
"""A cell in work says so every few seconds; one that has been silent for so long is in nobody's hands."""


@dataclass
class Status:
    """How far a suite is; lists of names in the order of the plan.

    Attributes:
        running: what each worker said last, ``stale`` for those that have fallen silent.
        failed: name, reason, detail, attempts and time.
    """

    suite: str
    world: str
    out: str
    finished: list[str] = field(default_factory=list)
    running: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[dict[str, str]] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


def read_status(out: str) -> Status:
    """How far the suite in an output folder is.

    Raises:
        StoreError: there is none, or it is of another version.
    """
    store = open_store(out)
    plan = store.plan()
    if plan is None:
        raise StoreError(f"{store.url}: holds no suite.json; give the folder or url that `bitquake run` writes (--out)")
    status = Status(plan.suite, plan.world, store.url)
    failures, beats = store.failures(), store.heartbeats()
    there = store.cells(cell.hash for cell in plan.cells)
    for cell in run_order(plan.cells):
        found = there.get(cell.hash)
        beat, failure = beats.get(cell.hash), failures.get(cell.hash)
        if isinstance(found, CellManifest):
            status.finished.append(cell.name)
        elif isinstance(found, Damage):
            status.damaged.append({"name": cell.name, "reason": found.reason})
        elif beat is not None:
            status.running.append({**beat, "name": cell.name, "stale": _is_stale(beat)})
        elif failure is not None:
            keys = ("reason", "detail", "attempts", "when")
            status.failed.append({"name": cell.name, **{key: failure[key] for key in keys if key in failure}})
        else:
            status.waiting.append(cell.name)
    return status


def show_status(out: str, *, as_json: bool = False) -> int:
    """Carry out ``bitquake status``; 0 when every cell is finished, else 1."""
    status = read_status(out)
    missing = status.running or status.failed or status.damaged or status.waiting
    if as_json:
        print(json.dumps(vars(status), indent=1))
        return 1 if missing else 0
    print(f"{status.suite} ({status.world} world) in {status.out}")
    counts = {
        "finished": len(status.finished),
        "in work": sum(not one["stale"] for one in status.running),
        "failed": len(status.failed),
        "damaged": len(status.damaged),
        "waiting": len(status.waiting) + sum(one["stale"] for one in status.running),
    }
    print(", ".join(f"{n} {what}" for what, n in counts.items() if n or what == "finished"))
    for one in status.running:
        told = (
            f"{one.get('done', 0):,} of {one.get('total') or '?'} samples, {one.get('host')} process {one.get('pid')}"
        )
        if one.get("doing"):
            told += f", {one['doing']}"
        if one["stale"]:
            told += f", silent since {one.get('beat')}: its worker is gone; `bitquake run` goes on with it"
        print(f"{'stale   ' if one['stale'] else 'in work '} {one['name']}: {told}")
    for one in status.failed:
        print(
            f"failed   {one['name']}: {reason_of(one)} "
            f"(tried {one.get('attempts', 1)} times, last {one.get('when', '?')})"
        )
    for one in status.damaged:
        print(f"damaged  {one['name']}: {one['reason']}; `bitquake run` runs it again")
    for name in status.waiting:
        print(f"waiting  {name}")
    return 1 if missing else 0


def _is_stale(beat: Mapping[str, Any]) -> bool:
    try:
        silent = datetime.now(timezone.utc) - datetime.fromisoformat(str(beat["beat"]))
    except (KeyError, ValueError):
        return True
    if silent.total_seconds() > STALE_SECONDS:
        return True
    return beat.get("host") == socket.gethostname() and not _lives(beat.get("pid"))


def _lives(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # Linux tells those that have ended and whom nobody has waited for
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    return True


def reason_of(failure: Mapping[str, Any]) -> str:
    """Why a cell failed, in a line."""
    reason, detail = str(failure.get("reason", "")), str(failure.get("detail", ""))
    return f"{reason}: {detail}" if reason and detail else reason or detail
