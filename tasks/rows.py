"""A registered task with its rows, outside lmms-eval: the same dataset, split, order and ids as there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from .expand import builtin_index
from .families import FamilyError
from .glue import Task, read_task
from .stock import stock_task
from .strict_yaml import load_task_yaml


def find_task(name: str, folders: Iterable[Path] = ()) -> Task:
    """A registered task.

    Args:
        folders: more folders with family files.

    Raises:
        FamilyError: there is none of that name.
    """
    tasks = builtin_index(folders).tasks
    if name not in tasks:
        close = difflib.get_close_matches(name, tasks, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`bitquake tasks list --all` shows them"
        raise FamilyError(f"there is no task {name!r}; {hint}")
    return read_task(tasks[name])


def load_rows(task: Task) -> datasets.Dataset:
    """The rows that lmms-eval asks a model about, in its order, pictures left encoded.

    Raises:
        FamilyError: the dataset is not there, cannot be loaded, or is not as the family declares.
    """
    task.see_to_data()
    rows = task.process_docs(_split(task))
    if task.problem:
        raise FamilyError(f"{task.name}: {task.problem}")
    return rows


def _split(task: Task) -> datasets.Dataset:
    """The split that the task evaluates, loaded as lmms-eval does, from and into the same cache."""
    file = Path(task.file)
    config: dict[str, Any] = load_task_yaml(file.read_text(encoding="utf-8"))
    base = load_task_yaml((file.parent / config["include"]).read_text(encoding="utf-8"))
    stock = {} if task.contract.extends is None else stock_task(task.contract.extends.task).config
    config = {**stock, **base, **config}
    path, kwargs = config["dataset_path"], dict(config.get("dataset_kwargs") or {})
    kwargs.setdefault("cache_dir", os.environ.get("LMMS_EVAL_DATASETS_CACHE") or None)
    try:
        return datasets.load_dataset(path, config.get("dataset_name"), split=task.split, **kwargs)
    except Exception as error:  # of the hub, of the network, of the files
        told = " ".join(str(error).split())
        raise FamilyError(f"{task.name}: its dataset {path!r} cannot be loaded ({told})") from error
