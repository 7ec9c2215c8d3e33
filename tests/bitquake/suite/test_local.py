"""Worker processes of this machine: which of them get cells, and which are ended. The processes are real, but light."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquake.suite import local
from bitquake.suite.driver import CellOptions, Event, RunOptions
from bitquake.suite.local import _Run
from bitquake.suite_plan import SuitePlan

MODEL = {"name": "m", "pretrained": "bitquake/block-idefics3"}
WORKER = """\
import json, pathlib, sys, time

def tell(**event):
    print(json.dumps(event), flush=True)

stop = pathlib.Path(sys.argv[1])
tell(event="ready")
for line in sys.stdin:
    cell = json.loads(line)["cell"]
    if cell["quantization"] == "full-precision":
        time.sleep(600)
    for i in range(2_000):  # talks without a pause, until the other one has been ended
        if stop.exists():
            break
        tell(event="progress", done=i, total=2_000)
        time.sleep(0.01)
    tell(event="finished", manifest={"bitquake": "0", "hash": cell["hash"], "name": cell["name"], "samples": {},
         "files": {}, "seconds": 1, "load_seconds": 1, "began": "2026-01-01T00:00:00+00:00"})
    if sys.argv[2] == "once":
        break
"""


@pytest.fixture
def made(plan: Callable[..., SuitePlan]) -> SuitePlan:
    return plan(models=[MODEL], quantizations=["rtn-int4-g64", "rtn-int3-g64"])


def _run(
    made: SuitePlan, tmp_path: Path, cells: list[str], tell: Callable[[Event], None], kind: str, **more: Any
) -> _Run:
    options = RunOptions(tmp_path / "scratch", cell=CellOptions(minutes=0.0), **more)
    run = _Run(made, [made.cell(f"m/{name}") for name in cells], str(tmp_path / "out"), options, tell)
    run.command = [sys.executable, "-c", WORKER, str(tmp_path / "stop"), kind]
    return run


def test_a_stuck_worker_is_ended_while_the_others_talk(
    made: SuitePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    told: list[tuple[str, str]] = []

    def tell(event: Event) -> None:
        name = next(cell.quantization for cell in made.cells if cell.hash == event.cell)
        told.append((event.kind, name))
        if told[-1] == ("started", "rtn-int4-g64"):
            run.workers[-1].began = float("inf")  # this one has time
        if told[-1] == ("failed", "full-precision"):
            (tmp_path / "stop").touch()

    run = _run(made, tmp_path, ["full-precision", "rtn-int4-g64"], tell, "always", jobs=2)
    outcome = run.run()
    ends = [one for one in told if one[0] in ("failed", "finished")]
    assert ends == [("failed", "full-precision"), ("finished", "rtn-int4-g64")]
    assert outcome.failed[made.cell("m/full-precision").hash].startswith("time: ")


def test_an_idle_worker_that_has_died_gets_no_cell(made: SuitePlan, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    run = _run(made, tmp_path, ["rtn-int4-g64", "rtn-int3-g64"], lambda event: None, "once")
    run._hand_out()
    (first,) = run.workers
    while first.cell is not None:
        worker, message = run.said.get(timeout=60)
        assert message is not None
        run._heard(worker, message)
    first.process.wait(60)  # it has ended, and nobody has read so yet
    outcome = run.run()
    assert outcome.finished.keys() == {made.cell(f"m/{name}").hash for name in ("rtn-int4-g64", "rtn-int3-g64")}
    assert not outcome.failed
