"""What a quantization-aware training minimises (``CE + beta GDKD + omega RCKA``, papers.md 3.1), and on what model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import modeling_utils

from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quantizers.plan import QuantizationError, resolve
from bitquake.model_wrappers.quantizers.replace import row_group
from bitquake.model_wrappers.quantizers.spec import QuantSpec
from bitquake.model_wrappers.selector.capture import final_norm
from bitquake.model_wrappers.training.batch import TrainingBatch
from bitquake.model_wrappers.training.config import QatConfig
from bitquake.model_wrappers.training.controller import BottleneckController
from bitquake.model_wrappers.training.distillation import (
    confidence_gate,
    decoupled_divergence,
    divergence,
    relational_loss,
    wide,
)
from bitquake.model_wrappers.training.lsq import LsqLinear

_CHUNK = 1 << 26  # logits whose losses are computed at a time: bounds the float32 temporaries


class TeacherError(ValueError):
    """A teacher that cannot teach this student."""


def trained_spec(config: QatConfig) -> QuantSpec:
    """What a training makes of its model, as a spec: ``grace-int3-g64``, by the losses that were on.

    ``grace``: all of GRACE's losses; ``qat-kd``: some of them; ``qat``: no teacher. The twin of 16 bits is full
    precision.
    """
    if config.is_full_precision:
        return QuantSpec(name="full-precision", method="none")
    parts = (config.distillation, config.decoupled, config.gate, config.controller, config.relational)
    losses = "grace" if all(parts) else "qat-kd" if any(parts) else "qat"
    group = "channel" if config.group_size == "channel" else f"g{config.group_size}"
    return QuantSpec(
        name=f"{losses}-int{config.bits}-{group}{'' if config.symmetric else '-asym'}", method="checkpoint",
        bits=config.bits, group_size=config.group_size, symmetric=config.symmetric, components=config.components,
    )  # fmt: skip


def install(student: Any, config: QatConfig) -> list[dict[str, Any]]:
    """Make a model ready to be trained: ``LsqLinear`` where it is quantized, gradients where it learns.

    What learns are the components of ``config.trained`` with their embeddings and norms, and with the language model
    its head. Nothing is quantized at 16 bits.

    Args:
        student: a whole model in float32, changed in place; before an optimiser or wrapper sees it.

    Returns:
        Parameter groups for AdamW, each ``{name, params, lr, weight_decay}``: ``weights``; ``vectors`` (biases and
        norms) and ``scales`` (step sizes) without weight decay. Empty ones are left out.

    Raises:
        QuantizationError: a component without Linear modules, or a weight that cannot be quantized.
        ComponentMapError: the architecture has no component map.
    """
    parts = component_map(student)
    if not config.is_full_precision:
        for name in resolve(student, trained_spec(config)):
            linear = student.get_submodule(name)
            try:
                layer = LsqLinear(
                    linear, bits=config.bits, group_size=row_group(config.group_size, linear.in_features),
                    symmetric=config.symmetric,
                )  # fmt: skip
            except QuantizationError as error:
                raise QuantizationError(f"{name} (shape {tuple(linear.weight.shape)}): {error}") from error
            student.set_submodule(name, layer)
    head = student.get_output_embeddings()
    with_language = {id(p) for p in head.parameters()} if head is not None and "language" in config.trained else set()
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "vectors": [], "scales": []}
    for name, parameter in student.named_parameters():  # a tied one comes once
        learns = parts.component(name) in config.trained or id(parameter) in with_language
        parameter.requires_grad_(learns)
        if learns:
            scale = name.rpartition(".")[2] == "log_scale"
            groups["scales" if scale else "weights" if parameter.ndim > 1 else "vectors"].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": config.scale_rate if name == "scales" else config.rate,
            "weight_decay": config.weight_decay if name == "weights" else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]


def check_teacher(student: Any, teacher: Any, student_processor: Any, teacher_processor: Any) -> None:
    """Refuse a teacher whose tokens are not the student's, before anything is trained.

    Both see the inputs that the student's processor makes, so every token must have the same number in both
    tokenizers, special ones too, and pictures the same placeholder. Their logits may have further rows for no token
    at the end (some sizes of a model are padded, others not); the shorter one's length is compared.

    Raises:
        TeacherError: which tokens differ.
    """
    ours, theirs = (processor.tokenizer.get_vocab() for processor in (student_processor, teacher_processor))
    told = f"teacher {_named(teacher)} and student {_named(student)} have different tokenizers"
    fix = "Give a teacher of the student's family: distillation compares probabilities token by token"
    if odd := sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)):
        token = odd[0]
        raise TeacherError(
            f"{told}: {len(odd)} of {len(ours.keys() | theirs.keys())} tokens differ, the first is {token!r} "
            f"({_number(ours, token)} of the student's, {_number(theirs, token)} of the teacher's). {fix}"
        )
    # the same words, but perhaps another way to cut a text into them
    rules = [_rules(processor.tokenizer) for processor in (student_processor, teacher_processor)]
    if rules[0] != rules[1]:
        raise TeacherError(f"{told}: the same words, but other rules that cut a text into them. {fix}")
    image = [_image_token(model) for model in (student, teacher)]
    if image[0] != image[1]:
        raise TeacherError(f"{told}: image token {image[0]} of the student's, {image[1]} of the teacher's. {fix}")
    least = min(model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    if max(ours.values()) >= least:
        raise TeacherError(
            f"{told}: token {max(ours.values())} has no logit in a model of {least}; its checkpoint is not whole"
        )


def _named(model: Any) -> str:
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def _number(vocabulary: Mapping[str, int], token: str) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "none"


def _rules(tokenizer: Any) -> Any:
    """What decides how a text is cut, where the tokenizer tells."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__
    told = json.loads(backend.to_str())
    return [told.get("normalizer"), told.get("pre_tokenizer"), told["model"].get("type"), told["model"].get("merges")]


