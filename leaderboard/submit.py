"""From finished runs to submissions: complete for their board, without anybody's folders, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquake import __version__
from bitquake.leaderboard.boards import Board, BoardTask
from bitquake.leaderboard.strict_json import clean_answer, text_problem
from bitquake.leaderboard.submission import FOLDER, LONGEST_ANSWER, MANIFEST_VERSION, Row, encode, read_submission
from bitquake.quant_card import QuantCard
from bitquake.records import RECORD_KEY, SampleRecord
from bitquake.reports.pairing import model_differences, quantization_name, run_name
from bitquake.reports.runs import Cell, Run, public_name, public_subject, read_runs
from bitquake.tasks.scoring.gold import short_pixels, short_question

_SAMPLES = re.compile(r".+?_samples_.+\.jsonl")
_PLACES = re.compile(r",(?:artifacts|journal)=[^, ]*|(?<= )(?:artifacts|journal)=[^, ]*,")
"""Arguments that say where a run kept its files, which changes no answer."""
_LONGEST_SETTING = 80
_DIGITS = 6
"""Significant digits of a confidence: differences below that are the machine's."""
_SELECTOR = "selector"


class SubmitError(ValueError):
    """Runs that make no submission; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Written:
    """A submission on disk; ``changed`` is False where it stood there already, byte for byte."""

    folder: Path
    n_rows: int
    n_bytes: int
    twin: str
    changed: bool


def submit(
    runs: Sequence[Path],
    board: Board,
    organisation: str,
    out: Path,
    *,
    artifacts: Path | None = None,
    model: str = "",
    quantization: str = "",
    twin: str = "",
    contact: str = "",
    link: str = "",
) -> list[Written]:
    """Write a submission for each model among the runs, the full-precision ones first.

    Args:
        runs: output folders of lmms-eval (``--log_samples``); several of one model are put together.
        board: every task of it must be whole; other tasks are left out. Of a task with more samples than the board
            has, the first are taken, as ``--limit`` would.
        organisation, model, quantization: parts of the folder's name; model and quantization default to the card's.
        out: the folder of all submissions.
        artifacts: folder with ``quant_cards/``, see ``reports.read_runs``.
        twin: folder name of the full-precision submission; "": the full-precision model among the runs.
        contact, link: shown with the submission; the link is http or https.

    Raises:
        SubmitError: incomplete runs, no twin, a name in use, several models under one name.
        RunError: folders without a result.
        SubmissionError: a text that must not stand in a submission, or one that is too large.
    """
    inputs = read_runs(runs, artifacts)
    found = [run for run in inputs.runs if run.cells.keys() & board.by_task.keys()]
    if not found:
        raise SubmitError(f"no run of a task of the board {board.board}; `bitquake leaderboard board {board.board}`")
    if (model or quantization) and len(found) > 1:
        listed = ", ".join(run_name(run) for run in found)
        raise SubmitError(f"--model and --quantization name one submission, and the runs are {len(found)}: {listed}")
    problems = [problem for problem in inputs.problems if problem.level == "error"]
    files = _sample_files(runs)
    prepared: dict[str, tuple[Run, QuantCard, list[Row]]] = {}
    for run in sorted(found, key=lambda run: (not run.is_full_precision, run.label, run.key)):
        if run.card is None or run.card.self_declared:
            listed = "".join(f"\n  {problem}" for problem in problems)
            raise SubmitError(f"{run.label}: has no quant card of a loaded model, and nobody may guess one{listed}")
        _check_complete(run, board, [str(problem) for problem in problems])
        card = public_card(run.card)
        parts = (organisation, model or slug(public_subject(card)), quantization or slug(quantization_name(card)))
        name = "__".join(parts)
        if not FOLDER.fullmatch(name):
            raise SubmitError(
                f"{name}: give names of a-z, 0-9, dots and dashes (--organisation, --model, --quantization)"
            )
        if name in prepared:
            other = prepared[name][0]
            raise SubmitError(f"{run_name(other)} and another run would both be {name}; submit one with --quantization")
        prepared[name] = (run, card, _rows(run, board, files))
    contents = {}
    for name, (run, card, rows) in prepared.items():
        chosen = _twin(name, run, {key: value[0] for key, value in prepared.items()}, twin, out)
        manifest = _manifest(name, board, run, card, rows, chosen) | {"contact": contact, "link": link}
        contents[name] = (encode(manifest, card, rows), len(rows), chosen)
    return [_write(out / name, content, n, chosen) for name, (content, n, chosen) in contents.items()]


def slug(text: str) -> str:
    """A name for a folder: the last part of a hub id, lower case, with dashes for everything else."""
    name = "-".join(re.findall(r"[a-z0-9.]+", text.rpartition("/")[2].lower())).strip(".-")
    return name[:64].strip(".-")


def public_card(card: QuantCard) -> QuantCard:
    """A card without anybody's folders; where there are none, the same card with the same hash."""
    adapter = card.adapter and card.adapter.model_copy(update={"source": public_name(card.adapter.source)})
    data = card.calibration.model_copy(update={"data": public_name(card.calibration.data)})
    changes = {
        "pretrained": public_name(card.pretrained),
        "base": public_name(card.base) if card.base else "",
        "adapter": adapter,
        "calibration": data if card.calibration.data else card.calibration,
        "spec": _public(card.spec),
        "spec_name": ":".join(_public_option(option) for option in card.spec_name.split(":")),
    }
    return card.model_copy(update=changes)


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, list):
        return [_public(below) for below in value]
    return {key: _public(below) for key, below in value.items()} if isinstance(value, dict) else value


