"""The ``bitquake`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitquake import __version__
from bitquake.importance_command import add_parser as add_importance
from bitquake.leaderboard_command import add_parser as add_leaderboard
from bitquake.run_command import add_parser as add_run
from bitquake.train_command import add_parser as add_train

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

    gate = commands.add_parser("gate", help="may this candidate replace that baseline? exit 0 pass, 1 fail, 2 unknown")
    gate.add_argument("--candidate", nargs="+", type=Path, required=True, metavar="RUN", help="its runs' folders")
    gate.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN", help="what it is compared with")
    gate.add_argument("--rules", type=Path, required=True, metavar="FILE", help="YAML; see examples/gate.yaml")
    gate.add_argument("--junit", type=Path, metavar="FILE", help="write the verdict as JUnit XML too")
    gate.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON, with all numbers")
    gate.add_argument("--artifacts", type=Path, help="folder with quant cards (default: the runs' own, then the cache)")
    gate.add_argument("--replicates", type=int, default=2000, help="bootstrap replicates (default 2000)")
    gate.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    gate.add_argument("--common-samples", action="store_true", help="compare on the samples that both runs hold")

    records = commands.add_parser("records", help="answers of any engine as runs that report and gate read")
    actions = records.add_subparsers(dest="action", required=True, metavar="ACTION")
    taken = actions.add_parser("import", help="score (sample id, answer, confidence) tables and write them as a run")
    taken.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".csv, .tsv, .jsonl or .parquet")
    taken.add_argument("--task", required=True, help="the task that was answered; with --scored any name")
    taken.add_argument("--model", required=True, metavar="NAME", help="what ran: a hub name, say")
    taken.add_argument("--quantization", default="", metavar="NAME", help="how it was quantized (default: it was not)")
    taken.add_argument(
        "--twin", default="", metavar="NAME", help="its full-precision model, if --model is another name"
    )
    taken.add_argument("--engine", default="", metavar="NAME[=VERSION]", help="what ran it, such as vllm=0.11.0")
    taken.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for imported runs")
    taken.add_argument("--id-column", default="id", metavar="COLUMN", help="(default: %(default)s)")
    taken.add_argument("--answer-column", default="answer", metavar="COLUMN", help="(default: %(default)s)")
    taken.add_argument(
        "--confidence-column",
        action="append",
        default=[],
        metavar="[NAME=]COLUMN",
        help="may be repeated; without NAME it is the task's primary confidence (default: confidence)",
    )
    taken.add_argument("--log-probability", action="store_true", help="these columns hold log-probabilities")
    taken.add_argument("--allow-missing-confidence", action="store_true", help="take answers that have none")
    taken.add_argument("--missing-as-failures", action="store_true", help="samples without an answer score 0")
    taken.add_argument("--limit", type=int, metavar="N", help="only the task's first N samples were asked")
    taken.add_argument("--model-type", default="", help="architecture, as qwen2_vl: it decides how boxes are read")
    taken.add_argument("--scored", action="store_true", help="the table brings its scores; no dataset is needed")
    taken.add_argument("--score-column", default="score", metavar="COLUMN", help="with --scored (default: %(default)s)")
    taken.add_argument(
        "--image-column", default="image_id", metavar="COLUMN", help="with --scored: what shares it, counts as one draw"
    )
    taken.add_argument("--expected", type=int, metavar="N", help="with --scored: how many samples there should be")
    taken.add_argument("--shift-from", default="", metavar="TASK", help="with --scored: the task in distribution")

    tasks = commands.add_parser("tasks", help="the tasks that Bitquake adds to lmms-eval, and new ones")
    actions = tasks.add_subparsers(dest="action", required=True, metavar="ACTION")
    path = actions.add_parser("path", help="folder of the expanded YAML, for --include_path")
    listing = actions.add_parser("list", help="all families")
    listing.add_argument("--all", action="store_true", help="every task with its tags")
    show = actions.add_parser("show", help="one family, task (prompt, dataset, split, noise, metrics) or tag")
    show.add_argument("name")
    show.add_argument("--yaml", action="store_true", help="the expanded YAML instead")
    export = actions.add_parser("export", help="write the expanded YAML to a folder")
    export.add_argument("folder", type=Path)
    for action in (path, listing, show, export):
        action.add_argument("--families", type=Path, nargs="*", default=[], help="folders of further families")
    new = actions.add_parser("new", help="write a commented family file to edit")
    new.add_argument("name", help="the family's name; tasks are called NAME_clean and so on")
    new.add_argument("--protocol", default="vqa", help="vqa (default), choice, grounding, caption or retrieval")
    new.add_argument("--extends", metavar="STOCK", help="take dataset, prompt and scorer of this task of lmms-eval")
    new.add_argument("--out", type=Path, metavar="DIR", help="folder to write family.yaml to (default: ./NAME)")
    check = actions.add_parser("check", help="check a family file, then try it on a few samples")
    check.add_argument("--pretrained", default="bitquake/block-idefics3", help="model (default: %(default)s)")
    check.add_argument("--samples", type=int, default=3, help="samples of each task tried; 0: none (default 3)")
    validate = actions.add_parser("validate", help="check a family file (as check --samples 0)")
    for action in (check, validate):
        action.add_argument("file", type=Path)

    config = commands.add_parser("config", help="your own families, and published splits as lists of ids")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("path", help="the configuration file")
    actions.add_parser("show", help="what is set")
    put = actions.add_parser("set", help="families DIR..., or split_ids FAMILY FILE")
    unset = actions.add_parser("unset", help="families [DIR...], or split_ids [FAMILY...]")
    for action in (put, unset):
        action.add_argument("key", choices=("families", "split_ids"))
        action.add_argument("values", nargs="*", metavar="VALUE")

    data = commands.add_parser("data", help="datasets that are built on this machine, such as AdVQA")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what is built")
    prepare = actions.add_parser(
        "prepare", help="build one from questions and answers in VQA's JSON format; NAME alone says what it needs"
    )
    prepare.add_argument("name", help="advqa, or a name of yours, for `dataset: {prepared: NAME}` in a family file")
    prepare.add_argument("--questions", type=Path, metavar="FILE", help="JSON with `questions`")
    prepare.add_argument("--annotations", type=Path, metavar="FILE", help="JSON with `annotations`, the answers")
    prepare.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures")
    prepare.add_argument("--split", default="validation", help="what the split is called (default: %(default)s)")
    prepare.add_argument(
        "--image-pattern", action="append", metavar="PATTERN", help="pictures' names (default: as COCO calls them)"
    )
    prepare.add_argument("--annotators", type=int, default=10, help="answers to each question (default 10)")
    prepare.add_argument("--allow-missing", action="store_true", help="leave out what has no picture that decodes")
    prepare.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: where tasks look for it)")
    prepare.add_argument("--family", type=Path, metavar="DIR", help="write a family.yaml for it to this folder too")

    quantize = commands.add_parser("quantize", help="quantize a model and write it as a checkpoint (resumable)")
    quantize.add_argument("model", help="hub name, folder, or bitquake/... of a reference model")
    quantize.add_argument("--quant", required=True, metavar="SPEC", help="as quant=; see `bitquake quants list`")
    quantize.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder; run again to go on")
    quantize.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    quantize.add_argument("--device", help="cpu, cuda:0 (default: the accelerator if there is one)")
    quantize.add_argument("--revision", help="branch, tag or commit of a hub model")
    quantize.add_argument("--max-shard-size", default="5GB", help="of one file, as 500MB (default: %(default)s)")
    quantize.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DIR")
    quantize.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")

    card = commands.add_parser("card", help="what was done to a model: its quant card, checked where it can be")
    card.add_argument(
        "path", type=Path, help="a quantized checkpoint, the output folder of runs, or a card's JSON file"
    )
    card.add_argument("--modules", action="store_true", help="each quantized module, too")
    card.add_argument("--json", action="store_true", help="the card as it is stored")
    card.add_argument("--artifacts", type=Path, help="folder with quant cards (default: the runs' own, then the cache)")
    card.add_argument("--unchecked", action="store_true", help="of a checkpoint: show the card without reading tensors")

    selector = commands.add_parser("selector", help="a learned confidence: fit it on dev runs, add it to other runs")
    actions = selector.add_subparsers(dest="action", required=True, metavar="ACTION")
    fitted = actions.add_parser("fit", help="from runs of *_dev tasks with features=true; writes one file")
    fitted.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="output folders of lmms-eval: one quantization, the full-precision model, or several for a mixture",
    )  # fmt: skip
    fitted.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write (.safetensors)")
    fitted.add_argument(
        "--name", metavar="NAME",
        help="selector (default for one quantization), selector_transfer (for full precision) or selector_mixture (for "
        "several)",
    )  # fmt: skip
    fitted.add_argument("--target", choices=("score", "iou"), default="score", help="(default: %(default)s)")
    fitted.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these (default: all *_dev tasks)")
    fitted.add_argument("--allow-task", action="store_true", help="let --tasks name others than *_dev tasks")
    fitted.add_argument("--limit", type=int, metavar="N", help="samples to fit on, whole pictures (default: all)")
    fitted.add_argument("--project", type=int, metavar="K", help="random projection of the states to K numbers")
    fitted.add_argument("--folds", type=int, default=5, metavar="N", help="parts of the pictures (default 5)")
    fitted.add_argument("--epochs", type=int, default=12, metavar="N", help="(default 12)")
    fitted.add_argument("--hidden", type=int, default=256, metavar="N", help="units of a layer (default 256)")
    fitted.add_argument("--seed", type=int, default=0, help="(default 0)")
    applied = actions.add_parser("apply", help="copy runs with the confidence added to each record")
    applied.add_argument(
        "paths", nargs="+", type=Path, metavar="SELECTOR... RUN...",
        help="files of `selector fit`, then output folders of lmms-eval that have features",
    )  # fmt: skip
    applied.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the copies")
    for action in (fitted, applied):
        action.add_argument("--artifacts", type=Path, help="folder with the features (default: the runs' own)")

    quants = commands.add_parser("quants", help="the quantizations that quant=NAME accepts")
    actions = quants.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all named specs")
    show = actions.add_parser("show", help="one spec in full")
    show.add_argument("name")
    taken = actions.add_parser("import", help="a configuration of mmq (uniform, GPTQ or AWQ) as a spec of ours")
    taken.add_argument("file", type=Path, metavar="FILE.json")
    taken.add_argument("--out", type=Path, metavar="FILE.yaml", help="write it here, for quant=FILE.yaml")
    taken.add_argument("--kind", choices=("uniform", "gptq", "awq"), help="(default: what its keys say)")

    noise = commands.add_parser("noise", help="what the image and text noises do: look at them, try them")
    actions = noise.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all noises")
    show = actions.add_parser("show", help="one noise: what it computes, and its parameters at each severity")
    show.add_argument("name")
    corrupt = actions.add_parser("apply", help="write a corrupted copy of an image")
    sheet = actions.add_parser("sheet", help="all noises at several severities as one picture")
    for action in (corrupt, sheet):
        action.add_argument("image", type=Path, help="an image file")
        action.add_argument("--mode", choices=("native", "scaled"), default="native", help="(default: native)")
        action.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
        action.add_argument("--key", help="the sample's name, which also seeds the noise (default: the file's name)")
    corrupt.add_argument("name", help="an image noise")
    corrupt.add_argument("--severity", type=int, required=True, help="1 (mild) to 5")
    corrupt.add_argument("--out", type=Path, required=True, help="image file to write")
    sheet.add_argument("--out", type=Path, default=Path("sheet.png"), help="image file to write (default: sheet.png)")
    sheet.add_argument("--severities", nargs="+", default=["1", "3", "5"], help="numbers, or all (default: 1 3 5)")
    sheet.add_argument("--noises", nargs="+", help="noises or groups (default: all)")
    sheet.add_argument("--question", help="what the text noises are shown on")
    sheet.add_argument("--width", type=int, default=1280, help="pixels (default 1280)")

    add_leaderboard(commands)
    add_importance(commands)
    add_run(commands)
    add_train(commands)

    commands.add_parser("doctor", help="versions, devices, backends: what works here and what does not")

    demo = commands.add_parser("demo", help="quantize the reference model, evaluate it in noise, write the report")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for runs and page (default: demo)")
    demo.add_argument("--limit", type=int, default=1000, help="samples of each task (default 1000)")
    demo.add_argument("--jobs", type=int, help="models evaluated at once (default: number of cores, at most 4)")

    train = commands.add_parser("train-reference", help="train a reference checkpoint again (resumable)")
    train.add_argument("folder", type=Path, help="where progress and the model are kept; run again to go on")
    train.add_argument("--architecture", default="idefics3", metavar="NAME", help="idefics3 (default) or qwen2-vl")
    train.add_argument("--export", type=Path, help="train nothing; write the folder's model as it ships to this folder")
    train.add_argument(
        "--spread", type=float, default=0.0, help="with --export: sigma of the uneven channels (default 0)"
    )
    train.add_argument("--minutes", type=float, help="stop after this time; run again to go on")
    train.add_argument("--stop", type=int, help="stop at this step of the last stage; run again to go on")
    train.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    train.add_argument("--set", nargs="*", default=[], metavar="KEY=NUMBER", help="change entries of the recipe")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 1 a problem was found, 2 wrong usage or unusable input."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
        return EXIT_OK
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"bitquake {options.command}: {text}", file=sys.stderr)
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


def _gate(options: argparse.Namespace) -> int:
    from bitquake.gate_command import gate
    from bitquake.reports.gate import verdict_text

    result = gate(
        options.candidate,
        options.baseline,
        options.rules,
        junit=options.junit,
        json_file=options.json,
        artifacts=options.artifacts,
        common_samples=options.common_samples,
        replicates=options.replicates,
        seed=options.seed,
    )
    print(verdict_text(result))
    return result.exit_code


def _records(options: argparse.Namespace) -> int:
    from bitquake.records_command import Declared, ImportOptions, confidence_columns, import_records, summary

    done = import_records(
        options.files,
        options.task,
        Declared(options.model, options.quantization, options.twin, options.engine),
        options.out,
        ImportOptions(
            id_column=options.id_column,
            answer_column=options.answer_column,
            score_column=options.score_column,
            image_column=options.image_column,
            confidences=confidence_columns(options.confidence_column),
            log_probability=options.log_probability,
            allow_missing_confidence=options.allow_missing_confidence,
            missing_as_failures=options.missing_as_failures,
            scored=options.scored,
            limit=options.limit,
            expected=options.expected,
            shift_from=options.shift_from,
            model_type=options.model_type,
        ),
    )
    print(summary(done))
    return EXIT_OK if done.complete else EXIT_PROBLEM


def _tasks(options: argparse.Namespace) -> int:
    if options.action == "new":
        from bitquake.tasks.scaffold import new_family

        file = new_family(options.name, options.protocol, extends=options.extends, out=options.out)
        print(f"{file}\nedit it, then: bitquake tasks check {file}")
        return EXIT_OK
    if options.action in ("check", "validate"):
        samples = 0 if options.action == "validate" else options.samples
        return _check(options.file, samples, getattr(options, "pretrained", ""))
    from tabulate import tabulate

    from bitquake.tasks import catalog

    if options.action == "path":
        print(catalog.tasks_path(options.families))
    elif options.action == "list":
        rows = catalog.task_rows(options.families) if options.all else catalog.list_rows(options.families)
        print(tabulate(rows, headers="keys"))
    elif options.action == "export":
        print(f"{catalog.export(options.folder, options.families)} tasks written to {options.folder}")
    elif options.yaml:
        print(catalog.task_yaml(options.name, options.families), end="")
    else:
        print(tabulate(catalog.show(options.name, options.families), tablefmt="plain", maxcolwidths=[None, 100]))
    return EXIT_PROBLEM if _left_out(options.families) else EXIT_OK


def _check(file: Path, samples: int, pretrained: str) -> int:
    from bitquake.tasks import catalog

    if samples < 0:
        raise ValueError(f"--samples: give 0 or more, got {samples}")
    problems = catalog.validate(file)
    if problems:
        print("\n".join(problems))
        return EXIT_PROBLEM
    print(f"{file}: valid")
    if samples == 0 or catalog.is_expanded(file):
        return EXIT_OK
    from bitquake import dry_run
    from bitquake.tasks.families import FAMILY_FILE, load_family

    file = file / FAMILY_FILE if file.is_dir() else file
    reason = dry_run.missing_data(load_family(file))
    if reason is not None:
        print(f"Not tried on samples: {reason}. What was checked: the file, its names, and its expanded tasks.")
        return EXIT_OK
    task = ""
    for answered in dry_run.run(file, pretrained=pretrained, samples=samples):
        record = answered.record
        if answered.task != task:
            task = answered.task
            print(f"\n{task}")
        confidence = "none" if record.primary is None else f"{record.primary:.3f} ({record.primary_confidence})"
        failure = f"; failure: {record.failure_detail}" if record.failure else ""
        print(f"  prompt      {answered.prompt!r}\n  answer      {record.text!r}, read as {record.answer!r}")
        print(f"  target      {answered.target}\n  score       {record.score:g}, confidence {confidence}{failure}\n")
    return EXIT_OK


def _config(options: argparse.Namespace) -> int:
    from bitquake import config

    if options.action == "path":
        print(config.config_file())
        return EXIT_OK
    settings = config.load_config()
    if options.action == "set" and options.key == "families":
        if not options.values:
            raise ValueError(
                "set families: expected folders, for example `set families my_families`; unset removes them"
            )
        settings = config.set_families(settings, [Path(value) for value in options.values])
    elif options.action == "set":
        if len(options.values) != 2:
            raise ValueError(
                "set split_ids: expected a family and a file, for example `set split_ids vqav2 lists.json`"
            )
        settings = config.set_split_ids(settings, options.values[0], Path(options.values[1]))
    elif options.action == "unset":
        settings = config.unset(settings, options.key, options.values)
    if options.action != "show":
        config.save_config(settings)
    for folder in settings.families:
        print(f"families   {folder}")
    for family, file in settings.split_ids.items():
        print(f"split_ids  {family}  {file}")
    if not settings.families and not settings.split_ids:
        print(f"nothing is set in {settings.file}")
    if options.action in ("set", "show"):
        _left_out([])
    return EXIT_OK


def _left_out(folders: Sequence[Path]) -> bool:
    """Whether families of the user's are left out; says which and why."""
    from bitquake.tasks import catalog

    problems = catalog.problems(folders)
    for problem in problems:
        print(f"bitquake tasks: left out: {problem}", file=sys.stderr)
    return bool(problems)


