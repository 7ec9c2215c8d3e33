"""Whether a submission's records are all there, belong together, and carry confidences that can be meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from bitquake.leaderboard.boards import Board
from bitquake.leaderboard.findings import Finding, SubmissionError, refuse, shown
from bitquake.leaderboard.submission import MANIFEST_FILE, RECORDS_FILE, Manifest, Row, Submission
from bitquake.metrics import auroc
from bitquake.reports.runs import Cell, Run
from bitquake.tasks.scoring.gold import Gold

CONSTANT_FROM = 20
"""From so many samples on, one single confidence for all of them is no confidence."""
MOST_CONFIDENCES = 16
"""Confidences by different names in one task; each costs a bootstrap of its own."""
ORACLE_AUROC = 0.999
ORACLE_FROM = 20
"""An AUROC above this on so many right and as many wrong answers is no model's: it comes from the gold answers."""
_NO_BOX_OR_LETTER = ("choice", "grounding")
_SOME = 3

Rows = dict[str, list[Row]]


def read_rows(submission: Submission, board: Board) -> Rows:
    """A submission's records by task; no more of them are kept than its board has samples.

    Raises:
        SubmissionError: an unreadable record, one of a foreign task, or not the board's number of samples.
    """
    where = f"{submission.name}/{RECORDS_FILE}"
    found: Rows = {task.task: [] for task in board.tasks}
    sizes = {task.task: task.n for task in board.tasks}
    for row in submission.rows():
        rows = found.get(row.task)
        if rows is None:
            fix = f"submit the tasks of the board {board.board}"
            raise refuse("task-foreign", where, "a task that the board does not have", got=row.task, fix=fix)
        rows.append(row)
        if len(rows) > sizes[row.task]:
            what = f"{row.task} has more samples than the board's {sizes[row.task]}"
            raise refuse("rows-too-many", where, what, got=row.id, fix="submit the board's samples, no others")
    findings = []
    for task, rows in found.items():
        if not rows:
            what = f"{task} is missing: every task of the board is answered, none is picked"
            findings.append(Finding("task-missing", where, what, fix=f"run it with --limit {sizes[task]}"))
        elif len(rows) < sizes[task]:
            what = f"{task} has {len(rows)} of {sizes[task]} samples"
            findings.append(Finding("rows-missing", where, what, fix=f"run it whole, with --limit {sizes[task]}"))
    if findings:
        raise SubmissionError(findings)
    return found


def check_rows(submission: Submission, board: Board, rows: Rows) -> list[Finding]:
    """Findings on what the manifest says of the tasks, on the records' own sense, and on their confidences."""
    manifest, name = submission.manifest, submission.name
    findings = []
    for task in sorted(manifest.tasks.keys() ^ rows.keys()):
        what = f"{shown(task)} is not in both manifest and records"
        findings.append(Finding("task-foreign", f"{name}/{MANIFEST_FILE}: tasks", what, fix="submit the board's tasks"))
    for task, found in rows.items():
        if task in manifest.tasks:
            findings += _facts(manifest, board, task, len(found), f"{name}/{MANIFEST_FILE}: tasks.{task}")
            findings += _records(manifest, board, task, found, f"{name}/{RECORDS_FILE}: {task}")
    return findings


def check_gold(submission: Submission, rows: Rows, tables: Mapping[str, Gold], where: str) -> list[Finding]:
    """Findings on records that are not those of the gold file: other samples, other pictures, other questions."""
    findings = []
    for task, found in rows.items():
        table, place = tables[task], f"{where}: {task}"
        if task in submission.manifest.tasks:  # or else that has been found
            findings += _task_facts(
                submission.manifest, task, table, f"{submission.name}/{MANIFEST_FILE}: tasks.{task}"
            )
        ids = {row.id for row in found}
        for code, what, odd in (
            ("ids-foreign", "samples that the gold file does not have", ids - table.samples.keys()),
            ("ids-missing", "samples of the gold file are missing", table.samples.keys() - ids),
        ):
            if odd:
                fix = "submit the task's first samples, as --limit takes them"
                findings.append(Finding(code, place, f"{len(odd)} {what}", _some(sorted(odd)), fix))
        findings += _seen(found, table, place)
    return findings


def check_oracle(run: Run, where: str) -> list[Finding]:
    """Findings on confidences that separate right from wrong answers better than any model does."""
    findings = []
    for task, cell in sorted(run.cells.items()):
        for name, values in _confidences(cell).items():
            known = [sample for sample, value in values.items() if value is not None]
            right = np.array([cell.answers[sample].score >= 0.5 for sample in known], dtype=float)
            if min(right.sum(), len(right) - right.sum()) < ORACLE_FROM:
                continue
            found = auroc(right, np.array([values[sample] for sample in known], dtype=float))
            if found > ORACLE_AUROC:
                what = (
                    f"the confidence {name} tells right from wrong answers with an AUROC of {found:.4f} on {len(known)}"
                )
                fix = "a confidence may not be a function of the gold answer"
                findings.append(Finding("confidence-oracle", f"{where}: {task}", what, fix=fix))
    return findings


def _confidences(cell: Cell) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {cell.confidence_name: {}}
    for sample, answer in cell.answers.items():
        found[cell.confidence_name][sample] = answer.confidence
        for name, value in answer.confidences.items():
            found.setdefault(name, {})[sample] = value
    return found