def _public_option(option: str) -> str:
    key, equals, told = option.partition("=")
    return f"{key}{equals}{public_name(told)}" if equals else public_name(key)


def _check_complete(run: Run, board: Board, problems: Sequence[str]) -> None:
    """Every task of the board, whole.

    Raises:
        SubmitError: with each task that is not, and how to run it.
    """
    lacking = []
    for task in board.tasks:
        cell = run.cells.get(task.task)
        if cell is None:
            lacking.append((task, "was not run"))
        elif cell.damage:
            lacking.append((task, cell.damage))
        elif len(cell.answers) < task.n:
            lacking.append((task, f"has {len(cell.answers)} of {task.n} samples"))
    if not lacking:
        return
    listed = "".join(f"\n  {task.task} {why}" for task, why in lacking)
    about = "".join(f"\n  {problem}" for problem in problems)
    limits = sorted({task.n for task, _ in lacking})
    commands = "".join(
        f"\n  --tasks {','.join(task.task for task, _ in lacking if task.n == n)} --limit {n}" for n in limits
    )
    raise SubmitError(
        f"{run_name(run)}: {len(lacking)} of {len(board.tasks)} tasks of the board {board.board} are not whole:{listed}"
        f"{about}\nrun them with the settings of the others:{commands}"
    )


