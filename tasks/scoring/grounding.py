"""Referring expressions: the first box in a model's text against the annotated one, Acc@0.5.

The coordinate space is declared, never guessed: trying several spaces, or all boxes of a text, and keeping what fits
the annotation best would raise the accuracy and ruin every confidence. So a box that is written in the other form
(numbers where location tokens are declared, or the reverse) is a parse failure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from .targets import READ_CHARACTERS, TargetError

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2): edges in pixels, right and bottom exclusive, so that the width is x2 - x1."""
Space = Literal["unit", "thousand", "pixels", "processed", "location_tokens"]
BoxFormat = Literal["xywh", "xyxy"]

IOU_THRESHOLD = 0.5

_NUMBER = r"([-+]?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12}))"
# Four numbers with commas or blanks between them, perhaps in pairs:
# [a, b, c, d], (a,b),(c,d), <|box_start|>(a,b),(c,d)<|box_end|>
_GAP = r"\s*(?:,|\s)\s*"
_PAIR_GAP = r"\s*(?:[)\]]\s*,?\s*[(\[]|,|\s)\s*"
_FOUR = re.compile(rf"[\[(<{{]\s*[\[(]?\s*{_NUMBER}{_GAP}{_NUMBER}{_PAIR_GAP}{_NUMBER}{_GAP}{_NUMBER}\s*[\])>}}]")
_BARE_FOUR = re.compile(rf"\A\s*{_NUMBER}{_GAP}{_NUMBER}{_GAP}{_NUMBER}{_GAP}{_NUMBER}\s*\.?\s*\Z")
# PaliGemma: <loc0102><loc0204><loc0511><loc0767> the dog
_LOCATIONS = re.compile(r"\s*".join([r"<loc(\d{4})>"] * 4))
_LOCATION_BINS = 1024.0
_EXACT_BOX = re.compile(r"\[" + ", ".join([r"(-?\d{1,20}(?:\.\d{1,20})?(?:e-\d{1,2})?)"] * 4) + r"\]", re.ASCII)
_TAGS = re.compile(r"<\|?/?[A-Za-z_]{1,40}\|?>")


class BoxScore(NamedTuple):
    """score: 1 if the IoU is at least 0.5; iou in [0, 1]; box: in pixels of the picture, None where none was found."""

    score: float
    iou: float
    box: Box | None

    @property
    def parse_failure(self) -> bool:
        return self.box is None


class WrittenBox(NamedTuple):
    """A box as a model wrote it.

    box: (x1, y1, x2, y2), in whatever space; spans: (begin, end) of each of these four numbers in the text;
    location_tokens: whether they are ``<loc0000>`` to ``<loc1023>``, which PaliGemma writes as y1, x1, y2, x2.
    """

    box: Box
    spans: tuple[tuple[int, int], ...]
    location_tokens: bool = False


def find_box(text: str) -> WrittenBox | None:
    """The first four numbers, or location tokens, that are written as a box; None where there are none."""
    text = _TAGS.sub(lambda tag: " " * len(tag[0]), text[:READ_CHARACTERS])
    # runs of blanks collapsed, as in readable(), and each character's place kept
    places = [i for i, sign in enumerate(text) if not sign.isspace() or (i and not text[i - 1].isspace())]
    read = "".join(" " if text[i].isspace() else text[i] for i in places)
    numbers, tokens = _FOUR.search(read) or _BARE_FOUR.search(read), _LOCATIONS.search(read)
    by_token = tokens is not None and (numbers is None or tokens.start() < numbers.start())
    match, order = (tokens, (2, 1, 4, 3)) if by_token else (numbers, (1, 2, 3, 4))
    if match is None:
        return None
    x1, y1, x2, y2 = (float(match[i]) for i in order)
    spans = tuple((places[match.start(i)], places[match.end(i) - 1] + 1) for i in order)
    return WrittenBox((x1, y1, x2, y2), spans, by_token)


