"""What the report tells of a quant card: places counted by hand, options by name, nobody's folders."""

from __future__ import annotations

from bitquake.quant_card import Adapter, Calibration, ComponentEntry, ModuleEntry, QuantCard
from bitquake.reports.cards import card_entry


def module(name: str, third: str, layer: str, bits: int, **changes: object) -> ModuleEntry:
    return ModuleEntry.model_validate(
        {
            "name": name, "component": "language", "third": third, "layer": layer, "shape": (8, 64), "bits": bits,
            "group_size": 32, "symmetric": False, "n_weights": 512, "n_bytes": 1024, "packed_bytes": 64 * bits,
            "hash_before": "a", "hash_after": "b", **changes,
        }
    )  # fmt: skip


def card(**changes: object) -> QuantCard:
    modules = [
        module("layers.0.q", "front", "attention", 4),
        module("layers.0.up", "front", "mlp", 3, input_scale=True, activation_bits=8),
        module("layers.1.q", "front", "attention", 4, hash_after="a"),
        module("layers.2.q", "end", "attention", 4, group_size=64),
        module("layers.2.k", "end", "attention", 4, group_size=64, per_tensor=True),
    ]
    spec = {
        "name": "mine", "method": "mbq", "bits": 4, "plan": [{"layers": ["mlp"], "bits": 3}, {"layers": ["attention"]}],
        "calibration": {"source": "caption", "data": "/somebody/pictures", "samples": 16},
    }  # fmt: skip
    return QuantCard.model_validate(
        {
            "pretrained": "/somebody/mine", "base": "org/model", "architecture": "A", "dtype": "bfloat16",
            "spec_name": "mine", "spec": spec, "method": "mbq", "execution": "packed", "kernel": "k",
            "modules": modules, "kept": {"lm_head": "bfloat16"}, "nominal_bpw": 4.0, "effective_bpw": 4.5,
            "components": {"language": ComponentEntry(n_parameters=2560, n_quantized=2560, n_bytes=9, packed_bytes=9)},
            "weights_hash": "w", "calibration": Calibration(source="caption", data="/somebody/pictures"),
            "adapter": Adapter(source="/somebody/lora", hash="h"), **changes,
        }
    )  # fmt: skip


def test_modules_that_were_treated_alike_are_counted_together() -> None:
    found = card_entry(card())
    told = [(p.place, p.bits, p.group, p.n_modules, p.n_changed, p.n_weights, p.packed_bytes) for p in found.places]
    assert told == [
        ("language front attention", 4, "32", 2, 1, 1024, 512),
        ("language front MLP", 3, "32", 1, 1, 512, 192),
        ("language end attention", 4, "channel", 1, 1, 512, 256),
        ("language end attention", 4, "tensor", 1, 1, 512, 256),
    ]
    assert [(p.activation_bits, p.extras) for p in found.places[:2]] == [(None, []), (8, ["input scales"])]
    assert sum(place.n_modules for place in found.places) == found.n_quantized_modules == len(found.modules) == 5
    assert (found.n_changed_modules, found.bits, found.group_size) == (4, "3, 4", "32, channel, tensor")
    assert found.quantized_share == 1.0 and found.n_bytes == 9


def test_options_have_dotted_names_and_folders_stay_private() -> None:
    found = card_entry(card())
    assert found.spec["calibration.source"] == "caption" and found.spec["calibration.samples"] == "16"
    assert found.spec["plan"] == "(bits 3, layers mlp)+(layers attention)"
    assert (found.pretrained, found.base, found.adapter) == ("mine", "org/model", "lora")
    assert "somebody" not in found.model_dump_json()


def test_memory_of_a_simulated_run_is_not_told() -> None:
    found = card_entry(card(execution="simulated"))
    assert found.n_bytes is None and all("n_bytes" not in part for part in found.components.values())
