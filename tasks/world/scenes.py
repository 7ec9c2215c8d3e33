"""Scenes of the block world: coloured, textured shapes on a cluttered ground, drawn natively at 64 pixels.

Every number comes from ``random.Random(seed)`` (stable across Python versions) and every pixel from comparisons of
integers and exactly rounded floats, so that one seed gives one picture, bit for bit, on any machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 64
"""Side of every picture, in pixels."""
CELL = 16
"""Object centres lie in different cells of a grid of this pitch: one visual token of the reference model each."""
GRID = SIDE // CELL

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (243, 132, 28),
    "yellow": (236, 214, 46),
    "green": (52, 160, 60),
    "cyan": (44, 190, 190),
    "blue": (42, 82, 214),
    "purple": (142, 52, 176),
    "white": (238, 238, 238),
}
NEAR_COLOR = {
    "red": "orange",
    "orange": "red",
    "yellow": "orange",
    "green": "cyan",
    "cyan": "green",
    "blue": "purple",
    "purple": "blue",
    "white": "yellow",
}
"""The colour with which people confuse each colour."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped")
SIZE_BOUNDARY = 13
"""Objects of at most this many pixels are small."""


@dataclass(frozen=True)
class Block:
    """One object: words that describe it, and where it is.

    ``x, y, w, h`` is the tight box of its drawn pixels, in pixels, before other objects hide parts of it.
    ``blend`` in [0, 0.5) says how far the drawn colour lies on the way to the near colour; ``extent`` is the side of
    the box it was drawn in.
    """

    shape: str
    color: str
    size: str
    texture: str
    blend: float
    extent: int
    cell: int
    x: int
    y: int
    w: int
    h: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) in pixels, exclusive on the right and at the bottom."""
        return self.x, self.y, self.x + self.w, self.y + self.h


@dataclass(frozen=True)
class Scene:
    """A picture's content: its seed and its objects, from back to front."""

    seed: int
    blocks: tuple[Block, ...]


def _mask(shape: str, extent: int) -> NDArray[np.bool_]:
    """Boolean ``(extent, extent)`` mask of a shape that fills its box. Coordinates are doubled to stay integers."""
    v = 2 * np.arange(extent) - (extent - 1)
    x, y = np.meshgrid(v, v)
    r = extent  # half the side, doubled
    if shape == "circle":
        return x * x + y * y <= r * r
    if shape == "square":
        return np.ones((extent, extent), dtype=bool)
    if shape == "triangle":
        return 2 * np.abs(x) <= y + r
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= r
    if shape == "cross":
        arm = 3 * r
        return (10 * np.abs(x) <= arm) | (10 * np.abs(y) <= arm)
    if shape == "star":  # two triangles, one upside down
        up = (2 * np.abs(x) <= y + r) & (3 * y <= 2 * r)
        down = (2 * np.abs(x) <= r - y) & (-3 * y <= 2 * r)
        return up | down
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


_MASKS = {(shape, extent): _mask(shape, extent) for shape in SHAPES for extent in range(8, 24)}


def sample_scene(seed: int, n_min: int = 1, n_max: int = 6) -> Scene:
    """Draw a scene's content from its seed: ``n_min`` to ``n_max`` objects in different grid cells."""
    rng = random.Random(seed)
    n = rng.randint(n_min, n_max)
    cells = rng.sample(range(GRID * GRID), n)
    palette = rng.sample(list(COLORS), min(len(COLORS), max(2, n - rng.randint(0, 2))))
    blocks = []
    for cell in cells:
        shape, color, texture = rng.choice(SHAPES), rng.choice(palette), rng.choice(TEXTURES)
        large = rng.random() < 0.5
        extent = rng.randint(14, 19) if large else rng.randint(9, 13)
        blend = rng.uniform(0.3, 0.49) if rng.random() < 0.12 else rng.uniform(0.0, 0.12)
        cx = (cell % GRID) * CELL + CELL // 2 + rng.randint(-4, 4)
        cy = (cell // GRID) * CELL + CELL // 2 + rng.randint(-4, 4)
        left = min(max(cx - extent // 2, 0), SIDE - extent)
        top = min(max(cy - extent // 2, 0), SIDE - extent)
        rows, columns = np.nonzero(_MASKS[shape, extent])
        x, y = left + int(columns.min()), top + int(rows.min())
        w, h = int(columns.max() - columns.min()) + 1, int(rows.max() - rows.min()) + 1
        size = "large" if large else "small"
        blocks.append(Block(shape, color, size, texture, blend, extent, cell, x, y, w, h))
    return Scene(seed, tuple(blocks))


def _ground(rng: random.Random) -> NDArray[np.int32]:
    """A dull background: a ramp between two greys of a random tint, thin lines and grain. ``(64, 64, 3)`` int32."""
    base = [rng.randint(70, 130) for _ in range(3)]
    grey = sum(base) // 3
    base = [(channel + 2 * grey) // 3 for channel in base]
    gx, gy = rng.randint(-24, 24), rng.randint(-24, 24)
    ramp = np.arange(SIDE, dtype=np.int32)
    field = (ramp[None, :] * gx + ramp[:, None] * gy) // SIDE
    ground = np.asarray(base, dtype=np.int32) + field[:, :, None]
    for _ in range(rng.randint(0, 4)):  # clutter: lines of one pixel, a little lighter or darker
        shift = rng.choice((-22, -16, 16, 22))
        start, length = rng.randrange(SIDE), rng.randint(8, 40)
        if rng.random() < 0.5:
            ground[rng.randrange(SIDE), start : start + length] += shift
        else:
            ground[start : start + length, rng.randrange(SIDE)] += shift
    for _ in range(rng.randint(0, 5)):  # clutter: crumbs
        x, y = rng.randrange(SIDE - 3), rng.randrange(SIDE - 3)
        ground[y : y + 2, x : x + rng.randint(1, 3)] += rng.choice((-40, 40))
    grain = np.frombuffer(rng.randbytes(SIDE * SIDE), dtype=np.uint8).reshape(SIDE, SIDE)
    ground += (grain.astype(np.int32) % 4 - 1)[:, :, None]
    return ground


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene. Returns ``(64, 64, 3)`` uint8 RGB; the same scene gives the same bytes everywhere."""
    rng = random.Random(scene.seed * 2 + 1)
    canvas = _ground(rng)
    for block in scene.blocks:
        mask = _MASKS[block.shape, block.extent]
        rows, columns = np.nonzero(mask)
        left, top = block.x - int(columns.min()), block.y - int(rows.min())
        own, near = COLORS[block.color], COLORS[NEAR_COLOR[block.color]]
        weight = int(block.blend * 256)
        tint = rng.randint(-8, 8)
        rgb = np.array([(a * (256 - weight) + b * weight) // 256 + tint for a, b in zip(own, near, strict=True)])
        pixels = np.broadcast_to(rgb, (len(rows), 3)).copy()
        if block.texture == "striped":
            dark = (rows + columns) % 4 < 2
            pixels[dark] = pixels[dark] * 9 // 20
        canvas[top + rows, left + columns] = pixels
    return np.clip(canvas, 0, 255).astype(np.uint8)
