"""mmq's JSON configurations (arXiv 2601.15287) as specs of ours: uniform, GPTQ and AWQ, part by part. Torch-free.

- uniform: a list of ``{model_part: VIT|QFORMER|LLM, layer_group: FIRST|MIDDLE|LAST|ALL, layer_type:
  MLP|ATTENTION|BOTH, num_bits}``.
- GPTQ: ``{vision|qformer|language: {bits, percent_dampening, group_size, use_symmetric, use_act_order,
  use_static_groups}}``.
- AWQ: ``{vit_layers|vision_layers|qformer_layers|llm_layers: {layer: bits}}``, with BLIP-2's layer names
  (``self_attn``, ``self_attn_output``, ``fc1``, ...) or LLaVA's (``self_attn``, ``mlp``).

VIT, QFORMER and LLM are the components vision, connector and language; as there, only the linear layers inside of
blocks are quantized (no projector), and 16 bits are full precision. What the configuration says is done, also where
mmq's code did not (its uniform study leaves the language model's attention and the Q-Former's MLP alone, its AWQ the
scales of the vision tower's output projections; research notes of the project, section 2.3).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from bitquake.model_wrappers.quantizers.spec import FULL_PRECISION, QuantSpec, QuantSpecError, load_spec

MmqKind = Literal["uniform", "gptq", "awq"]
_FULL = 16
_THIRDS = ("front", "middle", "end")
_PARTS = {"VIT": "vision", "QFORMER": "connector", "LLM": "language"}
_GROUPS = {"FIRST": ("front",), "MIDDLE": ("middle",), "LAST": ("end",), "ALL": _THIRDS}
_TYPES = {"MLP": ("mlp",), "ATTENTION": ("attention",), "BOTH": ("attention", "mlp")}
_ENTRY = ("model_part", "layer_group", "layer_type", "num_bits")
_GPTQ_PARTS = {"vision": "vision", "qformer": "connector", "language": "language"}
_GPTQ_KEYS = {
    "percent_dampening": 0.01,
    "group_size": -1,
    "use_symmetric": True,
    "use_act_order": False,
    "use_static_groups": False,
}
"""A part's keys beside ``bits``, with the values that mmq gives them."""
_AWQ_PARTS = {
    "vit_layers": "vision",
    "vision_layers": "vision",
    "qformer_layers": "connector",
    "llm_layers": "language",
}
_QFORMER_LAYERS = {
    "self_attn": r"\.attention\.attention\.(query|key|value)",
    "self_attn_output": r"\.attention\.output\.dense",
    "cross_attn": r"\.crossattention\.attention\.(query|key|value)",
    "cross_attn_output": r"\.crossattention\.output\.dense",
    "intermediate_query": r"\.intermediate_query\.dense",
    "output_query": r"\.output_query\.dense",
    "intermediate_txt": r"\.intermediate\.dense",
    "output_txt": r"\.output\.dense",
}
_BLOCK_LAYERS = {
    "self_attn": r"\.self_attn\.(qkv|q_proj|k_proj|v_proj)",
    "self_attn_output": r"\.self_attn\.(projection|out_proj|o_proj)",
    "fc1": r"\.fc1",
    "fc2": r"\.fc2",
}
_LLAVA_LAYERS = {"self_attn": r"\.self_attn\..*", "mlp": r"\.mlp\..*"}


def load_mmq(config: str | Path | list[Any] | Mapping[str, Any], kind: MmqKind | None = None) -> QuantSpec:
    """The spec of a configuration of mmq.

    Args:
        config: its file, or what a file holds.
        kind: which of the three it is; None: what its keys say.

    Returns:
        A spec with one plan rule for what has the same bits; full precision when nothing is below 16 bits.

    Raises:
        QuantSpecError: the file cannot be read, is of no kind or another than ``kind``, or says what our quantizers
            cannot do; the message names the keys.
        OSError: the file cannot be opened.
    """
    where, name = "mmq configuration", ""
    if isinstance(config, (str, Path)):
        where, name = str(config), Path(config).stem
        config = _parsed(Path(config))
    found = _kind_of(config, where)
    if kind is not None and kind != found:
        raise QuantSpecError(f"{where}: is a configuration for {found}, not for {kind}")
    values = _READERS[found](config, where)
    name = name or f"mmq-{found}"
    if not values["plan"]:
        return load_spec({"name": name, "method": "none"})
    return load_spec({"name": name, **values})


