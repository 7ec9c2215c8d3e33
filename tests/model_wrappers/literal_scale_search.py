"""AutoAWQ's and MBQ's published searches, written down literally and slowly: an oracle for tests and benchmarks.

Nothing of Bitquake is imported. As in the published code, the scales are tried by overwriting a layer's weights,
running the whole target on every sample, and loading the old weights back; the winners are folded into the module
before the layers; ranges are clipped by multiplying out every product of an input and a weight. Departures: a
quantization scale is rounded to float16, in which the packed format stores it, and the means are summed in float64
(rounding turns a difference in the seventh digit of a scale into half a per cent of a loss, so that neighbours on the
grid may change places).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

GRID = 20


@dataclass
class Step:
    """One entry of AutoAWQ's ``get_layers_for_scaling``: names within the decoder layer."""

    before: str  # the module that the scales are folded into
    layers: tuple[str, ...]
    inspect: str  # the module whose output is compared
    kind: str  # "attention" or "mlp"


LLAMA = (
    Step("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", "attention"),
    Step("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", "attention"),
    Step("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp", "mlp"),
    Step("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj", "mlp"),
)
OPT = (
    Step("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn",
         "attention"),
    Step("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", "attention"),
    Step("final_layer_norm", ("fc1",), "fc1", "mlp"),
    Step("fc1", ("fc2",), "fc2", "mlp"),
)  # fmt: skip


@dataclass
class Found:
    """What the search chose in one decoder layer."""

    ratios: dict[str, int] = field(default_factory=dict)  # first layer's name -> index into the grid
    scales: dict[str, Tensor] = field(default_factory=dict)  # layer's name -> input scale
    bounds: dict[str, Tensor] = field(default_factory=dict)  # layer's name -> largest magnitude left, (out, groups, 1)
    layer: nn.Module | None = None  # the folded, clipped, fake-quantized layer


def pseudo_quantize(w: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """``pseudo_quantize_tensor`` of both projects; ``group`` -1 is the row."""
    shape = w.shape
    w = w.reshape(-1, shape[-1] if group == -1 else group)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = (w.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / most).half().float()
        w = torch.clamp(torch.round(w / scale), -most - 1, most) * scale
    else:
        high, low = w.amax(dim=1, keepdim=True).clamp(min=0), w.amin(dim=1, keepdim=True).clamp(max=0)
        most = 2**bits - 1
        scale = ((high - low).clamp(min=1e-5) / most).half().float()
        zero = (-torch.round(low / scale)).clamp_(0, most)
        w = (torch.clamp(torch.round(w / scale) + zero, 0, most) - zero) * scale
    return w.reshape(shape)


def per_token(x: Tensor, bits: int) -> Tensor:
    """Dynamic symmetric quantization of activations."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / most
    return (x / scale).round().clamp(-most - 1, most) * scale


Calls = Sequence[tuple[tuple[Any, ...], dict[str, Any]]]


def listen(layer: nn.Module, calls: Calls, names: Sequence[str]) -> dict[str, list[tuple[Any, Any]]]:
    """(args, kwargs) of the named modules in each call of the layer."""
    heard: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: heard[name].append((args, kwargs)), with_kwargs=True
        )
        for name in dict.fromkeys(names)
    ]
    with torch.no_grad():
        for args, kwargs in calls:
            layer(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return heard


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def search(
    layer: nn.Module,
    calls: Calls,
    steps: Sequence[Step],
    *,
    method: str,
    bits: int,
    group: int,
    symmetric: bool = False,
    duo_scaling: bool = True,
    clip: bool = True,
    activation_bits: int | None = None,
    loss: str = "mae",
    masks: Sequence[tuple[Tensor, Tensor]] | None = None,
    rho: dict[str, float] | None = None,
) -> Found:
    """``method`` awq or mbq on one decoder layer; ``masks`` are each sample's vision and answer positions."""
    layer = copy.deepcopy(layer)
    found = Found()
    names = [step.layers[0] for step in steps] + [step.inspect for step in steps]
    heard = listen(layer, calls, names)
    inputs = {step.layers[0]: [args[0] for args, _ in heard[step.layers[0]]] for step in steps}
    chosen: list[tuple[Step, Tensor]] = []
    for step in steps:
        layers = [layer.get_submodule(name) for name in step.layers]
        if step.before.endswith("v_proj") and layer.get_submodule(step.before).weight.shape != layers[0].weight.shape:
            continue
        x = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs[step.layers[0]]])
        x_mean = x.abs().double().mean(0).float()
        weight = torch.cat([one.weight for one in layers], dim=0)
        grouped = weight.reshape(-1, weight.shape[1] if group == -1 else group)
        w_mean = (grouped.abs() / (grouped.abs().amax(dim=1, keepdim=True) + 1e-6)).reshape(weight.shape)
        w_mean = w_mean.double().mean(0).float()
        inspect = layer.get_submodule(step.inspect)
        originals = [first(inspect(*args, **kwargs)) for args, kwargs in heard[step.inspect]]
        saved = {k: v.clone() for k, v in inspect.state_dict().items()}
        best, best_error, best_scales = -1, float("inf"), None
        for index in range(GRID):
            ratio = index / GRID
            if method == "awq" and duo_scaling:
                scales = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
            else:
                scales = x_mean.pow(ratio).clamp(min=1e-4)
            scales = scales / (scales.max() * scales.min()).sqrt()
            scales[torch.isinf(scales)] = 1
            scales[torch.isnan(scales)] = 1
            hooks = []
            for one in layers:
                one.weight.mul_(scales.view(1, -1))
                if activation_bits is None:
                    one.weight.data = pseudo_quantize(one.weight.data, bits, group, symmetric) / scales.view(1, -1)
                else:
                    one.weight.data = pseudo_quantize(one.weight.data, bits, group, symmetric)
                    hooks.append(
                        one.register_forward_pre_hook(
                            lambda _, args, scales=scales: (per_token(args[0] / scales, activation_bits),)
                        )
                    )
            error = error_of(inspect, heard[step.inspect], originals, method, loss, masks, (rho or {}).get(step.kind))
            for hook in hooks:
                hook.remove()
            inspect.load_state_dict(saved)
            if error < best_error:
                best, best_error, best_scales = index, error, scales
        assert best_scales is not None
        found.ratios[step.layers[0]] = best
        found.scales |= dict.fromkeys(step.layers, best_scales)
        chosen.append((step, best_scales))
    for step, scales in chosen:
        fold(layer, step, scales)
        inputs[step.layers[0]] = [one / scales for one in inputs[step.layers[0]]]
    for step in steps:
        for name in step.layers:
            one = layer.get_submodule(name)
            if method == "awq" and clip and not any(part in name for part in ("q_", "k_", "query", "key", "Wqkv")):
                x = torch.cat([t.reshape(-1, t.shape[-1]) for t in inputs[step.layers[0]]])
                bound = best_clip(one.weight, x, bits, group, symmetric)
                found.bounds[name] = bound
                shape = one.weight.shape
                grouped = one.weight.data.reshape(bound.shape[0], bound.shape[1], -1)
                one.weight.data = torch.clamp(grouped, -bound, bound).reshape(shape)
            one.weight.data = pseudo_quantize(one.weight.data, bits, group, symmetric)
    found.layer = layer
    return found


