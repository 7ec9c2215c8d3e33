"""The packed format: bits against a bit-by-bit reference, both executions, casts, and the way through safetensors."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitquake.model_wrappers.quantizers.linear import LinearLayout, QuantizedLinear
from bitquake.model_wrappers.quantizers.packing import pack, row_bytes, unpack
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight


def packed_bit_by_bit(codes: np.ndarray, bits: int) -> list[list[int]]:
    """The format as its text says it: bit k of the stream is bit k % 8 of byte k // 8."""
    rows = []
    for row in codes.tolist():
        stream = [(code >> b) & 1 for code in row for b in range(bits)]
        stream += [0] * (-len(stream) % 8)
        rows.append([sum(bit << i for i, bit in enumerate(stream[k : k + 8])) for k in range(0, len(stream), 8)])
    return rows


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), n=st.integers(1, 41), seed=st.integers(0, 2**31))
def test_packing_is_the_bit_stream(bits: int, rows: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, n), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, row_bytes(n, bits))
    expected = packed_bit_by_bit(codes, bits)
    width = len(expected[0])  # beyond it: zero codes up to a whole block
    assert packed[:, :width].tolist() == expected
    assert not packed[:, width:].any()
    assert torch.equal(unpack(packed, bits, n), torch.from_numpy(codes))


@pytest.mark.parametrize(("bits", "codes", "n_bytes"), [(8, 1, 1), (4, 2, 1), (2, 4, 1), (3, 8, 3)])
def test_storage_has_no_gap(bits: int, codes: int, n_bytes: int) -> None:
    assert row_bytes(codes * 5, bits) == n_bytes * 5


def filled(
    bits: int, n_in: int, n_out: int, group: int, zero: str, execution: str, dtype: torch.dtype = torch.bfloat16
) -> QuantizedLinear:
    """A layer from random codes; equal arguments give equal layers."""
    rng = torch.Generator().manual_seed(bits * 1000 + n_in)
    n_groups = -(-n_in // min(group, n_in))
    codes = torch.randint(0, 2**bits, (n_out, n_in), generator=rng, dtype=torch.uint8)
    scale = (torch.rand((n_out, n_groups), generator=rng) * 0.01 + 1e-3).half()
    half = 2 ** (bits - 1)
    zeros = {
        "symmetric": None,
        "integer": torch.randint(-half, half, (n_out, n_groups), generator=rng, dtype=torch.int8),
        "real": (torch.randn((n_out, n_groups), generator=rng) * half / 4).half(),
    }
    bias = torch.nn.Parameter(torch.randn(n_out, generator=rng).to(dtype))
    weight = QuantizedWeight(codes, scale, zeros[zero], bits, min(group, n_in))
    return QuantizedLinear.from_weight(weight, bias=bias, dtype=dtype, execution=execution)  # type: ignore[arg-type]


SHAPES = [(64, 8, 16), (127, 33, 64), (40, 5, 100), (4304, 3, 128), (7, 1, 1)]


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize(("n_in", "n_out", "group"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_and_executions(bits: int, n_in: int, n_out: int, group: int, zero: str) -> None:
    packed = filled(bits, n_in, n_out, group, zero, "packed")
    simulated = filled(bits, n_in, n_out, group, zero, "simulated")
    assert packed.codes is not None and packed.scale is not None
    codes = unpack(packed.codes, bits, n_in).numpy().astype(np.float32)
    scale = packed.scale.float().numpy()
    zeros = np.zeros_like(scale) if packed.zero is None else packed.zero.float().numpy()
    expected = np.empty_like(codes)
    for row in range(n_out):
        for column in range(n_in):
            g = column // min(group, n_in)
            expected[row, column] = (codes[row, column] - 2 ** (bits - 1) - zeros[row, g]) * scale[row, g]
    assert torch.equal(packed.weight, torch.from_numpy(expected).bfloat16())
    assert torch.equal(simulated.weight, packed.weight)
    x = torch.randn(2, 5, n_in, dtype=torch.bfloat16)
    assert torch.equal(packed(x), simulated(x))
    assert torch.equal(packed(x), torch.nn.functional.linear(x, packed.weight, packed.bias))
    assert packed.held_bytes == packed.packed_bytes == simulated.packed_bytes
    assert simulated.held_bytes == 2 * n_in * n_out


@pytest.mark.parametrize("execution", ["packed", "simulated"])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_safetensors_round_trip_is_bit_equal(tmp_path: Path, execution: str, zero: str) -> None:
    layer = filled(3, 50, 9, 16, zero, execution)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    layout = LinearLayout(3, 16, symmetric=zero == "symmetric", zero_dtype="float16" if zero == "real" else "int8")
    assert layout == layer.layout == LinearLayout.from_dict(json.loads(json.dumps(layer.layout.to_dict())))
    again = QuantizedLinear(50, 9, layout=layout, execution=execution)  # type: ignore[arg-type]
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    assert again.state_dict().keys() == layer.state_dict().keys()
    for key, value in layer.state_dict().items():
        assert again.state_dict()[key].dtype == value.dtype
        assert torch.equal(again.state_dict()[key], value)
    x = torch.randn(4, 50, dtype=torch.bfloat16)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("zero", ["integer", "real"])
def test_a_cast_of_the_model_does_not_round_scales(zero: str) -> None:
    layer = filled(8, 48, 6, 16, zero, "packed", torch.float32)
    before = layer.weight.clone()
    layer.bfloat16()
    assert layer.scale is not None and layer.scale.dtype == torch.float16
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before.bfloat16())  # rounded once
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, before.bfloat16(), layer.bias))
    assert torch.equal(layer.float().weight, before)


