"""Readers of published layouts: files made by hand, packers written with loops, and compressed-tensors itself."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from bitquake.model_wrappers.quantizers.published.awq import read_awq
from bitquake.model_wrappers.quantizers.published.compressed_tensors import (
    Scheme,
    read_compressed,
    read_schemes,
    scheme_of,
)
from bitquake.model_wrappers.quantizers.published.gptq import read_gptq, wrapped_zeros
from bitquake.model_wrappers.quantizers.published.grace import read_grace, read_sidecar
from bitquake.model_wrappers.quantizers.published.stored import PublishedCheckpointError

few = settings(max_examples=25, deadline=None)


def signed(words: Sequence[int]) -> Tensor:
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in words], dtype=torch.int32)


def stream(codes: Sequence[int], bits: int) -> list[int]:
    """Codes as one long number, lowest first, cut into 32-bit words."""
    number = 0
    for i, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        number |= code << (bits * i)
    return [(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(codes) * bits // 32))]


def rows_of_words(rows: Sequence[Sequence[int]], bits: int) -> Tensor:
    return torch.stack([signed(stream(row, bits)) for row in rows])


def matrix(rng: random.Random, rows: int, columns: int, top: int) -> list[list[int]]:
    return [[rng.randrange(top) for _ in range(columns)] for _ in range(rows)]


def scales_of(rng: random.Random, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.tensor([[rng.uniform(0.001, 0.1) for _ in range(columns)] for _ in range(rows)]).to(dtype)


def weight_by_loops(
    codes: Sequence[Sequence[int]], scales: Tensor, zeros: Sequence[Sequence[int]], group_of: Sequence[int]
) -> Tensor:
    """``scale * (code - zero)`` of (out, in) codes and (out, groups) scales and zeros, in float32."""
    out = []
    for o, row in enumerate(codes):
        out.append([float(scales[o, g]) * (code - zeros[o][g]) for code, g in zip(row, group_of, strict=True)])
    return torch.tensor(out, dtype=torch.float64).float()


# AutoAWQ


def test_awq_by_hand() -> None:
    """Two inputs, eight outputs, one group. Nibbles lowest first are outputs 0 2 4 6 1 3 5 7."""
    tensors = {
        # input 0: outputs 0..7 have codes 1..8; input 1: codes 15 14 13 12 11 10 9 0
        "qweight": signed([0x86427531, 0x0ACE9BDF]).reshape(2, 1),
        # zero-points of outputs 0..7: 8 8 8 8 8 8 8 3
        "qzeros": signed([0x38888888]).reshape(1, 1),
        "scales": torch.tensor([[0.5, 1, 2, 0.25, 1, 1, 1, 4]], dtype=torch.float16),
    }
    weight = read_awq(tensors, in_features=2, out_features=8, group_size=128)
    assert weight.dequantize(torch.float32).tolist() == [
        [-3.5, 3.5], [-6, 6], [-10, 10], [-1, 1], [-3, 3], [-2, 2], [-1, 1], [20, -12],
    ]  # fmt: skip
    assert weight.zero is not None and weight.zero.flatten().tolist() == [0, 0, 0, 0, 0, 0, 0, -5]
    assert (weight.bits, weight.group_size, weight.order, weight.scale.dtype) == (4, 2, None, torch.float16)
    tensors["qzeros"] = signed([0x88888888]).reshape(1, 1)
    assert read_awq(tensors, in_features=2, out_features=8, group_size=-1).zero is None


def pack_awq(codes: Sequence[Sequence[int]]) -> Tensor:
    """(rows, outputs) in words of eight outputs."""
    return rows_of_words(
        [[row[8 * w + i] for w in range(len(row) // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)] for row in codes], 4
    )


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_awq_is_what_was_packed(eights: int, n_groups: int, group: int, seed: int) -> None:
    rng, out, columns = random.Random(seed), 8 * eights, n_groups * group
    codes, zeros = matrix(rng, columns, out, 16), matrix(rng, n_groups, out, 16)
    scales = scales_of(rng, n_groups, out)
    tensors = {"qweight": pack_awq(codes), "qzeros": pack_awq(zeros), "scales": scales}
    weight = read_awq(tensors, in_features=columns, out_features=out, group_size=group)
    expected = weight_by_loops(
        [list(row) for row in zip(*codes, strict=True)], scales.t(), [list(row) for row in zip(*zeros, strict=True)],
        [j // group for j in range(columns)],
    )  # fmt: skip
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.dequantize(torch.float16), expected.half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "scales is missing beside qweight, qzeros"),
        ({"qzeros": None}, "qzeros is missing"),
        (
            {"qweight": torch.zeros(8, 8, dtype=torch.int32)},
            r"qweight is int32 of shape \(8, 8\), expected .*\(16, 1\)",
        ),
        ({"qweight": torch.zeros(8, 2, dtype=torch.int32)}, "GEMV layout"),
        ({"qweight": torch.zeros(16, 1)}, "qweight is float32"),
        ({"scales": torch.ones(3, 8)}, "scales for 3 groups of a row of 16 weights, .* group size 8"),
        ({"scales": torch.ones(2, 9)}, r"scales is float32 of shape \(2, 9\)"),
    ],
)
def test_awq_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    tensors = {
        "qweight": torch.zeros(16, 1, dtype=torch.int32), "qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "scales": torch.ones(2, 8),
    }  # fmt: skip
    changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(PublishedCheckpointError, match=message):
        read_awq(changed, in_features=16, out_features=8, group_size=8)


def test_awq_needs_outputs_in_eights() -> None:
    with pytest.raises(PublishedCheckpointError, match="outputs in eights, and this Linear has 12"):
        read_awq({}, in_features=16, out_features=12, group_size=8)


# GPTQ


def gptq_words(codes: Sequence[Sequence[int]], bits: int) -> Tensor:
    """(out, in) codes as ``qweight``: down the columns."""
    return rows_of_words(codes, bits).t().contiguous()


@pytest.mark.parametrize(("version", "stored"), [(1, 0x77777777), (2, 0x88888888)])
def test_gptq_by_hand(version: Any, stored: int) -> None:
    """Output o has codes 0..7 shifted by o, lowest nibble first; one zero-point of 8 for each."""
    columns = [0x76543210, 0x87654321, 0x98765432, 0xA9876543, 0xBA987654, 0xCBA98765, 0xDCBA9876, 0xEDCBA987]
    tensors = {
        "qweight": signed(columns).reshape(1, 8), "qzeros": signed([stored]).reshape(1, 1),
        "scales": torch.full((1, 8), 0.5, dtype=torch.bfloat16), "g_idx": torch.zeros(8, dtype=torch.int32),
    }  # fmt: skip
    weight = read_gptq(tensors, in_features=8, out_features=8, bits=4, group_size=-1, version=version)
    assert weight.dequantize(torch.float32).tolist() == [[(i + o - 8) / 2 for i in range(8)] for o in range(8)]
    assert (weight.zero, weight.order, weight.group_size, weight.scale.dtype) == (None, None, 8, torch.bfloat16)


def test_gptq_of_three_bits_by_hand() -> None:
    """Codes 0 1 2 … 7 again and again are octal 76543210 = 0xFAC688; 32 of them fill three words."""
    tensors = {
        "qweight": signed([0x88FAC688, 0xC688FAC6, 0xFAC688FA]).reshape(3, 1).repeat(1, 32),
        "qzeros": signed([0x88FAC688, 0xC688FAC6, 0xFAC688FA]).reshape(1, 3),
        "scales": torch.ones(1, 32),
    }
    second = read_gptq(tensors, in_features=32, out_features=32, bits=3, group_size=32, version=2)
    assert second.codes[5].tolist() == [i % 8 for i in range(32)]
    assert second.zero is not None and second.zero.flatten().tolist() == [i % 8 - 4 for i in range(32)]
    first = read_gptq(tensors, in_features=32, out_features=32, bits=3, group_size=32, version=1)
    # v1 means one more, and wraps around within the field
    assert first.zero is not None and first.zero.flatten().tolist() == [(i + 1) % 8 - 4 for i in range(32)]


def test_gptq_v1_zero_of_0_borrows_from_the_next_field() -> None:
    """0x88888880 - 0x11111111 = 0x7777776F: field 1 reads 6, and still means 8."""
    tensors = {
        "qweight": torch.zeros(1, 8, dtype=torch.int32), "qzeros": signed([0x7777776F]).reshape(1, 1),
        "scales": torch.ones(1, 8),
    }  # fmt: skip
    weight = read_gptq(tensors, in_features=8, out_features=8, bits=4, group_size=8, version=1)
    assert weight.zero is not None and weight.zero.flatten().tolist() == [-8, 0, 0, 0, 0, 0, 0, 0]
    assert wrapped_zeros(tensors["qzeros"], 4, 8) == 1
    assert wrapped_zeros(signed([0x77777777]).reshape(1, 1), 4, 8) == 0


@few
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 4),
    st.sampled_from(["none", "consecutive", "shuffled", "zeros"]), st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_gptq_is_what_was_packed(
    bits: int, version: Any, outs: int, n_groups: int, act_order: str, known: bool, seed: int
) -> None:
    rng, out, columns, top = random.Random(seed), 32 * outs, 32 * n_groups, 1 << bits
    codes = matrix(rng, out, columns, top)
    lowest = 0 if version == 2 else 1  # v1 cannot hold a zero-point of 0 without a borrow
    zeros = [[rng.randrange(lowest, top) for _ in range(n_groups)] for _ in range(out)]
    scales = scales_of(rng, out, n_groups)
    group_of = [j // 32 for j in range(columns)]
    if act_order == "shuffled":
        rng.shuffle(group_of)
    stored = [[row[g] - (version == 1) for row in zeros] for g in range(n_groups)]
    tensors = {
        "qweight": gptq_words(codes, bits), "qzeros": rows_of_words(stored, bits), "scales": scales.t().contiguous(),
    }  # fmt: skip
    if act_order != "none":
        tensors["g_idx"] = torch.tensor([0] * columns if act_order == "zeros" else group_of, dtype=torch.int32)
    weight = read_gptq(
        tensors, in_features=columns, out_features=out, bits=bits if known else None, group_size=32 if known else None,
        version=version,
    )  # fmt: skip
    assert weight.bits == bits and weight.group_size == 32
    assert (weight.order is None) == (group_of == sorted(group_of))
    assert torch.equal(weight.dequantize(torch.float32), weight_by_loops(codes, scales, zeros, group_of))


def test_gptq_last_group_may_be_short_and_filled_up() -> None:
    rng = random.Random(1)
    codes, scales = matrix(rng, 32, 48, 16), scales_of(rng, 32, 2)
    zeros = matrix(rng, 32, 2, 16)
    filled = [row + [0] * 16 for row in codes]
    for qweight in (gptq_words(codes, 4), gptq_words(filled, 4)):
        tensors = {
            "qweight": qweight, "scales": scales.t().contiguous(),
            "qzeros": rows_of_words([list(row) for row in zip(*zeros, strict=True)], 4),
        }  # fmt: skip
        weight = read_gptq(tensors, in_features=48, out_features=32, bits=4, group_size=32, version=2)
        assert torch.equal(
            weight.dequantize(torch.float32), weight_by_loops(codes, scales, zeros, [j // 32 for j in range(48)])
        )


@pytest.mark.parametrize(
    ("change", "bits", "message"),
    [
        ({}, 8, "qweight has 8 rows for 64 input features, which is 4 bits; the config says 8"),
        ({"qweight": torch.zeros(10, 32, dtype=torch.int32)}, None, "which is 5 bits; the config says nothing"),
        ({"qweight": torch.zeros(8, 31, dtype=torch.int32)}, 4, r"qweight is int32 of shape \(8, 31\)"),
        (
            {"qzeros": torch.zeros(2, 8, dtype=torch.int32)},
            4,
            r"qzeros is int32 of shape \(2, 8\), expected .*\(2, 4\)",
        ),
        ({"scales": torch.ones(4, 32)}, 4, "scales for 4 groups .* group size 32"),
        ({"g_idx": torch.tensor([0] * 31 + [1] * 33)}, 4, "does not divide 64 input features into 2 groups of 32"),
        ({"g_idx": torch.tensor([0] * 32 + [2] * 32)}, 4, r"groups 0 to 2"),
        ({"g_idx": torch.tensor([-1] * 32 + [1] * 32)}, 4, r"groups -1 to 1"),
        ({"g_idx": torch.zeros(32)}, 4, r"g_idx of shape \(32,\)"),
    ],
)
def test_gptq_that_does_not_fit_is_refused(change: dict[str, Tensor], bits: int | None, message: str) -> None:
    tensors = {
        "qweight": torch.zeros(8, 32, dtype=torch.int32), "qzeros": torch.zeros(2, 4, dtype=torch.int32),
        "scales": torch.ones(2, 32),
    }  # fmt: skip
    with pytest.raises(PublishedCheckpointError, match=message):
        read_gptq({**tensors, **change}, in_features=64, out_features=32, bits=bits, group_size=32, version=2)


# files of GPTQModel 7.7


GOLDEN = Path(__file__).parent / "published" / "gptqmodel-7.7.safetensors"


@pytest.mark.parametrize(
    ("file", "bits", "ordered", "symmetric"),
    [
        ("gptq2", 2, False, False), ("gptq3_asym", 3, False, False), ("gptq4_asym", 4, False, False),
        ("gptq4_sym", 4, False, True), ("gptq4_act", 4, True, False), ("gptq4_v2", 4, False, False),
        ("gptq8", 8, False, True), ("awq4", 4, False, None),
    ],
)  # fmt: skip
def test_files_of_gptqmodel(file: str, bits: int, ordered: bool, symmetric: bool | None) -> None:
    """One module each of small Qwen2-VL models that GPTQModel quantized, with the weight as its own kernel (AWQ's:
    as AutoAWQ 0.2.9) de-quantizes it in float16."""
    with safe_open(GOLDEN, framework="pt") as opened:
        tensors = {k.removeprefix(f"{file}."): opened.get_tensor(k) for k in opened.keys() if k.startswith(f"{file}.")}  # noqa: SIM118
        settings_ = json.loads(opened.metadata()["settings"])[file]
    expected = tensors.pop("weight")
    out, columns = expected.shape
    if file.startswith("awq"):
        weight = read_awq(tensors, in_features=columns, out_features=out, group_size=settings_["group_size"])
    else:
        version: Any = 2 if settings_["checkpoint_format"] == "gptq_v2" else 1
        weight = read_gptq(
            tensors, in_features=columns, out_features=out, bits=bits, group_size=settings_["group_size"],
            version=version,
        )  # fmt: skip
    assert torch.equal(weight.dequantize(torch.float16), expected)
    assert (weight.bits, weight.group_size, weight.order is not None) == (bits, 32, ordered)
    assert symmetric in (None, weight.zero is None)


# compressed-tensors


def scheme(format_: str, bits: int, symmetric: bool, group: int | None) -> Scheme:
    return Scheme(format_, ("Linear",), bits, symmetric, group, None)


@few
@example("pack-quantized", 3, False, "group", 1)  # 24 zero-points take three words in either layout
@given(
    st.sampled_from(["pack-quantized", "int-quantized", "naive-quantized"]), st.integers(2, 8), st.booleans(),
    st.sampled_from(["tensor", "channel", "group"]), st.integers(0, 2**32),
)  # fmt: skip
def test_compressed_tensors_agrees_with_its_library(
    format_: str, bits: int, symmetric: bool, strategy: str, seed: int
) -> None:
    """Its compressor writes the file, and its de-quantization is what ours must give."""
    generator = torch.Generator().manual_seed(seed)
    out, columns, group = 24, 64, 16
    groups = {"tensor": 1, "channel": 1, "group": columns // group}[strategy]
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group if strategy == "group" else None
    )
    shape = (1,) if strategy == "tensor" else (out, groups)
    half = 1 << (bits - 1)
    weight = torch.randn(out, columns, generator=generator)
    state = {
        "weight": weight,
        "weight_scale": torch.rand(shape, generator=generator) * 3 / half + 0.01,
        "weight_zero_point": torch.randint(-half, half, shape, generator=generator, dtype=torch.int8),
    }
    if symmetric:
        state["weight_zero_point"].zero_()
    plan = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.load_from_registry(format_)
    packed = compressor.compress(dict(state), plan)
    expected = compressor.decompress(dict(packed), plan)["weight"]
    assert "weight_packed" in packed or packed["weight"].dtype == torch.int8
    read = read_compressed(
        packed, in_features=columns, out_features=out,
        scheme=scheme(format_, bits, symmetric, group if strategy == "group" else None),
    )  # fmt: skip
    assert torch.equal(read.dequantize(torch.float32), expected)
    assert read.bits == bits and read.per_tensor == (strategy == "tensor")
    assert read.zero is None or not symmetric


def test_compressed_tensors_by_hand() -> None:
    """Signed codes -8..7 are stored plus 8, lowest nibble first; zero-points go down the column of outputs."""
    tensors = {
        "weight_packed": signed([0x76543210, 0xFEDCBA98]).reshape(2, 1), "weight_shape": torch.tensor([2, 8]),
        "weight_scale": torch.tensor([[1.0, 10.0], [0.5, 1.0]]),
        # stored 8 + zero-point; group 0: outputs 0, 1 have 0, -3; group 1: 1, 7
        "weight_zero_point": signed([0x58, 0xF9]).reshape(1, 2),
    }  # fmt: skip
    read = read_compressed(tensors, in_features=8, out_features=2, scheme=scheme("pack-quantized", 4, False, 4))
    assert read.dequantize(torch.float32).tolist() == [
        [-8, -7, -6, -5, -50, -40, -30, -20], [1.5, 2, 2.5, 3, -3, -2, -1, 0],
    ]  # fmt: skip


def test_compressed_tensors_act_order_and_old_three_bit_words() -> None:
    """Ten codes of 3 bits in each word, as versions wrote that did not straddle words."""
    rng = random.Random(3)
    codes, scales = matrix(rng, 2, 64, 8), scales_of(rng, 2, 4, torch.float32)
    group_of = [j // 16 for j in range(64)]
    rng.shuffle(group_of)
    words = [[stream(row[i : i + 10], 3)[0] for i in range(0, 64, 10)] for row in codes]
    tensors = {
        "weight_packed": torch.stack([signed(row) for row in words]), "weight_shape": torch.tensor([2, 64]),
        "weight_scale": scales, "weight_g_idx": torch.tensor(group_of),
    }  # fmt: skip
    read = read_compressed(tensors, in_features=64, out_features=2, scheme=scheme("pack-quantized", 3, True, 16))
    assert read.order is not None
    assert torch.equal(read.dequantize(torch.float32), weight_by_loops(codes, scales, [[4] * 4] * 2, group_of))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_shape": torch.tensor([4, 8])}, r"weight_shape says \(4, 8\), and the model's Linear has \(2, 16\)"),
        ({"weight_packed": torch.zeros(2, 4, dtype=torch.int32)}, r"weight_packed is int32 of shape \(2, 4\)"),
        ({"weight_scale": torch.ones(2, 3)}, "3 groups of a row of 16 weights"),
        ({"weight_scale": torch.ones(3, 2)}, r"weight_scale is float32 of shape \(3, 2\)"),
        ({"input_scale": torch.ones(1)}, "input_scale lies beside the weight: static or global scales"),
        ({"weight_packed": None}, "weight_packed is missing"),
    ],
)
def test_compressed_tensors_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    tensors = {
        "weight_packed": torch.zeros(2, 2, dtype=torch.int32), "weight_shape": torch.tensor([2, 16]),
        "weight_scale": torch.ones(2, 2),
    }  # fmt: skip
    changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(PublishedCheckpointError, match=message):
        read_compressed(changed, in_features=16, out_features=2, scheme=scheme("pack-quantized", 4, True, 8))


def test_compressed_tensors_codes_beyond_their_bits_are_refused() -> None:
    tensors = {"weight": torch.tensor([[-9, 7]], dtype=torch.int8), "weight_scale": torch.ones(1, 1)}
    with pytest.raises(PublishedCheckpointError, match="codes from -9 to 7, beyond the config's 4 bits"):
        read_compressed(tensors, in_features=2, out_features=1, scheme=scheme("int-quantized", 4, True, None))


def test_three_bit_words_that_could_be_either_are_refused() -> None:
    tensors = {
        "weight_packed": torch.zeros(1, 2, dtype=torch.int32), "weight_shape": torch.tensor([1, 16]),
        "weight_scale": torch.ones(1, 1),
    }  # fmt: skip
    with pytest.raises(PublishedCheckpointError, match="cannot be told"):
        read_compressed(tensors, in_features=16, out_features=1, scheme=scheme("pack-quantized", 3, True, None))


def ct_config(format_: str = "pack-quantized", **group: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors", "format": format_,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **group}},
    }  # fmt: skip


def test_schemes_are_what_the_library_would_read() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    written = QuantizationConfig.model_validate(ct_config(input_activations=inputs)).to_dict()
    assert read_schemes(written) == (Scheme("pack-quantized", ("Linear",), 4, True, 32, 8),)
    assert read_schemes(ct_config()) == (scheme("pack-quantized", 4, True, 32),)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ct_config("float-quantized"), "format 'float-quantized' is not read; pack-quantized, int-quantized"),
        (ct_config("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (ct_config("marlin-24"), "marlin-24"),
        ({"format": "dense"}, "format 'dense'"),
        (ct_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config .*sparse-24-bitmask"),
        (ct_config() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (ct_config(weights={"num_bits": 8, "type": "float", "strategy": "channel"}), "type float"),
        (ct_config(weights={"num_bits": 8, "type": "int", "strategy": "block"}), "strategy block"),
        (ct_config(weights={"num_bits": 1, "type": "int", "strategy": "channel"}), "1 bits"),
        (ct_config(input_activations={"num_bits": 8, "dynamic": False, "strategy": "tensor"}), "static activation"),
        (ct_config(input_activations={"num_bits": 8, "dynamic": True, "strategy": "token", "type": "float"}), "float"),
        (ct_config(output_activations={"num_bits": 8}), "output_activations"),
    ],
)
def test_schemes_that_are_not_read_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PublishedCheckpointError, match=message):
        read_schemes(config)


def test_a_name_decides_before_a_class() -> None:
    by_class = Scheme("pack-quantized", ("Linear",), 4, True, 32, None)
    by_name = Scheme("pack-quantized", ("re:.*down_proj$", "lm_head"), 8, True, 32, None)
    both = (by_class, by_name)
    assert scheme_of(both, ("model.layers.0.mlp.down_proj",)) is by_name
    assert scheme_of(both, ("model.layers.0.mlp.up_proj", "other")) is by_class
    assert scheme_of(both, ("x", "lm_head")) is by_name
    with pytest.raises(PublishedCheckpointError, match="2 entries of config_groups target"):
        scheme_of((by_class, by_class), ("x",))


# GRACE


@few
@given(st.sampled_from([4, 8]), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 2**32))
def test_grace_codes_are_those_of_its_scales(bits: int, n_groups: int, half: bool, seed: int) -> None:
    """The trained layer's formula, ``exp(log_scale) * clamp(round(w / s))``, saved in bfloat16 or float32."""
    generator = torch.Generator().manual_seed(seed)
    out, columns, top = 6, 32 * n_groups, 1 << (bits - 1)
    log_scale = torch.randn(out * n_groups, generator=generator) - 5
    scale = log_scale.exp().reshape(out, n_groups, 1)
    raw = torch.randn(out, n_groups, 32, generator=generator) * scale * top * 0.6
    codes = (raw / scale).round().clamp(-top, top - 1)
    codes[0, 0, :2] = torch.tensor([-top, top - 1])
    weight = (codes * scale).reshape(out, columns)
    stored = weight.bfloat16() if half else weight
    read = read_grace({"weight": stored, "log_scale": log_scale}, in_features=columns, out_features=out)
    assert (read.bits, read.group_size, read.zero) == (bits, 32, None)
    assert torch.equal(read.codes.float() - top, codes.reshape(out, columns))
    assert torch.equal(read.dequantize(stored.dtype), stored)


