"""Gold files: the reference answers of one task, by which anybody's answers can be scored again.

    <folder>/<task>.jsonl.zst      zstd; ``bitquake.tasks.gold`` writes it from the task's dataset

The first line is the header, every other one a sample, in the order of the samples' ids. What is pinned is the SHA-256
of the uncompressed text, because zstd's bytes differ between its versions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .choice import LETTERS
from .grounding import IOU_THRESHOLD, Box, iou, read_exact_box
from .vqa import normalise, soft_accuracy, strip_blanks

VERSION: Literal[1] = 1
ENDING = ".jsonl.zst"
SHORT = 8
"""Hex digits of a hash that are kept: enough to tell a task's samples apart."""
INEXACT = "0" * SHORT
"""Stands for the hash of a picture that every machine's codec decodes to other pixels."""

MAX_FILE = 256 << 20
MAX_TEXT = 1 << 30
MAX_LINE = 1 << 16
MAX_SAMPLES = 5_000_000
_MAX_WINDOW = 8 << 20
_PIECE = 1 << 20
_KEYS = ("id", "image", "pixels", "question", "target")

Protocol = Literal["vqa", "choice", "grounding"]


class GoldError(ValueError):
    """A gold file that cannot be read, a sample that it does not have, or an answer that no record can hold."""


class GoldHeader(BaseModel):
    """What the samples of a gold file are; the values are those of the task's records.

    n: number of samples; exact_pixels: whether pictures are the same on every machine (False where a noise or their own
    format goes through a codec: then ``pixels`` is ``INEXACT`` for each); annotators: reference answers of each sample
    (vqa), else 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1] = VERSION
    task: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    family: str
    variant: str
    world: Literal["block", "real"]
    protocol: Protocol
    n: int = Field(ge=1, le=MAX_SAMPLES)
    exact_pixels: bool
    annotators: int = Field(ge=0)
    dataset: str
    dataset_revision: str
    split: str
    part: str
    subset: str
    shift_from: str
    noise: dict[str, str | int] | None


class Letters(NamedTuple):
    """answer: letter of the right option; options: how many there are."""

    answer: str
    options: int


Target = tuple[str, ...] | Letters | Box


class GoldSample(NamedTuple):
    """One sample of a task.

    image: its image id; target: the annotators' answers as the dataset has them (vqa), the right option (choice), the
    box in pixels of the picture that models see (grounding), or None where no answer can be scored and every record is
    a failure; pixels: first digits of the hashes of the pictures that models see, "" without one; question: first
    digits of the question's hash, "" without one.
    """

    image: str
    target: Target | None
    pixels: str
    question: str


class Gold(NamedTuple):
    """A gold file; sha256: of its uncompressed text."""

    header: GoldHeader
    samples: dict[str, GoldSample]
    sha256: str


class GoldScore(NamedTuple):
    """As in a record: the score, further scores that the answer alone gives, and whether there was no answer in it."""

    score: float
    scores: dict[str, float]
    parse_failure: bool


def gold_path(folder: Path, task: str) -> Path:
    """Where a task's gold file lies in a folder of them."""
    return folder / f"{task}{ENDING}"


def short_pixels(pixel_hashes: list[str]) -> str:
    """What gold files and submissions keep of a record's ``pixel_hash``."""
    return "/".join(pixel_hashes)[:SHORT]


def short_question(question_hash: str) -> str:
    """What gold files and submissions keep of a record's ``question_hash``."""
    return question_hash[:SHORT]


def gold_text(header: GoldHeader, samples: Mapping[str, GoldSample]) -> Iterator[str]:
    """The canonical lines: ASCII, keys and samples sorted, floats with every digit."""
    yield _line(header.model_dump(mode="json"))
    for sample_id in sorted(samples):
        yield _line({"id": sample_id} | samples[sample_id]._asdict())


def read_gold(path: Path, sha256: str | None = None) -> Gold:
    """Read a gold file.

    Args:
        sha256: what its text must have (64 hex digits), or None to take any.

    Raises:
        GoldError: not there, not such a file, larger than the limits above, damaged, or with another text than
            ``sha256`` says; with the line.
    """
    digest = hashlib.sha256()
    lines = enumerate(_lines(path, digest), 1)
    header: GoldHeader | None = None
    samples: dict[str, GoldSample] = {}
    last = ""
    for number, line in lines:
        where = f"{path}:{number}"
        data = _parsed(line, where)
        if header is None:
            header = _header(data, where)
            continue
        sample_id, sample = _sample(data, header, where)
        if samples and sample_id <= last:
            raise GoldError(f"{where}: sample {sample_id!r} stands twice, or behind a later one; build the file again")
        if len(samples) == header.n:
            raise GoldError(f"{where}: more than the {header.n:,} samples of the header; build the file again")
        samples[sample_id], last = sample, sample_id
    if header is None:
        raise GoldError(f"{path}: is empty; build it again (`bitquake leaderboard gold`)")
    if len(samples) != header.n:
        raise GoldError(f"{path}: {len(samples):,} of {header.n:,} samples: cut short; build it again")
    found = digest.hexdigest()
    if sha256 is not None and found != sha256:
        raise GoldError(
            f"{path}: its text has the SHA-256 {found}, expected {sha256}: another version of the dataset or of the "
            "task, or an edited file; build it again (`bitquake leaderboard gold`)"
        )
    return Gold(header, samples, found)


