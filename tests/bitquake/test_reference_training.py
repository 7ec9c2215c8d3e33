"""The training script: what it feeds the models, that questions are kept apart, and that a stop changes nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitquake import reference_examples, reference_recipe, reference_training
from bitquake.model_wrappers.checkpoints import ARCHITECTURES, architecture, architecture_named, qwen2_vl
from bitquake.model_wrappers.checkpoints.architecture import Architecture
from bitquake.reference_examples import Batch, Example, Vocabulary
from bitquake.reference_recipe import RECIPES, Recipe
from bitquake.tasks.world import captions, questions, scenes
from bitquake.tasks.world.annotators import N_ANNOTATORS

TINY: dict[str, Any] = {
    "width": 32, "depth": 1, "vision_width": 32, "vision_depth": 1, "images": 2, "questions": 4, "see_images": 2,
    "see_steps": 4, "speak_steps": 6, "speak_until": 6, "warmup": 2, "ramp": (2, 3, 4, 5, 6), "hard_from": 2,
    "describe_steps": 4, "describe_warmup": 1,
}  # fmt: skip
# The second recipe begins with the first checkpoint's language model, so that one has to have its size.
TINY_RECIPES = {
    "idefics3": Recipe(**TINY),
    "qwen2-vl": replace(RECIPES["qwen2-vl"], **TINY | {"width": 96, "depth": 4}),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kind(request: pytest.FixtureRequest) -> Architecture:
    return architecture_named(request.param)


@pytest.fixture(scope="module")
def vocabulary(kind: Architecture) -> Vocabulary:
    return Vocabulary(kind.build_processor(questions.words()), kind)


def small_model(kind: Architecture, *, depth: int = 2) -> Any:
    return kind.build_model(len(questions.words()), width=32, depth=depth, vision_width=32, vision_depth=2).eval()


def test_training_computes_what_the_model_does_with_the_processor_s_inputs(
    kind: Architecture, vocabulary: Vocabulary
) -> None:
    """Ids and the logits of a plain forward pass: pixels, visual tokens and position ids are the same."""
    processor, model = kind.build_processor(questions.words()), small_model(kind)
    scene = scenes.sample_scene(11)
    picture = scenes.render(scene)
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(text=[text], images=[[Image.fromarray(picture)]], return_tensors="pt")
    question = vocabulary.ids("what color is the circle?" + architecture.ASSISTANT)
    assert made["input_ids"][0].tolist() == vocabulary.prefix + question

    trainee = reference_training.Trainee(model, vocabulary, kind)
    answer = vocabulary.ids("red square blue")
    packed = reference_examples.pack(vocabulary.prefix, [[Example(question, answer, [1.0, 0.5, 2.0])]])
    pixels = reference_examples.normalise(picture[None])
    batch = Batch(pixels, cells=torch.from_numpy(reference_examples.cell_targets(scene))[None], **packed)
    numbers = torch.tensor([vocabulary.ids(str(n))[0] for n in range(65)])
    inputs = {key: value for key, value in made.items() if key not in ("input_ids", "attention_mask")}
    ids = torch.tensor([vocabulary.prefix + question + answer[:-1]])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        loss, _ = trainee.speak_loss(trainee.encode(pixels), batch, numbers, 0.0)
        logs = model(input_ids=ids, **inputs).logits[0, -3:].log_softmax(-1)
    expected = -(logs[range(3), answer] * torch.tensor([1.0, 0.5, 2.0])).sum() / 3.5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_packed_questions_do_not_see_each_other(kind: Architecture, vocabulary: Vocabulary) -> None:
    """The packed pass gives every question the loss that it has alone."""
    trainee = reference_training.Trainee(small_model(kind), vocabulary, kind)
    numbers = torch.tensor([vocabulary.ids(str(n))[0] for n in range(65)])
    scene, rng = scenes.sample_scene(4, 3, 6), random.Random(0)
    found = reference_examples.examples(scene, rng, vocabulary, Recipe(questions=8), step=99_999)
    assert len(found) >= 6
    pixels = reference_examples.normalise(scenes.render(scene)[None])
    cells = torch.from_numpy(reference_examples.cell_targets(scene))[None]

    def loss(group: list[Example]) -> float:
        packed = reference_examples.pack(vocabulary.prefix, [group])
        with torch.no_grad():
            batch = Batch(pixels, cells=cells, **packed)
            return trainee.speak_loss(trainee.encode(pixels), batch, numbers, 0.0)[0].item()

    weights = np.array([sum(example.weights) for example in found])
    alone = np.array([loss([example]) for example in found])
    assert loss(found) == pytest.approx(float((weights * alone).sum() / weights.sum()), rel=1e-4)


def test_captions_are_learned_in_the_last_stage_only(vocabulary: Vocabulary) -> None:
    """Each is one annotator's caption of the very scene, ends where the text ends, and weighs as the recipe says."""
    recipe, end = Recipe(), vocabulary.tokenizer.eos_token_id
    prompt = vocabulary.ids(captions.PROMPT + architecture.ASSISTANT)
    for seed in range(30):
        scene = scenes.sample_scene(seed)
        early = reference_examples.examples(scene, random.Random(seed), vocabulary, recipe, 6000)
        late = reference_examples.examples(scene, random.Random(seed), vocabulary, recipe, 10, describe=True)
        assert not [example for example in early if example.prompt == prompt]
        described = [example for example in late if example.prompt == prompt]
        if not captions.MIN_OBJECTS <= len(scene.blocks) <= captions.MAX_OBJECTS:
            assert not described
            continue
        said = {tuple(vocabulary.ids(captions.caption(scene, annotator))) for annotator in range(N_ANNOTATORS)}
        assert len(described) == recipe.describe_captions
        for example in described:
            assert tuple(example.answer[:-1]) in said and example.answer[-1] == end
            assert example.weights == [recipe.caption_weight] * len(example.answer)


