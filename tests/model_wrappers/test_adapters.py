"""LoRA adapters on quantized layers of every kind: the adapter's term is added to what the quantized layer computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.loading import put_adapter_on
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.libraries.facts import library_facts
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.replace import quantize_linear, quantize_model
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 12
EVERYWHERE = ":components=vision+connector+language"
KINDS = [
    "none", "rtn-int3-g64", "rtn-int3-g64:execution=packed", "rtn-w8a8", "bnb-nf4", "bnb-fp4", "bnb-int8",
    "torchao-int8", "torchao-int8-dynamic", "torchao-fp8",
]  # fmt: skip
# every component has an adapted layer: of the vision tower, the connector and the language model
TARGETS = {
    "idefics3": r".*(vision_model.*out_proj|modality_projection\.proj|text_model.*(q_proj|down_proj))",
    "qwen2_5_vl": r".*(visual.*(qkv|gate_proj)|merger\.mlp\.0|language_model.*(v_proj|up_proj))",
    "qwen3_vl": r".*(visual.*linear_fc1|deepstack_merger_list\.0\.linear_fc2|language_model.*o_proj)",
    "llava_onevision": r".*(vision_tower.*k_proj|multi_modal_projector\.linear_1|language_model.*gate_proj)",
    "paligemma": r".*(vision_tower.*fc2|multi_modal_projector\.linear|language_model.*q_proj)",
    "blip-2": r".*(vision_model.*qkv|qformer.*(attention\.query|output\.dense)|language_model.*(fc1|out_proj))",
}
Save = Callable[..., Path]


@pytest.fixture(scope="module")
def save_adapter(tiny_architectures: Any, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """``save_adapter(architecture)``: folder of a LoRA adapter as peft saves it, none of its matrices zero."""
    made: dict[str, Path] = {}

    def save_adapter(name: str) -> Path:
        if name not in made:
            torch.manual_seed(1)
            lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[name], init_lora_weights=False)
            made[name] = tmp_path_factory.mktemp(f"lora_{name}")
            peft.get_peft_model(tiny_architectures.make(name), lora).save_pretrained(made[name])
        return made[name]

    return save_adapter


def matrices(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (rank, in) and B (out, rank), from the file."""
    stored = load_file(folder / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in stored}
    at = "base_model.model.{}.lora_{}.weight".format
    return {name: (stored[at(name, "A")], stored[at(name, "B")]) for name in names}


