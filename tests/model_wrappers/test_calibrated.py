"""Calibrated methods as a whole: which layers share scales, GPTQ's Hessians, resuming, errors, what is held."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from bitquake.model_wrappers.calibration.sample import CalibrationInputs
from bitquake.model_wrappers.components import ARCHITECTURES
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.blocks import Block, BlockRunner, ordered_blocks
from bitquake.model_wrappers.quantizers.calibrated import quantize
from bitquake.model_wrappers.quantizers.features import batched, features
from bitquake.model_wrappers.quantizers.gptq import HessianSum, gptq
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.options import GptqOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError, quantizable, resolve
from bitquake.model_wrappers.quantizers.replace import quantize_model
from bitquake.model_wrappers.quantizers.scale_groups import SCALE_GROUPS, scale_groups
from bitquake.model_wrappers.quantizers.spec import QuantSpec
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 3, "group_size": 16},
    "awq": {"bits": 3, "group_size": 16},
    "mbq": {"bits": 3, "group_size": 16},
    "mbq-distort": {"bits": 3, "group_size": 16, "method": "mbq", "mbq": {"distort": True}},
    "smoothquant": {"bits": 8},
}
EVERYTHING = ["vision", "connector", "language"]
# Linears of a block whose output projection of grouped queries keeps its scale; everything else is scaled.
NOT_SCALED = {name: {"self_attn.o_proj"} for name in ARCHITECTURES} | {"blip-2": set()}


def spec_of(method: str, **more: Any) -> QuantSpec:
    return load_spec({"name": method, "method": method, "components": EVERYTHING, **METHODS[method], **more})


def samples_of(tiny_architectures: Any, name: str, n: int = 3) -> list[CalibrationInputs]:
    return [CalibrationInputs(*tiny_architectures.example(name, seed=seed)) for seed in range(n)]


def test_the_table_has_every_architecture() -> None:
    assert set(SCALE_GROUPS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_linear_is_in_one_group_that_reads_what_it_reads(tiny_architectures: Any, name: str) -> None:
    """Inputs by hooks on every Linear; a target that is run token by token treats each token alone."""
    model = tiny_architectures.make(name)
    targets = quantizable(model)
    blocks = ordered_blocks(model, targets)
    seen: dict[str, Tensor] = {}
    names = {linear: linear_name for linear_name, linear in targets.items()}
    outputs: dict[nn.Module, tuple[Any, Any]] = {}

    def see(linear: nn.Module, args: Any) -> None:
        seen[names[linear]] = args[0]

    def hear(target: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(target, (args, output))

    groups = [(block, group) for block in blocks for group in scale_groups(model, block)]
    hooks = [linear.register_forward_pre_hook(see) for linear in targets.values()]
    hooks += [group.target.register_forward_hook(hear) for _, group in groups]
    with torch.no_grad():
        model(**tiny_architectures.example(name, seed=0).inputs)
        for hook in hooks:
            hook.remove()
        assert Counter(n for _, group in groups for n in group.linears) == Counter(list(targets))
        unscaled = set()
        for block, group in groups:
            inputs = [seen[n] for n in group.linears]
            assert all(one is inputs[0] or torch.equal(one, inputs[0]) for one in inputs)
            if not group.is_scaled:
                unscaled |= {n.removeprefix(f"{block.name}.") for n in group.linears}
            if group.group.span == "tokens":
                args, output = outputs[group.target]
                assert len(args) == 1 and torch.equal(args[0], inputs[0])
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                alone = torch.cat([group.target(token[None]) for token in x[:5]])
                torch.testing.assert_close(alone, output.reshape(-1, output.shape[-1])[:5], rtol=1e-4, atol=1e-5)
    assert unscaled == NOT_SCALED[name]
    clipped = {n.rpartition(".")[2] for _, group in groups for n in group.clipped}
    assert not clipped & {"q_proj", "k_proj", "query", "key", "qkv"} and clipped & {"v_proj", "o_proj", "out_proj"}


def test_groups_of_the_parts_that_the_tiny_models_lack() -> None:
    """T5 under BLIP-2, OPT's projections, the Q-Former's text layers."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5 = {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
          "num_decoder_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}  # fmt: skip
    opt = {"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 16,
           "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    for text in (t5, opt):
        qformer = {**sizes, "encoder_hidden_size": 24, "vocab_size": 64, "use_qformer_text_input": True}
        config = CONFIG_MAPPING["blip-2"](
            vision_config={**sizes, "image_size": 16, "patch_size": 8}, qformer_config=qformer, text_config=text
        )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        targets = quantizable(model)
        blocks = ordered_blocks(model, targets)
        held = [n for block in blocks for group in scale_groups(model, block) for n in group.linears]
        assert Counter(held) == Counter(list(targets))
        names = [block.name for block in blocks]
        if text is opt:
            path = "language_model.model.decoder"
            assert names[-4:] == [f"{path}.project_in", f"{path}.layers.0", f"{path}.layers.1", f"{path}.project_out"]


def test_a_linear_that_no_group_holds_is_refused(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("llava")
    extra = nn.Linear(2, 2)
    block = Block("model.language_model.layers.0", model.model.language_model.layers[0], "language",
                  {"model.language_model.layers.0.extra": extra}, "model.language_model.layers")  # fmt: skip
    with pytest.raises(ValueError, match=r"no scale group holds model.language_model.layers.0.extra"):
        scale_groups(model, block)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_joined_inputs_give_what_each_gives_alone(tiny_architectures: Any, name: str) -> None:
    """Among samples of equal and of different lengths; every input once."""
    model = tiny_architectures.make(name)
    samples = [s for s in samples_of(tiny_architectures, name, 3) for _ in range(2)]
    for i, sample in enumerate(samples):  # twins in shape, not in content
        sample.inputs["pixel_values"] = torch.roll(sample.inputs["pixel_values"], i, dims=-1)
        if i % 2:
            ids = sample.inputs["input_ids"].clone()
            ids[0, -4] = ids[0, -5]
            samples[i] = CalibrationInputs({**sample.inputs, "input_ids": ids}, sample.vision, sample.answer)
    joined = 0
    for block, inputs in BlockRunner(model, ordered_blocks(model, quantizable(model)), samples, propagate="original"):
        batches = batched(inputs)
        assert sorted(id(part) for batch in batches for part in batch.parts) == sorted(map(id, inputs))
        for batch in batches:
            together = _tensor(batch.joined.run(block.module))
            alone = torch.cat([_tensor(part.run(block.module)) for part in batch.parts])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
            joined += len(batch.parts) > 1
    assert joined >= 3


@pytest.mark.parametrize("name", [*sorted(ARCHITECTURES), "paligemma2"])
def test_equal_samples_count_as_often_as_they_come(tiny_architectures: Any, name: str) -> None:
    """Three times the same sample: each block computes three times what it does for one, and is seen to."""
    model = tiny_architectures.make(name)
    samples = samples_of(tiny_architectures, name, 1)
    blocks = ordered_blocks(model, quantizable(model))
    once: dict[str, Any] = {}
    for block, inputs in BlockRunner(model, blocks, samples, propagate="original"):
        once[block.name] = [_tensor(one.run(block.module)) for one in inputs]
    blocks = ordered_blocks(model, quantizable(model))
    joined = 0
    for block, inputs in BlockRunner(model, blocks, samples * 3, propagate="original"):
        batches = batched(inputs)
        together = [_tensor(batch.joined.run(block.module)) for batch in batches]
        expected = torch.cat(once[block.name] * 3).flatten(0, -2)
        torch.testing.assert_close(torch.cat(together).flatten(0, -2), expected, rtol=1e-4, atol=1e-5)
        for found in features(block.module, batches, scale_groups(model, block)):
            width = found.x.shape[1]
            first, second, third = found.x.reshape(3, -1, width)
            assert torch.allclose(first, second, atol=1e-5) and torch.allclose(first, third, atol=1e-5)
            assert found.vision is None or torch.equal(found.vision, samples[0].vision.repeat(3))
        joined += any(len(batch.parts) == 3 for batch in batches)
    assert joined >= 3


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl", "blip-2", "paligemma"])
def test_two_equal_samples_give_what_one_gives(tiny_architectures: Any, name: str, method: str) -> None:
    """All that the methods take from the data are means and largest values."""
    found = []
    for n in (1, 2):
        model = tiny_architectures.make(name)
        samples = samples_of(tiny_architectures, name, 1) * n
        quantize_model(model, spec_of(method), calibration=samples)  # type: ignore[arg-type]
        found.append({key: m for key, m in model.named_modules() if isinstance(m, QuantizedLinear)})
    one, two = found
    assert one.keys() == two.keys()
    codes = differ = 0
    for key, layer in one.items():
        if layer.input_scale is not None and two[key].input_scale is not None:
            torch.testing.assert_close(layer.input_scale, two[key].input_scale, rtol=1e-3, atol=1e-5)
        assert (layer.input_scale is None) == (two[key].input_scale is None)
        a, b = layer.quantized_weight().codes, two[key].quantized_weight().codes
        codes, differ = codes + a.numel(), differ + int((a != b).sum())
    assert differ <= 0.01 * codes  # sums of floats in another order move a weight that lies between two codes


@pytest.mark.parametrize("method", ["hqq", "awq", "mbq", "smoothquant"])
def test_a_group_longer_than_a_row_is_the_row(tiny_architectures: Any, method: str) -> None:
    """Of a whole model, where the rows of no layer are as long as the group."""
    samples = samples_of(tiny_architectures, "idefics3", 2)
    found = []
    for group in (4096, "channel"):
        model = tiny_architectures.make("idefics3")
        spec = load_spec(
            {"name": method, "method": method, "components": EVERYTHING, "bits": 4, "group_size": group}
            | ({"symmetric": True, "bits": 8, "activation_bits": 8} if method == "smoothquant" else {})
        )
        quantize_model(model, spec, calibration=None if method == "hqq" else samples)  # type: ignore[arg-type]
        found.append({key: m for key, m in model.named_modules() if isinstance(m, QuantizedLinear)})
    assert found[0].keys() == found[1].keys() == set(quantizable(tiny_architectures.make("idefics3")))
    for key, layer in found[0].items():
        a, b = layer.quantized_weight(), found[1][key].quantized_weight()
        assert a.group_size == b.group_size == layer.in_features and a.scale.shape == (layer.out_features, 1)
        for part in ("codes", "scale", "zero", "input_scale"):
            x, y = getattr(a, part), getattr(b, part)
            assert (x is None and y is None) or torch.equal(x, y), (key, part)


@pytest.mark.parametrize("method", ["hqq", "mbq", "smoothquant"])
def test_input_channels_that_are_always_zero(tiny_architectures: Any, method: str) -> None:
    """One of a layer, and all of another: finite everywhere, and the layer still gives about what it gave."""
    samples = samples_of(tiny_architectures, "idefics3", 2)
    model = tiny_architectures.make("idefics3")
    layers = model.model.text_model.layers
    with torch.no_grad():
        layers[0].input_layernorm.weight[5] = 0
        layers[1].post_attention_layernorm.weight.zero_()
    before = copy.deepcopy(model)
    bits = {"bits": 8, "group_size": 16} if method != "smoothquant" else {"bits": 8}
    spec = load_spec({"name": method, "method": method, **bits})
    quantize_model(model, spec, calibration=None if method == "hqq" else samples)  # type: ignore[arg-type]
    inputs: dict[str, Tensor] = {}
    names = [f"model.text_model.layers.{at}" for at in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.mlp.up_proj")]
    for name in names:
        before.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
    with torch.no_grad():
        logits = before(**samples[0].inputs).logits
        for name in names:
            x, layer = inputs[name], model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            dead = (x == 0).flatten(0, -2).all(dim=0)
            assert dead.all() if name.endswith("up_proj") else dead.tolist() == [i == 5 for i in range(len(dead))]
            weight = layer.quantized_weight()
            scale = weight.input_scale
            assert weight.dequantize(torch.float32).isfinite().all()
            assert scale is None or (scale.isfinite().all() and (scale > 0).all())
            expected = before.get_submodule(name)(x)
            assert (layer(x) - expected).norm() <= 0.02 * expected.norm()
        after = model(**samples[0].inputs).logits
    assert after.isfinite().all() and (after - logits).norm() < 0.1 * logits.norm()


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def test_gptq_gets_the_hessian_of_what_the_quantized_model_shows_a_layer(tiny_architectures: Any) -> None:
    """By plain forward passes of a copy that is quantized one block after the other."""
    name, options = "qwen2_vl", GptqOptions()
    model, samples = tiny_architectures.make(name), samples_of(tiny_architectures, name)
    oracle = copy.deepcopy(model)
    quantize_model(model, spec_of("gptq"), calibration=samples)
    for block in ordered_blocks(oracle, quantizable(oracle)):
        sums = {n: HessianSum(linear.in_features) for n, linear in block.linears.items()}
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, one=sums[n]: one.add(args[0]))
            for n, linear in block.linears.items()
        ]
        with torch.no_grad():
            for sample in samples:
                oracle(**sample.inputs)
        for hook in hooks:
            hook.remove()
        for n, linear in block.linears.items():
            expected = gptq(linear.weight, sums[n].hessian(), bits=3, group_size=16, symmetric=False, options=options)
            ours = model.get_submodule(n).quantized_weight()
            assert (ours.codes != expected.codes).float().mean() < 0.02  # batches add up in another order
            linear.weight.data = ours.dequantize(torch.float32)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tiny_architectures: Any, method: str) -> None:
    """Killed in the middle of a block, and once more later: what was emitted is given back, nothing is done twice."""
    name, spec = "idefics3", spec_of(method)
    samples = samples_of(tiny_architectures, name)
    whole: dict[str, QuantizedWeight] = {}
    quantize_model(tiny_architectures.make(name), spec, calibration=samples, emit=whole.__setitem__)
    done: dict[str, QuantizedWeight] = {}
    for stop in (5, 12, None):
        model, fresh = tiny_architectures.make(name), 0

        def emit(key: str, weight: QuantizedWeight, stop: int | None = stop) -> None:
            nonlocal fresh
            assert key not in done
            done[key] = weight
            fresh += 1
            if fresh == stop:
                raise KeyboardInterrupt

        try:
            quantize_model(model, spec, calibration=samples, done=dict(done), emit=emit)
        except KeyboardInterrupt:
            assert stop is not None and fresh == stop
    assert done.keys() == whole.keys() == set(resolve(tiny_architectures.make(name), spec))
    for key, weight in whole.items():
        for part in ("codes", "scale", "zero", "input_scale", "order"):
            a, b = getattr(weight, part), getattr(done[key], part)
            assert (a is None and b is None) or torch.equal(a, b), (key, part)
        assert isinstance(model.get_submodule(key), QuantizedLinear)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_weights_are_freed_block_by_block(tiny_architectures: Any, method: str) -> None:
    model, samples = tiny_architectures.make("llava"), samples_of(tiny_architectures, "llava", 1)
    spec = spec_of(method)
    linears = dict(quantizable(model))
    references = {name: weakref.ref(linear) for name, linear in linears.items()}
    alive: list[int] = []

    def emit(name: str, weight: QuantizedWeight) -> None:
        model.set_submodule(
            name, QuantizedLinear.from_weight(weight, bias=None, dtype=torch.float32, execution="packed")
        )
        alive.append(sum(one() is not None for one in references.values()))

    specs = dict.fromkeys(linears, spec)
    quantize(model, linears, specs, spec, samples, emit)  # type: ignore[arg-type]
    largest_block = 7
    for count, left in enumerate(alive, start=1):
        assert left <= len(references) - count + largest_block


