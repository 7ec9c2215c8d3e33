"""Frost on a window: ice crystals that are grown, not photographed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from .fields import POSITION_BITS, Field, Positions, interpolated
from .pixels import RGB
from .registry import image_noise
from .seeding import U16, RandomStream

TURN = 1 << 12  # directions in a full turn
UNIT = 1 << 12  # fixed-point one of positions, cosines and sines
STEM, BRANCH, TWIG = range(3)
BRANCH_ANGLE = 620  # about 54 degrees
GROWN = {"ferns": (1024, 110), "fronds": (896, 84), "hoar": (768, 1500)}  # side of a square of ice, and its crystals
MOST_HALVINGS = 7
GLOW = (
    (1, 2),
    (3, 6),
    (9, 4),
    (33, 3),
)  # widths over which a crystal's light is scattered, and the shares of the light
HALF_BRIGHT = 20_000  # light that makes half of full brightness
PATCH = 160  # cells from one random number to the next where ice is thick or thin
GRAIN = 16  # cells per point at which the thickness is computed
FULL = 1 << 16  # fixed-point one of thicknesses
TINT = (0.74, 0.9, 1.0)  # thin ice is bluish
BAND = 1 << 14  # pixels at a time, to stay in cache

Grey = npt.NDArray[np.uint8]
Tips = dict[str, Field]
Rows = Callable[[int, int], Field]


class Growth:
    """Tips of ice on a torus that grow one step per tick, and stop at the ice of another stem.

    A crystal is a fan of stems; a stem sprouts branches to both sides as it grows, and a branch twigs. All of it is
    integers, from the raw numbers of one generator: every machine grows the same ice.
    """

    def __init__(self, seed: int, side: int) -> None:
        self.side = side
        self.bits = np.random.PCG64(seed)
        self.owner = np.zeros(side * side, np.int32)
        self.ink = np.zeros(side * side, np.int32)
        angles = [2 * math.pi * index / TURN for index in range(TURN)]
        self.cosine = np.array([round(math.cos(angle) * UNIT) for angle in angles], np.int32)
        self.sine = np.array([round(math.sin(angle) * UNIT) for angle in angles], np.int32)

    def below(self, bound: int, count: int) -> Field:
        """Integers uniform on 0..bound - 1."""
        raw = np.asarray(self.bits.random_raw((count + 3) // 4), dtype="<u8").view("<u2")[:count]
        return (raw.astype(np.int64) * bound >> 16).astype(np.int32)

    def around(self, bound: int, count: int) -> Field:
        """Integers uniform on -bound..bound - 1."""
        return self.below(2 * bound, count) - bound

    def fans(self, crystals: int, stems: int, longest: int) -> Tips:
        """The first tips: at random places, crystals of some stems; none lives longer than ``longest`` ticks or so."""
        count = crystals * stems
        reach = self.below(1 << 10, count)
        return {
            "x": np.repeat(self.below(self.side, crystals), stems) * UNIT,
            "y": np.repeat(self.below(self.side, crystals), stems) * UNIT,
            "heading": np.repeat(self.below(TURN, crystals), stems) + self.around(TURN // 2, count),
            "bend": np.repeat(self.around(7, crystals), stems) + self.around(4, count),
            "age": -np.repeat(self.below(longest // 2, crystals), stems),
            "life": longest // 8 + (reach * reach * longest >> 20),
            "kind": np.full(count, STEM, np.int32),
            "spacing": np.repeat(4 + self.below(4, crystals), stems),
            "ink": np.repeat(150 + self.below(106, crystals), stems),
            "owner": np.arange(1, count + 1, dtype=np.int32),
        }

    def grow(self, tips: Tips) -> None:
        """Let tips grow until none is left."""
        while tips["x"].size:
            awake = tips["age"] >= 0
            stem = tips["kind"] == STEM
            chance = self.below(1 << 6, awake.size)
            turn = (tips["bend"] + (chance & 1)) >> 1
            turn += np.where(stem, (chance >> 1) - 16, 0)
            pace = np.where(stem, UNIT, UNIT * 3 // 4) * awake
            tips["age"] += 1
            tips["heading"] = (tips["heading"] + turn * awake) % TURN
            for axis, along in (("x", self.cosine), ("y", self.sine)):
                tips[axis] = (tips[axis] + along[tips["heading"]] * pace // UNIT) % (self.side * UNIT)
            place = tips["y"] // UNIT * self.side + tips["x"] // UNIT
            there = self.owner[place]
            free = (there == 0) | (there == tips["owner"]) | (tips["age"] < 6)
            alive = ~awake | (free & (tips["age"] < tips["life"]))
            tips = {name: values[alive] for name, values in tips.items()}
            awake, place = awake[alive], place[alive]

            drawn = place[awake]
            left = np.minimum(tips["life"] - tips["age"] + 8, 24)
            np.maximum.at(self.owner, drawn, tips["owner"][awake])  # two tips may meet in one cell
            np.maximum.at(self.ink, drawn, (tips["ink"] * left // 24)[awake])
            sprouting = awake & (tips["kind"] < TWIG) & (tips["age"] % tips["spacing"] == 0)
            new = self.sprouts({name: values[sprouting] for name, values in tips.items()})
            tips = {name: np.concatenate([values, new[name]]) for name, values in tips.items()}

    def sprouts(self, parents: Tips) -> Tips:
        """Two tips from every parent, one to each side."""
        new = {name: np.repeat(values, 2) for name, values in parents.items()}
        count = new["x"].size
        side = np.tile(np.array([1, -1], np.int32), count // 2)
        branch = new["kind"] == STEM
        longest = np.minimum((new["life"] - new["age"]) * 2 // 3, np.where(branch, 80, 12))
        longest = np.minimum(longest, 8 + new["age"])
        return {
            **new,
            "heading": new["heading"] + side * BRANCH_ANGLE + self.around(140, count),
            "bend": np.where(branch, -4 * side, 0),
            "age": np.zeros(count, np.int32),
            "life": np.maximum(2, longest * (100 + self.below(156, count)) >> 8),
            "kind": new["kind"] + 1,
            "spacing": np.full(count, 3, np.int32),
            "ink": np.where(branch, new["ink"] * 5 >> 3, new["ink"] * 3 >> 2),
        }


@lru_cache(maxsize=24)
def ice(kind: str, halvings: int = 0) -> Grey:
    """A square of ice that continues at its opposite edges, its side halved some times by averaging.

    ``ferns`` and ``fronds`` are long feathers with gaps between them, ``hoar`` is a dense felt of needles. Each is
    grown once per process, in a fraction of a second; threads that ask at once grow the same ice.
    """
    if halvings:
        finer = ice(kind, halvings - 1).astype(np.uint16)
        return ((finer[::2, ::2] + finer[::2, 1::2] + finer[1::2, ::2] + finer[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    side, crystals = GROWN[kind]
    growth = Growth(side, side)
    growth.grow(growth.fans(crystals, 6, 60) if kind == "hoar" else growth.fans(crystals, 5, 400))
    ink = growth.ink.reshape(side, side) << 4
    light = np.zeros((side, side), np.int64)
    for width, share in GLOW:
        light += _scattered(ink, width) * share
    return (255 * light // (light + HALF_BRIGHT)).astype(np.uint8)


def _scattered(field: Field, width: int) -> npt.NDArray[np.int64]:
    """The mean over width x width cells, taken twice; the field continues at its opposite edges."""
    reach = width // 2
    out = field.astype(np.int64)
    for axis in (0, 1, 0, 1) if width > 1 else ():
        padded = np.pad(out, [(reach + 1, reach) if other == axis else (0, 0) for other in (0, 1)], mode="wrap")
        sums = np.moveaxis(padded.cumsum(axis), axis, 0)
        out = np.moveaxis((sums[width:] - sums[:-width]) // width, 0, axis)
    return out


def sheet(kind: str, height: int, width: int, pixel: float, draws: U16) -> Rows:
    """A piece of ice as large as the picture, turned and shifted at random: rows from, rows to -> levels 0..255.

    Args:
        pixel: cells of ice are this many pixels wide.
        draws: three uniform numbers.
    """
    halvings = 0
    while pixel * 2 <= 1 and halvings < MOST_HALVINGS:
        halvings += 1
        pixel *= 2
    square = ice(kind, halvings)
    side = len(square)
    ys, xs = _centres(height, pixel), _centres(width, pixel)
    turn, start_y, start_x = (int(draw) for draw in draws)
    spans = []
    for places, start, backwards in ((ys, start_y, turn & 1), (xs, start_x, turn & 2)):
        first, last = _between(places)
        cells = np.arange(first, last) + (start * side >> 16)
        spans.append((-cells if backwards else cells) % side)
        places -= first << POSITION_BITS
    if turn & 4:
        piece = np.ascontiguousarray(square.take(spans[1], axis=0).take(spans[0], axis=1).T)
    else:
        piece = square.take(spans[0], axis=0).take(spans[1], axis=1)

    def rows(top: int, bottom: int) -> Field:
        if pixel == 1:
            return piece[top:bottom].astype(np.int32)
        first, last = _between(ys[top:bottom])
        return interpolated(piece[first:last].astype(np.int32), ys[top:bottom] - (first << POSITION_BITS), xs)

    return rows


def _centres(side: int, cell: float) -> Positions:
    """Where the centres of pixels lie among cells of ``cell`` pixels, in units of 2^-10 cells from the first centre."""
    places: npt.NDArray[np.float64] = np.floor(((np.arange(side) + 0.5) / cell - 0.5) * (1 << POSITION_BITS))
    return places.astype(np.int64)


def _between(places: Positions) -> tuple[int, int]:
    """The first of the cells that rising positions lie between, and the one after the last."""
    return int(places[0]) >> POSITION_BITS, -(-int(places[-1]) >> POSITION_BITS) + 1


def thickness(height: int, width: int, pixel: float, stream: RandomStream) -> tuple[Rows, Rows]:
    """How thick the ice is, and which of two pieces is seen: rows from, rows to -> 0..65536.

    Both are lattices of random numbers, interpolated; the thickness has a finer lattice on top, and rises towards the
    picture's edges where a third lattice says so.
    """
    grain = max(1.0, GRAIN * pixel)  # in pixels
    places = [_centres(math.ceil(side / grain), PATCH * pixel / grain) for side in (height, width)]
    fine = [place * 3 for place in places]

    def lattice(rows: Positions, columns: Positions) -> Field:
        (top, bottom), (left, right) = _between(rows), _between(columns)
        values = stream.uint16((bottom - top) * (right - left)).astype(np.int32).reshape(bottom - top, right - left)
        return interpolated(values, rows - (top << POSITION_BITS), columns - (left << POSITION_BITS))

    coarse, pieces, edges, detail = (lattice(*grid) for grid in (places, places, places, fine))
    inward = [_inward(side, grain, min(height, width)) for side in (height, width)]
    rim = FULL - np.minimum(inward[0][:, None], inward[1])
    icy = (2 * edges - FULL).clip(0, None) * 3 >> 2
    thick = (coarse * 5 + detail * 3 >> 3) + (icy * (rim >> 2) >> 14) - FULL * 3 // 8
    seen = (pieces - FULL // 2) * 4 + FULL // 2
    ys, xs = (_centres(side, grain).clip(0, None) for side in (height, width))
    ys, xs = (place.clip(0, (cells - 1) << POSITION_BITS) for place, cells in zip((ys, xs), thick.shape, strict=True))
    maps = [(field * factor).clip(0, FULL) for field, factor in ((thick, 2), (seen, 1))]
    thick_rows, seen_rows = (lambda top, bottom, field=field: interpolated(field, ys[top:bottom], xs) for field in maps)
    return thick_rows, seen_rows


def _inward(side: int, grain: float, shorter: int) -> Field:
    """How far inward the points lie: 0 at the edges, 65536 from a third of the shorter side on."""
    centres = (np.arange(math.ceil(side / grain)) + 0.5) * grain
    away: npt.NDArray[np.float64] = np.floor(np.minimum(centres, side - centres) * (3 * FULL / shorter))
    return away.clip(0, FULL).astype(np.int32)


def window(height: int, width: int, pixel: float, stream: RandomStream) -> Rows:
    """The brightness of a pane of frost, 0..255: rows from, rows to -> shape (rows, width)."""
    draws = stream.uint16(9)
    one, other, felt = (
        sheet(kind, height, width, pixel, draws[3 * index : 3 * index + 3]) for index, kind in enumerate(GROWN)
    )
    thick, seen = thickness(height, width, pixel, stream)

    def rows(top: int, bottom: int) -> Field:
        thickness, first = thick(top, bottom) >> 8, seen(top, bottom) >> 8
        fern = other(top, bottom)
        fern += (one(top, bottom) - fern) * first >> 8
        fern *= 150 + (thickness * 106 >> 8)
        fern += felt(top, bottom) * (thickness * 200 >> 8)
        fern += thickness * 40
        fern >>= 8
        fern += 16
        return np.minimum(fern, 255, out=fern)

    return rows


@image_noise(
    id=14,
    version=1,
    exactness="exact",
    group="imagenet_c",
    parameters={"keep": (1.0, 0.8, 0.7, 0.65, 0.6), "frost": (0.4, 0.6, 0.7, 0.7, 0.75), "pixel": (1,) * 5},
    spatial=("pixel",),
)
def frost(image: RGB, parameters: Mapping[str, float], stream: RandomStream) -> RGB:
    """Frost on a window in front of the scene: out = min(keep x + frost f, 255), f a picture of ice.

    Parameters: keep and frost, the shares; pixel, the side of the ice's own cells in pixels (spatial).
    Differs from ImageNet-C: f is not a crop of one of five photographs. Ice is grown by the program, in integers: stems
    with branches and twigs that stop where they meet others, in three squares, two of long ferns and one of a felt of
    short needles. For each sample the squares are turned and shifted at random and put together by maps of random
    thickness, thicker towards the edges in places. So f fits pictures of any size and hardly repeats; it is as bright
    as frost looks (about 100 of 255 on average), not fitted to those photographs. The result is rounded, not truncated,
    to 8 bits.
    """
    height, width, _ = image.shape
    levels = np.arange(256)
    pixels = np.rint(levels * (parameters["keep"] * 64)).astype(np.uint16)  # all in 1/64 of a level from here
    tints = [levels * (tint + (1 - tint) * levels / 255) for tint in TINT]
    colours = np.rint(np.stack(tints, axis=-1) * (parameters["frost"] * 64)).astype(np.uint16)
    pane = window(height, width, parameters["pixel"], stream)
    out = np.empty_like(image)
    band = max(1, BAND // width)
    for top in range(0, height, band):
        part = image[top : top + band]
        grey = pane(top, min(top + band, height)).astype(np.uint8)
        mixed = cv2.LUT(cv2.merge([grey] * 3).reshape(part.shape), colours[None])
        mixed += cv2.LUT(part, pixels)
        mixed += np.uint16(32)
        mixed >>= 6
        out[top : top + band] = np.minimum(mixed, 255, out=mixed)
    return out
