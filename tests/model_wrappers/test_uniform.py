"""Per-tensor uniform quantization against the formula of the mmq study, one number after the other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.uniform import uniform, uniform_bias


def literally(tensor: np.ndarray, bits: int) -> np.ndarray:
    """``round((x - min) / (max - min) * (2^b - 1)) / (2^b - 1) * (max - min) + min`` in float64."""
    low, high, top = float(tensor.min()), float(tensor.max()), 2**bits - 1
    return np.array(
        [round((float(x) - low) / (high - low) * top) / top * (high - low) + low for x in tensor.flat]
    ).reshape(tensor.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("offset", [0.0, 0.05, -3.0])
def test_it_is_the_formula(bits: int, offset: float) -> None:
    weight = (np.random.default_rng(bits).standard_t(4, (13, 37)) * 0.03 + offset).astype(np.float32)
    found = uniform(torch.from_numpy(weight), bits)
    assert found.per_tensor and found.zero is not None and len(found.codes.unique()) <= 2**bits
    np.testing.assert_allclose(found.dequantize(torch.float64), literally(weight, bits), rtol=1e-5, atol=1e-6)
    bias = uniform_bias(torch.from_numpy(weight[0]), bits)
    np.testing.assert_allclose(bias, literally(weight[0], bits), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(2, 8), st.floats(-1e3, 1e3), st.floats(1e-6, 1e3))
def test_ends_are_on_the_grid_and_nothing_is_off_by_more_than_half_a_step(
    rows: int, columns: int, bits: int, offset: float, width: float
) -> None:
    weight = torch.rand(rows, columns, generator=torch.Generator().manual_seed(bits)) * width + offset
    found = uniform(weight, bits)
    rounded = found.dequantize(torch.float64)
    step = float(weight.max() - weight.min()) / (2**bits - 1)
    slack = 1e-5 * max(abs(offset), width)  # float32
    assert float((rounded - weight).abs().max()) <= step / 2 + slack
    for end in (weight.min(), weight.max()):
        assert float((rounded - end).abs().min()) <= slack
    assert len(rounded.unique()) <= 2**bits


def test_more_bits_lose_less_and_one_outlier_coarsens_all() -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    losses = [float((uniform(weight, bits).dequantize(torch.float32) - weight).norm()) for bits in range(2, 9)]
    assert all(more < 0.6 * fewer for fewer, more in itertools.pairwise(losses))
    spoilt = weight.clone()
    spoilt[0, 0] = 100.0
    rounded = uniform(spoilt, 8).dequantize(torch.float32)
    assert float((rounded - spoilt)[1:].norm()) > 10 * losses[-1]


@pytest.mark.parametrize("value", [0.0, -0.3, 1e30, 1e-44])
def test_a_constant_stays_what_it_is(value: float) -> None:
    weight = torch.full((3, 5), value)
    assert torch.equal(uniform(weight, 4).dequantize(torch.float32), weight)
    assert torch.equal(uniform_bias(weight[0], 2), weight[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert torch.equal(uniform(weight, 4).codes, uniform(weight.float(), 4).codes)
    bias = uniform_bias(weight[0], 4)
    assert bias.dtype == dtype and len(bias.unique()) <= 16


def test_a_layer_of_it_keeps_weight_and_state() -> None:
    found = uniform(torch.randn(6, 10, generator=torch.Generator().manual_seed(2)), 3)
    layer = QuantizedLinear.from_weight(found, bias=None, dtype=torch.float32, execution="packed")
    assert torch.equal(layer.weight, found.dequantize(torch.float32))
    assert layer.packed_bytes == 6 * 6 + 2 * 4  # ten 3-bit codes fill two blocks of three bytes; float32 scale and zero


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match="1 weights are NaN or infinite"):
        uniform(weight, 4)
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        uniform_bias(weight[1], 4)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(QuantizationError, match=f"bits must be 2 to 8, got {bits}"):
        uniform(torch.zeros(2, 2), bits)
