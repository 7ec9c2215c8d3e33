"""Time of clustered bootstrap intervals, each beside the plain NumPy loop that it replaces.

The loops are what an evaluation script does without this package: draw images, gather their samples, sort them and
compute each figure, once for every replicate. Both give the same figures of the same samples, with intervals of like
width, which is checked before anything is timed; a loop runs a twentieth of the replicates and is scaled up, since its
replicates are independent. All run on one thread, in turns, and the table shows the median of the rounds: processor
time, which is the wall time on a core of one's own, and the wall time that this machine took beside its other work.

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
from collections.abc import Callable, Sequence  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import numpy as np  # noqa: E402
import scipy  # noqa: E402
from tabulate import tabulate  # noqa: E402

from bitquake.metrics import (  # noqa: E402
    METRICS,
    MIXTURE_METRICS,
    SHARES,
    OrderedSamples,
    Run,
    Samples,
    compare,
    evaluate,
    flips,
    mixture_curve,
    replicate_jointly,
    transfer,
)

KEYS = ["accuracy", "ece_15", "ece_mass_15", "brier", "auroc", "aurc", "coverage_at_risk_1", "coverage_at_risk_5"]
SEED = 0
NAMES = (("image", 1), ("threshold", 2), ("shifted", 3))
CHECKED = 400  # replicates of which the intervals are compared
LOOP = "plain loop, "
RISK = 0.2


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


class Images:
    """The samples of each image, to be drawn."""

    def __init__(self, samples: Samples) -> None:
        self.score, self.confidence = np.asarray(samples.score), np.asarray(samples.confidence)
        self.names, codes, sizes = np.unique(np.asarray(samples.cluster), return_inverse=True, return_counts=True)
        self.members = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Samples of as many images as there are, drawn with replacement."""
        chosen = rng.integers(0, len(self.members), len(self.members))
        return np.concatenate([self.members[i] for i in chosen])


def plain_loop(samples: Samples, replicates: int) -> np.ndarray:
    """(replicates, 8): the obvious cluster bootstrap."""
    rng, images = np.random.default_rng(SEED), Images(samples)
    out = np.empty((replicates, len(KEYS)))
    for r in range(replicates):
        rows = images.draw(rng)
        out[r] = plain_metrics(images.score[rows], images.confidence[rows])
    return out


def plain_joint_loop(conditions: list[list[Samples]], replicates: int) -> np.ndarray:
    """(replicates, runs of all conditions, 8) on shared images, of which the first condition holds all."""
    rng = np.random.default_rng(SEED)
    all_images = Images(conditions[0][0])
    parts = [(Images(run), np.isin(all_images.names, run.cluster)) for runs in conditions for run in runs]
    out = np.empty((replicates, len(parts), len(KEYS)))
    for r in range(replicates):
        chosen = rng.integers(0, len(all_images.members), len(all_images.members))
        for k, (images, held) in enumerate(parts):
            place = np.cumsum(held) - 1
            rows = np.concatenate([images.members[place[i]] for i in chosen if held[i]])
            out[r, k] = plain_metrics(images.score[rows], images.confidence[rows])
    return out


def plain_threshold(score: np.ndarray, confidence: np.ndarray) -> float:
    """The threshold of the largest coverage at the tolerated risk, ties kept whole."""
    order = np.argsort(-confidence, kind="stable")
    c = confidence[order]
    last = np.flatnonzero(np.append(c[1:] != c[:-1], True))
    reached = last[np.cumsum(1 - score[order])[last] <= (RISK + 1e-9) * (last + 1)]
    return float(c[reached[-1]]) if reached.size else np.inf


def plain_transfer_loop(fitting: Samples, samples: Samples, replicates: int) -> np.ndarray:
    """(replicates, 2): coverage and risk taken, the threshold refitted in each replicate."""
    rng, fit, test = np.random.default_rng(SEED), Images(fitting), Images(samples)
    out = np.empty((replicates, 2))
    for r in range(replicates):
        rows = fit.draw(rng)
        threshold = plain_threshold(fit.score[rows], fit.confidence[rows])
        rows = test.draw(rng)
        answered = rows[test.confidence[rows] >= threshold]
        out[r] = answered.size / rows.size, np.mean(1 - test.score[answered]) if answered.size else np.nan
    return out


