"""Learned step sizes against the paper's formula in loops, torch's own kernel, and the packed format's arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.replace import quantize_weight
from bitquake.model_wrappers.quantizers.spec import load_spec
from bitquake.model_wrappers.training.lsq import LsqLinear, lsq_layers, search


def layer(
    seed: int = 0, *, shape: tuple[int, int] = (6, 96), bits: int = 3, group: int = 64, symmetric: bool = True,
    shift: float = 0.0,
) -> LsqLinear:  # fmt: skip
    """A layer with log-scales moved away from float16's values, and some weights beyond the outer codes."""
    rng = torch.Generator().manual_seed(seed)
    linear = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=rng) + shift)
        linear.bias.copy_(torch.randn(shape[0], generator=rng))
    made = LsqLinear(linear, bits=bits, group_size=group, symmetric=symmetric)
    with torch.no_grad():
        made.log_scale.add_(0.3 * torch.randn(made.log_scale.shape, generator=rng) - 0.1)
    return made


CASES = [
    (bits, symmetric, shape) for bits in (2, 3, 4, 8) for symmetric in (True, False) for shape in ((6, 96), (3, 64))
]


@pytest.mark.parametrize(("bits", "symmetric", "shape"), CASES)
def test_the_grid_and_its_gradient_are_the_papers(bits: int, symmetric: bool, shape: tuple[int, int]) -> None:
    one = layer(bits, bits=bits, symmetric=symmetric, shape=shape, shift=0.4)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    rounded = one.rounded()
    rounded.backward(upstream)
    half, top = 2 ** (bits - 1), 2**bits - 1
    codes = one.quantized_weight().codes
    outside = 0
    for o in range(shape[0]):
        sums = [0.0] * one.log_scale.shape[1]
        for i in range(shape[1]):
            g, w = i // 64, one.weight[o, i].item()
            s = float(torch.tensor(math.exp(one.log_scale[o, g].item())).half())
            z = half if one.zero is None else half + int(one.zero[o, g])
            q = min(max(round(w / s) + z, 0), top)
            assert int(codes[o, i]) == q
            assert rounded[o, i].item() == pytest.approx(s * (q - z), rel=1e-6)
            inside = -z <= w / s <= top - z
            outside += not inside
            sums[g] += (q - z - (w / s if inside else 0.0)) * upstream[o, i].item()
            assert one.weight.grad[o, i].item() == (upstream[o, i].item() if inside else 0.0)
        for g, total in enumerate(sums):
            n = min(64, shape[1] - 64 * g)
            scaled = total / math.sqrt(n * (half - 1 if symmetric else top))
            s = math.exp(one.log_scale[o, g].item())  # of the logarithm
            assert one.log_scale.grad[o, g].item() == pytest.approx(scaled * s, rel=1e-4, abs=1e-6)
    assert outside > 0 or bits == 8


