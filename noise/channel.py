"""What channels do to a picture in use, beyond ImageNet-C: repeated recompression, and loss of resolution."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError
from .pixels import RGB
from .registry import image_noise
from .seeding import RandomStream

WEBP_MAX_SIDE = 16_383  # what the file format can hold
BAND = 1 << 16  # values that a pass works on at a time, to stay in cache


@image_noise(
    id=21,
    version=1,
    exactness="build-dependent",
    group="camera",
    parameters={"rounds": (2, 3, 3, 3, 5), "quality": (75, 60, 40, 25, 18)},
)
def recompression(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Passed on again and again: written and read back as JPEG, WebP, JPEG, ..., ``rounds`` times.

    Before each round 0 to 7 rows and columns, drawn from the stream, are added at the top and the left (copies of the
    edge) and removed after it, as when a picture is cropped or framed on its way: without that the blocks of all rounds
    coincide, and rounds after the second would change next to nothing. The geometry stays.

    Parameters: rounds; quality, 1..95, of both formats. Networks and messengers write JPEG at about 70 to 85, old or
    thrifty ones at half of that; the low values stand for more rounds than there is time for. None is spatial: the
    blocks have 8 x 8 (JPEG) and 4 x 4 to 16 x 16 (WebP) pixels whatever the picture's size. JPEG has colour at half
    resolution and standard tables, as in ``jpeg_compression``; WebP is lossy at method 0, the fastest.
    Not in ImageNet-C, whose JPEG noise is a single round at lower quality. Pillow writes and OpenCV, which is faster
    at it, reads: the bytes depend on the libraries that both were built with.

    Raises:
        ImageError: a side over 16,376 pixels, which no WebP file can hold with the added rows.
    """
    height, width, _ = image.shape
    if max(height, width) > WEBP_MAX_SIDE - 7:
        raise ImageError(
            f"image: {width}x{height} pixels, but recompression goes through WebP, whose side is at most "
            f"{WEBP_MAX_SIDE}, 7 of them for the shift of the blocks. Scale it down."
        )
    rounds, quality = int(parameters["rounds"]), int(parameters["quality"])
    out = image
    for turn, shift in enumerate(stream.uint16(rounds)):
        top, left = int(shift) & 7, int(shift) >> 3 & 7
        out = np.asarray(cv2.copyMakeBorder(out, top, 0, left, 0, cv2.BORDER_REPLICATE))
        out = _passed_on(out, "WEBP" if turn % 2 else "JPEG", quality)
        out = np.asarray(cv2.cvtColor(out[top:, left:], cv2.COLOR_BGR2RGB))
    return out


def _passed_on(picture: RGB, file_format: str, quality: int) -> RGB:
    """The picture written to a file in memory and read back, in the order blue, green, red."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, file_format, quality=quality, method=0)  # method: WebP's; JPEG has none
    return np.asarray(cv2.imdecode(np.frombuffer(file.getbuffer(), np.uint8), cv2.IMREAD_COLOR), np.uint8)


@image_noise(id=22, version=1, exactness="exact", group="camera", parameters={"factor": (2, 3, 4, 6, 8)})
def down_up_scaling(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Sent at a lower resolution: the mean of each factor x factor cell, then bilinear enlargement to the old size.

    Cells start at the top left corner; where the last ones reach over the picture, its edge is repeated. Each cell's
    mean is rounded to 8 bits and stands at the cell's centre; between centres the enlargement is linear, beyond the
    outermost ones constant, and rounded to 8 bits. Nothing moves.

    Parameters: factor, a whole number, at most 8: 2, 3, 4 and 8 are the scales at which super-resolution is studied
    (Dong et al. 2014, arXiv 1501.00092; Lai et al. 2017, arXiv 1704.03915). None is spatial: the factor relates to the
    picture's own size. Not in ImageNet-C, whose pixelate enlarges by repeating pixels, so that blocks with sharp edges
    remain; here detail is lost and nothing is added.
    """
    factor = int(parameters["factor"])
    width = image.shape[1]
    small = _cell_means(image, factor)
    rows, columns, _ = small.shape

    wide = np.empty((rows, columns, factor, 3), np.uint16)
    for phase, near, far, before in _bilinear_phases(factor):
        wide[:, :, phase] = small * near + _neighbours(small, 1, before) * far
    wide = wide.reshape(rows, -1, 3)[:, :width]

    out = np.empty_like(image)
    half, whole = np.uint16(2 * factor * factor), np.uint16(4 * factor * factor)  # the weights' sum, at most 256
    band = max(1, BAND // (3 * width))
    for first in range(0, rows, band):
        cells = slice(first, first + band)
        part = wide[cells]
        above = np.concatenate([wide[max(0, first - 1)][None], part[:-1]])
        below = np.concatenate([part[1:], wide[min(rows - 1, first + len(part))][None]])
        for phase, near, far, before in _bilinear_phases(factor):
            lines = out[first * factor + phase : (first + len(part)) * factor : factor]
            mixed = part[: len(lines)] * near
            mixed += (above if before else below)[: len(lines)] * far
            mixed += half
            mixed //= whole
            lines[...] = mixed
    return out


def _cell_means(image: RGB, factor: int) -> npt.NDArray[np.uint16]:
    """Rounded means of factor x factor cells, the last ones filled up with the edge; shape (rows, columns, 3)."""
    height, width, _ = image.shape
    rows, columns = -(-height // factor), -(-width // factor)
    if (rows * factor, columns * factor) != (height, width):
        padding = rows * factor - height, columns * factor - width
        image = np.asarray(cv2.copyMakeBorder(image, 0, padding[0], 0, padding[1], cv2.BORDER_REPLICATE))
    lines = image.reshape(rows, factor, -1)
    summed = lines[:, 0].astype(np.uint16)
    for line in range(1, factor):
        summed += lines[:, line]
    cells = summed.reshape(rows, columns, factor, 3)
    means: npt.NDArray[np.uint16] = cells[:, :, 0].copy()
    for column in range(1, factor):
        means += cells[:, :, column]
    means += np.uint16(factor * factor // 2)
    means //= np.uint16(factor * factor)
    return means


def _bilinear_phases(factor: int) -> Iterator[tuple[int, np.uint16, np.uint16, bool]]:
    """For each pixel of a cell: its place, the weights of the cell and of a neighbour, and whether that is before it.

    The centre of pixel p lies (2 p + 1 - factor) / (2 factor) cells after the cell's centre; weights are in units of
    1 / (2 factor).
    """
    for phase in range(factor):
        offset = 2 * phase + 1 - factor
        yield phase, np.uint16(2 * factor - abs(offset)), np.uint16(abs(offset)), offset < 0


def _neighbours(cells: npt.NDArray[np.uint16], axis: int, before: bool) -> npt.NDArray[np.uint16]:
    """Each cell's neighbour before or after it along an axis; at the end the cell itself."""
    last = cells.shape[axis] - 1
    places = np.arange(last + 1) + (-1 if before else 1)
    return cells.take(places.clip(0, last), axis)
