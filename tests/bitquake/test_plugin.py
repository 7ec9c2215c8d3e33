"""Registration: what the entry point gives, how tasks and tags join lmms-eval's index, and that nothing is shadowed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from bitquake import plugin
from bitquake.plugin import TaskNameClash, add_tasks, wrap
from bitquake.tasks import expand
from bitquake.tasks.expand import Index, builtin_index
from bitquake.tasks.scaffold import new_family


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "plugin-cache"
    monkeypatch.setattr(expand, "cache_root", lambda: folder)


def python(code: str, tmp_path: Path) -> str:
    """What a fresh interpreter prints."""
    import os

    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def manager_module(index: dict[str, Any]) -> types.ModuleType:
    """A module with a ``TaskManager`` like lmms-eval's."""

    class TaskManager:
        def initialize_tasks(self, include_path: Any = None, include_defaults: bool = True) -> dict[str, Any]:
            self.walked = include_path
            return dict(index)

    module = types.ModuleType("some_tasks")
    module.TaskManager = TaskManager  # type: ignore[attr-defined]
    return module


def test_the_entry_point_is_installed() -> None:
    [ours] = [point for point in entry_points(group="lmms_eval.models") if point.name == "bitquake"]
    assert ours.value == "bitquake.plugin:register"
    assert ours.load() is plugin.register


