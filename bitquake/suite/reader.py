"""Suite files: where they are, how one is read for a world, and errors that say file, line, what was got, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from bitquake.suite.schema import (
    TWIN_KEYS,
    Calibration,
    Exclusion,
    Model,
    Quantization,
    Suite,
    SuiteError,
    Task,
)
from bitquake.suite_plan import World
from bitquake.tasks.strict_yaml import Place, line_of, load_mapping

_MODELS: tuple[type[BaseModel], ...] = (Suite, Model, Quantization, Calibration, Task, Exclusion)


class LoadedSuite(NamedTuple):
    """A suite as it is for one world, the file it was read from, and on which line of it each value stands."""

    suite: Suite
    world: World
    file: Path
    lines: Mapping[Place, int] = {}

    def problem(self, place: Iterable[str | int], message: str) -> SuiteError:
        """An error about a value of the file, with its line."""
        place = list(place)
        where = ".".join(map(str, place))
        return SuiteError(f"{_at(self.file, self.lines, place)}: {f'{where}: ' if where else ''}{message}")


def suite_names() -> list[str]:
    """Suites that ship with Bitquake."""
    folder = resources.files("bitquake.suites")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_suite(suite: str | Path, world: World = "real") -> LoadedSuite:
    """Read a suite.

    Args:
        suite: name of one that ships with Bitquake, or the path of a YAML file.
        world: ``block``: as its twin in the block world.

    Raises:
        SuiteError: no such suite, not plain YAML, not valid (every problem is named, a line each), no twin.
    """
    file = _file_of(str(suite))
    data, lines = load_mapping(file, "that begins with `suite: name`", SuiteError)
    if world not in get_args(World):
        raise SuiteError(f"world {world!r}: expected {' or '.join(get_args(World))}")
    data, placed = _in_world(data, lines, file, world)
    try:
        loaded = LoadedSuite(Suite.model_validate(data), world, file, placed)
    except ValidationError as error:
        raise SuiteError("\n".join(_problems(error, file, placed))) from error
    if loaded.suite.suite != file.stem:
        raise loaded.problem(["suite"], f"{loaded.suite.suite!r} must stand in a file called {loaded.suite.suite}.yaml")
    return loaded


def _file_of(suite: str) -> Path:
    path = Path(suite).expanduser()
    if path.is_file():
        return path
    names = suite_names()
    if suite in names:
        return Path(str(resources.files("bitquake.suites") / f"{suite}.yaml"))
    close = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    what = "is a folder" if path.is_dir() else "is no suite file"
    raise SuiteError(
        f"suite {suite!r}: {what} and no suite that ships with Bitquake; {hint}shipped: {', '.join(names) or 'none'}"
    )


def _in_world(
    data: dict[str, Any], lines: Mapping[Place, int], file: Path, world: World
) -> tuple[dict[str, Any], Mapping[Place, int]]:
    """The suite's data for a world, and the lines of what it is made of."""
    twin = data.get("block")
    if isinstance(twin, dict):
        known = [key for key in Suite.model_fields if key not in TWIN_KEYS]
        for key in twin:
            if key not in known:
                at = _at(file, lines, ["block", str(key)])
                raise SuiteError(f"{at}: block.{key}: {_unknown(str(key), known)}")
    if world == "real":
        return data, lines
    if not isinstance(twin, dict) or not twin:
        raise SuiteError(
            f"{file}: has no twin in the block world; add `block:` with the keys that differ there (models, tasks, …), "
            "or run it without --world block"
        )
    own = {key: value for key, value in data.items() if key != "block"}
    moved = {place: line for place, line in lines.items() if place[:1] != ("block",) and place[:1] not in _tops(twin)}
    moved |= {place[1:]: line for place, line in lines.items() if place[:1] == ("block",) and len(place) > 1}
    return own | twin, moved


def _tops(twin: Mapping[str, Any]) -> set[Place]:
    return {(key,) for key in twin}


def _problems(error: ValidationError, file: Path, lines: Mapping[Place, int]) -> list[str]:
    out: list[str] = []
    for problem in error.errors(include_url=False):
        place = [part for part in problem["loc"] if not _is_branch(part)]
        where = ".".join(map(str, place))
        what = problem["msg"].removeprefix("Value error, ")
        got = problem["input"]
        shown = "" if isinstance(got, (dict, BaseModel)) else f" (got {_short(got)})"
        if problem["type"] == "extra_forbidden":
            known = sorted({name for model in _MODELS for name in model.model_fields})
            what, shown = _unknown(str(place[-1]), known), ""
        elif problem["type"] == "missing":
            what, shown = "this key is missing; add it", ""
        line = f"{_at(file, lines, place)}: {f'{where}: ' if where else ''}{what}{shown}"
        if line not in out:
            out.append(line)
    return out


def _is_branch(part: str | int) -> bool:
    """Whether pydantic put the name of a branch of a union here, which is no key of the file."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _unknown(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, [name for name in known if name != key], n=1)
    return "unknown key; remove it" + (f", or did you mean {close[0]!r}?" if close else " or check its place")


def _at(file: Path, lines: Mapping[Place, int], place: Iterable[str | int]) -> str:
    line = line_of(lines, list(place))
    return str(file) if line is None else f"{file}:{line}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
