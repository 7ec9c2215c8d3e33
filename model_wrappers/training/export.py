"""A trained model as a checkpoint: in the packed format, in AutoAWQ's GEMM layout, or plain at 16 bits; then read back.

The model that was trained is left as it is. What is written holds the grid that the training computed with; every
export is loaded again and compared with it, integer code by integer code.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitquake.model_wrappers.loading import LoadedModel, load_processor, load_quantized, without_progress_bars
from bitquake.model_wrappers.quant_cards import build_card
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.spec import FULL_PRECISION, QuantSpec, load_spec
from bitquake.model_wrappers.quantizers.transformers_quantizer import make_savable
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight
from bitquake.model_wrappers.saving import move_in, save_aside
from bitquake.model_wrappers.training.batch import TrainingBatch
from bitquake.model_wrappers.training.lsq import LsqLinear, lsq_layers
from bitquake.quant_card import CARD_FILE, PARTIAL

Layout = Literal["packed", "awq"]
AWQ_BITS = 4
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of each nibble of a word, lowest first


class ExportError(ValueError):
    """A model that a layout cannot hold, or a checkpoint that is not what was trained."""


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written and read back.

    Attributes:
        folder: the checkpoint.
        spec: what it is: a quantization of method ``checkpoint``, or full precision.
        n_modules: quantized ones, whose codes, scales and zero-points were all found equal.
        logits: greatest difference of a logit between the trained model and the reloaded one on the probe; None
            without a probe.
    """

    folder: Path
    spec: QuantSpec
    n_modules: int
    logits: float | None


