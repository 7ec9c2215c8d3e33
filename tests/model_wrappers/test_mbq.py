"""MBQ against the published search written literally; what it does without a modality; quantized activations."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bitquake.model_wrappers.calibration.sample import CalibrationInputs
from bitquake.model_wrappers.components import ARCHITECTURES
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.blocks import BlockRunner, ordered_blocks
from bitquake.model_wrappers.quantizers.features import Features, batched, features
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.mbq import mbq_scale, token_weights
from bitquake.model_wrappers.quantizers.options import MbqOptions
from bitquake.model_wrappers.quantizers.plan import quantizable
from bitquake.model_wrappers.quantizers.ratios import modality_ratios
from bitquake.model_wrappers.quantizers.replace import quantize_model
from bitquake.model_wrappers.quantizers.scale_groups import output_projections, scale_groups
from bitquake.model_wrappers.quantizers.spec import QuantSpec


def _load_literal() -> ModuleType:
    path = Path(__file__).with_name("literal_scale_search.py")
    spec = importlib.util.spec_from_file_location("literal_scale_search", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up by name
    spec.loader.exec_module(module)
    return module


literal = _load_literal()
MODES: dict[str, dict[str, Any]] = {
    "w3": {"bits": 3, "group_size": 16},
    "w3-mse": {"bits": 3, "group_size": 16, "mbq": {"loss": "mse"}},
    "w4a8": {"bits": 4, "group_size": "channel", "symmetric": True, "activation_bits": 8},
}


def mbq(mode: str = "w3", **more: Any) -> QuantSpec:
    return load_spec({"name": "mbq", "method": "mbq", **MODES[mode], **more})


def samples_of(tiny_architectures: Any, name: str, n: int = 4) -> list[CalibrationInputs]:
    return [CalibrationInputs(*tiny_architectures.example(name, seed=seed)) for seed in range(n)]


def make(tiny_architectures: Any, name: str) -> Any:
    """A tiny model with input features of very different sizes, as norms of real ones make them."""
    model = tiny_architectures.make(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key and key.endswith("weight") and ("text" in key or "language" in key):
                parameter.mul_(torch.randn(parameter.shape, generator=generator).mul(0.7).exp())
    return model


def language(model: Any) -> dict[str, Any]:
    return {n: m for n, m in quantizable(model).items() if "language_model" in n or "text_model" in n}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_ratios_are_those_of_plain_backward_passes(tiny_architectures: Any, name: str) -> None:
    """Against the model's own loss on labels and whole graphs, with a gradient for every weight."""
    model, samples = make(tiny_architectures, name), samples_of(tiny_architectures, name, 2)
    linears = {id(m): n for n, m in model.named_modules()}
    projections = [(block, kind, linears[id(linear)]) for block, kind, linear in output_projections(model)]
    expected = literal.gradient_ratios(
        model, [s.inputs for s in samples], [(s.vision, s.answer) for s in samples],
        {linear: kind for _, kind, linear in projections},
    )  # fmt: skip
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    got = modality_ratios(model, samples)
    assert len(projections) == 6 and len({round(value, 6) for value in expected.values()}) >= 3
    for block, kind, linear in projections:
        assert getattr(got, kind)[block] == pytest.approx(expected[linear], rel=1e-3)
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("name", ["idefics3", "qwen2_vl", "blip-2"])
def test_scales_are_those_of_the_published_search(tiny_architectures: Any, name: str, mode: str) -> None:
    model, samples = make(tiny_architectures, name), samples_of(tiny_architectures, name)
    spec = mbq(mode)
    assert spec.mbq is not None
    targets = language(model)
    ratios = modality_ratios(model, samples)
    chosen = {}
    for block, inputs in BlockRunner(model, ordered_blocks(model, targets), samples, propagate="original"):
        rho = {"attention": ratios.attention[block.name], "mlp": ratios.mlp[block.name]}
        found = literal.search(
            block.module, [(one.args, one.kwargs) for one in inputs],
            literal.OPT if name == "blip-2" else literal.LLAMA, method="mbq", bits=spec.bits,
            group=-1 if mode == "w4a8" else 16, symmetric=spec.symmetric, activation_bits=spec.activation_bits,
            loss=spec.mbq.loss, masks=[(s.vision, s.answer) for s in samples], rho=rho,
        )  # fmt: skip
        for group in scale_groups(model, block):
            if group.is_scaled:
                seen = features(block.module, batched(inputs), [group])[0]
                ratio = rho[group.group.kind]
                scale, choice = mbq_scale(group, seen, dict.fromkeys(targets, spec), spec.mbq, ratio)
                first = next(iter(group.linears)).removeprefix(f"{block.name}.")
                assert choice.index == found.ratios[first], (block.name, first)
                torch.testing.assert_close(scale, found.scales[first], rtol=1e-4, atol=0)
                chosen[block.name, first] = scale
    quantize_model(model, spec, calibration=samples)
    for (path, first), scale in chosen.items():
        kept = model.get_submodule(f"{path}.{first}").input_scale
        torch.testing.assert_close(torch.ones_like(scale) if kept is None else kept, scale, rtol=1e-4, atol=0)
    assert len(chosen) == 3 * (4 if name == "blip-2" else 3)


