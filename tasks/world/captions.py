"""Captions of scenes by simulated annotators, who mention, order and word things differently.

Each sees the scene through ``perceive``, turns first to what is large, and says one sentence in a form of their choice:
``a red circle and a small star``, ``there is a blue square left of a striped cross``, ``two stars with a red circle``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .annotators import perceive
from .questions import CLEAR, SIDES, plural
from .scenes import Block, Scene

N_CAPTIONS = 5
"""Captions of every picture, one by each of the first annotators."""
PROMPT = "describe the picture."
MIN_OBJECTS, MAX_OBJECTS = 2, 4
"""Objects of a picture that is few enough to be described in a sentence."""
COUNTS = {2: "two", 3: "three"}

_FORMS = ((34, "pair"), (30, "place"), (8, "there is"), (8, "picture"), (20, "three"), (14, "group"))
"""(weight, form) of the sentences; a form that does not fit the scene is drawn again."""


def _name(block: Block, rng: random.Random, *, sized: bool = True) -> str:
    """Article, the attributes that the annotator cares to mention, and the shape: ``a large striped red circle``."""
    striking = block.extent <= 10 or block.extent >= 17
    words = [block.size] if rng.random() < (0.35 if striking else 0.1) and sized else []
    if rng.random() < (0.7 if block.texture == "striped" else 0.05):
        words.append(block.texture)
    if rng.random() < 0.97:
        words.append(block.color)
    words.append(block.shape)
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _side(first: Block, second: Block) -> str | None:
    """Where ``first`` lies, seen from ``second``: the clearer of the two axes, or None when neither is clear."""
    side = max(SIDES, key=lambda name: SIDES[name](first, second))
    return side if SIDES[side](first, second) > CLEAR else None


def _group(blocks: Sequence[Block], rng: random.Random) -> str | None:
    """``two stars with a red circle``: objects of one shape or colour counted, and one other named."""
    kinds = [(key, getattr(block, key)) for block in blocks for key in ("shape", "color")]
    counted = sorted({kind for kind in kinds if 1 < kinds.count(kind) < len(blocks)})
    if not counted:
        return None
    key, word = rng.choice(counted)
    many = [block for block in blocks if getattr(block, key) == word]
    same_color = key == "shape" and len({block.color for block in many}) == 1
    named = plural(word) if key == "shape" else f"{word} objects"
    text = f"{COUNTS[len(many)]} {many[0].color + ' ' if same_color else ''}{named}"
    other = next(block for block in blocks if getattr(block, key) != word)
    return f"{text} {rng.choice(('and', 'with'))} {_name(other, rng)}"


def caption(scene: Scene, annotator: int) -> str:
    """What annotator ``annotator`` (0 to 9) says about a scene of two to four objects, in 5 to 14 words.

    Raises ValueError for a scene of another number of objects.
    """
    if not MIN_OBJECTS <= len(scene.blocks) <= MAX_OBJECTS:
        raise ValueError(f"a caption needs {MIN_OBJECTS} to {MAX_OBJECTS} objects, got {len(scene.blocks)}")
    rng = random.Random(scene.seed * 64 + 40 + annotator)
    blocks = sorted(perceive(scene, annotator).blocks, key=lambda block: -(block.extent + rng.uniform(0.0, 5.0)))
    first, second = blocks[:2]
    while True:
        form = rng.choices([form for _, form in _FORMS], [weight for weight, _ in _FORMS])[0]
        side = _side(first, second)
        if form == "group":
            text = _group(blocks, rng)
            if text is not None:
                return text
        elif form == "three":
            if len(blocks) > 2:
                names = [_name(block, rng, sized=False) for block in blocks[:3]]
                return f"{names[0]} with {names[1]} and {names[2]}"
        elif form in ("pair", "picture"):
            start = "a picture of " if form == "picture" else ""
            return f"{start}{_name(first, rng)} and {_name(second, rng)}"
        elif side is not None:
            start = "there is " if form == "there is" else ""
            return f"{start}{_name(first, rng)} {side} {_name(second, rng)}"


def captions(scene: Scene) -> list[str]:
    """The ``N_CAPTIONS`` reference captions of a scene."""
    return [caption(scene, annotator) for annotator in range(N_CAPTIONS)]
