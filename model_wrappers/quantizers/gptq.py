"""GPTQ (papers.md section 4; Frantar et al., 2023): column by column, each makes up for the rounding of those before.

The published algorithm inverts the damped Hessian ``H``, takes the upper Cholesky factor ``U`` of the inverse and,
after each column, moves the columns to come by ``-(w - q) / U[i, i] * U[i, :]``. Here ``H = R R^T`` itself is factored,
``R`` upper triangular (the Cholesky factor of ``H`` read backwards). Then ``U = R^-1``, and column j is rounded at
``w_j + sum_{i<j} (w_i - q_i) R[i, j] / R[j, j]``: the same number, without an inverse and a second factorization (a
quarter of the cubic work). Halving the columns again and again turns nearly all corrections into products of large
matrices, whatever the group size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from loguru import logger as eval_logger
from torch import Tensor

from bitquake.model_wrappers.quantizers.options import GptqOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.weight import SCALE_DTYPE, QuantizedWeight

_LEAST_RANGE = 1e-5  # as in rtn: keeps the scale of a group of zeros above zero
_MSE_NORM, _MSE_STEPS, _MSE_MOST_SHRINKAGE = 2.4, 100, 0.8


class HessianSum:
    """``H = 2/n X^T X`` over the n token rows X that a layer has seen; no activation is kept.

    Args:
        in_features: columns of X.
        dtype: float32, or float64 at twice the memory and time; what follows is computed in it, too.
        device: where the sum lies: ``4 * in_features**2`` bytes in float32.
    """

    def __init__(
        self, in_features: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self.rows = 0
        self._sum = torch.zeros((in_features, in_features), dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add inputs of the layer: shape (..., in_features), any floating dtype and device.

        Raises:
            QuantizationError: another number of features.
        """
        if x.shape[-1] != len(self._sum):
            raise QuantizationError(f"a Hessian of {len(self._sum)} input features got a batch of {x.shape[-1]}")
        flat = x.reshape(-1, x.shape[-1]).to(self._sum)
        self._sum.addmm_(flat.T, flat)
        self.rows += len(flat)

    def hessian(self) -> Tensor:
        """``2/n X^T X``, shape (in_features, in_features).

        Raises:
            QuantizationError: nothing was added.
        """
        if not self.rows:
            raise QuantizationError(
                "no calibration sample reached this layer, so its Hessian is not known; use calibration data that does "
                "(pictures for a vision tower), or leave the layer out of the spec"
            )
        return self._sum * (2.0 / self.rows)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | Literal["channel"],
    symmetric: bool,
    options: GptqOptions,
) -> QuantizedWeight:
    """Quantize one weight matrix so that the layer's outputs on its calibration inputs change little.

    The grid is the published one: ``s = (max(w, 0) - min(w, 0)) / (2^b - 1)``, ``z = -round(min(w, 0) / s)``; symmetric
    ``s = 2 max|w| / (2^b - 1)``, ``z = 2^(b-1)``. It is fitted to a group when its first column's turn comes, with all
    corrections so far (the published code leaves out those of the running block). Scales are rounded to their stored
    float16 before any code is chosen.

    As published, an input feature that was always zero gets zero weights and 1 on the diagonal (and comes last in
    ``act_order``); ``damp`` times the mean of the diagonal is added to it. A Hessian that is not positive definite then
    gets ten times that, and so on up to the whole mean, and a warning says so.

    Args:
        weight: shape (out_features, in_features), floating.
        hessian: shape (in_features, in_features), of ``HessianSum``. The work is done on its device and in its dtype.
        bits: 2 to 8.
        group_size: columns that share a scale; the last group of a row may be shorter, a group longer than a row, and
            ``channel``, is the row.
        symmetric: without zero-points.
        options: see ``GptqOptions``. With ``act_order`` the result has an ``order``, unless the groups do not depend
            on it (``static_groups``, or one group).

    Returns:
        On the device of ``hessian``; scale float16, zero int8.

    Raises:
        QuantizationError: shapes, bits or a group size that cannot be; a weight or Hessian that is not finite; inputs
            that were all zero; a Hessian that stays indefinite; a group whose range a float16 scale cannot hold.
    """
    _check(weight, hessian, bits, group_size)
    in_features = weight.shape[1]
    hessian = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
    diagonal = hessian.diagonal()
    if not diagonal.any():
        raise QuantizationError("every calibration input of this layer was zero, so nothing is known of its Hessian")
    columns = weight.detach().to(hessian).T.clone(memory_format=torch.contiguous_format)
    columns[diagonal == 0] = 0.0

    group = min(group_size, in_features) if isinstance(group_size, int) else in_features
    grid = _Grid(bits, symmetric, options.mse)
    group_of = torch.arange(in_features) // group
    fixed = None
    if options.static_groups or group == in_features:
        fixed = [grid.fit(part) for part in torch.split(columns, group)]
    order = None
    if options.act_order:
        order = diagonal.argsort(descending=True, stable=True)
        columns = columns[order]
        if fixed is not None:
            group_of = group_of[order.cpu()]
    factor = _factor(hessian, options.damp, order)
    codes, parameters = _solve(columns, factor, grid, group_of.tolist(), fixed, options.block)
    if order is not None and fixed is not None:  # the groups are those of the features as they stand
        codes, order = codes[order.argsort()], None

    scale, zero = (torch.stack(rows, dim=1) for rows in zip(*parameters, strict=True))
    if not scale.isfinite().all():
        raise QuantizationError("a group's range is beyond float16, in which its scale is stored")
    return QuantizedWeight(
        codes.T.contiguous(), scale.to(SCALE_DTYPE), None if symmetric else (zero - grid.middle).to(torch.int8),
        bits, group, order=None if order is None else order.int(),
    )  # fmt: skip


