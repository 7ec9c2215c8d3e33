"""``bitquake run`` and ``bitquake status``: a suite from its file to its page, and how far it is."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put ``run`` and ``status`` into the command line."""
    run = commands.add_parser("run", help="run a suite: every cell once, then the study's page; run again to go on")
    run.add_argument("suite", metavar="SUITE", help="one that ships (a wrong name lists them), or a YAML file")
    run.add_argument("--world", choices=("real", "block"), default="real", help="block: the suite's offline twin")
    run.add_argument("--out", metavar="DIR", help="folder or fsspec url (default: suite-runs/SUITE[-block])")
    run.add_argument("--dry-run", action="store_true", help="print the plan and the lmms-eval commands, run nothing")
    run.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN",
        help="cells by name (shell patterns, as '*/rtn-*'), or FACTOR=LEVEL; any of them",
    )  # fmt: skip
    run.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave these out of this run")
    run.add_argument("--retry-failed", action="store_true", help="only the cells that failed before")
    run.add_argument("--limit", type=int, metavar="N", help="at most N samples of each task, to try the suite out")
    run.add_argument("--jobs", type=int, default=1, help="cells at once on this machine (default 1)")
    run.add_argument("--threads", type=int, help="of each cell (default: the cores, shared)")
    run.add_argument("--device", help="cpu, cuda:0, … (default: an accelerator if there is one)")
    run.add_argument("--ray", metavar="WHERE", help="on Ray: auto, the address of a cluster, or local:N")
    run.add_argument(
        "--scratch", type=Path, metavar="DIR", help="with a url: folder of this machine for work in progress"
    )
    run.add_argument(
        "--noise-cache", metavar="DIR", help="of corrupted pictures (default: the user's cache; none: off)"
    )
    run.add_argument("--noise-cache-gb", type=float, metavar="GB", help="its bound (default 20)")
    run.add_argument("--no-report", action="store_true", help="evaluate only: no Selectors and no page")

    status = commands.add_parser("status", help="how far a suite is: finished, in work, failed, waiting")
    status.add_argument("out", metavar="OUT", help="the folder or url that `bitquake run` writes")
    status.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace) -> int:
    """Carry out one of the two; the exit code is 0 (all cells are there), 1 (not all), or 2 (the input is no use)."""
    if options.command == "status":
        from bitquake.suite.status import show_status

        return show_status(options.out, as_json=options.json)
    from bitquake.suite.run import run_suite

    return run_suite(options)
