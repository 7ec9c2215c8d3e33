"""Time of clustered bootstrap intervals, beside the plain NumPy loop that they replace.

The loop is what an evaluation script does without this package: draw images, gather their samples, sort them and
compute each metric, once for every replicate. Both give the same eight metrics of the same samples, which is checked
before anything is timed; the loop runs a twentieth of the replicates and is scaled up, since its replicates are
independent. All run on one thread, in turns, and the table shows the median of the rounds: processor time, which is the
wall time on a core of one's own, and the wall time that this machine took beside its other work.

    python benchmarks/bootstrap.py [--samples N] [--replicates R] [--rounds K] [--json FILE]
"""

from __future__ import annotations

import os
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before NumPy loads its linear algebra

import argparse  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
import scipy  # noqa: E402
from tabulate import tabulate  # noqa: E402

from bitquake.metrics import METRICS, Samples, compare, evaluate  # noqa: E402

KEYS = ["accuracy", "ece_15", "ece_mass_15", "brier", "auroc", "aurc", "coverage_at_risk_1", "coverage_at_risk_5"]
SEED = 0
LOOP = "plain NumPy loop, 8 metrics"


def make_samples(n: int, prefix: str = "image", seed: int = 1) -> Samples:
    """n answers to about 2.5 questions per image, with soft scores and confidences without ties."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(4, 1, n)
    score = (rng.random(n) < confidence) * rng.choice([0.3, 0.6, 0.9, 1.0], n, p=[0.05, 0.1, 0.15, 0.7])
    return Samples(score, confidence, np.array([f"{prefix}-{i:06d}" for i in rng.integers(0, max(1, n * 2 // 5), n)]))


def plain_metrics(score: np.ndarray, confidence: np.ndarray) -> list[float]:
    """The eight metrics of one replicate in vectorised NumPy, without weights or shared work between replicates."""
    n = score.size
    order = np.argsort(-confidence, kind="stable")
    a, c = score[order], confidence[order]
    gap = a - c
    edges = np.arange(1, 15) / 15
    ece = np.abs(np.bincount(np.searchsorted(edges, c), gap, 15)).sum() / n
    last = np.flatnonzero(np.append(c[1:] != c[:-1], True))
    first = np.append(0, last[:-1] + 1)
    middle = (first + last + 1) / 2
    mass = np.abs(np.bincount((15 * middle / n).astype(int), np.add.reduceat(gap, first), 15)).sum() / n
    right = np.add.reduceat((a >= 0.5).astype(float), first)
    size = last + 1 - first
    above = np.cumsum(right)
    auroc = ((size - right) * (above - right / 2)).sum() / (above[-1] * (n - above[-1]))
    risk = np.cumsum(1 - a)[last]
    covered = last + 1.0
    own = np.diff(risk) / size[1:]
    aurc = (risk[-1] + ((risk[:-1] - covered[:-1] * own) * np.diff(np.log(covered))).sum()) / n
    coverage = [covered[(risk <= (r + 1e-9) * covered)].max(initial=0) / n for r in (0.01, 0.05)]
    return [a.mean(), ece, mass, (gap**2).mean(), auroc, aurc, *coverage]


def plain_loop(samples: Samples, replicates: int) -> np.ndarray:
    """(replicates, 8): the obvious cluster bootstrap."""
    rng = np.random.default_rng(SEED)
    score, confidence = np.asarray(samples.score), np.asarray(samples.confidence)
    _, codes, sizes = np.unique(np.asarray(samples.cluster), return_inverse=True, return_counts=True)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
    out = np.empty((replicates, len(KEYS)))
    for r in range(replicates):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        out[r] = plain_metrics(score[rows], confidence[rows])
    return out


def check_agreement(samples: Samples) -> None:
    """Stops unless both ways give the same values, and intervals of like width (calibration errors aside)."""
    ours = evaluate(*samples, metrics=KEYS, replicates=400, seed=SEED)
    expected = plain_metrics(np.asarray(samples.score), np.asarray(samples.confidence))
    draws = plain_loop(samples, 400)
    for index, key in enumerate(KEYS):
        if not np.isclose(ours[key].value, expected[index], atol=1e-9):
            raise SystemExit(f"{key}: {ours[key].value} here, {expected[index]} in the plain loop")
        spread = np.subtract(*np.quantile(draws[:, index], [0.975, 0.025]))
        if not METRICS[key].noise_layers and not 0.75 < (ours[key].hi - ours[key].lo) / spread < 1.33:
            raise SystemExit(f"{key}: interval of width {ours[key].hi - ours[key].lo} here, {spread} in the plain loop")


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Processor and wall seconds of a call."""
    processor_start, wall_start = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - processor_start, time.perf_counter() - wall_start


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--replicates", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, of which the median counts")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    samples, fitting = make_samples(options.samples), make_samples(options.samples, "threshold", 2)
    candidate = samples._replace(confidence=np.sqrt(np.asarray(samples.confidence)))
    check_agreement(samples)
    shared = {"replicates": options.replicates, "seed": SEED}
    loop_replicates = max(1, options.replicates // 20)
    scale = options.replicates / loop_replicates
    tasks: dict[str, Callable[[], object]] = {
        "bitquake, 8 metrics": lambda: evaluate(*samples, metrics=KEYS, **shared),
        f"bitquake, all {len(METRICS)} metrics, with threshold split": lambda: evaluate(
            *samples, threshold=fitting, **shared
        ),
        "bitquake, 8 metrics, difference of two runs": lambda: compare(candidate, samples, metrics=KEYS, **shared),
        LOOP: lambda: plain_loop(samples, loop_replicates),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(options.rounds):
        for name, task in tasks.items():
            rounds[name].append(seconds(task))
    median = {name: np.median(values, axis=0) * (scale if name == LOOP else 1) for name, values in rounds.items()}
    ratio = {name: float(median[LOOP][0] / median[name][0]) for name in tasks}
    machine = {
        "processor": processor(),
        "threads": 1,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    print(
        f"{options.replicates:,} replicates of {options.samples:,} samples; "
        + ", ".join(f"{key} {value}" for key, value in machine.items())
    )
    rows = [[name, *median[name], ratio[name]] for name in tasks]
    print(tabulate(rows, headers=["", "processor s", "wall s", "times as fast as the loop"], floatfmt=".2f"))
    if options.json:
        figures = {
            "samples": options.samples,
            "replicates": options.replicates,
            "rounds": options.rounds,
            "plain_loop_replicates_timed": loop_replicates,
            "machine": machine,
            "results": {
                name: {
                    "processor_seconds": round(float(median[name][0]), 3),
                    "wall_seconds": round(float(median[name][1]), 3),
                    "times_as_fast_as_the_loop": round(ratio[name], 2),
                }
                for name in tasks
            },
        }
        part = options.json.with_name(options.json.name + ".part")
        part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        part.replace(options.json)


if __name__ == "__main__":
    main()
