"""Fields of integers: smoothed, interpolated and enlarged, exactly.

OpenCV filters in float64 here only ever see integers, and every product and sum stays an integer below 2^53: the result
is the same in any order of summation, with any vector instructions, on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .blur import gaussian_weights

WEIGHT_BITS = 14  # of a Gaussian kernel's weights, per axis
POSITION_BITS = 10  # of the fractions of positions between two cells
GUARD_BITS = 3  # kept between the two directions of an interpolation
FINEST_LAYER = 1 << 22  # cells, when a layer is computed more finely than the picture

Field = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]


def gaussian_kernel(sigma: float, truncate: float) -> npt.NDArray[np.float64]:
    """scipy.ndimage's and scikit-image's Gaussian, |i| <= truncate * sigma + 1/2, in integers that sum to 2^14."""
    weights = gaussian_weights(sigma, int(truncate * sigma + 0.5), 2, WEIGHT_BITS)
    return np.array([*weights[:0:-1], *weights], np.float64)


def spread_left(sigma: float, truncate: float) -> float:
    """The standard deviation of white noise after smoothing in both directions, as a share of what it was before."""
    if sigma >= 8:
        return 1 / (2 * math.sqrt(math.pi) * sigma)
    return float(np.square(gaussian_kernel(sigma, truncate)).sum() * 2.0 ** (-2 * WEIGHT_BITS))


def smoothed(
    field: npt.NDArray[np.float64], down: npt.NDArray[np.float64], across: npt.NDArray[np.float64], border: int
) -> npt.NDArray[np.float64]:
    """Integers below 2^23 convolved with a column and a row of integer weights; their sums stay in it.

    Args:
        border: an OpenCV border mode, for what lies outside.

    Returns:
        float64 that holds integers: the weighted sums, ``down.sum() * across.sum()`` times the weighted mean.
    """
    out: npt.NDArray[np.float64] = cv2.sepFilter2D(field, cv2.CV_64F, across, down, borderType=border)
    return out


def smoothed_bands(
    height: int,
    read: Callable[[Positions], npt.NDArray[np.float64]],
    weights: npt.NDArray[np.float64],
    *,
    mirror: bool,
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """A whole field smoothed in both directions, some rows at a time, for the sake of memory.

    Args:
        height: the field's rows.
        read: row numbers -> those rows, integers below 2^23.
        mirror: what lies outside: the field mirrored with its edge cells, or else the edge cells repeated.

    Yields:
        The number of the first row, and the smoothed rows from there (see :func:`smoothed`).
    """
    reach = len(weights) // 2
    band = max(32, 8 * reach)
    for top in range(0, height, band):
        rows = np.arange(top - reach, min(top + band, height) + reach)
        if mirror:
            rows %= 2 * height
            rows = np.minimum(rows, 2 * height - 1 - rows)
        field = smoothed(
            read(rows.clip(0, height - 1)), weights, weights, cv2.BORDER_REFLECT if mirror else cv2.BORDER_REPLICATE
        )
        yield top, field[reach : len(field) - reach]


def interpolated(field: Field, rows: Positions, columns: Positions) -> Field:
    """Bilinear interpolation on a grid of positions; shape (len(rows), len(columns)).

    Args:
        field: integers of at most 2^17 in size.
        rows, columns: positions in units of 2^-10 cells, 0 to 1024 * (cells - 1), rising.

    Returns:
        The interpolated values, rounded.
    """
    one = 1 << POSITION_BITS
    first, last = rows[0] >> POSITION_BITS, -(-rows[-1] >> POSITION_BITS)
    field = field[first : last + 1]
    left, right = columns >> POSITION_BITS, -(-columns >> POSITION_BITS)
    weight = (columns & (one - 1)).astype(np.int32)
    wide = field.take(left, axis=1)
    wide *= one - weight
    wide += field.take(right, axis=1) * weight
    wide += 1 << (POSITION_BITS - GUARD_BITS - 1)
    wide >>= POSITION_BITS - GUARD_BITS
    above, below = (rows >> POSITION_BITS) - first, -(-rows >> POSITION_BITS) - first
    weight = (rows & (one - 1)).astype(np.int32)[:, None]
    out: Field = wide.take(above, axis=0)
    out *= one - weight
    out += wide.take(below, axis=0) * weight
    out += 1 << (POSITION_BITS + GUARD_BITS - 1)
    out >>= POSITION_BITS + GUARD_BITS
    return out


def cell_centres(side: int, cells: int) -> Positions:
    """Where the centres of ``side`` pixels lie among ``cells`` cells that span them; positions for `interpolated`."""
    centres = ((2 * np.arange(side, dtype=np.int64) + 1) * cells << (POSITION_BITS - 1)) // side
    return (centres - (1 << (POSITION_BITS - 1))).clip(0, (cells - 1) << POSITION_BITS)


@dataclass(frozen=True)
class LayerGrid:
    """The cells of a layer that lies over a picture, when a length of 1 in the layer shall be ``pixel`` picture pixels.

    A layer of large pixels is computed coarsely and enlarged; one of small pixels is computed finely and averaged, up
    to 8 x 8 cells a pixel and 4 million cells. Both by whole numbers, which leaves a ``unit`` of 1 to 2 cells (or less
    than 1, where fine is not fine enough), in which the layer's lengths are measured.
    """

    height: int
    width: int
    enlarge: int
    divide: int
    unit: float

    @classmethod
    def over(cls, height: int, width: int, pixel: float) -> LayerGrid:
        """For a picture of height x width."""
        enlarge = max(1, int(pixel))
        affordable = max(1, math.isqrt(FINEST_LAYER // (height * width)))
        divide = min(math.ceil(1 / pixel), 8, affordable)
        return cls(height, width, enlarge, divide, pixel * divide / enlarge)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return -(-self.height * self.divide // self.enlarge), -(-self.width * self.divide // self.enlarge)

    def fit(self, layer: npt.NDArray[Any]) -> Callable[[int, int], npt.NDArray[Any]]:
        """The layer in the picture's pixels: rows from, rows to -> those rows.

        Args:
            layer: integers from 0 to 2^16 - 1, of this grid's shape.
        """
        if self.enlarge > 1:
            field = layer.astype(np.int32)
            rows, columns = (cell_centres(cells * self.enlarge, cells) for cells in layer.shape)
            return lambda top, bottom: interpolated(field, rows[top:bottom], columns[: self.width])
        if self.divide > 1:
            cells = layer.reshape(self.height, self.divide, self.width, self.divide)
            square = self.divide**2
            return lambda top, bottom: (cells[top:bottom].sum(axis=(1, 3), dtype=np.int32) + square // 2) // square
        return lambda top, bottom: layer[top:bottom]
