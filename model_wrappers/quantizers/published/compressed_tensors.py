"""compressed-tensors' (llm-compressor's) integer formats: ``pack-quantized``, ``int-quantized``, ``naive-quantized``.

Codes are signed. ``pack-quantized``: ``weight_packed`` int32 holds code + 2^(b-1), a row's bit stream in 32-bit words
(old versions did not let codes of 3, 5, 6 and 7 bits straddle words; the width tells which), ``weight_shape`` the
shape, ``weight_zero_point`` the zero-points packed the same way down the columns. The other two hold ``weight`` as
int8. ``weight_scale`` (out, groups), (out, 1) or (1,); ``weight_g_idx`` the group of each feature (act-order).
``W[o, f] = scale[o, g] * (q[o, f] - zero_point[o, g])``.

Activations: dynamic symmetric per-token integers are carried out (``activation_bits``), by our rule ``max|x| / 127``,
where the library divides by 127.5; everything else is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitquake.model_wrappers.quantizers.published.stored import (
    FLOATS,
    PublishedCheckpointError,
    column_order,
    expect,
    group_width,
    n_words,
    unpack_words,
)
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

PACKED, PLAIN = "pack-quantized", ("int-quantized", "naive-quantized")
FORMATS = (PACKED, *PLAIN)
LEAVES = ("weight_packed", "weight_shape", "weight", "weight_scale", "weight_zero_point", "weight_g_idx")
STATIC_LEAVES = ("input_scale", "input_zero_point", "input_global_scale", "weight_global_scale", "output_scale")
"""Tensors beside these that mean a scheme which is not read."""
_STRATEGIES = ("tensor", "channel", "group")


@dataclass(frozen=True)
class Scheme:
    """One entry of ``config_groups``.

    Attributes:
        format: one of ``FORMATS``.
        targets: class names (``Linear``), module names, or ``re:`` and a pattern.
        bits: of the weight, 2 to 8.
        symmetric: there are no zero-points.
        group_size: None: as the scales say (per channel, per tensor).
        activation_bits: of the dynamically quantized inputs, or None.
    """

    format: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    group_size: int | None
    activation_bits: int | None

    def rank(self, names: tuple[str, ...]) -> int:
        """How specifically the scheme targets a module of these names: 2 by name, 1 by class, 0 not at all."""
        for target in self.targets:
            pattern = target.removeprefix("re:")
            if any(re.match(pattern, name) if pattern != target else name == target for name in names):
                return 2
        return int("Linear" in self.targets)


def read_schemes(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a ``quantization_config``.

    Raises:
        PublishedCheckpointError: a format, scheme or transform that is not read, by its name.
    """
    whole = str(config.get("format", "dense"))
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = config.get(key)
        given = isinstance(value, Mapping) and value.get("format") != "dense" and any(value.values())
        if given or (value and not isinstance(value, Mapping)):
            raise PublishedCheckpointError(f"compressed-tensors {key} {_brief(value)} is not carried out here")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        _refuse_format(whole)
        raise PublishedCheckpointError("compressed-tensors: quantization_config has no config_groups")
    schemes = []
    for name, group in groups.items():
        format_ = str(group.get("format") or whole)
        _refuse_format(format_)
        weights = group.get("weights") or {}
        kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
        if strategy is None:
            strategy = "group" if (weights.get("group_size") or -1) > 0 else "tensor"
        if not weights or kind != "int" or bits not in range(2, 9) or strategy not in _STRATEGIES:
            raise PublishedCheckpointError(
                f"compressed-tensors {name}: weights of type {kind}, {bits} bits, strategy {strategy} are not read; "
                f"integers of 2 to 8 bits per {', '.join(_STRATEGIES)} are"
            )
        if group.get("output_activations"):
            raise PublishedCheckpointError(f"compressed-tensors {name}: quantized output_activations are not read")
        schemes.append(
            Scheme(
                format_, tuple(map(str, group.get("targets") or ())), bits, bool(weights.get("symmetric", True)),
                weights.get("group_size") if strategy == "group" else None, _activation_bits(name, group),
            )
        )  # fmt: skip
    return tuple(schemes)


def _refuse_format(format_: str) -> None:
    if format_ not in FORMATS:
        raise PublishedCheckpointError(
            f"compressed-tensors format {format_!r} is not read; {', '.join(FORMATS)} are. Use an integer checkpoint, "
            "or quantize the full-precision model with quant="
        )


def _activation_bits(name: str, group: Mapping[str, Any]) -> int | None:
    inputs = group.get("input_activations")
    if not inputs:
        return None
    told = {key: inputs.get(key) for key in ("type", "num_bits", "strategy", "dynamic", "symmetric")}
    dynamic = inputs.get("dynamic", False)
    bits = inputs.get("num_bits", 8)
    if (
        inputs.get("type", "int") != "int"
        or dynamic is not True
        or inputs.get("strategy") != "token"
        or not inputs.get("symmetric", True)
        or bits not in range(2, 9)
    ):
        raise PublishedCheckpointError(
            f"compressed-tensors {name}: {'' if dynamic else 'static '}activation scales ({_brief(told)}) are not "
            "read; dynamic symmetric integers per token are"
        )
    return int(bits)


def _brief(value: object) -> str:
    return str(value)[:120]


