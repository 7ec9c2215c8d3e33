"""Builds gold files: a registered task's reference answers, pictures' hashes and questions' hashes, from its dataset.

The rows are those that lmms-eval would ask about, the noise is the task's own, and references are read by the code that
scores: what a submission is checked against comes from the dataset, never from a submission.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import platformdirs
import zstandard

from bitquake.noise import ImageError, ImageNoise, pixel_hash
from bitquake.records import question_hash

from .families import FamilyError
from .scoring import TargetError
from .scoring.choice import correct_letter
from .scoring.gold import (
    INEXACT,
    Gold,
    GoldHeader,
    GoldSample,
    Letters,
    Target,
    gold_path,
    gold_text,
    short_pixels,
    short_question,
)
from .scoring.vqa import score_vqa
from .sources import replacing

if TYPE_CHECKING:
    from .glue import Task

PROTOCOLS = ("vqa", "choice", "grounding")
"""What the parsed answer alone can be scored for: a caption's score needs the whole text, retrieval's all scores."""
_LEVEL = 12
_EVERY = 1000


class GoldFile(NamedTuple):
    """A file that was built; sha256: of its uncompressed text, which a board pins; n_bytes: of the file."""

    path: Path
    task: str
    n: int
    sha256: str
    n_bytes: int


def default_folder() -> Path:
    """``gold`` in the user's cache folder of ``bitquake``."""
    return platformdirs.user_cache_path("bitquake", appauthor=False) / "gold"


def build_gold(
    task_name: str,
    folder: Path | None = None,
    limit: int | None = None,
    *,
    families: Iterable[Path] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> GoldFile:
    """Write a task's gold file, atomically; equal data give an equal text.

    Args:
        task_name: a registered task, as ``block_vqav2_fog_3``.
        folder: where to, default :func:`default_folder`.
        limit: only the first documents, in lmms-eval's order (its ``--limit``).
        families: more folders with family files.
        progress: told now and then how far it is.

    Raises:
        FamilyError: there is no such task, its protocol cannot be scored from parsed answers, or its dataset is not
            there or not as declared.
    """
    gold = collect_gold(task_name, limit, families=families, progress=progress)
    digest = hashlib.sha256()
    path = gold_path(folder or default_folder(), task_name)
    try:
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        with replacing(path) as new, new.open("wb") as file, compressor.stream_writer(file, closefd=False) as out:
            for line in gold_text(gold.header, gold.samples):
                data = line.encode("ascii")
                digest.update(data)
                out.write(data)
    except OSError as error:
        raise FamilyError(f"{path}: cannot be written ({error.strerror or error}); name another folder") from error
    return GoldFile(path, task_name, gold.header.n, digest.hexdigest(), path.stat().st_size)


def collect_gold(
    task_name: str,
    limit: int | None = None,
    *,
    families: Iterable[Path] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Gold:
    """What :func:`build_gold` writes (``sha256`` is still empty)."""
    from .documents import IDS
    from .rows import find_task, load_rows

    if limit is not None and limit < 1:
        raise FamilyError(f"limit: expected 1 or more, got {limit}")
    task = find_task(task_name, families)
    contract = task.contract
    if contract.protocol not in PROTOCOLS:
        raise FamilyError(
            f"{task_name}: the protocol {contract.protocol!r} cannot be scored from parsed answers, so it has no gold "
            f"file; those with one are {', '.join(PROTOCOLS)}"
        )
    rows = load_rows(task)
    n = len(rows) if limit is None else min(limit, len(rows))
    samples: dict[str, GoldSample] = {}
    pixels = _Pixels(task)
    for number in range(n):
        doc = rows[number]
        ids = doc[IDS]
        hashes = pixels.hashes(doc)
        question = task.question(doc)
        column = contract.columns.question
        asked = column is None or bool(str(doc[column] or "").strip())
        target = _target(task, doc) if asked and hashes is not None else None
        seen = (short_pixels(hashes or []), short_question(question_hash(question)))
        samples[ids["sample_id"]] = GoldSample(ids["image_id"], target, *seen)
        if (number + 1) % _EVERY == 0:
            progress(f"{task_name}: {number + 1:,} of {n:,}")
    if not pixels.exact:  # hashes of this machine's codec would make another file on the next one
        samples = {key: sample._replace(pixels=sample.pixels and INEXACT) for key, sample in samples.items()}
    header = GoldHeader(
        task=task_name,
        family=contract.family,
        variant=task.variant,
        world=contract.world,
        protocol=contract.protocol,  # type: ignore[arg-type]  # one of PROTOCOLS
        n=n,
        exact_pixels=pixels.exact,
        annotators=contract.annotators if contract.protocol == "vqa" else 0,
        dataset=contract.dataset,
        dataset_revision=task.revision,
        split=task.split,
        part=task.part_for_people,
        subset=rows[0][IDS]["subset"],
        shift_from=task.shift_from,
        noise=None if task.noise is None else task.noise.to_mapping(),
    )
    return Gold(header, samples, "")


class _Pixels:
    """Hashes of the pictures that models see; exact: whether every machine gets the same."""

    def __init__(self, task: Task) -> None:
        self._task, self._kwargs = task, {"noise": task.noise_as_written}
        noise = None if task.noise is None else task.noise.noise()
        self._noisy = isinstance(noise, ImageNoise)
        self.exact = not isinstance(noise, ImageNoise) or noise.exactness == "exact"
        self._clean: dict[bytes, list[str]] = {}

    def hashes(self, doc: Mapping[str, Any]) -> list[str] | None:
        """The record's ``pixel_hash``; None where the picture is missing or does not decode."""
        encoded = doc.get(self._task.contract.columns.image)
        self.exact = self.exact and (encoded is None or _is_lossless(encoded))
        # several questions are asked on one clean picture
        file = hashlib.blake2b(encoded or b"", digest_size=16).digest()
        if not self._noisy and file in self._clean:
            return self._clean[file]
        try:
            found = [pixel_hash(picture) for picture in self._task.doc_to_visual(doc, self._kwargs)]
        except ImageError:
            return None
        if not self._noisy:
            self._clean[file] = found
        return found


def _is_lossless(encoded: bytes) -> bool:
    """Whether a picture is in a format that every decoder reads to the same pixels."""
    return encoded.startswith((b"\x89PNG", b"BM", b"GIF8", b"P5", b"P6")) or encoded[12:16] == b"VP8L"


def _target(task: Task, doc: Mapping[str, Any]) -> Target | None:
    """The reference by which an answer is scored; None where nothing can be scored against it."""
    from . import answers

    try:
        if task.contract.protocol == "vqa":
            references = answers.reference_answers(task, doc)
            score_vqa("", references, task.contract.annotators)
            return tuple(references)
        if task.contract.protocol == "choice":
            options, correct = answers.options_and_answer(task, doc)
            return Letters(correct_letter(options, correct), len(options))
        x1, y1, x2, y2 = map(float, answers.reference_box(task, doc)[0])
        return x1, y1, x2, y2
    except TargetError:
        return None
