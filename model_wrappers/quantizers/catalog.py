"""The named specs as rows and as text, for ``bitquake quants list`` and ``show``. Torch-free."""

from __future__ import annotations

from typing import Any

import yaml

from bitquake.model_wrappers.quantizers.spec import QuantSpec, load_spec, named_specs


def _bits_per_weight(spec: QuantSpec) -> str:
    """Bits per quantized weight with the scale and the zero-point of each group, where the spec alone tells.

    Scales have 16 bits and zero-points 8; hqq's and tinygemm's zero-points have 16, bitsandbytes' 4-bit scales 32, or
    when quantized 8 and a 32-bit scale for 256 of them. A scale for each row or matrix, or for each input feature (awq,
    mbq, smoothquant), depends on the module's shape; it is a fraction of a percent at the sizes of real models.
    """
    if spec.bits is None:
        return "-"
    if spec.bitsandbytes is not None and spec.bits == 4:
        return f"{spec.bits + (8 + 32 / 256 if spec.bitsandbytes.double_quant else 32) / 64:.3f}"
    if not isinstance(spec.group_size, int):
        return f"{spec.bits}+"
    per_group = 16 + (16 if spec.method in ("hqq", "torchao") else 0 if spec.symmetric else 8)
    return f"{spec.bits + per_group / spec.group_size:.3f}"


def _codes(spec: QuantSpec) -> dict[str, Any]:
    """Group size, symmetry and bits of activations; of libraries what their formats are, which no spec says."""
    found = {"group": spec.group_size, "symmetric": spec.symmetric, "activations": spec.activation_bits}
    kind = spec.bitsandbytes.type if spec.bitsandbytes else spec.torchao.kind if spec.torchao else "int4"
    if kind != "int4":
        found = {"group": "channel" if spec.bits == 8 else 64, "symmetric": True, "activations": None}
        if kind == "int8-dynamic" or (kind == "int8" and spec.bitsandbytes):
            found["activations"] = 8
    return found


def quants_table() -> list[dict[str, str]]:
    """One mapping per named spec, keys in column order."""
    rows = []
    for name, spec in named_specs().items():
        codes = _codes(spec)
        rows.append(
            {
                "name": name,
                "method": spec.method,
                "bits": str(spec.bits or "-"),
                "group": str(codes["group"] or "-"),
                "symmetric": "-" if spec.is_full_precision else "yes" if codes["symmetric"] else "no",
                "components": "+".join(spec.components) or "-",
                "activations": str(codes["activations"] or "-"),
                "calibration": spec.calibration.source if spec.calibration else "-",
                "execution": "-" if spec.is_full_precision else spec.execution,
                "bits/weight": _bits_per_weight(spec),
            }
        )
    return rows


def describe_spec(name: str) -> str:
    """A spec as YAML, with what it stores per weight; takes whatever ``load_spec`` takes.

    Raises:
        QuantSpecError: as ``load_spec``.
    """
    spec = load_spec(name)
    text = yaml.safe_dump(spec.options(), sort_keys=False)
    if spec.is_full_precision:
        return text + "# nothing is quantized: the model runs as it was loaded\n"
    rules = [spec.of_rule(rule) for rule in spec.plan if not rule.keep] or [spec]
    stored = sorted({_bits_per_weight(rule) for rule in rules}, key=lambda bits: float(bits.rstrip("+")))
    return (
        text
        + f"# {' or '.join(stored)} bits per quantized weight, scales and zero-points included\n"
        + f"# use: --model bitquake_hf --model_args pretrained=…,quant={name}\n"
    )