def test_boxes_of_a_tower_without_places_are_told_within_their_cells() -> None:
    """Its heads are right when each says the box minus its cell's corner, plus 32."""
    kind = architecture_named("qwen2-vl")
    vocabulary = Vocabulary(kind.build_processor(questions.words()), kind)
    trainee = reference_training.Trainee(small_model(kind), vocabulary, kind)
    scene = scenes.sample_scene(4, 3, 6)
    cells = torch.from_numpy(reference_examples.cell_targets(scene))[None]
    block = scene.blocks[0]
    corner = (block.cell % 4 * 16, block.cell // 4 * 16)
    told = [side - corner[i % 2] + 32 for i, side in enumerate(block.box)]
    one = cells.clone()
    one[0, [i for i in range(16) if i != block.cell], 4:] = -1
    with torch.no_grad():
        trainee.box_heads.weight.zero_()
        losses = []
        for shift in (0, 1, -16):
            trainee.box_heads.bias.fill_(-30.0)
            for side, place in enumerate(told):
                trainee.box_heads.bias[side * 65 + min(64, max(0, place + shift))] = 30.0
            losses.append(trainee.see_loss(torch.zeros(1, 16, 32), one)[0].item())
    assert losses[0] < losses[1] < losses[2]


def test_the_second_language_model_begins_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On words alone, and with the same rotary frequencies, the copy computes what the first computes."""
    monkeypatch.setattr(qwen2_vl, "THETA", 10_000.0)
    first, first_kind = reference_training.load_first("bitquake/block-idefics3")
    kind = architecture_named("qwen2-vl")
    model: Any = kind.build_model(len(questions.words())).eval()
    reference_training.begin_language(model, kind, first, first_kind, questions.words())
    ours, theirs = (Vocabulary(k.build_processor(questions.words()), k) for k in (kind, first_kind))
    text = f"{architecture.USER}is the red square left of the blue star?{architecture.ASSISTANT}"
    with torch.no_grad():
        logits = model(torch.tensor([ours.ids(text)])).logits[..., len(kind.specials) :]
        wanted = first(torch.tensor([theirs.ids(text)])).logits[..., len(first_kind.specials) :]
    assert wanted.std() > 1 and torch.allclose(logits, wanted, atol=1e-3)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[model.config.vision_start_token_id], rows[model.config.vision_end_token_id])
    assert model.lm_head.weight.data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_learning_rate_of_each_stage_warms_up_stays_and_falls(recipe: Recipe) -> None:
    for stage, peak, steps in (
        ("see", 1e-3, recipe.see_steps),
        ("speak", recipe.rate, recipe.speak_steps),
        ("describe", recipe.describe_rate, recipe.describe_steps),
    ):
        rates = [reference_recipe.rate_at(recipe, step, stage) for step in range(steps)]
        assert max(rates) == rates[steps // 2] == pytest.approx(peak) and rates[0] < peak / 40
        assert rates[-1] < rates[3 * steps // 4] < peak


@pytest.mark.parametrize(
    ("name", "saves", "stage"), [("idefics3", 3, "speak"), ("idefics3", 5, "describe"), ("qwen2-vl", 3, "speak")]
)
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, saves: int, stage: str
) -> None:
    torch.set_num_threads(1)
    recipe = TINY_RECIPES[name]
    whole = reference_training.train(tmp_path / "whole", recipe, save_every=3)
    real_save, calls = reference_training._save, []

    def save_then_die(*arguments: object) -> None:
        real_save(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(reference_training, "_save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        reference_training.train(tmp_path / "cut", recipe, save_every=3)
    monkeypatch.undo()
    stopped = json.loads((tmp_path / "cut" / "progress.json").read_text())
    assert (stopped["stage"], stopped["step"]) == (stage, 3)
    resumed = reference_training.train(tmp_path / "cut", recipe, save_every=3)
    from safetensors.torch import load_file

    first, second = load_file(str(whole / "model.safetensors")), load_file(str(resumed / "model.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_borrowed_language_model_is_frozen_until_it_speaks(tmp_path: Path) -> None:
    """After stage ``see`` it is what it began as; the tower is not; after ``speak`` neither is."""
    from transformers import AutoModelForImageTextToText

    recipe = replace(TINY_RECIPES["qwen2-vl"], speak_steps=0, speak_until=0, describe_steps=0)
    fresh: Any = architecture_named("qwen2-vl").build_model(len(questions.words()), vision_width=32, vision_depth=1)
    first, first_kind = reference_training.load_first(recipe.begin_with)
    kind = architecture_named("qwen2-vl")
    reference_training.begin_language(fresh, kind, first, first_kind, questions.words())
    begun = fresh.state_dict()

    def changed(recipe: Recipe) -> set[str]:
        folder = reference_training.train(tmp_path / str(recipe.speak_steps), recipe)
        after = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert after.keys() == begun.keys()
        return {name.split(".")[1] for name, value in after.items() if not torch.equal(value, begun[name])}

    assert changed(recipe) == {"visual"}
    assert changed(TINY_RECIPES["qwen2-vl"]) >= {"visual", "language_model"}


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    reference_training.train(tmp_path, TINY_RECIPES["idefics3"], save_every=3)
    with pytest.raises(ValueError, match="begun with another recipe"):
        reference_training.train(tmp_path, reference_recipe.recipe_from(["width=64"]))


def test_recipes_go_by_the_names_of_architectures() -> None:
    for name in ARCHITECTURES:
        assert reference_recipe.recipe_from(["width=64"], name) == replace(RECIPES[name], width=64)
        assert RECIPES[name].architecture == name
    with pytest.raises(ValueError, match="--architecture llava: known are idefics3, qwen2-vl"):
        reference_recipe.recipe_from([], "llava")
    with pytest.raises(ValueError, match="unknown key 'begin_with'"):
        reference_recipe.recipe_from(["begin_with=1"])
