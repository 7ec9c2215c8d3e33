"""``bitquake records import``: answers of another engine as a run that ``bitquake report`` and ``bitquake gate`` read.

A table of sample ids, answers and confidences (vLLM, llama.cpp, a production log) becomes a folder like lmms-eval's:

    <out>/<model>/<hash>_results.json            what was imported, from which files, how many samples were expected
    <out>/<model>/<hash>_samples_<task>.jsonl    one sample record a line
    <out>/<model>/quant_cards/<hash>.json        what the user says the model is

The answers to a task are scored by that task; a table with scores of its own (``scored``) needs no dataset. What ran is
known by hearsay only, and the card says so: such runs pair with one another and never with a measured one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from bitquake import __version__
from bitquake.answer_tables import AnswerRow, AnswerTable, TableColumns, TableError, read_tables, some
from bitquake.envelope import Envelope
from bitquake.quant_card import QuantCard
from bitquake.records import IMPORTER, RECORD_KEY, SampleRecord
from bitquake.tasks.sources import replacing

if TYPE_CHECKING:
    from bitquake.tasks.imported import TaskRows

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}")
_THRESHOLD = "_threshold"
_NO_ANSWER = "model: the imported table has no answer to this sample"


@dataclass(frozen=True)
class Declared:
    """What the user says of the model behind the answers; see ``QuantCard.declared``. engine: ``vllm=0.11.0``."""

    model: str
    quantization: str = ""
    twin: str = ""
    engine: str = ""

    def card(self) -> QuantCard:
        name, _, version = self.engine.partition("=")
        return QuantCard.declared(
            self.model, self.quantization, twin=self.twin, libraries={name: version or "unknown"} if name else {}
        )


@dataclass(frozen=True)
class ImportOptions:
    """How a table is read and what may be missing from it.

    confidences: name -> column; "" names the task's primary confidence. scored: the table brings its scores.
    limit: the run answered the first so many samples of the task only, as with lmms-eval's ``--limit``. expected: of a
    scored table: how many samples there should be. shift_from: of a scored table: the task that is in distribution for
    this one, whose threshold split fits thresholds. model_type: the architecture, which decides how boxes are read.
    """

    id_column: str = "id"
    answer_column: str = "answer"
    score_column: str = "score"
    image_column: str = "image_id"
    confidences: Mapping[str, str] = field(default_factory=dict)
    log_probability: bool = False
    allow_missing_confidence: bool = False
    missing_as_failures: bool = False
    scored: bool = False
    limit: int | None = None
    expected: int | None = None
    shift_from: str = ""
    model_type: str = ""


class Imported(NamedTuple):
    """What was written. missing: expected samples without an answer; foreign: rows that name no sample of the task."""

    folder: Path
    task: str
    n: int
    expected: int
    missing: list[str]
    foreign: list[str]
    failures: dict[str, int]
    without_confidence: list[str]
    remarks: list[str]

    @property
    def complete(self) -> bool:
        return self.n == self.expected


def import_records(
    files: Sequence[Path], task: str, declared: Declared, out: Path, options: ImportOptions | None = None
) -> Imported:
    """Score a table of answers and write it as a run.

    Args:
        files: tables with the same columns; see ``bitquake.answer_tables``.
        task: a task of ``bitquake tasks list --all``; with ``scored`` any name (``NAME_threshold`` holds the samples
            that thresholds for ``NAME`` are fitted on).
        declared: what ran.
        out: folder for the runs; an import of the same model and task in it must be equal.

    Raises:
        TableError: a table is not usable, its ids are not the task's, or options contradict one another.
        FamilyError: there is no such task, or its dataset cannot be loaded.
        OSError: a file cannot be read or written.
    """
    options = options or ImportOptions()
    _check(task, declared, options)
    if options.scored:
        table = _read(files, options, primary="confidence")
        records, expected, missing, foreign = _scored_records(table, task, declared.card(), options)
    else:
        from bitquake.tasks.imported import rows_of

        found = rows_of(task)
        table = _read(files, options, primary=found.task.contract.confidence)
        records, expected, missing, foreign = _task_records(table, found, declared.card(), options)
    folder = _write(out, task, declared, options, table, records, expected)
    failures: dict[str, int] = {}
    for record in records:
        if record.failure is not None:
            failures[record.failure] = failures.get(record.failure, 0) + 1
    return Imported(
        folder,
        task,
        len(records),
        expected,
        missing,
        foreign,
        failures,
        table.without_confidence,
        _remarks(table, records, options),
    )


def confidence_columns(written: Sequence[str]) -> dict[str, str]:
    """Name -> column from ``NAME=COLUMN`` or ``COLUMN``, which stands for the primary confidence (name "").

    Raises:
        TableError: one of them is empty, no name, or given twice.
    """
    found: dict[str, str] = {}
    for text in written:
        name, equals, column = text.partition("=")
        name, column = (name, column) if equals else ("", name)
        if not column or (equals and not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name)):
            raise TableError(
                f"--confidence-column: expected COLUMN, or NAME=COLUMN with a name such as selector, got {text!r}"
            )
        if name in found:
            raise TableError(f"--confidence-column: {name or 'the primary confidence'} is given twice")
        found[name] = column
    return found


def summary(done: Imported) -> str:
    """What was imported, in lines for a terminal."""
    lines = [f"{done.task}: {done.n:,} of {done.expected:,} samples imported (self-declared) into {done.folder}"]
    if done.missing:
        how = "counted as failures"
        if not done.complete:
            how = (
                "the run is incomplete, and neither report nor gate uses it; add their answers, give --limit N where "
                "only the first N samples were asked, or --missing-as-failures"
            )
        have = "1 sample has" if len(done.missing) == 1 else f"{len(done.missing):,} samples have"
        lines.append(f"{have} no answer ({some(done.missing)}): {how}")
    if done.foreign:
        name = "1 row names" if len(done.foreign) == 1 else f"{len(done.foreign):,} rows name"
        lines.append(f"{name} no expected sample of {done.task}, left out: {some(done.foreign)}")
    if done.failures:
        counts = ", ".join(f"{name} {count:,}" for name, count in sorted(done.failures.items()))
        lines.append(f"failed, and scored 0: {counts}")
    if done.without_confidence:
        lines.append(f"{len(done.without_confidence):,} confidences are missing: {some(done.without_confidence)}")
    return "\n".join([*lines, *done.remarks])


def _check(task: str, declared: Declared, options: ImportOptions) -> None:
    if not _TASK_NAME.fullmatch(task):
        raise TableError(f"--task: a name has letters, digits, _, - and ., got {task!r}")
    for name, text in (("--model", declared.model), *((("--twin", declared.twin),) if declared.twin else ())):
        if not text.strip() or not text.isprintable() or len(text) > 200:
            raise TableError(f"{name}: expected the model's name, got {text!r}")
    if declared.twin and not declared.quantization:
        raise TableError("--twin names the full-precision model of a quantized one: give --quantization too")
    for name, text in (("--quantization", declared.quantization), ("--engine", declared.engine)):
        if text and (not text.isprintable() or len(text) > 100 or "," in text):
            raise TableError(f"{name}: expected a short name without commas, got {text!r}")
    only = {"--limit": options.limit, "--model-type": options.model_type}
    if not options.scored:
        only = {"--expected": options.expected, "--shift-from": options.shift_from}
    for option, value in only.items():
        if value:
            raise TableError(f"{option} is for tables {'without' if options.scored else 'with'} --scored; leave it out")
    for option, number in (("--limit", options.limit), ("--expected", options.expected)):
        if number is not None and number < 1:
            raise TableError(f"{option}: expected 1 or more, got {number}")
    if options.scored and options.missing_as_failures:
        raise TableError("--missing-as-failures needs the task's ids; with --scored give such samples rows of score 0")


def _read(files: Sequence[Path], options: ImportOptions, *, primary: str) -> AnswerTable:
    confidences = {name or primary: column for name, column in options.confidences.items()}
    optional = set()
    if not confidences:
        confidences = {primary: "confidence"}
        optional = {"confidence"} if not options.log_probability else set()
    if options.scored:
        optional |= {options.answer_column, options.image_column}
    columns = TableColumns(
        sample_id=options.id_column,
        answer=options.answer_column,
        confidences=confidences,
        score=options.score_column if options.scored else None,
        image=options.image_column if options.scored else None,
        optional=frozenset(optional),
    )
    return read_tables(
        files, columns, log_probability=options.log_probability, allow_missing=options.allow_missing_confidence
    )


_Found = tuple[list[SampleRecord], int, list[str], list[str]]
"""Records, number of expected samples, ids of those without an answer, ids of rows that are no expected sample."""


def _task_records(table: AnswerTable, found: TaskRows, card: QuantCard, options: ImportOptions) -> _Found:
    ids = found.sample_ids[: options.limit]
    known = set(ids)
    foreign = [row for row in table.rows if row not in known]
    if len(foreign) == len(table.rows):
        theirs = some((repr(one) for one in table.rows), 3)
        raise TableError(
            f"no id of the table is a sample of {found.task.name}: the table has {theirs}; the task has "
            f"{some(map(repr, ids), 3)}. Ids are compared as exact texts: name the column that holds the task's own "
            "with --id-column"
        )
    missing = [one for one in ids if one not in table.rows or table.rows[one].answer is None]
    empty = Envelope(text="", model_hash=card.model_hash, card=card.content_hash, model_type=options.model_type)
    answers = {
        one: empty.model_copy(update={"text": row.answer, "confidence": row.confidence})
        for one in ids
        if (row := table.rows.get(one)) is not None and row.answer is not None
    }
    if options.missing_as_failures:
        answers |= {one: empty.model_copy(update={"error": _NO_ANSWER}) for one in missing}
    return list(found.score(answers)), len(ids), missing, foreign


def _scored_records(table: AnswerTable, task: str, card: QuantCard, options: ImportOptions) -> _Found:
    n, expected = len(table.rows), options.expected or len(table.rows)
    if n > expected:
        raise TableError(f"--expected: the table holds {n:,} samples, more than the {expected:,} expected")
    family = task.removesuffix(_THRESHOLD)
    variant = "threshold" if family != task else "shift" if options.shift_from else "clean"
    primary = next(iter(options.confidences), "") or "confidence"

    def record(row: AnswerRow) -> SampleRecord:
        assert row.score is not None  # the table was read with a score column
        return SampleRecord(
            family=family,
            variant=variant,
            task=task,
            world="real",
            dataset=family,
            split="imported",
            part=variant if variant == "threshold" else "",
            shift_from=options.shift_from,
            sample_id=row.sample_id,
            image_id=row.image_id or f"sample {row.sample_id}",
            protocol="scored",
            score=row.score,
            answer=row.answer,
            text=row.answer or "",
            confidence=row.confidence,
            primary_confidence=primary,
            model_hash=card.model_hash,
            card=card.content_hash,
        )

    return [record(row) for row in table.rows.values()], expected, [], []


def _remarks(table: AnswerTable, records: Sequence[SampleRecord], options: ImportOptions) -> list[str]:
    remarks = []
    if not any(value is not None for record in records for value in record.confidence.values()):
        remarks.append("no answer has a confidence: accuracy only (--confidence-column names the column)")
    if options.scored and options.image_column in table.absent:
        remarks.append(
            f"there is no column {options.image_column!r}: every sample counts as a picture of its own in intervals"
        )
    return remarks


def _write(
    out: Path,
    task: str,
    declared: Declared,
    options: ImportOptions,
    table: AnswerTable,
    records: Iterable[SampleRecord],
    expected: int,
) -> Path:
    """The run's files, each whole or absent; the results file comes last."""
    card = declared.card()
    folder = out / re.sub(r"[^A-Za-z0-9.-]+", "__", declared.model).strip("_.")[:80]
    stem = hashlib.blake2b(f"{card.content_hash}/{task}".encode(), digest_size=8).hexdigest()
    lines = [
        json.dumps(
            {"doc_id": place, "filtered_resps": record.text, RECORD_KEY: record.model_dump(mode="json")},
            ensure_ascii=False,
        )
        for place, record in enumerate(records)
    ]
    results = {
        "results": {},
        "configs": {},
        "n-samples": {task: {"original": expected, "effective": expected}},
        "config": {
            "model": IMPORTER,
            "model_args": {
                "pretrained": declared.model,
                "quant": declared.quantization or "full-precision",
                **({"engine": declared.engine} if declared.engine else {}),
            },
            "command": _command(task, declared, options, table),
        },
        "model_name": declared.model,
        "generator": f"bitquake {__version__}",
        "imported": {
            "files": [one._asdict() for one in table.files],
            "confidences": dict(options.confidences),
            "log_probability": options.log_probability,
            "missing_as_failures": options.missing_as_failures,
        },
    }
    written = {
        folder / "quant_cards" / f"{card.content_hash}.json": card.to_json(),
        folder / f"{stem}_samples_{task}.jsonl": "".join(f"{line}\n" for line in lines),
        folder / f"{stem}_results.json": json.dumps(results, indent=2, ensure_ascii=False) + "\n",
    }
    for path, text in written.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise TableError(
                f"{path}: holds another import of {declared.model} on {task}; remove it, or give another --out"
            )
    for path, text in written.items():
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    return folder


def _command(task: str, declared: Declared, options: ImportOptions, table: AnswerTable) -> str:
    """The command for people, files by their names."""
    words: list[Any] = ["bitquake records import", *(one.name for one in table.files), "--task", task]
    words += [
        "--model",
        PurePath(declared.model).name if declared.model.startswith(("/", "~", ".")) else declared.model,
    ]
    for option in ("quantization", "twin", "engine"):
        words += [f"--{option}", getattr(declared, option)] if getattr(declared, option) else []
    for option in ("scored", "log_probability", "missing_as_failures", "allow_missing_confidence"):
        words += [f"--{option.replace('_', '-')}"] if getattr(options, option) else []
    for name, column in options.confidences.items():
        words += ["--confidence-column", f"{name}={column}" if name else column]
    for option in ("limit", "expected", "shift_from", "model_type"):
        words += [f"--{option.replace('_', '-')}", getattr(options, option)] if getattr(options, option) else []
    return " ".join(map(str, [*words, "--out OUT"]))
