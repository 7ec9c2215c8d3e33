"""What an expanded task says about itself under ``metadata: {bitquake: {…}}`` of its YAML.

``bitquake.tasks.expand`` writes it, ``bitquake.tasks.glue`` scores by it, and the model wrapper reads from it what
depends on the model: whether an envelope is wanted, the option letters, the prompt of each architecture.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bitquake.records import Protocol

from .families import Candidates, Columns, Extends, Family, Prompt, QuestionText, Shift, Splits, Subset
from .scoring.choice import LETTERS
from .scoring.grounding import BoxFormat, Space
from .scoring.retrieval import recall_name, recalls_of
from .sources import Source

CANDIDATES = "bitquake_candidates"
"""Column that ``process_docs`` adds for retrieval: the row's candidate captions, a list of texts."""
OPTIONS = "bitquake_options"
"""Column that ``process_docs`` adds where ``extends.options`` names the options' columns: the row's options, a list."""
PROTOCOL_SCORES: dict[Protocol, tuple[str, ...]] = {
    "vqa": ("reliable_vqa", "lmms_eval"),
    "choice": ("strict", "lenient", "letter"),
    "grounding": ("iou",),
    "caption": ("cider",),
    "retrieval": (),
    "stock": (),
}
"""Protocol -> its further scores: keys of a record's ``scores``, and lines of lmms-eval's results table."""


def protocol_scores(protocol: Protocol, candidates: Candidates | None, extends: Extends | None) -> list[str]:
    """The further scores of a family; retrieval's say in their names among how many they rank."""
    if protocol == "retrieval" and candidates is not None:
        return [*(recall_name(k, candidates.n) for k in recalls_of(candidates.n)), "reciprocal_rank"]
    if extends is not None and extends.options:
        return list(PROTOCOL_SCORES["choice"])
    return list(PROTOCOL_SCORES[protocol])


class TaskContract(BaseModel):
    """One family's part of the metadata, shared by all its tasks.

    envelope: answers are wanted as ``bitquake.envelope`` texts; letters, options_field: for lettered choices: option i
    of the row's list ``options_field`` has ``letters[i]``; candidates_field: retrieval only: the row's list of texts
    that the wrapper scores; default_prompt: what ``doc_to_text`` puts around a question; prompts: what a ``model_type``
    of transformers wants around it instead; sources: split -> the table that its parquet file is made from, where there
    is one. The rest is as in the family file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    envelope: Literal[True]
    family: str
    world: Literal["block", "real"]
    dataset: str
    splits: Splits
    columns: Columns
    protocol: Protocol
    text: QuestionText
    letters: list[str] = Field(default_factory=list)
    options_field: str | None = None
    default_prompt: Prompt = Prompt()
    prompts: dict[str, Prompt] = Field(default_factory=dict)
    annotators: int
    box_format: BoxFormat
    coordinates: dict[str, Space] = Field(default_factory=dict)
    explode: str | None = None
    candidates: Candidates | None = None
    candidates_field: str | None = None
    extends: Extends | None = None
    sources: dict[str, Source] = Field(default_factory=dict)
    shift_from: str = ""
    shifts: dict[str, Shift] = Field(default_factory=dict)
    text_only_rows: bool = False
    confidence: str
    metrics: list[str]
    noise_subset: Subset | None = None

    @classmethod
    def of(cls, family: Family) -> TaskContract:
        """The contract of a family's tasks."""
        options = family.columns.choices if family.protocol == "choice" else None
        letters = family.max_choices if options is not None else 0
        if family.extends is not None and family.extends.options:
            options, letters = OPTIONS, len(family.extends.options)
        return cls(
            envelope=True,
            family=family.family,
            world=family.world,
            dataset=family.dataset_id,
            splits=family.splits,
            columns=family.columns,
            protocol=family.protocol,
            text=family.text,
            letters=list(LETTERS[:letters]),
            options_field=options,
            default_prompt=family.prompts["default"],
            prompts={name: prompt for name, prompt in family.prompts.items() if name != "default"},
            annotators=family.annotators,
            box_format=family.box_format,
            coordinates=dict(family.coordinates),
            explode=family.explode,
            candidates=family.candidates,
            candidates_field=CANDIDATES if family.protocol == "retrieval" else None,
            extends=family.extends,
            shift_from=family.shift_from,
            shifts=dict(family.variants.shifts),
            text_only_rows=family.text_only_rows,
            confidence=family.primary_confidence,
            metrics=list(family.metrics),
            noise_subset=family.variants.noise.subset if family.variants.noise else None,
        )
