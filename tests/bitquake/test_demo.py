"""The whole way on the shipped model: quantize, evaluate through lmms-eval, compare, board; and stop half-way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitquake import demo

LIMIT = 10


def _command(out: Path) -> list[str]:
    return [sys.executable, "-m", "bitquake", "demo", "--out", str(out), "--limit", str(LIMIT), "--jobs", "2"]


def _stamps(out: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/complete.json")}


def test_a_demo_killed_half_way_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = subprocess.Popen(
        _command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not _stamps(tmp_path) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = _stamps(tmp_path)
    assert 1 <= len(kept) < len(demo.QUANTS)

    done = subprocess.run(_command(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: stamp for name, stamp in _stamps(tmp_path).items() if name in kept} == kept

    index = Path(done.stdout.strip().splitlines()[-1])
    assert index == (tmp_path / "board" / "index.html").resolve() and index.is_file()
    assert (tmp_path / "site" / "index.html").is_file()
    board = json.loads((tmp_path / "board" / "board.json").read_text())
    (entry,) = board["boards"]
    assert {row["level"] for row in entry["submissions"]} == {"recomputed"} and board["n_refused"] == 0
    assert len(entry["submissions"]) == len(demo.QUANTS)
    report = json.loads((tmp_path / "site" / "report.json").read_text())
    assert json.dumps(report).count("rtn-int3-g64") > 0
    table = done.stdout
    assert all(name in table for name in ("BF16", "rtn-int8-g64", "rtn-int4-g64", "rtn-int3-g64"))


def test_the_fingerprint_changes_with_what_decides_a_run() -> None:
    assert demo._fingerprint("rtn-int8-g64", 10) != demo._fingerprint("rtn-int4-g64", 10)
    assert demo._fingerprint("rtn-int8-g64", 10) != demo._fingerprint("rtn-int8-g64", 11)


@pytest.mark.parametrize(("text", "share"), [(b"", 0.0), (b"Answering:  25%| 250/1000 [00:01<00:03, 9it/s]", 0.25)])
def test_progress_is_read_from_the_log(tmp_path: Path, text: bytes, share: float) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"Loading 3/3 [00:00]\r" * 300 + text if text else b"")
    assert demo._share_done(log) == share
