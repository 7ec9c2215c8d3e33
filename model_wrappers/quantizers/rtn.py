"""Round to nearest (papers.md section 4): the baseline that every other method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.weight import SCALE_DTYPE

_LEAST_RANGE = 1e-5  # as in AutoAWQ: keeps the scale of a constant group above zero


def rtn(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row of ``groups`` by itself.

    Asymmetric: ``s = max(w_max - w_min, 1e-5) / (2^b - 1)``, ``z = clamp(-round(w_min / s), 0, 2^b - 1)``,
    ``code = clamp(round(w / s) + z, 0, 2^b - 1)``, the range widened to hold 0 (AutoAWQ's is not, so that it clips a
    group of one sign towards 0). Symmetric: ``s = max(|w|) / (2^(b-1) - 1)`` and codes around ``2^(b-1)``. The scale
    is rounded to its stored float16 first, so that the codes are the nearest to what is stored.

    Args:
        groups: shape (n, group), float32, finite.
        bits: 2 to 8.

    Returns:
        codes (n, group) uint8, scale (n, 1) float16, zero (n, 1) int8 relative to the middle code, or None when
        symmetric.
    """
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        stored = (groups.abs().amax(1, keepdim=True).clamp(min=_LEAST_RANGE) / (half - 1)).to(SCALE_DTYPE)
        codes = (groups / stored.float()).round_().clamp_(-half, half - 1) + half
        return codes.to(torch.uint8), stored, None
    # aminmax takes eight times as long
    low, high = groups.amin(1, keepdim=True).clamp_(max=0), groups.amax(1, keepdim=True).clamp_(min=0)
    stored = ((high - low).clamp(min=_LEAST_RANGE) / top).to(SCALE_DTYPE)
    scale = stored.float()
    zero = (-(low / scale).round()).clamp_(0, top)
    codes = (groups / scale).round_().add_(zero).clamp_(0, top)
    return codes.to(torch.uint8), stored, (zero - half).to(torch.int8)
