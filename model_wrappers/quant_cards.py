"""Quant cards: built from a loaded model's tensors, kept in one content-addressed folder."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bitquake import __version__
from bitquake.model_wrappers.quantizers.spec import QuantSpec
from bitquake.quant_card import Calibration, ComponentEntry, ModuleEntry, QuantCard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitquake.model_wrappers.calibration import CalibrationSet
    from bitquake.model_wrappers.components import ComponentMap
    from bitquake.model_wrappers.quantizers.published.grid import Grid

_FOLDER = "quant_cards"


class QuantCardError(ValueError):
    """A card that cannot be built, is not there, or is damaged."""


def build_card(
    model: nn.Module,
    spec: QuantSpec,
    *,
    pretrained: str,
    base: str = "",
    revision: str = "",
    before: Mapping[str, str],
    calibration: Calibration | None = None,
    checkpoint_format: str = "",
    image_processor: str = "",
    grids: Mapping[str, Grid] | None = None,
) -> QuantCard:
    """Describe a loaded model by its tensors; full precision gets a card too.

    The spec is only quoted: bits, groups, shapes, bytes and hashes are read from the modules, and a ``simulated``
    weight is checked to be what its codes say. ``weights_hash`` is over parameters and persistent buffers (what a
    checkpoint stores), de-quantized: the same for every device and execution.

    Args:
        model: the model as it will run, before any adapter is put on and before codes are forgotten.
        spec: what was asked for.
        pretrained, base, revision: what the model was loaded from, as of ``QuantCard``.
        before: ``quantize_model``'s result; hash "" where the weight of before is not known (published checkpoints).
        calibration, checkpoint_format, image_processor: as of ``QuantCard``.
        grids: plain Linear modules whose weights lie on a low-bit grid (``on_grid``): the accuracy of so few bits and
            the memory of full precision, so they count as simulated.

    Raises:
        QuantCardError: the modules contradict ``before`` or the spec, or a tensor is offloaded and cannot be read.
    """
    from torch import nn

    from bitquake.model_wrappers.components import component_map

    quantized = {name: facts for name, m in model.named_modules() if (facts := _layer_facts(m)) is not None}
    quantized |= {name: _grid_facts(model.get_submodule(name), grid) for name, grid in (grids or {}).items()}
    if quantized.keys() != before.keys():
        odd = sorted(quantized.keys() ^ before.keys())
        raise QuantCardError(
            f"quant card of {pretrained}: {len(quantized)} modules are quantized, {len(before)} have a hash of before "
            f"({odd[0]} differs); pass quantize_model's result for this very model as before="
        )
    if quantized and spec.method != "checkpoint":
        _check_against_spec(model, quantized, spec)
    parts = component_map(model) if quantized and not grids else _map_or_none(model)
    hashes, weights_hash = _hash_weights(model, quantized, pretrained)
    modules = []
    for name, facts in quantized.items():
        cell = parts.cell(name) if parts else None
        modules.append(
            ModuleEntry(
                name=name, component=_component(parts, name), third=cell.third if cell else None,
                layer=cell.kind if cell else "other", hash_before=before[name], hash_after=hashes[f"{name}.weight"],
                **facts.entry,
            )
        )  # fmt: skip

    totals: dict[str, dict[str, int]] = {}
    nominal = effective = n_parameters = 0
    for entry in modules:
        _add(totals, entry.component, entry.n_weights, entry.n_weights, entry.n_bytes, entry.packed_bytes)
        nominal += entry.bits * entry.n_weights
        effective += 8 * entry.packed_bytes
        n_parameters += entry.n_weights
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            continue  # a library's layer keeps its low-bit weight as a parameter
        _add(totals, _component(parts, name), parameter.numel(), 0, parameter.nbytes, parameter.nbytes)
        nominal += 8 * parameter.nbytes
        effective += 8 * parameter.nbytes
        n_parameters += parameter.numel()

    dtype = _dtype_name(model, quantized)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in quantized}
    executions = {facts.execution for facts in quantized.values()}
    packages = {"hqq"} if spec.backend == "hqq" else set()
    packages |= {facts.package for facts in quantized.values()} - {""}
    return QuantCard(
        pretrained=pretrained,
        base=base,
        revision=revision,
        architecture=type(model).__name__,
        dtype=dtype,
        spec_name=spec.name,
        spec=spec.options(),
        method=spec.method,
        execution="full-precision" if not quantized else "packed" if executions == {"packed"} else "simulated",
        kernel=_kernel(dtype, quantized),
        modules=modules,
        kept={name: _short(module.weight.dtype) for name, module in linears.items()},
        components={name: ComponentEntry(**totals[name]) for name in sorted(totals)},
        nominal_bpw=nominal / n_parameters,
        effective_bpw=effective / n_parameters,
        weights_hash=weights_hash,
        calibration=calibration or Calibration(),
        checkpoint_format=checkpoint_format,
        image_processor=image_processor,
        libraries=_versions("torch", "transformers", "lmms-eval", *sorted(packages)),
        device=_devices(model),
    )


def calibration_entry(data: CalibrationSet) -> Calibration:
    """What a card says of a calibration set."""
    return Calibration(
        source=data.source,
        data=data.spec.data or "",
        n_samples=len(data),
        ids_hash=data.ids_hash if data.image_ids else "",
    )


@dataclass(frozen=True)
class _Facts:
    """A quantized layer, read from its tensors. ``entry``: fields of ``ModuleEntry``; ``package``: its library."""

    layer: nn.Module
    entry: dict[str, Any]
    execution: str
    kernel: str
    weight: Callable[[], Tensor]
    package: str = ""


def _layer_facts(module: nn.Module) -> _Facts | None:
    """None for a layer that is not quantized."""
    from bitquake.model_wrappers.quantizers.libraries.facts import library_facts
    from bitquake.model_wrappers.quantizers.linear import QuantizedLinear

    if isinstance(module, QuantizedLinear):
        entry = {
            "shape": (module.out_features, module.in_features), "bits": module.bits, "group_size": module.group_size,
            "symmetric": module.symmetric, "per_tensor": module.layout.per_tensor,
            "input_scale": module.layout.has_input_scale, "order": module.layout.has_order,
            "activation_bits": module.activation_bits, "n_weights": module.in_features * module.out_features,
            "n_bytes": module.held_bytes, "packed_bytes": module.packed_bytes,
        }  # fmt: skip
        when = "before the run" if module.execution == "simulated" else "at every call"
        plain = f"torch F.linear on {_short(module.weight_dtype)} de-quantized {when}"
        if module.activation_bits is not None:
            plain += f", inputs rounded to {module.activation_bits} bits"
        kernel = module.kernel.name if module.kernel is not None else plain
        return _Facts(module, entry, module.execution, kernel, lambda: module.weight)
    facts = library_facts(module)
    if facts is None:
        return None
    entry = {
        "shape": facts.shape, "bits": facts.bits, "group_size": facts.group_size, "symmetric": facts.symmetric,
        "activation_bits": facts.activation_bits, "n_weights": facts.n_weights, "n_bytes": facts.held_bytes,
        "packed_bytes": facts.held_bytes, "format": facts.format,
    }  # fmt: skip
    return _Facts(module, entry, "packed", facts.kernel, facts.weight, facts.package)


def _grid_facts(module: nn.Module, grid: Grid) -> _Facts:
    """A dense weight that lies on a grid."""
    weight = module._parameters["weight"]
    assert weight is not None
    entry = {
        "shape": tuple(weight.shape), "bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric,
        "n_weights": weight.numel(), "n_bytes": weight.nbytes, "packed_bytes": weight.nbytes,
        "format": "dense on a grid",
    }  # fmt: skip
    return _Facts(module, entry, "simulated", f"torch F.linear on {_short(weight.dtype)}", lambda: weight)


def _map_or_none(model: nn.Module) -> ComponentMap | None:
    """The map, or None for a full-precision model of an architecture that has none: it can run, all of it ``other``."""
    from bitquake.model_wrappers.components import ComponentMapError, component_map

    try:
        return component_map(model)
    except ComponentMapError:
        return None


def _component(parts: ComponentMap | None, name: str) -> str:
    return parts.component(name) if parts else "other"


def _add(totals: dict[str, dict[str, int]], component: str, *values: int) -> None:
    entry = totals.setdefault(component, dict.fromkeys(ComponentEntry.model_fields, 0))
    for key, value in zip(entry, values, strict=True):
        entry[key] += value


def _check_against_spec(model: nn.Module, quantized: Mapping[str, _Facts], spec: QuantSpec) -> None:
    """A card says what the tensors are; where they are not what the spec says, there is no card."""
    from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
    from bitquake.model_wrappers.quantizers.plan import resolve
    from bitquake.model_wrappers.quantizers.replace import row_group

    asked_of = resolve(model, spec)
    if odd := sorted(asked_of.keys() ^ quantized.keys()):
        raise QuantCardError(
            f"quant card: {spec.name!r} asks for {len(asked_of)} quantized modules, {len(quantized)} are "
            f"({odd[0]} differs)"
        )
    for name, facts in quantized.items():
        module, mine = facts.layer, asked_of[name]
        if not isinstance(module, QuantizedLinear):
            if module_bits := (facts.entry["bits"] if facts.entry["bits"] != mine.bits else None):
                raise QuantCardError(f"quant card: {name} has {module_bits} bits, not {mine.bits} as in {spec.name!r}")
            continue
        found = (module.bits, module.group_size, module.symmetric, module.execution, module.activation_bits)
        group = row_group(mine.group_size, module.in_features)
        asked = (mine.bits, group, mine.symmetric, mine.execution, mine.activation_bits)
        if found != asked:
            raise QuantCardError(
                f"quant card: {name} has (bits, group size, symmetric, execution, activations) {found}, not {asked} "
                f"as in {spec.name!r}"
            )
        if not module.is_on_grid():
            raise QuantCardError(
                f"quant card: {name} claims {module.bits} bits, but its de-quantized weight is not what its codes say; "
                "it was overwritten after quantization"
            )


def _hash_weights(model: nn.Module, quantized: Mapping[str, _Facts], where: str) -> tuple[dict[str, str], str]:
    """Hash of each weight as it computes, by name, and one hash over all of them in name order."""
    import hashlib

    from bitquake.model_wrappers.quantizers.hashing import tensor_hash

    tensors: dict[str, Tensor | None] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = {**module._parameters}
        if module_name in quantized:
            own["weight"] = None
            tensors[f"{prefix}weight"] = None  # de-quantized when its turn comes, one at a time
        else:
            own |= {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        tensors |= {prefix + key: value for key, value in own.items() if value is not None}
    hashes: dict[str, str] = {}
    seen: dict[int, str] = {}  # a tied weight is read once
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        weight = quantized[name.removesuffix(".weight")].weight() if tensor is None else tensor
        if weight.is_meta:
            raise QuantCardError(
                f"quant card of {where}: {name} is offloaded, so its bytes cannot be read; "
                "use a device_map that keeps the model on devices"
            )
        key = id(tensor)
        hashes[name] = seen[key] if tensor is not None and key in seen else tensor_hash(weight)
        if tensor is not None:
            seen[key] = hashes[name]
        total.update(f"{name} {_short(weight.dtype)} {tuple(weight.shape)} {hashes[name]}\n".encode())
    return hashes, total.hexdigest()


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_name(model: nn.Module, quantized: Mapping[str, _Facts]) -> str:
    """The floating dtype of most parameters (quantized weights: of their de-quantized form)."""
    from bitquake.model_wrappers.quantizers.linear import QuantizedLinear

    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name.removesuffix(".weight") not in quantized:
            counts[_short(parameter.dtype)] = counts.get(_short(parameter.dtype), 0) + parameter.numel()
    for facts in quantized.values():
        if isinstance(facts.layer, QuantizedLinear):
            key = _short(facts.layer.weight_dtype)
            counts[key] = counts.get(key, 0) + facts.entry["n_weights"]
    return max(counts, key=lambda name: (counts[name], name))


def _kernel(dtype: str, quantized: Mapping[str, _Facts]) -> str:
    """What computes, with the number of modules where that is not the same for all."""
    if not quantized:
        return f"torch F.linear on {dtype}"
    counts = Counter(facts.kernel for facts in quantized.values())
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{kernel} ({n} modules)" for kernel, n in sorted(counts.items()))


def _devices(model: nn.Module) -> str:
    """Devices that hold the model: ``cpu``, ``cuda NVIDIA H200``, ``2 x cuda NVIDIA H200``.

    Without the index: every rank of a data-parallel run has the same card.
    """
    import torch

    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    names = Counter(f"cuda {torch.cuda.get_device_name(d)}" if d.type == "cuda" else d.type for d in devices)
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in sorted(names.items()))


def _versions(*names: str) -> dict[str, str]:
    found = {"bitquake": __version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def artifacts_dir(path: str | Path | None = None) -> Path:
    """Folder of the artifacts, made when it is not there; default: the user's cache folder of ``bitquake``."""
    if path is None:
        from platformdirs import user_cache_path

        folder = user_cache_path("bitquake", appauthor=False)
    else:
        folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuantCardError(
            f"artifacts folder {folder} cannot be made: {error.strerror}; give another artifacts="
        ) from error
    return folder


