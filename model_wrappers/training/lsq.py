"""Learned step sizes (LSQ, Esser et al. 2020, arXiv 1902.08153), group-wise: a Linear trained on the grid it ships on.

What the forward pass computes with is what the packed format will hold: the step size is rounded to the stored float16
first, and codes turn back into weights by the operations of ``QuantizedWeight.dequantize``. An export is so exact.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.weight import SCALE_DTYPE, QuantizedWeight

CANDIDATES = 20
"""Step sizes tried at the start: ``CANDIDATES`` shares of the plain one, from 0.3 to 1.2 (papers.md 3.2)."""
_LEAST, _MOST = 2.0**-24, 65504.0  # of a float16 above zero
_CHUNK = 1 << 20  # weights searched at a time


class LsqLinear(nn.Linear):
    """Linear layer whose weight is rounded to a learned grid in each forward pass.

    With ``s = float16(exp(log_scale))`` of the weight's group and ``z = zero`` (0 if symmetric)::

        code = clamp(round(w / s) + 2**(bits - 1) + z, 0, 2**bits - 1)
        w^   = s * (code - 2**(bits - 1) - z)

    Gradients are the paper's: dw^/dw is 1 where w / s is within what the codes hold, else 0; dw^/ds is
    ``round(w / s) - w / s`` there, else ``w^ / s``, summed over the group and times ``1 / sqrt(n * q)`` for a group of
    n weights whose largest code is q. Zero-points are whole numbers found at the start, and stay.
    In a trial (reference model, 2 bits, 250 steps, one seed) learned ones (LSQ+), rounded or not, did no better:
    divergence from the teacher 0.037 to 0.043, against 0.031.

    Attributes:
        weight: Parameter (out, in), at full precision; float32 while it is trained.
        log_scale: Parameter (out, groups), float32: natural logarithm of the step size.
        zero: int8 (out, groups), relative to the middle code, as it is stored; None if symmetric.
        bits: 2 to 8; group_size: input features that share a step size; a row's last group may be shorter.
        hash_before: blake2 hex of the weight that the training began with.
    """

    zero: Tensor | None

    def __init__(self, linear: nn.Linear, *, bits: int, group_size: int, symmetric: bool) -> None:
        """Take over the parameters of ``linear`` and look for the step sizes of least squared error.

        Raises:
            QuantizationError: a weight is not finite, or a group's range is beyond float16.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bits, self.group_size, self.symmetric = bits, min(group_size, linear.in_features), symmetric
        self.hash_before = tensor_hash(linear.weight)
        scale, zero = search(linear.weight.detach(), bits, self.group_size, symmetric)
        self.log_scale = nn.Parameter(scale.log())
        self.register_buffer("zero", zero)
        self.train(linear.training)

    def scale(self) -> Tensor:
        """Step sizes (out, groups), float32, each a float16's value; the rounding passes the gradient through."""
        scale = self.log_scale.clamp(math.log(_LEAST), math.log(_MOST)).exp()
        return scale + (scale.to(SCALE_DTYPE).float() - scale).detach()

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as it would be stored now; codes are the nearest to the weight."""
        with torch.no_grad():
            scale = self.scale()
            level = _encode(_grouped(self.weight.float(), self.group_size), scale, self.zero, self.bits)[1]
            codes = (level + _middle(self.zero, self.bits)).to(torch.uint8)
            return QuantizedWeight(
                codes.flatten(1)[:, : self.in_features].contiguous(), scale.to(SCALE_DTYPE), self.zero, self.bits,
                self.group_size,
            )  # fmt: skip

    def rounded(self) -> Tensor:
        """The weight on its grid, (out, in), in the dtype of ``weight``."""
        result: Tensor = _Round.apply(self.weight, self.scale(), self.zero, self.bits, self.group_size)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """``x @ rounded().T + bias`` over the last dimension of ``x``."""
        return functional.linear(x, self.rounded(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"


def lsq_layers(model: nn.Module) -> dict[str, LsqLinear]:
    """The layers of a model whose step sizes are learned, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LsqLinear)}


