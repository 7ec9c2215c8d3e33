"""int4 kernels: exact codes, scales and zero-points back, products within the stated bound, weights bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitquake.model_wrappers.quantizers import kernels
from bitquake.model_wrappers.quantizers.kernels import CpuInt4, CudaInt4, Int4Kernel
from bitquake.model_wrappers.quantizers.linear import LinearLayout, QuantizedLinear
from bitquake.model_wrappers.quantizers.nibbles import UnknownOrder, block_rows, tile_order
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight


def weight(
    out_features: int, in_features: int, group: int, zero: str = "integer", *, per_tensor: bool = False, seed: int = 0
) -> QuantizedWeight:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=rng)
    shape = (1, 1) if per_tensor else (out_features, -(-in_features // group))
    scale = (torch.rand(shape, generator=rng) * 0.02 + 1e-4).half()
    integers = torch.randint(-8, 8, shape, generator=rng).to(torch.int8)
    real = (torch.randn(shape, generator=rng) * 4).clamp(-8, 8).half()
    return QuantizedWeight(codes, scale, {"symmetric": None, "integer": integers, "real": real}[zero], 4, group)


def brute_force(w: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The weight in stored columns and ``2**-8 * (|code - 8| + |zero|) * scale``, both float64, by the formulas."""
    out_features, in_features = w.codes.shape
    exact, bound = torch.empty(2, out_features, in_features, dtype=torch.float64)
    for column in range(in_features):
        g = 0 if w.per_tensor else column // w.group_size
        code = w.codes[:, column].double() - 8
        scale = w.scale[:, g].double()
        zero = torch.zeros_like(scale) if w.zero is None else w.zero[:, g].double()
        exact[:, column] = scale * (code - zero)
        bound[:, column] = 2.0**-8 * (code.abs() + zero.abs()) * scale
    return exact, bound


SHAPES = [(64, 128, 64), (208, 96, 96), (16, 32, 32), (112, 512, 256), (80, 384, 384), (1280, 192, 64)]


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_product_is_within_the_stated_bound(out_features: int, in_features: int, group: int, zero: str) -> None:
    w = weight(out_features, in_features, group, zero)
    kernel = Int4Kernel.from_weight(w)
    exact, bound = brute_force(w)
    for rows in (1, 5, kernel.many_rows):
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
        y, wanted = kernel.matmul(x).double(), x.double() @ exact.T
        adding = (in_features + 2) * 2.0**-24 * (x.double().abs() @ exact.abs().T + x.double().abs() @ bound.T)
        moved = x.double().abs() @ (bound.T if rows < kernel.many_rows else 2.0**-8 * exact.abs().T)
        assert ((y - wanted).abs() <= 2.0**-8 * (wanted.abs() + moved + adding) + moved + 2 * adding).all()


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES[:3])
def test_kernel_weight_is_what_the_operator_computes_with(out_features: int, in_features: int, group: int) -> None:
    w = weight(out_features, in_features, group, "real")
    kernel = Int4Kernel.from_weight(w)
    seen = torch.cat([kernel.matmul(row[None]) for row in torch.eye(in_features, dtype=torch.bfloat16)]).T
    assert torch.equal(seen, kernel.kernel_weight().bfloat16())
    exact, bound = brute_force(w)
    difference = (kernel.kernel_weight().double() - exact).abs()
    assert (difference <= bound * (1 + 1e-5)).all()
    assert difference.max() > 0  # the bound is no formality


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_many_rows_use_the_weight_of_dequantize_bit_by_bit(
    out_features: int, in_features: int, group: int, zero: str
) -> None:
    w = weight(out_features, in_features, group, zero)
    kernel = Int4Kernel.from_weight(w)
    rows = max(in_features, kernel.many_rows)
    seen = kernel.matmul(torch.eye(rows, in_features, dtype=torch.bfloat16))[:in_features].T
    assert torch.equal(seen, w.dequantize(torch.bfloat16))


