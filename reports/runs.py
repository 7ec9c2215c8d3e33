"""Reads lmms-eval's output folders: which model answered which samples, and whether an answer is missing.

``lmms-eval --output_path DIR --log_samples`` writes, after the last task, ``DIR/<model>/<time>_results.json`` and then
``<time>_samples_<task>.jsonl`` for each task. Neither is written atomically, and a run that was killed may still exit
with 0: so the set of samples decides whether a cell (one model on one task) is whole. A damaged cell is named and left
out; it never takes another one with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import platformdirs
from pydantic import ValidationError

from bitquake.quant_card import QuantCard
from bitquake.records import IMPORTER, RECORD_KEY, RECORD_VERSION, SampleRecord
from bitquake.reports.formatting import clean_text
from bitquake.reports.problems import Problem, RunError

_SAMPLES = re.compile(r"(?P<stem>.+?)_samples_(?P<task>.+)\.jsonl")
_RERUN = "run the same lmms-eval command again"
_SHOWN_DETAILS = 3
_FURTHER_CONFIDENCE = re.compile(r"selector\w{0,40}|geometric_mean")
_NO_CONFIDENCES: Mapping[str, float] = {}
_CLEAN, _THRESHOLD, _DEV = "clean", "threshold", "dev"
_SAME_IN_A_CELL = (
    *("task", "family", "variant", "world", "protocol", "dataset", "split", "part", "subset", "shift_from", "noise"),
    *("dataset_revision", "primary_confidence"),
)
# Arguments of the wrapper that name the model or a place, or that the quant card tells better.
_NOT_SETTINGS = (
    "pretrained",
    "quant",
    "execution",
    "base",
    "artifacts",
    "journal",
    "device",
    "dtype",
    "revision",
    "batch_size",
    "workers",
    "max_batch_size",
    "features",
    "selector",
    "noise_cache",
    "noise_cache_gb",
)


@dataclass(frozen=True)
class Answer:
    """What a report needs of one sample record; confidences: those beside the primary one, where there are any."""

    image_id: str
    score: float
    scores: Mapping[str, float]
    confidence: float | None
    pixels: str
    prompt: str
    failed: bool
    parse_failure: bool
    confidences: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Cell:
    """One model on one task.

    answers: sample id -> answer, in the order of the ids. expected: samples that the run planned, if it tells.
    settings: everything but the quantization that must be the same in a pair, by name. damage: why the samples are
    not all there, or "".
    """

    task: str
    family: str
    variant: str
    world: str
    protocol: str
    dataset: str
    dataset_revision: str
    split: str
    part: str
    subset: str
    shift_from: str
    noise: dict[str, str | int] | None
    confidence_name: str
    source: str
    answers: dict[str, Answer]
    expected: int | None
    settings: dict[str, str]
    failures: dict[str, int]
    failure_details: dict[str, int]
    parse_failures: int
    truncated: int
    duplicates: int
    damage: str = ""

    @property
    def is_threshold(self) -> bool:
        return self.variant == _THRESHOLD or self.variant.endswith(f"_{_THRESHOLD}")

    @property
    def is_clean(self) -> bool:
        """The task that the family's noises are compared with."""
        return self.noise is None and self.variant == _CLEAN

    @property
    def severity(self) -> int:
        """Of the noise; 0 without one, or without a number for it."""
        try:
            return int((self.noise or {}).get("severity", 0))
        except ValueError:
            return 0

    @property
    def is_full(self) -> bool:
        """A noisy task on the whole split, of a family whose other noisy tasks run on a subset."""
        return self.noise is not None and self.variant.endswith("_full")

    @property
    def threshold_task(self) -> str:
        """The task whose samples fit this one's threshold: the in-distribution one's, for thresholds are chosen there.

        ``vqav2_threshold`` for ``vqav2_clean``, its noisy tasks, and whatever is shifted from ``vqav2_clean``;
        ``scienceqa_natural_science_threshold`` for that shift, which is in distribution itself, and what is shifted
        from it.
        """
        own = self.task if self.noise is None and self.variant != _CLEAN else f"{self.family}_{_CLEAN}"
        return f"{(self.shift_from or own).removesuffix(f'_{_CLEAN}')}_{_THRESHOLD}"


