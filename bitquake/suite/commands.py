"""A cell as lmms-eval's commands: what ``--dry-run`` prints, and what a worker does without a process for each."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bitquake.model_wrappers.journal import digest
from bitquake.model_wrappers.quantizers.spec import FULL_PRECISION, named_specs
from bitquake.model_wrappers.training.config import QatConfig, load_training
from bitquake.suite.schema import AS_TRAINED
from bitquake.suite.store import Places
from bitquake.suite_plan import PlannedCell
from bitquake.tasks.sources import replacing

MODEL = "bitquake_hf"
NO_LIMIT = "all"
TRAINED_MODEL, TRAINED_ADAPTER, BASE_SPEC = "model", "adapter", "base.yaml"
"""Where a training puts what it makes (``training.run``, which imports torch)."""


class Begin(NamedTuple):
    """What a cell's model is loaded from.

    Attributes:
        pretrained: checkpoint; quant: what ``quant=`` is told, or "" for what the cell's own spec says.
        adapter, base: as of ``bitquake_hf``; "" without.
    """

    pretrained: str
    quant: str = ""
    adapter: str = ""
    base: str = ""


class LimitGroup(NamedTuple):
    """Tasks with one ``--limit``, which holds for all tasks of a command; folder: of their output, in ``runs``."""

    limit: int | None
    tasks: tuple[str, ...]

    @property
    def folder(self) -> str:
        return NO_LIMIT if self.limit is None else str(self.limit)


def limit_groups(cell: PlannedCell) -> list[LimitGroup]:
    """The cell's tasks by their limit, in the order of the plan."""
    groups: dict[int | None, list[str]] = {}
    for task, limit in cell.tasks.items():
        groups.setdefault(limit, []).append(task)
    return [LimitGroup(limit, tuple(tasks)) for limit, tasks in groups.items()]


def quant_of(cell: PlannedCell, places: Places) -> str:
    """What ``quant=`` is told: the name of a spec that ships, or a YAML file with the spec, written here.

    Raises:
        OSError: the file cannot be written.
    """
    if not cell.spec:
        return FULL_PRECISION
    named = named_specs().get(cell.spec["name"])
    if named is not None and named.options() == cell.spec:
        return named.name
    file = places.quants / f"{digest(cell.spec)}.yaml"
    _write_yaml(file, cell.spec)
    return str(file)


def begin_of(cell: PlannedCell, places: Places) -> Begin:
    """What a cell is loaded from; of a trained one, where ``run_training`` will put it."""
    if cell.training is None:
        return Begin(cell.pretrained)
    config, folder = load_training(cell.training), places.models / cell.training_hash
    if isinstance(config, QatConfig):
        quantized = not config.is_full_precision
        return as_trained(cell, str(folder / TRAINED_MODEL), base=config.pretrained if quantized else "")
    quant = config.quant if isinstance(config.quant, str) else "" if config.quant is None else str(folder / BASE_SPEC)
    return as_trained(cell, config.pretrained, quant=quant, adapter=str(folder / TRAINED_ADAPTER))


def as_trained(cell: PlannedCell, pretrained: str, *, quant: str = "", adapter: str = "", base: str = "") -> Begin:
    """What a training made, under the cell's own quantization or as it is."""
    return Begin(pretrained, (quant or "none") if cell.quantization == AS_TRAINED else "", adapter, base)


def model_args(cell: PlannedCell, begin: Begin, places: Places, noise_cache: Sequence[str] = ()) -> str:
    """``--model_args`` of a cell; noise_cache: further arguments for the cache of corrupted pictures."""
    arguments = {"pretrained": begin.pretrained}
    if cell.revision and begin.pretrained == cell.pretrained:
        arguments["revision"] = cell.revision
    arguments["quant"] = begin.quant or quant_of(cell, places)
    arguments |= {key: value for key, value in (("adapter", begin.adapter), ("base", begin.base)) if value}
    for key, value in cell.arguments.items():
        if key != "batch_size":
            arguments[key] = str(value).lower() if isinstance(value, bool) else str(value)
    arguments |= {"artifacts": str(places.artifacts), "journal": str(places.journal)}
    return ",".join([*(f"{key}={value}" for key, value in arguments.items()), *noise_cache])


def evaluation_arguments(
    cell: PlannedCell, group: LimitGroup, arguments: str, output: Path, device: str | None
) -> list[str]:
    """Arguments of ``lmms-eval`` that evaluate the tasks of one limit."""
    return [
        *("--model", MODEL, "--model_args", arguments, "--tasks", ",".join(group.tasks)),
        *("--batch_size", str(cell.arguments.get("batch_size", 1))),
        *(() if group.limit is None else ("--limit", str(group.limit))),
        *(() if device is None else ("--device", device)),
        *("--output_path", str(output), "--log_samples"),
    ]


def shown_commands(
    cell: PlannedCell, places: Places, runs: Path, device: str | None, noise_cache: Sequence[str] = ()
) -> list[str]:
    """The commands that give the cell's results, for a shell: the training of its model first, where it has one.

    Writes the quantization's YAML file, which they name, and the training's.
    """
    shown = []
    if cell.training is not None:
        shown.append(training_command(cell, places))
    arguments = model_args(cell, begin_of(cell, places), places, noise_cache)
    for group in limit_groups(cell):
        words = evaluation_arguments(cell, group, arguments, runs / group.folder, device)
        shown.append(shlex.join(["python", "-m", "lmms_eval", *words]))
    return shown


def training_command(cell: PlannedCell, places: Places) -> str:
    """The command that makes a trained model; its configuration is written beside its folder."""
    assert cell.training is not None
    config = places.models / f"{cell.training_hash}.yaml"
    _write_yaml(config, cell.training)
    out = places.models / cell.training_hash
    return shlex.join(["bitquake", "train", cell.training["method"], "--config", str(config), "--out", str(out)])


def _write_yaml(file: Path, told: dict[str, Any]) -> None:
    """Put it there unless it is there; other workers may be reading it."""
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with replacing(file) as new:
            new.write_text(text, encoding="utf-8")
