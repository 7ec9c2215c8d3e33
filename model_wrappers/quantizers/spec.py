"""What a quantization is: ``QuantSpec``, and how a name, an override, a file or a mapping becomes one. Torch-free."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from bitquake.model_wrappers.quantizers.options import (
    OPTIONS,
    AwqOptions,
    BitsandbytesOptions,
    GptqOptions,
    HqqOptions,
    MbqOptions,
    Options,
    SmoothquantOptions,
    TorchaoOptions,
    UniformOptions,
)

Component = Literal["vision", "connector", "language"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
Method = Literal[
    "none", "rtn", "uniform", "hqq", "gptq", "awq", "mbq", "smoothquant", "bitsandbytes", "torchao", "checkpoint"
]
CALIBRATED = ("gptq", "awq", "mbq", "smoothquant")
"""Methods that see data."""
LIBRARIES = ("bitsandbytes", "torchao")
"""Methods whose layers are a library's own and not in the packed format."""
BITS = (2, 3, 4, 5, 6, 7, 8)
FULL_PRECISION = "full-precision"


def _group_size(value: Any) -> Any:
    if value == -1:  # how GPTQ and AWQ checkpoints write it
        return "channel"
    if value in ("channel", "tensor") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"must be a positive whole number, channel or tensor, got {value!r}")


GroupSize = Annotated[int | Literal["channel", "tensor"], BeforeValidator(_group_size)]


class QuantSpecError(ValueError):
    """A quantization spec that does not exist or cannot be."""


CalibrationSource = Literal["none", "text", "noise", "self", "caption", "in-domain", "corrupted-in-domain"]


class CalibrationSpec(Options):
    """Data that a calibrated method sees (papers.md section 6).

    Attributes:
        source: ``text``: sentences without pictures; ``noise``: Gaussian pictures with generic prompts; ``self``: the
            model's own captions of synthetic pictures; ``caption``: pictures with captions; ``in-domain``: questions
            of the evaluated kind; ``corrupted-in-domain``: the same with ``noise`` at ``severity`` on the pictures.
        samples: number of them.
        seed: which ones, and of the noise.
        data: a task family whose ``calibration`` split is used, or a folder; None: the source's own (``noise`` has no
            other).
        noise, severity: of ``corrupted-in-domain``.
    """

    source: CalibrationSource = "caption"
    samples: int = Field(default=128, ge=1)
    seed: int = Field(default=0, ge=0)
    data: str | None = None
    noise: str = "gaussian_noise"
    severity: int = Field(default=3, ge=1, le=5)


class PlanRule(Options):
    """One rule of a plan: which Linear modules, and where they differ from the spec. What is given must all hold.

    Attributes:
        modules: regular expression that matches a module's whole name.
        components: their component.
        thirds: third of their stack of blocks.
        layers: attention or MLP, or neither.
        bits, group_size, symmetric: instead of the spec's.
        keep: leave these modules at full precision (they count as matched).
    """

    modules: str | None = None
    components: tuple[Component, ...] | None = None
    thirds: tuple[Literal["front", "middle", "end"], ...] | None = None
    layers: tuple[Literal["attention", "mlp", "other"], ...] | None = None
    bits: int | None = Field(default=None, ge=2, le=8)
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    keep: bool = False

    @field_validator("modules")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _selects(self) -> PlanRule:
        if not (self.modules or self.components or self.thirds or self.layers):
            raise ValueError("a rule needs modules, components, thirds or layers")
        if self.keep and (self.bits or self.group_size or self.symmetric is not None):
            raise ValueError("a rule that keeps modules takes no bits, group_size or symmetric")
        return self