def test_the_loss_weighs_the_modalities() -> None:
    vision = torch.tensor([True, True, False, False, False])
    answer = torch.tensor([False, False, False, True, False])
    found = Features(torch.zeros(5, 2), vision, answer)
    assert token_weights(found, 3.0, MbqOptions()).tolist() == [3, 3, 0, 1, 0]  # type: ignore[union-attr]
    assert token_weights(found, 3.0, MbqOptions(loss="mse")).tolist() == [1.5, 1.5, 0, 1, 0]  # type: ignore[union-attr]
    assert token_weights(found, None, MbqOptions()) is None
    assert token_weights(Features(torch.zeros(5, 2), None, None), 1.0, MbqOptions()) is None


def scales(model: Any) -> dict[str, Tensor]:
    return {n: m.input_scale for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def same_scales(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        return x is y if x is None or y is None else torch.equal(x, y)

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lacking", ["vision", "answer"])
def test_without_one_modality_every_position_counts_and_a_warning_says_so(
    tiny_architectures: Any, log: list[str], lacking: str
) -> None:
    samples = samples_of(tiny_architectures, "qwen2_vl")
    results = []
    for kept in (samples, [mask_out(sample, lacking) for sample in samples], [mask_out(s, "both") for s in samples]):
        model = make(tiny_architectures, "qwen2_vl")
        quantize_model(model, mbq(components=["vision", "connector", "language"]), calibration=kept)
        results.append(scales(model))
    balanced, one, none = results
    assert same_scales(one, none) and not same_scales(balanced, none)
    # the vision tower and the connector have no ratio in any case
    outside = [{n: s for n, s in found.items() if ".visual." in n} for found in results]
    assert outside[0] and same_scales(outside[0], outside[1])
    warnings = [line for line in log if "every position counts alike" in line]
    assert len(warnings) == 2 and f" 0 {lacking}" in warnings[0]


def mask_out(sample: CalibrationInputs, kind: str) -> CalibrationInputs:
    nothing = torch.zeros_like(sample.vision)
    return CalibrationInputs(
        sample.inputs,
        nothing if kind in ("vision", "both") else sample.vision,
        nothing if kind in ("answer", "both") else sample.answer,
    )


def test_options_change_what_is_searched(tiny_architectures: Any) -> None:
    """Without reweighting the ratio is 1; distorted inputs come from the quantized layers before."""
    samples = samples_of(tiny_architectures, "idefics3")
    found = {}
    for key, options in {"default": {}, "even": {"reweight": False}, "distort": {"distort": True}}.items():
        model = make(tiny_architectures, "idefics3")
        quantize_model(model, mbq(mbq=options), calibration=samples)
        found[key] = scales(model)
    assert not same_scales(found["default"], found["even"])
    first = {key: {n: s for n, s in one.items() if ".layers.0." in n} for key, one in found.items()}
    assert same_scales(first["default"], first["distort"])  # nothing is quantized before the first block
    assert not same_scales(found["default"], found["distort"])


def test_quantized_activations_are_searched_and_run(tiny_architectures: Any) -> None:
    samples = samples_of(tiny_architectures, "idefics3", 6)
    errors = {}
    for method in ("rtn", "mbq"):
        model = make(tiny_architectures, "idefics3")
        with torch.no_grad():
            before = [model(**sample.inputs).logits for sample in samples[4:]]
            spec = load_spec({"name": "x", "method": method, **MODES["w4a8"], "activation_bits": 4})
            quantize_model(model, spec, calibration=samples[:4] if method == "mbq" else None)
            errors[method] = sum(
                (model(**sample.inputs).logits - one).square().mean().item()
                for sample, one in zip(samples[4:], before, strict=True)
            )
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert layers and all(m.activation_bits == 4 and m.symmetric for m in layers)
    assert errors["mbq"] < 0.8 * errors["rtn"]