def store_card(card: QuantCard, directory: Path) -> str:
    """Write ``quant_cards/<content hash>.json`` in ``directory`` atomically and return the hash; again is harmless."""
    card_hash = card.content_hash
    target = _card_path(card_hash, directory)
    content = card.to_json().encode()
    if target.is_file() and target.read_bytes() == content:
        return card_hash
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{card_hash}.{uuid.uuid4().hex}.tmp")  # several processes may store the same card
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return card_hash


def load_card(card_hash: str, directory: Path) -> QuantCard:
    """Read a card by its content hash.

    Raises:
        QuantCardError: there is no such card, or its content does not fit its name.
    """
    if not card_hash or not all(c in "0123456789abcdef" for c in card_hash):
        raise QuantCardError(f"quant card: expected a content hash of hex digits, got {card_hash!r}")
    target = _card_path(card_hash, directory)
    try:
        content = target.read_bytes()
    except OSError as error:
        raise QuantCardError(
            f"quant card {card_hash} is not in {directory} ({error.strerror}); give the artifacts folder of the run "
            "that wrote it, or run the model again"
        ) from error
    try:
        card = QuantCard.model_validate_json(content)
    except ValidationError as error:
        raise QuantCardError(
            f"quant card {target} is damaged: {error.errors()[0]['msg']}; run the model again"
        ) from error
    if card.content_hash != card_hash:
        raise QuantCardError(
            f"quant card {target} is damaged: its content's hash is {card.content_hash}; run the model again"
        )
    return card


def _card_path(card_hash: str, directory: Path) -> Path:
    return Path(directory) / _FOLDER / f"{card_hash}.json"
