"""Cells on ``--ray local:2`` against two plain processes, each pinned to a core, that do half of the same cells each.

    python benchmarks/ray_efficiency.py --json benchmarks/ray_efficiency.json

Both sides call ``bitquake.suite.worker.run_cell`` on one thread, with everything imported and one cell done before the
clock starts; then it runs until the last cell is there. The sides take turns, each in a fresh output folder; the ratio
is that of a turn, and medians over the turns are printed; the ratio by processor time counts every process of a side
and depends least on what else the machine does. What starting costs is measured apart, and what Ray and the
driver cost for each cell: from cells that are finished already, of which nothing but the handing over is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

SUITE = """\
suite: efficiency
title: What Ray costs
page: selective
models:
  - {name: block-idefics3, pretrained: bitquake/block-idefics3}
quantizations:
  [full-precision, rtn-int8-g64, rtn-int4-g64, rtn-int3-g64, rtn-int2-g64, uniform-int8, uniform-int4, uniform-int3]
tasks: [block_vqav2_clean, block_vqav2_threshold]
arguments: {batch_size: 16}
block: {limit: 300}
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WARM_UP_SAMPLES = 16


class Turn(NamedTuple):
    """One side's turn.

    Attributes:
        seconds: until its last cell was there. busy: inside ``run_cell``, of all cells together. cpu: processor time of
            every process of that side, Ray's own too.
        start_seconds: what had to happen once before: Ray, imports.
    """

    seconds: float
    busy: float
    cpu: float
    start_seconds: dict[str, float]


def plans(folder: Path, limit: int | None) -> tuple[Any, Any]:
    """The plan that is measured, and one of the same cells with few samples to warm up."""
    from bitquake.suite.plan import plan_suite
    from bitquake.suite.reader import load_suite

    loaded = load_suite(folder / "efficiency.yaml", "block")
    return plan_suite(loaded, limit=limit), plan_suite(loaded, limit=WARM_UP_SAMPLES)


def processor_seconds(root: psutil.Process, others: Collection[int] = ()) -> dict[int, float]:
    """Processor time so far of a process and of those below it, by their ids."""
    found = {}
    for one in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.pid not in others:
                found[one.pid] = sum(one.cpu_times()[:2])
    return found


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def settings(out: Path) -> Any:
    from bitquake.suite.driver import CellOptions, RunOptions

    return RunOptions(out / ".scratch", jobs=2, threads=1, cell=CellOptions(device="cpu", noise_cache=""))


def plain_process(folder: Path, limit: int | None, half: int) -> None:
    """One of the two processes: on its own core, a plain loop over its half, whenever it is told an output folder."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[half % len(cores)]})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.monotonic()
    from bitquake.suite.worker import prepare, run_cell

    prepare()
    started = time.monotonic() - began
    plan, warm_up = plans(folder, limit)

    def loop(cells: Sequence[Any], out: Path) -> float:
        return sum(run_cell(cell, str(out), out / ".scratch", options=settings(out).cell).seconds for cell in cells)

    loop(warm_up.cells[half : half + 1], folder / f"plain-warm-up-{half}")
    print(json.dumps({"start": started}), file=answers, flush=True)
    for line in sys.stdin:
        busy = loop(plan.cells[half::2], Path(line.strip()))
        print(json.dumps({"busy": busy, "end": time.time()}), file=answers, flush=True)


class Plain:
    """The two pinned processes, started once and told when it is their turn."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        script = [sys.executable, __file__, "--folder", str(folder), *(["--limit", str(limit)] if limit else [])]
        with (folder / "plain.log").open("wb") as log:
            self._both = [
                subprocess.Popen(
                    [*script, "--half", str(half)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**os.environ, **ENVIRONMENT},
                )
                for half in (0, 1)
            ]
        self._start = max(self._answer(one)["start"] for one in self._both)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("a plain process has died; see plain.log")
        told: dict[str, float] = json.loads(line)
        return told

    def turn(self, out: Path) -> Turn:
        both = [psutil.Process(one.pid) for one in self._both]
        before, began = [processor_seconds(one) for one in both], time.time()
        for one in self._both:
            assert one.stdin is not None
            print(out, file=one.stdin, flush=True)
        told = [self._answer(one) for one in self._both]
        seconds = max(one["end"] for one in told) - began
        cpu = sum(spent(then, processor_seconds(one)) for then, one in zip(before, both, strict=True))
        return Turn(seconds, sum(one["busy"] for one in told), cpu, {"imports": self._start})

    def pids(self) -> set[int]:
        return {one.pid for one in self._both}

    def end(self) -> None:
        for one in self._both:
            assert one.stdin is not None
            one.stdin.close()
            one.wait()


