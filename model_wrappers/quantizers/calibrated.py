"""Methods that look at calibration data: GPTQ, AWQ, MBQ and SmoothQuant, block by block through a model.

Memory beside the model: what ``BlockRunner`` keeps (up to three hidden states a token), and for one block at a time
what ``features`` keeps (AWQ, MBQ: about six hidden states and an inner width of the MLP a token), or a Hessian for each
group of the block, ``4 in_features**2`` bytes (GPTQ). What MBQ's gradients need stands at ``modality_ratios``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from loguru import logger as eval_logger
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers.awq import awq_scale, clip_tokens, clipped
from bitquake.model_wrappers.quantizers.blocks import Block, BlockRunner, ordered_blocks
from bitquake.model_wrappers.quantizers.features import Batch, Features, batched, features
from bitquake.model_wrappers.quantizers.gptq import HessianSum, gptq
from bitquake.model_wrappers.quantizers.mbq import mbq_scale
from bitquake.model_wrappers.quantizers.options import AwqOptions, GptqOptions, MbqOptions, SmoothquantOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError
from bitquake.model_wrappers.quantizers.ratios import modality_ratios
from bitquake.model_wrappers.quantizers.scale_groups import ScaleGroup, scale_groups
from bitquake.model_wrappers.quantizers.smoothquant import LargestMagnitude, smoothquant_scale
from bitquake.model_wrappers.quantizers.spec import QuantSpec
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

if TYPE_CHECKING:
    from bitquake.model_wrappers.calibration import CalibrationSet

Emit = Callable[[str, QuantizedWeight], None]


def quantize(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    specs: Mapping[str, QuantSpec],
    spec: QuantSpec,
    calibration: CalibrationSet,
    emit: Emit,
    *,
    done: Mapping[str, QuantizedWeight] | None = None,
    progress: bool = False,
) -> None:
    """Quantize Linear layers of a model that is in evaluation mode; ``emit`` puts each result into the model.

    Inputs come from the full-precision model for awq, mbq and smoothquant, and from the blocks quantized so far for
    gptq and for mbq with ``distort``. All layers of a block are searched before the first of them is emitted.

    Args:
        linears: full name -> layer; emptied, so that the weights of a block are freed when the block is done.
        specs: full name -> how this one is quantized.
        spec: the method and its options.
        calibration: what the model is shown.
        emit: called once for every name; it is to replace the layer.
        done: results of an earlier, interrupted call: emitted as they are. The outcome is that of an uninterrupted one.
        progress: show a progress bar.

    Raises:
        QuantizationError: no calibration samples, or none that reaches a layer; weights or activations that are not
            finite; a layer that its method cannot do. The message names the layer.
    """
    if len(calibration) == 0:
        raise QuantizationError(
            f"quantization spec {spec.name!r}: method {spec.method} needs calibration data, and the set is empty"
        )
    done = done or {}
    _check(linears)
    count = len(linears)
    blocks = ordered_blocks(model, linears)
    linears.clear()
    waiting = [block for block in blocks if any(name not in done for name in block.linears)]
    finished = [name for block in blocks if block not in waiting for name in block.linears]
    del blocks
    sequential = spec.method == "gptq" or (spec.mbq is not None and spec.mbq.distort)
    method = _method(model, spec, specs, calibration, waiting)
    with _bar(count, spec.name, progress) as step:

        def put(names: Sequence[str], results: Mapping[str, QuantizedWeight]) -> None:
            for name in names:
                emit(name, done[name] if name in done else results[name])
                step()

        if sequential:
            put(finished, {})
        runner = BlockRunner(model, waiting, calibration, propagate="quantized" if sequential else "original")
        for block, inputs in runner:
            if not inputs:
                raise _unreached(next(iter(block.linears)))
            results = method(block, batched(inputs))
            put(list(block.linears), results)
        if not sequential:  # until now these had to compute at full precision
            put(finished, {})


_Method = Callable[[Block, list[Batch]], dict[str, QuantizedWeight]]


def _method(
    model: nn.Module,
    spec: QuantSpec,
    specs: Mapping[str, QuantSpec],
    calibration: CalibrationSet,
    blocks: Sequence[Block],
) -> _Method:
    """What is done to a block."""
    if spec.method == "gptq":
        return lambda block, batches: _gptq(model, block, batches, specs, spec.gptq or GptqOptions())
    if spec.method == "smoothquant":
        alpha = (spec.smoothquant or SmoothquantOptions()).alpha
        return lambda block, batches: _smoothquant(model, block, batches, specs, alpha)
    first: dict[tuple[str, tuple[str, ...]], int] = {}  # what the last block of a kind chose is a good first guess
    if spec.method == "awq":
        awq = spec.awq or AwqOptions()

        def search(block: Block, group: ScaleGroup, found: Features) -> Tensor:
            key = (block.component, group.group.linears)
            scale, choice = awq_scale(group, found, specs, awq, first.get(key))
            first[key] = choice.index
            return scale

        return lambda block, batches: _searched(model, block, batches, specs, search, clip=awq.clip)
    if spec.method != "mbq":
        raise QuantizationError(f"quantization spec {spec.name!r}: {spec.method} is no calibrated method")
    mbq = spec.mbq or MbqOptions()
    ratio = _ratios(model, spec, mbq, calibration, blocks)

    def weighed(block: Block, group: ScaleGroup, found: Features) -> Tensor:
        key = (block.component, group.group.linears)
        scale, choice = mbq_scale(group, found, specs, mbq, ratio(block, group), first.get(key))
        first[key] = choice.index
        return scale

    return lambda block, batches: _searched(model, block, batches, specs, weighed, clip=False)


def _ratios(
    model: nn.Module, spec: QuantSpec, options: MbqOptions, calibration: CalibrationSet, blocks: Sequence[Block]
) -> Callable[[Block, ScaleGroup], float | None]:
    """MBQ's weight of the vision tokens in each layer; None: no position counts more than another."""
    if not any(block.component == "language" for block in blocks):
        return lambda block, group: None
    vision = answer = 0
    for sample in calibration:
        vision, answer = vision + int(sample.vision.sum()), answer + int(sample.answer.sum())
    if not vision or not answer:
        eval_logger.warning(
            f"quantization spec {spec.name!r}: the calibration set has {vision} vision and {answer} answer tokens, so "
            "MBQ has nothing to balance: every position counts alike. Calibrate with captions or in-domain samples"
        )
        return lambda block, group: None
    if not options.reweight:
        return lambda block, group: 1.0 if block.component == "language" else None
    ratios = modality_ratios(model, calibration)
    by_kind = {"attention": ratios.attention, "mlp": ratios.mlp}
    # a Linear beside the blocks (OPT's projections) has no ratio of its own
    return lambda block, group: by_kind[group.group.kind].get(block.name)


