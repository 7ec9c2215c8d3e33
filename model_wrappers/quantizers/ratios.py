"""MBQ's modality ratios: how much more a vision token's error hurts the answer than an answer token's, per layer.

For the output of every output projection of the language model (``o_proj`` and ``down_proj``, or what the architecture
calls them): the mean of ``|dL/dY|`` over vision positions and over answer positions, each averaged over the samples
that have such positions, where L is a sample's mean cross-entropy of its answer tokens. Their quotient, vision by
answer, is a layer's ratio; a ratio below the median of its kind (attention, MLP) over the layers is raised to it.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quantizers.blocks import device_of, forwards_replaced, moved, without_cache
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.scale_groups import output_projections

if TYPE_CHECKING:
    from bitquake.model_wrappers.calibration import CalibrationInputs


@dataclass(frozen=True)
class ModalityRatios:
    """Block name -> ratio, floored by the median, for the layers of its attention and of its MLP."""

    attention: dict[str, float]
    mlp: dict[str, float]


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


def modality_ratios(model: Any, calibration: Iterable[CalibrationInputs]) -> ModalityRatios:
    """The ratios of every block of the language model, by one backward pass for each sample that has an answer.

    Peak memory: the model, the inputs of its language blocks for one sample, what one block keeps for its own backward
    pass (blocks are run again for it), and the logits of the answer. Weights get no gradient; the vision tower runs
    without a graph.

    Raises:
        QuantizationError: no sample has both vision and answer tokens' gradients, or one is not finite.
    """
    projections = list(output_projections(model))
    seen = {(name, kind): (_Mean(), _Mean()) for name, kind, _ in projections}
    with _prepared(model), contextlib.ExitStack() as hooks:
        current: list[CalibrationInputs] = []
        for name, kind, linear in projections:
            hook = _recorder(seen[name, kind], current, name)
            hooks.callback(linear.register_forward_hook(hook).remove)
        for sample in calibration:
            current[:] = [sample]
            if sample.answer[1:].any():
                torch.autograd.backward(_loss(model, sample))
    ratios: dict[str, dict[str, float]] = {"attention": {}, "mlp": {}}
    for (name, kind), (vision, answer) in seen.items():
        if not vision.count or not answer.count or not answer.value > 0:
            raise QuantizationError(
                f"{name}: MBQ weighs vision against answer tokens by their gradients, and this calibration set has "
                f"{vision.count} samples with the one and {answer.count} with the other; use samples with both"
            )
        ratios[kind][name] = vision.value / answer.value
    return ModalityRatios(**{kind: _floored(found) for kind, found in ratios.items()})


def _floored(ratios: dict[str, float]) -> dict[str, float]:
    median = statistics.median(ratios.values())
    return {name: max(ratio, median) for name, ratio in ratios.items()}


def _recorder(means: tuple[_Mean, _Mean], current: list[CalibrationInputs], name: str) -> Any:
    def record(gradient: Tensor) -> None:
        (sample,) = current
        sizes = gradient.float().reshape(-1, gradient.shape[-1]).abs().mean(dim=1)
        for mean, mask in zip(means, (sample.vision, sample.answer), strict=True):
            if mask.any():
                value = sizes[mask.to(sizes.device)].mean().item()
                if not abs(value) < float("inf"):
                    raise QuantizationError(f"{name}: the gradient of a calibration sample is NaN or infinite")
                mean.add(value)

    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(record)  # type: ignore[no-untyped-call]

    return hook


def _loss(model: Any, sample: CalibrationInputs) -> Tensor:
    """Mean cross-entropy of the answer's tokens; logits are made for these only."""
    at = torch.nonzero(sample.answer).flatten()
    at = at[at > 0]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][:, (at - 1).to(args[0].device)], *args[1:]))
    try:
        with torch.enable_grad():
            logits = model(**moved(sample.inputs, device_of(model))).logits[0].float()
            return functional.cross_entropy(logits, sample.inputs["input_ids"][0, at].to(logits.device))
    finally:
        hook.remove()


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Weights frozen, the language model's input differentiable, its blocks run again in the backward pass."""
    parts = component_map(model)
    stacks = [s.path for part in parts.parts if part.component == "language" for s in part.stacks]
    paths = [path for path in stacks if path in parts.depths]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def differentiable(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            raise QuantizationError("MBQ's ratios need a language model that is called with inputs_embeds")
        return args, {**kwargs, "inputs_embeds": embeds.detach().requires_grad_()}

    def recomputed(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    with contextlib.ExitStack() as undo:
        undo.enter_context(without_cache(model))
        for parameter in trainable:
            parameter.requires_grad_(False)
            undo.callback(parameter.requires_grad_, True)
        blocks = [block for path in paths for block in model.get_submodule(path).children()]
        undo.enter_context(forwards_replaced(blocks, recomputed))
        for path in paths:
            owner = model.get_submodule(path.rpartition(".")[0])
            undo.callback(owner.register_forward_pre_hook(differentiable, with_kwargs=True).remove)
        yield
