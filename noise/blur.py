"""Blurs that spread every pixel over its surroundings: defocus, Gaussian and glass.

OpenCV's filters are exact here although they count in floating point: every weight and every partial sum is an integer
that the format holds (below 2^24 in 32 bits, 2^53 in 64), so no order of summation and no vector instruction can change
a bit. Filters of 50 weights or more may go through a Fourier transform, which is not exact; none here is so large.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from decimal import Decimal, localcontext
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

NESTED = 8  # binary disks that together make one antialiased disk
INTEGERS = 1 << 24  # up to which 32-bit floating point holds every integer
LONGEST = 48  # weights in one row filter: OpenCV computes these directly
WEIGHT_BITS = 16  # of a Gaussian's weights for 8-bit pixels: 24 bits hold the sum
GUARD_BITS = 4  # fraction kept between the passes of a separable filter, at the cost of as many bits of weight
NARROW = 0.6  # standard deviation below which a sampled Gaussian is narrower than it should be


def disk_rows(radius: float) -> dict[int, dict[int, int]]:
    """An antialiased disk as vertical runs: half-height of a run -> its columns dx and how often it occurs there.

    The weight of a pixel at distance d from the centre is 8 clip(radius + 1/2 - d, 0, 1), rounded to an integer:
    the number, out of eight nested disks of radii radius - 7/16, ..., radius + 7/16, that contain it.
    """
    radii = [radius + (index + 0.5) / NESTED - 0.5 for index in range(NESTED)]
    rows: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for dx in range(int(radii[-1]) + 1):
        for r in radii:
            if r >= dx:
                for side in {dx, -dx}:
                    rows[int(math.sqrt(r * r - dx * dx))][side] += 1
    return rows


@image_noise(
    id=3, version=1, exactness="exact", group="imagenet_c", parameters={"radius": (3, 4, 6, 8, 10)}, spatial=("radius",)
)
def defocus_blur(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Loss of focus: each channel convolved with a uniform disk; borders are mirrored without the edge pixel.

    Parameters: radius of the disk in pixels (spatial; it may be fractional, and below 1/2 leaves the image as it is).
    Differs from ImageNet-C: the disk's edge is antialiased by a linear ramp one pixel wide, in steps of 1/8, where
    ImageNet-C smooths a jagged disk with a Gaussian of 0.1 or 0.5 pixels; so fractional radii mean something. The
    weights sum to one, where ImageNet-C's kernels for radii 8 and 10 sum to 1.013 and 1.011.
    The result is rounded, not truncated, to 8 bits.
    """
    # All runs of one half-height, in whatever columns, share one sum down the image: the difference of two entries of a
    # running sum. A filter along the row, with a weight for each of those columns, then adds them up.
    disk = disk_rows(parameters["radius"])
    reach = max(disk)
    total = sum((2 * half + 1) * sum(columns.values()) for half, columns in disk.items())
    exact, exact_total = _float_for(255 * (2 * reach + 1) * NESTED), _float_for(256 * total)
    filters = [
        (half, start, row.astype(exact))
        for half, columns in disk.items()
        for start, row in _row_filters(columns, INTEGERS // (255 * (2 * half + 1)))
    ]

    height, width, _ = image.shape
    mirrored = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REFLECT_101)
    out = np.empty_like(image)
    band = max(64, 2 * reach)  # rows at a time: working memory stays in cache, and the halo cheap
    for top in range(0, height, band):
        rows = min(band, height - top)
        sums = _running_sums(mirrored[top : top + rows + 2 * reach], exact)
        blurred = np.full((rows, width, 3), total // 2, exact_total)
        run = np.empty((rows, *sums.shape[1:]), exact)
        summed = -1
        for half, start, row in filters:
            if half != summed:
                low, high = reach - half, reach + half + 1
                np.subtract(sums[high : high + rows], sums[low : low + rows], out=run)
                summed = half
            reached = run[:, reach + start :][:, : width + row.size - 1]
            cv2.accumulate(cv2.filter2D(reached, -1, row, anchor=(0, 0))[:, :width], blurred)
        blurred /= total  # correctly rounded, and so never lifted to the next integer
        out[top : top + rows] = blurred
    return out


def _float_for(bound: int) -> type[np.floating]:
    """The floating-point type that holds every integer up to a bound."""
    return np.float32 if bound <= INTEGERS else np.float64


def _row_filters(columns: Mapping[int, int], most: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Weights by column as dense rows, of at most ``LONGEST`` columns and a sum of ``most`` unless one column has more.

    Returns pairs (first column, weights of shape (1, n)).
    """
    found: list[list[int]] = []
    total = 0
    for dx in sorted(columns):
        total += columns[dx]
        if not found or dx - found[-1][0] >= LONGEST or total > most:
            found.append([])
            total = columns[dx]
        found[-1].append(dx)
    return [
        (near[0], np.array([[columns.get(dx, 0) for dx in range(near[0], near[-1] + 1)]], np.int64)) for near in found
    ]


def _running_sums(rows: RGB, dtype: type[np.floating]) -> npt.NDArray[np.floating]:
    """sums[i] = rows[0] + ... + rows[i - 1]; shape (rows + 1, columns, 3)."""
    sums = np.zeros((rows.shape[0] + 1, *rows.shape[1:]), dtype)
    for index, row in enumerate(rows):  # row by row is several times faster than numpy.cumsum over the first axis
        np.add(sums[index], row, out=sums[index + 1])
    return sums


@lru_cache(maxsize=64)
def gaussian_weights(sigma: float, reach: int, sides: int, bits: int) -> tuple[int, ...]:
    """Integers in proportion to exp(-d^2 / (2 sigma^2)), d = 0..reach, of which 2^bits are used up: w0 + sides * rest.

    The sums over distances 0..d are rounded, not the weights, so that a wide Gaussian in few bits keeps its shape.
    Decimal arithmetic is defined to the last digit, its ``exp`` included, so every machine gets the same weights.

    Args:
        sides: 2 for a kernel on both sides of the pixel, 1 for one side.
    """
    with localcontext() as context:
        context.prec = 30
        density = [(-(d * d) / (2 * Decimal(sigma) ** 2)).exp() for d in range(reach + 1)]
        unit = (1 << bits) / (density[0] + sides * sum(density[1:])) / sides
        mass, used, weights = Decimal(0), 0, []
        for d, value in enumerate(density):
            mass += value * (sides if d else 1)
            until = sides * int((mass * unit).to_integral_value())
            weights.append((until - used) // (sides if d else 1))
            used = until
    return tuple(weights)


def _blur_kernel(sigma: float, bits: int) -> npt.NDArray[np.float32]:
    """A Gaussian of standard deviation sigma out to 4 sigma, in integers of sum 2^bits."""
    if sigma < NARROW:
        side = round(sigma * sigma / 2 * (1 << bits))
        weights: tuple[int, ...] = ((1 << bits) - 2 * side, side)
    else:
        weights = gaussian_weights(sigma, int(4 * sigma + 0.5), 2, bits)
    return np.array([*weights[:0:-1], *weights], np.float32)


def gaussian(image: RGB, sigma: float) -> RGB:
    """An image convolved with a Gaussian: see :func:`gaussian_blur`."""
    across, down = _blur_kernel(sigma, WEIGHT_BITS), _blur_kernel(sigma, WEIGHT_BITS - GUARD_BITS)
    single = np.ones(1, np.float32)
    reach = across.size // 2
    padded = cv2.copyMakeBorder(image, reach, reach, 0, 0, cv2.BORDER_REPLICATE)
    out = np.empty_like(image)
    band = max(96, 3 * reach)  # rows at a time
    for top in range(0, image.shape[0], band):
        rows = min(band, image.shape[0] - top)
        part = padded[top : top + rows + 2 * reach]
        part = cv2.sepFilter2D(part, cv2.CV_32F, across, single, borderType=cv2.BORDER_REPLICATE)
        part *= np.float32(2.0 ** (GUARD_BITS - WEIGHT_BITS))
        np.rint(part, out=part)
        part = cv2.sepFilter2D(part, cv2.CV_32F, single, down)[reach : reach + rows]
        part *= np.float32(2.0**-WEIGHT_BITS)
        out[top : top + rows] = np.rint(part, out=part)
    return out


@image_noise(
    id=9,
    version=1,
    exactness="exact",
    group="imagenet_c_extra",
    parameters={"sigma": (1, 2, 3, 4, 6)},
    spatial=("sigma",),
)
def gaussian_blur(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Each channel convolved with a Gaussian cut at 4 sigma; outside the image its border pixels are repeated.

    Parameters: sigma, the standard deviation in pixels (spatial; it may be fractional).
    Differs from ImageNet-C: weights of 16 bits across and of 12 bits down the image, with the sums across rounded to
    1/16 of a level; below sigma = 0.6, which only scaled mode reaches, the weights sigma^2 / 2, 1 - sigma^2,
    sigma^2 / 2, because a sampled Gaussian is narrower than sigma there; and the result is rounded, not truncated, to
    8 bits.
    """
    return gaussian(image, parameters["sigma"])


@lru_cache(maxsize=16)
def swap_offsets(delta: float) -> npt.NDArray[np.int64]:
    """What a 16-bit uniform number makes of a swap: (dy, dx), shape (65536, 2).

    Both are uniform on -delta..delta - 1. Between two integers delta is one or the other, so that its mean square, with
    which that of the displacement grows, is right; delta = 0 is no swap.
    """
    low = math.floor(delta)
    boundary = round((1 - (delta * delta - low * low) / (2 * low + 1)) * 65536)
    offsets = np.zeros((65536, 2), np.int64)
    for reach, start, stop in ((low, 0, boundary), (low + 1, boundary, 65536)):
        if reach and start < stop:
            cell = np.arange(stop - start, dtype=np.int64) * (2 * reach) ** 2 // (stop - start)
            offsets[start:stop] = np.stack(np.divmod(cell, 2 * reach), axis=1) - reach
    return offsets


@image_noise(
    id=10,
    version=1,
    exactness="exact",
    group="imagenet_c",
    parameters={"sigma": (0.7, 0.9, 1, 1.1, 1.5), "delta": (1, 2, 2, 3, 4), "iterations": (2, 1, 3, 2, 2)},
    spatial=("sigma", "delta"),
)
def glass_blur(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Frosted glass: Gaussian blur; every pixel swapped with one nearby, several times over; the same blur again.

    Parameters: sigma, the standard deviation of the blurs in pixels (spatial); delta, so that a pixel is swapped with
    the one at (y + dy, x + dx), both uniform on -delta..delta - 1 (spatial; a fractional delta is, for each swap anew,
    the integer below or above, right in the mean square); iterations, over all pixels farther than delta from a border.
    As in ImageNet-C one swap follows another. Differs from ImageNet-C: its swaps are copies, because a NumPy view has
    changed before it is read, so that pixels vanish and double; here they are swaps, and only the blurs make new
    colours. ImageNet-C goes through the pixels from the bottom right to the top left; here, with s = 2 ceil(delta),
    every s-th pixel of every s-th row has its turn before the others, again from the bottom right. The blurs are those
    of gaussian_blur, and are rounded, not truncated, to 8 bits.
    """
    sigma = parameters["sigma"]
    return gaussian(_shuffled(gaussian(image, sigma), parameters, stream), sigma)


def _shuffled(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """The image after the swaps of :func:`glass_blur`."""
    height, width, _ = image.shape
    delta = parameters["delta"]
    offsets: npt.NDArray[np.int64] = swap_offsets(delta) @ np.array([width, 1])
    packed = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA).view(np.uint32)[:, :, 0]  # a pixel in one number
    for _ in range(int(parameters["iterations"])):
        swap(packed, offsets, stream.uint16(height * width).reshape(height, width), math.ceil(delta))
    out: RGB = cv2.cvtColor(packed.view(np.uint8).reshape(height, width, 4), cv2.COLOR_RGBA2RGB)
    return out


def swap(
    pixels: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64], field: npt.NDArray[np.uint16], reach: int
) -> None:
    """Swap each pixel, in place, with the one that lies offsets[field] further on in memory.

    Two pixels of one class are 2 reach or more apart, and a swap stays within -reach..reach - 1 of its pixel: the swaps
    of a class touch no pixel twice, so doing them all at once is doing them one after another, in any order.
    """
    height, width = pixels.shape
    step = 2 * reach
    flat = pixels.reshape(-1)
    for y in range(step, 0, -1):
        for x in range(step, 0, -1):
            some = slice(reach + y, height - reach + 1, step), slice(reach + x, width - reach + 1, step)
            others = offsets.take(field[some])
            others += np.arange(height, dtype=np.int64)[some[0], None] * width
            others += np.arange(width)[some[1]]
            here = pixels[some].copy()
            pixels[some] = flat.take(others)
            flat[others] = here
