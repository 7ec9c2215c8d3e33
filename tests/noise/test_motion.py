"""Motion blur against ImageMagick's sum in floating point; zoom blur against SciPy's affine transform."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.blur import gaussian_weights
from bitquake.noise.motion import ANGLE_UNIT, direction, motion_blur, smeared, zoom_blur
from bitquake.noise.seeding import RandomStream

KEY = SampleKey("d", "s", "motion")
MOTIONS = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
ZOOMS = (  # ImageNet-C's own expressions
    np.arange(1, 1.11, 0.01),
    np.arange(1, 1.16, 0.01),
    np.arange(1, 1.21, 0.02),
    np.arange(1, 1.26, 0.02),
    np.arange(1, 1.31, 0.03),
)


def test_angles_are_uniform_between_minus_and_plus_45_degrees() -> None:
    pairs = np.array([direction(u) for u in range(0, 65536, 7)]) / ANGLE_UNIT
    expected = 90 * (np.arange(0, 65536, 7) + 0.5) / 65536 - 45
    assert np.abs(np.degrees(np.arctan2(pairs[:, 1], pairs[:, 0])) - expected).max() < 1e-4
    assert np.abs(np.hypot(*pairs.T) - 1).max() < 1e-6


def test_no_angle_depends_on_the_last_bits_of_the_c_library() -> None:
    angles = [math.radians(90 * (u + 0.5) / 65536 - 45) for u in range(65536)]
    scaled = ANGLE_UNIT * np.array([[math.cos(angle), math.sin(angle)] for angle in angles])
    assert np.abs(np.abs(scaled % 1) - 0.5).min() > 1e-7  # the C library may err by 1e-9 here


def image_magick(image: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """MotionBlurImage of ImageMagick 6 and 7 in float64: one-sided Gaussian, whole-pixel offsets, border repeated."""
    width = 2 * math.ceil(radius) + 1
    kernel = np.exp(-(np.arange(width) ** 2) / (2 * sigma * sigma))
    kernel /= kernel.sum()
    y, x = np.arange(image.shape[0]), np.arange(image.shape[1])
    out = np.zeros(image.shape)
    for i, weight in enumerate(kernel):
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        out += weight * image[np.clip(y + dy, 0, y[-1])][:, np.clip(x + dx, 0, x[-1])]
    return out


@pytest.mark.parametrize("severity", SEVERITIES)
def test_motion_blur_is_the_sum_of_image_magick(severity: int) -> None:
    radius, sigma = MOTIONS[severity - 1]
    assert image_noises()["motion_blur"].parameters[severity - 1] == {"radius": radius, "sigma": sigma}
    image = np.random.default_rng(severity).integers(0, 256, (110, 70, 3), dtype=np.uint8)
    for seed in range(6):
        angle = 90 * (RandomStream(seed, KEY, 11).uint16(1)[0] + 0.5) / 65536 - 45
        out = apply(image, "motion_blur", severity=severity, key=KEY, seed=seed)
        assert np.abs(out - image_magick(image, radius, sigma, angle)).max() < 0.52  # half a level by rounding


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.floats(0.05, 30.0),
    st.floats(0.05, 20.0),
    st.integers(0, 2**32 - 1),
)
def test_motion_blur_is_exact_integer_arithmetic(h: int, w: int, radius: float, sigma: float, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    cosine, sine = direction(int(RandomStream(seed, KEY, 11).uint16(1)[0]))
    y, x = np.arange(h), np.arange(w)
    sums = np.zeros(image.shape, np.int64)
    for i, weight in enumerate(gaussian_weights(sigma, 2 * math.ceil(radius), 1, 16)):
        dy, dx = (math.ceil((2 * i * part - ANGLE_UNIT) / (2 * ANGLE_UNIT)) for part in (sine, cosine))
        sums += weight * image.astype(np.int64)[np.clip(y + dy, 0, h - 1)][:, np.clip(x + dx, 0, w - 1)]
    down, rest = sums >> 16, sums & 65535
    expected = down + ((rest > 32768) | ((rest == 32768) & (down % 2 == 1)))
    out = motion_blur(image, {"radius": radius, "sigma": sigma}, RandomStream(seed, KEY, 11))
    assert np.array_equal(out, expected)


def test_a_dot_smears_away_from_the_direction_and_stays_brightest_where_it_was() -> None:
    dot = np.zeros((61, 61, 3), np.uint8)
    dot[30, 30] = 255
    half = round(math.sqrt(0.5) * ANGLE_UNIT)
    for along, down in ((ANGLE_UNIT, 0), (half, half), (half, -half), (-half, -half), (0, ANGLE_UNIT)):
        out = smeared(dot, 10, 3, along, down)[:, :, 0].astype(int)
        y, x = np.nonzero(out)
        brightest = np.array(divmod(int(out.argmax()), 61))
        assert np.abs(brightest - 30).max() <= 1 and len(y) > 5  # on a diagonal two steps round to the second pixel
        assert ((30 - x) * np.sign(along) >= 0).all() and ((30 - y) * np.sign(down) >= 0).all()
        assert out.sum() == pytest.approx(255, abs=4)  # each of some ten pixels is rounded


def test_scaled_motion_is_as_long_in_proportion_to_the_picture() -> None:
    noise = image_noises()["motion_blur"]
    assert noise.parameters_for(3, "scaled", 448, 900) == {"radius": 30, "sigma": 16}
    rows = [np.arange(side * 3) < side for side in (56, 448)]
    spread = []
    for row in rows:  # the centre of mass of a step's slope, as a share of the side
        side = len(row) // 3
        step = np.repeat((255 * row).astype(np.uint8)[None, :, None], side, axis=0).repeat(3, axis=2)
        out = apply(step, "motion_blur", severity=3, key=KEY, mode="scaled")[side // 2, :, 0].astype(float)
        spread.append((out - step[side // 2, :, 0]).sum() / 255 / side)
    assert spread[0] == pytest.approx(spread[1], rel=0.15) and abs(spread[1]) > 0.01


def mean_of_zooms(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The image and its copies about the exact centre, bilinear in float64 by SciPy."""
    total = image.astype(float)
    centre = (np.array(image.shape[:2]) - 1) / 2
    for factor in factors:
        for channel in range(3):
            total[:, :, channel] += ndimage.affine_transform(
                image[:, :, channel].astype(float), [1 / factor] * 2, centre - centre / factor, order=1, mode="nearest"
            )
    return total / (len(factors) + 1)


