"""Families with ``extends``: a stock task of lmms-eval under noise, answered in envelopes, with our records beside it.

Prompt, pictures and scorer are the stock task's own functions, called as lmms-eval calls them. Ours goes around them:

- pictures get the noise after the stock task has made them, each its own;
- a text noise changes the question's column in a copy of the row, and the stock task writes the prompt from that;
- the scorer reads the text out of the envelope, on a copy of the row, because stock scorers may change it;
- stock metrics stay in the results table, aggregated by the stock task; a sample's own score is one of them
  (``extends.score``), or, where none is a number for one sample, the protocol ``choice`` on the columns that hold the
  options (``extends.options``). MMBench is such a task: its metric exists for all answers together only (circular: a
  question counts when every rotation of its options is answered right), and what the stock scorer cannot read it sends
  to a chat service, or gives a letter drawn at random. Our own score asks nobody and draws nothing.

A stock function that raises costs one counted failure, never the run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image, ImageOps

from bitquake.envelope import Envelope, EnvelopeError, decode
from bitquake.noise import ImageError, load_rgb

from .answers import Outcome, choice_outcome, letter_index
from .contract import OPTIONS
from .documents import IDS, EncodedPicture
from .families import FamilyError
from .glue import Task
from .scoring import TargetError
from .stock import stock_task

_OURS = (IDS, OPTIONS)
_NO_OPTION = ("", "nan")
"""What stands in an options' column where a row has fewer of them."""
_ROWS_TRIED = 8
"""Rows on whose prompts a text noise is looked for before any model runs."""


@functools.lru_cache(maxsize=32)
def stock_functions(name: str) -> dict[str, Any]:
    """The config of a stock task with its functions imported, as lmms-eval loads it.

    Raises:
        FamilyError: there is no such task, or it cannot be loaded.
    """
    file = stock_task(name).file
    try:
        from lmms_eval.utils import load_yaml_config

        config: dict[str, Any] = load_yaml_config(str(file))
    except Exception as error:  # whatever a stock task's module does when it is imported
        raise FamilyError(f"{file}: lmms-eval's task {name!r} cannot be loaded ({error!r})") from error
    return config


