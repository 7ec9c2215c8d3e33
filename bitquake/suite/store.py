"""A suite's output folder, on this machine's disk or on anything that fsspec reaches (``s3://…``, ``memory://…``).

On a disk a cell is written beside its place, brought to the disk, and renamed: it is there whole or not at all.
Elsewhere its files are written first and ``cell.json`` last: without that, or when a file it names is missing, the cell
does not count. What models need as ordinary folders (artifacts, journal, trained models) is in the folder itself on a
disk, and else in a scratch folder of the machine, from where artifacts and trained models follow, once they are whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from bitquake.suite_plan import CELL_FILE, PLAN_FILE, PLAN_VERSION, CellManifest, SuitePlan

CELLS, FAILURES, RUNNING, DAMAGED = "cells", "failures", "running", "damaged"
ARTIFACTS, MODELS = "artifacts", "models"
TRAINED_FILE = "trained.json"
"""Beside a trained model that is not on this machine's disk, written last: path -> hash of its bytes."""
CURVE_FILE = "curve.jsonl"
SCRATCH = ".scratch"
WORK = "work"
"""Folder in a scratch folder: cells in the making, of no use to anybody once their worker is gone."""
_REQUESTS = 16
"""At once, to a url: each is mostly waiting."""
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


_Found = TypeVar("_Found")


class StoreError(ValueError):
    """An output folder that cannot be used."""


class Damage(NamedTuple):
    """Why a cell that is there does not count."""

    reason: str


class Places(NamedTuple):
    """Ordinary folders of this machine that a cell's model works with; logs: what workers print."""

    quants: Path
    artifacts: Path
    journal: Path
    models: Path
    logs: Path


def is_remote(out: str) -> bool:
    """Whether an output folder is a url for fsspec."""
    return "://" in out and not out.startswith("file://")


def open_store(out: str | Path) -> Store:
    """The output folder of that path or url; nothing is written yet.

    Raises:
        StoreError: a path that lmms-eval's ``model_args`` cannot carry, or a url that fsspec cannot open.
    """
    text = str(out).removeprefix("file://")
    if is_remote(text):
        return Store(_RemoteFiles(text), text)
    path = Path(text).expanduser().resolve()
    if set(str(path)) & set(",="):
        raise StoreError(f"--out {path}: lmms-eval cannot read a path with a comma or an equals sign; give another one")
    if path.exists() and not path.is_dir():
        raise StoreError(f"--out {path}: is a file; give a folder")
    return Store(_LocalFiles(path), str(path))


