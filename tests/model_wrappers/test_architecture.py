"""The reference architectures: uneven channels change the weights and nothing that a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitquake.model_wrappers.checkpoints import ARCHITECTURES, architecture, architecture_named


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_spread_channels_keep_the_function_and_widen_the_groups(name: str) -> None:
    model: Any = architecture_named(name).build_model(40, width=32, depth=2, vision_width=32, vision_depth=1).eval()
    language: Any = architecture.language_model(model)
    torch.manual_seed(1)
    biases = [value for key, value in language.named_parameters() if key.endswith("proj.bias")]
    assert len(biases) == (6 if name == "qwen2-vl" else 0)
    with torch.no_grad():
        for bias in biases:
            bias.normal_(std=0.1)
    inputs = {"input_ids": torch.randint(10, 40, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    down = language.layers[1].mlp.down_proj.weight
    original = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before, range_before = model(**inputs).logits, (down.amax(1) / down.abs().mean(1)).mean().item()
        architecture.spread_channels(model, 0.7)
        after, range_after = model(**inputs).logits, (down.amax(1) / down.abs().mean(1)).mean().item()
    assert torch.allclose(before, after, atol=1e-5)
    assert range_after > 1.3 * range_before
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    architecture.spread_channels(model, 0.0)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    architecture.spread_channels(model, -0.7)
    assert all(torch.allclose(value, original[key], rtol=1e-5) for key, value in model.state_dict().items())


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(ValueError, match="architecture='llava': known are idefics3, qwen2-vl"):
        architecture_named("llava")