def score_against_gold(gold: Gold, sample_id: str, answer: str | None, *, failed: bool = False) -> GoldScore:
    """Score the parsed answer of a record (``SampleRecord.answer``) again; the score is the record's own to the bit.

    Args:
        answer: as the record has it: normalised text (vqa), letter (choice), box (grounding), or None.
        failed: whether the record is a failure, which scores 0 whatever its answer is.

    Raises:
        GoldError: there is no such sample, or no record of it could hold this answer.
    """
    sample = gold.samples.get(sample_id)
    if sample is None:
        raise GoldError(f"{gold.header.task} has no sample {sample_id[:80]!r}")
    if failed or sample.target is None:
        return GoldScore(0.0, {}, False)
    try:
        return _SCORED[gold.header.protocol](answer, sample.target)
    except ValueError as error:
        raise GoldError(f"{gold.header.task}, sample {sample_id[:80]!r}: {error}") from error


def _vqa(answer: str | None, target: Any) -> GoldScore:
    if answer is None:
        raise ValueError("no answer; an answer without words is the empty text")
    # The answer was normalised when it was recorded. To do it twice could change it.
    return GoldScore(soft_accuracy(answer, [_normalised(reference) for reference in target]), {}, False)


@lru_cache(maxsize=1 << 16)
def _normalised(reference: str) -> str:
    return normalise(strip_blanks(reference))


def _choice(answer: str | None, target: Any) -> GoldScore:
    letters = LETTERS[: target.options]
    if answer is not None and (len(answer) != 1 or answer not in letters):
        raise ValueError(f"expected one of the letters {letters[0]} to {letters[-1]}, got {answer[:80]!r}")
    score = float(answer == target.answer)
    return GoldScore(score, {"lenient": score}, answer is None)


def _grounding(answer: str | None, target: Any) -> GoldScore:
    overlap = 0.0 if answer is None else iou(read_exact_box(answer), target)
    return GoldScore(float(overlap >= IOU_THRESHOLD), {"iou": overlap}, answer is None)


_SCORED = {"vqa": _vqa, "choice": _choice, "grounding": _grounding}


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def _lines(path: Path, digest: Any) -> Iterator[bytes]:
    """The lines of a compressed file, each whole; their bytes go into the digest."""
    total, left = 0, b""
    try:
        if path.stat().st_size > MAX_FILE:
            raise GoldError(f"{path}: more than the {MAX_FILE:,} bytes that are read")
        with path.open("rb") as file:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
            with decompressor.stream_reader(file, read_across_frames=False) as stream:
                while piece := stream.read(_PIECE):
                    total += len(piece)
                    if total > MAX_TEXT:
                        raise GoldError(f"{path}: holds more than the {MAX_TEXT:,} bytes of text that are read")
                    digest.update(piece)
                    *whole, left = (left + piece).split(b"\n")
                    if max(map(len, (*whole, left))) > MAX_LINE:
                        raise GoldError(f"{path}: has a line of more than {MAX_LINE:,} bytes")
                    yield from whole
    except OSError as error:
        raise GoldError(
            f"{path}: cannot be read ({error.strerror or error}); `bitquake leaderboard gold` builds it"
        ) from error
    except zstandard.ZstdError as error:
        raise GoldError(f"{path}: cannot be decompressed ({error}); build it again") from error
    if left:
        raise GoldError(f"{path}: ends within a line: cut short; build it again")


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        data: Any = json.loads(line.decode("ascii"))
        canonical = isinstance(data, dict) and _line(data).encode() == line + b"\n"
    except (ValueError, RecursionError) as error:
        raise GoldError(f"{where}: no JSON in ASCII ({error or 'nested too deeply'}); build the file again") from error
    if not canonical:
        raise GoldError(f"{where}: not written as gold files are (keys sorted, none twice); build the file again")
    return dict(data)


def _header(data: dict[str, Any], where: str) -> GoldHeader:
    if data.get("version") != VERSION:
        raise GoldError(f"{where}: gold file of version {data.get('version')!r}, this Bitquake reads {VERSION}")
    try:
        header = GoldHeader.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise GoldError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; build the file again") from error
    if (header.annotators > 0) != (header.protocol == "vqa"):
        raise GoldError(f"{where}: annotators: {header.annotators} with the protocol {header.protocol!r}")
    return header


def _sample(data: dict[str, Any], header: GoldHeader, where: str) -> tuple[str, GoldSample]:
    if tuple(data) != _KEYS:
        raise GoldError(f"{where}: expected the keys {', '.join(_KEYS)}, got {', '.join(data)[:80]}")
    for key in ("id", "image", "pixels", "question"):
        if not isinstance(data[key], str):
            raise GoldError(f"{where}: {key}: expected a text, got {data[key]!r}")
    for key in ("pixels", "question"):
        if data[key] and (len(data[key]) != SHORT or set(data[key]) - set("0123456789abcdef")):
            raise GoldError(f"{where}: {key}: expected {SHORT} hex digits or nothing, got {data[key][:80]!r}")
    target = data["target"]
    read = None if target is None else _target(target, header)
    if target is not None and read is None:
        raise GoldError(f"{where}: target: {str(target)[:80]} is no reference of the protocol {header.protocol!r}")
    return data["id"], GoldSample(data["image"], read, data["pixels"], data["question"])


def _target(value: Any, header: GoldHeader) -> Target | None:
    """A reference as the protocol has it, or None where it is of another form."""
    if not isinstance(value, list):
        return None
    if header.protocol == "vqa":
        fits = len(value) == header.annotators and all(isinstance(reference, str) for reference in value)
        return tuple(value) if fits else None
    if header.protocol == "choice":
        if len(value) != 2 or not isinstance(value[0], str) or type(value[1]) is not int:
            return None
        fits = 2 <= value[1] <= len(LETTERS) and len(value[0]) == 1 and value[0] in LETTERS[: value[1]]
        return Letters(value[0], value[1]) if fits else None
    if len(value) != 4 or not all(isinstance(edge, float) and math.isfinite(edge) for edge in value):
        return None
    x1, y1, x2, y2 = value
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
