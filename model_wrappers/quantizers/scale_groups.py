"""Which Linear layers share an input, and so a scale per input feature, and whose output says how good the scales are.

One table for every architecture of ``components.py``, tested to hold each Linear once. Input scales are stored beside
the codes and never folded into the layer before, so any Linear can have them. Here the table goes beyond AutoAWQ and
MBQ, which scale the language model only: vision towers, connectors, the Q-Former and Linears after a GELU (``fc2``,
the second of a projector) have scales of their own, with the layer's own output as the target. For language models the
groups and targets are theirs, the rule for the attention's output projection too: it is scaled only where its weight
has the shape of ``v_proj``'s (so not with grouped queries), since folding needs that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quantizers.blocks import Block

Span = Literal["tokens", "calls"]


@dataclass(frozen=True)
class Group:
    """Linear layers of a block that read the same input; names are relative to the block.

    Attributes:
        linears: their names; "" is a block that is a Linear itself. Names that a block lacks are passed over.
        target: module whose output error is measured; None: the (single) Linear's own output.
        span: what must be run to see an error: ``tokens`` each alone, the target taking the Linears' input as its
            only argument, or whole ``calls`` of the target (attention).
        kind: which of MBQ's gradient ratios counts.
        is_output: projects back into the residual stream, where MBQ measures gradients.
        shaped_as: the scales are searched only if the weight has the shape of this layer's.
        unclipped: layers without AWQ's range search: those that make queries and keys.
    """

    linears: tuple[str, ...]
    target: str | None = None
    span: Span = "tokens"
    kind: Literal["attention", "mlp"] = "mlp"
    is_output: bool = False
    shaped_as: str | None = None
    unclipped: tuple[str, ...] = ()


def _qkv(path: str, names: tuple[str, ...], unclipped: tuple[str, ...] | None = None) -> Group:
    inner = tuple(f"{path}.{name}" for name in names)
    skipped = inner[:2] if unclipped is None else tuple(f"{path}.{name}" for name in unclipped)
    return Group(inner, target=path, span="calls", kind="attention", unclipped=skipped)


def _output(name: str, kind: Literal["attention", "mlp"], shaped_as: str | None = None) -> Group:
    return Group((name,), kind=kind, is_output=True, shaped_as=shaped_as)


_SEPARATE = ("q_proj", "k_proj", "v_proj")
_LLAMA = (
    _qkv("self_attn", _SEPARATE),
    _output("self_attn.o_proj", "attention", "self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), target="mlp"),
    _output("mlp.down_proj", "mlp"),
)
_TOWER = (  # CLIP, SigLIP, Idefics3's
    _qkv("self_attn", _SEPARATE),
    _output("self_attn.out_proj", "attention", "self_attn.v_proj"),
    Group(("mlp.fc1",), target="mlp"),
    _output("mlp.fc2", "mlp"),
)
_OPT = (
    _qkv("self_attn", _SEPARATE),
    _output("self_attn.out_proj", "attention", "self_attn.v_proj"),
    Group(("fc1",)),  # no module holds the two
    _output("fc2", "mlp"),
)


def _fused(path: str, qkv: str, output: str) -> tuple[Group, ...]:
    """Queries, keys and values in one layer: not clipped, as it makes queries and keys."""
    return _qkv(path, (qkv,), unclipped=(qkv,)), _output(f"{path}.{output}", "attention")


_QWEN2_TOWER = (*_fused("attn", "qkv", "proj"), Group(("mlp.fc1",), target="mlp"), _output("mlp.fc2", "mlp"))
_QWEN2_5_TOWER = (
    *_fused("attn", "qkv", "proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), target="mlp"),
    _output("mlp.down_proj", "mlp"),
)
_QWEN3_TOWER = (
    *_fused("attn", "qkv", "proj"),
    Group(("mlp.linear_fc1",), target="mlp"),
    _output("mlp.linear_fc2", "mlp"),
)
_QWEN2_MERGER = (Group(("mlp.0",), target="mlp"), Group(("mlp.2",)))
_QWEN3_MERGER = (Group(("linear_fc1",), target="", span="calls"), Group(("linear_fc2",)))
_PROJECTOR = (Group(("linear_1",), target=""), Group(("linear_2",)))
_LINEAR = (Group(("",)),)
_BLIP2_TOWER = (
    *_fused("self_attn", "qkv", "projection"),
    Group(("mlp.fc1",), target="mlp"),
    _output("mlp.fc2", "mlp"),
)
_QFORMER = (
    _qkv("attention.attention", ("query", "key", "value")),
    _output("attention.output.dense", "attention"),
    _qkv("crossattention.attention", ("query",), unclipped=("query",)),
    _qkv("crossattention.attention", ("key", "value"), unclipped=("key",)),  # these read the picture
    _output("crossattention.output.dense", "attention"),
    Group(("intermediate_query.dense",), target="intermediate_query"),
    _output("output_query.dense", "mlp"),
    Group(("intermediate.dense",), target="intermediate"),
    _output("output.dense", "mlp"),
)
_T5_ENCODER = (
    _qkv("layer.0.SelfAttention", ("q", "k", "v")),
    _output("layer.0.SelfAttention.o", "attention", "layer.0.SelfAttention.v"),
    Group(("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
          target="layer.1.DenseReluDense"),
    _output("layer.1.DenseReluDense.wo", "mlp"),
)  # fmt: skip
_T5_DECODER = (
    *_T5_ENCODER[:2],
    _qkv("layer.1.EncDecAttention", ("q",), unclipped=("q",)),
    _qkv("layer.1.EncDecAttention", ("k", "v"), unclipped=("k",)),
    _output("layer.1.EncDecAttention.o", "attention", "layer.1.EncDecAttention.v"),
    Group(("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"),
          target="layer.2.DenseReluDense"),
    _output("layer.2.DenseReluDense.wo", "mlp"),
)  # fmt: skip

_Table = dict[str, tuple[Group, ...]]
_IDEFICS3_TABLE: _Table = {
    "model.vision_model.encoder.layers": _TOWER,
    "model.connector": (Group(("modality_projection.proj",)),),
    "model.text_model.layers": _LLAMA,
}
_LLAVA_TABLE: _Table = {
    "model.vision_tower.encoder.layers": _TOWER,
    "model.vision_tower.vision_model.encoder.layers": _TOWER,
    "model.multi_modal_projector": _PROJECTOR,
    "model.language_model.layers": _LLAMA,
}


def _qwen(tower: tuple[Group, ...], merger: tuple[Group, ...]) -> _Table:
    return {
        "model.visual.blocks": tower,
        "model.visual.merger": merger,
        "model.visual.deepstack_merger_list": merger,
        "model.language_model.layers": _LLAMA,
    }


SCALE_GROUPS: dict[str, _Table] = {
    "idefics3": _IDEFICS3_TABLE,
    "smolvlm": _IDEFICS3_TABLE,
    "qwen2_vl": _qwen(_QWEN2_TOWER, _QWEN2_MERGER),
    "qwen2_5_vl": _qwen(_QWEN2_5_TOWER, _QWEN2_MERGER),
    "qwen3_vl": _qwen(_QWEN3_TOWER, _QWEN3_MERGER),
    "llava": _LLAVA_TABLE,
    "llava_onevision": _LLAVA_TABLE,
    "paligemma": _LLAVA_TABLE | {"model.multi_modal_projector": (Group(("linear",)),)},
    "blip-2": {
        "vision_model.encoder.layers": _BLIP2_TOWER,
        "qformer.encoder.layer": _QFORMER,
        "language_projection": _LINEAR,
        "language_model.model.decoder.layers": _OPT,
        "language_model.model.decoder.project_in": _LINEAR,
        "language_model.model.decoder.project_out": _LINEAR,
        "language_model.encoder.block": _T5_ENCODER,
        "language_model.decoder.block": _T5_DECODER,
    },
}
"""``config.model_type`` -> path of a stack, or of a module that stands by itself -> its groups."""


@dataclass(frozen=True)
class ScaleGroup:
    """A ``Group`` found in a block: what of it is to be quantized.

    Attributes:
        linears: full name -> target Linear.
        target: module whose output error is measured.
        is_scaled: False where the table's rule for output projections forbids scales.
        clipped: full names of the Linears whose range AWQ searches.
    """

    group: Group
    linears: dict[str, nn.Linear]
    target: nn.Module
    is_scaled: bool
    clipped: frozenset[str]

    @property
    def is_linear(self) -> bool:
        """The target is the single Linear itself."""
        return self.target in self.linears.values()


def scale_groups(model: nn.Module, block: Block) -> list[ScaleGroup]:
    """The groups of a block that hold target Linears; together they hold each of them once.

    Raises:
        ValueError: the table lacks the block, or a Linear of it.
    """
    groups = []
    left = dict(block.linears)
    for group in table_of(model, block.stack or block.name):
        linears = {}
        for name in group.linears:
            full = f"{block.name}.{name}" if name else block.name
            if full in left:
                linears[full] = left.pop(full)
        if linears:
            groups.append(_found(block, group, linears))
    if left:
        raise ValueError(f"no scale group holds {', '.join(left)}; add it in scale_groups.py (SCALE_GROUPS)")
    return groups


def table_of(model: nn.Module, path: str) -> tuple[Group, ...]:
    """Groups of a stack of blocks, or of a module that stands by itself (by its own path or its list's).

    Raises:
        ValueError: the table has no such path.
    """
    tables = SCALE_GROUPS.get(str(getattr(getattr(model, "config", None), "model_type", "")), {})
    for key in (path, path.rpartition(".")[0]):
        if key in tables:
            return tables[key]
    raise ValueError(
        f"{path}: no scale groups are known for it in {type(model).__name__}; add it in scale_groups.py (SCALE_GROUPS)"
    )


def _found(block: Block, group: Group, linears: dict[str, nn.Linear]) -> ScaleGroup:
    target = next(iter(linears.values())) if group.target is None else block.module.get_submodule(group.target)
    is_scaled = True
    if group.shaped_as is not None:
        value = block.module.get_submodule(group.shaped_as)
        is_scaled = all(_shape(value) == _shape(linear) for linear in linears.values())
    skipped = {f"{block.name}.{name}" for name in group.unclipped}
    return ScaleGroup(group, linears, target, is_scaled, frozenset(linears) - skipped)


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Of its weight; a layer that is quantized already has no tensor of that shape."""
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


def output_projections(model: nn.Module) -> Iterator[tuple[str, Literal["attention", "mlp"], nn.Module]]:
    """Of each block of the language model: its name, the kind and the Linear that goes back to the residual stream."""
    parts = component_map(model)
    for part in parts.parts:
        for stack in part.stacks if part.component == "language" else ():
            for index in range(parts.depths.get(stack.path, 0)):
                name = f"{stack.path}.{index}"
                for group in table_of(model, stack.path):
                    if group.is_output:
                        yield name, group.kind, model.get_submodule(f"{name}.{group.linears[0]}")
