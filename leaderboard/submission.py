"""A submission: one model on one board, as three files in a folder of its own, read without trusting a byte of it.

``<organisation>__<model>__<quantization>/`` holds ``manifest.json`` (what was run and how), ``quant_card.json`` (what
was done to the weights) and ``records.jsonl.zst`` (for each sample its answer, its confidences, and short hashes of
what the model saw). There is no score in it and no place for one: numbers are computed from the answers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bitquake.leaderboard.boards import NAME
from bitquake.leaderboard.bounded_zstd import ZstdProblem, compress, lines
from bitquake.leaderboard.findings import MOST_SHOWN, Finding, SubmissionError, of_schema, path_of, refuse, shown
from bitquake.leaderboard.strict_json import JsonProblem, load_json, text_problem, texts_of
from bitquake.quant_card import CARD_FILE, QuantCard
from bitquake.records import Failure, Protocol
from bitquake.tasks.scoring.targets import READ_CHARACTERS

MANIFEST_VERSION = 1
MANIFEST_FILE, RECORDS_FILE = "manifest.json", "records.jsonl.zst"
FILES = (MANIFEST_FILE, CARD_FILE, RECORDS_FILE)

MAX_SUBMISSION = 20_000_000
MAX_FILE = {MANIFEST_FILE: 1_000_000, CARD_FILE: 4_000_000, RECORDS_FILE: MAX_SUBMISSION}
MAX_TEXT = 1_000_000_000
MAX_LINE = 64_000
MAX_ROWS = 5_000_000
LONGEST_ANSWER = 2 * READ_CHARACTERS
"""Scorers read no more than half of this of a text, and what they keep of it is hardly longer."""
_LONGEST_TEXT = 12_000
SHORT_HASH = 8
"""Characters of a hash that a record keeps: enough to notice a change, too few to weigh much."""

_PART = r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?"
FOLDER = re.compile(rf"({_PART})__({_PART})__({_PART})")
_AGAIN = "make the submission again with `bitquake leaderboard submit`"

Slug = Annotated[str, Field(pattern=rf"^{_PART}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Blake = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Short = Annotated[str, Field(max_length=200)]
ShortHash = Annotated[str, Field(pattern=rf"^(?:[0-9a-f]{{{SHORT_HASH}}})?$")]
ConfidenceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
Link = Annotated[str, Field(pattern=r"^(?:https?://[A-Za-z0-9][!-;=?-~]{1,300})?$")]


def _set(flag: bool) -> bool:
    if not flag:
        raise ValueError("a flag stands only where it is set")
    return flag


SetFlag = Annotated[bool, AfterValidator(_set)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(_Strict):
    """A file beside the manifest."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=MAX_SUBMISSION)]


class TaskEntry(_Strict):
    """One task as it was run: fields of ``SampleRecord`` that all its samples share, and what lmms-eval was told.

    settings: name -> canonical text, or ``blake2b:…`` where that is long; part of what a pair must have in common.
    """

    family: Annotated[str, Field(pattern=rf"^{NAME}$")]
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]{0,63}$")]
    world: Literal["block", "real"]
    protocol: Protocol
    dataset: Short
    dataset_revision: Short
    split: Short
    part: Annotated[str, Field(max_length=1000)]
    subset: Short
    shift_from: Short
    noise: dict[Short, Short | int] | None
    primary_confidence: ConfidenceName
    settings: Annotated[dict[Short, Short], Field(max_length=100)]
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)]


class Manifest(_Strict):
    """``manifest.json``: what a submission is.

    twin: folder of the full-precision submission that it is compared with; "" for one that is full precision itself.
    card_hash, model_hash: of its quant card. commands: what repeats the run. files: the other two files.
    """

    version: Literal[1]
    board: Annotated[str, Field(pattern=rf"^{NAME}$")]
    organisation: Slug
    model: Slug
    quantization: Slug
    twin: Annotated[str, Field(max_length=200, pattern=rf"^(?:{_PART}__{_PART}__{_PART})?$")]
    card_hash: Blake
    model_hash: Blake
    commands: Annotated[list[Annotated[str, Field(max_length=_LONGEST_TEXT)]], Field(max_length=200)]
    versions: Annotated[
        dict[Short, Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}$")]], Field(max_length=64)
    ]
    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,128}$")], TaskEntry], Field(min_length=1)]
    files: dict[str, FileEntry]
    contact: Short = ""
    link: Link = ""

    @property
    def name(self) -> str:
        """The folder that the submission must lie in."""
        return f"{self.organisation}__{self.model}__{self.quantization}"