class Store:
    """What is in an output folder, and how it gets there.

    Attributes:
        url: its path or url. local: its path where it is on this machine's disk, else None.
    """

    def __init__(self, files: _LocalFiles | _RemoteFiles, url: str) -> None:
        self._files = files
        self.url = url
        self.local = files.root if isinstance(files, _LocalFiles) else None

    def places(self, scratch: Path) -> Places:
        """Where models keep their files: in the folder itself, or in ``scratch`` when it is not on this machine."""
        root = self.local or scratch
        return Places(*(root / name for name in ("quants", ARTIFACTS, "journal", MODELS, "logs")))

    # the plan

    def plan(self) -> SuitePlan | None:
        """The plan that is there, or None.

        Raises:
            StoreError: of another version, or not readable.
        """
        data = self._files.read(PLAN_FILE)
        if data is None:
            return None
        return _parsed(SuitePlan, data, f"{self.url}/{PLAN_FILE}")

    def write_plan(self, plan: SuitePlan) -> None:
        """Put a plan there, in the place of an earlier one of the same suite.

        Raises:
            StoreError: another suite's results are there.
        """
        before = self.plan()
        if before is not None and (before.suite, before.world) != (plan.suite, plan.world):
            raise StoreError(
                f"{self.url}: holds suite {before.suite!r} ({before.world} world), not {plan.suite!r} ({plan.world}); "
                "give another --out"
            )
        self._files.write(PLAN_FILE, plan.model_dump_json(indent=1).encode())

    def check_version(self) -> None:
        """Refuse a folder that another version of the plan's form wrote.

        Raises:
            StoreError: it says which, and what to do.
        """
        self.plan()
        names = self._files.names(CELLS)
        for name, data in zip(names, self._each(self._manifest, names), strict=True):
            told = _json(data) if data is not None else {}
            if "version" in told and told["version"] != PLAN_VERSION:
                raise _other_version(f"{self.url}/{CELLS}/{name}/{CELL_FILE}", told)

    # cells

    def cells(self, hashes: Iterable[str], *, deep: bool = False) -> dict[str, CellManifest | Damage]:
        """What :meth:`cell` finds of each, those that are there."""
        wanted = list(dict.fromkeys(hashes))
        found = self._each(lambda one: self.cell(one, deep=deep), wanted)
        return {one: told for one, told in zip(wanted, found, strict=True) if told is not None}

    def cell(self, cell_hash: str, *, deep: bool = False) -> CellManifest | Damage | None:
        """A finished cell; why it does not count; or None where there is none.

        Args:
            deep: compare the bytes of its files with the manifest too, where they are on this machine.

        Raises:
            StoreError: it is of another version.
        """
        key = f"{CELLS}/{cell_hash}"
        data = self._manifest(cell_hash)
        if data is None:
            return Damage(f"{CELL_FILE} is missing") if self.local and (self.local / key).exists() else None
        told = _json(data)
        if told.get("version", PLAN_VERSION) != PLAN_VERSION:
            raise _other_version(f"{self.url}/{key}/{CELL_FILE}", told)
        try:
            manifest = CellManifest.model_validate_json(data)
        except ValidationError:
            return Damage(f"{CELL_FILE} cannot be read")
        if manifest.hash != cell_hash:
            return Damage(f"{CELL_FILE} is of another cell ({manifest.hash})")
        there = self._files.files(key)
        for path, told_hash in manifest.files.items():
            if path not in there:
                return Damage(f"{path} is missing")
            if deep and self.local is not None and file_hash(self.local / key / path) != told_hash:
                return Damage(f"{path} was changed")
        return manifest

    def publish_cell(self, folder: Path, manifest: CellManifest) -> None:
        """Make a finished cell of a folder with its files, which is gone afterwards.

        Raises:
            OSError: it cannot be written; nothing of it counts then.
        """
        (folder / CELL_FILE).write_bytes(manifest.model_dump_json(indent=1).encode())
        self._files.publish(folder, f"{CELLS}/{manifest.hash}", last=CELL_FILE)
        self.clear_failure(manifest.hash)

    def set_aside(self, cell_hash: str) -> str:
        """Move a damaged cell out of the way; returns where it is now."""
        return self._files.move(f"{CELLS}/{cell_hash}", f"{DAMAGED}/{cell_hash}-{uuid.uuid4().hex[:8]}")

    def follow(self, places: Places) -> None:
        """Bring artifacts that are new on this machine to a folder that is not on it."""
        if self.local is None and places.artifacts.is_dir():
            self._files.upload(places.artifacts, ARTIFACTS)

    def mirror(self, folder: Path) -> Path:
        """The folder on this machine: itself, or a copy in ``folder`` of what reports read.

        That is plan, finished cells, failures, artifacts and the curves of trainings. Of a cell its manifest comes
        first, then what that names: workers that died before theirs, or are at it now, leave other files there.
        """
        if self.local is not None:
            return self.local
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CELLS, FAILURES):
            shutil.rmtree(folder / name, ignore_errors=True)
        plan = self.plan()
        trainings = {cell.training_hash for cell in plan.cells if cell.training_hash} if plan else set()
        curves = (f"{MODELS}/{one}/{CURVE_FILE}" for one in sorted(trainings))
        self._files.download("", folder, (PLAN_FILE, FAILURES, ARTIFACTS, *curves))
        self._each(lambda name: self._copy_cell(name, folder / CELLS / name), self._files.names(CELLS))
        return folder

    def _copy_cell(self, name: str, folder: Path) -> None:
        data = self._manifest(name)
        if data is not None:
            key = f"{CELLS}/{name}"
            self._files.download(key, folder, self._named(key, _json(data).get("files")))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CELL_FILE).write_bytes(data)

    def _manifest(self, cell_hash: str) -> bytes | None:
        return self._files.read(f"{CELLS}/{cell_hash}/{CELL_FILE}")

    def _each(self, work: Callable[[str], _Found], names: Iterable[str]) -> list[_Found]:
        """What ``work`` makes of each, in order; of a url several at once."""
        if self.local is not None:
            return [work(name) for name in names]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(work, names))

    def _named(self, key: str, files: object) -> tuple[str, ...]:
        """What a manifest names of the files that are there."""
        return tuple(sorted(self._files.files(key).intersection(files if isinstance(files, dict) else ())))

    def fetch_training(self, training_hash: str, folder: Path, last: str) -> None:
        """Bring a training that another machine has finished, if there is one, from a folder that is not on this one.

        Args:
            folder: of the training, which nobody else may use meanwhile. last: its file that says that it is done.
        """
        key = f"{MODELS}/{training_hash}"
        data = None if self.local is not None else self._files.read(f"{key}/{TRAINED_FILE}")
        if data is None:
            return
        told = _json(data)
        near = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            names = self._named(key, told)
            self._files.download(key, near, names)
            if last not in names or {name: file_hash(near / name) for name in names} != told:
                # two machines have written there at once: whoever trains it next writes it anew
                self._files.delete(f"{key}/{TRAINED_FILE}")
                return
            for name in sorted(names, key=lambda name: name == last):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (near / name).replace(folder / name)
        finally:
            shutil.rmtree(near, ignore_errors=True)

    def follow_training(self, training_hash: str, folder: Path, leave_out: str) -> None:
        """Bring a finished training to a folder that is not on this machine, where it is not there yet.

        Args:
            leave_out: folder inside it that only the training itself needs.
        """
        key = f"{MODELS}/{training_hash}"
        if self.local is not None or self._files.read(f"{key}/{TRAINED_FILE}") is not None:
            return
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        kept = {
            name: path
            for name, path in files.items()
            if not path.name.startswith(".") and name.partition("/")[0] != leave_out
        }
        for name, path in kept.items():
            self._files.put(path, f"{key}/{name}")
        told = {name: file_hash(path) for name, path in kept.items()}
        self._files.write(f"{key}/{TRAINED_FILE}", json.dumps(told, indent=1).encode())

    def upload(self, folder: Path, key: str) -> None:
        """Copy a folder of this machine into the output folder."""
        self._files.upload(folder, key, replace=True)

    # failures and heartbeats

    def failures(self) -> dict[str, dict[str, Any]]:
        """Hash of a failed cell -> what is known of its failure."""
        return self._notes(FAILURES)

    def failure(self, cell_hash: str) -> dict[str, Any]:
        """What is known of one cell's failure; empty without one."""
        data = self._files.read(f"{FAILURES}/{cell_hash}.json")
        return {} if data is None else _json(data)

    def write_failure(self, cell_hash: str, told: dict[str, Any]) -> None:
        """Record why a cell failed. A disk that is full is no reason to raise: the caller says it all the same."""
        with contextlib.suppress(OSError):
            self._files.write(f"{FAILURES}/{cell_hash}.json", json.dumps(told, indent=1).encode())

    def clear_failure(self, cell_hash: str) -> None:
        self._files.delete(f"{FAILURES}/{cell_hash}.json")

    def heartbeats(self) -> dict[str, dict[str, Any]]:
        """Hash of a cell in work -> what its worker said last."""
        return self._notes(RUNNING)

    def write_heartbeat(self, cell_hash: str, told: dict[str, Any]) -> None:
        self._files.write(f"{RUNNING}/{cell_hash}.json", json.dumps(told).encode(), sync=False)

    def clear_heartbeat(self, cell_hash: str) -> None:
        self._files.delete(f"{RUNNING}/{cell_hash}.json")

    def _notes(self, folder: str) -> dict[str, dict[str, Any]]:
        names = [name for name in self._files.names(folder) if name.endswith(".json")]
        read = self._each(lambda name: self._files.read(f"{folder}/{name}"), names)
        return {
            name.removesuffix(".json"): _json(data) for name, data in zip(names, read, strict=True) if data is not None
        }

    def read(self, key: str) -> bytes | None:
        return self._files.read(key)

    def write(self, key: str, data: bytes) -> None:
        self._files.write(key, data)


