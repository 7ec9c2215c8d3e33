"""One training from its configuration to a checkpoint that ``bitquake_hf`` loads; runs once, whoever asks for it.

folder/config.json     the configuration, with every default filled in
folder/state, curve.jsonl     see ``loop``
folder/model           qat: the checkpoint, in the packed format (the twin: plain); folder/model-awq: AutoAWQ's layout
folder/adapter         lora: the adapter, as peft saves it
folder/result.json     written last: the training is done
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from loguru import logger as eval_logger

from bitquake import __version__
from bitquake.tasks.sources import replacing

from ..components import component_map
from ..loading import load_model, load_processor, resolve_pretrained, without_progress_bars
from .config import LoraConfig, QatConfig, load_training, training_hash
from .examples import Examples
from .loop import Outcome, Trainee, TrainingError, accelerator, train
from .seen import store_seen

CONFIG_FILE, RESULT_FILE = "config.json", "result.json"
MODEL_FOLDER, AWQ_FOLDER, ADAPTER_FOLDER = "model", "model-awq", "adapter"
BASE_FILE = "base.yaml"
"""The quantization of an adapter's base, where it has no name."""
_LOCK = ".lock"


@dataclass(frozen=True)
class Trained:
    """How a finished training is loaded: arguments of ``bitquake_hf``.

    Attributes:
        pretrained: a folder (qat), or what the adapter was trained on (lora).
        quant: name or file of the base's quantization; "" where the checkpoint is as it should be.
        adapter: folder of the adapter; None without one.
        base: the full-precision model that a quantized checkpoint's card names; None for others.
        folder: of the training.
    """

    pretrained: str
    quant: str
    adapter: str | None
    base: str | None
    folder: Path


class Prepared(NamedTuple):
    """A model ready to be trained, and what writes it down afterwards: (outcome, examples) -> keys of the result."""

    trainee: Trainee
    processor: Any
    write: Callable[[Outcome, Examples], Mapping[str, Any]]


