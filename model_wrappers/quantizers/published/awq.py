"""AutoAWQ's GEMM layout (AutoAWQ, GPTQModel's ``awq`` with format ``gemm``, GRACE's packed checkpoints).

``qweight`` int32 (in, out/8) and ``qzeros`` int32 (groups, out/8): each word holds eight outputs, nibble i (lowest
first) that of output ``8*word + (0, 2, 4, 6, 1, 3, 5, 7)[i]``. ``scales`` (groups, out).
``W[o, f] = scales[f // group, o] * (q[f, o] - zero[f // group, o])``, all integers 0 to 15.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.published.stored import (
    FLOATS,
    PublishedCheckpointError,
    expect,
    group_width,
    n_words,
    relative_zero,
    unpack_words,
)
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

LEAVES = ("qweight", "qzeros", "scales")
BITS = 4
_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # inverse of the order above


def read_awq(
    tensors: Mapping[str, Tensor], *, in_features: int, out_features: int, group_size: int | None
) -> QuantizedWeight:
    """One module's weight; symmetric where every zero-point is 8.

    Args:
        tensors: ``LEAVES`` of the module.
        in_features, out_features: of the Linear that the module is in the model.
        group_size: as the config says; None or -1: what the scales say.

    Raises:
        PublishedCheckpointError: a tensor is missing or of another shape or dtype.
    """
    if out_features % 8:
        raise PublishedCheckpointError(f"AWQ's GEMM layout needs outputs in eights, and this Linear has {out_features}")
    words = n_words(out_features, BITS)
    qweight = tensors.get("qweight")
    gemv = (out_features, n_words(in_features, BITS))
    if qweight is not None and tuple(qweight.shape) == gemv != (in_features, words):
        raise PublishedCheckpointError(
            f"qweight of shape {tuple(qweight.shape)} is in AWQ's GEMV layout, which is not read; use a GEMM checkpoint"
        )
    qweight = expect(tensors, "qweight", [torch.int32], [(in_features, words)])
    n_groups = len(expect(tensors, "scales", FLOATS))
    group = group_width(n_groups, in_features, group_size)
    scales = expect(tensors, "scales", FLOATS, [(n_groups, out_features)])
    zeros = _outputs(expect(tensors, "qzeros", [torch.int32], [(n_groups, words)]), out_features)
    zero = relative_zero(zeros, BITS)
    return QuantizedWeight(
        codes=_outputs(qweight, out_features).t().contiguous(),
        scale=scales.t().contiguous(),
        zero=None if zero is None else zero.t().contiguous(),
        bits=BITS,
        group_size=group,
    )


def _outputs(words: Tensor, out_features: int) -> Tensor:
    """Codes (rows, out), outputs in their order."""
    nibbles = unpack_words(words, BITS, out_features)
    return nibbles.reshape(len(words), -1, 8)[..., list(_NIBBLE_OF_OUTPUT)].reshape(len(words), out_features)
