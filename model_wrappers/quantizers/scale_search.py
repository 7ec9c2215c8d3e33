"""The search that AWQ and MBQ share: which of some scale vectors changes a target's output least once it is rounded.

It chooses what trying every candidate on every token chooses, with less work:

- tokens of all samples are run together where the target treats each alone, and samples of equal shape where it does
  not; tokens without weight in the loss are not run;
- one candidate is run on everything; the tokens are then taken by falling error. A candidate is given up as soon as
  its sum so far is above the least whole sum: errors are not negative, so it could not win any more;
- the squared error of a single Linear is ``tr(D H D^T)`` with ``H = X^T X`` and ``D`` the change of the weight,
  whatever the number of tokens.

Candidates whose losses lie within a few per cent of each other have to be run nearly whole, so large layers take about
as many multiplications as trying everything (benchmarks/quantization.py shows how many times faster the search is).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers.activations import quantize_tokens
from bitquake.model_wrappers.quantizers.blocks import device_of, forwards_replaced, moved
from bitquake.model_wrappers.quantizers.features import Features, first_tensor
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.rtn import rtn
from bitquake.model_wrappers.quantizers.scale_groups import ScaleGroup
from bitquake.model_wrappers.quantizers.spec import QuantSpec

_ROUNDED = 1 << 17  # weights rounded at a time: the working set stays in the processor's cache
_KEPT = 1 << 26  # rounded weights of all candidates that are kept together; of larger layers one candidate's is
_TOKENS = 2048  # most tokens that are run at a time
_LEAST_PART = 128  # fewest tokens worth a call
_PRODUCTS = 1 << 24  # multiplications worth a call: smaller candidates are run several in one


def fake_quantize(weight: Tensor, spec: QuantSpec) -> Tensor:
    """``weight`` (out, in) rounded to the grid of ``spec`` and back, in float32 on its own device."""
    assert spec.bits is not None
    out_features, in_features = weight.shape
    group = min(spec.group_size, in_features) if isinstance(spec.group_size, int) else in_features
    tail = in_features % group
    result = torch.empty((out_features, in_features), dtype=torch.float32, device=weight.device)
    step = max(1, _ROUNDED // in_features)
    for start in range(0, out_features, step):
        rows = weight[start : start + step].float()
        for columns, width in ((slice(0, in_features - tail), group), (slice(in_features - tail, None), tail)):
            if not width or columns.stop == 0:
                continue
            part = rows[:, columns]
            codes, scale, zero = rtn(part.reshape(-1, width), spec.bits, spec.symmetric)
            values = codes.float().sub_(float(1 << (spec.bits - 1)))
            if zero is not None:
                values.sub_(zero.float())
            result[start : start + step, columns] = values.mul_(scale.float()).reshape(part.shape)
    return result


def normalised(scale: Tensor) -> Tensor:
    """Scales over the geometric mean of the largest and the smallest; 1 where that is not finite (as in AutoAWQ)."""
    scale = scale / (scale.amax(dim=-1, keepdim=True) * scale.amin(dim=-1, keepdim=True)).sqrt()
    return torch.where(scale.isfinite(), scale, torch.ones_like(scale))


@dataclass(frozen=True)
class Choice:
    """The winner: its index, its loss (a sum over tokens and outputs), and how much of the whole work was done."""

    index: int
    loss: float
    share: float


@torch.no_grad()
def best_scale(
    group: ScaleGroup,
    found: Features,
    candidates: Tensor,
    specs: Mapping[str, QuantSpec],
    *,
    power: int,
    weights: Tensor | None = None,
    first: int | None = None,
) -> Choice:
    """Index of the scale vector with the least ``sum_t weights[t] sum_i |output error[t, i]|^power``.

    Only the group's layers are rounded, each to its spec's grid; with ``activation_bits`` what they read is rounded,
    too. Of equal losses the first candidate wins.

    Args:
        candidates: shape (n, in_features), float32, positive.
        power: 1 or 2.
        weights: shape (tokens,), not negative; None: 1 each.
        first: the candidate that is run on everything, best the likely winner.

    Raises:
        QuantizationError: no candidate has a finite loss.
    """
    if weights is not None and not weights.any():
        return Choice(0, 0.0, 0.0)
    rounded = _Rounded(group, candidates.to(device_of(group.target)), specs)
    n = len(candidates)
    plain = group.is_linear and not rounded.activation_bits
    if plain and power == 2 and len(found.x) > found.x.shape[1]:
        losses = _by_gram(group, found, rounded, weights)
        best = min(range(n), key=lambda c: (losses[c], c))
        choice = Choice(best, losses[best], 1.0)
    else:
        errors = _CallErrors if found.calls else _ChangeErrors if plain else _TokenErrors
        choice = _race(n, errors(group, found, rounded, power, weights), n // 2 if first is None else first)
    if not choice.loss < float("inf"):
        raise QuantizationError(
            f"{', '.join(group.linears)}: no scale gives a finite error; its weights or activations are too large for "
            "float16 scales"
        )
    return choice


class _Rounded:
    """The group's weights under the candidates; of small layers all are made together and kept."""

    def __init__(self, group: ScaleGroup, candidates: Tensor, specs: Mapping[str, QuantSpec]) -> None:
        self.group, self.candidates, self.specs = group, candidates, specs
        self.activation_bits = next(iter(specs[name].activation_bits for name in group.linears))
        self.elements = sum(linear.weight.numel() for linear in group.linears.values())
        self.keeps_all = self.elements * len(candidates) <= _KEPT
        self._kept: dict[str, Tensor] = {}
        self._held: list[int] = []

    def at_once(self, tokens: int) -> int:
        """How many candidates to run in one call on so many tokens."""
        return max(1, _PRODUCTS // (tokens * self.elements)) if self.keeps_all else 1

    def __call__(self, indices: list[int], *, minus: bool = False) -> dict[str, Tensor]:
        """Full name -> weights, shape (candidates, out, in), float32, or with ``minus`` what they differ by.

        They stand on the scaled grid when activations are rounded; else the scale is divided out.
        """
        wanted = list(range(len(self.candidates))) if self.keeps_all else indices
        if self._held != wanted:
            self._kept = {name: self._make(linear, self.specs[name], wanted, minus)
                          for name, linear in self.group.linears.items()}  # fmt: skip
            self._held = wanted
        if wanted == indices:
            return self._kept
        rows: Any = slice(indices[0], indices[0] + 1) if len(indices) == 1 else indices  # a slice copies nothing
        return {name: weights[rows] for name, weights in self._kept.items()}

    def _make(self, linear: nn.Linear, spec: QuantSpec, indices: list[int], minus: bool) -> Tensor:
        scales = self.candidates[indices][:, None, :]
        weight = linear.weight.float()
        scaled = weight * scales
        made = fake_quantize(scaled.view(-1, linear.in_features), spec).view(scaled.shape)
        made = made if self.activation_bits else made.div_(scales)
        return made.sub_(weight) if minus else made

    def changes(self, indices: list[int]) -> Tensor:
        """How the weights of the only layer change, shape (candidates, out, in); in place of the weights."""
        (changes,) = self(indices, minus=True).values()
        return changes

    @contextlib.contextmanager
    def applied(self, indices: list[int]) -> Iterator[None]:
        """The group's layers compute with the candidates' weights: each with its share of the input's first rows."""
        bits, scales = self.activation_bits, self.candidates[indices][:, None, :]
        made = self(indices)
        weights = {linear: made[name].to(linear.weight.dtype) for name, linear in self.group.linears.items()}

        def forward(linear: nn.Module, _: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
            assert isinstance(linear, nn.Linear)
            weight, bias = weights[linear], linear.bias

            def several(x: Tensor) -> Tensor:
                rows = x.reshape(len(indices), -1, x.shape[-1])
                if bits is not None:
                    rows = quantize_tokens((rows.float() / scales).to(x.dtype), bits)
                if len(indices) == 1:
                    y = functional.linear(rows[0], weight[0], bias)
                else:
                    y = rows @ weight.transpose(1, 2)
                    y = y if bias is None else y.add_(bias)
                return y.reshape(*x.shape[:-1], -1)

            return several

        with forwards_replaced(list(weights), forward):
            yield


def _by_gram(group: ScaleGroup, found: Features, rounded: _Rounded, weights: Tensor | None) -> list[float]:
    """Squared error of each candidate by ``tr(D H D^T)``."""
    device = device_of(group.target)
    hessian = torch.zeros((found.x.shape[1], found.x.shape[1]), device=device)
    for start in range(0, len(found.x), _TOKENS):
        part = found.x[start : start + _TOKENS].to(device, torch.float32)
        if weights is not None:
            part = part * weights[start : start + _TOKENS, None].to(device).sqrt()
        hessian.addmm_(part.T, part)
    losses: list[float] = []
    for index in range(len(rounded.candidates)):
        (change,) = rounded.changes([index])
        losses.append(_finite(((change @ hessian) * change).sum(dtype=torch.float64).item()))
    return losses


class _Errors(Protocol):
    """Losses of candidates on parts of the calibration set, which begin where the losses are largest."""

    n_parts: int
    of_first: list[float]
    rounded: _Rounded

    def begin(self, first: int) -> None:
        """Run one candidate on everything and sort by its losses; ``of_first`` are its sums, part by part."""

    def losses(self, indices: list[int], part: int) -> list[float]:
        """Sum of each candidate's losses in a part."""


def _finite(value: float) -> float:
    return value if value == value else float("inf")


def _race(n: int, errors: _Errors, first: int) -> Choice:
    """The candidate with the least sum over the parts, the first of equal ones."""
    errors.begin(first)
    best, least, n_parts = first, sum(errors.of_first), errors.n_parts
    others = sorted((index for index in range(n) if index != first), key=lambda index: abs(index - first))
    totals = dict.fromkeys(others, 0.0)
    done = n_parts
    if errors.rounded.keeps_all:  # a look at all of them, then the likeliest alone: it lowers the bar for the others
        totals = dict(zip(others, errors.losses(others, 0), strict=True))
        done += len(others)
        others.sort(key=lambda index: totals[index])
        turns, begin = [others[:1], others[1:]], 1
    else:  # their weights are made anew for each turn: one by one, neighbours of the first first
        turns, begin = [[index] for index in others], 0
    for running in turns:
        for part in range(begin, n_parts):
            running = [index for index in running if totals[index] <= least]
            if not running:
                break
            done += len(running)
            for index, value in zip(running, errors.losses(running, part), strict=True):
                totals[index] += value
        for index in running:
            if (totals[index], index) < (least, best):
                best, least = index, totals[index]
    return Choice(best, least, done / (n * n_parts))


def _error(difference: Tensor, power: int, weights: Tensor | None) -> Tensor:
    """Loss of each token, float32; ``difference`` is of shape (..., tokens, out_features) and is overwritten."""
    difference = difference.float()
    values = difference.abs_() if power == 1 else difference.square_()
    summed = values.sum(dim=-1)
    return summed if weights is None else summed * weights


def _parts(n: int) -> list[slice]:
    """Cuts of n sorted tokens: a sixteenth each, but no less than is worth a call and no more than a call holds."""
    size = min(_TOKENS, max(_LEAST_PART, -(-n // 16)))
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


class _TokenErrors:
    """Of a target that treats each token alone."""

    def __init__(
        self, group: ScaleGroup, found: Features, rounded: _Rounded, power: int, weights: Tensor | None
    ) -> None:
        self.group, self.rounded, self.power = group, rounded, power
        self.x, self.weights = found.x, weights
        if weights is not None:
            kept = weights > 0
            self.x, self.weights = found.x[kept], weights[kept].float()
        self.device = device_of(group.target)
        self.reference: Tensor | None = None
        self.parts = _parts(len(self.x))
        self.n_parts = len(self.parts)

    def begin(self, first: int) -> None:
        """See ``_Errors``."""
        whole = [slice(start, start + _TOKENS) for start in range(0, len(self.x), _TOKENS)]
        self.reference = self._outputs(whole)
        losses = torch.cat([self._errors([first], part)[0].cpu() for part in whole])
        order = torch.argsort(losses, descending=True)
        losses = losses[order].double()
        self.x = self.x[order]
        self.reference = None if self.reference is None else self.reference[order]
        self.weights = None if self.weights is None else self.weights[order]
        self.of_first = [_finite(losses[part].sum().item()) for part in self.parts]

    def losses(self, indices: list[int], part: int) -> list[float]:
        """See ``_Errors``."""
        tokens = self.parts[part]
        step = self.rounded.at_once(tokens.stop - tokens.start)
        found: list[float] = []
        for start in range(0, len(indices), step):
            errors = self._errors(indices[start : start + step], tokens)
            found += [_finite(value) for value in errors.double().sum(dim=1).tolist()]
        return found

    def _outputs(self, whole: list[slice]) -> Tensor | None:
        return torch.cat([first_tensor(self.group.target(self.x[part].to(self.device))).cpu() for part in whole])

    def _errors(self, indices: list[int], tokens: slice) -> Tensor:
        """Shape (candidates, tokens)."""
        x = self.x[tokens].to(self.device)
        weights = None if self.weights is None else self.weights[tokens].to(self.device)
        return _error(self._difference(x, indices, tokens), self.power, weights)

    def _difference(self, x: Tensor, indices: list[int], tokens: slice) -> Tensor:
        assert self.reference is not None
        with self.rounded.applied(indices):
            output = first_tensor(self.group.target(x.expand(len(indices), *x.shape)))
        return output.float() - self.reference[tokens].to(self.device).float()


class _ChangeErrors(_TokenErrors):
    """Of a single Linear, by the change of its weight."""

    def _outputs(self, whole: list[slice]) -> Tensor | None:
        return None

    def _difference(self, x: Tensor, indices: list[int], tokens: slice) -> Tensor:
        difference: Tensor = x.float() @ self.rounded.changes(indices).transpose(1, 2)
        return difference


class _CallErrors:
    """Of a target that mixes the tokens of a call."""

    def __init__(
        self, group: ScaleGroup, found: Features, rounded: _Rounded, power: int, weights: Tensor | None
    ) -> None:
        self.group, self.rounded, self.power, self.weights = group, rounded, power, weights
        self.calls = list(found.calls)
        self.n_parts = len(self.calls)
        self.device = device_of(group.target)

    def begin(self, first: int) -> None:
        """See ``_Errors``."""
        losses = [self.losses([first], number)[0] for number in range(self.n_parts)]
        order = sorted(range(self.n_parts), key=lambda i: -losses[i] / max(1, self.calls[i].output.numel()))
        self.calls, self.of_first = [self.calls[i] for i in order], [losses[i] for i in order]

    def losses(self, indices: list[int], part: int) -> list[float]:
        """See ``_Errors``."""
        call = self.calls[part]
        # packed sequences (two dimensions) have none in which candidates could be put
        step = self.rounded.at_once(call.output[..., 0].numel()) if call.output.ndim > 2 else 1
        weights = None if self.weights is None else self.weights[call.tokens].to(self.device)
        reference = call.output.to(self.device).float().reshape(-1, call.output.shape[-1])
        args, kwargs = moved(call.args, self.device), moved(call.kwargs, self.device)
        found: list[float] = []
        for start in range(0, len(indices), step):
            some = indices[start : start + step]
            with self.rounded.applied(some):
                n, rows = len(some), call.output.shape[0]
                output = first_tensor(self.group.target(*_repeated(args, n, rows), **_repeated(kwargs, n, rows)))
            difference = output.float().reshape(n, -1, output.shape[-1]) - reference
            errors = _error(difference, self.power, weights).double().sum(dim=1)
            found += [_finite(value) for value in errors.tolist()]
        return found


def _repeated(value: Any, times: int, rows: int) -> Any:
    """Arguments with every tensor of ``rows`` samples ``times`` over."""
    if times == 1:
        return value
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1)) if value.ndim > 1 and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: _repeated(item, times, rows) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_repeated(item, times, rows) for item in value)
    return value