@dataclass
class ExtendedTask(Task):
    """A task whose family extends a stock one."""

    _values: Mapping[str, Any] | None = field(default=None, init=False, repr=False)

    @property
    def stock(self) -> dict[str, Any]:
        assert self.contract.extends is not None
        return stock_functions(self.contract.extends.task)

    def prepared(self, dataset: datasets.Dataset) -> datasets.Dataset:
        own = self.stock.get("process_docs")
        if callable(own):
            try:
                dataset = own(dataset)
            except Exception as error:
                raise FamilyError(f"the stock task's process_docs failed: {error!r}") from error
        assert self.contract.extends is not None
        if options := self.contract.extends.options:
            for column in options:
                if column not in dataset.column_names:
                    raise FamilyError(
                        f"extends.options: the dataset has no column {column!r}; "
                        f"it has {', '.join(sorted(dataset.column_names))}"
                    )
            texts = dataset.select_columns(options)[:]
            rows = [_options(values) for values in zip(*(texts[column] for column in options), strict=True)]
            name = f"{dataset._fingerprint}-options"
            dataset = dataset.add_column(OPTIONS, pa.array(rows, pa.list_(pa.string())), new_fingerprint=name)
        ready = super().prepared(dataset)
        if self._loses_noise(ready):
            raise FamilyError(
                f"columns.question: lmms-eval's {self.contract.extends.task} writes no prompt from the column "
                f"{self.contract.columns.question!r}: with a text noise it would run clean. Name the column that "
                "prompts are made from, or leave the text noises out"
            )
        return ready

    def doc_to_visual(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> list[Any]:
        self.check(doc, lmms_eval_specific_kwargs)
        try:
            row = self._row(doc, strict=True)
        except ImageError as error:
            raise ImageError(f"{error} (task {self.name}, sample {doc[IDS]['sample_id']})") from error
        visuals = self._pictures(doc, lambda: self._call("doc_to_visual", row, lmms_eval_specific_kwargs))
        return [self._noisy(visual, doc, place) for place, visual in enumerate(visuals or [])]

    def doc_to_text(self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
        """The stock task's own prompt; "" where the stock task cannot write one for this row."""
        self.check(doc, lmms_eval_specific_kwargs)
        try:
            return str(self._call("doc_to_text", self._row(doc), lmms_eval_specific_kwargs))
        except Exception:  # counted as a failure of this sample when it is scored
            return ""

    def doc_to_messages(
        self, doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The stock task's own messages, their pictures with the noise."""
        self.check(doc, lmms_eval_specific_kwargs)
        row = self._row(doc, strict=True)
        messages = self._pictures(doc, lambda: self._call("doc_to_messages", row, lmms_eval_specific_kwargs))
        place = 0
        noisy = []
        for message in messages:
            content = message.get("content")
            parts = list(content) if isinstance(content, list) else content
            for i, part in enumerate(parts if isinstance(parts, list) else ()):
                if isinstance(part, Mapping) and part.get("type") == "image":
                    parts[i] = dict(part) | {"url": self._noisy(part.get("url"), doc, place)}
                    place += 1
            noisy.append(dict(message) | {"content": parts})
        return noisy

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        """Ours and the stock task's values; the latter sees the answer's text, and "" where there is none."""
        self._values = None
        ours = super().process_results(doc, results)
        if self._values is None:  # our score needs none of them, or the sample failed
            try:
                text = decode(results[0]).text if results else ""
            except EnvelopeError:
                text = ""
            # A stock function that raises gives no values; the record says so where the score is one of them.
            with contextlib.suppress(Exception):
                self._values = self._stock_results(doc, text)
        return dict(self._values or {}) | ours

    def outcome(self, doc: Mapping[str, Any], envelope: Envelope) -> Outcome:
        extends = self.contract.extends
        assert extends is not None
        if extends.options:
            assert self.contract.columns.answer is not None  # the family's schema sees to it
            return choice_outcome(doc[OPTIONS], letter_index(doc[self.contract.columns.answer]), envelope)
        assert extends.score is not None
        try:
            self._call("doc_to_text", self._row(doc), self._default_kwargs())
            values = self._values = dict(self._stock_results(doc, envelope.text))
        except Exception as error:
            raise TargetError(f"{extends.task}: the stock task fails on this row: {error!r}") from error
        metric, _, key = extends.score.partition(".")
        value = values.get(metric)
        if key and isinstance(value, Mapping):
            value = value.get(key)
        number = float(value) if isinstance(value, numbers.Real) else math.nan
        score = number / extends.scale
        if not 0.0 <= score <= 1.0:
            keys = f"; it is a mapping with {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
            raise TargetError(
                f"extends.score: {extends.score} of {extends.task} should be a number from 0 to {extends.scale:g}, "
                f"got {str(value)[:60]!r}{keys}. Name another metric, metric.key, or the options' columns"
            )
        return Outcome(score, {}, None)

    def _loses_noise(self, ready: datasets.Dataset) -> bool:
        """Whether a text noise changes the question's column of the first rows, and none of their prompts."""
        column = self.contract.columns.question
        if column is None or self.noise is None or self.noise.medium != "text":
            return False
        changed = False
        for i in range(min(len(ready), _ROWS_TRIED)):
            noisy = self._row(ready[i])
            clean = noisy | {column: ready[i][column]}
            with contextlib.suppress(Exception):  # a row that gets no prompt is counted when it is scored
                kwargs = self._default_kwargs()
                if self._call("doc_to_text", clean, kwargs) != self._call("doc_to_text", noisy, kwargs):
                    return False
                changed |= clean[column] != noisy[column]
        return changed

    def _stock_results(self, doc: Mapping[str, Any], text: str) -> Mapping[str, Any]:
        # lmms-eval strips what it hands to a task.
        values: Mapping[str, Any] = self.stock["process_results"](self._row(doc), [text.strip()])
        return values

    def _default_kwargs(self) -> Mapping[str, Any]:
        own: Mapping[str, Any] = self.stock.get("lmms_eval_specific_kwargs") or {}
        return own.get("default") or own

    def _call(self, function: str, row: dict[str, Any], kwargs: Mapping[str, Any]) -> Any:
        """A stock function, called as lmms-eval would: with the model's own mapping where the stock task has one."""
        own = self.stock[function]
        if self.stock.get("lmms_eval_specific_kwargs") is None:
            return own(row)
        given = {key: value for key, value in kwargs.items() if key != "noise"}
        if function != "doc_to_text" and len(inspect.signature(own).parameters) != 2:
            return own(row)
        return own(row, given)

    def _row(self, doc: Mapping[str, Any], *, strict: bool = False) -> dict[str, Any]:
        """A copy of the row as the stock task knows it: pictures opened, a text noise on the question, ours left out.

        Raises:
            ImageError: ``strict``, and a picture does not decode; else it stays as it is.
        """
        row = {column: _opened(value, strict) for column, value in doc.items() if column not in _OURS}
        question = self.contract.columns.question
        if question is not None and self.noise is not None and self.noise.medium == "text":
            row[question] = self.question(doc)
        return row

    def _pictures(self, doc: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:
            raise ImageError(
                f"image: the stock task makes no picture of this row: {error!r} (task {self.name}, "
                f"sample {doc[IDS]['sample_id']})"
            ) from error

    def _noisy(self, visual: Any, doc: Mapping[str, Any], place: int) -> Any:
        """One of a row's pictures with the task's noise; the first one's is that of a row with one picture."""
        if self.noise is None or self.noise.medium != "image":
            return visual
        if not isinstance(visual, Image.Image):
            raise ImageError(
                f"image: the stock task gives {type(visual).__name__}, no picture; {self.noise.name} is for pictures "
                f"(task {self.name})"
            )
        key = self.key(doc)
        if place:
            key = key._replace(sample_id=f"{key.sample_id}#{place}")
        return self.picture(visual, key)


def _options(values: Sequence[Any]) -> list[str]:
    """The options of a row up to the first that it does not have."""
    texts = ["" if value is None else str(value) for value in values]
    n = next((i for i, text in enumerate(texts) if text.strip().lower() in _NO_OPTION), len(texts))
    return texts[:n]


def _opened(value: Any, strict: bool) -> Any:
    """A picture (or a list of them) opened, as ``datasets`` hands it to a stock task; of anything else a copy."""
    if isinstance(value, list) and any(isinstance(one, EncodedPicture) for one in value):
        return [_opened(one, strict) for one in value]
    if not isinstance(value, EncodedPicture):
        return copy.deepcopy(value)
    try:
        picture: Image.Image = Image.open(io.BytesIO(value))
    except Exception as error:
        if not strict:
            return value
        raise ImageError(f"image: {len(value)} bytes are no image that Pillow can open ({error})") from error
    if not strict:  # decoded when the stock task asks for pixels
        return picture
    load_rgb(picture)  # fails where the file is cut short or too large
    with contextlib.suppress(Exception):  # a damaged EXIF block must not cost a picture whose pixels are fine
        picture = ImageOps.exif_transpose(picture)
    return picture
