"""Builds the board: validates the submissions, computes their numbers, renders the pages, writes them all at once.

The slow parts are kept in the user cache under the hash of everything that they were made from: a verdict (submission,
twin, board, gold files, code) and the numbers, charts and page of a full-precision model with its quantizations. The
same inputs give the same bytes, warm or cold.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
from pydantic import BaseModel, ValidationError

import bitquake.leaderboard
import bitquake.metrics
import bitquake.quant_card
import bitquake.records
import bitquake.reports
import bitquake.tasks.scoring
from bitquake.leaderboard import pages
from bitquake.leaderboard.board_file import (
    BoardEntry,
    BoardFile,
    ModelFile,
    SubmissionEntry,
    TaskEntry,
    of_runs,
    without_points,
)
from bitquake.leaderboard.boards import Board
from bitquake.leaderboard.eee import eee_record
from bitquake.leaderboard.findings import SubmissionError, shown
from bitquake.leaderboard.model_page import model_page
from bitquake.leaderboard.numbers import (
    GENERATOR,
    empty_report,
    group_report,
    merged,
    run_without_numbers,
    settings_of,
)
from bitquake.leaderboard.recompute import gold_file
from bitquake.leaderboard.submission import MANIFEST_FILE, Submission, read_submission
from bitquake.leaderboard.validate import REPRODUCTIONS_FILE, all_submissions, twin_refused, validate
from bitquake.leaderboard.views import BoardView
from bitquake.reports import exports
from bitquake.reports.problems import ReportError
from bitquake.reports.schema import Report, Settings
from bitquake.reports.site import check_replaceable, replace_file, write_site
from bitquake.reports.views import Arrangement

CSV_HEAD = ("board", "submission", "organisation", "level")
_STATIC = {"board.css": "bitquake.leaderboard", "board.js": "bitquake.leaderboard", "style.css": "bitquake.reports"}
_LATEST = 253402300799
"""The last second of the year 9999: no date can be later."""
_DATA = ("submissions", "boards")
_Kept = TypeVar("_Kept", bound=BaseModel)


@dataclass(frozen=True)
class SiteResult:
    """A built board.

    index: path of the page to open. board: what ``board.json`` holds. refused: name and reasons of each submission
    that was refused.
    """

    index: Path
    board: BoardFile
    refused: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def n_rows(self) -> int:
        """Submissions that stand on a board."""
        return sum(len(entry.submissions) for entry in self.board.boards)


class _Verdict(BaseModel):
    """What the cache keeps of a verdict."""

    level: str
    findings: list[str]


class Artifact(BaseModel):
    """What the cache keeps of a full-precision submission and those compared with it.

    report: without points. files: name -> text of pages and data. charts: task -> fragment. rows: of the CSV file.
    """

    report: Report
    files: dict[str, str]
    charts: dict[str, str]
    rows: str


def build_site(
    boards: Sequence[Board],
    submissions: Path,
    gold: Path | None,
    out: Path,
    *,
    boards_folder: Path | None = None,
    replicates: int = 2000,
    seed: int = 0,
    cache_folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> SiteResult:
    """Validate the submissions of some boards, compute their numbers, and write the site.

    Args:
        boards: in the order of the page; submissions of other boards are left out.
        submissions: folder with one folder for each submission; nothing of a refused one is shown.
        gold: folder of gold files; without those that a board pins, its rows stay self-reported.
        out: folder of the site; replaced when it is an earlier one.
        boards_folder: folder of board files; None: those of the package.
        replicates: bootstrap replicates of every interval.
        seed: seed of the bootstrap.
        cache_folder: of verdicts and numbers; None: the user cache.
        progress: told, in a line, what is being worked on.

    Raises:
        ReportError: ``out`` must not be replaced, or an argument cannot be right.
        GoldError, HistoryError: a gold file, or a list of reproductions, that cannot be used.
    """
    tell = progress or (lambda line: None)
    if replicates < 1:
        raise ReportError(f"replicates must be at least 1, got {replicates}")
    if len({board.board for board in boards}) < len(boards):
        raise ReportError("a board is given twice; give each once")
    if not submissions.is_dir():
        raise ReportError(f"{submissions}: is no folder; give the folder that holds the submissions")
    if submissions.resolve().is_relative_to(out.resolve()):
        raise ReportError(f"{out}: holds the submissions; give another folder for the site")
    check_replaceable(out.resolve())
    date = _source_date()
    settings = settings_of(replicates, seed)
    store = _Store(cache_folder or platformdirs.user_cache_path("bitquake", appauthor=False) / "leaderboard")
    tell("validating submissions")
    standing, refused = _standing(boards, submissions, gold, boards_folder, store, tell)
    inputs = _inputs(boards, standing, submissions)
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    entries: list[BoardEntry] = []
    artifacts: list[tuple[str, Artifact]] = []
    for board in boards:
        made = _board(board, standing, gold, boards_folder, settings, date, store, tell)
        entries.append(made[0])
        artifacts += [(board.board, artifact) for artifact in made[1]]
    file = BoardFile(
        generator=GENERATOR, source_date=date, inputs_digest=digest, n_refused=len(refused), boards=entries
    )
    tell("writing pages")
    write_site(out, render_files(file, settings, artifacts, inputs, digest))
    return SiteResult(out / "index.html", file, tuple(refused))


def render_files(
    file: BoardFile,
    settings: Settings,
    artifacts: Sequence[tuple[str, Artifact]],
    inputs: Sequence[dict[str, Any]],
    digest: str,
) -> dict[str, bytes]:
    """Everything that the site holds, by file name; artifacts: each with the name of its board."""
    charts: dict[tuple[str, str], list[str]] = {}
    texts: dict[str, str] = {}
    for board, artifact in artifacts:
        texts |= artifact.files
        for task, fragment in artifact.charts.items():
            charts.setdefault((board, task), []).append(fragment)
    texts |= pages.render_board(file, settings, charts)
    foot = pages.render_foot(file.generator, file.source_date, len(inputs), digest)
    texts = {name: pages.with_foot(text, foot) if name.endswith(".html") else text for name, text in texts.items()}
    texts["board.json"] = _json(file.model_dump(mode="json"))
    texts["board.schema.json"] = _schema(BoardFile)
    texts["model.schema.json"] = _schema(ModelFile)
    head = ",".join([*CSV_HEAD, *exports.CSV_COLUMNS])
    texts["board.csv"] = f"{head}\n" + "".join(artifact.rows for _, artifact in artifacts)
    texts["manifest.json"] = _json({"generator": file.generator, "inputs_digest": digest, "inputs": inputs}, indent=1)
    found = {name: text.encode("utf-8") for name, text in texts.items()}
    for name, package in _STATIC.items():
        found[name] = resources.files(package).joinpath(f"static/{name}").read_bytes()
    return found


@dataclass(frozen=True)
class _Standing:
    """A submission that may stand; its records are read again when they are needed."""

    submission: Submission
    level: str


def _standing(
    boards: Sequence[Board],
    folder: Path,
    gold: Path | None,
    boards_folder: Path | None,
    store: _Store,
    tell: Callable[[str], None],
) -> tuple[dict[str, _Standing], list[tuple[str, tuple[str, ...]]]]:
    """The submissions of these boards that are valid, by name, and the refused ones with their reasons."""
    chosen = {board.board: board for board in boards}
    found: dict[str, Submission] = {}
    refused: list[tuple[str, tuple[str, ...]]] = []
    for path in all_submissions(folder):
        try:
            found[path.name] = replace(read_submission(path), records=b"")
        except SubmissionError as error:
            refused.append((shown(path.name, 200), tuple(map(str, error.findings))))
    found = {name: one for name, one in found.items() if one.manifest.board in chosen}
    # What another submission can change in a verdict: a copy of its records, or a reproduction of its weights.
    kin: dict[str, list[str]] = {}
    for name, one in found.items():
        for trait in (one.manifest.model_hash, one.manifest.files["records.jsonl.zst"].sha256):
            kin.setdefault(trait, []).append(name)
    reproductions = folder / REPRODUCTIONS_FILE
    listed = _sha256(reproductions.read_bytes()) if reproductions.is_file() else ""

    def relatives(name: str) -> list[str]:
        one = found[name].manifest
        return sorted({*kin[one.model_hash], *kin[one.files["records.jsonl.zst"].sha256]})

    keys = {}
    for name, one in found.items():
        board = chosen[one.manifest.board]
        twin = found.get(one.manifest.twin)
        files = [gold is not None and gold_file(gold, board.board, task.task) is not None for task in board.tasks]
        near = [(other, found[other].digest) for other in relatives(name)]
        keys[name] = _key("verdict", one.digest, twin.digest if twin else "", board.model_dump(), files, near, listed)
    verdicts = {name: store.load(_Verdict, key) for name, key in keys.items()}
    unknown = sorted({other for name, known in verdicts.items() if known is None for other in relatives(name)})
    if unknown:
        tell(f"validating {len(unknown)} of {len(found)} submissions")
        judged = validate([folder / name for name in unknown], gold=gold, boards=boards_folder)
        for name, verdict in zip(unknown, judged, strict=True):
            found_out = _Verdict(level=verdict.level, findings=[str(finding) for finding in verdict.findings])
            verdicts[name] = found_out
            store.save(found_out, keys[name])
    standing = {}
    for name, known in verdicts.items():
        assert known is not None
        if known.level in ("self-reported", "recomputed", "reproduced"):
            standing[name] = _Standing(found[name], known.level)
        else:
            refused.append((name, tuple(known.findings)))
    # A copy of its twin's records, which only the twin's own verdict knows of, may have brought the twin down.
    for name in [name for name, one in standing.items() if (one.submission.manifest.twin or name) not in standing]:
        refused.append((name, (str(twin_refused(standing.pop(name).submission)),)))
    return standing, sorted(refused)


def _board(
    board: Board,
    standing: dict[str, _Standing],
    gold: Path | None,
    boards_folder: Path | None,
    settings: Settings,
    date: int | None,
    store: _Store,
    tell: Callable[[str], None],
) -> tuple[BoardEntry, list[Artifact]]:
    """One board with its numbers, and what each of its groups gave."""
    own = {name: one for name, one in standing.items() if one.submission.manifest.board == board.board}
    groups: dict[str, list[str]] = {}
    for name in sorted(own, key=lambda name: (own[name].submission.manifest.twin != "", name)):
        groups.setdefault(own[name].submission.manifest.twin or name, []).append(name)
    artifacts = []
    for head, names in groups.items():
        members = [own[name] for name in names]
        key = _key("group", board.model_dump(), [(m.submission.digest, m.level) for m in members], settings, date)
        artifact = store.load(Artifact, key)
        if artifact is None:
            tell(f"{board.board}: {head}, {len(members)} submissions")
            artifact = _artifact(board, members, gold, boards_folder, settings, date)
            store.save(artifact, key)
        artifacts.append(artifact)
    report = merged([artifact.report for artifact in artifacts], settings, board.title)
    return _entry(board, [own[name] for name in sorted(own)], report), artifacts


def _artifact(
    board: Board,
    members: Sequence[_Standing],
    gold: Path | None,
    boards_folder: Path | None,
    settings: Settings,
    date: int | None,
) -> Artifact:
    """Numbers, charts, pages and data of one group; the first member is full precision."""
    numbered = [m.submission for m in members if m.level != "self-reported"]
    whole = [read_submission(submission.folder) for submission in numbered]
    report = (
        group_report(whole, gold, settings, boards=boards_folder, title=board.title)
        if whole
        else empty_report(settings, board.title)
    )
    report.runs += [run_without_numbers(m.submission) for m in members if m.level == "self-reported"]
    return render_artifact(_entry(board, members, report), date)


def render_artifact(entry: BoardEntry, date: int | None) -> Artifact:
    """Pages, charts and data of a group whose entry holds its whole report."""
    report = entry.report
    brief = without_points(report)
    view = BoardView(entry.model_copy(update={"report": brief}))
    files = {}
    for run in report.runs:
        submission = view.submissions[run.id]
        twin = view.submissions.get(run.twin or "")
        page = model_page(view, report, run)
        files[submission.page] = pages.render_model(view, submission, twin, run, page)
        data = ModelFile(
            generator=GENERATOR, board=entry.board, submission=submission, twin=twin, report=of_runs(report, [run.id])
        )
        files[submission.data] = _json(data.model_dump(mode="json"))
        if page.families:
            record = eee_record(entry, submission, report, run, generator=GENERATOR, source_date=date)
            files[submission.record] = _json(record, indent=1)
    charts = {}
    for task in view.tasks:
        fragments = [
            pages.render_task_chart(Arrangement(of_task(report, ids, task)), task, view.submissions[ids[0]].model)
            for ids in view.charted(task)
        ]
        if drawn := "".join(fragments):
            charts[task] = drawn
    return Artifact(report=brief, files=files, charts=charts, rows=_rows(entry, report))


def of_task(report: Report, runs: Iterable[str], task: str) -> Report:
    """The cells of some runs on one task, and nothing else."""
    found = of_runs(report, runs)
    cells = [cell for cell in found.cells if cell.task == task]
    nothing: dict[str, Any] = {"summaries": [], "transfers": [], "interactions": [], "robustness": [], "mixtures": []}
    return found.model_copy(update={"cells": cells, **nothing})


def _entry(board: Board, members: Sequence[_Standing], report: Report) -> BoardEntry:
    return BoardEntry(
        board=board.board,
        title=board.title,
        world=board.world,
        about=board.about,
        tasks=[TaskEntry(task=task.task, n=task.n, gold=task.gold) for task in board.tasks],
        submissions=[_submission(member) for member in members],
        report=report,
    )


def _submission(member: _Standing) -> SubmissionEntry:
    manifest = member.submission.manifest
    return SubmissionEntry.model_validate(
        {
            "name": member.submission.name,
            "organisation": manifest.organisation,
            "model": manifest.model,
            "quantization": manifest.quantization,
            "twin": manifest.twin,
            "level": member.level,
            "link": manifest.link,
            "contact": manifest.contact,
            "versions": dict(sorted(manifest.versions.items())),
            "files": {name: entry.sha256 for name, entry in sorted(manifest.files.items())},
        }
    )


def _rows(entry: BoardEntry, report: Report) -> str:
    """The group's rows of ``board.csv``: those of a report, with board, submission, organisation and level before."""
    submissions = {submission.name: submission for submission in entry.submissions}
    at = exports.CSV_COLUMNS.index("run")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in list(csv.reader(io.StringIO(exports.to_csv(report))))[1:]:
        submission = submissions[row[at]]
        writer.writerow([entry.board, submission.name, submission.organisation, submission.level, *row])
    return buffer.getvalue()


