"""GPTQ's layouts v1 (AutoGPTQ, optimum, GPTQModel's default) and v2 (``checkpoint_format: gptq_v2``).

``qweight`` int32 (in*bits/32, out): the codes of an output run down its column, lowest bits first, those of 3 bits
across words (32 codes in three). ``qzeros`` int32 (groups, out*bits/32): likewise along a row. ``scales`` (groups,
out). ``g_idx`` (in,): the group of each feature. ``W[o, f] = scales[g_idx[f], o] * (q[f, o] - zero[g_idx[f], o])``.

v1 stores zero-points minus one. For a zero-point of 0 that is no code: GPTQModel, which writes and reads most of
today's checkpoints, subtracts one in every field of a 32-bit word with ordinary integer arithmetic, so the borrow goes
into the next field, and adds it back in the same way; for 3 bits it wraps around within each field. Both are undone
here as they were done. AutoGPTQ wrote such words wrong (later fields are all ones), which cannot be undone: see
``wrapped_zeros``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.published.stored import (
    FLOATS,
    PublishedCheckpointError,
    column_order,
    expect,
    group_width,
    n_words,
    relative_zero,
    unpack_words,
)
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)


def read_gptq(
    tensors: Mapping[str, Tensor],
    *,
    in_features: int,
    out_features: int,
    bits: int | None,
    group_size: int | None,
    version: Literal[1, 2],
) -> QuantizedWeight:
    """One module's weight; symmetric where every zero-point is the middle code, ordered where ``g_idx`` says so.

    Args:
        tensors: ``LEAVES`` of the module; ``g_idx`` may be absent.
        in_features, out_features: of the Linear that the module is in the model.
        bits: as the config says; None where it may differ by module, then the shape of ``qweight`` decides.
        group_size: as the config says; None or -1: what the scales say.
        version: of the layout.

    Raises:
        PublishedCheckpointError: a tensor is missing or of another shape or dtype, bits are not 2, 3, 4 or 8, or
            ``g_idx`` makes groups of unequal size.
    """
    n_groups = len(expect(tensors, "scales", FLOATS))
    group = group_width(n_groups, in_features, group_size)
    padded = n_groups * group  # GPTQModel fills a short last group up
    rows = len(expect(tensors, "qweight", [torch.int32]))
    fitting = [b for b in BITS if rows in (n_words(in_features, b), n_words(padded, b))]
    if (bits is not None and bits not in fitting) or not fitting:
        raise PublishedCheckpointError(
            f"qweight has {rows} rows for {in_features} input features, which is {rows * 32 / in_features:g} bits; "
            f"the config says {bits or 'nothing'}, and GPTQ layouts of {', '.join(map(str, BITS))} bits are read"
        )
    width = bits if bits is not None else fitting[0]
    qweight = expect(tensors, "qweight", [torch.int32], [(rows, out_features)])
    scales = expect(tensors, "scales", FLOATS, [(n_groups, out_features)])
    qzeros = expect(tensors, "qzeros", [torch.int32], [(n_groups, n_words(out_features, width))])
    order = column_order(tensors.get("g_idx"), in_features, group)
    codes = unpack_words(qweight.t(), width, in_features)
    zero = relative_zero(_zeros(qzeros, width, out_features, version), width)
    return QuantizedWeight(
        codes=codes.contiguous() if order is None else codes[:, order.long()],
        scale=scales.t().contiguous(),
        zero=None if zero is None else zero.t().contiguous(),
        bits=width,
        group_size=group,
        order=order,
    )


def wrapped_zeros(qzeros: Tensor, bits: int, out_features: int) -> int:
    """How many stored zero-points of a v1 module are all ones: those meant as 0, where packers disagree."""
    return int((unpack_words(qzeros, bits, out_features) == (1 << bits) - 1).sum())


def _zeros(qzeros: Tensor, bits: int, out_features: int, version: Literal[1, 2]) -> Tensor:
    if version == 2:
        return unpack_words(qzeros, bits, out_features)
    if bits == 3:
        return (unpack_words(qzeros, bits, out_features) + 1) & 7
    ones = sum(1 << i for i in range(0, 32, bits))
    words = (qzeros.long() + ones) & 0xFFFFFFFF
    return unpack_words(((words ^ (1 << 31)) - (1 << 31)).to(torch.int32), bits, out_features)
