"""What an expanded task says about itself under ``metadata: {bitquake: {…}}`` of its YAML.

``bitquake.tasks.expand`` writes it, ``bitquake.tasks.glue`` scores by it, and the model wrapper reads from it what
depends on the model: whether an envelope is wanted, the option letters, the prompt of each architecture.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bitquake.records import Protocol

from .families import Columns, Family, Prompt, QuestionText, Splits, Subset
from .scoring.choice import LETTERS
from .scoring.grounding import BoxFormat, Space

THRESHOLD = "threshold"
CLEAN = "clean"


class TaskContract(BaseModel):
    """One family's part of the metadata, shared by all its tasks.

    envelope: answers are wanted as ``bitquake.envelope`` texts; letters, options_field: choice only: option i of the
    row's list ``options_field`` has ``letters[i]``; default_prompt: what ``doc_to_text`` puts around a question;
    prompts: what a ``model_type`` of transformers wants around it instead. The rest is as in the family file.
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
    text_only_rows: bool = False
    confidence: str
    metrics: list[str]
    noise_subset: Subset | None = None

    @classmethod
    def of(cls, family: Family) -> TaskContract:
        """The contract of a family's tasks."""
        choice = family.protocol == "choice"
        return cls(
            envelope=True,
            family=family.family,
            world=family.world,
            dataset=family.dataset_id,
            splits=family.splits,
            columns=family.columns,
            protocol=family.protocol,
            text=family.text,
            letters=list(LETTERS[: family.max_choices]) if choice else [],
            options_field=family.columns.choices if choice else None,
            default_prompt=family.prompts["default"],
            prompts={name: prompt for name, prompt in family.prompts.items() if name != "default"},
            annotators=family.annotators,
            box_format=family.box_format,
            coordinates=dict(family.coordinates),
            text_only_rows=family.text_only_rows,
            confidence=family.primary_confidence,
            metrics=list(family.metrics),
            noise_subset=family.variants.noise.subset if family.variants.noise else None,
        )
