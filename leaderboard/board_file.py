"""The board as data: what ``board.json`` and a model's own file hold, and what the pages are made from.

Numbers are those of `bitquake.reports.schema`, computed from the answers; a run's id is its submission's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from bitquake.reports.schema import Report, RunEntry

BOARD_FILE_VERSION = 1

Level = Literal["self-reported", "recomputed", "reproduced"]
SAME_SCORES = 0.99
"""Share of samples on which a reproduction scores what the original does: kernels of other machines flip a few."""
LEVELS: dict[Level, str] = {
    "self-reported": "no gold file is pinned for its tasks, so nobody could recompute it: its figures are not shown",
    "recomputed": "every figure was computed by the board from the submitted answers and the pinned gold files",
    "reproduced": "recomputed, and a second organisation's own run of the same weights gave the same scores on "
    f"{SAME_SCORES:.0%} of the samples or more",
}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SubmissionEntry(_Entry):
    """One submission that stands on a board.

    name: its folder, and the id of its run. twin: the full-precision submission it is compared with, or "". link: an
    http(s) address or "". contact: any text. versions: software by name. files: sha256 by file name.
    """

    name: str
    organisation: str
    model: str
    quantization: str
    twin: str
    level: Level
    link: str = ""
    contact: str = ""
    versions: dict[str, str] = {}
    files: dict[str, str] = {}

    @property
    def page(self) -> str:
        return page_of(self.name)

    @property
    def data(self) -> str:
        return f"model--{self.name}.json"

    @property
    def record(self) -> str:
        """File of its Every-Eval-Ever record."""
        return f"eee--{self.name}.json"


class TaskEntry(_Entry):
    """A task of a board: samples, and the sha256 of its gold file's text, None where none is pinned."""

    task: str
    n: int
    gold: str | None


class BoardEntry(_Entry):
    """One board: its tasks, its submissions, and their numbers without the points of curves and diagrams."""

    board: str
    title: str
    world: Literal["block", "real"]
    about: str
    tasks: list[TaskEntry]
    submissions: list[SubmissionEntry]
    report: Report


class BoardFile(_Entry):
    """``board.json``. n_refused: submissions that were refused; nothing else of them is shown."""

    version: int = BOARD_FILE_VERSION
    generator: str
    source_date: int | None
    """Seconds since 1970 of ``SOURCE_DATE_EPOCH``, or None where it was not set."""
    inputs_digest: str
    n_refused: int
    boards: list[BoardEntry]


class ModelFile(_Entry):
    """``model--….json``: one submission with everything that its page shows, beside its full-precision twin."""

    version: int = BOARD_FILE_VERSION
    generator: str
    board: str
    submission: SubmissionEntry
    twin: SubmissionEntry | None
    report: Report


def page_of(name: str) -> str:
    """The page of a submission."""
    return f"model--{name}.html"


def without_points(report: Report) -> Report:
    """The report without the points of curves, diagrams and mixtures, and without the modules of the quant cards."""
    return report.model_copy(
        update={
            "cells": [cell.model_copy(update={"curve": [], "bins": []}) for cell in report.cells],
            "runs": [_brief(run) for run in report.runs],
            "mixtures": [],
        }
    )


def _brief(run: RunEntry) -> RunEntry:
    if run.card is None:
        return run
    return run.model_copy(update={"card": run.card.model_copy(update={"modules": [], "places": [], "kept": {}})})


def of_runs(report: Report, chosen: Iterable[str]) -> Report:
    """The part of a report that is about some runs."""
    kept = set(chosen)
    return report.model_copy(
        update={
            "runs": [run for run in report.runs if run.id in kept],
            "cells": [cell for cell in report.cells if cell.run in kept],
            "summaries": [entry for entry in report.summaries if entry.run in kept],
            "transfers": [entry for entry in report.transfers if entry.run in kept],
            "interactions": [entry for entry in report.interactions if entry.run in kept],
            "robustness": [entry for entry in report.robustness if entry.run in kept],
            "mixtures": [entry for entry in report.mixtures if entry.run in kept],
            "problems": [],
        }
    )
