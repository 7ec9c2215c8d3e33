"""A suite killed with SIGKILL at seeded random moments, against the same suite undisturbed.

    python benchmarks/kill.py --json benchmarks/kill.json
    python benchmarks/kill.py --kills 3 --ways ray -- reliable_vqa --world block --only '*int4*'

What stands after ``--`` is a command line of ``bitquake run`` without ``--out``, ``--jobs`` and ``--ray``; by default a
small suite of the block world is written. It runs once undisturbed. Then, on this machine's processes (``--jobs 2``)
and on a Ray of its own (``--ray local:2``), workers and drivers are killed; after a driver's death the same command is
given again, at once, while what it left behind may still run. A run that ends before all kills are spent is judged and
another one begun. Judged is that every cell of the plan is there once, with its samples byte for byte as undisturbed
(no times are in them), that nothing half-written is left, and that the study's page says the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from machine import machine
from tabulate import tabulate

from bitquake.suite.store import CELLS, FAILURES, RUNNING
from bitquake.suite_plan import CELL_FILE, PLAN_FILE

WAYS = {"jobs": ("--jobs", "2"), "ray": ("--ray", "local:2")}
SUITE = """\
suite: kill
title: What is killed
page: selective
models:
  - {name: block-idefics3, pretrained: bitquake/block-idefics3}
quantizations: [full-precision, rtn-int8-g64, rtn-int4-g64, rtn-int3-g64, rtn-int2-g64, hqq-int4-g64]
tasks: [block_vqav2_threshold, block_vqav2_clean, block_vqav2_gaussian_noise_3, block_scienceqa_clean]
arguments: {batch_size: 16}
block: {limit: 300}
"""
WHOLE_RUN_S = 1200
"""After which a run counts as hanging."""


class Killed(NamedTuple):
    """A kill: of the driver or of a worker, after so many seconds of its command; cells: finished by then."""

    target: str
    after_s: float
    cells: int


class Planned(NamedTuple):
    """A kill to come; which: of the workers at a cell, as a number from 0 to 1."""

    target: str
    after_s: float
    which: float


@dataclass
class Disturbed:
    """A run under kills: those that fell, commands it took, their seconds, and for how long at most a process that was
    at a cell outlived its driver."""

    killed: list[Killed] = field(default_factory=list)
    commands: int = 0
    seconds: float = 0.0
    outlived_s: float = 0.0


class Judged(NamedTuple):
    """A run's folder against the undisturbed one: what is wrong with it; nothing: it is the same."""

    lost: list[str]
    doubled: list[str]
    different: list[str]
    left_over: list[str]

    @property
    def same(self) -> bool:
        return not any(self)


class Driver:
    """A ``bitquake run`` and every process below it."""

    def __init__(self, arguments: Sequence[str], out: Path, log: Path) -> None:
        self.out = out
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "bitquake", "run", *arguments, "--out", str(out)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.began = time.monotonic()
        self.seen: dict[int, psutil.Process] = {}

    @property
    def age(self) -> float:
        return time.monotonic() - self.began

    def below(self) -> list[psutil.Process]:
        """Processes that this one started, at any depth; remembered, so that those it leaves behind are known."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen |= {one.pid: one for one in found}
        return found

    def workers(self) -> list[psutil.Process]:
        """Those that are at a cell, by their heartbeats."""
        return [one for one in self.below() if one.pid in set(heartbeats(self.out))]

    def left_behind(self) -> list[psutil.Process]:
        """Processes of this driver that still run, once it is dead."""
        return [one for one in self.seen.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def end(self) -> None:
        """Kill whatever is left of it."""
        self.below()
        for one in [self.process, *self.left_behind()]:
            try:
                one.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        self.process.wait()


class Orphans:
    """Processes whose driver was killed, and how long they lived on."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._seconds: list[float] = [0.0]

    def watch(self, processes: Sequence[psutil.Process]) -> None:
        began = time.monotonic()

        def wait() -> None:
            psutil.wait_procs(processes, timeout=120)
            self._seconds.append(time.monotonic() - began)

        self._threads.append(threading.Thread(target=wait, daemon=True))
        self._threads[-1].start()

    def longest(self) -> float:
        for thread in self._threads:
            thread.join()
        return max(self._seconds)


def heartbeats(out: Path) -> Iterator[int]:
    """Process ids of the workers that say they are at a cell."""
    for file in (out / RUNNING).glob("*.json"):
        try:
            yield int(json.loads(file.read_bytes())["pid"])
        except (OSError, ValueError, KeyError):
            continue


def finished(out: Path) -> list[str]:
    """Hashes of the cells that are there."""
    return sorted(file.parent.name for file in (out / CELLS).glob(f"*/{CELL_FILE}"))


