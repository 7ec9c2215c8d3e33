"""Spatter: drops of water or mud on the lens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .fields import WEIGHT_BITS, LayerGrid, gaussian_kernel, smoothed_bands, spread_left
from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream
from .sensor import Z_UNIT, normal_quantiles

WATER = (175, 238, 238)  # pale turquoise
MUD = (63, 42, 20)
CANNY = (50, 150)  # the thresholds of its hysteresis
FARTHEST = 20.0  # distances from a drop's edge end here
EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
OPAQUE = 0.8  # mud thinner than this is none
TRUNCATE = 4.0  # standard deviations at which a smoothing kernel ends
BAND = 1 << 14  # pixels at a time, to stay in cache

Layer = npt.NDArray[np.uint8]
Rows = Callable[[int, int], npt.NDArray[Any]]


@image_noise(
    id=15,
    version=1,
    exactness="exact",
    group="imagenet_c_extra",
    parameters={
        "mean": (0.65, 0.65, 0.65, 0.65, 0.67),
        "deviation": (0.3, 0.3, 0.3, 0.3, 0.4),
        "sigma": (4, 3, 2, 1, 1),
        "threshold": (0.69, 0.68, 0.68, 0.65, 0.65),
        "water": (0.6, 0.6, 0.5, 0, 0),
        "mud": (0, 0, 0, 1.5, 1.5),
        "pixel": (1,) * 5,
    },
    spatial=("pixel",),
)
def spatter(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Drops on the lens: of water, which adds light, or of mud, which covers.

    A liquid layer l = mean + deviation z, z ~ N(0, 1) per pixel, is smoothed by a Gaussian of standard deviation sigma
    and set to 0 below threshold.

    Water (where the parameter is not 0): the distance from the nearest edge that Canny's detector (50, 150) finds in l,
    at most 20, is averaged over 3 x 3 pixels, made integer, equalised over its histogram, embossed with [[-2, -1, 0],
    [-1, 1, 1], [0, 1, 2]] and averaged over 3 x 3 again: d. Then out = x + water * (175, 238, 238) l d / max(l d).
    Mud (where the parameter is not 0): m, 1 where there is liquid and 0 elsewhere, is smoothed by a Gaussian of
    standard deviation mud, and set to 0 below 0.8. Then out = x (1 - m) + (63, 42, 20) m.

    Parameters: mean, deviation, threshold and water as above; sigma and mud in units of pixel, which is the side of the
    layer's pixels in the picture's (spatial). The layer's cells are a whole number of times larger or smaller than the
    picture's pixels, and fitted to them bilinearly or by averaging; what is left of pixel multiplies sigma, mud and the
    distance 20, and changes the deviation so that after the smoothing it is what it was: as much of the picture gets
    wet.
    Differs from ImageNet-C: z is the normal quantile of a 16-bit uniform number; distances are exact, where OpenCV's
    are up to 2 % longer or shorter; a picture without any drop stays as it is, where ImageNet-C divides by 0; and the
    result is rounded, not truncated, to 8 bits.
    """
    grid = LayerGrid.over(image.shape[0], image.shape[1], parameters["pixel"])
    layer = _liquid(grid, parameters, stream)
    if parameters["mud"]:
        return _covered(image, grid.fit(_mud(layer, parameters["mud"] * grid.unit)))
    shine = _shine(layer, FARTHEST * grid.unit)
    if not shine.any():
        return np.array(image)
    return _lit(image, grid.fit(shine), int(shine.max()), parameters["water"])


def _liquid(grid: LayerGrid, parameters: Mapping[str, float], stream: RandomStream) -> Layer:
    """The liquid layer in 8 bits, rounded down; for mud 1 where it lies above the threshold."""
    height, width = grid.shape
    noise = stream.uint16(height * width).reshape(height, width)
    quantiles = normal_quantiles()
    mean, sigma, threshold = parameters["mean"], parameters["sigma"], parameters["threshold"]
    gain = parameters["deviation"] * spread_left(sigma, TRUNCATE) / spread_left(sigma * grid.unit, TRUNCATE)
    gain *= 2.0 ** -(2 * WEIGHT_BITS) / Z_UNIT
    layer = np.empty((height, width), np.uint8)
    weights = gaussian_kernel(sigma * grid.unit, TRUNCATE)
    for top, field in smoothed_bands(
        height, lambda rows: quantiles[noise[rows]].astype(np.float64), weights, mirror=False
    ):
        field *= gain
        field += mean
        if parameters["mud"]:
            layer[top : top + len(field)] = field > threshold
        else:
            field[field < threshold] = 0
            field *= 255
            layer[top : top + len(field)] = field.clip(0, 255, out=field)
    return layer


