"""AWQ (papers.md section 4; Lin et al., 2024), as AutoAWQ does it: input scales by a grid search, then clipped ranges.

``x`` is the mean magnitude of each input feature over all calibration tokens, ``w`` the mean over the weight's rows of
``|W| / (its group's largest)``. Candidates are ``s = x^r / (w^(1-r) + 1e-4)`` (without duo scaling ``s = x^r``) for
``r`` = 0, 1/20, …, 19/20, at least 1e-4, over the geometric mean of their largest and smallest. The winner has the
least mean squared error of the target's output with ``Q(W s) / s`` in place of ``W``. All groups of a block are
searched with the rest of the block at full precision. Then each weight group of ``W s`` is clipped to ``1 - i/20`` of
its largest magnitude, i = 0 … 9, whichever gives the least squared error of that group's part of the output over 512
tokens; layers that make queries and keys are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from bitquake.model_wrappers.quantizers.features import Features
from bitquake.model_wrappers.quantizers.options import AwqOptions
from bitquake.model_wrappers.quantizers.scale_groups import ScaleGroup
from bitquake.model_wrappers.quantizers.scale_search import Choice, best_scale, fake_quantize, normalised
from bitquake.model_wrappers.quantizers.spec import QuantSpec

_LEAST = 1e-4
_CLIP_GRID, _CLIP_STEPS, _CLIP_TOKENS = 20, 10, 512
_CLIP_WEIGHTS = 1 << 20  # weights clipped at a time: bounds the float32 temporaries


def mean_magnitude(x: Tensor) -> Tensor:
    """Mean of ``|x|`` over the tokens, float32, shape (in_features,)."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for start in range(0, len(x), 4096):
        total += x[start : start + 4096].float().abs().sum(dim=0).double()
    return (total / max(1, len(x))).float()


def weight_magnitude(group: ScaleGroup, specs: Mapping[str, QuantSpec]) -> Tensor:
    """Mean over all rows of the layers of ``|W|`` over the largest of its weight group, shape (in_features,)."""
    total, rows = torch.zeros(()), 0
    for name, linear in group.linears.items():
        weight = linear.weight.detach().float().abs()
        width = specs[name].group_size
        width = min(width, weight.shape[1]) if isinstance(width, int) else weight.shape[1]
        padded = functional.pad(weight, (0, -weight.shape[1] % width)).reshape(len(weight), -1, width)
        relative = (padded / (padded.amax(dim=2, keepdim=True) + 1e-6)).reshape(len(weight), -1)
        total = total + relative[:, : weight.shape[1]].sum(dim=0, dtype=torch.float64).cpu()
        rows += len(weight)
    return (total / rows).float()


def awq_candidates(x: Tensor, w: Tensor | None, grid: int) -> Tensor:
    """Scale vectors of the grid, float32, shape (grid, in_features); ``w`` None leaves the weights out."""
    rows = []
    for step in range(grid):
        ratio = step / grid
        scale = x.pow(ratio) if w is None else x.pow(ratio) / (w.pow(1 - ratio) + 1e-4)
        rows.append(normalised(scale.clamp(min=_LEAST)))
    return torch.stack(rows)


def awq_scale(
    group: ScaleGroup, found: Features, specs: Mapping[str, QuantSpec], options: AwqOptions, first: int | None = None
) -> tuple[Tensor, Choice]:
    """The input scales of a group, float32 on the CPU, and the choice among the candidates."""
    w = weight_magnitude(group, specs) if options.duo_scaling else None
    candidates = awq_candidates(mean_magnitude(found.x), w, options.grid)
    choice = best_scale(group, found, candidates, specs, power=2, first=first)
    return candidates[choice.index], choice


def clip_tokens(x: Tensor, scale: Tensor | None) -> Tensor:
    """Every n-th token, 512 to 1023 of them where there are as many, over ``scale``; float32."""
    x = x[:: max(1, len(x) // _CLIP_TOKENS)].float()
    return x if scale is None else x / scale


@torch.no_grad()
def clipped(weight: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """``weight`` with each weight group clipped to the range whose rounding error matters least for the outputs.

    AutoAWQ multiplies out every product of a token and a weight; here ``sum_t (x_t . d)^2 = d^T (X^T X) d`` for the
    group's part of the inputs, the same errors without the tokens in the inner loop.

    Args:
        weight: shape (out_features, in_features), scaled already.
        x: of ``clip_tokens``.

    Returns:
        float32, on the device of ``weight``.
    """
    out_features, in_features = weight.shape
    width = min(spec.group_size, in_features) if isinstance(spec.group_size, int) else in_features
    x = x.to(weight.device)
    result = weight.detach().to(torch.float32, copy=True)
    tail = in_features % width
    pieces = [(0, in_features - tail, width)] + ([(in_features - tail, in_features, tail)] if tail else [])
    for start, stop, size in pieces:
        if start == stop:
            continue
        groups = (stop - start) // size
        tokens = x[:, start:stop].reshape(len(x), groups, size).permute(1, 2, 0)  # (groups, size, tokens)
        gram = tokens @ tokens.transpose(1, 2) if len(x) > size else None
        rows = max(1, _CLIP_WEIGHTS // (stop - start))
        for row in range(0, out_features, rows):
            part = result[row : row + rows, start:stop]
            part.copy_(_clip_rows(part.clone(), tokens, gram, spec))
    return result


def _clip_rows(weight: Tensor, tokens: Tensor, gram: Tensor | None, spec: QuantSpec) -> Tensor:
    size = tokens.shape[1]
    groups = weight.reshape(len(weight), -1, size)
    largest = groups.abs().amax(dim=2, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, float("inf"))
    one_group = spec.model_copy(update={"group_size": size})
    for step in range(_CLIP_STEPS):
        bound = largest * (1 - step / _CLIP_GRID)
        cut = groups.clamp(-bound, bound).reshape(weight.shape)
        change = (fake_quantize(cut, one_group) - weight).reshape(groups.shape).transpose(0, 1)
        squares = (change @ tokens).square_() if gram is None else (change @ gram) * change
        error = squares.sum(dim=2).T[..., None]  # (rows, groups, 1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, bound, best)
    return groups.clamp(-best, best).reshape(weight.shape)
