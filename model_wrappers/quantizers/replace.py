"""Carries a spec out: replaces a model's Linear modules by ``QuantizedLinear``, one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.hqq import hqq, hqq_library
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.rtn import rtn
from bitquake.model_wrappers.quantizers.spec import HqqOptions, QuantSpec

_CHUNK = 1 << 17  # weights solved at a time: the working set of a solver stays in the processor's cache


class QuantizationError(ValueError):
    """A model that cannot be quantized as its spec asks."""


def quantize_weight(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize one weight matrix.

    It is solved on the CPU in float32 wherever the weight lies, so that a spec gives one model and not one per device.

    Args:
        weight: shape (out_features, in_features), any floating dtype and device.
        spec: a spec that quantizes.

    Returns:
        On the CPU: codes (out, in) uint8, scale (out, groups) float16, zero (out, groups) relative to the middle code,
        int8 or float16, or None when symmetric.

    Raises:
        QuantizationError: a weight that is not finite, or a group whose range a float16 scale cannot hold.
    """
    if spec.bits is None or spec.group_size is None:
        raise QuantizationError(f"spec {spec.name!r} does not quantize")
    out_features, in_features = weight.shape
    group = min(spec.group_size, in_features)
    tail = in_features % group
    # The library stops by the error of the whole matrix, so it gets the whole; own solvers treat every group alone.
    rows = out_features if spec.backend == "hqq" else max(1, _CHUNK // in_features)
    results = []
    for start in range(0, out_features, rows):
        part = weight.detach()[start : start + rows].to("cpu", torch.float32)
        if not part.isfinite().all():
            bad = int((~part.isfinite()).sum())
            raise QuantizationError(f"{bad} weights in rows {start} to {start + len(part) - 1} are NaN or infinite")
        pieces = [_quantize_groups(part[:, : in_features - tail], group, spec)]
        if tail:
            pieces.append(_quantize_groups(part[:, in_features - tail :], tail, spec))
        results.append(tuple(torch.cat(same, dim=1) for same in zip(*pieces, strict=True)))
    codes, scale, *zero = (torch.cat(same) for same in zip(*results, strict=True))
    if not scale.isfinite().all() or (zero and not zero[0].isfinite().all()):
        raise QuantizationError("a group's range or offset is beyond float16, in which scale and zero-point are stored")
    return codes, scale, zero[0] if zero else None


def _quantize_groups(part: Tensor, group: int, spec: QuantSpec) -> tuple[Tensor, ...]:
    """Codes, scale and (unless symmetric) zero of rows whose length is a multiple of ``group``."""
    rows, width = part.shape
    groups = part.reshape(-1, group)
    bits = spec.bits or 0
    codes: Tensor
    zero: Tensor | None
    if spec.method == "rtn":
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


def quantize_model(model: nn.Module, spec: QuantSpec, *, progress: bool = False) -> dict[str, str]:
    """Quantize a loaded model in place, module by module: no more than one module is held twice.

    Linear modules of the spec's components are replaced. ``lm_head`` belongs to no component, a weight that another
    module shares (a tied embedding) is left alone, and so are embeddings, norms and convolutions.

    Args:
        model: a Hugging Face model of an architecture in ``components.py``, before any adapter is put on.
        spec: what to do; full precision does nothing.
        progress: show a progress bar.

    Returns:
        Name of each replaced module -> hash of its weight before; ``build_card`` wants it as ``before``.

    Raises:
        QuantizationError: nothing matches a component of the spec, the model is quantized already, or a weight is
            offloaded or not finite. Modules done before the error stay quantized.
        ComponentMapError: the architecture has no component map.
    """
    if spec.is_full_precision:
        return {}
    parts = component_map(model)
    modules = dict(model.named_modules(remove_duplicate=False))  # a module under two names is shared, too
    if done := [name for name, module in modules.items() if isinstance(module, QuantizedLinear)]:
        raise QuantizationError(f"model is quantized already ({len(done)} modules, first {done[0]}); load it afresh")
    uses = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    targets = {
        name: module
        for name, module in modules.items()
        if type(module) is nn.Linear and parts.component(name) in spec.components and uses[id(module.weight)] == 1
    }
    found = {parts.component(name) for name in targets}
    if empty := [component for component in spec.components if component not in found]:
        raise QuantizationError(
            f"quantization spec {spec.name!r}: no Linear module of {type(model).__name__} belongs to "
            f"{', '.join(empty)}; this architecture has Linear modules in "
            f"{', '.join(sorted({parts.component(n) for n, m in modules.items() if isinstance(m, nn.Linear)}))}"
        )
    if offloaded := [name for name, module in targets.items() if module.weight.is_meta]:
        raise QuantizationError(
            f"{len(offloaded)} weights are offloaded (first {offloaded[0]}), so they cannot be quantized; "
            "use a device_map that keeps the model on devices"
        )
    before: dict[str, str] = {}
    names = list(targets)
    targets.clear()
    modules.clear()
    for name in _shown(names, spec.name, progress):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        before[name] = tensor_hash(linear.weight)
        try:
            model.set_submodule(name, quantize_linear(linear, spec))
        except QuantizationError as error:
            raise QuantizationError(f"{name} (shape {tuple(linear.weight.shape)}): {error}") from error
    return before


def quantize_linear(linear: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
    """The quantized twin of one layer, on the same device; ``linear`` itself is left alone."""
    device = linear.weight.device
    codes, scale, zero = (t if t is None else t.to(device) for t in quantize_weight(linear.weight, spec))
    assert codes is not None and scale is not None and spec.bits is not None and spec.group_size is not None
    layer = QuantizedLinear.from_codes(
        codes, scale, zero, bits=spec.bits, group_size=spec.group_size, bias=linear.bias, dtype=linear.weight.dtype,
        execution=spec.execution,
    )  # fmt: skip
    return layer.train(linear.training)


def _shown(names: list[str], label: str, progress: bool) -> Iterator[str]:
    if not progress:
        return iter(names)
    from tqdm import tqdm

    return iter(tqdm(names, desc=f"quantizing {label}", unit="module"))
