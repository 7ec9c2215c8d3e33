"""What processing does to a picture: loss of contrast, JPEG compression, and coarse pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin

from .errors import ImageError
from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

JPEG_MAX_SIDE = 65_500  # libjpeg's limit


@image_noise(id=5, version=1, exactness="exact", group="imagenet_c", parameters={"gain": (0.4, 0.3, 0.2, 0.1, 0.05)})
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


@image_noise(
    id=6, version=1, exactness="build-dependent", group="imagenet_c", parameters={"quality": (25, 18, 15, 10, 7)}
)
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


@image_noise(
    id=19,
    version=1,
    exactness="exact",
    group="imagenet_c",
    parameters={"block": (1 / 0.6, 2.0, 2.5, 1 / 0.3, 4.0)},
    spatial=("block",),
)
def pixelate(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Coarse pixels: scaled down to 1 / block of each side by averaging, and up again without interpolation.

    The small picture has int(side / block) pixels, at least 1; each is the mean of the pixels whose centres it covers.

    Parameters: block, the side of a coarse pixel (spatial): 1 over ImageNet-C's factors. A block of up to one pixel, as
    scaled mode has in pictures that are much smaller than 224 pixels, leaves the picture as it is.
    As in ImageNet-C, whose Pillow filter BOX counts whole pixels too. Differs from ImageNet-C: means are rounded once,
    where Pillow rounds across and then down.
    """
    if parameters["block"] <= 1:
        return np.array(image)
    rows, columns = (_cells(side, max(1, int(side / parameters["block"] + 1e-9))) for side in image.shape[:2])
    (_, tops, heights), (_, lefts, widths) = (
        np.unique(cells, return_index=True, return_counts=True) for cells in (rows, columns)
    )
    sums = np.add.reduceat(image, tops, axis=0, dtype=np.uint16 if heights.max() <= 257 else np.uint32)
    sums = np.add.reduceat(sums, lefts, axis=1, dtype=np.uint32)
    areas = (heights[:, None] * widths)[:, :, None].astype(np.uint32)
    sums += areas // 2
    sums //= areas
    out: RGB = sums.astype(np.uint8).take(rows, axis=0).take(columns, axis=1)
    return out


def _cells(side: int, count: int) -> npt.NDArray[np.int64]:
    """For each pixel of a side the one of ``count`` equal cells that its centre lies in; the later one on an edge."""
    return (2 * np.arange(side, dtype=np.int64) + 1) * count // (2 * side)
