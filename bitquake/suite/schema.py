"""What a suite file may say: the model behind ``suite.schema.json``, and every check that needs the file alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bitquake.model_wrappers.quantizers.spec import FULL_PRECISION
from bitquake.suite_plan import Page

AS_TRAINED = "as-trained"
"""The quantization of a trained model: whatever its training made."""
OWN = "own"
"""The calibration source that a spec itself names."""
SET_BY_THE_SUITE = (
    *("pretrained", "revision", "quant", "artifacts", "journal", "noise_cache", "noise_cache_gb", "device", "selector"),
)
"""Arguments of ``bitquake_hf`` that a suite file gives elsewhere, or that belong to the machine that runs it."""
TWIN_KEYS = ("block", "suite")
"""Top-level keys that the block-world twin cannot replace."""

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
_NAME_OR_TEMPLATE = r"^[A-Za-z0-9{][A-Za-z0-9._+{}-]*$"
Name = Annotated[str, Field(pattern=_NAME)]
Level = str | int | float
Grid = dict[Name, Annotated[list[Level], Field(min_length=1)]]
"""Factor -> its levels."""
Arguments = dict[str, str | int | float | bool]
SelectorKind = Literal["own", "transfer", "mixture"]


class SuiteError(ValueError):
    """A suite file that cannot be read, or that asks for what cannot be."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _number(value: Any) -> Any:
    try:  # YAML 1.1 reads 7e9 as a text
        return float(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else value
    except ValueError:
        return value


Number = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]


class Quantization(_Part):
    """A quantization, or a grid of them. A text alone is its ``name``.

    Attributes:
        name: how cells and tables call it; without ``spec`` also what ``quant=`` would take.
        spec: keys of a quantization spec, or what ``quant=`` takes; default ``name``.
        grid: factor -> its levels: an entry for every combination. ``{factor}`` in ``name`` and in texts of ``spec`` is
            the level; bits that come out as 16 leave their rule of the plan, or the whole spec, at full precision.
        factors: further factors, of one level each, that the analysis of a grid counts.
    """

    name: str = Field(min_length=1)
    spec: str | dict[str, Any] | None = None
    grid: Grid | None = None
    factors: dict[Name, Level] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Quantization:
        _check_grid(self.grid, self.factors)
        return self


class Calibration(_Part):
    """What calibrated methods see. A text alone is the name of a source; ``own`` leaves it to each spec.

    Attributes:
        name: how cells and tables call it; default the source's.
        source, samples, data, noise, severity: as of a spec's ``calibration``; what is not given stays the spec's.
    """

    name: Name
    source: Literal["text", "noise", "self", "caption", "in-domain", "corrupted-in-domain"] | None = None
    samples: int | None = Field(default=None, ge=1)
    data: str | None = None
    noise: str | None = None
    severity: int | None = Field(default=None, ge=1, le=5)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value} if value == OWN else {"name": value, "source": value}
        if isinstance(value, dict) and "name" not in value and isinstance(value.get("source"), str):
            return {"name": value["source"], **value}
        return value

    @model_validator(mode="after")
    def _own_alone(self) -> Calibration:
        given = self.model_dump(exclude_none=True, exclude={"name"})
        if self.name == OWN and given:
            raise ValueError(f"own is what each spec says and takes no further keys, got {', '.join(given)}")
        if self.name != OWN and self.source is None:
            raise ValueError("source: is missing; say which data, as source: caption")
        return self


class Task(_Part):
    """A task, or a tag, which stands for its tasks. A text alone is its ``name``.

    Attributes:
        limit: only the first so many samples; default the suite's ``limit``; ``all``: no limit, whatever the suite has.
        samples: of a task whose size only its dataset tells: what the estimates count with.
    """

    name: str = Field(min_length=1)
    limit: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    samples: int | None = Field(default=None, ge=1)


NamedTask = Annotated[Task, BeforeValidator(_named)]
NamedQuantization = Annotated[Quantization, BeforeValidator(_named)]


