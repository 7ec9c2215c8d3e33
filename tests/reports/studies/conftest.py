"""A suite's output folder as ``bitquake run`` leaves it, with runs of ``run_folders`` in the place of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Runs, Task, blake

from bitquake.records import RECORD_KEY
from bitquake.suite_plan import MADE_FROM, CellManifest, PlannedCell, SuitePlan, made_from

Edit = Callable[[str, list[Any]], list[Any]]


@dataclass
class Suite:
    """Collects cells; ``write`` puts plan and results into ``out``."""

    out: Path
    page: str = "noise"
    cells: list[PlannedCell] = field(default_factory=list)

    def plan(self, name: str, tasks: Sequence[Task], *, twin: str = "", **changes: Any) -> PlannedCell:
        """A cell that is planned and nothing else."""
        model, _, rest = name.partition("/")
        told = {
            "name": name,
            "hash": blake("cell", name),
            "model": model,
            "pretrained": "bitquake/idefics3-tiny",
            "quantization": rest.partition("/")[0],
            "twin": twin,
            "tasks": {task.name: task.n for task in tasks},
            **changes,
        }
        cell = PlannedCell.model_validate(told)
        self.cells.append(cell)
        return cell

    def add(
        self,
        name: str,
        model: Model,
        tasks: Sequence[Task],
        *,
        twin: str = "",
        edit: Edit | None = None,
        applied: Edit | None = None,
        **changes: Any,
    ) -> PlannedCell:
        """A finished cell; edit: changes its records; applied: the same for a copy with Selectors' confidences."""
        cell = self.plan(name, tasks, twin=twin, **changes)
        folder = self.out / "cells" / cell.hash
        runs = Runs(folder / "runs")
        runs.artifacts = self.out / "artifacts"
        runs.write(model, list(tasks), name=str(len(self.cells)), edit=edit)
        if applied is not None:
            copy = Runs(self.out / "applied")
            copy.artifacts = self.out / "artifacts"
            copy.write(model, list(tasks), name=cell.hash, edit=applied)
        manifest = CellManifest(
            bitquake="0.1.0",
            hash=cell.hash,
            name=name,
            samples={task.name: task.n for task in tasks},
            files={},
            seconds=61.0,
            load_seconds=7.0,
            noise_cache={"hits": 30, "misses": 10},
            peak_memory_bytes=10**9,
            began="2026-11-21T10:00:00+00:00",
            machine={"processor": "x86_64", "threads": "1"},
        )
        (folder / "cell.json").write_text(manifest.model_dump_json())
        return cell

    def fail(self, cell: PlannedCell, reason: str, detail: str = "") -> None:
        folder = self.out / "failures"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cell.hash}.json").write_text(json.dumps({"reason": reason, "detail": detail}))

    def write(self, **changes: Any) -> Path:
        told = {
            "bitquake": "0.1.0",
            "suite": "trial",
            "title": "A trial",
            "description": "What this is for.",
            "world": "block",
            "page": self.page,
            "cells": self.cells,
            **changes,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        plan = SuitePlan.model_validate(told)
        (self.out / "suite.json").write_text(plan.model_dump_json())
        for cell in plan.cells:
            if (applied := self.out / "applied" / cell.hash).is_dir():
                (applied / MADE_FROM).write_text(made_from(plan, cell))
        return self.out


@dataclass(frozen=True)
class Answers:
    """A task's answers as arrays, read from the sample file by hand."""

    score: np.ndarray
    confidence: np.ndarray
    image: np.ndarray
    confidences: Mapping[str, np.ndarray]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path / "out")


@pytest.fixture(scope="module")
def shared_suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """One for all tests of a file, which must only read it."""
    return Suite(tmp_path_factory.mktemp("suite") / "out")


@pytest.fixture(scope="module")
def answers() -> Callable[[Path, PlannedCell, str], Answers]:
    """Reads the answers of a cell to a task, in the order of the sample ids."""

    def read(out: Path, cell: PlannedCell, task: str) -> Answers:
        folder = out / "applied" / cell.hash
        folder = folder if folder.is_dir() else out / "cells" / cell.hash
        (file,) = folder.rglob(f"*_samples_{task}.jsonl")
        rows = [json.loads(line)[RECORD_KEY] for line in file.read_text().splitlines()]
        rows.sort(key=lambda row: str(row["sample_id"]))
        first = rows[0]["primary_confidence"]
        names = sorted({name for row in rows for name in row["confidence"]})
        held = {name: np.array([row["confidence"].get(name, np.nan) for row in rows]) for name in names}
        return Answers(
            np.array([row["score"] for row in rows]),
            held[first],
            np.array([row["image_id"] for row in rows]),
            held,
        )

    return read
