"""The split ``train``: what a family file may say of it, and the block world's, drawn when it is wanted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from bitquake.tasks.contract import TaskContract
from bitquake.tasks.expand import builtin_index
from bitquake.tasks.families import BUILT_IN, FAMILY_FILE, FamilyError, Loaded, load_families, load_family
from bitquake.tasks.world import build, splits

GOOD: dict[str, Any] = {
    "family": "mine",
    "dataset": {"path": "someone/mine"},
    "splits": {"test": {"split": "val", "part": [0.5, 1.0]}, "threshold": {"split": "val", "part": [0.4, 0.5]}},
    "columns": {"answers": "answers"},
    "protocol": "vqa",
}


def load(tmp_path: Path, **changes: Any) -> Loaded:
    file = tmp_path / FAMILY_FILE
    file.write_text(yaml.safe_dump(GOOD | changes))
    return load_family(file)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, ("train", None, None)),
        ({"split": "train2014", "dataset": {"prepared": "mine_train"}}, ("train2014", "mine_train", None)),
        ({"split": "val", "part": [0.0, 0.4]}, ("val", None, (0.0, 0.4))),
    ],
)
def test_a_family_says_what_models_are_trained_on(tmp_path: Path, train: dict[str, Any], expected: Any) -> None:
    found = load(tmp_path, train=train).family.train
    assert found is not None
    assert (found.split, found.dataset and found.dataset.prepared, found.part) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"split": "val"}}, "train: shares images with test: both take 'val'"),
        ({"train": {"split": "val", "part": [0.0, 0.45]}}, "train: shares images with threshold"),
        ({"train": {"pictures": 10}}, "train.pictures: only the block world's pictures are drawn"),
        ({"train": {"pictures": 10, "part": [0.0, 0.5]}, "world": "block"}, "pictures are drawn: give no"),
        ({"train": {"ids": "a.json"}}, "a list of `ids` is for splits that tasks evaluate"),
        ({"train": {"picture": 10}}, r"unknown key; remove it, or did you mean 'pictures'\?"),
        ({"train": {"dataset": {"path": "a", "prepared": "b"}}}, "give either `path`"),
        (
            {"train": {}, "dataset": {"files": {"val": "a.parquet"}}},
            "train: dataset.files has no split 'train'; it has val",
        ),
    ],
)
def test_what_it_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        load(tmp_path, **changes)


def test_a_split_for_training_changes_no_task(tmp_path: Path) -> None:
    """What records and reports compare stays what it was before there was one."""
    with_it, without = (load(tmp_path, **changes).family for changes in ({"train": {}}, {}))
    assert TaskContract.of(with_it) == TaskContract.of(without)
    assert not [name for name in builtin_index().tasks if name.endswith("_train")]


def test_built_in_families_with_one() -> None:
    loaded, problems = load_families()
    assert not problems
    found = {one.family.family: one.family.train for one in loaded if one.family.train is not None}
    block = {name for name in found if name.startswith("block_")}
    assert block == set(splits.TRAIN_PER_IMAGE) and {found[name].pictures for name in block} == {8000}  # type: ignore[union-attr]
    assert set(found) - block == {"vqav2", "scienceqa", "scienceqa_full"}
    prepared = load_family(BUILT_IN / "vqav2" / FAMILY_FILE).family.train
    assert prepared is not None and prepared.dataset is not None and prepared.dataset.prepared == "vqav2_train"


@pytest.mark.parametrize("family", splits.TRAIN_PER_IMAGE)
def test_more_pictures_begin_with_the_same_ones_and_none_is_another_split_s(family: str) -> None:
    few, more = (list(splits.train_rows(family, n)) for n in (4, 60))
    assert more[: len(few)] == few
    names = [row["sample_id"] for row in more]
    assert len(set(names)) == len(names)
    pictures = {hashlib.blake2b(row["image"]["bytes"]).hexdigest() for row in more}
    assert len(pictures) <= 60 and len(more) / len(pictures) <= splits.TRAIN_PER_IMAGE[family]
    for split in splits.SIZES[family]:
        shipped = pq.read_table(build.data_file(family, split), columns=["image"])["image"].to_pylist()
        assert not pictures & {hashlib.blake2b(one["bytes"]).hexdigest() for one in shipped}


def test_its_seeds_are_apart_from_every_other_split_s() -> None:
    train = [splits.scene_seed(family, splits.TRAIN, i) for family in splits.TRAIN_PER_IMAGE for i in (0, 9_999_999)]
    others = [
        splits.scene_seed(family, split, i) for family in splits.FAMILIES for split in splits.SIZES[family]
        for i in (0, 9_999_999)
    ]  # fmt: skip
    assert len(set(train)) == len(train)
    assert min(train) >= 1 << 44 and max(train) < min((1 << 44) + (1 << 40), min(others))


def test_the_file_is_written_once_and_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = build.train_file("block_scienceqa", 5)
    assert tmp_path in file.parents
    written, when = file.read_bytes(), file.stat().st_mtime_ns
    assert build.train_file("block_scienceqa", 5) == file and file.stat().st_mtime_ns == when
    rows = pq.read_table(file).to_pylist()
    made = list(splits.train_rows("block_scienceqa", 5))
    assert rows == made
    file.unlink()
    assert build.train_file("block_scienceqa", 5).read_bytes() == written
    for family, n, message in (
        ("block_vizwiz", 5, "'block_vizwiz' has no train split; families with one are block_vqav2"),
        ("block_vqav2", 0, "has 1 to 10,000,000 pictures, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build.train_file(family, n)
