"""Whether submissions may stand on their boards: every check, for each of them by itself.

What a submission says is compared with what can be known without it: the board, the gold files, its full-precision
twin, the folder's history. Nothing of a refused submission is used further, and none keeps another one from its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitquake.leaderboard.board_file import SAME_SCORES
from bitquake.leaderboard.boards import Board, BoardError, load_board
from bitquake.leaderboard.card_checks import check_card
from bitquake.leaderboard.findings import MOST_SHOWN, Finding, SubmissionError, refuse, shown
from bitquake.leaderboard.history import WITHDRAWALS_FILE, HistoryError, changed_since, read_entries
from bitquake.leaderboard.recompute import GoldFolder, run_of
from bitquake.leaderboard.row_checks import Rows, check_gold, check_oracle, check_rows, read_rows
from bitquake.leaderboard.submission import (
    FOLDER,
    MANIFEST_FILE,
    RECORDS_FILE,
    Submission,
    read_submission,
)
from bitquake.quant_card import CARD_FILE
from bitquake.reports.pairing import pair_runs
from bitquake.reports.runs import Run
from bitquake.tasks.scoring.gold import Gold, GoldError

Level = Literal["refused", "withdrawn", "self-reported", "recomputed", "reproduced"]
REPRODUCTIONS_FILE = "reproductions.yaml"
_EXACT_TWIN = "the full-precision submission that it is compared with"


class Reproduction(BaseModel):
    """A maintainer's word that one submission was made independently of another, of the same weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    submission: Annotated[str, Field(pattern=rf"^{FOLDER.pattern}$")]
    by: Annotated[str, Field(pattern=rf"^{FOLDER.pattern}$")]
    note: Annotated[str, Field(max_length=1000)] = ""


@dataclass(frozen=True)
class Verdict:
    """What validation says of one submission.

    level: ``refused``; ``self-reported``: valid, but a pinned gold file is missing, so no number can be computed;
    ``recomputed``; ``reproduced``: and an independent submission of the same weights gave the same scores;
    ``withdrawn``: it is gone, with a reason. submission: None where it was refused or withdrawn. reproduced_by: names
    of the submissions that did.
    """

    name: str
    level: Level
    findings: tuple[Finding, ...]
    submission: Submission | None = None
    reproduced_by: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.level != "refused"


def all_submissions(root: Path) -> list[Path]:
    """Whatever lies in the folder of submissions, files and links too: all but its two lists must be a submission."""
    lists = (WITHDRAWALS_FILE, REPRODUCTIONS_FILE, "README.md")
    return sorted(path for path in root.iterdir() if path.name not in lists) if root.is_dir() else []


def validate(
    folders: Sequence[Path],
    *,
    gold: Path | None = None,
    base: str | None = None,
    root: Path | None = None,
    boards: Path | None = None,
) -> list[Verdict]:
    """Check submissions, each by itself; a twin is looked for beside its submission.

    Args:
        folders: the submissions' folders.
        gold: folder of gold files, see ``recompute.GoldFolder``; without the pinned ones a row stays self-reported.
        base: a commit: what it holds of the folders around ``folders``, and of ``root``, must be there as it was.
        root: the folder of all submissions, whose history counts even when none is left in it.
        boards: folder of board files; None: those of the package.

    Returns:
        a verdict for each folder, in the order given, then one for each other submission that ``base`` knows and that
        was changed or removed.

    Raises:
        GoldError: a gold file that is damaged, or not the one that its board pins.
        HistoryError: a base that git does not know, a list of withdrawals or reproductions that cannot be read.
    """
    checker = _Checker(GoldFolder(gold), boards)
    verdicts = {folder.absolute(): checker.verdict(folder) for folder in folders}
    _refuse_copies(verdicts)
    _note_reproductions(verdicts, checker)
    if base is not None:
        _add_history(verdicts, base, [] if root is None else [root.absolute()])
    return list(verdicts.values())


