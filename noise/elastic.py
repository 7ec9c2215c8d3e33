"""Elastic transform: the picture stretched askew, then displaced from place to place. Boxes move along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction

import cv2
import numpy as np
import numpy.typing as npt

from .fields import (
    WEIGHT_BITS,
    Field,
    Positions,
    cell_centres,
    gaussian_kernel,
    interpolated,
    smoothed,
    smoothed_bands,
    spread_left,
)
from .framing import LEFT_OF_BOX
from .pixels import RGB
from .registry import Box, Size, image_noise
from .resampling import FRACTION_BITS, Coordinates, mirrored, packed, sample
from .seeding import U16, RandomStream

SIDE = 244.0  # ImageNet-C's constants are multiples of it (its authors meant 224)
MATRIX_BITS = 32  # of the fractions in the affine map
STEEPEST = Fraction(1 << 10)  # source pixels per pixel in a picture squeezed all but flat
TRUNCATE = 3.0  # standard deviations at which the smoothing kernel ends
BLOCKS_PER_SIGMA = 6  # how fine a grid a smooth displacement is computed on
FEWEST_BLOCKS = 16  # along the shorter side
GUARD_BITS = 6  # of the blocks' means
BAND = 1 << 14  # pixels at a time, to stay in cache

Matrix = tuple[tuple[int, int, int], tuple[int, int, int]]
Displacement = Callable[[int, int], npt.NDArray[np.signedinteger]]
"""Rows from, rows to -> how far from a pixel its source lies, in units of 2^-6 pixels; shape (rows, width)."""


def source_of_stretch(size: Size, jitter: float, stream: RandomStream) -> Matrix:
    """The affine map from a pixel of the stretched picture to its source, in units of 2^-32 pixels.

    As in ImageNet-C, three points around the centre, at a third of the shorter side, are moved by uniform numbers in
    (-jitter, jitter) and take the picture along. Source x = row 0 . (x, y, 1), source y = row 1 . (x, y, 1). Nothing
    moves where three points make no triangle: in pictures under 3 pixels, or when they are moved into one line.
    """
    one, unit = 1 << MATRIX_BITS, 1 << 16
    reach = min(size) // 3
    cx, cy = size[0] // 2, size[1] // 2
    moves = (2 * stream.uint16(6).astype(np.int64) - 65535) * round(jitter * 256) >> 8  # in units of 2^-16 pixels
    before = ((cx + reach, cy + reach), (cx + reach, cy - reach), (cx - reach, cy - reach))
    (ax, ay), (bx, by), (ox, oy) = (
        (x * unit + int(dx), y * unit + int(dy)) for (x, y), (dx, dy) in zip(before, moves.reshape(3, 2), strict=True)
    )
    ux, uy, vx, vy = ax - bx, ay - by, bx - ox, by - oy  # what became of (0, 2 reach) and (2 reach, 0)
    determinant = vx * uy - ux * vy
    if determinant == 0 or reach == 0:
        return (one, 0, 0), (0, one, 0)
    rows = []
    for start, along, down in ((cx - reach, uy, -ux), (cy - reach, -vy, vx)):
        slopes = (Fraction(part * 2 * reach * unit, determinant) for part in (along, down))
        dx, dy = (max(-STEEPEST, min(slope, STEEPEST)) for slope in slopes)
        rows.append((round(dx * one), round(dy * one), round((start - (dx * ox + dy * oy) / unit) * one)))
    return rows[0], rows[1]


def displacements(size: Size, parameters: Mapping[str, float], stream: RandomStream) -> tuple[Displacement, ...]:
    """How far across and how far down from a pixel its source lies."""
    pixel, sigma = parameters["pixel"], parameters["sigma"]
    # One number per pixel, not per cell of pixel x pixel: the same spread after smoothing stands for the same field.
    spread = spread_left(sigma, TRUNCATE) / spread_left(sigma * pixel, TRUNCATE)
    return tuple(displacement(size, parameters["alpha"] * pixel * spread, sigma * pixel, stream) for _ in range(2))


def displacement(size: Size, alpha: float, sigma: float, stream: RandomStream) -> Displacement:
    """alpha times a field of uniform numbers in (-1, 1) smoothed by a Gaussian, mirrored at the edges; in pixels.

    Where sigma is 12 pixels or more, the Gaussian acts on the means of blocks of about sigma / 6 pixels (at least 16
    blocks along the shorter side) and the result is interpolated. The field has the same spread and smoothness, and
    differs from what every single pixel would give by under 5 % of its spread, or a quarter of a pixel.
    """
    width, height = size
    noise = stream.uint16(width * height).reshape(height, width)
    spacing = max(1, min(int(sigma / BLOCKS_PER_SIGMA), min(size) // FEWEST_BLOCKS))
    if spacing == 1:
        field = _smoothed_pixels(noise, alpha, sigma)
        return lambda top, bottom: field[top:bottom]

    rows, columns = (max(1, round(side / spacing)) for side in (height, width))
    tops, lefts = (
        (2 * np.arange(cells, dtype=np.int64) * side + cells) // (2 * cells)
        for side, cells in ((height, rows), (width, columns))
    )
    sums = np.stack([noise[top:bottom].sum(axis=0, dtype=np.int64) for top, bottom in _spans(tops, height)])
    sums = np.add.reduceat(sums, lefts, axis=1)
    areas = np.diff(tops, append=height)[:, None] * np.diff(lefts, append=width)
    sums = 2 * sums - 65535 * areas
    means = (sums << GUARD_BITS) * (rows * columns) // (height * width)  # of blocks of equal area: pixels count alike
    down, across = (_coarse_weights(sigma, side, cells) for side, cells in ((height, rows), (width, columns)))
    coarse = smoothed(means.astype(np.float64), down, across, cv2.BORDER_REFLECT)
    grid = _in_pixels(coarse, alpha, GUARD_BITS)
    ys, xs = cell_centres(height, rows), cell_centres(width, columns)
    return lambda top, bottom: interpolated(grid, ys[top:bottom], xs)


def _spans(starts: npt.NDArray[np.int64], end: int) -> Iterator[tuple[int, int]]:
    return zip(starts.tolist(), [*starts[1:].tolist(), end], strict=True)


def _coarse_weights(sigma: float, side: int, cells: int) -> npt.NDArray[np.float64]:
    """The Gaussian in cells, less what the blocks' means and the interpolation smooth by themselves."""
    if cells == 1:
        return gaussian_kernel(0.01, TRUNCATE)  # one weight
    block = side / cells
    left = sigma * sigma - (block * block - 1) / 12 - block * block / 6
    return gaussian_kernel(math.sqrt(left) / block, TRUNCATE)