@dataclass
class Run:
    """One model (weights and quantization as loaded) over its tasks; ``card`` is None when its file is missing."""

    model_hash: str
    card_hash: str
    card: QuantCard | None
    label: str
    cells: dict[str, Cell] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Tells runs apart: hash of the model and of its card, or what lmms-eval was told where there is neither."""
        return f"{self.model_hash}/{self.card_hash}" if self.model_hash else self.label

    @property
    def is_full_precision(self) -> bool:
        return self.card is not None and self.card.method == "none"


@dataclass(frozen=True)
class InputFile:
    """A file that the report was made from."""

    path: str
    sha256: str
    n_bytes: int


@dataclass
class Inputs:
    """All that was read: runs by their key's order, problems, and the files with their hashes."""

    runs: list[Run]
    problems: list[Problem]
    files: list[InputFile]


def read_runs(folders: Sequence[Path], artifacts: Path | None = None) -> Inputs:
    """Read every run below the folders.

    Args:
        folders: output folders of lmms-eval, or folders above or below them; searched recursively.
        artifacts: folder with ``quant_cards/<hash>.json``; None looks where each run put them (``artifacts=`` of its
            model_args), then into the user cache.

    Raises:
        RunError: a folder does not exist, or no whole cell is found in any of them.
    """
    reader = _Reader(artifacts)
    for folder in _distinct(folders):
        reader.read(folder)
    if not any(not cell.damage for run in reader.runs.values() for cell in run.cells.values()):
        listed = "".join(f"\n  {problem}" for problem in sorted(reader.problems))
        raise RunError(
            f"no complete result in {', '.join(folder.name or str(folder) for folder in folders) or 'no folder at all'}"
            f"{listed}\nGive the --output_path folders of finished runs that had --log_samples."
        )
    runs = sorted(reader.runs.values(), key=lambda run: (run.label, run.key))
    files = sorted(reader.files.values(), key=lambda file: (file.path, file.sha256))
    return Inputs(runs, sorted(set(reader.problems)), files)


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Folders that exist, without repeats and without those inside another."""
    for folder in folders:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise RunError(f"{folder}: {what}; give a folder that lmms-eval wrote (--output_path)")
    resolved = {folder.resolve(): folder for folder in folders}
    return [folder for path, folder in resolved.items() if not any(other in path.parents for other in resolved)]


def public_name(text: str) -> str:
    """A hub id as it is, a local path as its last part: a report must not show anybody's folders."""
    return PurePath(text).name or text if re.match(r"[/~.\\]|[A-Za-z]:[\\/]", text) else text


def public_subject(card: QuantCard) -> str:
    """``QuantCard.subject`` without anybody's folders."""
    adapter = f" + {public_name(card.adapter.source)}" if card.adapter else ""
    return public_name(card.base or card.pretrained) + adapter