@dataclass
class _Checker:
    gold: GoldFolder
    boards: Path | None
    known: dict[Path, tuple[Verdict, Run | None]] = field(default_factory=dict)
    read: dict[str, Board] = field(default_factory=dict)
    pending: set[Path] = field(default_factory=set)

    def verdict(self, folder: Path) -> Verdict:
        return self.check(folder)[0]

    def check(self, folder: Path) -> tuple[Verdict, Run | None]:
        """The verdict, and the run of a valid submission; a full-precision one is kept for those that name it."""
        key = folder.absolute()
        if key in self.known:
            return self.known[key]
        name = shown(folder.name, 200)
        self.pending.add(key)
        found: tuple[Verdict, Run | None]
        try:
            found = self.examine(folder)
        except SubmissionError as error:
            found = (Verdict(name, "refused", error.findings[:MOST_SHOWN]), None)
        except (GoldError, HistoryError):  # of this place, not of the submission
            raise
        except Exception as error:  # whatever hostile data finds in the checks, it ends at its own submission
            finding = Finding("check-failed", name, f"could not be checked ({type(error).__name__}); please report it")
            found = (Verdict(name, "refused", (finding,)), None)
        self.pending.discard(key)
        submission = found[0].submission
        full = submission is not None and submission.card.method == "none"
        self.known[key] = found if full else (found[0], None)
        return found

    def examine(self, folder: Path) -> tuple[Verdict, Run]:
        submission = read_submission(folder)
        name, manifest = submission.name, submission.manifest
        try:
            board = self.board(manifest.board)
        except BoardError as error:
            raise refuse("board-unknown", f"{name}/{MANIFEST_FILE}: board", str(error)) from error
        rows = read_rows(submission, board)
        findings = [*check_rows(submission, board, rows), *_check_card(submission)]
        warnings, tables = self.references(board)
        where = f"{name}/{RECORDS_FILE}"
        if tables is not None:
            findings += check_gold(submission, rows, tables, where)
        if findings:
            raise SubmissionError(findings)
        run = run_of(submission, (row for task in sorted(rows) for row in rows[task]), tables or {})
        if tables is not None:
            findings += check_oracle(run, where)
        findings += self.check_twin(submission, run, rows)
        if findings:
            raise SubmissionError(findings)
        level: Level = "self-reported" if tables is None else "recomputed"
        return Verdict(name, level, tuple(warnings), submission), run

    def tables(self, submission: Submission) -> dict[str, Gold]:
        """The gold tables of a submission's board; none where it is self-reported."""
        return self.references(self.board(submission.manifest.board))[1] or {}

    def board(self, name: str) -> Board:
        if name not in self.read:
            self.read[name] = load_board(name, self.boards)
        return self.read[name]

    def references(self, board: Board) -> tuple[list[Finding], dict[str, Gold] | None]:
        """The board's gold tables; None, with a warning, where not all of them are pinned and there."""
        missing = self.gold.missing(board)
        if not missing:
            tables = {task.task: self.gold.of(board, task) for task in board.tasks}
            return [], {task: table for task, table in tables.items() if table is not None}
        more = f" and {len(missing) - 1} more tasks" if len(missing) > 1 else ""
        what = f"no pinned gold file of {missing[0]}{more}: its numbers cannot be computed here"
        fix = f"`bitquake leaderboard gold --board {board.board}` builds them"
        return [Finding("gold-missing", f"board {board.board}", what, fix=fix, level="warning")], None

    def check_twin(self, submission: Submission, run: Run, rows: Rows) -> list[Finding]:
        """Findings on the full-precision submission that it names."""
        manifest, full = submission.manifest, submission.card.method == "none"
        where = f"{submission.name}/{MANIFEST_FILE}: twin"
        if full:
            if not manifest.twin:
                return []
            return [Finding("twin-unwanted", where, "a full-precision submission has no twin", manifest.twin)]
        fix = f"submit {_EXACT_TWIN}, and name its folder"
        if not manifest.twin:
            return [Finding("twin-missing", where, "a quantized submission names its full-precision twin", fix=fix)]
        folder = submission.folder.parent / manifest.twin
        if folder.absolute() in self.pending or not folder.is_dir():
            return [Finding("twin-missing", where, f"{_EXACT_TWIN} is not there", manifest.twin, fix)]
        verdict, twin = self.check(folder)
        if verdict.submission is None:
            return [twin_refused(submission, ", ".join(sorted({one.code for one in verdict.findings})))]
        if twin is None:
            return [Finding("twin-quantized", where, "its twin is quantized itself", manifest.twin, fix)]
        if verdict.submission.manifest.board != manifest.board:
            return [Finding("twin-board", where, "its twin stands on another board", manifest.twin, fix)]
        return _check_pair(submission, run, twin, where)


def _check_card(submission: Submission) -> list[Finding]:
    manifest, card, name = submission.manifest, submission.card, submission.name
    found = check_card(card, f"{name}/{CARD_FILE}")
    for code, said, value in (
        ("card-hash", manifest.card_hash, card.content_hash),
        ("model-hash", manifest.model_hash, card.model_hash),
    ):
        if said != value:
            what = f"the card's own is {value}"
            field_name = code.replace("-", "_")
            fix = "submit the card that the run made"
            found.append(Finding(code, f"{name}/{MANIFEST_FILE}: {field_name}", what, said, fix))
    return found


def _check_pair(submission: Submission, run: Run, twin: Run, where: str) -> list[Finding]:
    """What differs from the twin besides the quantization, by the rules of reports; and answers that are its copy."""
    fix = "run both with the same version, settings and samples"
    groups, _ = pair_runs([twin, run])
    group = next((group for group in groups if run in group.runs), None)
    if group is None or group.twin is None:
        return [Finding("twin-differs", where, group.refused if group else "no pair", fix=fix)]
    unpaired = [(task, reason) for (_, task), reason in sorted(group.unpaired.items())]
    if unpaired:
        return [
            Finding("twin-differs", f"{submission.name}: {task}", shown(reason, 400), fix=fix)
            for task, reason in unpaired[:MOST_SHOWN]
        ]
    same = all(
        answer.confidence == twin.cells[task].answers[sample].confidence and answer.score == _score(twin, task, sample)
        for task, cell in run.cells.items()
        for sample, answer in cell.answers.items()
    )
    if same:
        what = "every score and every confidence is that of its twin: these are the twin's answers"
        return [Finding("records-copied", where, what, submission.manifest.twin, "submit the quantized model's own")]
    return []


