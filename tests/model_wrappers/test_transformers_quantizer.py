"""The packed format in transformers: quantizing while loading, saving in shards, reloading, and damaged checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from bitquake.model_wrappers.loading import LoadedModel, load_model, load_quantized
from bitquake.model_wrappers.quant_cards import build_card
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.replace import quantize_model, quantize_weight
from bitquake.model_wrappers.quantizers.transformers_quantizer import (
    BitquakeConfig,
    CheckpointError,
    LoadingHooks,
    make_savable,
)
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

WHOLE = "rtn-int4-g64:components=vision+connector+language"
ARGUMENTS: dict[str, Any] = {
    "revision": None, "dtype": torch.float32, "device": torch.device("cpu"), "device_map": None,
    "attn_implementation": None, "trust_remote_code": False,
}  # fmt: skip


def from_pretrained(folder: Path, **arguments: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **{"dtype": torch.float32, **arguments})


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    """The same tensors under the same names, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="session")
def saved(tiny_architectures: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of Idefics3 in one file."""
    folder = tmp_path_factory.mktemp("saved")
    model = from_pretrained(tiny_architectures.checkpoint("idefics3"), quantization_config=BitquakeConfig(WHOLE))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """``damaged(change)``: a copy whose tensors ``change`` has edited in place; ``config=`` edits config.json."""

    def copy(
        change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
        config: Callable[[dict[str, Any]], None] = lambda values: None,
    ) -> Path:
        tensors = load_file(saved / "model.safetensors")
        values = json.loads((saved / "config.json").read_text())
        change(tensors)
        config(values)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return copy


# bfloat16 for most; float16 where an architecture keeps parts of itself in float32
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blip-2", torch.float16),
        ("idefics3", torch.bfloat16),
        ("llava", torch.bfloat16),
        ("llava_onevision", torch.bfloat16),
        ("paligemma", torch.float32),
        ("qwen2_5_vl", torch.bfloat16),
        ("qwen2_vl", torch.float16),
        ("qwen3_vl", torch.bfloat16),
        ("smolvlm", torch.float32),
    ],
)
def test_while_loading_is_after_loading_and_reload_gives_the_same_bits(
    tiny_architectures: Any, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    source = tiny_architectures.checkpoint(name)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in tiny_architectures.example(name).inputs.items()
    }

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**inputs).logits
        return found

    after = from_pretrained(source, dtype=dtype)
    before = quantize_model(after, load_spec(WHOLE))
    model = from_pretrained(source, dtype=dtype, quantization_config=BitquakeConfig(WHOLE))
    assert_equal(model, after)
    assert model.config.quantization_config.before == before
    expected = logits(after)
    assert torch.equal(logits(model), expected)

    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    again = from_pretrained(tmp_path / "saved", dtype=dtype)
    assert_equal(again, model)
    assert torch.equal(logits(again), expected)
    other = BitquakeConfig(execution="packed")
    with pytest.warns(UserWarning, match=r"loading attributes \(e.g. \['execution'\]\) will be overwritten"):
        packed = from_pretrained(tmp_path / "saved", dtype=dtype, device_map="cpu", quantization_config=other)
    layers = [module for module in packed.modules() if isinstance(module, QuantizedLinear)]
    assert {layer.execution for layer in layers} == {"packed"} and all(one.dequantized is None for one in layers)
    assert torch.equal(logits(packed), expected)

    packed.save_pretrained(tmp_path / "again")  # what was loaded can be saved, too
    assert_equal(from_pretrained(tmp_path / "again", dtype=dtype), model)


@pytest.mark.parametrize("quant", ["uniform-int4", "hqq-int3-g64", "rtn-w8a8"])
def test_every_data_free_method_gives_the_card_of_quantizing_after_loading(tiny_architectures: Any, quant: str) -> None:
    source, spec = str(tiny_architectures.checkpoint("qwen2_vl")), load_spec(quant)
    loaded = load_quantized(source, spec, **ARGUMENTS)
    model = load_model(source, **ARGUMENTS)
    before = quantize_model(model, spec)
    assert loaded.before == before
    cards = [build_card(one, spec, pretrained="x", before=before) for one in (loaded.model, model)]
    assert cards[0] == cards[1]
    assert_equal(loaded.model, model)


def test_a_plan_is_carried_out_and_comes_back(tiny_architectures: Any, tmp_path: Path) -> None:
    plan = [{"layers": ["mlp"], "bits": 3, "group_size": 16}, {"components": ["connector"], "symmetric": True}]
    spec = load_spec({"method": "rtn", "bits": 8, "group_size": "channel", "plan": plan})
    model = from_pretrained(tiny_architectures.checkpoint("llava"), quantization_config=BitquakeConfig(spec))
    model.save_pretrained(tmp_path)
    loaded = load_quantized(str(tmp_path), load_spec(None), **ARGUMENTS)
    assert loaded.spec == spec and loaded.checkpoint_format == "bitquake"
    assert {(m.bits, m.symmetric) for m in loaded.model.modules() if isinstance(m, QuantizedLinear)} == {
        (3, False),
        (8, True),
    }
    build_card(
        loaded.model, loaded.spec, pretrained="x", before=loaded.before or {}
    )  # which checks it against the spec


def test_layers_that_share_scales_of_their_input_are_saved(tiny_architectures: Any, tmp_path: Path) -> None:
    model = tiny_architectures.make("qwen2_vl")
    spec = load_spec("rtn-int4-g64")
    before = quantize_model(model, spec)
    shared = torch.rand(32) + 0.5
    for name in before:
        layer = model.get_submodule(name)
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            weight = quantize_weight(layer.weight * shared, spec)
            scaled = QuantizedWeight(weight.codes, weight.scale, weight.zero, 4, weight.group_size, shared)
            new = QuantizedLinear.from_weight(scaled, bias=layer.bias, dtype=torch.float32, execution="packed")
            model.set_submodule(name, new)
    make_savable(model, spec, before, base="somewhere/model", calibration={"source": "text", "n_samples": 3})
    model.save_pretrained(tmp_path)
    loaded = load_quantized(str(tmp_path), load_spec(None), **ARGUMENTS)
    assert_equal(loaded.model, model)
    assert (loaded.base, loaded.calibration) == ("somewhere/model", {"source": "text", "n_samples": 3})


def test_a_model_without_packed_modules_cannot_be_made_savable(tiny_architectures: Any) -> None:
    with pytest.raises(QuantizationError, match="no module in the packed format"):
        make_savable(tiny_architectures.make("idefics3"), load_spec("rtn-int4-g64"), {})


def test_hooks_are_asked_for_and_told_of_each_module(tiny_architectures: Any) -> None:
    source, spec = str(tiny_architectures.checkpoint("idefics3")), load_spec("rtn-int4-g64")
    kept: dict[tuple[str, str], QuantizedWeight] = {}

    class Keep(LoadingHooks):
        started = 0

        def start(self, n_modules: int) -> None:
            self.started = n_modules

        def find(self, name: str, before: str) -> QuantizedWeight | None:
            return kept.get((name, before))

        def finished(self, name: str, before: str, weight: QuantizedWeight) -> None:
            kept[name, before] = weight

    first, second = Keep(), Keep()
    model = load_quantized(source, spec, hooks=first, **ARGUMENTS).model
    assert first.started == len(kept) == sum(isinstance(m, QuantizedLinear) for m in model.modules())
    known = dict(kept)
    for key in list(kept)[::2]:
        del kept[key]
    assert_equal(load_quantized(source, spec, hooks=second, **ARGUMENTS).model, model)
    assert kept.keys() == known.keys()  # and only what was missing was made again
    assert all((kept[key] is known[key]) == bool(i % 2) for i, key in enumerate(known))


PEAK = """
import json, sys, torch
from bitquake.model_wrappers.loading import load_quantized
from bitquake.model_wrappers.quantizers import load_spec

def held(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

load = lambda folder: load_quantized(
    folder, load_spec("rtn-int4-g64:components=vision+language:execution=packed"), revision=None, dtype=torch.bfloat16,
    device=torch.device("cpu"), device_map=None, attn_implementation=None, trust_remote_code=False,
)
torch.set_num_threads(1)
load(sys.argv[1])  # what the first use of anything takes
before = held("VmRSS")
model = load(sys.argv[2]).model
print(json.dumps(held("VmHWM") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_full_precision_model_is_never_whole_in_memory(tiny_architectures: Any, tmp_path: Path) -> None:
    config = tiny_architectures.config("idefics3", text_blocks=4)
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.head_dim = 1024, 4096, 256
    config.text_config.num_key_value_heads = 4
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    full = sum(parameter.nbytes for parameter in model.parameters())
    assert full > 100e6
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    del model
    command = [sys.executable, "-c", PEAK, str(tiny_architectures.checkpoint("idefics3")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])
    assert 0.2 * full < peak < 0.65 * full, (peak, full)  # packed 0.28; the rest is one module's working set


def test_a_weight_that_was_changed_in_a_mapped_file_survives_another_load(tiny_architectures: Any) -> None:
    source = tiny_architectures.checkpoint("smolvlm")
    first = from_pretrained(source)
    weight = first.model.text_model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(3)
    expected = weight.clone()
    from_pretrained(source, quantization_config=BitquakeConfig(WHOLE))
    assert torch.equal(weight, expected)


# what cannot be


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("gptq-int4-g64", "needs calibration data.*bitquake quantize MODEL --quant gptq-int4-g64"),
        ("none", "does not quantize"),
    ],
)
def test_methods_that_loading_cannot_carry_out_are_refused(tiny_architectures: Any, quant: str, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        from_pretrained(tiny_architectures.checkpoint("idefics3"), quantization_config=BitquakeConfig(quant))


def test_offloading_to_the_disk_is_refused(saved: Path) -> None:
    with pytest.raises(QuantizationError, match="held in memory only"):
        from_pretrained(saved, device_map={"": "disk"})


def test_a_weight_that_is_not_finite_is_named(tiny_architectures: Any, tmp_path: Path) -> None:
    model = tiny_architectures.make("idefics3")
    model.model.text_model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj \(shape \(48, 32\)\): 1 weights in rows"):
        load_quantized(str(tmp_path), load_spec("rtn-int4-g64"), **ARGUMENTS)


def test_a_weight_of_another_shape_is_an_error(tiny_architectures: Any, tmp_path: Path) -> None:
    tiny_architectures.make("idefics3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name][:40].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for quant in ("rtn-int4-g64", "none"):
        with pytest.raises(CheckpointError, match=r"up_proj\.weight.*\(40, 32\).*\(48, 32\)"):
            load_quantized(str(tmp_path), load_spec(quant), **ARGUMENTS)


@pytest.mark.parametrize("quant", ["none", WHOLE])
def test_missing_tensors_are_never_filled_with_random_numbers(
    tiny_architectures: Any, tmp_path: Path, quant: str
) -> None:
    tiny_architectures.make("idefics3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors.*layers\.1\.input_layernorm\.weight.*would be random"):
        load_quantized(str(tmp_path), load_spec(quant), **ARGUMENTS)


def test_a_file_that_is_cut_short_is_named(saved: Path, tiny_architectures: Any, tmp_path: Path) -> None:
    for source in (saved, tiny_architectures.checkpoint("idefics3")):
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        whole = (source / "model.safetensors").read_bytes()
        for length in (len(whole) - 100, 20):
            (tmp_path / "model.safetensors").write_bytes(whole[:length])
            for quant in ("none", WHOLE):
                with pytest.raises(CheckpointError, match=r"model\.safetensors: is no whole safetensors file"):
                    load_quantized(str(tmp_path), load_spec(quant), **ARGUMENTS)


def test_plain_weights_under_a_config_that_says_int4(
    damaged: Callable[..., Path], tiny_architectures: Any, saved: Path
) -> None:
    n = len(json.loads((saved / "config.json").read_text())["quantization_config"]["layouts"])
    folder = damaged()
    tiny_architectures.make("idefics3").to(torch.bfloat16).save_pretrained(folder / "plain")
    (folder / "plain" / "model.safetensors").replace(folder / "model.safetensors")
    said = rf"{n} quantized modules, but {n} of them are stored as plain BF16 weights without codes"
    with pytest.raises(CheckpointError, match=said):
        load_quantized(str(folder), load_spec(None), **ARGUMENTS)
    with pytest.raises(CheckpointError, match=said):
        from_pretrained(folder)


def _name(tensors: dict[str, torch.Tensor], leaf: str) -> str:
    return next(name for name in tensors if name.endswith(f"layers.1.mlp.up_proj.{leaf}"))


def _cast(tensors: dict[str, torch.Tensor]) -> None:
    name = _name(tensors, "scale")
    tensors[name] = tensors[name].bfloat16()


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    name = _name(tensors, "codes")
    tensors[name] = tensors[name][:, :8].contiguous()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(_name(t, "codes")), r"up_proj\.codes is in none of its files"),
        (lambda t: t.pop(_name(t, "zero")), r"up_proj\.zero is in none of its files"),
        (_cast, r"up_proj\.scale is BF16 of shape \(48, 1\) in .*model\.safetensors, not F16"),
        (_cut, r"up_proj\.codes is U8 of shape \(48, 8\) in .*, not U8 of shape \(48, 16\)"),
        (lambda t: t.pop(next(n for n in t if n.endswith("norm.weight"))), "would be random"),
    ],
)
def test_stored_tensors_that_are_not_what_the_config_says(
    damaged: Callable[..., Path], change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    folder = damaged(change)
    with pytest.raises(CheckpointError, match=said):
        from_pretrained(folder)


def _first_layout(values: dict[str, Any]) -> dict[str, Any]:
    layouts: dict[str, dict[str, Any]] = values["quantization_config"]["layouts"]
    return next(iter(layouts.values()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["quantization_config"].pop("layouts"), "names no quantized module"),
        (lambda v: _first_layout(v).update(colour="red"), "key 'colour' is unknown"),
        (lambda v: _first_layout(v).update(bits=9), "bits must be 2 to 8"),
        (lambda v: _first_layout(v).update(scale_dtype="complex64"), "complex64"),
        (lambda v: v["quantization_config"]["layouts"].update({"model.nothing": {}}), "has no such module"),
        (lambda v: v["quantization_config"]["layouts"].update({"model.text_model.norm": {}}), "a LlamaRMSNorm there"),
        (lambda v: v["quantization_config"].update(quant={"method": "rtn"}), "bits must be one of"),
    ],
)
def test_a_damaged_config_is_one_clear_error(
    damaged: Callable[..., Path], change: Callable[[dict[str, Any]], None], said: str
) -> None:
    folder = damaged(config=change)
    with pytest.raises(ValueError, match=said):
        load_quantized(str(folder), load_spec(None), **ARGUMENTS)


def test_a_card_that_says_quantized_beside_plain_weights(tiny_architectures: Any, tmp_path: Path, saved: Path) -> None:
    tiny_architectures.make("idefics3").save_pretrained(tmp_path)
    loaded = load_quantized(str(saved), load_spec(None), **ARGUMENTS)
    card = build_card(loaded.model, loaded.spec, pretrained="x", before=loaded.before or {})
    (tmp_path / "quant_card.json").write_text(card.to_json())
    with pytest.raises(CheckpointError, match=f"says rtn-int4.*{len(card.modules)} quantized modules.*full-precision"):
        load_quantized(str(tmp_path), load_spec(None), **ARGUMENTS)
    (tmp_path / "quant_card.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no quant card"):
        load_quantized(str(tmp_path), load_spec(None), **ARGUMENTS)


def test_what_may_be_asked_of_a_quantized_checkpoint(saved: Path) -> None:
    def load(quant: str | None, **arguments: Any) -> LoadedModel:
        return load_quantized(str(saved), load_spec(quant), **ARGUMENTS, **arguments)

    def executions(loaded: LoadedModel) -> set[str]:
        return {m.execution for m in loaded.model.modules() if isinstance(m, QuantizedLinear)}

    assert executions(load(None)) == {"simulated"}
    packed = load(None, execution="packed")
    assert executions(packed) == {"packed"} == {packed.spec.execution}
    assert executions(load(f"{WHOLE}:execution=packed")) == {"packed"}
    with pytest.raises(ValueError, match=r"is quantized already .*cannot be quantized again by 'rtn-int3-g64'"):
        load("rtn-int3-g64")


def test_a_checkpoint_of_an_unread_format_is_refused(damaged: Callable[..., Path]) -> None:
    folder = damaged(config=lambda values: values.update(quantization_config={"quant_method": "hqq"}))
    with pytest.raises(CheckpointError, match="quantized by 'hqq', whose checkpoints are not read here"):
        load_quantized(str(folder), load_spec(None), **ARGUMENTS)
