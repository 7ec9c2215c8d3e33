"""bitsandbytes layers: against the formats written out by hand, against transformers' own conversion, and its traps."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.libraries.bnb import quantize_bnb
from bitquake.model_wrappers.quantizers.libraries.facts import library_facts
from bitquake.model_wrappers.quantizers.options import BitsandbytesOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.replace import quantize_model

bnb = pytest.importorskip("bitsandbytes")

# QLoRA (Dettmers et al. 2023), appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# sign, two bits of exponent, one of mantissa: magnitudes 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1
FP4 = [sign * value for sign in (-1, 1) for value in (0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1)]
SHAPES = [(40, 4304), (24, 3420), (33, 127), (64, 256)]  # SigLIP's and Qwen2.5-VL's awkward rows; odd everything


def layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0])
    rows = torch.linspace(0.1, 3.0, shape[0])[:, None]  # rows of unlike size: a scale of another block shows
    linear.weight.data = rows * torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return linear.to(dtype).eval()


def inputs(width: int, dtype: torch.dtype = torch.float32, n: int = 7) -> Tensor:
    return torch.randn((2, n, width), generator=torch.Generator().manual_seed(1)).to(dtype)


def options(kind: str) -> BitsandbytesOptions:
    return BitsandbytesOptions(type=kind.removesuffix("-dq"), double_quant=kind.endswith("-dq"))  # type: ignore[arg-type]


def facts(module: nn.Module) -> Any:
    found = library_facts(module)
    assert found is not None
    return found


def by_book(weight: Tensor, book: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Nearest entry of the code book times the greatest magnitude of 64 weights of the flattened matrix, and that."""
    flat = weight.double().numpy().ravel()
    padded = np.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    absmax = np.abs(padded).max(1, keepdims=True)
    values = np.array(book)
    nearest = values[np.abs((padded / absmax)[..., None] - values).argmin(-1)] * absmax
    return nearest.ravel()[: len(flat)].reshape(weight.shape), absmax


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "book"), [("nf4", NF4), ("fp4", FP4)])
def test_weights_are_nearest_in_the_published_code_book(kind: str, book: list[float], shape: tuple[int, int]) -> None:
    linear = layer(shape)
    found = facts(quantize_bnb(linear, options(kind), "cpu"))
    expected, absmax = by_book(linear.weight.detach(), book)
    wrong = np.abs(found.weight().double().numpy() - expected) > 1e-6 * np.abs(expected).max()
    # the library's thresholds between two values are rounded: a weight that stands on one may go either way
    assert wrong.mean() < 1e-3
    rows, width = shape
    packed = -(-rows * width // 2) + 4 * len(absmax)
    assert (found.bits, found.group_size, found.shape, found.held_bytes) == (4, 64, shape, packed)
    assert (found.format, found.package, found.activation_bits) == (f"bitsandbytes {kind}", "bitsandbytes", None)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_absmax_of_a_row_in_127_steps(shape: tuple[int, int]) -> None:
    linear = layer(shape)
    found = facts(quantize_bnb(linear, options("int8"), "cpu"))
    half = linear.weight.detach().half().double()
    step = half.abs().amax(1, keepdim=True) / 127
    expected = ((half / step).round() * step).numpy()
    wrong = np.abs(found.weight().double().numpy() - expected) > 1e-6
    assert wrong.mean() < 1e-3  # halves, rounded in float32 there
    assert found.held_bytes == shape[0] * shape[1] + 4 * shape[0]
    assert (found.bits, found.activation_bits, found.symmetric) == (8, 8, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-dq"])
def test_4_bit_layers_compute_with_the_weight_that_the_card_hashes(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    linear, x = layer(shape, dtype), inputs(shape[1], dtype)
    module = quantize_bnb(linear, options(kind), "cpu")
    weight = facts(module).weight()
    with torch.inference_mode():
        y = module(x)
        assert torch.equal(y, functional.linear(x, weight, linear.bias))
    assert (weight.dtype, y.dtype) == (dtype, dtype)
    assert linear.weight.dtype == dtype and type(linear) is nn.Linear  # it was left alone


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_layers_quantize_each_token_unless_a_column_has_an_outlier(shape: tuple[int, int]) -> None:
    linear, x = layer(shape), inputs(shape[1])[0]
    x[:, 3] = 50.0
    weight = facts(quantize_bnb(linear, options("int8"), "cpu")).weight()
    with torch.inference_mode():
        for threshold, kept in ((0.0, False), (6.0, True)):
            module = quantize_bnb(linear, BitsandbytesOptions(type="int8", threshold=threshold), "cpu")
            rounded = x.half().float()
            if kept:
                rounded[:, 3] = 0.0
            step = rounded.abs().amax(1, keepdim=True) / 127
            rounded = (rounded / step).round() * step
            if kept:
                rounded[:, 3] = 50.0
            expected = functional.linear(rounded, weight, linear.bias)
            assert torch.allclose(module(x), expected, rtol=1e-2, atol=1e-2 * float(expected.std()))


def test_an_outlier_in_the_batch_moves_int8_answers_of_others_and_no_threshold_does_not() -> None:
    linear, x = layer((32, 64)), inputs(64)
    x = x.clamp(-3, 3)
    loud = x.clone()
    loud[1, 0, 5] = 40.0
    with torch.inference_mode():
        for threshold, moves in ((6.0, True), (0.0, False)):
            module = quantize_bnb(linear, BitsandbytesOptions(type="int8", threshold=threshold), "cpu")
            assert torch.equal(module(x)[0], module(loud)[0]) is not moves


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_a_forward_pass_changes_nothing_that_is_stored(kind: str) -> None:
    """On a CPU with AVX512-BF16 the library repacks 4-bit weights in the first forward pass, and saves wreckage."""
    module = quantize_bnb(layer((64, 256), torch.bfloat16), options(kind), "cpu")
    stored = {name: value.clone() for name, value in module.state_dict().items()}
    weight, described = facts(module).weight().clone(), facts(module)
    x = inputs(256, torch.bfloat16)
    with torch.inference_mode():
        first = module(x)
    again = module.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], value) for name, value in stored.items())
    after = facts(module)
    assert torch.equal(after.weight(), weight)
    assert (after.held_bytes, after.kernel, after.format) == (
        described.held_bytes, described.kernel, described.format,
    )  # fmt: skip
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(module)(x), first)


