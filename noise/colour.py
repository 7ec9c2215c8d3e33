"""Colour in hue, saturation and value: brightness and saturation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

ONE = 1 << 16  # fixed-point one of the factors
BAND = 1 << 15  # pixels at a time, to stay in cache


@lru_cache(maxsize=8)
def _value_factors(offset: float) -> npt.NDArray[np.int32]:
    """min(v + 255 offset, 255) / v in units of 2^-16, for the values v = 1..255; 0 stands at 0."""
    values = np.arange(256.0)
    brighter = np.minimum(values + 255 * offset, 255) * ONE
    factors: npt.NDArray[np.float64] = np.rint(np.divide(brighter, values, out=np.zeros(256), where=values > 0))
    return factors.astype(np.int32)


@image_noise(id=16, version=1, exactness="exact", group="imagenet_c", parameters={"offset": (0.1, 0.2, 0.3, 0.4, 0.5)})
def brightness(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Brighter: the value v (the largest channel) of hue, saturation and value becomes min(v + 255 offset, 255).

    With hue and saturation kept, that multiplies each channel by min(v + 255 offset, 255) / v; black becomes the grey
    255 offset.

    Parameters: offset, as a fraction of full scale. None is spatial.
    Differs from ImageNet-C: the result is rounded, not truncated, to 8 bits.
    """
    offset = parameters["offset"]
    factors = _value_factors(offset)
    grey = np.uint8(np.rint(255 * offset))
    out = np.empty_like(image)
    band = max(1, BAND // image.shape[1])
    for top in range(0, image.shape[0], band):
        part = image[top : top + band]
        red, green, blue = cv2.split(part)
        value = np.maximum(np.maximum(red, green), blue)
        factor = factors.take(value)
        for channel in (red, green, blue):
            np.copyto(channel, _rounded(factor * channel), casting="unsafe")
            channel[value == 0] = grey
        cv2.merge([red, green, blue], dst=out[top : top + band])
    return out


@lru_cache(maxsize=8)
def _saturation_factors(gain: float, offset: float) -> npt.NDArray[np.int32]:
    """new saturation / old saturation in units of 2^-16, at [256 v + d] for value v and v minus smallest channel d."""
    value, spread = np.meshgrid(np.arange(256.0), np.arange(256.0), indexing="ij")
    steepest = np.divide(value, spread, out=np.zeros((256, 256)), where=spread > 0)  # the factor that saturates fully
    factors: npt.NDArray[np.float64] = np.rint(np.minimum(steepest, gain + offset * steepest) * ONE)
    return factors.astype(np.int32).reshape(-1)


@image_noise(
    id=17,
    version=1,
    exactness="exact",
    group="imagenet_c_extra",
    parameters={"gain": (0.3, 0.1, 2.0, 5.0, 20.0), "offset": (0.0, 0.0, 0.0, 0.1, 0.2)},
)
def saturate(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Faded or garish: the saturation s of hue, saturation and value becomes min(gain s + offset, 1).

    With hue and value v (the largest channel) kept, a channel x becomes v - (v - x) s' / s, s being the difference of
    the largest and the smallest channel over v. A grey pixel has no hue; as in ImageNet-C it counts as red, so that
    severities 4 and 5 tint greys: (v, v (1 - offset), v (1 - offset)).

    Parameters: gain and offset. None is spatial. Severities 1 and 2 fade, 3 to 5 saturate, as in ImageNet-C.
    Differs from ImageNet-C: the result is rounded, not truncated, to 8 bits.
    """
    gain, offset = parameters["gain"], parameters["offset"]
    factors = _saturation_factors(gain, offset)
    tint = np.rint(np.arange(256) * (1 - min(1.0, offset))).astype(np.uint8)
    out = np.empty_like(image)
    band = max(1, BAND // image.shape[1])
    for top in range(0, image.shape[0], band):
        red, green, blue = cv2.split(image[top : top + band])
        value = np.maximum(np.maximum(red, green), blue)
        spread = value - np.minimum(np.minimum(red, green), blue)
        index = value.astype(np.intp)
        index <<= 8
        index |= spread
        factor = factors.take(index)
        grey = np.flatnonzero(spread == 0) if offset else np.empty(0, np.intp)
        for channel in (red, green, blue):
            np.subtract(value, _rounded(factor * (value - channel)), out=channel, casting="unsafe")
        for channel in (green, blue):
            channel.reshape(-1)[grey] = tint[value.reshape(-1)[grey]]
        cv2.merge([red, green, blue], dst=out[top : top + band])
    return out


def _rounded(product: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """A product with a factor of fixed-point one ``ONE``, rounded to integers in place."""
    product += ONE // 2
    product >>= 16
    return product
