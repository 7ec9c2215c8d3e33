"""From the logits of each greedy step to the confidences of an answer (papers.md 1.4; names: ``bitquake.envelope``).

Everything is read from the raw logits in float32, one step at a time; only one number per step and sequence is kept
(and a few more at the first step), never a vocabulary-sized tensor.

What is counted, with ``p_1 .. p_n`` the probabilities of the answer tokens and ``p_end`` that of its end:

- The end of an answer is its end-of-sequence token, or the tokens that complete a stop string. Tokens after it are
  excluded from everything. An answer cut short by the token limit has no end.
- ``joint`` = p_1 * .. * p_n * p_end; ``joint_no_eos`` = p_1 * .. * p_n.
- ``geometric_mean`` = (p_1 * .. * p_n) ** (1 / n); ``minimum`` = min p_i; without the end.
- ``first_token`` and ``margin`` belong to the first generated token, which for an empty answer is its end.
- An empty answer has no ``joint_no_eos``, ``geometric_mean`` and ``minimum`` (None).
- ``options``: at the first generated position, the probability of an option letter is the sum over its one-token forms
  ("A" and " A"), divided by the same sum over all letters of the question.
- ``box_*``: see :func:`box_confidences`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor

from bitquake.tasks.scoring.grounding import find_box

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GreedySteps:
    """What the steps of one greedy batch gave; B sequences, T steps; natural logarithms.

    Attributes:
        log_prob: (B, T), log-probability of the greedy token; steps after a sequence's end are meaningless.
        finite: (B, T), False where the logits held a NaN or an infinity that leaves no distribution.
        entropy_first: (B,), entropy of the first step's distribution, in nats.
        margin_first: (B,), probability of the first greedy token minus that of the runner-up.
        tracked_log_prob: (B, K), log-probability of the tracked tokens at the first step.
    """

    log_prob: Floats
    finite: npt.NDArray[np.bool_]
    entropy_first: Floats
    margin_first: Floats
    tracked_log_prob: Floats


class GreedyRecorder(LogitsProcessor):  # type: ignore[misc]
    """Watches the raw logits of a greedy ``generate`` and changes nothing.

    It must be the only logits processor: those that a ``generation_config`` names run before the caller's own (see
    ``generation.greedy_config``, which removes them).

    Args:
        tracked: token ids whose log-probabilities are wanted at the first step.
    """

    def __init__(self, tracked: Sequence[int] = ()) -> None:
        self._tracked = list(tracked)
        self._log_probs: list[torch.Tensor] = []
        self._first: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores``: (B, V) raw logits of this step; returned unchanged."""
        logits = scores.float()
        log_total = logits.logsumexp(dim=-1)
        if self._first is None:
            log_probs = logits - log_total[:, None]
            # p log p at p = 0 is 0, not NaN: a model may forbid a token with -inf
            entropy = -(log_probs.exp() * log_probs.clamp_min(torch.finfo(torch.float32).min)).sum(dim=-1)
            top = log_probs.topk(2, dim=-1).values.exp()
            self._first = (entropy, top[:, 0] - top[:, 1], log_probs[:, self._tracked])
            self._log_probs.append(log_probs.amax(dim=-1))
        else:
            self._log_probs.append(logits.amax(dim=-1) - log_total)
        return scores

    def steps(self) -> GreedySteps:
        """Everything seen so far, on the host.

        Raises:
            RuntimeError: no step was seen.
        """
        if self._first is None:
            raise RuntimeError("no generation step was recorded: pass the recorder to generate(logits_processor=[...])")
        entropy, margin, tracked = (tensor.double().cpu().numpy() for tensor in self._first)
        log_prob = torch.stack(self._log_probs, dim=1).double().cpu().numpy()
        return GreedySteps(log_prob, np.isfinite(log_prob), entropy, margin, tracked)


@dataclass(frozen=True)
class Answer:
    """One generated answer, cut at its end.

    Attributes:
        text: decoded answer, without special tokens and without the stop string; not stripped.
        n_answer: number of its tokens.
        n_end: number of tokens that end it: 1 for an end-of-sequence token, those that complete a stop string, or 0.
        truncated: True when the token limit ended it.
        ends: (n_answer,) offset in ``text`` (before the cut at a stop string) at which each token's characters end;
            empty unless asked for.
    """

    text: str
    n_answer: int
    n_end: int
    truncated: bool
    ends: tuple[int, ...] = ()


def read_answer(
    tokenizer: Any, tokens: Sequence[int], eos: frozenset[int], stops: Sequence[str] = (), *, with_ends: bool = False
) -> Answer:
    """Find where an answer ends, and decode it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        tokens: generated token ids, without the prompt, with whatever padding follows.
        eos: end-of-sequence token ids.
        stops: stop strings; the earliest one in the text ends the answer.
        with_ends: fill ``Answer.ends``.
    """
    n = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
    generated = list(tokens[:n])
    text = _decode(tokenizer, generated)
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    ends = _token_ends(tokenizer, generated) if found or with_ends else ()
    if not found:
        ended = n < len(tokens)
        return Answer(text, n, int(ended), not ended, ends if with_ends else ())
    cut, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
    starts = (0, *ends)
    n_answer = sum(1 for start, end in zip(starts, ends, strict=False) if start < cut or end <= cut)
    n_stop = next(i for i, end in enumerate(ends, start=1) if end >= cut + len(stop))
    return Answer(text[:cut], n_answer, max(0, n_stop - n_answer), False, ends[:n_answer] if with_ends else ())