@pytest.mark.parametrize("method", sorted(METHODS))
def test_one_sample_is_enough(tiny_architectures: Any, method: str) -> None:
    model, samples = tiny_architectures.make("paligemma"), samples_of(tiny_architectures, "paligemma", 1)
    quantize_model(model, spec_of(method), calibration=samples)  # type: ignore[arg-type]
    with torch.no_grad():
        assert model(**samples[0].inputs).logits.isfinite().all()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_errors_name_what_is_wrong(tiny_architectures: Any, method: str) -> None:
    spec = spec_of(method)
    model = tiny_architectures.make("idefics3")
    targets = dict(quantizable(model))
    with pytest.raises(QuantizationError, match="needs calibration data, and the set is empty"):
        quantize(model, targets, dict.fromkeys(targets, spec), spec, [], lambda *_: None)  # type: ignore[arg-type]
    model.model.vision_model.encoder.layers[1].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"vision_model.encoder.layers.1.mlp.fc1 \(shape .*\): 1 weights are"):
        quantize_model(model, spec, calibration=samples_of(tiny_architectures, "idefics3", 1))  # type: ignore[arg-type]
    model = tiny_architectures.make("qwen2_vl")
    text = {"input_ids": torch.tensor([[8, 9, 10, 11]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    nothing = torch.zeros(4, dtype=torch.bool)
    with pytest.raises(QuantizationError, match=r"model.visual.*: no calibration sample reaches this layer"):
        quantize_model(model, spec, calibration=[CalibrationInputs(text, nothing, nothing)])  # type: ignore[arg-type]


def test_a_plan_gives_layers_of_one_group_their_own_grids(tiny_architectures: Any) -> None:
    """Keys at 8 bits, queries at 3, values kept: they still share their input scales."""
    model, samples = tiny_architectures.make("qwen2_vl"), samples_of(tiny_architectures, "qwen2_vl")
    plan = [
        {"modules": r".*language_model.*q_proj"},
        {"modules": r".*language_model.*k_proj", "bits": 8},
        {"modules": r".*language_model.*v_proj", "keep": True},
    ]
    spec = load_spec({"name": "p", "method": "awq", "bits": 3, "group_size": 16, "plan": plan})
    quantize_model(model, spec, calibration=samples)  # type: ignore[arg-type]
    attention = model.model.language_model.layers[1].self_attn
    assert (attention.q_proj.bits, attention.k_proj.bits) == (3, 8) and type(attention.v_proj) is nn.Linear
    assert torch.equal(attention.q_proj.input_scale, attention.k_proj.input_scale)


def test_bfloat16_and_half_models_are_searched(tiny_architectures: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_architectures.make("idefics3").to(dtype)
        samples = [
            CalibrationInputs({k: v.to(dtype) if v.is_floating_point() else v for k, v in s.inputs.items()}, *rest)
            for s in samples_of(tiny_architectures, "idefics3", 2)
            for rest in [(s.vision, s.answer)]
        ]
        with torch.no_grad():
            before = model(**samples[0].inputs).logits.float()
            for method in ("awq", "mbq", "gptq", "smoothquant"):
                quantized = copy.deepcopy(model)
                quantize_model(quantized, spec_of(method, bits=8), calibration=samples)  # type: ignore[arg-type]
                after = quantized(**samples[0].inputs).logits.float()
                assert (after - before).norm() < 0.1 * before.norm()
