"""Photographic degradations of the VizWiz twin: what goes wrong when one cannot see the viewfinder.

All integer arithmetic, so that one seed gives one picture, bit for bit.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]


class Photo(NamedTuple):
    """A degraded picture, how badly it is degraded (0 fine .. 1 hopeless), and what was done to it."""

    pixels: Picture
    harm: float
    kind: str


def _blur(picture: Picture, passes: int) -> Picture:
    """``passes`` box blurs of 3 x 3 pixels, edges repeated, sums divided with rounding down."""
    work = picture.astype(np.int32)
    height, width = work.shape[:2]
    for _ in range(passes):
        padded = np.pad(work, ((1, 1), (1, 1), (0, 0)), mode="edge")
        shifted = np.stack([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
        work = shifted.sum(axis=0) // 9
    return work.astype(np.uint8)


def _scale(picture: Picture, percent: int, shift: int = 0) -> Picture:
    return np.clip(picture.astype(np.int32) * percent // 100 + shift, 0, 255).astype(np.uint8)


def _crop_off_centre(picture: Picture, dx: int, dy: int) -> Picture:
    """Move the picture by (dx, dy) pixels and repeat the edge in the uncovered part."""
    height, width = picture.shape[:2]
    rows = np.clip(np.arange(height) - dy, 0, height - 1)
    columns = np.clip(np.arange(width) - dx, 0, width - 1)
    moved: Picture = picture[rows][:, columns]
    return moved


def _grain(picture: Picture, rng: random.Random, strength: int) -> Picture:
    noise = np.frombuffer(rng.randbytes(picture.size), dtype=np.uint8).reshape(picture.shape).astype(np.int32)
    grained: Picture = np.clip(picture.astype(np.int32) + (noise - 128) * strength // 128, 0, 255).astype(np.uint8)
    return grained


def degrade(picture: Picture, rng: random.Random) -> Photo:
    """Spoil a ``(64, 64, 3)`` uint8 picture in one of five ways, or leave it alone (one time in six)."""
    kind = rng.choice(("none", "blur", "dark", "bright", "off centre", "grain"))
    harm = rng.random()
    if kind == "none":
        return Photo(picture, 0.0, kind)
    if kind == "blur":
        return Photo(_blur(picture, 1 + int(harm * 9)), harm, kind)
    if kind == "dark":
        return Photo(_grain(_scale(picture, 60 - int(harm * 54)), rng, 6), harm, kind)
    if kind == "bright":
        return Photo(_scale(picture, 100, 40 + int(harm * 120)), harm, kind)
    if kind == "off centre":
        reach = 4 + int(harm * 40)
        return Photo(_crop_off_centre(picture, rng.choice((-1, 1)) * reach, rng.choice((-1, 0, 1)) * reach), harm, kind)
    return Photo(_grain(picture, rng, 20 + int(harm * 180)), harm, kind)
