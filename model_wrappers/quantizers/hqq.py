"""HQQ, half-quadratic quantization (papers.md section 4): own solver, and the hqq library's beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.options import HqqOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.weight import SCALE_DTYPE

_GREATEST_INVERSE_SCALE = 2e4
_CONSTANT = 1e-4  # a group whose range is below this is held by its zero-point alone, as in the library


def solve(groups: Tensor, bits: int, options: HqqOptions) -> tuple[Tensor, Tensor]:
    """Fit the zero-points of each row of ``groups``; the scales follow from the ranges and stay.

    Minimises ``sum |w - s (code - z)|^p`` by turns: ``code = clamp(round(w/s + z))``, ``e = shrink_p(w - s (code -
    z))``, ``z = mean(code - (w - e)/s)``. It ends after ``options.iterations`` or when nothing moves any more; the
    library's stop looks at the mean error of a whole matrix, so that the result would depend on how it is cut.

    Args:
        groups: shape (n, group), float32.

    Returns:
        inverse scale ``1/s`` and zero, both (n, 1) float32, as the library counts them (codes from 0).
    """
    top = float((1 << bits) - 1)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    span = high - low
    inverse = torch.where(span <= _CONSTANT, torch.ones_like(span), top / span).clamp_(max=_GREATEST_INVERSE_SCALE)
    zero = -low * inverse
    if bits == 4:  # the library's rule
        zero = zero.round()
    scaled, scaled_low, scaled_high = groups * inverse, low * inverse, high * inverse
    # shrink_p(x) = sign(x) relu(|x| - |x|^(p-1)/beta) is exactly zero up to this |x|, and the error of a group is at
    # most half a step or what is clipped at its ends. So nearly all groups of a real model need no power, by far the
    # dearest operation. The margin covers the rounding of the power.
    silent = options.beta ** (-1.0 / (2.0 - options.p)) * (1.0 - 1e-4)
    codes = torch.empty_like(groups)
    for _ in range(options.iterations):
        torch.add(scaled, zero, out=codes).round_().clamp_(0.0, top)
        greatest_error = torch.maximum(-(scaled_low + zero), scaled_high + zero - top).clamp_(min=0.5) / inverse
        loud = (greatest_error > silent).flatten().nonzero().flatten()
        if len(loud):
            some, s, z = groups[loud], inverse[loud], zero[loud]
            error = some - (codes[loud] - z) / s
            size = error.abs()
            shrunk = (size - size.pow(options.p - 1.0) / options.beta).clamp_min_(0.0).mul_(error.sign())
            moved_loud = (codes[loud] - (some - shrunk) * s).mean(1, keepdim=True)
        moved = codes.sub_(scaled).mean(1, keepdim=True)
        if len(loud):
            moved[loud] = moved_loud
        if torch.equal(moved, zero):
            break
        zero = moved
    return inverse, zero


def hqq(groups: Tensor, bits: int, options: HqqOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row of ``groups`` with the own solver.

    Scale and zero are rounded to their stored float16 first, so that the codes are the nearest to what is stored.

    Args:
        groups: shape (n, group), float32, finite.

    Returns:
        codes (n, group) uint8, scale (n, 1) float16, zero (n, 1) float16 relative to the middle code.
    """
    middle = 1 << (bits - 1)
    inverse, zero = solve(groups, bits, options)
    scale, zero = inverse.reciprocal().to(SCALE_DTYPE), _centred(zero, groups, middle)
    codes = (groups / scale.float()).add_(zero.float()).round_().clamp_(-middle, middle - 1).add_(middle)
    return codes.to(torch.uint8), scale, zero


def hqq_library(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the hqq library (its defaults, axis 1): its integers as they are, its scale and zero as float16.

    Raises:
        ImportError: hqq is not installed.
        QuantizationError: the library has no such bits (7).
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise ImportError("backend hqq needs hqq: pip install 'bitquake[eval]', or use backend own") from error
    if bits not in Quantizer.SUPPORTED_BITS:
        raise QuantizationError(f"the hqq library has no {bits} bits; use backend own")
    found, meta = Quantizer.quantize(
        groups, nbits=bits, group_size=groups.shape[1], axis=1, round_zero=bits == 4, bitpack=False, device="cpu"
    )
    middle = 1 << (bits - 1)
    codes = torch.where(_is_constant(groups), found + middle, found)
    return codes.to(torch.uint8), meta["scale"].to(SCALE_DTYPE), _centred(meta["zero"], groups, middle)


def _is_constant(groups: Tensor) -> Tensor:
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    return high - low <= _CONSTANT


def _centred(zero: Tensor, groups: Tensor, middle: int) -> Tensor:
    """Zero-points relative to the middle code, in float16.

    A constant group has code 0 throughout and its value in the zero-point; its codes are moved to the middle instead,
    because a value of 0.02 would drown in the float16 rounding of 8.02.
    """
    return torch.where(_is_constant(groups), zero, zero - middle).to(SCALE_DTYPE)