def test_registration_loads_neither_torch_nor_the_task_index(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    code = (
        "import sys, lmms_eval.models as m; "
        "print(m.get_model_manifest('bitquake_hf').chat_class_path, "
        "[n for n in ('torch', 'datasets', 'lmms_eval.tasks', 'bitquake.tasks', 'numpy') if n in sys.modules])"
    )
    assert python(code, tmp_path) == "bitquake.model_wrappers.bitquake_hf.BitquakeHF []"


def test_registration_after_the_tasks_were_imported_and_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order, models first, is that of every command line run: see test_contract_lmms_eval."""
    manager = pytest.importorskip("lmms_eval.tasks").TaskManager
    monkeypatch.setattr(manager, "initialize_tasks", inspect.unwrap(manager.initialize_tasks))
    plugin.register()
    plugin.register()
    assert not hasattr(manager.initialize_tasks.__wrapped__, "__wrapped__")
    known = manager(include_defaults=False)
    assert "block_vqav2_fog_3" in known.all_subtasks
    assert "block_vqav2_noise" in known.all_tags


def test_a_later_import_is_wrapped_even_when_somebody_asked_for_the_spec_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "later_tasks.py").write_text("class TaskManager:\n    def initialize_tasks(self):\n        return {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugin, "_TASKS_MODULE", "later_tasks")
    monkeypatch.setattr(sys, "meta_path", [plugin._WrapOnImport(), *sys.meta_path])
    assert importlib.util.find_spec("later_tasks") is not None
    assert importlib.util.find_spec("later_tasks") is not None
    module = importlib.import_module("later_tasks")
    assert "block_vqav2_clean" in module.TaskManager().initialize_tasks()
    assert not any(isinstance(finder, plugin._WrapOnImport) for finder in sys.meta_path)


def test_wrapping_keeps_the_original_and_happens_once() -> None:
    module = manager_module({"mine": {"type": "task", "yaml_path": "mine.yaml"}})
    wrap(module)
    once = module.TaskManager.initialize_tasks
    wrap(module)
    assert module.TaskManager.initialize_tasks is once
    index = module.TaskManager().initialize_tasks(include_path="x", include_defaults=False)
    assert index["mine"] == {"type": "task", "yaml_path": "mine.yaml"}
    entry = index["block_vqav2_clean"]
    assert entry["type"] == "task" and Path(entry["yaml_path"]).name == "block_vqav2_clean.yaml"
    assert index["block_vqav2_noise"]["type"] == "tag" and index["block_vqav2_noise"]["yaml_path"] == -1


def test_tags_are_merged_into_tags_that_exist() -> None:
    theirs = {"type": "tag", "task": ["another", "block_vqav2_fog_1"], "yaml_path": -1}
    index = add_tasks({"block_vqav2_noise": theirs})
    merged = index["block_vqav2_noise"]["task"]
    assert merged[:2] == ["another", "block_vqav2_fog_1"]
    assert len(merged) == len(set(merged)) == 1 + len(builtin_index().tags["block_vqav2_noise"])
    assert theirs["task"] == ["another", "block_vqav2_fog_1"]


@pytest.mark.parametrize("name", ["block_vqav2_clean", "block_vqav2_noise"])
@pytest.mark.parametrize("kind", ["task", "group", "python_task"])
def test_a_name_that_is_taken_is_refused_with_both_files(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(f"task: {name}\n")
    theirs = str(tmp_path / "theirs.yaml")
    with pytest.raises(TaskNameClash, match=name) as caught:
        add_tasks({name: {"type": kind, "yaml_path": theirs}})
    assert theirs in str(caught.value)
    assert str(builtin_index().root) in str(caught.value)


def test_a_tag_with_the_name_of_our_task_is_refused() -> None:
    with pytest.raises(TaskNameClash, match="name of a tag"):
        add_tasks({"block_vqav2_clean": {"type": "tag", "task": ["x"], "yaml_path": -1}})


def test_our_own_files_found_by_include_path_are_no_clash(tmp_path: Path) -> None:
    name, file = next(iter(builtin_index().tasks.items()))
    again = add_tasks({name: {"type": "task", "yaml_path": str(file)}})
    assert again[name]["yaml_path"] == str(file)
    copy = shutil.copytree(file.parent, tmp_path / "copy") / file.name
    assert add_tasks({name: {"type": "task", "yaml_path": str(copy)}})[name]["yaml_path"] == str(file)


@pytest.mark.parametrize("edited", ["the task's file", "_base_yaml", "glue.py"])
def test_an_edited_copy_of_ours_is_refused(edited: str, tmp_path: Path) -> None:
    """lmms-eval would run ours under the name of theirs, or the other way round."""
    name, file = next(iter(builtin_index().tasks.items()))
    copy = shutil.copytree(file.parent, tmp_path / "copy") / file.name
    changed = copy if edited == "the task's file" else copy.parent / edited
    changed.write_text(changed.read_text() + "# edited\n")
    with pytest.raises(TaskNameClash, match="edited copy"):
        add_tasks({name: {"type": "task", "yaml_path": str(copy)}})
    changed.unlink()
    with pytest.raises(TaskNameClash, match=name):
        add_tasks({name: {"type": "task", "yaml_path": str(copy)}})


@pytest.mark.filterwarnings("ignore:bitquake. a task family is left out")
def test_a_folder_of_families_works_as_include_path(tmp_path: Path) -> None:
    new_family("mine", "vqa", out=tmp_path / "families" / "mine")
    (tmp_path / "tasks").mkdir()
    module = manager_module({})
    wrap(module)
    manager = module.TaskManager()
    assert "mine_clean" not in manager.initialize_tasks()
    (tmp_path / "families" / "broken").mkdir()
    (tmp_path / "families" / "broken" / "family.yaml").write_text("family: [")
    for given in (str(tmp_path / "families"), [str(tmp_path / "tasks"), str(tmp_path / "families" / "mine")]):
        for index in (manager.initialize_tasks(given), manager.initialize_tasks(include_path=given)):
            assert {"mine_clean", "mine_noise_3", "block_vqav2_clean"} <= set(index)
            text = Path(index["mine_clean"]["yaml_path"]).read_text()
            assert "task: mine_clean" in text.splitlines()
    assert manager.walked == [str(tmp_path / "tasks")]  # lmms-eval would end at the broken file
    (tmp_path / "families" / "theirs.yaml").write_text("task: theirs")
    manager.initialize_tasks(given)
    assert manager.walked == given[:1]
    manager.initialize_tasks(str(tmp_path / "families"))
    assert manager.walked == [str(tmp_path / "families")]


def test_a_family_that_is_left_out_is_warned_about_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    good = builtin_index()
    broken: Callable[[Any], Index] = lambda _: good._replace(problems=["bad.yaml: family: no"])  # noqa: E731
    monkeypatch.setattr(expand, "builtin_index", broken)
    with pytest.warns(UserWarning, match="bad.yaml: family: no"):
        assert "block_vqav2_clean" in add_tasks({})