def _shine(liquid: Layer, farthest: float) -> npt.NDArray[np.uint16]:
    """Liquid times embossed distance, l d; at most 255 * 255."""
    distance = capped_distance(cv2.Canny(liquid, *CANNY) != 0, farthest)
    sums = cv2.boxFilter(distance, cv2.CV_32F, (3, 3), normalize=False)  # of integers: exact
    levels = (sums.astype(np.int32) // (9 << 8)).astype(np.uint8)
    embossed = cv2.filter2D(cv2.LUT(levels, equalising_table(levels)), cv2.CV_8U, EMBOSS)
    smooth: npt.NDArray[np.uint16] = cv2.boxFilter(embossed, cv2.CV_16U, (3, 3), normalize=False)
    smooth += np.uint16(4)
    smooth //= np.uint16(9)
    smooth *= liquid
    return smooth


def capped_distance(edges: npt.NDArray[np.bool_], farthest: float) -> npt.NDArray[np.uint16]:
    """Distance from each pixel to the nearest edge pixel, at most ``farthest``, in units of 2^-8 pixels."""
    reach = int(farthest) + 1
    rise = np.where(edges, 0, reach).astype(np.uint8)  # the distance within the column, at most reach
    step = 1
    while step < reach:  # after each round the least over twice as many pixels
        for to, of in (
            (slice(step, None), slice(None, -step)),
            (slice(None, -step), slice(step, None)),
        ):
            rise[to] = np.minimum(rise[to], rise[of] + np.uint8(step))
        step *= 2
    squares, roots = (np.arange(reach + 1) ** 2).astype(np.uint16), _roots(farthest)
    out = np.empty(edges.shape, np.uint16)
    band = max(1, 2 * BAND // edges.shape[1])
    for top in range(0, edges.shape[0], band):
        of_column = squares.take(rise[top : top + band])
        nearest = of_column.copy()
        for dx in range(1, min(reach, edges.shape[1])):
            away = of_column + np.uint16(dx * dx)
            np.minimum(nearest[:, dx:], away[:, :-dx], out=nearest[:, dx:])
            np.minimum(nearest[:, :-dx], away[:, dx:], out=nearest[:, :-dx])
        out[top : top + band] = roots.take(nearest)
    return out


@lru_cache(maxsize=8)
def _roots(farthest: float) -> npt.NDArray[np.uint16]:
    """min(sqrt(i), farthest) in units of 2^-8."""
    count = (int(farthest) + 1) ** 2 + 1
    roots: npt.NDArray[np.float64] = np.rint(256 * np.minimum(np.sqrt(np.arange(count)), farthest))
    return roots.astype(np.uint16)


def equalising_table(levels: Layer) -> npt.NDArray[np.uint8]:
    """Histogram equalisation as OpenCV defines it: the lowest level that occurs becomes 0, the highest 255."""
    counts = np.bincount(levels.reshape(-1), minlength=256)
    lowest = int(np.argmax(counts > 0))
    above = levels.size - int(counts[lowest])
    if above == 0:
        return np.arange(256, dtype=np.uint8)
    reached = np.cumsum(counts) - counts[lowest]
    table: npt.NDArray[np.int64] = (510 * reached + above) // (2 * above)
    return table.clip(0, 255).astype(np.uint8)


def _lit(image: RGB, shine: Rows, brightest: int, strength: float) -> RGB:
    """image + strength * WATER * shine / brightest."""
    pixels = (np.arange(256) << 6).astype(np.uint16)  # all in 1/64 of a level from here
    peaks = [np.uint32(round(strength * colour * 64)) for colour in WATER]
    height, width, _ = image.shape
    out = np.empty_like(image)
    band = max(1, BAND // width)
    for top in range(0, height, band):
        part = image[top : top + band]
        share = shine(top, top + band).astype(np.uint32)
        share *= np.uint32(65535)
        share //= np.uint32(brightest)
        red, green = (((share * peak + 32768) >> 16).astype(np.uint16) for peak in peaks[:2])
        lit = cv2.merge([red, green, green]).reshape(part.shape)
        lit += cv2.LUT(part, pixels)
        lit += np.uint16(32)
        lit >>= 6
        out[top : top + band] = np.minimum(lit, 255, out=lit)
    return out


def _mud(drops: Layer, sigma: float) -> npt.NDArray[np.uint16]:
    """How much of the mud's colour is seen, in units of 2^-15."""
    weights = gaussian_kernel(sigma, TRUNCATE)
    cover = np.empty(drops.shape, np.uint16)
    for top, field in smoothed_bands(len(drops), lambda rows: drops[rows].astype(np.float64), weights, mirror=False):
        field *= 2.0 ** (15 - 2 * WEIGHT_BITS)
        field[field < OPAQUE * (1 << 15)] = 0
        cover[top : top + len(field)] = np.rint(field, out=field)
    return cover


def _covered(image: RGB, cover: Rows) -> RGB:
    """image * (1 - cover) + MUD * cover."""
    height, width, _ = image.shape
    out = np.empty_like(image)
    band = max(1, BAND // width)
    for top in range(0, height, band):
        share = cover(top, top + band).astype(np.int32)
        for channel, colour in enumerate(MUD):
            level = image[top : top + band, :, channel]
            change = colour - level.astype(np.int32)
            change *= share
            change += 1 << 14
            change >>= 15
            change += level
            out[top : top + band, :, channel] = change
    return out
