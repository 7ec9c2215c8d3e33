"""Plans: which modules a spec means, and how each is quantized, on a model counted by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from bitquake.model_wrappers.components import ARCHITECTURES, component_map
from bitquake.model_wrappers.quant_cards import build_card
from bitquake.model_wrappers.quantizers import QuantSpec, load_spec
from bitquake.model_wrappers.quantizers.plan import QuantizationError, quantizable, resolve
from bitquake.model_wrappers.quantizers.replace import quantize_model

Make = Callable[[str], Any]


def spec(*rules: dict[str, Any], **keys: Any) -> QuantSpec:
    return load_spec({"name": "mine", "method": "rtn", "bits": 4, "group_size": 16, "plan": list(rules), **keys})


@pytest.fixture
def model(tiny_architectures: Any) -> nn.Module:
    return tiny_architectures.make("idefics3")


def test_a_rule_overrides_the_spec(model: nn.Module) -> None:
    plan = spec(
        {"components": ["language"], "layers": ["mlp"], "thirds": ["end"], "bits": 2, "group_size": "channel"},
        {"components": ["language"], "layers": ["attention"], "symmetric": True},
        {"modules": r"model\.vision_model\..*\.q_proj", "bits": 8},
    )
    found = resolve(model, plan)
    parts = component_map(model)
    for name in quantizable(model):
        cell = parts.cell(name)
        if (cell.component, cell.kind, cell.third) == ("language", "mlp", "end"):
            expected = (2, "channel", False)
        elif (cell.component, cell.kind) == ("language", "attention"):
            expected = (4, 16, True)
        elif cell.component == "vision" and name.endswith("q_proj"):
            expected = (8, 16, False)
        else:
            assert name not in found
            continue
        assert (found[name].bits, found[name].group_size, found[name].symmetric) == expected
    card = build_card(model, plan, pretrained="tiny", before=quantize_model(model, plan))
    assert {e.name: (e.bits, e.symmetric) for e in card.modules} == {n: (s.bits, s.symmetric) for n, s in found.items()}
    assert all(e.group_size == e.shape[1] for e in card.modules if e.bits == 2)
    assert {e.layer for e in card.modules if e.bits == 2} == {"mlp"} and {
        e.third for e in card.modules if e.bits == 2
    } == {"end"}


def test_a_rule_that_keeps(model: nn.Module) -> None:
    every = resolve(model, load_spec("rtn-int4-g64"))
    found = resolve(
        model, spec({"components": ["language"], "layers": ["mlp"]}, {"layers": ["attention"], "keep": True})
    )
    assert set(found) == {name for name in every if ".mlp." in name}


def test_a_rule_that_matches_nothing_or_twice_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        QuantizationError, match=r"plan rule 1 \(modules q_proj\) matches no Linear .*must match the whole"
    ):
        resolve(model, spec({"modules": "q_proj"}))
    with pytest.raises(QuantizationError, match=r"rule 2 .*layers mlp.* matches nothing|matches no Linear"):
        resolve(
            model, spec({"components": ["language"], "layers": ["attention"]}, {"modules": "none", "layers": ["mlp"]})
        )
    with pytest.raises(
        QuantizationError, match=r"plan rule 2 .* matches model\.text_model.*q_proj, which rule 1 matches"
    ):
        resolve(model, spec({"components": ["language"]}, {"modules": ".*text_model.*q_proj"}))
    with pytest.raises(QuantizationError, match="every rule of its plan keeps"):
        resolve(model, spec({"components": ["language"], "keep": True}))
    assert not any("Quantized" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_all_cells_together_are_every_quantizable_linear(architecture: str, tiny_architectures: Any) -> None:
    """mmq's grid (component x third x layer) on every architecture: nothing is left over or done twice."""
    model = tiny_architectures.make(architecture)
    parts = component_map(model)
    names = list(quantizable(model))
    cells = Counter((c.component, c.third, c.kind) for c in map(parts.cell, names))
    rules = [
        {"components": [component], "layers": [kind], **({"thirds": [third]} if third else {"modules": ".*"})}
        for (component, third, kind) in cells
        if third
    ]
    loose = [name for name in names if parts.cell(name).third is None]
    rules += [{"modules": name.replace(".", r"\.")} for name in loose]
    assert list(resolve(model, spec(*rules))) == names
    assert sum(cells.values()) == len(names) > 20
