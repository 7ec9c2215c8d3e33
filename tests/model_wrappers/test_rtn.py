"""Round to nearest against a slow, literal NumPy reference of the formulas in papers.md section 4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.replace import QuantizationError, quantize_weight


def dequantized(weight: torch.Tensor, quant: str) -> torch.Tensor:
    return quantize_weight(weight, load_spec(quant)).dequantize(torch.float32)


def rtn_literally(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """One group after the other, one weight after the other; the scale is stored as float16."""
    out = np.empty_like(weight)
    group = min(group, weight.shape[1])
    one = np.float32
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            w = weight[row, start : start + group]
            if symmetric:
                scale = one(np.float16(one(max(np.abs(w).max(), one(1e-5))) / one(2 ** (bits - 1) - 1)))
                lowest, highest, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, one(0)
            else:
                scale = one(np.float16(one(max(max(w.max(), 0) - min(w.min(), 0), one(1e-5))) / one(2**bits - 1)))
                lowest, highest = 0, 2**bits - 1
                zero = one(np.clip(-np.rint(one(min(w.min(), 0)) / scale), lowest, highest))
            for i, value in enumerate(w):
                code = np.clip(np.rint(value / scale) + zero, lowest, highest)
                out[row, start + i] = scale * (code - zero)
    return out


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(6, 128, 64), (33, 127, 64), (4, 24, 64), (3, 100, 16)])
def test_equals_the_formula(rows: int, columns: int, group: int, bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(rows * columns + bits)
    weight = (rng.standard_t(4, (rows, columns)) * 0.03 + 0.005).astype(np.float32)
    weight[0] = 0.0  # a dead row
    weight[1, :group] = 0.25  # a constant group
    weight[2] = np.abs(weight[2])
    got = dequantized(torch.from_numpy(weight), f"rtn-int{bits}-g64:group_size={group}:symmetric={symmetric}")
    np.testing.assert_array_equal(got.numpy(), rtn_literally(weight, bits, group, symmetric))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_group_of_one_sign_is_not_clipped(bits: int) -> None:
    """AutoAWQ's range leaves 0 out while its zero-point is a code: such a group would shrink towards 0."""
    weight = torch.tensor([[0.5] * 64, [-0.3] * 64, [0.4, 0.6] * 32])
    got = dequantized(weight, f"rtn-int4-g64:bits={bits}")
    step = weight.abs().amax(1, keepdim=True) / (2**bits - 1)
    assert ((got - weight).abs() <= 0.5 * step + 1e-3 * weight.abs()).all()
    alone = torch.randn(5, 65, generator=torch.Generator().manual_seed(0))  # a last group of one weight
    torch.testing.assert_close(dequantized(alone, "rtn-int8-g64")[:, 64], alone[:, 64], rtol=1e-3, atol=0)


def test_error_falls_with_bits_and_with_smaller_groups() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = {q: float((dequantized(weight, q) - weight).norm() / weight.norm())
              for q in ("rtn-int8-g64", "rtn-int4-g64", "rtn-int4-g128", "rtn-int3-g64", "rtn-int2-g64")}  # fmt: skip
    assert errors["rtn-int8-g64"] < errors["rtn-int4-g64"] < errors["rtn-int4-g128"] < errors["rtn-int3-g64"]
    assert errors["rtn-int3-g64"] < errors["rtn-int2-g64"]


def test_dtype_of_the_model_does_not_matter_to_the_solver() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    spec = load_spec("rtn-int3-g64")
    same, other = quantize_weight(weight, spec), quantize_weight(weight.float(), spec)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(same, name), getattr(other, name))


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_per_channel_and_per_tensor_are_groups_of_a_row_and_of_all(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(bits).standard_normal((7, 50)).astype(np.float32)
    options = f"bits={bits}:symmetric={symmetric}"
    by_row = dequantized(torch.from_numpy(weight), f"rtn-int4-g64:group_size=channel:{options}")
    np.testing.assert_array_equal(by_row.numpy(), rtn_literally(weight, bits, 50, symmetric))
    by_all = dequantized(torch.from_numpy(weight), f"rtn-int4-g64:group_size=tensor:{options}")
    expected = rtn_literally(weight.reshape(1, -1), bits, weight.size, symmetric).reshape(weight.shape)
    np.testing.assert_array_equal(by_all.numpy(), expected)
    assert quantize_weight(torch.from_numpy(weight), load_spec("rtn-int4-g64:group_size=tensor")).per_tensor


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("quant", ["rtn-int4-g64", "hqq-int4-g64"])
def test_weights_that_are_not_finite_are_refused(bad: float, quant: str) -> None:
    weight = torch.zeros(4, 64)
    weight[2, 3] = bad
    with pytest.raises(QuantizationError, match="1 weights in rows 0 to 3 are NaN or infinite"):
        quantize_weight(weight, load_spec(quant))


def test_ranges_beyond_float16_are_refused() -> None:
    weight = torch.tensor([[-1e7, 1e7]])
    with pytest.raises(QuantizationError, match="beyond float16"):
        quantize_weight(weight, load_spec("rtn-int2-g64"))


def test_full_precision_is_no_quantization() -> None:
    with pytest.raises(QuantizationError, match="does not quantize"):
        quantize_weight(torch.zeros(2, 2), load_spec(None))
