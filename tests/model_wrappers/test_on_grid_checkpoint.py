"""A plain checkpoint whose weights were quantized and de-quantized (GRACE's BF16 ones): no run may call it full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.replace import quantize_model


def dense(model: Any) -> None:
    """Put plain Linear modules with the de-quantized weights back."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        linear.weight.data, linear.bias = layer.weight, layer.bias
        model.set_submodule(name, linear)


def test_weights_on_a_grid_are_labelled_simulated(tiny_architectures: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    source = tiny_architectures.checkpoint("qwen2_vl")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    spec = load_spec("rtn-int4-g64:group_size=32:symmetric=true")
    expected = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    done = quantize_model(model, spec)
    hashes = {name: model.get_submodule(name).weight.clone() for name in done}
    assert any(not torch.equal(hashes[name], expected[name]) for name in done)
    dense(model)
    model.save_pretrained(tmp_path / "grace")
    tiny_architectures.processor("qwen2_vl").save_pretrained(tmp_path / "grace")
    found = BitquakeHF(str(tmp_path / "grace"), device="cpu", base="org/full", artifacts=str(tmp_path))
    card = found.card
    assert (card.execution, card.method, card.checkpoint_format) == ("simulated", "checkpoint", "dense on a grid")
    assert card.spec_name == "on-grid-int4-g32" and card.subject == "org/full"
    assert {entry.name for entry in card.modules} == set(done)
    assert {(entry.bits, entry.symmetric, entry.format) for entry in card.modules} == {(4, True, "dense on a grid")}
    assert card.effective_bpw == 16.0 and card.nominal_bpw < 16.0  # the bits of the codes, the memory of full precision
    assert all(entry.n_bytes == entry.packed_bytes == 2 * entry.n_weights for entry in card.modules)
    assert BitquakeHF(str(source), device="cpu", artifacts=str(tmp_path)).card.execution == "full-precision"