def _image_token(model: Any) -> int | None:
    config = model.config
    return next(
        (v for n in ("image_token_id", "image_token_index") if (v := getattr(config, n, None)) is not None), None
    )


class QatObjective:
    """The loss of a batch, each part of it switched by the configuration.

    Args:
        student: what is trained, as the loop calls it: the model or its wrapper (DDP and the like).
        teacher: put into evaluation mode, without gradients; None where the configuration asks none. Its hidden size
            may differ from the student's.
        config: of the training.

    Raises:
        TeacherError: the configuration asks a teacher and there is none, or the other way round.
    """

    def __init__(self, student: Any, teacher: Any | None, config: QatConfig) -> None:
        if (teacher is not None) != config.uses_teacher:
            what = "there is none" if teacher is None else "it is asked nothing (distillation and relational are off)"
            raise TeacherError(f"quantization-aware training: a teacher where {what}")
        self.student, self.teacher, self.config = student, teacher, config
        self.steps = 0
        self._answered = False  # the teacher, once
        self.controller = BottleneckController(
            tau=config.tau, eta=config.eta, beta=config.beta0, beta_min=config.beta_min, beta_max=config.beta_max,
            decay=config.ema,
        )  # fmt: skip
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    @property
    def omega(self) -> float:
        """Weight of the relational loss in this step: it rises from 0 over ``omega_warmup`` steps."""
        warmup = self.config.omega_warmup
        return self.config.omega * (min(1.0, self.steps / warmup) if warmup else 1.0)

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and its parts.

        Returns:
            A float32 scalar to call ``backward`` on; name -> value of ``loss``, ``ce`` and where they are on ``gdkd``
            (the plain divergence without ``decoupled``), ``tckd``, ``nckd`` (times T^2, not gated), ``gate`` (its
            mean), ``beta``, ``rcka``, ``omega``, ``pictures`` (compared ones).

        Raises:
            ValueError: nothing in the batch is learned.
            TeacherError: the teacher does not take the student's inputs, or sees other positions.
        """
        # logits at position t - 1 predict the token at t
        predicts = functional.pad(batch.labels[:, 1:] != -100, (0, 1))
        if not bool(predicts.any()):
            raise ValueError(
                f"batch of {len(batch.labels)} examples: every label is -100, so that nothing is learned; an answer "
                "may have been cut off (max_length)"
            )
        labels = batch.labels[:, 1:][predicts[:, :-1]]
        relational = self.config.relational
        ours, our_states = self._answers(self.student, batch, predicts, states=relational)
        theirs = their_states = None
        if self.teacher is not None:
            with torch.no_grad():
                theirs, their_states = self._taught(batch, predicts, states=relational)
            self._answered = True
            if theirs.shape[0] != ours.shape[0]:
                raise TeacherError(
                    f"teacher {_named(self.teacher)} answers at {theirs.shape[0]} positions, the student at "
                    f"{ours.shape[0]}: it lays its pictures out otherwise. Give a teacher of the student's family"
                )
        loss, parts = self._of_answers(ours, theirs if self.config.distillation else None, labels)
        if our_states is not None and their_states is not None:
            relations, pictures = self._of_relations(our_states, their_states, batch.visual)
            loss = loss + self.omega * relations
            parts |= {"rcka": relations.detach()}
        names, values = list(parts), torch.stack([loss.detach(), *parts.values()]).tolist()
        told: dict[str, float] = dict(zip(["loss", *names], values, strict=True))
        if self.config.distillation:
            told["beta"] = self.controller.beta
        if relational:
            told |= {"omega": self.omega, "pictures": float(pictures)}
        return loss, told

    def after_step(self, parts: Mapping[str, float]) -> None:
        """End a step of the optimiser; ``parts`` are averaged over its passes and all processes."""
        self.steps += 1
        if self.config.controller:
            self.controller.update(parts["gdkd"])

    def state_dict(self) -> dict[str, Any]:
        """What changes during a training, as JSON holds it."""
        return {"steps": self.steps, "controller": self.controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``'s state."""
        self.steps = int(state["steps"])
        self.controller.load_state_dict(state["controller"])

    def _taught(self, batch: TrainingBatch, predicts: Tensor, *, states: bool) -> tuple[Tensor, Tensor | None]:
        try:
            return self._answers(self.teacher, batch, predicts, states=states)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            # whatever transformers says to tokens and features that do not fit; later ones have another cause
            if self._answered or isinstance(error, (TeacherError, torch.OutOfMemoryError)):
                raise
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise TeacherError(
                f"teacher {_named(self.teacher)} does not take what the student's processor makes ({told}). Give a "
                "teacher of the student's family, whose pictures have as many visual tokens"
            ) from error

    def _answers(
        self, model: Any, batch: TrainingBatch, predicts: Tensor, *, states: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (N, V) of the positions of ``predicts``, and hidden states (B, T, d) of the relational layer."""
        inner = model.module if hasattr(model, "module") else model
        kind = inner.dtype
        inputs = {k: v.to(kind) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        # before the head: (B, T, V) is never made
        slices = hasattr(modeling_utils, "slice_logits_to_keep")
        if slices and "logits_to_keep" in inspect.signature(inner.forward).parameters:
            inputs["logits_to_keep"] = predicts
        with _watching(inner, self.config.relational_layer, active=states) as found:
            logits = model(**inputs, use_cache=False).logits
        if logits.ndim == 3:
            logits = logits[predicts]
        if not states:
            return logits, None
        if len(found) != 1:
            raise TeacherError(f"{_named(inner)}: its layer {self.config.relational_layer} ran {len(found)} times")
        if found[0].shape[:2] != batch.visual.shape:
            raise TeacherError(
                f"{_named(inner)}: its layers see {tuple(found[0].shape[:2])} positions, the batch has "
                f"{tuple(batch.visual.shape)}: its visual tokens are not laid out one for one"
            )
        return logits, found[0]

    def _of_answers(self, ours: Tensor, theirs: Tensor | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and distillation, some positions at a time, computed again for the backward pass."""
        n = len(labels)
        rows = max(1, _CHUNK // ours.shape[-1])
        sums: Tensor | None = None
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            arguments = (ours[part], None if theirs is None else theirs[part], labels[part])
            one: Tensor = (
                self._sums(*arguments) if n <= rows else checkpoint(self._sums, *arguments, use_reentrant=False)
            )
            sums = one if sums is None else sums + one
        assert sums is not None
        entropy = sums[0] / n
        if theirs is None:
            return entropy, {"ce": entropy.detach()}
        distilled = sums[1] / sums[2]
        parts = {"ce": entropy, "gdkd": distilled}
        if self.config.gate:
            parts["gate"] = sums[2] / n
        if self.config.decoupled:
            parts |= {"tckd": sums[3] / n, "nckd": sums[4] / n}
        return entropy + self.controller.beta * distilled, {name: value.detach() for name, value in parts.items()}

    def _sums(self, ours: Tensor, theirs: Tensor | None, labels: Tensor) -> Tensor:
        """Over positions: cross-entropy, gate times distillation, gate, TCKD and NCKD."""
        config = self.config
        ours = wide(ours)
        entropy = functional.cross_entropy(ours, labels, reduction="sum")
        if theirs is None:
            return entropy.reshape(1)
        shared = min(ours.shape[-1], theirs.shape[-1])  # rows for no token may follow
        ours, theirs = ours[:, :shared], wide(theirs[:, :shared])
        gate = confidence_gate(theirs) if config.gate else torch.ones_like(entropy).expand(len(labels))
        if not config.decoupled:
            each = divergence(ours, theirs, config.temperature)
            return torch.stack([entropy, (gate * each).sum(), gate.sum()])
        square = config.temperature**2
        target, others = (square * part for part in decoupled_divergence(ours, theirs, labels, config.temperature))
        each = config.alpha * target + config.beta_dkd * others
        return torch.stack([entropy, (gate * each).sum(), gate.sum(), target.sum(), others.sum()])

    def _of_relations(self, ours: Tensor, theirs: Tensor, visual: Tensor) -> tuple[Tensor, int]:
        if torch.is_grad_enabled() and not ours.requires_grad:
            raise RuntimeError(
                "the student's hidden states carry no gradient: gradient checkpointing must not be reentrant "
                "(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        return relational_loss(ours, theirs, visual)


@contextmanager
def _watching(model: Any, layer: int, *, active: bool) -> Iterator[list[Tensor]]:
    """Within the block, the forward pass puts ``hidden_states[layer]`` of the language model into the list.

    Of n blocks, ``hidden_states`` are the inputs of each (with what Qwen3-VL adds between its first ones), and what the
    final norm makes of the last one's output. Asking the model for them would keep all, for both models.
    """
    found: list[Tensor] = []
    if not active:
        yield found
        return
    blocks = language_blocks(model)
    at = layer + len(blocks) + 1 if layer < 0 else layer
    if not 0 <= at <= len(blocks):
        raise ValueError(
            f"relational_layer={layer}: {_named(model)} has {len(blocks)} blocks, so layers {-len(blocks) - 1} to "
            f"{len(blocks)}"
        )

    def before(_: nn.Module, arguments: tuple[Tensor, ...], named: Mapping[str, Any]) -> None:
        found.append(arguments[0] if arguments else named["hidden_states"])

    def after(_: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        found.append(result)

    if at < len(blocks):
        handle = blocks[at].register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = final_norm(model).register_forward_hook(after)
    try:
        yield found
    finally:
        handle.remove()


def language_blocks(model: Any) -> list[nn.Module]:
    """The language model's blocks, by the component map.

    Raises:
        ComponentMapError: the architecture has no component map.
        TeacherError: it has an encoder of its own, so that no single stack sees the whole prompt.
    """
    parts = component_map(model)
    stacks = [stack.path for part in parts.parts if part.component == "language" for stack in part.stacks]
    found = [list(model.get_submodule(path).children()) for path in stacks if path in parts.depths]
    if len(found) != 1:
        raise TeacherError(
            f"{_named(model)}: relations of visual tokens are compared in one stack of blocks, and its language model "
            f"has {len(found)}; set relational: false"
        )
    return found[0]
