"""GRACE's sidecar ``qat_quantized_weights.bin``: the learned scales of a checkpoint whose BF16 weights lie on a grid.

For each quantized Linear it holds ``{name}.weight`` (on the grid), ``{name}.log_scale`` (out * groups numbers, row by
row) and perhaps ``{name}.bias``. ``W[o, f] = exp(log_scale[o, g]) * q[o, f]`` with q in [-2^(b-1), 2^(b-1) - 1].
It is a pickle, and is read as tensors only (``weights_only``). GRACE's packed checkpoints are in AutoAWQ's layout.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.published.stored import FLOATS, PublishedCheckpointError, expect
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

SIDECAR = "qat_quantized_weights.bin"
LEAVES = ("weight", "log_scale")
_BITS = (4, 8)


def read_sidecar(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Module name -> its ``LEAVES`` (mapped, not in memory).

    Raises:
        PublishedCheckpointError: the file is cut short, holds anything but tensors, or no scale.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise PublishedCheckpointError(
            f"{path}: is no whole file of plain tensors ({str(error).splitlines()[0][:160]}); download it again. "
            "Anything but tensors in a pickle is not loaded"
        ) from error
    modules: dict[str, dict[str, Tensor]] = {}
    if isinstance(stored, Mapping):
        names = [key.removesuffix(".log_scale") for key in stored if str(key).endswith(".log_scale")]
        modules = {
            name: {leaf: stored[f"{name}.{leaf}"] for leaf in LEAVES if f"{name}.{leaf}" in stored} for name in names
        }
    if not modules:
        raise PublishedCheckpointError(f"{path}: holds no log_scale, so it is no sidecar of GRACE")
    return modules


def read_grace(tensors: Mapping[str, Tensor], *, in_features: int, out_features: int) -> QuantizedWeight:
    """One module's weight: 4 bits where its codes fit, else 8; symmetric, scales in float32.

    Raises:
        PublishedCheckpointError: a tensor is missing or of another shape, or the weight is not on the grid.
    """
    weight = expect(tensors, "weight", FLOATS, [(out_features, in_features)])
    log_scale = expect(tensors, "log_scale", FLOATS)
    n_groups, rest = divmod(log_scale.numel(), out_features)
    if rest or not n_groups or in_features % n_groups:
        raise PublishedCheckpointError(
            f"log_scale has {log_scale.numel()} numbers, which do not divide a weight of {out_features} rows and "
            f"{in_features} columns into equal groups"
        )
    group = in_features // n_groups
    scale = log_scale.reshape(out_features, n_groups).float().exp()
    steps = weight.float().reshape(out_features, n_groups, group) / scale.unsqueeze(-1)
    codes = steps.round()
    off = (steps - codes).abs() - codes.abs() / 128  # bfloat16 keeps eight bits of a weight
    half = next(
        (1 << (bits - 1) for bits in _BITS if -(1 << (bits - 1)) <= codes.min() and codes.max() < 1 << (bits - 1)), 0
    )
    if not half or not bool((off < 0.02).all()):
        raise PublishedCheckpointError(
            f"weight is not on the grid of its log_scale: codes from {float(codes.min()):g} to {float(codes.max()):g}, "
            f"up to {float((steps - codes).abs().max()):.2f} steps off"
        )
    return QuantizedWeight(
        codes=(codes + half).reshape(out_features, in_features).to(torch.uint8), scale=scale, zero=None,
        bits=half.bit_length(), group_size=group,
    )  # fmt: skip
