"""``bitquake leaderboard``: make submissions from runs, check them, build the gold files, render the board."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquake.leaderboard.boards import Board
    from bitquake.leaderboard.findings import Finding
    from bitquake.leaderboard.validate import Verdict

SUBMISSIONS = Path("leaderboard/submissions")
_PRETRAINED = {"block": "bitquake/block-idefics3", "real": "MODEL"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put ``leaderboard`` and its actions into the command line."""
    parser = commands.add_parser("leaderboard", help="submissions: make them, check them, render the board")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    board = actions.add_parser("board", help="a board's tasks, and the commands that answer them; no name: all boards")
    board.add_argument("name", nargs="?")
    board.add_argument("--command", dest="commands", action="store_true", help="print the lmms-eval commands only")
    board.add_argument("--quant", default="SPEC", help="quantization to put into the commands")
    board.add_argument("--pretrained", help="model to put into the commands (default: the world's reference model)")

    submit = actions.add_parser("submit", help="write submissions from finished runs, the full-precision twin's first")
    submit.add_argument("runs", nargs="+", type=Path, help="output folders of lmms-eval (written with --log_samples)")
    submit.add_argument("--board", required=True)
    submit.add_argument("--organisation", required=True, help="who submits: a-z, 0-9, dots and dashes")
    submit.add_argument("--model", default="", help="name of the model (default: the quant card's)")
    submit.add_argument("--quantization", default="", help="name of the quantization (default: the quant card's)")
    submit.add_argument("--twin", default="", help="folder name of the full-precision submission (default: of RUNS)")
    submit.add_argument(
        "--artifacts", type=Path, help="folder with quant cards (default: the runs' own, then the cache)"
    )
    submit.add_argument("--contact", default="", help="shown with the submission")
    submit.add_argument("--link", default="", help="http or https address, shown with the submission")
    submit.add_argument("--out", type=Path, default=SUBMISSIONS, metavar="DIR", help="(default: %(default)s)")

    validate = actions.add_parser("validate", help="check submissions, and recompute them from their answers")
    validate.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="submissions (or --all)")
    validate.add_argument("--all", action="store_true", help="every submission in --submissions")
    validate.add_argument("--base", metavar="REF", help="a commit: its submissions must still be there, unchanged")

    build = actions.add_parser("build", help="render the site from the valid submissions")
    build.add_argument("--out", type=Path, required=True, metavar="DIR")
    build.add_argument("--board", action="append", help="may be repeated, in the order of the page (default: all)")
    build.add_argument("--replicates", type=int, default=2000, help="bootstrap replicates (default 2000)")
    build.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    for action in (validate, build):
        action.add_argument(
            "--submissions", type=Path, default=SUBMISSIONS, metavar="DIR", help="(default: %(default)s)"
        )
        action.add_argument("--gold", type=Path, metavar="DIR", help="folder of gold files (default: the user's cache)")

    gold = actions.add_parser("gold", help="build answers-only gold files from the datasets; prints their hashes")
    gold.add_argument("tasks", nargs="*", metavar="TASK")
    gold.add_argument("--limit", type=int, metavar="N", help="the first N samples of each TASK (default: all)")
    gold.add_argument("--board", help="the tasks of a board, each with its number of samples, to a folder of its own")
    gold.add_argument("--pin", type=Path, metavar="FILE", help="with --board: write the hashes into the board's file")
    gold.add_argument("--out", type=Path, metavar="DIR", help="(default: the user's cache)")
    gold.add_argument("--families", type=Path, nargs="*", default=[], help="folders of further families")


def run(options: argparse.Namespace) -> int:
    """Run one action; the exit code is 0, 1 (something is refused or left out), or 2 (the input cannot be used)."""
    return {"board": _board, "submit": _submit, "validate": _validate, "gold": _gold, "build": _build}[options.action](
        options
    )


