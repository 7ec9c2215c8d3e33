"""Trains a reference checkpoint on the block world's ``train`` split (run ``bitquake train-reference --help``).

Stage ``see``: the visual tokens are supervised directly, against the language model's own tied word embeddings:
colour, shape, size and pattern word of the object whose centre lies in each token's cell (and its box, through
throw-away heads; within the cell, where the tower has no absolute positions).
Stage ``speak``: the language model learns on whole scenes, few objects first. A picture is encoded once; the separate
questions on it share its prefix through a block attention mask, so that none sees another's answer. Targets are one
random annotator's answers, which is what makes the model's confidence mean something.
Stage ``describe``: the same with fewer questions and with captions, which are learned last, at a lower learning rate.

A recipe may begin with the language model of a shipped checkpoint (``begin_with``): it is frozen in stage ``see``,
where the tower also imitates that checkpoint's visual tokens.

Only ``block_vqav2``, ``block_refcocoplus`` and ``block_scienceqa`` questions and captions are trained; ``block_advqa``
and ``block_vizwiz`` stay unseen: they are the shifts.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers import checkpoints
from bitquake.model_wrappers.checkpoints import architecture
from bitquake.model_wrappers.checkpoints.architecture import Architecture
from bitquake.reference_examples import IGNORED, WORD_GROUPS, Batch, Vocabulary, ahead, batches
from bitquake.reference_recipe import Recipe, rate_at
from bitquake.tasks.world import questions, scenes


class Trainee(nn.Module):
    """The reference model with the throw-away box heads of stage ``see``."""

    def __init__(self, model: Any, vocabulary: Vocabulary, kind: Architecture) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        width = model.config.text_config.hidden_size
        self.box_heads = nn.Linear(width, 4 * (scenes.SIDE + 1))
        groups = [[vocabulary.ids(word)[0] for word in group] for group in WORD_GROUPS]
        self.group_ids = [torch.tensor(group) for group in groups]
        self.image_token = model.config.image_token_id

    def encode(self, pixels: Tensor) -> Tensor:
        """``(B, 3, 64, 64)`` to visual tokens ``(B, 16, width)``."""
        return self.kind.encode(self.model, pixels)

    def language_parameters(self) -> list[nn.Parameter]:
        """Those of the language model; its head is its embedding."""
        return list(architecture.language_model(self.model).parameters())

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
        places = cells[full][:, 4:]
        if not self.kind.tower_knows_places:
            places = places - _corners()[full.nonzero()[:, 1]] + scenes.SIDE // 2
        loss = loss + 0.5 * _coordinate_loss(sides.flatten(0, 1), places.flatten(), 1.0).mean()
        return loss, accuracies

    def speak_loss(self, features: Tensor, batch: Batch, number_ids: Tensor, blur: float) -> tuple[Tensor, float]:
        """Weighted cross-entropy of the answers; returns it and the share of one-token answers that are right."""
        embeddings = self.model.get_input_embeddings()(batch.ids)
        is_image = batch.ids == self.image_token
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        length = batch.ids.shape[1]
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        allowed = (same | (batch.segments[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        hidden = architecture.language_model(self.model)(
            inputs_embeds=embeddings,
            attention_mask=allowed[:, None],
            position_ids=self.kind.positions(batch.positions),
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


def _corners() -> Tensor:
    """``(16, 4)``: x and y, twice, of each cell's upper left corner in pixels."""
    cell = torch.arange(scenes.GRID**2)
    corner = torch.stack([cell % scenes.GRID, cell // scenes.GRID], dim=1) * scenes.CELL
    return corner.repeat(1, 2)


def imitation_loss(features: Tensor, wanted: Tensor, cells: Tensor) -> Tensor:
    """Squared distance to another model's visual tokens, as a share of their variance; empty cells count half."""
    full = cells[:, :, 4] >= 0
    each = (features - wanted).square().mean(-1)
    return each[full].mean() / wanted[full].var() + 0.5 * each[~full].mean() / wanted[~full].var()


def begin_language(model: Any, kind: Architecture, source: Any, source_kind: Architecture, words: list[str]) -> None:
    """Copy the language model of another architecture's reference model; rows of special tokens by their use.

    Norms, projections and words match one to one. Biases that the source has not become 0; tokens around a picture
    begin with the source's, wherever both have some; others with its unknown token's.
    """
    theirs = architecture.language_model(source).state_dict()
    ours = architecture.language_model(model).state_dict()
    rows = {token: i for i, token in enumerate([*source_kind.specials, *words])}
    around = [
        t for t in source_kind.specials if t in source_kind.prefix and t not in (source_kind.image, architecture.USER)
    ]
    for token in kind.specials:
        if token == kind.image:
            rows[token] = rows[source_kind.image]
        elif token not in rows:
            rows[token] = rows[around[0] if token in kind.prefix else architecture.UNK]
    order = torch.tensor([rows[token] for token in [*kind.specials, *words]])
    for name, value in ours.items():
        if name == "embed_tokens.weight":
            ours[name] = theirs[name][order]
        elif name in theirs:
            ours[name] = theirs[name]
        elif name.endswith(".bias"):
            ours[name] = torch.zeros_like(value)
        else:
            raise ValueError(f"{source_kind.name} has no {name} for {kind.name} to begin with")
    architecture.language_model(model).load_state_dict(ours)


def load_first(name: str) -> tuple[Any, Architecture]:
    """A shipped checkpoint in float32, its channels made even again, and its architecture.

    Raises:
        ValueError: no such checkpoint, or it cannot be a beginning.
    """
    from transformers import AutoModelForImageTextToText

    folder = checkpoints.resolve(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    history = json.loads((folder / "training.json").read_text())
    architecture.spread_channels(model, -float(history["spread"]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, checkpoints.architecture_named(history["recipe"].get("architecture", "idefics3"))


def _coordinate_loss(logits: Tensor, places: Tensor, blur: float, *, offset: int = 0) -> Tensor:
    """Cross-entropy against a Gaussian of ``blur`` pixels around the true coordinate, over the whole vocabulary."""
    grid = torch.arange(scenes.SIDE + 1)
    target = torch.softmax(-((grid[None] - places[:, None]).float() ** 2) / (2 * blur * blur), dim=-1)
    logs = torch.log_softmax(logits.float(), dim=-1)[:, offset : offset + scenes.SIDE + 1]
    return -(target * logs).sum(-1)


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
    kind = checkpoints.architecture_named(recipe.architecture)
    processor = kind.build_processor(questions.words())
    vocabulary = Vocabulary(processor, kind)
    model = kind.build_model(
        len(questions.words()),
        width=recipe.width,
        depth=recipe.depth,
        vision_width=recipe.vision_width,
        vision_depth=recipe.vision_depth,
        seed=recipe.seed,
    )
    trainee = Trainee(model, vocabulary, kind)
    first = load_first(recipe.begin_with) if recipe.begin_with else None
    if first:
        begin_language(model, kind, *first, questions.words())
    optimiser = torch.optim.AdamW(_groups(trainee, recipe), lr=recipe.rate, betas=(0.9, 0.98))
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
        for parameter in trainee.language_parameters():
            parameter.requires_grad_(not (first and stage == "see"))
        window: list[tuple[float, ...]] = []
        source = ahead(batches(recipe, vocabulary, stage=stage, start=progress["step"]))
        while progress["step"] < goal:
            step = progress["step"]
            for group in optimiser.param_groups:
                group["lr"] = rate_at(recipe, step, stage) * group["share"]
            batch = next(source)
            features = trainee.encode(batch.pixels)
            loss, seen = trainee.see_loss(features, batch.cells)
            right = math.nan
            if stage == "see" and first and recipe.imitate_weight:
                with torch.no_grad():
                    wanted = first[1].encode(first[0], batch.pixels)
                loss = loss + recipe.imitate_weight * imitation_loss(features, wanted, batch.cells)
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


def _groups(trainee: Trainee, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not; the language model has its share of the learning rate."""
    language = {id(parameter) for parameter in trainee.language_parameters()}
    groups = []
    for decayed in (True, False):
        for share, inside in ((1.0, False), (recipe.language_rate, True)):
            chosen = [p for p in trainee.parameters() if (p.ndim > 1) == decayed and (id(p) in language) == inside]
            groups.append({"params": chosen, "weight_decay": recipe.weight_decay if decayed else 0.0, "share": share})
    return groups


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
    stride = max(1, len(kept["curve"]) // 40)
    # One line for each entry of the curve keeps the file readable.
    text = json.dumps({**kept, "spread": spread, "curve": []}, indent=1).replace(
        '"curve": []',
        '"curve": [\n  ' + ",\n  ".join(json.dumps(entry) for entry in kept["curve"][stride - 1 :: stride]) + "\n ]",
    )
    (target / "training.json").write_text(text.replace("NaN", "null") + "\n")
    return target
