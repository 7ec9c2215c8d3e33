"""torchao layers: against the formats written out by hand, torchao's own conversion of a model, and its traps."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.libraries.facts import library_facts, multiply_by_identity
from bitquake.model_wrappers.quantizers.libraries.torchao_backend import quantize_torchao
from bitquake.model_wrappers.quantizers.options import TorchaoOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.replace import quantize_model

torchao = pytest.importorskip("torchao.quantization")

SHAPES = [(40, 4304), (24, 3420), (33, 127), (64, 256)]  # SigLIP's and Qwen2.5-VL's awkward rows; odd everything
KINDS = ["int8", "int8-dynamic", "fp8"]


def layer(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(shape[1], shape[0])
    rows = torch.linspace(0.1, 3.0, shape[0])[:, None]  # rows of unlike size: their scales differ
    linear.weight.data = rows * torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    return linear.to(dtype).eval()


def inputs(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, 7, width), generator=torch.Generator().manual_seed(1)).to(dtype)


def quantized(linear: nn.Linear, kind: str) -> nn.Module:
    return quantize_torchao(linear, TorchaoOptions(kind=kind), None, "cpu")  # type: ignore[arg-type]


def facts(module: nn.Module) -> Any:
    found = library_facts(module)
    assert found is not None
    return found


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    at = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    low, high = grid[at - 1], grid[at]
    return np.where(values - low < high - values, low, high)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_nearest_on_a_grid_of_each_row(kind: str, shape: tuple[int, int]) -> None:
    linear = layer(shape)
    found = facts(quantized(linear, kind))
    weight = linear.weight.detach().double().numpy()
    absmax = np.abs(weight).max(1, keepdims=True)
    if kind == "fp8":  # e4m3: 3 bits of mantissa, exponents -6 to 8, subnormal below 2^-6, 1.75 * 2^8 the greatest
        normal = [2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8)]
        positive = np.array([*(2.0**-6 * m / 8 for m in range(8)), *normal][:-1])
        grid, scale = np.concatenate([-positive[:0:-1], positive]), absmax / 448
        assert len(grid) == 253
    else:
        grid, scale = np.arange(-128.0, 128.0), absmax / 127.5
    expected = nearest(weight / scale, grid) * scale
    assert np.mean(np.abs(found.weight().double().numpy() - expected) > 1e-5 * absmax) < 2e-3  # ties, in float32 there
    rows, width = shape
    assert found.held_bytes == rows * width + rows * (4 if kind == "fp8" else 4 + 1)  # int8 keeps a zero of zeros
    assert (found.bits, found.group_size, found.shape, found.symmetric) == (8, width, shape, True)
    assert (found.format, found.package) == (f"torchao {kind}", "torchao")
    assert found.activation_bits == (8 if kind == "int8-dynamic" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_with_the_weight_that_the_card_hashes(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    linear, x = layer(shape, dtype), inputs(shape[1], dtype)
    module = quantized(linear, kind)
    stored, weight = module.state_dict(), facts(module).weight().double()
    seen = x.double()
    if kind == "int8-dynamic":
        step = seen.abs().amax(-1, keepdim=True) / 127.5
        seen = (seen / step).round().clamp(-128, 127) * step
    expected = functional.linear(seen, weight, linear.bias.double())
    with torch.inference_mode():
        y = module(x)
    assert y.dtype == dtype and linear.weight.dtype == dtype and type(linear.weight) is nn.Parameter
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    tolerance += 2e-3 if kind == "int8-dynamic" else 0.0  # an input that stands between two steps
    assert float((y.double() - expected.detach()).norm() / expected.detach().norm()) < tolerance
    assert all(torch.equal(facts(module).weight().double(), weight) for _ in range(2))
    assert module.state_dict().keys() == stored.keys() == {"weight", "bias"}
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(module)(x), y)


def test_errors_order_as_the_formats_do() -> None:
    linear = layer((256, 1024), torch.bfloat16)
    weight = linear.weight.detach().float()
    error = {k: float((facts(quantized(linear, k)).weight() - weight).norm() / weight.norm()) for k in KINDS}
    assert 0.005 < error["int8"] < 0.012 < error["fp8"] < 0.03  # e4m3: half of 1/16 at most, for a normal weight
    assert error["int8-dynamic"] == error["int8"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_as_torchao_on_the_whole_model(tiny_architectures: Any, kind: str) -> None:
    """Qwen2-VL, whose q, k and v have biases; our component selection is a filter there."""
    example = tiny_architectures.example("qwen2_vl")
    ours, theirs = tiny_architectures.make("qwen2_vl"), tiny_architectures.make("qwen2_vl")
    replaced = quantize_model(ours, load_spec(f"torchao-{kind}"))
    config = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "fp8": torchao.Float8WeightOnlyConfig,
    }[kind](set_inductor_config=False)
    torchao.quantize_(
        theirs, config, lambda module, name: isinstance(module, nn.Linear) and name.startswith("model.language_model")
    )
    converted = {name for name, module in theirs.named_modules() if library_facts(module) is not None}
    assert converted == set(replaced) == {n for n, m in ours.named_modules() if library_facts(m) is not None}
    with torch.inference_mode():
        logits = ours(**example.inputs).logits
        assert torch.equal(logits, theirs(**example.inputs).logits)
        assert not torch.equal(logits, tiny_architectures.make("qwen2_vl")(**example.inputs).logits)


@pytest.mark.parametrize("name", ["smolvlm", "llava", "blip-2", "paligemma", "qwen3_vl"])
def test_every_component_of_other_architectures(tiny_architectures: Any, name: str) -> None:
    model, example = tiny_architectures.make(name), tiny_architectures.example(name)
    replaced = quantize_model(model, load_spec("torchao-fp8:components=vision+connector+language"))
    plain = tiny_architectures.make(name)
    for module_name in replaced:
        plain.get_submodule(module_name).weight.data = facts(model.get_submodule(module_name)).weight()
    with torch.inference_mode():
        assert torch.allclose(model(**example.inputs).logits, plain(**example.inputs).logits, atol=1e-4)


def test_nothing_outside_the_layer_changes() -> None:
    """torchao's default sets the precision of float32 products for the whole process."""
    import torch._inductor.config as inductor

    before = torch.get_float32_matmul_precision(), inductor.coordinate_descent_tuning
    for kind in KINDS:
        quantized(layer((4, 64)), kind)
    assert (torch.get_float32_matmul_precision(), inductor.coordinate_descent_tuning) == before == ("highest", False)


