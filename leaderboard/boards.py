"""Boards: which tasks a submission answers, with how many samples each, and the gold file that their answers meet.

A board is one YAML file of ``boards/``. It pins each task's gold file by its sha256: without the hash, nobody could say
which references a row was scored against, and its rows stay self-reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitquake.tasks.strict_yaml import StrictYamlError, line_of, load_with_lines, read_bounded

SHIPPED = Path(__file__).parent / "boards"
NAME = r"[a-z0-9][a-z0-9_]{0,63}"
_TASK_LINE = r'^(\s*- \{{task: {task},.*\bgold: )(?:null|"?[0-9a-f]{{64}}"?)(\s*\}}.*)$'


class BoardError(ValueError):
    """A board that is not there, or whose file is not valid."""


class BoardTask(BaseModel):
    """One task of a board: n: samples, the first of the task as ``--limit`` counts them; gold: sha256 of the canonical
    text of its gold file, None as long as nobody has pinned one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: Annotated[str, Field(pattern=rf"^{NAME}$")]
    n: Annotated[int, Field(ge=1, le=1_000_000)]
    gold: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


class Board(BaseModel):
    """A board.

    board, title, about: its name, its heading, and a sentence or two on what it is for. world: ``block`` or ``real``;
    the two never share a table. confidences: what a submission keeps besides the primary confidence and every
    ``selector…``. tasks: all of them, each answered whole by every submission: no cell can be picked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    board: Annotated[str, Field(pattern=rf"^{NAME}$")]
    title: Annotated[str, Field(min_length=1, max_length=120)]
    world: Literal["block", "real"]
    about: Annotated[str, Field(max_length=2000)] = ""
    confidences: list[str] = Field(default_factory=lambda: ["geometric_mean"])
    tasks: Annotated[list[BoardTask], Field(min_length=1)]

    @model_validator(mode="after")
    def _tasks_once(self) -> Board:
        names = [task.task for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks: {', '.join(twice)} stands there twice")
        return self

    @property
    def by_task(self) -> dict[str, BoardTask]:
        return {task.task: task for task in self.tasks}

    @property
    def n(self) -> int:
        """Samples of all tasks."""
        return sum(task.n for task in self.tasks)


def board_names(folder: Path | None = None) -> list[str]:
    """The boards of a folder; None: those that come with the package."""
    return sorted(path.stem for path in (folder or SHIPPED).glob("*.yaml"))


def load_board(name: str, folder: Path | None = None) -> Board:
    """A board by its name.

    Args:
        name: foreign data may give it.
        folder: holds the boards' files; None: those of the package.

    Raises:
        BoardError: no such board, or a file that is not valid.
    """
    if not re.fullmatch(NAME, name) or name not in board_names(folder):
        raise BoardError(f"board {name[:64]!a}: there is none of this name; boards: {', '.join(board_names(folder))}")
    return read_board((folder or SHIPPED) / f"{name}.yaml")


def with_gold(text: str, hashes: dict[str, str]) -> str:
    """A board's YAML text with the gold hashes of some of its tasks put in place, everything else as it was.

    Raises:
        BoardError: a task has no line of the form ``- {task: NAME, n: N, gold: …}``.
    """
    for task, sha256 in hashes.items():
        pattern = _TASK_LINE.format(task=re.escape(task))
        text, n = re.subn(pattern, rf'\g<1>"{sha256}"\g<2>', text, flags=re.MULTILINE)
        if n != 1:
            raise BoardError(f"{task}: expected one line `- {{task: {task}, n: …, gold: …}}`, found {n}")
    return text


def tasks_by_limit(samples: Mapping[str, int]) -> dict[int, list[str]]:
    """Number of samples -> tasks, from task -> number: ``--limit`` holds for all tasks of a command of lmms-eval."""
    by_n: dict[int, list[str]] = {}
    for task, n in samples.items():
        by_n.setdefault(n, []).append(task)
    return by_n


def evaluation_commands(board: Board, model_args: str) -> list[str]:
    """The lmms-eval commands that answer a board, one for each number of samples."""
    return [
        f"lmms-eval --model bitquake_hf --model_args {model_args} --tasks {','.join(tasks)} --limit {n} "
        "--log_samples --output_path OUT"
        for n, tasks in tasks_by_limit({task.task: task.n for task in board.tasks}).items()
    ]


def read_board(file: Path) -> Board:
    """The board of a YAML file.

    Raises:
        BoardError: it is not valid, or its file is not called as it is.
    """
    try:
        data, lines = load_with_lines(read_bounded(file))
        board = Board.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        line = line_of(lines, found["loc"])
        where = f"{file.name}, line {line}" if line else file.name
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BoardError(f"{where}: {_place(found['loc'])}{found['msg']}{more}") from error
    except StrictYamlError as error:
        where = f"{file.name}, line {error.line}" if error.line else file.name
        raise BoardError(f"{where}: {error}") from error
    if board.board != file.stem:
        raise BoardError(f"{file.name}: board: {board.board!r} must stand in a file called {board.board}.yaml")
    return board


def _place(parts: Iterable[str | int]) -> str:
    told = ".".join(map(str, parts))
    return f"{told}: " if told else ""