def scheme_of(schemes: tuple[Scheme, ...], names: tuple[str, ...]) -> Scheme:
    """The scheme of a quantized module, by any of its names.

    Raises:
        PublishedCheckpointError: none targets it, or two do equally.
    """
    if len(schemes) == 1:
        return schemes[0]
    best = max(scheme.rank(names) for scheme in schemes)
    found = [scheme for scheme in schemes if scheme.rank(names) == best and best]
    if len(found) != 1:
        raise PublishedCheckpointError(
            f"{len(found)} entries of config_groups target this quantized module (targets: "
            f"{', '.join(' '.join(scheme.targets) for scheme in schemes)})"
        )
    return found[0]


def read_compressed(
    tensors: Mapping[str, Tensor], *, in_features: int, out_features: int, scheme: Scheme
) -> QuantizedWeight:
    """One module's weight; symmetric where the scheme is or every zero-point is 0.

    Args:
        tensors: ``LEAVES`` of the module, those that its format has.
        in_features, out_features: of the Linear that the module is in the model.

    Raises:
        PublishedCheckpointError: a tensor is missing or of another shape or dtype, codes are beyond their bits, or a
            static scale lies beside them.
    """
    if static := [leaf for leaf in STATIC_LEAVES if leaf in tensors]:
        raise PublishedCheckpointError(f"{static[0]} lies beside the weight: static or global scales are not read")
    bits, shape = scheme.bits, (out_features, in_features)
    scale = expect(tensors, "weight_scale", FLOATS)
    per_tensor = scale.numel() == 1
    group, n_groups, straddle = in_features, 1, True
    if per_tensor:
        scale = scale.reshape(1, 1)
    else:
        n_groups = scale.shape[1] if scale.ndim == 2 else 0
        expect(tensors, "weight_scale", FLOATS, [(out_features, max(n_groups, 1))])
        group = group_width(n_groups, in_features, scheme.group_size)
    if scheme.format == PACKED:
        stored_shape = expect(tensors, "weight_shape", [torch.int64, torch.int32], [(2,)])
        if tuple(stored_shape.tolist()) != shape:
            raise PublishedCheckpointError(
                f"weight_shape says {tuple(stored_shape.tolist())}, and the model's Linear has {shape}"
            )
        packed = expect(
            tensors, "weight_packed", [torch.int32], [(out_features, w) for w in _widths(in_features, bits)]
        )
        straddle = _straddle(packed.shape[1], bits, in_features)
        codes = _unpack(packed, bits, in_features, straddle)
    else:
        codes = _unsigned(expect(tensors, "weight", [torch.int8], [shape]), bits, "weight")
    zero = None
    if not scheme.symmetric:
        zero = _zeros(tensors, bits, (out_features, n_groups), per_tensor, straddle)
    order = column_order(tensors.get("weight_g_idx"), in_features, group)
    return QuantizedWeight(
        codes=codes.contiguous() if order is None else codes[:, order.long()],
        scale=scale.contiguous(),
        zero=zero if zero is not None and bool(zero.any()) else None,
        bits=bits,
        group_size=group,
        order=order,
    )


def _zeros(
    tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, int], per_tensor: bool, straddle: bool
) -> Tensor:
    """Zero-points as int8; they are stored signed, so relative to the middle code; shape (out, groups) or (1, 1)."""
    stored = expect(tensors, "weight_zero_point", [torch.int8, torch.int32])
    if stored.dtype == torch.int32:
        words = _widths(shape[0], bits)[0 if straddle else 1]
        expect(tensors, "weight_zero_point", [torch.int32], [(words, shape[1])])
        return (_unpack(stored.t(), bits, shape[0], straddle).to(torch.int16) - (1 << (bits - 1))).to(torch.int8).t()
    return expect(tensors, "weight_zero_point", [torch.int8], [(1,), (1, 1)] if per_tensor else [shape]).reshape(
        (1, 1) if per_tensor else shape
    )


def _widths(n: int, bits: int) -> tuple[int, int]:
    """Words of a row: as a bit stream, and with ``32 // bits`` codes in each."""
    return n_words(n, bits), -(-n // (32 // bits))


def _straddle(width: int, bits: int, n: int) -> bool:
    """Whether codes may straddle words, from the width of a row.

    Raises:
        PublishedCheckpointError: a row so short that the width does not tell, and bits where it matters.
    """
    stream, whole = _widths(n, bits)
    if stream == whole and 32 % bits and n > 32 // bits:
        raise PublishedCheckpointError(
            f"{n} codes of {bits} bits take {stream} words in the layouts of old and of new versions of "
            "compressed-tensors; which one this is cannot be told"
        )
    return width == stream


def _unpack(words: Tensor, bits: int, n: int, straddle: bool) -> Tensor:
    if straddle:
        return unpack_words(words, bits, n)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(words), -1)[:, :n].to(torch.uint8)


def _unsigned(codes: Tensor, bits: int, leaf: str) -> Tensor:
    half = 1 << (bits - 1)
    shifted = codes.to(torch.int16) + half
    if int(shifted.min()) < 0 or int(shifted.max()) >= 2 * half:
        raise PublishedCheckpointError(
            f"{leaf} has codes from {int(codes.min())} to {int(codes.max())}, beyond the config's {bits} bits"
        )
    return shifted.to(torch.uint8)
