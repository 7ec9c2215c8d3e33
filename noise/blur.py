"""Blurs: loss of focus."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

NESTED = 8  # binary disks that together make one antialiased disk


def disk_columns(radius: float) -> list[list[tuple[int, int]]]:
    """An antialiased disk as vertical runs: for each column dx = 0, 1, ... the pairs (half-height, weight).

    The weight of a pixel at distance d from the centre is 8 clip(radius + 1/2 - d, 0, 1), rounded to an integer:
    the number, out of eight nested disks of radii radius - 7/16, ..., radius + 7/16, that contain it.
    """
    radii = [radius + (index + 0.5) / NESTED - 0.5 for index in range(NESTED)]
    columns = []
    for dx in range(int(radii[-1]) + 1):
        heights = Counter(int(math.sqrt(r * r - dx * dx)) for r in radii if r >= dx)
        columns.append(sorted(heights.items()))
    return columns


@image_noise(id=3, version=1, exactness="exact", parameters={"radius": (3, 4, 6, 8, 10)}, spatial=("radius",))
def defocus_blur(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Loss of focus: each channel convolved with a uniform disk; borders are mirrored without the edge pixel.

    Parameters: radius of the disk in pixels (spatial; it may be fractional, and below 1/2 leaves the image as it is).
    Differs from ImageNet-C: the disk's edge is antialiased by a linear ramp one pixel wide, in steps of 1/8, where
    ImageNet-C smooths a jagged disk with a Gaussian of 0.1 or 0.5 pixels; so fractional radii mean something. The
    weights sum to one, where ImageNet-C's kernels for radii 8 and 10 sum to 1.013 and 1.011.
    The result is rounded, not truncated, to 8 bits.
    """
    # A column of the disk is a run of ones, so its sum is the difference of two entries of a running sum down the
    # image: O(radius) integer operations per pixel, exact in any order.
    columns = disk_columns(parameters["radius"])
    reach = len(columns) - 1
    total = sum((2 if dx else 1) * n * (2 * half + 1) for dx, runs in enumerate(columns) for half, n in runs)
    dtype: type[np.unsignedinteger] = np.uint32 if 256 * total < 1 << 32 else np.uint64

    height, width, _ = image.shape
    mirrored = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REFLECT_101).reshape(
        height + 2 * reach, -1
    )
    out = np.empty_like(image)
    band = max(64, 4 * reach)  # rows at a time: working memory stays in cache, and the halo cheap
    for top in range(0, height, band):
        rows = min(band, height - top)
        sums = _running_sums(mirrored[top : top + rows + 2 * reach], dtype)
        blurred = np.zeros((rows, 3 * width), dtype)
        run = np.empty_like(blurred)
        for dx, runs in enumerate(columns):
            pair = sums[:, 3 * (reach + dx) :][:, : 3 * width]
            if dx:
                pair = pair + sums[:, 3 * (reach - dx) :][:, : 3 * width]
            for half, weight in runs:
                low, high = reach - half, reach + half + 1
                np.subtract(pair[high : high + rows], pair[low : low + rows], out=run)
                if weight > 1:
                    run *= dtype(weight)
                blurred += run
        blurred += dtype(total // 2)
        blurred //= dtype(total)
        out[top : top + rows] = blurred.reshape(rows, width, 3)
    return out


def _running_sums(rows: RGB, dtype: type[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """sums[i] = rows[0] + ... + rows[i - 1], modulo the range of dtype; shape (rows + 1, columns)."""
    sums = np.zeros((rows.shape[0] + 1, rows.shape[1]), dtype)
    for index, row in enumerate(rows):  # row by row is several times faster than numpy.cumsum over the first axis
        np.add(sums[index], row, out=sums[index + 1])
    return sums
