"""Which module of a vision-language model belongs to which part: explicit maps per architecture, never a guess.

Each Linear of a mapped architecture belongs to one cell: a component (vision tower, connector, language model), the
third of its stack of blocks, and attention or MLP. Output heads belong to ``other``. Names are transformers 5's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

ComponentName = Literal["vision", "connector", "language", "other"]
Third = Literal["front", "middle", "end"]
Kind = Literal["attention", "mlp", "other"]


class ComponentMapError(ValueError):
    """An architecture without a component map, or a model that its map does not cover."""


@dataclass(frozen=True)
class Cell:
    """Where a Linear stands. ``third`` is None and ``kind`` ``other`` outside a stack of blocks (a connector's)."""

    component: ComponentName
    third: Third | None = None
    kind: Kind = "other"


@dataclass(frozen=True)
class Stack:
    """A list of blocks at ``path``; ``attention`` and ``mlp`` name the modules in a block, at any depth."""

    path: str
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)


@dataclass(frozen=True)
class Part:
    """One component's module paths and its stacks of blocks (a stack that a checkpoint lacks is passed over)."""

    component: ComponentName
    paths: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()


def _language(path: str) -> Part:
    return Part("language", (path,), (Stack(f"{path}.layers"),))


_IDEFICS3 = (
    Part("vision", ("model.vision_model",), (Stack("model.vision_model.encoder.layers"),)),
    Part("connector", ("model.connector",)),
    _language("model.text_model"),
    Part("other", ("lm_head",)),
)
_QWEN_VL = (
    Part("vision", ("model.visual",), (Stack("model.visual.blocks", attention=("attn",)),)),
    Part("connector", ("model.visual.merger", "model.visual.deepstack_merger_list")),
    _language("model.language_model"),
    Part("other", ("lm_head",)),
)
_TOWER_AND_PROJECTOR = (
    Part(
        "vision",
        ("model.vision_tower",),
        # CLIP and SigLIP towers; transformers 4 nests them one level deeper.
        (Stack("model.vision_tower.encoder.layers"), Stack("model.vision_tower.vision_model.encoder.layers")),
    ),
    Part("connector", ("model.multi_modal_projector",)),
    _language("model.language_model"),
    Part("other", ("lm_head",)),
)
_T5 = (("SelfAttention", "EncDecAttention"), ("DenseReluDense",))
_BLIP2_VISION = Part("vision", ("vision_model",), (Stack("vision_model.encoder.layers"),))
_QFORMER = Stack(
    "qformer.encoder.layer",
    attention=("attention", "crossattention"),
    mlp=("intermediate_query", "output_query", "intermediate", "output"),
)
_BLIP2 = (
    _BLIP2_VISION,
    Part("connector", ("qformer", "language_projection"), (_QFORMER,)),
    Part(
        "language",
        ("language_model",),
        (
            Stack("language_model.model.decoder.layers", mlp=("fc1", "fc2")),  # OPT
            Stack("language_model.encoder.block", *_T5),
            Stack("language_model.decoder.block", *_T5),
        ),
    ),
    Part("other", ("language_model.lm_head",)),
)
_BLIP2_RETRIEVAL = (
    _BLIP2_VISION,
    Part("connector", ("qformer",), (_QFORMER,)),
    Part("other", ("itm_head", "vision_projection", "text_projection")),
)

ARCHITECTURES: dict[str, tuple[Part, ...]] = {
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "llava": _TOWER_AND_PROJECTOR,
    "llava_onevision": _TOWER_AND_PROJECTOR,
    "paligemma": _TOWER_AND_PROJECTOR,
    "blip-2": _BLIP2,
}
"""``config.model_type`` -> its parts. Where two paths hold a module, the longer one counts."""
HEADS: dict[str, tuple[Part, ...]] = {"Blip2ForImageTextRetrieval": _BLIP2_RETRIEVAL}
"""Class of a model that shares its ``model_type`` with one of ``ARCHITECTURES`` and has other parts -> its parts."""


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


@dataclass(frozen=True)
class ComponentMap:
    """The map of one loaded model; ``component_map`` makes it."""

    model_type: str
    parts: tuple[Part, ...]
    depths: dict[str, int] = field(default_factory=dict)
    """Stack path -> number of its blocks."""

    def component(self, name: str) -> ComponentName:
        """Component of a module or parameter by its name; ``other`` outside every part."""
        matches = [(len(path), part.component) for part in self.parts for path in part.paths if _within(name, path)]
        return max(matches)[1] if matches else "other"

    def covers(self, name: str) -> bool:
        """True when a part of the map, heads included, holds ``name``."""
        return any(_within(name, path) for part in self.parts for path in part.paths)

    def cell(self, name: str) -> Cell:
        """Cell of a Linear by its name. Thirds of n blocks are [0, n//3), [n//3, 2n//3), [2n//3, n) (papers.md 2.1)."""
        component = self.component(name)
        for stack in (stack for part in self.parts if part.component == component for stack in part.stacks):
            if stack.path not in self.depths or not name.startswith(f"{stack.path}."):
                continue
            index, *inner = name[len(stack.path) + 1 :].split(".")
            n, i = self.depths[stack.path], int(index)
            third: Third = "front" if i < n // 3 else "middle" if i < 2 * n // 3 else "end"
            kind: Kind = "other"
            for segment in inner:  # the first that is named decides: attention.output belongs to attention
                if segment in stack.attention or segment in stack.mlp:
                    kind = "attention" if segment in stack.attention else "mlp"
                    break
            return Cell(component, third, kind)
        return Cell(component)


def component_map(model: nn.Module) -> ComponentMap:
    """Return the component map of a loaded model, checked against it.

    Raises:
        ComponentMapError: the architecture is unknown, a part of its map is absent from the model, or a Linear of the
            model belongs to no part. The message says which.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if model_type not in ARCHITECTURES:
        roots = sorted({".".join(name.split(".")[:2]) for name in linears})
        raise ComponentMapError(
            f"no component map for the architecture {model_type!r} ({type(model).__name__}), whose Linear modules lie "
            f"under {', '.join(roots) or 'nothing'}; known architectures: {', '.join(ARCHITECTURES)}. To add it, name "
            "its vision, connector and language paths in model_wrappers/components.py (ARCHITECTURES)"
        )
    parts = HEADS.get(type(model).__name__, ARCHITECTURES[model_type])
    if lacking := [part for part in parts if not any(path in modules for path in part.paths)]:
        raise ComponentMapError(
            f"component map of {model_type!r}: {type(model).__name__} has no "
            f"{', '.join(' or '.join(part.paths) for part in lacking)}; load the whole model with "
            "AutoModelForImageTextToText, before any adapter is put on"
        )
    depths = {
        stack.path: sum(1 for _ in modules[stack.path].children())
        for part in parts
        for stack in part.stacks
        if stack.path in modules
    }
    found = ComponentMap(model_type, parts, depths)
    if uncovered := [name for name in linears if not found.covers(name)]:
        raise ComponentMapError(
            f"component map of {model_type!r} covers {len(linears) - len(uncovered)} of {len(linears)} Linear modules; "
            f"missing: {', '.join(uncovered[:5])}{' …' if len(uncovered) > 5 else ''}. Add their paths in "
            "model_wrappers/components.py (ARCHITECTURES)"
        )
    return found


def cells(model: nn.Module) -> dict[str, Cell]:
    """The cell of every Linear of a model, by module name, in the model's order; heads are in ``other``.

    Raises:
        ComponentMapError: as ``component_map``.
    """
    parts = component_map(model)
    return {name: parts.cell(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
