"""Board files: the shipped ones name real tasks; a wrong one is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitquake.demo import TASKS
from bitquake.leaderboard.boards import (
    SHIPPED,
    BoardError,
    board_names,
    evaluation_commands,
    load_board,
    read_board,
    with_gold,
)
from bitquake.tasks.expand import variants_of
from bitquake.tasks.families import load_families

GOOD = "board: x\ntitle: X\nworld: block\ntasks:\n  - {task: a_clean, n: 5, gold: null}\n"


@pytest.mark.parametrize("name", board_names())
def test_shipped_boards_name_registered_tasks_of_their_world(name: str) -> None:
    families, problems = load_families()
    assert not problems
    worlds = {variant.task: one.family.world for one in families for variant in variants_of(one.family)}
    board = load_board(name)
    assert {worlds.get(task.task) for task in board.tasks} == {board.world}


@pytest.mark.parametrize("name", board_names())
def test_every_task_has_the_threshold_task_that_its_abstention_needs(name: str) -> None:
    tasks = load_board(name).by_task
    first = next(task for task in tasks if task.endswith("_threshold"))
    assert first.endswith("vqav2_threshold")


def test_the_demo_board_is_the_demo() -> None:
    assert set(load_board("demo").by_task) == {task for task in TASKS if "caption" not in task}


def test_the_commands_answer_every_task_once_with_its_limit() -> None:
    board = load_board("block")
    commands = evaluation_commands(board, "pretrained=m,quant=q")
    told = {}
    for command in commands:
        words = command.split()
        n = int(words[words.index("--limit") + 1])
        for task in words[words.index("--tasks") + 1].split(","):
            assert task not in told
            told[task] = n
    assert told == {task.task: task.n for task in board.tasks}
    assert all("--model_args pretrained=m,quant=q" in command and "--log_samples" in command for command in commands)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("block", "blocks"), "line 3: world"),
        (GOOD.replace("n: 5", "n: 0"), "line 5: tasks.0.n"),
        (GOOD.replace("n: 5", "n: '5'"), "line 5: tasks.0.n"),
        (GOOD.replace("null", "abc"), "line 5: tasks.0.gold"),
        (GOOD.replace("null", "null, score: 1"), "line 5: tasks.0.score"),
        (GOOD.replace("a_clean", "../a"), "line 5: tasks.0.task"),
        (GOOD + "  - {task: a_clean, n: 5, gold: null}\n", "a_clean stands there twice"),
        (GOOD + "tasks: []\n", "'tasks' given twice"),
        (GOOD.replace("X", "!!python/name:os.system x"), "tags"),
        (GOOD.replace("board: x", "board: y"), "file called y.yaml"),
        ("[]", "x.yaml"),
        ("", "x.yaml"),
    ],
)
def test_a_wrong_board_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BoardError, match=message):
        load_board("x", tmp_path)


@pytest.mark.parametrize("name", ["../block", "block.yaml", "", "Block", "a" * 70, "no\nne", "<b>"])
def test_foreign_names_find_no_file(name: str) -> None:
    with pytest.raises(BoardError, match="there is none of this name"):
        load_board(name)


def test_hashes_are_put_in_place_and_nothing_else(tmp_path: Path) -> None:
    text = (SHIPPED / "block.yaml").read_text()
    tasks = [task.task for task in load_board("block").tasks]
    pinned = with_gold(text, {task: f"{i:064x}" for i, task in enumerate(tasks)})
    (tmp_path / "block.yaml").write_text(pinned)
    assert [task.gold for task in read_board(tmp_path / "block.yaml").tasks] == [f"{i:064x}" for i in range(len(tasks))]
    assert with_gold(pinned, {}) == pinned and len(pinned.splitlines()) == len(text.splitlines())
    with pytest.raises(BoardError, match="expected one line"):
        with_gold(text, {"block_vqav2": "0" * 64})
