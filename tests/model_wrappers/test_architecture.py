"""The reference architecture: uneven channels change the weights and nothing that the model computes."""

from __future__ import annotations

import torch

from bitquake.model_wrappers.checkpoints import architecture


def test_spread_channels_keep_the_function_and_widen_the_groups() -> None:
    model = architecture.build_model(40, width=32, depth=2, vision_width=32, vision_depth=1).eval()
    inputs = {"input_ids": torch.randint(9, 40, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    down = model.model.text_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        before, range_before = model(**inputs).logits, (down.amax(1) / down.abs().mean(1)).mean().item()
        architecture.spread_channels(model, 0.7)
        after, range_after = model(**inputs).logits, (down.amax(1) / down.abs().mean(1)).mean().item()
    assert torch.allclose(before, after, atol=1e-5)
    assert range_after > 1.3 * range_before
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    architecture.spread_channels(model, 0.0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
