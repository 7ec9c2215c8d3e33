"""``QuantizedLinear``: a Linear whose weight lies on a low-bit grid, held packed or de-quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers.packing import pack, row_bytes, unpack

Execution = Literal["simulated", "packed"]

SCALE_DTYPE = torch.float16
"""Scales are float16 whatever the model's dtype: at 8 bits a bfloat16 scale (8 significant bits) moves the outer codes
by up to half a step, a float16 one (11 bits) by a sixteenth; float32 would cost another 0.25 bits per weight at group
size 64. Zero-points are kept relative to the middle code, where float16 is finest."""

_CHUNK = 1 << 20  # weights de-quantized at a time: bounds the float32 temporary


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """De-quantize packed codes: ``scale * (code - 2**(bits-1) - zero)`` in float32, rounded once to ``dtype``.

    Each operation is rounded by itself as IEEE says, so every device gives the same bits.

    Args:
        packed: uint8, shape (out_features, ``row_bytes(in_features, bits)``).
        scale: shape (out_features, groups), float16.
        zero: shape (out_features, groups), relative to the middle code; None for symmetric codes: 0.

    Returns:
        Tensor of shape (out_features, in_features).
    """
    out_features, n_groups = scale.shape
    weight = torch.empty((out_features, in_features), dtype=dtype, device=packed.device)
    rows = max(1, _CHUNK // in_features)
    fill = n_groups * group_size - in_features
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        values = unpack(packed[part], bits, in_features).float()
        if fill:
            values = functional.pad(values, (0, fill))
        values = values.reshape(-1, n_groups, group_size)
        values -= float(1 << (bits - 1))
        if zero is not None:
            values -= zero[part].float().unsqueeze(-1)
        values *= scale[part].float().unsqueeze(-1)
        weight[part] = values.reshape(-1, n_groups * group_size)[:, :in_features].to(dtype)
    return weight


class QuantizedLinear(nn.Module):
    """Linear layer with a weight of 2 to 8 bits, one scale (and zero-point) for each group of a row.

    The group size need not divide ``in_features``: the last group of a row is then shorter. A group longer than a row
    is the row. ``simulated`` keeps the de-quantized weight (buffer ``dequantized``), ``packed`` keeps ``codes``,
    ``scale`` and ``zero`` and de-quantizes at every call; both compute with the same weight, bit for bit.

    The constructor makes an empty layer to load a state dict into; ``from_codes`` makes a filled one.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        bits: 2 to 8.
        group_size: input features that share a scale, > 0.
        symmetric: no zero-point is stored; codes are centred on ``2**(bits-1)``.
        zero_dtype: ``torch.int8`` for integer zero-points, ``torch.float16`` for real ones.
        bias: whether there is a bias (kept in ``dtype``).
        dtype: of the de-quantized weight.
        execution: see above.
    """

    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    dequantized: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        zero_dtype: torch.dtype = torch.int8,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        execution: Execution = "packed",
    ) -> None:
        super().__init__()
        if group_size < 1:
            raise ValueError(f"QuantizedLinear: group_size must be positive, got {group_size}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, min(group_size, in_features), symmetric
        self.zero_dtype, self.weight_dtype, self.execution = zero_dtype, dtype, execution
        self.n_groups = -(-in_features // self.group_size)
        is_packed = execution == "packed"

        def buffer(name: str, shape: tuple[int, int], kind: torch.dtype, present: bool) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device) if present else None)

        buffer("codes", (out_features, row_bytes(in_features, bits)), torch.uint8, is_packed)
        buffer("scale", (out_features, self.n_groups), SCALE_DTYPE, is_packed)
        buffer("zero", (out_features, self.n_groups), zero_dtype, is_packed and not symmetric)
        buffer("dequantized", (out_features, in_features), dtype, not is_packed)
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        group_size: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        execution: Execution,
    ) -> QuantizedLinear:
        """Make a filled layer on the device of ``codes`` (uint8, shape (out_features, in_features), not packed).

        ``scale`` and ``zero`` as for ``dequantize``; ``bias`` is kept as it is.
        """
        out_features, in_features = codes.shape
        layer = cls(
            in_features, out_features, bits=bits, group_size=group_size, symmetric=zero is None, bias=False,
            zero_dtype=torch.int8 if zero is None else zero.dtype, dtype=dtype, device="meta", execution=execution,
        )  # fmt: skip
        packed, scale = pack(codes, bits), scale.to(SCALE_DTYPE)
        if execution == "packed":
            layer.codes, layer.scale, layer.zero = packed, scale, zero
        else:
            layer.dequantized = dequantize(packed, scale, zero, bits, layer.group_size, in_features, dtype)
        layer.bias = bias
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, shape (out_features, in_features)."""
        if self.dequantized is not None:
            return self.dequantized
        if self.codes is None or self.scale is None:
            raise RuntimeError("QuantizedLinear holds no weight; load a state dict or use from_codes")
        return dequantize(
            self.codes, self.scale, self.zero, self.bits, self.group_size, self.in_features, self.weight_dtype
        )

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zeros in the packed format, whatever the execution."""
        per_group: int = SCALE_DTYPE.itemsize + (0 if self.symmetric else self.zero_dtype.itemsize)
        return self.out_features * (row_bytes(self.in_features, self.bits) + self.n_groups * per_group)

    @property
    def held_bytes(self) -> int:
        """Bytes that the weight takes in memory in this execution, read from the tensors."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.zero, self.dequantized) if t is not None)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` over the last dimension of ``x``."""
        weight = self.weight
        return functional.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .half(), .bfloat16() and .to(dtype) are meant for what the model computes in; a rounded scale or zero-point
        # would change the weight, so these keep their dtype and follow to the device only.
        kept = {name: getattr(self, name) for name in ("scale", "zero")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, "
            f"symmetric={self.symmetric}, bias={self.bias is not None}, execution={self.execution}"
        )
