"""Expansion: names, tags and content of the task files, their cache folder, and export."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from bitquake.noise import image_noises, text_noises
from bitquake.tasks import catalog, expand, families, stock
from bitquake.tasks.contract import TaskContract
from bitquake.tasks.expand import builtin_index, read_index
from bitquake.tasks.families import FamilyError
from bitquake.tasks.glue import read_task
from bitquake.tasks.strict_yaml import load_task_yaml


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expanded")


@pytest.fixture
def all_families() -> None:
    """For tests about every built-in family; the others make do with three, which expand in a tenth of the time."""


@pytest.fixture(autouse=True)
def three_families(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if "all_families" in request.fixturenames:
        return
    folder = tmp_path_factory.getbasetemp() / "three"
    for name in ("block_scienceqa", "block_vqav2", "vqav2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(families.BUILT_IN / name / "family.yaml", folder / name / "family.yaml")
    monkeypatch.setattr(families, "BUILT_IN", folder)


NAMED = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog
brightness contrast elastic_transform pixelate jpeg_compression"""
IMAGENET_C = NAMED.split()
EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]


def noisy(family: str, names: Any, severities: Any = range(1, 6), end: str = "") -> set[str]:
    return {f"{family}_{name}_{severity}{end}" for name in names for severity in severities}


def test_every_built_in_family_is_registered(cache: Path, all_families: None) -> None:
    index = builtin_index(cache=cache)
    assert index.problems == []
    assert set(index.families) == {file.parent.name for file in families.BUILT_IN.glob("*/family.yaml")}
    assert {file.parent.name for file in index.tasks.values()} == set(index.families)
    assert all(file.is_file() for file in index.tasks.values())


def test_every_family_has_clean_threshold_and_each_noise_at_each_severity(cache: Path) -> None:
    index = builtin_index(cache=cache)
    expected = {"block_vqav2_clean", "block_vqav2_threshold", "block_vqav2_dev"}
    expected |= noisy("block_vqav2", [*image_noises(), *text_noises()])
    assert set(index.family_tasks("block_vqav2")) == expected
    assert {name for name in index.tasks if name.startswith("block_vqav2_")} == expected
    assert index.problems == []


def test_tags_of_the_four_groups(cache: Path) -> None:
    index = builtin_index(cache=cache)
    tags = index.tags
    camera = set(image_noises()) - set(IMAGENET_C) - set(EXTRA)
    for tag, names in (
        ("noise", IMAGENET_C),
        ("noise_extra", EXTRA),
        ("camera_noise", camera),
        ("text_noise", text_noises()),
    ):
        assert set(tags[f"vqav2_{tag}"]) == noisy("vqav2", names)
        assert set(tags[f"vqav2_{tag}_full"]) == noisy("vqav2", names, end="_full")
        for severity in range(1, 6):
            assert set(tags[f"vqav2_{tag}_{severity}"]) == noisy("vqav2", names, [severity])
            assert set(tags[f"vqav2_{tag}_{severity}_full"]) == noisy("vqav2", names, [severity], "_full")
    assert set(tags["real_dev"]) == {"vqav2_dev"}
    assert set(tags["block_dev"]) == {"block_vqav2_dev", "block_scienceqa_dev"}
    assert not any(name.endswith("_dev") for tag, names in tags.items() if not tag.endswith("_dev") for name in names)
    plain = {"vqav2_clean", "vqav2_threshold"}
    assert set(tags["vqav2_all"]) == noisy("vqav2", [*image_noises(), *text_noises()]) | plain
    assert not any(name.endswith("_full") for name in index.family_tasks("block_vqav2"))  # no subset, no _full
    assert not set(tags) & set(index.tasks)
    assert all(len(set(names)) == len(names) for names in tags.values())


SHIFTED = """
family: {name}
world: block
dataset: {{files: {{test: test.parquet, threshold: threshold.parquet, other: test.parquet}}}}
splits: {{test: test, threshold: threshold}}
columns: {{answers: answers, sample_id: question_id, image_id: image_id}}
protocol: vqa
tags: [a_study]
variants:
  noise: {{names: [fog], severities: [2], subset: {{n: 4}}}}
  shifts:
    early: {{split: test, where: {{grade: [1, 2]}}, shift_from: null}}
    late: {{split: test, where: {{grade: [3]}}, shift_from: early}}
    others: {{split: other}}
    abroad: {{split: other, part: [0.5, 1], shift_from: null, threshold: {{split: other, part: [0, 0.5]}}}}
"""


