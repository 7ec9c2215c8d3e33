"""Component maps, each on a tiny random model of its architecture: every Linear in exactly one cell, counts by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Blip2ForImageTextRetrieval,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)

from bitquake.model_wrappers.components import ARCHITECTURES, Cell, ComponentMapError, cells, component_map
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.plan import quantizable
from bitquake.model_wrappers.quantizers.replace import quantize_model

N_VISION, N_TEXT = 4, 5  # blocks: thirds of 1+1+2 and 1+2+2

# Linear modules per (component, kind), counted by hand from the architecture.
SPLIT_TOWER = {("vision", "attention"): 4 * N_VISION, ("vision", "mlp"): 2 * N_VISION}  # q, k, v, out; fc1, fc2
FUSED_TOWER = {("vision", "attention"): 2 * N_VISION, ("vision", "mlp"): 2 * N_VISION}  # qkv, proj; fc1, fc2
GATED = {("language", "attention"): 4 * N_TEXT, ("language", "mlp"): 3 * N_TEXT, ("other", "other"): 1}
EXPECTED: dict[str, dict[tuple[str, str], int]] = {
    "idefics3": SPLIT_TOWER | GATED | {("connector", "other"): 1},
    "smolvlm": SPLIT_TOWER | GATED | {("connector", "other"): 1},
    "qwen2_vl": FUSED_TOWER | GATED | {("connector", "other"): 2},
    "qwen2_5_vl": FUSED_TOWER | GATED | {("vision", "mlp"): 3 * N_VISION, ("connector", "other"): 2},
    "qwen3_vl": FUSED_TOWER | GATED | {("connector", "other"): 2 + 2 * 2},  # merger and two deepstack mergers
    "llava": SPLIT_TOWER | GATED | {("connector", "other"): 2},
    "llava_onevision": SPLIT_TOWER | GATED | {("connector", "other"): 2},
    "paligemma": SPLIT_TOWER | GATED | {("connector", "other"): 1},
    # Q-Former: as many layers as the tower, cross-attention in layers 0 and 2; its dense layers; the projection
    "blip-2": FUSED_TOWER | {
        ("language", "attention"): 4 * N_TEXT, ("language", "mlp"): 2 * N_TEXT, ("other", "other"): 1,
        ("connector", "attention"): 4 * 4 + 4 * 2, ("connector", "mlp"): 2 * 4, ("connector", "other"): 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_architectures: Any) -> Callable[..., nn.Module]:
    """A model without values: the thirds of its 4 and 5 blocks are unequal. Keywords change its configuration."""

    def tiny(model_type: str, **changes: Any) -> nn.Module:
        config = tiny_architectures.config(model_type, vision_blocks=N_VISION, text_blocks=N_TEXT)
        for key, values in changes.items():
            part = getattr(config, key)
            setattr(config, key, type(part)(**{**part.to_dict(), **values}))
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)

    return tiny


def test_every_map_has_a_model(tiny_architectures: Any) -> None:
    assert set(tiny_architectures.names) == set(EXPECTED) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", [*sorted(ARCHITECTURES), "paligemma2"])
def test_every_linear_stands_in_one_cell(tiny: Callable[..., nn.Module], model_type: str) -> None:
    model = tiny(model_type)
    parts, found = component_map(model), cells(model)
    assert list(found) == [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    expected = EXPECTED[model_type.removesuffix("2") if model_type == "paligemma2" else model_type]
    assert Counter((c.component, c.kind) for c in found.values()) == Counter(expected)
    for name, cell in found.items():
        assert parts.component(name) == cell.component
        assert parts.cell(name) == cell
        held_by = [p.component for p in parts.parts for path in p.paths if f"{name}.".startswith(f"{path}.")]
        assert len(held_by) == 1 or sorted(held_by) in (["connector", "vision"], ["language", "other"])
        assert (cell.third is None) == (cell.kind == "other")
    # thirds [0, n//3), [n//3, 2n//3), [2n//3, n): by hand for 4 and for 5 blocks
    for component, blocks in (
        ("vision", {"front": 1, "middle": 1, "end": 2}),
        ("language", {"front": 1, "middle": 2, "end": 2}),
    ):
        thirds = Counter(c.third for c in found.values() if c.component == component)
        per_block = sum(thirds.values()) // sum(blocks.values())
        assert thirds == Counter({third: n * per_block for third, n in blocks.items()})


@pytest.mark.parametrize(
    ("model_type", "name", "cell"),
    [
        ("idefics3", "model.vision_model.encoder.layers.0.self_attn.out_proj", Cell("vision", "front", "attention")),
        ("idefics3", "model.text_model.layers.2.mlp.gate_proj", Cell("language", "middle", "mlp")),
        ("idefics3", "model.text_model.embed_tokens", Cell("language")),
        ("idefics3", "model.connector.modality_projection.proj", Cell("connector")),
        ("idefics3", "lm_head", Cell("other")),
        ("qwen2_vl", "model.visual.merger.mlp.0", Cell("connector")),
        ("qwen2_vl", "model.visual.patch_embed.proj", Cell("vision")),
        ("qwen3_vl", "model.visual.deepstack_merger_list.1.linear_fc2", Cell("connector")),
        ("blip-2", "qformer.encoder.layer.0.crossattention.output.dense", Cell("connector", "front", "attention")),
        ("blip-2", "qformer.encoder.layer.2.output_query.dense", Cell("connector", "end", "mlp")),
        ("blip-2", "language_model.lm_head", Cell("other")),
        ("llava", "model.language_model.layers.4.self_attn.q_proj", Cell("language", "end", "attention")),
    ],
)
def test_cells_by_hand(tiny: Callable[..., nn.Module], model_type: str, name: str, cell: Cell) -> None:
    model = tiny(model_type)
    assert name in dict(model.named_modules())
    assert component_map(model).cell(name) == cell


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_quantizes_and_runs(tiny_architectures: Any, model_type: str) -> None:
    example, logits = tiny_architectures.example(model_type), {}
    for execution in ("none", "simulated", "packed"):
        model = tiny_architectures.make(model_type)
        every_linear = cells(model)
        quant = (
            "" if execution == "none" else f"rtn-int3-g64:components=vision+connector+language:execution={execution}"
        )
        before = quantize_model(model, load_spec(quant))
        assert set(before) == ({n for n, c in every_linear.items() if c.component != "other"} if quant else set())
        with torch.inference_mode():
            logits[execution] = model(**example.inputs).logits
    assert torch.equal(logits["simulated"], logits["packed"])
    assert logits["packed"].isfinite().all() and not torch.equal(logits["none"], logits["packed"])


def test_blip2_with_t5_has_two_stacks(tiny_architectures: Any) -> None:
    config = tiny_architectures.config("blip-2")
    config.text_config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.use_decoder_only_language_model = False
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    found = Counter((c.kind, c.third) for c in cells(model).values() if c.component == "language")
    # a third is one block each of encoder (4 + 3) and decoder (4 + 4 + 3)
    assert found == Counter({(k, t): n for k, n in (("attention", 12), ("mlp", 6)) for t in ("front", "middle", "end")})


def test_blip2_retrieval_has_a_text_branch_and_no_language_model(tiny_architectures: Any) -> None:
    """``use_qformer_text_input``: every Q-Former layer has a second pair of dense layers, for the words."""
    config = tiny_architectures.config("blip-2", vision_blocks=N_VISION)
    config.qformer_config.use_qformer_text_input = True
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(config)
    found = cells(model)
    assert Counter((c.component, c.kind) for c in found.values()) == Counter(
        FUSED_TOWER
        | {("connector", "attention"): 4 * 4 + 4 * 2, ("connector", "mlp"): (2 + 2) * 4, ("other", "other"): 3}
    )
    assert found["qformer.encoder.layer.1.output.dense"] == Cell("connector", "middle", "mlp")
    assert {n for n, c in found.items() if c.component == "other"} == {
        "itm_head", "vision_projection", "text_projection",
    }  # fmt: skip


@pytest.mark.parametrize("model_type", ["llava_onevision", "paligemma"])
def test_a_pooling_head_of_siglip_belongs_to_the_tower_and_to_no_block(
    tiny: Callable[..., nn.Module], model_type: str
) -> None:
    found = cells(tiny(model_type, vision_config={"vision_use_head": True}))
    extra = {name: cell for name, cell in found.items() if ".head." in name}
    assert set(found) - set(extra) == set(cells(tiny(model_type)))
    assert sorted(name.partition(".head.")[2] for name in extra) == ["attention.out_proj", "mlp.fc1", "mlp.fc2"]
    assert set(extra.values()) == {Cell("vision")}
    # nn.MultiheadAttention reads the weight of its output and never calls it
    left_out = found.keys() - quantizable(tiny(model_type, vision_config={"vision_use_head": True})).keys()
    assert {name for name in left_out if found[name].component != "other"} == {
        name for name in extra if name.endswith("attention.out_proj")
    }


def test_unknown_architecture_is_refused_with_what_is_missing() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(ComponentMapError) as caught:
        component_map(model)
    for word in (
        "'llama' (LlamaForCausalLM)",
        "lm_head, model.layers",
        "idefics3",
        "vision, connector and language paths",
    ):
        assert word in str(caught.value)


def test_a_linear_that_no_part_holds_is_refused(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llava")
    model.extra_head = nn.Linear(4, 4)
    with pytest.raises(ComponentMapError, match="covers 62 of 63 Linear modules; missing: extra_head"):
        component_map(model)


def test_half_a_model_is_refused(tiny: Callable[..., nn.Module]) -> None:
    with pytest.raises(ComponentMapError, match=r"has no model.vision_model, .*, lm_head; load the whole model"):
        component_map(tiny("idefics3").model)
