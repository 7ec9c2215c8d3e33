"""What the command line shows and does with task families: ``bitquake tasks path | list | show | export | check``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from bitquake.config import load_config

from .expand import INDEX, Variant, builtin_index, clash, stock_names, task_files, variants_of
from .families import FAMILY_FILE, FamilyError, Loaded, is_built_in, load_family
from .schema import Family, Split
from .sources import make_ready
from .split_ids import with_ids
from .strict_yaml import load_task_yaml
from .variants import ALL, CLEAN, FULL


def tasks_path(folders: Iterable[Path] = ()) -> str:
    """Folder with all task files as plain lmms-eval YAML, for ``--include_path $(bitquake tasks path)``."""
    return str(builtin_index(folders).root)


def registered(folders: Iterable[Path] = ()) -> list[Loaded]:
    """The families that have tasks: of the package, of the user's configuration and of ``folders``."""
    lists = load_config().split_ids
    families = builtin_index(folders).families
    return [with_ids(load_family(file), lists.get(name)) for name, file in families.items()]


def list_rows(folders: Iterable[Path] = ()) -> list[dict[str, str]]:
    """One row for each family: columns ready for a table."""
    return [
        {
            "family": one.family.family,
            "world": one.family.world,
            "protocol": one.family.protocol,
            "dataset": one.family.dataset_id,
            "tasks": str(sum(1 for _ in variants_of(one.family))),
            "title": one.family.title,
        }
        for one in registered(folders)
    ]


def task_rows(folders: Iterable[Path] = ()) -> list[dict[str, str]]:
    """One row for each task: its name and its tags."""
    return [
        {"task": variant.task, "tags": ", ".join(variant.tags)}
        for one in registered(folders)
        for variant in variants_of(one.family)
    ]


def problems(folders: Iterable[Path] = ()) -> list[str]:
    """What is wrong with the families that are left out; empty when all are fine."""
    return builtin_index(folders).problems


def show(name: str, folders: Iterable[Path] = ()) -> list[tuple[str, str]]:
    """(what, text) about a family, about one task, or about a tag.

    Raises:
        FamilyError: there is none of that name.
    """
    from .selection import describe

    folders = list(folders)
    if tagged := builtin_index(folders).tags.get(name):
        return [("tag", name), (f"{len(tagged)} tasks", ", ".join(tagged))]
    loaded, variant = _find(name, folders)
    family = loaded.family
    beside = builtin_index(folders).tasks[f"{family.family}_{CLEAN}"].parent

    def part(split: Split) -> str:
        return describe(split, beside) or split.split

    rows = [
        ("family", f"{family.family} (version {family.version}): {family.title}"),
        ("file", str(loaded.file)),
        ("source", family.source),
        ("licence", family.license),
        ("protocol", family.protocol if family.extends is None else f"that of lmms-eval's {family.extends.task}"),
        ("dataset", _dataset(family)),
        ("prompt", _prompt(family)),
        *((f"prompt of {model}", _around(family, model)) for model in family.prompts if model != "default"),
        ("confidence", family.primary_confidence),
        ("metrics", ", ".join(family.metrics)),
        ("shifted from", family.shift_from),
    ]
    subset = family.variants.noise.subset if family.variants.noise else None
    fixed = "" if subset is None else f"{subset.n} questions, whole pictures, seed {subset.seed}"
    if variant is not None:
        noise = variant.noise
        noisy = "" if noise is None else ", ".join(f"{key} {value}" for key, value in noise.to_mapping().items())
        rows.insert(0, ("task", variant.task))
        rows += [("tags", ", ".join(variant.tags)), ("rows", part(variant.split)), ("noise", noisy or "none")]
        rows.append(("subset", "" if noise is None or variant.task.endswith(f"_{FULL}") else fixed))
    else:
        rows += [(role, part(split)) for role, split in family.splits.roles()]
        if (train := family.train) is not None:
            drawn = f"{train.pictures} pictures, drawn at their first use"
            rows.append(("train", part(train) if train.pictures is None else drawn))
        rows += [(f"shift {key}", part(shift)) for key, shift in family.variants.shifts.items()]
        noises = list(dict.fromkeys(noise.name for noise in family.noises()))
        severities = sorted({noise.severity for noise in family.noises()})
        if noises:
            rows.append(("noises", f"{', '.join(noises)}; severities {', '.join(map(str, severities))}"))
        tags = dict.fromkeys(tag for one in variants_of(family) for tag in one.tags)
        rows += [("subset of noisy tasks", fixed), ("tags", ", ".join(tags))]
        rows.append(("tasks", str(sum(1 for _ in variants_of(family)))))
    return [(what, text) for what, text in rows if text]


