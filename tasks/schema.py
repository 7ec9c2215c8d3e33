"""What a family file may say: the model behind ``family.schema.json``, and every check that needs the file alone."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from bitquake.envelope import CONFIDENCES as GENERATED
from bitquake.metrics import METRICS
from bitquake.noise import SEVERITIES, NoiseSpec
from bitquake.records import Protocol

from .scoring.choice import LETTERS
from .scoring.grounding import BoxFormat, Space
from .variants import CLEAN, chosen_noises, group_of, groups, why_reserved

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

DEFAULT_CONFIDENCE = {
    "vqa": "joint",
    "choice": "options",
    "grounding": "box_joint",
    "caption": "geometric_mean",
    "retrieval": "candidates",
    "stock": "joint",
}
CONFIDENCES = (*GENERATED, "options", "box_joint", "box_geometric_mean", "box_minimum", "candidates")
"""What may be a headline confidence; see ``bitquake.envelope``."""
COLUMNS_NEEDED = {
    "vqa": ("question", "answers"),
    "choice": ("question", "choices", "answer"),
    "grounding": ("question", "box"),
    "caption": ("captions",),
    "retrieval": ("captions",),
    "stock": (),
}
ONLY_FOR = {"max_choices": "choice", "annotators": "vqa", "box_format": "grounding", "candidates": "retrieval"}
"""Keys that mean something to one protocol only."""
STOCK_DECIDES = ("text", "prompts", "max_new_tokens", "explode")
"""Keys that a family with ``extends`` cannot have: the stock task's own hold."""
_FIELD = re.compile(r"\{(\w*)\}")
FIELD_OF_PATTERN = re.compile(r"\{(\w+)(?::0(\d{1,2})d)?\}")
"""``{column}``, or ``{column:012d}`` for an integer with leading zeros."""
IMAGE_COLUMN = "image"
"""The column that ``dataset.image`` makes."""
TABLES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
"""Ending of a file in ``dataset.files`` that is no parquet -> its form."""


