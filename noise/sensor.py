"""Noise of the sensor: Gaussian, shot, impulse and speckle noise, from integer tables."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, localcontext
from functools import lru_cache
from statistics import NormalDist

import cv2
import numpy as np
import numpy.typing as npt

from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

Z_UNIT = 1 << 16  # fixed-point one of the normal quantile table
FINE = 6  # bits of a 16-bit uniform number that only the second level of the Poisson table looks at
FACTOR_BITS = 14  # fixed-point fraction of speckle noise's factors
CHUNK = 1 << 16  # look-ups are done in chunks that stay in the processor's cache


@lru_cache(maxsize=1)
def normal_quantiles() -> npt.NDArray[np.int32]:
    """Standard normal quantiles at (i + 1/2) / 65536, i = 0..65535, in units of 2^-16; shape (65536,).

    The last bits of a C library's logarithm differ between machines; rounding to 2^-16 removes them (a test checks that
    no entry lies near a rounding boundary).
    """
    normal = NormalDist()
    upper = [round(normal.inv_cdf((i + 0.5) / 65536) * Z_UNIT) for i in range(32768, 65536)]
    return np.array([-z for z in reversed(upper)] + upper, dtype=np.int32)


@lru_cache(maxsize=16)
def _gaussian_levels(sigma: float) -> npt.NDArray[np.int16]:
    """round(255 * sigma * z) for each of the 65,536 quantiles z."""
    levels: npt.NDArray[np.float64] = np.rint(normal_quantiles() * (255 * sigma / Z_UNIT))
    return levels.astype(np.int16)


@image_noise(
    id=1, version=1, exactness="exact", group="imagenet_c", parameters={"sigma": (0.08, 0.12, 0.18, 0.26, 0.38)}
)
def gaussian_noise(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Additive Gaussian noise, independent per pixel and channel: out = clip(x + 255 sigma z), z ~ N(0, 1).

    Parameters: sigma, the standard deviation as a fraction of full scale. None is spatial.
    Differs from ImageNet-C: z is the normal quantile of a 16-bit uniform number (|z| <= 4.33), and the result is
    rounded where ImageNet-C truncates to 8 bits, which darkens by half a level.
    """
    levels = _gaussian_levels(parameters["sigma"])
    field = stream.uint16(image.size)
    pixels = image.reshape(-1)
    out = np.empty_like(pixels)
    for start in range(0, pixels.size, CHUNK):
        part = slice(start, start + CHUNK)
        noisy = levels[field[part]]
        noisy += pixels[part]
        out[part] = noisy.clip(0, 255, out=noisy)
    return out.reshape(image.shape)


def poisson_thresholds(rate: int) -> npt.NDArray[np.int64]:
    """round(65536 * P(N <= k)) for N ~ Poisson(rate * x / 255); rows x = 0..255, columns k = 0..rate - 1.

    Decimal arithmetic is defined to the last digit, its ``exp`` included, so every machine gets the same table.
    """
    rows = []
    with localcontext() as context:
        context.prec = 30
        for level in range(256):
            mean = Decimal(rate * level) / 255
            probability = cumulative = (-mean).exp()
            row = []
            for count in range(rate):
                row.append(int((cumulative * 65536).to_integral_value()))
                probability *= mean / (count + 1)
                cumulative += probability
            rows.append(row)
    return np.array(rows, dtype=np.int64)