class _Reader:
    def __init__(self, artifacts: Path | None) -> None:
        self.artifacts = artifacts
        self.runs: dict[str, Run] = {}
        self.problems: list[Problem] = []
        self.files: dict[Path, InputFile] = {}
        self.cards: dict[str, QuantCard | None] = {}

    def read(self, folder: Path) -> None:
        results = sorted(folder.rglob("*_results.json"))
        samples = sorted(path for path in folder.rglob("*_samples_*.jsonl") if _SAMPLES.fullmatch(path.name))
        if not results and not samples:
            self.error(
                folder.name, "holds no result (lmms-eval writes only at the end: a killed run leaves none)", _RERUN
            )
        by_results: dict[Path, list[tuple[str, Path]]] = {path: [] for path in results}
        for path in samples:
            match = _SAMPLES.fullmatch(path.name)
            if match:
                by_results.setdefault(path.with_name(f"{match['stem']}_results.json"), []).append((match["task"], path))
        for results_path, sample_paths in sorted(by_results.items()):
            self.read_process(folder, results_path, sample_paths)

    def read_process(self, folder: Path, results_path: Path, sample_paths: list[tuple[str, Path]]) -> None:
        """One process of lmms-eval: its results file and its sample files."""
        where = _relative(results_path, folder)
        results = self.read_results(results_path, where, [_relative(path, folder) for _, path in sample_paths])
        if results is None:
            return
        # what Selectors learn from is neither shown nor paired
        sample_paths = [(task, path) for task, path in sample_paths if not _is_dev(results, task)]
        planned = {task for task in _mapping(results.get("n-samples")) if not _is_dev(results, task)}
        if not planned and not sample_paths:
            return
        for task in sorted(planned - {task for task, _ in sample_paths}):
            if RECORD_KEY in str(_mapping(results.get("configs")).get(task, RECORD_KEY)):
                fix = f"killed while writing, or run without --log_samples: {_RERUN}"
                self.error(where, f"no sample file for task {task!r}", fix)
        read: list[tuple[Cell, set[tuple[str, str]]]] = []
        for task, path in sample_paths:
            name = _relative(path, folder)
            try:
                found = self.read_cell(path, name, task, results)
            except OSError as error:  # one file that cannot be read costs no other
                self.error(name, f"cannot be read ({error.strerror})", f"make it readable, or {_RERUN}")
                continue
            if found is not None:
                read.append(found)
        models = sorted(set().union(*(models for _, models in read))) if read else []
        if len({model for model, _ in models}) > 1:
            self.error(
                where,
                f"answers of several models in one run (model hashes {', '.join(m[:8] or 'none' for m, _ in models)})",
                "the checkpoint was replaced under an old --use_cache; remove that cache and run again",
            )
            return
        if len(models) > 1:
            self.error(
                where,
                f"answers under several quant cards in one run ({', '.join(c[:8] or 'none' for _, c in models)})",
                "the environment changed under an old --use_cache; remove that cache and run again",
            )
            return
        model_hash, card_hash = models[0] if models else ("", "")
        run = self.run_of(model_hash, card_hash, results, where, results_path.parent)
        command = command_line(results)
        if read and command not in run.commands:
            run.commands = sorted([*run.commands, command])
        for cell, _ in read:
            self.add(run, cell)

    def read_results(self, path: Path, where: str, samples: list[str]) -> dict[str, Any] | None:
        if not path.is_file():
            what = f"is missing, so nothing tells how {', '.join(samples)} came about"
            self.error(where, what, f"restore it, or {_RERUN}")
            return None
        try:
            results = json.loads(self.text(path, where))
        except (OSError, ValueError) as error:
            self.error(where, f"cannot be read ({error}): cut short by a kill?", _RERUN)
            return None
        if not isinstance(results, dict) or not isinstance(results.get("n-samples"), dict):
            self.error(where, "is no results file of lmms-eval (no 'n-samples')", _RERUN)
            return None
        return results

    def text(self, path: Path, where: str) -> str:
        data = path.read_bytes()
        self.files[path.resolve()] = InputFile(where, hashlib.sha256(data).hexdigest(), len(data))
        return data.decode("utf-8")

    def read_cell(
        self, path: Path, where: str, task: str, results: Mapping[str, Any]
    ) -> tuple[Cell, set[tuple[str, str]]] | None:
        documents: dict[tuple[str, str], SampleRecord] = {}
        bad: list[str] = []
        contradicted: set[str] = set()
        foreign = duplicates = n_lines = 0
        for number, line in self.lines(path, where):
            n_lines += 1
            try:
                payload = json.loads(line)
                if isinstance(payload, dict) and RECORD_KEY not in payload:
                    foreign += 1
                    continue
                record = _record(payload)
            except (ValueError, RecursionError) as error:
                bad.append(f"line {number}: {error}")
                continue
            known = documents.setdefault((record.sample_id, f"{payload.get('doc_id', '')!s:>9}"), record)
            if known is not record:
                duplicates += 1
                if _said(known) != _said(record):
                    bad.append(f"line {number}: a second, different answer to sample {record.sample_id!r}")
                    contradicted.add(record.sample_id)
        records = _by_sample(documents)
        if foreign and not records and not bad:
            self.warn(where, f"task {task!r} holds no Bitquake records", "its own results stand in lmms-eval's table")
            return None
        if foreign:
            bad.append(f"{foreign} of {n_lines} lines without a record")
        if not records:
            self.error(where, "no readable sample" + (f" ({bad[0]})" if bad else " (the file is empty)"), _RERUN)
            return None
        ordered = [records[sample] for sample in sorted(records)]
        first = ordered[0]
        for name in _SAME_IN_A_CELL:
            values = sorted({json.dumps(getattr(record, name), sort_keys=True) for record in ordered})
            if len(values) > 1:
                what = f"samples of different {name}: {', '.join(values[:_SHOWN_DETAILS])}"
                self.error(where, what, f"remove the file and {_RERUN}")
                return None
        cell = Cell(
            task=first.task,
            family=first.family,
            variant=first.variant,
            world=first.world,
            protocol=first.protocol,
            dataset=first.dataset,
            dataset_revision=first.dataset_revision,
            split=first.split,
            part=first.part,
            subset=first.subset,
            shift_from=first.shift_from,
            noise=first.noise,
            confidence_name=first.primary_confidence,
            source=where,
            answers={s: _answer(records[s]) for s in sorted(records) if records[s].sample_id not in contradicted},
            expected=expected_samples(_mapping(results["n-samples"]).get(task), _mapping(results.get("config"))),
            settings=settings_of(results, task),
            failures=dict(sorted(Counter(record.failure for record in ordered if record.failure).items())),
            failure_details=dict(Counter(r.failure_detail for r in ordered if r.failure).most_common(_SHOWN_DETAILS)),
            parse_failures=sum(record.parse_failure for record in ordered),
            truncated=sum(record.truncated for record in ordered),
            duplicates=duplicates,
        )
        self.judge(cell, bad)
        return cell, {(r.model_hash, r.card) for r in ordered if r.model_hash or not r.failure}

    def judge(self, cell: Cell, bad: list[str]) -> None:
        """Note whether all samples are there."""
        n = len(cell.answers)
        reasons = []
        if n != cell.expected:
            reasons.append(f"{n} of {'an unknown number of' if cell.expected is None else cell.expected} samples")
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            reasons.append(f"{bad[0]}{more}")
        cell.damage = "; ".join(reasons)
        if cell.damage:
            self.error(cell.source, f"{cell.task} is incomplete: {cell.damage}", _RERUN)
        elif cell.duplicates:
            self.warn(cell.source, f"{cell.duplicates} samples stand there twice, with equal answers", "counted once")
        if cell.failures:
            counts = ", ".join(f"{name} {count}" for name, count in cell.failures.items())
            what = f"{sum(cell.failures.values())} of {n} samples of {cell.task} failed ({counts}), such as: "
            fix = "they score 0 and have no confidence; mend the cause and run it again to have them count"
            if cell.failures.keys() == {"target"}:
                fix = "no answer to them can be scored: they count 0 for every model"
            self.warn(cell.source, what + clean_text(next(iter(cell.failure_details))), fix)

    def lines(self, path: Path, where: str) -> Iterator[tuple[int, bytes]]:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                size += len(line)
                if line.strip():
                    yield number, line
        self.files[path.resolve()] = InputFile(where, digest.hexdigest(), size)

    def run_of(self, model_hash: str, card_hash: str, results: Mapping[str, Any], where: str, beside: Path) -> Run:
        arguments = model_arguments(results)
        card = self.card(card_hash, model_hash, arguments.get("artifacts"), where, beside) if card_hash else None
        told = arguments.get("pretrained") or str(results.get("model_name") or "model")
        label = public_subject(card) if card else public_name(told)
        if card is None and arguments.get("quant"):
            label += f" {arguments['quant']}"
        new = Run(model_hash, card_hash, card, label)
        run = self.runs.setdefault(new.key, new)
        if run.card is None and card is not None:
            run.card, run.label = card, label
        return run

    def card(self, card_hash: str, model_hash: str, told: str | None, where: str, beside: Path) -> QuantCard | None:
        if self.cards.get(card_hash) is None:
            self.cards[card_hash] = self.load_card(card_hash, model_hash, told, where, beside)
        return self.cards[card_hash]

    def load_card(
        self, card_hash: str, model_hash: str, told: str | None, where: str, beside: Path
    ) -> QuantCard | None:
        name = f"quant card {card_hash[:12]}"
        if not re.fullmatch(r"[0-9a-f]{16,128}", card_hash):
            self.error(where, f"{name!r} is not the hash of a quant card", "no pair can be formed; run again")
            return None
        if self.artifacts is not None:
            places = [self.artifacts]
        else:
            places = [Path(told).expanduser()] if told else []
            places.append(platformdirs.user_cache_path("bitquake", appauthor=False))
        places.append(beside)  # imported runs carry theirs with them
        for place in places:
            path = place / "quant_cards" / f"{card_hash}.json"
            if not path.is_file():
                continue
            try:
                card = QuantCard.model_validate_json(self.text(path, f"quant_cards/{path.name}"))
            except (OSError, ValueError) as error:
                what = f"{name} cannot be read ({str(error).splitlines()[0]})"
                self.error(where, what, "no pair can be formed; run again")
                return None
            if card.content_hash != card_hash or card.model_hash != model_hash:
                self.error(where, f"{name} was changed after the run: its content does not give its hash", "run again")
                return None
            return card
        self.error(
            where,
            f"{name} is missing from the artifacts folder, so what was done to the model is unknown; no pair",
            "give the folder that the run had as artifacts= (bitquake report --artifacts DIR)",
        )
        return None

    def add(self, run: Run, cell: Cell) -> None:
        """Put a cell into its run; of two results for one task the whole one stays, and different ones go."""
        other = run.cells.get(cell.task)
        if other is None:
            run.cells[cell.task] = cell
            return
        old, new = sorted([other, cell], key=lambda c: c.source)
        if old.damage or new.damage:
            run.cells[cell.task] = old if new.damage and not old.damage else new
            return
        if old.answers == new.answers and old.settings == new.settings:
            self.warn(new.source, f"repeats {old.source} with equal answers", "it was counted once")
            return
        names = [
            name
            for name in old.settings.keys() | new.settings.keys()
            if old.settings.get(name) != new.settings.get(name)
        ]
        answers = [a for a in old.answers.keys() | new.answers.keys() if old.answers.get(a) != new.answers.get(a)]
        what = ", ".join([*sorted(names), *([f"{len(answers)} answers"] if answers else [])])
        new.damage = f"two results for {cell.task} that differ in {what}: {old.source} and {new.source}"
        new.answers = {}
        run.cells[cell.task] = new
        self.error(new.source, new.damage, "remove one of them")

    def error(self, where: str, what: str, fix: str) -> None:
        self.problems.append(Problem("error", where, what, fix))

    def warn(self, where: str, what: str, fix: str) -> None:
        self.problems.append(Problem("warning", where, what, fix))


