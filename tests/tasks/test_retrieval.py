"""Ranks of candidates against sorting, and the draw of candidates: by hash, never a caption of the picture itself."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.tasks.candidates import CandidatePool
from bitquake.tasks.families import FamilyError
from bitquake.tasks.schema import Candidates
from bitquake.tasks.scoring.retrieval import CandidateError, score_retrieval
from bitquake.tasks.scoring.targets import TargetError

floats = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(floats | st.sampled_from([0.0, -1.0]), min_size=2, max_size=30), st.data())
def test_the_rank_is_the_place_after_sorting_behind_all_ties(scores: list[float], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    found = score_retrieval(scores, target, len(scores))
    # Sorted from best to worst; among equals the own caption stands last.
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i == target))
    assert found.rank == order.index(target) + 1
    assert found.score == float(order[0] == target)
    assert found.answer is not None and scores[found.answer] == max(scores)
    assert (found.answer == target) == (found.rank == 1)
    assert not found.parse_failure


def test_recalls_and_reciprocal_rank() -> None:
    scores = [float(-i) for i in range(100)]
    for target, rank in ((0, 1), (4, 5), (5, 6), (9, 10), (10, 11)):
        found = score_retrieval(scores, target, 100)
        assert found.scores(100) == {
            "recall_1_of_100": float(rank <= 1),
            "recall_5_of_100": float(rank <= 5),
            "recall_10_of_100": float(rank <= 10),
            "reciprocal_rank": 1 / rank,
        }
    # Among five candidates, the first five hold the own caption always: that is no score.
    assert set(score_retrieval([0.0] * 5, 0, 5).scores(5)) == {"recall_1_of_5", "reciprocal_rank"}
    assert score_retrieval([0.0] * 5, 2, 5).rank == 5  # a model that tells nothing apart is wrong


def test_text_alone_cannot_be_ranked() -> None:
    found = score_retrieval(None, 3, 100)
    assert found.parse_failure and found.score == 0.0 and found.rank is None
    assert set(found.scores(100).values()) == {0.0}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0] * 99, "expected 100, one for each candidate, got 99"),
        ([], "got 0"),
        ([0.0] * 99 + [math.nan], r"expected finite numbers, got nan \(1 of 100\)"),
        ([-math.inf] * 100, r"got -inf \(100 of 100\)"),
    ],
)
def test_scores_that_cannot_be_ranked(scores: list[float], message: str) -> None:
    with pytest.raises(CandidateError, match=message):
        score_retrieval(scores, 0, 100)


@pytest.mark.parametrize("target", [None, -1, 100])
def test_a_row_without_a_caption_of_its_own(target: int | None) -> None:
    with pytest.raises(TargetError, match="no caption of its own"):
        score_retrieval([0.0] * 100, target, 100)


def pool(n_pictures: int = 60, n: int = 20, seed: int = 0, order: int = 0) -> tuple[CandidatePool, list[str]]:
    images = [f"picture {i}" for i in range(n_pictures)]
    rows = [(image, [f"{image} {word}" for word in ("one", "two", "three")]) for image in images]
    random.Random(order).shuffle(rows)
    names, captions = zip(*rows, strict=True)
    return CandidatePool.of(Candidates(n=n, seed=seed), names, captions), images


def test_candidates_are_the_own_caption_and_one_of_each_of_n_minus_1_other_pictures() -> None:
    drawn, images = pool()
    for image in images:
        captions, target = drawn.draw(image)
        assert target is not None and len(captions) == 20
        assert captions[target].startswith(f"{image} ")
        of = [caption.rpartition(" ")[0] for caption in captions]
        assert len(set(of)) == 20


def test_the_draw_depends_on_seed_and_picture_only() -> None:
    drawn, images = pool()
    shuffled, _ = pool(order=7)
    assert [drawn.draw(image) for image in images] == [shuffled.draw(image) for image in reversed(images)][::-1]
    other, _ = pool(seed=1)
    assert sum(drawn.draw(image) == other.draw(image) for image in images) == 0


def test_places_own_captions_and_other_pictures_are_drawn_evenly() -> None:
    drawn, images = pool(n_pictures=400, n=10)
    draws = [drawn.draw(image) for image in images]
    places = Counter(target for _, target in draws)
    assert set(places) == set(range(10)) and max(places.values()) < 70  # 40 expected, sd 6
    own = Counter(captions[target].rpartition(" ")[2] for captions, target in draws if target is not None)
    assert min(own.values()) > 95  # 133 expected, sd 9
    others = Counter(caption.rpartition(" ")[0] for captions, _ in draws for caption in captions)
    assert len(others) == 400 and max(others.values()) < 28  # 10 expected, sd 3


def test_a_text_of_the_picture_itself_is_never_a_distractor_and_none_comes_twice() -> None:
    images = [str(i) for i in range(30)]
    # Five texts that most pictures share, in various writings, and one of each picture's own.
    captions = [[("A dog ", "a  dog", "A DOG", "a cat", "A  Cat")[i % 5], f"picture {i}"] for i in range(30)]
    drawn = CandidatePool.of(Candidates(n=25), images, captions)
    for image, own in zip(images, captions, strict=True):
        found, target = drawn.draw(image)
        folded = [" ".join(text.lower().split()) for text in found]
        assert len(set(folded)) == 25
        mine = {" ".join(text.lower().split()) for text in own}
        assert [i for i, text in enumerate(folded) if text in mine] == [target]


def test_pictures_with_the_same_id_share_their_captions() -> None:
    images = ["a", "a", "b", "c"]
    drawn = CandidatePool.of(Candidates(n=3), images, [["one"], ["two"], ["three"], ["four"]])
    captions, target = drawn.draw("a")
    assert sorted(captions[i] for i in range(3) if i != target) == ["four", "three"]


def test_a_picture_without_captions_has_no_candidates() -> None:
    drawn = CandidatePool.of(Candidates(n=2), ["a", "b", "c"], [["one"], ["two"], None])
    assert drawn.draw("c") == ([], None)


def test_too_few_pictures_or_captions() -> None:
    with pytest.raises(FamilyError, match="100 candidates need 100 pictures with captions, this part has 2"):
        CandidatePool.of(Candidates(n=100), ["a", "b"], [["one"], ["two"]])
    same = CandidatePool.of(Candidates(n=3), ["a", "b", "c"], [["one"], ["Two"], ["two "]])
    with pytest.raises(
        FamilyError, match="picture 'a' finds only 1 captions that differ from its own and from each other"
    ):
        same.draw("a")
