"""Damaged rows all the way: lmms-eval's command line, the wrapper with a real model, the records, the report."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitquake.records import SampleRecord
from bitquake.reports import build
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import load_family

pytest.importorskip("lmms_eval")

BOXES = """
family: {name}
world: block
dataset: {{files: {{test: test.parquet, threshold: threshold.parquet}}}}
splits: {{test: test, threshold: threshold}}
columns: {{box: bbox, sample_id: question_id, image_id: image_id}}
protocol: grounding
coordinates: {{default: unit}}
"""
QUANTS = ("full-precision", "rtn-int3-g64")


@pytest.fixture(scope="module", autouse=True)
def files_read_once() -> Iterator[None]:
    """lmms-eval reads the thousands of task files that it ships whenever it starts; here once for all starts."""
    from lmms_eval.tasks import TaskManager

    read = TaskManager._get_task_and_group
    known: dict[str, Any] = {}

    def remembered(self: TaskManager, folder: str) -> Any:
        if folder not in known:
            known[folder] = read(self, folder)
        return copy.deepcopy(known[folder])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "_get_task_and_group", remembered)
        yield


def evaluate(
    quant: str, tasks: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, include: Path | None = None
) -> Path:
    """The command that a user types, in this process."""
    from lmms_eval.__main__ import cli_evaluate

    arguments = f"pretrained=bitquake/block-idefics3,quant={quant},artifacts={folder / 'artifacts'},dtype=float32"
    command = ["lmms-eval", "--model", "bitquake_hf", "--model_args", arguments, "--tasks", ",".join(tasks)]
    command += ["--batch_size", "4", "--device", "cpu", "--log_samples"]
    command += ["--include_path", str(include)] if include else []
    monkeypatch.setattr(sys, "argv", [*command, "--output_path", str(folder / quant)])
    cli_evaluate()
    return folder / quant


def records(folder: Path, task: str) -> list[SampleRecord]:
    [path] = folder.rglob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [SampleRecord.model_validate(line["bitquake"]) for line in lines]
    return sorted(found, key=lambda record: int(record.sample_id))


def test_bad_rows_are_counted_by_name_from_the_command_line_to_the_report(
    make_family: Callable[..., Path],
    rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = rows(12)
    bad = [dict(row) for row in good]
    bad[0]["image"] = None
    bad[2]["image"] = {"bytes": b"no picture", "path": None}
    bad[4]["image"] = {"bytes": good[4]["image"]["bytes"][:500], "path": None}
    bad[6]["image"] = {"bytes": b"", "path": None}
    bad[8]["question"] = ""
    boxes = [{key: value for key, value in row.items() if key != "answers"} for row in good]
    boxes = [row | {"bbox": [4.0, 4.0, 20.0, 20.0]} for row in boxes]
    boxes[3]["bbox"] = [50.0, 4.0, 20.0, 20.0]  # right of a picture that is 40 wide
    boxes[5]["bbox"] = [30.0, 20.0, 20.0, 20.0]  # hangs over its edge: cut to the picture
    boxes[7]["bbox"] = [4.0, 4.0, 0.0, 20.0]
    families = [
        make_family("bad_rows", test=bad, threshold=rows(8, start=500)),
        make_family("bad_boxes", BOXES, test=boxes, threshold=boxes[:2]),
    ]
    for family in families:
        folder = tmp_path / "own" / family.name
        folder.mkdir(parents=True)
        for name, text in task_files(load_family(family / "family.yaml")).items():
            (folder / name).write_text(text)
    tasks = ["bad_rows_clean", "bad_rows_gaussian_noise_5", "bad_boxes_clean"]
    runs = [evaluate(quant, tasks, tmp_path / "out", monkeypatch, tmp_path / "own") for quant in QUANTS]

    expected = dict.fromkeys((0, 2, 4, 6), "image") | {8: "question"}
    for run in runs:
        for task in tasks[:2]:
            found = records(run, task)
            assert {i: record.failure for i, record in enumerate(found) if record.failure} == expected
            for i, record in enumerate(found):
                assert bool(record.confidence) == bool(record.pixel_hash) == (i not in expected) or i == 8
                assert record.failure is None or (record.score, record.confidence) == (0.0, {})
        found = records(run, "bad_boxes_clean")
        assert {i: record.failure for i, record in enumerate(found) if record.failure} == {3: "target", 7: "target"}
        assert "outside its picture of 40x30" in found[3].failure_detail and "no area" in found[7].failure_detail

    result = build(runs, tmp_path / "site", artifacts=tmp_path / "out" / "artifacts", replicates=20)
    assert result.ok and result.n_pairs == 1
    cells = {(cell.task, cell.pairing): cell for cell in result.report.cells}
    for pairing in ("twin", "paired"):
        assert cells["bad_rows_clean", pairing].failures == {"image": 4, "question": 1}
        assert cells["bad_boxes_clean", pairing].failures == {"target": 2}
        assert {cell.n for cell in result.report.cells} == {12}
    warned = "\n".join(map(str, result.problems))
    assert "5 of 12 samples of bad_rows_clean failed (image 4, question 1)" in warned
    assert "2 of 12 samples of bad_boxes_clean failed (target 2)" in warned
    pages = "".join(path.read_text() for path in (tmp_path / "site").glob("*.html"))
    assert "image 4, question 1" in pages


def test_tasks_of_an_unknown_noise_and_of_severity_6_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from bitquake.model_wrappers.bitquake_hf import BitquakeHF

    monkeypatch.setattr(BitquakeHF, "__init__", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    tasks = ["block_vqav2_rain_3", "block_vqav2_fog_6"]
    evaluate("full-precision", tasks, tmp_path / "out", monkeypatch)
    said = capfd.readouterr()
    assert re.search(r"not found: block_vqav2_(rain_3|fog_6), block_vqav2_(fog_6|rain_3)", said.out + said.err)
    assert not list(tmp_path.rglob("*_results.json"))


def test_an_unknown_quantization_is_refused_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate("rtn-int5-g64", ["block_vqav2_clean"], tmp_path / "out", monkeypatch)
    assert "unknown quantization spec 'rtn-int5-g64' (did you mean 'rtn-int8-g64'?); known: " in capfd.readouterr().err
    assert not list(tmp_path.rglob("*_results.json"))
