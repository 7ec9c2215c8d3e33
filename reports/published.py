"""Numbers of the literature (``published.yaml``): cited table by table, apart from what is measured."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Evidence = Literal["paper", "note", "files"]
EVIDENCE: dict[Evidence, str] = {
    "paper": "Read in the paper.",
    "note": "As a reading note of the paper gives them; not checked against the paper itself.",
    "files": "Read in the result files that the authors published with their code.",
}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Entry):
    """Where a table stands."""

    authors: str
    title: str
    year: Annotated[int, Field(ge=2000, le=2100)]
    url: Annotated[str, Field(pattern=r"^https://")]
    where: str


class PublishedTable(_Entry):
    """A table as it was published; the first column names the row."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    title: str
    caption: str
    evidence: Evidence
    source: Source
    columns: list[str]
    rows: Annotated[list[list[str | float | None]], Field(min_length=1)]
    notes: list[str]

    @model_validator(mode="after")
    def _rectangular(self) -> PublishedTable:
        wrong = [row[0] for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"{self.id}: expected {len(self.columns)} values in each row, not so in {wrong}")
        return self


class Published(_Entry):
    """All tables."""

    tables: list[PublishedTable]

    @model_validator(mode="after")
    def _named_once(self) -> Published:
        names = [table.id for table in self.tables]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tables: {min(twice)!r} stands there twice")
        return self


@cache
def published_numbers() -> Published:
    """The tables of ``published.yaml``."""
    text = resources.files("bitquake.reports").joinpath("published.yaml").read_text(encoding="utf-8")
    return Published.model_validate(yaml.safe_load(text))