def error_of(
    inspect: nn.Module, heard: Sequence[tuple[Any, Any]], originals: Sequence[Tensor], method: str, loss: str,
    masks: Sequence[tuple[Tensor, Tensor]] | None, rho: float | None,
) -> float:  # fmt: skip
    answer_sum = vision_sum = 0.0
    answers = visions = elements = 0
    plain = 0.0
    for number, ((args, kwargs), original) in enumerate(zip(heard, originals, strict=True)):
        difference = (first(inspect(*args, **kwargs)) - original).float()
        size = difference.abs() if method == "mbq" and loss == "mae" else difference.pow(2)
        plain += size.sum().item()
        elements += size.numel()
        if masks is not None:
            vision, answer = masks[number]
            size = size.reshape(-1, size.shape[-1])
            answer_sum += (size * answer[:, None]).sum().item()
            vision_sum += (size * vision[:, None]).sum().item()
            answers += int(answer.sum()) * size.shape[-1]
            visions += int(vision.sum()) * size.shape[-1]
    if masks is None or rho is None:
        return plain / elements
    if loss == "mae":
        return (answer_sum + rho * vision_sum) / (answers + visions)
    return answer_sum / answers + rho * vision_sum / visions


def fold(layer: nn.Module, step: Step, scales: Tensor) -> None:
    """``scale_ln_fcs``, ``scale_fc_fc``: the module before gives inputs that are smaller by the scales."""
    before = layer.get_submodule(step.before)
    if isinstance(before, nn.Linear):
        before.weight[-scales.numel() :].div_(scales.view(-1, 1))
    else:
        before.weight.div_(scales)
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scales)
    for name in step.layers:
        layer.get_submodule(name).weight.mul_(scales.view(1, -1))


def best_clip(w: Tensor, x: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """``_compute_best_clip``: max_shrink 0.5 of a grid of 20, every n-th token."""
    group = group if group > 0 else w.shape[1]
    x = x.reshape(1, x.shape[0], -1, group)
    x = x[:, :: max(1, x.shape[1] // 512)]
    w = w.reshape(w.shape[0], 1, -1, group)
    bounds = []
    for start in range(0, w.shape[0], 64):
        part = w[start : start + 64]
        most = part.abs().amax(dim=-1, keepdim=True)
        best, least = most.clone(), torch.ones_like(most) * 1e9
        original = (x * part).sum(dim=-1)
        for step in range(10):
            bound = most * (1 - step / 20)
            rounded = pseudo_quantize(torch.clamp(part, -bound, bound), bits, group, symmetric)
            error = ((x * rounded).sum(dim=-1) - original).pow(2).mean(dim=1).view(least.shape)
            better = error < least
            least[better], best[better] = error[better], bound[better]
        bounds.append(best)
    return torch.cat(bounds).squeeze(1)


def gradient_ratios(
    model: Any, samples: Sequence[dict[str, Tensor]], masks: Sequence[tuple[Tensor, Tensor]], names: dict[str, str],
) -> dict[str, float]:  # fmt: skip
    """Vision over answer, floored by the median of its kind; ``names``: Linear -> kind. By the model's own loss."""
    sums = {name: [0.0, 0.0] for name in names}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    for inputs, (vision, answer) in zip(samples, masks, strict=True):
        labels = torch.where(answer, inputs["input_ids"][0], -100)[None]
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        for name in names:
            gradient = outputs[name].grad.reshape(-1, outputs[name].shape[-1]).abs()
            sums[name][0] += gradient[vision].mean().item() / len(samples)
            sums[name][1] += gradient[answer].mean().item() / len(samples)
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    ratios = {name: vision / answer for name, (vision, answer) in sums.items()}
    for kind in set(names.values()):
        mine = sorted(ratios[name] for name in names if names[name] == kind)
        median = (mine[(len(mine) - 1) // 2] + mine[len(mine) // 2]) / 2
        ratios |= {name: max(ratios[name], median) for name in names if names[name] == kind}
    return ratios
