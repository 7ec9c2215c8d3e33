"""Registration in lmms-eval: the models by its entry-point group, the tasks by a wrapper around its task index.

lmms-eval calls ``register`` while it imports ``lmms_eval.models``. It has no entry point for tasks (and its
``LMMS_EVAL_PLUGINS`` hook runs after the index was built), so ``TaskManager.initialize_tasks`` is wrapped: the wrapper
calls the original and adds our tasks and tags from the index of ``bitquake.tasks.expand``, without a walk of folders.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_TASKS_MODULE = "lmms_eval.tasks"
_MARK = "_bitquake_tasks"


class TaskNameClash(ValueError):
    """One of our task or tag names is taken by another file: lmms-eval would silently run whichever path came first."""


def register() -> Any:
    """The payload of our entry point in ``lmms_eval.models``: a ``ModelManifest``. Also sees to the tasks.

    Imports nothing heavy: an error here would make lmms-eval skip every plugin that comes later.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    if _TASKS_MODULE in sys.modules:
        wrap(sys.modules[_TASKS_MODULE])
    elif not any(isinstance(finder, _WrapOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WrapOnImport())
    return ModelManifest(model_id="bitquake_hf", chat_class_path="bitquake.model_wrappers.bitquake_hf.BitquakeHF")


def wrap(tasks_module: ModuleType) -> None:
    """Make every ``TaskManager`` of the module know our tasks; a second call changes nothing."""
    manager = tasks_module.TaskManager
    original: Callable[..., dict[str, Any]] = manager.initialize_tasks
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize_tasks(self: Any, include_path: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        families: list[Path] = []
        if include_path is not None:
            given = [include_path] if isinstance(include_path, str) else list(include_path)
            families = family_folders(given)
            # lmms-eval reads every YAML file, and ends at the first that is broken: families are ours to read.
            args = ([folder for folder in given if Path(folder) not in families or _holds_tasks(folder)], *args)
        return add_tasks(original(self, *args, **kwargs), families)

    setattr(initialize_tasks, _MARK, True)
    manager.initialize_tasks = initialize_tasks


def family_folders(include_path: Sequence[str]) -> list[Path]:
    """Those folders of lmms-eval's ``--include_path`` that hold family files, whose tasks are then known too."""
    from bitquake.tasks.families import FamilyError, family_files

    found = []
    for folder in map(Path, include_path):
        with contextlib.suppress(FamilyError):  # it holds none: task files of lmms-eval's own form, then
            family_files([folder], built_in=False)
            found.append(folder)
    return found


def add_tasks(index: dict[str, Any], folders: Sequence[Path] = ()) -> dict[str, Any]:
    """lmms-eval's task index with our tasks and tags in it.

    Args:
        folders: more folders with family files.

    Raises:
        TaskNameClash: a name of ours is in it already, and not for the very same task.
    """
    from bitquake.tasks.expand import builtin_index

    ours = builtin_index(folders)
    for problem in ours.problems:
        warnings.warn(f"bitquake: a task family is left out: {problem}", stacklevel=2)
    shared: dict[tuple[Path, Path], bool] = {}
    for name, file in ours.tasks.items():
        present = index.get(name)
        if present is not None and not _same_task(present, file, shared):
            raise TaskNameClash(
                f"task {name!r} of bitquake ({file}) has the name of a {present['type']} that is already known "
                f"({present['yaml_path']}), which is another one, an edited copy perhaps. Rename that one, or remove "
                "its folder from --include_path."
            )
        index[name] = {"type": "task", "yaml_path": str(file)}
    for tag, names in ours.tags.items():
        present = index.get(tag)
        if present is not None and present["type"] != "tag":
            raise TaskNameClash(
                f"tag {tag!r} of bitquake ({ours.root}) has the name of a {present['type']} that is already known "
                f"({present['yaml_path']}). Rename that one, or remove its folder from --include_path."
            )
        known = list(present["task"]) if present is not None else []
        merged = known + [name for name in names if name not in known]
        index[tag] = {"type": "tag", "task": merged, "yaml_path": -1}
    return index


def _holds_tasks(folder: str) -> bool:
    """Whether a folder of families has other YAML files too."""
    from bitquake.tasks.families import FAMILY_FILE

    return any(file.name != FAMILY_FILE for file in Path(folder).rglob("*.yaml"))


def _same_task(present: dict[str, Any], file: Path, shared: dict[tuple[Path, Path], bool]) -> bool:
    """Whether an entry is our own file, found by --include_path too, there or in an exported copy.

    A task is its file and what all tasks of its folder share (``_base_yaml``, ``glue.py``, lists of sample ids).
    shared: pair of folders -> whether they share the same; filled here.
    """
    path = present["yaml_path"]
    if present["type"] != "task" or not isinstance(path, str):
        return False
    other = Path(path)
    if other == file:
        return True
    if not other.is_file() or other.read_bytes() != file.read_bytes():
        return False
    folders = (other.parent, file.parent)
    if folders not in shared:
        shared[folders] = all(
            (there := other.parent / one.name).is_file() and there.read_bytes() == one.read_bytes()
            for one in file.parent.iterdir()
            if one.is_file() and one.suffix != ".yaml"
        )
    return shared[folders]


class _WrapOnImport(importlib.abc.MetaPathFinder):
    """Wraps ``lmms_eval.tasks`` when it is imported: importing it here would load torch for ``lmms-eval models``."""

    looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TASKS_MODULE or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            wrap(module)
            # Not before: whoever only asks for the spec must not use us up.
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
