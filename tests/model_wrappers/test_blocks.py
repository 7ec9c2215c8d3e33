"""Blocks: their inputs and outputs against hooks in a plain forward pass, for every architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquake.model_wrappers.calibration.sample import CalibrationInputs
from bitquake.model_wrappers.components import ARCHITECTURES
from bitquake.model_wrappers.quantizers.blocks import Block, BlockInput, BlockRunner, ordered_blocks, without_cache
from bitquake.model_wrappers.quantizers.plan import quantizable

NAMES = (*sorted(ARCHITECTURES), "paligemma2")


def samples_of(tiny_architectures: Any, name: str, n: int = 2) -> list[CalibrationInputs]:
    return [CalibrationInputs(*tiny_architectures.example(name, seed=seed)) for seed in range(n)]


def flat(value: Any) -> Iterator[Any]:
    """Tensors and plain values of nested arguments, with their places."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield key
            yield from flat(value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def same(a: Any, b: Any) -> bool:
    left, right = list(flat(a)), list(flat(b))
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in zip(left, right, strict=True)
    )


def by_hooks(model: nn.Module, blocks: list[Block], samples: list[CalibrationInputs]) -> dict[str, list[Any]]:
    """Block name -> (args, kwargs, output) of each call in plain forward passes."""
    seen: dict[str, list[Any]] = {block.name: [] for block in blocks}
    handles = [
        block.module.register_forward_hook(
            lambda _, args, kwargs, output, name=block.name: seen[name].append((args, kwargs, output)), with_kwargs=True
        )
        for block in blocks
    ]
    with without_cache(model), torch.no_grad():
        for sample in samples:
            model(**sample.inputs)
    for handle in handles:
        handle.remove()
    return seen


def round_weights(block: Block) -> None:
    """Stand-in for a quantizer: one that cannot be overlooked."""
    for linear in block.linears.values():
        linear.weight.data = (linear.weight.data * 8).round() / 8


@pytest.mark.parametrize("name", NAMES)
def test_original_inputs_and_outputs_are_those_of_a_forward_pass(tiny_architectures: Any, name: str) -> None:
    """Although each block is changed as it is handed out."""
    model, samples = tiny_architectures.make(name), samples_of(tiny_architectures, name)
    targets = quantizable(model)
    blocks = ordered_blocks(model, targets)
    assert Counter(n for block in blocks for n in block.linears) == Counter(list(targets))
    expected = by_hooks(model, blocks, samples)
    order = []
    for block, inputs in BlockRunner(model, blocks, samples, propagate="original"):
        calls = expected[block.name]
        assert len(inputs) == len(calls) == len(samples) and [i.sample for i in inputs] == [0, 1]
        for got, (args, kwargs, output) in zip(inputs, calls, strict=True):
            assert same(got.args, args) and same(got.kwargs, kwargs)
            assert same(got.run(block.module), output)
        check_masks(block, inputs, samples)
        round_weights(block)
        order.append(block)
    assert {block.name for block in order} == {block.name for block in blocks}
    assert not any(block.linears for block in blocks), "weights of blocks that are done must not be held"
    assert not any("forward" in module.__dict__ for module in model.modules())


def check_masks(block: Block, inputs: list[BlockInput], samples: list[CalibrationInputs]) -> None:
    for got in inputs:
        if block.component == "language":
            sample = samples[got.sample]
            assert got.vision is not None and torch.equal(got.vision, sample.vision) and sample.vision.any()
            assert got.answer is not None and torch.equal(got.answer, sample.answer) and got.answer.sum() == 5
            assert got.args[0].shape[:2] == (1, len(got.vision))
        else:
            assert got.vision is None and got.answer is None


@pytest.mark.parametrize("name", NAMES)
def test_quantized_inputs_are_those_of_the_model_quantized_so_far(tiny_architectures: Any, name: str) -> None:
    samples = samples_of(tiny_architectures, name)
    plain = tiny_architectures.make(name)
    reference = ordered_blocks(plain, quantizable(plain))
    model = tiny_architectures.make(name)
    runner = BlockRunner(model, ordered_blocks(model, quantizable(model)), samples, propagate="quantized")
    for (block, inputs), oracle in zip(runner, reference, strict=True):
        assert block.name == oracle.name
        for got, (args, kwargs, _) in zip(inputs, by_hooks(plain, [oracle], samples)[oracle.name], strict=True):
            assert same(got.args, args) and same(got.kwargs, kwargs)
        round_weights(block)
        round_weights(oracle)
    with torch.no_grad():
        assert torch.equal(model(**samples[0].inputs).logits, plain(**samples[0].inputs).logits)


def test_blocks_between_targets_are_run(tiny_architectures: Any) -> None:
    """Targets in some blocks of a stack only."""
    name = "idefics3"
    model = tiny_architectures.make(name, vision_blocks=4, text_blocks=5)
    samples = samples_of(tiny_architectures, name)
    wanted = ("vision_model.encoder.layers.3.mlp", "layers.1.self_attn.q_proj", "text_model.layers.4")
    targets = {n: linear for n, linear in quantizable(model).items() if any(part in n for part in wanted)}
    blocks = ordered_blocks(model, targets)
    assert [block.name.split("model.", 1)[1] for block in blocks] == [
        "vision_model.encoder.layers.1", "vision_model.encoder.layers.3", "text_model.layers.1", "text_model.layers.4",
    ]  # fmt: skip
    expected = by_hooks(model, blocks, samples)
    for block, inputs in BlockRunner(model, blocks, samples, propagate="quantized"):
        assert all(same(got.args, call[0]) for got, call in zip(inputs, expected[block.name], strict=True))


def test_a_sample_without_a_picture_reaches_the_language_model_only(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("qwen2_vl")
    inputs = {"input_ids": torch.tensor([[8, 9, 10, 11]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    nothing = torch.zeros(4, dtype=torch.bool)
    samples = [CalibrationInputs(inputs, nothing, nothing), *samples_of(tiny_architectures, "qwen2_vl", 1)]
    for block, found in BlockRunner(model, ordered_blocks(model, quantizable(model)), samples, propagate="original"):
        assert [one.sample for one in found] == ([0, 1] if block.component == "language" else [1])


def test_two_calls_of_one_sample_are_two_inputs() -> None:
    """BLIP-2's retrieval head runs the Q-Former once on the picture and once on the text."""
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, num_query_tokens=4, image_text_hidden_size=16,
        qformer_config={**sizes, "encoder_hidden_size": 24, "vocab_size": 64, "use_qformer_text_input": True},
        text_config={"model_type": "opt", "vocab_size": 64, "hidden_size": 24, "ffn_dim": 48, "num_hidden_layers": 1,
                     "word_embed_proj_dim": 24, "num_attention_heads": 2, "max_position_embeddings": 64},
        image_token_index=9,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config).eval()
    ids = torch.tensor([[9] * 4 + [3, 5, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}
    samples = [CalibrationInputs(inputs, ids[0] == 9, ids[0] == 7)]
    blocks = ordered_blocks(model, quantizable(model))
    expected = by_hooks(model, blocks, samples)
    for block, found in BlockRunner(model, blocks, samples, propagate="original"):
        assert len(found) == (2 if block.component == "connector" else 1)
        for got, (args, kwargs, output) in zip(found, expected[block.name], strict=True):
            assert same(got.args, args) and same(got.kwargs, kwargs) and same(got.run(block.module), output)


def test_a_target_outside_the_components_is_refused(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("llava")
    with pytest.raises(ValueError, match="lm_head: no block of LlavaForConditionalGeneration holds it"):
        ordered_blocks(model, {"lm_head": model.lm_head})