def expected_samples(counts: Any, config: Mapping[str, Any]) -> int | None:
    """Samples that lmms-eval set out to answer; None when its results file does not tell.

    Its ``effective`` knows of ``--limit`` but not of ``--offset``.
    """
    counts = _mapping(counts)
    try:
        left = int(counts["original"]) - int(config.get("offset") or 0)
        return max(0, min(int(counts["effective"]), left))
    except (KeyError, TypeError, ValueError):
        return None


def model_arguments(results: Mapping[str, Any]) -> dict[str, str]:
    """``model_args`` as strings, however lmms-eval noted them."""
    arguments = _mapping(results.get("config")).get("model_args")
    if isinstance(arguments, str):
        pairs = (part.partition("=") for part in arguments.split(",") if "=" in part)
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {str(name): str(value) for name, value in _mapping(arguments).items()}


def settings_of(results: Mapping[str, Any], task: str) -> dict[str, str]:
    """What lmms-eval was told besides the quantization, as name -> canonical text."""
    config = _mapping(results.get("config"))
    task_config = _mapping(_mapping(results.get("configs")).get(task))
    arguments = model_arguments(results)
    told = {name: value for name, value in arguments.items() if name not in _NOT_SETTINGS}
    settings: dict[str, Any] = {f"model argument {name}": value for name, value in told.items()}
    settings["model wrapper"] = config.get("model")
    settings["batch size"] = str(arguments.get("batch_size", config.get("batch_size")))
    settings["generation arguments"] = config.get("gen_kwargs") or None
    settings["task generation arguments"] = task_config.get("generation_kwargs")
    settings["task metadata"] = _without_dev(task_config.get("metadata"))
    settings["task version"] = _mapping(results.get("versions")).get(task)
    settings["few-shot examples"] = _mapping(results.get("n-shot")).get(task)
    settings["system instruction"] = results.get("system_instruction_sha")
    settings["chat template"] = results.get("chat_template_sha")
    return {name: json.dumps(value, sort_keys=True) for name, value in sorted(settings.items()) if value is not None}


