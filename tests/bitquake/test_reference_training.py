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
from bitquake.tasks.world import questions, scenes

TINY = training.Recipe(
    width=32, depth=1, vision_width=32, vision_depth=1, images=2, questions=4, see_images=2, see_steps=4, speak_steps=6,
    warmup=2, ramp=(2, 3, 4, 5, 6), hard_from=2,
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


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    whole = training.train(tmp_path / "whole", TINY, save_every=3)
    real_save, calls = training._save, []

    def save_then_die(*arguments: object) -> None:
        real_save(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "cut", TINY, save_every=3)
    monkeypatch.undo()
    assert json.loads((tmp_path / "cut" / "progress.json").read_text())["step"] < TINY.speak_steps
    resumed = training.train(tmp_path / "cut", TINY, save_every=3)
    from safetensors.torch import load_file

    first, second = load_file(str(whole / "model.safetensors")), load_file(str(resumed / "model.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    training.train(tmp_path, TINY, save_every=3)
    with pytest.raises(ValueError, match="begun with another recipe"):
        training.train(tmp_path, training.recipe_from(["width=64"]))
