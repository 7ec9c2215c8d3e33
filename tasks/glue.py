"""The functions that lmms-eval calls for a task, made from the task's own YAML file.

lmms-eval gives a document to a task's functions and nothing else, so each task has functions of its own. The glue
module in an expanded folder hands them out: ``!function glue.process_results__block_vqav2_fog_3`` reads
``block_vqav2_fog_3.yaml`` beside it, binds ``process_results`` to what stands there, and returns that. The YAML is the
only place where a task is described: a file edited after export does what it says.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from pydantic import ValidationError

from bitquake.envelope import Envelope, EnvelopeError, decode
from bitquake.noise import ImageError, NoiseCache, NoiseSpec, SampleKey, as_picture, load_rgb
from bitquake.records import RECORD_KEY, Failure, SampleRecord, question_hash

from . import aggregate, answers, sources
from .answers import Outcome
from .contract import TaskContract, protocol_scores
from .documents import IDS, Rows, prepare, require_columns
from .expand import threshold_of
from .families import FamilyError, fill
from .schema import Split, Subset
from .scoring import TargetError
from .scoring.caption import Corpus
from .scoring.choice import LETTERS
from .scoring.retrieval import CandidateError
from .selection import describe
from .strict_yaml import load_task_yaml
from .variants import DEV, FULL, THRESHOLD, why_not


@dataclass(frozen=True)
class References:
    """The references of every row of a task's part, subset or not; equal where the rows are."""

    fingerprint: str
    values: list[Any] = field(compare=False, repr=False)


