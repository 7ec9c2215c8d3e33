"""What the readers share: checks on stored tensors, 32-bit words to codes, group sizes and the order of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bitquake.model_wrappers.quantizers.packing import row_bytes, unpack

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class PublishedCheckpointError(ValueError):
    """A published checkpoint that is not what it says, or that is in a format which is not read."""


def expect(
    tensors: Mapping[str, Tensor],
    leaf: str,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Tensor:
    """The tensor ``leaf`` of a module.

    Raises:
        PublishedCheckpointError: it is not there, or has another dtype or shape.
    """
    tensor = tensors.get(leaf)
    if tensor is None:
        raise PublishedCheckpointError(
            f"{leaf} is missing beside {', '.join(sorted(tensors)) or 'nothing'}; a shard may be lacking or cut short"
        )
    if tensor.dtype not in dtypes or (shapes is not None and tuple(tensor.shape) not in shapes):
        wanted = " or ".join(_short(dtype) for dtype in dtypes)
        wanted += "" if shapes is None else " of shape " + " or ".join(map(str, dict.fromkeys(shapes)))
        raise PublishedCheckpointError(
            f"{leaf} is {_short(tensor.dtype)} of shape {tuple(tensor.shape)}, expected {wanted}; the checkpoint does "
            "not belong to this config.json, or its quantization settings there are not true"
        )
    return tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def n_words(n_codes: int, bits: int) -> int:
    """32-bit words that hold ``n_codes`` codes without a gap."""
    return -(-n_codes * bits // 32)


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Codes of rows of 32-bit words: code i of a row occupies bits ``bits*i`` to ``bits*(i+1) - 1``, lowest first.

    It is the bit stream of ``packing`` in little-endian words. Codes of 3 bits may straddle two words.

    Args:
        words: int32, shape (rows, at least ``n_words(n, bits)``).

    Returns:
        uint8, shape (rows, n).
    """
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    needed = row_bytes(n, bits)
    if stream.shape[1] < needed:  # whole blocks of codes may end after the last word
        stream = functional.pad(stream, (0, needed - stream.shape[1]))
    return unpack(stream[:, :needed], bits, n)


def group_width(n_groups: int, in_features: int, declared: int | None) -> int:
    """Columns that share a scale, from the number of groups that are stored.

    Args:
        declared: what the config says; None or -1: nothing, or a scale for each row.

    Raises:
        PublishedCheckpointError: the two contradict each other.
    """
    if declared is not None and declared > 0:
        width = min(declared, in_features)
        if -(-in_features // width) == n_groups:
            return width
    if n_groups == 1:  # a scale for each row; also the way out of a group size that does not divide the row
        return in_features
    if (declared is None or declared <= 0) and in_features % n_groups == 0:
        return in_features // n_groups
    raise PublishedCheckpointError(
        f"there are scales for {n_groups} groups of a row of {in_features} weights, which does not fit the config's "
        f"group size {declared}; the checkpoint does not belong to this config.json"
    )


def column_order(g_idx: Tensor | None, in_features: int, group: int) -> Tensor | None:
    """``QuantizedWeight.order`` from the group of each feature; None where groups are consecutive features.

    All zeros (checkpoints of before act-order) and all -1 (not set) mean consecutive, too.

    Raises:
        PublishedCheckpointError: the features of some group are not as many as its columns.
    """
    if g_idx is None:
        return None
    groups = g_idx[:in_features].long()
    n_groups = -(-in_features // group)
    consecutive = torch.arange(in_features, device=groups.device) // group
    if len(groups) == in_features and (
        torch.equal(groups, consecutive) or (n_groups > 1 and bool((groups == 0).all())) or bool((groups == -1).all())
    ):
        return None
    sizes = torch.bincount(groups, minlength=n_groups) if len(groups) and int(groups.min()) >= 0 else groups
    if len(groups) != in_features or not torch.equal(sizes, torch.bincount(consecutive)):
        raise PublishedCheckpointError(
            f"g_idx of shape {tuple(g_idx.shape)} does not divide {in_features} input features into {n_groups} groups "
            f"of {group} (groups {int(groups.min())} to {int(groups.max())}); such a grouping cannot be represented"
        )
    return torch.argsort(groups, stable=True).to(torch.int32)


def relative_zero(zeros: Tensor, bits: int) -> Tensor | None:
    """Unsigned zero-points as int8 relative to the middle code; None when all of them are the middle code."""
    relative = zeros.to(torch.int16) - (1 << (bits - 1))
    return relative.to(torch.int8) if bool(relative.any()) else None
