"""The user's configuration: folders with families of their own, and published splits as lists of sample ids.

    families: [~/families]
    split_ids: {vqav2: ~/reliable_vqa.json}

One YAML file in the user's configuration folder, read by ``bitquake.tasks.expand`` whenever tasks are looked up;
``bitquake config`` writes it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitquake.tasks.strict_yaml import StrictYamlError, line_of, load_with_lines, read_bounded

CONFIG_FILE = "config.yaml"


class ConfigError(ValueError):
    """A configuration file that is not valid; the message names the file and, where there is one, the line."""


class Config(BaseModel):
    """What the user configured.

    file: where it was read from, or would be written to.
    families: folders with family files (``FOLDER/family.yaml``, ``FOLDER/*/family.yaml``), registered in lmms-eval.
    split_ids: family -> JSON file with its published split (``bitquake.tasks.split_ids``).
    Relative paths count from the configuration's folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    families: tuple[Path, ...] = ()
    split_ids: dict[str, Path] = Field(default_factory=dict)


def config_file() -> Path:
    """The configuration file of this user."""
    return platformdirs.user_config_path("bitquake", appauthor=False) / CONFIG_FILE


def load_config(file: Path | None = None) -> Config:
    """The configuration, all defaults where there is no file.

    Raises:
        ConfigError: not readable, not plain YAML, an unknown key or a wrong type; every problem is named.
    """
    file = file or config_file()
    try:
        data, lines = load_with_lines(read_bounded(file))
    except FileNotFoundError:
        return Config(file=file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error
    except StrictYamlError as error:
        at = file if error.line is None else f"{file}:{error.line}"
        raise ConfigError(f"{at}: not plain YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict) or "file" in data:
        raise ConfigError(f"{file}: expected the keys `families` and `split_ids`, got {str(data)[:80]}")
    try:
        config = Config.model_validate(data | {"file": file})
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(file, lines, problem) for problem in error.errors())) from error
    return config.model_copy(
        update={
            "families": tuple(_absolute(file, folder) for folder in config.families),
            "split_ids": {family: _absolute(file, ids) for family, ids in config.split_ids.items()},
        }
    )


def save_config(config: Config) -> None:
    """Write the configuration to its file, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    data = {
        "families": [str(folder) for folder in config.families],
        "split_ids": {family: str(file) for family, file in config.split_ids.items()},
    }
    text = "# Written by `bitquake config`.\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    try:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{CONFIG_FILE}-", dir=config.file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, config.file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{config.file}: cannot be written ({error.strerror or error})") from error


def set_families(config: Config, folders: Sequence[Path]) -> Config:
    """The configuration with these folders of families instead of its own; each must hold one.

    Raises:
        FamilyError: a folder that does not exist or holds no family file.
    """
    from bitquake.tasks.families import family_files

    family_files(folders, built_in=False)
    return config.model_copy(update={"families": tuple(dict.fromkeys(folder.resolve() for folder in folders))})


def set_split_ids(config: Config, family: str, file: Path) -> Config:
    """The configuration with a published split for a family.

    Raises:
        FamilyError: the file does not hold what it must, or does not fit the family.
        ConfigError: there is no such family.
    """
    from bitquake.tasks.families import load_families
    from bitquake.tasks.split_ids import with_ids

    folders = [folder for folder in config.families if folder.is_dir()]
    known = {one.family.family: one for one in load_families(folders)[0]}
    if family not in known:
        raise ConfigError(f"there is no family {family!r}; there are {', '.join(known)}")
    with_ids(known[family], file)
    return config.model_copy(update={"split_ids": {**config.split_ids, family: file.resolve()}})


def unset(config: Config, key: str, names: Sequence[str]) -> Config:
    """The configuration without some of what stands under a key, or without all of it where none is named.

    Raises:
        ConfigError: one of the names does not stand there.
    """
    present: Mapping[str, Path] = {str(folder): folder for folder in config.families}
    if key == "split_ids":
        present = config.split_ids
    gone = set(present) if not names else set()
    for name in names:
        as_path = str(Path(name).resolve())
        if name not in present and as_path not in present:
            raise ConfigError(f"{key}: {name!r} is not set; set are: {', '.join(present) or 'none'}")
        gone.add(name if name in present else as_path)
    left: Any = {name: path for name, path in present.items() if name not in gone}
    return config.model_copy(update={key: left if key == "split_ids" else tuple(left.values())})


def _absolute(file: Path, path: Path) -> Path:
    return (file.parent / path.expanduser()).resolve()


def _problem(file: Path, lines: Mapping[tuple[str | int, ...], int], problem: Mapping[str, Any]) -> str:
    place = ".".join(map(str, problem["loc"]))
    line = line_of(lines, problem["loc"])
    what = problem["msg"]
    if problem["type"] == "extra_forbidden":
        what = "unknown key; known: families, split_ids"
    return f"{file}{f':{line}' if line else ''}: {place}: {what} (got {str(problem['input'])[:80]!r})"
