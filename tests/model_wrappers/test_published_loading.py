"""Published checkpoints end to end: written with the hub's key names, loaded, equal to the de-quantized model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.published.formats import PublishedFormat, read_config
from bitquake.model_wrappers.quantizers.published.grid import Grid, detect_grid, on_grid
from bitquake.model_wrappers.quantizers.published.loading import load_published
from bitquake.model_wrappers.quantizers.published.stored import PublishedCheckpointError
from bitquake.model_wrappers.quantizers.replace import quantize_weight
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

# names on the hub -> names in transformers 5, by hand
HUB_NAMES = {
    "qwen2_vl": [("model.visual.", "visual."), ("model.language_model.", "model.")],
    "llava": [
        ("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."), ("lm_head.", "language_model.lm_head."),
    ],
    "idefics3": [],
    "qwen3_vl": [],
}  # fmt: skip


def hub_name(architecture: str, name: str) -> str:
    for ours, theirs in HUB_NAMES[architecture]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def words(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as 32-bit words, lowest bits first, by long numbers."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        cut = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in cut])
    return torch.tensor(rows, dtype=torch.int32)


def unsigned_zero(weight: QuantizedWeight) -> Tensor:
    half = 1 << (weight.bits - 1)
    return torch.full_like(weight.scale, half).long() if weight.zero is None else weight.zero.long() + half


def pack_awq(weight: QuantizedWeight) -> dict[str, Tensor]:
    def eights(codes: Tensor) -> Tensor:
        return words(codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape), 4)

    return {
        "qweight": eights(weight.codes.t()), "qzeros": eights(unsigned_zero(weight).t()),
        "scales": weight.scale.t().contiguous(),
    }  # fmt: skip


def pack_gptq(version: int) -> Callable[[QuantizedWeight], dict[str, Tensor]]:
    """With the features dealt out to groups as act-order does: every second one of a pair of groups is exchanged."""

    def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
        zeros = unsigned_zero(weight).t() - int(version == 1)
        assert zeros.min() >= 0
        order = torch.arange(weight.codes.shape[1]) if weight.order is None else weight.order.long()
        codes, g_idx = torch.empty_like(weight.codes), torch.empty(len(order), dtype=torch.int32)
        codes[:, order] = weight.codes
        g_idx[order] = (torch.arange(len(order)) // weight.group_size).int()
        return {
            "qweight": words(codes.t().t(), weight.bits).t().contiguous(), "qzeros": words(zeros, weight.bits),
            "scales": weight.scale.t().contiguous(), "g_idx": g_idx,
        }  # fmt: skip

    return pack


def pack_compressed(weight: QuantizedWeight) -> dict[str, Tensor]:
    packed = {
        "weight_packed": words(weight.codes, weight.bits), "weight_shape": torch.tensor(weight.codes.shape),
        "weight_scale": weight.scale,
    }  # fmt: skip
    if weight.zero is not None:
        packed["weight_zero_point"] = words(unsigned_zero(weight).t(), weight.bits).t().contiguous()
    return packed


def pack_int8(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {"weight": (weight.codes.int() - 128).to(torch.int8), "weight_scale": weight.scale}


def ct_config(
    format_: str, bits: int, group: int | None, symmetric: bool, inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
        "group_size": group, "dynamic": False,
    }  # fmt: skip
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group_0}, "kv_cache_scheme": None,
    }  # fmt: skip


class Written:
    """A published checkpoint in a folder, and the model that it must be: plain Linears with de-quantized weights."""

    def __init__(self, path: Path, expected: nn.Module, modules: list[str]) -> None:
        self.path, self.expected, self.modules = path, expected, modules

    def load(self, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Any, dict[str, str], PublishedFormat]:
        arguments = {"execution": "simulated", "loader": AutoModelForImageTextToText, **arguments}
        return load_published(str(self.path), AutoConfig.from_pretrained(self.path), dtype=dtype, **arguments)


Write = Callable[..., Written]


@pytest.fixture
def write(tiny_architectures: Any, tmp_path: Path) -> Write:
    def write(
        architecture: str, spec: str, pack: Callable[[QuantizedWeight], dict[str, Tensor]], config: dict[str, Any],
        *, shards: int = 1, act_order: bool = False, dtype: torch.dtype = torch.float32, side_file: str = "",
    ) -> Written:  # fmt: skip
        model = tiny_architectures.make(architecture).to(dtype)
        parts, plan = component_map(model), load_spec(spec)
        modules = [
            name for name, module in model.named_modules()
            if type(module) is nn.Linear and parts.component(name) in plan.components
        ]  # fmt: skip
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        for name in modules:
            weight = quantize_weight(state.pop(f"{name}.weight"), plan)
            if weight.zero is not None:
                weight = replace(weight, zero=weight.zero.clamp(min=1 - (1 << (weight.bits - 1))))
            if act_order:
                n = weight.codes.shape[1]
                weight = replace(weight, order=torch.randperm(n, generator=generator).int())
            model.get_submodule(name).weight.data = weight.dequantize(dtype)
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in pack(weight).items()})
        tied = getattr(model, "all_tied_weights_keys", {})
        named = {
            hub_name(architecture, name): tensor.contiguous() for name, tensor in state.items() if name not in tied
        }
        values = json.loads(model.config.to_json_string())
        if side_file:
            (tmp_path / side_file).write_text(json.dumps(config))
        elif config:
            values["quantization_config"] = config
        (tmp_path / "config.json").write_text(json.dumps(values))
        if shards == 1:
            save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
        else:
            where = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(named)}
            for file in set(where.values()):
                part = {key: tensor for key, tensor in named.items() if where[key] == file}
                save_file(part, tmp_path / file, metadata={"format": "pt"})
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return Written(tmp_path, model.eval(), modules)

    return write


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}

FORMATS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "awq": ("rtn-int4-g64:group_size=16", pack_awq, AWQ, {}),
    "awq symmetric": ("rtn-int4-g64:group_size=16:symmetric=true", pack_awq, AWQ, {}),
    "gptq v1": ("rtn-int4-g64:group_size=16", pack_gptq(1), GPTQ, {}),
    "gptq v2 act-order": (
        "rtn-int4-g64:group_size=16", pack_gptq(2), GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True},
        {"act_order": True},
    ),
    "gptq int8": ("rtn-int8-g64:group_size=16", pack_gptq(1), GPTQ | {"bits": 8}, {}),
    "gptq int2": ("rtn-int2-g64:group_size=16", pack_gptq(2), GPTQ | {"bits": 2, "checkpoint_format": "gptq_v2"}, {}),
    "gptq int3": ("rtn-int3-g64:group_size=16", pack_gptq(1), GPTQ | {"bits": 3}, {"shards": 3}),
    "packed": ("rtn-int4-g64:group_size=16", pack_compressed, ct_config("pack-quantized", 4, 16, False), {}),
    "packed int8": (
        "rtn-int8-g64:group_size=channel:symmetric=true", pack_compressed,
        ct_config("pack-quantized", 8, None, True), {},
    ),
    "int8": (
        "rtn-int8-g64:group_size=channel:symmetric=true", pack_int8, ct_config("naive-quantized", 8, None, True), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("architecture", ["qwen2_vl", "llava"])
def test_logits_are_those_of_the_dequantized_model(
    architecture: str, kind: str, write: Write, tiny_architectures: Any
) -> None:
    spec, pack, config, more = FORMATS[kind]
    written = write(architecture, spec, pack, config, **more)
    inputs = tiny_architectures.example(architecture).inputs
    with torch.inference_mode():
        expected = written.expected(**inputs).logits
    for execution in ("simulated", "packed"):
        model, hashes, published = written.load(execution=execution)
        quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        assert sorted(quantized) == sorted(hashes) == sorted(written.modules)
        assert {m.execution for m in quantized.values()} == {execution} and not model.training
        assert {m.bits for m in quantized.values()} == {published.bits}
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, expected)
        assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    symmetric = kind in ("awq symmetric", "packed int8", "int8")
    assert all(m.symmetric == symmetric for m in quantized.values())
    assert all((m.order is not None) == ("act-order" in kind) for m in quantized.values())


def assert_equal_logits(model: Any, expected: Any, inputs: dict[str, Any], folder: Path) -> None:
    """In bfloat16, the expected model loaded as one is: ``.to`` would round its positions, too."""
    expected.save_pretrained(folder)
    expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


def test_every_component_and_sixteen_bit_weights(write: Write, tiny_architectures: Any, tmp_path: Path) -> None:
    """Vision, connector and language, in the names that transformers 5 itself writes, and a bfloat16 model."""
    spec = "rtn-int4-g64:group_size=8:symmetric=true:components=vision+connector+language"
    config = ct_config("pack-quantized", 4, 8, True)
    written = write("idefics3", spec, pack_compressed, config, dtype=torch.bfloat16, shards=2)
    model, _, _ = written.load(torch.bfloat16)
    assert_equal_logits(model, written.expected, tiny_architectures.example("idefics3").inputs, tmp_path / "dense")
    components = {component_map(written.expected).component(name) for name in written.modules}
    assert components == {"vision", "connector", "language"}
    for name in written.modules:
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, written.expected.get_submodule(name).weight)
        assert layer.weight.dtype == torch.bfloat16


def test_a_device_map_is_followed(write: Write) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_awq, AWQ)
    model, hashes, _ = written.load(execution="packed", device_map="cpu")
    for name in hashes:
        assert torch.equal(model.get_submodule(name).weight, written.expected.get_submodule(name).weight)


def test_answers_through_the_wrapper(
    write: Write, tiny_architectures: Any, load: Any, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    """``pretrained=`` a published checkpoint gives the answers of the de-quantized model, and says what it is."""
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_gptq(1), GPTQ)
    tiny_architectures.processor("qwen2_vl").save_pretrained(written.path)
    dense = tmp_path / "dense"
    written.expected.save_pretrained(dense)
    tiny_architectures.processor("qwen2_vl").save_pretrained(dense)
    docs = random_docs(6)
    answers = [chat_task(docs).run(load(pretrained=str(path))) for path in (written.path, dense)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_activations_per_token_are_carried_out(write: Write, tiny_architectures: Any) -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = ct_config("int-quantized", 8, None, True, inputs)
    written = write("qwen2_vl", "rtn-int8-g64:group_size=channel:symmetric=true", pack_int8, config)
    model, _, published = written.load()
    assert published.schemes[0].activation_bits == 8
    inputs = tiny_architectures.example("qwen2_vl").inputs
    reference = copy.deepcopy(written.expected)

    def round_input(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        x = arguments[0]
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        return ((x / step).round() * step,)

    for name in written.modules:
        reference.get_submodule(name).register_forward_pre_hook(round_input)
    with torch.inference_mode():
        plain, expected, found = (m(**inputs).logits for m in (written.expected, reference, model))
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize(("file", "settings"), [
    ("quant_config.json", {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}),
    ("quantize_config.json", {"bits": 4, "group_size": 16, "desc_act": False, "sym": False}),
    ("awq_quantized_modules.json", {"bits": 4, "group_size": 128, "modules": ["…"]}),
])  # fmt: skip
def test_settings_beside_config_json(file: str, settings: dict[str, Any], write: Write) -> None:
    """As AutoAWQ, AutoGPTQ and GRACE's packer write them."""
    pack = pack_gptq(1) if file == "quantize_config.json" else pack_awq
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack, settings, side_file=file)
    assert read_config(AutoConfig.from_pretrained(written.path)) is None
    published = read_config(written.path)
    assert published is not None and published.source == file
    assert (published.method, published.variant, published.bits) == {
        "quant_config.json": ("awq", "gemm", 4), "quantize_config.json": ("gptq", "v1", 4),
        "awq_quantized_modules.json": ("grace", "packed", 4),
    }[file]  # fmt: skip
    model, hashes, _ = written.load(published=published)
    assert len(hashes) == len(written.modules) > 0
    name = written.modules[0]
    assert torch.equal(model.get_submodule(name).weight, written.expected.get_submodule(name).weight)


