"""From families to ordinary lmms-eval task files, in a cache folder named by the hash of everything they are made from.

    <cache>/<hash>/index.json
    <cache>/<hash>/<family>/_base_yaml                what all tasks of the family share
    <cache>/<hash>/<family>/<task>.yaml               the rest: names, split, noise
    <cache>/<hash>/<family>/glue.py                   hands lmms-eval the functions of ``bitquake.tasks.glue``
    <cache>/<hash>/<family>/<list>-<hash>.json        the sample ids of a split that is given by a list

A finished folder is never changed. It is written under another name and renamed, so that it is whole or absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import yaml

import bitquake
from bitquake.config import load_config
from bitquake.metrics import METRICS
from bitquake.noise import NoiseSpec, image_noises, text_noises

from . import stock
from .contract import TaskContract, protocol_scores
from .families import PACKAGE, FamilyError, Loaded, family_files, read_families
from .schema import Family, Shift, Split
from .sources import datasets_folder
from .split_ids import with_ids
from .variants import ALL, CLEAN, DEV, FULL, SHIFT, THRESHOLD, dev_tag, noise_tags

OWN = ("process_docs", "doc_to_visual", "doc_to_text", "doc_to_target", "process_results")
OVER_STOCK = ("process_docs", "doc_to_visual", "doc_to_text", "process_results")
GLUE = '''"""Hands lmms-eval the functions of this folder's tasks; ``!function glue.NAME__TASK`` asks for one."""

from bitquake.tasks.glue import functions_of

