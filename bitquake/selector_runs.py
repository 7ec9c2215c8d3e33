"""What ``bitquake selector`` reads of lmms-eval's output folders: records, quant cards, saved features."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import platformdirs

from bitquake.model_wrappers.quant_cards import QuantCardError, load_card
from bitquake.model_wrappers.selector.features import Features, FeaturesError, features_folder, load_features
from bitquake.model_wrappers.selector.model import SelectorError
from bitquake.quant_card import QuantCard
from bitquake.records import RECORD_KEY, RECORD_VERSION, SampleRecord
from bitquake.reports.runs import model_arguments

_SAMPLES = re.compile(r"(?P<stem>.+?)_samples_(?P<task>.+)\.jsonl")
_FEATURES = "run it again with features=true in model_args (and the same artifacts=)"
DEV = "dev"


@dataclass(frozen=True)
class Line:
    """One line of a sample file: its text without the line's end, and its record, or None where it holds none."""

    text: str
    record: SampleRecord | None


@dataclass(frozen=True)
class SampleFile:
    """The samples of one task of one process of lmms-eval.

    Attributes:
        path: the file; results: the results file beside it.
        relative: its path in the run's folder.
        task: name of the task, by the file's name.
    """

    path: Path
    results: Path
    relative: Path
    task: str

    @cached_property
    def lines(self) -> list[Line]:
        """All lines, in order, blank ones included.

        Raises:
            SelectorError: a line cannot be read.
        """
        try:
            text = self.path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SelectorError(
                f"{self.path}: cannot be read ({error}); run the same lmms-eval command again"
            ) from error
        return [self._line(number, line) for number, line in enumerate(text.split("\n"), start=1)]

    def _line(self, number: int, text: str) -> Line:
        if not text.strip():
            return Line(text, None)
        try:
            payload = json.loads(text)
            said = payload.get(RECORD_KEY) if isinstance(payload, dict) else None
            if not isinstance(said, dict):
                return Line(text, None)
            if said.get("version") != RECORD_VERSION:
                raise ValueError(f"a record of version {said.get('version')!r}, this Bitquake reads {RECORD_VERSION}")
            return Line(text, SampleRecord.model_validate(said))
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SelectorError(
                f"{self.path}, line {number}: {reason}; cut short by a kill? Run the same lmms-eval command again"
            ) from error

    @property
    def records(self) -> list[SampleRecord]:
        """The records, in the file's order."""
        return [line.record for line in self.lines if line.record is not None]

    @property
    def is_dev(self) -> bool:
        """Whether this is a task of a dev split, by its records' variant."""
        first = next((line.record for line in self.lines if line.record is not None), None)
        return first is not None and (first.variant == DEV or first.variant.endswith(f"_{DEV}"))

    def artifacts(self, told: Path | None) -> list[Path]:
        """Folders in which the run's features and card may lie: those told, or the run's own and the user's cache."""
        if told is not None:
            return [told]
        try:
            results = json.loads(self.results.read_bytes())
        except (OSError, ValueError) as error:
            raise SelectorError(
                f"{self.results}: cannot be read ({error}), so nothing tells which artifacts folder the run had; give "
                "--artifacts"
            ) from error
        own = model_arguments(results if isinstance(results, Mapping) else {}).get("artifacts")
        places = [Path(own).expanduser()] if own else []
        return [*places, platformdirs.user_cache_path("bitquake", appauthor=False)]


def sample_files(folder: Path) -> list[SampleFile]:
    """The sample files below an output folder of lmms-eval, by path.

    Raises:
        SelectorError: no such folder, or no samples in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise SelectorError(f"{folder}: {what}; give a folder that lmms-eval wrote (--output_path)")
    found = []
    for path in sorted(folder.rglob("*_samples_*.jsonl")):
        match = _SAMPLES.fullmatch(path.name)
        if match:
            results = path.with_name(f"{match['stem']}_results.json")
            found.append(SampleFile(path, results, path.relative_to(folder), match["task"]))
    if not found:
        raise SelectorError(
            f"{folder}: holds no samples of lmms-eval (it writes them at the end, with --log_samples); give the "
            "--output_path of a finished run"
        )
    return found


def card_of(model_hash: str, card_hash: str, places: Sequence[Path]) -> QuantCard:
    """The quant card that a record names.

    Raises:
        SelectorError: it is in none of the artifacts folders, or is another model's.
    """
    reason = ""
    for place in places:
        try:
            card = load_card(card_hash, place)
        except QuantCardError as error:
            reason = reason or str(error)
            continue
        if card.model_hash != model_hash:
            raise SelectorError(f"quant card {card_hash[:12]}: is of another model than the records name; run again")
        return card
    raise SelectorError(f"{reason}. `--artifacts DIR` gives another folder")


def features_of(records: Sequence[SampleRecord], places: Sequence[Path], where: str) -> Features:
    """Saved features of records of one model, all of which name some.

    Raises:
        SelectorError: they are in none of the artifacts folders.
    """
    keys = [record.features for record in records]
    model_hash = records[0].model_hash
    holding = [place for place in places if features_folder(place, model_hash).is_dir()] or list(places[:1])
    reason = ""
    for place in holding:
        try:
            return load_features(place, model_hash, keys)
        except FeaturesError as error:
            reason = reason or str(error)
    raise SelectorError(f"{where}: {reason} (--artifacts DIR gives another folder)")


def no_features(where: str) -> SelectorError:
    """That a run kept no features, and what to do."""
    return SelectorError(f"{where}: its records name no features; {_FEATURES}")


def confidence_span(text: str) -> tuple[int, int]:
    """Where in a line the mapping of its record's confidences stands: offset of its ``{``, and that after its ``}``.

    Raises:
        ValueError: there is none.
    """
    begin, _ = _value(text, 0, RECORD_KEY)
    return _value(text, begin, "confidence")


def _value(text: str, at: int, wanted: str) -> tuple[int, int]:
    """Span of a key's value in the object that begins at or after ``at``; of equal keys the last, as json takes it."""
    decoder, found = json.JSONDecoder(), None
    at = _skip(text, at)
    if text[at : at + 1] != "{":
        raise ValueError(f"no object where {wanted!r} was looked for")
    at = _skip(text, at + 1)
    while text[at : at + 1] == '"':
        key, at = decoder.raw_decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)
        _, at = decoder.raw_decode(text, begin)
        if key == wanted:
            found = begin, at
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
    if found is None:
        raise ValueError(f"no {wanted!r}")
    return found


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at
