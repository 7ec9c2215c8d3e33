"""``bitquake data prepare NAME``: a local dataset from questions and answers in VQA's JSON format, and pictures.

    <user data>/datasets/<name>/<split>.parquet      a row for each question, with its picture's file inside
    <user data>/datasets/<name>/manifest.json        what it was made from: hashes, counts, what was left out

The format is the one of visualqa.org: ``{"questions": [{question_id, image_id, question}]}`` and ``{"annotations":
[{question_id, image_id, answers: [{answer, answer_confidence, answer_id}]}]}``, joined by ``question_id``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitquake
from bitquake.noise import ImageError, load_rgb

from .schema import FamilyError
from .sources import MAX_TABLE, datasets_folder, fill_pattern, listed, prepared_folder, replacing

MANIFEST = "manifest.json"
PATTERNS = ("{image_id:012d}.jpg", "COCO_val2014_{image_id:012d}.jpg", "COCO_val2017_{image_id:012d}.jpg")
"""File names of COCO's pictures, tried in this order."""
SPLIT = "validation"
ANNOTATORS = 10
WANTED = {
    "advqa": """\
AdVQA (Sheng et al. 2021, https://adversarialvqa.org, CC BY-NC 4.0), its validation split on COCO's val2017 pictures.
Fetch (the authors' addresses and figures; nothing here has asked them):
  https://dl.fbaipublicfiles.com/advqa/v1_OpenEnded_mscoco_val2017_advqa_questions.json
  https://dl.fbaipublicfiles.com/advqa/v1_mscoco_val2017_advqa_annotations.json
  http://images.cocodataset.org/zips/val2017.zip  (1 GB, 5,000 pictures as 000000000139.jpg; unpack it)
COCO's val2014 folder will do as well: it holds the same pictures as COCO_val2014_000000000139.jpg and so on.
Expected: ten answers to every question, and a picture for every question; the number of questions is not checked,
because no figure could be verified. Then:
  bitquake data prepare advqa --questions v1_OpenEnded_mscoco_val2017_advqa_questions.json \\
    --annotations v1_mscoco_val2017_advqa_annotations.json --images val2017""",
    "vqav2_train": """\
VQA-v2 (Goyal et al. 2017, https://visualqa.org/download.html, CC BY 4.0), its train split on COCO's train2014 pictures:
what `bitquake train` takes of the family vqav2. Fetch (the authors' addresses and figures, which nothing here asked):
  https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Train_mscoco.zip
  https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Train_mscoco.zip
  http://images.cocodataset.org/zips/train2014.zip  (13 GB, 82,783 pictures; unpack all three)
Expected: 443,757 questions with ten answers each. Then:
  bitquake data prepare vqav2_train --split train --questions v2_OpenEnded_mscoco_train2014_questions.json \\
    --annotations v2_mscoco_train2014_annotations.json --images train2014 \\
    --image-pattern 'COCO_train2014_{image_id:012d}.jpg'""",
}
"""Dataset of a built-in family -> what to fetch for it."""
_GROUP = 32 << 20
"""Bytes of pictures in memory before they are written."""
_TEXTS = ("question_type", "answer_type", "multiple_choice_answer")


def needed(name: str) -> str:
    """What ``bitquake data prepare NAME`` needs, and where it is to be had."""
    return WANTED.get(
        name,
        f"bitquake data prepare {name} --questions Q.json --annotations A.json --images FOLDER\n"
        "Any dataset in the format of visualqa.org; for which --split (default validation), and --image-pattern where\n"
        f"the pictures are not called {', or '.join(PATTERNS)}.",
    )


@dataclass
class Prepared:
    """A split that was built.

    rows, images: how many; missing, broken: files of pictures (as the first pattern calls them) that are not there, or
    do not decode; left_out: how many questions went with them.
    """

    file: Path
    rows: int = 0
    images: int = 0
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left_out: int = 0


