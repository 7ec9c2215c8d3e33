"""The training loop: steps of an objective over examples, on one process or many, interrupted and gone on with at will.

A state folder holds ``progress.json`` and the tensors that it names::

    state/progress.json            step, place in the data, the objective's and the curve's state, pictures seen
    state/step-500.safetensors     the weights that learn and AdamW's moments
    curve.jsonl                    {"step": 10, "loss": 0.71, …, "rate": 1e-05, "seconds": 12.3}, at most 1,000 lines

``progress.json`` is replaced last, so that a killed run goes on from the last save, on a CPU to the very same weights.
On many GPUs every process holds the model, and all see the same folder: ``accelerate launch -m bitquake train …``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from loguru import logger as eval_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from bitquake.tasks.sources import replacing

from ..journal import digest
from .batch import TrainingBatch
from .config import LoraConfig, QatConfig
from .examples import Examples, Place, learned

STATE_FOLDER = "state"
CURVE_FILE = "curve.jsonl"
_PROGRESS = "progress.json"
_LINES = 1000
"""Most lines of a curve."""
_WEIGHT, _MOMENT = "weight.", "optimiser."


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where it stands and what to change."""


class Objective(Protocol):
    """What is minimised, see ``objective.QatObjective``."""

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]: ...

    def after_step(self, parts: Mapping[str, float]) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Trainee:
    """A model that is to be trained.

    Attributes:
        model: moved to its device; parameters that need gradients learn.
        groups: of them, for AdamW: mappings with ``params``, ``lr``, ``weight_decay`` and a ``name``.
        objective: makes the objective of the model, which may by then be wrapped for many processes.
    """

    model: Any
    groups: list[dict[str, Any]]
    objective: Callable[[Any], Objective]


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended.

    Attributes:
        step, steps: optimiser steps done, and of the whole training.
        seconds: of training, over all calls.
        image_ids: names of the pictures that were trained on.
        skipped: reason -> examples that could not be used.
        parts: loss and its parts at the end; validation: of the examples that were kept out.
    """

    step: int
    steps: int
    seconds: float
    image_ids: frozenset[str]
    skipped: Counter[str]
    parts: dict[str, float]
    validation: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.step == self.steps


def accelerator(config: QatConfig | LoraConfig) -> Accelerator:
    """Processes and devices of this run.

    Mixed precision is the loop's own: a process that has evaluated a model has an accelerator already, whose precision
    cannot be changed any more.
    """
    # a component that only some batches reach has no gradient in the others
    unused = isinstance(config, QatConfig) and config.trained != ("language",)
    # the others wait while the first writes a large model, longer than torch's ten minutes
    patient = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
    return Accelerator(
        cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused), patient],
    )


def rate_share(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Share of the highest rate in a step, counted from 0: a linear rise, then half a cosine down to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def total_steps(config: QatConfig | LoraConfig, batches_per_epoch: int) -> int:
    """Optimiser steps of a training; ``batches_per_epoch`` are one process's."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * batches_per_epoch / config.gradient_accumulation))


