"""Tables that are no parquet: what they become, when, and what is said of the ones that cannot."""

from __future__ import annotations

import csv
import json
import os
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet
from hypothesis import given
from hypothesis import strategies as st

from bitquake.noise import load_rgb
from bitquake.tasks import catalog, sources
from bitquake.tasks.expand import builtin_index
from bitquake.tasks.families import FamilyError, load_family
from bitquake.tasks.glue import functions_of
from bitquake.tasks.sources import Source, fill_pattern, make_ready, read_table

FAMILY = """
family: shapes
title: t
source: s
license: l
world: real
dataset: {{files: {{test: {file}, train: {file}}}{more}}}
splits: {{test: test, threshold: train}}
columns: {{answers: answer, sample_id: id}}
protocol: vqa
annotators: 1
variants: {{noise: {{names: [fog], severities: [3]}}}}
"""
ROWS: list[dict[str, Any]] = [
    {"id": i, "question": f"is it {i}?", "answer": "yes" if i % 2 else "no", "picture": i // 2} for i in range(6)
]


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_lists(rows: list[dict[str, Any]]) -> str:
    return json.dumps([list(row.values()) for row in rows])


def as_csv(rows: list[dict[str, Any]]) -> str:
    return "id,question,answer,picture\r\n" + "".join(f"{','.join(map(str, row.values()))}\r\n" for row in rows)


FORMS = {
    "t.json": (json.dumps, ""),
    "l.json": (as_lists, ", fields: [id, question, answer, picture]"),
    "t.jsonl": (as_jsonl, ""),
    "t.csv": (as_csv, ""),
}
MakeShapes = Callable[..., Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(
    tmp_path: Path, cache: Path, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> MakeShapes:
    """A family folder with a table, and three pictures beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def make(text: str, file: str = "t.json", more: str = "", image: str = "images/{picture}.png") -> Path:
        folder = tmp_path / "shapes"
        (folder / "images").mkdir(parents=True)
        for i in range(3):
            (folder / "images" / f"{i}.png").write_bytes(make_picture(i))
        (folder / file).write_text(text)
        written = FAMILY.format(file=file, more=f'{more}, image: "{image}"')
        (folder / "family.yaml").write_text(written)
        return folder

    return make


def loaded_rows(folder: Path) -> datasets.Dataset:
    file = load_family(folder / "family.yaml").split_file("test")
    return datasets.load_dataset("parquet", data_files={"test": str(file)})["test"]


@pytest.mark.parametrize("file", FORMS)
def test_every_form_becomes_the_same_dataset(file: str, make: MakeShapes, make_picture: Callable[..., bytes]) -> None:
    write, more = FORMS[file]
    folder = make(write(ROWS), file, more)
    assert catalog.validate(folder) == []
    dataset = loaded_rows(folder)
    assert isinstance(dataset.features["image"], datasets.Image)
    assert [{key: row[key] for key in ROWS[0]} for row in dataset] == ROWS
    for row in dataset:
        assert (load_rgb(row["image"]) == load_rgb(make_picture(row["picture"]))).all()


def test_registering_reads_no_table_and_loading_a_task_converts_it(make: MakeShapes, tmp_path: Path) -> None:
    folder = make("this is no JSON", "t.json")
    root = builtin_index([folder], tmp_path / "tasks").root
    table = load_family(folder / "family.yaml").split_file("test")
    assert not table.exists()
    get = functions_of(str(root / "shapes" / "glue.py"))
    with pytest.raises(FamilyError, match=r"shapes_clean: .*t.json: not valid JSON"):
        get("process_docs__shapes_clean")
    (folder / "t.json").write_text(json.dumps(ROWS))
    get("process_docs__shapes_clean")
    assert loaded_rows(folder)["id"][:] == [0, 1, 2, 3, 4, 5]
    written = table.stat().st_mtime_ns
    get("process_docs__shapes_fog_3")
    assert table.stat().st_mtime_ns == written  # as it was: nothing changed
    (folder / "t.json").write_text(json.dumps(ROWS[:4]))
    get("process_docs__shapes_fog_3")
    assert loaded_rows(folder)["id"][:] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "file", "more", "message"),
    [
        ('[{"id": 1}, {"id"', "t.json", "", r"t.json: not valid JSON .*cut short"),
        ('{"id": 1}', "t.json", "", r"expected a list of rows, got dict"),
        ("[]", "t.json", "", r"holds no rows"),
        ("[[1, 2]]", "t.json", "", r"row 1: expected a mapping, got list .*; give dataset.fields"),
        ("[[1, 2]]", "t.json", ", fields: [id]", r"row 1: dataset.fields names 1 columns, got 2 values"),
        ('{"id": 1}\n{"id": ', "t.jsonl", "", r"t.jsonl:2: not valid JSON"),
        ("id,picture\n1,2\n3\n", "t.csv", "", r"t.csv:3: 2 columns, but 1 values"),
        ('id,picture\n1,"2\n', "t.csv", "", r"t.csv:2: not valid CSV"),
        (json.dumps([ROWS[0], ROWS[1] | {"answer": 7}]), "t.json", "", r"holds values of different kinds"),
        (json.dumps([{"id": 1}]), "t.json", "", r"row 1: no value for \{picture\} of 'images.*'; it has id"),
        (json.dumps([*ROWS, ROWS[0] | {"picture": 44}]), "t.json", "", r"1 of 4 pictures are not there: .*44.png"),
        (json.dumps([ROWS[0] | {"picture": "../../x"}]), "t.json", "", r"leads out of the folder"),
        (json.dumps([ROWS[0] | {"picture": "a\0b"}]), "t.json", "", r"leads out of the folder"),
        (json.dumps([ROWS[0] | {"image": 1}]), "t.json", "", r"has a column 'image' already"),
        (json.dumps([{"id": 1, "question": "q", "picture": 0}]), "t.json", "", r"columns.answers: .* 'answer'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_file_and_place(
    text: str, file: str, more: str, message: str, make: MakeShapes
) -> None:
    folder = make(text, file, more)
    problems = "\n".join(catalog.validate(folder))
    assert re.search(message, problems), problems
    assert f"{folder}/family.yaml:" in problems
    assert len(problems.splitlines()) == 2  # one for each split


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{files: {test: t.txt, train: t.json}}", r"files.test: 't.txt' ends with none of .parquet, .json"),
        ("{files: {test: t.parquet, train: t.json}, fields: [a]}", r"`fields` belongs to JSON"),
        ("{path: a/b, image: 'x/{id}.png'}", r"`image` belongs to `files`"),
        ("{files: {test: t.json, train: t.json}, image: '../{id}.png'}", r"inside the table's folder"),
        ("{files: {test: t.json, train: t.json}, image: 'x.png'}", r"a path with columns in braces"),
        ("{files: {test: t.json, train: t.json}, image: '{id.__class__}.png'}", r"a path with columns in braces"),
        ("{files: {test: t.json, train: t.json}, fields: [a, a]}", r"field 'a' is named twice"),
        ("{package: a.b, files: {test: t.json, train: t.json}}", r"dataset.package: String should match"),
        ("{package: a, files: {test: ../t.json, train: t.json}}", r"must lie in the folder of the package"),
    ],
)
def test_family_files_that_ask_for_something_else(dataset: str, message: str, tmp_path: Path) -> None:
    text = FAMILY.format(file="t.json", more="")
    line = next(line for line in text.splitlines() if line.startswith("dataset"))
    (tmp_path / "family.yaml").write_text(text.replace(line, f"dataset: {dataset}"))
    with pytest.raises(FamilyError, match=message):
        load_family(tmp_path / "family.yaml")


def test_a_package_is_found_without_running_it(
    make: MakeShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(json.dumps(ROWS), "t.json", ", package: shapes_for_tests")
    [problem, _] = catalog.validate(folder)
    assert "'shapes_for_tests', which holds the data, is not installed; pip install shapes-for-tests" in problem
    for file in ("t.json", "images"):
        (folder / file).rename(tmp_path / file)
    package = tmp_path / "site" / "shapes_for_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('was run')")
    for file in ("t.json", "images"):
        (tmp_path / file).rename(package / file)
    monkeypatch.syspath_prepend(str(package.parent))
    assert catalog.validate(folder) == []
    assert "shapes_for_tests" not in sys.modules
    assert loaded_rows(folder)["id"][:] == [0, 1, 2, 3, 4, 5]


def test_files_that_lmms_eval_would_fail_on_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(FamilyError, match=r"there is no .*t.parquet; put it there"):
        make_ready(tmp_path / "t.parquet", None)
    file = tmp_path / "t.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    make_ready(file, None)
    whole = file.read_bytes()
    for data in (whole[:-100], whole[:50], b""):
        file.write_bytes(data)
        with pytest.raises(FamilyError, match=r"is not readable parquet .*make it again"):
            make_ready(file, None)
    with pytest.raises(FamilyError, match=r"'advqa' is not prepared on this machine .*`bitquake data prepare advqa`"):
        make_ready(sources.prepared_folder("advqa") / "validation.parquet", None)


def test_revision_is_the_commit_or_the_hash_of_what_was_read(make: MakeShapes, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    # What datasets does for a dataset of the hub: `hash` is then the commit that was asked for.
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "t.parquet"))
    for name, expected in ((commit, commit), ("9" * 64, "")):
        files = {"test": [str(tmp_path / "t.parquet")]}
        builder = Parquet(cache_dir=str(tmp_path / "arrow"), dataset_name="vqav2", hash=name, data_files=files)
        builder.download_and_prepare()
        assert sources.revision(builder.as_dataset("test"), None) == expected
    assert sources.revision(datasets.Dataset.from_list(ROWS), None) == ""
    folder = make(json.dumps(ROWS))
    assert catalog.validate(folder) == []
    file = load_family(folder / "family.yaml").split_file("test")
    first = sources.revision(loaded_rows(folder), file)
    os.utime(folder / "t.json", (1, 1))  # another time, the same content
    assert catalog.validate(folder) == []
    assert sources.revision(loaded_rows(folder), file) == first
    (folder / "t.json").write_text(json.dumps(ROWS[:5]))
    assert catalog.validate(folder) == []
    assert sources.revision(loaded_rows(folder), file) != first


def test_what_a_killed_process_left_behind_goes_after_a_day(tmp_path: Path) -> None:
    file, old, young, other = (
        tmp_path / name for name in ("t.parquet", ".t-a.parquet", ".t-b.parquet", ".u-a.parquet")
    )
    for left in (old, young, other):
        left.write_text("half")
    for left in (old, other):
        os.utime(left, (1, 1))
    with sources.replacing(file) as new:
        new.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {file.name, young.name, other.name}
    assert file.read_text() == "whole"


def test_a_decompression_bomb_is_one_counted_failure(
    make: MakeShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PNG of 100 bytes that declares 60,000 x 60,000 pixels, among pictures that are fine, through lmms-eval."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from bitquake.envelope import Envelope
    from bitquake.noise import ImageError

    lmms = pytest.importorskip("lmms_eval.api.model").lmms

    class Yes(lmms):  # type: ignore[misc,name-defined]
        is_simple = False

        def generate_until(self, requests: list[Any]) -> list[str]:
            out = []
            for request in requests:
                _, doc_to_messages, _, doc_id, task, split = request.args
                try:
                    doc_to_messages(self.task_dict[task][split][doc_id])
                    out.append(Envelope(text="yes", confidence={"joint": 0.5}).encode())
                except ImageError as error:
                    out.append(Envelope(text="", error=f"image: {error}").encode())
            return out

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    folder = make(json.dumps(ROWS))
    (folder / "images" / "1.png").write_bytes(bomb)
    root = builtin_index([folder], tmp_path / "tasks").root
    manager = TaskManager(include_path=str(root / "shapes"), include_defaults=False)
    results = simple_evaluate(model=Yes(), tasks=["shapes_clean"], task_manager=manager, batch_size=1)
    assert results is not None
    records = [line["bitquake"] for line in results["samples"]["shapes_clean"]]
    assert [record["failure"] for record in records] == [None, None, "image", "image", None, None]
    assert "decompression bomb" in records[2]["failure_detail"]
    assert [record["score"] for record in records] == [0, 1, 0, 0, 0, 1]
    assert results["results"]["shapes_clean"]["failures,none"] == 2
    # Of the file that the task read, from lmms-eval's log.
    assert {record["dataset_revision"] for record in records} == {
        sources.revision(None, load_family(folder / "family.yaml").split_file("test"))
    }
    assert records[0]["dataset_revision"].startswith("blake2b:")


@given(st.lists(st.tuples(st.text(), st.integers(), st.text()), min_size=1, max_size=8))
def test_csv_gives_back_what_the_standard_writer_wrote(rows: list[tuple[str, int, str]]) -> None:
    rows = [(a.replace("\0", ""), n, "x" + b.replace("\0", "")) for a, n, b in rows]
    rows = [(a.encode("utf-8", "replace").decode(), n, b.encode("utf-8", "replace").decode()) for a, n, b in rows]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.csv"
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("a", "n", "b"), *rows])
        got = read_table(file)
    # Columns of integers alone are integers; the last one never is.
    assert [(str(row["a"]), str(row["n"]), row["b"]) for row in got] == [(a, str(n), b) for a, n, b in rows]


@given(st.text(max_size=12))
def test_no_value_leads_out_of_the_folder(value: str) -> None:
    root = Path("/data/set").resolve()
    try:
        path = fill_pattern("images/{id}.png", {"id": value}, "here")
    except FamilyError:
        return
    assert (root / path).resolve().is_relative_to(root)


def test_an_unread_table_leaves_the_converted_one(make: MakeShapes) -> None:
    folder = make(json.dumps(ROWS))
    source = load_family(folder / "family.yaml").source("test")
    assert isinstance(source, Source)
    make_ready(source.converted(), source)
    (folder / "t.json").unlink()
    with pytest.raises(FamilyError, match=r"there is no .*t.json"):
        make_ready(source.converted(), source)
    assert source.converted().is_file()
    assert {path.suffix for path in source.converted().parent.iterdir()} == {".parquet"}  # nothing half written
