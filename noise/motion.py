"""Blurs of a camera that moves while the shutter is open: sideways, and forwards."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from .blur import WEIGHT_BITS, gaussian_weights
from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

ANGLE_UNIT = 1 << 20  # fixed-point one of cosines and sines
ZOOM_BAND = 1 << 16  # pixels zoomed at a time
ZOOM_BITS = 3  # fraction of a zoomed pixel: 16 bits hold the sum of 32 of them


def direction(uniform: int) -> tuple[int, int]:
    """Cosine and sine, in units of 2^-20, of the angle that lies at (uniform + 1/2) / 65536 between -45 and 45 degrees.

    The last bits of a C library's cosine differ between machines; rounding removes them (a test checks that no angle
    lies near a rounding boundary).
    """
    angle = math.radians(90 * (uniform + 0.5) / 65536 - 45)
    return round(math.cos(angle) * ANGLE_UNIT), round(math.sin(angle) * ANGLE_UNIT)


@image_noise(
    id=11,
    version=1,
    exactness="exact",
    group="imagenet_c",
    parameters={"radius": (10, 15, 15, 15, 20), "sigma": (3, 5, 8, 12, 15)},
    spatial=("radius", "sigma"),
)
def motion_blur(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Motion along a line: out(p) = sum_i w_i x(p + round(i u)), i = 0..2 ceil(radius), w_i ~ exp(-i^2 / (2 sigma^2)).

    u is the unit vector at an angle that is uniform on -45..45 degrees, from the right towards the bottom; outside the
    image its border pixels are repeated. The Gaussian has one side only, so things smear towards the other side and
    keep their brightest copy where they were.
    Parameters: radius and sigma, in pixels (both spatial; they may be fractional).
    The kernel is that of ImageMagick, which ImageNet-C calls; halves in i u are rounded down as there. Differs from
    ImageNet-C: the angle is one of 65,536, and the weights are multiples of 2^-16.
    """
    along, down = direction(int(stream.uint16(1)[0]))
    return smeared(image, parameters["radius"], parameters["sigma"], along, down)


def smeared(image: RGB, radius: float, sigma: float, along: int, down: int) -> RGB:
    """The sum of :func:`motion_blur` for u = (along, down) in units of 2^-20; the image has any number of channels."""
    weights = gaussian_weights(sigma, 2 * math.ceil(radius), 1, WEIGHT_BITS)
    taps: dict[tuple[int, int], int] = defaultdict(int)
    for i, weight in enumerate(weights):
        if weight:
            taps[_round(i * down), _round(i * along)] += weight

    # Weighted sums of shifted copies, exact in 32-bit floating point because they are integers below 2^24.
    height, width, channels = image.shape
    above, below = -min(dy for dy, _ in taps), max(dy for dy, _ in taps)
    left, right = -min(dx for _, dx in taps), max(dx for _, dx in taps)
    padded = cv2.copyMakeBorder(image, above, below, left, right, cv2.BORDER_REPLICATE)
    padded = padded.reshape(height + above + below, -1)
    out = np.empty_like(image)
    band = max(32, 2 * (above + below))  # rows at a time, to stay in cache
    for top in range(0, height, band):
        rows = min(band, height - top)
        part = padded[top : top + rows + above + below].astype(np.float32)
        blurred = np.zeros((rows, channels * width), np.float32)
        for (dy, dx), weight in taps.items():
            shifted = part[above + dy :, channels * (left + dx) :][:rows, : channels * width]
            cv2.scaleAdd(shifted, weight, blurred, blurred)
        blurred *= np.float32(2.0**-WEIGHT_BITS)
        out[top : top + rows] = np.rint(blurred, out=blurred).reshape(rows, width, channels)
    return out


def _round(length: int) -> int:
    """From fixed point to the nearest integer; halves go down."""
    return (length + ANGLE_UNIT // 2 - 1) // ANGLE_UNIT


@image_noise(
    id=12,
    version=1,
    exactness="exact",
    group="imagenet_c",
    geometry="changed",
    parameters={"largest": (1.11, 1.15, 1.2, 1.24, 1.3), "step": (0.01, 0.01, 0.02, 0.02, 0.03)},
)
def zoom_blur(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Motion towards the scene: the mean of the image and of copies zoomed 1, 1 + step, ..., largest times.

    Parameters: largest and step, of the zoom factors. None is spatial: a zoom moves a pixel in proportion to its
    distance from the centre. As in ImageNet-C the image itself counts twice, and copies are interpolated bilinearly.
    (The factors are those that its np.arange gives: arange(1, 1.11, 0.01) does reach 1.11, by rounding.)
    The geometry changes, and no box could say how: an object is in many places at once.
    Differs from ImageNet-C: copies are zoomed about the centre exactly, where ImageNet-C enlarges a central crop of
    whole pixels, and so moves the picture by up to a pixel, and the crop is central in width only on square images;
    interpolation weights are multiples of 1/256, and copies are rounded between the axes and at the end; and the result
    is rounded, not truncated, to 8 bits.
    """
    step = round(parameters["step"] * 100)
    percents = range(100 + step, round(parameters["largest"] * 100) + 1, step)
    height, width, _ = image.shape
    down, across = ([_zoomed_positions(side, percent) for percent in percents] for side in (height, width))
    source = image.reshape(height, -1)
    count = 2 + len(percents)
    out = np.empty_like(image)
    band = max(1, ZOOM_BAND // width)  # rows at a time, to stay in cache
    for top in range(0, height, band):
        part = slice(top, top + band)
        total = cv2.transpose(image[part]).astype(np.uint16).reshape(width, -1)  # transposed: rows are quick to pick
        total *= np.uint16(2 << ZOOM_BITS)
        for (y, dy), (x, dx) in zip(down, across, strict=True):
            copy = _interpolate(source, y[part], dy[part], 0).astype(np.uint8).reshape(-1, width, 3)
            total += _interpolate(cv2.transpose(copy).reshape(width, -1), x, dx, ZOOM_BITS)
        total += np.uint16(count << ZOOM_BITS >> 1)
        total //= np.uint16(count << ZOOM_BITS)
        out[part] = cv2.transpose(total.astype(np.uint8).reshape(width, -1, 3))
    return out


def _zoomed_positions(side: int, percent: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint16]]:
    """Where the pixels of a zoomed row come from: whole part, and 256ths as a column.

    A zoom leaves the centre (side - 1) / 2 in place, and brings pixel i from centre + (i - centre) 100 / percent.
    """
    twice = 2 * np.arange(side, dtype=np.int64) - (side - 1)  # the distance from the centre, doubled
    position = (((side - 1) * percent + 100 * twice) * 128 + percent // 2) // percent
    return position >> 8, (position & 255).astype(np.uint16)[:, None]


def _interpolate(
    rows: npt.NDArray[np.uint8], index: npt.NDArray[np.intp], weight: npt.NDArray[np.uint16], bits: int
) -> npt.NDArray[np.uint16]:
    """Weighted means of rows ``index`` and ``index + 1``, with ``weight`` 256ths of the latter, in units of 2^-bits."""
    mixed = np.multiply(rows.take(index, axis=0, mode="clip"), 256 - weight, dtype=np.uint16)
    mixed += np.multiply(rows.take(index + 1, axis=0, mode="clip"), weight, dtype=np.uint16)
    mixed += np.uint16(128 >> bits)
    mixed >>= 8 - bits
    return mixed
