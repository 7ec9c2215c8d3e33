"""Defocus blur against a brute-force convolution and ImageNet-C's kernel; Gaussian blur against SciPy and against the
same sums in integers; glass blur against a loop that swaps one pixel after another."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.blur import defocus_blur, gaussian, gaussian_weights, swap, swap_offsets
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
    for radius in (3.0, 10.0, 21.4, 60.0):  # beyond 51 the sums need more than 24 bits
        exact = cv2.filter2D(image.astype(np.float64), -1, disk(radius), borderType=cv2.BORDER_REFLECT_101)
        assert np.abs(blurred(image, radius) - exact).max() <= 0.5 + 1e-6


def test_large_radii_do_not_overflow() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    for radius in (300.0, 900.0):  # sums of up to 33 bits
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


SIGMAS = (1, 2, 3, 4, 6)


def integer_weights(sigma: float, bits: int) -> np.ndarray:
    """Both sides of the documented kernel, in integers of sum 2^bits."""
    if sigma < 0.6:
        side = round(sigma * sigma / 2 * 2**bits)
        return np.array([side, 2**bits - 2 * side, side])
    half = np.array(gaussian_weights(sigma, int(4 * sigma + 0.5), 2, bits))
    return np.concatenate([half[:0:-1], half])


def integer_gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    """The documented arithmetic with NumPy's 64-bit integers only; halves are rounded to even."""

    def rounded(values: np.ndarray, bits: int) -> np.ndarray:
        down, rest = values >> bits, values & (2**bits - 1)
        half = 2 ** (bits - 1)
        return down + ((rest > half) | ((rest == half) & (down % 2 == 1)))

    def along(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
        index = np.arange(values.shape[axis])
        taps = [
            weight * values.take(np.clip(index + d, 0, index[-1]), axis)
            for d, weight in enumerate(weights, -(len(weights) // 2))
        ]
        return np.sum(taps, axis=0)

    across = rounded(along(image.astype(np.int64), integer_weights(sigma, 16), 1), 12)
    return rounded(along(across, integer_weights(sigma, 12), 0), 16)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 14.0), st.integers(0, 2**32 - 1))
def test_gaussian_blur_is_exact_integer_arithmetic(height: int, width: int, sigma: float, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(gaussian(image, sigma), integer_gaussian(image, sigma))


def test_gaussian_blur_of_white_uses_the_whole_range_of_a_float() -> None:
    """255 in every place makes the largest sums there can be, 255 * 2^16 on either pass."""
    white = np.full((70, 90, 3), 255, np.uint8)
    for sigma in (0.3, 1.0, 6.0, 20.0):
        assert np.array_equal(gaussian(white, sigma), white)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_equals_scipy(severity: int) -> None:
    assert image_noises()["gaussian_blur"].parameters[severity - 1] == {"sigma": SIGMAS[severity - 1]}
    image = np.random.default_rng(severity).integers(0, 256, (211, 150, 3), dtype=np.uint8)
    sigma = (SIGMAS[severity - 1],) * 2 + (0,)
    exact = ndimage.gaussian_filter(image.astype(float), sigma, mode="nearest", truncate=4)
    out = apply(image, "gaussian_blur", severity=severity, key=KEY)
    assert np.abs(out - exact).max() < 0.6  # half a level by rounding


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.45, 0.59, 0.61, 0.9, 2.5, 12.9, 40.0])
def test_gaussian_kernels_have_the_width_they_are_asked_for(sigma: float) -> None:
    for bits in (16, 12):
        weights = integer_weights(sigma, bits)
        offsets = np.arange(len(weights)) - len(weights) // 2
        assert weights.sum() == 2**bits and (weights >= 0).all()
        variance = (weights * offsets**2).sum() / 2**bits
        step = 2 * (len(weights) // 2 + 1) ** 2 / 2**bits  # one unit of weight more at the far end, on both sides
        assert abs(variance / sigma**2 - 1) < 0.03 or abs(variance - sigma**2) < step / 4
        if sigma > 0.6:
            exact = stats.norm.pdf(offsets, scale=sigma)
            assert np.abs(np.cumsum(weights) / 2**bits - np.cumsum(exact / exact.sum())).max() < 2 / 2**bits


def literal_glass(
    image: np.ndarray, delta: float, iterations: int, offsets: np.ndarray, stream: RandomStream
) -> np.ndarray:
    """One swap after another, as a loop over Python lists."""
    height, width, _ = image.shape
    pixels = [[tuple(pixel) for pixel in row] for row in image.tolist()]
    reach = int(np.ceil(delta))
    for _ in range(iterations):
        field = stream.uint16(height * width).reshape(height, width)
        for bottom in range(2 * reach):
            for right in range(2 * reach):
                for y in range(3 * reach - bottom, height - reach + 1, 2 * reach):
                    for x in range(3 * reach - right, width - reach + 1, 2 * reach):
                        dy, dx = offsets[field[y, x]]
                        held = pixels[y][x]
                        pixels[y][x] = pixels[y + dy][x + dx]
                        pixels[y + dy][x + dx] = held
    return np.array(pixels, np.uint8)


@pytest.mark.parametrize("mode", ["native", "scaled"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_is_one_swap_after_another(severity: int, mode: str) -> None:
    image = np.random.default_rng(severity).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    noise = image_noises()["glass_blur"]
    published = [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)][severity - 1]
    assert tuple(noise.parameters[severity - 1].values()) == published
    values = noise.parameters_for(severity, "scaled" if mode == "scaled" else "native", 61, 83)
    swapped = literal_glass(
        gaussian(image, values["sigma"]),
        values["delta"],
        int(values["iterations"]),
        swap_offsets(values["delta"]),
        RandomStream(3, KEY, noise.id),
    )
    expected = gaussian(swapped, values["sigma"])
    assert np.array_equal(noise.corrupt(image, values, RandomStream(3, KEY, noise.id)), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_swaps_lose_no_pixel_and_carry_it_no_farther_than_they_may(h: int, w: int, reach: int, seed: int) -> None:
    pixels = np.arange(h * w, dtype=np.uint32).reshape(h, w)
    field = np.random.default_rng(seed).integers(0, 65536, (h, w), dtype=np.uint16)
    before = pixels.copy()
    swap(pixels, swap_offsets(reach) @ np.array([w, 1]), field, reach)
    assert np.array_equal(np.sort(pixels, axis=None), before.ravel())
    assert np.array_equal(pixels[0], before[0]) and np.array_equal(pixels[:, 0], before[:, 0])  # as in ImageNet-C
    if min(h, w) <= 2 * reach:
        assert np.array_equal(pixels, before)
    elif min(h, w) > 4 * reach + 4 and reach > 1:
        assert (pixels != before).mean() > 0.1


@pytest.mark.parametrize("delta", [0.0, 0.286, 1, 1.14, 2, 2.5, 3, 4, 8.57, 107.1])
def test_swap_offsets_are_uniform_and_between_integers_right_in_the_mean_square(delta: float) -> None:
    offsets = swap_offsets(delta)
    low, high = int(delta), int(np.ceil(delta))
    assert offsets.shape == (65536, 2)
    if delta:
        assert offsets.min() == -high and offsets.max() == high - 1
    if delta == low and delta < 20:
        counts = np.unique(offsets, axis=0, return_counts=True)[1] if delta else np.array([65536])
        assert len(counts) == max(1, (2 * low) ** 2) and np.ptp(counts) <= 1
    squares = [(2 * d * d + 1) / 6 if d else 0 for d in (low, low + 1)]  # of a uniform number on -d..d - 1
    share = (delta**2 - low**2) / (2 * low + 1)
    expected = squares[0] * (1 - share) + squares[1] * share
    assert (offsets.astype(float) ** 2).mean(axis=0) == pytest.approx([expected, expected], rel=0.002, abs=1e-4)


def test_glass_blur_without_room_for_swaps_is_two_blurs() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    out = apply(image, "glass_blur", severity=5, key=KEY)
    assert np.array_equal(out, gaussian(gaussian(image, 1.5), 1.5))