def prepare(
    name: str,
    questions: Path,
    annotations: Path,
    images: Path,
    *,
    split: str = SPLIT,
    patterns: Sequence[str] = PATTERNS,
    annotators: int = ANNOTATORS,
    allow_missing: bool = False,
    out: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Check everything, then write ``<split>.parquet`` and ``manifest.json``; what was there before stays until then.

    Rows are in order of their pictures' first questions, so that a picture is stored once for all its questions.

    Args:
        patterns: file names of pictures, relative to ``images``; the first that exists is taken.
        annotators: how many answers each question must have.
        allow_missing: leave out the questions of pictures that are missing or do not decode, instead of refusing.
        out: the dataset's folder (default: where tasks look for it).

    Raises:
        FamilyError: the JSON is broken or of another form, the two do not belong together, or a picture is missing or
            damaged.
    """
    import pyarrow.parquet as pq

    for what, text in (("NAME", name), ("--split", split)):
        if not re.fullmatch(r"[A-Za-z0-9_]+" if what == "--split" else r"[a-z0-9_]+", text):
            raise FamilyError(f"{what}: expected letters (small ones in a NAME), digits and _, got {text!r}")
    if not images.is_dir():
        raise FamilyError(f"--images: {images} is no folder; name the one that holds the pictures")
    asked = _by_id(questions, "questions", ("image_id", "question"))
    answered = _by_id(annotations, "annotations", ("answers",))
    _check_together(asked, answered, questions, annotations, annotators)
    numbers = all(isinstance(one, int) for entry in asked.items() for one in (entry[0], entry[1]["image_id"]))
    progress(f"{len(asked):,} questions, {annotators} answers each")

    folder = prepared_folder(name) if out is None else out
    built = Prepared(folder / f"{split}.parquet")
    by_image: dict[int | str, list[int | str]] = {}
    for question_id, question in asked.items():
        by_image.setdefault(question["image_id"], []).append(question_id)
    files = {image_id: _find(images, patterns, image_id) for image_id in by_image}
    built.missing = [fill_pattern(patterns[0], {"image_id": one}, "") for one, file in files.items() if file is None]
    if built.missing and not allow_missing:
        raise FamilyError(_lacking("are not in", built.missing, len(files), images, patterns))
    digest = hashlib.blake2b(digest_size=16)
    schema = _schema(numbers)
    with replacing(built.file) as new:
        with pq.ParquetWriter(new, schema, compression="zstd", dictionary_pagesize_limit=2 * _GROUP) as writer:
            pictures = _pictures(files, built)
            for group in _groups(pictures):
                rows = [
                    _row(question_id, asked[question_id], answered[question_id], picture, path, numbers)
                    for image_id, picture, path in group
                    for question_id in by_image[image_id]
                ]
                for _, picture, _ in group:
                    digest.update(len(picture).to_bytes(8, "big") + picture)
                writer.write_table(_table(rows, schema), row_group_size=len(rows))
                built.rows += len(rows)
                built.images += len(group)
                progress(f"{built.images:,} of {len(files):,} pictures")
        built.left_out = len(asked) - built.rows
        if built.broken and not allow_missing:
            raise FamilyError(_lacking("do not decode, in", built.broken, len(files), images, patterns))
        if built.rows == 0:
            raise FamilyError(f"--images: none of {len(files)} pictures is in {images} and decodes; nothing is left")
    _note(folder, split, name, built, questions, annotations, digest.hexdigest())
    return built


def built_datasets() -> list[dict[str, str]]:
    """One row for each split that was built on this machine."""
    rows = []
    for file in sorted(datasets_folder().glob(f"*/{MANIFEST}")):
        for split, made in _manifest(file)["splits"].items():
            there = (file.parent / f"{split}.parquet").is_file()
            rows.append(
                {
                    "dataset": file.parent.name,
                    "split": split,
                    "questions": f"{made['rows']:,}",
                    "images": f"{made['images']:,}",
                    "left out": str(made["left_out"]),
                    "file": str(file.parent / f"{split}.parquet") if there else "missing: prepare it again",
                }
            )
    return rows


def _by_id(file: Path, key: str, columns: Sequence[str]) -> dict[int | str, dict[str, Any]]:
    """``question_id`` -> entry, of one of the two files."""
    where = f"--{key}: {file}"
    try:
        if file.stat().st_size > MAX_TABLE:
            raise FamilyError(f"{where}: more than the {MAX_TABLE:,} bytes that are read; split it")
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FamilyError(f"{where}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise FamilyError(f"{where}: not valid JSON ({error or 'nested too deeply'}); fetch it again") from error
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        found = f"a mapping with {', '.join(map(str, data))}" if isinstance(data, dict) else type(data).__name__
        raise FamilyError(f"{where}: expected a mapping whose {key!r} is a list of entries, got {found}")
    out: dict[int | str, dict[str, Any]] = {}
    repeated: dict[str, None] = {}
    for number, entry in enumerate(entries, 1):
        at = f"{where}: entry {number}"
        if not isinstance(entry, dict):
            raise FamilyError(f"{at}: expected a mapping, got {type(entry).__name__}")
        for column in ("question_id", *columns):
            if entry.get(column) is None:
                raise FamilyError(f"{at}: has no {column!r}; it has {', '.join(map(str, entry))}")
        if "question" in columns and not isinstance(entry["question"], str):
            raise FamilyError(f"{at}: question: expected a text, got {entry['question']!r}")
        ids = {
            column: _id(entry[column], f"{at}: {column}") for column in ("question_id", "image_id") if column in entry
        }
        if ids["question_id"] in out:
            repeated[str(ids["question_id"])] = None
        out[ids["question_id"]] = entry | ids
    if repeated:
        raise FamilyError(f"{where}: {len(repeated)} question ids stand in it more than once: {listed(repeated)}")
    return out


def _id(value: Any, where: str) -> int | str:
    """An id as it is compared: 139, 139.0 and "000000000139" are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise FamilyError(f"{where}: expected an integer or a text, got {value!r}")
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else value


def _check_together(
    asked: Mapping[int | str, Mapping[str, Any]],
    answered: Mapping[int | str, Mapping[str, Any]],
    questions: Path,
    annotations: Path,
    annotators: int,
) -> None:
    problems = []
    for one, other, have, lack in (
        (asked, answered, questions, annotations),
        (answered, asked, annotations, questions),
    ):
        alone = [str(question_id) for question_id in one if question_id not in other]
        if alone:
            problems.append(f"{len(alone)} question ids of {have} are not in {lack}: {listed(alone)}")
    pictures, counts, wrong = [], Counter[int](), []
    for question_id, entry in answered.items():
        image_id = asked.get(question_id, entry).get("image_id")
        if entry.get("image_id", image_id) != image_id:
            pictures.append(str(question_id))
        answers = entry["answers"]
        texts = isinstance(answers, list) and all(isinstance(_answer(one).get("answer"), str) for one in answers)
        if not texts or len(answers) != annotators:
            wrong.append(str(question_id))
            counts[len(answers) if texts else -1] += 1
    if pictures:
        problems.append(f"{len(pictures)} questions have another image_id in {annotations}: {listed(pictures)}")
    if wrong:
        found = ", ".join(f"{n} with {'no texts' if k < 0 else k}" for k, n in counts.most_common(3))
        problems.append(
            f"{len(wrong)} questions of {annotations} do not have {annotators} answers ({found}): {listed(wrong)}"
        )
    if problems:
        raise FamilyError("the two files do not belong together, or are damaged:\n  " + "\n  ".join(problems))


def _answer(answer: Any) -> Mapping[str, Any]:
    return answer if isinstance(answer, dict) else {"answer": answer}


def _find(images: Path, patterns: Sequence[str], image_id: int | str) -> Path | None:
    for pattern in patterns:
        file = images / fill_pattern(pattern, {"image_id": image_id}, f"--image-pattern: image_id {image_id!r}")
        if file.is_file():
            return file
    return None


def _pictures(files: Mapping[int | str, Path | None], built: Prepared) -> Iterator[tuple[int | str, bytes, str]]:
    """(id, bytes, name) of each picture that decodes; the others are noted."""
    for image_id, file in files.items():
        if file is None:
            continue
        try:
            picture = file.read_bytes()
            load_rgb(picture)
        except (OSError, ImageError):
            built.broken.append(file.name)
            continue
        yield image_id, picture, file.name


def _groups(pictures: Iterator[tuple[int | str, bytes, str]]) -> Iterator[list[tuple[int | str, bytes, str]]]:
    group: list[tuple[int | str, bytes, str]] = []
    size = 0
    for one in pictures:
        group.append(one)
        size += len(one[1])
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _row(
    question_id: int | str,
    asked: Mapping[str, Any],
    answered: Mapping[str, Any],
    picture: bytes,
    path: str,
    numbers: bool,
) -> dict[str, Any]:
    answers = [
        {
            "answer": one["answer"],
            "answer_confidence": str(one.get("answer_confidence", "")),
            "answer_id": number,
        }
        for number, one in enumerate(map(_answer, answered["answers"]), 1)
    ]
    row: dict[str, Any] = {key: None if answered.get(key) is None else str(answered[key]) for key in _TEXTS}
    image_id = asked["image_id"]
    row["question_id"], row["image_id"] = (question_id, image_id) if numbers else (str(question_id), str(image_id))
    return row | {
        "question": asked["question"],
        "answers": answers,
        "image": {"bytes": picture, "path": path},
    }


def _schema(numbers: bool) -> Any:
    """The columns that VQA-v2 has on the hub; ids are integers, or texts where one of them is none."""
    import datasets

    text = datasets.Value("string")
    ids = datasets.Value("int64" if numbers else "string")
    answer = {"answer": text, "answer_confidence": text, "answer_id": datasets.Value("int64")}
    columns = dict.fromkeys(_TEXTS, text) | {"question_id": ids, "image_id": ids, "question": text}
    return datasets.Features(columns | {"answers": [answer], "image": datasets.Image()}).arrow_schema


def _table(rows: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=schema)


def _lacking(what: str, names: list[str], total: int, images: Path, patterns: Sequence[str]) -> str:
    return (
        f"{len(names)} of {total} pictures {what} {images}: {listed(names)}. Fetch them again, or give --allow-missing "
        f"to leave their questions out. Names that were tried: {', '.join(patterns)}"
    )


def _manifest(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("splits"), dict):
            raise ValueError("no mapping with splits")
    except (OSError, ValueError) as error:
        raise FamilyError(f"{file}: not readable ({error}); remove its folder and prepare it again") from error
    return data


def _note(
    folder: Path, split: str, name: str, built: Prepared, questions: Path, annotations: Path, pictures: str
) -> None:
    file = folder / MANIFEST
    manifest = _manifest(file) if file.is_file() else {"splits": {}}
    manifest |= {"manifest_version": 1, "dataset": name, "bitquake": bitquake.__version__}
    manifest["splits"][split] = {
        "rows": built.rows,
        "images": built.images,
        "left_out": built.left_out,
        "missing_images": built.missing,
        "broken_images": built.broken,
        "pictures_blake2b": pictures,
        "inputs": {
            key: {"file": given.name, "sha256": hashlib.sha256(given.read_bytes()).hexdigest()}
            for key, given in (("questions", questions), ("annotations", annotations))
        },
    }
    with replacing(file) as new:
        new.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
