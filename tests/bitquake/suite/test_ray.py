"""Cells on a Ray of this machine against the same cells in turn; dying workers; addresses that are no use."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from bitquake.cli import main
from bitquake.suite import ray_driver
from bitquake.suite.driver import CellOptions, Event, Outcome, RunOptions
from bitquake.suite.local import run_locally
from bitquake.suite.plan import plan_suite
from bitquake.suite.ray_driver import TRIES, run_on_ray
from bitquake.suite.reader import load_suite
from bitquake.suite_plan import PlannedCell, SuitePlan

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DOOMED = "block/rtn-int2-g64"
SUITE = """\
suite: tiny
title: Tiny
page: selective
models:
  - {{name: block, pretrained: bitquake/block-idefics3}}
  - {{name: broken, pretrained: {broken}, quantizations: [full-precision]}}
quantizations: [full-precision, rtn-int4-g64, rtn-int3-g64, rtn-int2-g64]
tasks: [block_vqav2_clean, block_scienceqa_clean]
arguments: {{batch_size: 8}}
block: {{limit: 24}}
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of four cells that can be run, and one whose checkpoint is none."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "idefics3"}')
    (folder / "tiny.yaml").write_text(SUITE.format(broken=folder / "broken"))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def plan(suite: Path) -> SuitePlan:
    return plan_suite(load_suite(suite, "block"))


@pytest.fixture(scope="module")
def kill() -> Iterator[ModuleType]:
    """The benchmark ``kill.py``, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("kill_benchmark", BENCHMARKS / "kill.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def options(scratch: Path, **cell: float) -> RunOptions:
    # whatever decides rounding is the same in all runs: one thread each
    return RunOptions(scratch, threads=1, cell=CellOptions(device="cpu", noise_cache="", **cell))


@pytest.fixture(scope="module")
def serial(plan: SuitePlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one worker that ran the cells in turn."""
    out = tmp_path_factory.mktemp("serial")
    cells = [cell for cell in plan.cells if cell.model == "block" and cell.name != DOOMED]
    outcome = run_locally(plan, cells, str(out), options(out / ".scratch"), lambda event: None)
    assert len(outcome.finished) == 3
    return out


class OnRay(NamedTuple):
    out: Path
    outcome: Outcome
    events: list[Event]


@pytest.fixture(scope="module")
def on_ray(plan: SuitePlan, tmp_path_factory: pytest.TempPathFactory) -> OnRay:
    """All five cells on two workers; one is killed at a random moment, those of ``DOOMED`` whenever they begin."""
    out = tmp_path_factory.mktemp("ray")
    doomed = next(cell.hash for cell in plan.cells if cell.name == DOOMED)
    events: list[Event] = []
    wait = random.Random(6).randrange(1, 3)

    def tell(event: Event) -> None:
        nonlocal wait
        events.append(event)
        pid = int(event.worker.rpartition(":")[2] or 0)
        if event.kind == "started" and event.cell == doomed:
            os.kill(pid, signal.SIGKILL)
        elif event.kind == "progress":
            wait -= 1
            if wait == 0:
                os.kill(pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_driver, "_POLL_SECONDS", 0.1)
        patch.setattr(ray_driver, "_PROGRESS_SECONDS", 0.0)
        # a url, as of a bucket: files are put there one by one
        outcome = run_on_ray(plan, plan.cells, f"local://{out}", options(out / ".scratch"), tell, address="local:2")
    return OnRay(out, outcome, events)


def named(plan: SuitePlan, name: str) -> PlannedCell:
    return next(cell for cell in plan.cells if cell.name == name)


