"""Confidences against plain arithmetic on full distributions, and answer ends on real tokenizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bitquake.envelope import CONFIDENCES
from bitquake.model_wrappers.confidence import (
    GreedyRecorder,
    answer_confidences,
    box_confidences,
    chosen_letter,
    letter_forms,
    option_probabilities,
    read_answer,
)
from bitquake.tasks.scoring.grounding import find_box


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen and Llama-3 have: a space belongs to the next token, a character may be many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["the answer is A or B", " A B C D E", "A B C D E", "[12, 345, 67, 890]", "a red circle\n\nQuestion:"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>", "<box>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=["<box>"])


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Metaspace BPE as Llama-2 has: the first word gets a space in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<eos>"])
    tokenizer.train_from_iterator(["A B C D E (A) (B) (C) (D) (E)", "the answer is A or B"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_recorder_equals_softmax_by_hand() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(3, 11) * 4 for _ in range(5)]
    logits[0][1, 4] = -math.inf  # a forbidden token must not turn the entropy into NaN
    recorder = GreedyRecorder(tracked=[2, 7])
    for step in logits:
        before = step.clone()
        assert recorder(torch.zeros(3, 1), step) is step
        assert torch.equal(step, before)
    steps = recorder.steps()
    for t, step in enumerate(logits):
        for b in range(3):
            weights = [math.exp(x) for x in step[b].tolist()]
            p = [w / sum(weights) for w in weights]
            assert math.exp(steps.log_prob[b, t]) == pytest.approx(max(p), rel=1e-5)
            if t == 0:
                ranked = sorted(p, reverse=True)
                assert steps.margin_first[b] == pytest.approx(ranked[0] - ranked[1], abs=1e-6)
                assert steps.entropy_first[b] == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), rel=1e-5)
                assert np.exp(steps.tracked_log_prob[b]) == pytest.approx([p[2], p[7]], rel=1e-5)


def test_recorder_keeps_no_vocabulary_sized_tensor() -> None:
    recorder = GreedyRecorder()
    for _ in range(3):
        recorder(torch.zeros(2, 1), torch.randn(2, 1000))
    held = [t for t in [*recorder._log_probs, *(recorder._first or ())] if t.untyped_storage().nbytes() >= 4000]
    assert held == []


def test_recorder_marks_steps_without_a_distribution() -> None:
    recorder = GreedyRecorder()
    recorder(torch.zeros(2, 1), torch.randn(2, 6))
    broken = torch.randn(2, 6)
    broken[1, 3] = math.nan
    recorder(torch.zeros(2, 1), broken)
    assert recorder.steps().finite.tolist() == [[True, True], [True, False]]
    with pytest.raises(RuntimeError, match="no generation step"):
        GreedyRecorder().steps()


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8),
    st.floats(1e-6, 1.0),
    st.booleans(),
)
def test_answer_confidences_are_what_their_names_say(p: list[float], p_end: float, ended: bool) -> None:
    log_prob = np.log([*p, p_end, 0.3])  # the last one lies after the end and must not count
    got = answer_confidences(log_prob, len(p), int(ended), 0.25)
    assert set(got) == set(CONFIDENCES)
    product = math.prod(p)
    assert got["joint"] == pytest.approx(product * (p_end if ended else 1.0))
    assert got["joint_no_eos"] == pytest.approx(product)
    assert got["geometric_mean"] == pytest.approx(product ** (1 / len(p)))
    assert got["minimum"] == pytest.approx(min(p))
    assert got["first_token"] == pytest.approx(p[0])
    assert got["margin"] == 0.25
    assert all(value is not None and 0.0 <= value <= 1.0 for value in got.values())


def test_an_empty_answer_is_as_likely_as_its_end() -> None:
    got = answer_confidences(np.log([0.8, 0.5]), 0, 1, 0.7)
    assert got["joint"] == pytest.approx(0.8)
    assert got["first_token"] == pytest.approx(0.8)
    assert [name for name, value in got.items() if value is None] == ["joint_no_eos", "geometric_mean", "minimum"]


def test_end_of_sequence_ends_an_answer(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = byte_level.encode("a red circle")
    answer = read_answer(byte_level, [*tokens, 0, 5, 6], frozenset({0}))
    assert (answer.text, answer.n_answer, answer.n_end, answer.truncated) == ("a red circle", len(tokens), 1, False)
    answer = read_answer(byte_level, tokens, frozenset({0}))
    assert (answer.n_answer, answer.n_end, answer.truncated) == (len(tokens), 0, True)
    answer = read_answer(byte_level, [0, 0, 0], frozenset({0}))
    assert (answer.text, answer.n_answer, answer.n_end, answer.truncated) == ("", 0, 1, False)


@pytest.mark.parametrize("text", ["red\n\nQuestion: what", "\n\nred", "red \n\n", "grün 🟥\n\nmore", "red\n\n\n\nx"])
def test_stop_string_ends_an_answer(byte_level: PreTrainedTokenizerFast, text: str) -> None:
    tokens = byte_level.encode(text)
    answer = read_answer(byte_level, [*tokens, 0], frozenset({0}), ["Question", "\n\n"], with_ends=True)
    assert answer.text == text[: text.index("\n\n")]
    assert not answer.truncated
    # the counted tokens are the shortest prefix of the generation that holds the answer and the stop string
    counted = answer.n_answer + answer.n_end
    assert answer.text + "\n\n" in byte_level.decode(tokens[:counted])
    assert answer.text + "\n\n" not in byte_level.decode(tokens[: counted - 1])
    # and the answer's own tokens are the shortest prefix that holds the answer
    assert byte_level.decode(tokens[: answer.n_answer]).startswith(answer.text)
    if answer.n_answer:
        assert not byte_level.decode(tokens[: answer.n_answer - 1]).startswith(answer.text)


def test_a_token_that_holds_answer_and_stop_string_belongs_to_the_answer(byte_level: PreTrainedTokenizerFast) -> None:
    class OneToken:
        def decode(self, tokens: list[int], **_: object) -> str:
            return "".join({1: "five\n\n", 2: "tail"}[token] for token in tokens)

    answer = read_answer(OneToken(), [1, 2], frozenset({0}), ["\n\n"])
    assert (answer.text, answer.n_answer, answer.n_end) == ("five", 1, 0)


@given(st.text(alphabet="ab 1,[]é🟥\n", max_size=20))
def test_token_ends_cover_the_text(text: str) -> None:
    tokenizer = _CHARACTERS
    tokens = tokenizer.encode(text)
    answer = read_answer(tokenizer, tokens, frozenset(), with_ends=True)
    assert len(answer.ends) == len(tokens) == answer.n_answer
    assert list(answer.ends) == sorted(answer.ends)
    assert (answer.ends[-1] if answer.ends else 0) == len(text) == len(answer.text)


def _characters() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=260)
    tokenizer.train_from_iterator(["ab"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


_CHARACTERS = _characters()


def test_letter_forms_with_and_without_space(
    byte_level: PreTrainedTokenizerFast, sentencepiece_like: PreTrainedTokenizerFast
) -> None:
    vocabulary = byte_level.get_vocab()
    forms = letter_forms(byte_level, "AB")
    assert forms == {letter: tuple(sorted((vocabulary[letter], vocabulary["Ġ" + letter]))) for letter in "AB"}
    vocabulary = sentencepiece_like.get_vocab()
    forms = letter_forms(sentencepiece_like, "AB")
    assert forms == {letter: tuple(sorted((vocabulary[letter], vocabulary["▁" + letter]))) for letter in "AB"}
    assert letter_forms(byte_level, ["A", "Ω"])["Ω"] == ()  # two bytes, no single token


def test_letters_that_fold_together_are_refused() -> None:
    with pytest.raises(ValueError, match="same token"):
        letter_forms(_Same(), ["A", "a"])


class _Same:
    """A tokenizer whose one token decodes to whatever was last asked for: both letters would claim it."""

    unk_token_id = 0

    def encode(self, text: str, **_: object) -> list[int]:
        self.last = text.strip()
        return [1]

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [0 for _ in tokens]

    def decode(self, tokens: list[int]) -> str:
        return self.last


def test_option_probabilities_sum_forms_then_normalise() -> None:
    p = {1: 0.2, 2: 0.1, 3: 0.05, 4: 0.01, 5: 0.3}
    got = option_probabilities({k: math.log(v) for k, v in p.items()}, {"A": (1, 2), "B": (3,), "C": (4,)})
    assert got == pytest.approx({"A": 0.3 / 0.36, "B": 0.05 / 0.36, "C": 0.01 / 0.36})
    assert option_probabilities({1: -1.0}, {"A": (1,), "B": ()}) is None
    assert option_probabilities({}, {}) is None
    assert option_probabilities({1: -math.inf, 2: -math.inf}, {"A": (1,), "B": (2,)}) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("Answer: C.", "C"),
        ("B. red", "B"),
        ("Because", None),
        ("", None),
        ("F", None),
        ("A's", None),
    ],
)
def test_chosen_letter(text: str, letter: str | None) -> None:
    assert chosen_letter(text, ["A", "B", "C", "D"]) == letter


def test_box_confidences_count_coordinates_only(byte_level: PreTrainedTokenizerFast) -> None:
    text = "box [12, 345, 67, 890] and [1, 2, 3, 4]"
    tokens = _CHARACTERS.encode(text)  # one token per character
    answer = read_answer(_CHARACTERS, tokens, frozenset(), with_ends=True)
    rng = np.random.default_rng(1)
    p = rng.uniform(0.5, 1.0, len(text))
    spans = [(5, 7), (9, 12), (14, 16), (18, 21)]
    assert [text[a:b] for a, b in spans] == ["12", "345", "67", "890"]
    per_coordinate = [math.prod(p[a:b]) for a, b in spans]
    got = box_confidences(answer.text, answer.ends, np.log(p))
    assert got["box_joint"] == pytest.approx(math.prod(per_coordinate))
    assert got["box_geometric_mean"] == pytest.approx(math.prod(per_coordinate) ** (1 / 10))
    assert got["box_minimum"] == pytest.approx(min(per_coordinate))


@pytest.mark.parametrize("text", ["", "nothing", "[1, 2, 3]", "1 red 2 blue 3 4", "1.5"])
def test_no_box_no_confidence(text: str) -> None:
    answer = read_answer(_CHARACTERS, _CHARACTERS.encode(text), frozenset(), with_ends=True)
    got = box_confidences(answer.text, answer.ends, np.zeros(len(text)))
    assert got == {"box_joint": None, "box_geometric_mean": None, "box_minimum": None}


@pytest.mark.parametrize(
    "text",
    [
        "(12,34),(56,78)",
        "[0.12, 0.34, 0.56, 0.78]",
        "12 34 56 78",
        "-1 2 3 4",
        "<box>  ( 12, 34 ),\n\n(56,78)</box>",
        "  [[12,\t34], [.56, -78.]]  ",
    ],
)
def test_box_forms_of_the_models(text: str) -> None:
    answer = read_answer(_CHARACTERS, _CHARACTERS.encode(text), frozenset(), with_ends=True)
    p = np.where([c.isdigit() or c in ".-" for c in text], 0.5, 1.0)
    got = box_confidences(answer.text, answer.ends, np.log(p))
    assert got["box_joint"] == pytest.approx(math.prod(p))


@given(st.text(alphabet="[](){}<>,. \n\t1290-+box/|", max_size=60) | st.text(alphabet="[], 12.", max_size=30))
def test_the_box_of_the_confidence_is_the_one_that_is_scored(text: str) -> None:
    found = find_box(text)
    answer = read_answer(_CHARACTERS, _CHARACTERS.encode(text), frozenset(), with_ends=True)
    got = box_confidences(answer.text, answer.ends, np.log(np.full(len(text), 0.5)))
    assert (got["box_joint"] is None) == (found is None)
    if found is not None:
        assert tuple(float(text[begin:end]) for begin, end in found.spans) == found.box
        assert got["box_joint"] == pytest.approx(0.5 ** sum(end - begin for begin, end in found.spans))
