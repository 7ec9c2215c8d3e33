"""Retrieval: candidate captions of one picture, each scored by the model that looks at it.

A generating model scores a caption by the summed log-probability of its tokens and of the token that ends the turn,
given picture and prompt (raw logits, log-softmax in float32): what greedy decoding would give the caption as ``joint``
if it answered with it. Picture and prompt are encoded once (:class:`CachedPrompt`); candidates run in chunks on copies
of that key-value cache, padded on the right, where causal attention keeps padding out of every score. A chunk of n
captions holds n copies of the prompt's cache and n x longest caption x vocabulary logits; the size of chunks is the
caller's. Where the cache is not proved to be exact, whole sequences run (:class:`RepeatedPrompt`).

BLIP-2's image-text matching head scores picture and caption together (:class:`MatchingPicture`).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .confidence import Floats

CACHED = frozenset(
    {"idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "paligemma", "blip-2"}
)
"""``model_type``s whose cached path equals full passes, which tests prove for each; any other runs full passes."""

_PROBE = "caption"


class CaptionError(ValueError):
    """A candidate that cannot be scored as a caption."""


@dataclass(frozen=True)
class AssistantTurn:
    """How a chat template writes an assistant's text.

    Attributes:
        before: blanks between the generation prompt and the text ("" or " ", say).
        end: id of the token that ends the turn; None for a model without end-of-sequence tokens.
    """

    before: str
    end: int | None


def assistant_turn(processor: Any, eos: frozenset[int]) -> AssistantTurn:
    """Read from a processor's template what stands around an assistant's text.

    Args:
        processor: its ``apply_chat_template`` is asked for a turn of one word.
        eos: the model's end-of-sequence ids. The end of a turn is the first of them that the template writes after the
            text, else the tokenizer's own, else the least.
    """
    before, after = "", ""
    question = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": _PROBE}]}
    try:
        prompt = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template([question, answer], tokenize=False)
    except Exception:  # a template without assistant's turns says nothing about them
        prompt = whole = ""
    if whole.startswith(prompt) and _PROBE in whole[len(prompt) :]:
        between, _, after = whole[len(prompt) :].partition(_PROBE)
        before = between if not between.strip() else ""
    written = [token for token in processor.tokenizer.encode(after, add_special_tokens=False) if token in eos]
    own = processor.tokenizer.eos_token_id
    end = written[0] if written else own if own in eos else min(eos, default=None)
    return AssistantTurn(before, end)


def caption_tokens(tokenizer: Any, prompt: str, captions: Sequence[str], turn: AssistantTurn) -> list[list[int]]:
    """Token ids of each caption as the assistant's answer to ``prompt``, its end included.

    A caption is tokenized where it will stand, because vocabularies mark the beginning of a word in different ways; its
    tokens are those after the prompt's. Where the two would merge into one token, it is tokenized by itself.

    Raises:
        CaptionError: a caption has no tokens, or holds a special one (an image's, say).
    """
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    joint = tokenizer([f"{prompt}{turn.before}{text.strip()}" for text in captions], add_special_tokens=False)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    found = []
    for text, ids in zip(captions, joint["input_ids"], strict=True):
        if ids[: len(head)] == head:
            tokens = ids[len(head) :]
        else:
            tokens = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        if not tokens:
            raise CaptionError(f"candidate {text!r} has no tokens")
        if odd := special.intersection(tokens):
            raise CaptionError(f"candidate {text!r} holds the special token {tokenizer.decode([min(odd)])!r}")
        found.append([*tokens, *(() if turn.end is None else (turn.end,))])
    return found


def continued(inputs: dict[str, Any], added: Tensor, model_type: str) -> dict[str, Any]:
    """A processor's inputs of unpadded prompts, gone on with an answer's tokens.

    Args:
        inputs: of n prompts.
        added: int64 (n, length), on the inputs' device.
        model_type: the model's.
    """
    batch = {**inputs, "input_ids": torch.cat([inputs["input_ids"], added], dim=1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "token_type_ids" in batch:
        types = batch["token_type_ids"]
        # in the suffix of PaliGemma (type 1) attention is causal; elsewhere text goes on as text
        last = torch.ones_like(types[:, :1]) if model_type == "paligemma" else types[:, -1:]
        batch["token_type_ids"] = torch.cat([types, last.expand_as(added)], dim=1)
    if "mm_token_type_ids" in batch:  # 0 is text
        types = batch["mm_token_type_ids"]
        batch["mm_token_type_ids"] = torch.cat([types, types.new_zeros(added.shape)], dim=1)
    return batch


class PromptEncoding(Protocol):
    """One prompt with its picture, ready to be continued.

    ``entropy``: of the first answer token's distribution, in nats; NaN before the first caption was scored.
    """

    entropy: float

    def log_probs(self, captions: Sequence[Sequence[int]]) -> list[Floats]:
        """Natural log-probability of each token of each caption: n arrays of shape (tokens of this caption,)."""


def encode_prompt(model: Any, inputs: Any, *, use_cache: bool) -> PromptEncoding:
    """Picture and prompt of one sample, encoded once where that is exact.

    Args:
        model: in evaluation mode; call this and ``log_probs`` without gradients.
        inputs: what the processor made of one sample (a batch of one, not padded), on the model's device.
        use_cache: False runs full passes.
    """
    inputs = {name: value for name, value in inputs.items() if name != "labels"}  # PaliGemma's processor adds them
    if use_cache and model.config.model_type in CACHED:
        return CachedPrompt(model, inputs)
    return RepeatedPrompt(model, inputs)


class CachedPrompt:
    """The prompt's key-value cache, of which every chunk of captions gets its copies."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        inner: Any = getattr(model, "model", None)
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = None  # the Qwen-VL kind keeps the last picture's: wrong for a prompt without one
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        # BLIP-2 itself wants a picture in every call; its language model goes on alone
        alone = model.config.model_type == "blip-2"
        self._decoder = model.language_model if alone else model
        self._device = self._decoder.get_input_embeddings().weight.device
        self._cache = (output.language_model_outputs if alone else output).past_key_values
        self._first = output.logits[0, -1].float().log_softmax(dim=-1)
        self.entropy = _entropy(self._first)

    def log_probs(self, captions: Sequence[Sequence[int]]) -> list[Floats]:
        """See :class:`PromptEncoding`."""
        rest = [caption[1:] for caption in captions]
        later = [self._first.new_empty(0) for _ in captions]
        if any(rest):
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(captions))
            # no attention mask: all of the prompt is seen, and padding comes after everything that is read
            output = self._decoder(input_ids=_padded(captions).to(self._device), past_key_values=cache, use_cache=True)
            later = [_gather(logits, tokens) for logits, tokens in zip(output.logits, rest, strict=True)]
        first = self._first[[caption[0] for caption in captions]]
        return _to_host([torch.cat([first[i : i + 1].to(row.device), row]) for i, row in enumerate(later)])