class FamilyError(ValueError):
    """A family file, or a dataset that does not have what its family file says."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Model):
    """Where the rows come from: a dataset of the hub, files, or a dataset that was built on this machine.

    path, name, revision: as for ``datasets.load_dataset``; files: split -> parquet, JSON, JSONL or CSV file, relative
    to the folder of the family file, or of the installed Python ``package``; fields: names of the columns of a JSON
    list of lists (of a CSV without header); image: where the pictures of such a table are, relative to its folder, as
    ``images/{image_id}.png`` or ``{image_id:012d}.jpg``: makes the column ``image``; prepared: what ``bitquake data
    prepare`` was told to build, one parquet file for each split; id: what records and noise seeds call the dataset
    (default: the hub's path and name, else the family's name).
    """

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    files: dict[str, str] | None = None
    package: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    fields: Annotated[list[str], Field(min_length=1)] | None = None
    image: str | None = None
    prepared: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] | None = None
    id: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if sum(source is not None for source in (self.path, self.files, self.prepared)) != 1:
            raise ValueError(
                "give either `path` (a dataset of the hub), `files` (split -> parquet, JSON, JSONL or CSV file), or "
                "`prepared` (the name of one that `bitquake data prepare` builds)"
            )
        if self.path is None and (self.name or self.revision):
            raise ValueError("`name` and `revision` belong to a dataset of the hub (`path`) only")
        wanted = [key for key in ("package", "fields", "image") if getattr(self, key) is not None]
        for split, file in (self.files or {}).items():
            ending = file[file.rfind(".") :].lower()
            if ending not in (".parquet", *TABLES):
                raise ValueError(f"files.{split}: {file!r} ends with none of .parquet, {', '.join(TABLES)}")
            if wanted and ending == ".parquet":
                raise ValueError(f"`{wanted[0]}` belongs to JSON, JSONL and CSV files; {file!r} is parquet")
            if self.package is not None and (file.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", file)):
                raise ValueError(f"files.{split}: {file!r} must lie in the folder of the package {self.package!r}")
        if wanted and self.files is None:
            raise ValueError(f"`{wanted[0]}` belongs to `files`")
        return self

    @field_validator("image")
    @classmethod
    def _pattern_of_columns(cls, image: str | None) -> str | None:
        if image is not None:
            rest = FIELD_OF_PATTERN.sub("", image)
            if rest == image or "{" in rest or "}" in rest:
                raise ValueError("expected a path with columns in braces, as images/{image_id}.png or {id:012d}.jpg")
            if image.startswith("/") or ".." in re.split(r"[/\\]", image) or "\\" in image:
                raise ValueError("expected a path inside the table's folder, with / and without ..")
        return image

    @field_validator("fields")
    @classmethod
    def _distinct_fields(cls, fields: list[str] | None) -> list[str] | None:
        return None if fields is None else _distinct(fields, "field")


class Split(_Model):
    """A split of the dataset, or a part of one.

    part: the images whose hash, as a number in [0, 1), lies in [low, high); where: column -> the values that rows must
    have one of; ids: instead of ``part``, a JSON file beside the family file with a list of sample ids (a published
    split).
    """

    split: str
    part: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None
    where: dict[str, Annotated[list[str | int | bool], Field(min_length=1)]] = Field(default_factory=dict)
    ids: Annotated[str, Field(pattern=r"^[^/\\]+\.json$")] | None = None

    @field_validator("part")
    @classmethod
    def _rising(cls, part: tuple[float, float] | None) -> tuple[float, float] | None:
        if part is not None and part[0] >= part[1]:
            raise ValueError("expected [low, high] with low < high")
        return part

    @model_validator(mode="after")
    def _part_or_ids(self) -> Split:
        if self.part is not None and self.ids is not None:
            raise ValueError("give either `part` or `ids`, which replaces it")
        return self

    def shares_images(self, other: Split) -> bool:
        """Whether the two may hold the same image, as far as can be told without the data and the lists of ids."""
        if self.split != other.split:
            return False
        if self.ids is not None and other.ids is not None:
            return False
        a, b = self.part or (0.0, 1.0), other.part or (0.0, 1.0)
        return self.ids is not None or other.ids is not None or (a[0] < b[1] and b[0] < a[1])


def _as_split(value: Any) -> Any:
    return {"split": value} if isinstance(value, str) else value


AnySplit = Annotated[Split, BeforeValidator(_as_split)]


ROLES = ("test", "threshold", "calibration", "dev")
"""What a split is for; see ``Splits``."""


class Splits(_Model):
    """test: what is reported; threshold: what thresholds are fitted on; calibration: what quantizers may see; dev: what
    a Selector learns from.

    They must not share an image; parts of one split must not overlap. A split's name alone may stand for it.
    """

    test: AnySplit
    threshold: AnySplit
    calibration: AnySplit | None = None
    dev: AnySplit | None = None

    @model_validator(mode="after")
    def _disjoint(self) -> Splits:
        given = self.roles()
        for i, (role, one) in enumerate(given):
            for other_role, other in given[i + 1 :]:
                if one.shares_images(other):
                    raise ValueError(f"{role} and {other_role} share images: {_take_both(one, other)}")
        return self

    def roles(self) -> list[tuple[str, Split]]:
        """(role, split) for each that is given."""
        return [(role, split) for role in ROLES if (split := getattr(self, role))]


class Train(Split):
    """What models are trained on: rows that no task evaluates.

    dataset: another dataset with the same columns, whose split it is (default: the family's own); pictures: block
    world: so many are drawn, when they are first wanted, instead of read.
    """

    split: str = "train"
    dataset: Dataset | None = None
    pictures: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Train:
        if self.pictures is not None and (self.dataset is not None or self.part or self.ids or self.where):
            raise ValueError("pictures are drawn: give no `dataset`, `part`, `where` or `ids` with `pictures`")
        if self.ids is not None:
            raise ValueError("give `part` or `where`; a list of `ids` is for splits that tasks evaluate")
        return self


class Columns(_Model):
    """The dataset's column for each thing that is needed.

    answers: list of texts, or of mappings with the key ``answer`` (vqa); choices: list of texts, answer: index of the
    right one from 0, hint: text (choice); box: four numbers (grounding); captions: list of texts (caption, retrieval).
    question is not needed where ``text.template`` has no ``{question}``. sample_id and image_id default to hashes of
    the row's content and of its pixels; width and height (of the picture) are read from the picture by default.
    """

    image: str = "image"
    question: str | None = "question"
    answers: str | None = None
    choices: str | None = None
    answer: str | None = None
    hint: str | None = None
    box: str | None = None
    captions: str | None = None
    sample_id: str | None = None
    image_id: str | None = None
    width: str | None = None
    height: str | None = None


class QuestionText(_Model):
    """How the question is written, before ``pre_prompt`` and ``post_prompt`` are put around it.

    template: text with ``{question}``, ``{hint}`` and ``{choices}``; hint: how a hint that is not empty is written,
    with ``{hint}``; option: how one choice is written, with ``{letter}`` and ``{choice}``; separator: between choices;
    case: ``capitalize`` writes the question's first letter large and all others small, as ``str.capitalize`` does.
    """

    template: str = "{question}"
    hint: str = "{hint}"
    option: str = "{letter}. {choice}"
    separator: str = "\n"
    case: Literal["as_is", "capitalize"] = "as_is"

    @model_validator(mode="after")
    def _known_fields(self) -> QuestionText:
        allowed = {"template": {"question", "hint", "choices"}, "hint": {"hint"}, "option": {"letter", "choice"}}
        for key, known in allowed.items():
            unknown = [name for name in _FIELD.findall(getattr(self, key)) if name not in known]
            if unknown:
                names = ", ".join(f"{{{name}}}" for name in sorted(known))
                raise ValueError(f"{key}: unknown field {{{unknown[0]}}}; known: {names}")
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
    """Which noises become task variants: every one at every severity.

    names: ``all``, or a list of noises and of groups of them (``imagenet_c``: the standard study; ``imagenet_c_extra``,
    ``camera``, ``text``); ``all`` and groups leave out what the family cannot have; mode (of image noises): ``native``
    or ``scaled``; seed: the suite's seed; subset: what noisy variants run on (default: the whole test split, and no
    ``_full`` tasks).
    """

    names: Literal["all"] | list[str] = "all"
    severities: list[int] = list(SEVERITIES)
    mode: Literal["native", "scaled"] = "native"
    seed: int = Field(default=0, ge=0)
    subset: Subset | None = None

    @field_validator("names")
    @classmethod
    def _known_names(cls, names: Any) -> Any:
        # What the family itself cannot have is its own matter.
        chosen_noises(names, boxes=False, question=True)
        return names

    @field_validator("severities")
    @classmethod
    def _known_severities(cls, severities: list[int]) -> list[int]:
        for severity in severities:
            if severity not in SEVERITIES:
                raise ValueError(
                    f"noises have severities {SEVERITIES[0]} to {SEVERITIES[-1]} (integers), not {severity}"
                )
        return _distinct(severities, "severity")


class Shift(Split):
    """Other rows of the same dataset: the task ``<family>_<name>``.

    shift_from: the variant that is in distribution for these rows (``clean`` or another shift's name). None: these rows
    are in distribution themselves; they then get a task ``<family>_<name>_threshold`` of the rows in ``threshold``
    (default: the same ``where`` on the family's threshold split).
    """

    shift_from: str | None = "clean"
    threshold: AnySplit | None = None


class Variants(_Model):
    """Variants beside ``<family>_clean`` and ``<family>_threshold``, which every family has, and ``<family>_dev``."""

    noise: NoiseVariants | None = None
    shifts: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], Shift] = Field(default_factory=dict)

    @field_validator("shifts")
    @classmethod
    def _consistent_shifts(cls, shifts: dict[str, Shift]) -> dict[str, Shift]:
        for name, shift in shifts.items():
            reason = why_reserved(name)
            if reason is not None:
                raise ValueError(f"{name!r} {reason}; give the shift another name")
            origin = shift.shift_from
            if shift.threshold is not None and (origin is not None or shift.threshold.ids is not None):
                raise ValueError(f"{name}: threshold: only with shift_from: null, and without `ids`")
            if origin is None or origin == CLEAN:
                continue
            if origin == name or origin not in shifts:
                others = [CLEAN, *(other for other, one in shifts.items() if one.shift_from is None and other != name)]
                raise ValueError(f"{name}: shift_from {origin!r} is no other variant; name one of {', '.join(others)}")
            if shifts[origin].shift_from is not None:
                raise ValueError(
                    f"{name}: shift_from {origin!r} is shifted itself; name what that one is shifted from, or give "
                    f"{origin!r} the value null"
                )
        return shifts


class Candidates(_Model):
    """What a picture's own caption is ranked against: ``n - 1`` captions of other pictures, drawn by ``seed``."""

    n: int = Field(default=100, ge=2)
    seed: int = Field(default=0, ge=0)


class Extends(_Model):
    """A stock task of lmms-eval whose dataset, prompt and scorer a family takes over.

    task: its name; score: the metric of its results that is a sample's score (``metric``, or ``metric.key`` where that
    is a mapping); scale: what that metric calls a perfect sample (1, or 100); options: instead of ``score``, where no
    metric has a number for one sample (MMBench): the columns that hold an option's text each, scored by the protocol
    ``choice`` against ``columns.answer`` (a letter, or an index from 0).
    """

    task: str
    score: str | None = None
    scale: float = Field(default=1.0, gt=0)
    options: list[str] = Field(default_factory=list, max_length=len(LETTERS))

    @model_validator(mode="after")
    def _score_or_options(self) -> Extends:
        if (self.score is None) == (not self.options):
            raise ValueError("give either `score`, a metric of the task, or `options`, the columns of lettered options")
        return self


class Family(_Model):
    """One benchmark and its variants; see CONTRIBUTING for an example.

    Attributes:
        family: name; tasks are called ``<family>_clean``, ``<family>_threshold``, ``<family>_<noise>_<severity>``, and
            with a split ``dev`` ``<family>_dev``.
        title, source, license: for people.
        version: rises when prompts, splits or scoring change, so that old and new results are told apart.
        world: ``block`` for the offline block world, else ``real``; the two never share a table.
        train: what models are trained on.
        protocol: ``vqa``, ``choice``, ``grounding``, ``caption`` or ``retrieval``; ``stock`` with ``extends``.
        text, prompts: how the question is written; ``prompts`` has an entry ``default`` and one for each
            ``model_type`` of transformers that wants another one.
        max_new_tokens: token limit of an answer.
        max_choices: choice: the most options that a row has (each needs a letter).
        annotators: vqa: number of reference answers that each row must have.
        box_format: grounding: how the dataset writes boxes.
        coordinates: grounding: space in which a model answers, under ``default`` and by ``model_type``.
        explode: a column that holds a list: each of its entries becomes a row of its own (grounding: one expression).
        candidates: retrieval: what captions are ranked against.
        extends: a stock task of lmms-eval to take dataset, prompt and scorer from, instead of ``dataset`` and
            ``protocol``.
        shift_from: the task of another family that is in distribution for this family's (``vqav2_clean`` for AdVQA).
        tags: further tags for the clean, threshold and shift tasks.
        text_only_rows: rows without an image are questions without one, not failures.
        confidence: the headline confidence (default: joint for vqa and stock, options for choice, box_joint for
            grounding, geometric_mean for caption, candidates for retrieval).
        metrics: what stands in lmms-eval's results table.
    """

    family: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str = ""
    source: str = ""
    license: str = ""
    version: int = Field(default=1, ge=1)
    world: Literal["block", "real"] = "real"
    dataset: Dataset | None = None
    splits: Splits
    train: Train | None = None
    columns: Columns = Columns()
    protocol: Protocol
    extends: Extends | None = None
    text: QuestionText = QuestionText()
    prompts: dict[str, Prompt] = Field(default_factory=lambda: {"default": Prompt()})
    max_new_tokens: int = Field(default=16, ge=1)
    max_choices: int = Field(default=8, ge=2, le=len(LETTERS))
    annotators: int = Field(default=10, ge=1)
    box_format: BoxFormat = "xywh"
    coordinates: dict[str, Space] = Field(default_factory=dict)
    explode: str | None = None
    candidates: Candidates | None = None
    shift_from: Annotated[str, Field(pattern=r"^([a-z][A-Za-z0-9_]*)?$")] = ""
    tags: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]] = Field(default_factory=list)
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

    @field_validator("tags")
    @classmethod
    def _distinct_tags(cls, tags: list[str]) -> list[str]:
        return _distinct(tags, "tag") if tags else tags

    @field_validator("confidence")
    @classmethod
    def _known_confidence(cls, confidence: str | None) -> str | None:
        if confidence is not None and confidence not in CONFIDENCES:
            raise ValueError(f"unknown confidence {confidence!r}; known: {', '.join(CONFIDENCES)}")
        return confidence

    @model_validator(mode="after")
    def _consistent(self) -> Family:
        if (self.dataset is None) == (self.extends is None):
            raise ValueError("give either `dataset` or `extends`")
        if (self.protocol == "stock") != (self.extends is not None):
            raise ValueError("protocol: 'stock' belongs to `extends`, and only to it")
        if self.protocol == "retrieval" and self.candidates is None:
            raise ValueError("candidates: needed with the protocol 'retrieval', for example {n: 100}")
        for key, protocol in ONLY_FOR.items():
            if key in self.model_fields_set and self.protocol != protocol:
                raise ValueError(
                    f"{key}: belongs to the protocol {protocol!r}, this one is {self.protocol!r}; remove it"
                )
        if self.extends is not None:
            for key in STOCK_DECIDES:
                if key in self.model_fields_set:
                    raise ValueError(f"{key}: with `extends` the stock task's own holds; remove it")
            if self.extends.options and self.columns.answer is None:
                raise ValueError("columns.answer is missing: extends.options are scored against it")
            if "question" not in self.columns.model_fields_set:
                self._without_question()
        elif "{question}" not in self.text.template:
            if "question" in COLUMNS_NEEDED[self.protocol]:
                raise ValueError("text.template: must contain {question}")
            self._without_question()
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
        if self.dataset is not None and self.dataset.files is not None:
            shifts = {f"variants.shifts.{name}": shift for name, shift in self.variants.shifts.items()}
            fitted = {f"{place}.threshold": shift.threshold for place, shift in shifts.items() if shift.threshold}
            roles = {f"splits.{role}": split for role, split in self.splits.roles()}
            for place, split in (roles | shifts | fitted).items():
                if split.split not in self.dataset.files:
                    known = ", ".join(self.dataset.files)
                    raise ValueError(f"{place}: dataset.files has no split {split.split!r}; it has {known}")
        self._check_train()
        declared = self.columns.model_dump(exclude_none=True)
        if self.explode is not None and self.explode not in [
            column for key, column in declared.items() if key not in ("image", "image_id", "sample_id")
        ]:
            raise ValueError(f"explode: {self.explode!r} is none of the columns that `columns` names")
        self.check_shifts()
        if self.variants.noise is not None:
            try:
                self._noise_names()
            except ValueError as error:
                raise ValueError(f"variants.noise.names: {error}") from None
        return self

    def _check_train(self) -> None:
        train = self.train
        if train is None or train.dataset is not None:
            return
        if train.pictures is not None:
            if self.world != "block":
                raise ValueError("train.pictures: only the block world's pictures are drawn")
            return
        files = None if self.dataset is None else self.dataset.files
        if files is not None and train.split not in files:
            raise ValueError(f"train: dataset.files has no split {train.split!r}; it has {', '.join(files)}")
        apart: dict[str, Split] = {**dict(self.splits.roles()), **self.variants.shifts}
        for place, split in apart.items():
            if train.shares_images(split):
                raise ValueError(f"train: shares images with {place}: {_take_both(train, split)}")

    def check_shifts(self) -> None:
        """Raise ValueError where a shift holds images that thresholds or Selectors are fitted on or quantizers see."""
        for name, shift in self.variants.shifts.items():
            for role, split in self.splits.roles():
                if role != "test" and shift.shares_images(split):
                    raise ValueError(f"variants.shifts.{name}: shares images with {role}: {_take_both(shift, split)}")
            if shift.threshold is None:
                continue
            apart: dict[str, Split] = {name: shift}
            apart |= {other: one for other, one in self.variants.shifts.items() if one.shift_from == name}
            apart |= {role: split for role, split in self.splits.roles() if role in ("calibration", "dev")}
            for other, one in apart.items():
                if one.shares_images(shift.threshold):
                    both = _take_both(one, shift.threshold)
                    raise ValueError(f"variants.shifts.{name}.threshold: shares images with {other}: {both}")

    def _without_question(self) -> None:
        object.__setattr__(self, "columns", self.columns.model_copy(update={"question": None}))

    def _noise_names(self) -> list[str]:
        wanted = self.variants.noise
        assert wanted is not None
        question = self.columns.question is not None
        return chosen_noises(wanted.names, boxes=self.protocol == "grounding", question=question)

    @property
    def dataset_id(self) -> str:
        """What records and noise seeds call the dataset."""
        if self.dataset is None:
            assert self.extends is not None
            return f"lmms-eval/{self.extends.task}"
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
        return [
            NoiseSpec(name, severity, seed=wanted.seed, mode="native" if group_of(name) == "text" else wanted.mode)
            for name in self._noise_names()
            for severity in wanted.severities
        ]


