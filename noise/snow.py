"""Falling snow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from .fields import FINEST_LAYER, POSITION_BITS, LayerGrid, Positions, interpolated
from .motion import direction, smeared
from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream
from .sensor import Z_UNIT, normal_quantiles

LUMA = (0.299, 0.587, 0.114)
BAND = 1 << 14  # pixels at a time, to stay in cache


@image_noise(
    id=13,
    version=1,
    exactness="exact",
    group="imagenet_c",
    parameters={
        "mean": (0.1, 0.2, 0.55, 0.55, 0.55),
        "deviation": (0.3,) * 5,
        "zoom": (3, 2, 4, 4.5, 2.5),
        "threshold": (0.5, 0.5, 0.9, 0.85, 0.85),
        "radius": (10, 12, 12, 12, 12),
        "sigma": (4, 4, 8, 8, 12),
        "keep": (0.8, 0.7, 0.7, 0.65, 0.55),
        "pixel": (1,) * 5,
    },
    spatial=("pixel",),
)
def snow(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Falling snow: out = min(keep x + (1 - keep) max(x, 1.5 grey + 127.5) + s + r, 255), r being s turned upside down.

    The scene is whitened towards its own grey (0.299 red + 0.587 green + 0.114 blue). The flakes s: mean + deviation z,
    z ~ N(0, 1), enlarged bilinearly zoom times, set to 0 below threshold, cut to 0..1, times 255 (made integer), and
    blurred by the motion of ``motion_blur`` with radius and sigma, in a direction uniform on -135..-45 degrees: about
    straight down.

    Parameters: mean, deviation, threshold and keep as above; zoom, radius and sigma in units of pixel, which is the
    side of the flakes' own pixels in the picture's (spatial). The flakes' cells are a whole number of times larger or
    smaller than the picture's pixels, and fitted to them bilinearly or by averaging; what is left of pixel multiplies
    zoom, radius and sigma.
    As in ImageNet-C, ImageMagick's motion blur included. Differs from ImageNet-C: z is the normal quantile of a 16-bit
    uniform number, the direction one of 65,536; only as many z are drawn as the enlarged part needs; and the result is
    rounded, not truncated, to 8 bits.
    """
    height, width, _ = image.shape
    grid = LayerGrid.over(height, width, parameters["pixel"])
    cosine, sine = direction(int(stream.uint16(1)[0]))
    layer = _flakes(grid, parameters, stream)[:, :, None]
    layer = smeared(layer, parameters["radius"] * grid.unit, parameters["sigma"] * grid.unit, sine, -cosine)
    flakes = grid.fit(layer[:, :, 0])

    keep = parameters["keep"]
    levels = np.arange(256) * 64.0  # all in 1/64 of a level from here
    kept, whitened = (np.rint(levels * share).astype(np.uint16) for share in (keep, 1 - keep))
    greys = np.rint(levels[:, None] * (1.5 * (1 - keep) * np.array(LUMA))).astype(np.uint16)[None]
    lift = np.uint16(round(127.5 * 64 * (1 - keep)))
    out = np.empty_like(image)
    band = max(1, BAND // width)
    for top in range(0, height, band):
        bottom = min(top + band, height)
        part = image[top:bottom]
        grey = cv2.LUT(part, greys)
        veil = grey[:, :, 0] + grey[:, :, 1]
        veil += grey[:, :, 2]
        veil += lift
        mixed = np.maximum(cv2.merge([veil] * 3).reshape(part.shape), cv2.LUT(part, whitened))
        mixed += cv2.LUT(part, kept)
        falling = flakes(top, bottom).astype(np.uint16)
        falling += flakes(height - bottom, height - top)[::-1, ::-1].astype(np.uint16)
        falling <<= 6
        falling += np.uint16(32)
        mixed += cv2.merge([falling] * 3).reshape(part.shape)
        mixed >>= 6
        out[top:bottom] = np.minimum(mixed, 255, out=mixed)
    return out


def _flakes(grid: LayerGrid, parameters: Mapping[str, float], stream: RandomStream) -> npt.NDArray[np.uint8]:
    """The flakes before they move."""
    height, width = grid.shape
    zoom = parameters["zoom"] * grid.unit
    zoom = max(zoom, min(1.0, math.sqrt(height * width / FINEST_LAYER)))  # a very narrow picture scaled down
    rows, columns = (_zoomed(side, zoom) for side in (height, width))
    size = math.ceil(height / zoom), math.ceil(width / zoom)
    z = normal_quantiles().take(stream.uint16(size[0] * size[1])).reshape(size)
    field = np.rint(z * parameters["deviation"] + parameters["mean"] * Z_UNIT).astype(np.int32)
    least = math.ceil(parameters["threshold"] * Z_UNIT)
    out = np.empty((height, width), np.uint8)
    band = max(1, BAND // width)
    for top in range(0, height, band):
        part = interpolated(field, rows[top : top + band], columns)
        part[part < least] = 0
        np.minimum(part, Z_UNIT, out=part)
        part *= 255
        part >>= 16
        out[top : top + band] = part
    return out


def _zoomed(side: int, zoom: float) -> Positions:
    """Where a side's pixels lie among ceil(side / zoom) cells, first on first and last on last before trimming."""
    cells = math.ceil(side / zoom)
    large = round(cells * zoom)
    places = np.arange(side) + (large - side) // 2
    spread: npt.NDArray[np.float64] = np.rint(places * ((cells - 1) / max(1, large - 1) * (1 << POSITION_BITS)))
    return spread.astype(np.int64)
