"""From submissions to runs: every score computed from the submitted answer and the pinned gold file.

What comes out are the runs of `bitquake.reports`, so that pairing, intervals and pages are those of a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitquake.leaderboard.boards import Board, BoardTask, load_board
from bitquake.leaderboard.findings import refuse
from bitquake.leaderboard.submission import RECORDS_FILE, Row, Submission, TaskEntry
from bitquake.reports.runs import Answer, Cell, Run, public_subject
from bitquake.tasks.scoring.gold import Gold, GoldError, gold_path, read_gold, score_against_gold

_NO_SCORES: Mapping[str, float] = {}


@dataclass
class GoldFolder:
    """The gold files of boards, each read once, and only where its hash is the one that the board pins.

    folder: holds ``<task>.jsonl.zst``, or one folder of these for each board; None where there are none.
    """

    folder: Path | None
    _read: dict[tuple[str, str], Gold | None] = field(default_factory=dict)

    def of(self, board: Board, task: BoardTask) -> Gold | None:
        """A task's references; None where no hash is pinned or no file is there.

        Raises:
            GoldError: the file is damaged, or is not the pinned one.
        """
        key = (board.board, task.task)
        if key not in self._read:
            file = None if self.folder is None or task.gold is None else gold_file(self.folder, board.board, task.task)
            table = None if file is None else read_gold(file, task.gold)
            if table is not None and (table.header.task, table.header.n) != (task.task, task.n):
                held = f"{table.header.n} samples of {table.header.task}"
                raise GoldError(f"{file}: holds {held}, board {board.board} wants {task.n} of {task.task}; pin another")
            self._read[key] = table
        return self._read[key]

    def missing(self, board: Board) -> list[str]:
        """Tasks of a board that cannot be recomputed, without reading a file."""
        return [
            task.task
            for task in board.tasks
            if task.gold is None or self.folder is None or gold_file(self.folder, board.board, task.task) is None
        ]


def gold_file(folder: Path, board: str, task: str) -> Path | None:
    """A task's gold file: the board's own, or one that stands for all boards; None where neither is there."""
    places = (gold_path(folder / board, task), gold_path(folder, task))
    return next((place for place in places if place.is_file()), None)


def load_runs(submissions: Sequence[Submission], gold: Path | None, *, boards: Path | None = None) -> list[Run]:
    """Each submission as a run, in the order given; scores come from the gold files.

    Args:
        submissions: validated ones.
        gold: folder of the gold files, see ``GoldFolder``.
        boards: folder of board files; None: those of the package.

    Raises:
        GoldError: a gold file of a board is missing, damaged or not the pinned one.
        SubmissionError: a submission that does not fit its board: it was not validated.
    """
    references = GoldFolder(gold)
    runs = []
    for submission in submissions:
        board = load_board(submission.manifest.board, boards)
        tables = {task.task: references.of(board, task) for task in board.tasks}
        if missing := sorted(task for task, table in tables.items() if table is None):
            raise GoldError(
                f"board {board.board}: no pinned gold file of {missing[0]} (and {len(missing) - 1} more tasks); "
                "build them with `bitquake leaderboard gold`, or validate first: this submission is self-reported"
            )
        runs.append(run_of(submission, submission.rows(), tables))
    return runs


def run_of(submission: Submission, rows: Iterable[Row], tables: Mapping[str, Gold | None]) -> Run:
    """One submission as a run; without a task's gold table, its scores are 0 and its image ids empty.

    Raises:
        SubmissionError: an answer that no record can hold, or a sample that the gold file does not know.
    """
    manifest = submission.manifest
    cells = {task: _cell(submission, task, entry) for task, entry in sorted(manifest.tasks.items())}
    for row in rows:
        if row.task in cells:
            _add(cells[row.task], row, tables.get(row.task), submission)
    for cell in cells.values():
        cell.failures = dict(sorted(cell.failures.items()))
    return Run(
        model_hash=manifest.model_hash,
        card_hash=manifest.card_hash,
        card=submission.card,
        label=public_subject(submission.card),
        cells=cells,
        commands=sorted(manifest.commands),
    )


def _cell(submission: Submission, task: str, entry: TaskEntry) -> Cell:
    return Cell(
        task=task,
        family=entry.family,
        variant=entry.variant,
        world=entry.world,
        protocol=entry.protocol,
        dataset=entry.dataset,
        dataset_revision=entry.dataset_revision,
        split=entry.split,
        part=entry.part,
        subset=entry.subset,
        shift_from=entry.shift_from,
        noise=None if entry.noise is None else dict(entry.noise),
        confidence_name=entry.primary_confidence,
        source=submission.name,
        answers={},
        expected=entry.n,
        settings=dict(entry.settings),
        failures={},
        failure_details={},
        parse_failures=0,
        truncated=0,
        duplicates=0,
    )


def _add(cell: Cell, row: Row, table: Gold | None, submission: Submission) -> None:
    failed = row.failure is not None
    image, score, scores, unparsed = "", 0.0, _NO_SCORES, row.parse_failure is not None
    if table is not None:
        try:
            found = score_against_gold(table, row.id, row.answer, failed=failed)
        except GoldError as error:
            known = row.id in table.samples
            code, what = ("answer-form", str(error)) if known else ("ids-foreign", "the gold file has no such sample")
            where = f"{submission.name}/{RECORDS_FILE}: {row.task}"
            raise refuse(code, where, what, got=row.id, fix="submit what the run answered") from error
        image, score, scores = table.samples[row.id].image, found.score, found.scores
        unparsed = found.parse_failure
    confidence = None if failed else row.confidence.get(cell.confidence_name)
    cell.answers[row.id] = Answer(
        image_id=image,
        score=score,
        scores=scores,
        confidence=confidence,
        pixels=row.pixels,
        prompt=row.prompt,
        failed=failed,
        parse_failure=unparsed,
        confidences={
            name: value
            for name, value in sorted(row.confidence.items())
            if value is not None and name != cell.confidence_name and not failed
        },
    )
    if row.failure is not None:
        cell.failures[row.failure] = cell.failures.get(row.failure, 0) + 1
    cell.parse_failures += unparsed
    cell.truncated += row.truncated is not None
