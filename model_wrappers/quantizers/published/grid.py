"""Recognises a plain weight whose values lie on a low-bit grid: a quantization that was simulated and then saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUP_SIZES = (128, 64, 32)
_MOST = 128  # steps of the largest weight: 8 bits symmetric
_STAGES = (4, 64)  # groups looked at first, to be done with ordinary weights quickly
_FIRST_COLUMNS = 256  # and columns of the very first
_EVIDENCE = 100.0  # bits
_SURE = 0.25  # of a step: weights that may be farther off do not say which k is theirs, and count for nothing
_PARTS = (0.5, 0.375, 0.625, 0.25, 0.75, 0.125, 0.875, 0.0, 1.0)
_ELEMENTS = 1 << 21  # numbers at a time
_PRECISIONS = (
    # dtype, digits, least spacing, and how many units in the last place a weight may be off: half, and where the
    # weight passed through another dtype a little more; in float32 the grid's own arithmetic may have rounded, too
    (torch.bfloat16, 8, 2.0**-133, 0.5625),
    (torch.float16, 11, 2.0**-24, 0.5625),
    (torch.float32, 24, 2.0**-149, 4.0),
)


@dataclass(frozen=True)
class Grid:
    """The coarsest grid that holds a weight: ``W = s * k`` with one s for each group, and whole k.

    Attributes:
        bits: of the codes: k in [-2^(b-1), 2^(b-1) - 1] if symmetric, else within 2^b consecutive numbers with 0.
        group_size: columns that share s; ``in_features`` for a scale for each row.
        symmetric: see ``bits``.
        n_groups: groups that were looked at.
    """

    bits: int
    group_size: int
    symmetric: bool
    n_groups: int

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{kind} {self.bits}-bit grid in groups of {self.group_size}"


def detect_grid(weight: Tensor, *, group_sizes: Sequence[int] = GROUP_SIZES, max_groups: int = 1024) -> Grid | None:
    """The grid that a weight lies on (2 to 8 bits symmetric, 2 to 7 asymmetric), or None.

    A group lies on a grid when one s makes every weight a rounded ``s * k`` with whole k. For each k that the largest
    weight may have, s is estimated and confined to the intersection of the intervals that the weights' roundings allow;
    then every weight must be where it may be. Any group of few values lies on some grid, so there must be evidence:
    each further magnitude that falls on the grid counts as much as that was improbable, less the choice of s, and each
    magnitude once in the whole weight. So a weight of few values, a sign matrix or zeros are taken for no grid; nor is
    a 2-bit one that uses three levels, which cannot be told from those.

    Args:
        weight: shape (out, in), any floating dtype and device.
        group_sizes: tried after whole rows, from large to small.
        max_groups: groups looked at, spread evenly over the weight; all of them must lie on the grid.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        return None
    weight, in_features = weight.detach(), weight.shape[1]
    for group in (in_features, *(size for size in sorted(group_sizes, reverse=True) if size < in_features)):
        if (grid := _detect(weight, group, max_groups)) is not None:
            return grid
    return None


def on_grid(model: nn.Module) -> dict[str, Grid]:
    """Name of each plain Linear of a loaded model whose weight lies on a grid -> that grid.

    A full-precision model gives an empty mapping; GRACE's BF16 checkpoints all of their language model's.
    """
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not module.weight.is_meta:
            grid = detect_grid(module.weight)
            if grid is not None:
                found[name] = grid
    return found


def grid_name(grids: Mapping[str, Grid]) -> str:
    """A name for the quantization that left these grids: ``on-grid-int4-g128``, of the widest codes among them."""
    widest = max(grids.values(), key=lambda grid: (grid.bits, grid.group_size))
    return f"on-grid-int{widest.bits}-g{widest.group_size}"


def _detect(weight: Tensor, group: int, max_groups: int) -> Grid | None:
    most = _MOST
    for n in (*_STAGES, max_groups):
        groups = _sample(weight, group, min(n, max_groups))
        if not bool(groups.isfinite().all()):
            return None
        if n == _STAGES[0]:
            groups = groups[:, :_FIRST_COLUMNS]
        margin = _margin(groups)
        fitted = _fit(groups, margin, most)
        if fitted is None:
            return None
        codes, scale = fitted
        if n == _STAGES[-1]:
            if _evidence(groups, codes, scale, margin) < _EVIDENCE:
                return None
            most = min(_MOST, 2 * max(1, int(codes.abs().max())))
    low, high = codes.amin(dim=1).clamp(max=0), codes.amax(dim=1).clamp(min=0)
    symmetric = 1 + max(1, max(0, int(-low.min()) - 1).bit_length(), int(high.max()).bit_length())
    asymmetric = max(2, int((high - low).max()).bit_length())
    return Grid(min(symmetric, asymmetric), group, symmetric <= asymmetric, len(groups))


