"""What a reference checkpoint is trained on: questions and captions about scenes of the block world."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitquake.model_wrappers.checkpoints import architecture
from bitquake.model_wrappers.checkpoints.architecture import Architecture
from bitquake.reference_recipe import Recipe
from bitquake.tasks.world import captions, questions, scenes, splits
from bitquake.tasks.world.annotators import N_ANNOTATORS, perceive

IGNORED = -100


class Example(NamedTuple):
    """Prompt token ids (without the picture's prefix) and answer token ids; ``weights`` per answer token."""

    prompt: list[int]
    answer: list[int]
    weights: list[float]


class Batch(NamedTuple):
    """``pixels`` (B, 3, 64, 64) float; packed ``ids``, ``positions``, ``segments``, ``labels``, ``weights`` (B, T);
    ``cells`` (B, 16, 8) int: colour, shape, size, pattern index and x1, y1, x2, y2, or -1 in empty cells."""

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor
    weights: Tensor
    cells: Tensor


WORD_GROUPS: tuple[tuple[str, ...], ...] = (
    (*scenes.COLORS, "no"),
    (*scenes.SHAPES, "no"),
    (*scenes.SIZES, "no"),
    (*scenes.TEXTURES, "no"),
)


class Vocabulary:
    """Word ids of a reference tokenizer, without its overhead."""

    def __init__(self, processor: Any, kind: Architecture) -> None:
        self.tokenizer = processor.tokenizer
        self.prefix = self.tokenizer(kind.prefix, add_special_tokens=False)["input_ids"]
        """The tokens that stand before a question, as the chat template and the processor make them."""
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        found = self._cache.get(text)
        if found is None:
            found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self.tokenizer.unk_token_id in found:
                raise ValueError(f"the reference tokenizer lacks a word of {text!r}; add it to questions.words()")
            if len(self._cache) < 200_000:
                self._cache[text] = found
        return found


def _example(vocabulary: Vocabulary, prompt: str, answer: str, *, box_weight: float | None = None) -> Example:
    answer_ids = vocabulary.ids(answer)
    # Of a box's nine tokens only the four numbers carry news.
    weights = [box_weight if i % 2 else 0.02 for i in range(len(answer_ids))] if box_weight else [1.0] * len(answer_ids)
    end = vocabulary.tokenizer.eos_token_id
    return Example(vocabulary.ids(prompt + architecture.ASSISTANT), [*answer_ids, end], [*weights, 0.05])


def caption_examples(scene: scenes.Scene, rng: random.Random, vocabulary: Vocabulary, recipe: Recipe) -> list[Example]:
    """Captions of a scene by some of its annotators; none where it has too many objects, or one only."""
    if not captions.MIN_OBJECTS <= len(scene.blocks) <= captions.MAX_OBJECTS:
        return []
    found = []
    prompt = vocabulary.ids(captions.PROMPT + architecture.ASSISTANT)
    for annotator in rng.sample(range(N_ANNOTATORS), recipe.describe_captions):
        said = [*vocabulary.ids(captions.caption(scene, annotator)), vocabulary.tokenizer.eos_token_id]
        found.append(Example(prompt, said, [recipe.caption_weight] * len(said)))
    return found


def box_text(block: scenes.Block) -> str:
    """A box as the reference model writes it: x1, y1, x2, y2 in pixels of the 64-pixel picture."""
    return "[{}, {}, {}, {}]".format(*block.box)


def _science_step(science: questions.ScienceQuestion, step: int, rng: random.Random) -> tuple[str, str]:
    """Every other science example is whole; the others teach its two halves: apply the rule, find the letter."""
    if step % 4 == 1:
        return f"{science.hint} {science.text}", science.choices[science.answer].split()[-1]
    if step % 4 == 3:
        wanted = rng.randrange(len(science.choices))
        options = questions.lettered(science.choices)
        return f"which is {science.choices[wanted]}? {options}", questions.LETTERS[wanted]
    return questions.science_prompt(science), questions.LETTERS[science.answer]


def examples(
    scene: scenes.Scene,
    rng: random.Random,
    vocabulary: Vocabulary,
    recipe: Recipe,
    step: int,
    *,
    describe: bool = False,
) -> list[Example]:
    """Training examples about one scene: the recipe's number of referring and science ones, the rest VQA.

    ``describe`` adds captions; ``step`` is then one of stage ``describe``, else one of ``speak``.
    """
    if describe:
        step += recipe.speak_until
    hard, focused = step >= recipe.hard_from, step >= recipe.focus_from
    box_weight = recipe.focus_box_weight if focused else recipe.box_weight
    makers = questions.VQA if hard else questions.VQA[:-4]
    found = []
    drilled = step >= recipe.drill_from
    sciences = recipe.drill_sciences if drilled else recipe.focus_sciences if focused else recipe.sciences
    sciences = recipe.describe_sciences if describe else sciences
    for k in range(sciences):
        science = questions.science(scene, rng)
        if science is not None:
            half = 0 if drilled and k % 4 == 1 and not questions.is_clear(science, scene) else k
            found.append(_example(vocabulary, *_science_step(science, half if focused else 0, rng)))
    for referral in questions.refer(scene, rng, recipe.boxes):
        answer = box_text(scene.blocks[referral.target])
        found.append(_example(vocabulary, f"find : {referral.expression}", answer, box_weight=box_weight))
    seen = perceive(scene, rng.randrange(N_ANNOTATORS))
    total = recipe.describe_questions if describe else recipe.drill_questions if drilled else recipe.questions
    for question in questions.ask(makers, scene, rng, total - len(found)):
        found.append(_example(vocabulary, question.text, question.program(seen)))
    return found + caption_examples(scene, rng, vocabulary, recipe) if describe else found


def cell_targets(scene: scenes.Scene) -> NDArray[np.int64]:
    """``(16, 8)`` int64: word indices in ``WORD_GROUPS`` and the box of each cell's object; empty cells say 'no'."""
    cells = np.full((scenes.GRID**2, 8), -1, dtype=np.int64)
    cells[:, :4] = [len(group) - 1 for group in WORD_GROUPS]
    for block in scene.blocks:
        words = (block.color, block.shape, block.size, block.texture)
        cells[block.cell] = [*(g.index(w) for g, w in zip(WORD_GROUPS, words, strict=True)), *block.box]
    return cells


def pack(prefix: list[int], groups: list[list[Example]]) -> dict[str, Tensor]:
    """Lay the questions on one picture side by side behind its prefix; segments keep them apart."""
    rows = []
    for group in groups:
        ids, positions, segments = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        labels, weights = [IGNORED] * len(prefix), [0.0] * len(prefix)
        for k, example in enumerate(group, start=1):
            tokens = example.prompt + example.answer[:-1]
            ids += tokens
            positions += range(len(prefix), len(prefix) + len(tokens))
            segments += [k] * len(tokens)
            silent = len(example.prompt) - 1
            labels += [IGNORED] * silent + example.answer
            weights += [0.0] * silent + example.weights
        rows.append((ids, positions, segments, labels, weights))
    length = max(len(row[0]) for row in rows)
    fill = (0, 0, -1, IGNORED, 0.0)
    columns = [torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows]) for i in range(5)]
    return dict(zip(("ids", "positions", "segments", "labels", "weights"), columns, strict=True))