def test_int4_on_a_cpu_says_what_to_use() -> None:
    with pytest.raises(
        QuantizationError, match=r"tinygemm kernel, which runs on CUDA only, and the layer is on cpu; use"
    ):
        quantize_torchao(layer((8, 64), torch.bfloat16), TorchaoOptions(kind="int4"), 32, "cpu")


@pytest.mark.parametrize(
    ("shape", "dtype", "group", "capability", "message"),
    [
        ((8, 4304), torch.bfloat16, 128, (9, 0), r"multiple of the group size 128, got 4304; no group size of its"),
        ((8, 96), torch.bfloat16, 64, (9, 0), r"group size 64, got 96; group_size 32 would fit. A plan with keep"),
        ((8, 64), torch.float16, 64, (9, 0), r"computes in bfloat16, got torch.float16; use dtype=bfloat16"),
        ((8, 64), torch.bfloat16, 48, (9, 0), r"has groups of 32, 64, 128, 256, got group_size 48"),
        ((8, 64), torch.bfloat16, "channel", (9, 0), r"got group_size channel"),
        ((8, 64), torch.bfloat16, 64, (7, 5), r"needs compute capability 8.0, and old GPU has less"),
    ],
)
def test_int4_that_torchao_would_skip_or_break_on(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, group: Any,
    capability: tuple[int, int], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "old GPU")
    with pytest.raises(QuantizationError, match=message):
        quantize_torchao(layer(shape, dtype), TorchaoOptions(kind="int4"), group, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(40, 4096), (24, 1280), (33, 128)])
def test_int4_on_cuda(shape: tuple[int, int]) -> None:
    """Against asymmetric rounding of each group, written out; columns and rows that the kernel pads too."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    linear, x = layer(shape, torch.bfloat16).cuda(), inputs(shape[1], torch.bfloat16).cuda()
    module = quantize_torchao(linear, TorchaoOptions(kind="int4"), 64, "cuda")
    found = facts(module)
    groups = linear.weight.detach().double().reshape(shape[0], -1, 64)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    expected = (((groups - low) / step).round() * step + low).reshape(shape)
    weight = found.weight().double()
    scale = step.expand_as(groups).reshape(shape)
    assert float(((weight - expected).abs() / scale).mean()) < 0.1  # scale and zero in bfloat16 there
    y = module(x).double()
    reference = functional.linear(x.double(), weight, linear.bias.double())
    assert float((y - reference).norm() / reference.norm()) < 1e-2
    assert (found.bits, found.group_size, found.format) == (4, 64, "torchao int4")
    assert found.held_bytes >= shape[0] * shape[1] // 2 + shape[0] * (shape[1] // 64) * 4


def test_a_weight_is_read_through_the_product_exactly() -> None:
    """As for int4, whose format cannot be de-quantized; float8 can be, and has more columns than one step takes."""
    module = quantized(layer((40, 700), torch.bfloat16), "fp8")
    assert isinstance(module, nn.Linear)
    weight = facts(module).weight()
    assert weight.dtype == torch.bfloat16 and torch.equal(multiply_by_identity(module), weight)


def test_unknown_formats_are_not_called_full_precision() -> None:
    module = nn.Sequential(layer((8, 64)))
    torchao.quantize_(module, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=torchao.PerGroup(32)))
    with pytest.raises(QuantizationError, match=r"IntxUnpackedToInt8Tensor of torchao, which Bitquake does not know"):
        library_facts(module[0])


def test_weights_that_are_not_finite_are_refused() -> None:
    linear = layer((4, 64))
    linear.weight.data[1, 2] = float("inf")
    with pytest.raises(QuantizationError, match="1 weights are NaN or infinite"):
        quantized(linear, "int8")


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'bitquake\[torchao\]'"):
        quantized(layer((4, 64)), "int8")


def test_a_model_is_not_quantized_twice(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("idefics3")
    quantize_model(model, load_spec("torchao-int8"))
    for again in ("torchao-int8", "rtn-int4-g64"):
        with pytest.raises(QuantizationError, match=r"quantized already \(21 modules, first .*; load it afresh"):
            quantize_model(model, load_spec(again))
