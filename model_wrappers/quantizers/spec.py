"""What a quantization is: ``QuantSpec``, and how a name, an override, a file or a mapping becomes one. Torch-free."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Component = Literal["vision", "connector", "language"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
BITS = (2, 3, 4, 8)
FULL_PRECISION = "full-precision"


class QuantSpecError(ValueError):
    """A quantization spec that does not exist or cannot be."""


class HqqOptions(BaseModel):
    """Options of HQQ (papers.md section 4). ``axis`` 1: groups run along the input features, as in the packed format.

    Attributes:
        iterations: most half-quadratic steps (a fixed point ends them).
        p: norm of the shrinkage, 0 < p <= 1.
        beta: its strength, > 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    axis: int = 1
    iterations: int = Field(default=20, ge=1, le=1000)
    p: float = Field(default=0.7, gt=0.0, le=1.0)
    beta: float = Field(default=10.0, gt=0.0)

    @field_validator("axis")
    @classmethod
    def _axis_is_representable(cls, axis: int) -> int:
        if axis != 1:
            raise ValueError(f"only axis 1 (groups along the input features) fits the packed format, got axis {axis}")
        return axis


class QuantSpec(BaseModel):
    """One quantization, as asked for. What was really done stands in the quant card.

    Attributes:
        name: how tables call it.
        method: ``none`` (full precision), ``rtn`` or ``hqq``.
        backend: ``own`` solver, or for hqq the ``hqq`` library's (its integers are stored in our packed format).
        bits: bits of an integer code.
        group_size: consecutive input features that share a scale; a row's last group may be shorter, and a group
            longer than the row is the row.
        symmetric: codes around 0 without a zero-point (rtn only).
        components: which parts' Linear modules are quantized; lm_head, embeddings and norms never are.
        execution: ``simulated`` holds the de-quantized weight in the model's dtype, ``packed`` the low-bit codes.
        hqq: options of HQQ; absent for other methods.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    method: Literal["none", "rtn", "hqq"]
    backend: Literal["own", "hqq"] = "own"
    bits: int | None = None
    group_size: int | None = Field(default=None, gt=0)
    symmetric: bool = False
    components: tuple[Component, ...] = ("language",)
    execution: Literal["simulated", "packed"] = "simulated"
    hqq: HqqOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        if isinstance(filled.get("components"), str):  # "vision+language", the form that fits into model_args
            filled["components"] = [part.strip() for part in filled["components"].split("+")]
        if filled.get("method") == "none":
            filled.setdefault("components", [])
        elif filled.get("method") == "hqq" and filled.get("hqq") is None:
            filled["hqq"] = {}
        return filled

    @field_validator("components")
    @classmethod
    def _in_standard_order(cls, components: tuple[Component, ...]) -> tuple[Component, ...]:
        return tuple(c for c in COMPONENTS if c in components)

    @model_validator(mode="after")
    def _consistent(self) -> QuantSpec:
        if self.method == "none":
            given = [key for key in ("bits", "group_size", "hqq") if getattr(self, key) is not None] + [
                key for key in ("components", "symmetric") if getattr(self, key)
            ]
            if given or self.backend != "own" or self.execution != "simulated":
                raise ValueError(f"method none quantizes nothing and takes no further keys, got {given or 'others'}")
            return self
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group_size is None:
            raise ValueError(f"method {self.method} needs a group_size, for example 64")
        if not self.components:
            raise ValueError(f"components is empty; name at least one of {', '.join(COMPONENTS)}")
        if self.method != "hqq" and (self.hqq is not None or self.backend != "own"):
            raise ValueError(f"backend and hqq options belong to method hqq, not to {self.method}")
        if self.method == "hqq" and self.symmetric:
            raise ValueError("hqq fits a zero-point and cannot be symmetric; use method rtn or symmetric: false")
        if self.backend == "hqq":
            if self.group_size % 8:
                raise ValueError(f"the hqq library needs a group_size that is a multiple of 8, got {self.group_size}")
            if self.hqq != HqqOptions():
                raise ValueError("the hqq library runs with its own defaults; leave hqq options out or use backend own")
        return self

    @property
    def is_full_precision(self) -> bool:
        """True when nothing is quantized."""
        return self.method == "none"

    def options(self) -> dict[str, Any]:
        """The spec as plain values without what does not apply, for the quant card and for display."""
        kept = self.model_dump(mode="json", exclude_none=True)
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
                known = HqqOptions.model_fields if key.startswith("hqq.") else QuantSpec.model_fields
                message = f"unknown key{_suggest(key.rpartition('.')[2], list(known))}; known: {', '.join(known)}"
            problems.append(f"{key}: {message}" if key else message)
        raise QuantSpecError(f"quantization spec {where!r}: {'; '.join(problems)}") from error


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _overridden(base: QuantSpec, overrides: list[str], where: str) -> QuantSpec:
    values: dict[str, Any] = base.model_dump(exclude_none=True)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise QuantSpecError(f"quantization spec {where!r}: expected key=value after ':', got {item!r}")
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
    values["name"] = ":".join([base.name, *sorted(overrides)])
    return _validated(values, where)


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
    if text in ("", "none"):
        text = FULL_PRECISION
    base, *overrides = text.split(":")
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
