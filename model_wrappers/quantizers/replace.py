"""Carries a spec out: replaces a model's Linear modules by quantized ones, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.hqq import hqq, hqq_library
from bitquake.model_wrappers.quantizers.libraries.facts import library_facts
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.options import HqqOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError, resolve
from bitquake.model_wrappers.quantizers.rtn import rtn
from bitquake.model_wrappers.quantizers.spec import CALIBRATED, LIBRARIES, QuantSpec
from bitquake.model_wrappers.quantizers.uniform import uniform, uniform_bias
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

if TYPE_CHECKING:
    from bitquake.model_wrappers.calibration import CalibrationSet

_CHUNK = 1 << 17  # weights solved at a time: the working set of a solver stays in the processor's cache

Emit = Callable[[str, QuantizedWeight], None]
"""Told of each module as soon as it is done."""


def row_group(group_size: int | str | None, in_features: int) -> int:
    """Columns that share a scale: a group longer than the row is the row; ``channel`` and ``tensor`` are it, too."""
    return min(group_size, in_features) if isinstance(group_size, int) else in_features


def quantize_weight(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize one weight matrix by a data-free method; for a calibrated one, onto its grid by rounding.

    It is solved on the CPU in float32 wherever the weight lies, so that a spec gives one model and not one per device.

    Args:
        weight: shape (out_features, in_features), any floating dtype and device.
        spec: a spec that quantizes.

    Returns:
        On the CPU; scale float16 (uniform: float32), zero relative to the middle code, int8 or floating, or None when
        symmetric.

    Raises:
        QuantizationError: a weight that is not finite, or a group whose range a float16 scale cannot hold.
    """
    if spec.bits is None:
        raise QuantizationError(f"spec {spec.name!r} does not quantize")
    if spec.method == "uniform":
        return uniform(weight, spec.bits)
    out_features, in_features = weight.shape
    if spec.group_size == "tensor":
        whole = _finite(weight, 0).reshape(1, -1)
        codes, scale, zero = rtn(whole, spec.bits, spec.symmetric)
        return _checked(codes.reshape(out_features, in_features), scale, zero, spec.bits, in_features)
    group = row_group(spec.group_size, in_features)
    tail = in_features % group
    # The library stops by the error of the whole matrix, so it gets the whole; own solvers treat every group alone.
    rows = out_features if spec.backend == "hqq" else max(1, _CHUNK // in_features)
    results = []
    for start in range(0, out_features, rows):
        part = _finite(weight[start : start + rows], start)
        pieces = [_quantize_groups(part[:, : in_features - tail], group, spec)]
        if tail:
            pieces.append(_quantize_groups(part[:, in_features - tail :], tail, spec))
        results.append(tuple(torch.cat(same, dim=1) for same in zip(*pieces, strict=True)))
    codes, scale, *zeros = (torch.cat(same) for same in zip(*results, strict=True))
    return _checked(codes, scale, zeros[0] if zeros else None, spec.bits, group)


def _finite(part: Tensor, start: int) -> Tensor:
    part = part.detach().to("cpu", torch.float32)
    if not part.isfinite().all():
        bad = int((~part.isfinite()).sum())
        raise QuantizationError(f"{bad} weights in rows {start} to {start + len(part) - 1} are NaN or infinite")
    return part


def _checked(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> QuantizedWeight:
    if not scale.isfinite().all() or (zero is not None and not zero.isfinite().all()):
        raise QuantizationError("a group's range or offset is beyond float16, in which scale and zero-point are stored")
    return QuantizedWeight(codes, scale, zero, bits, group)


def _quantize_groups(part: Tensor, group: int, spec: QuantSpec) -> tuple[Tensor, ...]:
    """Codes, scale and (unless symmetric) zero of rows whose length is a multiple of ``group``."""
    rows, width = part.shape
    groups = part.reshape(-1, group)
    bits = spec.bits or 0
    codes: Tensor
    zero: Tensor | None
    if spec.method != "hqq":
        codes, scale, zero = rtn(groups, bits, spec.symmetric)
    elif spec.backend == "own":
        codes, scale, zero = hqq(groups, bits, spec.hqq or HqqOptions())
    elif group % 8:
        raise QuantizationError(
            f"the hqq library needs groups of a multiple of 8, and the last group of a row has {group}; use backend own"
        )
    else:
        codes, scale, zero = hqq_library(groups, bits)
    parts = (codes.reshape(rows, width), scale.reshape(rows, -1))
    return parts if zero is None else (*parts, zero.reshape(rows, -1))


def quantize_model(
    model: nn.Module,
    spec: QuantSpec,
    *,
    calibration: CalibrationSet | None = None,
    done: Mapping[str, QuantizedWeight] | None = None,
    emit: Emit | None = None,
    progress: bool = False,
) -> dict[str, str]:
    """Quantize a loaded model in place, module by module: no more than one module is held twice.

    ``plan.resolve`` says which modules; ``lm_head``, tied weights, embeddings, norms and convolutions stay.

    Args:
        model: a Hugging Face model of an architecture in ``components.py``, before any adapter is put on.
        spec: what to do; full precision does nothing.
        calibration: what a calibrated method sees.
        done: modules that an earlier, interrupted call finished; they are put in as they are.
        emit: called for each newly finished module.
        progress: show a progress bar.

    Returns:
        Name of each replaced module -> hash of its weight before; ``build_card`` wants it as ``before``.

    Raises:
        QuantizationError: nothing matches the spec, the model is quantized already, a weight is offloaded or not
            finite, or calibration data is missing. Modules done before the error stay quantized.
        ComponentMapError: the architecture has no component map.
    """
    if spec.is_full_precision:
        return {}
    targets = quantization_targets(model, spec)
    before = {name: tensor_hash(model.get_submodule(name).weight) for name in targets}  # type: ignore[arg-type]
    done = done or {}

    def put(name: str, weight: QuantizedWeight) -> None:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, quantized_linear(linear, weight, targets[name]))

    if spec.method in CALIBRATED:
        from bitquake.model_wrappers.quantizers.calibrated import quantize

        if calibration is None or len(calibration) == 0:
            raise QuantizationError(
                f"quantization spec {spec.name!r}: method {spec.method} needs calibration data, and there is none; "
                "give a calibration source with at least one sample"
            )

        def finished(name: str, weight: QuantizedWeight) -> None:
            put(name, weight)
            if emit is not None and name not in done:
                emit(name, weight)

        linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in targets}
        quantize(model, linears, targets, spec, calibration, finished, done=done, progress=progress)
        return before
    for name in _shown(list(targets), spec.name, progress):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            if spec.method in LIBRARIES:
                model.set_submodule(name, library_linear(linear, targets[name]))
                continue
            weight = done[name] if name in done else quantize_weight(linear.weight, targets[name])
        except QuantizationError as error:
            raise QuantizationError(f"{name} (shape {tuple(linear.weight.shape)}): {error}") from error
        put(name, weight)
        if emit is not None and name not in done:
            emit(name, weight)
    return before


