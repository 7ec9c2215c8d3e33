"""What happens before and inside a camera, beyond ImageNet-C: low light, and occlusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream
from .sensor import CHUNK, normal_quantiles

ONE = 1 << 16  # fixed-point one of linear light
Z_SHIFT = 12  # low light takes normal quantiles in units of 2^-12, so that 32 bits hold their products
SUBPIXEL = 256  # occluding shapes are placed in 1/256 of a pixel
ASPECTS = tuple((round(2 ** (8 + i / 30)), round(2 ** (8 - i / 30))) for i in range(-15, 16))  # 1:2 to 2:1


def srgb_to_linear(level: float) -> float:
    """Linear light 0..1 of an sRGB level 0..255: the decoding curve of IEC 61966-2-1."""
    value = level / 255
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


@lru_cache(maxsize=1)
def srgb_levels() -> npt.NDArray[np.uint8]:
    """The 8-bit sRGB level of linear light in units of 2^-16; shape (65536,)."""
    steps = [srgb_to_linear(level + 0.5) * ONE for level in range(255)]
    return np.searchsorted(steps, np.arange(ONE), side="right").astype(np.uint8)


@lru_cache(maxsize=8)
def exposure_tables(
    light: float, gain: float, electrons: float, read_noise: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Mean and standard deviation of the developed signal of each sRGB level, in units of 2^-16; shape (256,) each."""
    counts = [electrons * light * srgb_to_linear(level) for level in range(256)]
    unit = ONE * gain / electrons
    means = [round(unit * count) for count in counts]
    sigmas = [round(unit * (count + read_noise * read_noise) ** 0.5) for count in counts]
    return np.array(means, np.int32), np.array(sigmas, np.int32)


