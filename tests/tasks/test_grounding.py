"""Boxes: IoU against counting pixels, parsing of every form in use, coordinate spaces there and back."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.tasks.scoring import TargetError, iou, score_box
from bitquake.tasks.scoring.grounding import clip, find_box, format_box, target_box, to_pixels

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
    found = find_box(text)
    assert found is not None and found.box == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "text",
    ["", "left", "[1, 2, 3]", "[1, 2, 3, 4, 5]", "[a, b, c, d]", "1 2 3", "[1, 2], [3]", "in 2021, 4 of 5", "[,,,]"],
)
def test_no_box_is_a_parse_failure_and_wrong(text: str) -> None:
    found = score_box(text, (0, 0, 10, 10), "pixels", (10, 10))
    assert found.parse_failure
    assert (found.score, found.iou, found.box) == (0.0, 0.0, None)


def test_negative_and_fractional_numbers() -> None:
    found = find_box("[-1.5, .25, +3, 4]")
    assert found is not None and found.box == (-1.5, 0.25, 3, 4)


def test_the_spans_are_where_the_numbers_stand() -> None:
    text = '```json\n[\n\t{"bbox_2d": [41,  7.5,\n 127, 390], "label": "12 dogs"}\n]\n```'
    found = find_box(text)
    assert found is not None and found.box == (41, 7.5, 127, 390) and not found.location_tokens
    assert [text[begin:end] for begin, end in found.spans] == ["41", "7.5", "127", "390"]


def test_location_tokens_are_read_in_paligemmas_order() -> None:
    text = "<loc0128><loc0256><loc0640><loc1023> the dog ; <loc0000><loc0000><loc0512><loc0512> the cat"
    found = find_box(text)
    assert found is not None and found.location_tokens
    assert found.box == (256, 128, 1023, 640)  # written y1, x1, y2, x2
    assert [text[begin:end] for begin, end in found.spans] == ["0256", "0128", "1023", "0640"]
    # In a picture of 640x480: 256 / 1024 of 640, 128 / 1024 of 480, ...
    scored = score_box(text, (160, 60, 640, 300), "location_tokens", (640, 480))
    assert scored.box == pytest.approx((160, 60, 639.375, 300)) and scored.score == 1.0


@pytest.mark.parametrize(
    ("text", "first", "tokens"),
    [
        ("[1, 2, 3, 4] <loc0001><loc0002><loc0003><loc0004>", (1, 2, 3, 4), False),
        ("<loc0002> <loc0001> <loc0004> <loc0003> [5, 6, 7, 8]", (1, 2, 3, 4), True),
        ("<loc0001><loc0002><loc0003> [5, 6, 7, 8]", (5, 6, 7, 8), False),
        ("<loc1><loc2><loc3><loc4> (5,6),(7,8)", (5, 6, 7, 8), False),
    ],
)
def test_the_first_box_counts_in_whatever_form(text: str, first: tuple[int, ...], tokens: bool) -> None:
    found = find_box(text)
    assert found is not None and (found.box, found.location_tokens) == (first, tokens)


def test_a_box_in_the_form_that_is_not_declared_is_a_parse_failure() -> None:
    right = (10.0, 20.0, 60.0, 80.0)
    assert score_box("[0.1, 0.2, 0.6, 0.8]", right, "unit", (100, 100)).score == 1.0
    assert score_box("[102, 205, 614, 819]", right, "location_tokens", (100, 100)).parse_failure
    tokens = "<loc0205><loc0102><loc0819><loc0614> the dog"
    assert score_box(tokens, right, "location_tokens", (100, 100)).score == 1.0
    assert score_box(tokens, right, "thousand", (100, 100)).parse_failure


@pytest.mark.parametrize(
    ("space", "text", "processed"),
    [
        # One box, (80, 120) to (320, 360) in a picture of 640x480, as each model family writes it.
        ("unit", "[0.125, 0.25, 0.5, 0.75]", None),
        ("thousand", "(125,250),(500,750)", None),
        ("thousand", "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(125,250),(500,750)<|box_end|>", None),
        ("thousand", '```json\n[\n\t{"bbox_2d": [125, 250, 500, 750], "label": "the dog"}\n]\n```', None),
        # Qwen2.5-VL's smart resize of 640x480 to whole patches of 28: 644x476.
        ("processed", '```json\n[{"bbox_2d": [80.5, 119, 322, 357], "label": "the dog"}]\n```', (644, 476)),
        ("processed", '{"bbox_2d": [80.5, 119, 322, 357]}', (644, 476)),
        ("location_tokens", "<loc0256><loc0128><loc0768><loc0512> the dog", (224, 224)),
        ("pixels", "[80, 120, 320, 360]", (644, 476)),
    ],
)
def test_each_familys_own_answer_is_the_same_box(space: str, text: str, processed: tuple[int, int] | None) -> None:
    scored = score_box(text, (80, 120, 320, 360), space, (640, 480), processed)  # type: ignore[arg-type]
    assert scored.iou == pytest.approx(1.0)
    assert scored.box == pytest.approx((80, 120, 320, 360))


spaces = st.sampled_from(["unit", "thousand", "pixels", "processed", "location_tokens"])


@given(
    spaces,
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    st.tuples(st.integers(28, 2000), st.integers(28, 2000)),
)
def test_spaces_scale_each_axis_on_its_own(space: str, size: tuple[int, int], processed: tuple[int, int]) -> None:
    spans = {"unit": (1, 1), "thousand": (1000, 1000), "pixels": size, "processed": processed}
    spans["location_tokens"] = (1024, 1024)
    sx, sy = spans[space]
    # The same place in every picture: a quarter in from the left, half down, and the far corner.
    found = to_pixels((sx / 4, sy / 2, sx, sy), space, size, processed)  # type: ignore[arg-type]
    assert found == pytest.approx((size[0] / 4, size[1] / 2, size[0], size[1]))


def test_processed_coordinates_without_the_processed_size_are_never_guessed() -> None:
    with pytest.raises(TargetError, match="size that the processor resized to is not known"):
        to_pixels((1, 2, 3, 4), "processed", (10, 20))
    with pytest.raises(TargetError, match="size that the processor resized to is not known"):
        score_box("[1, 2, 3, 4]", (1, 2, 3, 4), "processed", (10, 20))


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