def quantization_targets(model: nn.Module, spec: QuantSpec) -> dict[str, QuantSpec]:
    """``plan.resolve`` on a model that is whole and not quantized yet.

    Raises:
        QuantizationError: it is quantized already, or a weight is offloaded.
    """
    modules = model.named_modules()
    if done := [n for n, m in modules if isinstance(m, QuantizedLinear) or library_facts(m) is not None]:
        raise QuantizationError(f"model is quantized already ({len(done)} modules, first {done[0]}); load it afresh")
    targets = resolve(model, spec)
    offloaded = [name for name in targets if model.get_submodule(name).weight.is_meta]
    if offloaded:
        raise QuantizationError(
            f"{len(offloaded)} weights are offloaded (first {offloaded[0]}), so they cannot be quantized; "
            "use a device_map that keeps the model on devices"
        )
    return targets


def quantized_linear(linear: nn.Linear, weight: QuantizedWeight, spec: QuantSpec) -> QuantizedLinear:
    """The quantized twin of one layer, on the same device; ``linear`` itself is left alone."""
    bias = linear.bias
    if bias is not None and spec.uniform is not None and spec.uniform.quantize_bias:
        assert spec.bits is not None
        bias = nn.Parameter(uniform_bias(bias, spec.bits), requires_grad=bias.requires_grad)
    layer = QuantizedLinear.from_weight(
        weight.to(linear.weight.device), bias=bias, dtype=linear.weight.dtype, execution=spec.execution,
        activation_bits=spec.activation_bits,
    )  # fmt: skip
    return layer.train(linear.training)


def quantize_linear(linear: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
    """The quantized twin of one layer by a data-free method."""
    return quantized_linear(linear, quantize_weight(linear.weight, spec), spec)


def library_linear(linear: nn.Linear, spec: QuantSpec) -> nn.Module:
    """The layer of bitsandbytes or torchao."""
    if spec.bitsandbytes is not None:
        from bitquake.model_wrappers.quantizers.libraries.bnb import quantize_bnb

        return quantize_bnb(linear, spec.bitsandbytes, linear.weight.device)
    from bitquake.model_wrappers.quantizers.libraries.torchao_backend import quantize_torchao

    assert spec.torchao is not None
    return quantize_torchao(linear, spec.torchao, spec.group_size, linear.weight.device)


def _shown(names: list[str], label: str, progress: bool) -> Iterator[str]:
    if not progress:
        return iter(names)
    from tqdm import tqdm

    return iter(tqdm(names, desc=f"quantizing {label}", unit="module"))
