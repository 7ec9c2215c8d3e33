"""Suites small enough for a test, and one that has been evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitquake.suite.driver import CellOptions
from bitquake.suite.plan import plan_suite
from bitquake.suite.reader import LoadedSuite, load_suite
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

MODEL = {"name": "block-idefics3", "pretrained": "bitquake/block-idefics3"}
TINY: dict[str, Any] = {
    "suite": "tiny",
    "title": "A suite for tests",
    "page": "noise",
    "models": [MODEL],
    "quantizations": ["full-precision", {"name": "mine", "spec": {"method": "rtn", "bits": 3, "group_size": 32}}],
    "tasks": [
        {"name": "block_vqav2_clean", "limit": 24},
        {"name": "block_vqav2_low_light_3", "limit": 24},
        {"name": "block_scienceqa_clean", "limit": 8},
    ],
    "arguments": {"dtype": "bfloat16", "batch_size": 8},
    "block": {"description": "Its twin."},
}


class _WrittenOut(yaml.SafeDumper):
    """Suite files have no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class Evaluated:
    """An output folder with every cell of a plan, made in this process."""

    out: Path
    plan: SuitePlan
    options: CellOptions
    manifests: dict[str, CellManifest]

    def cell(self, name: str) -> PlannedCell:
        return self.plan.cell(name)


@pytest.fixture
def write_suite(tmp_path: Path) -> Callable[..., Path]:
    """Writes a suite file: ``TINY`` with some keys replaced, or left out where None."""

    def write(**changes: Any) -> Path:
        data = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
        file = tmp_path / f"{data['suite']}.yaml"
        file.write_text(yaml.dump(data, Dumper=_WrittenOut, sort_keys=False), encoding="utf-8")
        return file

    return write


@pytest.fixture
def load(write_suite: Callable[..., Path]) -> Callable[..., LoadedSuite]:
    """Loads such a suite, in the block world."""
    return lambda **changes: load_suite(write_suite(**changes), "block")


@pytest.fixture
def plan(load: Callable[..., LoadedSuite]) -> Callable[..., SuitePlan]:
    """Plans such a suite."""
    return lambda **changes: plan_suite(load(**changes))


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """``TINY``, evaluated: full precision and a quantization of its own, three tasks, two limits."""
    from bitquake.suite.worker import run_cell

    root = tmp_path_factory.mktemp("evaluated")
    file = root / "tiny.yaml"
    file.write_text(yaml.dump(TINY, Dumper=_WrittenOut), encoding="utf-8")
    made = plan_suite(load_suite(file, "block"))
    out, options = root / "out", CellOptions(device="cpu", noise_cache=str(root / "noise"))
    manifests = {cell.name: run_cell(cell, str(out), out / ".scratch", options=options) for cell in made.cells}
    return Evaluated(out, made, options, manifests)