def plain_flip_loop(candidate: Samples, baseline: Samples, replicates: int) -> np.ndarray:
    """(replicates, 1): rate of flips."""
    rng, images = np.random.default_rng(SEED), Images(baseline)
    flipped = (np.asarray(candidate.score) >= 0.5) != (np.asarray(baseline.score) >= 0.5)
    return np.array([[flipped[images.draw(rng)].mean()] for _ in range(replicates)])


def plain_mixture_loop(near: Samples, far: Samples, replicates: int) -> np.ndarray:
    """(replicates, shares, 4): the metrics of `MIXTURE_METRICS` at each share, by weights."""
    rng, sources = np.random.default_rng(SEED), [Images(near), Images(far)]
    out = np.empty((replicates, len(SHARES), len(MIXTURE_METRICS)))
    for r in range(replicates):
        rows = [source.draw(rng) for source in sources]
        a, c = (
            np.concatenate([getattr(source, name)[at] for source, at in zip(sources, rows, strict=True)])
            for name in ("score", "confidence")
        )
        order = np.argsort(-c, kind="stable")
        a, c = a[order], c[order]
        last = np.flatnonzero(np.append(c[1:] != c[:-1], True))
        for s, share in enumerate(SHARES):
            weights = [np.full(at.size, w / at.size) for at, w in zip(rows, (1 - share, share), strict=True)]
            w = np.concatenate(weights)[order]
            covered, risk = np.cumsum(w)[last], np.cumsum(w * (1 - a))[last]
            covered, risk = covered[covered > 0], risk[covered > 0]
            size = np.diff(covered)
            own = np.divide(np.diff(risk), size, out=np.zeros_like(size), where=size > 0)
            aurc = risk[-1] + ((risk[:-1] - covered[:-1] * own) * np.diff(np.log(covered))).sum()
            coverage = [covered[risk <= (t + 1e-9) * covered].max(initial=0) for t in (0.01, 0.05)]
            out[r, s] = [w @ a, *coverage, aurc]
    return out


class Task(NamedTuple):
    """A row of the table: the package's way, the plain loop's, and the values with intervals of the first.

    call, loop: take a number of replicates. values, widths: read off what `call` gives, to compare with the loop's
    replicates, whose spread should be `widths` (NaN: not comparable).
    """

    name: str
    peer: str
    call: Callable[[int], Any]
    loop: Callable[[int], np.ndarray]
    widths: Callable[[Any], np.ndarray]