def _smoothed_pixels(noise: U16, alpha: float, sigma: float) -> npt.NDArray[np.signedinteger]:
    """The displacement with each pixel computed by itself."""
    weights = gaussian_kernel(sigma, TRUNCATE)
    out = np.empty(noise.shape, np.int16 if alpha < 1 << (15 - FRACTION_BITS) else np.int32)

    def read(rows: Positions) -> npt.NDArray[np.float64]:
        uniform = noise[rows].astype(np.float64)
        uniform *= 2
        uniform -= 65535
        return uniform

    for top, field in smoothed_bands(len(noise), read, weights, mirror=True):
        out[top : top + len(field)] = _in_pixels(field, alpha, 0)
    return out


def _in_pixels(field: npt.NDArray[np.float64], alpha: float, guard_bits: int) -> Field:
    """alpha times a smoothed field of uniform numbers 2 u - 65535, in units of 2^-6 pixels; at most 2,048 pixels."""
    bits = 16 + guard_bits + 2 * WEIGHT_BITS
    scaled: npt.NDArray[np.float64] = np.rint(field * (alpha * 2.0 ** (FRACTION_BITS - bits)))
    limit = 1 << 17
    return scaled.clip(-limit, limit).astype(np.int32)


def stretched_places(matrix: Matrix, x: Coordinates, y: Coordinates) -> tuple[Coordinates, Coordinates]:
    """Where the pixels of the stretched picture come from, unmirrored; all in units of 2^-6 pixels."""
    half = 1 << (MATRIX_BITS - 1)
    source = [((a * x + b * y) + ((c << FRACTION_BITS) + half)) >> MATRIX_BITS for a, b, c in matrix]
    return source[0], source[1]


