"""``QuantizedWeight``: one weight matrix on its grid, as every method makes it and every checkpoint reader finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

SCALE_DTYPE = torch.float16
"""Scales that we choose are float16 whatever the model's dtype: at 8 bits a bfloat16 scale (8 significant bits) moves
the outer codes by up to half a step, a float16 one (11 bits) by a sixteenth; float32 would cost another 0.25 bits per
weight at group size 64. Zero-points are kept relative to the middle code, where float16 is finest."""

_CHUNK = 1 << 20  # weights de-quantized at a time: bounds the float32 temporary


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes of a weight ``W`` of shape (out_features, in_features), and what turns them back into numbers.

    With ``g = j // group_size`` and the stored column j holding feature ``f = order[j]``::

        W[:, f] = scale[:, g] * (codes[:, j] - 2**(bits - 1) - zero[:, g]) / input_scale[f]

    Attributes:
        codes: uint8, shape (out, in), each below ``2**bits``; stored columns, not packed.
        scale: shape (out, groups), or (1, 1) per tensor; float16, bfloat16 or float32.
        zero: shape of ``scale``, relative to the middle code; int8 or floating; None for symmetric codes.
        bits: 2 to 8.
        group_size: stored columns that share a scale; the last group of a row may be shorter; ``in_features`` per
            channel and per tensor.
        input_scale: float32, shape (in,), by feature: the grid approximates ``W * input_scale`` (AWQ, SmoothQuant).
        order: int32, shape (in,): feature of each stored column (GPTQ's act-order); None: as they are.

    Raises:
        ValueError: shapes that do not fit together.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    input_scale: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        if not 2 <= self.bits <= 8 or self.codes.dtype != torch.uint8:
            raise ValueError(
                f"QuantizedWeight: expected uint8 codes of 2 to 8 bits, got {self.codes.dtype}, {self.bits}"
            )
        if not 1 <= self.group_size <= in_features:
            raise ValueError(f"QuantizedWeight: group_size must be 1 to {in_features} (a row), got {self.group_size}")
        per_group = (out_features, -(-in_features // self.group_size))
        if tuple(self.scale.shape) not in {per_group, (1, 1)}:
            raise ValueError(
                f"QuantizedWeight: scale has shape {tuple(self.scale.shape)}, expected {per_group} or (1, 1)"
            )
        if self.zero is not None and self.zero.shape != self.scale.shape:
            raise ValueError(
                f"QuantizedWeight: zero has shape {tuple(self.zero.shape)}, scale {tuple(self.scale.shape)}"
            )
        for name in ("input_scale", "order"):
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != (in_features,):
                raise ValueError(f"QuantizedWeight: {name} has shape {tuple(tensor.shape)}, expected ({in_features},)")

    @property
    def per_tensor(self) -> bool:
        """One scale for the whole matrix. (A matrix of one row and one group is not told apart, nor need it be.)"""
        return self.scale.shape == (1, 1)

    def dequantize(self, dtype: torch.dtype, *, divided: bool = True) -> Tensor:
        """The weight in feature order, computed in float32 and rounded once to ``dtype``; shape (out, in).

        ``divided``: without ``input_scale``; False leaves it in (what scaled activations are multiplied by).
        """
        return dequantize(
            lambda rows: self.codes[rows], tuple(self.codes.shape), self.scale, self.zero, bits=self.bits,
            group_size=self.group_size, order=self.order, dtype=dtype,
            input_scale=self.input_scale if divided else None,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self, codes=self.codes.to(device), scale=self.scale.to(device), zero=moved(self.zero),
            input_scale=moved(self.input_scale), order=moved(self.order),
        )  # fmt: skip


def dequantize(
    rows_of_codes: Callable[[slice], Tensor],
    shape: tuple[int, ...],
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    input_scale: Tensor | None,
    order: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The formula of ``QuantizedWeight``, some rows at a time; ``rows_of_codes`` gives their unpacked codes.

    Each operation is rounded by itself as IEEE says, so every device gives the same bits. ``input_scale`` None leaves
    the weight as it stands on the grid. Returns a tensor of ``shape`` (out, in) on the device of ``scale``.
    """
    out_features, in_features = shape
    n_groups = -(-in_features // group_size)
    fill = n_groups * group_size - in_features
    per_tensor = scale.shape == (1, 1)
    columns = None if order is None else torch.argsort(order.long())
    weight = torch.empty((out_features, in_features), dtype=dtype, device=scale.device)
    step = max(1, _CHUNK // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        part = slice(None) if per_tensor else rows
        values = rows_of_codes(rows).float()
        if fill:
            values = functional.pad(values, (0, fill))
        values = values.reshape(-1, n_groups, group_size)
        values -= float(1 << (bits - 1))
        if zero is not None:
            values -= zero[part].float().unsqueeze(-1)
        values *= scale[part].float().unsqueeze(-1)
        values = values.reshape(-1, n_groups * group_size)[:, :in_features]
        if columns is not None:
            values = values[:, columns]
        if input_scale is not None:
            values = values / input_scale
        weight[rows] = values.to(dtype)
    return weight