def test_gradient_reaches_the_input() -> None:
    layer = filled(4, 32, 8, 16, "integer", "packed", torch.float32)
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


@pytest.mark.parametrize("group", [0, -1, 9])
def test_group_size_must_fit_a_row(group: int) -> None:
    with pytest.raises(ValueError, match=f"group_size must be 1 to 8 .a row., got {group}"):
        QuantizedLinear(8, 8, layout=LinearLayout(4, group))


def test_an_empty_layer_says_so() -> None:
    layer = QuantizedLinear(8, 8, layout=LinearLayout(4, 8))
    layer.codes = None
    with pytest.raises(RuntimeError, match="holds no codes"):
        _ = layer.weight


def extended(per_tensor: bool, scaled: bool, ordered: bool, zero: bool, seed: int) -> QuantizedWeight:
    """3-bit codes of 6 x 21 with whatever is asked for."""
    rng = torch.Generator().manual_seed(seed)
    shape = (1, 1) if per_tensor else (6, 3)
    return QuantizedWeight(
        codes=torch.randint(0, 8, (6, 21), generator=rng, dtype=torch.uint8),
        scale=torch.rand(shape, generator=rng) + 0.1,
        zero=torch.randn(shape, generator=rng) if zero else None,
        bits=3,
        group_size=21 if per_tensor else 8,
        input_scale=torch.rand(21, generator=rng) + 0.5 if scaled else None,
        order=torch.randperm(21, generator=rng).int() if ordered else None,
    )


FLAGS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("flags", FLAGS)
def test_scales_of_inputs_and_order_of_columns(flags: tuple[bool, bool, bool, bool], tmp_path: Path) -> None:
    """Against the formula, one weight at a time; kept by both executions and by a file."""
    weight = extended(*flags, seed=7)
    expected = torch.empty(6, 21, dtype=torch.float64)
    for row in range(6):
        for stored in range(21):
            feature = stored if weight.order is None else int(weight.order[stored])
            at = (0, 0) if weight.per_tensor else (row, stored // 8)
            offset = 0.0 if weight.zero is None else float(weight.zero[at])
            value = float(weight.scale[at]) * (int(weight.codes[row, stored]) - 4 - offset)
            expected[row, feature] = value / (1.0 if weight.input_scale is None else float(weight.input_scale[feature]))
    torch.testing.assert_close(weight.dequantize(torch.float32).double(), expected, rtol=1e-6, atol=1e-7)
    layers = [
        QuantizedLinear.from_weight(weight, bias=None, dtype=torch.float32, execution=execution)  # type: ignore[arg-type]
        for execution in ("packed", "simulated")
    ]
    x = torch.randn(4, 21)
    assert torch.equal(layers[0](x), layers[1](x))
    assert torch.equal(layers[0].weight, weight.dequantize(torch.float32))
    assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
    back = layers[1].quantized_weight()
    for name in ("codes", "scale", "zero", "input_scale", "order"):
        one, other = getattr(back, name), getattr(weight, name)
        assert (one is None and other is None) or torch.equal(one, other), name
    assert layers[0].packed_bytes == sum(t.nbytes for t in layers[0].state_dict().values())
    save_file(layers[1].state_dict(), tmp_path / "layer.safetensors")
    again = QuantizedLinear(
        21, 6, layout=LinearLayout.of(weight), bias=False, dtype=torch.float32, execution="simulated"
    )
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    assert torch.equal(again(x), layers[1](x))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("execution", ["packed", "simulated"])
def test_quantized_activations(execution: str, scaled: bool) -> None:
    """Against integer arithmetic: 8-bit tokens times 3-bit weights, then both scales."""
    weight = extended(True, scaled, False, False, seed=3)
    layer = QuantizedLinear.from_weight(
        weight, bias=None, dtype=torch.float32, execution=execution, activation_bits=8  # type: ignore[arg-type]
    )  # fmt: skip
    x = torch.randn(5, 21, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 0.1, 30, 1e-3, 0])[:, None]
    divided = x if weight.input_scale is None else x / weight.input_scale
    step = divided.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    tokens = (divided / step).round().to(torch.int64)
    assert tokens.abs().max() == 127
    whole = tokens @ (weight.codes.long() - 4).T
    torch.testing.assert_close(layer(x), whole.float() * step * weight.scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight, weight.dequantize(torch.float32))


