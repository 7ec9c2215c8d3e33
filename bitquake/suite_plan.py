"""What a suite's output folder says of itself: the plan (``suite.json``), each finished cell (``cell.json``), and the
copies of a cell's answers with the confidences of the plan's Selectors (``applied/<hash>``).

A cell is one loaded model (checkpoint, quantization, calibration source, seed) with all its tasks. ``bitquake run``
writes these files; the study pages read them and nothing else of the suite.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from bitquake.model_wrappers.journal import digest

PLAN_VERSION = 1
PLAN_FILE = "suite.json"
CELL_FILE = "cell.json"
APPLIED = "applied"
MADE_FROM = "made_from.json"
"""In a copy with confidences, written last: the Selectors' files."""
World = Literal["real", "block"]
Page = Literal["noise", "grounding", "components", "selective", "training"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedCell(_Part):
    """One cell of a plan.

    Attributes:
        name: unique in the suite: ``MODEL/QUANTIZATION[/CALIBRATION][/seedN]``.
        hash: of everything that decides its answers; names its result folder.
        model: the model entry's name; pretrained: its checkpoint (of a trained one: what the training begins with).
        quantization: name of the spec; spec: its keys, as ``load_spec`` takes them; empty for full precision and for
            ``as-trained``.
        calibration: name of the calibration source, "" where nothing is calibrated.
        seed: of calibration and training.
        factors: name -> level, for variance decompositions: the grid's factors, and ``model``, ``quantization``,
            ``calibration``, ``seed`` where the suite varies them.
        twin: name of the cell that it is compared with, its own full-precision control; "" for full precision.
        training: the training's configuration, None for an untrained model; training_hash: names its folder.
        arguments: further ``model_args``.
        tasks: task -> number of its first samples, None for all.
        n: task -> samples expected, where that is known before the run.
    """

    name: str
    hash: str = Field(pattern=r"^[0-9a-f]{32}$")
    model: str
    pretrained: str
    revision: str | None = None
    parameters: float | None = None
    quantization: str
    spec: dict[str, Any] = Field(default_factory=dict)
    calibration: str = ""
    seed: int = 0
    factors: dict[str, str | int | float] = Field(default_factory=dict)
    twin: str = ""
    training: dict[str, Any] | None = None
    training_hash: str = ""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    tasks: dict[str, int | None]
    n: dict[str, int] = Field(default_factory=dict)


class SuitePlan(_Part):
    """A suite, expanded for one world.

    Several cells may share a hash (full precision, as the corner of several grids): they are evaluated once.

    Attributes:
        selectors, selector_mixture: which Selectors are fitted, and the quantizations that the mixture's sees.
        minutes: after which a cell is given up; None: never.
    """

    version: int = PLAN_VERSION
    bitquake: str
    suite: str
    title: str
    description: str = ""
    world: World
    page: Page
    published: tuple[str, ...] = ()
    selectors: tuple[str, ...] = ()
    selector_mixture: tuple[str, ...] = ()
    minutes: float | None = None
    cells: tuple[PlannedCell, ...]

    def cell(self, name: str) -> PlannedCell:
        """The cell of that name. Raises KeyError."""
        for one in self.cells:
            if one.name == name:
                return one
        raise KeyError(f"suite {self.suite!r} has no cell {name!r}")


class CellManifest(_Part):
    """A finished cell.

    Attributes:
        samples: task -> samples that are there.
        files: path inside the cell's folder -> blake2b-128 hex of its bytes.
        seconds: of the whole cell, of loading (with quantization and training), and of each task.
        peak_memory_bytes: highest resident set of the worker during the cell (of the device's memory on CUDA).
        noise_cache: hits and misses of the corrupted-image cache; None where it was off.
        machine: processor or device, threads, library versions, host name's hash.
    """

    version: int = PLAN_VERSION
    bitquake: str
    hash: str
    name: str
    samples: dict[str, int]
    files: dict[str, str]
    seconds: float
    load_seconds: float
    task_seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: int | None = None
    noise_cache: dict[str, int] | None = None
    began: str
    machine: dict[str, str] = Field(default_factory=dict)


class PlannedFit(NamedTuple):
    """A Selector: its name as of ``bitquake selector fit``, and the cells whose dev runs it learns from."""

    name: str
    cells: tuple[PlannedCell, ...]

    @property
    def file(self) -> str:
        """Name of its file, by everything it is made from."""
        return f"{digest([self.name, [cell.hash for cell in self.cells]])}.safetensors"


def planned_fits(plan: SuitePlan, cell: PlannedCell) -> Iterator[PlannedFit]:
    """The Selectors whose confidences a cell's answers get."""
    if "own" in plan.selectors:
        yield PlannedFit("selector", (cell,))
    if "transfer" in plan.selectors:
        yield PlannedFit("selector_transfer", (plan.cell(cell.twin) if cell.twin else cell,))
    if "mixture" in plan.selectors:
        mixed = [one for one in plan.cells if one.model == cell.model and one.quantization in plan.selector_mixture]
        # one of each quantization: as the cell is calibrated and seeded, or as the plan has it first
        chosen = {}
        for one in mixed:
            same = (one.calibration, one.seed) == (cell.calibration, cell.seed)
            if one.quantization not in chosen or same:
                chosen[one.quantization] = one
        yield PlannedFit("selector_mixture", tuple(chosen.values()))


def made_from(plan: SuitePlan, cell: PlannedCell) -> str:
    """What ``made_from.json`` says in the copy of a cell, once it is whole and as long as it fits the plan."""
    return json.dumps([fit.file for fit in planned_fits(plan, cell)])
