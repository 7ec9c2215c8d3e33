"""The elastic transform against ImageNet-C's recipe with OpenCV and SciPy, given the same random numbers."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises, move_box
from bitquake.noise.elastic import displacements, source_of_stretch
from bitquake.noise.seeding import RandomStream

call: Any = apply
move: Any = move_box
CONSTANTS = ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88))


def key(sample: object) -> SampleKey:
    return SampleKey("d", "s", str(sample))


def stream(sample: object) -> RandomStream:
    return RandomStream(0, key(sample), 18)


def picture(height: int, width: int) -> np.ndarray:
    """Smooth enough that a small error of place is a small error of colour."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 11 + c) + np.cos(y / 13 - c) + np.sin((x + y) / 29) for c in range(3)]
    return (127.5 + 40 * np.stack(waves, axis=2)).round().astype(np.uint8)


def published_matrix(severity: int, height: int, width: int, numbers: RandomStream) -> np.ndarray:
    """The forward affine map, by OpenCV."""
    jitter = CONSTANTS[severity - 1][2]
    centre, third = np.float32([width // 2, height // 2]), min(height, width) // 3
    before = np.float32([centre + third, [centre[0] + third, centre[1] - third], centre - third])
    moved = (2.0 * numbers.uint16(6) - 65535).reshape(3, 2) / 65536 * jitter
    return cv2.getAffineTransform(before, (before + moved).astype(np.float32))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (300, 201)])
def test_the_stretch_is_opencvs(severity: int, height: int, width: int) -> None:
    for sample in range(20):
        forward = published_matrix(severity, height, width, stream(sample))
        backward = cv2.invertAffineTransform(forward)
        ours = np.array(source_of_stretch((width, height), CONSTANTS[severity - 1][2], stream(sample)), float) / 2**32
        assert np.abs((ours - backward) @ [width, height, 1]).max() < 0.02 * max(1, np.abs(backward[:, :2]).max() ** 2)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (240, 330), (40, 60)])
def test_the_displacement_is_scipys_gaussian(severity: int, height: int, width: int) -> None:
    """To 1/64 of a pixel where every pixel is computed, else to 5 % of the spread or a quarter of a pixel."""
    alpha, sigma, _ = CONSTANTS[severity - 1]
    ours = displacements((width, height), image_noises()["elastic_transform"].parameters[severity - 1], stream(1))
    numbers = stream(1)
    for field in ours:
        noise = (2.0 * numbers.uint16(width * height) - 65535).reshape(height, width) / 65536
        expected = alpha * ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3)
        error = field(0, height) / 64 - expected
        if sigma < 16:
            assert np.abs(error).max() < 1 / 64
        else:
            assert np.sqrt(np.square(error).mean()) < max(0.05 * expected.std(), 0.25)
            assert field(0, height).std() / 64 == pytest.approx(expected.std(), rel=0.03, abs=0.1)
        assert np.array_equal(field(7, 19), field(0, height)[7:19])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_whole_transform_is_the_published_recipe(severity: int) -> None:
    height, width = 224, 260
    image, numbers = picture(height, width), stream(5)
    alpha, sigma, _ = CONSTANTS[severity - 1]
    forward = published_matrix(severity, height, width, numbers)
    stretched = cv2.warpAffine(image / 255, forward, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    noises = [(2.0 * numbers.uint16(width * height) - 65535).reshape(height, width) / 65536 for _ in range(2)]
    dx, dy = (alpha * ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3) for noise in noises)
    y, x = np.mgrid[0:height, 0:width]
    expected = 255 * np.stack(
        [ndimage.map_coordinates(stretched[:, :, c], [y + dy, x + dx], order=1, mode="reflect") for c in range(3)],
        axis=2,
    )
    error = np.abs(apply(image, "elastic_transform", severity=severity, key=key(5)) - expected)
    assert np.median(error) < 0.6 and np.quantile(error, 0.99) < (3 if sigma > 16 else 1.5)
    assert error.max() < 12  # at the edges, which ImageNet-C mirrors in another way
    assert np.abs(image - expected).mean() > 5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_scaled_mode_moves_twice_as_far_in_a_picture_twice_as_large(severity: int) -> None:
    noise = image_noises()["elastic_transform"]
    spreads = []
    for side in (224, 448):
        fields = [
            displacements((side, side), noise.parameters_for(severity, "scaled", side, side), stream(sample))
            for sample in range(12)
        ]
        spreads.append(np.sqrt(np.mean([np.square(f(0, side) / 64.0).mean() for pair in fields for f in pair])))
    # the mean over a whole picture of severity 1 is all that its 171-pixel Gaussian leaves: few effective numbers
    assert spreads[1] / spreads[0] == pytest.approx(2, rel=0.45 if severity == 1 else 0.1)


def ellipse(height: int, width: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """White, on black: the ellipse inscribed in a box."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x1, y1, x2, y2 = box
    inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
    return np.repeat(255 * inside.astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("mode", ["native", "scaled"])
def test_boxes_move_to_where_the_pixels_of_their_ellipse_are_seen(severity: int, mode: str) -> None:
    height, width, box = 300, 380, (150.0, 110.0, 260.0, 175.0)
    moved = 0
    for sample in range(8):
        seen = call(ellipse(height, width, box), "elastic_transform", severity=severity, key=key(sample), mode=mode)
        rows, columns = (np.flatnonzero((seen[:, :, 0] > 127).any(axis=axis)) for axis in (1, 0))
        found = move(box, (width, height), "elastic_transform", severity=severity, key=key(sample), mode=mode)
        if found is None:
            continue
        corners, size = found
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert size == (width, height)
        assert np.abs(np.subtract(corners, edges)).max() <= 2, (corners, edges)
        moved += np.abs(np.subtract(corners, box)).max() > 1
    assert moved >= 6


def test_a_box_that_left_the_picture_is_gone_and_one_that_stayed_is_not() -> None:
    found = [
        move((0.0, 0.0, 24.0, 24.0), (224, 224), "elastic_transform", severity=2, key=key(sample))
        for sample in range(60)
    ]
    gone = [
        not (call(ellipse(224, 224, (0, 0, 24, 24)), "elastic_transform", severity=2, key=key(sample)) > 127).any()
        for sample in range(60)
    ]
    assert all(box is None for box, lost in zip(found, gone, strict=True) if lost)
    assert 5 < sum(gone) < sum(box is None for box in found) < 55
    whole = move((0.0, 0.0, 224.0, 224.0), (224, 224), "elastic_transform", severity=3, key=key(0))
    assert whole is not None and np.abs(np.subtract(whole[0], (0, 0, 224, 224))).max() < 12


def test_pictures_too_small_to_stretch() -> None:
    for size in ((1, 1), (2, 2), (2, 300), (3, 3), (4, 9)):
        for severity in SEVERITIES:
            for mode in ("native", "scaled"):
                image = np.full((*size, 3), 90, np.uint8)
                assert (call(image, "elastic_transform", severity=severity, key=key(0), mode=mode) == 90).all()