def _check(weight: Tensor, hessian: Tensor, bits: int, group_size: int | str) -> None:
    if not 2 <= bits <= 8:
        raise QuantizationError(f"gptq: bits must be 2 to 8, got {bits}")
    if group_size != "channel" and not (isinstance(group_size, int) and group_size > 0):
        raise QuantizationError(f"gptq: group_size must be a positive whole number or channel, got {group_size!r}")
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise QuantizationError(
            f"gptq: a weight of shape {tuple(weight.shape)} needs a Hessian of (in_features, in_features), got "
            f"{tuple(hessian.shape)}"
        )
    if bad := int((~weight.isfinite()).sum()):
        raise QuantizationError(f"{bad} weights are NaN or infinite")
    if bad := int((~hessian.isfinite()).sum()):
        raise QuantizationError(
            f"{bad} entries of the Hessian are NaN or infinite: activations overflowed on the calibration data; run "
            "the model in bfloat16 or float32"
        )


@dataclass(frozen=True)
class _Grid:
    """How a group's scale and zero-point are chosen."""

    bits: int
    symmetric: bool
    mse: bool

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (as float16 holds it) and zero-point (from code 0), both (out,), of columns of shape (group, out)."""
        low, high = columns.amin(0).clamp_(max=0.0), columns.amax(0).clamp_(min=0.0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale, zero = self._of_range(low, high)
        if not self.mse:
            return scale, zero
        least = torch.full_like(low, torch.inf)
        for step in range(int(_MSE_MOST_SHRINKAGE * _MSE_STEPS)):
            kept = 1.0 - step / _MSE_STEPS
            tried = self._of_range(low * kept, high * kept)
            error = (columns - self.round(columns, *tried)[1]).abs_().pow_(_MSE_NORM).sum(0)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
        return scale, zero

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = ((high - low).clamp_(min=_LEAST_RANGE) / self.top).to(SCALE_DTYPE).to(low.dtype)
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle)
        return scale, (-low / scale).round_().clamp_(0, self.top)

    def round(self, values: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, as floats, and what they stand for."""
        codes = (values / scale).round_().add_(zero).clamp_(0, self.top)
        return codes, (codes - zero).mul_(scale)


def _factor(hessian: Tensor, damp: float, order: Tensor | None) -> Tensor:
    """``R`` (of the damped Hessian ``R R^T``, features in ``order``) with each column divided by its diagonal entry."""
    reverse = torch.arange(len(hessian) - 1, -1, -1, device=hessian.device) if order is None else order.flip(0)
    backwards = hessian[reverse][:, reverse]
    diagonal = backwards.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean, share, added = diagonal.mean(), damp, 0.0
    while True:
        diagonal += (share - added) * mean
        lower, failed_at = torch.linalg.cholesky_ex(backwards)
        if not failed_at:
            break
        if share >= 1.0:
            raise QuantizationError(
                "the Hessian is not positive definite, not even with the whole mean of its diagonal "
                f"({float(mean):.3g}) added to it, so it is no sum of squares of activations"
            )
        share, added = min(10.0 * share, 1.0), share
        eval_logger.warning(f"gptq: the Hessian is not positive definite; trying again with damp={share:g}")
    del backwards, diagonal
    upper: Tensor = lower.flip(0, 1)
    upper /= upper.diagonal().clone()
    return upper


def _solve(
    columns: Tensor,
    factor: Tensor,
    grid: _Grid,
    group_of: list[int],
    fixed: list[tuple[Tensor, Tensor]] | None,
    block: int,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Choose the codes of all columns.

    Args:
        columns: weights, shape (in, out), in the order in which they are taken; what rounding loses is left in it.
        factor: of ``_factor``, in the same order.
        group_of: group of each column.
        fixed: scale and zero-point of each group. None: fitted on the way; groups are runs of columns then.

    Returns:
        codes (in, out) uint8, and scale and zero-point of each group.
    """
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    lost, corrected = columns, columns.clone()
    parameters = [] if fixed is None else fixed
    group = group_of.count(0) if fixed is None else len(group_of)

    def take(start: int, end: int, unit: int) -> None:
        """Columns start to end, which have every correction for those before start; cut at multiples of unit only."""
        if end - start > unit:
            middle = start + unit * ((end - start + unit) // (2 * unit))
            take(start, middle, unit)
            corrected[middle:end].addmm_(factor[start:middle, middle:end].T, lost[start:middle])
            take(middle, end, unit)
            return
        if unit == group and fixed is None:
            here = slice(start, end)
            parameters.append(grid.fit(_expected(columns[here], corrected[here], factor[here, here])))
        if unit > block:
            take(start, end, block)
            return
        for j in range(start, end):
            found, rounded = grid.round(corrected[j], *parameters[group_of[j]])
            codes[j] = found
            lost[j] -= rounded
            corrected[j + 1 : end].addr_(factor[j, j + 1 : end], lost[j])

    take(0, len(columns), group)
    return codes, parameters


def _expected(columns: Tensor, corrected: Tensor, factor: Tensor) -> Tensor:
    """What the published algorithm holds for a group (group, out) when its turn comes, to fit its grid to.

    It is the best value of these columns if none to come were rounded: with ``E`` the losses so far and ``R = [[A, B],
    [0, C]]`` it is ``W + E B C^-1``, for which a group at the head of C needs its own block of C alone. ``corrected``
    has ``W + E B diag(C)^-1`` instead.
    """
    moved: Tensor = torch.linalg.solve_triangular(factor.T, corrected - columns, upper=False, unitriangular=True)
    return moved + columns
