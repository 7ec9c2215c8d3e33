"""The ``bitquake`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitquake import __version__

EXIT_OK, EXIT_PROBLEM, EXIT_USAGE = 0, 1, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitquake", description="Accuracy and reliability of quantized vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"bitquake {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="compare runs and write a static page, report.json and report.csv")
    report.add_argument("runs", nargs="+", type=Path, help="output folders of lmms-eval (written with --log_samples)")
    report.add_argument("--out", type=Path, required=True, help="folder to write; replaced if a report wrote it before")
    report.add_argument(
        "--artifacts", type=Path, help="folder with quant cards (default: the runs' own, then the cache)"
    )
    report.add_argument("--title", default="Bitquake report")
    report.add_argument("--replicates", type=int, default=2000, help="bootstrap replicates (default 2000)")
    report.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    report.add_argument(
        "--common-samples", action="store_true", help="compare runs of different sample sets on what they share"
    )

    tasks = commands.add_parser("tasks", help="the tasks that Bitquake adds to lmms-eval")
    actions = tasks.add_subparsers(dest="action", required=True, metavar="ACTION")
    path = actions.add_parser("path", help="folder of the expanded YAML, for lmms-eval's --include_path")
    listing = actions.add_parser("list", help="all families")
    for action in (path, listing):
        action.add_argument("--families", type=Path, nargs="*", default=[], help="folders of further families")
    export = actions.add_parser("export", help="write the expanded YAML to a folder")
    export.add_argument("folder", type=Path)
    validate = actions.add_parser("validate", help="check a family YAML")
    validate.add_argument("file", type=Path)

    quants = commands.add_parser("quants", help="the quantizations that quant=NAME accepts")
    actions = quants.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all named specs")
    show = actions.add_parser("show", help="one spec in full")
    show.add_argument("name")

    commands.add_parser("doctor", help="versions, devices, backends: what works here and what does not")

    demo = commands.add_parser("demo", help="quantize the reference model, evaluate it in noise, write the report")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for runs and page (default: demo)")
    demo.add_argument("--limit", type=int, default=1000, help="samples of each task (default 1000)")
    demo.add_argument("--jobs", type=int, help="models evaluated at once (default: number of cores, at most 4)")

    train = commands.add_parser("train-reference", help="train the reference checkpoint again (resumable)")
    train.add_argument("folder", type=Path, help="where progress and the model are kept; run again to go on")
    train.add_argument("--export", type=Path, help="train nothing; write the folder's model as it ships to this folder")
    train.add_argument(
        "--spread", type=float, default=0.0, help="with --export: sigma of the uneven channels (default 0)"
    )
    train.add_argument("--minutes", type=float, help="stop after this time; run again to go on")
    train.add_argument("--stop", type=int, help="stop at this step of the second stage; run again to go on")
    train.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    train.add_argument("--set", nargs="*", default=[], metavar="KEY=NUMBER", help="change entries of the recipe")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 1 a problem was found, 2 wrong usage or unusable input."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader (head, less) has seen enough
            sys.stderr.close()
            return EXIT_OK
        print(f"bitquake {options.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("bitquake: interrupted", file=sys.stderr)
        return 130


def _report(options: argparse.Namespace) -> int:
    from bitquake.reports import build

    result = build(
        options.runs,
        options.out,
        artifacts=options.artifacts,
        title=options.title,
        replicates=options.replicates,
        seed=options.seed,
        common_samples=options.common_samples,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(result.table)
    for problem in result.problems:
        print(problem, file=sys.stderr)
    print(result.index)
    return EXIT_OK if result.ok else EXIT_PROBLEM


def _tasks(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from bitquake.tasks import catalog

    if options.action in ("path", "list"):
        if options.action == "path":
            print(catalog.tasks_path(options.families))
        else:
            print(tabulate(catalog.list_rows(options.families), headers="keys"))
        problems = catalog.problems(options.families)
        for problem in problems:
            print(f"bitquake tasks: left out: {problem}", file=sys.stderr)
        return EXIT_PROBLEM if problems else EXIT_OK
    elif options.action == "export":
        print(f"{catalog.export(options.folder)} tasks written to {options.folder}")
    else:
        problems = catalog.validate(options.file)
        print("\n".join(problems) if problems else f"{options.file}: valid")
        return EXIT_PROBLEM if problems else EXIT_OK
    return EXIT_OK


def _quants(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from bitquake.model_wrappers.quantizers import catalog

    if options.action == "list":
        print(tabulate(catalog.quants_table(), headers="keys"))
    else:
        print(catalog.describe_spec(options.name))
    return EXIT_OK


def _doctor(_: argparse.Namespace) -> int:
    from bitquake import doctor

    return EXIT_OK if doctor.run() else EXIT_PROBLEM


def _demo(options: argparse.Namespace) -> int:
    from bitquake import demo

    return demo.run(options.out, limit=options.limit, jobs=options.jobs)


def _train(options: argparse.Namespace) -> int:
    import torch

    from bitquake.reference_training import export, recipe_from, train

    if options.export:
        print(export(options.folder, options.export, spread=options.spread))
        return EXIT_OK
    if options.threads:
        torch.set_num_threads(options.threads)
    print(train(options.folder, recipe_from(options.set), minutes=options.minutes, stop=options.stop))
    return EXIT_OK


_COMMANDS = {
    "report": _report,
    "tasks": _tasks,
    "quants": _quants,
    "doctor": _doctor,
    "demo": _demo,
    "train-reference": _train,
}


if __name__ == "__main__":
    sys.exit(main())
