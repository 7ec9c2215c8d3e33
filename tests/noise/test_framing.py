"""Crop and rotation against SciPy and exact cases; moved boxes against where drawn shapes really end up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from bitquake.noise import SEVERITIES, NoiseError, NoiseSpec, SampleKey, apply, image_noises, move_box, registry
from bitquake.noise.framing import rotation
from bitquake.noise.seeding import RandomStream

KEEP = (0.95, 0.9, 0.84, 0.77, 0.71)
ANGLES = (5, 10, 15, 20, 30)
KEYS = [SampleKey("d", "s", str(sample)) for sample in range(40)]
KEY = KEYS[0]


def addresses(height: int, width: int) -> np.ndarray:
    """A picture whose pixels say where they are: red the column, green the row."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, 0 * x], axis=2).astype(np.uint8)


def extent(out: np.ndarray) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 around the pixels that are more red than half."""
    rows, columns = np.nonzero((out[:, :, 0] > 127) & (out[:, :, 1] < 64))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, across) * max(0.0, down)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


@pytest.mark.parametrize("height, width", [(100, 150), (37, 200), (2, 3), (1, 1)])
def test_crop_is_a_window_off_the_centre_inside_the_milder_ones(height: int, width: int) -> None:
    image = addresses(height, width)
    sides = set()
    for key in KEYS:
        outer = (0, 0, width - 1, height - 1)
        for severity, keep in zip(SEVERITIES, KEEP, strict=True):
            out = apply(image, "off_centre_crop", severity=severity, key=key)
            assert out.shape == (max(1, round(keep * height)), max(1, round(keep * width)), 3)
            (left, top, _), (right, bottom, _) = out[0, 0].tolist(), out[-1, -1].tolist()
            assert np.array_equal(out, image[top : bottom + 1, left : right + 1])
            for low, high, side in ((left, right, width), (top, bottom, height)):
                play = side - (high - low + 1)
                assert min(low, side - 1 - high) <= play / 4 + 0.5
            if min(height, width) > 30:
                sides.add((left > width - 1 - right, top > height - 1 - bottom))
                inner = (left, top, right, bottom)
                assert all(a <= b + 1 for a, b in zip(outer[:2], inner[:2], strict=True))
                assert all(a >= b - 1 for a, b in zip(outer[2:], inner[2:], strict=True))
                outer = inner
    assert len(sides) in (0, 4)  # every corner of the picture is kept to by some sample


@pytest.mark.parametrize("severity", SEVERITIES)
def test_box_of_a_cropped_picture_is_where_the_rectangle_is_drawn(severity: int) -> None:
    moved = gone = 0
    for number, key in enumerate(KEYS):
        x1, y1 = 7 * number % 120, 11 * number % 80
        box = (x1, y1, x1 + 10 + number % 30, y1 + 12 + 3 * number % 25)
        image = np.full((120, 170, 3), 255, np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
        out = apply(image, "off_centre_crop", severity=severity, key=key)
        drawn = int((image[:, :, 1] == 0).sum())
        left = int((out[:, :, 1] == 0).sum())
        result = move_box(box, (170, 120), "off_centre_crop", severity=severity, key=key)
        if 2 * left < drawn:
            assert result is None
            gone += 1
        else:
            assert result == (extent(out), (out.shape[1], out.shape[0]))
            moved += 1
    assert moved > 20 and gone + moved == 40 and (severity < 3 or gone)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("height, width", [(61, 90), (80, 33)])
def test_rotation_is_bilinear_interpolation_on_grey(severity: int, height: int, width: int) -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).uniform(0, 255, (height, width, 3)), (2, 2, 0))
    image = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    turns = set()
    for key in KEYS[:6]:
        out = apply(image, "rotation", severity=severity, key=key).astype(float)
        errors = {}
        for sign in (1, -1):
            angle = sign * math.radians(ANGLES[severity - 1])
            y, x = np.mgrid[0:height, 0:width] - np.array([height - 1, width - 1]).reshape(2, 1, 1) / 2
            source_y = math.sin(angle) * x + math.cos(angle) * y + (height - 1) / 2
            source_x = math.cos(angle) * x - math.sin(angle) * y + (width - 1) / 2
            framed = np.pad(image.astype(float), ((2, 2), (2, 2), (0, 0)), constant_values=128)
            exact = np.stack(
                [
                    ndimage.map_coordinates(framed[:, :, c], [source_y + 2, source_x + 2], order=1, cval=128)
                    for c in range(3)
                ],
                axis=2,
            )
            errors[sign] = np.abs(out - exact).max()
        best = min(errors, key=lambda sign: errors[sign])
        assert errors[best] < 1.7 and errors[-best] > 30  # coordinates are rounded to 1/64 of a pixel
        turns.add(best)
    assert turns == {1, -1}


def test_rotation_by_nothing_and_by_quarters_only_moves_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (31, 31, 3), dtype=np.uint8)
    for sample in range(8):

        def turned(angle: float) -> np.ndarray:
            return rotation(image, {"angle": angle}, RandomStream(0, KEYS[sample], 25))  # noqa: B023

        assert np.array_equal(turned(0), image)
        assert np.array_equal(turned(180), image[::-1, ::-1])
        assert any(np.array_equal(turned(90), np.rot90(image, quarter)) for quarter in (1, 3))
    wide = np.zeros((10, 90, 3), np.uint8)
    assert (rotation(wide, {"angle": 90}, RandomStream(0, KEY, 25))[:, [0, 20, 60, 89]] == 128).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_box_of_a_rotated_picture_is_around_the_ellipse_drawn_in_it(severity: int) -> None:
    """An ellipse that fills its box, drawn finely, rotated, and found again by its colour."""
    size = (200, 160)
    y, x = np.mgrid[0:160, 0:200] + 0.5
    found = 0
    for key in KEYS[:12]:
        for box in ((60, 40, 130, 90), (90, 20, 120, 120), (30, 70, 110, 95), (70.5, 50.25, 99, 100.75)):
            (cx, cy), (a, b) = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), (box[2] - box[0], box[3] - box[1])
            image = np.full((160, 200, 3), 255, np.uint8)
            image[((x - cx) * 2 / a) ** 2 + ((y - cy) * 2 / b) ** 2 <= 1] = (255, 0, 0)
            result = move_box(box, size, "rotation", severity=severity, key=key)
            assert result is not None and result[1] == size
            seen = extent(apply(image, "rotation", severity=severity, key=key))
            if min(seen[:2]) > 0 and seen[2] < 200 and seen[3] < 160:
                assert np.abs(np.subtract(result[0], seen)).max() < 1.5
                assert iou(result[0], seen) > 0.9
                found += 1
    assert found >= 40


@pytest.mark.parametrize("severity, square", list(zip(SEVERITIES, (0.85, 0.75, 0.67, 0.61, 0.54), strict=True)))
def test_rotated_box_is_smaller_than_the_one_around_a_rectangle_as_documented(severity: int, square: float) -> None:
    image = np.full((200, 200, 3), 255, np.uint8)
    image[70:130, 70:130] = (255, 0, 0)
    result = move_box((70, 70, 130, 130), (200, 200), "rotation", severity=severity, key=KEY)
    assert result is not None
    seen = extent(apply(image, "rotation", severity=severity, key=KEY))
    assert iou(result[0], seen) == pytest.approx(square, abs=0.03)
    assert all(a >= b - 1 for a, b in zip(result[0][:2], seen[:2], strict=True))
    assert all(a <= b + 1 for a, b in zip(result[0][2:], seen[2:], strict=True))
    assert f"{square}" in image_noises()["rotation"].documentation


def test_a_box_turned_out_of_the_picture_is_gone() -> None:
    corners = [(0, 0, 20, 20), (180, 0, 200, 20), (0, 80, 20, 100), (180, 80, 200, 100)]
    whole = np.zeros((100, 200, 3), np.uint8)
    for key in KEYS[:10]:
        for box in corners:
            image = whole.copy()
            image[box[1] : box[3], box[0] : box[2]] = (255, 0, 0)
            out = apply(image, "rotation", severity=5, key=key)
            left = ((out[:, :, 0] > 200) & (out[:, :, 1] < 64)).sum()
            result = move_box(box, (200, 100), "rotation", severity=5, key=key)
            assert (result is None) == (left < 200)  # here a corner leaves all or stays for the most part
    centre = move_box((90, 40, 110, 60), (200, 100), "rotation", severity=5, key=KEY)
    assert centre is not None and np.allclose(centre[0], (90, 40, 110, 60), atol=1e-6)  # a circle stays as it is


@settings(max_examples=100, deadline=None)
@given(
    x=st.floats(0, 400),
    y=st.floats(0, 300),
    across=st.floats(0.5, 500),
    down=st.floats(0.5, 400),
    name=st.sampled_from(["off_centre_crop", "rotation", "fog", "occlusion"]),
    severity=st.sampled_from(SEVERITIES),
    sample=st.text(max_size=2),
)
def test_a_moved_box_lies_in_the_picture_that_apply_returns(
    x: float, y: float, across: float, down: float, name: str, severity: int, sample: str
) -> None:
    key, size = SampleKey("d", "s", sample), (64, 48)
    box = (x * 0.15, y * 0.15, min(64.0, (x + across) * 0.16 + 0.1), min(48.0, (y + down) * 0.16 + 0.1))
    if box[0] >= box[2] or box[1] >= box[3]:
        return
    result = move_box(box, size, name, severity=severity, key=key, mode="scaled", seed=3)
    if image_noises()[name].geometry == "preserved":
        assert result == (box, size)
    elif result is not None:
        (x1, y1, x2, y2), new_size = result
        image = np.zeros((48, 64, 3), np.uint8)
        out = apply(image, name, severity=severity, key=key, mode="scaled", seed=3)
        assert new_size == (out.shape[1], out.shape[0])
        assert 0 <= x1 < x2 <= new_size[0] and 0 <= y1 < y2 <= new_size[1]


def test_a_spec_moves_boxes_as_it_corrupts() -> None:
    spec = NoiseSpec("rotation", 4, seed=9)
    box, size = (10.0, 20.0, 50.0, 60.0), (100, 80)
    assert spec.move_box(box, size, KEY) == move_box(box, size, "rotation", severity=4, key=KEY, seed=9)
    by_seed = {NoiseSpec("off_centre_crop", 4, seed=s).move_box(box, size, KEY) for s in range(5)}
    assert len(by_seed) > 1


def test_boxes_that_cannot_be_moved_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    box, size = (1.0, 2.0, 3.0, 4.0), (10, 10)
    for bad in ((3.0, 2.0, 3.0, 4.0), (1.0, 5.0, 3.0, 4.0), (math.nan, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0)):
        for name in ("fog", "rotation"):
            with pytest.raises(NoiseError, match=r"^box: expected finite x1 < x2"):
                move_box(bad, size, name, severity=1, key=KEY)  # type: ignore[arg-type]
    for wrong in ((10,), (10.5, 10), (0, 10), (10, True)):
        with pytest.raises(NoiseError, match=r"^size: expected"):
            move_box(box, wrong, "fog", severity=1, key=KEY)  # type: ignore[arg-type]
    with pytest.raises(NoiseError, match="severities 1 to 5"):
        move_box(box, size, "rotation", severity=6, key=KEY)
    with pytest.raises(NoiseError, match="SampleKey"):
        move_box(box, size, "rotation", severity=1, key="7")  # type: ignore[arg-type]
    with pytest.raises(NoiseError, match="version 1, got 2"):
        move_box(box, size, "rotation", severity=1, key=KEY, version=2)
    melting = replace(image_noises()["rotation"], move_box=None)
    monkeypatch.setitem(registry._IMAGE_NOISES, "rotation", melting)
    with pytest.raises(NoiseError, match=r"rotation moves things.*no box can say where.*fog"):
        move_box(box, size, "rotation", severity=1, key=KEY)