def _score(run: Run, task: str, sample: str) -> float:
    return run.cells[task].answers[sample].score


def _refuse_copies(verdicts: dict[Path, Verdict]) -> None:
    """Of submissions with the same records, but of different models, none can be believed but the first by name."""
    by_records: dict[str, list[Path]] = {}
    for key, verdict in sorted(verdicts.items()):
        if verdict.submission is not None:
            by_records.setdefault(verdict.submission.manifest.files[RECORDS_FILE].sha256, []).append(key)
    for keys in by_records.values():
        first = verdicts[keys[0]].submission
        assert first is not None
        for key in keys[1:]:
            submission = verdicts[key].submission
            assert submission is not None
            if submission.manifest.model_hash != first.manifest.model_hash:
                what = f"these are the records of {first.name}, which is another model"
                finding = Finding("records-copied", f"{submission.name}/{RECORDS_FILE}", what)
                verdicts[key] = Verdict(submission.name, "refused", (finding,))
    refused = {key for key, verdict in verdicts.items() if not verdict.ok}
    for key, verdict in verdicts.items():
        if (
            verdict.submission is not None
            and verdict.submission.manifest.twin
            and key.parent / verdict.submission.manifest.twin in refused
        ):
            verdicts[key] = Verdict(verdict.name, "refused", (twin_refused(verdict.submission),))


def twin_refused(submission: Submission, why: str = "records-copied") -> Finding:
    """That a submission is compared with one that does not stand."""
    where, twin = f"{submission.name}/{MANIFEST_FILE}: twin", submission.manifest.twin
    return Finding("twin-refused", where, f"its twin is refused ({why})", shown(twin), "mend the twin first")


def _note_reproductions(verdicts: dict[Path, Verdict], checker: _Checker) -> None:
    """Raise the level of what a maintainer has listed as reproduced, where the numbers agree."""
    for root in sorted({key.parent for key in verdicts}):
        file = root / REPRODUCTIONS_FILE
        entries: list[Reproduction] = read_entries(file, Reproduction) if file.is_file() else []
        for entry in entries:
            mine, other = root / entry.submission, root / entry.by
            if mine not in verdicts or verdicts[mine].level not in ("recomputed", "reproduced"):
                continue
            reason = _not_reproduced(verdicts[mine], other, checker)
            if reason:
                finding = Finding("not-reproduced", entry.submission, f"{entry.by}: {reason}", level="warning")
                verdicts[mine] = replace(verdicts[mine], findings=(*verdicts[mine].findings, finding))
            else:
                by = (*verdicts[mine].reproduced_by, entry.by)
                verdicts[mine] = replace(verdicts[mine], level="reproduced", reproduced_by=by)


def _not_reproduced(verdict: Verdict, other: Path, checker: _Checker) -> str:
    """Why a submission is no reproduction of another; "" where it is one."""
    again = checker.verdict(other) if other.is_dir() else None
    mine, theirs = verdict.submission, again.submission if again else None
    if mine is None or theirs is None or again is None or again.level == "self-reported":
        return "is not there, or its numbers could not be recomputed"
    if mine.manifest.organisation == theirs.manifest.organisation:
        return "comes from the same organisation"
    if (mine.manifest.model_hash, mine.manifest.board) != (theirs.manifest.model_hash, theirs.manifest.board):
        return "is another model, or stands on another board"
    if mine.manifest.files == theirs.manifest.files:
        return "is a copy, byte for byte"
    scores = [
        {
            (cell.task, sample): answer.score
            for cell in run_of(one, one.rows(), checker.tables(one)).cells.values()
            for sample, answer in cell.answers.items()
        }
        for one in (mine, theirs)
    ]
    share = sum(scores[1].get(key) == score for key, score in scores[0].items()) / len(scores[0])
    return "" if share >= SAME_SCORES else f"only {share:.1%} of the samples have the same score"


def _add_history(verdicts: dict[Path, Verdict], base: str, roots: Sequence[Path]) -> None:
    for root in sorted({*roots, *(key.parent for key in verdicts)}):
        for finding in changed_since(base, root):
            key = root / finding.where
            known = verdicts.get(key)
            if known is None:
                level: Level = "refused" if finding.level == "error" else "withdrawn"
                verdicts[key] = Verdict(finding.where, level, (finding,))
            elif finding.level == "error":
                verdicts[key] = Verdict(known.name, "refused", (*known.findings, finding))
            else:
                verdicts[key] = replace(known, findings=(*known.findings, finding))