def test_grace_that_is_not_on_its_grid_is_refused() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PublishedCheckpointError, match="not on the grid of its log_scale"):
        read_grace({"weight": weight, "log_scale": torch.full((4,), -1.5)}, in_features=32, out_features=4)
    with pytest.raises(PublishedCheckpointError, match="log_scale has 7 numbers"):
        read_grace({"weight": weight, "log_scale": torch.zeros(7)}, in_features=32, out_features=4)


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("a pickle ran code",)


def test_a_sidecar_is_read_as_tensors_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "qat_quantized_weights.bin"
    state = {"a.weight": torch.ones(2, 4), "a.log_scale": torch.zeros(2), "a.bias": torch.zeros(2)}
    torch.save(state, path)
    assert {name: sorted(leaves) for name, leaves in read_sidecar(path).items()} == {"a": ["log_scale", "weight"]}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PublishedCheckpointError, match="no whole file of plain tensors"):
        read_sidecar(path)
    torch.save({"a.log_scale": Hostile()}, path)
    with pytest.raises(PublishedCheckpointError, match="Anything but tensors in a pickle is not loaded"):
        read_sidecar(path)
    assert "a pickle ran code" not in capsys.readouterr().out
    torch.save({"a.weight": torch.ones(2, 4)}, path)
    with pytest.raises(PublishedCheckpointError, match="no sidecar of GRACE"):
        read_sidecar(path)
