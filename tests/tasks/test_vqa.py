"""Soft accuracy against its defining formula, normalisation against lmms-eval's own processor, and cases by hand."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitquake.tasks.scoring import TargetError, normalise, score_vqa
from bitquake.tasks.scoring.vqa import CONTRACTIONS, normalise_upstream, soft_accuracy


def formula(answer: str, references: list[str]) -> float:
    """Antol et al. 2015, written out: leave each annotator out once."""
    total = 0.0
    for i in range(len(references)):
        others = references[:i] + references[i + 1 :]
        total += min(1.0, others.count(answer) / 3)
    return total / len(references)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=10), st.sampled_from("abcd"))
def test_soft_accuracy_is_the_formula(references: list[str], answer: str) -> None:
    assert soft_accuracy(answer, references) == pytest.approx(formula(answer, references))


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_annotators_give_the_five_known_values(matches: int, expected: float) -> None:
    references = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert score_vqa("red", references).score == pytest.approx(expected)


def test_contractions_are_those_of_lmms_eval() -> None:
    processor = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor
    # Upstream's five keys with a capital can never match: words are lower case when they are looked up.
    assert {key: value for key, value in processor.CONTRACTIONS.items() if key == key.lower()} == {
        **CONTRACTIONS,
        "let's": "let's",
        "she's": "she's",
    }


pieces = st.sampled_from(
    [*";/[]\"{}()=+\\_-><@`,?! .'aBz01\n\t:", "yes", "no", "the", "two", "dont", "3,000", "1.5", "ten"]
)


@given(st.lists(pieces, max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_upstream_normalisation_is_lmms_evals(text: str) -> None:
    module = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric")
    processor = module.EvalAIAnswerProcessor()
    clean = text.replace("\n", " ").replace("\t", " ").strip()
    assert normalise_upstream(text) == processor.process_digit_article(processor.process_punctuation(clean))


# Each was computed with the public reliable_vqa script (punctuation, then digits and articles).
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  the Red\tcar \n", "red car"),
        ("1,000", "1000"),
        ("two,three", "2 3"),
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("1.5 m.", "1.5 m"),
        ("dont know", "don't know"),
        ("an apple, a pear", "apple pear"),
        ("none", "0"),
        ('"quoted"!', "quoted"),
        ("a - b", "b"),
        ("6:30", "6:30"),
        ("...", ""),
    ],
)
def test_normalisation_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_a_capital_counts_where_all_annotators_agree_and_the_original_number_stands_beside() -> None:
    found = score_vqa("Yes", ["yes"] * 10)
    assert (found.score, found.reliable_vqa, found.lmms_eval) == (1.0, 0.0, 1.0)
    # Where they do not all agree, both are the same.
    found = score_vqa("Yes", ["yes"] * 9 + ["no"])
    assert found.score == found.reliable_vqa == 1.0


def test_lmms_eval_and_reliable_vqa_differ_where_punctuation_rules_do() -> None:
    # Next to a space upstream removes a mark (joining the words), reliable_vqa writes a space.
    found = score_vqa("black /white", ["black white"] * 5 + ["grey"] * 5)
    assert (found.score, found.lmms_eval) == (1.0, 1.0)
    found = score_vqa("black- white-ish", ["black white ish"] * 5 + ["grey"] * 5)
    assert (found.score, found.lmms_eval) == (1.0, 0.0)


@pytest.mark.parametrize("references", [[], ["yes"] * 9, ["yes"] * 11, "yes", None, ["yes"] * 9 + [None]])
def test_references_that_cannot_be_scored(references: object) -> None:
    with pytest.raises(TargetError, match="answers: expected"):
        score_vqa("yes", references)  # type: ignore[arg-type]


def test_single_reference_is_an_exact_match() -> None:
    assert score_vqa("Red.", ["red"], annotators=1).score == 1.0
    assert score_vqa("blue", ["red"], annotators=1).score == 0.0


@given(st.text())
@example("\ud800")
@example("\x00")
def test_no_output_of_a_model_raises(text: str) -> None:
    found = score_vqa(text, ["yes"] * 6 + ["no"] * 4)
    assert 0.0 <= found.score <= 1.0


@pytest.mark.parametrize("piece", [" -", " ", "(", "a,", "1,", "don't ", ".", "-a"])
def test_runaway_text_is_quick(piece: str) -> None:
    start = time.perf_counter()
    score_vqa(piece * 200_000, ["yes"] * 10)
    assert time.perf_counter() - start < 2.0