def _data(options: argparse.Namespace) -> int:
    from bitquake.tasks import prepare_vqa, scaffold
    from bitquake.tasks.sources import listed

    if options.action == "list":
        from tabulate import tabulate

        rows = prepare_vqa.built_datasets()
        print(tabulate(rows, headers="keys") if rows else "nothing is built; `bitquake data prepare NAME` builds")
        return EXIT_OK
    given = {key: getattr(options, key) for key in ("questions", "annotations", "images")}
    absent = [f"--{key}" + (f" ({path} is not there)" if path else "") for key, path in given.items() if not _is(path)]
    if absent:
        print(f"{prepare_vqa.needed(options.name)}\nNot given: {', '.join(absent)}", file=sys.stderr)
        return EXIT_USAGE
    built = prepare_vqa.prepare(
        options.name,
        options.questions,
        options.annotations,
        options.images,
        split=options.split,
        patterns=options.image_pattern or prepare_vqa.PATTERNS,
        annotators=options.annotators,
        allow_missing=options.allow_missing,
        out=options.out,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(f"{built.file}: {built.rows:,} questions on {built.images:,} pictures")
    if built.left_out:
        print(
            f"left out: {built.left_out:,} questions, whose pictures are missing ({len(built.missing)}: "
            f"{listed(built.missing) or 'none'}) or broken ({len(built.broken)}: "
            f"{listed(built.broken) or 'none'})"
        )
    if options.family is not None:
        print(scaffold.new_family(options.name, "vqa", prepared=options.split, out=options.family))
    return EXIT_OK


def _is(path: Path | None) -> bool:
    return path is not None and path.exists()


def _quantize(options: argparse.Namespace) -> int:
    from bitquake.quantize_command import quantize, summary

    done = quantize(
        options.model,
        options.quant,
        options.out,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
    )
    print(summary(done))
    return EXIT_OK


def _card(options: argparse.Namespace) -> int:
    from bitquake.card_command import cards, describe

    whole = True
    for found in cards(options.path, artifacts=options.artifacts, check=not options.unchecked):
        print(found.card.to_json() if options.json else describe(found, modules=options.modules))
        for problem in found.problems:
            print(f"bitquake card: {problem}", file=sys.stderr)
        whole = whole and not found.problems
    return EXIT_OK if whole else EXIT_PROBLEM


def _selector(options: argparse.Namespace) -> int:
    from bitquake import selector_command

    if options.action == "apply":
        files = [path for path in options.paths if not path.is_dir()]
        runs = [path for path in options.paths if path.is_dir()]
        if not files or not runs:
            what = "a file of `bitquake selector fit`" if not files else "the output folder of a run"
            raise ValueError(f"apply: {what} is missing; give SELECTOR files and RUN folders")
        done = selector_command.apply(files, runs, options.out, artifacts=options.artifacts)
        print(selector_command.apply_summary(done, options.out))
        return EXIT_OK
    from bitquake.model_wrappers.selector.training import Options

    result = selector_command.fit(
        options.runs,
        options.out,
        Options(
            seed=options.seed,
            folds=options.folds,
            epochs=options.epochs,
            projection=options.project,
            limit=options.limit,
            hidden=options.hidden,
        ),
        name=options.name,
        target=options.target,
        tasks=options.tasks,
        artifacts=options.artifacts,
        allow_task=options.allow_task,
    )
    print(selector_command.fit_summary(result))
    return EXIT_OK


def _quants(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from bitquake.model_wrappers.quantizers import catalog

    if options.action == "list":
        print(tabulate(catalog.quants_table(), headers="keys"))
    elif options.action == "import":
        from bitquake.model_wrappers.quantizers.mmq import import_mmq

        print(import_mmq(options.file, options.out, kind=options.kind))
    else:
        print(catalog.describe_spec(options.name))
    return EXIT_OK


def _noise(options: argparse.Namespace) -> int:
    import inspect

    from PIL import Image
    from tabulate import tabulate

    from bitquake import noise

    if options.action == "list":
        every = [*noise.image_noises().values(), *noise.text_noises().values()]
        keys = ("name", "id", "version", "group", "exactness", "geometry")
        print(tabulate([{key: getattr(one, key) for key in keys} for one in every], headers="keys"))
        return EXIT_OK
    if options.action == "show":
        known = noise.NoiseSpec(options.name, 1).noise()
        rows = [{"severity": severity, **known.parameters[severity - 1]} for severity in noise.SEVERITIES]
        print(f"{known.name}: id {known.id}, version {known.version}, group {known.group}, {known.exactness},")
        print(f"geometry {known.geometry}\n\n{inspect.cleandoc(known.documentation)}\n")
        print(tabulate(rows, headers="keys"))
        return EXIT_OK

    from bitquake.noise.sheet import QUESTION, contact_sheet, save_image

    key = noise.SampleKey("", "", options.key or options.image.name)
    try:
        image = Image.fromarray(noise.load_rgb(options.image.read_bytes()))
    except noise.ImageError as error:
        raise noise.ImageError(f"{options.image}: {error}") from error
    if options.action == "apply":
        out = noise.apply(image, options.name, severity=options.severity, key=key, mode=options.mode, seed=options.seed)
    else:
        out = contact_sheet(
            image,
            names=options.noises,
            severities=_severities(options.severities),
            mode=options.mode,
            key=key,
            seed=options.seed,
            question=QUESTION if options.question is None else options.question,
            width=options.width,
        )
    save_image(out, options.out)
    print(options.out)
    return EXIT_OK


def _severities(written: Sequence[str]) -> list[int]:
    from bitquake.noise import SEVERITIES

    if list(written) == ["all"]:
        return list(SEVERITIES)
    wrong = [text for text in written if text not in map(str, SEVERITIES)]
    if wrong:
        raise ValueError(f"--severities: expected numbers from 1 to 5, or all, got {wrong[0]!r}.")
    return [int(text) for text in dict.fromkeys(written)]


def _importance(options: argparse.Namespace) -> int:
    from bitquake.importance_command import run

    return run(options)


def _run(options: argparse.Namespace) -> int:
    from bitquake import run_command

    return run_command.run(options)


def _leaderboard(options: argparse.Namespace) -> int:
    from bitquake import leaderboard_command

    return leaderboard_command.run(options)


def _doctor(_: argparse.Namespace) -> int:
    from bitquake import doctor

    return EXIT_OK if doctor.run() else EXIT_PROBLEM


def _demo(options: argparse.Namespace) -> int:
    from bitquake import demo

    return demo.run(options.out, limit=options.limit, jobs=options.jobs)


def _train(options: argparse.Namespace) -> int:
    from bitquake import train_command

    return train_command.run(options)


def _train_reference(options: argparse.Namespace) -> int:
    import torch

    from bitquake.reference_recipe import recipe_from
    from bitquake.reference_training import export, train

    if options.export:
        print(export(options.folder, options.export, spread=options.spread))
        return EXIT_OK
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = recipe_from(options.set, options.architecture)
    print(train(options.folder, recipe, minutes=options.minutes, stop=options.stop))
    return EXIT_OK


_COMMANDS = {
    "report": _report,
    "gate": _gate,
    "records": _records,
    "tasks": _tasks,
    "config": _config,
    "data": _data,
    "quantize": _quantize,
    "card": _card,
    "selector": _selector,
    "quants": _quants,
    "noise": _noise,
    "leaderboard": _leaderboard,
    "importance": _importance,
    "run": _run,
    "status": _run,
    "doctor": _doctor,
    "demo": _demo,
    "train": _train,
    "train-reference": _train_reference,
}


if __name__ == "__main__":
    sys.exit(main())