def test_a_repacked_weight_is_refused() -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16: nothing is repacked")
    module = quantize_bnb(layer((64, 256), torch.bfloat16), options("nf4"), "cpu")
    module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]  # as the library makes it
    with torch.inference_mode():
        module(inputs(256, torch.bfloat16))
    with pytest.raises(QuantizationError, match="computes with other weights than it stores"):
        library_facts(module)


def test_the_librarys_own_layer_is_refused_where_blocks_go_on_in_the_next_row() -> None:
    theirs = {
        width: bnb.nn.Linear4bit(width, 40, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
        for width in (4304, 4288)
    }
    assert library_facts(theirs[4288].to("cpu")) is not None
    with pytest.raises(QuantizationError, match="quantize it here with method bitsandbytes"):
        library_facts(theirs[4304].to("cpu"))


def test_errors_order_as_the_formats_do_and_bits_are_what_is_stored() -> None:
    linear = layer((256, 1024), torch.bfloat16)
    weight = linear.weight.detach().float()
    error, bits = {}, {}
    for kind in ("int8", "nf4", "nf4-dq", "fp4"):
        found = facts(quantize_bnb(linear, options(kind), "cpu"))
        error[kind] = float((found.weight().float() - weight).norm() / weight.norm())
        bits[kind] = 8 * found.held_bytes / found.n_weights
    assert error["int8"] < 0.012 < error["nf4"] < 0.1 < error["fp4"] < 0.13
    assert error["nf4-dq"] == pytest.approx(error["nf4"], rel=0.01)
    assert bits == pytest.approx({"int8": 8 + 32 / 1024, "nf4": 4.5, "fp4": 4.5, "nf4-dq": 4 + 8 / 64}, abs=0.01)


@pytest.fixture(scope="module")
def aligned_qwen2_vl(tiny_architectures: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose rows are whole blocks of 64, which the library's own kernels do right."""
    config = tiny_architectures.config("qwen2_vl")
    config.text_config.update(
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    )
    config.vision_config.hidden_size = 64
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.ndim >= 2:
            nn.init.normal_(weight, 0.0, 1.2 / weight[0].numel() ** 0.5)
    path = tmp_path_factory.mktemp("aligned_qwen2_vl")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("quant", ["bnb-nf4", "bnb-fp4", "bnb-nf4:bitsandbytes.double_quant=true", "bnb-int8"])
def test_same_logits_as_the_conversion_by_transformers(
    tiny_architectures: Any, aligned_qwen2_vl: Path, quant: str
) -> None:
    """Qwen2-VL, whose q, k and v have biases; our component selection is a list of modules to skip there."""
    spec = load_spec(quant)
    assert spec.bitsandbytes is not None
    path, example = aligned_qwen2_vl, tiny_architectures.example("qwen2_vl")
    ours = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    replaced = quantize_model(ours, spec)
    kind = spec.bitsandbytes.type
    config = BitsAndBytesConfig(
        load_in_8bit=kind == "int8", load_in_4bit=kind != "int8", bnb_4bit_quant_type=kind if kind != "int8" else "nf4",
        bnb_4bit_use_double_quant=spec.bitsandbytes.double_quant, bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    theirs = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map="cpu"
    ).eval()
    for module in theirs.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    converted = {name for name, module in theirs.named_modules() if library_facts(module) is not None}
    assert converted == set(replaced) == {n for n, m in ours.named_modules() if library_facts(m) is not None}
    with torch.inference_mode():
        logits = ours(**example.inputs).logits
        assert torch.equal(logits, theirs(**example.inputs).logits)
        plain = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        assert not torch.equal(logits, plain(**example.inputs).logits)


@pytest.mark.parametrize("name", ["idefics3", "llava_onevision", "blip-2", "paligemma", "qwen3_vl"])
def test_every_component_of_other_architectures(tiny_architectures: Any, name: str) -> None:
    """BLIP-2's Q-Former too, which transformers leaves out of its own accord."""
    model, example = tiny_architectures.make(name), tiny_architectures.example(name)
    replaced = quantize_model(model, load_spec("bnb-nf4:components=vision+connector+language"))
    assert replaced.keys() == {n for n, m in model.named_modules() if library_facts(m) is not None}
    plain = tiny_architectures.make(name)
    for module_name in replaced:
        linear = plain.get_submodule(module_name)
        linear.weight.data = facts(model.get_submodule(module_name)).weight()
    with torch.inference_mode():
        logits = model(**example.inputs).logits
        assert torch.allclose(logits, plain(**example.inputs).logits, atol=1e-4)


def test_int8_in_every_component_stays_close(tiny_architectures: Any) -> None:
    """Layers see tensors of two and of three dimensions; the reference is full precision."""
    for name in ("qwen2_5_vl", "blip-2"):
        model, example = tiny_architectures.make(name), tiny_architectures.example(name)
        with torch.inference_mode():
            before = model(**example.inputs).logits
            quantize_model(model, load_spec("bnb-int8:components=vision+connector+language"))
            after = model(**example.inputs).logits
        assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_int8_says_nothing_at_every_call(caplog: pytest.LogCaptureFixture) -> None:
    module = quantize_bnb(layer((8, 64)), options("int8"), "cpu")
    with torch.inference_mode(), caplog.at_level("DEBUG"):
        module(inputs(64))
    assert caplog.records == []


def test_weights_that_the_library_would_garble_are_refused() -> None:
    linear = layer((4, 64))
    linear.weight.data[1, 2] = float("nan")
    with pytest.raises(QuantizationError, match="1 weights are NaN or infinite"):
        quantize_bnb(linear, options("nf4"), "cpu")
    linear.weight.data[1, 2] = 1e5
    with pytest.raises(QuantizationError, match=r"by way of float16, and a weight of 100000 is beyond it; use method"):
        quantize_bnb(linear, options("int8"), "cpu")
    assert facts(quantize_bnb(linear, options("nf4"), "cpu")).weight()[1, 2] == 1e5


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'bitquake\[bitsandbytes\]'"):
        quantize_bnb(layer((4, 64)), options("nf4"), "cpu")


def test_layers_that_hold_nothing_quantized_have_no_facts() -> None:
    assert library_facts(layer((4, 64))) is None
    assert library_facts(bnb.nn.Linear4bit(64, 4)) is None  # quantizes itself when it is moved
    assert library_facts(bnb.nn.Linear8bitLt(64, 4, has_fp16_weights=False)) is None


def test_a_model_is_not_quantized_twice(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("idefics3")
    quantize_model(model, load_spec("bnb-nf4"))
    for again in ("bnb-nf4", "rtn-int4-g64"):
        with pytest.raises(QuantizationError, match=r"quantized already \(21 modules, first .*; load it afresh"):
            quantize_model(model, load_spec(again))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-dq", "int8"])
def test_cuda_layers_are_those_of_the_cpu(kind: str, shape: tuple[int, int]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    linear, x = layer(shape, torch.bfloat16), inputs(shape[1], torch.bfloat16)
    here = quantize_bnb(linear, options(kind), "cpu")
    there = quantize_bnb(linear.cuda(), options(kind), "cuda")
    weights = facts(here).weight().float(), facts(there).weight().float().cpu()
    assert float((weights[0] != weights[1]).float().mean()) < 1e-2  # on a threshold between two codes
    assert facts(there).held_bytes == facts(here).held_bytes
    with torch.inference_mode():
        y = there(x.cuda()).float()
        expected = functional.linear(x.cuda().float(), facts(there).weight().float(), linear.bias.float())
    assert float((y - expected).norm() / expected.norm()) < 0.03
