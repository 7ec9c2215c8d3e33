"""A picture sampled between its pixels: bilinear, in integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .pixels import RGB

FRACTION_BITS = 6  # of the coordinates between which pixels are mixed
LANE = 21  # bits per channel of a pixel packed into 64: 8 of colour, 2 * FRACTION_BITS of weight, 1 to spare

Coordinates = npt.NDArray[np.int64]


def packed(image: RGB) -> npt.NDArray[np.int64]:
    """Each pixel's three channels in one integer, ``LANE`` bits apart; flat, with a row and a pixel to spare."""
    height, width, _ = image.shape
    pixels = np.zeros(height * width + width + 1, np.int64)
    inner = pixels[: height * width].reshape(height, width)
    for channel in (2, 1, 0):
        inner <<= LANE
        inner |= image[:, :, channel]
    return pixels


def mirrored(coordinates: Coordinates, side: int) -> None:
    """Fold coordinates, in units of 2^-6 pixels, into 0..side - 1 pixels, in place: mirrored without the edge pixel."""
    last = (side - 1) << FRACTION_BITS
    if last == 0:
        coordinates[...] = 0
        return
    np.abs(coordinates, out=coordinates)
    farthest = int(coordinates.max())
    if farthest > last:
        if farthest > 2 * last:
            coordinates %= 2 * last
        np.subtract(last, coordinates, out=coordinates)
        np.abs(coordinates, out=coordinates)
        np.subtract(last, coordinates, out=coordinates)


def sample(pixels: npt.NDArray[np.int64], width: int, x: Coordinates, y: Coordinates, out: RGB) -> None:
    """Write into ``out`` the pixels at coordinates within the picture, each mixed from its four neighbours.

    Args:
        pixels: a :func:`packed` picture of this width.
        x, y: in units of 2^-6 pixels, shape out.shape[:2]; overwritten.
    """
    place = (y >> FRACTION_BITS) * width
    place += x >> FRACTION_BITS
    x &= (1 << FRACTION_BITS) - 1
    y &= (1 << FRACTION_BITS) - 1
    mixed = _between(pixels, place, x)
    place += width
    below = _between(pixels, place, x)
    below -= mixed
    below *= y
    mixed <<= FRACTION_BITS
    mixed += below
    mixed += sum(1 << (LANE * channel + 2 * FRACTION_BITS - 1) for channel in range(3))
    for channel in range(3):
        out[:, :, channel] = mixed >> (LANE * channel + 2 * FRACTION_BITS)


def _between(pixels: npt.NDArray[np.int64], place: Coordinates, fraction: Coordinates) -> npt.NDArray[np.int64]:
    """64 times the mixture of a pixel and its right neighbour (which off the edge has weight 0)."""
    left = pixels.take(place)
    right = pixels[1:].take(place)
    right -= left
    right *= fraction
    left <<= FRACTION_BITS
    left += right
    return left
