"""Adapters: gradients through quantized layers, what is trained and saved, and that inference puts it on again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitquake.model_wrappers.loading import put_adapter_on
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.training.config import LoraConfig, load_training
from bitquake.model_wrappers.training.lora import AdapterError, load_base
from bitquake.model_wrappers.training.lsq import LsqLinear
from bitquake.model_wrappers.training.run import processor_of, run_training
from bitquake.model_wrappers.training.seen import load_seen


@pytest.fixture(scope="module")
def data(tiny_architectures: Any, conversations: Any) -> Path:
    folder: Path = conversations(24, words=tiny_architectures.words)
    return folder


def config_of(tiny: Any, data: Path, **keys: Any) -> LoraConfig:
    values = {"method": "lora", "pretrained": str(tiny.checkpoint("idefics3")), "data": [str(data)], "steps": 8,
              "batch_size": 4, "rate": 1e-2, "rank": 4, "precision": "fp32", "validation_samples": 2,
              "loader_threads": 0, **keys}  # fmt: skip
    config = load_training(values)
    assert isinstance(config, LoraConfig)
    return config


@pytest.mark.parametrize("execution", ["simulated", "packed"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_pass_a_quantized_layer_as_they_pass_its_weight(execution: Any, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias)
    weight = LsqLinear(linear, bits=3, group_size=8, symmetric=False).quantized_weight()
    layer = QuantizedLinear.from_weight(weight, bias=linear.bias, dtype=torch.float32, execution=execution)
    x = torch.randn(2, 5, 24, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    expected = nn.functional.linear(dense, layer.weight, layer.bias)
    expected.square().sum().backward()
    assert x.grad is not None and dense.grad is not None
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, dense.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, dense.grad, atol=0.15, rtol=0.05)


def test_a_packed_layer_keeps_no_weight_for_the_backward_pass() -> None:
    linear = nn.Linear(256, 256)
    weight = LsqLinear(linear, bits=4, group_size=64, symmetric=False).quantized_weight()
    layers = [QuantizedLinear.from_weight(weight, bias=None, dtype=torch.float32, execution="packed") for _ in range(4)]
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = x
        for layer in layers:
            y = layer(y)
    assert sum(kept) < 256 * 256
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("quant", [None, "rtn-int3-g64", "hqq-int4-g64:execution=packed"])
def test_an_adapter_learns_and_inference_puts_it_on_the_same_base(
    tiny_architectures: Any, data: Path, tmp_path: Path, quant: str | None
) -> None:
    config = config_of(tiny_architectures, data, quant=quant, steps=20)
    done = run_training(config, tmp_path)
    losses = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()][:-1]
    assert sum(one["loss"] for one in losses[-5:]) < 0.8 * sum(one["loss"] for one in losses[:5])
    assert (done.pretrained, done.quant, done.base) == (config.pretrained, quant or "", None)
    assert done.adapter == str(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == config.pretrained and saved["r"] == 4

    base = load_base(config, processor_of(config), torch.device("cpu"))
    inputs = tiny_architectures.example("idefics3").inputs
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted, _ = put_adapter_on(base, done.adapter)
        with_adapter = adapted(**inputs).logits
    assert (with_adapter - plain).abs().max() > 1e-2
    # the state that training ended with, through peft alone
    state = tmp_path / "state" / "step-20.safetensors"
    from safetensors.torch import load_file

    trained = {k.removeprefix("weight."): v for k, v in load_file(state).items() if k.startswith("weight.")}
    held = dict(adapted.named_parameters())
    assert trained and all(torch.equal(held[name], value) for name, value in trained.items())
    seen = load_seen(Path(done.adapter))
    assert seen is not None and seen.image_ids


def test_every_linear_of_the_language_model_and_no_other_gets_one(
    tiny_architectures: Any, data: Path, tmp_path: Path
) -> None:
    done = run_training(config_of(tiny_architectures, data, steps=1), tmp_path)
    targets = set(json.loads(Path(done.adapter or "", "adapter_config.json").read_text())["target_modules"])
    model = tiny_architectures.make("idefics3")
    language = {n for n, m in model.model.text_model.named_modules() if isinstance(m, nn.Linear)}
    named = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(n.endswith(t) for t in targets)}
    assert named == {f"model.text_model.{name}" for name in language} and len(named) == 21


def test_an_interrupted_adapter_with_dropout_ends_the_same(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_architectures, data, dropout=0.3, steps=4, save_every=1, quant="rtn-int4-g64")
    whole = run_training(config, tmp_path / "whole")

    def die(step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(config, tmp_path / "cut", progress=die)
    cut = run_training(config, tmp_path / "cut")
    one, other = (Path(done.adapter or "", "adapter_model.safetensors").read_bytes() for done in (whole, cut))
    assert one == other


def test_what_no_adapter_can_be_trained_on(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="rounded activations pass no gradient"):
        run_training(config_of(tiny_architectures, data, quant="rtn-w8a8"), tmp_path / "a")
    with pytest.raises(AdapterError, match=r"target=\['nothing'\]: .*not found"):
        run_training(config_of(tiny_architectures, data, target=["nothing"]), tmp_path / "b")