def test_the_answers_are_those_of_a_serial_run_bit_for_bit(
    plan: SuitePlan, serial: Path, on_ray: OnRay, kill: ModuleType
) -> None:
    folders = sorted((serial / "cells").iterdir())
    assert len(folders) == 3
    assert {folder.name for folder in folders} == set(on_ray.outcome.finished)
    for folder in folders:
        lines = kill.samples(folder)
        assert {task: len(found) for task, found in lines.items()} == dict.fromkeys(plan.cells[0].tasks, 24)
        assert kill.samples(on_ray.out / "cells" / folder.name) == lines


def test_manifests_differ_in_times_places_and_file_names_alone(serial: Path, on_ray: OnRay) -> None:
    measured = {"seconds", "load_seconds", "task_seconds", "peak_memory_bytes", "began", "files"}
    for cell_hash, manifest in on_ray.outcome.finished.items():
        one = json.loads((serial / "cells" / cell_hash / "cell.json").read_bytes())
        other = json.loads((on_ray.out / "cells" / cell_hash / "cell.json").read_bytes())
        assert other == manifest.model_dump(mode="json")
        assert {key for key in one if one[key] != other[key]} <= measured


def test_a_cell_whose_worker_was_killed_is_run_again(on_ray: OnRay) -> None:
    starts: dict[str, list[str]] = {cell_hash: [] for cell_hash in on_ray.outcome.finished}
    for event in on_ray.events:
        if event.kind == "started" and event.cell in starts:
            starts[event.cell].append(event.detail)
    (twice,) = (details for details in starts.values() if len(details) > 1)
    assert twice == ["", f"try 2 of {TRIES}: its worker died"]


def test_a_cell_that_kills_every_worker_fails_after_some_tries(plan: SuitePlan, on_ray: OnRay) -> None:
    cell = named(plan, DOOMED)
    assert sum(event.kind == "started" and event.cell == cell.hash for event in on_ray.events) == TRIES
    failure = json.loads((on_ray.out / "failures" / f"{cell.hash}.json").read_bytes())
    assert failure["reason"] == "worker died"
    assert f"died {TRIES} times" in failure["detail"]


def test_a_failing_cell_costs_no_other_and_says_why(plan: SuitePlan, on_ray: OnRay) -> None:
    cell = named(plan, "broken/full-precision")
    assert set(on_ray.outcome.failed) == {cell.hash, named(plan, DOOMED).hash}
    failure = json.loads((on_ray.out / "failures" / f"{cell.hash}.json").read_bytes())
    assert failure["reason"] == "error"
    assert "broken" in failure["detail"]
    assert "Traceback" in failure["log"] or "Error" in failure["log"]


def test_every_cell_starts_before_it_ends_and_ends_once(plan: SuitePlan, on_ray: OnRay) -> None:
    for cell in plan.cells:
        kinds = [event.kind for event in on_ray.events if event.cell == cell.hash]
        assert kinds[0] == "started"
        assert [kind for kind in kinds if kind in ("finished", "failed")] == kinds[-1:]
    assert not list((on_ray.out / "running").glob("*"))


