"""What one step of a training sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """Examples with prompt, pictures and answer, padded to one length.

    Attributes:
        inputs: keyword arguments of the model's ``forward`` as its processor makes them, without ``labels``.
        labels: int64 (B, T): the token itself where it is learned (an answer's, and the one that ends the turn), -100
            elsewhere. Not shifted: the logits at position t - 1 predict ``labels[:, t]``.
        visual: bool (B, T): positions of image features.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    visual: Tensor

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on a device."""
        return replace(
            self,
            inputs={name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            visual=self.visual.to(device, non_blocking=True),
        )
