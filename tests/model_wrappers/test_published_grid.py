"""Recognising simulated quantization by the weights alone: what lies on a grid, and what must not be taken for one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers.published.grid import Grid, detect_grid, on_grid

some = settings(max_examples=15, deadline=None)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def ordinary(rows: int, columns: int, seed: int, heavy: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.03
    return weight * torch.randn(rows, columns, generator=generator).exp() if heavy else weight


def quantized(weight: Tensor, bits: int, group: int, symmetric: bool, shrink: float = 0.9) -> Tensor:
    """Rounded to a grid by the textbook formulas; ``shrink`` below 1 clips, as learned scales do."""
    groups = weight.reshape(len(weight), -1, group)
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) * shrink / (2 ** (bits - 1) - 1)
        steps = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    else:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) * shrink / (2**bits - 1)
        zero = (-low / scale).round().clamp(0, 2**bits - 1)
        steps = (groups / scale + zero).round().clamp(0, 2**bits - 1) - zero
    return (steps * scale).reshape(weight.shape)


@some
@example(8, 128, True, torch.bfloat16, 1.0, 0)
@given(
    st.integers(3, 8), st.sampled_from([32, 64, 128]), st.booleans(), st.sampled_from(DTYPES),
    st.sampled_from([0.8, 1.0]), st.integers(0, 2**32),
)  # fmt: skip
def test_a_grid_is_found(bits: int, group: int, symmetric: bool, dtype: torch.dtype, shrink: float, seed: int) -> None:
    if bits == 8 and not symmetric:
        return  # 255 steps are more than bfloat16 tells apart
    weight = quantized(ordinary(48, 256, seed), bits, group, symmetric, shrink).to(dtype)
    found = detect_grid(weight)
    assert found is not None and found.group_size == group
    assert (found.bits, found.symmetric) == (bits, symmetric)


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_a_grid_is_found_through_two_roundings(first: torch.dtype, second: torch.dtype) -> None:
    """GRACE saves float32 products in bfloat16; others keep scales in half precision, or cast the file once more."""
    weight = quantized(ordinary(32, 256, 1), 4, 128, True).to(first).to(second)
    assert detect_grid(weight) == Grid(4, 128, True, 64)


def test_a_scale_for_each_row_and_a_short_last_group() -> None:
    assert detect_grid(quantized(ordinary(96, 200, 2), 4, 200, True).bfloat16()) == Grid(4, 200, True, 96)
    columns = quantized(ordinary(40, 256, 3), 4, 128, True)[:, :200].bfloat16()
    assert detect_grid(columns) == Grid(4, 128, True, 80)


@some
@given(st.booleans(), st.sampled_from(DTYPES), st.sampled_from([48, 256, 300]), st.integers(0, 2**32))
def test_ordinary_weights_are_on_no_grid(heavy: bool, dtype: torch.dtype, columns: int, seed: int) -> None:
    assert detect_grid(ordinary(32, columns, seed, heavy).to(dtype)) is None


@some
@given(
    st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=1, max_size=12), st.booleans(), st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)  # fmt: skip
def test_few_values_are_on_no_grid(values: list[float], evenly: bool, dtype: torch.dtype, seed: int) -> None:
    """A sign matrix, a codebook, a few even steps: any group of these lies on some grid, which proves nothing."""
    if evenly:
        values = [(i - len(values) // 2) * 0.0137 for i in range(len(values))]
    chosen = torch.randint(len(values), (32, 256), generator=torch.Generator().manual_seed(seed))
    assert detect_grid(torch.tensor(values)[chosen].to(dtype)) is None


@pytest.mark.parametrize("values", [[0.0], [1.0, -1.0], [-1.0, 0.0, 1.0], [0.02]])
def test_signs_and_constants_are_on_no_grid(values: list[float]) -> None:
    chosen = torch.randint(len(values), (64, 256), generator=torch.Generator().manual_seed(0))
    assert detect_grid(torch.tensor(values)[chosen]) is None


def test_one_group_off_the_grid_is_enough() -> None:
    plain = ordinary(32, 256, 4)
    weight = quantized(plain, 4, 128, True).bfloat16()
    assert detect_grid(weight) is not None
    weight[17, 128:] = plain[17, 128:].bfloat16()
    assert detect_grid(weight) is None


def test_nan_integers_and_vectors_are_on_no_grid() -> None:
    weight = quantized(ordinary(32, 256, 5), 4, 128, True)
    weight[0, 0] = torch.nan
    assert detect_grid(weight) is None
    assert detect_grid(torch.zeros(4, 4, dtype=torch.int8)) is None
    assert detect_grid(torch.zeros(4)) is None


def test_modules_of_a_model() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(256, 32), "grid": nn.Linear(256, 32), "norm": nn.LayerNorm(256)})
    grid = model["grid"]
    assert isinstance(grid, nn.Linear)
    grid.weight.data = quantized(ordinary(32, 256, 6), 4, 128, True).bfloat16()
    assert on_grid(model) == {"grid": Grid(4, 128, True, 64)}