@pytest.mark.parametrize("damage", ["none", "lost sample", "doubled sample", "other answer", "lost cell", "left over"])
def test_the_kill_benchmark_notices(
    serial: Path, plan: SuitePlan, kill: ModuleType, tmp_path: Path, damage: str
) -> None:
    reference, out = tmp_path / "reference", tmp_path / "out"
    shutil.copytree(serial / "cells", reference / "cells")
    cells = [cell for cell in plan.cells if (serial / "cells" / cell.hash).is_dir()]
    (reference / "suite.json").write_text(plan.model_copy(update={"cells": tuple(cells)}).model_dump_json())
    (reference / "site").mkdir()
    (reference / "site" / "study.json").write_text(json.dumps({"run": [], "inputs": {}, "cells": [], "findings": []}))
    shutil.copytree(reference, out)
    folder = out / "cells" / cells[0].hash
    file = next(folder.rglob("*_samples_block_vqav2_clean.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    if damage == "lost sample":
        file.write_text("".join(lines[:-1]))
    elif damage == "doubled sample":
        file.write_text("".join([*lines[:-1], lines[0]]))
    elif damage == "other answer":
        changed = {**json.loads(lines[0]), "filtered_resps": "no"}
        file.write_text("".join([json.dumps(changed) + "\n", *lines[1:]]))
    elif damage == "lost cell":
        (folder / "cell.json").unlink()
    elif damage == "left over":
        (out / "running").mkdir()
        (out / "running" / "x.json").write_text("{}")
    judged = kill.judge(out, reference)
    expected = {"lost sample": "lost", "lost cell": "lost", "doubled sample": "doubled", "other answer": "different"}
    wrong = {name for name, found in judged._asdict().items() if found}
    assert wrong == ({expected.get(damage, "left_over")} if damage != "none" else set())


def test_a_cell_that_hangs_is_ended(plan: SuitePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over while torch is imported, so that nothing in the worker can notice."""
    monkeypatch.setattr(ray_driver, "GRACE_SECONDS", 0.5)
    events: list[Event] = []
    cell = named(plan, "block/full-precision")
    settings = options(tmp_path / ".scratch", minutes=0.001)
    outcome = run_on_ray(plan, [cell], str(tmp_path), settings, events.append, address="local:1")
    assert outcome.failed[cell.hash].startswith("time")
    assert [event.kind for event in events] == ["started", "failed"]


def test_a_cell_that_no_machine_can_hold_fails_at_once(
    plan: SuitePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"block": ray_driver._Need(1.0, 1000.0, 0)}
    monkeypatch.setattr(ray_driver, "_needs", lambda *given: needs)
    cell = named(plan, "block/full-precision")
    outcome = run_on_ray(plan, [cell], str(tmp_path), options(tmp_path), lambda event: None, address="local:1")
    assert outcome.failed[cell.hash].startswith("no machine: it needs 1 cores, 1000 GPUs")


class Machines(NamedTuple):
    """A cluster, as far as needs are concerned."""

    found: list[dict[str, float]]
    cells: int = 0
    threads: int | None = None

    def machines(self) -> list[dict[str, float]]:
        return self.found


def test_needs_follow_the_estimate_and_the_machines(plan: SuitePlan) -> None:
    large = plan.cells[0].model_copy(update={"model": "large", "pretrained": "some/70b", "parameters": 7e10})
    spread = large.model_copy(update={"model": "spread", "arguments": {"device_map": "auto"}})
    cells = [plan.cells[0], large, spread]
    node = {"CPU": 96.0, "GPU": 8.0, "memory": 1e12}
    found = ray_driver._needs(plan, cells, Machines([node, {"CPU": 16.0, "memory": 3e12}]), CellOptions())
    assert {name: need.gpus for name, need in found.items()} == {"block": 1.0, "large": 1.0, "spread": 3.0}
    assert {need.cores for need in found.values()} == {8.0}  # of 12 for each GPU, no more than 8
    assert found["large"].memory == found["spread"].memory
    assert found["large"].memory == pytest.approx(2 * 7e10, rel=0.02)
    assert found["block"].memory < 2e9
    # a machine with less memory than the estimate is not refused: the cell gets all of it
    small = ray_driver._needs(plan, [large], Machines([{"CPU": 4.0, "memory": 6e10}]), CellOptions())
    assert small["large"] == ray_driver._Need(1.0, 0.0, int(6e10))
    # on this machine alone, what there is is shared by as many cells as were asked for
    shared = ray_driver._needs(plan, [large], Machines([node], cells=3, threads=5), CellOptions())["large"]
    assert (shared.cores, shared.gpus) == (5.0, 1.0)
    thirds = ray_driver._needs(plan, [large], Machines([{**node, "GPU": 1.0}], cells=3, threads=5), CellOptions())
    assert 3 * thirds["large"].gpus <= 1.0
    assert thirds["large"].gpus == pytest.approx(1 / 3, abs=1e-3)
    on_cores = ray_driver._needs(plan, [large], Machines([node]), CellOptions(device="cpu"))["large"]
    assert (on_cores.cores, on_cores.gpus) == (1.0, 0.0)


def run_on(address: str, suite: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = main(["run", str(suite), "--world", "block", "--ray", address, "--out", str(out)])
    return code, capsys.readouterr().err.splitlines()


def test_an_address_where_nothing_listens_is_one_clear_error(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code, told = run_on(address, suite, tmp_path, capsys)
    assert code == 2
    assert len(told) == 1
    assert told[0].startswith(f"bitquake run: --ray {address}: nothing answers there")


def test_something_that_is_no_ray_is_one_clear_error(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_driver, "REACH_SECONDS", 4.0)
    with socket.create_server(("0.0.0.0", 0)) as server:

        def accept() -> None:
            silent = []
            while True:
                try:
                    silent.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, told = run_on(address, suite, tmp_path, capsys)
    assert code == 2
    assert len(told) == 1
    assert "no answer of a Ray cluster within 4 s" in told[0]


@pytest.mark.parametrize("address", ["garbage", "ray://head:10001", "head:99999", "local:0", "local:"])
def test_an_address_that_cannot_be_one_is_refused(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    code, told = run_on(address, suite, tmp_path, capsys)
    assert code == 2
    assert len(told) == 1
    assert "--ray" in told[0]
    assert "auto" in told[0]


def test_no_cluster_on_this_machine_is_one_clear_error(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray notes a cluster of this machine
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, told = run_on("auto", suite, tmp_path / "out", capsys)
    assert code == 2
    assert len(told) == 1
    assert "Could not find any running Ray instance" in told[0]
    assert "ray start --head" in told[0]


def test_a_gpu_of_ones_own_choice_is_refused(plan: SuitePlan, tmp_path: Path) -> None:
    settings = RunOptions(tmp_path, cell=CellOptions(device="cuda:1"))
    with pytest.raises(ray_driver.RayUnavailable, match="say --device cuda"):
        run_on_ray(plan, plan.cells, str(tmp_path), settings, lambda event: None, address="local:1")


@pytest.mark.slow
def test_kills_of_workers_and_driver_lose_and_double_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "kill.py"), "--kills", "3", "--ways", "ray", "--limit", "60"]
    figures = tmp_path / "kill.json"
    done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(figures.read_bytes())["rows"]
    assert row["kills"] == row["of drivers"] + row["of workers"] == 3
    assert {row[name] for name in ("lost", "doubled", "different", "left over")} == {0}


@pytest.mark.slow
def test_a_cluster_is_joined_with_its_token(suite: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    sessions = tempfile.mkdtemp(prefix="ray")  # not pytest's: the paths of sockets must be short
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": sessions, "HOME": str(home)}
    environment.pop("RAY_AUTH_MODE", None)
    ray = Path(sys.executable).with_name("ray")
    start = [str(ray), "start", "--head", "--block", "--port", str(port), "--num-cpus", "1"]
    with_token = {**environment, "RAY_AUTH_MODE": "token"}
    head = subprocess.Popen([*start, "--include-dashboard=false"], env=with_token, stdout=subprocess.DEVNULL)
    try:
        run = [sys.executable, "-m", "bitquake", "run", str(suite), "--world", "block", "--device", "cpu"]
        run += ["--only", "block/full-precision", "--no-report", "--out", str(tmp_path / "out")]
        run += ["--ray", f"127.0.0.1:{port}"]
        for _ in range(20):  # until the head is up
            refused = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
            assert refused.returncode == 2, refused.stderr
            if "nothing answers there" not in refused.stderr:
                break
        assert "the cluster wants its token" in refused.stderr
        told = subprocess.run(run, env=with_token, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        assert "1 of 5 cells are finished" in told.stdout
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(sessions, ignore_errors=True)
