"""A task family: one YAML file that names a dataset, its columns, a scoring protocol and the variants it wants.

The file holds data only. :class:`Family` is its schema (published as ``family.schema.json``), ``load_family`` reads one
file with errors that say what, where, what was got and how to fix it, and ``bitquake.tasks.expand`` turns families into
ordinary lmms-eval task files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitquake.metrics import METRICS
from bitquake.noise import SEVERITIES, NoiseError, NoiseSpec, image_noises
from bitquake.records import Protocol

from .scoring.choice import LETTERS
from .scoring.grounding import BoxFormat, Space
from .strict_yaml import load_strict

FAMILY_FILE = "family.yaml"
BUILT_IN = Path(__file__).parent / "families"
PACKAGE = Path(__file__).parent

DEFAULT_METRICS = (
    "accuracy",
    "ece_15",
    "ece_mass_15",
    "brier",
    "auroc",
    "aurc",
    "coverage_at_risk_1",
    "coverage_at_risk_5",
    "coverage_at_risk_10",
    "coverage_at_risk_20",
)
"""What one task's samples allow; effective reliability needs a second task's (``<family>_threshold``)."""

DEFAULT_CONFIDENCE = {"vqa": "joint", "choice": "options", "grounding": "box_joint"}
COLUMNS_NEEDED = {
    "vqa": ("question", "answers"),
    "choice": ("question", "choices", "answer"),
    "grounding": ("question", "box"),
}
_FIELD = re.compile(r"\{(\w*)\}")


class FamilyError(ValueError):
    """A family file, or a dataset that does not have what its family file says."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Model):
    """Where the rows come from: a dataset of the hub, or parquet files.

    path, name, revision: as for ``datasets.load_dataset``; files: split -> parquet file, relative to the folder of the
    family file, else to the package ``bitquake.tasks``; id: what records and noise seeds call the dataset (default: the
    hub's path and name, or the family's name for files).
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    files: dict[str, str] | None = None
    id: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if (self.path is None) == (self.files is None):
            raise ValueError("give either `path` (a dataset of the hub) or `files` (split -> parquet file)")
        if self.files is not None and (self.name or self.revision):
            raise ValueError("`name` and `revision` belong to a dataset of the hub (`path`), not to `files`")
        return self


class Split(_Model):
    """A split of the dataset, or a part of one: the images whose hash, as a number in [0, 1), lies in [low, high)."""

    split: str
    part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None

    @field_validator("part")
    @classmethod
    def _rising(cls, part: tuple[float, float] | None) -> tuple[float, float] | None:
        if part is not None and part[0] >= part[1]:
            raise ValueError("expected [low, high] with low < high")
        return part


def _as_split(value: Any) -> Any:
    return {"split": value} if isinstance(value, str) else value


AnySplit = Annotated[Split, BeforeValidator(_as_split)]


class Splits(_Model):
    """test: what is reported; threshold: what thresholds are fitted on; calibration: what quantizers may see.

    They must not share an image; parts of one split must not overlap. A split's name alone may stand for it.
    """

    test: AnySplit
    threshold: AnySplit
    calibration: AnySplit | None = None

    @model_validator(mode="after")
    def _disjoint(self) -> Splits:
        given = [(role, split) for role in ("test", "threshold", "calibration") if (split := getattr(self, role))]
        for i, (role, one) in enumerate(given):
            for other_role, other in given[i + 1 :]:
                a, b = one.part or (0.0, 1.0), other.part or (0.0, 1.0)
                if one.split == other.split and a[0] < b[1] and b[0] < a[1]:
                    raise ValueError(
                        f"{role} and {other_role} share images: both take {one.split!r}; "
                        "give each another split, or parts that do not overlap (part: [0.0, 0.5])"
                    )
        return self


class Columns(_Model):
    """The dataset's column for each thing that is needed.

    answers: list of texts, or of mappings with the key ``answer`` (vqa); choices: list of texts, answer: index of the
    right one from 0, hint: text (choice); box: four numbers (grounding). sample_id and image_id default to hashes of
    the row's content and of its pixels; width and height (of the picture) are read from the picture by default.
    """

    image: str = "image"
    question: str = "question"
    answers: str | None = None
    choices: str | None = None
    answer: str | None = None
    hint: str | None = None
    box: str | None = None
    sample_id: str | None = None
    image_id: str | None = None
    width: str | None = None
    height: str | None = None


class QuestionText(_Model):
    """How the question is written, before ``pre_prompt`` and ``post_prompt`` are put around it.

    template: text with ``{question}``, ``{hint}`` and ``{choices}``; hint: how a hint that is not empty is written,
    with ``{hint}``; option: how one choice is written, with ``{letter}`` and ``{choice}``; separator: between choices.
    """

    template: str = "{question}"
    hint: str = "{hint}"
    option: str = "{letter}. {choice}"
    separator: str = "\n"

    @model_validator(mode="after")
    def _known_fields(self) -> QuestionText:
        allowed = {"template": {"question", "hint", "choices"}, "hint": {"hint"}, "option": {"letter", "choice"}}
        for key, known in allowed.items():
            unknown = [name for name in _FIELD.findall(getattr(self, key)) if name not in known]
            if unknown:
                names = ", ".join(f"{{{name}}}" for name in sorted(known))
                raise ValueError(f"{key}: unknown field {{{unknown[0]}}}; known: {names}")
        if "{question}" not in self.template:
            raise ValueError("template: must contain {question}")
        return self


class Prompt(_Model):
    """Text before and after the question."""

    pre_prompt: str = ""
    post_prompt: str = ""


class Subset(_Model):
    """A fixed, seeded choice of whole images, cut at ``n`` questions."""

    n: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)


class NoiseVariants(_Model):
    """Which corruptions become task variants: every name at every severity.

    names: ``all`` or a list; mode: ``native`` or ``scaled``; seed: the suite's seed; subset: what noisy variants run on
    (default: the whole test split).
    """

    names: Literal["all"] | list[str] = "all"
    severities: list[int] = list(SEVERITIES)
    mode: Literal["native", "scaled"] = "native"
    seed: int = Field(default=0, ge=0)
    subset: Subset | None = None

    @field_validator("names")
    @classmethod
    def _known_names(cls, names: Any) -> Any:
        if names == "all":
            return names
        for name in names:
            _checked_noise({"name": name, "severity": 1})
        return _distinct(names, "noise")

    @field_validator("severities")
    @classmethod
    def _known_severities(cls, severities: list[int]) -> list[int]:
        for severity in severities:
            _checked_noise({"name": next(iter(image_noises())), "severity": severity})
        return _distinct(severities, "severity")


class Variants(_Model):
    """Variants beside ``<family>_clean`` and ``<family>_threshold``, which every family has."""

    noise: NoiseVariants | None = None


class Family(_Model):
    """One benchmark and its variants; see CONTRIBUTING for an example.

    Attributes:
        family: name; tasks are called ``<family>_clean``, ``<family>_threshold``, ``<family>_<noise>_<severity>``.
        title, source, license: for people.
        version: rises when prompts, splits or scoring change, so that old and new results are told apart.
        world: ``block`` for the offline block world, else ``real``; the two never share a table.
        protocol: ``vqa``, ``choice`` or ``grounding``.
        text, prompts: how the question is written; ``prompts`` has an entry ``default`` and one for each
            ``model_type`` of transformers that wants another one.
        max_new_tokens: token limit of an answer.
        max_choices: choice: the most options that a row has (each needs a letter).
        annotators: vqa: number of reference answers that each row must have.
        box_format: grounding: how the dataset writes boxes.
        coordinates: grounding: space in which a model answers, under ``default`` and by ``model_type``.
        text_only_rows: rows without an image are questions without one, not failures.
        confidence: the headline confidence (default: joint, options, box_joint for vqa, choice, grounding).
        metrics: what stands in lmms-eval's results table.
    """

    family: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str = ""
    source: str = ""
    license: str = ""
    version: int = Field(default=1, ge=1)
    world: Literal["block", "real"] = "real"
    dataset: Dataset
    splits: Splits
    columns: Columns
    protocol: Protocol
    text: QuestionText = QuestionText()
    prompts: dict[str, Prompt] = Field(default_factory=lambda: {"default": Prompt()})
    max_new_tokens: int = Field(default=16, ge=1)
    max_choices: int = Field(default=8, ge=2, le=len(LETTERS))
    annotators: int = Field(default=10, ge=1)
    box_format: BoxFormat = "xywh"
    coordinates: dict[str, Space] = Field(default_factory=dict)
    text_only_rows: bool = False
    confidence: str | None = None
    metrics: list[str] = list(DEFAULT_METRICS)
    variants: Variants = Variants()

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: list[str]) -> list[str]:
        usable = [key for key, metric in METRICS.items() if not metric.needs_threshold_split]
        for key in metrics:
            if key not in usable:
                raise ValueError(f"unknown metric {key!r} for one task's samples; known: {', '.join(usable)}")
        return _distinct(metrics, "metric")

    @model_validator(mode="after")
    def _consistent(self) -> Family:
        for need in COLUMNS_NEEDED[self.protocol]:
            if getattr(self.columns, need) is None:
                raise ValueError(f"columns.{need} is missing: the protocol {self.protocol!r} needs it")
        if "default" not in self.prompts:
            raise ValueError("prompts: the entry `default` is missing")
        if (self.protocol == "grounding") != bool(self.coordinates):
            raise ValueError("coordinates: needed with the protocol 'grounding', and only there")
        if self.coordinates and "default" not in self.coordinates:
            raise ValueError("coordinates: the entry `default` is missing")
        if (self.protocol == "choice") != ("{choices}" in self.text.template):
            raise ValueError("text.template: {choices} must stand in it with the protocol 'choice', and only there")
        if "{hint}" in self.text.template and self.columns.hint is None:
            raise ValueError("text.template: {hint} needs columns.hint")
        if self.dataset.files is not None:
            for role in ("test", "threshold", "calibration"):
                split = getattr(self.splits, role)
                if split is not None and split.split not in self.dataset.files:
                    raise ValueError(f"splits.{role}: dataset.files has no split {split.split!r}")
        noise = self.variants.noise
        if self.protocol == "grounding" and noise is not None and noise.names != "all":
            for name in noise.names:
                if image_noises()[name].geometry == "changed":
                    raise ValueError(f"variants.noise.names: {name} moves things in the picture, boxes would be wrong")
        return self

    @property
    def dataset_id(self) -> str:
        """What records and noise seeds call the dataset."""
        if self.dataset.id:
            return self.dataset.id
        if self.dataset.path is None:
            return self.family
        return f"{self.dataset.path}/{self.dataset.name}" if self.dataset.name else self.dataset.path

    @property
    def primary_confidence(self) -> str:
        return self.confidence or DEFAULT_CONFIDENCE[self.protocol]

    def noises(self) -> list[NoiseSpec]:
        """The noisy variants, in order of name and severity."""
        wanted = self.variants.noise
        if wanted is None:
            return []
        known = image_noises()
        if wanted.names == "all":
            still = [name for name, noise in known.items() if noise.geometry == "preserved"]
            names = still if self.protocol == "grounding" else list(known)
        else:
            names = list(wanted.names)
        return [
            NoiseSpec(name=name, severity=severity, seed=wanted.seed, mode=wanted.mode)
            for name in names
            for severity in wanted.severities
        ]


class Loaded(NamedTuple):
    """A family and the file it was read from."""

    family: Family
    file: Path

    def data_file(self, name: str) -> Path:
        """A path of ``dataset.files``: relative ones count from the family file's folder, else from the package."""
        beside = self.file.parent / name
        return beside.resolve() if beside.exists() else (PACKAGE / name).resolve()


