"""Round to nearest against torchao's and compressed-tensors': weights on the same grid, and a model's logits.

Our scales are stored as float16 and the libraries' as float32. Where a scale fits into float16 the weights agree to the
last bit of float32; elsewhere a scale may differ by 2^-11 of itself and a weight near a border by a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.replace import quantize_model, quantize_weight

GROUP = 32
Rounding = Callable[[Tensor, int, bool], Tensor]


def by_torchao(weight: Tensor, bits: int, symmetric: bool) -> Tensor:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    kinds = primitives.MappingType
    # our symmetric scale is max|w| / (2^(b-1) - 1), which torchao uses where the greatest weight is positive
    kind = kinds.SYMMETRIC_NO_CLIPPING_ERR if symmetric else kinds.ASYMMETRIC
    half = 2 ** (bits - 1)
    bounds = (-half, half - 1)
    scale, zero = primitives.choose_qparams_affine(
        weight, kind, (1, GROUP), torch.int8, *bounds, eps=1e-9, scale_dtype=torch.float32, zero_point_dtype=torch.int8
    )
    codes = primitives.quantize_affine(weight, (1, GROUP), scale, zero, torch.int8, *bounds)
    found: Tensor = primitives.dequantize_affine(
        codes, (1, GROUP), scale, zero, torch.int8, *bounds, output_dtype=torch.float32
    )
    return found


def by_compressed_tensors(weight: Tensor, bits: int, symmetric: bool) -> Tensor:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = quantization.QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=GROUP)
    groups = weight.reshape(len(weight), -1, GROUP)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    found: Tensor = quantization.fake_quantize(weight, scale, zero, arguments)
    return found


def weight_with_exact_scales(bits: int, symmetric: bool) -> Tensor:
    """Every group's range is a float16 number times the number of its steps, and straddles zero."""
    generator = torch.Generator().manual_seed(bits)
    scale = (torch.rand(24, 6, 1, generator=generator) * 0.01 + 0.001).half().float()
    lowest, highest = (
        (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) if symmetric else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    )
    inside = torch.rand(24, 6, GROUP - 2, generator=generator) * (highest - lowest) + lowest
    steps = torch.cat([torch.full((24, 6, 1), lowest), torch.full((24, 6, 1), highest), inside], dim=2)
    return (steps * scale).reshape(24, 6 * GROUP)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("library", "symmetric"), [(by_torchao, False), (by_torchao, True), (by_compressed_tensors, False)]
)
def test_weights_agree_where_scales_fit_into_float16(library: Rounding, symmetric: bool, bits: int) -> None:
    weight = weight_with_exact_scales(bits, symmetric)
    spec = load_spec({"method": "rtn", "bits": bits, "group_size": GROUP, "symmetric": symmetric})
    found = quantize_weight(weight, spec)
    torch.testing.assert_close(found.dequantize(torch.float32), library(weight, bits, symmetric), rtol=1e-6, atol=0)
    assert len(found.codes.unique()) == 2**bits - symmetric


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("library", [by_torchao, by_compressed_tensors])
def test_weights_agree_but_for_the_float16_scale(library: Rounding, bits: int) -> None:
    weight = torch.randn(64, 4 * GROUP, generator=torch.Generator().manual_seed(bits)) * 0.02
    found = quantize_weight(weight, load_spec({"method": "rtn", "bits": bits, "group_size": GROUP}))
    gap = (found.dequantize(torch.float32) - library(weight, bits, False)).abs()
    step = found.scale.float().repeat_interleave(GROUP, dim=1)
    near = gap <= 2**-11 * step * 2 ** (bits - 1)
    assert near.double().mean() > 1 - 2**bits * 2**-11
    assert (gap <= step * (1 + 2 ** (bits - 11))).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logits_of_a_model_agree(bits: int) -> None:
    """The language model of the reference checkpoint: own ``quantize_model`` against weights from each library."""
    from bitquake.model_wrappers.loading import load_model, resolve_pretrained

    def loaded() -> Any:
        return load_model(
            resolve_pretrained("bitquake/block-idefics3"), revision=None, dtype=torch.float32,
            device=torch.device("cpu"), device_map=None, attn_implementation=None, trust_remote_code=False,
        )  # fmt: skip

    tokens = torch.randint(10, 160, (4, 24), generator=torch.Generator().manual_seed(0))
    full = loaded()
    with torch.no_grad():
        logits = full(input_ids=tokens).logits
    own = loaded()
    names = quantize_model(own, load_spec({"method": "rtn", "bits": bits, "group_size": GROUP}))
    assert len(names) == 28
    with torch.no_grad():
        ours = own(input_ids=tokens).logits
        error = (ours - logits).norm()
        for library in (by_torchao, by_compressed_tensors):
            theirs = loaded()
            for name in names:
                linear = theirs.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                linear.weight.copy_(library(linear.weight, bits, False))
            found = theirs(input_ids=tokens).logits
            assert float((found - logits).norm() / error) == pytest.approx(1.0, abs=0.05)
            assert (found - ours).norm() < 0.4 * error
            print(
                bits,
                library.__name__,
                float((found - logits).norm() / error),
                float((found - ours).norm() / error),
                float(error / logits.norm()),
            )