def import_mmq(file: Path, out: Path | None, *, kind: MmqKind | None = None) -> str:
    """What a configuration is as a spec of ours, as YAML; written to ``out``, if there is one.

    Raises:
        QuantSpecError: as ``load_mmq``, or ``out`` does not end in ``.yaml``.
        OSError: a file cannot be read or written.
    """
    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise QuantSpecError(f"--out {out}: expected a name that ends in .yaml, so that quant={out}.yaml finds it")
    spec = load_mmq(file, kind)
    if out is not None:
        spec = spec.model_copy(update={"name": out.stem})
    text = yaml.safe_dump(spec.options(), sort_keys=False)
    if spec.is_full_precision:
        text += f"# all parts have 16 bits: this is {FULL_PRECISION}\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
    return text.rstrip("\n")


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        return json.loads(text)
    except ValueError as error:
        try:  # JSON is YAML, which takes a comma after the last item: mmq's own example has one
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise QuantSpecError(f"{path}: is no JSON: {error}") from error


def _kind_of(config: Any, where: str) -> MmqKind:
    if isinstance(config, list):
        return "uniform"
    if isinstance(config, Mapping) and config:
        if all(key in _GPTQ_PARTS for key in config):
            return "gptq"
        if all(key in _AWQ_PARTS for key in config):
            return "awq"
        known = [*_GPTQ_PARTS, *_AWQ_PARTS]
        odd = [str(key) for key in config if key not in known]
        raise QuantSpecError(
            f"{where}: {f'unknown part {_shown(odd, known)}' if odd else 'mixes the parts of two kinds'}; expected a "
            f"list (uniform), or parts {', '.join(_GPTQ_PARTS)} (GPTQ) or {', '.join(_AWQ_PARTS)} (AWQ)"
        )
    raise QuantSpecError(
        f"{where}: expected a list (uniform) or a mapping of parts (GPTQ, AWQ), got {type(config).__name__}"
    )


def _uniform(config: list[Any], where: str) -> dict[str, Any]:
    rules = []
    taken: dict[tuple[str, str, str], int] = {}
    for number, entry in enumerate(config, start=1):
        place = f"{where}: entry {number}"
        values = _keys(entry, _ENTRY, place, required=_ENTRY)
        component = _choice(values["model_part"], _PARTS, f"{place}: model_part")
        thirds = _choice(values["layer_group"], _GROUPS, f"{place}: layer_group")
        layers = _choice(values["layer_type"], _TYPES, f"{place}: layer_type")
        bits = _bits(values["num_bits"], f"{place}: num_bits")
        for cell in ((component, third, layer) for third in thirds for layer in layers):
            if cell in taken:
                raise QuantSpecError(
                    f"{place}: {'/'.join(cell)} is in entry {taken[cell]} already; mmq would quantize it twice, "
                    "and here each module belongs to one rule"
                )
            taken[cell] = number
        if bits < _FULL:
            rules.append({"components": [component], "thirds": list(thirds), "layers": list(layers), "bits": bits})
    return {"method": "uniform", "bits": _widest(rules), "plan": rules}


