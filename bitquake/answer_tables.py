"""Tables of answers that another engine gave: one row a sample, with its id, its answer and its confidences.

CSV, TSV, JSON lines or parquet. Nothing is guessed and nothing is dropped: a file that is cut short, a column that is
not there, an id that comes twice and a confidence that is no probability are named with the file and the row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple

LONGEST_LINE = 1 << 20
"""Characters of a line of JSON; an answer has a few, and a file that is not what its name says has no line ends."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
_ROUNDING = 1e-6
"""How far outside of [0, 1] a probability may lie by the rounding of whoever wrote it; it is put on the edge."""
_SHOWN = 3


class TableError(ValueError):
    """A table that cannot be imported; the message says which row of which file, what was got and how to fix it."""


@dataclass(frozen=True)
class TableColumns:
    """Which column holds what.

    confidences: name of a confidence -> column. score, image: of tables that bring their own scores; None: there is
    none. optional: columns that may be absent.
    """

    sample_id: str = "id"
    answer: str | None = "answer"
    confidences: Mapping[str, str] = field(default_factory=dict)
    score: str | None = None
    image: str | None = None
    optional: frozenset[str] = frozenset()

    @property
    def wanted(self) -> list[str]:
        named = (self.sample_id, self.answer, self.score, self.image, *self.confidences.values())
        return list(dict.fromkeys(column for column in named if column is not None))


class AnswerRow(NamedTuple):
    """One sample. where: file and row; answer: None where the table has none; score: in [0, 1], where it has one."""

    where: str
    sample_id: str
    answer: str | None
    confidence: dict[str, float | None]
    score: float | None = None
    image_id: str | None = None


class TableFile(NamedTuple):
    """A file that was read: its name, hash and rows."""

    name: str
    sha256: str
    n_rows: int


@dataclass(frozen=True)
class AnswerTable:
    """All rows of the files by sample id, in their order.

    without_confidence: where a confidence is missing or unusable, and why. absent: optional columns that no file has.
    """

    rows: dict[str, AnswerRow]
    without_confidence: list[str]
    absent: list[str]
    files: list[TableFile]


def read_tables(
    files: Sequence[Path], columns: TableColumns, *, log_probability: bool = False, allow_missing: bool = False
) -> AnswerTable:
    """The rows of all files.

    Args:
        files: ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson`` or ``.parquet``; UTF-8, with a header where the format has
            one.
        columns: their names, the same in all files.
        log_probability: the confidence columns hold natural logarithms of probabilities.
        allow_missing: take rows whose confidence is missing, no number or no probability; they then have none.

    Raises:
        TableError: a file cannot be read to its end, lacks a column, an id is missing or comes twice, a score is no
            number from 0 to 1, or (unless ``allow_missing``) a confidence is not usable.
        OSError: a file cannot be opened.
    """
    rows: dict[str, AnswerRow] = {}
    unusable: list[_Unusable] = []
    read: list[TableFile] = []
    absent = set(columns.optional)
    for file in files:
        n = 0
        for where, values in _raw_rows(file, columns):
            n += 1
            absent -= values.keys()
            row = _row(where, values, columns, log_probability, unusable)
            known = rows.setdefault(row.sample_id, row)
            if known is not row:
                raise TableError(
                    f"{where}: the sample {row.sample_id!r} stands at {known.where} already; one answer to a sample: "
                    "remove the other"
                )
        if n == 0:
            raise TableError(f"{file}: holds no rows")
        with file.open("rb") as stream:
            read.append(TableFile(file.name, _sha256(stream), n))
    unusable = [one for one in unusable if one.column not in absent]
    if unusable and not allow_missing:
        raise TableError(_confidence_error(unusable, log_probability))
    return AnswerTable(rows, [str(one) for one in unusable], sorted(absent), read)


class _Unusable(NamedTuple):
    where: str
    sample_id: str
    column: str
    why: str
    number: float | None

    def __str__(self) -> str:
        return f"{self.where}: sample {self.sample_id!r}: {self.column} {self.why}"


def some(found: Iterable[object], limit: int = _SHOWN) -> str:
    """The first few of a list, and how many more there are."""
    listed = list(found)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(map(str, listed[:limit])) + more


def _row(
    where: str, values: Mapping[str, Any], columns: TableColumns, log_probability: bool, unusable: list[_Unusable]
) -> AnswerRow:
    sample_id = _text(values.get(columns.sample_id), where, columns.sample_id)
    if not sample_id:
        raise TableError(f"{where}: the id ({columns.sample_id}) is missing; every answer needs its sample's id")
    answer = None if columns.answer is None else _text(values.get(columns.answer), where, columns.answer)
    confidence: dict[str, float | None] = {}
    for name, column in columns.confidences.items():
        number, why = _number(values.get(column))
        if number is not None:
            probability, why = _probability(number, log_probability)
        else:
            probability = None
        if why:
            unusable.append(_Unusable(where, sample_id, column, why, number))
        confidence[name] = probability
    score = None
    if columns.score is not None:
        score, why = _number(values.get(columns.score))
        if score is None or not -_ROUNDING <= score <= 1 + _ROUNDING:
            hint = "; percentages are divided by 100" if score is not None and 1 < score <= 100 else ""
            got = why or f"is {score:g}"
            raise TableError(
                f"{where}: sample {sample_id!r}: {columns.score} {got}; a score is a number from 0 (wrong) to 1 (right)"
                f"{hint}; an answer that failed scores 0"
            )
        score = min(max(score, 0.0), 1.0)
    image = None
    if columns.image is not None:
        image = _text(values.get(columns.image), where, columns.image) or None
    return AnswerRow(where, sample_id, answer, confidence, score, image)


