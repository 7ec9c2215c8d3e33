"""YAML that holds data and nothing else: no tags that run code, no aliases, no key given twice, nothing huge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 250_000
"""A family file has a kilobyte or two; whatever is larger than this is not one."""
MAX_DEPTH = 40

Place = tuple[str | int, ...]
"""Where a value stands: the keys and list positions that lead to it."""


class StrictYamlError(ValueError):
    """A text that is not plain YAML.

    line: where, from 1; None where the whole text is meant.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses tags, aliases (they can explode), repeated keys (the last would win silently), depth."""

    depth = 0

    def compose_node(self, parent: yaml.nodes.Node | None, index: Any) -> yaml.nodes.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.events.AliasEvent):
            raise _error("aliases (*name) are not allowed; write the value out", event.start_mark)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _error(f"tags ({tag}) are not allowed; write plain data", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.nodes.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.nodes.ScalarNode):
                raise _error("a key must be a plain text", key.start_mark)
            if key.value in seen:
                raise _error(f"key {key.value!r} given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def load_strict(text: str) -> Any:
    """The data in a YAML text.

    Raises:
        StrictYamlError: not YAML, a tag (``!function``, ``!!python/…``), an alias, a repeated key, more than
            ``MAX_DEPTH`` levels, or a value that its form promises and that does not exist (a 99th of May).
    """
    return load_with_lines(text)[0]


def load_with_lines(text: str) -> tuple[Any, dict[Place, int]]:
    """The data in a YAML text, and the line (from 1) on which each of its values begins.

    Raises:
        StrictYamlError: as ``load_strict``.
    """
    lines: dict[Place, int] = {}
    node = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _note_lines(node, (), lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        where = f" (column {mark.column + 1})" if mark else ""
        raise StrictYamlError(what + where, mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise StrictYamlError(" ".join(str(error).split())) from error


def read_bounded(file: Path) -> str:
    """The text of a file that people write by hand.

    Raises:
        StrictYamlError: larger than ``MAX_BYTES``, or not UTF-8.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise StrictYamlError(f"larger than {MAX_BYTES:,} bytes; data belongs into files of its own")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictYamlError(f"no UTF-8 text ({error})") from error


def load_mapping(
    file: Path, expected: str, error: Callable[[str], Exception]
) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping in a file that people write by hand, and the line of each of its values.

    Args:
        expected: what the mapping holds, for the message where there is none.
        error: makes what is raised of its message.

    Raises:
        ``error``: it cannot be read, is not plain YAML, or holds no mapping.
    """
    try:
        data, lines = load_with_lines(read_bounded(file))
    except OSError as found:
        raise error(f"{file}: cannot be read ({found.strerror or found})") from found
    except StrictYamlError as found:
        at = file if found.line is None else f"{file}:{found.line}"
        raise error(f"{at}: not plain YAML: {found}") from found
    if not isinstance(data, dict):
        raise error(f"{file}: expected a mapping {expected}, got {type(data).__name__}")
    return data, lines


def line_of(lines: Mapping[Place, int], place: Sequence[str | int]) -> int | None:
    """The line of a value, or of the nearest thing around it that stands in the text; None for an empty text.

    Parts of ``place`` that are no keys (the names that pydantic gives to the branches of a union) are passed over.
    """
    found: Place = ()
    for part in place:
        if (*found, part) in lines:
            found = (*found, part)
    return lines.get(found)


class _TaskLoader(yaml.SafeLoader):
    """Reads an expanded task file without importing what its ``!function`` tags name: they become their text."""


def _as_text(loader: yaml.SafeLoader, node: yaml.nodes.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_TaskLoader.add_constructor("!function", _as_text)


def load_task_yaml(text: str) -> Any:
    """The data in an lmms-eval task file; ``!function a.b`` reads as the text ``a.b``."""
    return yaml.load(text, Loader=_TaskLoader)  # noqa: S506 - a SafeLoader


def _note_lines(node: yaml.nodes.Node, place: Place, lines: dict[Place, int]) -> None:
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.nodes.MappingNode):
        for key, value in node.value:
            inside = (*place, str(key.value))
            _note_lines(value, inside, lines)
            lines[inside] = key.start_mark.line + 1
    elif isinstance(node, yaml.nodes.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*place, i), lines)


def _error(message: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)
