"""Hidden states of the prompt, pooled as they come in the first forward of ``generate``: no second forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..components import ComponentMapError, component_map
from .features import Features

_NORMS = ("norm", "final_layer_norm")
"""What transformers calls the norm after a language model's last block."""


class CaptureError(ValueError):
    """A model whose hidden states cannot be captured."""


class Positions(NamedTuple):
    """Where in a batch's prompts the tokens are: each bool (B, T)."""

    image: Tensor
    question: Tensor


class PrefillStates:
    """The states of one model's prompts: of its last layer, before its final norm.

    Raises:
        CaptureError: the model has no such norm, or an encoder reads its prompt.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norm = final_norm(model)
        config: Any = model.config
        named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        ids = {token for token in named if token is not None}
        if not ids:
            raise CaptureError(
                f"features=true: the configuration of {type(model).__name__} names no image token (image_token_id), so "
                "that the states of a picture cannot be told from those of the text"
            )
        self.image_tokens: frozenset[int] = frozenset(ids)
        weight: Any = self._norm.weight
        self.hidden_size = len(weight)

    def image_positions(self, input_ids: Tensor) -> Tensor:
        """bool (B, T), from the processor's input ids, placeholders expanded."""
        return torch.isin(input_ids, torch.tensor(sorted(self.image_tokens), device=input_ids.device))

    @contextmanager
    def watching(self, positions: Positions) -> Iterator[list[Features]]:
        """Within the block, the first forward of the model puts its pooled states into the list; B rows, float32.

        Prompts are padded on the left. Padding belongs to no position.
        """
        found: list[Features] = []

        def pool(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if found:
                return
            (states,) = arguments
            if states.shape[:2] != positions.image.shape:
                raise CaptureError(
                    f"features=true: the language model sees {tuple(states.shape[:2])} positions, the processor made "
                    f"{tuple(positions.image.shape)}: its image tokens are not laid out one for one"
                )
            has_image = positions.image.any(dim=1)
            pooled = [_largest(states, where.to(states.device)) for where in positions]
            image, question, first = (one.float().cpu().numpy() for one in (*pooled, states[:, -1]))
            found.append(Features(image, question, first, has_image.cpu().numpy()))

        handle = self._norm.register_forward_pre_hook(pool)
        try:
            yield found
        finally:
            handle.remove()


def _largest(states: Tensor, where: Tensor) -> Tensor:
    """(B, T, d), (B, T) -> (B, d): maximum over the positions, zero where there are none."""
    largest = states.masked_fill(~where[..., None], float("-inf")).amax(dim=1)
    return torch.where(where.any(dim=1)[:, None], largest, 0)


def final_norm(model: Any) -> nn.Module:
    """The norm after the last block of the language model, by the component map, or by ``get_decoder`` without one.

    Raises:
        CaptureError: there is none.
    """
    if getattr(getattr(model.config, "text_config", model.config), "is_encoder_decoder", False):
        raise CaptureError(
            f"features=true: the language model of {type(model).__name__} reads its prompt with an encoder of its own; "
            "features are of decoder-only language models"
        )
    try:
        parts = component_map(model)
    except ComponentMapError:
        owners = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    else:
        stacks = [stack.path for part in parts.parts if part.component == "language" for stack in part.stacks]
        owners = [model.get_submodule(path.rpartition(".")[0]) for path in stacks if path in parts.depths]
    found = [norm for owner in owners for name in _NORMS if isinstance(norm := getattr(owner, name, None), nn.Module)]
    if len(found) != 1:
        raise CaptureError(
            f"features=true: {type(model).__name__} has {len(found)} norms after the last block of its language model "
            f"({' or '.join(_NORMS)} beside its blocks), where one is expected"
        )
    return found[0]


class Tokens(NamedTuple):
    """A prompt's tokens before its image placeholders were expanded: ids, and (begin, end) of each in the prompt."""

    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]


def question_mask(
    expanded: Sequence[int], prompt: Tokens | None, question: Sequence[int], text: Sequence[bool]
) -> list[bool]:
    """Which of a prompt's tokens are the question's.

    Expanding a placeholder puts image tokens, and tokens that frame them, where it stood; all other tokens stay. So the
    question's run of tokens is looked for from the end: after it comes in both what came after it.

    Args:
        expanded: (T,) ids that the model is given.
        prompt: the tokens of the templated prompt; None without a tokenizer that tells where they are from.
        question: begin and end of the question in the prompt; empty where it cannot be told.
        text: (T,) tokens to take where the question's cannot be told: all of the prompt's text.
    """
    if prompt is None or not question:
        return list(text)
    begin, end = question
    inside = [at for at, (a, b) in enumerate(prompt.spans) if a < end and b > begin and b > a]
    if not inside:
        return list(text)
    run = list(prompt.ids[inside[0] : inside[-1] + 1])
    from_end = sum(at >= inside[0] for at in _starts(list(prompt.ids), run))
    places = _starts(list(expanded), run)
    if len(places) < from_end:
        return list(text)
    start = places[-from_end]
    return [start <= at < start + len(run) for at in range(len(expanded))]


def _starts(ids: list[int], run: list[int]) -> list[int]:
    return [at for at in range(len(ids) - len(run) + 1) if ids[at] == run[0] and ids[at : at + len(run)] == run]