def _is_dev(results: Mapping[str, Any], task: str) -> bool:
    """Whether a task is a family's ``<family>_dev``."""
    metadata = _mapping(_mapping(_mapping(results.get("configs")).get(task)).get("metadata"))
    return task == f"{_mapping(metadata.get('bitquake')).get('family')}_{_DEV}"


def _without_dev(metadata: Any) -> Any:
    """A task's metadata but for the family's split ``dev``, which says nothing about any other task's rows."""
    told = _mapping(_mapping(metadata).get("bitquake"))
    if _DEV not in _mapping(told.get("splits")):
        return metadata
    splits = {role: split for role, split in told["splits"].items() if role != _DEV}
    return {**metadata, "bitquake": {**told, "splits": splits}}


def command_line(results: Mapping[str, Any]) -> str:
    """The command that repeats the run, local folders shortened to their last part."""
    config = _mapping(results.get("config"))
    if config.get("model") == IMPORTER:
        return str(config.get("command"))
    arguments = {name: _public_argument(value) for name, value in model_arguments(results).items()}
    if "selector" in arguments:  # several files, joined by "+"
        files = model_arguments(results)["selector"].split("+")
        arguments["selector"] = "+".join(public_name(file) for file in files)
    words = ["lmms-eval", "--model", str(config.get("model", "?"))]
    if arguments:
        words += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    words += ["--tasks", ",".join(sorted(_mapping(results.get("n-samples"))))]
    for option in ("batch_size", "device", "limit", "offset", "gen_kwargs"):
        if value := config.get(option):
            # lmms-eval reads a limit as a float, of which a part below 1 is a share
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    return " ".join([*words, "--log_samples", "--output_path", "OUT"])


