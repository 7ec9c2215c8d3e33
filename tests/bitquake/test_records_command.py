"""``bitquake records import``: another engine's answers give what lmms-eval would have given, or it says why not."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitquake import cli
from bitquake.answer_tables import TableColumns, TableError, read_tables
from bitquake.quant_card import QuantCard
from bitquake.records import SampleRecord
from bitquake.records_command import Declared, ImportOptions, confidence_columns, import_records
from bitquake.reports import build, read_runs
from bitquake.reports.pairing import pair_runs

TASKS = {"block_vqav2_clean": "joint", "block_refcocoplus_clean": "box_joint", "block_scienceqa_clean": "options"}
LIMIT = 30
MODEL = Declared("bitquake/block-idefics3")


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the reference model through lmms-eval's own command line."""
    folder = tmp_path_factory.mktemp("real")
    arguments = f"pretrained={MODEL.model},quant=rtn-int3-g64,artifacts={folder / 'artifacts'},dtype=float32"
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "bitquake_hf", "--model_args", arguments, "--device", "cpu"),
        *("--tasks", ",".join(TASKS), "--limit", str(LIMIT), "--batch_size", "20", "--log_samples"),
        *("--output_path", str(folder / "run")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert len(list(folder.rglob("*_samples_*.jsonl"))) == len(TASKS), done.stderr[-3000:]
    return folder


def records_of(folder: Path, task: str) -> list[SampleRecord]:
    [file] = folder.rglob(f"*_samples_{task}.jsonl")
    return [SampleRecord.model_validate(json.loads(line)["bitquake"]) for line in file.open()]


def write_csv(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(records: list[SampleRecord], confidence: str) -> list[dict[str, Any]]:
    return [{"id": r.sample_id, "answer": r.text, "confidence": r.confidence.get(confidence)} for r in records]


def write_as(kind: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_csv(path, rows, delimiter="\t" if kind == "tsv" else ",")
    return path


def test_an_imported_run_gives_the_numbers_of_the_run_that_it_was_exported_from(real_run: Path, tmp_path: Path) -> None:
    for task, confidence in TASKS.items():
        rows = rows_of(records_of(real_run, task), confidence)
        table = write_csv(tmp_path / f"{task}.csv", rows[::-1])  # in any order
        done = import_records([table], task, MODEL, tmp_path / "imported", ImportOptions(
            limit=LIMIT, allow_missing_confidence=True
        ))  # fmt: skip
        assert (done.n, done.expected, done.missing, done.failures) == (LIMIT, LIMIT, [], {})
    original = build([real_run / "run"], tmp_path / "a", artifacts=real_run / "artifacts", replicates=200)
    imported = build([tmp_path / "imported"], tmp_path / "b", replicates=200)
    assert not [problem for problem in imported.problems if problem.level == "error" and "no pair" not in problem.what]
    assert [cell.task for cell in imported.report.cells] == [cell.task for cell in original.report.cells]
    for ours, theirs in zip(imported.report.cells, original.report.cells, strict=True):
        assert ours.metrics == theirs.metrics
        assert ours.parse_failures == theirs.parse_failures
        assert (ours.curve, ours.bins, ours.chance_ece) == (theirs.curve, theirs.bins, theirs.chance_ece)
        # The option letter's probability comes with an envelope only.
        assert ours.scores == {name: value for name, value in theirs.scores.items() if name != "letter"}
        known = {"model_hash", "card", "pixel_hash", "prompt_hash", "n_tokens", "confidence", "scores", "features"}
        for a, b in zip(
            records_of(tmp_path / "imported", ours.task), records_of(real_run / "run", ours.task), strict=True
        ):
            assert a.model_dump(exclude=known) == b.model_dump(exclude=known)
    page = (tmp_path / "b" / "models.html").read_text()
    assert "imported, self-declared" in page and "full-precision (imported)" in page
    assert "imported, self-declared" not in (tmp_path / "a" / "models.html").read_text()
    assert "0.00" not in page and "undeclared on" not in page


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_records(real_run: Path, tmp_path: Path, kind: str) -> None:
    task = "block_vqav2_clean"
    rows = rows_of(records_of(real_run, task), "joint")
    rows[3]["answer"] = 'with "quotes", a\ttab and\na line'
    expected: list[SampleRecord] | None = None
    for form in ("csv", kind):
        table = write_as(form, tmp_path / f"t.{form}", rows)
        out = tmp_path / form
        assert import_records([table], task, MODEL, out, ImportOptions(limit=LIMIT)).complete
        found = records_of(out, task)
        assert expected is None or found == expected
        expected = found


def test_named_confidences_columns_and_log_probabilities(real_run: Path, tmp_path: Path) -> None:
    task = "block_vqav2_clean"
    rows = [
        {"key": r.sample_id, "said": r.text, "lp": math.log(r.confidence["joint"] or 1), "mean": -0.5}
        for r in records_of(real_run, task)
    ]
    table = write_csv(tmp_path / "t.csv", rows)
    out = tmp_path / "out"
    arguments = [
        *("records", "import", str(table), "--task", task, "--model", MODEL.model, "--limit", str(LIMIT)),
        *("--id-column", "key", "--answer-column", "said", "--log-probability", "--out", str(out)),
        *("--confidence-column", "lp", "--confidence-column", "geometric_mean=mean", "--engine", "vllm=0.11.0"),
    ]
    assert cli.main(arguments) == 0
    for ours, theirs in zip(records_of(out, task), records_of(real_run, task), strict=True):
        assert ours.primary == pytest.approx(theirs.confidence["joint"], rel=1e-12)
        assert ours.confidence["geometric_mean"] == pytest.approx(math.exp(-0.5))
    [run] = read_runs([out]).runs
    assert run.card is not None and run.card.libraries == {"vllm": "0.11.0"}
    [command] = run.commands
    assert command.startswith("bitquake records import t.csv --task block_vqav2_clean") and str(tmp_path) not in command
    assert cli.main(arguments) == 0  # the same import again changes nothing
    table.write_text(table.read_text().replace("-0.5", "-0.6"))
    assert cli.main(arguments) == 2  # another one is not put in its place


def vqa_rows(n: int, confidence: float = 0.5) -> Iterator[dict[str, Any]]:
    from bitquake.tasks.imported import rows_of as task_rows

    for sample in task_rows("block_vqav2_clean").sample_ids[:n]:
        yield {"id": sample, "answer": "red", "confidence": confidence}


def test_missing_answers_are_counted_named_and_never_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(vqa_rows(20))
    gone = rows.pop(7)["id"]
    table = write_csv(tmp_path / "t.csv", [*rows, {"id": "test-999", "answer": "x", "confidence": 1}])
    arguments = ["records", "import", str(table), "--task", "block_vqav2_clean", "--model", "m", "--limit", "20"]
    assert cli.main([*arguments, "--out", str(tmp_path / "a")]) == 1
    shown = capsys.readouterr().out
    assert f"1 sample has no answer ({gone})" in shown and "19 of 20 samples imported" in shown
    assert "1 row names no expected sample of block_vqav2_clean, left out: test-999" in shown
    inputs = read_runs_or_problems(tmp_path / "a")
    assert "block_vqav2_clean is incomplete: 19 of 20 samples" in inputs
    assert cli.main([*arguments, "--out", str(tmp_path / "b"), "--missing-as-failures"]) == 0
    assert "failed, and scored 0: model 1" in capsys.readouterr().out
    found = {record.sample_id: record for record in records_of(tmp_path / "b", "block_vqav2_clean")}
    assert len(found) == 20
    assert (found[gone].score, found[gone].failure, found[gone].primary) == (0.0, "model", None)
    assert not read_runs([tmp_path / "b"]).runs[0].cells["block_vqav2_clean"].damage


def read_runs_or_problems(folder: Path) -> str:
    try:
        return "\n".join(map(str, read_runs([folder]).problems))
    except ValueError as error:
        return str(error)


def test_imports_pair_with_one_another_and_never_with_a_measured_run(real_run: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", list(vqa_rows(LIMIT)))
    options = ImportOptions(limit=LIMIT)
    for name, declared in (
        ("full", MODEL),
        ("int4", Declared(MODEL.model, "awq-int4")),
        ("own", Declared("my/checkpoint", "awq-int4", twin=MODEL.model)),
    ):
        import_records([table], "block_vqav2_clean", declared, tmp_path / "imported" / name, options)
    groups, problems = pair_runs(read_runs([tmp_path / "imported"]).runs)
    [group] = groups
    assert not problems and len(group.cells["block_vqav2_clean"]) == 3
    # The measured INT3 run has no measured twin: the imported one must not become it.
    mixed = read_runs([tmp_path / "imported" / "full", real_run / "run"], real_run / "artifacts")
    groups, problems = pair_runs(mixed.runs)
    assert all(len(group.runs) == 1 for group in groups)
    assert any("origin measured vs imported, self-declared" in problem.what for problem in problems)


def test_another_engine_or_version_makes_no_pair(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", list(vqa_rows(10)))
    options = ImportOptions(limit=10)
    for quantization, engine in (("", "vllm=0.11.0"), ("a", "vllm=0.11.0"), ("b", "vllm=0.12.0"), ("c", "llama.cpp")):
        declared = Declared("m", quantization, engine=engine)
        import_records([table], "block_vqav2_clean", declared, tmp_path / f"q{quantization}", options)
    inputs = read_runs([tmp_path / f"q{name}" for name in ("", "a", "b", "c")])
    groups, problems = pair_runs(inputs.runs)
    reasons = "\n".join(map(str, problems))
    assert sorted(len(group.runs) for group in groups) == [1, 3]
    assert "vllm 0.12.0 vs 0.11.0" in reasons
    assert 'model argument engine "llama.cpp" vs "vllm=0.11.0"' in reasons


def test_ids_that_are_not_the_tasks_are_shown_beside_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(tmp_path / "t.csv", [{"id": i, "answer": "x", "confidence": 0.5} for i in (1, 2, 3, 4)])
    arguments = ["records", "import", str(table), "--task", "block_vqav2_clean", "--model", "m", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert "the table has '1', '2', '3' and 1 more" in said and "the task has 'test-3" in said and "--id-column" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "block_vqav2_claen"], "there is no task 'block_vqav2_claen'; did you mean block_vqav2_clean"),
        (["--task", "block_flickr_retrieval_clean"], "retrieval ranks a model's scores of candidates"),
        (["--task", "block_vqav2_dev"], "these samples are for Selectors"),
        (["--task", "../x", "--scored"], "--task: a name has letters, digits"),
        (["--task", "t", "--model", "\x1b[31m", "--scored"], "--model: expected the model's name"),
        (["--task", "t", "--twin", "x", "--scored"], "give --quantization too"),
        (["--task", "t", "--engine", "a,b=c", "--scored"], "--engine: expected a short name without commas"),
        (["--task", "t", "--limit", "3", "--scored"], "--limit is for tables without --scored"),
        (["--task", "t", "--scored", "--missing-as-failures"], "give such samples rows of score 0"),
        (["--task", "t", "--scored", "--expected", "0"], "--expected: expected 1 or more, got 0"),
        (["--task", "t", "--scored", "--expected", "1"], "the table holds 2 samples, more than the 1 expected"),
        (["--task", "block_vqav2_clean", "--expected", "3"], "--expected is for tables with --scored"),
        (["--task", "block_vqav2_clean", "--limit", "-1"], "--limit: expected 1 or more, got -1"),
        (["--task", "t", "--scored", "--confidence-column", "="], "expected COLUMN, or NAME=COLUMN"),
        (["--task", "t", "--scored", "--confidence-column", "p", "--confidence-column", "q"], "is given twice"),
        (["--task", "t", "--scored", "--confidence-column", "p"], "has no column 'p'; it has 'id', 'answer'"),
        (["--task", "t", "--scored", "--score-column", "s"], "has no column 's'"),
        (["--task", "t", "--scored", "--log-probability", "--confidence-column", "score"], "at most 0"),
    ],
)
def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    rows = [{"id": i, "answer": "x", "confidence": 0.5, "score": 1} for i in "ab"]
    table = write_csv(tmp_path / "t.csv", rows)
    arguments = ["records", "import", str(table), "--model", "m", "--out", str(tmp_path / "out"), *options]
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


COLUMNS = TableColumns(confidences={"joint": "confidence"})
HEAD = "id,answer,confidence\n"
BROKEN = [
    ("csv", b"", "is empty; the first line names the columns"),
    ("csv", HEAD.encode(), "holds no rows"),
    ("csv", HEAD.encode() + b"a,x,0.5\nb,x", ":3: 2 fields, the header has 3; cut short"),
    ("csv", HEAD.encode() + b"a,x,0.5,9\n", ":2: 4 fields, the header has 3"),
    ("csv", HEAD.encode() + b'a,"x,0.5\n', "no valid table: unexpected end of data"),
    ("csv", HEAD.encode() + b"a," + b"x" * 200_000 + b",0.5\n", ":2: no valid table: field larger than field limit"),
    ("csv", HEAD.encode() + b"a,x\x00y,0.5\n", "NUL"),
    ("csv", b"id,answer,confidence,id\na,x,0.5,b\n", "the column 'id' is there twice"),
    ("csv", b"id,text,confidence\na,x,0.5\n", "has no column 'answer'; it has 'id', 'text', 'confidence'"),
    ("csv", HEAD.encode() + "a,für,0.5\n".encode("latin-1"), "no UTF-8 text"),
    ("csv", (HEAD + "a,x,0.5\n").encode("utf-16"), "no UTF-8 text"),
    ("csv", HEAD.encode() + b",x,0.5\n", ":2: the id (id) is missing"),
    ("csv", HEAD.encode() + b"a,x,0.5\nb,x,0.5\na,y,0.5\n", ":4: the sample 'a' stands at t.csv:2 already"),
    ("csv", HEAD.encode() + b"a,x,nan\nb,x,0.5\nc,x,\n", "2 confidences cannot be used: t.csv:2: sample 'a'"),
    ("csv", HEAD.encode() + b"a,x,-0.1\n", "confidence is -0.1, outside of 0 to 1; if the column holds log-prob"),
    ("csv", HEAD.encode() + b"a,x,97\nb,x,55\n", "if they are percentages, divide by 100"),
    ("csv", HEAD.encode() + b"a,x,high\n", "is no number: 'high'"),
    ("csv", HEAD.encode() + b"a,x,1_0\n", "is no number: '1_0'"),
    ("csv", HEAD.encode() + b"a,x,1e999\n", "confidence is inf"),
    ("jsonl", b"", "holds no rows"),
    ("jsonl", b'{"id": "a", "answer": "x", "confidence": 0.5}\n{"id": "b", "answ', ":2: no JSON object"),
    ("jsonl", b'{"id": "b", "answ', "the file ends in this line: cut short?"),
    ("jsonl", b'["a", "x", 0.5]\n', ":1: expected a JSON object"),
    ("jsonl", b'{"id": "a", "id": "b", "answer": "x"}\n', "a key is given twice"),
    ("jsonl", b'{"id": {"a": 1}, "answer": "x", "confidence": 1}\n', "expected a text or a number, got {'a': 1}"),
    ("jsonl", b'{"id": "a", "answer": "x", "confidence": [1]}\n', "is no number: [1]"),
    ("jsonl", b'{"id": "a", "answer": "x", "confidence": true}\n', "is no number: True"),
    ("jsonl", b'{"id": "a", "answer": "\\ud800", "confidence": 1}\n', "half a character"),
    ("jsonl", b'{"key": "a", "answer": "x", "confidence": 1}\n', "has no column 'id'"),
    ("jsonl", b'{"id": "a", "answer": "x"}\n{"id": "b", "answer": "x"}\n', "has no column 'confidence'"),
    ("jsonl", b"[" * 100_000 + b"\n", ":1: no JSON object"),
    ("jsonl", b'{"id": "' + b"a" * 2_000_000 + b'"}\n', "a line of more than 1,048,576 bytes"),
    ("parquet", b"PAR1 no more", "not readable parquet after row 0"),
    ("parquet", b"", "not readable parquet"),
    ("xlsx", b"PK", "the name's ending says which format"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "said"), BROKEN, ids=range(len(BROKEN)))
def test_broken_tables_say_which_row_and_what_is_wrong(tmp_path: Path, kind: str, data: bytes, said: str) -> None:
    file = tmp_path / f"t.{kind}"
    file.write_bytes(data)
    with pytest.raises(TableError) as caught:
        read_tables([file], COLUMNS)
    text = str(caught.value)
    assert said in text and f"t.{kind}" in text and len(text) < 1000


def test_a_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, quotes, blank lines, and numbers on the very edge."""
    file = tmp_path / "t.csv"
    text = 'id,answer,confidence\r\n 1 ,"a ""b"",\nc",1.0000001\r\n\r\n2,,-1e-9\r\n'
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = read_tables([file], COLUMNS).rows
    assert {key: (row.answer, row.confidence["joint"]) for key, row in rows.items()} == {
        " 1 ": ('a "b",\nc', 1.0),
        "2": ("", 0.0),
    }
    more = tmp_path / "more.jsonl"
    more.write_text(
        '\ufeff{"id": 3, "answer": null, "confidence": 0.25}\n\n{"id": "4", "answer": 7, "confidence": "1"}'
    )
    both = read_tables([file, more], COLUMNS)
    assert [(row.sample_id, row.answer) for row in both.rows.values()][2:] == [("3", None), ("4", "7")]
    assert [one.n_rows for one in both.files] == [2, 2]


def test_answers_without_a_confidence_are_taken_where_that_is_said(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(HEAD + "a,x,nan\nb,x,0.5\nc,x,7\n")
    table = read_tables([file], COLUMNS, allow_missing=True)
    assert [row.confidence["joint"] for row in table.rows.values()] == [None, 0.5, None]
    assert len(table.without_confidence) == 2 and "t.csv:4: sample 'c': confidence is 7" in table.without_confidence[1]


SCORED = [
    {"id": f"q{i}", "answer": "yes", "score": float(i % 5 > 0), "confidence": (i % 7) / 7, "image_id": f"i{i // 2}"}
    for i in range(400)
]


def test_a_production_log_needs_no_dataset_and_no_heavy_library(tmp_path: Path) -> None:
    """Import, report and gate of scored tables in an interpreter that has none of the evaluation's libraries."""
    worse = [{**row, "score": row["score"] if i % 4 else 0.0} for i, row in enumerate(SCORED)]
    write_csv(tmp_path / "full.csv", SCORED)
    write_csv(tmp_path / "int4.csv", worse)
    threshold = [{**row, "id": f"t{row['id']}", "image_id": f"t{row['image_id']}"} for row in SCORED]
    write_csv(tmp_path / "threshold.csv", threshold)
    (tmp_path / "gate.yaml").write_text(
        "rules: [{metric: accuracy, may_fall: 2}, {metric: phi_1, may_fall: 90}, "
        "{transfer: {risk: 30, realised_at_most: 99}}, {metric: brier, may_rise: 0.9}]"
    )

    def imported(table: str, task: str, *more: str) -> list[str]:
        return ["records", "import", f"{table}.csv", "--task", task, "--model", "m", "--scored", *more]

    engine = ("--engine", "llama.cpp=b6900")
    quantized = (*engine, "--quantization", "gguf-q4")
    commands = [
        imported("full", "support_log", "--out", "a", "--expected", "400", *engine),
        imported("threshold", "support_log_threshold", "--out", "a", *engine),
        imported("int4", "support_log", "--out", "b", *quantized),
        imported("threshold", "support_log_threshold", "--out", "b", *quantized),
        ["report", "a", "b", "--out", "site", "--replicates", "100"],
        ["gate", "--candidate", "b", "--baseline", "a", "--rules", "gate.yaml", "--json", "gate.json"],
    ]
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'lmms_eval', 'datasets', 'transformers', 'pyarrow'):\n"
        "            raise ImportError(f'{name} is not installed')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from bitquake.cli import main\n"
        f"print([main(command) for command in {commands!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.rstrip().endswith("[0, 0, 0, 0, 0, 1]"), done.stdout + done.stderr
    checks = json.loads((tmp_path / "gate.json").read_text())["checks"]
    assert [check["verdict"] for check in checks] == ["fail", "pass", "pass", "pass"]
    expected = sum(row["score"] for row in worse) / 400 - sum(row["score"] for row in SCORED) / 400
    assert checks[0]["value"] == pytest.approx(expected, abs=1e-12) and checks[0]["n_images"] == 200


def test_a_scored_table_that_is_short_is_incomplete_and_scores_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ImportOptions(scored=True, expected=410)
    done = import_records([write_csv(tmp_path / "t.csv", SCORED)], "log", MODEL, tmp_path / "a", options)
    assert not done.complete
    assert "log is incomplete: 400 of 410 samples" in read_runs_or_problems(tmp_path / "a")
    for value, said in (("", "score is missing"), ("nan", "score is nan"), ("85", "percentages are divided by 100")):
        rows = [{**SCORED[0], "score": value}, *SCORED[1:]]
        with pytest.raises(TableError, match=said):
            import_records(
                [write_csv(tmp_path / "bad.csv", rows)], "log", MODEL, tmp_path / "b", ImportOptions(scored=True)
            )
    bare = [{"id": row["id"], "score": row["score"]} for row in SCORED]
    done = import_records(
        [write_csv(tmp_path / "bare.csv", bare)], "log", MODEL, tmp_path / "c", ImportOptions(scored=True)
    )
    assert any("every sample counts as a picture of its own" in remark for remark in done.remarks)
    assert any("accuracy only" in remark for remark in done.remarks)
    [run] = read_runs([tmp_path / "c"]).runs
    assert len({answer.image_id for answer in run.cells["log"].answers.values()}) == 400


def test_a_shifted_log_takes_the_threshold_of_the_log_that_it_is_shifted_from(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", SCORED)
    import_records([table], "week_2", MODEL, tmp_path / "a", ImportOptions(scored=True, shift_from="week_1"))
    [run] = read_runs([tmp_path / "a"]).runs
    cell = run.cells["week_2"]
    assert (cell.threshold_task, cell.shift_from, cell.is_threshold) == ("week_1_threshold", "week_1", False)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from bitquake.cli import main\n"
        "sys.exit(main(['records', 'import', 't.parquet', '--task', 't', '--model', 'm', '--scored', '--out', 'o']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "reading parquet needs pyarrow: pip install pyarrow" in done.stderr


def test_cards_of_measured_models_keep_their_hashes() -> None:
    """Hashes that the release before imports gave to this card: runs of that time still find theirs."""
    card = QuantCard(
        pretrained="a/b",
        architecture="X",
        dtype="bfloat16",
        spec_name="rtn-int4-g64",
        spec={"method": "rtn", "bits": 4},
        method="rtn",
        execution="packed",
        kernel="k",
        components={},
        nominal_bpw=4.0,
        effective_bpw=4.5,
        weights_hash="00ff",
    )
    assert card.content_hash == "c95257ab902fd9e06dca030067202118"
    assert card.model_hash == "1b7ca3a68e8f7452a0d3adc1db12b675"
    declared = QuantCard.declared("a/b", "rtn-int4-g64", libraries={})
    assert declared.self_declared and declared.execution == "unknown"
    again = QuantCard.model_validate_json(declared.to_json())
    assert again == declared and again.content_hash == declared.content_hash
    forged = declared.model_copy(update={"self_declared": False})
    assert forged.content_hash != declared.content_hash


def test_confidence_columns() -> None:
    assert confidence_columns(["p", "selector=s", "mean=a=b"]) == {"": "p", "selector": "s", "mean": "a=b"}
    with pytest.raises(TableError, match="NAME=COLUMN"):
        confidence_columns(["Bad Name=p"])
