"""Boxes: IoU against counting pixels, parsing of every form in use, coordinate spaces there and back."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.tasks.scoring import TargetError, iou, score_box
from bitquake.tasks.scoring.grounding import clip, first_box, format_box, target_box, to_pixels

SIDE = 12
edge = st.integers(0, SIDE)
boxes = st.tuples(edge, edge, edge, edge)


def counted(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """IoU by looking at every pixel of the grid."""

    def covers(box: tuple[int, ...], x: int, y: int) -> bool:
        return box[0] <= x < box[2] and box[1] <= y < box[3]

    pixels = [(covers(a, x, y), covers(b, x, y)) for x in range(SIDE) for y in range(SIDE)]
    either = sum(p or q for p, q in pixels)
    both = sum(p and q for p, q in pixels)
    return both / either if both else 0.0


@given(boxes, boxes)
def test_iou_is_what_counting_pixels_gives(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert iou(a, b) == pytest.approx(counted(a, b))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3, 4]",
        "[1,2,3,4]",
        "(1,2),(3,4)",
        "(1, 2), (3, 4)",
        "[[1, 2], [3, 4]]",
        "[[1, 2, 3, 4]]",
        "<|box_start|>(1,2),(3,4)<|box_end|>",
        "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
        "<ref>dog</ref><box>[[1, 2, 3, 4]]</box>",
        '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]\n```',
        "1 2 3 4",
        "1, 2, 3, 4.",
        "The dog is at [1.0, 2.00, 3., 4] in the picture.",
        "[1, 2, 3, 4] or [5, 6, 7, 8]",
        "[1 , 2 ,\n3 , 4]",
    ],
)
def test_the_first_box_is_read(text: str) -> None:
    assert first_box(text) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "text",
    ["", "left", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[a, b, c, d]", "1 2 3", "[1, 2], [3]", "in 2021, 4 of 5", "[,,,]"],
)
def test_no_box_is_a_parse_failure_and_wrong(text: str) -> None:
    found = score_box(text, (0, 0, 10, 10), "pixels", (10, 10))
    assert found.parse_failure
    assert (found.score, found.iou, found.box) == (0.0, 0.0, None)


def test_negative_and_fractional_numbers() -> None:
    assert first_box("[-1.5, .25, +3, 4]") == (-1.5, 0.25, 3, 4)


spaces = st.sampled_from(["unit", "thousand", "pixels", "processed"])


@given(
    spaces,
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    st.tuples(st.integers(28, 2000), st.integers(28, 2000)),
)
def test_spaces_scale_each_axis_on_its_own(space: str, size: tuple[int, int], processed: tuple[int, int]) -> None:
    spans = {"unit": (1, 1), "thousand": (1000, 1000), "pixels": size, "processed": processed}
    sx, sy = spans[space]
    # The same place in every picture: a quarter in from the left, half down, and the far corner.
    found = to_pixels((sx / 4, sy / 2, sx, sy), space, size, processed)  # type: ignore[arg-type]
    assert found == pytest.approx((size[0] / 4, size[1] / 2, size[0], size[1]))


def test_processed_without_a_resize_is_the_picture() -> None:
    assert to_pixels((1, 2, 3, 4), "processed", (10, 20)) == (1, 2, 3, 4)


def test_the_declared_space_is_used_even_where_another_would_fit_better() -> None:
    target = target_box([100, 100, 200, 200], "xywh", (1000, 500))
    right = score_box("[0.1, 0.2, 0.3, 0.6]", target, "unit", (1000, 500))
    assert (right.score, right.iou) == (1.0, pytest.approx(1.0))
    assert score_box("[100, 200, 300, 600]", target, "thousand", (1000, 500)).iou == pytest.approx(1.0)
    # Pixels answered where 0..1 is declared: everything is cut to the picture's far corner.
    assert score_box("[100, 100, 300, 300]", target, "unit", (1000, 500)).score == 0.0


@pytest.mark.parametrize(("right_edge", "score"), [(20, 1.0), (21, 0.0)])
def test_an_iou_of_exactly_one_half_counts(right_edge: int, score: float) -> None:
    assert score_box(f"[0, 0, {right_edge}, 10]", (0, 0, 10, 10), "pixels", (100, 100)).score == score


def test_a_box_is_cut_to_the_picture() -> None:
    assert score_box("[-50, -50, 10, 10]", (0, 0, 10, 10), "pixels", (64, 64)).iou == 1.0
    assert target_box([60, 60, 10, 10], "xywh", (64, 64)) == (60, 60, 64, 64)
    assert clip((-1, -1, 100, 100), (64, 32)) == (0, 0, 64, 32)


def test_formats_of_datasets() -> None:
    assert (
        target_box([5, 6, 10, 20], "xywh", (64, 64)) == target_box([5, 6, 15, 26], "xyxy", (64, 64)) == (5, 6, 15, 26)
    )
    assert format_box((5.0, 6.4, 15.0, 26.0)) == "[5, 6, 15, 26]"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "four numbers"),
        ([1, 2, 3], "four numbers"),
        ("1234x", "four numbers"),
        ([1, 2, 0, 5], "degenerate"),
        ([1, 2, -3, 5], "degenerate"),
        ([1, 2, math.nan, 5], "degenerate"),
        ([1, 2, math.inf, 5], "degenerate"),
        ([64, 0, 5, 5], "outside"),
        ([-9, -9, 5, 5], "outside"),
    ],
)
def test_references_that_cannot_be_scored(values: object, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        target_box(values, "xywh", (64, 64))


def test_an_unknown_picture_size_is_an_error_only_where_it_is_needed() -> None:
    assert score_box("[0, 0, 10, 10]", (0, 0, 10, 10), "pixels", None).score == 1.0
    with pytest.raises(TargetError, match="size is not known"):
        score_box("[0, 0, 1, 1]", (0, 0, 10, 10), "unit", None)


@given(st.text(), spaces)
def test_no_output_of_a_model_raises(text: str, space: str) -> None:
    assert 0.0 <= score_box(text, (0, 0, 10, 10), space, (64, 64), (128, 128)).iou <= 1.0  # type: ignore[arg-type]


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=4, max_size=4), spaces)
def test_any_numbers_give_an_iou(numbers: list[float], space: str) -> None:
    text = "[" + ", ".join(f"{number:f}" for number in numbers) + "]"
    assert 0.0 <= score_box(text, (0, 0, 10, 10), space, (64, 64), (128, 128)).iou <= 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", ["[", "[1", "[1, ", " ", "[1 ", "(1,2),", "<a", "1 ", "9"])
def test_runaway_text_is_quick(piece: str) -> None:
    start = time.perf_counter()
    score_box(piece * 200_000, (0, 0, 10, 10), "pixels", (64, 64))
    assert time.perf_counter() - start < 2.0
