"""Weather: fog."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

AMPLITUDE = 1 << 26  # of the largest wave; leaves room in 32 bits for the sum of four neighbours


def plasma(rows: int, columns: int, wave: int, decay: float, stream: RandomStream) -> npt.NDArray[np.int32]:
    """A fractal on a torus by the diamond-square algorithm, in integers; shape (rows * wave, columns * wave).

    A lattice of rows x columns random points, ``wave`` pixels apart, is refined until every pixel has a value: each new
    point is the mean of its four neighbours plus a uniform number on [-a, a), where a is ``AMPLITUDE`` for the lattice
    and the first refinement and falls by decay^2 with each further one.

    Args:
        wave: a power of two.
    """
    field: npt.NDArray[np.int32] = _uniform(stream, 1, rows, columns, AMPLITUDE)[0]
    amplitude = float(AMPLITUDE)
    while field.shape[0] < rows * wave:
        height, width = field.shape
        noise = _uniform(stream, 3, height, width, round(amplitude))
        right = np.roll(field, -1, axis=1)
        down = np.roll(field, -1, axis=0)
        centre = ((field + right + down + np.roll(right, -1, axis=0)) >> 2) + noise[0]
        across = ((field + right + centre + np.roll(centre, 1, axis=0)) >> 2) + noise[1]
        along = ((field + down + centre + np.roll(centre, 1, axis=1)) >> 2) + noise[2]
        finer = np.empty((2 * height, 2 * width), np.int32)
        finer[0::2, 0::2] = field
        finer[1::2, 1::2] = centre
        finer[0::2, 1::2] = across
        finer[1::2, 0::2] = along
        field = finer
        amplitude /= decay * decay
    return field


def _uniform(stream: RandomStream, count: int, height: int, width: int, amplitude: int) -> npt.NDArray[np.int32]:
    """Integers uniform on [-amplitude, amplitude), shape (count, height, width)."""
    signed: npt.NDArray[np.int32] = stream.uint16(count * height * width).view("<i2").astype(np.int32)
    signed *= (amplitude + (1 << 10)) >> 11
    signed >>= 4
    return signed.reshape(count, height, width)


@image_noise(
    id=4,
    version=1,
    exactness="exact",
    group="imagenet_c",
    parameters={"thickness": (1.5, 2.0, 2.5, 2.5, 3.0), "decay": (2.0, 2.0, 1.7, 1.5, 1.4), "wave": (256,) * 5},
    spatial=("wave",),
)
def fog(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Fog: out = (x + 255 thickness p) m / (m + 255 thickness), with a plasma fractal p in 0..1 and m the largest x.

    Parameters: thickness; decay, by whose square the fractal's waves weaken from one octave to the next; wave, the
    length of the longest wave in pixels (spatial; the nearest power of two on a logarithmic scale is used).
    As in ImageNet-C p comes from the diamond-square algorithm on a torus, scaled to 0..1 over the torus, of which the
    picture is the top left part. Differs from ImageNet-C: on pictures wider or higher than the longest wave the torus
    starts from a lattice of random points instead of one, so that nothing repeats; and the result is rounded, not
    truncated, to 8 bits. A picture within 256 x 256 pixels gets ImageNet-C's own construction.
    """
    height, width, _ = image.shape
    wave = _nearest_power_of_two(parameters["wave"])
    field = plasma(-(-height // wave), -(-width // wave), wave, parameters["decay"], stream)
    low, high = int(field.min()), int(field.max())

    brightest, full = int(image.max()), 255 * parameters["thickness"]
    keep = brightest / (brightest + full)
    pixels = np.rint(np.arange(256) * (keep * 256)).astype(np.uint16)  # all in 1/256 of a level from here
    peak = round(full * keep * 256)

    shift = max(0, (high - low).bit_length() - 16)  # 16 bits of p, so that 32 bits hold the products
    span = max(1, (high - low) >> shift)
    veil = ((field[:height, :width] - low) >> shift).astype(np.uint32)
    veil *= np.uint32(peak)
    veil += np.uint32(span // 2)
    veil //= np.uint32(span)
    veil16 = veil.astype(np.uint16)

    out = np.empty_like(image)
    band = max(1, (1 << 16) // width)  # rows at a time, to stay in cache
    for top in range(0, height, band):
        part = slice(top, top + band)
        mixed = cv2.LUT(image[part], pixels)
        mixed += cv2.merge([veil16[part]] * 3).reshape(mixed.shape)
        mixed += np.uint16(128)
        mixed >>= 8
        out[part] = mixed
    return out


def _nearest_power_of_two(value: float) -> int:
    """The power of two whose logarithm is nearest; at least 1."""
    power = 1
    while 2 * power * power < value * value:  # power < value / sqrt(2)
        power *= 2
    return power