def normalise(pictures: NDArray[np.uint8]) -> Tensor:
    """``(B, 64, 64, 3)`` uint8 to the processor's ``(B, 3, 64, 64)`` float32: (x / 255 - 0.5) / 0.25."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0 - 0.5) / 0.25


def spoil(picture: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    """Mild grain (sigma up to 0.15 of the range) and contrast (down to 0.4) on a ``(64, 64, 3)`` uint8 picture."""
    normal = np.random.Generator(np.random.PCG64(rng.getrandbits(64))).standard_normal(picture.shape, dtype=np.float32)
    mean = picture.mean()
    flat = (picture - mean) * rng.uniform(0.4, 1.0) + mean
    spoiled: NDArray[np.uint8] = np.clip(flat + normal * (255 * rng.uniform(0.0, 0.15)), 0, 255).astype(np.uint8)
    return spoiled


def batches(recipe: Recipe, vocabulary: Vocabulary, *, stage: str, start: int) -> Iterator[Batch]:
    """Training batches from step ``start`` on; step and seed alone decide a batch, so a resumed run sees the same."""
    prefix = vocabulary.prefix
    step = start
    while True:
        offset = {"see": 1, "speak": 0, "describe": 500_000}[stage]
        rng = random.Random(recipe.seed * 1_000_003 + step * 2 + offset)
        n_max = 1 + sum(step >= at for at in recipe.ramp) if stage == "speak" else 6
        count = recipe.see_images if stage == "see" else recipe.images
        pictures, cells = [], []
        groups: list[list[Example]] = []
        for _ in range(count):
            scene = scenes.sample_scene(splits.train_seed(rng), 1, n_max)
            picture = scenes.render(scene)
            pictures.append(spoil(picture, rng) if rng.random() < recipe.spoiled else picture)
            cells.append(cell_targets(scene))
            if stage == "see":
                groups.append([])
            else:
                groups.append(examples(scene, rng, vocabulary, recipe, step, describe=stage == "describe"))
        packed = pack(prefix, groups)
        yield Batch(normalise(np.stack(pictures)), cells=torch.from_numpy(np.stack(cells)), **packed)
        step += 1


def ahead(source: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """Make batches in a thread while the model computes."""
    ready: queue.Queue[Batch] = queue.Queue(maxsize=depth)

    def work() -> None:
        for batch in source:
            ready.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()