def _facts(manifest: Manifest, board: Board, task: str, n: int, where: str) -> list[Finding]:
    entry = manifest.tasks[task]
    noise = entry.noise
    named = entry.variant if noise is None else f"{noise.get('name')}_{noise.get('severity')}"
    found = []
    for field, said, expected in (
        ("n", entry.n, n),
        ("world", entry.world, board.world),
        ("variant", f"{entry.family}_{entry.variant}", task),
        ("noise", entry.variant.removesuffix("_full"), named.removesuffix("_full")),
    ):
        if said != expected:
            what = f"does not fit the records and the board: expected {shown(expected)}"
            found.append(Finding("task-facts", f"{where}.{field}", what, shown(said), "submit what the run says"))
    return found


def _task_facts(manifest: Manifest, task: str, table: Gold, where: str) -> list[Finding]:
    """What the gold file's header says of the task too."""
    found = []
    entry = manifest.tasks[task]
    for field in (
        "family",
        "variant",
        "world",
        "protocol",
        "dataset",
        "split",
        "part",
        "subset",
        "shift_from",
        "noise",
    ):
        said, expected = getattr(entry, field), getattr(table.header, field)
        if said != expected:
            what = f"the gold file says {shown(expected)}"
            found.append(Finding("task-facts", f"{where}.{field}", what, shown(said), "evaluate the board's own task"))
    said, expected = entry.dataset_revision, table.header.dataset_revision
    if said and expected and said != expected:
        what = f"the gold file was built from revision {shown(expected)}"
        found.append(Finding("task-facts", f"{where}.dataset_revision", what, shown(said), "use that revision"))
    return found


def _records(manifest: Manifest, board: Board, task: str, rows: Sequence[Row], where: str) -> list[Finding]:
    entry = manifest.tasks[task]
    primary = entry.primary_confidence
    kept = {primary, *board.confidences}
    odd: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for problem in _row_problems(row, entry.protocol, primary, kept):
            odd.setdefault(problem, []).append(row.id)
    findings = [
        Finding(code, where, f"{len(ids)} records {what}", _some(ids), fix) for (code, what, fix), ids in odd.items()
    ]
    values_of: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.confidence.items():
            if value is not None:
                values_of.setdefault(name, []).append(value)
    if len(values_of) > MOST_CONFIDENCES:
        what = f"the records have {len(values_of)} confidences by different names; {MOST_CONFIDENCES} are allowed"
        findings.append(Finding("confidence-name", where, what, fix="submit what the run recorded"))
        return findings
    for name, values in sorted(values_of.items()):
        if len(values) >= CONSTANT_FROM and len(set(values)) == 1:
            what = f"the confidence {name} is {values[0]:g} for all of {len(values)} answers"
            fix = "submit a confidence of each answer"
            findings.append(Finding("confidence-constant", where, what, fix=fix))
    return findings


def _row_problems(row: Row, protocol: str, primary: str, kept: set[str]) -> Iterable[tuple[str, str, str]]:
    again = "submit what the run recorded"
    foreign = sorted(name for name in row.confidence if name not in kept and not name.startswith("selector"))
    if foreign:
        yield "confidence-name", f"have a confidence {foreign[0]}, which the board does not keep", again
    if row.failure is not None:
        if row.answer is not None or row.parse_failure or any(v is not None for v in row.confidence.values()):
            yield "row-contradiction", "have failed, and an answer or a confidence nevertheless", again
        return
    unread = row.answer is None
    if unread and protocol not in _NO_BOX_OR_LETTER:
        yield "row-contradiction", "have neither an answer nor a failure", again
    elif unread != (row.parse_failure is not None):
        yield "row-contradiction", "say of a missing answer that it was read, or of a read one that it was not", again
    if row.confidence.get(primary) is None and not unread:
        what = f"have an answer but not its confidence {primary}"
        yield "confidence-missing", what, "no answer may be left out of the ranking"


def _seen(rows: Sequence[Row], table: Gold, where: str) -> list[Finding]:
    """Records whose picture or question is not the sample's; those of another sample are called swapped."""
    others: dict[tuple[str, str], list[str]] = {}
    for sample, gold in table.samples.items():
        others.setdefault((gold.pixels, gold.question), []).append(sample)
    swapped, pixels, questions = [], [], []
    for row in rows:
        known = table.samples.get(row.id)
        if known is None or (row.failure is not None and not row.pixels and not row.question):
            continue
        other_pixels = row.pixels != known.pixels and (
            table.header.exact_pixels or bool(row.pixels) != bool(known.pixels)
        )
        other_question = row.question != known.question
        if not other_pixels and not other_question:
            continue
        if table.header.exact_pixels and (row.pixels, row.question) in others:
            swapped.append(row.id)
        elif other_pixels:
            pixels.append(row.id)
        else:
            questions.append(row.id)
    fix = "evaluate the board's task with this version of Bitquake: same pictures, same noise, same questions"
    return [
        Finding(code, where, f"{len(ids)} records {what}", _some(ids), fix)
        for code, what, ids in (
            ("ids-swapped", "saw picture and question of another sample than they name", swapped),
            ("pixels-differ", "saw other pixels than the sample's", pixels),
            ("question-differs", "were asked another question than the sample's", questions),
        )
        if ids
    ]


def _some(ids: Sequence[str]) -> str:
    return ", ".join(shown(sample, 40) for sample in ids[:_SOME]) + (" …" if len(ids) > _SOME else "")
