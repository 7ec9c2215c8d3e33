"""Source ``self``: a model's own captions, greedily decoded, of pictures that nobody has described."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..confidence import read_answer
from ..generation import eos_ids, greedy_config
from ..quantizers.hashing import tensor_hash
from .encoding import Encoder
from .sample import CalibrationSample


class Captioner:
    """Lets a model answer the prompts of samples.

    Args:
        model: at full precision: what it says is what its quantized self is calibrated on.
        tokenizer: its own.
        max_new_tokens: of a caption.
    """

    def __init__(self, model: Any, tokenizer: Any, encoder: Encoder, max_new_tokens: int) -> None:
        self._model, self._tokenizer, self._encoder = model, tokenizer, encoder
        self._config = greedy_config(model, tokenizer)
        self._config.max_new_tokens = max_new_tokens

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of all that decides the captions: weights, dtype, device, length."""
        return {
            "weights": weights_hash(self._model),
            "dtype": str(self._model.dtype),
            "device": self._device.type,
            "max_new_tokens": self._config.max_new_tokens,
        }

    def caption(self, sample: CalibrationSample) -> CalibrationSample:
        """The sample with what the model says as its answer; without one where it says nothing."""
        inputs = {
            name: value.to(self._device, self._model.dtype if value.is_floating_point() else None)
            for name, value in self._encoder.encode(replace(sample, answer=None)).inputs.items()
        }
        # no inference mode: tensors that a module keeps from it would make a later backward pass fail
        with torch.no_grad(), _greedy(self._model, self._config):
            output = self._model.generate(**inputs, generation_config=copy.copy(self._config))
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        said = read_answer(self._tokenizer, tokens, eos_ids(self._config), ()).text.strip()
        return replace(sample, answer=said or None)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device


@contextlib.contextmanager
def _greedy(model: Any, config: Any) -> Iterator[None]:
    """``generate`` fills the gaps of its config from the model's own; what it leaves in the model is taken back."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own
        inner: Any = getattr(model, "model", None)
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = None  # the Qwen-VL kind keeps the last picture's


def weights_hash(model: nn.Module) -> str:
    """blake2 hex over all parameters in name order."""
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        total.update(f"{name} {tensor_hash(parameter)}\n".encode())
    return total.hexdigest()