def run_training(
    config: QatConfig | LoraConfig,
    folder: Path,
    *,
    minutes: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train, go on with a training that was interrupted, or find one that is done.

    Args:
        folder: of this training alone; processes that ask for the same one wait for the first.
        minutes: stop after that time in a state to go on from.
        progress: called with (steps done, steps in all).

    Raises:
        TrainingError: the folder holds another training, the time is over, or see ``loop.train``.
        ValueError: of models, quantizations and data; the message says what to change.
    """
    with alone(folder):
        done = finished(config, folder)
        if done is not None:
            return done
        on = accelerator(config)
        prepared = _prepare(config, folder, on.device)
        examples = Examples(
            config, prepared.trainee.model, prepared.processor, rank=on.process_index, processes=on.num_processes
        )
        if on.is_main_process:  # not before: what cannot begin must not keep the folder from what can
            _write_json(folder / CONFIG_FILE, {"hash": training_hash(config), **config.model_dump(mode="json")})
        outcome = train(prepared.trainee, examples, config, folder, on=on, minutes=minutes, progress=progress)
        if not outcome.finished:
            raise TrainingError(
                f"training: stopped at step {outcome.step} of {outcome.steps} after {minutes:g} minutes; run it again "
                f"to go on (state in {folder})"
            )
        if on.is_main_process:
            for reason, n in outcome.skipped.most_common(3):
                eval_logger.warning(f"training: {n} examples were left out: {reason}")
            written = prepared.write(outcome, examples)
            _write_json(folder / RESULT_FILE, _result(config, outcome, written))
        on.wait_for_everyone()
        done = finished(config, folder)
        assert done is not None  # it was just written
        return done


def finished(config: QatConfig | LoraConfig, folder: Path) -> Trained | None:
    """The training's result, or None while it is not done.

    Raises:
        TrainingError: the folder holds another training, or its files are damaged.
    """
    for name in (CONFIG_FILE, RESULT_FILE):
        try:
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            found = told["hash"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"training: {folder / name} is damaged ({error}); remove {folder}") from error
        if found != training_hash(config):
            raise TrainingError(
                f"training: {folder} holds another training{_differs(told, config)}; give another folder"
            )
    if not (folder / RESULT_FILE).is_file():
        return None
    nameless = isinstance(config, LoraConfig) and isinstance(config.quant, dict)
    return Trained(
        pretrained=str(folder / told["model"]) if told["model"] else told["pretrained"],
        quant=str(folder / BASE_FILE) if nameless else told["quant"],  # the folder may have come from another machine
        adapter=str(folder / told["adapter"]) if told["adapter"] else None,
        base=told["base"],
        folder=folder,
    )


def _differs(told: Mapping[str, Any], config: QatConfig | LoraConfig) -> str:
    """The first keys in which a folder's configuration is another."""
    ours = config.model_dump(mode="json")
    odd = [key for key in ours if key in told and told[key] != ours[key]]
    return f" ({', '.join(f'{key} {told[key]!r}, not {ours[key]!r}' for key in odd[:3])})" if odd else ""


def read_config(folder: Path) -> QatConfig | LoraConfig:
    """The configuration that a folder's training was begun with.

    Raises:
        TrainingError: there is none.
    """
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        del values["hash"]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"training: {folder} holds no training ({error})") from error
    return load_training(values, str(folder / CONFIG_FILE))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other program trains into the folder meanwhile; the processes of one program share it."""
    folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    with FileLock(folder / _LOCK):
        yield


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    with replacing(file) as new:
        new.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _result(config: QatConfig | LoraConfig, outcome: Outcome, written: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hash": training_hash(config), "bitquake": __version__, "torch": torch.__version__, "method": config.method,
        "model": None, "pretrained": None, "quant": "", "adapter": None, "base": None,
        "steps": outcome.steps, "seconds": round(outcome.seconds, 3), "parts": outcome.parts,
        "validation": outcome.validation, "skipped": outcome.skipped.total(), "pictures": len(outcome.image_ids),
        **written,
    }  # fmt: skip


def _prepare(config: QatConfig | LoraConfig, folder: Path, device: torch.device) -> Prepared:
    if isinstance(config, QatConfig):
        return _prepare_qat(config, folder, device)
    from .lora import prepare_lora

    return prepare_lora(config, folder, device)


def _prepare_qat(config: QatConfig, folder: Path, device: torch.device) -> Prepared:
    from .export import Layout, export
    from .objective import QatObjective, check_teacher, install, trained_spec

    source = resolve_pretrained(config.pretrained)
    processor = processor_of(config)
    with without_progress_bars():
        student = _load(source, config.revision, torch.float32, device, config)
        teacher = None
        if config.teacher is not None:
            teacher_source = resolve_pretrained(config.teacher)
            dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
            teacher = _load(teacher_source, config.teacher_revision, dtype, device, config)
    if teacher is not None:
        theirs = load_processor(
            teacher_source, revision=config.teacher_revision, trust_remote_code=config.trust_remote_code
        )
        check_teacher(student, teacher, processor, theirs)
        share_vision(student, teacher, config)
    groups = install(student, config)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    spec = trained_spec(config)

    def write(outcome: Outcome, examples: Examples) -> Mapping[str, Any]:
        unshare_vision(student)
        probe = next(examples.held_out(), None)
        arguments: dict[str, Any] = {
            "source": source, "revision": config.revision, "base": config.pretrained,
            "base_revision": config.revision or "", "trust_remote_code": config.trust_remote_code,
            "dtype": None if config.precision == "fp32" else torch.bfloat16, "probe": probe,
        }  # fmt: skip
        folders: dict[str, Layout] = {MODEL_FOLDER: "packed"}
        if config.awq:
            folders[AWQ_FOLDER] = "awq"
        for name, layout in folders.items():
            export(student, spec, folder / name, layout=layout, **arguments)
            store_seen(outcome.image_ids, folder / name, training_hash(config))
        return {"model": MODEL_FOLDER, "base": None if spec.is_full_precision else config.pretrained, "spec": spec.name}

    return Prepared(Trainee(student, groups, lambda model: QatObjective(model, teacher, config)), processor, write)


def processor_of(config: QatConfig | LoraConfig) -> Any:
    """The processor of the model that is trained, within the configuration's bounds of pixels."""
    return load_processor(
        resolve_pretrained(config.pretrained),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )


def _load(
    source: str, revision: str | None, dtype: torch.dtype, device: torch.device, config: QatConfig | LoraConfig
) -> Any:
    return load_model(
        source, revision=revision, dtype=dtype, device=device, device_map=None, attn_implementation=None,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip


_FEATURES = "get_image_features"


def share_vision(student: Any, teacher: Any, config: QatConfig) -> bool:
    """Let the teacher take the visual features that the student has just made, where they are bound to be the same.

    That is so where the student's vision tower and connector do not learn, and equal the teacher's. Both must then see
    every batch one after the other, the student first.

    Returns:
        Whether it is so.
    """
    ours, theirs = getattr(student, "model", None), getattr(teacher, "model", None)
    frozen = ("vision", "connector")
    if any(one in config.trained for one in frozen) or not (hasattr(ours, _FEATURES) and hasattr(theirs, _FEATURES)):
        return False
    parts = component_map(student)
    mine, others = (
        {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if parts.component(name) in frozen
        }
        for model in (student, teacher)
    )
    same = mine.keys() == others.keys() and all(
        one.dtype == others[name].dtype and torch.equal(one, others[name]) for name, one in mine.items()
    )
    if not same or not mine:
        return False
    make = getattr(ours, _FEATURES)
    made: list[Any] = []

    def remember(*arguments: Any, **named: Any) -> Any:
        made[:] = [make(*arguments, **named)]
        return made[0]

    setattr(ours, _FEATURES, remember)
    setattr(theirs, _FEATURES, lambda *arguments, **named: made[0])
    return True


def unshare_vision(student: Any) -> None:
    """Undo ``share_vision`` of the student."""
    vars(getattr(student, "model", student)).pop(_FEATURES, None)
