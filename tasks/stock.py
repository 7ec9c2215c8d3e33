"""The tasks of the installed lmms-eval, read from its files without importing it, for families that extend one.

``bitquake.tasks.expand`` includes the file of the extended task, so that its dataset, prompt and scorer stay what they
are; what a family changes is written over it.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .schema import FamilyError

_DEFINES = re.compile(r"^[\"']?(task|group|tag)[\"']?[ \t]*:[ \t]*(.*?)[ \t]*(?:#.*)?$", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*-[ \t]*(.*?)[ \t]*(?:#.*)?$")
FUNCTION = "!function "
_FUNCTIONS_NEEDED = ("doc_to_visual", "doc_to_text", "process_results")
_SKIPPED = ("__pycache__", ".ipynb_checkpoints")


class Names(NamedTuple):
    """What lmms-eval's own files define: task -> file, group -> file, and the tags."""

    tasks: Mapping[str, Path]
    groups: Mapping[str, Path]
    tags: frozenset[str]

    def taken(self) -> set[str]:
        """Names that a task or a tag of ours must not have: a tag may join a tag, nothing else."""
        return {*self.tasks, *self.groups}


class StockTask(NamedTuple):
    """One stock task: its file, and its config with every ``include`` followed.

    Functions are texts, ``!function FILE.name`` with the absolute path of the file that lmms-eval would import it from.
    """

    name: str
    file: Path
    config: dict[str, Any]


def tasks_folder() -> Path | None:
    """The folder with the task files of the installed lmms-eval, or None where it is not installed."""
    try:
        found = importlib.util.find_spec("lmms_eval")
    except (ImportError, ValueError):
        return None
    for place in (found.submodule_search_locations or []) if found is not None else []:
        if (folder := Path(place) / "tasks").is_dir():
            return folder
    return None


@functools.lru_cache(maxsize=4)
def names(folder: Path) -> Names:
    """Everything that the files of a folder define, found by their text: reading them as YAML takes seconds."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    tags: set[str] = set()
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for file in files:  # not sorted: where two files define a name, the last one in this order is lmms-eval's too
            if file.endswith(".yaml"):
                defined = _defined(Path(root, file))
                if defined.get("task"):
                    tasks.update(dict.fromkeys(defined["task"], Path(root, file)))
                    tags.update(defined.get("tag", []), defined.get("group", []))
                else:
                    groups.update(dict.fromkeys(defined.get("group", []), Path(root, file)))
    return Names(tasks, groups, frozenset(tags))


def stock_task(name: str) -> StockTask:
    """A stock task that a family can extend.

    Raises:
        FamilyError: lmms-eval is not installed, has no such task, or the task is of a kind that cannot be extended.
    """
    folder = tasks_folder()
    if folder is None:
        raise FamilyError(f"{name!r} is a task of lmms-eval, which is not installed here: pip install lmms-eval")
    known = names(folder)
    if name not in known.tasks:
        raise FamilyError(_missing(name, known))
    file = known.tasks[name]
    try:
        config = _load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FamilyError(f"{file}: cannot be read as a task of lmms-eval ({' '.join(str(error).split())})") from error
    _refuse_unfit(name, file, config)
    return StockTask(name, file, config)


def with_noise(kwargs: Any, noise: dict[str, Any] | None) -> dict[str, Any]:
    """A stock task's ``lmms_eval_specific_kwargs`` with the noise under every key that a model may be given.

    lmms-eval hands a model the mapping under its own name, else ``default``, else ``dataset``, else everything; the
    noise must be in whichever it is.
    """
    given = dict(kwargs) if isinstance(kwargs, Mapping) else {}
    default = given.get("default", given.get("dataset"))
    out = {key: dict(value) | {"noise": noise} if isinstance(value, Mapping) else value for key, value in given.items()}
    out["default"] = (dict(default) if isinstance(default, Mapping) else {}) | {"noise": noise}
    return out


def _defined(file: Path) -> dict[str, list[str]]:
    """``task``, ``group`` and ``tag`` of a task file: the names that stand behind the key, or in the list below it.

    A ``task`` that is a list makes the file a group's: its items are names of tasks that stand elsewhere.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for match in _DEFINES.finditer(text):
        key, value = match[1], match[2]
        if value:
            found[key] = [item.strip("\"' ") for item in value.strip("[]").split(",")]
        elif key != "task":
            items = (_ITEM.match(line) for line in text[match.end() :].lstrip("\n").splitlines())
            found[key] = [item[1].strip("\"'") for item in itertools.takewhile(bool, items) if item]
    if not found and "include" in text:  # the name comes from the included file
        try:
            name = _load(file).get("task")
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return {"task": [name]} if isinstance(name, str) else {}
    return found


def _missing(name: str, known: Names) -> str:
    import difflib

    if name in known.groups:
        return f"{name!r} is a group of lmms-eval ({known.groups[name]}); name one of its tasks"
    if name in known.tags:
        return f"{name!r} is a tag of lmms-eval; name one of the tasks that have it"
    close = difflib.get_close_matches(name, known.tasks, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `lmms-eval --tasks list` shows them"
    return f"lmms-eval has no task {name!r}{hint}"


def _refuse_unfit(name: str, file: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("output_type", "generate_until")
    if "class" in config:
        raise FamilyError(f"{name!r} is a task written in Python ({file}); only tasks that are YAML can be extended")
    if not isinstance(config.get("task"), str):
        raise FamilyError(f"{name!r} is a group of lmms-eval ({file}); name one of its tasks")
    if kind != "generate_until":
        raise FamilyError(f"{name!r} has output_type {kind!r} ({file}); only generate_until tasks can be extended")
    for key in _FUNCTIONS_NEEDED:
        if not str(config.get(key, "")).startswith(FUNCTION):
            raise FamilyError(f"{name!r} has no function for {key} ({file}); such a task cannot be extended")
    for key in ("filter_list", "reasoning_tags"):
        if config.get(key) not in (None, [], "none"):
            raise FamilyError(
                f"{name!r} cuts answers before it scores them ({key} in {file}), which would destroy the envelopes "
                "that hold confidences; such a task cannot be extended"
            )


class _StockLoader(yaml.SafeLoader):
    """Reads lmms-eval's task files; functions become texts, and none is imported."""

    folder = Path()


def _function(loader: _StockLoader, node: yaml.nodes.ScalarNode) -> str:
    # As lmms-eval finds it: a file beside the YAML, else a module.
    module, _, name = str(loader.construct_scalar(node)).rpartition(".")
    beside = (loader.folder / module).resolve()
    return f"{FUNCTION}{beside if beside.with_name(beside.name + '.py').is_file() else module}.{name}"


_StockLoader.add_constructor("!function", _function)


def _load(file: Path) -> dict[str, Any]:
    """A task file with its includes under it, as ``lmms_eval.utils.load_yaml_config`` puts them together."""
    with file.open(encoding="utf-8") as stream:
        loader = _StockLoader(stream)
        loader.folder = file.parent
        try:
            config = loader.get_single_data()
        finally:
            loader.dispose()
    if not isinstance(config, dict):
        raise ValueError("expected a mapping")
    includes = config.pop("include", [])
    under: dict[str, Any] = {}
    for name in reversed([includes] if isinstance(includes, str) else includes):
        under |= _load(file.parent / name)
    return under | config