def test_the_file_name_that_autogptq_gave(write: Write) -> None:
    settings = {"bits": 4, "group_size": 16, "desc_act": False, "model_file_base_name": "gptq_model-4bit-16g"}
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_gptq(1), settings, side_file="quantize_config.json")
    (written.path / "model.safetensors").rename(written.path / "gptq_model-4bit-16g.safetensors")
    _, hashes, _ = written.load()
    assert sorted(hashes) == sorted(written.modules)


# GRACE


@pytest.fixture
def grace(tiny_architectures: Any, tmp_path: Path) -> Iterator[tuple[Path, Any, dict[str, Tensor]]]:
    """As GRACE's training ends: BF16 weights of the language model on a grid of its own scales, and the sidecar."""
    model = tiny_architectures.make("qwen3_vl").to(torch.bfloat16)
    generator, sidecar = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.startswith("model.language_model"):
            groups = module.weight.data.float().reshape(-1, 16)
            scale = (
                groups.abs().amax(1, keepdim=True) / 7 * (0.7 + 0.4 * torch.rand(len(groups), 1, generator=generator))
            )
            log_scale = scale.log()
            scale = log_scale.exp()
            baked = ((groups / scale).round().clamp(-8, 7) * scale).reshape(module.weight.shape).bfloat16()
            module.weight.data = baked
            sidecar |= {f"{name}.weight": baked.clone(), f"{name}.log_scale": log_scale.flatten()}
    model.save_pretrained(tmp_path)
    torch.save(sidecar, tmp_path / "qat_quantized_weights.bin")
    yield tmp_path, model.eval(), sidecar


