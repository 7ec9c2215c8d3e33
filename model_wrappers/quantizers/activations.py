"""Dynamic quantization of activations: what W8A8 and W4A8 do to the input of a layer."""

from __future__ import annotations

from torch import Tensor


def quantize_tokens(x: Tensor, bits: int) -> Tensor:
    """Symmetric, one scale per token, rounded to the grid and back (papers.md section 4, MBQ's and SmoothQuant's).

    ``s = max(|x|) / (2^(b-1) - 1)`` over the last dimension, ``x^ = s * clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)``,
    in float32, rounded once to the dtype of ``x``.

    Args:
        x: shape (..., features), floating.
        bits: 2 to 8.
    """
    half = 1 << (bits - 1)
    values = x.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-5) / (half - 1)
    return ((values / scale).round_().clamp_(-half, half - 1) * scale).to(x.dtype)
