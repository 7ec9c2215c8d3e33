"""Expansion: names, tags and content of the task files, their cache folder, and export."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from bitquake.noise import image_noises
from bitquake.tasks import catalog
from bitquake.tasks.contract import TaskContract
from bitquake.tasks.expand import builtin_index, read_index
from bitquake.tasks.families import FamilyError
from bitquake.tasks.strict_yaml import load_task_yaml


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expanded")


def test_every_family_has_clean_threshold_and_each_noise_at_each_severity(cache: Path) -> None:
    index = builtin_index(cache=cache)
    expected = {"block_vqav2_clean", "block_vqav2_threshold"}
    expected |= {f"block_vqav2_{name}_{severity}" for name in image_noises() for severity in range(1, 6)}
    assert {name for name in index.tasks if name.startswith("block_vqav2_")} == expected
    assert index.problems == []


def test_tags(cache: Path) -> None:
    tags = builtin_index(cache=cache).tags
    noisy = {f"block_vqav2_{name}_{severity}" for name in image_noises() for severity in range(1, 6)}
    assert set(tags["block_vqav2_noise"]) == noisy
    assert set(tags["block_vqav2_noise_3"]) == {name for name in noisy if name.endswith("_3")}
    assert set(tags["block_vqav2_all"]) == noisy | {"block_vqav2_clean", "block_vqav2_threshold"}
    assert not set(tags) & set(builtin_index(cache=cache).tasks)


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


def test_functions_come_from_bitquake_only(cache: Path) -> None:
    root = builtin_index(cache=cache).root
    functions = set()
    for file in [*root.glob("*/*.yaml"), *root.glob("*/_base_yaml")]:
        functions |= {line.split("!function ")[1].strip("'\n") for line in file.open() if "!function" in line}
    assert functions
    assert all(name.startswith(("glue.", "bitquake.tasks.aggregate.")) for name in functions)


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


def test_the_wrapper_reads_the_metadata(cache: Path) -> None:
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
    (first.root / "index.json").unlink()
    again = builtin_index(cache=tmp_path)
    assert again.tasks.keys() == first.tasks.keys() and all(file.is_file() for file in again.tasks.values())
    assert again.root.stat().st_mode & 0o055 == 0o055
