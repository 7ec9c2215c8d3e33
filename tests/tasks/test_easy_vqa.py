"""easy-VQA, a dataset that nobody here wrote, as the one YAML file in examples/, through lmms-eval's own command."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from bitquake.cli import main
from bitquake.metrics import evaluate
from bitquake.records import SampleRecord
from bitquake.tasks.documents import Rows
from bitquake.tasks.documents import prepare as prepare_rows
from bitquake.tasks.expand import builtin_index
from bitquake.tasks.families import load_family
from bitquake.tasks.glue import functions_of

pytest.importorskip("easy_vqa")
pytest.importorskip("lmms_eval")
EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def own_folders(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a new user: nothing configured, nothing cached."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(home / name))


def questions(split: str) -> list[tuple[str, str, int]]:
    """What the package itself says, read without any code of ours."""
    spec = importlib.util.find_spec("easy_vqa")
    assert spec is not None and spec.origin is not None
    rows = json.loads((Path(spec.origin).parent / "data" / split / "questions.json").read_text())
    return [(question, answer, image) for question, answer, image in rows]


def test_the_whole_split(home: Path) -> None:
    assert main(["tasks", "validate", str(EXAMPLES / "easy_vqa")]) == 0
    loaded = load_family(EXAMPLES / "easy_vqa" / "family.yaml")
    file = loaded.split_file("test")
    dataset = datasets.load_dataset("parquet", data_files={"test": str(file)}, cache_dir=str(home / "arrow"))["test"]
    rows = prepare_rows(dataset, loaded.family.columns, Rows(loaded.family.splits.test))
    assert len(rows) == 9673
    assert len({row["image_id"] for row in rows["bitquake"]}) == 1000
    assert len({row["sample_id"] for row in rows["bitquake"]}) == 9673
    columns = (rows[column][:] for column in ("question", "answer", "image_id"))
    assert list(zip(*columns, strict=True)) == questions("test")
    index = builtin_index([EXAMPLES])
    process_results = functions_of(str(index.root / "easy_vqa" / "glue.py"))("process_results__easy_vqa_clean")
    for row, (_, answer, _) in zip(rows.select(range(LIMIT)), questions("test"), strict=False):
        scores = [process_results(row, [text])["bitquake"]["score"] for text in (answer.upper(), "mauve", "")]
        assert scores == [1, 0, 0]


def test_through_lmms_eval_from_the_users_own_folder(home: Path) -> None:
    """The two commands that CONTRIBUTING shows. The reference checkpoint may get none right."""
    assert main(["config", "set", "families", str(EXAMPLES)]) == 0
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "bitquake_hf"),
        *("--model_args", f"pretrained=bitquake/block-idefics3,dtype=float32,artifacts={home / 'artifacts'}"),
        *("--tasks", "easy_vqa_clean,easy_vqa_fog_3", "--device", "cpu", "--batch_size", "16"),
        *("--limit", str(LIMIT), "--log_samples", "--output_path", str(home / "runs")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = [json.loads(file.read_text()) for file in home.glob("runs/**/*_results.json")]
    for task in ("easy_vqa_clean", "easy_vqa_fog_3"):
        [log] = home.glob(f"runs/**/*_samples_{task}.jsonl")
        records = [SampleRecord.model_validate(json.loads(line)["bitquake"]) for line in log.read_text().splitlines()]
        assert len(records) == LIMIT
        assert {record.failure for record in records} == {None}
        assert {record.world for record in records} == {"real"}
        assert len({record.dataset_revision for record in records}) == 1 and records[0].dataset_revision
        answers = {(question, str(image)): answer for question, answer, image in questions("test")}
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        asked = [(line["input"].split("\n")[0], record.image_id) for line, record in zip(lines, records, strict=True)]
        if task == "easy_vqa_clean":
            assert asked == list(answers)[:LIMIT]
        # One answer a question: right if the words are those, whatever the case and the punctuation.
        words = [re.sub(r"[^\w ]", "", record.text.lower()).strip() for record in records]
        right = [word == answers[one] for word, one in zip(words, asked, strict=True)]
        assert [record.score for record in records] == [float(one) for one in right]
        table = results["results"][task]
        assert math.isclose(table["accuracy,none"], sum(right) / LIMIT, abs_tol=1e-12)
        expected = evaluate(
            [record.score for record in records],
            [record.primary for record in records],
            [record.image_id for record in records],
            metrics=["ece_15"],
            seed=0,
        )
        assert table["ece_15,none"] == pytest.approx(expected["ece_15"].value)