def test_forgotten_codes_cannot_be_saved_and_a_changed_weight_is_noticed() -> None:
    layer = filled(4, 64, 8, 16, "integer", "simulated")
    assert layer.is_on_grid()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    before = layer(x)
    layer.forget_codes()
    assert torch.equal(layer(x), before) and layer.held_bytes == layer.weight.nbytes
    with pytest.raises(RuntimeError, match="Quantize or load the model again"):
        layer.state_dict()
    other = filled(4, 64, 8, 16, "integer", "simulated")
    assert other.dequantized is not None
    other.dequantized[3, 5] += 1
    assert not other.is_on_grid()


def test_a_simulated_weight_is_rounded_once_after_a_cast() -> None:
    layer = filled(8, 48, 6, 16, "real", "simulated", torch.float32)
    exact = layer.weight.clone()
    layer.bfloat16()
    assert torch.equal(layer.weight, exact.bfloat16())
    assert torch.equal(layer.float().weight, exact)  # and nothing is lost on the way back


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_executions_are_the_same_layer_after_a_cast(dtype: torch.dtype, activation_bits: int | None) -> None:
    weight = extended(False, True, True, True, seed=5)
    packed, simulated = (
        QuantizedLinear.from_weight(
            weight, bias=None, dtype=torch.bfloat16, execution=execution, activation_bits=activation_bits  # type: ignore[arg-type]
        ).to(dtype)
        for execution in ("packed", "simulated")
    )  # fmt: skip
    assert packed.weight_dtype == simulated.weight_dtype == dtype
    # the weight that cards hash: input scales divided out, rounded once
    assert torch.equal(packed.weight, weight.dequantize(dtype)) and torch.equal(simulated.weight, packed.weight)
    x = torch.randn(4, 21, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(packed(x), simulated(x))


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", "4"), ("group_size", 0), ("group_size", "64"), ("scale_dtype", "float99"),
     ("zero_dtype", "nonsense"), ("activation_bits", 1)],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key} cannot be {value!r}"):
        LinearLayout.from_dict({"bits": 4, "group_size": 64, key: value})


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    good = extended(False, True, True, True, seed=1)
    for name, value, words in [
        ("scale", good.scale[:, :2], "scale has shape"),
        ("zero", good.zero[:2], "zero has shape"),  # type: ignore[index]
        ("order", good.order[:3], "order has shape"),  # type: ignore[index]
        ("group_size", 22, "group_size must be 1 to 21"),
        ("codes", good.codes.int(), "expected uint8 codes"),
        ("bits", 9, "2 to 8 bits"),
    ]:
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(good, **{name: value})


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_a_kernel_changes_neither_state_nor_weight(zero: str) -> None:
    layer = filled(4, 256, 64, 64, zero, "packed")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight, x = layer.weight, torch.randn(1, 256, dtype=torch.bfloat16)
    plain = layer(x)
    reason = layer.use_kernel()
    if reason is not None:
        pytest.skip(reason)
    assert layer.codes is None and layer.held_bytes < 0.30 * 2 * 256 * 64
    assert torch.equal(layer.weight, weight)
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    close = (layer(x).float() - plain.float()).norm() / plain.float().norm()
    assert close < 0.02  # its scales are bfloat16
    assert layer.use_kernel() is None  # again is harmless
    layer.to(torch.bfloat16)  # anything that may move tensors goes back to the codes first
    assert layer.kernel is None and all(torch.equal(layer.state_dict()[name], before[name]) for name in before)


def test_no_kernel_says_why() -> None:
    assert "simulated" in str(filled(4, 64, 8, 64, "real", "simulated").use_kernel())
    assert "bits" in str(filled(3, 64, 64, 64, "real", "packed").use_kernel())