def json_schema() -> str:
    """The published JSON schema of a family file (``family.schema.json``), as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Family.model_json_schema()
    # What a validator turns into a mapping, a file may write short.
    for role in ROLES:
        split = schema["$defs"]["Splits"]["properties"][role]
        split.setdefault("anyOf", [{"$ref": split.pop("$ref")}] if "$ref" in split else [])
        split["anyOf"].append({"type": "string"})
    # What validators check against lists of ours, so that editors complete it.
    by_group = groups()
    noise = schema["$defs"]["NoiseVariants"]["properties"]
    names = {"enum": [*by_group, *(name for names in by_group.values() for name in names)]}
    noise["names"]["anyOf"][1] |= {"items": names, "minItems": 1, "uniqueItems": True}
    noise["severities"] |= {"items": {"enum": list(SEVERITIES)}, "minItems": 1, "uniqueItems": True}
    schema["$defs"]["Variants"]["properties"]["shifts"]["additionalProperties"] = False
    usable = [key for key, metric in METRICS.items() if not metric.needs_threshold_split]
    schema["properties"]["metrics"] |= {"items": {"enum": usable}, "minItems": 1, "uniqueItems": True}
    schema["properties"]["confidence"]["anyOf"][0] |= {"enum": list(CONFIDENCES)}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def fill(template: str, values: dict[str, str]) -> str:
    """Put values for ``{name}``; nothing else in the template or in a value has a meaning."""
    return _FIELD.sub(lambda match: values[match[1]], template)


def _take_both(one: Split, other: Split) -> str:
    if one.ids is not None or other.ids is not None:
        return f"both take {one.split!r}, and one of them has `ids`; give both `ids`"
    return (
        f"both take {one.split!r}; give each another split, or parts that do not overlap "
        "(part: [0.0, 0.5] and part: [0.5, 1.0])"
    )


def _distinct(values: list[Any], what: str) -> list[Any]:
    repeated = [value for i, value in enumerate(values) if value in values[:i]]
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} is named twice")
    if not values:
        raise ValueError(f"expected at least one {what}")
    return values
