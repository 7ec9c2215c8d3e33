"""From families to ordinary lmms-eval task files, in a cache folder named by the hash of everything they are made from.

    <cache>/<hash>/index.json
    <cache>/<hash>/<family>/_base_yaml                what all tasks of the family share
    <cache>/<hash>/<family>/<task>.yaml               the rest: names, split, noise
    <cache>/<hash>/<family>/glue.py                   hands lmms-eval the functions of ``bitquake.tasks.glue``

A finished folder is never changed. It is written under another name and renamed, so that it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import yaml

import bitquake
from bitquake.metrics import METRICS
from bitquake.noise import image_noises

from .contract import CLEAN, THRESHOLD, TaskContract
from .families import PACKAGE, FamilyError, Loaded, family_files, load_families

FUNCTIONS = ("process_docs", "doc_to_visual", "doc_to_text", "doc_to_target", "process_results")
GLUE = '''"""Hands lmms-eval the functions of this folder's tasks; ``!function glue.NAME__TASK`` asks for one."""

from bitquake.tasks.glue import functions_of

__getattr__ = functions_of(__file__)
'''
INDEX = "index.json"


class Index(NamedTuple):
    """An expanded folder: where it is, task name -> YAML file, tag -> task names, problems of families left out."""

    root: Path
    tasks: dict[str, Path]
    tags: dict[str, list[str]]
    problems: list[str]


class Task(NamedTuple):
    """One task to be written: its name, its tags and the part of its config that the family's base does not hold."""

    name: str
    tags: list[str]
    config: dict[str, Any]


class _Function(str):
    """A scalar that is written with the tag ``!function``."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Function, lambda dumper, data: dumper.represent_scalar("!function", str(data)))


def cache_root() -> Path:
    """Folder under which expanded task files are kept: ``tasks`` in the user's cache folder of ``bitquake``."""
    return platformdirs.user_cache_path("bitquake", appauthor=False) / "tasks"


def builtin_index(folders: Iterable[Path] = (), cache: Path | None = None) -> Index:
    """The expanded families of the package and of ``folders``, written on the first call, read from then on.

    Args:
        folders: more folders with family files.
        cache: where to keep them, default :func:`cache_root`.

    Raises:
        FamilyError: the cache folder cannot be written.
    """
    files = family_files(folders)
    root = (cache or cache_root()).resolve() / _content_hash(files)
    if not (root / INDEX).is_file():
        loaded, problems = load_families(folders)
        _write(root, loaded, problems)
    return read_index(root)


def read_index(root: Path) -> Index:
    """The index of an expanded folder."""
    data = json.loads((root / INDEX).read_text(encoding="utf-8"))
    return Index(root, {name: root / path for name, path in data["tasks"].items()}, data["tags"], data["problems"])


def tasks_of(loaded: Loaded) -> Iterator[Task]:
    """The tasks of one family: clean, threshold, and every noise at every severity."""
    family = loaded.family
    everything = f"{family.family}_all"
    yield Task(f"{family.family}_{CLEAN}", [everything], _variant(loaded, f"{family.family}_{CLEAN}", "test", None))
    name = f"{family.family}_{THRESHOLD}"
    yield Task(name, [everything], _variant(loaded, name, "threshold", None))
    for noise in family.noises():
        name = f"{family.family}_{noise.name}_{noise.severity}"
        tags = [f"{family.family}_noise", f"{family.family}_noise_{noise.severity}", everything]
        yield Task(name, tags, _variant(loaded, name, "test", noise.to_mapping()))


def base_config(loaded: Loaded) -> dict[str, Any]:
    """What all tasks of a family share."""
    family = loaded.family
    dataset = family.dataset
    config: dict[str, Any] = {"dataset_path": dataset.path or "parquet"}
    if dataset.name:
        config["dataset_name"] = dataset.name
    if dataset.revision:
        config["dataset_kwargs"] = {"revision": dataset.revision}
    contract = TaskContract.of(family).model_dump(mode="json", exclude_defaults=True)
    return config | {
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": family.max_new_tokens, "do_sample": False, "temperature": 0},
        "metric_list": _metric_list(family.metrics),
        "score_key": "accuracy",
        "cluster_key": "image_id",
        "metadata": {"version": family.version, "bitquake": contract},
    }


def task_files(loaded: Loaded) -> dict[str, str]:
    """File name -> text, for the folder of one family."""
    family = loaded.family
    head = (
        f"# {family.family}: expanded by bitquake {bitquake.__version__} from its {loaded.file.name}; edit that one.\n"
    )
    files = {"_base_yaml": head + _dump(base_config(loaded)), "glue.py": GLUE}
    for task in tasks_of(loaded):
        tags = {"tag": task.tags}
        files[f"{task.name}.yaml"] = head + _dump({"include": "_base_yaml", "task": task.name} | tags | task.config)
    return files


def _variant(loaded: Loaded, name: str, role: str, noise: dict[str, Any] | None) -> dict[str, Any]:
    family = loaded.family
    split = getattr(family.splits, role).split
    config: dict[str, Any] = {}
    if family.dataset.files is not None:
        config["dataset_kwargs"] = {"data_files": {split: str(loaded.data_file(family.dataset.files[split]))}}
    config["test_split"] = split
    config |= {function: _Function(f"glue.{function}__{name}") for function in FUNCTIONS}
    config["lmms_eval_specific_kwargs"] = {"default": {"noise": noise} | family.prompts["default"].model_dump()}
    return config


def _metric_list(metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The record itself, then every metric with its interval, then what went wrong."""

    def metric(key: str, function: str, higher_is_better: bool) -> dict[str, Any]:
        aggregation = _Function(f"bitquake.tasks.aggregate.{function}")
        return {"metric": key, "aggregation": aggregation, "higher_is_better": higher_is_better}

    out = [metric("bitquake", "n_scored", True)]
    for key in metrics:
        better = METRICS[key].higher_is_better is not False
        out += [metric(key, key, better), metric(f"{key}_ci", f"{key}_ci", better)]
    return [*out, metric("failures", "total", False), metric("parse_failures", "total", False)]


def _dump(config: dict[str, Any]) -> str:
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _content_hash(files: Sequence[Path]) -> str:
    """Hash of all that decides the expanded text: families, our code and version, noises, metrics, package folder."""
    digest = hashlib.blake2b(digest_size=12)
    versions = {name: noise.version for name, noise in image_noises().items()}
    directions = {key: metric.higher_is_better for key, metric in METRICS.items()}
    parts: list[Any] = [bitquake.__version__, str(PACKAGE), versions, directions]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    code = [PACKAGE / name for name in ("expand.py", "families.py", "contract.py")]
    for file in [*code, *files]:
        data = file.read_bytes()
        digest.update(f"{file}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def _index_text(loaded: Sequence[Loaded], problems: list[str]) -> str:
    tasks: dict[str, str] = {}
    tags: dict[str, list[str]] = {}
    for one in loaded:
        for task in tasks_of(one):
            tasks[task.name] = f"{one.family.family}/{task.name}.yaml"
            for tag in task.tags:
                tags.setdefault(tag, []).append(task.name)
    return json.dumps({"tasks": tasks, "tags": tags, "problems": problems}, indent=1)


def _write(root: Path, loaded: Sequence[Loaded], problems: list[str]) -> None:
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=root.parent))
    except OSError as error:
        raise FamilyError(
            f"task files cannot be written to {root.parent} ({error}). Make the folder writable, or set XDG_CACHE_HOME."
        ) from error
    try:
        for one in loaded:
            folder = building / one.family.family
            folder.mkdir()
            for name, text in task_files(one).items():
                (folder / name).write_text(text, encoding="utf-8")
        with (building / INDEX).open("w", encoding="utf-8") as file:
            file.write(_index_text(loaded, problems))
            file.flush()
            os.fsync(file.fileno())
        building.chmod(0o755)  # a cache that several people share
        try:
            building.rename(root)
        except OSError:
            if not (root / INDEX).is_file():  # a cache that was cleaned by halves
                shutil.rmtree(root, ignore_errors=True)
                building.rename(root)
            # else another process was first, with the same content
    finally:
        shutil.rmtree(building, ignore_errors=True)
