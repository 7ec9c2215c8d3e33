"""Pictures that no benchmark holds: Gaussian noise, scenes of the block world, and shapes on a gradient."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitquake.noise import SampleKey, apply, pixel_hash

from .overlap import PIXELS
from .prompts import describe, generic
from .sample import CalibrationSample

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

SIDE = 448
"""Pixels, for a model whose config names no picture size."""
NOISE_SEVERITY = 4
"""Of gaussian_noise on middle grey: a standard deviation of 0.26 of the range, so that few values are cut off."""
_SCENE_BASE = 1 << 45
"""Above every scene seed of ``bitquake.tasks.world.splits``, ``train`` included."""
_VERSION = 1


class NoisePictures:
    """Gaussian noise with generic prompts, and no answers."""

    title = "Gaussian noise"

    def __init__(self, n: int, seed: int, *, side: int, model_type: str, block: bool) -> None:
        self._n, self._seed, self._side, self._model_type, self._block = n, seed, side, model_type, block

    @property
    def identity(self) -> Mapping[str, Any]:
        prompts = [generic(self._model_type, i, block=self._block) for i in range(len(self))]
        return {"noise": _VERSION, "side": self._side, "prompts": prompts}

    def __len__(self) -> int:
        return self._n

    def sample(self, index: int) -> CalibrationSample:
        grey = np.full((self._side, self._side, 3), 128, dtype=np.uint8)
        key = SampleKey("bitquake calibration", "noise", str(index))
        pixels = apply(grey, "gaussian_noise", severity=NOISE_SEVERITY, key=key, seed=self._seed)
        return synthetic_sample(pixels, generic(self._model_type, index, block=self._block))


class SyntheticPictures:
    """Drawn pictures to be captioned by the model itself: block-world scenes, or shapes on a gradient."""

    def __init__(self, n: int, seed: int, *, side: int, model_type: str, block: bool) -> None:
        self._n, self._seed, self._side, self._block = n, seed, side, block
        self._prompt = describe(model_type, block=block).prompt
        self.title = "block-world scenes" if block else "synthetic pictures"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"synthetic": _VERSION, "block": self._block, "side": self._side, "prompt": self._prompt}

    def __len__(self) -> int:
        return self._n

    def sample(self, index: int) -> CalibrationSample:
        draw = block_scene if self._block else shapes
        return synthetic_sample(draw(self._seed, index, self._side), self._prompt)


def synthetic_sample(pixels: Pixels, prompt: str) -> CalibrationSample:
    """A sample of one drawn picture, without an answer."""
    return CalibrationSample((_image(pixels),), prompt, None, (PIXELS + pixel_hash(pixels),))


def block_scene(seed: int, index: int, side: int) -> Pixels:
    """A block-world scene of none of its splits; its side is always the world's own 64 pixels."""
    from bitquake.tasks.world import captions, scenes

    scene_seed = _SCENE_BASE + (seed << 32) + index
    return scenes.render(scenes.sample_scene(scene_seed, captions.MIN_OBJECTS, captions.MAX_OBJECTS))


def shapes(seed: int, index: int, side: int) -> Pixels:
    """Three to eight coloured, plain or patterned shapes on a gradient, shape (side, side, 3), uint8.

    Random numbers come from ``random.Random`` and pixels from integer arithmetic: the same bytes on any machine.
    """
    rng = random.Random(f"bitquake synthetic {seed} {index}")
    y, x = np.mgrid[:side, :side].astype(np.int64)
    first, second = _colour(rng), _colour(rng)
    across, down = rng.randint(-4, 4), rng.randint(1, 4)
    ramp = across * x + down * y
    ramp = (ramp - ramp.min()) * 256 // max(1, int(np.ptp(ramp)))
    canvas = first + (second - first) * ramp[:, :, None] // 256
    for _ in range(rng.randint(3, 8)):
        width, height = rng.randint(side // 12, side // 3), rng.randint(side // 12, side // 3)
        dx, dy = x - rng.randrange(side), y - rng.randrange(side)
        kind = rng.choice(("ellipse", "box", "triangle", "ring"))
        oval = dx * dx * height * height + dy * dy * width * width
        full = width * width * height * height
        if kind == "ellipse":
            inside = oval <= full
        elif kind == "ring":
            inside = (oval <= full) & (4 * oval >= full)
        elif kind == "box":
            inside = (abs(dx) <= width) & (abs(dy) <= height)
        else:
            inside = (abs(dy) <= height) & (2 * height * abs(dx) <= width * (dy + height))
        pitch = max(2, side // rng.randint(16, 48))
        pattern = rng.choice(("plain", "plain", "stripes", "checks"))
        if pattern == "stripes":
            inside &= (dx + rng.randint(0, 2) * dy) // pitch % 2 == 0
        elif pattern == "checks":
            inside &= (dx // pitch + dy // pitch) % 2 == 0
        canvas[inside] = _colour(rng)
    pixels: Pixels = canvas.astype(np.uint8)
    return pixels


def _colour(rng: random.Random) -> NDArray[np.int64]:
    return np.array([rng.randrange(256) for _ in range(3)], dtype=np.int64)


def _image(pixels: Pixels) -> Image:
    from PIL import Image

    return Image.fromarray(pixels)