class _Round(torch.autograd.Function):
    """Weight and scale -> weight on its grid. Keeps its arguments alone for the backward pass, not what is between."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.bits, ctx.group_size = bits, group_size
        _, level = _encode(_grouped(weight.float(), group_size), scale, zero, bits)
        values = level.mul_(scale.unsqueeze(-1))
        return values.flatten(1)[:, : weight.shape[1]].to(weight.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero = ctx.saved_tensors
        in_features = weight.shape[1]
        steps, level = _encode(_grouped(weight.float(), ctx.group_size), scale, zero, ctx.bits)
        middle = _middle(zero, ctx.bits)
        inside = (steps >= -middle) & (steps <= (1 << ctx.bits) - 1 - middle)
        to_weight = to_scale = None
        if ctx.needs_input_grad[0]:
            to_weight = gradient * inside.flatten(1)[:, :in_features].to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            each = level.sub_(steps.mul_(inside)).mul_(_grouped(gradient.float(), ctx.group_size))
            to_scale = each.sum(-1) * _share(in_features, ctx.group_size, ctx.bits, zero is None, each.device)
        return to_weight, to_scale, None, None, None


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """(out, in) -> (out, groups, group_size), a short last group filled up with zeros."""
    if fill := -weight.shape[1] % group_size:
        weight = functional.pad(weight, (0, fill))
    return weight.reshape(len(weight), -1, group_size)


def _middle(zero: Tensor | None, bits: int) -> Tensor | int:
    """The code that stands for 0, broadcast over a group."""
    half = 1 << (bits - 1)
    return half if zero is None else half + zero.float().unsqueeze(-1)


def _encode(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Weights in steps of their scale, and the whole numbers of steps that the codes hold (both float32)."""
    middle = _middle(zero, bits)
    steps = groups / scale.unsqueeze(-1)
    if isinstance(middle, int):
        return steps, steps.round().clamp_(-middle, (1 << bits) - 1 - middle)
    # zero-points are whole numbers: rounding before or after them is one
    return steps, torch.maximum(torch.minimum(steps.round(), (1 << bits) - 1 - middle), -middle)


@functools.cache
def _share(in_features: int, group_size: int, bits: int, symmetric: bool, device: torch.device) -> Tensor:
    """LSQ's gradient scale of each group of a row, 1 / sqrt(n * q); float32 (groups,)."""
    most = (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1
    counts = torch.full((-(-in_features // group_size),), float(group_size))
    if tail := in_features % group_size:
        counts[-1] = tail
    return (counts * most).rsqrt().to(device)


def search(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales of least squared error among ``CANDIDATES``, and zero-points.

    Symmetric: shares of ``max|w| / (2**(bits - 1) - 1)``. Asymmetric: shares of ``(max - min) / (2**bits - 1)`` around
    the range's middle, the range widened to hold 0, each with its own zero-point.

    Args:
        weight: (out, in), floating.

    Returns:
        scale float32 (out, groups), each a float16's value; zero int8 of that shape relative to the middle code, or
        None.

    Raises:
        QuantizationError: a weight is not finite, or a group's range is beyond float16.
    """
    rows = max(1, _CHUNK // weight.shape[1])
    found = [_search(part.float(), bits, group_size, symmetric) for part in torch.split(weight, rows)]
    scale = torch.cat([scale for scale, _ in found])
    if not bool(weight.isfinite().all()):
        raise QuantizationError(f"{int((~weight.isfinite()).sum())} weights are NaN or infinite")
    if not bool(scale.isfinite().all()):
        raise QuantizationError("a group's range is beyond float16, in which step sizes are stored")
    return scale, None if symmetric else torch.cat([zero for _, zero in found if zero is not None])


def _search(part: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    groups = _grouped(part, group_size)
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    plain = torch.maximum(-low, high) / (half - 1) if symmetric else (high - low) / top
    best = torch.full_like(plain, torch.inf)
    scale, zero = torch.full_like(plain, torch.nan), None if symmetric else torch.zeros_like(plain, dtype=torch.int8)
    for share in torch.linspace(0.3, 1.2, CANDIDATES).tolist():
        tried = (plain * share).to(SCALE_DTYPE).float().clamp(min=_LEAST)
        offset = None
        if zero is not None:
            lowest = (low + high) / 2 - tried * top / 2
            offset = ((-lowest / tried).round().clamp(0, top) - half).to(torch.int8)
        level = _encode(groups, tried, offset, bits)[1]
        error = level.mul_(tried.unsqueeze(-1)).sub_(groups).square_().sum(-1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
        if zero is not None and offset is not None:
            zero = torch.where(better, offset, zero)
    scale = torch.where(plain.isfinite() & ~scale.isnan(), scale, torch.inf)
    return scale, zero