class QuantSpec(Options):
    """One quantization, as asked for. What was really done stands in the quant card.

    Attributes:
        name: how tables call it.
        method: ``none`` (full precision), ``rtn``, ``uniform``, ``hqq``, ``gptq``, ``awq``, ``mbq``, ``smoothquant``,
            or by a library ``bitsandbytes``, ``torchao``; ``checkpoint`` is what a published checkpoint brought.
        backend: ``own`` solver, or for hqq the ``hqq`` library's (its integers are stored in our packed format).
        bits: bits of an integer code, 2 to 8.
        group_size: consecutive input features that share a scale; a row's last group may be shorter, and a group
            longer than the row is the row. ``channel``: a scale for each row; ``tensor``: one for the matrix.
        symmetric: codes around 0 without a zero-point.
        components: which parts' Linear modules are quantized; lm_head, embeddings and norms never are.
        plan: rules instead of ``components``: exactly what they name is quantized, each as its rule says.
        execution: ``simulated`` holds the de-quantized weight in the model's dtype, ``packed`` the low-bit codes.
        activation_bits: quantize the inputs of these modules at run time to so many bits, per token; None: do not.
        calibration: data for gptq, awq, mbq and smoothquant.
        hqq, uniform, gptq, awq, mbq, smoothquant, bitsandbytes, torchao: options of the method; absent for others.
    """

    name: str = Field(min_length=1)
    method: Method
    backend: Literal["own", "hqq"] = "own"
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool = False
    components: tuple[Component, ...] = ("language",)
    plan: tuple[PlanRule, ...] = ()
    execution: Literal["simulated", "packed"] = "simulated"
    activation_bits: int | None = Field(default=None, ge=2, le=8)
    calibration: CalibrationSpec | None = None
    hqq: HqqOptions | None = None
    uniform: UniformOptions | None = None
    gptq: GptqOptions | None = None
    awq: AwqOptions | None = None
    mbq: MbqOptions | None = None
    smoothquant: SmoothquantOptions | None = None
    bitsandbytes: BitsandbytesOptions | None = None
    torchao: TorchaoOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        method = filled.get("method")
        if not isinstance(method, str):
            return filled  # refused by its field
        if isinstance(filled.get("components"), str):  # "vision+language", the form that fits into model_args
            filled["components"] = [part.strip() for part in filled["components"].split("+")]
        if method in ("none", "checkpoint") or filled.get("plan"):
            filled.setdefault("components", [])
        if method in OPTIONS and filled.get(method) is None:
            filled[method] = {}
        if method in CALIBRATED and filled.get("calibration") is None:
            filled["calibration"] = {}
        elif method not in CALIBRATED and filled.get("calibration") in ({"source": "none"}, {}):
            filled["calibration"] = None
        if method == "smoothquant":
            filled = {"activation_bits": 8, "group_size": "channel", "symmetric": True, **filled}
        elif method == "uniform":
            filled = {"group_size": "tensor", **filled}
        elif method == "bitsandbytes" and isinstance(filled["bitsandbytes"], Mapping):
            kind = filled["bitsandbytes"].get("type", "nf4")
            filled = {"bits": 8 if kind == "int8" else 4, "execution": "packed", **filled}
        elif method == "torchao" and isinstance(filled["torchao"], Mapping):
            kind = filled["torchao"].get("kind", "int8")
            filled = {"bits": 4 if kind == "int4" else 8, "execution": "packed", **filled}
            if kind == "int4":
                filled.setdefault("group_size", 128)
        return filled

    @field_validator("components")
    @classmethod
    def _in_standard_order(cls, components: tuple[Component, ...]) -> tuple[Component, ...]:
        return tuple(c for c in COMPONENTS if c in components)

    @model_validator(mode="after")
    def _consistent(self) -> QuantSpec:
        if self.method == "none":
            given = [key for key in ("bits", "group_size", "hqq", "calibration") if getattr(self, key) is not None] + [
                key for key in ("components", "symmetric", "plan", "activation_bits") if getattr(self, key)
            ]
            if given or self.backend != "own" or self.execution != "simulated":
                raise ValueError(f"method none quantizes nothing and takes no further keys, got {given or 'others'}")
            return self
        for section in OPTIONS:
            if section != self.method and getattr(self, section) is not None:
                raise ValueError(f"{section} options belong to method {section}, not to {self.method}")
        if self.backend != "own" and self.method != "hqq":
            raise ValueError(f"backend {self.backend} belongs to method hqq, not to {self.method}")
        if self.method == "checkpoint":
            return self
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.plan and self.components:
            raise ValueError("a plan says itself what is quantized: leave components out, or put them into its rules")
        if not self.components and not self.plan:
            raise ValueError(f"components is empty; name at least one of {', '.join(COMPONENTS)}")
        if self.method in LIBRARIES:
            self._check_library()
            return self
        if self.group_size is None:
            raise ValueError(f"method {self.method} needs a group_size, for example 64")
        groups = {size for size in (self.group_size, *(rule.group_size for rule in self.plan)) if size is not None}
        if self.method == "uniform":
            if groups != {"tensor"} or self.symmetric or any(rule.symmetric for rule in self.plan):
                raise ValueError("method uniform is per tensor and asymmetric; use rtn for groups or symmetric codes")
        elif "tensor" in groups and self.method != "rtn":
            raise ValueError(f"group_size tensor fits methods uniform and rtn; {self.method} needs groups or channel")
        if self.calibration is not None and self.method not in CALIBRATED:
            raise ValueError(f"method {self.method} is data-free and takes no calibration; it has source none")
        if self.calibration is not None and self.calibration.source == "none":
            raise ValueError(f"method {self.method} needs calibration data; source none fits rtn, uniform and hqq only")
        if self.activation_bits is not None and self.method not in ("rtn", "mbq", "smoothquant"):
            raise ValueError(f"activation_bits fits methods rtn, mbq and smoothquant, not {self.method}")
        if self.method == "smoothquant" and self.activation_bits is None:
            raise ValueError("smoothquant is for quantized activations: give activation_bits, for example 8")
        if self.method == "hqq" and (self.symmetric or any(rule.symmetric for rule in self.plan)):
            raise ValueError("hqq fits a zero-point and cannot be symmetric; use method rtn or symmetric: false")
        if self.backend == "hqq":
            if any(not isinstance(size, int) or size % 8 for size in groups):
                raise ValueError(f"the hqq library needs a group_size that is a multiple of 8, got {self.group_size}")
            if self.hqq != HqqOptions():
                raise ValueError("the hqq library runs with its own defaults; leave hqq options out or use backend own")
        return self

    def _check_library(self) -> None:
        kind = (self.bitsandbytes.type if self.bitsandbytes else None) or (self.torchao.kind if self.torchao else None)
        expected = 4 if kind in ("nf4", "fp4", "int4") else 8
        if self.bits != expected or any(rule.bits not in (None, expected) for rule in self.plan):
            raise ValueError(f"{self.method} {kind} has {expected} bits, got {self.bits}")
        if any(rule.symmetric is not None or (rule.group_size and kind != "int4") for rule in self.plan):
            raise ValueError(
                f"{self.method} {kind}: its rules take no symmetric, and a group_size for torchao int4 only"
            )
        if self.execution != "packed" or self.symmetric or self.calibration or self.activation_bits:
            raise ValueError(
                f"{self.method} runs packed and takes no execution, symmetric, calibration, activation_bits"
            )
        if (self.group_size is not None) != (kind == "int4"):
            raise ValueError(
                f"{self.method} {kind} {'needs a group_size' if kind == 'int4' else 'takes no group_size'}"
            )

    @property
    def is_full_precision(self) -> bool:
        """True when nothing is quantized."""
        return self.method == "none"

    def of_rule(self, rule: PlanRule) -> QuantSpec:
        """The spec with what a rule of its plan says instead."""
        overrides = {
            key: value for key in ("bits", "group_size", "symmetric") if (value := getattr(rule, key)) is not None
        }
        return self.model_copy(update=overrides)

    def options(self) -> dict[str, Any]:
        """The spec as plain values without what does not apply, for the quant card and for display."""
        kept = self.model_dump(mode="json", exclude_none=True)
        if self.method in LIBRARIES:
            del kept["symmetric"]  # the library's format decides that
        if self.method != "hqq":
            del kept["backend"]  # hqq alone has two
        if self.calibration is not None and self.calibration.source != "corrupted-in-domain":
            del kept["calibration"]["noise"], kept["calibration"]["severity"]
        if self.plan:
            kept["plan"] = [rule.model_dump(mode="json", exclude_defaults=True) for rule in self.plan]
            del kept["components"]
        else:
            del kept["plan"]
        return {"name": self.name, "method": "none"} if self.is_full_precision else kept


