"""Rows made ready: ids, parts and subsets by image, and images that stay encoded until they are wanted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from bitquake.noise import pixel_hash
from bitquake.tasks.contract import CANDIDATES
from bitquake.tasks.documents import IDS, EncodedPicture, Rows, keep_encoded, prepare
from bitquake.tasks.families import FamilyError
from bitquake.tasks.schema import Candidates, Columns, Split, Subset
from bitquake.tasks.selection import describe

WHOLE = Split(split="test")
COLUMNS = Columns(answers="answers", sample_id="question_id", image_id="image_id")
MakeRows = Callable[..., list[dict[str, Any]]]


def dataset_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_declared_ids_are_taken_as_text(rows: MakeRows) -> None:
    ready = prepare(dataset_of(rows(4)), COLUMNS, Rows(WHOLE))
    assert [row["sample_id"] for row in ready[IDS]] == ["0", "1", "2", "3"]
    assert [row["image_id"] for row in ready[IDS]] == ["1000", "1000", "1001", "1001"]
    assert {row["subset"] for row in ready[IDS]} == {""}


def test_default_ids_are_hashes_of_content_and_of_pixels(rows: MakeRows, make_picture: Callable[..., bytes]) -> None:
    made = rows(4)
    # The same pixels in another file: the same image.
    other = io.BytesIO()
    Image.open(io.BytesIO(made[1]["image"]["bytes"])).save(other, "BMP")
    made[1]["image"] = {"bytes": other.getvalue(), "path": None}
    # The same row twice keeps two ids.
    made.append(made[3])
    ready = prepare(dataset_of(made), Columns(answers="answers"), Rows(WHOLE))[IDS]
    assert ready[0]["image_id"] == ready[1]["image_id"] == pixel_hash(make_picture(0))
    assert ready[2]["image_id"] != ready[0]["image_id"]
    assert len({row["sample_id"] for row in ready}) == 5
    assert ready[4]["sample_id"] == ready[3]["sample_id"] + "-2"
    # Neither depends on what else is in the dataset.
    alone = prepare(dataset_of(made[2:4]), Columns(answers="answers"), Rows(WHOLE))[IDS]
    assert [row["sample_id"] for row in alone] == [row["sample_id"] for row in ready[2:4]]


def test_rows_without_a_readable_image_are_clusters_of_their_own(rows: MakeRows) -> None:
    made = rows(4)
    made[0]["image"] = None
    made[1]["image"] = {"bytes": b"broken", "path": None}
    made[2]["image"] = {"bytes": None, "path": "nowhere.png"}
    ready = prepare(dataset_of(made), Columns(answers="answers"), Rows(WHOLE, need_size=True))[IDS]
    assert [row["image_id"] == f"none-{row['sample_id']}" for row in ready] == [True, True, True, False]
    assert [row["width"] for row in ready] == [None, None, None, 40]


def test_rows_without_an_image_id_are_clusters_of_their_own(rows: MakeRows) -> None:
    some = [row | {"image_id": None if i % 2 else row["image_id"]} for i, row in enumerate(rows(6))]
    ready = prepare(dataset_of(some), COLUMNS, Rows(WHOLE))[IDS]
    assert [row["image_id"] for row in ready[1::2]] == [f"none-{row['sample_id']}" for row in ready[1::2]]
    assert len({row["image_id"] for row in ready[1::2]}) == 3


def test_images_are_not_decoded(rows: MakeRows) -> None:
    made = rows(2)
    made[0]["image"] = {"bytes": b"broken", "path": None}
    with pytest.raises(Exception, match="cannot identify"):
        dataset_of(made)[0]
    ready = prepare(dataset_of(made), COLUMNS, Rows(WHOLE))
    assert ready[0]["image"] == b"broken"
    assert ready[1]["image"] == made[1]["image"]["bytes"]
    # And it still is an image column to whoever drops those.
    assert isinstance(ready.features["image"], datasets.Image)
    assert "image" not in ready.remove_columns("image")[0]


def test_an_image_by_its_path(tmp_path: Any, make_picture: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(make_picture(3))
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    assert keep_encoded(dataset)[0]["image"] == make_picture(3)


def test_sizes_are_those_of_the_picture_as_seen(rows: MakeRows) -> None:
    made = rows(2)
    sideways = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(sideways, "JPEG", exif=exif)
    made[1]["image"] = {"bytes": sideways.getvalue(), "path": None}
    ready = prepare(dataset_of(made), COLUMNS, Rows(WHOLE, need_size=True))[IDS]
    assert [(row["width"], row["height"]) for row in ready] == [(40, 30), (30, 40)]
    declared = COLUMNS.model_copy(update={"width": "w", "height": "h"})
    sized = [row | {"w": 7, "h": 9} for row in made]
    ready = prepare(dataset_of(sized), declared, Rows(WHOLE, need_size=True))[IDS]
    assert [(row["width"], row["height"]) for row in ready] == [(7, 9), (7, 9)]
    for wrong in ("7", 7.5, 0):
        with pytest.raises(FamilyError, match=rf"columns.width, .* got {wrong!r}; name the right columns"):
            prepare(dataset_of([row | {"w": wrong} for row in sized]), declared, Rows(WHOLE, need_size=True))


def test_parts_deal_out_whole_images_and_are_disjoint(rows: MakeRows) -> None:
    dataset = dataset_of(rows(400))
    cuts = [(0.0, 0.4), (0.4, 0.5), (0.5, 1.0)]
    parts = [prepare(dataset, COLUMNS, Rows(Split(split="v", part=cut)))[IDS] for cut in cuts]
    images = [{row["image_id"] for row in part} for part in parts]
    assert not images[0] & images[1] and not images[1] & images[2] and not images[0] & images[2]
    assert sum(len(part) for part in parts) == 400
    assert [len(part) / 400 for part in parts] == pytest.approx([0.4, 0.1, 0.5], abs=0.08)
    for part in parts:  # two questions on every picture, both or none
        assert len(part) == 2 * len({row["image_id"] for row in part})


def test_a_subset_is_fixed_clustered_by_image_and_hashed(rows: MakeRows) -> None:
    dataset = dataset_of(rows(100))
    chosen = prepare(dataset, COLUMNS, Rows(WHOLE, Subset(n=20)))
    ids = [row["sample_id"] for row in chosen[IDS]]
    assert len(ids) == 20
    assert len({row["image_id"] for row in chosen[IDS]}) == 10
    assert ids == sorted(ids, key=int)
    shuffled = prepare(dataset.shuffle(seed=1), COLUMNS, Rows(WHOLE, Subset(n=20)))
    assert {row["sample_id"] for row in shuffled[IDS]} == set(ids)
    hashes = {row["subset"] for row in chosen[IDS]} | {row["subset"] for row in shuffled[IDS]}
    assert len(hashes) == 1 and hashes != {""}
    other = prepare(dataset, COLUMNS, Rows(WHOLE, Subset(n=20, seed=1)))
    assert {row["sample_id"] for row in other[IDS]} != set(ids)
    smaller = prepare(dataset, COLUMNS, Rows(WHOLE, Subset(n=10)))
    assert {row["sample_id"] for row in smaller[IDS]} < set(ids)
    assert len(prepare(dataset, COLUMNS, Rows(WHOLE, Subset(n=1000)))) == 100
    # Rows keep their own content through the choice.
    assert all(str(row["question_id"]) == row[IDS]["sample_id"] for row in chosen)


def test_a_missing_column_and_repeated_ids(rows: MakeRows) -> None:
    with pytest.raises(
        FamilyError, match=r"columns.answers: the dataset has no column 'replies'; it has answers, image"
    ):
        prepare(dataset_of(rows(2)), Columns(answers="replies"), Rows(WHOLE))
    with pytest.raises(FamilyError, match=r"columns.sample_id: 'image_id' has '1000' in more than one row"):
        prepare(dataset_of(rows(2)), Columns(sample_id="image_id"), Rows(WHOLE))


def ids_of(ready: datasets.Dataset) -> list[str]:
    return [row["sample_id"] for row in ready[IDS]]


def graded(rows: MakeRows, n: int = 12) -> datasets.Dataset:
    made = [row | {"grade": f"grade{i % 3 + 1}", "level": i % 2, "hard": i > 5} for i, row in enumerate(rows(n))]
    return dataset_of(made)


def test_rows_where_columns_have_given_values(rows: MakeRows) -> None:
    dataset = graded(rows)

    def chosen(**where: list[Any]) -> list[str]:
        return ids_of(prepare(dataset, COLUMNS, Rows(Split(split="test", where=where))))

    assert chosen(grade=["grade1"]) == ["0", "3", "6", "9"]
    assert chosen(grade=["grade1", "grade3"]) == [str(i) for i in range(12) if i % 3 != 1]
    assert chosen(grade=["grade1"], level=[1]) == ["3", "9"]
    assert chosen(hard=[True], level=[0]) == ["6", "8", "10"]
    part = Split(split="test", part=(0.0, 0.5), where={"level": [0]})
    half = ids_of(prepare(dataset, COLUMNS, Rows(Split(split="test", part=(0.0, 0.5)))))
    assert ids_of(prepare(dataset, COLUMNS, Rows(part))) == [one for one in half if int(one) % 2 == 0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"grad": ["grade1"]}, r"where.grad: the dataset has no column 'grad'; it has answers, grade, hard"),
        (
            {"grade": ["grade 2"]},
            r"where.grade: 'grade 2' occurs in none of the 12 rows .*'test'; it has 'grade1' \(4\), 'grade2'",
        ),
        ({"level": ["0"]}, r"where.level: '0' occurs in none .* it has 0 \(6\), 1 \(6\)"),
        ({"answers": ["yes"]}, r"where.answers: expected a column of texts, integers or truth values"),
        (
            {"grade": ["grade1"], "question_id": [1]},
            r"rows where grade is grade1, rows where question_id is 1: none of",
        ),
    ],
)
def test_rows_where_nothing_fits(rows: MakeRows, where: dict[str, Any], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        prepare(graded(rows), COLUMNS, Rows(Split(split="test", where=where)))


def test_a_value_that_does_not_occur_beside_one_that_does_is_a_warning(rows: MakeRows) -> None:
    split = Split(split="test", where={"grade": ["grade1", "grade12"]})
    with pytest.warns(UserWarning, match=r"where.grade: 'grade12' occurs in none of the 12 rows"):
        assert len(prepare(graded(rows), COLUMNS, Rows(split))) == 4


def test_rows_by_a_list_of_ids(rows: MakeRows, tmp_path: Path) -> None:
    split = Split(split="test", ids="dev.json")
    wanted = Rows(split, folder=tmp_path)
    (tmp_path / "dev.json").write_text('[7, "2", 5]')
    assert ids_of(prepare(dataset_of(rows(12)), COLUMNS, wanted)) == ["2", "5", "7"]
    assert describe(split, tmp_path).startswith("test, 3 ids of dev.json (")
    (tmp_path / "dev.json").write_text('["2", "5", "500", "501", "502", "503"]')
    with pytest.raises(
        FamilyError, match=r"dev.json: 4 of its 6 sample ids are not in .*'test' \(12 samples\), for .*500"
    ):
        prepare(dataset_of(rows(12)), COLUMNS, wanted)
    for text, message in (
        ("{", "dev.json:1: no JSON"),
        ("{}", "expected a list of sample ids"),
        ("[true]", "expected sample ids"),
    ):
        (tmp_path / "dev.json").write_text(text)
        with pytest.raises(FamilyError, match=message):
            prepare(dataset_of(rows(12)), COLUMNS, wanted)
    (tmp_path / "dev.json").unlink()
    with pytest.raises(FamilyError, match="cannot be read"):
        prepare(dataset_of(rows(12)), COLUMNS, wanted)


EXPRESSIONS = Columns(question="sentences", sample_id="question_id", image_id="image_id")


def expressions(rows: MakeRows, n: int = 6) -> datasets.Dataset:
    return dataset_of(
        [row | {"sentences": [f"{i} {k}" for k in range((0, 3, 1)[i % 3])]} for i, row in enumerate(rows(n))]
    )


def test_an_exploded_list_makes_a_row_of_each_entry(rows: MakeRows) -> None:
    ready = prepare(expressions(rows), EXPRESSIONS, Rows(WHOLE, explode="sentences", need_size=True))
    assert ids_of(ready) == ["1-0", "1-1", "1-2", "2-0", "4-0", "4-1", "4-2", "5-0"]
    for row in ready:
        question, entry = row[IDS]["sample_id"].split("-")
        assert row["sentences"] == f"{question} {entry}"
        assert str(row["question_id"]) == question
        assert row[IDS]["image_id"] == str(row["image_id"])
        assert (row[IDS]["width"], row[IDS]["height"]) == (40, 30)
        assert (
            row["image"]
            == expressions(rows).cast_column("image", datasets.Image(decode=False))[int(question)]["image"]["bytes"]
        )


def test_an_exploded_list_shares_the_images_of_its_rows(rows: MakeRows) -> None:
    import pyarrow as pa

    dataset = expressions(rows, 60)
    before = pa.total_allocated_bytes()
    ready = prepare(dataset, EXPRESSIONS, Rows(WHOLE, explode="sentences"))
    images = sum(len(row["image"]) for row in ready)
    assert len(ready) == 80
    assert pa.total_allocated_bytes() - before < images / 4


def test_parts_subsets_and_ids_of_exploded_rows(rows: MakeRows, tmp_path: Path) -> None:
    dataset = expressions(rows, 60)
    whole = ids_of(prepare(dataset, EXPRESSIONS, Rows(WHOLE, explode="sentences")))
    halves = [
        ids_of(prepare(dataset, EXPRESSIONS, Rows(Split(split="v", part=part), explode="sentences")))
        for part in ((0.0, 0.5), (0.5, 1.0))
    ]
    assert sorted(halves[0] + halves[1]) == sorted(whole) and min(map(len, halves)) > 20
    images = [{int(one.split("-")[0]) // 2 for one in half} for half in halves]
    assert not images[0] & images[1]
    chosen = ids_of(prepare(dataset, EXPRESSIONS, Rows(WHOLE, Subset(n=10), explode="sentences")))
    assert len(chosen) == 10
    shuffled = prepare(dataset.shuffle(seed=3), EXPRESSIONS, Rows(WHOLE, Subset(n=10), explode="sentences"))
    assert set(ids_of(shuffled)) == set(chosen)
    # A published list may name rows, or single entries.
    (tmp_path / "l.json").write_text('[4, "1-2"]')
    listed = Rows(Split(split="v", ids="l.json"), explode="sentences", folder=tmp_path)
    assert ids_of(prepare(dataset, EXPRESSIONS, listed)) == ["1-2", "4-0", "4-1", "4-2"]


def test_a_column_that_holds_no_lists_cannot_be_exploded(rows: MakeRows) -> None:
    columns = COLUMNS.model_copy(update={"answers": None})
    with pytest.raises(FamilyError, match="explode: column 'question' must hold lists, it holds string"):
        prepare(dataset_of(rows(2)), columns, Rows(WHOLE, explode="question"))


CAPTIONS = Columns(question=None, captions="captions", sample_id="question_id", image_id="question_id")


def captioned(rows: MakeRows, n: int = 40) -> datasets.Dataset:
    return dataset_of([row | {"captions": [f"picture {i} {k}" for k in "ab"]} for i, row in enumerate(rows(n))])


def test_candidates_are_those_of_the_part_whatever_the_subset_and_the_order(rows: MakeRows) -> None:
    dataset, five = captioned(rows), Candidates(n=5, seed=2)
    whole = {row[IDS]["sample_id"]: row for row in prepare(dataset, CAPTIONS, Rows(WHOLE, candidates=five))}
    assert len(whole) == 40
    for key, row in whole.items():
        assert len(row[CANDIDATES]) == 5
        own = [i for i, text in enumerate(row[CANDIDATES]) if text.startswith(f"picture {key} ")]
        assert own == [row[IDS]["target"]]
    some = prepare(dataset.shuffle(seed=4), CAPTIONS, Rows(WHOLE, Subset(n=7), candidates=five))
    assert len(some) == 7
    for row in some:
        assert row[CANDIDATES] == whole[row[IDS]["sample_id"]][CANDIDATES]
        assert row[IDS]["target"] == whole[row[IDS]["sample_id"]][IDS]["target"]
    part = prepare(dataset, CAPTIONS, Rows(Split(split="v", part=(0.0, 0.5)), candidates=five))
    inside = set(ids_of(part))
    drawn = {text.split()[1] for row in part for text in row[CANDIDATES]}
    assert drawn <= inside  # distractors are of the part itself
    with pytest.raises(FamilyError, match=r"candidates.n: 100 candidates need 100 pictures .* this part has 40"):
        prepare(dataset, CAPTIONS, Rows(WHOLE, candidates=Candidates(n=100)))


def test_nothing_is_left(rows: MakeRows) -> None:
    with pytest.raises(FamilyError, match=r"v, pictures with hash in \[0, 1e-09\): none of the split's 12 samples"):
        prepare(dataset_of(rows(12)), COLUMNS, Rows(Split(split="v", part=(0.0, 1e-9))))


def test_lists_of_images_stay_encoded_too(rows: MakeRows, make_picture: Callable[..., bytes]) -> None:
    made = [
        row | {"more": [{"bytes": make_picture(8), "path": None}, {"bytes": b"broken", "path": None}]}
        for row in rows(2)
    ]
    dataset = dataset_of(made).cast_column("more", datasets.Sequence(datasets.Image()))
    ready = prepare(dataset, COLUMNS, Rows(WHOLE))
    assert ready[1]["more"] == [make_picture(8), b"broken"]
    assert {type(one) for one in ready[1]["more"]} == {EncodedPicture}