def samples(cell: Path) -> dict[str, list[str]]:
    """Task -> its lines in lmms-eval's sample log: answers, confidences and scores; no times are in them."""
    found: dict[str, list[str]] = {}
    for file in sorted(cell.rglob("*_samples_*.jsonl")):
        task = file.stem.split("_samples_")[1]
        found.setdefault(task, []).extend(file.read_text(encoding="utf-8").splitlines())
    return found


def report(out: Path) -> dict[str, Any]:
    """Every number and sentence of the study's page, without what a run takes: times, memory, hits of the cache, and
    the hashes of lmms-eval's files, whose names and results hold the time of day."""
    told: dict[str, Any] = json.loads((out / "site" / "study.json").read_bytes())
    del told["run"], told["inputs"]
    for cell in told["cells"]:
        cell.pop("seconds", None)
    return told


def judge(out: Path, reference: Path) -> Judged:
    """Compare a run's folder with that of the undisturbed run, cell by cell, sample by sample, page by page."""
    planned = {cell["hash"]: cell["name"] for cell in json.loads((reference / PLAN_FILE).read_bytes())["cells"]}
    lost, doubled, different = [], [], []
    for hashed, name in planned.items():
        if not (out / CELLS / hashed / CELL_FILE).is_file():
            lost.append(name)
            continue
        found = samples(out / CELLS / hashed)
        for task, lines in samples(reference / CELLS / hashed).items():
            got = found.pop(task, [])
            ids = [json.loads(line)["doc_id"] for line in got]
            if len(set(ids)) < len(ids):
                doubled.append(f"{name} {task}")
            elif len(got) < len(lines):
                lost.append(f"{name} {task}")
            elif got != lines:
                different.append(f"{name} {task}")
        different += [f"{name} {task}: was not asked for" for task in found]
    here, there = report(out), report(reference)
    different += [
        f"the page's {part}" for part in sorted(here.keys() | there.keys()) if here.get(part) != there.get(part)
    ]
    known = {CELL_FILE, "runs"}
    left_over = [f"cells/{one.name}" for one in (out / CELLS).iterdir() if one.name not in planned]
    left_over += [f"cells/{one.parent.name}/{one.name}" for one in (out / CELLS).glob("*/*") if one.name not in known]
    left_over += [f"{folder}/{one.name}" for folder in (FAILURES, RUNNING) for one in (out / folder).glob("*")]
    return Judged(lost, doubled, different, left_over)


def undisturbed(arguments: Sequence[str], out: Path, log: Path) -> float:
    """Run to the end on two processes; seconds."""
    driver = Driver([*arguments, *WAYS["jobs"]], out, log)
    try:
        code = driver.process.wait(timeout=WHOLE_RUN_S)
        seconds = driver.age
    finally:
        driver.end()
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with code {code}; see {log}:\n{tail(log)}")
    return seconds


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def planned_kills(n: int, seed: int, span: float) -> list[Planned]:
    """Whom to kill, how many seconds after the command's begin or the kill before, and which of the workers."""
    seeded = random.Random(seed)
    return [Planned(seeded.choice(["driver", "worker"]), seeded.uniform(0.0, span), seeded.random()) for _ in range(n)]


def disturbed(arguments: Sequence[str], out: Path, log: Path, kills: list[Planned]) -> Disturbed:
    """Run to the end under ``kills``, which are taken from the list as they fall; those not needed stay in it."""
    drivers: list[Driver] = []
    orphans = Orphans()
    told = Disturbed()
    try:
        while True:
            driver = Driver(arguments, out, log)
            drivers.append(driver)
            disturb(driver, kills, told, orphans)
            code = driver.process.wait(timeout=WHOLE_RUN_S)
            told.seconds += driver.age
            if code == 0:
                break
            # cells whose worker was killed too often are tried again by the next command
            if len(drivers) > len(told.killed) + 3:
                raise SystemExit(f"{' '.join(arguments)}: code {code} again and again; see {log}:\n{tail(log)}")
        told.commands = len(drivers)
        told.outlived_s = orphans.longest()
        return told
    finally:
        for driver in drivers:
            driver.end()


def disturb(driver: Driver, kills: list[Planned], told: Disturbed, orphans: Orphans) -> None:
    """Kill as planned until the driver is dead, has ended by itself, or no kill is left."""
    since = driver.began
    while kills:
        planned = kills[0]
        while time.monotonic() < since + planned.after_s or (planned.target == "worker" and not driver.workers()):
            driver.below()
            if driver.process.poll() is not None:
                return  # the kill is kept for the next command
            time.sleep(0.05)
        workers = driver.workers()
        if planned.target == "worker":
            if not workers:
                continue
            victim = workers[int(planned.which * len(workers))].pid
        else:
            victim = driver.process.pid
        os.kill(victim, signal.SIGKILL)
        kills.pop(0)
        told.killed.append(Killed(planned.target, round(driver.age, 1), len(finished(driver.out))))
        if planned.target == "driver":
            driver.process.wait()
            orphans.watch(workers)
            return
        since = time.monotonic()


