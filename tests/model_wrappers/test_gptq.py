"""GPTQ against the published algorithm column by column, against brute force, and against llm-compressor."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers.gptq import HessianSum, gptq
from bitquake.model_wrappers.quantizers.options import GptqOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

ORACLE = Path(__file__).parents[1] / "oracles" / "llmcompressor_gptq.py"
LLMCOMPRESSOR = ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0")


def layer(rows: int, columns: int, *, seed: int = 0, tokens: int = 3) -> tuple[Tensor, Tensor]:
    """Weights, and inputs whose features hang together and differ in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    inputs = torch.randn(tokens * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return weight, inputs


def hessian_of(inputs: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    total = HessianSum(inputs.shape[1], dtype=dtype)
    total.add(inputs)
    return total.hessian()


def lost(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    """Relative Frobenius error of the layer's output."""
    gap = (rounded.double() - weight.double()) @ inputs.double().T
    return float(gap.norm() / (weight.double() @ inputs.double().T).norm())


def fitted(part: Tensor, bits: int, symmetric: bool, mse: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero-point, counted from code 0, for each row of a group."""
    top = 2**bits - 1
    scales, zeros = [], []
    for row in part:
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        best, chosen = float("inf"), None
        for step in range(80 if mse else 1):
            left, right = low * (1 - step / 100), high * (1 - step / 100)
            scale = torch.tensor(max(right - left, 1e-5) / top, dtype=torch.float64).half().double()
            zero = torch.tensor(2.0 ** (bits - 1)) if symmetric else (-left / scale).round().clamp(0, top)
            grid = (((row / scale).round() + zero).clamp(0, top) - zero) * scale
            error = float((grid - row).abs().pow(2.4).sum())
            if error < best:
                best, chosen = error, (scale, zero)
        assert chosen is not None
        scales.append(chosen[0])
        zeros.append(chosen[1])
    return torch.stack(scales), torch.stack(zeros).double()


def published(
    weight: Tensor, hessian: Tensor, bits: int, group: int, symmetric: bool, options: GptqOptions
) -> tuple[Tensor, Tensor]:
    """Frantar et al.'s algorithm in float64, one column after the other: codes in stored order, and the weight.

    Dead features come last in the order; the published code sorts them by the 1 that it puts on their diagonal.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if options.act_order else torch.arange(columns)
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    if options.static_groups:
        grids = {g: fitted(w[:, g * group : (g + 1) * group], bits, symmetric, options.mse)
                 for g in range(-(-columns // group))}  # fmt: skip
    w, h = w[:, order], h[order][:, order]
    h += options.damp * h.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes, rounded = torch.zeros_like(w), torch.zeros_like(w)
    for i in range(columns):
        g = int(order[i]) // group if options.static_groups else i // group
        if g not in grids:
            grids[g] = fitted(w[:, i : i + group], bits, symmetric, options.mse)
        scale, zero = grids[g]
        codes[:, i] = ((w[:, i] / scale).round() + zero).clamp(0, 2**bits - 1)
        rounded[:, i] = (codes[:, i] - zero) * scale
        error = (w[:, i] - rounded[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    back = torch.argsort(order)
    return (codes[:, back] if options.static_groups else codes).to(torch.uint8), rounded[:, back]


OPTIONS = {
    "plain": GptqOptions(),
    "act_order": GptqOptions(act_order=True),
    "static": GptqOptions(static_groups=True),
    "static act_order": GptqOptions(static_groups=True, act_order=True, damp=0.05),
    "mse": GptqOptions(mse=True),
    "small blocks": GptqOptions(block=7, act_order=True),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 192, 64), (9, 127, 64), (5, 100, 16), (6, 150, 150)])
def test_codes_are_those_of_the_published_algorithm(
    rows: int, columns: int, group: int, bits: int, symmetric: bool
) -> None:
    weight, inputs = layer(rows, columns, seed=columns + bits)
    hessian = hessian_of(inputs)
    codes, rounded = published(weight, hessian, bits, group, symmetric, GptqOptions())
    found = gptq(weight, hessian, bits=bits, group_size=group, symmetric=symmetric, options=GptqOptions())
    assert torch.equal(found.codes, codes)
    assert found.order is None and (found.zero is None) == symmetric and found.scale.dtype == torch.float16
    torch.testing.assert_close(found.dequantize(torch.float64), rounded, rtol=1e-6, atol=1e-9)
    # in float32 a weight on the border of two codes may fall either way, and what follows then differs
    single = gptq(weight, hessian.float(), bits=bits, group_size=group, symmetric=symmetric, options=GptqOptions())
    assert lost(weight, single.dequantize(torch.float32), inputs) <= lost(weight, rounded, inputs) * 1.02
    assert (single.codes != codes).double().mean() < 0.02


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_published_algorithm(name: str, symmetric: bool) -> None:
    options = OPTIONS[name]
    weight, inputs = layer(12, 120, seed=7)
    inputs[:, [3, 64, 119]] = 0.0  # dead features
    hessian = hessian_of(inputs)
    for bits, group in ((3, 32), (4, 50), (2, 120)):
        codes, rounded = published(weight, hessian, bits, group, symmetric, options)
        found = gptq(weight, hessian, bits=bits, group_size=group, symmetric=symmetric, options=options)
        grid = found.dequantize(torch.float64)
        torch.testing.assert_close(grid, rounded, rtol=1e-6, atol=1e-9)
        assert (grid[:, [3, 64, 119]] == 0.0).all()
        has_order = options.act_order and not options.static_groups and group < 120
        assert (found.order is not None) == has_order
        if has_order or not options.act_order:
            assert torch.equal(found.codes, codes)


def test_a_large_layer_in_float32_loses_as_much_as_the_published_algorithm() -> None:
    weight, inputs = layer(128, 640, seed=3)
    codes, rounded = published(weight, hessian_of(inputs), 4, 128, False, GptqOptions())
    found = gptq(
        weight, hessian_of(inputs, torch.float32), bits=4, group_size=128, symmetric=False, options=GptqOptions()
    )
    assert (found.codes != codes).double().mean() < 0.01
    expected = lost(weight, rounded, inputs)
    assert lost(weight, found.dequantize(torch.float32), inputs) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("group", [16, 100])
def test_the_block_size_decides_the_speed_only(group: int) -> None:
    weight, inputs = layer(4, 100)
    hessian = hessian_of(inputs)
    first, *others = (
        gptq(weight, hessian, bits=3, group_size=group, symmetric=False, options=GptqOptions(block=block))
        for block in (1, 3, 16, 64, 1000)
    )
    assert all(torch.equal(first.codes, other.codes) and torch.equal(first.scale, other.scale) for other in others)


def test_it_stands_between_brute_force_and_rounding() -> None:
    """On GPTQ's own grid, over all 4^4 codes of a row; by rounding each weight alone; summed over 40 layers."""
    totals = {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    for seed in range(40):
        weight, inputs = layer(3, 4, seed=seed, tokens=8)
        hessian = hessian_of(inputs)
        options = GptqOptions(damp=1e-6, static_groups=True)
        found = gptq(weight, hessian, bits=2, group_size=4, symmetric=False, options=options)
        assert found.zero is not None
        scale, zero = found.scale.double(), found.zero.double() + 2
        choices = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64)
        nearest = ((weight.double() / scale).round() + zero).clamp(0, 3)
        for row in range(3):
            grids = (choices - zero[row]) * scale[row]
            gaps = torch.stack([*grids, found.dequantize(torch.float64)[row], (nearest[row] - zero[row]) * scale[row]])
            gaps -= weight[row].double()
            errors = torch.einsum("ni,ij,nj->n", gaps, hessian, gaps)
            assert errors[-2] >= errors[:-2].min() * (1 - 1e-9)
            totals["best"] += float(errors[:-2].min())
            totals["gptq"] += float(errors[-2])
            totals["nearest"] += float(errors[-1])
    assert totals["gptq"] < 0.8 * totals["nearest"]
    assert totals["gptq"] < 3.0 * totals["best"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_lose_less_than_by_rounding(bits: int, symmetric: bool) -> None:
    """The same grids with the identity for a Hessian are rounding to nearest; the order of activations helps."""
    weight, inputs = layer(64, 256, seed=bits)

    def error(hessian: Tensor, act_order: bool = False) -> float:
        options = GptqOptions(static_groups=True, act_order=act_order)
        found = gptq(weight, hessian, bits=bits, group_size=64, symmetric=symmetric, options=options)
        return lost(weight, found.dequantize(torch.float32), inputs)

    nearest = error(torch.eye(256))
    assert error(hessian_of(inputs)) < 0.8 * nearest
    assert error(hessian_of(inputs), act_order=True) < 0.7 * nearest


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(2, 8), st.integers(1, 80), st.booleans(), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_properties(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, act_order: bool, seed: int
) -> None:
    weight, inputs = layer(rows, columns, seed=seed)
    options = GptqOptions(act_order=act_order)
    args = {"bits": bits, "group_size": group, "symmetric": symmetric, "options": options}
    hessian = hessian_of(inputs)
    kept = weight.clone(), hessian.clone()
    whole = gptq(weight, hessian, **args)
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])
    assert whole.group_size == min(group, columns) and int(whole.codes.max()) < 2**bits
    if whole.order is not None:
        assert torch.equal(whole.order.long().sort().values, torch.arange(columns))
        assert (hessian.diagonal()[whole.order.long()].diff() <= 0).all()
    # rows do not see each other, and the unit of the activations does not matter
    for row in range(rows):
        assert torch.equal(gptq(weight[row : row + 1], hessian, **args).codes, whole.codes[row : row + 1])
    assert torch.equal(gptq(weight, hessian * 4.0, **args).codes, whole.codes)
    # with inputs that do not hang together each weight is rounded by itself, in any order
    alone = gptq(weight, torch.diag(hessian.diagonal()), **(args | {"options": GptqOptions()}))
    zero = 0.0 if alone.zero is None else alone.zero.double()
    each = torch.arange(columns) // alone.group_size
    steps = weight.double() / alone.scale.double()[:, each]
    expected = (steps.round() + (zero if alone.zero is None else zero[:, each])).clamp(
        -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    assert torch.equal(alone.codes.double(), expected + 2 ** (bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_the_one_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    weight, _ = layer(32, 64, seed=bits)
    weight[3] = weight[3].abs()  # zero is on the grid all the same
    arguments = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), arguments)
    found = gptq(weight, torch.eye(64), bits=bits, group_size="channel", symmetric=symmetric, options=GptqOptions())
    torch.testing.assert_close(found.scale.float(), scale, rtol=2**-11, atol=0)  # ours is rounded to float16
    if found.zero is not None:
        assert (found.zero.int() - zero.int()).abs().max() <= (bits == 8)  # a half may fall either way
    theirs = quantization.fake_quantize(weight, found.scale.float(), None if symmetric else found.zero, arguments)
    torch.testing.assert_close(found.dequantize(torch.float32), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hessian_sum_is_two_over_n_of_the_rows(dtype: torch.dtype) -> None:
    x = torch.randn(60, 10, generator=torch.Generator().manual_seed(1))
    total = HessianSum(10, dtype=dtype)
    for batch in (x[:10], x[10:40].reshape(2, 3, 5, 10), x[40:41][0], x[41:].T.contiguous().T, x[:0]):
        total.add(batch)
    assert total.rows == 60 and total.hessian().dtype == dtype
    expected = 2.0 / 60 * sum(torch.outer(row, row) for row in x.double())
    torch.testing.assert_close(total.hessian().double(), expected, rtol=1e-5, atol=1e-6)
    half = HessianSum(10)
    half.add(x.bfloat16())
    torch.testing.assert_close(half.hessian(), hessian_of(x.bfloat16().double(), torch.float32))


def test_hessian_sum_holds_no_batch_and_not_the_graph() -> None:
    total = HessianSum(4)
    total.add(torch.ones(3, 4, requires_grad=True))
    assert not total.hessian().requires_grad


def test_a_layer_that_no_sample_reached_is_an_error() -> None:
    total = HessianSum(4)
    with pytest.raises(QuantizationError, match="no calibration sample reached this layer"):
        total.hessian()
    total.add(torch.zeros(0, 4))
    with pytest.raises(QuantizationError, match="no calibration sample"):
        total.hessian()
    with pytest.raises(QuantizationError, match="a Hessian of 4 input features got a batch of 5"):
        total.add(torch.zeros(2, 5))


def quantized(weight: Tensor, hessian: Tensor, **changed: object) -> QuantizedWeight:
    given = {"bits": 4, "group_size": 8, "symmetric": False, "options": GptqOptions(), **changed}
    return gptq(weight, hessian, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8, got 1"),
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"group_size": 0}, "positive whole number or channel, got 0"),
        ({"group_size": "tensor"}, "positive whole number or channel, got 'tensor'"),
        ({"weight": torch.ones(3, 8).index_fill(0, torch.tensor(1), torch.nan)}, "8 weights are NaN or infinite"),
        ({"hessian": torch.full((8, 8), torch.inf)}, "64 entries of the Hessian are NaN or infinite: activations"),
        ({"hessian": torch.eye(8) * torch.nan}, "entries of the Hessian are NaN"),
        ({"hessian": torch.eye(7)}, r"a weight of shape \(3, 8\) needs a Hessian of .* got \(7, 7\)"),
        ({"hessian": torch.zeros(8, 8)}, "every calibration input of this layer was zero"),
        ({"hessian": -torch.eye(8)}, "not positive definite, not even with the whole mean"),
        ({"weight": torch.full((3, 8), 1e7)}, "beyond float16"),
    ],
)
def test_bad_input_is_an_error(changed: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"weight": torch.ones(3, 8), "hessian": torch.eye(8), **changed}
    with pytest.raises(QuantizationError, match=message):
        quantized(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_longer_than_the_row_and_channel_are_the_row(symmetric: bool) -> None:
    weight, inputs = layer(3, 40)
    hessian = hessian_of(inputs)
    row, longer, channel = (
        quantized(weight, hessian, group_size=size, symmetric=symmetric) for size in (40, 1000, "channel")
    )
    assert row.group_size == longer.group_size == channel.group_size == 40
    assert torch.equal(row.codes, longer.codes) and torch.equal(row.codes, channel.codes)


def test_fewer_samples_than_features_need_damping_only() -> None:
    weight, inputs = layer(8, 64)
    found = quantized(weight, hessian_of(inputs[:1], torch.float32)).dequantize(torch.float32)
    assert lost(weight, found, inputs[:1]) < 0.02  # of one token's output nearly nothing


def test_a_hessian_that_is_not_quite_positive_gets_more_damping(log: list[str]) -> None:
    weight, inputs = layer(8, 32)
    hessian = hessian_of(inputs, torch.float32)
    least = torch.linalg.eigvalsh(hessian)[0]
    broken = hessian - (least + 0.03 * hessian.diagonal().mean()) * torch.eye(32)
    found = quantized(weight, broken)
    assert any("not positive definite; trying again with damp=0.1" in line for line in log)
    again = quantized(weight, broken, options=GptqOptions(damp=0.1))
    assert torch.equal(found.codes, again.codes)


def test_weights_of_zero_and_of_one_sign_stay_on_their_grid() -> None:
    weight, inputs = layer(6, 16)
    weight[0], weight[1], weight[2] = 0.0, weight[1].abs() + 0.5, -0.25
    found = quantized(weight, hessian_of(inputs), bits=8).dequantize(torch.float32)
    assert (found[0] == 0).all()
    assert lost(weight[1:3], found[1:3], inputs) < 0.01


@pytest.fixture(scope="module")
def reference() -> Iterator[tuple[Path, nn.Module, list[dict[str, Tensor]]]]:
    """The reference checkpoint and 48 block-world pictures with captions, as its processor makes them."""
    from PIL import Image

    from bitquake.model_wrappers.loading import load_model, load_processor, resolve_pretrained
    from bitquake.tasks.world.captions import captions
    from bitquake.tasks.world.scenes import render, sample_scene

    path = resolve_pretrained("bitquake/block-idefics3")
    processor = load_processor(path, revision=None, trust_remote_code=False)
    model = load_model(
        path, revision=None, dtype=torch.float32, device=torch.device("cpu"), device_map=None,
        attn_implementation=None, trust_remote_code=False,
    )  # fmt: skip
    samples = []
    for i in range(48):
        scene = sample_scene(10**9 + i, 2, 4)
        question = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
        answer = [{"type": "text", "text": captions(scene)[0]}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = processor.apply_chat_template(turns)
        samples.append(dict(processor(text=[text], images=[[Image.fromarray(render(scene))]], return_tensors="pt")))
    yield Path(path), model, samples


def hessians(model: nn.Module, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of every Linear but lm_head, from one pass of the full-precision model."""
    sums, hooks = {}, []

    def watch(name: str, linear: nn.Linear) -> Callable[..., None]:
        sums[name] = HessianSum(linear.in_features, dtype=torch.float64)
        return lambda _, arguments: sums[name].add(arguments[0])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            hooks.append(module.register_forward_pre_hook(watch(name, module)))
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for hook in hooks:
        hook.remove()
    return {name: total.hessian() for name, total in sums.items()}


@pytest.mark.network
def test_a_whole_model_loses_as_much_as_by_llmcompressor(
    reference: tuple[Path, nn.Module, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    """The library's GPTQ of the reference checkpoint, vision and language, pipeline ``basic``, on the same samples.

    Its pins do not fit this environment, so that it runs in a process with its own folder of packages. It fits every
    group before the first column (our ``static_groups``), keeps scales in float32 and factors in float32.
    """
    from safetensors.torch import load_file, save_file

    path, model, samples = reference
    packages, inputs = tmp_path / "packages", tmp_path / "inputs.safetensors"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    subprocess.run([*install, *LLMCOMPRESSOR], check=True)
    save_file({f"{i:03d}.{k}": v.contiguous() for i, sample in enumerate(samples) for k, v in sample.items()}, inputs)
    grouped = {"strategy": "group", "group_size": 32, "symmetric": False}
    runs = [
        {"num_bits": bits, **scheme}
        for bits in (8, 4, 3, 2)
        for scheme in (grouped, {**grouped, "actorder": "static"}, {"strategy": "channel", "symmetric": True})
    ]
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ORACLE), str(path), str(inputs), str(tmp_path), json.dumps(runs)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]

    seen = hessians(model, samples)
    table = []
    for i, run in enumerate(runs):
        theirs = load_file(tmp_path / f"{i}.safetensors")
        errors: dict[str, list[float]] = {"own": [], "library": []}
        for name, hessian in seen.items():
            weight = model.get_submodule(name).weight.detach()
            own = gptq(
                weight, hessian.float(), bits=run["num_bits"], group_size=run.get("group_size", "channel"),
                symmetric=run["symmetric"], options=GptqOptions(static_groups=True, act_order="actorder" in run),
            )  # fmt: skip
            for kind, rounded in (("own", own.dequantize(torch.float64)), ("library", theirs[name].double())):
                gap = rounded - weight
                errors[kind].append(float((gap @ hessian * gap).sum() / (weight.double() @ hessian * weight).sum()))
        own_error, their_error = (sum(error**0.5 for error in errors[kind]) for kind in ("own", "library"))
        by_layer = [(a / b) ** 0.5 for a, b in zip(errors["own"], errors["library"], strict=True)]
        table.append((run, own_error / their_error, min(by_layer), max(by_layer)))
    print(*table, sep="\n")
    assert len(seen) == 53
    assert all(abs(ratio - 1) <= 0.02 for _, ratio, _, _ in table), table
    assert all(least >= 0.9 and most <= 1.1 for _, _, least, most in table), table
