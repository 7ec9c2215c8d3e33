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

ANSWERS = {"flickr_retrieval_clean": 10.0}
"""What a sample costs, in short answers: a retrieval sample scores 100 captions on one picture."""
BEGIN_SECONDS = 20.0
"""A worker with a GPU ends with its cell: imports, each time."""


class Job(NamedTuple):
    """A cell, or a part of one: hours, samples."""

    hours: float
    samples: int


def jobs(plan: SuitePlan, parts: int) -> list[Job]:
    """The suite's cells in the order of their work, each in at most so many parts, which share its tasks evenly."""
    cells = run_order(plan.cells)
    speeds = {
        model: estimate(plan, [cell for cell in cells if cell.model == model], {}, 1).speeds[model]
        for model in {cell.model for cell in cells}
    }
    found = []
    for cell in cells:
        speed = speeds[cell.model]
        shares: list[tuple[float, int]] = [(0.0, 0)] * min(parts, len(cell.tasks))  # answers, samples
        costs = {task: cell.n[task] * ANSWERS.get(task, 1.0) for task in cell.tasks}
        for task in sorted(costs, key=lambda task: -costs[task]):
            answers, samples = heapq.heappop(shares)
            heapq.heappush(shares, (answers + costs[task], samples + cell.n[task]))
        for answers, samples in shares:
            seconds = answers / speed.answers + speed.load_seconds + BEGIN_SECONDS
            found.append(Job(seconds / 3600, samples))
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
        print("cells whole" if parts == 1 else f"each cell in at most {parts} parts, of whole tasks")
        print(tabulate(rows, headers="keys", disable_numparse=True), end="\n\n")


if __name__ == "__main__":
    main()