@dataclass
class Task:
    """One task as its YAML file describes it; its methods are what lmms-eval calls.

    lmms-eval asks for the functions of a file one by one, and they are all bound to one of these: what
    ``process_docs`` finds out about the dataset (``references``, ``problem``, ``revision``) the others know.
    data_file: the parquet file of the split, where the dataset consists of files; noise_cache: where pictures with the
    task's noise are looked up first.
    """

    file: str
    name: str
    split: str
    noise: NoiseSpec | None
    noise_as_written: Any
    contract: TaskContract
    references: References | None = field(default=None, init=False)
    problem: str = field(default="", init=False)
    data_file: Path | None = field(default=None, init=False)
    revision: str = field(default="", init=False)
    noise_cache: NoiseCache | None = field(default=None, init=False, compare=False)

    @property
    def variant(self) -> str:
        """``clean``, ``threshold``, ``dev``, ``fog_3``, ``fog_3_full``, a shift's name, ``<shift>_threshold``."""
        return self.name.removeprefix(f"{self.contract.family}_")

    @property
    def part(self) -> Split:
        """The part of the split that the task evaluates."""
        splits, shifts = self.contract.splits, self.contract.shifts
        if self.variant in shifts:
            return shifts[self.variant]
        if self.variant == THRESHOLD:
            return splits.threshold
        if self.variant == DEV and splits.dev is not None:
            return splits.dev
        shift = self._threshold_of()
        if shift is not None:
            return threshold_of(shifts[shift], splits.threshold)
        return splits.test

    @property
    def subset(self) -> Subset | None:
        return None if self.noise is None or self.variant.endswith(f"_{FULL}") else self.contract.noise_subset

    @property
    def shift_from(self) -> str:
        """The task that is in distribution for this one; "" where this one is itself."""
        shift = self.contract.shifts.get(self.variant)
        if shift is not None:
            return "" if shift.shift_from is None else f"{self.contract.family}_{shift.shift_from}"
        return "" if self._threshold_of() is not None else self.contract.shift_from

    @property
    def rows(self) -> Rows:
        """What the task wants of its split."""
        return Rows(
            split=self.part,
            subset=self.subset,
            explode=self.contract.explode,
            candidates=self.contract.candidates,
            need_size=self.contract.protocol == "grounding",
            folder=Path(self.file).parent,
        )

    @functools.cached_property
    def part_for_people(self) -> str:
        return describe(self.part, Path(self.file).parent)

    def with_noise_cache(self, cache: NoiseCache) -> Task:
        """The same task, its noisy pictures out of a cache; this one stays as it is."""
        task = copy.copy(self)
        task.noise_cache = cache
        return task

    def picture(self, source: Any, key: SampleKey) -> Image.Image:
        """A picture as RGB, with the task's image noise, if it has one.

        Raises:
            ImageError: the picture is missing or does not decode.
        """
        if self.noise is None or self.noise.medium != "image":
            return as_picture(load_rgb(source))
        if self.noise_cache is not None:
            return as_picture(*self.noise_cache.picture(self.noise, source, key))
        return as_picture(self.noise.apply(load_rgb(source), key))

    def key(self, doc: Mapping[str, Any]) -> SampleKey:
        """What seeds the document's noise."""
        return SampleKey(self.contract.dataset, self.split, doc[IDS]["sample_id"])

    def corpus(self) -> Corpus:
        """caption: document frequencies of every reference of the part, whatever subset or limit is evaluated.

        Raises:
            FamilyError: ``process_docs`` did not run in this process, or failed.
        """
        if self.references is None:
            raise FamilyError(
                f"{self.file}: captions are scored by the references of the whole split, which process_docs of the "
                f"same task keeps: call it first, in this process ({self.problem or 'it was not called'})"
            )
        return _corpus(self.references)

    def see_to_data(self) -> None:
        """Convert a table, or refuse a damaged file, before lmms-eval loads it.

        Raises:
            FamilyError: see :func:`bitquake.tasks.sources.make_ready`.
        """
        if self.data_file is None:
            return
        try:
            sources.make_ready(self.data_file, self.contract.sources.get(self.split))
        except FamilyError as error:
            raise FamilyError(f"{self.name}: {error}") from error

    def process_docs(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The task's rows. A dataset that is not as declared is left as it is: ``doc_to_text`` says so.

        lmms-eval calls this five times before it reports an error, two seconds apart and without its text.
        """
        self.problem = ""
        self.revision = sources.revision(dataset, self.data_file)
        try:
            return self.prepared(dataset)
        except FamilyError as error:
            self.problem = str(error)
            return dataset

    def prepared(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The task's rows.

        Raises:
            FamilyError: see :func:`bitquake.tasks.documents.prepare`.
        """
        columns, wanted = self.contract.columns, self.rows
        ready = prepare(dataset, columns, wanted)
        _ = self.part_for_people  # read now: after days of answers the folder may have been pruned
        if self.contract.protocol == "caption":
            whole = ready if wanted.subset is None else prepare(dataset, columns, replace(wanted, subset=None))
            values = whole.select_columns([columns.captions])[:][columns.captions]
            self.references = References(whole._fingerprint, values)
        return ready

    def doc_to_visual(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[Image.Image]:
        """The document's picture as RGB, corrupted as the task says; none for a row without one, where that is allowed.

        Raises:
            ImageError: the picture is missing or does not decode.
            FamilyError: the mapping is not the one of this task's YAML (see ``check``).
        """
        self.check(doc, lmms_eval_specific_kwargs)
        encoded = doc.get(self.contract.columns.image)
        if encoded is None and self.contract.text_only_rows:
            return []
        try:
            return [self.picture(encoded, self.key(doc))]
        except ImageError as error:
            raise ImageError(f"{error} (task {self.name}, sample {doc[IDS]['sample_id']})") from error

    def doc_to_text(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
        """The question with its hint and choices, between ``pre_prompt`` and ``post_prompt``.

        A text noise changes the question alone: hint, choices and the instructions around them stay.

        Raises:
            FamilyError: the dataset does not have what the family declares, or ``check`` fails. lmms-eval asks for one
                text when it loads a task, so this comes before any model runs.
        """
        self.check(doc, lmms_eval_specific_kwargs)
        columns, text = self.contract.columns, self.contract.text
        values = {"question": self.question(doc), "hint": "", "choices": ""}
        if columns.hint is not None and (hint := _text(doc[columns.hint])):
            values["hint"] = fill(text.hint, {"hint": hint})
        if columns.choices is not None:
            options = zip(LETTERS, doc[columns.choices] or [], strict=False)
            written = [fill(text.option, {"letter": letter, "choice": _text(choice)}) for letter, choice in options]
            values["choices"] = text.separator.join(written)
        before, after = (lmms_eval_specific_kwargs.get(key) or "" for key in ("pre_prompt", "post_prompt"))
        return f"{before}{fill(text.template, values)}{after}"

    def question(self, doc: Mapping[str, Any]) -> str:
        """The document's own question, as the model gets it; "" where rows have none."""
        column = self.contract.columns.question
        question = "" if column is None else _text(doc[column])
        if self.contract.text.case == "capitalize":
            question = question.capitalize()
        if self.noise is not None and self.noise.medium == "text":
            question = self.noise.apply_text(question, self.key(doc))
        return question

    def doc_to_target(self, doc: Mapping[str, Any]) -> Any:
        """The reference answer, as logs show it; "" where it cannot be scored."""
        try:
            return answers.target(self, doc)
        except TargetError:
            return ""

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """The sample record, and the sample's value for every metric of the task; raises for no output of a model."""
        record = self.record(doc, results[0] if results else "")
        confidence = record.primary
        values: dict[str, Any] = {RECORD_KEY: record.model_dump(mode="json")}
        for key in self.contract.metrics:
            value = aggregate.item(record.score, confidence, record.image_id)
            if key == "accuracy":
                values[key] = aggregate.accuracy_item(record.score, record.image_id)
            else:
                values[key] = value
            values[f"{key}_ci"] = value
        for key in protocol_scores(self.contract.protocol, self.contract.candidates, self.contract.extends):
            failed = record.failure is not None
            values[key] = values[f"{key}_ci"] = aggregate.score_item(record.scores.get(key), failed, record.image_id)
        failures, parse_failures = [int(record.failure is not None)], [int(record.parse_failure)]
        return values | {
            "failures": failures,
            "parse_failures": parse_failures,
            "parse_failure_rate": parse_failures,
        }

    def doc_to_messages(
        self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Only families that extend a stock task with messages of its own have any; see ``bitquake.tasks.extended``."""
        raise NotImplementedError(f"{self.file}: the task has no messages of its own")

    def record(self, doc: Mapping[str, Any], response: str) -> SampleRecord:
        """Score one response: an envelope of our wrappers, or the plain text of any other model."""
        failure: Failure | None = None
        detail, outcome = "", Outcome(0.0, {}, None)
        try:
            envelope = decode(response)
        except EnvelopeError as error:
            envelope, failure, detail = Envelope(text=response), "envelope", str(error)
        column = self.contract.columns.question
        if column is not None and not _text(doc[column]).strip():
            failure, detail = "question", f"question: column {column!r} is empty in this row"
        elif envelope.error is not None:
            failure, detail = _failure_kind(envelope.error), envelope.error
        elif failure is None:
            try:
                outcome = self.outcome(doc, envelope)
                detail = outcome.remark
            except TargetError as error:
                failure, detail = "target", str(error)
            except CandidateError as error:
                failure, detail = "model", str(error)
        confidence = {} if failure else dict(envelope.confidence)
        options = envelope.option_probabilities
        if not failure and options and outcome.answer in options:
            confidence["options"] = options[outcome.answer]
        return SampleRecord(
            family=self.contract.family,
            variant=self.variant,
            task=self.name,
            world=self.contract.world,
            dataset=self.contract.dataset,
            dataset_revision=self.revision,
            split=self.split,
            part=self.part_for_people,
            shift_from=self.shift_from,
            sample_id=doc[IDS]["sample_id"],
            image_id=doc[IDS]["image_id"],
            protocol=self.contract.protocol,
            score=outcome.score,
            scores=outcome.scores,
            answer=outcome.answer,
            text=envelope.text,
            parse_failure=outcome.parse_failure,
            failure=failure,
            failure_detail=detail,
            confidence=confidence,
            primary_confidence=self.contract.confidence,
            noise=None if self.noise is None else self.noise.to_mapping(),
            pixel_hash=envelope.pixel_hash,
            prompt_hash=envelope.prompt_hash,
            model_hash=envelope.model_hash,
            card=envelope.card,
            subset=doc[IDS]["subset"],
            n_tokens=envelope.n_tokens,
            truncated=envelope.truncated,
            question_hash=question_hash(self.question(doc)),
            features=envelope.features,
        )

    def outcome(self, doc: Mapping[str, Any], envelope: Envelope) -> Outcome:
        """Score an answer; see :func:`bitquake.tasks.answers.outcome`."""
        return answers.outcome(self, doc, envelope)

    def check(self, doc: Mapping[str, Any], kwargs: Any) -> None:
        """Refuse a document that was not prepared, and a mapping that would silently change the noise.

        A model-named key in ``lmms_eval_specific_kwargs`` replaces ``default``: the task would run clean, and its
        records would say otherwise.
        """
        written = kwargs.get("noise", "missing") if isinstance(kwargs, Mapping) else "missing"
        if written != self.noise_as_written:
            raise FamilyError(
                f"{self.file}: lmms_eval_specific_kwargs: this model is given noise: {written!r}, the task's `default` "
                f"says {self.noise_as_written!r}. A key named after a model replaces `default` as a whole: "
                "repeat `noise` in it, or remove it."
            )
        if IDS not in doc:
            require_columns(doc, self.contract.columns)
            raise FamilyError(f"{self.file}: {self.problem or 'the rows were not prepared: process_docs did not run'}")

    def _threshold_of(self) -> str | None:
        """The shift whose threshold task this is."""
        shift = self.variant.removesuffix(f"_{THRESHOLD}")
        return shift if shift != self.variant and shift in self.contract.shifts else None


@functools.lru_cache(maxsize=4)
def _corpus(references: References) -> Corpus:
    # The noisy tasks of a family share their references, and counting n-grams takes seconds.
    return Corpus.of(references.values)


def read_task(file: Path) -> Task:
    """The task of an expanded YAML file.

    Raises:
        FamilyError: the file is not one of ours, or was edited into something that is not valid.
    """
    config = load_task_yaml(file.read_text(encoding="utf-8"))
    if "include" in config:
        base = load_task_yaml((file.parent / config["include"]).read_text(encoding="utf-8"))
        config = base | config
    try:
        contract = TaskContract.model_validate(config["metadata"]["bitquake"])
        written = config["lmms_eval_specific_kwargs"]["default"]["noise"]
    except (KeyError, TypeError, ValidationError) as error:
        raise FamilyError(f"{file}: not a task file of bitquake: {error}") from error
    noise = None
    if written is not None:
        noise = NoiseSpec.from_mapping(written, f"{file}: lmms_eval_specific_kwargs.default.noise")
        boxes, question = contract.protocol == "grounding", contract.columns.question is not None
        if (reason := why_not(noise.name, boxes=boxes, question=question)) is not None:
            raise FamilyError(f"{file}: lmms_eval_specific_kwargs.default.noise: {noise.name} {reason}")
    arguments = (str(file), config["task"], config["test_split"], noise, written, contract)
    kind = Task
    if contract.extends is not None:
        from .extended import ExtendedTask

        kind = ExtendedTask
    task = kind(*arguments)
    files = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    if contract.extends is None and files:
        task.data_file = Path(files[task.split])
    return task


def functions_of(glue_file: str) -> Callable[[str], Callable[..., Any]]:
    """The ``__getattr__`` of a glue module: ``<function>__<task>`` -> that function of that task's YAML beside it."""
    folder = Path(glue_file).parent

    def get(name: str) -> Callable[..., Any]:
        function, _, task = name.partition("__")
        file = folder / f"{task}.yaml"
        if function not in _FUNCTIONS or not task or not file.is_file():
            raise AttributeError(f"{glue_file}: no function {name!r}: expected FUNCTION__TASK with TASK.yaml beside it")
        found = _cached_task(str(file), file.stat().st_mtime_ns)
        if function == "process_docs":
            found.see_to_data()
        return _made(function, found)

    return get


@functools.lru_cache(maxsize=256)
def _cached_task(file: str, changed: int) -> Task:
    # lmms-eval asks for a task's functions one by one.
    return read_task(Path(file))


# Plain functions, not bound methods: lmms-eval counts their parameters, and writes their names into results and caches.


def _process_docs(task: Task) -> Callable[[datasets.Dataset], datasets.Dataset]:
    def process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
        return task.process_docs(dataset)

    return process_docs


def _doc_to_visual(task: Task) -> Callable[[Mapping[str, Any], Mapping[str, Any]], list[Image.Image]]:
    def doc_to_visual(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[Image.Image]:
        return task.doc_to_visual(doc, lmms_eval_specific_kwargs)

    return doc_to_visual


def _doc_to_text(task: Task) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
        return task.doc_to_text(doc, lmms_eval_specific_kwargs)

    return doc_to_text


def _doc_to_target(task: Task) -> Callable[[Mapping[str, Any]], Any]:
    def doc_to_target(doc: Mapping[str, Any]) -> Any:
        return task.doc_to_target(doc)

    return doc_to_target


def _process_results(task: Task) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]:
    def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        return task.process_results(doc, results)

    return process_results


def _doc_to_messages(task: Task) -> Callable[[Mapping[str, Any], Mapping[str, Any]], list[dict[str, Any]]]:
    def doc_to_messages(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        return task.doc_to_messages(doc, lmms_eval_specific_kwargs)

    return doc_to_messages


_FUNCTIONS: dict[str, Callable[[Task], Callable[..., Any]]] = {
    "process_docs": _process_docs,
    "doc_to_visual": _doc_to_visual,
    "doc_to_text": _doc_to_text,
    "doc_to_target": _doc_to_target,
    "process_results": _process_results,
    "doc_to_messages": _doc_to_messages,
}


def _made(name: str, task: Task) -> Callable[..., Any]:
    """One of the functions; those that give pictures get an attribute ``with_noise_cache``.

    ``function.with_noise_cache(cache)`` is the same function, its noisy pictures out of a :class:`NoiseCache`
    (``bitquake.model_wrappers.samples.from_noise_cache`` asks for it).
    """
    function: Any = _FUNCTIONS[name](task)
    function.__signature__ = inspect.signature(function)  # kept: lmms-eval asks for it with every document
    if name in ("doc_to_visual", "doc_to_messages"):
        function.with_noise_cache = lambda cache: _made(name, task.with_noise_cache(cache))
    made: Callable[..., Any] = function
    return made


def _failure_kind(error: str) -> Failure:
    """Envelope errors begin with ``image:`` or ``question:``; all others happened inside the model."""
    kind = error.partition(":")[0]
    return "image" if kind == "image" else "question" if kind == "question" else "model"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