def train(
    trainee: Trainee,
    examples: Examples,
    config: QatConfig | LoraConfig,
    folder: Path,
    *,
    on: Accelerator,
    minutes: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train, or go on where the folder's state stands.

    Args:
        folder: gets the state and the curve.
        on: from ``accelerator``.
        minutes: stop after that time, in a state to go on from.
        progress: called with (steps done, steps in all).

    Raises:
        TrainingError: the loss is no number any more; the state is damaged, or of another training.
        CalibrationError: of the data.
    """
    devices = [on.device] if on.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # whoever called draws the numbers that it would have drawn
        return _Loop(trainee, examples, config, folder, on).run(minutes, progress)


class _Loop:
    def __init__(
        self, trainee: Trainee, examples: Examples, config: QatConfig | LoraConfig, folder: Path, on: Accelerator
    ) -> None:
        self.config, self.examples, self.on, self.folder = config, examples, on, folder
        self.inner = trainee.model
        self.learning = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        self.model = on.prepare(trainee.model) if on.num_processes > 1 else trainee.model
        self.objective = trainee.objective(self.model)
        # not through the wrapper, whose passes wait for one another: processes may have different numbers of batches
        self.measure = self.objective if self.model is self.inner else trainee.objective(self.inner)
        self.optimiser = torch.optim.AdamW(trainee.groups, fused=True)
        for group in self.optimiser.param_groups:
            group["peak"] = group["lr"]
        self.steps = total_steps(config, examples.batches_per_epoch)
        self.step, self.place, self.seconds = 0, Place(), 0.0
        self.image_ids: set[str] = set()
        self.skipped: Counter[str] = Counter()
        self.lately: tuple[set[str], Counter[str]] = set(), Counter()  # this process's since the last save
        self.window: list[dict[str, float]] = []
        self.curve: list[str] = []
        self.parts: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.saved = 0
        self.identity = digest({"version": 1, "steps": self.steps, "data": examples.identity})

    def run(self, minutes: float | None, progress: Callable[[int, int], None] | None) -> Outcome:
        self._load()
        began, before = time.monotonic(), self.seconds
        batches = self.examples.batches(self.place)
        shown = tqdm(
            total=self.steps, initial=self.step, desc=f"train {self.config.method}", unit="step",
            disable=None if self.on.is_main_process else True,
        )  # fmt: skip
        self._learning_mode()
        try:
            while self.step < self.steps:
                self._step(batches)
                self.seconds = before + time.monotonic() - began
                self._record()
                shown.update()
                shown.set_postfix_str(f"loss {self.parts['loss']:.3f}", refresh=False)
                if progress is not None:
                    progress(self.step, self.steps)
                every = self.config.validate_every
                if self.step == self.steps or (every is not None and self.step % every == 0):
                    self._validate()
                over = minutes is not None and self._agreed(time.monotonic() - began > 60 * minutes)
                if self.step % self.config.save_every == 0 or self.step == self.steps or over:
                    self._save()
                if over:
                    break
        finally:
            shown.close()
            batches.close()  # type: ignore[attr-defined]
        return Outcome(
            self.step, self.steps, self.seconds, frozenset(self.image_ids), self.skipped, self.parts, self.validation
        )

    def _step(self, batches: Iterator[Any]) -> None:
        config, passes = self.config, self.config.gradient_accumulation
        share = rate_share(self.step, self.steps, config.warmup, config.schedule)
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["peak"]
        seen: list[dict[str, float]] = []
        for number in range(passes):
            loaded = next(batches)
            # what is drawn at random in a pass (dropout) depends on its place alone
            at = (self.step * passes + number) * self.on.num_processes + self.on.process_index
            torch.manual_seed(config.seed * 1_000_003 + at)
            last = number + 1 == passes
            with nullcontext() if last else self.on.no_sync(self.model), self._precision():
                loss, parts = self.objective(loaded.batch.to(self.on.device))
            with nullcontext() if last else self.on.no_sync(self.model):
                self.on.backward(loss / passes)
            seen.append(parts)
            self.lately[0].update(loaded.image_ids)
            self.lately[1].update(loaded.skipped)
            self.place = loaded.following
        norm = nn.utils.clip_grad_norm_(self.learning.values(), config.clip_norm)
        self.parts = self._averaged(seen)
        if not math.isfinite(float(norm)):
            told = ", ".join(f"{name} {value:.4g}" for name, value in self.parts.items())
            state = f"The state of step {self.saved} is kept in {self.folder}" if self.saved else "Nothing was saved"
            raise TrainingError(
                f"training: step {self.step + 1} of {self.steps}: the gradient's norm is {float(norm)} ({told}). "
                f"{state}; begin again in another folder with a lower rate (now {config.rate:g}"
                f"{f', scale_rate {config.scale_rate:g}' if isinstance(config, QatConfig) else ''}), a longer warmup, "
                "or precision fp32"
            )
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.after_step(self.parts)
        self.step += 1

    def _learning_mode(self) -> None:
        """Dropout and its kin in what learns; what is frozen computes as it will be evaluated."""
        self.model.train()
        for module in self.inner.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.on.device.type, dtype=torch.bfloat16)

    def _averaged(self, seen: list[dict[str, float]]) -> dict[str, float]:
        """Parts of the loss, averaged over passes and processes."""
        names = list(seen[0])
        values = torch.tensor([[one[name] for name in names] for one in seen], dtype=torch.float64).mean(0)
        if self.on.num_processes > 1:
            values = self.on.reduce(values.float().to(self.on.device), "mean").double().cpu()
        return dict(zip(names, values.tolist(), strict=True))

    def _agreed(self, over: bool) -> bool:
        """The first process's opinion."""
        return bool(broadcast_object_list([over])[0]) if self.on.num_processes > 1 else over

    @torch.no_grad()
    def _validate(self) -> None:
        sums: Counter[str] = Counter()
        tokens = 0.0
        self.model.eval()
        self.measure.load_state_dict(self.objective.state_dict())
        for batch in self.examples.held_out():
            with self._precision():
                _, parts = self.measure(batch.to(self.on.device))
            n = float(learned(batch))
            tokens += n
            for name, value in parts.items():
                sums[name] += n * value  # type: ignore[assignment]
        self._learning_mode()
        if self.on.num_processes > 1:
            gathered = gather_object([(tokens, dict(sums))])
            tokens, sums = sum(n for n, _ in gathered), Counter()
            for _, one in gathered:
                sums.update(one)
        if tokens:
            self.validation = {name: value / tokens for name, value in sums.items()}
            line = {"step": self.step, **{f"validation_{name}": value for name, value in self.validation.items()}}
            self.curve.append(json.dumps(line))
            self._write_curve()

    def _record(self) -> None:
        self.window.append(self.parts)
        every = -(-self.steps // _LINES)
        if self.step % every and self.step != self.steps:
            return
        means = {name: sum(one[name] for one in self.window) / len(self.window) for name in self.parts}
        rate = self.optimiser.param_groups[0]["lr"]
        self.curve.append(json.dumps({"step": self.step, **means, "rate": rate, "seconds": round(self.seconds, 3)}))
        self.window = []
        self._write_curve(append=True)

    def _write_curve(self, *, append: bool = False) -> None:
        if not self.on.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if append and (self.folder / CURVE_FILE).is_file():
            with (self.folder / CURVE_FILE).open("a", encoding="utf-8") as stream:
                stream.write(self.curve[-1] + "\n")
            return
        with replacing(self.folder / CURVE_FILE) as new:
            new.write_text("".join(f"{line}\n" for line in self.curve), encoding="utf-8")

    def _save(self) -> None:
        for ids, skipped in gather_object([self.lately]) if self.on.num_processes > 1 else [self.lately]:
            self.image_ids |= ids
            self.skipped += skipped
        self.lately = set(), Counter()
        self.saved = self.step
        if not self.on.is_main_process:
            return
        tensors = {_WEIGHT + name: p.detach().cpu().contiguous() for name, p in self.learning.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"{_MOMENT}{index}.{k}": torch.as_tensor(v).cpu().contiguous() for k, v in state.items()}
        name = f"step-{self.step}.safetensors"
        folder = self.folder / STATE_FOLDER
        progress = {
            "training": self.identity, "step": self.step, "place": list(self.place), "seconds": self.seconds,
            "objective": self.objective.state_dict(), "parts": self.parts, "validation": self.validation,
            "window": self.window, "curve": self.curve, "skipped": dict(self.skipped),
            "image_ids": sorted(self.image_ids), "state": name,
        }  # fmt: skip
        try:
            with replacing(folder / name) as new:
                save_file(tensors, str(new))
            with replacing(folder / _PROGRESS) as new:
                new.write_text(json.dumps(progress), encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"training: step {self.step}: {folder} cannot be written ({error}); the state before it is whole: make "
                "room, and run again"
            ) from error
        for old in folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def _load(self) -> None:
        folder = self.folder / STATE_FOLDER
        if not (folder / _PROGRESS).is_file():
            return
        damaged = f"training: the state in {folder} is damaged; remove {self.folder} to begin again"
        try:
            progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
            told = progress["training"]
            tensors = load_file(str(folder / progress["state"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TrainingError(f"{damaged} ({error})") from error
        if told != self.identity:
            raise TrainingError(
                f"training: {folder} was begun on other data, with another processor or number of processes, so that "
                "its examples do not go on where they stood; give another folder, or what it was begun with"
            )
        if {name for name in tensors if name.startswith(_WEIGHT)} != {_WEIGHT + name for name in self.learning}:
            raise TrainingError(damaged)
        with torch.no_grad():
            for name, parameter in self.learning.items():
                parameter.copy_(tensors[_WEIGHT + name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_MOMENT):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.objective.load_state_dict(progress["objective"])
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.place = Place(*progress["place"])
        self.image_ids, self.skipped = set(progress["image_ids"]), Counter(progress["skipped"])
        self.window, self.curve = progress["window"], progress["curve"]
        self.parts, self.validation = progress["parts"], progress["validation"]
        self.saved = self.step
        self._write_curve()  # without what came after the save
        eval_logger.info(f"training: going on from step {self.step} of {self.steps} in {self.folder}")