def _text(value: Any, where: str, column: str) -> str | None:
    """A cell as text; None for an absent one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise TableError(f"{where}: {column}: expected a text or a number, got {_short(value)}")
    text = str(value)
    if "\0" in text or (not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text)):
        raise TableError(
            f"{where}: {column}: holds a NUL character or half a character; the file is damaged, or no text"
        )
    return text


def _number(value: Any) -> tuple[float | None, str]:
    """A cell as a finite number, or None and why not."""
    if value is None or value == "":
        return None, "is missing"
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real, Decimal)):
        return None, f"is no number: {_short(value)}"
    try:
        number = float(value.replace("_", "?") if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None, f"is no number: {_short(value)}"
    return (number, "") if math.isfinite(number) else (None, f"is {number}")


def _probability(number: float, log_probability: bool) -> tuple[float | None, str]:
    if log_probability:
        if number > _ROUNDING:
            return None, f"is {number:g}, and a log-probability is at most 0"
        return min(math.exp(number), 1.0), ""
    if not -_ROUNDING <= number <= 1 + _ROUNDING:
        return None, f"is {number:g}, outside of 0 to 1"
    return min(max(number, 0.0), 1.0), ""


def _confidence_error(unusable: Sequence[_Unusable], log_probability: bool) -> str:
    outside = [one.number for one in unusable if one.number is not None]
    hint = ""
    if outside and not log_probability and max(outside) < 0:
        hint = "; if the column holds log-probabilities, give --log-probability"
    elif outside and not log_probability and 1 < max(outside) <= 100 and min(outside) > 1:
        hint = "; if they are percentages, divide by 100"
    elif outside and log_probability:
        hint = "; if the column holds probabilities, leave --log-probability out"
    return (
        f"{len(unusable)} confidences cannot be used: {some(unusable)}{hint}. Correct them, or give "
        "--allow-missing-confidence to import these answers without a confidence (they then count as the last to be "
        "answered)"
    )


def _raw_rows(file: Path, columns: TableColumns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file:row, column -> cell) of a table's rows, columns checked."""
    kind = file.suffix.lower()
    if kind in _DELIMITERS:
        return _delimited(file, _DELIMITERS[kind], columns)
    if kind in _JSON_LINES:
        return _json_lines(file, columns)
    if kind == _PARQUET:
        return _parquet(file, columns)
    known = ", ".join((*_DELIMITERS, *_JSON_LINES, _PARQUET))
    raise TableError(f"{file}: the name's ending says which format a table has; known: {known}")


def _delimited(file: Path, delimiter: str, columns: TableColumns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        # strict: a quote that is not closed is an error, not a very long field
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        lines = _decoded(reader, lambda: f"{file.name}:{reader.line_num}")
        header = next(lines, None)
        if not header:
            raise TableError(f"{file}: is empty; the first line names the columns")
        _check_columns(file, header, columns)
        for cells in lines:
            where = f"{file.name}:{reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise TableError(
                    f"{where}: {len(cells)} fields, the header has {len(header)}; cut short, or a {delimiter!r} "
                    "inside a text without quotes"
                )
            yield where, dict(zip(header, cells, strict=True))


def _decoded(reader: Iterator[list[str]], where: Callable[[], str]) -> Iterator[list[str]]:
    while True:
        try:
            cells = next(reader, None)
        except UnicodeDecodeError as error:
            raise TableError(f"{where()}: no UTF-8 text ({error}); save the table as UTF-8") from error
        except csv.Error as error:
            raise TableError(
                f"{where()}: no valid table: {error}; is the file cut short, or a quote left open?"
            ) from error
        if cells is None:
            return
        yield cells


def _json_lines(file: Path, columns: TableColumns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    seen: dict[str, None] = {}
    number = 0
    with file.open("rb") as stream:
        while data := stream.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{file.name}:{number}"
            if len(data) > LONGEST_LINE:
                raise TableError(f"{where}: a line of more than {LONGEST_LINE:,} bytes; one JSON object a line")
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text, object_pairs_hook=_distinct)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
                cut = "" if data.endswith(b"\n") else "; the file ends in this line: cut short?"
                raise TableError(f"{where}: no JSON object ({error}){cut}") from error
            if not isinstance(row, dict):
                raise TableError(f'{where}: expected a JSON object such as {{"id": …}}, got {_short(row)}')
            if not seen:  # a confidence may be left out of a row, and so of the first one
                _check_columns(file, list(dict.fromkeys([*row, *columns.confidences.values()])), columns)
            seen |= dict.fromkeys(row)
            yield where, row
    if seen:
        _check_columns(file, list(seen), columns)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _parquet(file: Path, columns: TableColumns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TableError(
            f'{file}: reading parquet needs pyarrow: pip install pyarrow (it comes with "bitquake[eval]"), or save the '
            "table as CSV or JSON lines"
        ) from error
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            names = list(table.schema_arrow.names)
            _check_columns(file, names, columns)
            for batch in table.iter_batches(columns=[name for name in columns.wanted if name in names]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise TableError(f"{file}: not readable parquet after row {number} ({error}); write it again") from error


def _check_columns(file: Path, header: Sequence[str], columns: TableColumns) -> None:
    twice = sorted(name for name, n in Counter(header).items() if n > 1)
    if twice:
        raise TableError(f"{file}: the column {twice[0]!r} is there twice; rename one")
    lacking = [name for name in columns.wanted if name not in header and name not in columns.optional]
    if lacking:
        raise TableError(
            f"{file}: has no column {lacking[0]!r}; it has {some(map(repr, header), 12)}; the options --id-column, "
            "--answer-column, --confidence-column and --score-column name them"
        )


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while part := stream.read(LONGEST_LINE):
        digest.update(part)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
