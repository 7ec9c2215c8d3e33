"""How the camera was held: a crop off the centre, and a rotation. Both move boxes along."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .pixels import RGB
from .registry import Box, Size, image_noise
from .resampling import FRACTION_BITS, packed, sample
from .seeding import RandomStream

LEFT_OF_BOX = 0.5  # the share of a box's area that must stay in the picture for the box to be asked about
GREY = 128  # what is seen where the rotated picture ends
TURN_BITS = 32  # of the fractions that sine and cosine have
BAND = 1 << 14  # pixels that a pass works on at a time, to stay in cache


def cut(box: Box, size: Size) -> tuple[Box, Size] | None:
    """The part of a box inside a picture of (width, height), or None if that is under half of the box's area."""
    x1, y1, x2, y2 = box
    width, height = size
    left, top, right, bottom = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    inside = max(0.0, right - left) * max(0.0, bottom - top)
    return ((left, top, right, bottom), size) if inside >= LEFT_OF_BOX * (x2 - x1) * (y2 - y1) else None


def crop_window(size: Size, parameters: Mapping[str, float], stream: RandomStream) -> tuple[int, int, int, int]:
    """Left, top, width and height of the window that a picture of (width, height) is cropped to."""
    starts, lengths = [], []
    for side, number in zip(size, stream.uint16(2), strict=True):
        length = max(1, round(parameters["keep"] * side))
        near = (side - length) * int(number >> 1) / (1 << 17)  # from the near edge, at most a quarter of the play
        starts.append(round(near) if number & 1 else side - length - round(near))
        lengths.append(length)
    return starts[0], starts[1], lengths[0], lengths[1]


def move_box_of_crop(
    box: Box, size: Size, parameters: Mapping[str, float], stream: RandomStream
) -> tuple[Box, Size] | None:
    """The box in the window's coordinates, cut at its edges; None where under half of the box's area is left."""
    left, top, width, height = crop_window(size, parameters, stream)
    x1, y1, x2, y2 = box
    return cut((x1 - left, y1 - top, x2 - left, y2 - top), (width, height))


@image_noise(
    id=24,
    version=1,
    exactness="exact",
    group="camera",
    geometry="changed",
    move_box=move_box_of_crop,
    parameters={"keep": (0.95, 0.9, 0.84, 0.77, 0.71)},
)
def off_centre_crop(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Badly framed: the picture cropped to a window that has a share of each side and lies off the centre.

    In both directions the stream draws the edge that the window keeps to and its distance from it, at most a quarter
    of the play. The result has the window's size, at least 1 x 1; higher severities show a part of what lower ones do.

    Parameters: keep, the share of each side (rounded to pixels). Of the area, 10, 19, 29, 41 and 50 % are lost: nearly
    the shares of ``occlusion``, so that hiding and cutting away can be compared. Framing is, after blur, the most
    frequent of the six flaws that Chiu et al. (2020, arXiv 2003.12511) count in photographs taken by blind people; the
    others are too dark, too bright, obstructed and rotated. None is spatial. Not in ImageNet-C.
    Geometry: boxes move with the window and are cut at its edges; a box of which under half is left counts as gone.
    """
    left, top, width, height = crop_window((image.shape[1], image.shape[0]), parameters, stream)
    out: RGB = image[top : top + height, left : left + width].copy()
    return out


def turn(parameters: Mapping[str, float], stream: RandomStream) -> tuple[int, int]:
    """Cosine and sine of the angle with its drawn sign, in units of 2^-32."""
    angle = math.radians(parameters["angle"])
    cosine, sine = round(math.cos(angle) * (1 << TURN_BITS)), round(math.sin(angle) * (1 << TURN_BITS))
    return cosine, sine if stream.uint16(1)[0] & 1 else -sine


def move_box_of_rotation(
    box: Box, size: Size, parameters: Mapping[str, float], stream: RandomStream
) -> tuple[Box, Size] | None:
    """The box around the box's own rotated inscribed ellipse, cut to the picture; see :func:`rotation`."""
    cosine, sine = (part / (1 << TURN_BITS) for part in turn(parameters, stream))
    x1, y1, x2, y2 = box
    a, b = (x2 - x1) / 2, (y2 - y1) / 2
    from_centre_x, from_centre_y = x1 + a - size[0] / 2, y1 + b - size[1] / 2
    x = size[0] / 2 + cosine * from_centre_x + sine * from_centre_y
    y = size[1] / 2 - sine * from_centre_x + cosine * from_centre_y
    across = math.sqrt((a * cosine) ** 2 + (b * sine) ** 2)
    down = math.sqrt((a * sine) ** 2 + (b * cosine) ** 2)
    return cut((x - across, y - down, x + across, y + down), size)


@image_noise(
    id=25,
    version=1,
    exactness="exact",
    group="camera",
    geometry="changed",
    move_box=move_box_of_rotation,
    parameters={"angle": (5.0, 10.0, 15.0, 20.0, 30.0)},
)
def rotation(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """A camera held askew: the picture rotated about its centre, bilinearly, in a frame of the same size.

    Each pixel's source is found to 1/64 of a pixel and mixed from its four neighbours in integers. Where the source
    lies outside, mid-grey (128) is seen: repeating or mirroring the picture would add things to count.

    Parameters: angle in degrees; its sign is drawn from the stream, positive is counter-clockwise. A hand-held camera
    is some degrees off; 30 is as far as rotation is taken as augmentation (AutoAugment, Cubuk et al. 2019, arXiv
    1805.09501). None is spatial. Not in ImageNet-C.
    Geometry: what a box holds is unknown but for its extent. The box around its four rotated corners is too large for
    anything but a rectangle; Kalra et al. (2021, Towards Rotation Invariance in Object Detection, arXiv 2109.13488)
    show that the best guess is the box around the rotated ellipse inscribed in the old box, of half axes
    sqrt((a cos)^2 + (b sin)^2) and sqrt((a sin)^2 + (b cos)^2). That is used here: exact for an ellipse, too small for
    a rectangle, too large for a diamond. For a square box its IoU with the box around the corners is 0.85, 0.75, 0.67,
    0.61 and 0.54 at the five severities, and similar up to sides of 1:3: no model can reach an IoU of 1 here, so
    compare with the full-precision twin, not with published scores. The box is cut to the picture and counts as gone
    where under half of it is left.
    """
    height, width = image.shape[0] + 2, image.shape[1] + 2
    framed = np.full((height, width, 3), GREY, np.uint8)  # from this frame on, coordinates are those of the frame
    framed[1:-1, 1:-1] = image
    pixels = packed(framed)
    cosine, sine = turn(parameters, stream)
    across, down = (np.arange(3 - side, side - 1, 2, dtype=np.int64) for side in (width, height))  # in half pixels
    shift = TURN_BITS + 1 - FRACTION_BITS
    centre_x, centre_y = (((side - 1) << TURN_BITS) + (1 << (shift - 1)) for side in (width, height))
    x_along, x_down = across * cosine, down * -sine + centre_x
    y_along, y_down = across * sine, down * cosine + centre_y

    last_x, last_y = ((side - 1) << FRACTION_BITS for side in (width, height))
    out = np.empty_like(image)
    band = max(1, BAND // width)
    for top in range(0, out.shape[0], band):
        rows = slice(top, top + band)
        x = ((x_down[rows, None] + x_along) >> shift).clip(0, last_x)
        y = ((y_down[rows, None] + y_along) >> shift).clip(0, last_y)
        sample(pixels, width, x, y, out[rows])
    return out