def to_pixels(box: Box, space: Space, size: tuple[float, float], processed: tuple[float, float] | None = None) -> Box:
    """A box in a model's coordinate space, in pixels of the picture.

    Args:
        box: (x1, y1, x2, y2) as the model wrote it.
        space: ``unit`` (0 to 1), ``thousand`` (0 to 1000), ``pixels`` (of the picture), ``processed`` (pixels of the
            picture as the model's processor resized it), ``location_tokens`` (PaliGemma's 1024 bins; big_vision reads
            bin i as i / 1024).
        size: (width, height) of the picture.
        processed: (width, height) that the processor resized to; needed for ``processed``.

    Raises:
        TargetError: it is needed and not known.
    """
    if space == "pixels":
        return box
    if space == "processed":
        if processed is None:
            raise TargetError("box: the size that the processor resized to is not known, and coordinates count from it")
        spans = processed
    else:
        span = {"unit": 1.0, "thousand": 1000.0, "location_tokens": _LOCATION_BINS}[space]
        spans = (span, span)
    sx, sy = size[0] / spans[0], size[1] / spans[1]
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


def clip(box: Box, size: tuple[float, float]) -> Box:
    """The part of a box that lies inside a picture of (width, height); empty ones keep an area of 0."""
    x1, y1, x2, y2 = box
    width, height = size
    return min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(max(x2, 0.0), width), min(max(y2, 0.0), height)


def iou(a: Box, b: Box) -> float:
    """Area of the intersection over area of the union, in [0, 1]; 0 where a box is empty or turned inside out."""
    area_a, area_b = _area(a), _area(b)
    if area_a <= 0 or area_b <= 0:
        return 0.0
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (area_a + area_b - shared)


def target_box(values: Any, box_format: BoxFormat, size: tuple[float, float] | None) -> Box:
    """An annotated box, in pixels of its picture, cut to the picture.

    Args:
        values: four numbers, as the dataset holds them.
        box_format: ``xywh`` (corner and extent) or ``xyxy`` (two corners).
        size: (width, height) of the picture; None where it is not known, then nothing is cut.

    Raises:
        TargetError: not four finite numbers, an extent of 0 or less, or a box that lies outside the picture.
    """
    try:
        x, y, c, d = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise TargetError(f"box: expected four numbers ({box_format}), got {values!r}") from error
    box = (x, y, x + c, y + d) if box_format == "xywh" else (x, y, c, d)
    if not all(math.isfinite(edge) for edge in box) or _area(box) <= 0:
        raise TargetError(f"box: {values!r} ({box_format}) is degenerate: it has no area")
    if size is None:
        return box
    inside = clip(box, size)
    if _area(inside) <= 0:
        raise TargetError(f"box: {values!r} ({box_format}) lies outside its picture of {size[0]:g}x{size[1]:g} pixels")
    return inside


def score_box(
    text: str,
    target: Box,
    space: Space,
    size: tuple[float, float] | None,
    processed: tuple[float, float] | None = None,
) -> BoxScore:
    """Score the first box in a model's text; a text without one of the declared form scores 0: a parse failure.

    Args:
        text: the model's answer, as it wrote it.
        target: the annotated box, from :func:`target_box`.
        space: the coordinate space that the family declares for this model.
        size: (width, height) of the picture; needed for every space but ``pixels``.
        processed: see :func:`to_pixels`.

    Raises:
        TargetError: the picture's size, or the processed one, is needed and not known.
    """
    found = find_box(text)
    if found is None or found.location_tokens != (space == "location_tokens"):
        return BoxScore(0.0, 0.0, None)
    if size is None:
        if space != "pixels":
            raise TargetError(f"box: the picture's size is not known, and {space!r} coordinates need it")
        box = found.box
    else:
        box = clip(to_pixels(found.box, space, size, processed), size)
    overlap = iou(box, target)
    return BoxScore(float(overlap >= IOU_THRESHOLD), overlap, box)


def format_box(box: Sequence[float]) -> str:
    """A box as reference answers are written: whole pixels, ``[x1, y1, x2, y2]``."""
    return "[" + ", ".join(str(round(edge)) for edge in box) + "]"


def exact_box(box: Box) -> str:
    """A box as records hold a model's answer: ``[x1, y1, x2, y2]`` with every digit, so that it can be scored again."""
    return "[" + ", ".join(str(int(edge)) if edge.is_integer() else repr(edge) for edge in map(float, box)) + "]"


def read_exact_box(text: str) -> Box:
    """The box that ``exact_box`` wrote.

    Raises:
        ValueError: the text is of another form.
    """
    match = _EXACT_BOX.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a box as [x1, y1, x2, y2], got {text[:80]!r}")
    x1, y1, x2, y2 = (float(edge) for edge in match.groups())
    return x1, y1, x2, y2


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