@lru_cache(maxsize=16)
def _poisson_table(rate: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Inverse Poisson distribution for all 256 levels x 65,536 uniform numbers, in two levels that fit in cache.

    coarse[level * 1024 + (u >> 6)] is the count, or ~cell where the 64 numbers u of that entry do not share one count;
    then fine[cell, u & 63] is the count. Counts above ``rate`` are white anyway and stand as ``rate``.
    """
    counts = np.arange(rate + 1, dtype=np.uint8)
    coarse = np.empty((256, 65536 >> FINE), dtype=np.int16)
    fine: list[npt.NDArray[np.uint8]] = []
    for level, bounds in enumerate(poisson_thresholds(rate)):
        row = np.repeat(counts, np.diff(bounds, prepend=0, append=65536)).reshape(-1, 1 << FINE)
        coarse[level] = row[:, 0]
        for entry in np.flatnonzero(row[:, 0] != row[:, -1]):
            coarse[level, entry] = ~len(fine)
            fine.append(row[entry])
    return coarse.reshape(-1), np.stack(fine)


@image_noise(id=2, version=1, exactness="exact", group="imagenet_c", parameters={"rate": (60, 25, 12, 5, 3)})
def shot_noise(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Photon noise, independent per pixel and channel: out = clip(255 N / rate), N ~ Poisson(rate x / 255).

    Parameters: rate, the photons that make full white. None is spatial.
    Differs from ImageNet-C: N is the Poisson quantile of a 16-bit uniform number (probabilities in steps of 2^-16), and
    the result is rounded, not truncated, to 8 bits.
    """
    rate = int(parameters["rate"])
    coarse, fine = _poisson_table(rate)
    levels = np.rint(np.arange(256) * (255 / rate)).clip(0, 255).astype(np.uint8)
    field = stream.uint16(image.size)
    pixels = image.reshape(-1)
    counts = np.empty_like(pixels)
    for start in range(0, pixels.size, CHUNK):
        part = slice(start, start + CHUNK)
        uniform = field[part]
        index = pixels[part].astype(np.intp)
        index <<= 16 - FINE
        index |= uniform >> FINE
        count = coarse[index]
        split = np.flatnonzero(count < 0)
        count[split] = fine[~count[split], uniform[split] & ((1 << FINE) - 1)]
        counts[part] = count
    out: RGB = cv2.LUT(counts, levels).reshape(image.shape)
    return out


@image_noise(
    id=7, version=1, exactness="exact", group="imagenet_c", parameters={"amount": (0.03, 0.06, 0.09, 0.17, 0.27)}
)
def impulse_noise(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Salt and pepper, independent per pixel and channel: white or black, each with probability amount / 2.

    Parameters: amount, the share of the values that are replaced. None is spatial.
    Differs from ImageNet-C: amount / 2 is rounded to a multiple of 2^-16. The values that one severity replaces, the
    next one replaces by the same.
    """
    extreme = round(parameters["amount"] * 32768)
    field = stream.uint16(image.size)
    pixels = image.reshape(-1)
    out = np.empty_like(pixels)
    for start in range(0, pixels.size, CHUNK):
        part = slice(start, start + CHUNK)
        uniform = field[part]
        np.multiply(pixels[part], uniform < 65536 - extreme, out=out[part])
        out[part] |= np.negative((uniform < extreme).view(np.uint8))  # 0 or 255
    return out.reshape(image.shape)


@lru_cache(maxsize=16)
def _speckle_factors(sigma: float) -> npt.NDArray[np.uint32]:
    """max(0, 1 + sigma * z) for each of the 65,536 quantiles z, in units of 2^-14."""
    factors: npt.NDArray[np.float64] = np.rint((normal_quantiles() * sigma + Z_UNIT) * ((1 << FACTOR_BITS) / Z_UNIT))
    return factors.clip(0, None).astype(np.uint32)


@image_noise(
    id=8, version=1, exactness="exact", group="imagenet_c_extra", parameters={"sigma": (0.15, 0.2, 0.35, 0.45, 0.6)}
)
def speckle_noise(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Multiplicative Gaussian noise, independent per pixel and channel: out = clip(x + sigma x z), z ~ N(0, 1).

    Parameters: sigma, the standard deviation as a fraction of the value itself. None is spatial.
    Differs from ImageNet-C: z is the normal quantile of a 16-bit uniform number (|z| <= 4.33), and the result is
    rounded, not truncated, to 8 bits.
    """
    factors = _speckle_factors(parameters["sigma"])
    field = stream.uint16(image.size)
    pixels = image.reshape(-1)
    out = np.empty_like(pixels)
    for start in range(0, pixels.size, CHUNK):
        part = slice(start, start + CHUNK)
        noisy = factors[field[part]]
        noisy *= pixels[part]
        noisy += np.uint32(1 << (FACTOR_BITS - 1))
        noisy >>= FACTOR_BITS
        out[part] = np.minimum(noisy, 255, out=noisy)
    return out.reshape(image.shape)
