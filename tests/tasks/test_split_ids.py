"""Splits that are lists of sample ids: in a family file, and in the user's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquake.tasks import families
from bitquake.tasks.contract import TaskContract
from bitquake.tasks.expand import builtin_index, variants_of
from bitquake.tasks.families import FamilyError, Loaded, load_family
from bitquake.tasks.split_ids import read_roles, with_ids
from bitquake.tasks.strict_yaml import load_task_yaml

FAMILY = """
family: listed
dataset: {path: someone/listed}
splits:
  test: {split: val, part: [0.5, 1.0]}
  threshold: {split: val, part: [0.25, 0.5]}
  calibration: {split: val, part: [0.0, 0.25]}
columns: {answers: answers}
protocol: vqa
"""
OWN = FAMILY.replace("part: [0.5, 1.0]", "ids: test.json").replace("part: [0.25, 0.5]", "ids: dev.json")
OWN = OWN.replace("  calibration: {split: val, part: [0.0, 0.25]}\n", "")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_json(name: str, data: Any) -> Path:
        (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
        return tmp_path / name

    return write_json


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., Loaded]:
    def load(text: str = FAMILY) -> Loaded:
        (tmp_path / "family.yaml").write_text(text)
        return load_family(tmp_path / "family.yaml")

    return load


def test_a_list_takes_the_place_of_a_part(write: Any, listed: Any) -> None:
    file = write("paper.json", {"test": [1, 2, "x"], "threshold": [3], "calibration": ["4"]})
    found = with_ids(listed(), file)
    splits = found.family.splits
    for role, ids in (("test", ["1", "2", "x"]), ("threshold", ["3"]), ("calibration", ["4"])):
        split = getattr(splits, role)
        assert split.split == "val" and split.part is None
        assert split.ids.startswith(f"paper-{role}-") and json.loads(found.ids[split.ids]) == ids
    assert len(found.ids) == 3
    again = with_ids(listed(), write("paper.json", {"test": [1, 2], "threshold": [3], "calibration": ["4"]}))
    assert again.family.splits.test.ids != splits.test.ids
    assert again.family.splits.threshold.ids == splits.threshold.ids
    assert with_ids(listed()) == listed()


def test_a_list_for_dev_makes_a_task_of_its_own(write: Any, listed: Any) -> None:
    found = with_ids(listed(), write("paper.json", {"test": [1], "threshold": [2], "dev": ["7", 8]}))
    dev = found.family.splits.dev
    assert dev.split == "val" and json.loads(found.ids[dev.ids]) == ["7", "8"]
    tasks = {variant.task: variant for variant in variants_of(found.family)}
    assert tasks["listed_dev"].split == dev and tasks["listed_dev"].noise is None
    assert "listed_dev" not in {variant.task for variant in variants_of(listed().family)}


def test_without_a_list_for_calibration_there_is_no_calibration(write: Any, listed: Any) -> None:
    found = with_ids(listed(), write("paper.json", {"test": [1], "threshold": [2]}))
    assert found.family.splits.calibration is None


def test_a_familys_own_lists(write: Any, listed: Any) -> None:
    write("test.json", ["a", "b"])
    write("dev.json", ["c"])
    found = with_ids(listed(OWN))
    assert {name.rpartition("-")[0]: json.loads(text) for name, text in found.ids.items()} == {
        "test": ["a", "b"],
        "dev": ["c"],
    }
    replaced = with_ids(listed(OWN), write("paper.json", {"test": [1], "threshold": [2]}))
    assert {name.rpartition("-")[0] for name in replaced.ids} == {"paper-test", "paper-threshold"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"paper.json:1: no JSON"),
        ("[" * 100_000, "no JSON"),
        ([1, 2], "expected .*got list"),
        ({"test": [1], "threshold": [2], "train": [3]}, "'train' is no role"),
        ({"test": [1], "calibration": [3]}, "the list 'threshold' is missing"),
        ({"test": [], "threshold": [2]}, "test: expected a list of sample ids"),
        ({"test": "1", "threshold": [2]}, "test: expected a list of sample ids, got 1"),
        ({"test": [1, True], "threshold": [2]}, "expected sample ids .* got 'True'"),
        ({"test": [1.5], "threshold": [2]}, "expected sample ids .* got '1.5'"),
        ({"test": [1, "1"], "threshold": [2]}, "test: '1' comes more than once"),
    ],
)
def test_a_file_that_is_none(data: Any, message: str, write: Any) -> None:
    with pytest.raises(FamilyError, match=message):
        read_roles(write("paper.json", data))


def test_a_file_that_is_not_there(tmp_path: Path, listed: Any) -> None:
    with pytest.raises(FamilyError, match=r"paper.json: cannot be read \(No such file"):
        read_roles(tmp_path / "paper.json")
    with pytest.raises(FamilyError, match=r"family.yaml:5: splits.test.ids: .*test.json: cannot be read"):
        with_ids(listed(OWN))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"test": [1, 2], "threshold": [2, 3]}, "splits.threshold: shares 1 sample ids with splits.test in .*'2'"),
        ({"test": [1], "threshold": [2], "calibration": [2]}, "shares 1 sample ids with splits.calibration"),
        ({"test": [1], "threshold": [2], "calibration": [1]}, "splits.calibration: shares 1 sample ids"),
        ({"test": [1], "threshold": [2], "dev": [3, 1]}, "splits.dev: shares 1 sample ids with splits.test"),
        ({"test": [1], "threshold": [2], "dev": [2]}, "splits.threshold: shares 1 sample ids with splits.dev"),
    ],
)
def test_lists_that_overlap(lists: Any, message: str, write: Any, listed: Any) -> None:
    with pytest.raises(FamilyError, match=message):
        with_ids(listed(), write("paper.json", lists))


def test_shift_rows_may_be_test_rows_but_not_threshold_rows(write: Any, listed: Any) -> None:
    write("test.json", ["a", "b"])
    write("dev.json", ["c"])
    shift = "variants:\n  shifts:\n    hard: {split: val, ids: hard.json}\n"
    write("hard.json", ["b"])
    found = with_ids(listed(OWN + shift))
    assert json.loads(found.ids[found.family.variants.shifts["hard"].ids]) == ["b"]
    write("hard.json", ["b", "c"])
    with pytest.raises(FamilyError, match=r"splits.threshold: shares 1 sample ids with variants.shifts.hard"):
        with_ids(listed(OWN + shift))
    whole = FAMILY + "variants:\n  shifts:\n    hard: {split: val, part: [0.9, 1.0]}\n"
    with pytest.raises(FamilyError, match=r"hard: shares images with threshold.*give both `ids`"):
        with_ids(listed(whole), write("paper.json", {"test": [1], "threshold": [2]}))


def test_the_lists_of_the_configuration_reach_the_task_files(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitquake.config import load_config, save_config, set_split_ids

    built_in = tmp_path / "built_in" / "vqav2"
    built_in.mkdir(parents=True)
    (built_in / "family.yaml").write_text((families.BUILT_IN / "vqav2" / "family.yaml").read_text())
    monkeypatch.setattr(families, "BUILT_IN", tmp_path / "built_in")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    cache = tmp_path / "cache"
    without = builtin_index(cache=cache)
    file = write("paper.json", {"test": [1, 2], "threshold": [3]})
    save_config(set_split_ids(load_config(), "vqav2", file))
    first = builtin_index(cache=cache)
    assert first.problems == [] and first.root != without.root
    base = load_task_yaml((first.root / "vqav2" / "_base_yaml").read_text())
    splits = TaskContract.model_validate(base["metadata"]["bitquake"]).splits
    assert splits.calibration is None and splits.test.ids is not None
    assert json.loads((first.root / "vqav2" / splits.test.ids).read_text()) == ["1", "2"]
    write("paper.json", {"test": [1], "threshold": [3]})
    second = builtin_index(cache=cache)
    assert second.root not in (first.root, without.root)
    write("paper.json", {"test": [1], "threshold": [1]})
    [problem] = builtin_index(cache=cache).problems
    assert "splits.threshold: shares 1 sample ids" in problem and "paper.json" in problem
    file.unlink()
    [problem] = builtin_index(cache=cache).problems
    assert "paper.json: cannot be read" in problem
