"""Tables that are no parquet, as datasets that lmms-eval can load: JSON, JSON lines or CSV with pictures beside them.

lmms-eval calls ``load_dataset`` itself, before any function of a task, and hands on what stands in the task's YAML. So
a task of such a table says ``dataset_path: parquet`` and names a file of our cache. It is written when lmms-eval asks
for the task's functions, which is before it loads the task's data: registering a hundred families reads no table.
Pictures stay where they are, rows name their files: nothing is copied, and a damaged one is one counted failure as
anywhere.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict

from .schema import FIELD_OF_PATTERN, IMAGE_COLUMN, TABLES, FamilyError

MAX_TABLE = 1 << 30
"""Bytes; a table is held in memory while it is read, and whoever has a larger one makes parquet of it."""
_LEFT_BEHIND = 24 * 3600
"""Seconds."""
_SHOWN = 10
_WRITTEN_FROM = b"bitquake"
"""Key of a converted file's metadata: what it was made from."""


class Source(BaseModel):
    """A table of rows that is not parquet.

    file: its path, absolute, or inside ``package``; package: an installed Python package; fields: names of the columns
    of a JSON list of lists; image: the pictures' files, relative to the table's folder, as a pattern of columns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    package: str | None = None
    fields: list[str] | None = None
    image: str | None = None

    def path(self) -> Path:
        """Where the table is.

        Raises:
            FamilyError: the package is not installed.
        """
        return Path(self.file) if self.package is None else package_folder(self.package) / self.file

    def converted(self) -> Path:
        """The parquet file that is made of it, in the user's cache; its name says what it is made from."""
        name = hashlib.blake2b(self.model_dump_json().encode(), digest_size=12).hexdigest()
        return platformdirs.user_cache_path("bitquake", appauthor=False) / "tables" / f"{name}.parquet"


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is found without running any of its code.

    Raises:
        FamilyError: there is none of that name, or it has no folder.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that was made by hand has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        hint = package.replace("_", "-")
        raise FamilyError(f"the Python package {package!r}, which holds the data, is not installed; pip install {hint}")
    return Path(next(iter(spec.submodule_search_locations)))


def prepared_folder(dataset: str) -> Path:
    """Where ``bitquake data prepare`` puts a dataset that it builds, and where tasks read it."""
    return datasets_folder() / dataset


def datasets_folder() -> Path:
    """The folder of all datasets that ``bitquake data prepare`` has built."""
    return platformdirs.user_data_path("bitquake", appauthor=False) / "datasets"