def ray_turn(folder: Path, limit: int | None, out: Path, others: set[int]) -> Turn:
    """A Ray of its own, two warm workers, then all cells; others: processes that are not of this side."""
    from bitquake.suite.ray_driver import _connected, _Run

    plan, warm_up = plans(folder, limit)
    began = time.monotonic()
    with _connected("local:2", 1) as cluster:
        up = time.monotonic()
        warm = out.with_name(f"{out.name}-warm-up")
        outcome = _Run(warm_up, warm_up.cells[:2], str(warm), settings(warm), _nothing, cluster).run()
        ready = time.monotonic()
        imports = ready - up - max(one.seconds for one in outcome.finished.values())
        run = _Run(plan, plan.cells, str(out), settings(out), _nothing, cluster)
        before = processor_seconds(psutil.Process(), others)
        outcome = run.run()
        seconds = time.monotonic() - ready
        cpu = spent(before, processor_seconds(psutil.Process(), others))
    if outcome.failed:
        raise SystemExit(f"cells failed on Ray: {outcome.failed}")
    busy = sum(one.seconds for one in outcome.finished.values())
    return Turn(seconds, busy, cpu, {"Ray": up - began, "workers": imports})


def _nothing(event: object) -> None:
    """Nobody is told."""


def handing_over(folder: Path, limit: int | None, done: Path, n: int) -> dict[str, float]:
    """What Ray, the driver and the output folder cost for a cell: of ``n`` that are finished, on warm workers."""
    from bitquake.suite.ray_driver import _connected, _Run
    from bitquake.suite_plan import CELL_FILE, CellManifest

    plan, warm_up = plans(folder, limit)
    first = plan.cells[0]
    out = folder / "finished"
    manifest = CellManifest.model_validate_json((done / "cells" / first.hash / CELL_FILE).read_bytes())
    cells = []
    for i in range(n):
        cell = first.model_copy(update={"hash": f"{i:032x}", "name": f"copy/{i}"})
        shutil.copytree(done / "cells" / first.hash, out / "cells" / cell.hash, copy_function=os.link)
        (out / "cells" / cell.hash / CELL_FILE).unlink()
        told = manifest.model_copy(update={"hash": cell.hash, "name": cell.name})
        (out / "cells" / cell.hash / CELL_FILE).write_text(told.model_dump_json())
        cells.append(cell)
    with _connected("local:2", 1) as cluster:
        warm = folder / "finished-warm-up"
        _Run(warm_up, warm_up.cells[:2], str(warm), settings(warm), _nothing, cluster).run()
        began = time.monotonic()
        outcome = _Run(plan, cells, str(out), settings(out), _nothing, cluster).run()
        seconds = time.monotonic() - began
        counts = cluster.ray.remote(num_cpus=0)(_Counter).remote()
        cluster.ray.get(counts.value.remote())
        began_events = time.monotonic()
        for _ in range(5 * n):
            counts.put.remote("0" * 32, 1)
        cluster.ray.get(counts.value.remote())
        events = 5 * n / (time.monotonic() - began_events)
    assert len(outcome.finished) == n
    return {"cells": n, "ms a cell": 1e3 * seconds / n, "events a second": events}


class _Counter:
    """An actor that takes what workers would say."""

    def __init__(self) -> None:
        self._n = 0

    def put(self, cell_hash: str, done: int) -> None:
        self._n += 1

    def value(self) -> int:
        return self._n


