"""Everything that decides the result of training a reference checkpoint: the recipe of each architecture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run; stored beside every checkpoint."""

    architecture: str = "idefics3"
    begin_with: str = ""
    """A shipped reference checkpoint whose language model this one begins with (frozen in ``see``); none: fresh."""
    imitate_weight: float = 0.0
    """Weight, in stage ``see``, of the squared distance to that checkpoint's visual tokens."""
    language_rate: float = 1.0
    """Learning rate of the language model, as a share of the tower's."""
    width: int = 96
    depth: int = 4
    vision_width: int = 128
    vision_depth: int = 4
    seed: int = 0
    images: int = 16
    questions: int = 16
    boxes: int = 2
    sciences: int = 2
    box_weight: float = 0.15
    """Weight of a coordinate in the loss (an answer word weighs 1)."""
    see_steps: int = 1200
    see_images: int = 48
    speak_steps: int = 9000
    speak_until: int = 6500
    """Step of ``speak`` at which the next stage takes over; later, look-ups get better than the block world wants."""
    describe_steps: int = 2000
    describe_rate: float = 4e-4
    describe_warmup: int = 100
    describe_questions: int = 8
    """Questions on a picture in this stage, of which ``describe_sciences`` about science."""
    describe_sciences: int = 4
    describe_captions: int = 4
    """Annotators whose captions of a picture are learned, where it has few enough objects."""
    caption_weight: float = 0.5
    """Weight of a caption's word in the loss."""
    rate: float = 8e-4
    floor: float = 0.05
    warmup: int = 300
    weight_decay: float = 0.01
    see_weight: float = 0.3
    focus_from: int = 2500
    """Step from which the three below replace the numbers of their kind: first look-ups, then what rests on them."""
    focus_sciences: int = 4
    focus_box_weight: float = 0.4
    focus_see_weight: float = 1.0
    drill_from: int = 5250
    """Step from which science, learned last, gets more room."""
    drill_sciences: int = 6
    drill_questions: int = 18
    spoiled: float = 0.35
    """Share of the pictures with mild grain and a flatter contrast, so that noise does not break the answers' form."""
    ramp: tuple[int, ...] = (300, 700, 1200, 1800, 2400)
    """Step at which scenes of up to 2, 3, 4, 5, 6 objects begin."""
    hard_from: int = 1500
    """Step at which comparisons begin (look-ups and counts come first)."""
    decay_from: float = 0.5
    """Share of the speak steps after which the learning rate falls (cosine) to ``floor`` times itself."""


RECIPES = {
    "idefics3": Recipe(),
    # Its language model knows the questions already: it learns to read another tower's tokens, and where they are.
    "qwen2-vl": Recipe(
        architecture="qwen2-vl",
        begin_with="bitquake/block-idefics3",
        imitate_weight=1.0,
        language_rate=0.5,
        boxes=4,
        questions=14,
        see_steps=900,
        speak_steps=1000,
        speak_until=1000,
        describe_steps=600,
        describe_rate=6e-4,
        describe_questions=12,
        warmup=100,
        focus_from=0,
        drill_from=0,
        drill_sciences=4,
        drill_questions=16,
        ramp=(0, 0, 0, 0, 0),
        hard_from=0,
    ),
}
"""The recipe of each architecture's shipped checkpoint."""


def recipe_from(changes: list[str], name: str = "idefics3") -> Recipe:
    """An architecture's recipe with ``KEY=NUMBER`` changes. Raises ValueError for unknown keys or other values."""
    if name not in RECIPES:
        raise ValueError(f"--architecture {name}: known are {', '.join(RECIPES)}")
    defaults = asdict(RECIPES[name])
    numeric = {key: value for key, value in defaults.items() if not isinstance(value, (tuple, str))}
    found: dict[str, float] = {}
    for change in changes:
        key, _, text = change.partition("=")
        if key not in numeric:
            raise ValueError(f"--set {change}: unknown key {key!r}; known are {', '.join(numeric)}")
        try:
            found[key] = type(numeric[key])(text)
        except ValueError as error:
            raise ValueError(f"--set {change}: expected a {type(numeric[key]).__name__}, got {text!r}") from error
    return Recipe(**{**defaults, **found})


def rate_at(recipe: Recipe, step: int, stage: str) -> float:
    """Learning rate: linear warm-up, then constant, then a cosine fall in the last part of the stage."""
    total = {"see": recipe.see_steps, "speak": recipe.speak_steps, "describe": recipe.describe_steps}[stage]
    rate, warmup = recipe.rate, recipe.warmup
    if stage == "describe":
        rate, warmup = recipe.describe_rate, recipe.describe_warmup
    if stage == "see":  # never above 1e-3, and twice the rate otherwise
        return min(1e-3, 2 * _fall(recipe, step, total, rate, warmup))
    return _fall(recipe, step, total, rate, warmup)


def _fall(recipe: Recipe, step: int, total: int, rate: float, warmup: int) -> float:
    if step < warmup:
        return rate * (step + 1) / warmup
    begin = recipe.decay_from * total
    if step < begin:
        return rate
    share = min(1.0, (step - begin) / max(1.0, total - begin))
    return rate * (recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * share)))