@pytest.mark.parametrize("symmetric", [True, False])
def test_torchs_own_learnable_quantization_agrees(symmetric: bool) -> None:
    one = layer(4, bits=4, symmetric=symmetric, shape=(8, 128), shift=0.3)
    upstream = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    one.rounded().backward(upstream)
    rows = one.weight.detach().reshape(-1, 64).requires_grad_()
    scale = one.scale().detach().flatten().requires_grad_()
    zero = torch.full_like(scale, 8.0) if one.zero is None else 8.0 + one.zero.flatten().float()
    factor = 1 / math.sqrt(64 * (7 if symmetric else 15))
    theirs = torch._fake_quantize_learnable_per_channel_affine(rows, scale, zero, 0, 0, 15, factor)
    theirs.backward(upstream.reshape(-1, 64))
    assert torch.allclose(theirs.reshape(8, 128), one.rounded(), atol=1e-6)
    # theirs takes weights that round to an outer code as inside; the paper's bounds are the codes themselves
    steps = rows.detach() / scale.detach()[:, None] + zero[:, None]
    between = ((steps < 0) & (steps > -0.5)) | ((steps > 15) & (steps < 15.5))
    same = ~between.reshape(8, 128)
    assert torch.equal(one.weight.grad[same], rows.grad.reshape(8, 128)[same])
    whole = ~between.any(1)
    assert 4 <= int(whole.sum()) < 16 or not between.any()
    ours = (one.log_scale.grad / one.log_scale.detach().exp()).flatten()
    assert torch.allclose(ours[whole], scale.grad[whole], rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans(), n=st.integers(1, 90),
    group=st.integers(1, 100), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_it_computes_with_what_is_stored(
    seed: int, bits: int, symmetric: bool, n: int, group: int, dtype: torch.dtype
) -> None:
    one = layer(seed, bits=bits, symmetric=symmetric, shape=(4, n), group=group, shift=0.2)
    weight = one.quantized_weight()
    assert torch.equal(one.rounded().to(dtype), weight.dequantize(dtype))
    stored = QuantizedLinear.from_weight(weight, bias=one.bias, dtype=dtype, execution="packed")
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    if dtype == torch.float32:
        assert torch.equal(one(x), stored(x))
    else:  # float32 weights that are trained in mixed precision
        with torch.autocast("cpu", dtype=dtype):
            found = one(x)
        assert torch.equal(found, functional.linear(x, stored.weight, one.bias.to(dtype)))


def squared_error(weight: Tensor, levels: Tensor) -> Tensor:
    return (weight - levels).square().sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_search_is_the_best_of_the_candidates(bits: int) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(2)) ** 3
    half, top = 2 ** (bits - 1), 2**bits - 1
    scale, none = search(weight, bits, 32, True)
    asymmetric, zero = search(weight, bits, 32, False)
    assert none is None and zero is not None and zero.dtype == torch.int8
    shares = [0.3 + 0.9 * i / 19 for i in range(20)]
    for row in range(5):
        for g, group in enumerate(weight[row].double().split(32)):

            def error(s: float, z: int, group: Tensor = group) -> float:
                return float((((group / s).round() + z).clamp(0, top).sub(z) * s - group).square().sum())

            found = error(scale[row, g].item(), half)
            tried = [error(float((group.abs().max() / (half - 1) * share).half()), half) for share in shares]
            assert found == pytest.approx(min(tried), rel=1e-2)
            low, high = min(0.0, float(group.min())), max(0.0, float(group.max()))
            tried = []
            for share in shares:
                s = float(torch.tensor((high - low) * share / top).half())
                middle = (low + high) / 2
                tried.append(error(s, min(max(round(-(middle - s * top / 2) / s), 0), top)))
            found = error(asymmetric[row, g].item(), half + int(zero[row, g]))
            assert found == pytest.approx(min(tried), rel=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_beats_round_to_nearest(bits: int, symmetric: bool) -> None:
    linear = nn.Linear(128, 32)
    spec = load_spec({"method": "rtn", "bits": bits, "group_size": 64, "symmetric": symmetric})
    nearest = quantize_weight(linear.weight, spec).dequantize(torch.float32)
    one = LsqLinear(linear, bits=bits, group_size=64, symmetric=symmetric)
    assert squared_error(linear.weight, one.rounded()).sum() < 0.95 * squared_error(linear.weight, nearest).sum()


def test_training_learns_weights_and_step_sizes() -> None:
    """Towards another layer's outputs, step sizes alone lower the loss, and weights with them lower it much more."""
    rng = torch.Generator().manual_seed(3)
    x, linear = torch.randn(128, 32, generator=rng), nn.Linear(32, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 32, generator=rng))
    target = x @ (linear.weight.detach() + 0.7 * torch.randn(4, 32, generator=rng)).T
    losses = {}
    for learned in ((), ("log_scale",), ("weight", "log_scale")):
        one = LsqLinear(copy.deepcopy(linear), bits=3, group_size=16, symmetric=True)
        optimiser = torch.optim.Adam([getattr(one, name) for name in learned] or [nn.Parameter(x)], lr=0.02)
        for _ in range(100):
            loss = functional.mse_loss(one(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses[learned] = loss.item()
    assert losses["weight", "log_scale"] < 0.5 * losses["log_scale",] < 0.5 * losses[()]


def test_backward_keeps_no_copies_of_the_weight() -> None:
    one = layer(shape=(32, 96))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        one.rounded()
    large = [t for t in kept if t.numel() == one.weight.numel()]
    assert [t.data_ptr() for t in large] == [one.weight.data_ptr()]


def test_step_sizes_stay_in_float16() -> None:
    one = layer()
    with torch.no_grad():
        one.log_scale[0].fill_(-80.0)
        one.log_scale[1].fill_(80.0)
        one.log_scale[2].fill_(0.1)
    scale = one.scale()
    assert scale[:2, 0].tolist() == [2.0**-24, 65504.0]
    assert torch.equal(scale, one.quantized_weight().scale.float())
    assert bool(one.rounded().isfinite().all())


def test_it_takes_the_layer_over() -> None:
    linear = nn.Linear(10, 3, bias=False).eval()
    one = LsqLinear(linear, bits=4, group_size=64, symmetric=False)
    assert one.weight is linear.weight and one.bias is None and not one.training
    assert one.group_size == 10
    assert one.hash_before == tensor_hash(linear.weight)
    assert set(one.state_dict()) == {"weight", "log_scale", "zero"}
    outer = nn.Sequential(one, nn.Linear(3, 3))
    assert lsq_layers(outer) == {"0": one}
    again = LsqLinear(nn.Linear(10, 3, bias=False), bits=4, group_size=64, symmetric=False)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.rounded(), one.rounded())


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_stay_zero(symmetric: bool) -> None:
    linear = nn.Linear(64, 2)
    nn.init.zeros_(linear.weight)
    one = LsqLinear(linear, bits=2, group_size=32, symmetric=symmetric)
    assert not one.rounded().any()


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "1 weights are NaN or infinite"), (math.inf, "1 weights"), (1e6, "beyond float16")],
)
def test_weights_that_have_no_grid(value: float, message: str) -> None:
    linear = nn.Linear(64, 2)
    with torch.no_grad():
        linear.weight[1, 3] = value
    with pytest.raises(QuantizationError, match=message):
        LsqLinear(linear, bits=2, group_size=64, symmetric=True)