def test_grace_with_its_sidecar(grace: tuple[Path, Any, dict[str, Tensor]], tiny_architectures: Any) -> None:
    path, expected, sidecar = grace
    published = read_config(path)
    assert published is not None and (published.method, published.variant) == ("grace", "sidecar")
    model, hashes, _ = load_published(
        str(path), AutoConfig.from_pretrained(path), loader=AutoModelForImageTextToText, dtype=torch.bfloat16,
        execution="packed", published=published,
    )  # fmt: skip
    assert {f"{name}.log_scale" for name in hashes} == {key for key in sidecar if key.endswith("log_scale")}
    for name in hashes:
        layer = model.get_submodule(name)
        assert (layer.bits, layer.group_size, layer.symmetric) == (4, 16, True)
        assert torch.equal(layer.weight, expected.get_submodule(name).weight)
    assert_equal_logits(model, expected, tiny_architectures.example("qwen3_vl").inputs, path / "dense")


def test_grace_without_its_sidecar_is_recognised(grace: tuple[Path, Any, dict[str, Tensor]]) -> None:
    """A plain BF16 checkpoint, by every sign but its weights: the language model's, and no others."""
    path, _, sidecar = grace
    (path / "qat_quantized_weights.bin").unlink()
    assert read_config(path) is None
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)
    weight = sidecar["model.language_model.layers.0.mlp.down_proj.weight"]
    assert detect_grid(weight, group_sizes=[16]) == Grid(4, 16, True, weight.numel() // 16)
    names = {key.removesuffix(".weight") for key in sidecar if key.endswith(".weight")}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            assert (detect_grid(module.weight, group_sizes=[16]) is not None) == (name in names)
    assert on_grid(model) == {}  # groups of 16 are none that are published


# what is not what it says


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def test_a_config_that_says_int4_over_plain_tensors(tiny_architectures: Any, tmp_path: Path) -> None:
    model = tiny_architectures.make("llava").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": AWQ}))
    published = read_config(tmp_path)
    assert published is not None and str(published) == "awq gemm, 4 bits, groups of 16 (config.json)"
    written = Written(tmp_path, model, [])
    with pytest.raises(PublishedCheckpointError) as caught:
        written.load()
    for text in (
        "awq gemm, 4 bits, groups of 16 (config.json) says that it is quantized, but its tensors are not",
        "is plain BF16 of shape (", "no module has qweight", "remove the quantization settings",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_a_file_that_was_cut_short(write: Write) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_awq, AWQ)
    whole = (written.path / "model.safetensors").read_bytes()
    (written.path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(PublishedCheckpointError, match=r"model\.safetensors is no whole safetensors file .*cut short"):
        written.load()


def test_a_shard_that_is_missing(write: Write) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_awq, AWQ, shards=3)
    (written.path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(PublishedCheckpointError, match=r"model-00002-of-00003\.safetensors.*download"):
        written.load()


def test_a_pickle_is_not_loaded(write: Write) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_awq, AWQ)
    torch.save(load_file(written.path / "model.safetensors"), written.path / "pytorch_model.bin")
    (written.path / "model.safetensors").unlink()
    with pytest.raises(PublishedCheckpointError, match="Only safetensors are loaded, never pickles"):
        written.load()


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{UP}.scales"), rf"{UP}: scales is missing beside g_idx, qweight, qzeros"),
        (lambda s: s.pop("model.norm.weight"), r"1 tensors of the model are in no file \(first .*norm.weight\)"),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith(f"{UP}.")], "tensors of the model are in no file"),
        (lambda s: s.update({f"{UP}.qweight": s[f"{UP}.qweight"][:, :40].clone()}), rf"{UP}: qweight is int32 of"),
        (lambda s: s.update({f"{UP}.qweight": s[f"{UP}.qweight"][:3].clone()}), "which is 3 bits; the config says 4"),
        (lambda s: s.update({"model.layers.9.x.qweight": s[f"{UP}.qweight"].clone()}), "layers.9.x .* no module takes"),
        (lambda s: s.update({"model.norm.qweight": s[f"{UP}.qweight"].clone()}), "is a .*RMSNorm, not a Linear"),
        (lambda s: s.update({"model.layers.0.mlp.act.scales": torch.ones(4)}), "act"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], None], message: str, write: Write
) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_gptq(1), GPTQ)
    edit(written.path, change)
    with pytest.raises(PublishedCheckpointError, match=message):
        written.load()


