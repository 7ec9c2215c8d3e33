"""``bitquake tasks check``: a family tried on samples, through lmms-eval, with the reference checkpoint on the CPU."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

import datasets
from PIL import Image

from bitquake import cli, dry_run
from bitquake.tasks.families import load_family

FAMILY = """
family: dry
world: block
dataset: {files: {test: test.parquet, threshold: threshold.parquet}}
splits: {test: test, threshold: threshold}
columns: {answers: answers, sample_id: id}
protocol: vqa
prompts: {default: {pre_prompt: "now: "}}
variants: {noise: {names: [fog, contrast], severities: [5, 1, 3], mode: scaled}}
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "dry"
    folder.mkdir()
    (folder / "family.yaml").write_text(FAMILY)
    rows = []
    for i, colour in enumerate(("red", "blue", "green", "yellow")):
        stream = io.BytesIO()
        Image.new("RGB", (64, 64), colour).save(stream, "PNG")
        image = {"bytes": stream.getvalue(), "path": None}
        rows.append({"id": i, "question": f"what colour {i}?", "answers": [colour] * 10, "image": image})
    rows[1]["question"] = ""
    for split in ("test", "threshold"):
        dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        dataset.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_samples_of_the_clean_task_and_of_a_noisy_one(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_run.tasks_to_try(load_family(family / "family.yaml")) == ["dry_clean", "dry_fog_3"]
    found: list[dry_run.Answered] = []
    original = dry_run.run

    def run(*args: Any, **kwargs: Any) -> list[dry_run.Answered]:
        found.extend(original(*args, **kwargs))
        return found

    monkeypatch.setattr(dry_run, "run", run)
    assert cli.main(["tasks", "check", str(family), "--samples", "2"]) == 0
    assert [(one.task, one.record.sample_id) for one in found] == [
        ("dry_clean", "0"),
        ("dry_clean", "1"),
        ("dry_fog_3", "0"),
        ("dry_fog_3", "1"),
    ]
    first, empty, noisy, _ = found
    assert first.prompt == "now: what colour 0?" and first.target == "'red', 10 times"
    assert first.record.noise is None and noisy.record.noise is not None and noisy.record.noise["severity"] == 3
    assert first.record.pixel_hash != noisy.record.pixel_hash
    assert first.record.primary is not None and 0 < first.record.primary <= 1
    assert empty.record.failure == "question"

    said = capsys.readouterr().out
    assert said.startswith(f"{family}: valid\n\ndry_clean\n  prompt      'now: what colour 0?'\n  answer      '")
    assert "  target      'red', 10 times\n" in said and "\ndry_fog_3\n" in said
    assert f"score       {first.record.score:g}, confidence {first.record.primary:.3f} (joint)\n" in said
    assert said.count("failure: question") == 2


def test_a_model_that_cannot_be_loaded_is_one_clear_error(
    family: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["tasks", "check", str(family), "--samples", "1", "--pretrained", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "the dry run failed" in said and "none" in said


def test_data_that_is_not_here_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FAMILY.replace("{files: {test: test.parquet, threshold: threshold.parquet}}", "{prepared: my_photos}")
    (tmp_path / "family.yaml").write_text(text)
    assert cli.main(["tasks", "check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Not tried on samples: there is no " in said and "`bitquake data prepare my_photos`" in said
