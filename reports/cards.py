"""From a quant card to what the report shows of it: every module, and the places that were treated alike."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from bitquake.quant_card import ModuleEntry, QuantCard
from bitquake.reports.pairing import short_dtype
from bitquake.reports.runs import public_name
from bitquake.reports.schema import CardEntry, ModuleAudit, PlaceAudit


def card_entry(card: QuantCard) -> CardEntry:
    """The card for the report: local folders shortened to their names, spec flattened, modules audited."""
    components = {name: entry.model_dump() for name, entry in sorted(card.components.items())}
    n_parameters = sum(entry.n_parameters for entry in card.components.values())
    n_quantized = sum(entry.n_quantized for entry in card.components.values())
    measured = card.execution != "simulated" and not card.self_declared
    modules = [_module(module) for module in card.modules]
    return CardEntry(
        pretrained=public_name(card.pretrained),
        base=public_name(card.base) if card.base else "",
        adapter=public_name(card.adapter.source) if card.adapter else "",
        adapter_hash=card.adapter.hash if card.adapter else "",
        checkpoint_format=card.checkpoint_format,
        image_processor=card.image_processor,
        revision=card.revision,
        architecture=card.architecture,
        dtype=short_dtype(card.dtype),
        spec_name=card.spec_name,
        spec=_flat({key: value for key, value in card.spec.items() if key != "method"}),
        method=card.method,
        execution=card.execution,
        self_declared=card.self_declared,
        kernel=card.kernel,
        device=card.device,
        nominal_bpw=None if card.self_declared else card.nominal_bpw,
        effective_bpw=None if card.self_declared else card.effective_bpw,
        bits=_span({str(module.bits) for module in modules}),
        group_size=_span({module.group for module in modules}),
        n_quantized_modules=len(modules),
        n_changed_modules=sum(module.changed for module in modules),
        n_kept_modules=len(card.kept),
        quantized_share=n_quantized / n_parameters if n_parameters else 0.0,
        components=components
        if measured
        else {k: {n: v for n, v in c.items() if n != "n_bytes"} for k, c in components.items()},
        n_bytes=sum(entry.n_bytes for entry in card.components.values()) if measured else None,
        places=_places(modules),
        modules=modules,
        kept=dict(sorted(card.kept.items())),
        calibration_source=card.calibration.source,
        calibration_data=public_name(card.calibration.data) if card.calibration.data else "",
        calibration_samples=card.calibration.n_samples,
        calibration_hash=card.calibration.ids_hash,
        weights_hash=card.weights_hash,
        libraries=dict(sorted(card.libraries.items())),
    )


def _module(module: ModuleEntry) -> ModuleAudit:
    layer = "MLP" if module.layer == "mlp" else "" if module.layer == "other" else module.layer
    group = "tensor" if module.per_tensor else "channel" if module.group_size == module.shape[1] else module.group_size
    extras = ["input scales"] * module.input_scale + ["column order"] * module.order
    return ModuleAudit(
        name=module.name,
        place=" ".join(part for part in (module.component, module.third or "", layer) if part),
        format=module.format,
        bits=module.bits,
        group=str(group),
        symmetric=module.symmetric,
        activation_bits=module.activation_bits,
        extras=extras,
        shape=module.shape,
        packed_bytes=module.packed_bytes,
        changed=module.changed,
        hash_before=module.hash_before,
        hash_after=module.hash_after,
    )


_ALIKE = ("place", "format", "bits", "group", "symmetric", "activation_bits", "extras")


def _places(modules: list[ModuleAudit]) -> list[PlaceAudit]:
    """Places in the order of the model, as far as its modules come in that order."""

    def kind(module: ModuleAudit) -> str:
        return repr([getattr(module, key) for key in _ALIKE])

    first = {kind(module): index for index, module in reversed(list(enumerate(modules)))}
    found = []
    for _, group in groupby(sorted(modules, key=lambda module: first[kind(module)]), key=kind):
        alike = list(group)
        found.append(
            PlaceAudit(
                **{key: getattr(alike[0], key) for key in _ALIKE},
                n_modules=len(alike),
                n_changed=sum(module.changed for module in alike),
                n_weights=sum(module.shape[0] * module.shape[1] for module in alike),
                packed_bytes=sum(module.packed_bytes for module in alike),
            )
        )
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options under dotted names, sorted."""
    found: dict[str, str] = {}
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            found[prefix + key] = "+".join(_shown(item) for item in value)
        else:
            found[prefix + key] = public_name(str(value)) if key == "data" else str(value)
    return found


def _shown(item: object) -> str:
    return f"({', '.join(f'{k} {v}' for k, v in _flat(item).items())})" if isinstance(item, Mapping) else str(item)


def _span(values: set[str]) -> str:
    return ", ".join(sorted(values, key=lambda value: (not value.isdigit(), value.zfill(6))))
