"""The training script: what it feeds the model, that questions are kept apart, and that a stop changes nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitquake import reference_training as training
from bitquake.model_wrappers.checkpoints import architecture
from bitquake.tasks.world import captions, questions, scenes
from bitquake.tasks.world.annotators import N_ANNOTATORS

TINY = training.Recipe(
    width=32, depth=1, vision_width=32, vision_depth=1, images=2, questions=4, see_images=2, see_steps=4, speak_steps=6,
    warmup=2, ramp=(2, 3, 4, 5, 6), hard_from=2, describe_steps=4, describe_warmup=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary() -> training.Vocabulary:
    return training.Vocabulary(architecture.build_processor(questions.words()))


def test_inputs_equal_what_the_processor_makes(vocabulary: training.Vocabulary) -> None:
    processor = architecture.build_processor(questions.words())
    scene = scenes.sample_scene(11)
    picture = scenes.render(scene)
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(text=[text], images=[[Image.fromarray(picture)]], return_tensors="pt")
    ours = training.prefix_ids(vocabulary) + vocabulary.ids("what color is the circle?" + architecture.ASSISTANT)
    assert made["input_ids"][0].tolist() == ours
    assert torch.allclose(made["pixel_values"][0, 0], training.normalise(picture[None])[0], atol=1e-6)


def test_packed_questions_do_not_see_each_other(vocabulary: training.Vocabulary) -> None:
    """The packed pass gives every question the loss that it has alone."""
    trainee = training.Trainee(
        architecture.build_model(len(questions.words()), width=32, depth=2, vision_width=32), vocabulary
    )
    numbers = torch.tensor([vocabulary.ids(str(n))[0] for n in range(65)])
    scene, rng = scenes.sample_scene(4, 3, 6), random.Random(0)
    found = training.examples(scene, rng, vocabulary, training.Recipe(questions=8), step=99_999)
    assert len(found) >= 6
    pixels = training.normalise(scenes.render(scene)[None])
    cells = torch.from_numpy(training.cell_targets(scene))[None]

    def loss(group: list[training.Example]) -> float:
        packed = training.pack(training.prefix_ids(vocabulary), [group])
        with torch.no_grad():
            batch = training.Batch(pixels, cells=cells, **packed)
            return trainee.speak_loss(trainee.encode(pixels), batch, numbers, 0.0)[0].item()

    weights = np.array([sum(example.weights) for example in found])
    alone = np.array([loss([example]) for example in found])
    assert loss(found) == pytest.approx(float((weights * alone).sum() / weights.sum()), rel=1e-4)


def test_captions_are_learned_in_the_last_stage_only(vocabulary: training.Vocabulary) -> None:
    """Each is one annotator's caption of the very scene, ends where the text ends, and weighs as the recipe says."""
    recipe, end = training.Recipe(), vocabulary.tokenizer.eos_token_id
    prompt = vocabulary.ids(captions.PROMPT + architecture.ASSISTANT)
    for seed in range(30):
        scene = scenes.sample_scene(seed)
        early = training.examples(scene, random.Random(seed), vocabulary, recipe, 6000)
        late = training.examples(scene, random.Random(seed), vocabulary, recipe, 10, describe=True)
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


def test_the_learning_rate_of_each_stage_warms_up_stays_and_falls() -> None:
    recipe = training.Recipe()
    for stage, peak, steps in (
        ("see", 1e-3, recipe.see_steps),
        ("speak", recipe.rate, recipe.speak_steps),
        ("describe", recipe.describe_rate, recipe.describe_steps),
    ):
        rates = [training.rate_at(recipe, step, stage) for step in range(steps)]
        assert max(rates) == rates[steps // 2] == pytest.approx(peak) and rates[0] < peak / 50
        assert rates[-1] < rates[3 * steps // 4] < peak


@pytest.mark.parametrize(("saves", "stage"), [(3, "speak"), (5, "describe")])
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: int, stage: str
) -> None:
    torch.set_num_threads(1)
    whole = training.train(tmp_path / "whole", TINY, save_every=3)
    real_save, calls = training._save, []

    def save_then_die(*arguments: object) -> None:
        real_save(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "cut", TINY, save_every=3)
    monkeypatch.undo()
    stopped = json.loads((tmp_path / "cut" / "progress.json").read_text())
    assert (stopped["stage"], stopped["step"]) == (stage, 3)
    resumed = training.train(tmp_path / "cut", TINY, save_every=3)
    from safetensors.torch import load_file

    first, second = load_file(str(whole / "model.safetensors")), load_file(str(resumed / "model.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    training.train(tmp_path, TINY, save_every=3)
    with pytest.raises(ValueError, match="begun with another recipe"):
        training.train(tmp_path, training.recipe_from(["width=64"]))
