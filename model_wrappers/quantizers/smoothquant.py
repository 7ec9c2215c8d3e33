"""SmoothQuant (Xiao et al., 2023), the baseline of quantized activations: part of their range goes to the weights.

``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` for input feature j, with the largest magnitudes over all calibration
tokens and over all rows of the layers that share the input, each at least 1e-5; the layer computes
``Q_a(x / s) Q_w(W s)^T``. The published code scales what follows a norm only (queries, keys and values, the first layer
of the MLP), since it folds the scales into the norm; here every layer has them, output projections too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.scale_groups import ScaleGroup

_LEAST = 1e-5


class LargestMagnitude:
    """Running maximum of ``|x|`` over tokens; ``value`` is float32 on the CPU, None before the first token."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in inputs of shape (..., in_features)."""
        largest = x.reshape(-1, x.shape[-1]).float().abs().amax(dim=0).cpu()
        self.value = largest if self.value is None else torch.maximum(self.value, largest)


@torch.no_grad()
def smoothquant_scale(group: ScaleGroup, largest: Tensor, alpha: float) -> Tensor:
    """Input scales of a group, float32 on the CPU, shape (in_features,).

    A feature that was zero throughout keeps the scale 1: nothing is known of it, and 1e-5 to the power of alpha would
    blow up whatever comes when the model runs.

    Args:
        largest: of the group's inputs, shape (in_features,).
        alpha: 0 to 1.
    """
    weight = torch.stack([linear.weight.detach().float().abs().amax(dim=0).cpu() for linear in group.linears.values()])
    scale = largest.clamp(min=_LEAST).pow(alpha) / weight.amax(dim=0).clamp(min=_LEAST).pow(1.0 - alpha)
    return torch.where(largest > 0, scale, torch.ones_like(scale)).clamp(min=_LEAST)