def _check(linears: Mapping[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        if not linear.weight.isfinite().all():
            bad = int((~linear.weight.isfinite()).sum())
            raise QuantizationError(f"{name} (shape {tuple(linear.weight.shape)}): {bad} weights are NaN or infinite")


def _unreached(name: str) -> QuantizationError:
    return QuantizationError(
        f"{name}: no calibration sample reaches this layer, so nothing can be fitted to it; use samples that do "
        "(pictures for a vision tower and its connector), or keep the layer by a rule of the plan"
    )


@contextlib.contextmanager
def _named(name: str, linear: nn.Linear) -> Iterator[None]:
    """Errors say which layer."""
    try:
        yield
    except QuantizationError as error:
        raise QuantizationError(f"{name} (shape {tuple(linear.weight.shape)}): {error}") from error


def _searched(
    model: nn.Module,
    block: Block,
    batches: list[Batch],
    specs: Mapping[str, QuantSpec],
    search: Callable[[Block, ScaleGroup, Features], Tensor],
    *,
    clip: bool,
) -> dict[str, QuantizedWeight]:
    """AWQ and MBQ: scales by a search, the range clipped if so asked, then rounding."""
    results: dict[str, QuantizedWeight] = {}
    groups = scale_groups(model, block)
    for group, found in zip(groups, features(block.module, batches, groups), strict=True):
        if not len(found.x):
            raise _unreached(next(iter(group.linears)))
        scale = search(block, group, found) if group.is_scaled else None
        x = clip_tokens(found.x, scale) if clip else found.x
        for name, linear in group.linears.items():
            weight = linear.weight.detach().float()
            if scale is not None:
                weight = weight * scale.to(weight.device)
            if clip and name in group.clipped:
                weight = clipped(weight, x, specs[name])
            results[name] = _rounded(name, linear, weight, specs[name], scale)
    return results


def _smoothquant(
    model: nn.Module, block: Block, batches: list[Batch], specs: Mapping[str, QuantSpec], alpha: float
) -> dict[str, QuantizedWeight]:
    groups = scale_groups(model, block)
    seen = [LargestMagnitude() for _ in groups]
    _show(block, batches, groups, [one.add for one in seen])
    results: dict[str, QuantizedWeight] = {}
    for group, one in zip(groups, seen, strict=True):
        if one.value is None:
            raise _unreached(next(iter(group.linears)))
        if not one.value.isfinite().all():
            raise QuantizationError(f"{next(iter(group.linears))}: its calibration inputs are NaN or infinite")
        scale = smoothquant_scale(group, one.value, alpha)
        for name, linear in group.linears.items():
            weight = linear.weight.detach().float() * scale.to(linear.weight.device)
            results[name] = _rounded(name, linear, weight, specs[name], scale)
    return results


def _gptq(
    model: nn.Module, block: Block, batches: list[Batch], specs: Mapping[str, QuantSpec], options: GptqOptions
) -> dict[str, QuantizedWeight]:
    """Layers that share an input share a Hessian; those of all groups are summed in one pass over the block."""
    groups = scale_groups(model, block)
    sums = []
    for group in groups:
        linear = next(iter(group.linears.values()))
        sums.append(HessianSum(linear.in_features, device=linear.weight.device))
    _show(block, batches, groups, [one.add for one in sums])
    results: dict[str, QuantizedWeight] = {}
    for group, one in zip(groups, sums, strict=True):
        if not one.rows:
            raise _unreached(next(iter(group.linears)))
        hessian = one.hessian()
        for name, linear in group.linears.items():
            own = specs[name]
            assert own.bits is not None and own.group_size is not None and own.group_size != "tensor"
            with _named(name, linear):
                results[name] = gptq(
                    linear.weight, hessian, bits=own.bits, group_size=own.group_size, symmetric=own.symmetric,
                    options=options,
                ).to("cpu")  # fmt: skip
    return results


def _show(
    block: Block, batches: Sequence[Batch], groups: Sequence[ScaleGroup], consumers: Sequence[Callable[[Tensor], None]]
) -> None:
    """Run a block on its inputs; each group's consumer gets what the group's layers read."""

    def hook(consume: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: consume(args[0].detach())

    with contextlib.ExitStack() as hooks:
        for group, consume in zip(groups, consumers, strict=True):
            linear = next(iter(group.linears.values()))
            hooks.callback(linear.register_forward_pre_hook(hook(consume)).remove)
        for batch in batches:
            batch.joined.run(block.module)


def _rounded(name: str, linear: nn.Linear, weight: Tensor, spec: QuantSpec, scale: Tensor | None) -> QuantizedWeight:
    """``weight`` (scaled already) on its grid, with its scales; scales that are all 1 are left out."""
    from bitquake.model_wrappers.quantizers.replace import quantize_weight

    with _named(name, linear):
        found = quantize_weight(weight, spec)
    if scale is None or torch.equal(scale, torch.ones_like(scale)):
        return found
    return replace(found, input_scale=scale)


@contextlib.contextmanager
def _bar(total: int, label: str, progress: bool) -> Iterator[Callable[[], object]]:
    if not progress:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=f"quantizing {label}", unit="module") as bar:
        yield bar.update
