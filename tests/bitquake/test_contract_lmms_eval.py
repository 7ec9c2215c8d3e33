"""What Bitquake relies on in lmms-eval, one behaviour a test: an upgrade that changes one fails here, by its name.

Each test says which symbol it is about. The registered way (entry point) and ``--include_path`` are both covered.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lmms_eval")

import datasets
import numpy as np
from lmms_eval import utils
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.evaluator_utils import TaskOutput
from lmms_eval.tasks import TaskManager

from bitquake.tasks import catalog, expand, families
from bitquake.tasks.expand import builtin_index


@pytest.fixture(scope="module", autouse=True)
def three_families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Three of the built-in families, one of them on top of a stock task: lmms-eval takes half a minute to walk all."""
    folder = tmp_path_factory.mktemp("built_in")
    for name in ("block_vqav2", "vqav2", "pope"):
        (folder / name).mkdir()
        (folder / name / "family.yaml").write_text((families.BUILT_IN / name / "family.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "BUILT_IN", folder)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, three_families: None) -> Path:
    return builtin_index(cache=tmp_path_factory.mktemp("contract")).root


@pytest.fixture(scope="module")
def stock_index() -> dict[str, Any]:
    """lmms-eval's own index, without our wrapper."""
    original = inspect.unwrap(TaskManager.initialize_tasks)
    manager = TaskManager.__new__(TaskManager)
    manager.logger = utils.eval_logger
    return dict(original(manager))


def bare_manager(root: Path, monkeypatch: pytest.MonkeyPatch, model_name: str | None = None) -> TaskManager:
    """A TaskManager that knows nothing of our plugin, given our folder by ``--include_path``."""
    monkeypatch.setattr(TaskManager, "initialize_tasks", inspect.unwrap(TaskManager.initialize_tasks))
    return TaskManager(include_path=str(root), include_defaults=False, model_name=model_name)


# lmms_eval.tasks.TaskManager


def test_initialize_tasks_returns_a_mapping_of_type_and_yaml_path(stock_index: dict[str, Any]) -> None:
    message = (
        "TaskManager.initialize_tasks: entries are no longer {type, yaml_path[, task]}; see bitquake.plugin.add_tasks"
    )
    assert set(inspect.signature(TaskManager.initialize_tasks).parameters) == {
        "self",
        "include_path",
        "include_defaults",
    }
    assert len(stock_index) > 500, message
    kinds = {entry["type"] for entry in stock_index.values()}
    assert kinds <= {"task", "group", "tag", "python_task"}, message
    for entry in stock_index.values():
        assert "yaml_path" in entry, message
        if entry["type"] == "tag":
            assert isinstance(entry["task"], list) and entry["yaml_path"] == -1, message


def test_no_name_of_ours_is_a_stock_name(
    stock_index: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "BUILT_IN", families.PACKAGE / "families")
    index = builtin_index(cache=tmp_path)
    assert index.problems == []
    taken = (set(index.tasks) | set(index.tags)) & set(stock_index)
    assert not taken, f"lmms-eval has taken names of ours: {taken}; rename our families"


def test_bare_manager_finds_our_tasks_by_include_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = bare_manager(root, monkeypatch)
    index = expand.read_index(root)
    assert set(manager.all_subtasks) == set(index.tasks), "--include_path: tasks differ from our index"
    assert set(manager.all_tags) == set(index.tags), "--include_path: tags differ from our index"
    assert not manager.all_groups
    for tag, names in index.tags.items():
        assert sorted(manager.task_index[tag]["task"]) == sorted(names)


def test_plugin_and_include_path_together_are_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitquake.plugin import wrap

    monkeypatch.setattr(expand, "cache_root", lambda: root.parent)
    monkeypatch.setattr(TaskManager, "initialize_tasks", inspect.unwrap(TaskManager.initialize_tasks))
    wrap(sys.modules["lmms_eval.tasks"])
    alone = TaskManager(include_defaults=False)
    both = TaskManager(include_path=catalog.tasks_path(), include_defaults=False)
    assert alone.all_tasks == both.all_tasks
    for name in alone.all_subtasks:
        assert alone.task_index[name]["yaml_path"] == both.task_index[name]["yaml_path"]


def test_the_listing_reads_our_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = bare_manager(root / "block_vqav2", monkeypatch).list_all_tasks()
    assert "block_vqav2_fog_3" in listing, (
        "TaskManager.list_all_tasks no longer lists a task that only includes its base"
    )
    assert "block_vqav2_noise" in listing


# lmms_eval.utils.load_yaml_config


def test_full_mode_imports_from_glue_beside_the_file_and_from_modules(root: Path) -> None:
    config = utils.load_yaml_config(str(root / "block_vqav2" / "block_vqav2_fog_3.yaml"), mode="full")
    message = "utils.import_function: `!function glue.x` (file beside the YAML) or `!function package.module.x` changed"
    assert callable(config["process_results"]) and config["process_results"].__name__ == "process_results", message
    aggregations = {metric["metric"]: metric["aggregation"] for metric in config["metric_list"]}
    assert aggregations["ece_15_ci"].__module__ == "bitquake.tasks.aggregate", message
    assert config["task"] == "block_vqav2_fog_3", (
        "utils.load_yaml_config: a file's own keys no longer win over included ones"
    )
    assert config["dataset_path"] == "parquet"
    assert "include" not in config


def test_simple_mode_imports_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("utils.load_yaml_config(mode='simple') imports functions")

    monkeypatch.setattr("bitquake.tasks.glue.functions_of", fail)
    config = utils.load_yaml_config(str(root / "block_vqav2" / "block_vqav2_fog_3.yaml"), mode="simple")
    assert config["tag"] == ["block_vqav2_noise", "block_vqav2_noise_3", "block_vqav2_all"]
    # Leave lmms-eval's process-wide YAML loader as its next full load expects it.
    yaml.add_constructor("!function", utils.import_function)


def test_absolute_data_files_are_left_as_they_are(root: Path) -> None:
    config = utils.load_yaml_config(str(root / "block_vqav2" / "block_vqav2_threshold.yaml"), mode="simple")
    [file] = config["dataset_kwargs"]["data_files"].values()
    assert Path(file).is_absolute() and file.endswith("world/data/block_vqav2/threshold.parquet")


# lmms_eval.api.task


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigurableMessagesTask:
    """A chat task of our kind on two rows, one of them with a damaged image, loaded by a bare TaskManager."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "family.yaml").write_text(
        "family: tiny\nworld: block\ndataset: {files: {test: t.parquet, threshold: t.parquet}}\n"
        "splits: {test: test, threshold: threshold}\ncolumns: {answers: answers, sample_id: id}\nprotocol: vqa\n"
        "variants: {noise: {names: [fog], severities: [5]}}\n"
    )
    import io

    from PIL import Image

    good = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(good, "PNG")
    rows = [
        {"id": i, "question": "q?", "answers": ["yes"] * 10, "image": {"bytes": data, "path": None}}
        for i, data in enumerate([good.getvalue(), b"broken"])
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(str(folder / "t.parquet"))
    index = builtin_index([folder], tmp_path / "cache")
    manager = bare_manager(index.root / "tiny", monkeypatch, model_name="bitquake_hf")
    return manager.load_task_or_group(["tiny_fog_5"], "chat")["tiny_fog_5"]


def test_documents_come_prepared_and_undecoded(task: ConfigurableMessagesTask) -> None:
    message = "ConfigurableTask.download: process_docs no longer runs before rows are read, or images are decoded again"
    docs = task.test_docs()
    assert docs[1]["image"] == b"broken", message
    assert docs[0]["bitquake"]["sample_id"] == "0", message
    assert "image" not in task.test_docs_no_media().features, "ConfigurableTask: image columns are no longer dropped"


def test_default_kwargs_reach_our_functions(task: ConfigurableMessagesTask) -> None:
    message = (
        "ConfigurableTask: lmms_eval_specific_kwargs.default is no longer merged into what doc_to_visual/_text get"
    )
    assert task.lmms_eval_specific_kwargs["noise"]["severity"] == 5, message
    [picture] = task.doc_to_visual(task.test_docs()[0])
    assert (np.asarray(picture) != 99).any(), "ConfigurableTask.doc_to_visual: the noise did not reach the picture"


def test_a_model_named_key_replaces_default(task: ConfigurableMessagesTask) -> None:
    """The trap that ``Task.check`` is for; if this ever fails, the trap is gone."""
    config = task.config
    config.lmms_eval_specific_kwargs = {"default": {"noise": 1}, "bitquake_hf": {"pre_prompt": ""}}
    task._prepare_model_specific_config()
    assert "noise" not in task.lmms_eval_specific_kwargs


def test_messages_are_an_image_and_a_text_and_lead_back_to_the_config(task: ConfigurableMessagesTask) -> None:
    [instance] = [
        task.construct_requests(0, "q?", metadata={"split": "test", "task": "tiny_fog_5", "doc_id": 0, "repeats": 1})
    ]
    _, doc_to_messages, generation_kwargs, doc_id, name, split = instance.args
    assert (doc_id, name, split) == (0, "tiny_fog_5", "test")
    assert generation_kwargs["max_new_tokens"] == 16 and generation_kwargs["do_sample"] is False
    [message] = doc_to_messages(task.test_docs()[0])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    ours = doc_to_messages.__self__.config.metadata["bitquake"]
    assert ours["envelope"] is True, (
        "doc_to_messages.__self__.config.metadata: the wrapper's way to our metadata is gone"
    )


def test_a_copied_task_shows_the_pictures_of_its_own_config(task: ConfigurableMessagesTask) -> None:
    """What the noise cache relies on (``bitquake.model_wrappers.samples.from_noise_cache``)."""
    import copy

    copied, config, doc = copy.copy(task), copy.copy(task.config), task.test_docs()[0]
    config.doc_to_visual = lambda doc, lmms_eval_specific_kwargs: ["another picture"]
    copied._config = config
    [message] = copied.doc_to_messages(doc)
    assert message["content"][0]["url"] == "another picture", "ConfigurableTask.config: no longer what _config holds"
    [message] = task.doc_to_messages(doc)
    assert message["content"][0]["url"] != "another picture"


def test_results_are_stripped_texts_and_every_metric_is_aggregated(task: ConfigurableMessagesTask) -> None:
    from bitquake.envelope import Envelope

    response = Envelope(text="yes", confidence={"joint": 0.5}).encode()
    values = task.process_results(task.test_docs_no_media()[0], [f" {response}\n"])
    assert values["bitquake"]["confidence"] == {"joint": 0.5}, "Task.process_results: an envelope no longer survives"
    missing = set(values) - set(task.aggregation())
    assert not missing, f"metrics without an aggregation: {missing}"
    output = TaskOutput.from_taskdict("tiny_fog_5", task)
    for key, value in values.items():
        output.sample_metrics[key, "none"] = [value, value, value]
    output.calculate_aggregate_metric(bootstrap_iters=100_000)
    output.calculate_clt_aggregate_metric()
    assert output.agg_metrics["accuracy,none"] == 1.0
    assert output.agg_metrics["bitquake,none"] == 3
    assert output.agg_metrics["accuracy_stderr_clt,none"] == 0.0, "TaskOutput: score_key no longer finds our accuracy"
    assert output.agg_metrics["ece_15_stderr_clt,none"] == "N/A", "TaskOutput: makes errors of lists now"


def test_clustered_error_reads_score_key_and_cluster_key(task: ConfigurableMessagesTask) -> None:
    output = TaskOutput.from_taskdict("tiny_fog_5", task)
    output.sample_metrics["accuracy", "none"] = [
        {"accuracy": score, "score": score, "image_id": image}
        for score, image in [(1.0, "a"), (1.0, "a"), (0.0, "b"), (0.0, "b"), (1.0, "c"), (0.0, "d")]
    ]
    output.calculate_clt_aggregate_metric()
    # Miller 2024, arXiv 2411.00640, equation 4, by hand: variance 0.3 over n = 6, cross terms 0.5 + 0.5 over n squared.
    assert output.agg_metrics["accuracy_stderr_clustered,none"] == pytest.approx(np.sqrt(0.3 / 6 + 1 / 36))


def test_the_results_table_prints_texts() -> None:
    table = utils.make_table(
        {
            "results": {"t": {"ece_15,none": 0.25, "ece_15_ci,none": "[0.1000, 0.3000]", "x,none": "N/A"}},
            "n-shot": {"t": 0},
            "higher_is_better": {"t": {"ece_15": False}},
        }
    )
    assert "[0.1000, 0.3000]" in table and "0.25" in table, "utils.make_table no longer prints a text as it is"


def test_config_dumps_name_functions_not_objects(task: ConfigurableMessagesTask) -> None:
    dumped = task.dump_config()
    assert "process_results" in dumped["process_results"]
    assert dumped["lmms_eval_specific_kwargs"]["noise"]["version"] >= 1
    assert isinstance(dumped["metadata"]["bitquake"], dict)
    assert task.VERSION == 1, "ConfigurableTask: metadata.version is no longer the task's version"


def test_signature_based_calls_of_our_functions() -> None:
    source = inspect.getsource(ConfigurableTask.doc_to_visual)
    assert "parameters) == 2" in source, (
        "ConfigurableTask.doc_to_visual: two-parameter functions get no kwargs any more"
    )


# lmms_eval.models


def test_the_registry_takes_a_manifest_from_a_callable_entry_point() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    resolved = registry.resolve("bitquake_hf")
    assert (resolved.model_type, resolved.class_path) == ("chat", "bitquake.model_wrappers.bitquake_hf.BitquakeHF")


# the command line


def run_cli(arguments: list[str], tmp_path: Path) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "lmms_eval", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_tasks_list_shows_ours_with_no_flag(tmp_path: Path) -> None:
    listing = run_cli(["--tasks", "list"], tmp_path)
    assert "block_vqav2_gaussian_noise_3" in listing
    assert "vqav2_clean" in listing and "mmbench_en_dev" in listing


def test_the_tasks_command_sees_ours_by_include_path(root: Path, tmp_path: Path) -> None:
    """This subcommand writes the option with a hyphen, and does not load model plugins."""
    assert "block_vqav2_gaussian_noise_3" not in run_cli(["tasks", "list"], tmp_path)
    assert "block_vqav2_gaussian_noise_3" in run_cli(["tasks", "list", "--include-path", str(root)], tmp_path)