def _inputs(boards: Sequence[Board], standing: dict[str, _Standing], folder: Path) -> list[dict[str, Any]]:
    """Every file that the site was made from, with its SHA-256; gold files by the hash of their text."""
    found = []
    for name, one in sorted(standing.items()):
        manifest = (folder / name / MANIFEST_FILE).read_bytes()
        found.append({"path": f"submissions/{name}/{MANIFEST_FILE}", "sha256": _sha256(manifest)})
        for file, entry in sorted(one.submission.manifest.files.items()):
            found.append({"path": f"submissions/{name}/{file}", "sha256": entry.sha256})
    for board in boards:
        text = json.dumps(board.model_dump(mode="json"), sort_keys=True)
        found.append({"path": f"boards/{board.board}", "sha256": _sha256(text.encode())})
        for task in board.tasks:
            if task.gold:
                found.append({"path": f"gold/{board.board}/{task.task}", "sha256": task.gold})
    found.append({"path": "code", "sha256": _code()})
    return found


def _source_date() -> int | None:
    """``SOURCE_DATE_EPOCH``, or None where it is not set.

    Raises:
        ReportError: it is no number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or int(text) > _LATEST:
        raise ReportError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {text[:40]!r}")
    return int(text)


@cache
def _code() -> str:
    """One hash over the version, code, templates and data that make verdicts, numbers and pages."""
    found = hashlib.sha256(GENERATOR.encode())
    for module in (bitquake.quant_card, bitquake.records):
        found.update(Path(str(module.__file__)).read_bytes() + b"\0")
    for package in (bitquake.leaderboard, bitquake.metrics, bitquake.reports, bitquake.tasks.scoring):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.suffix in (".py", ".html", ".css", ".js", ".yaml") and inside.parts[0] not in _DATA:
                found.update(f"{package.__name__}/{inside.as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def _key(kind: str, *parts: Any) -> str:
    text = json.dumps([kind, _code(), *parts], sort_keys=True, default=lambda value: value.model_dump(mode="json"))
    return _sha256(text.encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Any, *, indent: int | None = None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(value, indent=indent, separators=separators, sort_keys=True, allow_nan=False) + "\n"


def _schema(model: type[BaseModel]) -> str:
    return _json(model.model_json_schema(mode="serialization"), indent=1)


class _Store:
    """Entries by the hash of what they were made from; one that cannot be read is as good as none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, kind: type[_Kept], key: str) -> _Kept | None:
        try:
            return kind.model_validate_json((self.folder / f"{key}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def save(self, entry: BaseModel, key: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / f"{key}.json", entry.model_dump_json().encode())
