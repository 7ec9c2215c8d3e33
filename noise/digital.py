"""What processing does to a picture: loss of contrast, and JPEG compression."""

from __future__ import annotations

import io
from collections.abc import Mapping

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin

from .errors import ImageError
from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

JPEG_MAX_SIDE = 65_500  # libjpeg's limit


@image_noise(id=5, version=1, exactness="exact", parameters={"gain": (0.4, 0.3, 0.2, 0.1, 0.05)})
def contrast(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Less contrast: out = (x - mean) gain + mean, with the mean of each channel over the picture.

    Parameters: gain. None is spatial.
    Differs from ImageNet-C: the result is rounded, not truncated, to 8 bits.
    """
    gain = parameters["gain"]
    sums = np.array(cv2.sumElems(image)[:3])  # sums of integers below 2^53: exact
    means = sums / (image.shape[0] * image.shape[1])
    table = np.rint(np.arange(256.0)[:, None] * gain + means * (1 - gain)).astype(np.uint8)
    out: RGB = cv2.LUT(image, table[None])
    return out


@image_noise(id=6, version=1, exactness="build-dependent", parameters={"quality": (25, 18, 15, 10, 7)})
def jpeg_compression(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Written as a JPEG file and read back, with Pillow: colour at half resolution (4:2:0), standard tables.

    Parameters: quality, 1..95. None is spatial: a JPEG block has 8 x 8 pixels whatever the picture's size.
    As in ImageNet-C. The bytes depend on the JPEG library that Pillow was built with.

    Raises:
        ImageError: a side over 65,500 pixels, which no JPEG file can hold.
    """
    if max(image.shape[:2]) > JPEG_MAX_SIDE:
        raise ImageError(
            f"image: {image.shape[1]}x{image.shape[0]} pixels, but a JPEG side is at most {JPEG_MAX_SIDE}. "
            "Scale it down."
        )
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(parameters["quality"]))
    file.seek(0)
    return np.array(JpegImagePlugin.JpegImageFile(file))
