"""Ten simulated people look at a scene: near colours and borderline sizes are seen differently by different people."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from .scenes import NEAR_COLOR, SIZE_BOUNDARY, Scene

N_ANNOTATORS = 10


def perceive(scene: Scene, annotator: int) -> Scene:
    """The scene as one of the annotators sees it: same objects and places, some colour and size words changed.

    An object whose drawn colour lies a share ``blend`` of the way to the near colour is called by the near colour with
    probability ``logistic(14 (blend - 0.5))``; one of ``extent`` pixels is called large with probability
    ``logistic(3 (extent - boundary - 0.5))``.
    """
    rng = random.Random(scene.seed * 64 + 17 + annotator)
    blocks = []
    for block in scene.blocks:
        color, size = block.color, block.size
        if rng.random() < _logistic(14.0 * (block.blend - 0.5)):
            color = NEAR_COLOR[color]
        size = "large" if rng.random() < _logistic(3.0 * (block.extent - SIZE_BOUNDARY - 0.5)) else "small"
        blocks.append(replace(block, color=color, size=size))
    return Scene(scene.seed, tuple(blocks))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
