"""What a group of Linear layers reads in the calibration set, gathered by running its block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers.blocks import BlockInput, moved
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.scale_groups import ScaleGroup

_TOKENS = 1024  # most tokens that are run at a time


@dataclass(frozen=True)
class Call:
    """One call of a group's target: its arguments, its output at full precision, and each token's place in ``x``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    tokens: slice


@dataclass(frozen=True)
class Features:
    """What a group of Linear layers reads in the calibration set.

    Attributes:
        x: shape (tokens, in_features), in the model's dtype, on the CPU.
        vision, answer: bool, shape (tokens,); None outside the language model.
        calls: of the target, where it is not run token by token.
    """

    x: Tensor
    vision: Tensor | None
    answer: Tensor | None
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Block inputs that are run as one: ``joined``, made of ``parts`` in their order."""

    joined: BlockInput
    parts: tuple[BlockInput, ...]


def batched(inputs: Sequence[BlockInput]) -> list[Batch]:
    """Join inputs of equal shapes whose first tensor, the hidden states, has a leading dimension of 1.

    That dimension is the samples': every tensor with one is joined along it (hidden states, masks, positions, rotary
    embeddings), whatever its values, so that equal samples count as often as they come. What has none must be equal in
    all of them. Hidden states without a dimension of samples (patches of a Qwen vision tower), or with one that counts
    the tiles of a picture, are not joined. A batch has ``_TOKENS`` rows of its first tensor at most.
    """
    batches: list[list[BlockInput]] = []
    open_batches: dict[Any, list[BlockInput]] = {}
    for one in inputs:
        signature = _signature((one.args, one.kwargs, one.vision is None))
        first = next(_tensors((one.args, one.kwargs)))
        group = open_batches.get(signature)
        rows = first[0].numel() // first.shape[-1]
        if group is None or not _of_one_sample(first) or (len(group) + 1) * rows > _TOKENS:
            group = open_batches[signature] = []
            batches.append(group)
        group.append(one)
    found = []
    for group in batches:
        joined = _joined([(one.args, one.kwargs) for one in group])
        if joined is None:
            found += [Batch(one, (one,)) for one in group]
        else:
            found.append(Batch(replace(group[0], args=joined[0], kwargs=joined[1]), tuple(group)))
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _signature(value: Any) -> Any:
    """Equal for arguments that differ in the values of tensors only."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(_signature(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _signature(value[key])) for key in sorted(value))
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _of_one_sample(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.shape[0] == 1


def _joined(values: Sequence[Any]) -> Any:
    """Arguments of several calls as those of one; None where that cannot be."""
    first = values[0]
    if isinstance(first, Tensor):
        if _of_one_sample(first):
            return torch.cat(list(values))
        return first if all(torch.equal(first, other) for other in values[1:]) else None
    if isinstance(first, (tuple, list)):
        items = [_joined(same) for same in zip(*values, strict=True)]
        lost = any(item is None and one is not None for item, one in zip(items, first, strict=True))
        return None if lost else type(first)(items)
    if isinstance(first, dict):
        items = [_joined([value[key] for value in values]) for key in first]
        lost = any(item is None and one is not None for item, one in zip(items, first.values(), strict=True))
        return None if lost else dict(zip(first, items, strict=True))
    return first


@torch.no_grad()
def features(block: nn.Module, batches: Sequence[Batch], groups: Sequence[ScaleGroup]) -> list[Features]:
    """Run a block once on its inputs and keep what each of its groups needs.

    Memory: the inputs of every group for all tokens, and for a target that is run in calls its arguments and outputs
    as well: of a decoder layer about six hidden states and one of the MLP's inner width per token, on the CPU.

    Raises:
        QuantizationError: activations that are not finite.
    """
    seen = [_Seen(group) for group in groups]
    with contextlib.ExitStack() as hooks:
        for one in seen:
            hooks.callback(one.linear.register_forward_pre_hook(one.keep_input).remove)
            if one.group.group.span == "calls" and one.group.is_scaled:
                hooks.callback(one.group.target.register_forward_hook(one.keep_call, with_kwargs=True).remove)
        for batch in batches:
            for one in seen:
                one.batch = batch
            batch.joined.run(block)
    return [one.gathered() for one in seen]


class _Seen:
    """What hooks saw of one group."""

    def __init__(self, group: ScaleGroup) -> None:
        self.group = group
        self.name, self.linear = next(iter(group.linears.items()))
        self.batch: Batch | None = None
        self.xs: list[Tensor] = []
        self.vision: list[Tensor] = []
        self.answer: list[Tensor] = []
        self.calls: list[Call] = []
        self.count = 0

    def keep_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self.batch is not None
        x = args[0].detach().reshape(-1, args[0].shape[-1]).cpu()
        self.xs.append(x)
        self.count += len(x)
        self.vision += [part.vision for part in self.batch.parts if part.vision is not None]
        self.answer += [part.answer for part in self.batch.parts if part.answer is not None]

    def keep_call(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tokens = slice(self.count - len(self.xs[-1]), self.count)
        self.calls.append(Call(moved(args, "cpu"), moved(kwargs, "cpu"), first_tensor(output).cpu(), tokens))

    def gathered(self) -> Features:
        if not self.xs:
            return Features(torch.empty(0, self.linear.in_features), None, None)
        x = torch.cat(self.xs)
        self.xs.clear()
        if not x.isfinite().all():
            raise QuantizationError(
                f"{self.name}: {int((~x.isfinite()).sum())} of its calibration inputs are NaN or infinite; load the "
                "model in bfloat16 or float32, and check that it answers before it is quantized"
            )
        vision, answer = (torch.cat(masks) if masks else None for masks in (self.vision, self.answer))
        for mask in (vision, answer):
            if mask is not None and len(mask) != len(x):
                raise QuantizationError(
                    f"{self.name} saw {len(x)} tokens, the calibration set marks {len(mask)}: its masks do not fit "
                    "this model"
                )
        return Features(x, vision, answer, tuple(self.calls))


def first_tensor(output: Any) -> Tensor:
    """The output of a module, or the first of several."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found.detach()