def _expand(declaration: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One mapping per combination of the list-valued bits and group_size; the name is filled from them."""
    axes = {key: declaration[key] for key in ("bits", "group_size") if isinstance(declaration.get(key), list)}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        yield {**declaration, **chosen, "name": declaration["name"].format(**chosen)}


@cache
def named_specs() -> dict[str, QuantSpec]:
    """Every spec that ships with Bitquake, by name, in the order of the tables."""
    found: dict[str, QuantSpec] = {}
    folder = resources.files(__package__) / "specs"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            for values in _expand(yaml.safe_load(file.read_text(encoding="utf-8"))):
                if values["name"] in found:
                    raise QuantSpecError(f"quantization specs: {values['name']!r} is declared twice ({file.name})")
                found[values["name"]] = _validated(values, file.name)
    return found


def list_specs() -> list[str]:
    """Names of the specs that ship with Bitquake."""
    return list(named_specs())


def _validated(values: Mapping[str, Any], where: str) -> QuantSpec:
    try:
        return QuantSpec.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                known = _fields_at(key)
                message = f"unknown key{_suggest(key.rpartition('.')[2], list(known))}; known: {', '.join(known)}"
            problems.append(f"{key}: {message}" if key else message)
        raise QuantSpecError(f"quantization spec {where!r}: {'; '.join(problems)}") from error


def _fields_at(key: str) -> list[str]:
    """Keys that the mapping around ``key`` knows."""
    section = key.split(".")[0] if "." in key else ""
    nested: dict[str, type[Options]] = {**OPTIONS, "calibration": CalibrationSpec, "plan": PlanRule}
    return list(nested.get(section, QuantSpec).model_fields)


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _overridden(base: QuantSpec, overrides: list[str], where: str) -> QuantSpec:
    values: dict[str, Any] = base.model_dump(exclude_none=True)
    seen: set[str] = set()
    for item in overrides:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise QuantSpecError(f"quantization spec {where!r}: expected key=value after ':', got {item!r}")
        if key in seen:
            raise QuantSpecError(f"quantization spec {where!r}: {key} is given twice; give it once")
        if key == "name":
            raise QuantSpecError(
                f"quantization spec {where!r}: the name is made of the overrides; leave name out, or use a YAML file"
            )
        seen.add(key)
        target = values
        *parents, leaf = key.split(".")
        for parent in parents:
            nested = target.get(parent)
            target[parent] = dict(nested) if isinstance(nested, Mapping) else {}
            target = target[parent]
        try:
            target[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise QuantSpecError(f"quantization spec {where!r}: {item!r} has no readable value") from error
    values["name"] = ":".join([base.name, *map(_without_folders, sorted(overrides))])
    return _validated(values, where)


def _without_folders(override: str) -> str:
    """A name stands in reports, which show nobody's folders."""
    key, _, value = override.partition("=")
    return f"{key}={Path(value).name or value}" if key == "calibration.data" else override


def _from_file(path: Path) -> QuantSpec:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantSpecError(f"quantization spec file {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QuantSpecError(f"quantization spec file {str(path)!r} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise QuantSpecError(f"quantization spec file {str(path)!r}: expected one mapping, got {type(values).__name__}")
    return _validated({"name": path.stem, **values}, str(path))


def load_spec(spec: str | Mapping[str, Any] | QuantSpec | None) -> QuantSpec:
    """Read a quantization spec.

    Args:
        spec: a name (``rtn-int4-g64``), a name with overrides (``rtn-int3-g64:components=vision+language``,
            ``hqq-int3-g64:hqq.iterations=40:execution=packed``), a YAML file's path (with overrides too), a mapping of
            ``QuantSpec``'s keys, a ``QuantSpec``, or None, ``""`` and ``none`` for full precision.

    Raises:
        QuantSpecError: unknown name (with the nearest one and the list), unknown key, or a value that cannot be.
    """
    if isinstance(spec, QuantSpec):
        return spec
    if isinstance(spec, Mapping):
        return _validated({"name": "inline", **spec}, str(spec.get("name", "inline")))
    text = (spec or "").strip()
    base, *overrides = text.split(":")
    if base in ("", "none"):
        base = FULL_PRECISION
    if base.endswith((".yaml", ".yml")) or "/" in base:
        found = _from_file(Path(base).expanduser())
    elif base in named_specs():
        found = named_specs()[base]
    else:
        names = list_specs()
        raise QuantSpecError(
            f"unknown quantization spec {base!r}{_suggest(base, names)}; known: {', '.join(names)}; "
            "or give the path of a YAML file"
        )
    return _overridden(found, overrides, text) if overrides else found