def test_shifts_their_thresholds_and_tags(make_family, cache: Path) -> None:  # type: ignore[no-untyped-def]
    index = builtin_index([make_family("seasons", SHIFTED)], cache)
    shifts = ["early", "early_threshold", "late", "others", "abroad", "abroad_threshold"]
    plain = {f"seasons_{variant}" for variant in ("clean", "threshold", *shifts)}
    assert set(index.family_tasks("seasons")) == plain | {"seasons_fog_2", "seasons_fog_2_full"}
    for tag in ("seasons_shift", "a_study"):
        assert set(index.tags[tag]) == plain
    assert set(index.tags["seasons_all"]) == plain | {"seasons_fog_2"}
    assert index.tags["seasons_noise_full"] == ["seasons_fog_2_full"]
    configs = {name: load_task_yaml(index.tasks[f"seasons_{name}"].read_text()) for name in shifts}
    assert {name: config["test_split"] for name, config in configs.items()} == {
        "early": "test",
        "early_threshold": "threshold",
        "late": "test",
        "others": "other",
        "abroad": "other",
        "abroad_threshold": "other",
    }
    for config in configs.values():
        assert list(config["dataset_kwargs"]["data_files"]) == [config["test_split"]]
        assert config["lmms_eval_specific_kwargs"]["default"]["noise"] is None
    base = load_task_yaml((index.root / "seasons" / "_base_yaml").read_text())
    contract = TaskContract.model_validate(base["metadata"]["bitquake"])
    assert contract.shifts["late"].where == {"grade": [3]} and contract.shifts["late"].shift_from == "early"
    parts = {name: read_task(index.tasks[f"seasons_{name}"]).part.part for name in ("abroad", "abroad_threshold")}
    assert parts == {"abroad": (0.5, 1.0), "abroad_threshold": (0.0, 0.5)}


STOCK = {
    "plain/plain.yaml": """
include: _default_yaml
task: "plain_vqa"
tag: [theirs]
task_alias: Plain
metric_list:
  - metric: exact
    aggregation: !function utils.total
    higher_is_better: true
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.3
lmms_eval_specific_kwargs:
  default: {pre_prompt: "", post_prompt: "Answer."}
  qwen_vl: {pre_prompt: "", post_prompt: " Answer:"}
""",
    "plain/_default_yaml": """
dataset_path: someone/plain
output_type: generate_until
validation_split: val
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_messages: !function utils.messages
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {max_new_tokens: 7}
""",
    "plain/utils.py": """
def visual(doc): return []
def text(doc, lmms_eval_specific_kwargs): return ""
def messages(doc, lmms_eval_specific_kwargs=None): return []
def results(doc, results): return {}
def total(items): return sum(items)
""",
    "plain/older.yaml": "include: plain.yaml\ntask: older_vqa\ngroup: old_style\n",
    "plain/unnamed.yaml": "include: _named_yaml\n",
    "plain/_named_yaml": "include: plain.yaml\ntask: named_by_what_it_includes\n",
    "plain/all.yaml": "group: many\ntask:\n  - plain_vqa\n  - older_vqa\n",
    "plain/choose.yaml": "include: plain.yaml\ntask: choose\noutput_type: multiple_choice\n",
    "plain/python.yaml": "task: python_task\nclass: !function utils.visual\n",
    "plain/blind.yaml": "task: blind\noutput_type: generate_until\ndoc_to_text: question\nmetric_list: []\n",
    "plain/cut.yaml": "include: plain.yaml\ntask: cut\nfilter_list: [{name: regex}]\n",
}
EXTENDS = """
family: {name}
extends: {{task: plain_vqa, score: exact}}
splits: {{test: {{split: val, part: [0.5, 1]}}, threshold: {{split: val, part: [0, 0.5]}}}}
protocol: stock
variants: {{noise: {{names: [fog], severities: [3]}}}}
"""


@pytest.fixture
def lmms_eval_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task files like lmms-eval's."""
    folder = tmp_path / "stock"
    for name, text in STOCK.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(stock, "tasks_folder", lambda: folder)
    return folder


