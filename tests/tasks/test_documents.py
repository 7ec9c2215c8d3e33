"""Rows made ready: ids, parts and subsets by image, and images that stay encoded until they are wanted."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from bitquake.noise import pixel_hash
from bitquake.tasks.documents import IDS, keep_encoded, prepare
from bitquake.tasks.families import Columns, FamilyError, Split, Subset

WHOLE = Split(split="test")
COLUMNS = Columns(answers="answers", sample_id="question_id", image_id="image_id")
Rows = Callable[..., list[dict[str, Any]]]


def dataset_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_declared_ids_are_taken_as_text(rows: Rows) -> None:
    ready = prepare(dataset_of(rows(4)), COLUMNS, WHOLE, None, need_size=False)
    assert [row["sample_id"] for row in ready[IDS]] == ["0", "1", "2", "3"]
    assert [row["image_id"] for row in ready[IDS]] == ["1000", "1000", "1001", "1001"]
    assert {row["subset"] for row in ready[IDS]} == {""}


def test_default_ids_are_hashes_of_content_and_of_pixels(rows: Rows, make_picture: Callable[..., bytes]) -> None:
    made = rows(4)
    # The same pixels in another file: the same image.
    other = io.BytesIO()
    Image.open(io.BytesIO(made[1]["image"]["bytes"])).save(other, "BMP")
    made[1]["image"] = {"bytes": other.getvalue(), "path": None}
    # The same row twice keeps two ids.
    made.append(made[3])
    ready = prepare(dataset_of(made), Columns(answers="answers"), WHOLE, None, need_size=False)[IDS]
    assert ready[0]["image_id"] == ready[1]["image_id"] == pixel_hash(make_picture(0))
    assert ready[2]["image_id"] != ready[0]["image_id"]
    assert len({row["sample_id"] for row in ready}) == 5
    assert ready[4]["sample_id"] == ready[3]["sample_id"] + "-2"
    # Neither depends on what else is in the dataset.
    alone = prepare(dataset_of(made[2:4]), Columns(answers="answers"), WHOLE, None, need_size=False)[IDS]
    assert [row["sample_id"] for row in alone] == [row["sample_id"] for row in ready[2:4]]


def test_rows_without_a_readable_image_are_clusters_of_their_own(rows: Rows) -> None:
    made = rows(4)
    made[0]["image"] = None
    made[1]["image"] = {"bytes": b"broken", "path": None}
    made[2]["image"] = {"bytes": None, "path": "nowhere.png"}
    ready = prepare(dataset_of(made), Columns(answers="answers"), WHOLE, None, need_size=True)[IDS]
    assert [row["image_id"] == f"none-{row['sample_id']}" for row in ready] == [True, True, True, False]
    assert [row["width"] for row in ready] == [None, None, None, 40]


def test_rows_without_an_image_id_are_clusters_of_their_own(rows: Rows) -> None:
    some = [row | {"image_id": None if i % 2 else row["image_id"]} for i, row in enumerate(rows(6))]
    ready = prepare(dataset_of(some), COLUMNS, WHOLE, None, need_size=False)[IDS]
    assert [row["image_id"] for row in ready[1::2]] == [f"none-{row['sample_id']}" for row in ready[1::2]]
    assert len({row["image_id"] for row in ready[1::2]}) == 3


def test_images_are_not_decoded(rows: Rows) -> None:
    made = rows(2)
    made[0]["image"] = {"bytes": b"broken", "path": None}
    with pytest.raises(Exception, match="cannot identify"):
        dataset_of(made)[0]
    ready = prepare(dataset_of(made), COLUMNS, WHOLE, None, need_size=False)
    assert ready[0]["image"] == b"broken"
    assert ready[1]["image"] == made[1]["image"]["bytes"]
    # And it still is an image column to whoever drops those.
    assert isinstance(ready.features["image"], datasets.Image)
    assert "image" not in ready.remove_columns("image")[0]


def test_an_image_by_its_path(tmp_path: Any, make_picture: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(make_picture(3))
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    assert keep_encoded(dataset, "image")[0]["image"] == make_picture(3)


def test_sizes_are_those_of_the_picture_as_seen(rows: Rows) -> None:
    made = rows(2)
    sideways = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(sideways, "JPEG", exif=exif)
    made[1]["image"] = {"bytes": sideways.getvalue(), "path": None}
    ready = prepare(dataset_of(made), COLUMNS, WHOLE, None, need_size=True)[IDS]
    assert [(row["width"], row["height"]) for row in ready] == [(40, 30), (30, 40)]
    declared = COLUMNS.model_copy(update={"width": "w", "height": "h"})
    sized = [row | {"w": 7, "h": 9} for row in made]
    ready = prepare(dataset_of(sized), declared, WHOLE, None, need_size=True)[IDS]
    assert [(row["width"], row["height"]) for row in ready] == [(7, 9), (7, 9)]


def test_parts_deal_out_whole_images_and_are_disjoint(rows: Rows) -> None:
    dataset = dataset_of(rows(400))
    cuts = [(0.0, 0.4), (0.4, 0.5), (0.5, 1.0)]
    parts = [prepare(dataset, COLUMNS, Split(split="v", part=cut), None, need_size=False)[IDS] for cut in cuts]
    images = [{row["image_id"] for row in part} for part in parts]
    assert not images[0] & images[1] and not images[1] & images[2] and not images[0] & images[2]
    assert sum(len(part) for part in parts) == 400
    assert [len(part) / 400 for part in parts] == pytest.approx([0.4, 0.1, 0.5], abs=0.08)
    for part in parts:  # two questions on every picture, both or none
        assert len(part) == 2 * len({row["image_id"] for row in part})


def test_a_subset_is_fixed_clustered_by_image_and_hashed(rows: Rows) -> None:
    dataset = dataset_of(rows(100))
    chosen = prepare(dataset, COLUMNS, WHOLE, Subset(n=20), need_size=False)
    ids = [row["sample_id"] for row in chosen[IDS]]
    assert len(ids) == 20
    assert len({row["image_id"] for row in chosen[IDS]}) == 10
    assert ids == sorted(ids, key=int)
    shuffled = prepare(dataset.shuffle(seed=1), COLUMNS, WHOLE, Subset(n=20), need_size=False)
    assert {row["sample_id"] for row in shuffled[IDS]} == set(ids)
    hashes = {row["subset"] for row in chosen[IDS]} | {row["subset"] for row in shuffled[IDS]}
    assert len(hashes) == 1 and hashes != {""}
    other = prepare(dataset, COLUMNS, WHOLE, Subset(n=20, seed=1), need_size=False)
    assert {row["sample_id"] for row in other[IDS]} != set(ids)
    smaller = prepare(dataset, COLUMNS, WHOLE, Subset(n=10), need_size=False)
    assert {row["sample_id"] for row in smaller[IDS]} < set(ids)
    assert len(prepare(dataset, COLUMNS, WHOLE, Subset(n=1000), need_size=False)) == 100
    # Rows keep their own content through the choice.
    assert all(str(row["question_id"]) == row[IDS]["sample_id"] for row in chosen)


def test_a_missing_column_and_repeated_ids(rows: Rows) -> None:
    with pytest.raises(
        FamilyError, match=r"columns.answers: the dataset has no column 'replies'; it has answers, image"
    ):
        prepare(dataset_of(rows(2)), Columns(answers="replies"), WHOLE, None, need_size=False)
    with pytest.raises(FamilyError, match=r"columns.sample_id: 'image_id' has '1000' in more than one row"):
        prepare(dataset_of(rows(2)), Columns(sample_id="image_id"), WHOLE, None, need_size=False)
