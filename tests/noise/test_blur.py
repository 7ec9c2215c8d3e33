"""Defocus blur against a brute-force convolution and against ImageNet-C's kernel."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.blur import defocus_blur
from bitquake.noise.seeding import RandomStream

KEY = SampleKey("d", "s", "blur")
RADII = (3, 4, 6, 8, 10)


def disk(radius: float) -> np.ndarray:
    """The documented kernel: a linear ramp one pixel wide at the edge, in steps of 1/8; sums to one."""
    reach = int(radius + 1)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    nested = [radius - 0.5 + (step + 0.5) / 8 for step in range(8)]
    kernel = sum(((y * y + x * x <= r * r) & (r >= 0)).astype(float) for r in nested)
    return kernel / kernel.sum()


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Pixel by pixel, mirrored borders, float64."""
    reach = len(kernel) // 2
    height, width, _ = image.shape

    def mirror(index: int, size: int) -> int:
        period = max(1, 2 * size - 2)
        index %= period
        return index if index < size else period - index

    out = np.zeros(image.shape)
    for y in range(height):
        rows = [mirror(y + d, height) for d in range(-reach, reach + 1)]
        for x in range(width):
            columns = [mirror(x + d, width) for d in range(-reach, reach + 1)]
            out[y, x] = (image[np.ix_(rows, columns)] * kernel[:, :, None]).sum(axis=(0, 1))
    return out


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return defocus_blur(image, {"radius": radius}, RandomStream(0, KEY, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.05, 9.0), st.integers(0, 2**32 - 1))
def test_equals_the_brute_force_convolution(height: int, width: int, radius: float, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.abs(blurred(image, radius) - convolve(image, disk(radius))).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("shape", [(200, 33), (70, 90), (129, 65)])
def test_bands_leave_no_seams(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for radius in (3.0, 10.0, 21.4):
        exact = cv2.filter2D(image.astype(np.float64), -1, disk(radius), borderType=cv2.BORDER_REFLECT_101)
        assert np.abs(blurred(image, radius) - exact).max() <= 0.5 + 1e-6


def test_large_radii_do_not_overflow() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    for radius in (300.0, 900.0):  # above 818 the sums need more than 32 bits
        assert (blurred(white, radius) == 255).all()


def imagenet_c_kernel(radius: int, alias: float) -> np.ndarray:
    reach = 8 if radius <= 8 else radius
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    jagged = (x * x + y * y <= radius * radius).astype(np.float64)
    size = 3 if radius <= 8 else 5
    return cv2.GaussianBlur(jagged / jagged.sum(), (size, size), sigmaX=alias)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_close_to_imagenet_c(severity: int) -> None:
    radius, alias = RADII[severity - 1], (0.1, 0.5, 0.5, 0.5, 0.5)[severity - 1]
    assert image_noises()["defocus_blur"].parameters[severity - 1] == {"radius": radius}
    theirs = imagenet_c_kernel(radius, alias)
    if severity in (4, 5):  # the disk fills its array, and OpenCV mirrors it there: the documented defect
        assert abs(theirs.sum() - 1) > 0.005
    theirs /= theirs.sum()
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = cv2.resize(small, (320, 240), interpolation=cv2.INTER_CUBIC)
    expected = cv2.filter2D(image.astype(np.float64), -1, theirs)
    out = apply(image, "defocus_blur", severity=severity, key=KEY)
    assert np.abs(out - expected).mean() < 0.6  # rounding alone makes 0.25
    assert np.abs(out - expected).mean() < 0.05 * np.abs(out - image.astype(float)).mean()


def test_scaled_mode_multiplies_the_radius_and_small_pictures_still_blur() -> None:
    noise = image_noises()["defocus_blur"]
    assert noise.parameters_for(5, "scaled", 64, 100) == {"radius": pytest.approx(10 * 64 / 224)}
    assert noise.parameters_for(5, "native", 64, 100) == {"radius": 10}
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    deviations = [apply(image, "defocus_blur", severity=s, key=KEY, mode="scaled").std() for s in SEVERITIES]
    assert image.std() * 0.85 > deviations[0] and deviations == sorted(deviations, reverse=True)
    assert deviations[4] < 0.25 * image.std()


def test_width_grows_smoothly_with_fractional_radius() -> None:
    widths = []
    for radius in np.arange(0.5, 12, 0.25):
        kernel = disk(radius)
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        widths.append(np.sqrt((kernel * offsets**2).sum()))
        dot = np.zeros((31, 31, 3), np.uint8)
        dot[15, 15] = 255
        out = blurred(dot, radius)[:, :, 0] / 255
        if radius < 4:  # beyond that one pixel of 255 is spread too thin for 8 bits
            reach = len(kernel) // 2
            assert np.abs(out[15 - reach : 16 + reach, 15 - reach : 16 + reach] - kernel).max() <= 0.5 / 255 + 1e-9
    assert (np.diff(widths) > 0).all()  # a uniform disk has standard deviation radius / 2
    assert np.abs(np.array(widths)[10:] - np.arange(0.5, 12, 0.25)[10:] / 2).max() < 0.1
