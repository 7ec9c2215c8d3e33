"""Three readings of a lettered answer, against lmms-eval's own scorer, hand cases and properties."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.tasks.scoring import TargetError, score_choice
from bitquake.tasks.scoring.choice import LETTERS, lenient_letter

OPTIONS = ["red circle", "blue square", "dog"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B. blue square", "B"),
        ("(B)", "B"),
        ("(b) because it is blue", "B"),
        ("B) blue square", "B"),
        ("[B]", "B"),
        ("**B**", "B"),
        ("'B'", "B"),
        ("B: blue square", "B"),
        ("B, I think", "B"),
        ("Answer: B", "B"),
        ("answer is b", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (B).", "B"),
        ("So, the answer is option B", "B"),
        ("Option B", "B"),
        ("blue square", "B"),
        ("Blue  Square.", "B"),
        ("The answer is blue square", "B"),
        ("\n B \n", "B"),
        # No answer: an article, a sentence, a letter without an option, two at once.
        ("A dog sits there", None),
        ("The answer is a cat", None),
        ("I am not sure", None),
        ("D", None),
        ("B or C", None),
        ("", None),
        ("Because", None),
        ("Answer", None),
    ],
)
def test_lenient_reading(text: str, letter: str | None) -> None:
    assert lenient_letter(text, OPTIONS) == letter


def test_text_of_two_options_is_no_answer() -> None:
    assert lenient_letter("red", ["red", "Red.", "blue"]) is None
    assert score_choice("red", ["red", "Red.", "blue"], 0).parse_failure


@pytest.mark.parametrize("correct", range(3))
@pytest.mark.parametrize(
    "text", ["A", "b", "C.", "B. blue", "b.", "(A)", "Answer: C", "", "dog", "A) red", "Apple", "a. x"]
)
def test_strict_is_lmms_evals_scienceqa(text: str, correct: int) -> None:
    upstream = pytest.importorskip("lmms_eval.tasks.scienceqa.utils").sqa_process_results
    expected = upstream({"choices": OPTIONS, "answer": correct}, [text])["exact_match"]
    assert score_choice(text, OPTIONS, correct).strict == expected


def test_letter_needs_no_text() -> None:
    found = score_choice("no idea", OPTIONS, 1, {"A": 0.2, "B": 0.5, "C": 0.3, "D": 0.9})
    assert (found.score, found.strict, found.lenient, found.letter) == (0.0, 0.0, 0.0, 1.0)
    assert found.parse_failure
    assert score_choice("B", OPTIONS, 1).letter is None
    assert score_choice("B", OPTIONS, 1, {"A": float("nan")}).letter is None


@pytest.mark.parametrize(
    ("options", "correct"),
    [([], 0), (["one"], 0), (OPTIONS, 3), (OPTIONS, -1), (OPTIONS, None), (OPTIONS, True), ("abc", 0)],
)
def test_references_that_cannot_be_scored(options: list[str], correct: int) -> None:
    with pytest.raises(TargetError, match=r"choices: expected|answer: expected"):
        score_choice("A", options, correct)


@given(st.text(), st.integers(2, 26))
def test_no_output_of_a_model_raises(text: str, n: int) -> None:
    options = [f"option {i}" for i in range(n)]
    found = score_choice(text, options, n - 1)
    assert found.strict <= found.lenient
    assert found.answer is None or found.answer in LETTERS[:n]


@given(
    st.sampled_from("ABC"), st.sampled_from(["{}", "{}.", "({})", "{})", "Answer: {}", "The answer is {}.", "**{}**"])
)
def test_every_common_form_is_read(letter: str, form: str) -> None:
    assert lenient_letter(form.format(letter), OPTIONS) == letter


@pytest.mark.parametrize("piece", ["(", " ", "answer ", "the answer is ", "*", "B ", '"'])
def test_runaway_text_is_quick(piece: str) -> None:
    start = time.perf_counter()
    score_choice(piece * 200_000, OPTIONS, 0)
    assert time.perf_counter() - start < 2.0