def test_a_stock_task_is_included_and_overridden(make_family, cache: Path, lmms_eval_folder: Path) -> None:  # type: ignore[no-untyped-def]
    utils = pytest.importorskip("lmms_eval.utils")
    index = builtin_index([make_family("mine", EXTENDS, test=[])], cache)
    assert index.problems == []
    assert stock.stock_task("named_by_what_it_includes").config["dataset_path"] == "someone/plain"
    base = load_task_yaml((index.root / "mine" / "_base_yaml").read_text())
    assert base["include"] == str(lmms_eval_folder / "plain" / "plain.yaml")
    # What lmms-eval itself makes of the two files, functions of ours aside: its own chain of includes and imports.
    found = utils.load_yaml_config(str(index.root / "mine" / "_base_yaml"), mode="full")
    assert found["dataset_path"] == "someone/plain" and found["generation_kwargs"] == {"max_new_tokens": 7}
    assert found["task_alias"] is None
    metrics = {metric["metric"]: metric for metric in found["metric_list"]}
    assert len(metrics) == len(found["metric_list"])
    assert metrics["exact"]["aggregation"]([1, 2]) == 3
    assert metrics["accuracy"]["aggregation"].__module__ == "bitquake.tasks.aggregate"  # one name, one value
    assert found["metadata"]["version"] == 1 and found["metadata"]["bitquake"]["extends"]["task"] == "plain_vqa"
    config = load_task_yaml(index.tasks["mine_fog_3"].read_text())
    assert config["tag"] == ["mine_noise", "mine_noise_3", "mine_all"] and config["test_split"] == "val"
    ours = {"process_docs", "doc_to_visual", "doc_to_text", "doc_to_messages", "process_results"}
    assert {key for key, value in config.items() if str(value).startswith("glue.")} == ours
    noise = {"name": "fog", "severity": 3, "seed": 0, "version": image_noises()["fog"].version, "mode": "native"}
    assert config["lmms_eval_specific_kwargs"] == {
        "default": {"pre_prompt": "", "post_prompt": "Answer.", "noise": noise},
        "qwen_vl": {"pre_prompt": "", "post_prompt": " Answer:", "noise": noise},
    }


def test_a_stock_task_with_the_older_key_group(make_family, cache: Path, lmms_eval_folder: Path) -> None:  # type: ignore[no-untyped-def]
    del_tag = (lmms_eval_folder / "plain" / "plain.yaml").read_text().replace("tag: [theirs]\n", "")
    (lmms_eval_folder / "plain" / "plain.yaml").write_text(del_tag)
    index = builtin_index([make_family("mine", EXTENDS.replace("plain_vqa", "older_vqa"), test=[])], cache)
    config = load_task_yaml(index.tasks["mine_clean"].read_text())
    assert config["group"] == ["mine_all"] and "tag" not in config


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("plain_vqaa", "no task 'plain_vqaa'; did you mean 'plain_vqa'"),
        ("many", "'many' is a group of lmms-eval .*all.yaml.*; name one of its tasks"),
        ("theirs", "'theirs' is a tag of lmms-eval"),
        ("choose", "output_type 'multiple_choice' .*only generate_until"),
        ("python_task", "is a task written in Python"),
        ("blind", "no function for doc_to_visual"),
        ("cut", "cuts answers before it scores them \\(filter_list"),
        ("mine_clean", "'mine_clean' is this family's own task"),
        ("mine_fog_3", "'mine_fog_3' is this family's own task"),
    ],
)
def test_what_cannot_be_extended(  # type: ignore[no-untyped-def]
    task: str, message: str, make_family, cache: Path, lmms_eval_folder: Path
) -> None:
    folder = make_family("mine", EXTENDS.replace("plain_vqa", task), test=[])
    index = builtin_index([folder], cache)
    assert not index.family_tasks("mine") and "block_vqav2_clean" in index.tasks
    [problem] = index.problems
    assert problem.startswith(f"{folder / 'family.yaml'}:3: extends.task: ")
    with pytest.raises(FamilyError, match=message):
        raise FamilyError(problem)