def _public_argument(value: str) -> str:
    """An argument with its folder shortened, also inside a quantization's overrides (``a:calibration.data=DIR``)."""
    parts = (part.partition("=") for part in value.split(":"))
    return ":".join(f"{key}{equals}{public_name(told)}" if equals else public_name(key) for key, equals, told in parts)


def _relative(path: Path, folder: Path) -> str:
    return f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _record(payload: Any) -> SampleRecord:
    """The sample record in a line; ValueError with a one-line reason."""
    record = payload.get(RECORD_KEY) if isinstance(payload, dict) else None
    if not isinstance(record, dict):
        raise ValueError("no sample record")
    version = record.get("version")
    if version != RECORD_VERSION:
        raise ValueError(f"sample record of version {version!r}, this Bitquake reads {RECORD_VERSION}")
    try:
        found = SampleRecord.model_validate(record)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise ValueError(f"sample record: {'.'.join(map(str, details['loc']))}: {details['msg']}") from None
    for name, value in found.scores.items():
        if not name or not 0 <= value <= 1:  # NaN too
            raise ValueError(f"sample record: scores.{name}: expected a number from 0 to 1, got {value}")
    return found


def _said(record: SampleRecord) -> tuple[object, ...]:
    """What two records of one answer must have in common."""
    return record.score, record.scores, record.primary, record.pixel_hash


def _by_sample(documents: Mapping[tuple[str, str], SampleRecord]) -> dict[str, SampleRecord]:
    """Sample id -> record; a dataset may hold the same sample twice (two documents of lmms-eval), and both count."""
    records: dict[str, SampleRecord] = {}
    for (sample, document), record in sorted(documents.items()):
        records[f"{sample} (document {document.strip()})" if sample in records else sample] = record
    return records


def _answer(record: SampleRecord) -> Answer:
    confidence = record.primary
    if record.failure or (confidence is not None and not 0 <= confidence <= 1):
        confidence = None
    further = _NO_CONFIDENCES
    if not record.failure:
        further = {
            name: value
            for name, value in sorted(record.confidence.items())
            if value is not None
            and 0 <= value <= 1  # not NaN either
            and name != record.primary_confidence
            and _FURTHER_CONFIDENCE.fullmatch(name)
        }
    return Answer(
        image_id=record.image_id,
        score=record.score,
        scores={} if record.failure else record.scores,
        confidence=confidence,
        pixels="/".join(record.pixel_hash),
        prompt=record.prompt_hash,
        failed=record.failure is not None,
        parse_failure=record.parse_failure,
        confidences=further,
    )
