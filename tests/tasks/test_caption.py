"""CIDEr-D against the published implementation, and the tokenizer against what COCO's own one makes of captions.

``fixtures/ptb_captions.json`` holds captions that we wrote (``realistic``, and ``odd`` ones made to be hard) or drew
from pieces (``drawn``, after the tokenizer was finished), each with the tokens that pycocoevalcap's PTBTokenizer gave.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquake.tasks.scoring.caption import Corpus, cider_d, ngrams, reference_captions, score_caption, tokenize
from bitquake.tasks.scoring.targets import TargetError

PAIRS: dict[str, list[tuple[str, str]]] = json.loads(
    (Path(__file__).parent / "fixtures" / "ptb_captions.json").read_text(encoding="utf-8")
)
WORDS = ["a", "man", "dog", "on", "the", "red", "surfboard", "rides", "wave", "two", "people", "with", "hat"]


def sentence(rng: random.Random, longest: int = 14) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))


def published(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """pycocoevalcap's score of the corpus and of each caption, on tokens joined by spaces."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    mean, each = cider.compute_score(
        {i: list(texts) for i, texts in enumerate(references)}, {i: [text] for i, text in enumerate(captions)}
    )
    return float(mean), list(map(float, each))


@pytest.mark.parametrize("seed", range(8))
def test_cider_d_is_the_published_one(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice((2, 5, 60))
    references = [[sentence(rng) for _ in range(rng.choice((1, 5)))] for _ in range(n)]
    # Some captions repeat a reference, some say nothing, some say one thing again and again.
    captions = [rng.choice((sentence(rng), texts[0], "", "dog", "dog dog dog dog dog dog")) for texts in references]
    corpus = Corpus.of(references)
    ours = [
        cider_d(text.split(), [reference.split() for reference in texts], corpus)
        for text, texts in zip(captions, references, strict=True)
    ]
    mean, theirs = published(captions, references)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert np.mean(ours) == pytest.approx(mean, abs=1e-9)
    assert min(ours) >= 0 and max(ours) <= 10 + 1e-9


def test_the_score_is_a_tenth_and_a_whole_pipeline_agrees_on_our_tokens() -> None:
    pairs = PAIRS["realistic"]
    references = [[pairs[i][0], pairs[i + 1][0], pairs[i + 2][0]] for i in range(0, 210, 3)]
    captions = [texts[0] if i % 3 else texts[1].rpartition(" ")[0] for i, texts in enumerate(references)]
    corpus = Corpus.of(references)
    scored = [score_caption(text, texts, corpus) for text, texts in zip(captions, references, strict=True)]
    mean, theirs = published(
        [" ".join(tokenize(text)) for text in captions],
        [[" ".join(tokenize(reference)) for reference in texts] for texts in references],
    )
    np.testing.assert_allclose([10 * one.score for one in scored], theirs, rtol=0, atol=1e-9)
    assert 10 * float(np.mean([one.score for one in scored])) == pytest.approx(mean, abs=1e-9)
    assert mean > 1


def test_document_frequencies_by_hand() -> None:
    corpus = Corpus.of([["a dog", "a dog runs"], ["a cat"], [], None, [" "]])
    assert corpus.documents == 2
    assert corpus.frequency[("a",)] == 2
    assert corpus.frequency[("a", "dog")] == corpus.frequency[("cat",)] == 1
    assert ngrams(["a", "b", "c", "d", "e"])["b", "c", "d", "e"] == 1
    # "a" is everywhere and weighs nothing; "dog", "a dog" once each: two of four n-gram lengths are perfect.
    assert cider_d(["a", "dog"], [["a", "dog"]], corpus) == pytest.approx(10 * 2 / 4)


def test_a_score_depends_on_the_corpus_and_not_on_which_samples_are_scored() -> None:
    references = [[f"a dog number {i} on street {i % 4}", f"dog {i}"] for i in range(20)]
    whole, part = Corpus.of(references), Corpus.of(references[:3])
    assert Corpus.of(references[::-1]) == whole
    text = "a dog number 1 on street 2"
    assert score_caption(text, references[1], whole).score != score_caption(text, references[1], part).score


def test_captions_that_say_nothing() -> None:
    corpus = Corpus.of([["a dog"], ["a cat"]])
    for text in ("", " \n", "...", "?!", "\u200b"):
        found = score_caption(text, ["a dog"], corpus)
        assert found.score == 0.0
        assert found.parse_failure == (not tokenize(text))
    assert not score_caption("dog", ["a dog"], corpus).parse_failure
    # One picture is no corpus: everything is everywhere.
    assert score_caption("a dog", ["a dog"], Corpus.of([["a dog"]])).score == 0.0
    assert score_caption("a dog", ["a dog"], Corpus(0, {})).score == 0.0


def test_line_ends_are_spaces_and_the_whole_text_counts() -> None:
    corpus = Corpus.of([["a dog runs on grass"], ["a cat sleeps"]])
    assert score_caption("a dog\nruns on grass", ["a dog runs on grass"], corpus).score == pytest.approx(1.0)
    chatty = score_caption("a dog runs on grass\n\nLet me know if you want more!", ["a dog runs on grass"], corpus)
    assert 0 < chatty.score < 0.7


@pytest.mark.parametrize("references", [None, [], 5, [5], ["", " "], {"a": 1}])
def test_bad_references(references: object) -> None:
    with pytest.raises(TargetError, match="captions: "):
        score_caption("a dog", references, Corpus(0, {}))
    assert Corpus.of([references]).documents == 0


def test_references_are_texts_or_one_text() -> None:
    assert reference_captions("a dog") == ["a dog"]
    assert reference_captions(["a dog", "", "dog"]) == ["a dog", "dog"]


@given(st.text(), st.lists(st.text(), max_size=3))
@settings(deadline=None, max_examples=150)
def test_no_text_raises_and_scores_stay_in_range(text: str, references: list[str]) -> None:
    usable = [reference for reference in references if reference.strip()] or ["a dog"]
    found = score_caption(text, usable, Corpus.of([usable, ["a cat on a mat"]]))
    assert 0.0 <= found.score <= 1.0 and math.isfinite(found.score)


def test_runaway_text_is_cut() -> None:
    assert len(tokenize("dog " * 100_000)) <= 4096


def differing(group: str) -> set[str]:
    return {caption for caption, tokens in PAIRS[group] if " ".join(tokenize(caption)) != tokens}


def test_the_tokens_are_those_of_coco() -> None:
    assert len(PAIRS["realistic"]) == 214 and len(PAIRS["drawn"]) == 400
    assert differing("realistic") == {"Temperature: 25°C."}  # "c" there, "c." here
    assert differing("drawn") == {
        "the player (no. 7) - I think - wearing a tie,hat and gloves while in the '80s :)",  # no smiley there, one here
        "a St. Bernard are not under a clock that says 12:15 while on top of skis.;",  # "skis." there, "skis" here
    }


def test_most_odd_captions_too() -> None:
    assert len(differing("odd")) <= 12 and len(PAIRS["odd"]) == 86


def test_brackets_stay_and_punctuation_goes_as_in_coco_s_evaluation() -> None:
    assert tokenize('"A dog," he said (twice).') == ["a", "dog", "he", "said", "-lrb-", "twice", "-rrb-"]
    assert tokenize("They don't; it's Mr. Lee's U.S. x-ray!") == [
        "they", "do", "n't", "it", "'s", "mr.", "lee", "'s", "u.s.", "x-ray"
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java, to run COCO's own tokenizer")
def test_the_fixture_is_what_coco_s_tokenizer_says() -> None:
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    pairs = [pair for group in ("realistic", "drawn") for pair in PAIRS[group]]
    said = tokenizer.tokenize({i: [{"caption": caption}] for i, (caption, _) in enumerate(pairs)})
    assert [said[i] for i in range(len(pairs))] == [[tokens] for _, tokens in pairs]