def _bands(size: Size) -> Iterator[tuple[int, int, Coordinates, Coordinates]]:
    """First row, row after the last, and the coordinates of their pixels (column, row) in units of 2^-6 pixels."""
    width, height = size
    x = np.arange(width, dtype=np.int64) << FRACTION_BITS
    band = max(1, BAND // width)
    for top in range(0, height, band):
        bottom = min(top + band, height)
        yield top, bottom, x, np.arange(top, bottom, dtype=np.int64)[:, None] << FRACTION_BITS


def move_box_of_elastic(
    box: Box, size: Size, parameters: Mapping[str, float], stream: RandomStream
) -> tuple[Box, Size] | None:
    """The box around the pixels that come from the box's inscribed ellipse; see :func:`elastic_transform`."""
    matrix = source_of_stretch(size, parameters["jitter"] * parameters["pixel"], stream)
    across, down = displacements(size, parameters, stream)
    x1, y1, x2, y2 = (value * (1 << FRACTION_BITS) for value in box)
    half = (1 << FRACTION_BITS) / 2  # from a pixel's corner to its centre
    columns, rows, count = [], [], 0
    for top, bottom, x, y in _bands(size):
        from_x, from_y = stretched_places(matrix, x + across(top, bottom), y + down(top, bottom))
        off_x, off_y = (from_x + half - (x1 + x2) / 2) / (x2 - x1), (from_y + half - (y1 + y2) / 2) / (y2 - y1)
        inside = off_x * off_x + off_y * off_y <= 0.25
        columns.append(np.flatnonzero(inside.any(axis=0)))
        rows.append(top + np.flatnonzero(inside.any(axis=1)))
        count += int(np.count_nonzero(inside))
    (xx, xy, _), (yx, yy, _) = matrix
    shrinkage = abs(xx * yy - xy * yx) / (1 << 2 * MATRIX_BITS)  # source pixels per pixel
    whole = math.pi / 4 * (box[2] - box[0]) * (box[3] - box[1]) / shrinkage if shrinkage else math.inf
    if count == 0 or count < LEFT_OF_BOX * whole:
        return None
    found_x, found_y = np.concatenate(columns), np.concatenate(rows)
    return (float(found_x.min()), float(found_y.min()), float(found_x.max() + 1), float(found_y.max() + 1)), size


@image_noise(
    id=18,
    version=1,
    exactness="exact",
    group="imagenet_c",
    geometry="changed",
    move_box=move_box_of_elastic,
    parameters={
        "alpha": (SIDE * 2, SIDE * 2, SIDE * 0.05, SIDE * 0.07, SIDE * 0.12),
        "sigma": (SIDE * 0.7, SIDE * 0.08, SIDE * 0.01, SIDE * 0.01, SIDE * 0.01),
        "jitter": (SIDE * 0.1, SIDE * 0.2, SIDE * 0.02, SIDE * 0.02, SIDE * 0.02),
        "pixel": (1,) * 5,
    },
    spatial=("pixel",),
)
def elastic_transform(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Elastic: the picture stretched askew by a random affine map, then each pixel displaced by a smooth random field.

    First step: three points, at a third of the shorter side around the centre, move by U(-jitter, jitter) in x and y
    and take the picture along. Second step: out(p) = stretched(p + alpha (g * u)(p)), u uniform on (-1, 1), independent
    per pixel and direction, g a Gaussian of standard deviation sigma. Both steps interpolate bilinearly.

    Parameters: alpha, sigma and jitter, 244 times ImageNet-C's factors, in units of pixel (spatial), which is the side
    in pixels of the cells that one u belongs to: twice the pixel moves everything twice as far. Severities 1 and 2
    stretch and bend the whole picture, 3 to 5 ripple it on the scale of a few pixels, as in ImageNet-C; so errors need
    not rise from severity to severity.
    Differs from ImageNet-C: sources are found to 1/64 of a pixel, and pixels rounded to 8 bits after each step;
    outside, the picture is mirrored without the edge pixel in both steps, where ImageNet-C's second step repeats that
    pixel; the three points lie around the true centre of pictures that are not square; a sigma of 12 pixels or
    more smooths the means of blocks of sigma / 6 pixels, which changes displacements by under 5 % of their spread.
    Geometry: a box moves to the box around all pixels that show its inscribed ellipse, found by the same maps (what a
    box holds is unknown but for its extent, and the box around the moved corners would be too large: see
    ``rotation``); None where under half of the ellipse is left in the picture.
    """
    height, width, _ = image.shape
    size = width, height
    matrix = source_of_stretch(size, parameters["jitter"] * parameters["pixel"], stream)
    stretched = np.empty_like(image)
    pixels = packed(image)
    for top, bottom, x, y in _bands(size):
        from_x, from_y = stretched_places(matrix, x, y)
        mirrored(from_x, width)
        mirrored(from_y, height)
        sample(pixels, width, from_x, from_y, stretched[top:bottom])
    del pixels

    across, down = displacements(size, parameters, stream)
    pixels = packed(stretched)
    out = stretched  # no longer needed, but for its memory
    for top, bottom, x, y in _bands(size):
        from_x, from_y = x + across(top, bottom), y + down(top, bottom)
        mirrored(from_x, width)
        mirrored(from_y, height)
        sample(pixels, width, from_x, from_y, out[top:bottom])
    return out