def answer_confidences(log_prob: Floats, n_answer: int, n_end: int, margin_first: float) -> dict[str, float | None]:
    """The confidences that every answer has; see the module's text for what each one counts.

    Args:
        log_prob: (>= n_answer + n_end,), natural log-probabilities of the generated tokens.
        n_answer: answer tokens.
        n_end: tokens that end the answer, right after them.
        margin_first: see :class:`GreedySteps`.
    """
    answer = log_prob[:n_answer]
    none = n_answer == 0
    return {
        "joint": _probability(log_prob[: n_answer + n_end].sum()),
        "joint_no_eos": None if none else _probability(answer.sum()),
        "geometric_mean": None if none else _probability(answer.mean()),
        "minimum": None if none else _probability(answer.min()),
        "first_token": _probability(log_prob[0]),
        "margin": min(1.0, max(0.0, margin_first)),
    }


def letter_forms(tokenizer: Any, letters: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """One-token forms of each option letter: as it stands, and after a space.

    Whether a chat template leads to "A" or " A" depends on the model, so both count. A letter that the tokenizer has no
    single token for gets an empty tuple.

    Raises:
        ValueError: two letters share a token (a vocabulary that folds case, say), so that they cannot be told apart.
    """
    forms: dict[str, tuple[int, ...]] = {}
    owner: dict[int, str] = {}
    for letter in letters:
        ids = set()
        for text in (letter, f" {letter}"):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            if len(encoded) == 1:
                ids.add(encoded[0])
        # the same letter inside byte-level (Ġ) and SentencePiece (▁) vocabularies, where encode adds or drops the space
        ids.update(tokenizer.convert_tokens_to_ids([letter, f"Ġ{letter}", f"▁{letter}"]))
        ids -= {None, tokenizer.unk_token_id}
        kept = tuple(sorted(i for i in ids if tokenizer.decode([i]).strip() == letter))
        for token in kept:
            if owner.setdefault(token, letter) != letter:
                raise ValueError(f"option letters {owner[token]!r} and {letter!r} are the same token, {token}")
        forms[letter] = kept
    return forms


def option_probabilities(log_prob: Mapping[int, float], forms: Mapping[str, Sequence[int]]) -> dict[str, float] | None:
    """Softmax over the option letters at the first answer position; they sum to 1.

    Args:
        log_prob: token id -> log-probability at that position.
        forms: letters of this question -> token ids (:func:`letter_forms`).

    Returns:
        None when there are no letters, a letter has no form, or none of them has any probability.
    """
    if not forms or not all(forms.values()):
        return None
    scores = np.array([np.logaddexp.reduce([log_prob[token] for token in ids]) for ids in forms.values()])
    total = np.logaddexp.reduce(scores)
    if not np.isfinite(total):
        return None
    return {letter: _probability(score - total) for letter, score in zip(forms, scores, strict=True)}


def chosen_letter(text: str, letters: Sequence[str]) -> str | None:
    """The first option letter that stands alone in the text ("B", "(B)", "Answer: B"), or None."""
    if not letters:
        return None
    found = re.search(rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, letters))})(?![A-Za-z0-9'])", text)
    return found.group(1) if found else None


def box_confidences(text: str, ends: Sequence[int], log_prob: Floats) -> dict[str, float | None]:
    """Confidences of the first box in a text, the one that is scored (``bitquake.tasks.scoring.grounding.find_box``).

    ``box_joint`` is the product over the tokens that hold any character of a coordinate, ``box_geometric_mean`` their
    geometric mean, and ``box_minimum`` the least of the four coordinates' own products: a coordinate of three digit
    tokens is one decision, not three.

    Args:
        text: the answer.
        ends: offset at which each token's characters end.
        log_prob: (>= len(ends),) log-probabilities of these tokens.
    """
    names = ("box_joint", "box_geometric_mean", "box_minimum")
    found = find_box(text)
    if found is None:
        return dict.fromkeys(names)
    starts = [0, *ends[:-1]]
    coordinates = [[i for i, at in enumerate(starts) if at < end and ends[i] > begin] for begin, end in found.spans]
    tokens = sorted({token for coordinate in coordinates for token in coordinate})
    values = (
        log_prob[tokens].sum(),
        log_prob[tokens].mean(),
        min(log_prob[coordinate].sum() for coordinate in coordinates),
    )
    return {name: _probability(value) for name, value in zip(names, values, strict=True)}


def _probability(log_prob: float) -> float:
    return min(1.0, math.exp(log_prob))  # float32 rounding can leave a log-probability a hair above 0


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _token_ends(tokenizer: Any, tokens: Sequence[int]) -> tuple[int, ...]:
    """Offsets by decoding ever longer prefixes: right for every tokenizer, and answers are short."""
    ends: list[int] = []
    for k in range(1, len(tokens) + 1):
        ends.append(max(len(_decode(tokenizer, tokens[:k])), ends[-1] if ends else 0))
    return tuple(ends)