def written(out: Path, n: int) -> dict[str, int]:
    """Bytes for each cell, by folder."""
    return {
        name: sum(file.stat().st_size for file in (out / name).rglob("*") if file.is_file()) // n
        for name in ("cells", "journal", "artifacts", "logs")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="of each side (default 3)")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of each task at most")
    parser.add_argument("--finished", type=int, default=300, help="cells handed over for nothing (default 300)")
    parser.add_argument("--quick", action="store_true", help="one turn, 100 samples of each task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--half", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.half is not None:
        plain_process(options.folder, options.limit, options.half)
        return
    from machine import machine
    from tabulate import tabulate

    turns, limit = (1, options.limit or 100) if options.quick else (options.turns, options.limit)
    os.environ.update(ENVIRONMENT)
    folder = Path(tempfile.mkdtemp(prefix="efficiency-"))
    (folder / "efficiency.yaml").write_text(SUITE, encoding="utf-8")
    cells = plans(folder, limit)[0].cells
    n_samples = sum(sum(cell.n.values()) for cell in cells)
    found: list[tuple[Turn, Turn]] = []
    plain = Plain(folder, limit)
    try:
        for i in range(turns):
            pair = plain.turn(folder / f"plain-{i}"), ray_turn(folder, limit, folder / f"ray-{i}", plain.pids())
            found.append(pair)
            rates = [n_samples / turn.seconds for turn in pair]
            line = f"turn {i + 1}: plain {rates[0]:.1f}, Ray {rates[1]:.1f} samples a second"
            print(f"{line}, ratio {rates[1] / rates[0]:.3f}", file=sys.stderr, flush=True)
    finally:
        plain.end()

    def median(value: Any) -> float:
        return statistics.median(value(*pair) for pair in found)

    # as if no half were longer than the other
    balanced = median(lambda one, other: (one.busy / 2) / other.seconds)
    figures: dict[str, Any] = {
        "cells": len(cells),
        "samples": n_samples,
        "turns": turns,
        "plain samples/s": round(median(lambda one, other: n_samples / one.seconds), 1),
        "Ray samples/s": round(median(lambda one, other: n_samples / other.seconds), 1),
        "ratio": round(median(lambda one, other: one.seconds / other.seconds), 3),
        "ratios": [round(one.seconds / other.seconds, 3) for one, other in found],
        "ratio to equal halves": round(balanced, 3),
        "ratio by processor time": round(median(lambda one, other: one.cpu / other.cpu), 3),
        "plain ms a cell outside it": round(median(lambda one, _: 1e3 * (2 * one.seconds - one.busy) / len(cells))),
        "Ray ms a cell outside it": round(median(lambda _, other: 1e3 * (2 * other.seconds - other.busy) / len(cells))),
        "start: imports of a process s": round(median(lambda one, _: one.start_seconds["imports"]), 1),
        "start: Ray s": round(median(lambda _, other: other.start_seconds["Ray"]), 1),
        "start: workers on Ray s": round(median(lambda _, other: other.start_seconds["workers"]), 1),
    }
    done = folder / "ray-0"
    over = handing_over(folder, limit, done, 50 if options.quick else options.finished)
    figures["finished cells handed over"] = over["cells"]
    figures["ms a cell handed over"] = round(over["ms a cell"], 1)
    figures["events a second"] = round(over["events a second"])
    figures |= {f"bytes a cell: {name}": size for name, size in written(done, len(cells)).items()}
    where = machine("torch", "ray", "bitquake")
    print(tabulate([[key, value] for key, value in figures.items()], disable_numparse=True, tablefmt="plain"))
    print(
        "peer: two processes pinned to a core each, a plain loop over half of the cells, one thread; "
        + ", ".join(f"{key} {value}" for key, value in where.items())
    )
    if options.json:
        told = {"peer": "two plain pinned processes", "machine": where, "load": os.getloadavg()[0], "figures": figures}
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
