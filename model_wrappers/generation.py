"""Greedy decoding, and nothing else: what a task may ask of it, and the configuration that a model is run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger as eval_logger
from transformers import GenerationConfig, StoppingCriteria

DEFAULT_MAX_NEW_TOKENS = 1024
"""Token limit where neither the task nor the user names one."""

_LIMITS = ("max_new_tokens", "max_gen_toks")
_MUST_BE_1 = ("num_beams", "n", "best_of", "num_return_sequences", "repetition_penalty")
# checked elsewhere, or without effect on greedy decoding
_HARMLESS = ("do_sample", "temperature", "top_p", "top_k", "until", "use_cache", "return_dict_in_generate")


@dataclass(frozen=True)
class GenerationRequest:
    """What a task asks of the decoder: the token limit, and strings that end an answer."""

    max_new_tokens: int
    until: tuple[str, ...] = ()

    @classmethod
    def from_task(cls, kwargs: Mapping[str, Any], task: str, max_new_tokens: int | None = None) -> GenerationRequest:
        """Read a task's ``generation_kwargs``.

        Args:
            kwargs: the mapping as lmms-eval hands it over.
            task: its name, for errors.
            max_new_tokens: the user's limit, which goes before the task's.

        Raises:
            ValueError: the task asks for sampling, beams, several answers, penalties (confidences of the greedy answer
                would not belong to such an answer), or a limit below 1.
        """
        where = f"task {task!r}: generation_kwargs"
        temperature = kwargs.get("temperature") or 0
        if kwargs.get("do_sample") or (kwargs.get("do_sample") is None and temperature > 0):
            raise ValueError(
                f"{where}: bitquake_hf decodes greedily, got do_sample={kwargs.get('do_sample')!r}, "
                f"temperature={kwargs.get('temperature')!r}. Set do_sample: false and temperature: 0 "
                "(on the command line: --gen_kwargs do_sample=False,temperature=0), or use another model class."
            )
        for key in _MUST_BE_1:
            if (value := kwargs.get(key)) is not None and float(value) != 1:
                raise ValueError(f"{where}: bitquake_hf decodes greedily with {key}=1, got {value!r}. Remove it.")
        limits = [kwargs[key] for key in _LIMITS if kwargs.get(key) is not None]
        limit = int(max_new_tokens or (limits[0] if limits else DEFAULT_MAX_NEW_TOKENS))
        if limit < 1:
            raise ValueError(f"{where}: {_LIMITS[0]} must be at least 1, got {limit}.")
        until = kwargs.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"{where}: until must be a string or a list of strings, got {until!r}.")
        return cls(limit, tuple(stop for stop in stops if stop))

    @staticmethod
    def unknown_keys(kwargs: Mapping[str, Any]) -> list[str]:
        """Keys that have no meaning here (``image_aspect_ratio``, say) and are left out."""
        return sorted(set(kwargs) - set(_LIMITS) - set(_MUST_BE_1) - set(_HARMLESS))


def greedy_config(model: Any, tokenizer: Any) -> GenerationConfig:
    """A generation config with the model's special token ids and nothing that changes a logit.

    Hub checkpoints ship sampling defaults, repetition penalties and forced tokens in ``generation_config.json``;
    ``generate`` fills every value that the caller leaves out from there, and applies those processors before the
    caller's own. So the model's config is replaced as a whole. What is thereby dropped is logged.
    """
    shipped = model.generation_config
    eos = shipped.eos_token_id if shipped.eos_token_id is not None else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    config = GenerationConfig(
        bos_token_id=shipped.bos_token_id,
        eos_token_id=eos,
        pad_token_id=pad,
        do_sample=False,
        num_beams=1,
    )
    kept = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length", "max_new_tokens"}
    dropped = {
        key: value
        for key, value in shipped.to_diff_dict().items()
        if key not in kept and not key.startswith("_") and value != getattr(config, key, None)
    }
    if dropped:
        eval_logger.info(f"bitquake_hf: greedy decoding from raw logits; generation_config entries left out: {dropped}")
    return config


def eos_ids(config: GenerationConfig) -> frozenset[int]:
    """End-of-sequence token ids of a generation config."""
    eos = config.eos_token_id
    return frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])


class StopOnText(StoppingCriteria):  # type: ignore[misc]
    """Ends a sequence once one of the stop strings stands in what it generated.

    Only the last tokens are decoded each step: enough for the longest stop string even when each token holds one byte.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stops, self._prompt_length = tokenizer, tuple(stops), prompt_length
        self._tail = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tail = input_ids[:, max(self._prompt_length, input_ids.shape[1] - self._tail) :]
        texts = self._tokenizer.batch_decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)
