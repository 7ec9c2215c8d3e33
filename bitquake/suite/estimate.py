"""What a suite will cost and what it can show, before it is run: samples, time, disk, memory, statistical power.

Measured where this output folder has finished cells of the same model, and else by rules of thumb that are named as
such in what is printed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bitquake.metrics import minimum_detectable_accuracy_change
from bitquake.model_wrappers.checkpoints import PREFIX, resolve
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

ASSUMED_FLIPS = (0.02, 0.05, 0.10)
"""Shares of answers that turn from right to wrong or back, for the power of comparisons that nobody has run yet."""
_SAMPLE_BYTES, _JOURNAL_BYTES, _TASK_BYTES = 3_600, 800, 16_000
"""Of lmms-eval's sample log and the journal for a short answer, and of its results for a task; of block_vqav2."""
_STATE_BYTES = 6
"""Of the features, for each hidden dimension and sample."""
_ASSUMED_HIDDEN = 4096
_PROCESS_BYTES = 1.1e9
"""Of a worker with everything imported and no model."""
_ANSWERS, _AT_PARAMETERS, _MOST_ANSWERS, _BLOCK_ANSWERS = 10.0, 8e9, 100.0, 80.0
"""Answers a second: on one data-centre GPU for 8e9 parameters, in inverse proportion, and of a reference model on one
core."""
_LOAD_SECONDS = {"block": 2.0, "real": 120.0}
_DTYPE_BYTES = {"float32": 4, "fp32": 4}


@dataclass(frozen=True)
class Speed:
    """Answers a second in one worker, and where that is known from."""

    answers: float
    load_seconds: float
    source: str


@dataclass(frozen=True)
class Power:
    """What comparisons at one number of samples can show.

    changes: smallest change of accuracy found in 80 % of such studies, for each of ``ASSUMED_FLIPS``, as a fraction.
    """

    n: int
    comparisons: int
    changes: tuple[float, ...]


@dataclass(frozen=True)
class Estimate:
    """Costs of the cells that are to be run, and the power of the whole plan.

    Attributes:
        cells: distinct ones; samples: of them together; unsized: tasks whose size only their dataset tells.
        seconds: of all, with so many at once. speeds: model -> how it was estimated.
        disk_bytes: of results, journal, features and copies with Selectors' confidences.
        memory_bytes: of the largest cell, None where nothing is known of any; memory_of: its model.
        trainings: distinct ones, whose time and memory are in no figure.
    """

    cells: int
    samples: int
    unsized: tuple[str, ...]
    seconds: float
    speeds: Mapping[str, Speed]
    disk_bytes: int
    memory_bytes: int | None
    memory_of: str
    trainings: int
    power: tuple[Power, ...]


def estimate(plan: SuitePlan, todo: Sequence[PlannedCell], done: Mapping[str, CellManifest], jobs: int) -> Estimate:
    """Costs of ``todo``; ``done``: hash -> manifest of what is finished already."""
    distinct = list({cell.hash: cell for cell in todo}.values())
    by_hash = {cell.hash: cell for cell in plan.cells}
    speeds = {
        cell.model: _speed(plan, cell, [m for h, m in done.items() if by_hash[h].model == cell.model])
        for cell in distinct
    }
    seconds, samples, disk = 0.0, 0, 0
    memory: dict[str, int] = {}
    for cell in distinct:
        n, speed = sum(cell.n.values()), speeds[cell.model]
        samples += n
        seconds += n / speed.answers + speed.load_seconds
        disk += _disk(plan, cell, n)
        measured = [m.peak_memory_bytes for h, m in done.items() if by_hash[h].model == cell.model]
        found = max((peak for peak in measured if peak), default=None) or _memory(cell)
        if found is not None:
            memory[cell.model] = max(found, memory.get(cell.model, 0))
    largest = max(memory, key=lambda model: memory[model], default="")
    return Estimate(
        cells=len(distinct),
        samples=samples,
        unsized=tuple(sorted({task for cell in distinct for task in cell.tasks if task not in cell.n})),
        seconds=seconds / max(1, min(jobs, len(distinct))),
        speeds=speeds,
        disk_bytes=disk,
        memory_bytes=memory.get(largest),
        memory_of=largest,
        trainings=len({cell.training_hash for cell in distinct if cell.training_hash}),
        power=_power(plan),
    )