__getattr__ = functions_of(__file__)
'''
INDEX = "index.json"
KEPT = 4
"""How many cache folders stay however old they are; younger than a day, all do."""
_DAY = 86_400
_READ = 1 << 24
"""Bytes: a larger JSON file beside a family is a table; when it was changed says enough."""


class Index(NamedTuple):
    """An expanded folder.

    root: where it is; tasks: name -> YAML file; tags: name -> names of tasks; problems: of families that are left out;
    families: name -> family file, of those that are not.
    """

    root: Path
    tasks: dict[str, Path]
    tags: dict[str, list[str]]
    problems: list[str]
    families: dict[str, Path]

    def family_tasks(self, family: str) -> list[str]:
        """The names of a family's tasks."""
        return [name for name, file in self.tasks.items() if file.parent.name == family]


class Variant(NamedTuple):
    """One task of a family: its name, its tags, the rows that it evaluates, and its noise."""

    task: str
    tags: list[str]
    split: Split
    noise: NoiseSpec | None


class _Function(str):
    """A scalar that is written with the tag ``!function``."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Function, lambda dumper, data: dumper.represent_scalar("!function", str(data)))


def cache_root() -> Path:
    """Folder under which expanded task files are kept: ``tasks`` in the user's cache folder of ``bitquake``."""
    return platformdirs.user_cache_path("bitquake", appauthor=False) / "tasks"


def builtin_index(folders: Iterable[Path] = (), cache: Path | None = None) -> Index:
    """The expanded families of the package, of the user's configuration and of ``folders``.

    Written on the first call, read from then on.

    Args:
        folders: more folders with family files.
        cache: where to keep them, default :func:`cache_root`.

    Raises:
        FamilyError: one of ``folders`` holds no family, or the cache folder cannot be written.
        ConfigError: the user's configuration is not valid.
    """
    settings = load_config()
    problems: list[str] = []
    files = family_files(())
    for folder in settings.families:
        try:
            files += family_files([folder], built_in=False)
        except FamilyError as error:
            problems.append(f"{settings.file}: families: {error}, or `bitquake config unset families {folder}`")
    files += family_files(folders, built_in=False)
    files = list(dict.fromkeys(file.resolve() for file in files))
    root = (cache or cache_root()).resolve() / _content_hash(files, settings.split_ids, problems)
    if not (root / INDEX).is_file():
        loaded, broken = read_families(files)
        _write(root, loaded, problems + broken, settings.split_ids)
        prune(root.parent)
    with contextlib.suppress(OSError):  # a cache that somebody else owns
        os.utime(root)  # "in use today", for prune
    return read_index(root)


def read_index(root: Path) -> Index:
    """The index of an expanded folder."""
    data = json.loads((root / INDEX).read_text(encoding="utf-8"))
    folders = {family: root / family for family in data["tasks"]}
    tasks = {name: folders[family] / f"{name}.yaml" for family, names in data["tasks"].items() for name in names}
    families = {name: Path(file) for name, file in data["families"].items()}
    return Index(root, tasks, data["tags"], data["problems"], families)


def prune(cache: Path) -> None:
    """Remove cache folders that nobody used for a day, but for the ``KEPT`` used last, and leftovers of killed runs."""
    try:
        used = sorted(((path.stat().st_mtime, path) for path in cache.iterdir() if path.is_dir()), reverse=True)
    except OSError:  # somebody else prunes at this moment
        return
    finished = [(when, path) for when, path in used if (path / INDEX).is_file()]
    broken = [entry for entry in used if entry not in finished]
    for when, path in [*finished[KEPT:], *broken]:
        if when < time.time() - _DAY:
            shutil.rmtree(path, ignore_errors=True)


def variants_of(family: Family) -> Iterator[Variant]:
    """The tasks of one family: clean, threshold, dev, shifts, and every noise at every severity.

    dev is in none of the family's tags: nothing that is measured runs on it.
    """
    name, splits = family.family, family.splits
    everything = f"{name}_{ALL}"
    shifted = [f"{name}_{SHIFT}"] if family.variants.shifts or family.shift_from else []
    plain = [everything, *shifted, *family.tags]
    yield Variant(f"{name}_{CLEAN}", plain, splits.test, None)
    yield Variant(f"{name}_{THRESHOLD}", plain, splits.threshold, None)
    if splits.dev is not None:
        yield Variant(f"{name}_{DEV}", [dev_tag(family.world)], splits.dev, None)
    for key, shift in family.variants.shifts.items():
        yield Variant(f"{name}_{key}", plain, shift, None)
        if shift.shift_from is None:
            yield Variant(f"{name}_{key}_{THRESHOLD}", plain, threshold_of(shift, splits.threshold), None)
    subset = family.variants.noise is not None and family.variants.noise.subset is not None
    for noise in family.noises():
        task = f"{name}_{noise.name}_{noise.severity}"
        tags = noise_tags(name, noise.name, noise.severity)
        yield Variant(task, [*tags, everything], splits.test, noise)
        if subset:
            tags = noise_tags(name, noise.name, noise.severity, full=True)
            yield Variant(f"{task}_{FULL}", tags, splits.test, noise)


def threshold_of(shift: Shift, threshold: Split) -> Split:
    """The rows on which thresholds for a shift that is in distribution itself are fitted."""
    return shift.threshold or threshold.model_copy(update={"where": {**threshold.where, **shift.where}})


def base_config(loaded: Loaded, extended: stock.StockTask | None = None) -> dict[str, Any]:
    """What all tasks of a family share."""
    family = loaded.family
    tables = {split: source for split in _files(family) if (source := loaded.source(split)) is not None}
    described = TaskContract.of(family).model_copy(update={"sources": tables})
    contract = described.model_dump(mode="json", exclude_defaults=True)
    metadata = {"version": family.version, "bitquake": contract}
    scored = {"score_key": "accuracy", "cluster_key": "image_id"}
    if extended is not None:
        theirs = extended.config
        config: dict[str, Any] = {"include": str(extended.file), "output_type": "generate_until"}
        ours = _metric_list(family)
        config["metric_list"] = _stock_metrics(theirs.get("metric_list"), ours) + ours
        if theirs.get("task_alias") is not None:
            config["task_alias"] = None
        return config | scored | {"metadata": _stock_metadata(theirs.get("metadata")) | metadata}
    dataset = family.dataset
    assert dataset is not None  # the schema sees to it
    config = {"dataset_path": dataset.path or "parquet"}
    if dataset.name:
        config["dataset_name"] = dataset.name
    if dataset.revision:
        config["dataset_kwargs"] = {"revision": dataset.revision}
    config["output_type"] = "generate_until"
    config["generation_kwargs"] = {"max_new_tokens": family.max_new_tokens, "do_sample": False, "temperature": 0}
    config["metric_list"] = _metric_list(family)
    return config | scored | {"metadata": metadata}


def _files(family: Family) -> dict[str, str]:
    return {} if family.dataset is None else family.dataset.files or {}


def task_config(loaded: Loaded, variant: Variant, extended: stock.StockTask | None = None) -> dict[str, Any]:
    """One task: what the family's base does not hold."""
    family = loaded.family
    noise = None if variant.noise is None else variant.noise.to_mapping()
    # A stock task with the older key `group` gets our tags there: lmms-eval refuses both in one task.
    key = "group" if extended is not None and extended.config.get("group") is not None else "tag"
    config: dict[str, Any] = {"include": "_base_yaml", "task": variant.task, key: variant.tags}
    split = variant.split.split
    if family.dataset is not None and family.dataset.path is None:
        config["dataset_kwargs"] = {"data_files": {split: str(loaded.split_file(split))}}
    config["test_split"] = split
    functions: tuple[str, ...] = OWN
    if extended is not None:
        functions = (*OVER_STOCK, *(["doc_to_messages"] if extended.config.get("doc_to_messages") else []))
        config["lmms_eval_specific_kwargs"] = stock.with_noise(extended.config.get("lmms_eval_specific_kwargs"), noise)
    else:
        config["lmms_eval_specific_kwargs"] = {"default": {"noise": noise} | family.prompts["default"].model_dump()}
    return config | {function: _Function(f"glue.{function}__{variant.task}") for function in functions}


def task_files(loaded: Loaded) -> dict[str, str]:
    """File name -> text, for the folder of one family.

    Raises:
        FamilyError: the stock task that it extends cannot be extended.
    """
    family = loaded.family
    extended = None if family.extends is None else _extended(loaded)
    head = (
        f"# {family.family}: expanded by bitquake {bitquake.__version__} from its {loaded.file.name}; edit that one.\n"
    )
    files = {"_base_yaml": head + _dump(base_config(loaded, extended)), "glue.py": GLUE, **loaded.ids}
    for variant in variants_of(family):
        files[f"{variant.task}.yaml"] = head + _dump(task_config(loaded, variant, extended))
    return files


def clash(loaded: Loaded, others: Mapping[str, str]) -> FamilyError | None:
    """Why a family cannot be registered beside others, or None where it can.

    Args:
        others: name that is taken -> by whom; a tag of ours may join a tag, and is none of these.
    """
    family = loaded.family
    tasks = [variant.task for variant in variants_of(family)]
    tags = {tag for variant in variants_of(family) for tag in variant.tags}
    for name in (*tasks, *sorted(tags)):
        if name in others:
            place = "tags" if name in family.tags else "family"
            return loaded.problem(place, f"{name!r} would be the name of {others[name]} too; choose another name")
    for name in sorted(tags.intersection(tasks)):
        place = "tags" if name in family.tags else "family"
        return loaded.problem(place, f"{name!r} is the name of a task and of a tag; choose another name")
    return None


def stock_names() -> dict[str, str]:
    """Names that the installed lmms-eval has for tasks and groups -> what they are; empty where it is not installed."""
    folder = stock.tasks_folder()
    if folder is None:
        return {}
    known = stock.names(folder)
    groups = {name: f"lmms-eval's group ({file})" for name, file in known.groups.items()}
    return groups | {name: f"lmms-eval's task ({file})" for name, file in known.tasks.items()}


def _extended(loaded: Loaded) -> stock.StockTask:
    extends = loaded.family.extends
    assert extends is not None
    if extends.task in {variant.task for variant in variants_of(loaded.family)}:
        raise loaded.problem("extends.task", f"{extends.task!r} is this family's own task; name one of lmms-eval's")
    try:
        found = stock.stock_task(extends.task)
    except FamilyError as error:
        raise loaded.problem("extends.task", str(error)) from error
    scores = [str(metric.get("metric")) for metric in found.config.get("metric_list") or [] if metric]
    if extends.score is not None and extends.score.partition(".")[0] not in scores:
        raise loaded.problem(
            "extends.score", f"{extends.task} has no metric {extends.score!r}; it has {', '.join(scores)}"
        )
    return found


def _stock_metrics(theirs: Any, ours: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A stock task's metrics, but for those whose names are ours: one name can have one value only."""
    taken = {metric["metric"] for metric in ours}
    out = []
    for metric in theirs or []:
        if isinstance(metric, Mapping) and metric.get("metric") not in taken:
            function = str(metric.get("aggregation", ""))
            mine = {"aggregation": _Function(function.removeprefix(stock.FUNCTION))}
            out.append(dict(metric) | (mine if function.startswith(stock.FUNCTION) else {}))
    return out


def _stock_metadata(metadata: Any) -> dict[str, Any]:
    """A mapping, or the list of mappings that older files have."""
    parts = metadata if isinstance(metadata, list) else [metadata]
    return {key: value for part in parts if isinstance(part, Mapping) for key, value in part.items()}


def _metric_list(family: Family) -> list[dict[str, Any]]:
    """The record itself, then metrics and the protocol's further scores with their intervals, then what went wrong."""

    def metric(key: str, function: str, higher_is_better: bool) -> dict[str, Any]:
        aggregation = _Function(f"bitquake.tasks.aggregate.{function.replace('.', '_')}")
        return {"metric": key, "aggregation": aggregation, "higher_is_better": higher_is_better}

    out = [metric("bitquake", "n_scored", True)]
    for key in family.metrics:
        better = METRICS[key].higher_is_better is not False
        out += [metric(key, key, better), metric(f"{key}_ci", f"{key}_ci", better)]
    for key in protocol_scores(family.protocol, family.candidates, family.extends):
        function = "cider" if key == "cider" else "score"
        out += [metric(key, function, True), metric(f"{key}_ci", f"{function}_ci", True)]
    out += [metric("failures", "total", False), metric("parse_failures", "total", False)]
    return [*out, metric("parse_failure_rate", "share", False)]


def _dump(config: dict[str, Any]) -> str:
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


@functools.cache
def _surroundings() -> str:
    """What, beside the family files, decides the expanded text; the same for the life of a process."""
    images, texts = image_noises().values(), text_noises().values()
    parts: list[Any] = [
        bitquake.__version__,
        str(PACKAGE),
        [[noise.name, noise.version, noise.group, noise.geometry, noise.move_box is None] for noise in images],
        [[noise.name, noise.version] for noise in texts],
        {key: metric.higher_is_better for key, metric in METRICS.items()},
    ]
    code = sorted([*PACKAGE.glob("*.py"), *(PACKAGE / "scoring").glob("*.py")])
    return json.dumps([*parts, *(file.read_text(encoding="utf-8") for file in code)], sort_keys=True)


def _lmms_eval() -> list[str]:
    """What is known of the installed lmms-eval, whose task files families may extend and names they must leave."""
    try:
        installed = importlib.metadata.distribution("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        return [str(stock.tasks_folder())]
    # RECORD has a hash of each file: of two commits with one version they differ.
    return [installed.version, str(stock.tasks_folder()), installed.read_text("RECORD") or ""]


def _content_hash(files: Sequence[Path], split_ids: Mapping[str, Path], problems: list[str]) -> str:
    """Hash of all that decides the expanded text and the index."""
    digest = hashlib.blake2b(digest_size=12)
    places = [str(cache_root()), str(datasets_folder())]  # task files name what is converted, and what is prepared
    digest.update(json.dumps([_surroundings(), _lmms_eval(), places, problems]).encode())
    lists = [file for folder in dict.fromkeys(file.parent for file in files) for file in sorted(folder.glob("*.json"))]
    for family, file in split_ids.items():
        digest.update(f"{family}:".encode())
        lists.append(file)
    for file in [*files, *lists]:
        try:
            found = file.stat()
            data = file.read_bytes() if found.st_size <= _READ else str(found.st_mtime_ns).encode()
        except OSError:  # whoever reads it says what is wrong
            data = b""
        digest.update(f"{file}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def _write(root: Path, loaded: Sequence[Loaded], problems: list[str], split_ids: Mapping[str, Path]) -> None:
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=root.parent))
    except OSError as error:
        raise FamilyError(
            f"task files cannot be written to {root.parent} ({error}). Make the folder writable, or set XDG_CACHE_HOME."
        ) from error
    try:
        index = _write_families(building, loaded, problems, split_ids)
        with (building / INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file)
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


def _write_families(
    folder: Path, loaded: Sequence[Loaded], problems: list[str], split_ids: Mapping[str, Path]
) -> dict[str, Any]:
    """Write each family that can be registered; the index of those, and the problems of the others."""
    tasks: dict[str, list[str]] = {}
    tags: dict[str, list[str]] = {}
    taken = stock_names()
    problems = list(problems)
    for family in split_ids.keys() - {one.family.family for one in loaded}:
        problems.append(f"split_ids of the configuration: there is no family {family!r} (`bitquake config show`)")
    for one in loaded:
        name = one.family.family
        try:
            one = with_ids(one, split_ids.get(name))
            error = clash(one, taken)
            if error is not None:
                raise error
            files = task_files(one)
        except FamilyError as error:
            problems += str(error).splitlines()
            continue
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text, encoding="utf-8")
        tasks[name] = []
        for variant in variants_of(one.family):
            tasks[name].append(variant.task)
            taken[variant.task] = f"a task of the family {name!r} ({one.file})"
            for tag in variant.tags:
                tags.setdefault(tag, []).append(variant.task)
                if tag not in (*one.family.tags, dev_tag(one.family.world)):
                    taken[tag] = f"a tag of the family {name!r} ({one.file})"
    files = {one.family.family: str(one.file) for one in loaded if one.family.family in tasks}
    return {"tasks": tasks, "tags": tags, "problems": problems, "families": files}
