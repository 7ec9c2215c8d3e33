"""The functions that lmms-eval calls for a task, made from the task's own YAML file.

lmms-eval gives a document to a task's functions and nothing else, so each task has functions of its own. The glue
module in an expanded folder hands them out: ``!function glue.process_results__block_vqav2_fog_3`` reads
``block_vqav2_fog_3.yaml`` beside it, binds ``process_results`` to what stands there, and returns that. The YAML is the
only place where a task is described: a file edited after export does what it says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from pydantic import ValidationError

from bitquake.envelope import Envelope, EnvelopeError, decode
from bitquake.noise import ImageError, NoiseSpec, SampleKey, load_rgb
from bitquake.records import RECORD_KEY, Failure, SampleRecord

from . import aggregate
from .contract import THRESHOLD, TaskContract
from .documents import IDS, prepare, require_columns
from .families import FamilyError, Split, Subset, fill
from .scoring import TargetError, score_box, score_choice, score_vqa
from .scoring.choice import LETTERS, correct_letter
from .scoring.grounding import Box, format_box, target_box
from .strict_yaml import load_task_yaml


@dataclass(frozen=True)
class Outcome:
    """What a protocol makes of one answer."""

    score: float
    scores: dict[str, float]
    answer: str | None
    parse_failure: bool = False


@dataclass(frozen=True)
class Task:
    """One task as its YAML file describes it; its methods are what lmms-eval calls."""

    file: str
    name: str
    split: str
    noise: NoiseSpec | None
    noise_as_written: Any
    contract: TaskContract

    @property
    def variant(self) -> str:
        """``clean``, ``threshold``, ``fog_3``, …"""
        return self.name.removeprefix(f"{self.contract.family}_")

    @property
    def part(self) -> Split:
        """The part of the split that the task evaluates."""
        splits = self.contract.splits
        return splits.threshold if self.variant == THRESHOLD else splits.test

    @property
    def subset(self) -> Subset | None:
        return self.contract.noise_subset if self.noise is not None else None

    def process_docs(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """The task's rows. A dataset that lacks a column is left as it is: ``doc_to_text`` says so.

        lmms-eval calls this five times before it reports an error, two seconds apart and without its text.
        """
        columns, need_size = self.contract.columns, self.contract.protocol == "grounding"
        try:
            return prepare(dataset, columns, self.part, self.subset, need_size=need_size)
        except FamilyError:
            return dataset

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
            pixels = load_rgb(encoded)
        except ImageError as error:
            raise ImageError(f"{error} (task {self.name}, sample {doc[IDS]['sample_id']})") from error
        if self.noise is not None:
            key = SampleKey(self.contract.dataset, self.split, doc[IDS]["sample_id"])
            pixels = self.noise.apply(pixels, key)
        return [Image.fromarray(pixels)]

    def doc_to_text(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
        """The question with its hint and choices, between ``pre_prompt`` and ``post_prompt``.

        Raises:
            FamilyError: the dataset does not have what the family declares, or ``check`` fails. lmms-eval asks for one
                text when it loads a task, so this comes before any model runs.
        """
        self.check(doc, lmms_eval_specific_kwargs)
        columns, text = self.contract.columns, self.contract.text
        values = {"question": _text(doc[columns.question]), "hint": "", "choices": ""}
        if columns.hint is not None and (hint := _text(doc[columns.hint])):
            values["hint"] = fill(text.hint, {"hint": hint})
        if columns.choices is not None:
            options = zip(LETTERS, doc[columns.choices] or [], strict=False)
            written = [fill(text.option, {"letter": letter, "choice": _text(choice)}) for letter, choice in options]
            values["choices"] = text.separator.join(written)
        before, after = (lmms_eval_specific_kwargs.get(key) or "" for key in ("pre_prompt", "post_prompt"))
        return f"{before}{fill(text.template, values)}{after}"

    def doc_to_target(self, doc: Mapping[str, Any]) -> Any:
        """The reference answer, as logs show it; "" where it cannot be scored."""
        try:
            if self.contract.protocol == "vqa":
                return self._references(doc)
            if self.contract.protocol == "choice":
                return correct_letter(*self._choices(doc))
            return format_box(self._target_box(doc)[0])
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
        return values | {"failures": [int(record.failure is not None)], "parse_failures": [int(record.parse_failure)]}

    def record(self, doc: Mapping[str, Any], response: str) -> SampleRecord:
        """Score one response: an envelope of our wrappers, or the plain text of any other model."""
        failure: Failure | None = None
        detail, outcome = "", Outcome(0.0, {}, None)
        try:
            envelope = decode(response)
        except EnvelopeError as error:
            envelope, failure, detail = Envelope(text=response), "envelope", str(error)
        if not _text(doc[self.contract.columns.question]).strip():
            failure, detail = "question", f"question: column {self.contract.columns.question!r} is empty in this row"
        elif envelope.error is not None:
            failure, detail = _failure_kind(envelope.error), envelope.error
        elif failure is None:
            try:
                outcome = self._score(doc, envelope)
            except TargetError as error:
                failure, detail = "target", str(error)
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
            split=self.split,
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
        )

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
            raise FamilyError(
                f"{self.file}: the rows have no column {IDS!r}: process_docs did not run or found sample ids that are "
                f"not unique in column {self.contract.columns.sample_id!r}"
            )

    def _score(self, doc: Mapping[str, Any], envelope: Envelope) -> Outcome:
        if self.contract.protocol == "vqa":
            vqa = score_vqa(envelope.text, self._references(doc), self.contract.annotators)
            both = {"reliable_vqa": vqa.reliable_vqa, "lmms_eval": vqa.lmms_eval}
            return Outcome(vqa.score, both, vqa.answer)
        if self.contract.protocol == "choice":
            options, correct = self._choices(doc)
            choice = score_choice(envelope.text, options, correct, envelope.option_probabilities)
            scores = {"strict": choice.strict, "lenient": choice.lenient}
            if choice.letter is not None:
                scores["letter"] = choice.letter
            return Outcome(choice.score, scores, choice.answer, choice.parse_failure)
        target, size = self._target_box(doc)
        spaces = self.contract.coordinates
        space = spaces.get(envelope.model_type, spaces["default"])
        processed = envelope.processed_sizes[0] if envelope.processed_sizes else None
        box = score_box(envelope.text, target, space, size, processed)
        answer = None if box.box is None else "[" + ", ".join(f"{edge:g}" for edge in box.box) + "]"
        return Outcome(box.score, {"iou": box.iou}, answer, box.parse_failure)

    def _references(self, doc: Mapping[str, Any]) -> list[str]:
        column = self.contract.columns.answers
        answers = doc[column] if column is not None else None
        if not isinstance(answers, list) or not answers:
            raise TargetError(f"answers: column {column!r} holds no answers, got {answers!r}")
        return [answer["answer"] if isinstance(answer, Mapping) else answer for answer in answers]

    def _choices(self, doc: Mapping[str, Any]) -> tuple[list[str], int]:
        columns = self.contract.columns
        assert columns.choices is not None and columns.answer is not None  # the family's schema sees to it
        return doc[columns.choices], doc[columns.answer]

    def _target_box(self, doc: Mapping[str, Any]) -> tuple[Box, tuple[float, float] | None]:
        column = self.contract.columns.box
        assert column is not None  # the family's schema sees to it
        width, height = doc[IDS]["width"], doc[IDS]["height"]
        size = None if width is None or height is None else (float(width), float(height))
        return target_box(doc[column], self.contract.box_format, size), size


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
    return Task(str(file), config["task"], config["test_split"], noise, written, contract)


def functions_of(glue_file: str) -> Callable[[str], Callable[..., Any]]:
    """The ``__getattr__`` of a glue module: ``<function>__<task>`` -> that function of that task's YAML beside it."""
    folder = Path(glue_file).parent

    def get(name: str) -> Callable[..., Any]:
        function, _, task = name.partition("__")
        file = folder / f"{task}.yaml"
        if function not in _FUNCTIONS or not task or not file.is_file():
            raise AttributeError(f"{glue_file}: no function {name!r}: expected FUNCTION__TASK with TASK.yaml beside it")
        return _FUNCTIONS[function](_cached_task(str(file), file.stat().st_mtime_ns))

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


_FUNCTIONS: dict[str, Callable[[Task], Callable[..., Any]]] = {
    "process_docs": _process_docs,
    "doc_to_visual": _doc_to_visual,
    "doc_to_text": _doc_to_text,
    "doc_to_target": _doc_to_target,
    "process_results": _process_results,
}


def _failure_kind(error: str) -> Failure:
    """Envelope errors begin with ``image:`` or ``question:``; all others happened inside the model."""
    kind = error.partition(":")[0]
    return "image" if kind == "image" else "question" if kind == "question" else "model"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