def measure(arguments: Sequence[str], way: str, work: Path, reference: Path, kills: list[Planned]) -> dict[str, Any]:
    """Spend all kills on one way of running, in as many runs as that takes; every run is judged."""
    before, runs, seconds, longest, finished_by = len(kills), 0, 0.0, 0.0, []
    targets: dict[str, int] = {"driver": 0, "worker": 0}
    wrong: dict[str, list[str]] = {name: [] for name in Judged._fields}
    while kills:
        runs += 1
        out, log = work / f"{way}-{runs}", work / f"{way}-{runs}.log"
        shutil.rmtree(out, ignore_errors=True)
        told = disturbed([*arguments, *WAYS[way]], out, log, kills)
        seconds, longest = seconds + told.seconds, max(longest, told.outlived_s)
        for kill in told.killed:
            targets[kill.target] += 1
            finished_by.append(kill.cells)
        judged = judge(out, reference)
        for name, found in judged._asdict().items():
            wrong[name] += [f"run {runs}: {one}" for one in found]
        state = "the same" if judged.same else f"NOT the same: {judged}"
        fell = ", ".join(f"{one.target} at {one.after_s} s" for one in told.killed) or "none left"
        print(f"{way} run {runs}: {fell}; {told.commands} commands; {state}", file=sys.stderr, flush=True)
        if judged.same:
            shutil.rmtree(out)
    return {
        "way": " ".join(WAYS[way]),
        "kills": before,
        "of drivers": targets["driver"],
        "of workers": targets["worker"],
        "runs": runs,
        "with cells finished": sum(n > 0 for n in finished_by),
        **{name.replace("_", " "): len(found) for name, found in wrong.items()},
        "orphans s": round(longest, 1),
        "seconds": round(seconds),
        "wrong": {name: found for name, found in wrong.items() if found},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in each way of running (default 20)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--span", type=float, help="seconds that a kill waits at most (default: 0.4 of what the undisturbed run takes)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 kills, 100 samples of each task")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of each task at most")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the runs here")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures to FILE; those of other --ways stay in it"
    )
    parser.add_argument(
        "suite", nargs="*", help="arguments of `bitquake run` (default: a small suite of the block world)"
    )
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="kill-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    n, limit, arguments = options.kills, options.limit, options.suite
    if not arguments:
        (work / "kill.yaml").write_text(SUITE, encoding="utf-8")
        arguments = [str(work / "kill.yaml"), "--world", "block", "--device", "cpu", "--threads", "1"]
    if options.quick:
        n, limit = min(n, 5), limit or 100
    if limit:
        arguments = [*arguments, "--limit", str(limit)]
    reference = work / "undisturbed"
    whole = undisturbed(arguments, reference, work / "undisturbed.log")
    cells = finished(reference)
    n_samples = sum(len(lines) for cell in cells for lines in samples(reference / CELLS / cell).values())
    print(f"undisturbed: {len(cells)} cells, {n_samples:,} samples, {whole:.0f} s", file=sys.stderr, flush=True)
    span = options.span or 0.4 * whole
    rows = [
        {
            **measure(arguments, way, work, reference, planned_kills(n, options.seed + i, span)),
            "undisturbed s": round(whole),
        }
        for i, way in enumerate(WAYS)
        if way in options.ways
    ]
    where = machine("torch", "ray", "bitquake")
    print(tabulate([{key: value for key, value in row.items() if key != "wrong"} for row in rows], headers="keys"))
    about = {"cells": len(cells), "samples": n_samples, "seed": options.seed, "span s": round(span, 1)}
    print(
        "peer: the same suite undisturbed, --jobs 2; "
        + ", ".join(f"{key} {value}" for key, value in {**about, **where}.items())
    )
    if options.json:
        kept = json.loads(options.json.read_bytes())["rows"] if options.json.is_file() else []
        ways = {row["way"] for row in rows}
        rows = [*(row for row in kept if row["way"] not in ways), *rows]
        options.json.write_text(json.dumps({**about, "machine": where, "rows": rows}, indent=2) + "\n")
    if options.work is None and not any(row["wrong"] for row in rows):
        shutil.rmtree(work)
    sys.exit(1 if any(row["wrong"] for row in rows) else 0)


if __name__ == "__main__":
    main()