def test_a_score_that_the_stock_task_does_not_have(make_family, cache: Path, lmms_eval_folder: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make_family("mine", EXTENDS.replace("score: exact", "score: exacct"), test=[])
    [problem] = builtin_index([folder], cache).problems
    assert "extends.score: plain_vqa has no metric 'exacct'; it has exact, accuracy" in problem


def test_without_lmms_eval_families_that_extend_are_left_out(  # type: ignore[no-untyped-def]
    make_family, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "tasks_folder", lambda: None)
    index = builtin_index([make_family("mine", EXTENDS, test=[])], cache)
    assert "block_vqav2_clean" in index.tasks and not index.family_tasks("mine")
    assert all("which is not installed here: pip install lmms-eval" in problem for problem in index.problems)
    assert any("mine/family.yaml:3" in problem for problem in index.problems)


def test_names_that_are_taken_leave_a_family_out_and_no_other(  # type: ignore[no-untyped-def]
    make_family, cache: Path, lmms_eval_folder: Path
) -> None:
    folder = lmms_eval_folder / "plain"
    (folder / "clash.yaml").write_text("include: plain.yaml\ntask: first_clean\n")
    (folder / "group.yaml").write_text("group: second_noise\ntask:\n  - plain_vqa\n")
    shift = SHIFTED.replace("others:", "b_clean:")
    folders = [
        make_family("first"),
        make_family("second"),
        make_family("third"),
        make_family("a", shift),
        make_family("a_b", SHIFTED),
        make_family("study", SHIFTED.replace("a_study", "third_noise")),
        make_family("own", SHIFTED.replace("a_study", "own_clean")),
    ]
    index = builtin_index(folders, cache)
    assert set(index.families) == {"block_vqav2", "block_scienceqa", "vqav2", "third", "a"}
    said = {
        name: [one for one in index.problems if f"/{name}/family.yaml:" in one.split(" ")[0]]
        for name in ("first", "second", "third", "a", "a_b", "study", "own")
    }
    assert not said["third"] and not said["a"]
    assert "'first_clean' would be the name of lmms-eval's task" in said["first"][0]
    assert "'second_noise' would be the name of lmms-eval's group" in said["second"][0]
    assert "'a_b_clean' would be the name of a task of the family 'a'" in said["a_b"][0]
    assert "tags: 'third_noise' would be the name of a tag of the family 'third'" in said["study"][0]
    assert "tags: 'own_clean' is the name of a task" in said["own"][0]
    for name in ("first", "second", "a_b", "study", "own"):
        assert len(said[name]) == 1 and not index.family_tasks(name)


def test_the_newest_cache_folders_are_kept_and_those_used_today(tmp_path: Path) -> None:
    now = time.time()
    ages = {"a": 0, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, ".building-x": 9, ".building-y": 0}
    for name, days in ages.items():
        (tmp_path / name).mkdir()
        if not name.startswith("."):
            (tmp_path / name / "index.json").write_text("{}")
        os.utime(tmp_path / name, (now - days * 86_400,) * 2)
    expand.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "d", ".building-y"}
    for path in tmp_path.iterdir():
        os.utime(path)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "index.json").write_text("{}")
    expand.prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "d", "g", ".building-y"}
    expand.prune(tmp_path / "none")


def test_a_variant_differs_from_the_clean_task_in_its_noise_and_its_names_only(cache: Path) -> None:
    index = builtin_index(cache=cache)
    clean = load_task_yaml(index.tasks["block_vqav2_clean"].read_text())
    foggy = load_task_yaml(index.tasks["block_vqav2_fog_3"].read_text())
    assert clean["lmms_eval_specific_kwargs"]["default"].pop("noise") is None
    noise = foggy["lmms_eval_specific_kwargs"]["default"].pop("noise")
    version = image_noises()["fog"].version
    assert noise == {"name": "fog", "severity": 3, "seed": 0, "version": version, "mode": "scaled"}
    for config in (clean, foggy):
        config.pop("tag")
        task = config.pop("task")
        for key, value in config.items():
            if isinstance(value, str):
                config[key] = value.replace(task, "TASK")
    assert foggy == clean


def test_threshold_runs_clean_on_its_own_split(cache: Path) -> None:
    index = builtin_index(cache=cache)
    config = load_task_yaml(index.tasks["block_vqav2_threshold"].read_text())
    assert config["test_split"] == "threshold"
    assert list(config["dataset_kwargs"]["data_files"]) == ["threshold"]
    assert config["lmms_eval_specific_kwargs"]["default"]["noise"] is None


def test_functions_come_from_bitquake_only(cache: Path, all_families: None) -> None:
    root = builtin_index(cache=cache).root
    functions = set()
    for file in [*root.glob("*/*.yaml"), *root.glob("*/_base_yaml")]:
        functions |= {line.split("!function ")[1].strip("'\n") for line in file.open() if "!function" in line}
    assert functions
    folder = stock.tasks_folder()  # what a stock task sums up its own metrics with
    allowed = ("glue.", "bitquake.tasks.aggregate.", *([f"{folder}/"] if folder else []))
    assert all(name.startswith(allowed) for name in functions)


def test_what_depends_on_the_model_stands_in_the_metadata(cache: Path) -> None:
    root = builtin_index(cache=cache).root
    base = load_task_yaml((root / "block_scienceqa" / "_base_yaml").read_text())
    contract = TaskContract.model_validate(base["metadata"]["bitquake"])
    assert contract.envelope is True
    assert contract.protocol == "choice"
    assert contract.letters == ["A", "B", "C", "D", "E"]
    assert contract.options_field == "choices"
    assert set(base["generation_kwargs"]) == {"max_new_tokens", "do_sample", "temperature"}
    base = load_task_yaml((root / "vqav2" / "_base_yaml").read_text())
    assert base["dataset_path"] == "lmms-lab-encoder/VQAv2"
    assert TaskContract.model_validate(base["metadata"]["bitquake"]).default_prompt.post_prompt.startswith("\nAnswer")


