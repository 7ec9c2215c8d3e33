"""The packed format: bits against a bit-by-bit reference, both executions, casts, and the way through safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.packing import pack, row_bytes, unpack


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
    return QuantizedLinear.from_codes(
        codes, scale, zeros[zero], bits=bits, group_size=group, bias=bias, dtype=dtype,
        execution=execution,  # type: ignore[arg-type]
    )  # fmt: skip


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
    again = QuantizedLinear(
        50, 9, bits=3, group_size=16, symmetric=zero == "symmetric", dtype=torch.bfloat16,
        zero_dtype=torch.float16 if zero == "real" else torch.int8, execution=execution,  # type: ignore[arg-type]
    )  # fmt: skip
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
    assert torch.equal(layer.weight, before)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, before.bfloat16(), layer.bias))


def test_gradient_reaches_the_input() -> None:
    layer = filled(4, 32, 8, 16, "integer", "packed", torch.float32)
    x = torch.randn(2, 32, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1))


def test_group_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="group_size must be positive, got 0"):
        QuantizedLinear(8, 8, bits=4, group_size=0)


def test_an_empty_layer_says_so() -> None:
    layer = QuantizedLinear(8, 8, bits=4, group_size=8)
    layer.codes = None
    with pytest.raises(RuntimeError, match="holds no weight"):
        _ = layer.weight