def _sample(weight: Tensor, group: int, n: int) -> Tensor:
    """Up to n groups (n, group) in float64, evenly spread; what a last group lacks is zero, which is on every grid."""
    rows, columns = weight.shape
    per_row = -(-columns // group)
    total = rows * per_row
    n = min(n, total)
    chosen = torch.arange(n) * (total - 1) // max(1, n - 1)
    column = (chosen % per_row).unsqueeze(1) * group + torch.arange(group)
    row = (chosen // per_row).unsqueeze(1).expand_as(column)
    values = weight[row.to(weight.device), column.clamp(max=columns - 1).to(weight.device)].double().cpu()
    return values.masked_fill(column >= columns, 0.0)


def _margin(values: Tensor) -> Tensor:
    """How far each weight may be from its place on the grid, by the least precise dtype that holds all of them."""
    digits, least, slack = next(
        (digits, least, slack)
        for dtype, digits, least, slack in _PRECISIONS
        if dtype is torch.float32 or torch.equal(values.to(dtype).double(), values)
    )
    _, exponent = torch.frexp(values)  # |v| in [2^(e-1), 2^e)
    return torch.ldexp(torch.ones_like(values), exponent - digits).clamp(min=least) * slack


def _fit(groups: Tensor, margin: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Whole k (n, group) and s (n, 1) with the least k for each group's largest weight; None if a group has none."""
    steps = torch.arange(1, most + 1, dtype=torch.float64).reshape(-1, 1, 1)
    codes, scales = [], []
    step = max(1, _ELEMENTS // (most * groups.shape[1]))
    for start in range(0, len(groups), step):
        values, slack = groups[start : start + step], margin[start : start + step]
        largest = values.abs().amax(dim=1, keepdim=True)
        scale = largest.clamp(min=1e-300) / steps  # (candidates, groups, 1)
        for trusted in (32, most, most):  # a large k is only sure when s is known well, so small ones come first
            k = (values / scale).round_()
            used = (k != 0) & (k.abs() <= trusted)
            ratios = torch.where(used, values / torch.where(used, k, 1.0), 0.0)
            mean = ratios.sum(dim=2, keepdim=True) / used.sum(dim=2, keepdim=True).clamp(min=1)
            scale = torch.where(mean > 0, mean, scale)
        size = (values / scale).round_().abs()
        sure = (size > 0) & (slack < _SURE * scale)
        low = torch.where(sure, (values.abs() - slack) / size, 0.0).amax(dim=2, keepdim=True)
        high = torch.where(sure, (values.abs() + slack) / size, torch.inf).amin(dim=2, keepdim=True)
        possible = low <= high
        if not bool(possible.any(dim=0).all()):
            return None
        low, high = (torch.where(high.isfinite(), bound, scale) for bound in (low, high))
        k, fits = torch.zeros_like(size), torch.zeros_like(possible)
        for part in _PARTS:  # the other weights decide where in its interval s is
            tried = low + (high - low) * part
            # of two codes that are possible for the largest weight, the one that 8 bits have
            steps_there = (values / tried).round_().clamp_(-most, most - (most == _MOST))
            allowed = torch.where(slack < _SURE * tried, slack, slack + 0.1 * tried)
            good = ((values - steps_there * tried).abs() <= allowed).all(dim=2, keepdim=True) & possible & ~fits
            k, scale, fits = torch.where(good, steps_there, k), torch.where(good, tried, scale), fits | good
            if bool(fits[possible].all()):
                break
        fits = fits.squeeze(2)
        if not bool(fits.any(dim=0).all()):
            return None
        first = fits.int().argmax(dim=0)
        at = torch.arange(len(values))
        codes.append(k[first, at])
        scales.append(scale[first, at])
    return torch.cat(codes), torch.cat(scales)


def _evidence(groups: Tensor, codes: Tensor, scale: Tensor, margin: Tensor) -> float:
    """Bits by which the grid is more probable than chance; see ``detect_grid``."""
    seen: set[float] = set()
    total = 0.0
    for values, k, s, slack in zip(groups.abs(), codes.abs(), scale, margin, strict=True):
        largest = float(values.max())
        if not largest:
            continue
        by_chance = torch.where(slack < _SURE * s, 2 * slack / s, 1.0)
        new = {v: -p for v, p in zip(values.tolist(), by_chance.log2().tolist(), strict=True) if v and v not in seen}
        seen.update(new)
        new.pop(largest, None)
        total += max(0.0, sum(new.values()) - float(k.max().log2()))
    return total