def tasks(n: int) -> list[Task]:
    samples, fitting, shifted = (make_samples(n, prefix, seed) for prefix, seed in NAMES)
    other = make_samples(n, "image", 4)
    candidate = samples._replace(confidence=np.sqrt(np.asarray(samples.confidence)), score=other.score)
    kept = np.char.partition(np.asarray(samples.cluster), "-")[:, 2].astype(int) % 2 == 0
    clean = [samples, candidate]
    noisy = [Samples(*(np.asarray(column)[kept] for column in run)) for run in clean]
    conditions = [clean, noisy]
    metrics = [METRICS[key] for key in KEYS]
    comparable = np.array([METRICS[key].noise_layers == 0 for key in KEYS])

    def width(found: Any, keys: Sequence[str]) -> np.ndarray:
        return np.array([np.nan if METRICS[k].noise_layers else found[k].hi - found[k].lo for k in keys])

    def joint_width(found: Any) -> np.ndarray:
        draws = np.concatenate([part.draws for part in found])
        spread = np.subtract(*np.quantile(draws, [0.975, 0.025], axis=2))
        return np.where(comparable, spread, np.nan)

    def with_settings(call: Callable[..., Any]) -> Callable[[int], Any]:
        return lambda replicates: call(replicates=replicates, seed=SEED)

    eight = "8 metrics"
    return [
        Task(
            "8 metrics",
            eight,
            with_settings(partial(evaluate, *samples, metrics=KEYS)),
            lambda r: plain_loop(samples, r),
            lambda found: width(found, KEYS),
        ),
        Task(
            f"all {len(METRICS)} metrics, with threshold split",
            eight,
            with_settings(partial(evaluate, *samples, threshold=fitting)),
            lambda r: plain_loop(samples, r),
            lambda found: width(found, KEYS),
        ),
        Task(
            "8 metrics, difference of two runs",
            eight,
            with_settings(partial(compare, candidate, samples, metrics=KEYS)),
            lambda r: plain_loop(samples, r),
            lambda found: np.full(len(KEYS), np.nan),
        ),
        Task(
            "8 metrics, 2 runs under 2 conditions, jointly",
            "8 metrics, 2 runs under 2 conditions",
            with_settings(
                partial(
                    replicate_jointly,
                    [[Run(OrderedSamples(*run), None) for run in runs] for runs in conditions],
                    metrics,
                )
            ),
            lambda r: plain_joint_loop(conditions, r),
            joint_width,
        ),
        Task(
            "threshold transfer",
            "threshold transfer",
            with_settings(partial(transfer, fitting, samples, RISK)),
            lambda r: plain_transfer_loop(fitting, samples, r),
            lambda t: np.array([t.coverage_hi - t.coverage_lo, t.risk_hi - t.risk_lo]),
        ),
        Task(
            f"{len(MIXTURE_METRICS)} metrics of {len(SHARES)} mixtures",
            "mixtures",
            with_settings(partial(mixture_curve, samples, shifted)),
            lambda r: plain_mixture_loop(samples, shifted, r),
            # A coverage at 1 % risk rests on a handful of samples here, and its spread on a handful of draws.
            lambda curve: np.array(
                [[np.nan if "coverage" in k else e.hi - e.lo for k, e in p.metrics.items()] for p in curve]
            ),
        ),
        Task(
            "flips",
            "flips",
            with_settings(partial(flips, candidate, samples)),
            lambda r: plain_flip_loop(candidate, samples, r),
            lambda found: np.array([found.hi - found.lo]),
        ),
    ]


def check_agreement(samples: Samples, rows: list[Task]) -> None:
    """Stops unless both ways give the same values, and intervals of like width (calibration errors aside)."""
    ours = evaluate(*samples, metrics=KEYS, replicates=2, seed=SEED)
    expected = plain_metrics(np.asarray(samples.score), np.asarray(samples.confidence))
    for index, key in enumerate(KEYS):
        if not np.isclose(ours[key].value, expected[index], atol=1e-9):
            raise SystemExit(f"{key}: {ours[key].value} here, {expected[index]} in the plain loop")
    for row in rows:
        widths = row.widths(row.call(CHECKED))
        if np.isnan(widths).all():
            continue
        spread = np.subtract(*np.nanquantile(row.loop(CHECKED), [0.975, 0.025], axis=0))
        off = ~np.isnan(widths) & (np.abs(widths - spread) > 0.33 * spread + 1e-3)
        if off.any():
            raise SystemExit(f"{row.name}: intervals of width {widths[off]} here, {spread[off]} in the plain loop")


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
    rows = tasks(options.samples)
    check_agreement(make_samples(options.samples), rows)
    loop_replicates = max(1, options.replicates // 20)
    scale = options.replicates / loop_replicates
    calls: dict[str, Callable[[], object]] = {}
    for row in rows:
        calls[f"bitquake, {row.name}"] = partial(row.call, options.replicates)
        calls.setdefault(LOOP + row.peer, partial(row.loop, loop_replicates))
    peers = {f"bitquake, {row.name}": LOOP + row.peer for row in rows}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            rounds[name].append(seconds(call))
    median = {
        name: np.median(values, axis=0) * (scale if name.startswith(LOOP) else 1) for name, values in rounds.items()
    }
    ratio = {name: float(median[peers.get(name, name)][0] / median[name][0]) for name in calls}
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
    table = [[name, *median[name], ratio[name]] for name in calls]
    print(tabulate(table, headers=["", "processor s", "wall s", "times as fast as its loop"], floatfmt=".2f"))
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
                    "times_as_fast_as_its_loop": round(ratio[name], 2),
                }
                for name in calls
            },
        }
        part = options.json.with_name(options.json.name + ".part")
        part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        part.replace(options.json)


if __name__ == "__main__":
    main()
