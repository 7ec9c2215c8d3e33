"""What a cell is, as a hash: everything that decides its answers, and nothing that does not.

In the hash: the checkpoint (files of one on this machine, name and revision of the hub's), the spec with its name and
calibration (seed and data included), the training, ``model_args`` that reach the answers, and the tasks with limits and
versions. Not in it: folders, devices, threads, the names that a suite gives to models, and the versions of Bitquake and
of the plan's form: a new release goes on with what is finished.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitquake.model_wrappers.checkpoints import PREFIX, resolve
from bitquake.model_wrappers.journal import digest
from bitquake.model_wrappers.training.config import LoraConfig, QatConfig, training_hash
from bitquake.suite.task_list import Version, family_versions

_NO_ANSWER = ("workers", "device_map", "max_batch_size")
"""Arguments of ``bitquake_hf`` that change nothing but the speed."""
_WHOLE = 1 << 26
"""Bytes: of a larger file, ``_PROBES`` evenly spaced blocks stand for the whole."""
_PROBES, _BLOCK = 1024, 4096
_PROSE = (".md", ".png", ".jpg")
"""Beside a checkpoint's weights; pictures of a data folder are its data."""
_ABOUT = ("training.json",)


def checkpoint_identity(pretrained: str, revision: str | None = None) -> list[str]:
    """What tells a checkpoint from others: its files where it is a folder, name and revision on the hub.

    Raises:
        ValueError: a ``bitquake/`` name that does not ship.
    """
    if pretrained.startswith(PREFIX):
        return ["bytes", _folder_hash(resolve(pretrained))]
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return ["bytes", _folder_hash(folder.resolve())]
    return ["hub", pretrained, revision or ""]


def cell_hashes(
    *,
    pretrained: str,
    revision: str | None,
    spec: Mapping[str, Any],
    training_hash: str,
    arguments: Mapping[str, Any],
    tasks: Mapping[str, int | None],
    versions: Mapping[str, Version],
) -> tuple[str, str]:
    """The hash that names a cell's folder, and one without the spec's name, which is equal for cells that are the same.

    Args:
        tasks: task -> limit; versions: task -> version of its family, None of a stock task.
    """
    told = dict(spec)
    calibration = told.get("calibration")
    if calibration and calibration.get("data"):
        told["calibration"] = {**calibration, "data": data_identity(calibration["data"])}
    reaching = {key: value for key, value in arguments.items() if key not in _NO_ANSWER}
    if isinstance(reaching.get("adapter"), str):
        reaching["adapter"] = checkpoint_identity(str(reaching["adapter"]))
    entries = {
        "checkpoint": checkpoint_identity(pretrained, revision),
        "training": training_hash,
        "arguments": reaching,
        "tasks": {task: [limit, versions[task]] for task, limit in tasks.items()},
    }
    nameless = {key: value for key, value in told.items() if key != "name"}
    return digest({**entries, "spec": told}), digest({**entries, "spec": nameless})


def data_identity(data: str) -> list[Any]:
    """What tells data for calibration or training from others: a folder's files, a family's name and versions."""
    folder = Path(data).expanduser()
    if folder.is_dir():
        return ["bytes", _folder_hash(folder.resolve(), prose=True)]
    return [data, *family_versions(data)]


def training_identity(config: QatConfig | LoraConfig) -> str:
    """The hash that names a training's folder: its configuration, the checkpoints it begins with, and its data."""
    teacher = config.teacher if isinstance(config, QatConfig) else None
    begins = [checkpoint_identity(one) for one in (config.pretrained, teacher) if one]
    return digest([training_hash(config), begins, [data_identity(one.data) for one in config.data]])


@lru_cache(maxsize=256)
def _folder_hash(folder: Path, prose: bool = False) -> str:
    """blake2b of names, sizes and bytes (of a large file: of blocks of it) of a folder's files; prose: of prose too."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or ".cache" in inside.parts:
            continue
        if not prose and (path.suffix.lower() in _PROSE or path.name in _ABOUT):
            continue
        size = path.stat().st_size
        hashed.update(f"{inside.as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                hashed.update(file.read())
                continue
            for probe in range(_PROBES):
                file.seek(probe * (size - _BLOCK) // (_PROBES - 1))
                hashed.update(file.read(_BLOCK))
    return hashed.hexdigest()