def test_an_output_head_that_is_tied_and_quantized_is_refused(write: Write) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_gptq(1), GPTQ)
    values = json.loads((written.path / "config.json").read_text())
    values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = True
    (written.path / "config.json").write_text(json.dumps(values))
    edit(written.path, lambda s: s.update({"lm_head.qweight": s[f"{UP}.qweight"].clone()}))
    with pytest.raises(PublishedCheckpointError, match="lm_head quantized, which its config ties"):
        written.load()


def test_gptq_zero_points_of_0_are_reported(write: Write, log: list[str]) -> None:
    written = write("qwen2_vl", "rtn-int4-g64:group_size=16", pack_gptq(1), GPTQ)
    edit(written.path, lambda s: s[f"{UP}.qzeros"].view(-1)[:1].fill_(0x7777776F))
    model, _, _ = written.load()
    zero = model.get_submodule("model.language_model.layers.0.mlp.up_proj").zero
    assert zero[:8, 0].tolist() == [-8, 0, 0, 0, 0, 0, 0, 0]
    assert any(
        re.search("1 zero-points in 1 modules .*up_proj.* are 0, which GPTQ v1 cannot store", line) for line in log
    )


# config.json


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AWQ | {"version": "gemv"}, "AWQ version 'gemv' is not read, gemm is"),
        (AWQ | {"version": "GEMV_FAST"}, "gemv_fast"),
        (AWQ | {"version": "marlin"}, "marlin"),
        (AWQ | {"version": "exllama"}, "exllama"),
        (AWQ | {"backend": "llm-awq"}, "llm-awq"),
        (AWQ | {"bits": 3}, "has 4 bits, and the config says 3"),
        (AWQ | {"bits": "four"}, "bits must be a whole number, got 'four'"),
        (GPTQ | {"bits": 5}, "2, 3, 4, 8 bits are read, and the config says 5"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        (GPTQ | {"is_marlin_format": True}, "marlin"),
        (GPTQ | {"checkpoint_format": "gptq_p"}, "gptq_p"),
        (ct_config("float-quantized", 8, None, True), "config.json: compressed-tensors format 'float-quantized'"),
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PublishedCheckpointError, match=message):
        read_config({"quantization_config": settings})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None),
        ({"quantization_config": {"quant_method": "bitquake"}}, None),
        ({"quantization_config": GPTQ | {"checkpoint_format": "gptq_v2"}}, ("gptq", "v2", 4, 16)),
        ({"text_config": {"quantization_config": GPTQ}}, ("gptq", "v1", 4, 16)),
        ({"quantization_config": GPTQ | {"dynamic": {"-:.*up.*": {}}}}, ("gptq", "v1", None, None)),
        ({"quantization_config": AWQ | {"group_size": -1}}, ("awq", "gemm", 4, -1)),
        ({"quantization_config": {"quant_method": "awq", "format": "gemm", "bits": 4}}, ("awq", "gemm", 4, None)),
        (
            {"compression_config": ct_config("pack-quantized", 4, 128, False)},
            ("compressed-tensors", "pack-quantized", 4, 128),
        ),
        ({"awq_packing": {"bits": 4, "group_size": 128, "version": "gemm"}}, ("grace", "packed", 4, None)),
    ],
)  # fmt: skip
def test_what_a_config_says(config: dict[str, Any], expected: tuple[Any, ...] | None) -> None:
    found = read_config(config)
    told = None if found is None else (found.method, found.variant, found.bits, found.group_size)
    assert told == expected


def test_settings_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PublishedCheckpointError, match=r"config\.json is no JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PublishedCheckpointError, match="expected one object, got list"):
        read_config(tmp_path)
