"""AWQ against the published search written literally, against brute force, and on planted outliers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitquake.model_wrappers.calibration.sample import CalibrationInputs
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.awq import awq_candidates, awq_scale, clip_tokens, clipped, mean_magnitude
from bitquake.model_wrappers.quantizers.blocks import BlockRunner, ordered_blocks
from bitquake.model_wrappers.quantizers.features import Call, Features, batched, features
from bitquake.model_wrappers.quantizers.options import AwqOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError, quantizable
from bitquake.model_wrappers.quantizers.replace import quantize_model, quantize_weight
from bitquake.model_wrappers.quantizers.scale_groups import Group, ScaleGroup, scale_groups
from bitquake.model_wrappers.quantizers.scale_search import best_scale, fake_quantize
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


def awq(bits: int = 3, group_size: int | str = 16, **more: Any) -> QuantSpec:
    return load_spec({"name": "awq", "method": "awq", "bits": bits, "group_size": group_size, **more})


def with_outliers(model: nn.Module, seed: int = 0) -> nn.Module:
    """A few input features of each language layer large, as norms of real models make them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight") and ("text" in name or "language" in name):
                parameter.mul_(torch.randn(parameter.shape, generator=generator).mul(0.7).exp())
    return model


def samples_of(tiny_architectures: Any, name: str, n: int = 4) -> list[CalibrationInputs]:
    return [CalibrationInputs(*tiny_architectures.example(name, seed=seed)) for seed in range(n)]


@pytest.mark.parametrize("name", ["idefics3", "qwen2_vl", "blip-2"])
@pytest.mark.parametrize("options", [{}, {"duo_scaling": False, "clip": False}], ids=["default", "plain"])
def test_scales_are_those_of_the_published_search(tiny_architectures: Any, name: str, options: dict[str, bool]) -> None:
    model, samples = with_outliers(tiny_architectures.make(name)), samples_of(tiny_architectures, name)
    spec = awq(awq=options)
    targets = {n: m for n, m in quantizable(model).items() if "language_model" in n or "text_model" in n}
    expected, chosen = {}, {}
    for block, inputs in BlockRunner(model, ordered_blocks(model, targets), samples, propagate="original"):
        steps, calls = literal.OPT if name == "blip-2" else literal.LLAMA, [(one.args, one.kwargs) for one in inputs]
        found = literal.search(block.module, calls, steps, method="awq", bits=3, group=16, **options)
        outputs = [one.run(block.module)[0] for one in inputs]
        for group in scale_groups(model, block):
            if not group.is_scaled:
                assert name != "blip-2" and next(iter(group.linears)).endswith("o_proj")  # queries are grouped
                continue
            seen = features(block.module, batched(inputs), [group])[0]
            scale, choice = awq_scale(group, seen, dict.fromkeys(targets, spec), AwqOptions(**options))
            first = next(iter(group.linears)).removeprefix(f"{block.name}.")
            chosen[block.name, first] = choice.index
            assert choice.index == found.ratios[first], (block.name, first)
            torch.testing.assert_close(scale, found.scales[first], rtol=1e-4, atol=0)
        expected[block.name] = (found.layer, inputs, outputs)
    assert len(chosen) == 3 * (4 if name == "blip-2" else 3) and len(set(chosen.values())) >= 3
    # The whole way. The literal layer folds its scales; ours keeps them beside the codes.
    quantize_model(model, spec, calibration=samples)
    n_equal = 0
    for path, (layer, inputs, outputs) in expected.items():
        for linear_name in (n.removeprefix(f"{path}.") for n in targets if n.startswith(f"{path}.")):
            # folding divides the rows of these, which moves the float16 rounding of their steps and so a few choices
            if linear_name not in ("self_attn.v_proj", "mlp.up_proj", "fc1"):
                ours = model.get_submodule(f"{path}.{linear_name}").quantized_weight()
                literals = layer.get_submodule(linear_name).weight
                torch.testing.assert_close(ours.dequantize(torch.float32, divided=False), literals)
                n_equal += 1
        ours = torch.cat([one.run(model.get_submodule(path))[0] for one in inputs])
        theirs = torch.cat([one.run(layer)[0] for one in inputs])
        assert (ours - theirs).norm() < 0.35 * (ours - torch.cat(outputs)).norm()
    assert n_equal == 3 * (4 if name == "blip-2" else 5)