def _board(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from bitquake.leaderboard.boards import board_names, evaluation_commands, load_board

    if options.name is None:
        rows = [
            {"board": board.board, "world": board.world, "tasks": len(board.tasks), "samples": board.n,
             "gold": _pinned(board), "title": board.title}
            for board in map(load_board, board_names())
        ]  # fmt: skip
        print(tabulate(rows, headers="keys"))
        return 0
    board = load_board(options.name)
    arguments = f"pretrained={options.pretrained or _PRETRAINED[board.world]},quant={options.quant}"
    commands = evaluation_commands(board, arguments)
    if not options.commands:
        tasks = [{"task": task.task, "samples": task.n, "gold": (task.gold or "-")[:12]} for task in board.tasks]
        print(f"{board.title}. {board.about}\n")
        print(tabulate(tasks, headers="keys"))
        print("\nEach model answers all of it; --limit is per command, so there is one for each number of samples:\n")
    print("\n".join(commands))
    return 0


def _pinned(board: Board) -> str:
    n = sum(task.gold is not None for task in board.tasks)
    return "pinned" if n == len(board.tasks) else f"{n} of {len(board.tasks)} pinned"


def _submit(options: argparse.Namespace) -> int:
    from bitquake.leaderboard.boards import load_board
    from bitquake.leaderboard.submit import submit

    written = submit(
        options.runs,
        load_board(options.board),
        options.organisation,
        options.out,
        artifacts=options.artifacts,
        model=options.model,
        quantization=options.quantization,
        twin=options.twin,
        contact=options.contact,
        link=options.link,
    )
    for one in written:
        state = "" if one.changed else " (it stood there already)"
        print(f"{one.folder}: {one.n_rows:,} answers, {one.n_bytes:,} bytes{state}")
    print("check them: bitquake leaderboard validate " + " ".join(str(one.folder) for one in written))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from bitquake.leaderboard.validate import all_submissions, validate

    if options.all == bool(options.folders):
        raise ValueError("give the folders of submissions, or --all")
    if options.all and not options.submissions.is_dir():
        raise ValueError(f"{options.submissions}: is not there; give --submissions DIR")
    for folder in options.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: is no folder; give the folder of a submission")
    folders = all_submissions(options.submissions) if options.all else options.folders
    root = options.submissions if options.all else None
    verdicts = validate(folders, gold=_gold_of(options), base=options.base, root=root)
    print(table(verdicts))
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def table(verdicts: Sequence[Verdict]) -> str:
    """Verdicts for a terminal: a line each, then what was found, place by place."""
    from tabulate import tabulate

    if not verdicts:
        return "no submission"
    rows = [
        {
            "submission": verdict.name,
            "level": verdict.level,
            "board": verdict.submission.manifest.board if verdict.submission else "-",
            "answers": sum(task.n for task in verdict.submission.manifest.tasks.values())
            if verdict.submission
            else "-",
            "bytes": f"{verdict.submission.n_bytes:,}" if verdict.submission else "-",
        }
        for verdict in verdicts
    ]
    parts = [tabulate(rows, headers="keys", disable_numparse=True)]
    found: dict[Finding, None] = {}
    for verdict in verdicts:
        found |= dict.fromkeys(verdict.findings)
    if found:
        parts.append("\n".join(map(str, found)))
    refused = sum(not verdict.ok for verdict in verdicts)
    parts.append(f"{len(verdicts) - refused} valid, {refused} refused")
    return "\n\n".join(parts)


def _gold_of(options: argparse.Namespace) -> Path:
    """The gold folder that was given, or the user's own."""
    from bitquake.tasks.gold import default_folder

    folder: Path = options.gold if options.gold is not None else default_folder()
    if options.gold is not None and not folder.is_dir():
        raise ValueError(f"--gold {folder}: is no folder; `bitquake leaderboard gold --out {folder}` makes one")
    return folder


def _gold(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from bitquake.leaderboard.boards import load_board, with_gold
    from bitquake.tasks.gold import build_gold, default_folder
    from bitquake.tasks.sources import replacing

    if bool(options.tasks) == bool(options.board):
        raise ValueError("give tasks, or --board NAME for all tasks of a board")
    if options.pin is not None and not options.board:
        raise ValueError("--pin: writes the hashes of a board's tasks; give --board too")
    if options.board and options.limit is not None:
        raise ValueError("--limit: the board says how many samples each of its tasks has")
    out = options.out or default_folder()
    wanted: list[tuple[str, int | None]] = [(task, options.limit) for task in options.tasks]
    if options.board:
        board = load_board(options.board)
        out, wanted = out / board.board, [(task.task, task.n) for task in board.tasks]
        if options.pin is not None and options.pin.stem != board.board:
            raise ValueError(f"--pin {options.pin}: expected the file of the board, {board.board}.yaml")
    rows = []
    for task, n in wanted:
        built = build_gold(task, out, n, families=options.families, progress=lambda line: print(line, file=sys.stderr))
        if options.board and built.n != n:
            raise ValueError(f"{task}: has {built.n} samples, the board {options.board} wants {n}; correct its file")
        rows.append({"task": task, "n": built.n, "sha256 of the text": built.sha256, "bytes": built.n_bytes})
    print(tabulate(rows, headers="keys"))
    print(out)
    if options.pin is not None:
        hashes = {str(row["task"]): str(row["sha256 of the text"]) for row in rows}
        text = with_gold(options.pin.read_text(encoding="utf-8"), hashes)
        with replacing(options.pin) as new:
            new.write_text(text, encoding="utf-8")
        print(f"pinned in {options.pin}")
    return 0


def _build(options: argparse.Namespace) -> int:
    from bitquake.leaderboard.boards import board_names, load_board
    from bitquake.leaderboard.site import build_site

    result = build_site(
        [load_board(name) for name in options.board or board_names()],
        options.submissions,
        _gold_of(options),
        options.out,
        replicates=options.replicates,
        seed=options.seed,
        progress=lambda line: print(line, file=sys.stderr),
    )
    for name, reasons in result.refused:
        print(f"left out: {name}: {'; '.join(reasons)}", file=sys.stderr)
    print(f"{result.n_rows} submissions, {len(result.refused)} refused")
    print(result.index)
    return 1 if result.refused else 0
