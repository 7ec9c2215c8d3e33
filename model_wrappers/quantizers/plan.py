"""From a spec to each module: which Linear modules of a model are quantized, and how each of them."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bitquake.model_wrappers.components import Cell, ComponentMap, component_map
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.spec import PlanRule, QuantSpec


class QuantizationError(ValueError):
    """A model that cannot be quantized as its spec asks."""


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Linear modules that may be, or are, quantized: in a component, and their weight shared with no other module.

    ``lm_head`` belongs to no component; a tied embedding, norms and convolutions are left alone, and so is the output
    of an ``nn.MultiheadAttention`` (SigLIP's pooling head), which is read as a weight and never called.
    """
    parts = component_map(model)
    modules = dict(model.named_modules(remove_duplicate=False))  # a module under two names is shared, too
    uses = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    return {
        name: module
        for name, module in modules.items()
        if parts.component(name) != "other"
        and (
            isinstance(module, QuantizedLinear)
            or (
                isinstance(module, nn.Linear)
                and not isinstance(module, NonDynamicallyQuantizableLinear)
                and uses[id(module._parameters["weight"])] == 1
            )
        )
    }


def resolve(model: nn.Module, spec: QuantSpec) -> dict[str, QuantSpec]:
    """Spec of each module that is to be quantized, in the model's order.

    Without a plan these are the Linear modules of the spec's components. With one, they are what its rules match,
    with the rule's bits, group size and symmetry in place of the spec's.

    Raises:
        QuantizationError: a component without Linear modules; a rule that matches nothing; a module that two match.
        ComponentMapError: the architecture has no component map.
    """
    parts = component_map(model)
    names = list(quantizable(model))
    if not spec.plan:
        found = {name: spec for name in names if parts.component(name) in spec.components}
        present = sorted({parts.component(name) for name in names})
        if empty := [c for c in spec.components if c not in {parts.component(name) for name in found}]:
            raise QuantizationError(
                f"quantization spec {spec.name!r}: no Linear module of {type(model).__name__} belongs to "
                f"{', '.join(empty)}; this architecture has Linear modules in {', '.join(present)}"
            )
        return found
    rules = [spec.of_rule(rule) for rule in spec.plan]
    matched: dict[str, int] = {}
    for number, rule in enumerate(spec.plan):
        mine = [name for name in names if _matches(rule, name, parts.cell(name))]
        where = f"quantization spec {spec.name!r}: plan rule {number + 1} ({_shown(rule)})"
        if not mine:
            raise QuantizationError(
                f"{where} matches no Linear module of {type(model).__name__}; {_hint(rule, names, parts)}"
            )
        if twice := [name for name in mine if name in matched]:
            raise QuantizationError(
                f"{where} matches {twice[0]}, which rule {matched[twice[0]] + 1} matches already "
                f"({len(twice)} modules); each module may belong to one rule only"
            )
        matched |= dict.fromkeys(mine, number)
    if all(rule.keep for rule in spec.plan):
        raise QuantizationError(
            f"quantization spec {spec.name!r}: every rule of its plan keeps its modules; use quant=none"
        )
    return {name: rules[matched[name]] for name in names if name in matched and not spec.plan[matched[name]].keep}


def _matches(rule: PlanRule, name: str, cell: Cell) -> bool:
    return (
        (rule.modules is None or re.fullmatch(rule.modules, name) is not None)
        and (rule.components is None or cell.component in rule.components)
        and (rule.thirds is None or cell.third in rule.thirds)
        and (rule.layers is None or cell.kind in rule.layers)
    )


def _shown(rule: PlanRule) -> str:
    keys = rule.model_dump(exclude_defaults=True, include={"modules", "components", "thirds", "layers"})
    return ", ".join(f"{key} {value if isinstance(value, str) else '+'.join(value)}" for key, value in keys.items())


def _hint(rule: PlanRule, names: list[str], parts: ComponentMap) -> str:
    if rule.modules is not None and (partly := next((n for n in names if re.search(rule.modules, n)), None)):
        return f"a pattern must match the whole name, for example {partly!r} (add .* before or after)"
    cells = sorted({f"{c.component}/{c.third or '-'}/{c.kind}" for c in map(parts.cell, names)})
    return f"names are like {names[0]!r}; cells: {', '.join(cells)}"