def make_ready(file: Path, source: Source | None) -> None:
    """See to it that a task's parquet file is there and whole; convert the table that it is made from, if it changed.

    lmms-eval would try to load a missing or damaged file five times, and report that it tried.

    Raises:
        FamilyError: the file, the table, or the pictures that its rows name are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source is not None:
        _convert(file, source, source.path())
        return
    try:
        pq.read_metadata(file)
    except FileNotFoundError as error:
        if file.parent.parent == datasets_folder():
            name = file.parent.name
            raise FamilyError(
                f"the dataset {name!r} is not prepared on this machine (no {file}); `bitquake data prepare {name}` "
                "says what it needs, and builds it"
            ) from error
        raise FamilyError(f"there is no {file}; put it there, or correct dataset.files") from error
    except (OSError, pa.ArrowException) as error:
        raise FamilyError(f"{file} is not readable parquet ({error}); make it again, or fetch it again") from error


def revision(dataset: Any, file: Path | None) -> str:
    """What a task's rows are a version of: the commit of a dataset of the hub, or ``blake2b:`` and the file's hash.

    Args:
        dataset: as ``datasets`` loaded it.
        file: the parquet file that it was loaded from; None for a dataset of the hub.

    Returns:
        "" where nothing tells it: a dataset that is neither, or in memory.
    """
    if file is not None and file.is_file():
        return _file_hash(str(file), file.stat().st_mtime_ns)
    # datasets notes no commit beside the data, but keeps a dataset of the hub in a folder that is named by it.
    folders = {Path(cached["filename"]).parent.name for cached in dataset.cache_files}
    commits = [name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)]
    return commits[0] if len(folders) == len(commits) == 1 else ""


@functools.lru_cache(maxsize=256)
def _file_hash(file: str, changed: int) -> str:
    import pyarrow.parquet as pq

    written_from = (pq.read_schema(file).metadata or {}).get(_WRITTEN_FROM)
    if written_from is not None:
        return str(json.loads(written_from)["content"])
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return f"blake2b:{digest.hexdigest()}"


def _convert(file: Path, source: Source, table: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = table.stat()
    except OSError as error:
        raise FamilyError(f"there is no {table} ({error.strerror}); put it there, or correct dataset.files") from error
    if found.st_size > MAX_TABLE:
        raise FamilyError(f"{table}: {found.st_size:,} bytes, more than the {MAX_TABLE:,} read; make parquet of it")
    origin: dict[str, Any] = {"table": str(table), "size": found.st_size, "changed": found.st_mtime_ns}
    try:
        there = json.loads((pq.read_schema(file).metadata or {})[_WRITTEN_FROM])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        there = {}
    if all(there.get(key) == value for key, value in origin.items()):
        return
    rows = read_table(table, source.fields)
    if source.image is not None:
        _add_images(rows, table, source.image)
    try:
        built = pa.Table.from_pylist(rows)
    except (pa.ArrowException, OverflowError) as error:
        raise FamilyError(
            f"{table}: a column holds values of different kinds ({error}); give each column one"
        ) from error
    features = datasets.Features.from_arrow_schema(built.schema)
    if source.image is not None:
        features[IMAGE_COLUMN] = datasets.Image()
    schema = features.arrow_schema
    origin["content"] = f"blake2b:{hashlib.blake2b(table.read_bytes(), digest_size=16).hexdigest()}"
    schema = schema.with_metadata({**(schema.metadata or {}), _WRITTEN_FROM: json.dumps(origin).encode()})
    with replacing(file) as new:
        pq.write_table(built.cast(schema), new)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new file beside ``file`` to write to; it takes that one's place when the block ends without an error.

    What a process that was killed left behind goes after a day, when surely none writes to it any more.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{file.stem}-*{file.suffix}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_BEHIND:
                left.unlink()
    handle, name = tempfile.mkstemp(prefix=f".{file.stem}-", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        new.chmod(0o644)
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def read_table(table: Path, fields: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a JSON (a list of mappings, or with ``fields`` of lists), JSON lines, or CSV (with a header) file.

    A CSV column in which every value is an integer holds integers, any other one holds texts.

    Raises:
        FamilyError: not readable, of another form, or without rows; with the line or the number of the row.
    """
    form = TABLES.get(table.suffix.lower())
    try:
        if form == "csv":
            rows = list(_csv_rows(table, fields))
        elif form == "jsonl":
            rows = list(_json_rows(table, _json_lines(table), fields))
        else:
            rows = list(_json_rows(table, _parsed(table.read_text(encoding="utf-8-sig"), str(table)), fields))
    except UnicodeDecodeError as error:
        raise FamilyError(f"{table}: not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise FamilyError(f"{table}: cannot be read ({error.strerror or error})") from error
    if not rows:
        raise FamilyError(f"{table}: holds no rows; put some into it")
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FamilyError(f"{where}: not valid JSON ({error or 'nested too deeply'}); it may be cut short") from error


def _json_lines(table: Path) -> Iterator[Any]:
    with table.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(line, f"{table}:{number}")


def _json_rows(table: Path, data: Any, fields: list[str] | None) -> Iterator[dict[str, Any]]:
    if isinstance(data, Mapping | str) or not hasattr(data, "__iter__"):
        raise FamilyError(f"{table}: expected a list of rows, got {_kind(data)}")
    for number, row in enumerate(data, 1):
        if fields is None and not isinstance(row, dict):
            hint = "; give dataset.fields, the names of its columns" if isinstance(row, list) else ""
            raise FamilyError(f"{table}: row {number}: expected a mapping, got {_kind(row)}{hint}")
        if fields is not None:
            if not isinstance(row, list) or len(row) != len(fields):
                got = f"{len(row)} values" if isinstance(row, list) else _kind(row)
                raise FamilyError(f"{table}: row {number}: dataset.fields names {len(fields)} columns, got {got}")
            row = dict(zip(fields, row, strict=True))
        yield row


def _csv_rows(table: Path, fields: list[str] | None) -> Iterator[dict[str, Any]]:
    with table.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            names = fields or next(reader, [])
            values = []
            for row in reader:
                if row and len(row) != len(names):
                    raise FamilyError(f"{table}:{reader.line_num}: {len(names)} columns, but {len(row)} values")
                values += [row] if row else []
        except csv.Error as error:
            raise FamilyError(f"{table}:{reader.line_num}: not valid CSV ({error})") from error
    columns = [list(column) for column in zip(*values, strict=True)]
    whole = [all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", value) for value in column) for column in columns]
    for row in values:
        yield {name: int(value) if n else value for name, value, n in zip(names, row, whole, strict=True)}


def _add_images(rows: list[dict[str, Any]], table: Path, pattern: str) -> None:
    """Add to each row the column ``image`` with the path of its picture."""
    missing: dict[str, None] = {}
    there: set[str] = set()
    for number, row in enumerate(rows, 1):
        if IMAGE_COLUMN in row and f"{{{IMAGE_COLUMN}" not in pattern:
            raise FamilyError(f"{table}: has a column {IMAGE_COLUMN!r} already, and dataset.image would replace it")
        path = str(table.parent / fill_pattern(pattern, row, f"{table}: row {number}"))
        if path not in there:
            if os.path.isfile(path):
                there.add(path)
            else:
                missing[path] = None
        row[IMAGE_COLUMN] = {"bytes": None, "path": path}
    if missing:
        raise FamilyError(
            f"{table}: {len(missing)} of {len(missing) + len(there)} pictures are not there: {listed(missing)}. "
            f"Put them there, or correct dataset.image ({pattern!r})."
        )


def fill_pattern(pattern: str, row: Mapping[str, Any], where: str) -> str:
    """The relative path that a pattern (``{column}``, ``{column:012d}``) gives for a row.

    Raises:
        FamilyError: a column is missing, is no integer where one is wanted, or the path would lead out of the folder.
    """

    def value(match: re.Match[str]) -> str:
        column, digits = match[1], match[2]
        if row.get(column) is None:
            raise FamilyError(f"{where}: no value for {match[0]} of {pattern!r}; it has {', '.join(map(str, row))}")
        if digits is None:
            return str(row[column])
        try:
            return f"{int(row[column]):0{int(digits)}d}"
        except (TypeError, ValueError) as error:
            raise FamilyError(f"{where}: {column} is {row[column]!r}, no integer, for {match[0]}") from error

    path = FIELD_OF_PATTERN.sub(value, pattern)
    outside = os.path.normpath(path).startswith("..") or os.path.isabs(path) or "\\" in path or ":" in path
    if outside or "\0" in path:
        raise FamilyError(f"{where}: {pattern!r} gives {path!r}, which leads out of the folder")
    return path


def listed(names: Mapping[str, Any] | list[str]) -> str:
    """The first ten of many, and how many more there are."""
    shown = list(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(map(str, shown)) + (f" and {more} more" if more else "")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