def test_per_tensor_order_shapes_and_threads() -> None:
    w = weight(64, 128, 128, per_tensor=True)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    ordered = replace(w, order=order)
    plain, kernel = Int4Kernel.from_weight(w), Int4Kernel.from_weight(ordered)
    assert torch.equal(kernel.scale(), w.scale)
    assert kernel.scale().shape == (1, 1)
    x = torch.randn(3, 40, 256, dtype=torch.bfloat16)[..., ::2]  # not contiguous
    assert torch.equal(kernel.matmul(x), plain.matmul(x[..., order.long()]))
    assert torch.equal(kernel.matmul(x[0, :7]), plain.matmul(x[0, :7][..., order.long()]))
    assert kernel.matmul(x).shape == (3, 40, 64)
    assert kernel.matmul(x[0, 0]).shape == (64,)
    assert kernel.matmul(x[:0]).shape == (0, 40, 64)
    threads = torch.get_num_threads()
    try:
        one_and_two = []
        for n in (1, 2):
            torch.set_num_threads(n)
            one_and_two.append((kernel.matmul(x[0, :3]), kernel.codes()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one_and_two[0][0], one_and_two[1][0])
    assert torch.equal(one_and_two[0][1], one_and_two[1][1])


_EXTREME_HALF = [0.0, 6e-8, 5.96e-7, 6.1e-5, 1.0, 1.0009765625, 0.333251953125, 2047.0, 65504.0]


@settings(max_examples=60, deadline=None)
@given(
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    zero_dtype=st.sampled_from([None, torch.int8, torch.float16, torch.float32]),
    scales=st.lists(st.sampled_from(_EXTREME_HALF) | st.floats(2.0**-23, 60000, width=16), min_size=32, max_size=32),
    zeros=st.lists(st.integers(-128, 127) | st.floats(-500, 500, width=16), min_size=32, max_size=32),
)
def test_scale_and_zero_come_back_exactly(
    scale_dtype: torch.dtype, zero_dtype: torch.dtype | None, scales: list[float], zeros: list[float]
) -> None:
    scale = torch.tensor(scales, dtype=torch.float64).reshape(16, 2).to(scale_dtype)
    zero = torch.tensor(zeros, dtype=torch.float64).reshape(16, 2)
    stored = None if zero_dtype is None else zero.clamp(-128, 127).to(zero_dtype)
    w = QuantizedWeight(torch.full((16, 64), 3, dtype=torch.uint8), scale, stored, 4, 32)
    kernel = Int4Kernel.from_weight(w)
    assert kernel.scale().dtype == scale_dtype
    assert torch.equal(kernel.scale(), scale)
    back = kernel.zero()
    if stored is None:
        assert back is None
    else:
        assert back is not None and back.dtype == stored.dtype
        assert torch.equal(back, stored)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_held_bytes(group: int, zero: str) -> None:
    kernel = Int4Kernel.from_weight(weight(256, 512, group, zero))
    buffers = [kernel.packed, kernel.pairs, kernel.scale_rest, kernel.zero_rest]
    by_hand = sum(b.numel() * b.element_size() for b in buffers if b is not None)
    assert kernel.held_bytes == by_hand == sum(b.nbytes for b in kernel.buffers())
    assert by_hand <= 0.30 * 2 * 256 * 512


def test_gradient_of_the_input() -> None:
    w = weight(80, 96, 32)
    x = torch.randn(2, 3, 96, dtype=torch.bfloat16, requires_grad=True)
    Int4Kernel.from_weight(w).matmul(x).sum().backward()
    assert x.grad is not None
    wanted = w.dequantize(torch.bfloat16).double().sum(0).expand(2, 3, -1)
    torch.testing.assert_close(x.grad.double(), wanted, rtol=2e-2, atol=2e-3)


def layout(bits: int = 4, group: int = 64) -> LinearLayout:
    return LinearLayout(bits=bits, group_size=group)


@pytest.mark.parametrize(
    ("given_layout", "in_features", "out_features", "dtype", "device", "reason"),
    [
        (layout(3), 128, 64, torch.bfloat16, "cpu", "not one of 3 bits"),
        (layout(), 128, 64, torch.float32, "cpu", "not in float32"),
        (layout(), 128, 64, torch.bfloat16, "meta", "no int4 kernel for meta"),
        (layout(), 100, 64, torch.bfloat16, "cpu", "groups of 64 in 100"),
        (layout(group=48), 96, 64, torch.bfloat16, "cpu", "groups of 48 in 96"),
        (layout(), 128, 40, torch.bfloat16, "cpu", "16 output features, not 40"),
    ],
)
def test_what_does_not_suit(
    given_layout: LinearLayout, in_features: int, out_features: int, dtype: torch.dtype, device: str, reason: str
) -> None:
    why = Int4Kernel.suits(given_layout, in_features, out_features, dtype, device)
    assert why is not None and reason in why


@pytest.mark.parametrize(("out_features", "in_features", "group"), SHAPES)
def test_what_suits(out_features: int, in_features: int, group: int) -> None:
    assert Int4Kernel.suits(layout(group=group), in_features, out_features, torch.bfloat16, "cpu") is None


def test_from_weight_refuses_what_does_not_suit() -> None:
    with pytest.raises(ValueError, match=r"no kernel for 4 bits in torch\.float32"):
        Int4Kernel.from_weight(weight(16, 32, 32), torch.float32)
    with pytest.raises(ValueError, match="groups of 32 in 48"):
        Int4Kernel.from_weight(weight(16, 48, 32))


def test_a_misread_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Callable[[int], Tensor] = lambda rows: torch.arange(rows).flip(0)  # noqa: E731
    monkeypatch.setattr(kernels, "_cpu_rows", wrong)
    with pytest.raises(RuntimeError, match="do not read back"):
        Int4Kernel.from_weight(weight(64, 64, 32))


def test_unknown_orders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(codes: Tensor) -> Tensor:
        return codes[:, ::2] << 4 | codes[:, ::2]

    def long(codes: Tensor) -> Tensor:
        return codes

    for pack in (lossy, long):
        with pytest.raises(UnknownOrder):
            tile_order(pack, 4, 8)
    with pytest.raises(UnknownOrder):
        block_rows(lambda codes: torch.cat((codes[::2] << 4 | codes[1::2], codes[:0])).t().contiguous())

    def unknown() -> int:
        raise UnknownOrder

    monkeypatch.setattr(kernels, "_cpu_block", unknown)
    assert "not understood" in str(Int4Kernel.suits(layout(), 128, 64, torch.bfloat16, "cpu"))


_OTHER_INSTRUCTIONS = """
import torch
from bitquake.model_wrappers.quantizers.kernels import Int4Kernel
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight
for out_features, in_features, group in {shapes}:
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scale = (torch.rand(out_features, in_features // group) + 0.1).half()
    w = QuantizedWeight(codes, scale, torch.randint(-8, 8, scale.shape).to(torch.int8), 4, group)
    kernel = Int4Kernel.from_weight(w)
    assert torch.equal(kernel.codes(), codes)
    eye = torch.eye(max(in_features, kernel.many_rows), in_features, dtype=torch.bfloat16)
    assert torch.equal(kernel.matmul(eye)[:in_features].T, w.dequantize(torch.bfloat16))
    few = torch.cat([kernel.matmul(row[None]) for row in eye[:in_features]])
    assert torch.equal(few.T, kernel.kernel_weight().bfloat16())
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_other_instruction_sets_pack_otherwise(instructions: str) -> None:
    code = _OTHER_INSTRUCTIONS.format(shapes=[(112, 96, 32), (16, 64, 64)])
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def literal_cuda_pack(codes: Tensor, inner: int) -> Tensor:
    """``_convert_weight_to_int4pack`` on CUDA, nibble by nibble: the B operand of mma.m16n8k16 (PTX ISA, fragments).

    Lane t of a warp holds, for its column n = t // 4 of a tile of 16 k, the k of 2 (t % 4) + {0, 1, 8, 9}; two such
    tiles fill one 32-bit word, first the even places of the eight, then the odd ones.
    """
    n_features, k_features = codes.shape
    packed = np.zeros((n_features // 8, k_features // (16 * inner), 32, inner // 2), dtype=np.uint32)
    values = codes.numpy()
    for n_tile, k_super, lane, word in np.ndindex(packed.shape):
        eight = []
        for tile in (2 * word, 2 * word + 1):
            k = k_super * 16 * inner + tile * 16 + lane % 4 * 2
            eight += [values[n_tile * 8 + lane // 4, k + step] for step in (0, 1, 8, 9)]
        places = [eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        packed[n_tile, k_super, lane, word] = sum(int(value) << 4 * place for place, value in enumerate(places))
    return torch.from_numpy(packed.view(np.int32))


@pytest.mark.parametrize(("in_features", "group", "inner"), [(256, 64, 8), (192, 64, 4), (96, 32, 2)])
def test_cuda_layout_is_read_back_and_dequantized(
    monkeypatch: pytest.MonkeyPatch, in_features: int, group: int, inner: int
) -> None:
    """Without the device: its packing by a literal model of it, the reading back and de-quantizing by the real code."""
    monkeypatch.setattr(kernels, "_cuda_pack", literal_cuda_pack)
    monkeypatch.setattr(kernels, "_CUDA_CHUNK", 16 * in_features)  # more than one part
    monkeypatch.setattr(kernels, "_cuda_back", kernels._cuda_back.__wrapped__)
    assert kernels._inner_tiles(in_features) == inner
    w = weight(40, in_features, group, "real")
    kernel = CudaInt4(w)
    assert kernel.packed.shape == (5, in_features // (16 * inner), 32, inner // 2)
    assert torch.equal(kernel.codes(), w.codes)
    eye = torch.eye(max(in_features, kernel.many_rows), in_features, dtype=torch.bfloat16)
    assert torch.equal(kernel.matmul(eye)[:in_features].T, w.dequantize(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("out_features", "in_features", "group"), [(64, 256, 64), (40, 192, 192), (8, 96, 32)])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_on_cuda(out_features: int, in_features: int, group: int, zero: str) -> None:
    w = weight(out_features, in_features, group, zero)
    assert Int4Kernel.suits(layout(group=group), in_features, out_features, torch.bfloat16, "cuda") is None
    kernel = Int4Kernel.from_weight(w.to("cuda"))
    assert torch.equal(kernel.packed.cpu(), literal_cuda_pack(w.codes, kernels._inner_tiles(in_features)))
    eye = torch.eye(max(in_features, kernel.many_rows), in_features, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(kernel.matmul(eye)[:in_features].T.cpu(), w.dequantize(torch.bfloat16))
    exact, bound = brute_force(w)
    few = torch.cat([kernel.matmul(part) for part in eye[:in_features].split(kernel.many_rows // 2)]).T.cpu().double()
    # in bfloat16 itself, there: the product and the sum are rounded once more
    assert ((few - exact).abs() <= bound + 2.0**-8 * exact.abs() + 2.0**-8 * bound).all()
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, in_features, dtype=torch.bfloat16, device="cuda")
    kernel.matmul(x)
    with torch.cuda.graph(graph):
        y = kernel.matmul(x)
    x.copy_(eye[:1])
    graph.replay()
    assert torch.equal(y, kernel.matmul(eye[:1]))


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_quantized_linear_with_a_kernel(zero: str) -> None:
    w = weight(128, 256, 128, zero)
    bias = torch.nn.Parameter(torch.randn(128, dtype=torch.bfloat16), requires_grad=False)
    make = lambda execution: QuantizedLinear.from_weight(  # noqa: E731
        w, bias=bias, dtype=torch.bfloat16, execution=execution
    )
    layer, plain = make("packed"), make("packed")
    assert layer.use_kernel() is None
    assert isinstance(layer.kernel, CpuInt4)
    assert layer.held_bytes <= 0.30 * 2 * w.codes.numel()
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer.weight, plain.weight)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    exact, bound = brute_force(w)
    slack = x.double().abs() @ bound.T + 2.0**-7 * (x.double().abs() @ exact.abs().T)
    assert ((layer(x) - plain(x)).double().abs() <= slack + 2.0**-6).all()
    layer.drop_kernel()
    assert torch.equal(layer(x), plain(x))
    assert "simulated" in str(make("simulated").use_kernel())
