"""``bitquake data prepare``: official-looking JSON and a folder of pictures become what lmms-eval loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from bitquake.cli import main
from bitquake.noise import load_rgb
from bitquake.tasks import prepare_vqa
from bitquake.tasks.families import FamilyError, load_family, prepared_file
from bitquake.tasks.prepare_vqa import prepare

FIXTURE = Path(__file__).parent / "fixtures" / "advqa" / "validation.parquet"
Edit = Callable[[dict[str, Any], dict[str, Any]], None]


class Files:
    """Questions, annotations and pictures: two questions on each of three pictures, in no order."""

    def __init__(self, folder: Path, picture: Callable[..., bytes]) -> None:
        self.questions, self.annotations = folder / "q.json", folder / "a.json"
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        self.pictures = {image_id: picture(image_id, 60, 40) for image_id in (139, 285, 632)}
        for image_id, data in self.pictures.items():
            (self.images / f"{image_id:012d}.jpg").write_bytes(data)
        order = [(285, 5), (139, 1), (632, 9), (139, 2), (632, 8), (285, 6)]
        self.q: dict[str, Any] = {
            "info": {},
            "questions": [{"question_id": q, "image_id": i, "question": f"what is {q}?"} for i, q in order],
        }
        self.a: dict[str, Any] = {
            "annotations": [
                {
                    "question_id": q,
                    "image_id": i,
                    "question_type": "what",
                    "answer_type": "other",
                    "multiple_choice_answer": f"a{q}",
                    "answers": [{"answer": f"a{q}", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
                }
                for i, q in reversed(order)
            ]
        }
        self.save()

    def save(self) -> None:
        self.questions.write_text(json.dumps(self.q))
        self.annotations.write_text(json.dumps(self.a))

    @property
    def arguments(self) -> list[str]:
        return [
            *("--questions", str(self.questions)),
            *("--annotations", str(self.annotations)),
            *("--images", str(self.images)),
        ]


@pytest.fixture
def files(tmp_path: Path, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return Files(tmp_path / "given", make_picture)


def build(files: Files, **options: Any) -> prepare_vqa.Prepared:
    return prepare("advqa", files.questions, files.annotations, files.images, **options)


def test_rows_pictures_and_manifest(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_vqa, "_GROUP", 1)  # a row group for each picture
    built = build(files)
    assert built.file == prepared_file("advqa", "validation")
    assert (built.rows, built.images, built.left_out, built.missing, built.broken) == (6, 3, 0, [], [])
    assert pq.read_metadata(built.file).num_row_groups == 3
    loaded = datasets.load_dataset("parquet", data_files={"validation": str(built.file)})["validation"]
    assert isinstance(loaded.features["image"], datasets.Image)
    answers = {one["question_id"]: one["answers"] for one in files.a["annotations"]}
    assert [row["question_id"] for row in loaded] == [5, 6, 1, 2, 9, 8]
    for row in loaded:
        assert row["question"] == f"what is {row['question_id']}?"
        assert row["answers"] == answers[row["question_id"]]
        assert (load_rgb(row["image"]) == load_rgb(files.pictures[row["image_id"]])).all()
    # Columns and types are those that the family of the built-in benchmark was written for.
    schemas = [{(one.name, str(one.type)) for one in pq.read_schema(file)} for file in (built.file, FIXTURE)]
    assert schemas[0] == schemas[1]
    manifest = json.loads((built.file.parent / "manifest.json").read_text())["splits"]["validation"]
    assert manifest["inputs"]["questions"]["sha256"] == hashlib.sha256(files.questions.read_bytes()).hexdigest()
    assert (manifest["rows"], manifest["images"]) == (6, 3)
    before = built.file.read_bytes()
    assert build(files).file.read_bytes() == before  # again, with the same bytes


def test_ids_as_texts_are_the_same_ids(files: Files) -> None:
    for entry in files.q["questions"]:
        entry["image_id"] = f"{entry['image_id']:012d}"
        entry["question_id"] = str(entry["question_id"])
    files.save()
    built = build(files)
    assert sorted(pq.read_table(built.file)["image_id"].to_pylist()) == [139, 139, 285, 285, 632, 632]


def test_ids_that_are_no_numbers_stay_texts(files: Files) -> None:
    names = {139: "kitchen", 285: "street", 632: "desk"}
    for entry in (*files.q["questions"], *files.a["annotations"]):
        entry["image_id"] = names[entry["image_id"]]
    for image_id, name in names.items():
        (files.images / f"{image_id:012d}.jpg").rename(files.images / f"{name}.png")
    files.save()
    with pytest.raises(FamilyError, match=r"--image-pattern: image_id 'street'.*no integer, for \{image_id:012d\}"):
        build(files)
    built = build(files, patterns=["{image_id}.png"], split="test")
    rows = pq.read_table(built.file, columns=["image_id", "question_id"]).to_pylist()
    assert rows[0] == {"image_id": "street", "question_id": "5"}


def test_names_are_tried_in_the_stated_order(files: Files, make_picture: Callable[..., bytes]) -> None:
    (files.images / "000000000139.jpg").rename(files.images / "COCO_val2014_000000000139.jpg")
    (files.images / "COCO_val2014_000000000285.jpg").write_bytes(make_picture(1))  # not taken: the plain name is there
    built = build(files)
    for row in pq.read_table(built.file).to_pylist():
        assert row["image"]["bytes"] == files.pictures[row["image_id"]]


def _first(kind: str, **changes: Any) -> Edit:
    def edit(q: dict[str, Any], a: dict[str, Any]) -> None:
        entries = q["questions"] if kind == "q" else a["annotations"]
        entries[0] = entries[0] | changes

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q, a: q["questions"].pop(), r"1 question ids of .*a.json are not in .*q.json: 6"),
        (lambda q, a: a["annotations"].pop(), r"1 question ids of .*q.json are not in .*a.json: 5"),
        (lambda q, a: q["questions"].append(q["questions"][1]), r"1 question ids stand in it more than once: 1"),
        (
            lambda q, a: a["annotations"][0]["answers"].pop(),
            r"1 questions of .* do not have 10 answers \(1 with 9\): 6",
        ),
        (_first("a", answers="yes"), r"do not have 10 answers \(1 with no texts\): 6"),
        (_first("a", image_id=999), r"1 questions have another image_id in .*a.json: 6"),
        (_first("q", question=3), r"q.json: entry 1: question: expected a text, got 3"),
        (_first("q", question_id=[1]), r"entry 1: question_id: expected an integer or a text, got \[1\]"),
        (_first("q", image_id=True), r"entry 1: image_id: expected an integer or a text, got True"),
        (_first("q", image_id=None), r"entry 1: has no 'image_id'; it has question_id"),
        (lambda q, a: q.pop("questions"), r"expected a mapping whose 'questions' is a list of entries, got .*info"),
        (lambda q, a: q["questions"].insert(0, 7), r"entry 1: expected a mapping, got int"),
    ],
)
def test_files_that_do_not_belong_together(files: Files, edit: Edit, message: str) -> None:
    edit(files.q, files.a)
    files.save()
    with pytest.raises(FamilyError, match=message):
        build(files)
    assert not prepared_file("advqa", "validation").exists()


@pytest.mark.parametrize("pattern", ["{image_id}.jpg", "a/../../{image_id}"])
def test_a_pattern_cannot_leave_the_folder(files: Files, pattern: str) -> None:
    for entry in (*files.q["questions"][:1], *(e for e in files.a["annotations"] if e["question_id"] == 5)):
        entry["image_id"] = "../given/images/000000000285"
    files.save()
    with pytest.raises(FamilyError, match="leads out of the folder"):
        build(files, patterns=[pattern])


@pytest.mark.parametrize(("text", "message"), [('{"questions": [', "not valid JSON"), ("[" * 9000, "not valid JSON")])
def test_broken_json(files: Files, text: str, message: str) -> None:
    files.questions.write_text(text)
    with pytest.raises(FamilyError, match=message):
        build(files)


def test_missing_and_broken_pictures(files: Files) -> None:
    earlier = build(files).file.read_bytes()
    (files.images / "000000000139.jpg").unlink()
    with pytest.raises(FamilyError, match=r"1 of 3 pictures are not in .*: 000000000139.jpg. .*--allow-missing"):
        build(files)
    cut = files.images / "000000000632.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    (files.images / "000000000139.jpg").write_bytes(files.pictures[139])
    with pytest.raises(FamilyError, match=r"1 of 3 pictures do not decode, in .*: 000000000632.jpg"):
        build(files)
    assert prepared_file("advqa", "validation").read_bytes() == earlier
    assert sorted(path.name for path in prepared_file("advqa", "").parent.iterdir()) == [
        "manifest.json", "validation.parquet"
    ]  # fmt: skip
    (files.images / "000000000139.jpg").unlink()
    built = build(files, allow_missing=True)
    assert (built.rows, built.left_out, built.missing, built.broken) == (
        2, 4, ["000000000139.jpg"], ["000000000632.jpg"]
    )  # fmt: skip
    assert pq.read_table(built.file)["question_id"].to_pylist() == [5, 6]
    for file in files.images.iterdir():
        file.unlink()
    with pytest.raises(FamilyError, match="nothing is left"):
        build(files, allow_missing=True)


def test_the_command(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "advqa"]) == 2
    said = capsys.readouterr().err
    for needed in ("adversarialvqa.org", "v1_mscoco_val2017_advqa_annotations.json", "val2017.zip", "Not given: --que"):
        assert needed in said
    assert main(["data", "list"]) == 0
    assert "nothing is built" in capsys.readouterr().out
    folder = tmp_path / "family"
    assert main(["data", "prepare", "okvqa", *files.arguments, "--family", str(folder)]) == 0
    assert "6 questions on 3 pictures" in capsys.readouterr().out
    family = load_family(folder / "family.yaml")
    assert family.split_file("validation") == prepared_file("okvqa", "validation")
    assert main(["tasks", "validate", str(folder)]) == 0
    assert main(["data", "list"]) == 0
    assert str(prepared_file("okvqa", "validation")) in capsys.readouterr().out
    assert main(["data", "prepare", "../okvqa", *files.arguments]) == 2
    assert main(["data", "prepare", "okvqa", *files.arguments, "--split", "a/b"]) == 2
