"""Component maps, each on a tiny random model of its architecture: every Linear in exactly one cell, counts by hand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from bitquake.model_wrappers.components import ARCHITECTURES, Cell, ComponentMapError, component_map
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.replace import quantize_model

N_VISION, N_TEXT = 4, 5  # blocks: thirds of 1+1+2 and 1+2+2

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": N_TEXT, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": N_VISION, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def _idefics3() -> dict[str, Any]:
    return {
        "vision_config": TOWER,
        "text_config": {"model_type": "llama", **TEXT},
        "scale_factor": 2,
        "image_token_id": 9,
    }


def _tower(text: str, tower: str) -> dict[str, Any]:
    vision = {"model_type": tower, **TOWER} | ({"vision_use_head": False} if tower == "siglip_vision_model" else {})
    return {"vision_config": vision, "text_config": {"model_type": text, **TEXT}, "image_token_index": 9}


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "qwen2_vl": lambda: {
        "vision_config": {"depth": N_VISION, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        "text_config": TEXT | ROPE,
    },
    "qwen2_5_vl": lambda: {
        "vision_config": {"depth": N_VISION, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2,
                          "intermediate_size": 40, "fullatt_block_indexes": [1]},
        "text_config": TEXT | ROPE,
    },
    "qwen3_vl": lambda: {
        "vision_config": {"depth": N_VISION, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2,
                          "intermediate_size": 40, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 16},
        "text_config": TEXT | ROPE,
    },
    "llava": lambda: _tower("llama", "clip_vision_model"),
    "llava_onevision": lambda: _tower("qwen2", "siglip_vision_model"),
    "paligemma": lambda: _tower("gemma", "siglip_vision_model") | {"projection_dim": 32},
    "blip-2": lambda: {
        "vision_config": TOWER,
        "qformer_config": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40,
                           "encoder_hidden_size": 24, "cross_attention_frequency": 2, "vocab_size": 64},
        "text_config": {"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48,
                        "word_embed_proj_dim": 32, "num_hidden_layers": N_TEXT, "num_attention_heads": 4,
                        "max_position_embeddings": 64},
        "num_query_tokens": 4,
    },
}  # fmt: skip

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
    # Q-Former: 3 layers, cross-attention in layers 0 and 2; its dense layers; the projection
    "blip-2": FUSED_TOWER | {
        ("language", "attention"): 4 * N_TEXT, ("language", "mlp"): 2 * N_TEXT, ("other", "other"): 1,
        ("connector", "attention"): 4 * 3 + 4 * 2, ("connector", "mlp"): 2 * 3, ("connector", "other"): 1,
    },
}  # fmt: skip


def tiny(model_type: str) -> nn.Module:
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type]())
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_every_map_has_a_model() -> None:
    assert set(CONFIGS) == set(EXPECTED) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_linear_stands_in_one_cell(model_type: str) -> None:
    model = tiny(model_type)
    parts = component_map(model)
    cells = {n: parts.cell(n) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert Counter((c.component, c.kind) for c in cells.values()) == Counter(EXPECTED[model_type])
    for name, cell in cells.items():
        assert parts.component(name) == cell.component
        held_by = [p.component for p in parts.parts for path in p.paths if f"{name}.".startswith(f"{path}.")]
        assert len(held_by) == 1 or sorted(held_by) in (["connector", "vision"], ["language", "other"])
        assert (cell.third is None) == (cell.kind == "other")
    # thirds [0, n//3), [n//3, 2n//3), [2n//3, n): by hand for 4 and for 5 blocks
    for component, blocks in (
        ("vision", {"front": 1, "middle": 1, "end": 2}),
        ("language", {"front": 1, "middle": 2, "end": 2}),
    ):
        found = Counter(c.third for c in cells.values() if c.component == component)
        per_block = sum(found.values()) // sum(blocks.values())
        assert found == Counter({third: n * per_block for third, n in blocks.items()})


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
def test_cells_by_hand(model_type: str, name: str, cell: Cell) -> None:
    model = tiny(model_type)
    assert name in dict(model.named_modules())
    assert component_map(model).cell(name) == cell


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_quantizes_and_runs(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**CONFIGS[model_type]())).eval()
    tokens = {"input_ids": torch.tensor([[1, 5, 7, 11]])}
    if model_type == "blip-2":  # wants its image, in place of as many image tokens as there are queries
        tokens = {"input_ids": torch.tensor([[50265] * 4 + [1, 5]]) % 64, "pixel_values": torch.randn(1, 3, 16, 16)}
        model.config.image_token_id = 50265 % 64
    logits = {}
    for execution in ("none", "simulated", "packed"):
        copied = copy.deepcopy(model)
        quant = (
            "" if execution == "none" else f"rtn-int3-g64:components=vision+connector+language:execution={execution}"
        )
        before = quantize_model(copied, load_spec(quant))
        n_linear = sum(EXPECTED[model_type].values())
        assert len(before) == (0 if execution == "none" else n_linear - 1)  # all but the head
        with torch.inference_mode():
            logits[execution] = copied(**tokens).logits
    assert torch.equal(logits["simulated"], logits["packed"])
    assert logits["packed"].isfinite().all() and not torch.equal(logits["none"], logits["packed"])


def test_blip2_with_t5_has_two_stacks() -> None:
    values = CONFIGS["blip-2"]()
    values["text_config"] = {
        "model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3,
        "num_decoder_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["blip-2"](**values))
    parts = component_map(model)
    cells = [parts.cell(n) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = Counter((c.kind, c.third) for c in cells if c.component == "language")
    # a third is one block each of encoder (4 + 3) and decoder (4 + 4 + 3)
    assert found == Counter({(k, t): n for k, n in (("attention", 12), ("mlp", 6)) for t in ("front", "middle", "end")})


def test_unknown_architecture_is_refused_with_what_is_missing() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TEXT))
    with pytest.raises(ComponentMapError) as caught:
        component_map(model)
    for word in (
        "'llama' (LlamaForCausalLM)",
        "lm_head, model.layers",
        "idefics3",
        "vision, connector and language paths",
    ):
        assert word in str(caught.value)


def test_a_linear_that_no_part_holds_is_refused() -> None:
    model = tiny("llava")
    model.extra_head = nn.Linear(4, 4)
    with pytest.raises(ComponentMapError, match="covers 62 of 63 Linear modules; missing: extra_head"):
        component_map(model)


def test_half_a_model_is_refused() -> None:
    with pytest.raises(ComponentMapError, match=r"has no model.vision_model, .*, lm_head; load the whole model"):
        component_map(tiny("idefics3").model)