def make_group(kind: str, seed: int) -> tuple[ScaleGroup, Callable[[Tensor], Tensor], dict[str, nn.Linear]]:
    torch.manual_seed(seed)
    first, second = nn.Linear(24, 20), nn.Linear(20, 12)
    if kind == "linear":
        group = ScaleGroup(Group(("",)), {"one": first}, first, True, frozenset())
        return group, first, {"one": first}
    mlp = nn.Sequential(first, nn.GELU(), second)
    span: Any = "calls" if kind == "calls" else "tokens"
    return ScaleGroup(Group(("0",), "", span), {"one": first}, mlp, True, frozenset()), mlp, {"one": first}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["linear", "tokens", "calls"]),
    power=st.sampled_from([1, 2]),
    weighted=st.booleans(),
    activation_bits=st.sampled_from([None, 8, 4]),
    tokens=st.sampled_from([1, 5, 23, 150]),
    seed=st.integers(0, 1000),
    first=st.integers(0, 9),
)
def test_the_fast_search_finds_what_trying_everything_finds(
    kind: str, power: int, weighted: bool, activation_bits: int | None, tokens: int, seed: int, first: int
) -> None:
    group, target, linears = make_group(kind, seed)
    x = torch.randn(tokens, 24) * torch.randn(24).exp() * torch.randn(tokens, 1).exp()
    weights = torch.rand(tokens) * (torch.rand(tokens) < 0.6) if weighted else None
    candidates = awq_candidates(mean_magnitude(x), None, 10)
    spec = load_spec({
        "name": "m", "method": "mbq", "bits": 3, "group_size": 8, "symmetric": True, "activation_bits": activation_bits,
    })  # fmt: skip
    with torch.no_grad():
        calls = [
            Call((x[a:b],), {}, target(x[a:b]), slice(a, b))
            for a, b in ((0, tokens // 2), (tokens // 2, tokens))
            if b > a and kind == "calls"
        ]
    got = best_scale(
        group, Features(x, None, None, tuple(calls)), candidates, {"one": spec}, power=power, weights=weights,
        first=first,
    )  # fmt: skip
    losses = []
    with torch.no_grad():
        reference, linear = target(x), linears["one"]
        original = linear.weight.data
        for scale in candidates:
            linear.weight.data = quantize_weight(original * scale, spec).dequantize(torch.float32)
            seen = x / scale
            if activation_bits:
                seen = literal.per_token(seen, activation_bits)
            error = (target(seen) - reference).abs().pow(power).sum(dim=1)
            losses.append((error if weights is None else error * weights).double().sum().item())
        linear.weight.data = original
    assert got.loss == pytest.approx(min(losses), rel=1e-4, abs=1e-9)
    assert losses[got.index] == pytest.approx(min(losses), rel=1e-4, abs=1e-9)
    assert 0 <= got.share <= 1
    assert "forward" not in linear.__dict__


def test_hopeless_candidates_are_given_up_early() -> None:
    group, *_ = make_group("tokens", 0)
    x = torch.randn(4000, 24) * torch.randn(4000, 1).mul(2).exp()
    candidates = torch.stack([torch.ones(24), *(torch.full((24,), 1.0).index_fill(0, torch.tensor([i]), 1e3)
                                                for i in range(19))])  # fmt: skip
    choice = best_scale(group, Features(x, None, None), candidates, {"one": awq(4, 8)}, power=2)
    assert choice.index == 0 and choice.share < 0.3


@pytest.mark.parametrize(("group", "symmetric"), [(16, False), (16, True), (-1, False)])
def test_clip_is_the_published_one(group: int, symmetric: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(70, 48) * torch.randn(70, 48).mul(0.5).exp()
    x = torch.randn(1300, 48) * torch.randn(48).exp()
    bound = literal.best_clip(weight, x, 3, group, symmetric)
    expected = weight.reshape(70, -1, 48 if group == -1 else group).clamp(-bound, bound).reshape(70, 48)
    got = clipped(weight, clip_tokens(x, None), awq(3, group, symmetric=symmetric))
    assert (bound < weight.reshape(70, -1, bound.numel() and 48 if group == -1 else group).abs().amax(2, True)).any()
    torch.testing.assert_close(got, expected)


def test_clip_of_a_short_last_group_and_of_few_tokens() -> None:
    torch.manual_seed(2)
    weight, x, spec = torch.randn(9, 37) ** 3, torch.randn(7, 37), awq(3, 16)
    cut = clipped(weight, clip_tokens(x, None), spec)
    errors = []
    for columns in (slice(0, 16), slice(16, 32), slice(32, 37)):
        for w in (cut, weight):
            change = fake_quantize(w, spec)[:, columns] - weight[:, columns]
            errors.append((change @ x[:, columns].T).square().sum(dim=1))
        assert (errors[-2] <= errors[-1] * 1.0001).all()
    assert sum(e.sum() for e in errors[::2]) < 0.95 * sum(e.sum() for e in errors[1::2])
    assert (cut.abs() <= weight.abs()).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_it_beats_rounding_on_planted_outlier_channels(tiny_architectures: Any, bits: int) -> None:
    """Input features a hundred times larger than the rest, whose weights are small: what AWQ is made for."""
    samples = samples_of(tiny_architectures, "llava", 6)
    errors = {}
    for method in ("rtn", "awq"):
        model = tiny_architectures.make("llava")
        with torch.no_grad():
            for block in model.model.language_model.layers:
                for norm, linears in (
                    (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                    (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
                ):
                    norm.weight[[3, 17]] *= 100
                    for linear in linears:
                        linear.weight[:, [3, 17]] /= 100
            before = [model(**sample.inputs).logits for sample in samples[4:]]
            spec = load_spec({"name": "x", "method": method, "bits": bits, "group_size": "channel"})
            quantize_model(model, spec, calibration=samples[:4] if method == "awq" else None)
            errors[method] = sum(
                (model(**sample.inputs).logits - one).square().mean().item()
                for sample, one in zip(samples[4:], before, strict=True)
            )
    assert errors["awq"] < 0.5 * errors["rtn"]


def test_dead_channels_give_finite_scales_and_unchanged_outputs(tiny_architectures: Any) -> None:
    """An input feature that is always zero, and a layer all of whose inputs are."""
    samples = samples_of(tiny_architectures, "idefics3", 2)
    model = tiny_architectures.make("idefics3")
    with torch.no_grad():
        layers = model.model.text_model.layers
        layers[0].input_layernorm.weight[5] = 0
        layers[1].post_attention_layernorm.weight.zero_()
    quantize_model(model, awq(8), calibration=samples)
    for module in model.modules():
        scale = getattr(module, "input_scale", None)
        assert scale is None or (scale.isfinite().all() and (scale > 0).all())
    with torch.no_grad():
        assert model(**samples[0].inputs).logits.isfinite().all()


def test_bad_values_are_named(tiny_architectures: Any) -> None:
    samples = samples_of(tiny_architectures, "idefics3", 1)
    model = tiny_architectures.make("idefics3")
    model.model.text_model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"text_model.layers.1.mlp.up_proj \(shape .*\): 1 weights are NaN"):
        quantize_model(model, awq(), calibration=samples)
    model = tiny_architectures.make("idefics3")
    model.model.text_model.layers[2].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(QuantizationError, match=r"layers.2.self_attn.q_proj: .* calibration inputs are NaN"):
        quantize_model(model, awq(), calibration=samples)