class Row(_Strict):
    """One line of the records: an answer as ``SampleRecord.answer`` has it, and its confidences.

    pixels, question, prompt: first characters of the hashes of what the model saw; "" where there is none.
    """

    task: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,128}$")]
    id: Annotated[str, Field(min_length=1, max_length=300)]
    answer: Annotated[str, Field(max_length=LONGEST_ANSWER)] | None
    confidence: Annotated[
        dict[ConfidenceName, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None], Field(max_length=16)
    ]
    pixels: ShortHash
    question: ShortHash
    prompt: ShortHash
    failure: Failure | None = None
    parse_failure: SetFlag | None = None
    truncated: SetFlag | None = None

    def to_json(self) -> str:
        """One line, the optional fields only where they are set."""
        return json.dumps(
            self.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False, separators=(",", ":")
        )


@dataclass(frozen=True)
class Submission:
    """A submission whose manifest and card are valid and whose files are those that the manifest names.

    digest: sha256 over the files' own, for caches. records: the compressed file, as its hash was checked.
    """

    name: str
    folder: Path
    manifest: Manifest
    card: QuantCard
    digest: str
    n_bytes: int
    records: bytes = field(repr=False, compare=False)

    def rows(self) -> Iterator[Row]:
        """The records, in the order of (task, id), none twice.

        Raises:
            SubmissionError: at the first line that is not as it must be.
        """
        where = f"{self.name}/{RECORDS_FILE}"
        last: tuple[str, str] = ("", "")
        number = 0
        try:
            for number, line in enumerate(lines(self.records, max_bytes=MAX_TEXT, max_line=MAX_LINE), start=1):
                if number > MAX_ROWS:
                    raise refuse("too-many-rows", where, f"more than {MAX_ROWS:,} records")
                row = _row(line, f"{where}:{number}")
                place = (row.task, row.id)
                if place <= last:
                    code, what = ("row-duplicate", "the sample stands there twice")
                    if place != last:
                        code, what = "row-order", "records are not sorted by task and id, or one stands there twice"
                    raise refuse(code, f"{where}:{number}", what, got=f"{row.task} {row.id}", fix=_AGAIN)
                last = place
                yield row
        except ZstdProblem as problem:
            at = f"{where} (after record {number})" if number else where
            raise refuse(problem.code, at, str(problem), fix=_AGAIN) from problem


def read_submission(folder: Path) -> Submission:
    """Read manifest and card, and check every file against the manifest; the records are not parsed yet.

    Raises:
        SubmissionError: with a finding for each thing that is wrong.
    """
    name = folder.name
    if not FOLDER.fullmatch(name):
        what = "the folder's name is not <organisation>__<model>__<quantization> of a-z, 0-9, dots and dashes"
        raise refuse("folder-name", shown(name), what, got=name, fix="rename it as its manifest says")
    files = _files(folder)
    manifest = _manifest(files[MANIFEST_FILE], f"{name}/{MANIFEST_FILE}")
    findings = []
    if manifest.name != name:
        what = f"it says that it is {manifest.name}, its folder is called {name}"
        findings.append(Finding("name-differs", f"{name}/{MANIFEST_FILE}", what, fix=f"rename the folder, or {_AGAIN}"))
    for file in (CARD_FILE, RECORDS_FILE):
        findings += _differs(manifest, name, file, files[file])
    if findings:
        raise SubmissionError(findings)
    card = _card(files[CARD_FILE], f"{name}/{CARD_FILE}")
    hashes = "".join(f"{hashlib.sha256(files[file]).hexdigest()}  {file}\n" for file in FILES)
    return Submission(
        name=name,
        folder=folder,
        manifest=manifest,
        card=card,
        digest=hashlib.sha256(hashes.encode()).hexdigest(),
        n_bytes=sum(map(len, files.values())),
        records=files[RECORDS_FILE],
    )


