"""Prompts for pictures that come without one: those that the captioning and question families give each model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bitquake.tasks.families import Family

QUESTIONS = (
    "What is in the picture?",
    "What color is the largest object?",
    "How many objects are there?",
    "Is there a person in the picture?",
    "What is in the background?",
    "Where could this be?",
    "What is on the left side?",
)
BLOCK_QUESTIONS = (
    "what color is this?",
    "how many objects are there?",
    "what shape is this?",
    "is there a red circle?",
    "what size is the square?",
    "is there a striped object?",
    "are there any stars?",
)
BLOCK_PREFIX = "bitquake/block-"
"""``pretrained`` names of reference models that only know the block world."""


class Describe(NamedTuple):
    """How a model is asked for a caption, and how many tokens one may have."""

    prompt: str
    max_new_tokens: int


def describe(model_type: str, *, block: bool) -> Describe:
    """As the captioning family asks this kind of model; ``block``: that of the block world."""
    family = _family("block_coco_caption" if block else "coco_caption")
    around = family.prompts.get(model_type, family.prompts["default"])
    question = _block_prompt() if block else ""
    return Describe(f"{around.pre_prompt}{question}{around.post_prompt}", family.max_new_tokens)


def generic(model_type: str, index: int, *, block: bool) -> str:
    """A prompt that fits any picture: every other one asks for a caption, the others something about it."""
    if index % 2 == 0:
        return describe(model_type, block=block).prompt
    questions = BLOCK_QUESTIONS if block else QUESTIONS
    family = _family("block_vqav2" if block else "vqav2")
    around = family.prompts.get(model_type, family.prompts["default"])
    return f"{around.pre_prompt}{questions[index // 2 % len(questions)]}{around.post_prompt}"


def _block_prompt() -> str:
    from bitquake.tasks.world.captions import PROMPT

    return PROMPT


def _family(name: str) -> Family:
    from bitquake.tasks.families import BUILT_IN, FAMILY_FILE, load_family

    return load_family(BUILT_IN / name / FAMILY_FILE).family