@image_noise(
    id=20,
    version=1,
    exactness="exact",
    group="camera",
    parameters={
        "light": (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64),
        "gain": (2.0, 2.8, 4.0, 5.6, 8.0),
        "electrons": (2000.0,) * 5,
        "read_noise": (3.0,) * 5,
    },
)
def low_light(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """A dim scene before a sensor with gain: out = sRGB(gain (n + read_noise z') / electrons), n photoelectrons.

    With L the linear light of a level (sRGB decoding), n has mean and variance m = electrons light L. Photon and read
    noise together are taken as one normal number of variance m + read_noise^2: the signal-dependent model of Foi et
    al. (2008, Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data, IEEE TIP 17(10)), who
    use the same approximation, so out = sRGB(gain (m + sqrt(m + read_noise^2) z) / electrons), z ~ N(0, 1), clipped
    to 0..1. Noise is independent per pixel and channel; colour filter array, denoising and blur of the hand are left
    out.

    Parameters: light, the share of the light of a well exposed picture: two stops less at severity 1, then one stop
    more each; gain, which like a camera at the end of its ISO range makes up for half of the missing stops only, so
    that the picture is dark and noisy; electrons that make full white at light 1, per output pixel (a small sensor
    pixel holds some thousand); read_noise, its standard deviation in electrons (1 to 5 in small sensors). None is
    spatial. Not in ImageNet-C, whose noises keep the picture's brightness and ignore its encoding.
    """
    means, sigmas = exposure_tables(*(parameters[name] for name in ("light", "gain", "electrons", "read_noise")))
    quantiles = ((normal_quantiles() + 8) >> 4).astype(np.int16)
    levels = srgb_levels()
    field = stream.uint16(image.size)
    pixels = image.reshape(-1)
    out = np.empty_like(pixels)
    for start in range(0, pixels.size, CHUNK):
        part = slice(start, start + CHUNK)
        signal = cv2.LUT(pixels[part], sigmas).reshape(-1)
        signal *= quantiles[field[part]]
        signal >>= Z_SHIFT
        signal += cv2.LUT(pixels[part], means).reshape(-1)
        out[part] = levels[signal.clip(0, ONE - 1, out=signal)]
    return out.reshape(image.shape)


@dataclass(frozen=True)
class Occluder:
    """One opaque shape; lengths in 1/256 of a pixel.

    Attributes:
        elliptic: an ellipse, else a rectangle.
        x, y: its centre.
        across, down: its half axes at growth 2^16.
        shade: its grey level.
    """

    elliptic: bool
    x: int
    y: int
    across: int
    down: int
    shade: int

    def spans(self, growth: int, height: int, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First column covered and first column no more covered, of each row; shapes (height,), equal where none."""
        across, down = self.across * growth >> 16, self.down * growth >> 16
        away = np.abs(SUBPIXEL * np.arange(height, dtype=np.int64) + SUBPIXEL // 2 - self.y)
        reach = np.full(height, across, np.int64)
        if self.elliptic and down:
            # IEEE 754 rounds square roots correctly, so the integer part of one below 2^52 is the same everywhere
            root = np.sqrt((down * down - away * away).clip(0)).astype(np.int64)
            reach = across * root // down
        start = (self.x - reach + SUBPIXEL // 2 - 1) // SUBPIXEL  # a pixel is covered if its centre is
        stop = (self.x + reach + SUBPIXEL // 2) // SUBPIXEL
        start, stop = start.clip(0, width), stop.clip(0, width)
        return start, np.where(away <= down, np.maximum(start, stop), start)


def occluders(height: int, width: int, stream: RandomStream) -> list[Occluder]:
    """One to three shapes at random places in the picture, to be grown until they cover enough."""
    shapes = []
    for _ in range(1 + int(stream.uint16(1)[0]) % 3):
        x, y, form, size, shade = (int(number) for number in stream.uint16(5))
        across, down = ASPECTS[(form >> 1) % len(ASPECTS)]
        scale = 128 + size % 128
        shapes.append(
            Occluder(
                elliptic=bool(form & 1),
                x=(SUBPIXEL * width * x) >> 16,
                y=(SUBPIXEL * height * y) >> 16,
                across=across * scale,
                down=down * scale,
                shade=16 + shade % 96,
            )
        )
    return shapes


def _covered(shapes: list[Occluder], growth: int, height: int, width: int) -> int:
    """How many pixels the shapes cover together."""
    spans = [shape.spans(growth, height, width) for shape in shapes]
    starts, stops = (np.stack(ends) for ends in zip(*spans, strict=True))
    order = np.argsort(starts, axis=0, kind="stable")
    starts, stops = np.take_along_axis(starts, order, 0), np.take_along_axis(stops, order, 0)
    seen = np.maximum.accumulate(stops, axis=0)
    before = np.vstack([np.zeros((1, height), np.int64), seen[:-1]])
    return int((stops - np.maximum(starts, before)).clip(0).sum())


@image_noise(id=23, version=1, exactness="exact", group="camera", parameters={"share": (0.1, 0.2, 0.3, 0.4, 0.5)})
def occlusion(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Something before the lens or on the print: one to three opaque shapes that cover a share of the picture.

    The stream draws, for each shape: rectangle or ellipse, its centre anywhere in the picture, its aspect ratio (1:2 to
    2:1), its size relative to the others (1:1 to 1:2), and a dark grey of level 16 to 111: neutral, so that no colour
    is added that a question could be about. All shapes then grow together until one step more would cover more than
    the share, so higher severities cover what lower ones do and more, and half of the picture always stays.

    Parameters: share of the picture's area, at most; what is missing from it is less than the next rows and columns of
    pixels at the shapes' edges. Random Erasing takes up to 0.4 (Zhong et al. 2020, arXiv 1708.04896), studies of partly
    hidden objects 0.2 to 0.8 of the object (Kortylewski et al. 2020, arXiv 2006.15538); of a whole picture more than
    half would hide what most questions ask about. None is spatial. Not in ImageNet-C.
    """
    height, width, _ = image.shape
    shapes = occluders(height, width, stream)
    target = int(parameters["share"] * height * width)
    growth = 0
    for bit in range((8 * SUBPIXEL * max(height, width)).bit_length(), -1, -1):
        if _covered(shapes, growth | 1 << bit, height, width) <= target:
            growth |= 1 << bit
    out: RGB = image.copy()
    for shape in shapes:
        starts, stops = shape.spans(growth, height, width)
        for row in np.flatnonzero(starts < stops):
            out[row, starts[row] : stops[row]] = shape.shade
    return out
