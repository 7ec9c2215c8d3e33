"""What the suites that ship would take on so many GPUs: an extrapolation, from stated speeds, and no measurement.

    python benchmarks/scale.py --gpus 1000

Cells are dealt out as ``bitquake run --ray`` does, in their order, each to the GPU that is free first. A cell's time is
its samples at the speed that ``bitquake run --dry-run`` assumes of its model, and what it takes to begin. Trainings are
not in it. ``docs/scale.md`` says what the table means.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from typing import NamedTuple

from tabulate import tabulate

from bitquake.suite.driver import run_order
from bitquake.suite.estimate import estimate
from bitquake.suite.plan import plan_suite
from bitquake.suite.reader import load_suite, suite_names
from bitquake.suite_plan import SuitePlan

SIZES = {
    "vqav2_clean": 107_000, "vqav2_threshold": 21_400, "advqa_clean": 5_200, "vizwiz_clean": 3_460,
    "refcocoplus_clean": 8_600, "refcocoplus_threshold": 2_150, "refcocoplus_testA": 5_726, "refcocoplus_testB": 4_889,
    "scienceqa_clean": 1_510, "scienceqa_threshold": 520, "mmbench_clean": 4_329, "coco_caption_clean": 2_500,
    "flickr_retrieval_clean": 1_020,
}  # fmt: skip
"""Samples of tasks whose size only their data tell; from the families' READMEs."""
ANSWERS = {"flickr_retrieval_clean": 10.0}
"""What a sample costs, in short answers: a retrieval sample scores 100 captions on one picture."""
BEGIN_SECONDS = 20.0
"""A worker with a GPU ends with its cell: imports, each time."""


class Job(NamedTuple):
    """A cell, or a part of one: hours, samples."""

    hours: float
    samples: int


def jobs(plan: SuitePlan, parts: int) -> list[Job]:
    """The suite's cells in the order of their work, each in so many parts with a share of its tasks."""
    cells = run_order(plan.cells)
    speeds = {
        model: estimate(plan, [cell for cell in cells if cell.model == model], {}, 1).speeds[model]
        for model in {cell.model for cell in cells}
    }
    found = []
    for cell in cells:
        sizes = {task: cell.n.get(task) or SIZES[task] for task in cell.tasks}
        n = min(parts, len(sizes))
        speed = speeds[cell.model]
        answers = sum(size * ANSWERS.get(task, 1.0) for task, size in sizes.items())
        seconds = answers / n / speed.answers + speed.load_seconds + BEGIN_SECONDS
        found += [Job(seconds / 3600, sum(sizes.values()) // n)] * n
    return found


def hours(work: Sequence[Job], gpus: int) -> float:
    """Until the last is done, each given to the GPU that is free first."""
    free = [0.0] * gpus
    for job in work:
        heapq.heappush(free, heapq.heappop(free) + job.hours)
    return max(free)


def row(name: str, cells: int, work: Sequence[Job], gpus: int, price: float) -> dict[str, object]:
    spent, wall = sum(job.hours for job in work), hours(work, gpus)
    return {
        "suite": name,
        "cells": f"{cells:,}",
        "samples": f"{sum(job.samples for job in work) / 1e6:.2f} M",
        "GPU-hours": f"{spent:,.0f}",
        "longest cell h": f"{max(job.hours for job in work):.2f}",
        f"h on {gpus:,} GPUs": f"{wall:.2f}",
        "in use": f"{spent / wall / gpus:.0%}",
        "$ a cell": f"{price * spent / cells:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--price", type=float, default=2.5, help="dollars for a GPU-hour (default 2.50)")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 16], help="parts of a cell (default 1 and 16)")
    options = parser.parse_args()
    plans = [plan_suite(load_suite(name)) for name in suite_names()]
    for parts in options.parts:
        work = [jobs(plan, parts) for plan in plans]
        cells = [len({cell.hash for cell in plan.cells}) for plan in plans]
        rows = [
            row(plan.suite, n, own, options.gpus, options.price)
            for plan, n, own in zip(plans, cells, work, strict=True)
        ]
        every = sorted((job for own in work for job in own), key=lambda job: -job.hours)
        rows.append(row("all, longest first", sum(cells), every, options.gpus, options.price))
        print(f"each cell in {parts} part{'s' if parts > 1 else ''}")
        print(tabulate(rows, headers="keys", disable_numparse=True), end="\n\n")


if __name__ == "__main__":
    main()
