"""``bitquake run`` and ``status`` as a user has them: processes that fail, are killed, are stopped, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquake.cli import main
from bitquake.suite.driver import CellOptions
from bitquake.suite.plan import plan_suite
from bitquake.suite.reader import load_suite
from bitquake.suite.run import _locked
from bitquake.suite.status import read_status
from bitquake.suite.store import StoreError, open_store
from bitquake.suite.worker import run_cell
from bitquake.suite_plan import CellManifest

MODEL = {"name": "block-idefics3", "pretrained": "bitquake/block-idefics3"}
LONG = {"tasks": [{"name": "block_vqav2_threshold", "limit": 400}]}
FULL, LAST, BROKEN = "block-idefics3/full-precision", "long/rtn-int3-g64", "broken/full-precision"


def _study(write_suite: Callable[..., Path], tmp_path: Path) -> Path:
    """Cells that finish, one whose checkpoint is empty, and one that takes long enough to be killed."""
    (tmp_path / "empty").mkdir(exist_ok=True)
    return write_suite(
        models=[
            MODEL,
            {"name": "broken", "pretrained": str(tmp_path / "empty")},
            {**MODEL, "name": "long", "quantizations": ["rtn-int3-g64"], "twin": MODEL["name"], **LONG},
        ],
        quantizations=["full-precision"],
        tasks=[{"name": "block_vqav2_clean", "limit": 16}, {"name": "block_vqav2_low_light_3", "limit": 16}],
    )


def _command(file: Path, out: Path, *more: str) -> list[str]:
    options = ["--world", "block", "--out", str(out), "--threads", "1", "--device", "cpu", "--noise-cache", "none"]
    return [sys.executable, "-m", "bitquake", "run", str(file), *options, *more]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(what: Callable[[], Any], seconds: float = 240.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_and_stopped_runs_go_on_and_lose_nothing(write_suite: Callable[..., Path], tmp_path: Path) -> None:
    file, out = _study(write_suite, tmp_path), tmp_path / "out"
    plan = plan_suite(load_suite(file, "block"))
    last = plan.cell(LAST)
    only = ["--exclude", "long/full-precision"]
    journal = out / "journal"

    # the driver is killed while the last cell answers: its worker must not stay behind
    log = (tmp_path / "log").open("w+")
    driver = subprocess.Popen(_command(file, out, *only), stdout=log, stderr=log)

    def answering() -> dict[str, Any] | None:
        beat = open_store(out).heartbeats().get(last.hash)
        written = sum(path.stat().st_size for path in journal.rglob("*.jsonl")) if journal.is_dir() else 0
        assert driver.poll() is None, log.seek(0) or log.read()
        return beat if beat and written > 80_000 else None

    beat = _until(answering)
    assert read_status(str(out)).running[0]["name"] == LAST and not read_status(str(out)).running[0]["stale"]
    driver.kill()
    driver.wait()
    _until(lambda: not _lives(beat["pid"]), 20)
    status = read_status(str(out))
    assert status.finished == [FULL] and [one["name"] for one in status.failed] == [BROKEN]
    assert [(one["name"], one["stale"]) for one in status.running] == [(LAST, True)]
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}

    # a worker is killed: recorded with its signal, the page is made of what is there; a second run is kept out
    driver = subprocess.Popen(
        _command(file, out, "--only", LAST), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    (worker,) = _until(lambda: _children(driver.pid))
    with pytest.raises(StoreError, match="another `bitquake run` is at work"), _locked(open_store(out), tmp_path):
        pass
    os.kill(worker, signal.SIGKILL)
    printed, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1, printed + errors
    assert "killed by SIGKILL" in errors and f"missing   {LAST}: killed by SIGKILL" in errors
    assert (out / "site" / "index.html").is_file() and printed.strip().endswith("index.html")
    failure = json.loads((out / "failures" / f"{last.hash}.json").read_text())
    assert (failure["reason"], failure["name"], failure["attempts"]) == ("killed by SIGKILL", LAST, 1)

    # SIGTERM, as Ctrl-C
    driver = subprocess.Popen(_command(file, out, "--only", LAST), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (worker,) = _until(lambda: _children(driver.pid))
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=60) == 130
    _until(lambda: not _lives(worker), 20)
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")} == before

    # the killed cell, continued, has the bytes of an undisturbed one
    options = CellOptions(device="cpu", noise_cache="")
    import torch

    torch.set_num_threads(1)
    run_cell(last, str(out), out / ".scratch", options=options)
    run_cell(last, str(tmp_path / "other"), tmp_path / "scratch", options=options)
    (ours,), (theirs,) = ((root / "cells" / last.hash).rglob("*_samples_*") for root in (out, tmp_path / "other"))
    assert ours.read_bytes() == theirs.read_bytes() and len(ours.read_bytes().splitlines()) == 400
    keys = [json.loads(line)["key"] for path in journal.rglob("*.jsonl") for line in path.open() if line.endswith("\n")]
    assert len(keys) == len(set(keys))
    assert not open_store(out).failures().keys() & {last.hash}


HOLDER = """\
import sys
from pathlib import Path
from bitquake.suite.run import _locked
from bitquake.suite.store import open_store
with _locked(open_store(sys.argv[1]), Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_no_two_runs_share_a_scratch_folder(tmp_path: Path) -> None:
    """Each would remove what the other has in work, and on a url nothing else keeps them apart."""
    url, scratch = "memory://bitquake-tests/out", tmp_path / "scratch"
    command = [sys.executable, "-c", HOLDER, url, str(scratch)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for out in (url, tmp_path / "out"):
            again = r"another `bitquake run` .*another --scratch"
            with pytest.raises(StoreError, match=again) as caught, _locked(open_store(out), scratch):
                pass
            assert str(caught.value).startswith(f"{scratch}: ")
        with _locked(open_store(url), tmp_path / "its own"):
            pass
        holder.communicate("")
    with _locked(open_store(url), scratch):
        pass


def test_what_keeps_workers_from_starting_stops_the_run(write_suite: Callable[..., Path], tmp_path: Path) -> None:
    package = tmp_path / "broken" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this installation is broken')")
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        _command(write_suite(), tmp_path / "out"), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1 and "a worker cannot start" in done.stderr
    assert "this installation is broken" in done.stderr and "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_what_is_finished_stays(write_suite: Callable[..., Path], tmp_path: Path) -> None:
    file, out = write_suite(limit=None), tmp_path / "out"
    command = " ".join(_command(file, out, "--no-report"))
    done = subprocess.run(["bash", "-c", f"ulimit -f 70; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "nothing more can be written" in done.stderr
    assert subprocess.run(_command(file, out), capture_output=True, check=False).returncode == 0
    assert len(read_status(str(out)).finished) == 2


@pytest.fixture
def options(evaluated: Any, tmp_path: Path) -> list[str]:
    """Of a run on a suite that is evaluated already: nothing is left to do."""
    return [str(evaluated.out.parent / "tiny.yaml"), "--world", "block", "--out", str(evaluated.out)]


def test_a_finished_suite_is_planned_shown_and_not_run_again(
    evaluated: Any, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (evaluated.out / "cells").rglob("*")}
    assert main(["run", *options]) == 0
    printed = capsys.readouterr().out
    assert "2 on 3 tasks: 2 finished, 0 to run" in printed
    assert printed.strip().endswith(str(evaluated.out / "site" / "index.html"))
    assert {path: path.stat().st_mtime_ns for path in (evaluated.out / "cells").rglob("*")} == before
    assert main(["status", str(evaluated.out)]) == 0
    assert capsys.readouterr().out == f"tiny (block world) in {evaluated.out}\n2 finished\n"
    assert main(["status", str(evaluated.out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finished"] == ["block-idefics3/full-precision", "block-idefics3/mine"] and told["waiting"] == []


def test_a_dry_run_prints_commands_and_runs_nothing(
    write_suite: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(write_suite()), "--world", "block", "--out", str(out), "--dry-run", "--limit", "5"]
    assert main([*arguments, "--only", "quantization=mine"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("python -m lmms_eval")]
    assert len(lines) == 1 and "--limit 5" in lines[0] and f"quant={out}/quants/" in lines[0]
    (spec,) = (out / "quants").iterdir()
    assert str(spec) in lines[0] and not (out / "cells").exists() and not (out / "suite.json").exists()
    assert "# block-idefics3/mine" in printed and "power" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "nothing*"], "--only 'nothing*': matches no cell"),
        (["--exclude", "bits=9"], "--exclude 'bits=9': matches no cell"),
        (["--jobs", "0"], "--jobs: give at least 1"),
        (["--threads", "0"], "--threads: give at least 1"),
        (["--ray", "local:x"], "--ray: expected auto"),
        (["--ray", "auto", "--jobs", "2"], "--jobs: is for this machine alone"),
        (["--limit", "0"], "--limit: give at least 1"),
    ],
)
def test_wrong_options_are_wrong_usage(
    options: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *options, *more]) == 2
    assert message in capsys.readouterr().err


def test_another_version_is_refused_before_anything_is_done(
    evaluated: Any, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    out = Path(shutil.copytree(evaluated.out, tmp_path / "out"))
    cell = out / "cells" / evaluated.plan.cells[0].hash / "cell.json"
    cell.write_text(json.dumps({**json.loads(cell.read_text()), "version": 99}))
    assert main(["run", *options[:-1], str(out)]) == 2
    told = capsys.readouterr().err
    assert "is of version 99" in told and "new --out" in told
    assert main(["status", str(out)]) == 2
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no suite.json" in capsys.readouterr().err


def test_damage_is_found_by_the_bytes(evaluated: Any, tmp_path: Path) -> None:
    import shutil

    from bitquake.suite.run import _finished

    out = Path(shutil.copytree(evaluated.out, tmp_path / "out"))
    first, second = evaluated.plan.cells
    (victim,) = (out / "cells" / first.hash).rglob("*_samples_block_scienceqa_clean.jsonl")
    victim.write_bytes(victim.read_bytes()[:-2])
    done, damaged = _finished(open_store(out), evaluated.plan)
    assert list(done) == [second.hash] and isinstance(done[second.hash], CellManifest)
    assert damaged[first.hash].endswith("was changed")