class Model(_Part):
    """A checkpoint, or one that is trained first; with a grid, several.

    Attributes:
        name: how cells and tables call it.
        pretrained, revision: as of ``bitquake_hf``; of a trained model, what the training begins with.
        parameters: how many, for the estimate of memory where the checkpoint is not on this machine.
        arguments: further ``model_args``, over the suite's.
        training: configuration of ``bitquake train``, over the suite's; its ``pretrained`` and ``revision`` are this
            entry's.
        grid, factors: as of a quantization: an entry for every combination; ``{factor}`` in ``name``, ``twin`` and
            texts of ``training`` is the level.
        quantizations: instead of the suite's; a trained model's are ``as-trained`` (the default) and specs for it.
        tasks: instead of the suite's.
        twin: the model entry whose full-precision (or as-trained) cell is the control; default this entry's own.
    """

    name: Annotated[str, Field(pattern=_NAME_OR_TEMPLATE)]
    grid: Grid | None = None
    factors: dict[Name, Level] = Field(default_factory=dict)
    pretrained: str = Field(min_length=1)
    revision: str | None = None
    parameters: Number | None = None
    arguments: Arguments = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    quantizations: Annotated[list[NamedQuantization], Field(min_length=1)] | None = None
    tasks: Annotated[list[NamedTask], Field(min_length=1)] | None = None
    twin: Annotated[str, Field(pattern=_NAME_OR_TEMPLATE)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        _check_grid(self.grid, self.factors)
        names = [one.name for one in self.quantizations or []]
        if self.training is None and AS_TRAINED in names:
            raise ValueError(f"quantizations: {AS_TRAINED} is for models with training; this one has none")
        if self.training is not None and FULL_PRECISION in names:
            raise ValueError(f"quantizations: of a trained model {AS_TRAINED} is what the training made; write that")
        if self.twin == self.name:
            raise ValueError("twin: is the entry itself; leave it out")
        return self


class Exclusion(_Part):
    """Cells to leave out: every key given must match. Shell patterns (``*-int2-*``), and a number for ``seed``."""

    model: str | None = None
    quantization: str | None = None
    calibration: str | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Exclusion:
        if not self.model_dump(exclude_none=True):
            raise ValueError("is empty and would leave out everything; give model, quantization, calibration or seed")
        return self


class Suite(_Part):
    """One study: which models, how quantized, calibrated and seeded, answer which tasks.

    Attributes:
        suite: name, which is the file's too.
        title, description: for people; the study page shows them.
        page: which study page is made of the results.
        published: ids of published tables that are shown beside them.
        models, quantizations, calibration, seeds, tasks: every combination that makes sense is a cell. Calibration
            concerns calibrated methods only, seeds these and trained models; full precision is always there.
        seeds: of calibration and training; default those that the specs and trainings say.
        limit: only the first so many samples of each task that has no limit of its own.
        exclude: cells to leave out; a line that matches none is an error.
        arguments: further ``model_args``.
        training: what the trainings of all trained models have in common; an entry's own keys go before.
        selectors: learned confidences that are fitted on the ``*_dev`` tasks and added to the answers.
        selector_mixture: names of the quantizations that the mixture's Selector is fitted on.
        minutes: after which a cell is given up; what it answered until then is kept for the next try.
        block: the suite's twin in the block world: these keys replace those above.
    """

    suite: Name
    title: str = Field(min_length=1)
    description: str = ""
    page: Page
    published: list[str] = Field(default_factory=list)
    models: Annotated[list[Model], Field(min_length=1)]
    quantizations: Annotated[list[NamedQuantization], Field(min_length=1)] = Field(
        default_factory=lambda: [Quantization(name=FULL_PRECISION)]
    )
    calibration: Annotated[list[Calibration], Field(min_length=1)] = Field(
        default_factory=lambda: [Calibration(name=OWN)]
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    tasks: Annotated[list[NamedTask], Field(min_length=1)]
    limit: int | None = Field(default=None, ge=1)
    exclude: list[Exclusion] = Field(default_factory=list)
    arguments: Arguments = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    selectors: list[SelectorKind] = Field(default_factory=list)
    selector_mixture: list[str] = Field(default_factory=list)
    minutes: Number | None = None
    block: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        _once("models", [one.name for one in self.models])
        _once("calibration", [one.name for one in self.calibration])
        _once("seeds", [str(seed) for seed in self.seeds or []])
        _once("selectors", self.selectors)
        _once("published", self.published)
        if ("mixture" in self.selectors) != bool(self.selector_mixture):
            raise ValueError("selector_mixture: belongs to selectors: [mixture]; give both or neither")
        for name, arguments in (("arguments", self.arguments), *((one.name, one.arguments) for one in self.models)):
            if taken := [key for key in arguments if key in SET_BY_THE_SUITE]:
                raise ValueError(
                    f"arguments: {taken[0]} (of {name}) is not an argument of a suite: checkpoint and quantization "
                    "have their own keys, folders and devices are options of `bitquake run`"
                )
            if odd := [key for key, value in arguments.items() if isinstance(value, str) and set(value) & set(",=")]:
                raise ValueError(f"arguments: {odd[0]}: lmms-eval cannot read a value with a comma or an equals sign")
        return self


def _check_grid(grid: Grid | None, factors: dict[str, Level]) -> None:
    if grid is not None and not grid:
        raise ValueError("grid: is empty; give a factor with its levels, as bits: [8, 4], or leave grid out")
    for factor, levels in (grid or {}).items():
        if len({str(level) for level in levels}) < len(levels):
            raise ValueError(f"grid: {factor} has a level twice ({', '.join(map(str, levels))}); name each once")
    if both := sorted(set(grid or {}) & set(factors)):
        raise ValueError(f"factors: {both[0]} is in the grid already; take it out of one of them")
    if reserved := sorted({"model", "quantization", "calibration", "seed"} & {*(grid or {}), *factors}):
        raise ValueError(f"{reserved[0]} is a factor of every suite by itself; give this one another name")


def _once(key: str, names: Sequence[str]) -> None:
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{key}: {twice[0]!r} is named twice; give each once")


def json_schema() -> str:
    """The published JSON schema of a suite file (``suite.schema.json``), as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Suite.model_json_schema()
    # What a validator turns into a mapping, a file may write short.
    for owner in (schema, schema["$defs"]["Model"]):
        for key in ("quantizations", "tasks", "calibration"):
            for array in _arrays(owner["properties"].get(key, {})):
                array["items"] = {"anyOf": [array["items"], {"type": "string", "minLength": 1}]}
    for key, number in (("parameters", schema["$defs"]["Model"]), ("minutes", schema)):
        for one in number["properties"][key]["anyOf"]:
            if one.get("type") == "number":
                number["properties"][key]["anyOf"].append({"type": "string", "pattern": r"^[0-9.]+([eE]\+?[0-9]+)?$"})
                break
    # The name of a calibration defaults to its source.
    schema["$defs"]["Calibration"] |= {"required": [], "anyOf": [{"required": ["name"]}, {"required": ["source"]}]}
    properties = {key: value for key, value in schema["properties"].items() if key not in TWIN_KEYS}
    schema["properties"]["block"]["anyOf"][0] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {key: {"$ref": f"#/properties/{key}"} for key in properties},
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _arrays(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in (node, *node.get("anyOf", [])) if one.get("type") == "array"]