def file_hash(path: Path) -> str:
    """blake2b-128 hex of a file's bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that nothing more can be written."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            return True
        if any(os.strerror(number) in str(error) for number in _FULL_DISK):  # of libraries with errors of their own
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def disk_takes(folder: Path, n_bytes: int = 1 << 20) -> bool:
    """Whether so much can still be written to a folder: found by writing it, for quotas and limits count too."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("xb") as file:
            file.write(bytes(n_bytes))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return not is_full_disk(error)
    finally:
        probe.unlink(missing_ok=True)
    return True


def _other_version(where: str, told: dict[str, Any]) -> StoreError:
    return StoreError(
        f"{where}: is of version {told.get('version')!r} (Bitquake {told.get('bitquake', 'unknown')}), this Bitquake "
        f"writes version {PLAN_VERSION}. Its results are kept: go on with that release, or give a new --out"
    )


def _json(data: bytes) -> dict[str, Any]:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _parsed(model: type[SuitePlan], data: bytes, where: str) -> SuitePlan:
    told = _json(data)
    if told.get("version") != PLAN_VERSION and "version" in told:
        raise _other_version(where, told)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(
            f"{where}: is no plan of a suite ({error.error_count()} problems); give another --out"
        ) from error


class _LocalFiles:
    """Files below a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes, *, sync: bool = True) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with new.open("xb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        if sync:
            _sync(path.parent)

    def delete(self, key: str) -> None:
        with contextlib.suppress(OSError):
            (self.root / key).unlink(missing_ok=True)

    def names(self, key: str) -> list[str]:
        folder = self.root / key
        return sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []

    def files(self, key: str) -> set[str]:
        folder = self.root / key
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def move(self, key: str, to: str) -> str:
        target = self.root / to
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).rename(target)
        return str(target)

    def publish(self, folder: Path, key: str, last: str) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno == errno.EXDEV:  # the scratch folder is on another disk
                near = self.root / SCRATCH / WORK / f"{target.name}-{uuid.uuid4().hex[:8]}"
                try:
                    shutil.copytree(folder, near)
                    self.publish(near, key, last)
                finally:
                    shutil.rmtree(near, ignore_errors=True)
            elif error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another worker has finished the same cell
        _sync(target.parent)

    def put(self, path: Path, key: str) -> None:
        target = self.root / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)

    def upload(self, folder: Path, key: str, *, replace: bool = False) -> None:
        shutil.copytree(folder, self.root / key, dirs_exist_ok=True)

    def download(self, key: str, folder: Path, names: tuple[str, ...]) -> None:
        for name in names:
            source = self.root / key / name
            if source.is_dir():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
            elif source.is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / name)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class _RemoteFiles:
    """Files below a url that fsspec opens."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StoreError(f"--out {url}: cannot be opened ({error}); install what fsspec needs for it") from error

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}".rstrip("/")

    def read(self, key: str) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(self._path(key))
        except (FileNotFoundError, IsADirectoryError):
            return None
        return data

    def write(self, key: str, data: bytes, *, sync: bool = True) -> None:
        path = self._path(key)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, data)

    def delete(self, key: str) -> None:
        with contextlib.suppress(OSError):
            self._fs.rm_file(self._path(key))

    def names(self, key: str) -> list[str]:
        try:
            self._fs.invalidate_cache()
            return sorted({path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path(key), detail=False)})
        except (FileNotFoundError, NotADirectoryError):
            return []

    def files(self, key: str) -> set[str]:
        self._fs.invalidate_cache()
        return {name for name, _ in self._below(self._path(key))}

    def _below(self, path: str) -> Iterator[tuple[str, str]]:
        """(relative name, path) of every file below a path."""
        for found in self._fs.find(path):
            # url_to_fs and find need not agree about a leading slash
            yield found.lstrip("/").removeprefix(path.lstrip("/")).lstrip("/"), found

    def move(self, key: str, to: str) -> str:
        for name, path in list(self._below(self._path(key))):
            self.write(f"{to}/{name}", self._fs.cat_file(path))
        self._fs.rm(self._path(key), recursive=True)
        return f"{self._fs.unstrip_protocol(self._path(to))}"

    def publish(self, folder: Path, key: str, last: str) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix() == last):
            self.put(path, f"{key}/{path.relative_to(folder).as_posix()}")

    def put(self, path: Path, key: str) -> None:
        target = self._path(key)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(path), target)

    def upload(self, folder: Path, key: str, *, replace: bool = False) -> None:
        there = set() if replace else self.files(key)
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            # artifacts are called after their content; what a write has not finished yet begins with a dot
            if path.is_file() and name not in there and not path.name.startswith("."):
                self.put(path, f"{key}/{name}")

    def download(self, key: str, folder: Path, names: tuple[str, ...]) -> None:
        for name in names:
            source = self._path(f"{key}/{name}".lstrip("/"))
            if self._fs.isfile(source):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(source, str(folder / name))
                continue
            for relative, path in self._below(source) if self._fs.exists(source) else ():
                target = folder / name / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                if name != ARTIFACTS or not target.exists():
                    self._fs.get_file(path, str(target))