def export(
    student: Any,
    spec: QuantSpec,
    out: Path,
    *,
    source: str,
    base: str,
    base_revision: str = "",
    layout: Layout = "packed",
    dtype: torch.dtype | None = None,
    probe: TrainingBatch | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a trained model as a checkpoint that ``from_pretrained`` and ``pretrained=`` take, and check it.

    A model without ``LsqLinear`` (the twin of 16 bits) becomes a plain checkpoint. A packed one holds a quant card, and
    its runs pair with the full-precision runs of ``base``. AutoAWQ's config has no place for that name: such a
    checkpoint is evaluated with ``base=`` of ``bitquake_hf``.

    Args:
        student: unwrapped, with the weights that training ended with.
        spec: ``objective.trained_spec`` of its configuration.
        out: a folder, made if need be; a checkpoint that is in it makes room.
        source: folder or hub name of the processor, with its ``revision``.
        base, base_revision: the full-precision model that the quantized one is compared with.
        layout: ``packed``: the quantizers' own; ``awq``: AutoAWQ's GEMM, of 4 bits, as vLLM and others read it.
        dtype: of what is not quantized; None: as it is in the student.
        probe: a batch on whose logits both are compared; with the student's own dtype they must be equal.

    Raises:
        ExportError: the layout cannot hold the model, or what was read back differs.
    """
    layers = lsq_layers(student)
    if bool(layers) == spec.is_full_precision:
        raise ExportError(f"export: {len(layers)} layers have learned step sizes, and the spec is {spec.name}")
    if layout == "awq":
        _check_awq(layers, spec)
    dtype = dtype or student.dtype
    out.mkdir(parents=True, exist_ok=True)
    aside = out / PARTIAL / "checkpoint"
    weights = {name: layer.quantized_weight().to("cpu") for name, layer in layers.items()}
    shell = _shell(student, layers, weights, dtype, layout)
    if layers and layout == "packed":
        before = {name: layer.hash_before for name, layer in layers.items()}
        make_savable(shell, spec, before, base=base, base_revision=base_revision)
    elif layers:
        shell.config.quantization_config = _awq_config(student, layers)
    save_aside(
        shell, aside, source=source, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    del shell
    again = _reload(aside, dtype, trust_remote_code)
    _compare(again.model, student, weights, dtype)
    texts = {"README.md": _readme(student, spec, base, layout, dtype)}
    if layers and layout == "packed":
        processor = load_processor(source, revision=revision, trust_remote_code=trust_remote_code)
        card = build_card(
            again.model, again.spec, pretrained=base, revision=base_revision, before=again.before or {},
            image_processor=type(processor.image_processor).__name__,
        )  # fmt: skip
        texts[CARD_FILE] = card.to_json() + "\n"
    difference = None if probe is None else _logit_difference(again.model, student, probe)
    if difference and dtype == student.dtype:
        raise ExportError(f"export: a logit of the reloaded model is {difference:g} off the trained one's")
    (out / CARD_FILE).unlink(missing_ok=True)  # of another layout that was here
    move_in(aside, out, texts=texts)
    shutil.rmtree(out / PARTIAL)
    return Exported(out, spec, len(layers), difference)


def _shell(
    student: Any, layers: Mapping[str, LsqLinear], weights: Mapping[str, QuantizedWeight], dtype: torch.dtype,
    layout: Layout,
) -> Any:  # fmt: skip
    """A model of the student's class on the CPU that holds what is to be written; it need not compute."""
    with torch.device("meta"):
        shell = type(student)(copy.deepcopy(student.config))
    shell.generation_config = copy.deepcopy(student.generation_config)
    # some architectures keep parts of the model in float32 whatever its dtype
    whole = [pattern.replace("*", ".*") for pattern in student._get_dtype_plan(dtype)]

    def cast(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu()
        wanted = torch.float32 if any(re.search(pattern, name) for pattern in whole) else dtype
        return tensor.detach().to("cpu", wanted)

    made: set[str] = set()
    for name, layer in layers.items():
        bias = None if layer.bias is None else nn.Parameter(cast(f"{name}.bias", layer.bias), requires_grad=False)
        held: nn.Module
        if layout == "packed":
            kind = cast(f"{name}.weight", layer.weight[:0]).dtype
            held = QuantizedLinear.from_weight(weights[name], bias=bias, dtype=kind, execution="packed")
        else:
            held = _AwqTensors(weights[name], bias)
        shell.set_submodule(name, held)
        made |= {f"{name}.{leaf}" for leaf in (*held.state_dict(), "weight", "log_scale", "zero", "bias")}
    state = {name: cast(name, tensor) for name, tensor in student.state_dict().items() if name not in made}
    missing, unexpected = shell.load_state_dict(state, strict=False, assign=True)
    if odd := [*unexpected, *(name for name in missing if name not in made)]:
        raise ExportError(f"export: {odd[0]} is not in both the trained model and its architecture; is it wrapped?")
    shell.tie_weights()
    return shell.eval()


def _reload(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> LoadedModel:
    with without_progress_bars():
        return load_quantized(
            str(folder), load_spec(FULL_PRECISION), revision=None, dtype=dtype, device=torch.device("cpu"),
            device_map=None, attn_implementation=None, trust_remote_code=trust_remote_code, execution="packed",
        )  # fmt: skip


def _compare(again: nn.Module, student: nn.Module, weights: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> None:
    """What was written is what was trained: codes, scales, zero-points; weights as computed with; everything else.

    Raises:
        ExportError: the first difference.
    """
    found = {name for name, module in again.named_modules() if isinstance(module, QuantizedLinear)}
    if found != weights.keys():
        odd = sorted(found ^ weights.keys())[0]
        raise ExportError(f"export: {len(weights)} modules were trained on a grid, {len(found)} read back ({odd})")
    for name, mine in weights.items():
        layer, trained = again.get_submodule(name), student.get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and isinstance(trained, LsqLinear)
        stored = layer.quantized_weight()
        if error := int((stored.codes.int() - mine.codes.int()).abs().max()):
            raise ExportError(f"export: a code of {name} is {error} off in the file")
        zeros = [torch.zeros_like(w.scale, dtype=torch.int8) if w.zero is None else w.zero for w in (stored, mine)]
        if not torch.equal(stored.scale, mine.scale) or not torch.equal(*zeros):
            raise ExportError(f"export: scales or zero-points of {name} differ in the file")
        with torch.no_grad():
            computed = trained.rounded().to("cpu", layer.weight_dtype)
        if not torch.equal(layer.weight, computed):
            raise ExportError(f"export: {name} does not turn back into the weight that was trained")
    theirs = student.state_dict()
    for key, tensor in again.state_dict().items():
        name, _, leaf = key.rpartition(".")
        if name in weights and leaf != "bias":
            continue
        if not torch.equal(tensor, theirs[key].detach().to("cpu", tensor.dtype)):
            raise ExportError(f"export: {key} differs in the file (stored as {str(dtype).removeprefix('torch.')})")


@torch.no_grad()
def _logit_difference(again: Any, student: Any, probe: TrainingBatch) -> float:
    training, device = student.training, student.device
    student.eval()
    try:
        ours = student(**{**probe.to(device).inputs, "use_cache": False}).logits
    finally:
        student.train(training)
    again = again.to(device)
    inputs = {k: v.to(again.dtype) if v.is_floating_point() else v for k, v in probe.to(device).inputs.items()}
    theirs = again(**inputs, use_cache=False).logits
    return float((ours.float() - theirs.float()).abs().max())


# AutoAWQ's layout


class _AwqTensors(nn.Module):
    """What AutoAWQ stores of a Linear (``quantizers.published.awq`` says how); symmetric codes have zero-point 8."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero is None else weight.zero
        self.register_buffer("qweight", awq_words(weight.codes.t()))
        self.register_buffer("qzeros", awq_words((zero + (1 << (AWQ_BITS - 1))).to(torch.uint8).t()))
        self.register_buffer("scales", weight.scale.t().contiguous())
        self.bias = bias


def awq_words(codes: Tensor) -> Tensor:
    """Pack codes (rows, out), each below 16, to int32 words (rows, out / 8), outputs in AutoAWQ's order."""
    nibbles = codes.reshape(len(codes), -1, 8)[..., list(_AWQ_ORDER)].to(torch.int64)
    words = (nibbles << torch.arange(0, 32, 4, device=codes.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _check_awq(layers: Mapping[str, LsqLinear], spec: QuantSpec) -> None:
    if spec.is_full_precision or spec.bits != AWQ_BITS:
        bits = "16" if spec.is_full_precision else spec.bits
        raise ExportError(f"AutoAWQ's GEMM layout has {AWQ_BITS} bits, and the model {bits}; use layout packed")
    for name, layer in layers.items():
        if layer.in_features % layer.group_size or layer.out_features % 8:
            raise ExportError(
                f"AutoAWQ's GEMM layout wants inputs in whole groups and outputs in eights, and {name} has "
                f"{layer.in_features} inputs in groups of {layer.group_size} and {layer.out_features} outputs; train "
                "with a group_size that divides the inputs, or use layout packed"
            )
    if len(sizes := sorted({_awq_group(layer, spec) for layer in layers.values()})) > 1:
        raise ExportError(
            f"AutoAWQ's config has one group size, and the model {', '.join(map(str, sizes))} (a row shorter than a "
            "group is one); train with a smaller group_size, or use layout packed"
        )


def _awq_group(layer: LsqLinear, spec: QuantSpec) -> int:
    return -1 if spec.group_size == "channel" else layer.group_size


def _awq_config(student: nn.Module, layers: Mapping[str, LsqLinear]) -> dict[str, Any]:
    groups = {layer.group_size for layer in layers.values()}
    return {
        "quant_method": "awq", "version": "gemm", "bits": AWQ_BITS, "zero_point": True,
        "group_size": groups.pop() if len(groups) == 1 else -1,
        "modules_to_not_convert": _outside(student, layers),
    }  # fmt: skip


def _outside(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The fewest module paths that hold every Linear which is not among ``names``, and none that is."""
    taken = {name[:at] for name in names for at in _ends(name)}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in taken:
            path = next(name[:at] for at in _ends(name) if name[:at] not in taken)
            if path not in found:
                found.append(path)
    return found


def _ends(name: str) -> list[int]:
    """Where each prefix of a module's path ends."""
    return [at for at, letter in enumerate(name) if letter == "."] + [len(name)]


def _readme(student: Any, spec: QuantSpec, base: str, layout: Layout, dtype: torch.dtype) -> str:
    """A model card to fill in."""
    kind = str(dtype).removeprefix("torch.")
    if spec.is_full_precision:
        what = f"{type(student).__name__}, trained at full precision as the twin of a quantization-aware training."
    else:
        grid = f"{spec.bits} bits, groups of {spec.group_size}, {'symmetric' if spec.symmetric else 'asymmetric'}"
        where = "Bitquake's packed format" if layout == "packed" else "AutoAWQ's GEMM layout"
        what = (
            f"{type(student).__name__} after quantization-aware training ({spec.name}: {grid}; components: "
            f"{', '.join(spec.components)}), in {where}. The rest is {kind}."
        )
    return f"""---
library_name: transformers
tags: [bitquake, {"quantization-aware-training" if spec.is_full_precision else "quantized"}]
---

# {base.rstrip("/").rpartition("/")[2]}, {spec.name}

{what}
Trained from {base.rstrip("/").rpartition("/")[2]} by `bitquake train qat`.

How well it answers, and whether it knows when it is wrong:
`lmms-eval --model bitquake_hf --model_args pretrained=FOLDER --tasks vqav2_clean,vqav2_noise_3`.
"""
