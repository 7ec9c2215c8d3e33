"""Answers of another engine, scored as lmms-eval would have scored them: the task's own rows, references and protocol.

The dataset is loaded as lmms-eval loads it and made ready by the task's own ``process_docs``; each answer then goes
through the task's ``record`` inside an envelope, as an answer of our wrappers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import datasets

from bitquake.envelope import Envelope
from bitquake.records import SampleRecord

from .documents import IDS
from .families import FamilyError
from .glue import Task
from .rows import find_task, load_rows
from .variants import DEV


class TaskRows(NamedTuple):
    """A task with its rows, in lmms-eval's order; pictures are left out where scoring needs none."""

    task: Task
    rows: datasets.Dataset

    @property
    def sample_ids(self) -> list[str]:
        return [row["sample_id"] for row in self.rows.select_columns([IDS])[:][IDS]]

    def score(self, answers: dict[str, Envelope]) -> Iterator[SampleRecord]:
        """The records of the rows that have an answer, in the order of the rows."""
        for place, sample_id in enumerate(self.sample_ids):
            if sample_id in answers:
                yield self.task.record(self.rows[place], answers[sample_id].encode())


def rows_of(name: str) -> TaskRows:
    """A registered task's rows.

    Raises:
        FamilyError: there is no such task, a text cannot answer it, or its dataset is not there or not as declared.
    """
    try:
        task = find_task(name)
    except FamilyError as error:
        hint = "questions of your own: --scored, with a score for each answer"
        raise FamilyError(f"{error} ({hint})") from error
    if task.contract.protocol == "retrieval":
        raise FamilyError(f"{name}: retrieval ranks a model's scores of candidates; a table of answers has none")
    if task.variant == DEV:
        raise FamilyError(f"{name}: these samples are for Selectors, which learn from features; a table has none")
    rows = load_rows(task)
    if task.contract.extends is None:  # a stock scorer may look at the picture
        pictures = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        rows = rows.remove_columns(pictures)
    return TaskRows(task, rows)