def task_yaml(name: str, folders: Iterable[Path] = ()) -> str:
    """The expanded YAML of a task, or of what a family's tasks share (with ``include`` left as it is)."""
    folders = list(folders)
    loaded, variant = _find(name, folders)
    index = builtin_index(folders)
    base = index.tasks[f"{loaded.family.family}_{CLEAN}"].parent / "_base_yaml"
    if variant is None:
        return base.read_text(encoding="utf-8")
    return index.tasks[name].read_text(encoding="utf-8") + "---\n" + base.read_text(encoding="utf-8")


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

    Beside the file itself: its names must be free, what it refers to must exist, its data files must exist and have its
    columns. A dataset of the hub is not asked for. An expanded task file is checked for models that would get no noise.
    """
    file = path / FAMILY_FILE if path.is_dir() else path
    if is_expanded(file):
        return noise_lost(file)
    try:
        loaded = with_ids(load_family(file))
        task_files(loaded)
    except FamilyError as error:
        return str(error).splitlines()
    found = [str(error) for error in (_taken(loaded), _unknown_origin(loaded)) if error is not None]
    return found + [str(problem) for problem in _data_problems(loaded)]


def is_expanded(file: Path) -> bool:
    """Whether a file is an lmms-eval task file, such as those that ``bitquake tasks export`` writes."""
    try:
        with file.open(encoding="utf-8") as stream:
            return re.search(r"^task:", stream.read(4000), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError):
        return False


def noise_lost(file: Path) -> list[str]:
    """The keys of a task file's ``lmms_eval_specific_kwargs`` that would give a model other noise than ``default``."""
    import yaml

    text = file.read_text(encoding="utf-8")
    try:
        kwargs = load_task_yaml(text)["lmms_eval_specific_kwargs"]
        noise = kwargs["default"]["noise"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        return [f"{file}: no task file of bitquake ({' '.join(str(error).split())}); export it again"]
    out = []
    for key, value in kwargs.items():
        if isinstance(value, Mapping) and value.get("noise", "missing") != noise:
            line = next((i for i, row in enumerate(text.splitlines(), 1) if row.strip().startswith(f"{key}:")), 0)
            got = value.get("noise", "missing")
            out.append(
                f"{file}:{line}: lmms_eval_specific_kwargs.{key}: the model {key!r} gets this mapping instead of "
                f"`default`, and its noise is {got!r}, not {noise!r}; write the noise here too"
            )
    return out


def _find(name: str, folders: list[Path]) -> tuple[Loaded, Variant | None]:
    """A family and None, or a task's family and the task."""
    import difflib

    loaded = {one.family.family: one for one in registered(folders)}
    if name in loaded:
        return loaded[name], None
    tasks = {variant.task: (one, variant) for one in loaded.values() for variant in variants_of(one.family)}
    if name in tasks:
        return tasks[name]
    close = difflib.get_close_matches(name, [*loaded, *tasks], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; `bitquake tasks list` shows them"
    raise FamilyError(f"there is no family and no task {name!r}{hint}")


def _dataset(family: Family) -> str:
    if family.dataset is None:
        return family.dataset_id
    if family.dataset.prepared is not None:
        return f"built by `bitquake data prepare {family.dataset.prepared}`"
    if family.dataset.files is not None:
        return ", ".join(f"{split}: {file}" for split, file in family.dataset.files.items())
    return f"{family.dataset_id}, revision {family.dataset.revision or 'newest'}"


def _prompt(family: Family) -> str:
    return "the stock task's own" if family.extends is not None else _around(family, "default")


def _around(family: Family, model: str) -> str:
    prompt = family.prompts[model]
    return f"{prompt.pre_prompt}{family.text.template}{prompt.post_prompt}"


def _taken(loaded: Loaded) -> FamilyError | None:
    """Why the names of a family are not free, beside the families that are registered without it."""
    name = loaded.family.family
    index = builtin_index()
    there = index.families.get(name)
    if there is not None and there.resolve() != loaded.file.resolve():
        whose = "a built-in family" if is_built_in(there) else "a family of the configuration"
        return loaded.problem("family", f"{name!r} is the name of {whose} ({there}); give it another name")
    taken = stock_names()
    for other in index.families:
        if other != name:
            taken |= dict.fromkeys(index.family_tasks(other), f"a task of the family {other!r}")
            taken[f"{other}_{ALL}"] = f"a tag of the family {other!r}"
    return clash(loaded, taken)


def _unknown_origin(loaded: Loaded) -> FamilyError | None:
    origin = loaded.family.shift_from
    if not origin or origin in builtin_index().tasks:
        return None
    return loaded.problem("shift_from", f"there is no task {origin!r}; name one such as vqav2_clean, or leave it out")


def _data_problems(loaded: Loaded) -> list[FamilyError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .documents import require_columns

    dataset = loaded.family.dataset
    if dataset is None or dataset.path is not None:
        return []
    columns, shifts = loaded.family.columns, loaded.family.variants.shifts
    fitted = [shift.threshold for shift in shifts.values() if shift.threshold is not None]
    roles = [one for _, one in loaded.family.splits.roles()]
    splits = dict.fromkeys(split.split for split in (*roles, *shifts.values(), *fitted))
    out = []
    for split in dataset.files or splits:
        file = loaded.split_file(split)
        place = f"dataset.files.{split}" if dataset.prepared is None else "dataset.prepared"
        source = loaded.source(split)
        if source is not None:
            try:
                make_ready(file, source)
            except FamilyError as error:
                out.append(loaded.problem(place, str(error)))
                continue
        try:
            require_columns(pq.read_schema(file).names, columns)
        except FileNotFoundError:
            if dataset.prepared is None:  # else it is for the dry run to say what to do
                out.append(loaded.problem(place, f"there is no {file}; put it there, or correct the path"))
        except (OSError, pa.ArrowException) as error:
            out.append(loaded.problem(place, f"{file} is not readable parquet ({error}); make it again"))
        except FamilyError as error:
            out.append(loaded.problem("columns", f"{error} (in {file})"))
    return out