def record(model: nn.Module, names: list[str]) -> dict[str, list[Tensor]]:
    """Input and output of modules in every later forward pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen[name].extend((args[0].detach().clone(), y.detach().clone()))
        )
    return seen


@pytest.mark.parametrize(
    ("name", "quant"), [*(("qwen2_5_vl", kind) for kind in KINDS), *((n, "rtn-int4-g64") for n in TARGETS),
                        ("blip-2", "bnb-nf4"), ("paligemma", "torchao-fp8"), ("idefics3", "rtn-int2-g64")],
)  # fmt: skip
def test_an_adapted_layer_adds_its_term_to_the_quantized_one(
    tiny_architectures: Any, save_adapter: Save, name: str, quant: str
) -> None:
    adapter, example = save_adapter(name), tiny_architectures.example(name)
    quant = quant if quant == "none" else quant + EVERYWHERE
    base, model = tiny_architectures.make(name), tiny_architectures.make(name)
    quantize_model(base, load_spec(quant))
    quantize_model(model, load_spec(quant))
    adapted, digest = put_adapter_on(model, str(adapter))
    assert len(digest) == 32
    lora = matrices(adapter)
    components = ("vis", "connector|merger|projector|qformer", "language|text")
    assert all(any(part in n for n in lora for part in each.split("|")) for each in components)
    seen = record(adapted, list(lora))
    with torch.inference_mode():
        after, before = adapted(**example.inputs).logits, base(**example.inputs).logits
        assert float((after - before).abs().max()) > 0.1
        for module, (a, b) in lora.items():
            x, y = seen[module]
            layer = base.get_submodule(module)
            found = library_facts(layer)
            plain = functional.linear(x, found.weight() if found else layer.weight, layer.bias)
            if quant.startswith(("rtn-w8a8", "bnb-int8", "torchao-int8-dynamic")):  # the inputs are rounded, too
                assert not torch.allclose(layer(x), plain, atol=1e-5)
                plain = layer(x)
            expected = plain + ALPHA / RANK * (x @ a.T @ b.T)
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_input_scales_and_column_order_of_the_base_do_not_touch_the_adapter(
    tiny_architectures: Any, save_adapter: Save
) -> None:
    """As AWQ and act-order GPTQ leave them: x / input_scale and stored columns are the base layer's own affair."""
    model, adapter = tiny_architectures.make("qwen2_5_vl"), save_adapter("qwen2_5_vl")
    generator = torch.Generator().manual_seed(3)
    lora, layers = matrices(adapter), {}
    for i, name in enumerate(sorted(lora)):
        linear = model.get_submodule(name)
        rows, columns = linear.weight.shape
        weight = QuantizedWeight(
            codes=torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator),
            scale=torch.rand((rows, -(-columns // 16)), generator=generator).half() / 20 + 0.01, zero=None, bits=4,
            group_size=16, input_scale=torch.rand(columns, generator=generator) + 0.5,
            order=torch.randperm(columns, generator=generator).int(),
        )  # fmt: skip
        layers[name] = QuantizedLinear.from_weight(
            weight, bias=linear.bias, dtype=torch.float32, execution="packed" if i % 2 else "simulated",
            activation_bits=8 if i % 3 == 0 else None,
        )  # fmt: skip
        model.set_submodule(name, layers[name])
    adapted, _ = put_adapter_on(model, str(adapter))
    seen = record(adapted, list(lora))
    with torch.inference_mode():
        adapted(**tiny_architectures.example("qwen2_5_vl").inputs)
        for name, (a, b) in lora.items():
            x, y = seen[name]
            layer = layers[name]
            expected = layer(x) + ALPHA / RANK * (x @ a.T @ b.T)
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
            if layer.activation_bits is None:
                assert torch.allclose(layer(x), functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_a_kernel_goes_on_computing_beneath_an_adapter(tmp_path: Path) -> None:
    """peft asks the whole model for its state dict, and loads the adapter's into the whole model."""
    torch.manual_seed(0)

    def model() -> nn.Module:
        return nn.ModuleDict({"proj": nn.Linear(256, 64)}).bfloat16()

    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["proj"], init_lora_weights=False)
    peft.get_peft_model(model(), lora).save_pretrained(tmp_path)
    holder = model()
    layer = quantize_linear(holder.get_submodule("proj"), load_spec("rtn-int4-g64:execution=packed"))
    if (reason := layer.use_kernel()) is not None:
        pytest.skip(f"no int4 kernel here: {reason}")
    kernel, x = layer.kernel, torch.randn(1, 256).bfloat16()
    expected = layer(x)
    holder.set_submodule("proj", layer)
    adapted, _ = put_adapter_on(holder, str(tmp_path))
    base = adapted.get_submodule("proj.base_layer")
    assert base is layer and layer.kernel is kernel and torch.equal(base(x), expected)
    ((a, b),) = matrices(tmp_path).values()
    y = adapted.get_submodule("proj")(x)
    assert torch.allclose(y.float(), expected.float() + ALPHA / RANK * (x.float() @ a.T @ b.T), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quant", ["rtn-int4-g64:execution=packed", "bnb-nf4", "torchao-int8"])
def test_a_bfloat16_model_answers_in_bfloat16(tiny_architectures: Any, save_adapter: Save, quant: str) -> None:
    example = tiny_architectures.example("idefics3")
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in example.inputs.items()}
    model = tiny_architectures.make("idefics3").bfloat16()
    quantize_model(model, load_spec(quant + EVERYWHERE))
    with torch.inference_mode():
        before = model(**inputs).logits
    adapted, _ = put_adapter_on(model, str(save_adapter("idefics3")))
    with torch.inference_mode():
        after = adapted(**inputs).logits
    assert after.dtype == torch.bfloat16 and bool(after.isfinite().all())
    assert float((after - before).abs().max()) > 0.1


def test_an_adapter_of_other_modules_is_refused(tiny_architectures: Any, save_adapter: Save, tmp_path: Path) -> None:
    """peft leaves what it does not find at zero, and warns: the run would be of the bare model."""
    source = save_adapter("idefics3")
    stored = load_file(source / "adapter_model.safetensors")
    renamed = {key.replace("text_model.layers.1.", "text_model.blocks.1."): value for key, value in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"adapter=.* does not fit .*layers\.1\..*lora_A"):
        put_adapter_on(tiny_architectures.make("idefics3"), str(tmp_path))
    settings = json.loads((source / "adapter_config.json").read_text())
    settings["target_modules"] = "no_such_module"
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no_such_module"):
        put_adapter_on(tiny_architectures.make("idefics3"), str(tmp_path))
