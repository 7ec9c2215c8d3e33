"""Uniform quantization of a whole tensor between its minimum and its maximum, as the mmq study has it.

``x' = (x - min) / (max - min)``, rounded to ``2^b - 1`` equal steps and scaled back; biases, too (papers.md 2.1; arXiv
2601.15287). One scale and one real zero-point serve the whole matrix, so an outlier anywhere coarsens everything.

The method is reproduced, the study's code is not (papers.md 2.3). There, the attention of BLIP-2's language model is
never quantized (it looks for ``qkv`` and ``projection`` in a module that has ``q_proj``, ``k_proj``, ``v_proj`` and
``out_proj``), nor is the Q-Former's MLP, while their size is counted as compressed: the sensitivity to attention that
was read off those rows is that of no quantization at all. And its bits per weight leave scales and zero-points out.
Here every Linear of the components is quantized, and the quant card lists each by its hash and its bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight


@torch.no_grad()
def uniform(weight: Tensor, bits: int) -> QuantizedWeight:
    """Quantize one weight matrix.

    Args:
        weight: shape (out_features, in_features), any floating dtype and device; solved on the CPU in float32.
        bits: 2 to 8.

    Returns:
        On the CPU; scale and zero (1, 1) float32, which costs eight bytes a matrix. A constant matrix is kept exactly.

    Raises:
        QuantizationError: bits out of range, or weights that are not finite.
    """
    if not 2 <= bits <= 8:
        raise QuantizationError(f"uniform: bits must be 2 to 8, got {bits}")
    values = weight.detach().to("cpu", torch.float32)
    low, high = values.aminmax()
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    scale = (high - low) / top
    if not scale.isfinite():
        bad = int((~values.isfinite()).sum())
        raise QuantizationError(f"{bad} weights are NaN or infinite; they range from {float(low)} to {float(high)}")
    if scale == 0.0:
        scale, codes, zero = torch.ones_like(low), torch.full_like(values, middle), -low
    else:
        # a weight is min + scale * code; the zero-point counts from the middle code
        zero = -low / scale - middle
        codes = ((values - low) / scale).round_().clamp_(0, top)
    return QuantizedWeight(codes.to(torch.uint8), scale.view(1, 1), zero.view(1, 1), bits, values.shape[1])


def uniform_bias(bias: Tensor, bits: int) -> Tensor:
    """A bias rounded to the same kind of grid and back: its own minimum, maximum, dtype and device.

    Args:
        bias: shape (out_features,).
        bits: 2 to 8.

    Raises:
        QuantizationError: as ``uniform``.
    """
    return uniform(bias[None], bits).dequantize(bias.dtype)[0].to(bias.device)
