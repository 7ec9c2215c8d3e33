"""SmoothQuant against its formula and against PyTorch's integer matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bitquake.model_wrappers.calibration.sample import CalibrationInputs
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.replace import quantize_model
from bitquake.model_wrappers.quantizers.scale_groups import Group, ScaleGroup
from bitquake.model_wrappers.quantizers.smoothquant import LargestMagnitude, smoothquant_scale
from bitquake.model_wrappers.quantizers.spec import QuantSpec


def smoothquant(**more: Any) -> QuantSpec:
    return load_spec({"name": "sq", "method": "smoothquant", "bits": 8, **more})


def samples_of(tiny_architectures: Any, name: str, n: int = 3) -> list[CalibrationInputs]:
    return [CalibrationInputs(*tiny_architectures.example(name, seed=seed)) for seed in range(n)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scale_is_the_formula(alpha: float) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(6, 3)
    x = torch.randn(40, 6) * torch.tensor([1.0, 50.0, 0.1, 1.0, 3.0, 0.0])
    seen = LargestMagnitude()
    for part in x.split(7):
        seen.add(part[None])
    group = ScaleGroup(Group(("a", "b")), {"a": first, "b": second}, first, True, frozenset())
    assert seen.value is not None
    got = smoothquant_scale(group, seen.value, alpha)
    for j in range(5):
        largest_x = max(abs(row[j]) for row in x.tolist())
        largest_w = max(abs(row[j]) for row in [*first.weight.tolist(), *second.weight.tolist()])
        assert got[j].item() == pytest.approx(largest_x**alpha / largest_w ** (1 - alpha), rel=1e-5)
    assert got[5] == 1.0  # never seen: not scaled


def test_scales_of_a_model_come_from_its_own_activations(tiny_architectures: Any) -> None:
    model, samples = tiny_architectures.make("qwen3_vl"), samples_of(tiny_architectures, "qwen3_vl")
    names = {
        "model.language_model.layers.1.mlp.down_proj": None,
        "model.visual.blocks.1.attn.qkv": None,
        "model.visual.deepstack_merger_list.0.linear_fc2": None,
    }
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    largest: dict[str, Any] = {name: torch.zeros(weight.shape[1]) for name, weight in weights.items()}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            largest[name] = torch.maximum(largest[name], args[0].abs().flatten(0, -2).amax(dim=0))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad():
        for sample in samples:
            model(**sample.inputs)
    for hook in hooks:
        hook.remove()
    quantize_model(model, smoothquant(components=["vision", "connector", "language"]), calibration=samples)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        expected = (largest[name] / weight.abs().amax(dim=0)).sqrt()
        torch.testing.assert_close(layer.input_scale, expected, rtol=1e-4, atol=1e-6)
        assert layer.symmetric and layer.activation_bits == 8 and layer.scale.shape == (len(weight), 1)


def test_a_layer_computes_the_integer_product(tiny_architectures: Any) -> None:
    """int8 by int8 to int32 by PyTorch, times both scales, is what the layer gives in floating point."""
    model, samples = tiny_architectures.make("idefics3"), samples_of(tiny_architectures, "idefics3")
    quantize_model(model, smoothquant(), calibration=samples)
    layer = model.model.text_model.layers[1].mlp.down_proj
    assert isinstance(layer, QuantizedLinear) and layer.input_scale is not None
    x = torch.randn(32, layer.in_features) * layer.input_scale * 3
    weight = layer.quantized_weight()
    smooth = x / layer.input_scale
    step = smooth.abs().amax(dim=1, keepdim=True) / 127
    product = torch._int_mm((smooth / step).round().to(torch.int8), (weight.codes.int() - 128).to(torch.int8).T)
    expected = product.float() * step * weight.scale.float().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_it_beats_plain_w8a8_where_a_channel_sticks_out(tiny_architectures: Any) -> None:
    samples = samples_of(tiny_architectures, "llava", 5)
    errors = {}
    for method in ("rtn", "smoothquant"):
        model = tiny_architectures.make("llava")
        with torch.no_grad():
            for block in model.model.language_model.layers:
                block.input_layernorm.weight[7] *= 100
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(block.self_attn, name).weight[:, 7] /= 100
            before = [model(**sample.inputs).logits for sample in samples[3:]]
            spec = smoothquant() if method == "smoothquant" else load_spec(
                {"name": "x", "method": "rtn", "bits": 8, "group_size": "channel", "symmetric": True,
                 "activation_bits": 8}
            )  # fmt: skip
            quantize_model(model, spec, calibration=samples[:3] if method == "smoothquant" else None)
            errors[method] = sum(
                (model(**sample.inputs).logits - one).square().mean().item()
                for sample, one in zip(samples[3:], before, strict=True)
            )
    assert errors["smoothquant"] < 0.1 * errors["rtn"]
