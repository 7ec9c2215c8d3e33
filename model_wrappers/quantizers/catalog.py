"""The named specs as rows and as text, for ``bitquake quants list`` and ``show``. Torch-free."""

from __future__ import annotations

import yaml

from bitquake.model_wrappers.quantizers.spec import QuantSpec, load_spec, named_specs


def _bits_per_weight(spec: QuantSpec) -> str:
    """Bits per quantized weight with a float16 scale and the zero-point (8 bits for rtn, 16 for hqq) of each group."""
    if spec.bits is None or spec.group_size is None:
        return "-"
    per_group = 16 + (16 if spec.method == "hqq" else 0 if spec.symmetric else 8)
    return f"{spec.bits + per_group / spec.group_size:.3f}"


def quants_table() -> list[dict[str, str]]:
    """One mapping per named spec, keys in column order."""
    return [
        {
            "name": name,
            "method": spec.method,
            "bits": str(spec.bits or "-"),
            "group": str(spec.group_size or "-"),
            "symmetric": "-" if spec.is_full_precision else "yes" if spec.symmetric else "no",
            "components": "+".join(spec.components) or "-",
            "execution": "-" if spec.is_full_precision else spec.execution,
            "bits/weight": _bits_per_weight(spec),
        }
        for name, spec in named_specs().items()
    ]


def describe_spec(name: str) -> str:
    """A spec as YAML, with what it stores per weight; takes whatever ``load_spec`` takes.

    Raises:
        QuantSpecError: as ``load_spec``.
    """
    spec = load_spec(name)
    text = yaml.safe_dump(spec.options(), sort_keys=False)
    if spec.is_full_precision:
        return text + "# nothing is quantized: the model runs as it was loaded\n"
    return (
        text
        + f"# {_bits_per_weight(spec)} bits per quantized weight, scales and zero-points included\n"
        + f"# use: --model bitquake_hf --model_args pretrained=…,quant={spec.name}\n"
    )