@pytest.mark.parametrize("shape", [(480, 3), (47, 90), (130, 131), (1, 9), (2, 2)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_the_mean_of_scipys_zooms(severity: int, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(severity).integers(0, 256, (*shape, 3), dtype=np.uint8)
    exact = mean_of_zooms(image, ZOOMS[severity - 1])
    out = apply(image, "zoom_blur", severity=severity, key=KEY)
    # Besides the last rounding, positions are off by up to 1/512 of a pixel and copies by up to half a level.
    assert np.abs(out - exact).max() < 1 and np.abs(out - exact).mean() < 0.27 + 0.05 * (out.size < 200)
    assert abs((out - exact).mean()) < 0.05 or out.size < 200  # nothing gets darker or brighter


def imagenet_c_zoom(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """ImageNet-C: a central crop of whole pixels, enlarged by SciPy and trimmed, for every factor."""
    height, width, _ = image.shape
    total = image.astype(float)
    for factor in factors:
        h, w = math.ceil(height / factor), math.ceil(width / factor)
        top, left = (height - h) // 2, (width - w) // 2
        large = ndimage.zoom(image[top : top + h, left : left + w].astype(float), (factor, factor, 1), order=1)
        top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
        total += large[top : top + height, left : left + width]
    return total / (len(factors) + 1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_close_to_imagenet_c(severity: int) -> None:
    small = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    image = ndimage.zoom(small, (16, 16, 1), order=1)
    theirs = imagenet_c_zoom(image, ZOOMS[severity - 1])
    out = apply(image, "zoom_blur", severity=severity, key=KEY)
    change = np.abs(theirs - image.astype(float)).mean()
    assert np.abs(out - theirs).mean() < 0.15 * change  # theirs is off the centre by up to a pixel


def test_zoom_blur_keeps_the_centre_and_its_symmetry() -> None:
    image = np.random.default_rng(1).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    values = image_noises()["zoom_blur"].parameters[4]
    out = zoom_blur(image, values, RandomStream(0, KEY, 12)).astype(int)
    assert np.array_equal(out[37, 50], image[37, 50])
    turned = zoom_blur(image[::-1, ::-1], values, RandomStream(0, KEY, 12))[::-1, ::-1]
    assert np.abs(out - turned).max() <= 1


def test_zoom_blur_declares_that_no_box_could_follow_it() -> None:
    noise = image_noises()["zoom_blur"]
    assert noise.geometry == "changed" and noise.move_box is None and not noise.spatial
