"""What the command line shows and does with task families: ``bitquake tasks path | list | export | check``."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from .documents import require_columns
from .expand import INDEX, builtin_index, task_files, tasks_of
from .families import BUILT_IN, FAMILY_FILE, FamilyError, Loaded, load_families, load_family


def tasks_path(folders: Iterable[Path] = ()) -> str:
    """Folder with all task files as plain lmms-eval YAML, for ``--include_path $(bitquake tasks path)``."""
    return str(builtin_index(folders).root)


def list_rows(folders: Iterable[Path] = ()) -> list[dict[str, str]]:
    """One row for each family: columns ready for a table."""
    loaded, _ = load_families(folders)
    return [
        {
            "family": one.family.family,
            "world": one.family.world,
            "protocol": one.family.protocol,
            "dataset": one.family.dataset_id,
            "tasks": str(sum(1 for _ in tasks_of(one))),
            "title": one.family.title,
        }
        for one in loaded
    ]


def task_rows(folders: Iterable[Path] = ()) -> list[dict[str, str]]:
    """One row for each task: its name and its tags."""
    loaded, _ = load_families(folders)
    return [{"task": task.name, "tags": ", ".join(task.tags)} for one in loaded for task in tasks_of(one)]


def problems(folders: Iterable[Path] = ()) -> list[str]:
    """What is wrong with the families that are left out; empty when all are fine."""
    return load_families(folders)[1]


def export(directory: Path, folders: Iterable[Path] = ()) -> int:
    """Write all task files to a folder, for use with ``--include_path`` elsewhere; returns how many tasks.

    Raises:
        FamilyError: the folder exists and holds something else than an earlier export.
    """
    index = builtin_index(folders)
    if directory.exists():
        if not directory.is_dir() or (any(directory.iterdir()) and not (directory / INDEX).is_file()):
            raise FamilyError(f"{directory}: exists and is no earlier export; name a folder that is new or empty")
        for old in [path.parent for path in directory.glob("*/_base_yaml")]:
            shutil.rmtree(old)
    shutil.copytree(index.root, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return len(index.tasks)


def validate(path: Path) -> list[str]:
    """What is wrong with a family file (or the ``family.yaml`` of a folder), one problem a line; empty when it is fine.

    Beside the file itself: its name must not be a built-in family's, its data files must exist and have its columns.
    A dataset of the hub is not asked for.
    """
    file = path / FAMILY_FILE if path.is_dir() else path
    try:
        loaded = load_family(file)
        task_files(loaded)
    except FamilyError as error:
        return str(error).splitlines()
    found = []
    name = loaded.family.family
    taken = BUILT_IN / name / FAMILY_FILE
    if taken.is_file() and taken.resolve() != file.resolve():
        found.append(f"{file}: family: {name!r} is the name of a built-in family ({taken}); give it another name")
    return found + [f"{file}: {problem}" for problem in _data_problems(loaded)]


def _data_problems(loaded: Loaded) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = []
    for split, name in (loaded.family.dataset.files or {}).items():
        file = loaded.data_file(name)
        try:
            require_columns(pq.read_schema(file).names, loaded.family.columns)
        except FileNotFoundError:
            out.append(f"dataset.files.{split}: there is no {file}; put it there, or correct the path")
        except (OSError, pa.ArrowException) as error:
            out.append(f"dataset.files.{split}: {file} is not readable parquet ({error}); make it again")
        except FamilyError as error:
            out.append(f"dataset.files.{split}: {error}")
    return out