def test_the_wrapper_reads_the_metadata(cache: Path, all_families: None) -> None:
    contract_of = pytest.importorskip("bitquake.model_wrappers.task_contract").TaskContract.of

    class Config:
        metadata: dict[str, object]

    class Holder:
        config = Config()

        def doc_to_messages(self) -> None: ...

    for file in builtin_index(cache=cache).root.glob("*/_base_yaml"):
        Holder.config.metadata = load_task_yaml(file.read_text())["metadata"]
        read = contract_of(Holder().doc_to_messages, file.parent.name)
        assert read.envelope is True


def test_the_folder_is_named_by_its_content_and_read_again(cache: Path, make_family, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    first = builtin_index(cache=cache)
    stamp = (first.root / "index.json").stat().st_mtime_ns
    assert builtin_index(cache=cache) == first == read_index(first.root)
    assert (first.root / "index.json").stat().st_mtime_ns == stamp
    folder = make_family()
    other = builtin_index([folder], cache)
    assert other.root != first.root
    variants = ["clean", "threshold", "gaussian_noise_1", "gaussian_noise_5", "fog_1", "fog_5"]
    assert set(other.tasks) - set(first.tasks) == {f"tiny_{variant}" for variant in variants}
    text = (folder / "family.yaml").read_text()
    (folder / "family.yaml").write_text(text.replace("[1, 5]", "[1]"))
    assert builtin_index([folder], cache).root not in (first.root, other.root)
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))  # where prepared datasets are, which task files name
    assert builtin_index(cache=cache).root != first.root


def _expand(cache: Path) -> str:
    return str(builtin_index(cache=cache).root)


def test_processes_that_expand_at_once_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        roots = pool.map(_expand, [tmp_path] * 4)
    assert len(set(roots)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [Path(roots[0]).name]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FamilyError, match="XDG_CACHE_HOME"):
        builtin_index(cache=tmp_path / "file")


def test_export_is_a_copy_that_can_be_repeated(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitquake.tasks.expand.cache_root", lambda: cache)
    out = tmp_path / "exported"
    count = catalog.export(out)
    root = Path(catalog.tasks_path())
    assert count == len(list(out.glob("*/*.yaml"))) == len(builtin_index(cache=cache).tasks)
    name = "block_vqav2/block_vqav2_fog_3.yaml"
    assert (out / name).read_bytes() == (root / name).read_bytes()
    (out / "block_vqav2" / "stale.yaml").write_text("")
    assert catalog.export(out) == count
    assert not (out / "block_vqav2" / "stale.yaml").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(FamilyError, match="no earlier export"):
        catalog.export(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_catalog_lists_families_and_tasks(make_family) -> None:  # type: ignore[no-untyped-def]
    folder = make_family()
    row = next(row for row in catalog.list_rows([folder]) if row["family"] == "tiny")
    assert row["tasks"] == "6"
    assert {"task": "tiny_fog_5", "tags": "tiny_noise, tiny_noise_5, tiny_all"} in catalog.task_rows([folder])
    assert catalog.problems([folder]) == []


def test_validate_names_every_problem(make_family, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make_family()
    assert catalog.validate(folder) == catalog.validate(folder / "family.yaml") == []
    (folder / "threshold.parquet").unlink()
    (folder / "test.parquet").write_bytes(b"PAR1 no parquet")
    found = catalog.validate(folder)
    assert len(found) == 2
    assert "not readable parquet" in found[0]
    assert "there is no" in found[1]
    other = make_family("other")
    text = (other / "family.yaml").read_text()
    (other / "family.yaml").write_text(
        text.replace("answers: answers", "answers: replies").replace("other", "block_vqav2")
    )
    found = catalog.validate(other)
    assert any("name of a built-in family" in problem for problem in found)
    assert any("no column 'replies'; it has answers" in problem for problem in found)
    (other / "family.yaml").write_text("family: [")
    assert "not plain YAML" in catalog.validate(other)[0]
    assert "cannot be read" in catalog.validate(tmp_path / "nowhere.yaml")[0]


def test_a_cache_cleaned_by_halves_is_made_again(tmp_path: Path) -> None:
    first = builtin_index(cache=tmp_path)
    assert json.loads((first.root / "index.json").read_text())["problems"] == first.problems
    (first.root / "index.json").unlink()
    again = builtin_index(cache=tmp_path)
    assert again.tasks.keys() == first.tasks.keys() and all(file.is_file() for file in again.tasks.values())
    assert again.root.stat().st_mode & 0o055 == 0o055
