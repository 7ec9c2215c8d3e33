"""The tasks that a suite names, tags taken apart, with the number of their samples as far as it is known by now."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bitquake.config import load_config
from bitquake.suite.schema import SuiteError, Task
from bitquake.suite_plan import World
from bitquake.tasks import stock
from bitquake.tasks.expand import Index, Variant, builtin_index, variants_of
from bitquake.tasks.families import FamilyError, Loaded, load_family
from bitquake.tasks.split_ids import with_ids
from bitquake.tasks.variants import FULL
from bitquake.tasks.world.build import TRAIN_VERSION

Version = int | str | None


class ListedTask(NamedTuple):
    """A task of a suite.

    limit: its first so many samples; None: all. n: samples that will be, as far as that is known without its data.
    version: of its family and of the user's lists of ids; None for a task of lmms-eval's own.
    """

    name: str
    limit: int | None
    n: int | None
    version: Version


Problem = Callable[[Sequence[str | int], str], SuiteError]


def listed_tasks(
    tasks: Sequence[Task], limit: int | None, world: World, at_most: int | None, problem: Problem
) -> dict[str, ListedTask]:
    """The tasks by name, in the order of the file; a task that is named itself beats the tags that hold it.

    Args:
        limit: of tasks without their own; at_most: no task gets more samples, whatever the file says.
        problem: makes the error of a place below ``tasks``.

    Raises:
        SuiteError: an unknown name, a group, one named twice, two tags that disagree, a task of the other world.
    """
    index = builtin_index()
    named: dict[str, int] = {}
    found: dict[str, tuple[int | None, int | None, str]] = {}
    for i, task in enumerate(tasks):
        if task.name in named:
            raise problem([i], f"{task.name!r} is named twice (entry {named[task.name]} too); name it once")
        named[task.name] = i
        own = limit if task.limit is None else None if task.limit == "all" else task.limit
        cut = own if at_most is None else min(at_most, own or at_most)
        for name in _members(task.name, index, i, problem):
            before = found.get(name)
            itself = name == task.name
            if before is not None and not itself:
                if before[2] == name or before[0] == cut:
                    continue
                what = f"{name!r} is in {before[2]!r} (limit {before[0]}) and in {task.name!r} (limit {cut})"
                raise problem([i], f"{what}; name the task itself, with the limit that it should have")
            found[name] = (cut, task.samples, task.name)
    return {name: _listed(name, cut, samples, index, world, problem) for name, (cut, samples, _) in found.items()}


def _members(name: str, index: Index, i: int, problem: Problem) -> list[str]:
    if name in index.tasks:
        return [name]
    if name in index.tags:
        return list(index.tags[name])
    folder = stock.tasks_folder()
    known = stock.names(folder) if folder is not None else None
    if known is not None and name in known.tasks:
        return [name]
    if known is not None and (name in known.groups or name in known.tags):
        raise problem([i], f"{name!r} is a group of lmms-eval's own tasks; name its tasks, so that each can be counted")
    names = [*index.tasks, *index.tags, *(known.tasks if known else ())]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`bitquake tasks list --all` shows Bitquake's"
    raise problem([i], f"there is no task and no tag {name!r}; {hint}")


def _listed(
    name: str, cut: int | None, samples: int | None, index: Index, world: World, problem: Problem
) -> ListedTask:
    if name not in index.tasks:
        if world == "block":
            raise problem([], f"{name!r} is a task of real pictures; the block world's are called block_...")
        return ListedTask(name, cut, _least(cut, samples), None)
    loaded, variants = _family(str(index.families[index.tasks[name].parent.name]))
    if loaded.family.world != world:
        raise problem([], f"{name!r} is a task of the {loaded.family.world} world, the suite runs in the {world} one")
    size = _size(loaded, variants[name])
    return ListedTask(name, cut, _least(cut, samples if size is None else size), _version(loaded))


def family_versions(name: str) -> list[Any]:
    """What tells a family's rows from those it had or will have, by its name; nothing of a name that is none."""
    index = builtin_index()
    if name not in index.families:
        return []
    loaded, _ = _family(str(index.families[name]))
    train = loaded.family.train
    return [_version(loaded), None if train is None else [train.model_dump(mode="json"), TRAIN_VERSION]]


def calibrates(data: str) -> bool:
    """Whether models can be calibrated on it: a folder, or a family with a ``calibration`` split."""
    index = builtin_index()
    if data not in index.families:
        return Path(data).expanduser().is_dir()
    return _family(str(index.families[data]))[0].family.splits.calibration is not None


def _version(loaded: Loaded) -> Version:
    """The family's version, and the hash of the user's lists of ids where these cut it."""
    lists = load_config().split_ids.get(loaded.family.family)
    if lists is None:
        return loaded.family.version
    return f"{loaded.family.version} {hashlib.blake2b(Path(lists).read_bytes(), digest_size=16).hexdigest()}"


@lru_cache(maxsize=256)
def _family(file: str) -> tuple[Loaded, dict[str, Variant]]:
    loaded = load_family(Path(file))
    loaded = with_ids(loaded, load_config().split_ids.get(loaded.family.family))
    return loaded, {variant.task: variant for variant in variants_of(loaded.family)}


def _size(loaded: Loaded, variant: Variant) -> int | None:
    """Samples of the whole task, where its table lies on this machine and no row has to be read to tell."""
    family, split = loaded.family, variant.split
    noise = family.variants.noise
    subset = noise.subset if noise and variant.noise and not variant.task.endswith(f"_{FULL}") else None
    most = subset.n if subset else None
    if family.dataset is None or family.dataset.path is not None or family.explode:
        return most
    if split.part is not None or split.ids is not None or split.where:
        return most
    try:
        file = loaded.split_file(split.split)
    except FamilyError:
        return most
    return _least(most, _rows(str(file))) if file.suffix == ".parquet" and file.is_file() else most


@lru_cache(maxsize=256)
def _rows(file: str) -> int:
    import pyarrow.parquet as pq

    n: int = pq.read_metadata(file).num_rows
    return n


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)