def load_family(file: Path) -> Loaded:
    """Read one family file.

    Raises:
        FamilyError: not readable, not plain YAML, or not a family; every problem in it is named, one a line.
    """
    try:
        data = load_strict(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FamilyError(f"{file}: cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise FamilyError(f"{file}: not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise FamilyError(f"{file}: expected a mapping that begins with `family: name`, got {type(data).__name__}")
    try:
        return Loaded(Family.model_validate(data), file)
    except ValidationError as error:
        raise FamilyError("\n".join(f"{file}: {problem}" for problem in _problems(error))) from error


def family_files(folders: Iterable[Path] = ()) -> list[Path]:
    """The family files of the package, then of the given folders (``FOLDER/family.yaml``, ``FOLDER/*/family.yaml``).

    Raises:
        FamilyError: a folder does not exist, or holds no family file.
    """
    found: list[Path] = []
    for folder in (BUILT_IN, *folders):
        here = [file for file in (folder / FAMILY_FILE, *sorted(folder.glob(f"*/{FAMILY_FILE}"))) if file.is_file()]
        if not here:
            what = f"holds no {FAMILY_FILE}, nor does a folder in it" if folder.is_dir() else "is no folder"
            raise FamilyError(f"{folder}: {what}; name the folder of a family, or one that holds such folders")
        found += here
    return found


def load_families(folders: Iterable[Path] = ()) -> tuple[list[Loaded], list[str]]:
    """All families of :func:`family_files`, and what is wrong with the others; one broken file never hides the rest."""
    loaded: dict[str, Loaded] = {}
    problems: list[str] = []
    for file in family_files(folders):
        try:
            one = load_family(file)
        except FamilyError as error:
            problems += str(error).splitlines()
            continue
        first = loaded.setdefault(one.family.family, one)
        if first is not one:
            problems.append(f"{file}: family: {one.family.family!r} is taken by {first.file}; give it another name")
    return list(loaded.values()), problems


def json_schema() -> str:
    """The published JSON schema of a family file (``family.schema.json``), as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Family.model_json_schema()
    # What a validator turns into a mapping, a file may write short.
    for role in ("test", "threshold", "calibration"):
        split = schema["$defs"]["Splits"]["properties"][role]
        split.setdefault("anyOf", [{"$ref": split.pop("$ref")}] if "$ref" in split else [])
        split["anyOf"].append({"type": "string"})
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def fill(template: str, values: dict[str, str]) -> str:
    """Put values for ``{name}``; nothing else in the template or in a value has a meaning."""
    return _FIELD.sub(lambda match: values[match[1]], template)


def _problems(error: ValidationError) -> list[str]:
    out = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"] if part not in ("literal['all']", "list[str]"))
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown key; remove it or check its spelling"
        elif problem["type"] == "missing":
            what = "this key is missing; add it"
        got = problem["input"]
        shown = "" if problem["type"] == "missing" or isinstance(got, dict | BaseModel) else f" (got {got!r})"
        out.append(f"{where}: {what}{shown}" if where else f"{what}{shown}")
    return out


def _checked_noise(mapping: dict[str, Any]) -> None:
    try:
        NoiseSpec.from_mapping(mapping)
    except NoiseError as error:
        raise ValueError(str(error).removeprefix("noise.")) from error


def _distinct(values: list[Any], what: str) -> list[Any]:
    repeated = [value for i, value in enumerate(values) if value in values[:i]]
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} is named twice")
    if not values:
        raise ValueError(f"expected at least one {what}")
    return values