def encode(manifest: Mapping[str, Any], card: QuantCard, rows: Iterable[Row]) -> dict[str, bytes]:
    """The three files of a submission; ``manifest`` lacks only ``files``.

    Raises:
        SubmissionError: the result would be refused (a text that must not stand there, too large).
    """
    text = "".join(f"{row.to_json()}\n" for row in sorted(rows, key=lambda row: (row.task, row.id)))
    content = {CARD_FILE: f"{card.to_json()}\n".encode(), RECORDS_FILE: compress(text.encode())}
    entries = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in content.items()}
    whole = {**manifest, "files": entries}
    content[MANIFEST_FILE] = (json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    size = sum(map(len, content.values()))
    name = _manifest(content[MANIFEST_FILE], MANIFEST_FILE).name
    _card(content[CARD_FILE], f"{name}/{CARD_FILE}")
    if size > MAX_SUBMISSION:
        raise refuse(
            "too-large",
            name,
            f"it would take {size:,} bytes; {MAX_SUBMISSION:,} are allowed",
            fix="use a smaller board",
        )
    return content


def _files(folder: Path) -> dict[str, bytes]:
    """The three files' bytes; nothing is followed, and nothing but regular files is opened."""
    name = folder.name
    try:
        if folder.is_symlink() or not folder.is_dir():
            raise refuse("not-a-folder", name, "is no folder, or a link to one", fix="give the submission's own folder")
        found = sorted(os.listdir(folder))
    except OSError as error:
        raise refuse("unreadable", name, f"cannot be read ({error.strerror})") from error
    findings = [
        Finding(
            "file-unknown", f"{name}/{shown(entry)}", "a submission holds three files and nothing else", fix="remove it"
        )
        for entry in found
        if entry not in FILES
    ][:MOST_SHOWN]
    findings += [
        Finding("file-missing", f"{name}/{file}", "is missing", fix=_AGAIN) for file in FILES if file not in found
    ]
    if findings:
        raise SubmissionError(findings)
    content = {file: _bytes(folder / file, f"{name}/{file}", MAX_FILE[file]) for file in FILES}
    size = sum(map(len, content.values()))
    if size > MAX_SUBMISSION:
        raise refuse("too-large", name, f"its files take {size:,} bytes; {MAX_SUBMISSION:,} are allowed")
    return content


def _bytes(path: Path, where: str, most: int) -> bytes:
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise refuse("file-link", where, "is a symbolic link", fix="put the file itself there") from error
        raise refuse("unreadable", where, f"cannot be read ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refuse("file-kind", where, "is no regular file", fix="remove it")
        if status.st_size > most:
            raise refuse("too-large", where, f"has {status.st_size:,} bytes; {most:,} are allowed")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise refuse("unreadable", where, f"cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    if len(data) > most:
        raise refuse("too-large", where, f"has more than {most:,} bytes")
    return data


def _tree(data: bytes, where: str) -> Any:
    """JSON whose texts may all be shown."""
    try:
        tree = load_json(data)
    except JsonProblem as problem:
        raise refuse(problem.code, where, str(problem), fix=_AGAIN) from problem
    findings = []
    for path, text in texts_of(tree):
        unfit = text_problem(text)
        if unfit is not None:
            findings.append(Finding(unfit[0], f"{where}: {path_of(path)}", unfit[1], shown(text), "remove it"))
        elif len(text) > _LONGEST_TEXT:
            what = f"a text of {len(text):,} characters; {_LONGEST_TEXT:,} are allowed"
            findings.append(Finding("field-too-long", f"{where}: {path_of(path)}", what))
        if len(findings) == MOST_SHOWN:
            break
    if findings:
        raise SubmissionError(findings)
    return tree


def _manifest(data: bytes, where: str) -> Manifest:
    tree = _tree(data, where)
    if isinstance(tree, dict) and tree.get("version", MANIFEST_VERSION) != MANIFEST_VERSION:
        fix = f"this Bitquake reads version {MANIFEST_VERSION}; {_AGAIN}"
        raise refuse("manifest-version", f"{where}: version", "another version", got=tree["version"], fix=fix)
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise SubmissionError(of_schema(error, where, _AGAIN)) from error
    if odd := sorted(manifest.files.keys() ^ {CARD_FILE, RECORDS_FILE}):
        what = f"it lists {CARD_FILE} and {RECORDS_FILE}, each by its plain name, and nothing else"
        raise refuse("files-listed", f"{where}: files", what, got=odd[0], fix=_AGAIN)
    return manifest


def _differs(manifest: Manifest, name: str, file: str, data: bytes) -> list[Finding]:
    said, digest = manifest.files[file], hashlib.sha256(data).hexdigest()
    if said.sha256 == digest and said.bytes == len(data):
        return []
    what = f"is not the file that {MANIFEST_FILE} names: {said.bytes:,} bytes with sha256 {said.sha256[:12]}…"
    got = f"{len(data):,} bytes with {digest[:12]}…"
    fix = f"it was changed or cut short after the submission was made; {_AGAIN}"
    return [Finding("file-hash", f"{name}/{file}", what, got, fix)]


def _card(data: bytes, where: str) -> QuantCard:
    tree = _tree(data, where)
    try:
        # from JSON, where strict takes a list for a tuple
        card = QuantCard.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise SubmissionError(of_schema(error, where, _AGAIN)) from error
    if data != f"{card.to_json()}\n".encode():
        what = "is not written in the card's own form, so its hash would not be that of the file"
        raise refuse("card-form", where, what, fix=_AGAIN)
    return card


def _row(line: bytes, where: str) -> Row:
    try:
        tree = load_json(line)
    except JsonProblem as problem:
        raise refuse(problem.code, where, str(problem), fix=_AGAIN) from problem
    if line.endswith(b"\r"):
        raise refuse("line-end", where, "ends with a carriage return; lines end with a line feed alone", fix=_AGAIN)
    try:
        row = Row.model_validate(tree)
    except ValidationError as error:
        raise SubmissionError(of_schema(error, where, _AGAIN)) from error
    unfit = text_problem(row.id)
    if unfit is None and row.answer is not None:
        unfit = text_problem(row.answer, free=True)
    if unfit is not None:
        raise refuse(unfit[0], where, f"{row.task}: a text {unfit[1]}", got=row.id, fix=_AGAIN)
    return row