def shown(found: Estimate, plan: SuitePlan, *, finished: int, jobs: int) -> str:
    """The estimate for a terminal."""
    tasks = len({task for cell in plan.cells for task in cell.tasks})
    distinct = {cell.hash for cell in plan.cells}
    corners = len(plan.cells) - len(distinct)
    lines = [
        f"{plan.title} ({plan.suite}, {plan.world} world)",
        f"cells    {len(distinct)} on {tasks} tasks: {finished} finished, {found.cells} to run"
        + (f" ({corners} corners of grids are full precision, evaluated once)" if corners else ""),
    ]
    if found.cells:
        sized = f", and those of {len(found.unsized)} tasks of unknown size" if found.unsized else ""
        lines.append(f"samples  {found.samples:,}{sized}")
        lines.append(f"time     {duration(found.seconds)} with {jobs} at once{', without these' if sized else ''}")
        lines += [f"         {model}: {speed.source}" for model, speed in found.speeds.items()]
        if found.trainings:
            lines.append(f"         and {found.trainings} trainings first, which are not estimated")
        lines.append(f"disk     {size(found.disk_bytes)}")
        if found.memory_bytes is not None:
            lines.append(f"memory   {size(found.memory_bytes)} for a cell of {found.memory_of}, times {jobs}")
    if found.power:
        flips = " / ".join(f"{100 * share:g}" for share in ASSUMED_FLIPS)
        lines.append(
            "power    smallest change of accuracy, in points, that 80 % of such studies find (95 % level, two-sided),\n"
            f"         if {flips} % of the answers flip (assumed):"
        )
        for one in found.power:
            changes = " / ".join("none" if math.isinf(change) else f"{100 * change:.1f}" for change in one.changes)
            lines.append(f"         {one.comparisons:,} comparisons at n = {one.n:,}: {changes}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time for people: ``40 s``, ``12 min``, ``3.5 h``, ``6 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def size(n_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= divisor:
            return f"{n_bytes / divisor:.1f} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"


def parameters_of(cell: PlannedCell) -> float | None:
    """Parameters of a cell's checkpoint: counted in its safetensors where it lies here, else what the suite says."""
    return _counted(cell.pretrained) or cell.parameters


def _speed(plan: SuitePlan, cell: PlannedCell, finished: Sequence[CellManifest]) -> Speed:
    told = [(sum(one.samples.values()), sum(one.task_seconds.values()), one.load_seconds) for one in finished]
    samples, seconds = sum(n for n, _, _ in told), sum(s for _, s, _ in told)
    if seconds > 0:
        answers, load = samples / seconds, sum(one for _, _, one in told) / len(told)
        return Speed(answers, load, f"{answers:.1f} answers a second, measured in {len(told)} finished cells here")
    load = _LOAD_SECONDS[plan.world]
    if plan.world == "block":
        return Speed(_BLOCK_ANSWERS, load, f"{_BLOCK_ANSWERS:g} answers a second, assumed of a reference model")
    parameters = parameters_of(cell)
    if parameters is None:
        return Speed(_ANSWERS, load, f"{_ANSWERS:g} answers a second, assumed of a model of unknown size on one GPU")
    answers = min(_MOST_ANSWERS, _ANSWERS * _AT_PARAMETERS / parameters)
    return Speed(
        answers, load, f"{answers:.1f} answers a second, assumed of {parameters / 1e9:.1f}e9 parameters on one GPU"
    )


def _disk(plan: SuitePlan, cell: PlannedCell, n: int) -> int:
    copies = 2 if plan.selectors else 1
    features = _STATE_BYTES * (_hidden(cell.pretrained) or _ASSUMED_HIDDEN) if cell.arguments.get("features") else 0
    return n * (copies * _SAMPLE_BYTES + _JOURNAL_BYTES + features) + _TASK_BYTES * len(cell.tasks)


def _memory(cell: PlannedCell) -> int | None:
    """Bytes of a cell's weights as they run, and of the process; activations come on top."""
    parameters = parameters_of(cell)
    if parameters is None:
        return None
    bits = 8 * _DTYPE_BYTES.get(str(cell.arguments.get("dtype", "bfloat16")), 2)
    if cell.spec.get("execution") == "packed" and isinstance(cell.spec.get("bits"), int):
        bits = cell.spec["bits"] + 1  # scales and zero-points; what is not quantized is left out of account
    return int(parameters * bits / 8 + _PROCESS_BYTES)


def _power(plan: SuitePlan) -> tuple[Power, ...]:
    by_name = {cell.name: cell for cell in plan.cells}
    counted: Counter[int] = Counter()
    for cell in plan.cells:
        twin = by_name.get(cell.twin)
        for task in cell.n.keys() & (twin.n.keys() if twin else set()):
            if not task.endswith(("_dev", "_threshold")):
                counted[min(cell.n[task], twin.n[task] if twin else 0)] += 1
    return tuple(
        Power(n, counted[n], tuple(minimum_detectable_accuracy_change(share, n) for share in ASSUMED_FLIPS))
        for n in sorted(counted)
    )


def _folder(pretrained: str) -> Path | None:
    if pretrained.startswith(PREFIX):
        return resolve(pretrained)
    path = Path(pretrained).expanduser()
    return path if path.is_dir() else None


@lru_cache(maxsize=256)
def _counted(pretrained: str) -> float | None:
    """Elements of all tensors in the safetensors files of a folder, by their headers."""
    folder = _folder(pretrained)
    total = 0
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length))
            except (ValueError, OverflowError, MemoryError):
                return None
        total += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    return float(total) or None


@lru_cache(maxsize=256)
def _hidden(pretrained: str) -> int | None:
    """Hidden dimension of the language model, by the checkpoint's configuration."""
    folder = _folder(pretrained)
    file = folder / "config.json" if folder else None
    if file is None or not file.is_file():
        return None
    told = json.loads(file.read_text(encoding="utf-8"))
    found = told.get("text_config", told).get("hidden_size", told.get("hidden_size"))
    return found if isinstance(found, int) else None