class RepeatedPrompt:
    """Every caption with a copy of the whole prompt and its picture, in full passes: slow, and right for any model."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self._model, self._inputs = model, inputs
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._model_type = model.config.model_type
        self.entropy = math.nan

    def log_probs(self, captions: Sequence[Sequence[int]]) -> list[Floats]:
        """See :class:`PromptEncoding`."""
        # every processor lays tensors out sample after sample, whatever their first axis counts
        batch = {
            name: value.repeat(len(captions), *(1 for _ in value.shape[1:])) if isinstance(value, Tensor) else value
            for name, value in self._inputs.items()
        }
        added = _padded(captions).to(batch["input_ids"].device)
        batch = continued(batch, added, self._model_type)
        read = added.shape[1] + 1  # the prompt's last position tells the first token
        keep = {"logits_to_keep": read} if self._keeps else {}
        logits = self._model(**batch, **keep, use_cache=False).logits[:, -read:]
        self.entropy = _entropy(logits[0, 0].float().log_softmax(dim=-1))
        return _to_host([_gather(row, caption) for row, caption in zip(logits, captions, strict=True)])


class MatchingPicture:
    """One picture before BLIP-2's image-text matching head (``Blip2ForImageTextRetrieval``).

    The vision tower runs once per picture; each caption then attends to it together with the query tokens, as in the
    model's own ``forward(use_image_text_matching_head=True)``.
    """

    def __init__(self, model: Any, pixel_values: Tensor) -> None:
        if len(pixel_values) != 1:
            raise ValueError(f"image-text matching is between one picture and a caption, got {len(pixel_values)}")
        self._model = model
        self._picture = model.vision_model(pixel_values=pixel_values).last_hidden_state
        self._seen = torch.ones(self._picture.shape[:2], dtype=torch.long, device=self._picture.device)

    def log_odds(self, captions: Sequence[Sequence[int]]) -> Floats:
        """Log-odds that each caption belongs to the picture, shape (n,), from its token ids, [CLS] and [SEP] included.

        Padding is on the right: the Q-Former counts positions from the first text token.
        """
        model, device = self._model, self._picture.device
        longest = max(len(caption) for caption in captions)
        ids = torch.tensor([[*caption, *[0] * (longest - len(caption))] for caption in captions], device=device)
        lengths = torch.tensor([len(caption) for caption in captions], device=device)
        queries = model.query_tokens.expand(len(captions), -1, -1)
        real = torch.arange(longest, device=device) < lengths[:, None]
        output = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([real.new_ones(queries.shape[:2]), real], dim=1).long(),
            encoder_hidden_states=self._picture.expand(len(captions), -1, -1),
            encoder_attention_mask=self._seen.expand(len(captions), -1),
        )
        matched = output.last_hidden_state[:, : queries.shape[1]].to(model.itm_head.weight.dtype)
        logits = model.itm_head(matched).float().mean(dim=1)
        return np.asarray((logits[:, 1] - logits[:, 0]).double().cpu().numpy(), dtype=np.float64)


def matching_tokens(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """Token ids of each caption for :class:`MatchingPicture`, with the tokenizer's own first and last token."""
    return [list(ids) for ids in tokenizer([text.strip() for text in captions])["input_ids"]]


def _padded(captions: Sequence[Sequence[int]]) -> Tensor:
    """(n, longest - 1) input ids: the last token is never an input, and padding (its repetition) is never read."""
    longest = max(len(caption) for caption in captions) - 1
    return torch.tensor(
        [[*caption[:-1], *[caption[-1]] * (longest - len(caption) + 1)] for caption in captions], dtype=torch.long
    )


def _gather(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities of ``tokens`` at the first positions of one row's ``logits`` (positions, V)."""
    read = logits[: len(tokens)].float()
    ids = torch.tensor(tokens, dtype=torch.long, device=read.device)
    return read.gather(1, ids[:, None])[:, 0] - read.logsumexp(dim=-1)


def _entropy(log_probs: Tensor) -> float:
    # p log p at p = 0 is 0, not NaN: a model may forbid a token with -inf
    return float(-(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum())


def _to_host(rows: list[Tensor]) -> list[Floats]:
    """Tensors of several lengths as arrays, in one transfer."""
    flat = torch.cat(rows).double().cpu().numpy()
    return [np.asarray(part) for part in np.split(flat, np.cumsum([len(row) for row in rows])[:-1])]