def _gptq(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    rules = []
    shared: dict[str, dict[str, Any]] = {"percent_dampening": {}, "use_act_order": {}, "use_static_groups": {}}
    for part, told in config.items():
        place = f"{where}: {part}"
        values = {**_GPTQ_KEYS, **_keys(told, ("bits", *_GPTQ_KEYS), place, required=("bits",))}
        bits = _bits(values["bits"], f"{place}: bits")
        for flag in ("use_symmetric", "use_act_order", "use_static_groups"):
            if not isinstance(values[flag], bool):
                raise QuantSpecError(f"{place}: {flag}: expected true or false, got {values[flag]!r}")
        if bits == _FULL:
            continue
        for key, seen in shared.items():
            seen[part] = values[key]
        rules.append(
            {"components": [_GPTQ_PARTS[part]], "thirds": list(_THIRDS), "bits": bits,
             "group_size": values["group_size"], "symmetric": values["use_symmetric"]}
        )  # fmt: skip
    for key, seen in shared.items():
        if len(set(seen.values())) > 1:
            told = ", ".join(f"{part} {value}" for part, value in seen.items())
            raise QuantSpecError(f"{where}: {key} differs by part ({told}); here it is one for the whole model")
    options = {key: next(iter(seen.values()), _GPTQ_KEYS[key]) for key, seen in shared.items()}
    return {
        "method": "gptq",
        "bits": _widest(rules),
        "group_size": rules[0]["group_size"] if rules else -1,
        "symmetric": rules[0]["symmetric"] if rules else True,
        "plan": rules,
        "gptq": {
            "damp": options["percent_dampening"],
            "act_order": options["use_act_order"],
            "static_groups": options["use_static_groups"],
        },
    }


def _awq(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    if {"vit_layers", "vision_layers"} <= set(config):
        raise QuantSpecError(f"{where}: vit_layers (BLIP-2) and vision_layers (LLaVA) are the same part; give one")
    rules = []
    for part, told in config.items():
        place = f"{where}: {part}"
        layers = _awq_layers(part, told, config, place)
        values = _keys(told, tuple(layers), place)
        by_bits: dict[int, list[str]] = {}
        for layer, bits in values.items():
            by_bits.setdefault(_bits(bits, f"{place}: {layer}"), []).append(layer)
        for bits, members in by_bits.items():
            if bits == _FULL:
                continue
            rule: dict[str, Any] = {"components": [_AWQ_PARTS[part]], "thirds": list(_THIRDS), "bits": bits}
            if len(members) < len(layers):
                patterns = [layers[layer] for layer in members]
                rule["modules"] = r".*\.\d+" + (patterns[0] if len(patterns) == 1 else f"({'|'.join(patterns)})")
                if part != "qformer_layers" and any(layer in ("fc1", "fc2") for layer in members):
                    # OPT's blocks have fc1 themselves, a vision tower's in its mlp
                    rule["modules"] = rule["modules"].replace(r"\.fc", r"(\.mlp)?\.fc")
            rules.append(rule)
    return {"method": "awq", "bits": _widest(rules), "group_size": 128, "symmetric": False, "plan": rules}


def _awq_layers(part: str, told: Any, config: Mapping[str, Any], place: str) -> Mapping[str, str]:
    """The layer names that a part may have, with the modules that each of them is."""
    if part == "qformer_layers":
        return _QFORMER_LAYERS
    names = set(told) if isinstance(told, Mapping) else set()
    if part == "vision_layers" or "mlp" in names or (part == "llm_layers" and "vision_layers" in config):
        return _LLAVA_LAYERS
    blip2 = part == "vit_layers" or {"vit_layers", "qformer_layers"} & set(config) or names - {"self_attn"}
    if not blip2:
        raise QuantSpecError(
            f"{place}: self_attn alone is all of the attention for LLaVA and the inputs of it for BLIP-2; give "
            "self_attn_output (BLIP-2) or mlp (LLaVA) too, at 16 bits if it is to stay"
        )
    return _BLOCK_LAYERS


_READERS: dict[MmqKind, Callable[[Any, str], dict[str, Any]]] = {"uniform": _uniform, "gptq": _gptq, "awq": _awq}
assert set(_READERS) == set(get_args(MmqKind))


def _keys(told: Any, known: Iterable[str], place: str, *, required: Iterable[str] = ()) -> dict[str, Any]:
    names = list(known)
    if not isinstance(told, Mapping):
        raise QuantSpecError(f"{place}: expected a mapping with {', '.join(names)}, got {told!r}")
    if odd := [str(key) for key in told if key not in names]:
        raise QuantSpecError(f"{place}: cannot honour {_shown(odd, names)}; known: {', '.join(names)}")
    if absent := [key for key in required if key not in told]:
        raise QuantSpecError(f"{place}: {', '.join(absent)} is missing")
    return dict(told)


def _shown(odd: list[str], known: list[str]) -> str:
    close = difflib.get_close_matches(odd[0], known, n=1)
    return f"{', '.join(map(repr, odd))}{f' (did you mean {close[0]!r}?)' if close else ''}"


def _choice(value: Any, known: Mapping[str, Any], place: str) -> Any:
    found = known.get(value) if isinstance(value, str) else None
    if found is None:
        raise QuantSpecError(f"{place}: expected one of {', '.join(known)}, got {value!r}")
    return found


def _bits(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not (2 <= value <= 8 or value == _FULL):
        raise QuantSpecError(f"{place}: expected 2 to 8, or 16 for full precision, got {value!r}")
    return value


def _widest(rules: list[dict[str, Any]]) -> int:
    return max((rule["bits"] for rule in rules), default=8)