def _sample_files(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Sample files by the name that ``read_runs`` gives them in ``Cell.source``."""
    found: dict[str, list[Path]] = {}
    for folder in runs:
        for path in folder.rglob("*_samples_*.jsonl"):
            if _SAMPLES.fullmatch(path.name):
                name = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
                known = found.setdefault(name, [])
                if path.resolve() not in known:
                    known.append(path.resolve())
    return found


def _rows(run: Run, board: Board, files: Mapping[str, Sequence[Path]]) -> list[Row]:
    rows: list[Row] = []
    for task in board.tasks:
        rows += _task_rows(run, run.cells[task.task], task, board, files)
    return rows


def _task_rows(
    run: Run, cell: Cell, task: BoardTask, board: Board, files: Mapping[str, Sequence[Path]]
) -> Iterator[Row]:
    """The first ``task.n`` samples of a cell, in the order of lmms-eval's documents."""
    # Folders of one name give their files one name too; the model's hash in the records tells them apart.
    paths = [path for path in files.get(cell.source, []) if _is_of(run, path)]
    if not paths:
        raise SubmitError(f"{cell.source}: is gone, or was changed while it was read; submit again")
    documents: dict[int, SampleRecord] = {}
    with paths[0].open("rb") as lines:
        for line in lines:
            if line.strip():
                payload = json.loads(line)
                documents[int(payload["doc_id"])] = SampleRecord.model_validate(payload[RECORD_KEY])
    chosen = [documents[number] for number in sorted(documents)[: task.n]]
    ids = {record.sample_id for record in chosen}
    if len(ids) != task.n or not ids <= cell.answers.keys():
        raise SubmitError(f"{run_name(run)}: {task.task}: {len(ids)} different samples, the board has {task.n}")
    if any(record.pixel_hash and not record.prompt_hash for record in chosen):
        raise SubmitError(f"{run_name(run)}: {task.task}: records without prompt hashes; run it with bitquake_hf")
    return (row_of(record, board) for record in chosen)


def _is_of(run: Run, path: Path) -> bool:
    """Whether a sample file holds a model's answers; failed samples may name no model."""
    with path.open("rb") as lines:
        for line in lines:
            record = json.loads(line)[RECORD_KEY] if line.strip() else {}
            if record.get("model_hash"):
                return bool(record["model_hash"] == run.model_hash and record["card"] == run.card_hash)
    return False


def row_of(record: SampleRecord, board: Board) -> Row:
    """What a submission keeps of a sample record."""
    failed = record.failure is not None
    kept = {record.primary_confidence, *board.confidences}
    confidence = {
        name: _rounded(value)
        for name, value in sorted(record.confidence.items())
        if not failed and (name in kept or name.startswith(_SELECTOR))
    }
    return Row(
        task=record.task,
        id=record.sample_id,
        answer=None if failed or record.answer is None else clean_answer(record.answer, LONGEST_ANSWER),
        confidence=confidence,
        pixels=short_pixels(record.pixel_hash),
        question=short_question(record.question_hash),
        prompt=short_question(record.prompt_hash),
        failure=record.failure,
        parse_failure=True if record.parse_failure and not failed else None,
        truncated=True if record.truncated else None,
    )


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if value is not None and 0 <= value <= 1 else None


def _manifest(name: str, board: Board, run: Run, card: QuantCard, rows: Sequence[Row], twin: str) -> dict[str, Any]:
    organisation, model, quantization = name.split("__")
    return {
        "version": MANIFEST_VERSION,
        "board": board.board,
        "organisation": organisation,
        "model": model,
        "quantization": quantization,
        "twin": twin,
        "card_hash": card.content_hash,
        "model_hash": card.model_hash,
        "commands": [_PLACES.sub("", command) for command in run.commands],
        "versions": {"bitquake": __version__, **card.libraries},
        "tasks": {task.task: _entry(run.cells[task.task], task.n) for task in board.tasks},
    }


def _entry(cell: Cell, n: int) -> dict[str, Any]:
    fields = (
        *("family", "variant", "world", "protocol", "dataset", "dataset_revision", "split", "part", "subset"),
        *("shift_from", "noise"),
    )
    return {
        **{name: getattr(cell, name) for name in fields},
        "primary_confidence": cell.confidence_name,
        "settings": {name: _short(value) for name, value in sorted(cell.settings.items())},
        "n": n,
    }


def _short(setting: str) -> str:
    """A setting, or its hash where it is long: a pair must have it in common, and nobody reads a page of JSON."""
    if len(setting) <= _LONGEST_SETTING and text_problem(setting) is None:
        return setting
    return f"blake2b:{hashlib.blake2b(setting.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"


def _twin(name: str, run: Run, runs: Mapping[str, Run], told: str, out: Path) -> str:
    """The folder name of a run's twin; "" for full precision.

    Raises:
        SubmitError: none among the runs or in ``out``, or several.
    """
    if run.is_full_precision:
        return ""
    if told:
        if not (out / told).is_dir() and told not in runs:
            raise SubmitError(f"--twin {told}: is not in {out}; submit the full-precision run first")
        return told
    full = {key: other for key, other in runs.items() if other.is_full_precision}
    fitting = [
        key
        for key, other in full.items()
        if other.card is not None
        and run.card is not None
        and other.card.subject == run.card.subject
        and not model_differences(run, other)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SubmitError(f"{name}: {' and '.join(fitting)} could be its full-precision twin; give --twin")
    nearest = ""
    for key, other in full.items():
        nearest += f"\n  {key} is none: {'; '.join(model_differences(run, other)) or 'it is another model'}"
    raise SubmitError(
        f"{name}: needs its full-precision twin: give that model's run too, or --twin with the folder name of its "
        f"submission in {out}{nearest}"
    )


def _write(folder: Path, content: Mapping[str, bytes], n_rows: int, twin: str) -> Written:
    """Put the folder in its place at once; what stands there is never changed.

    Raises:
        SubmitError: another submission has the name.
    """
    n_bytes = sum(map(len, content.values()))
    if os.path.lexists(folder):
        held = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
        if held == content:
            return Written(folder, n_rows, n_bytes, twin, changed=False)
        raise SubmitError(
            f"{folder}: another submission stands there, and submissions are not changed; give another --quantization "
            "or --organisation, or remove it if it was never published"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        for name, data in content.items():
            with (building / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        building.chmod(0o755)
        building.rename(folder)
    except OSError as error:
        raise SubmitError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    read_submission(folder)
    return Written(folder, n_rows, n_bytes, twin, changed=True)
