"""Trains the reference checkpoint on the block world's ``train`` split (run ``bitquake train-reference --help``).

Stage ``see``: the visual tokens are supervised directly, against the language model's own tied word embeddings:
colour, shape, size and pattern word of the object whose centre lies in each token's cell (and its box, through
throw-away heads).
Stage ``speak``: the language model learns on whole scenes, few objects first. A picture is encoded once; the separate
questions on it share its prefix through a block attention mask, so that none sees another's answer. Targets are one
random annotator's answers, which is what makes the model's confidence mean something.
Stage ``describe``: the same with fewer questions and with captions, which are learned last, at a lower learning rate.

Only ``block_vqav2``, ``block_refcocoplus`` and ``block_scienceqa`` questions and captions are trained; ``block_advqa``
and ``block_vizwiz`` stay unseen: they are the shifts.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.checkpoints import architecture
from bitquake.tasks.world import captions, questions, scenes, splits
from bitquake.tasks.world.annotators import N_ANNOTATORS, perceive

IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a training run; stored beside every checkpoint."""

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
    """Word ids of the reference tokenizer, without its overhead."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
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


def prefix_ids(vocabulary: Vocabulary) -> list[int]:
    """The tokens that stand before a question, as the chat template and the processor make them."""
    image = architecture.FAKE + architecture.GLOBAL + architecture.IMAGE * architecture.N_VISUAL + architecture.FAKE
    return vocabulary.ids(architecture.USER + image)


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
    prefix = prefix_ids(vocabulary)
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


class Trainee(nn.Module):
    """The reference model with the throw-away box heads of stage ``see``."""

    def __init__(self, model: Any, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        self.box_heads = nn.Linear(width, 4 * (scenes.SIDE + 1))
        groups = [[vocabulary.ids(word)[0] for word in group] for group in WORD_GROUPS]
        self.group_ids = [torch.tensor(group) for group in groups]
        self.image_token = model.config.image_token_id

    def encode(self, pixels: Tensor) -> Tensor:
        """``(B, 3, 64, 64)`` to visual tokens ``(B, 16, width)``."""
        inner = self.model.model
        mask = torch.ones(
            pixels.shape[0], scenes.SIDE // architecture.PATCH, scenes.SIDE // architecture.PATCH, dtype=torch.bool
        )
        hidden = inner.vision_model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
        features: Tensor = inner.connector(hidden)
        return features

    def see_loss(self, features: Tensor, cells: Tensor) -> tuple[Tensor, list[float]]:
        """Cross-entropy of each attribute word among its group, and of the box sides, over cells."""
        embedding = self.model.get_input_embeddings().weight
        loss, accuracies = features.new_zeros(()), []
        full = cells[:, :, 4] >= 0
        for i, ids in enumerate(self.group_ids):
            logits = features @ embedding[ids].T
            # Empty cells outnumber the others; give both halves the same weight.
            each = functional.cross_entropy(logits.transpose(1, 2), cells[:, :, i], reduction="none")
            loss = loss + each[full].mean() + 0.5 * each[~full].mean()
            accuracies.append((logits.argmax(-1) == cells[:, :, i])[full].float().mean().item())
        sides = self.box_heads(features[full]).view(-1, 4, scenes.SIDE + 1)
        loss = loss + 0.5 * _coordinate_loss(sides.flatten(0, 1), cells[full][:, 4:].flatten(), 1.0).mean()
        return loss, accuracies

    def speak_loss(self, features: Tensor, batch: Batch, number_ids: Tensor, blur: float) -> tuple[Tensor, float]:
        """Weighted cross-entropy of the answers; returns it and the share of one-token answers that are right."""
        embeddings = self.model.get_input_embeddings()(batch.ids)
        is_image = batch.ids == self.image_token
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        length = batch.ids.shape[1]
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        allowed = (same | (batch.segments[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        hidden = self.model.model.text_model(
            inputs_embeds=embeddings,
            attention_mask=allowed[:, None],
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        spoken = batch.labels != IGNORED
        labels, weights = batch.labels[spoken], batch.weights[spoken]
        logits = self.model.lm_head(hidden[spoken]).float()
        each = functional.cross_entropy(logits, labels, reduction="none")
        number = (labels >= number_ids[0]) & (labels <= number_ids[-1])
        coordinate = number & (weights > 0.1) & (weights < 1.0)
        if blur > 0 and coordinate.any():
            first = int(number_ids[0])
            each = each.clone()
            each[coordinate] = _coordinate_loss(logits[coordinate], labels[coordinate] - first, blur, offset=first)
        loss = (each * weights).sum() / weights.sum()
        single = weights == 1.0
        right = (logits[single].argmax(-1) == labels[single]).float().mean().item() if single.any() else math.nan
        return loss, right


def _coordinate_loss(logits: Tensor, places: Tensor, blur: float, *, offset: int = 0) -> Tensor:
    """Cross-entropy against a Gaussian of ``blur`` pixels around the true coordinate, over the whole vocabulary."""
    grid = torch.arange(scenes.SIDE + 1)
    target = torch.softmax(-((grid[None] - places[:, None]).float() ** 2) / (2 * blur * blur), dim=-1)
    logs = torch.log_softmax(logits.float(), dim=-1)[:, offset : offset + scenes.SIDE + 1]
    return -(target * logs).sum(-1)


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


def _save(folder: Path, trainee: Trainee, optimiser: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write a resumable state: weights and optimiser moments as safetensors, progress as JSON; the JSON goes last."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{progress['stage']}-{progress['step']}"
    tensors = {f"weight.{k}": v.contiguous().clone() for k, v in trainee.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    save_file(tensors, str(folder / f"{name}.tmp"))
    os.replace(folder / f"{name}.tmp", folder / f"{name}.safetensors")
    temporary = folder / "progress.tmp"
    temporary.write_text(json.dumps({**progress, "state": f"{name}.safetensors"}, indent=1))
    os.replace(temporary, folder / "progress.json")
    for old in folder.glob("step-*.safetensors"):
        if old.name != f"{name}.safetensors":
            old.unlink()


def _load(folder: Path, recipe: Recipe, trainee: Trainee, optimiser: torch.optim.Optimizer) -> dict[str, Any] | None:
    path = folder / "progress.json"
    if not path.exists():
        return None
    progress: dict[str, Any] = json.loads(path.read_text())
    if progress["recipe"] != json.loads(json.dumps(asdict(recipe))):
        raise ValueError(f"{path} was begun with another recipe; give an empty folder, or --set that recipe again")
    tensors = load_file(str(folder / progress["state"]))
    trainee.load_state_dict({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, field = key.split(".", 2)
            state.setdefault(int(index), {})[field] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return progress


def train(
    folder: Path,
    recipe: Recipe,
    *,
    minutes: float | None = None,
    stop: int | None = None,
    save_every: int = 250,
) -> Path:
    """Train, or go on where ``folder`` stopped; writes the checkpoint to ``folder/model`` at every save.

    Stops after ``minutes``, at step ``stop`` of the last stage, or when the recipe's steps are done; resumable.
    Raises ValueError when ``folder`` was begun with another recipe.
    """
    processor = architecture.build_processor(questions.words())
    vocabulary = Vocabulary(processor)
    model = architecture.build_model(
        len(questions.words()),
        width=recipe.width,
        depth=recipe.depth,
        vision_width=recipe.vision_width,
        vision_depth=recipe.vision_depth,
        seed=recipe.seed,
    )
    trainee = Trainee(model, vocabulary)
    decayed = [p for p in trainee.parameters() if p.ndim > 1]
    plain = [p for p in trainee.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    number_ids = torch.tensor([vocabulary.ids(str(n))[0] for n in range(scenes.SIDE + 1)])
    if (number_ids.diff() != 1).any():
        raise ValueError("the tokenizer's numbers 0..64 must be consecutive")
    progress: dict[str, Any] = {"recipe": asdict(recipe), "stage": "see", "step": 0, "seconds": 0.0, "curve": []}
    progress = _load(folder, recipe, trainee, optimiser) or progress
    began, before = time.monotonic(), float(progress["seconds"])
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters,",
        f"from {progress['stage']} step {progress['step']}",
        flush=True,
    )

    goals = {
        "see": recipe.see_steps,
        "speak": min(recipe.speak_steps, recipe.speak_until),
        "describe": recipe.describe_steps if stop is None else min(recipe.describe_steps, stop),
    }
    for stage in list(goals)[list(goals).index(progress["stage"]) :]:
        goal = goals[stage]
        if progress["stage"] != stage:
            progress |= {"stage": stage, "step": 0}
        window: list[tuple[float, ...]] = []
        source = ahead(batches(recipe, vocabulary, stage=stage, start=progress["step"]))
        while progress["step"] < goal:
            step = progress["step"]
            for group in optimiser.param_groups:
                group["lr"] = rate_at(recipe, step, stage)
            batch = next(source)
            features = trainee.encode(batch.pixels)
            loss, seen = trainee.see_loss(features, batch.cells)
            right = math.nan
            if stage != "see":
                blur = 1.0 if stage == "speak" and step < 0.6 * recipe.speak_steps else 0.5
                spoken, right = trainee.speak_loss(features, batch, number_ids, blur)
                focused = stage == "describe" or step >= recipe.focus_from
                loss = (recipe.focus_see_weight if focused else recipe.see_weight) * loss + spoken
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimiser.step()
            window.append((loss.item(), right, *seen))
            progress["step"] = step + 1
            if (step + 1) % 50 == 0:
                mean = [round(float(v), 4) for v in np.nanmean(np.array(window), axis=0)]
                progress["seconds"] = before + time.monotonic() - began
                progress["curve"].append([stage, step + 1, round(progress["seconds"], 1), *mean])
                print(*progress["curve"][-1], flush=True)
                window = []
            finished = (step + 1) == goal
            late = minutes is not None and time.monotonic() - began > 60 * minutes
            if (step + 1) % save_every == 0 or finished or late:
                progress["seconds"] = before + time.monotonic() - began
                _save(folder, trainee, optimiser, progress)
                architecture.save(model, processor, folder / "model")
                if late and not finished:
                    return folder / "model"
    return folder / "model"


def export(folder: Path, target: Path, *, spread: float = 0.0) -> Path:
    """Write a training folder's checkpoint as it ships: BF16 safetensors, processor files, recipe and curve.

    ``spread`` is the sigma of ``architecture.spread_channels``. Raises ValueError when ``folder`` holds no checkpoint.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not (folder / "model" / "config.json").is_file():
        raise ValueError(f"{folder}: no checkpoint to export yet; train first")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    architecture.spread_channels(model, spread)
    architecture.save(model.to(torch.bfloat16), AutoProcessor.from_pretrained(folder / "model"), target)
    progress = json.loads((folder / "progress.json").read_text())
    kept = {key: progress[key] for key in ("recipe", "stage", "step", "seconds", "curve")}
    # One line for each entry of the curve keeps the file readable.
    text = json.dumps({**kept, "spread": spread, "curve": []}, indent=1).replace(
        '"curve": []', '"curve": [\n  ' + ",\n  ".join(json.dumps(entry) for entry in kept["curve"][3::4]) + "\n ]"
    )
    (target / "training.json").write_text(text.replace("NaN", "null") + "\n")
    return target


def recipe_from(changes: list[str]) -> Recipe:
    """The default recipe with ``KEY=NUMBER`` changes. Raises ValueError for unknown keys or other values."""
    defaults = asdict(Recipe())
    numeric = {key: value for key, value in defaults.items() if not isinstance(value, tuple)}
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
