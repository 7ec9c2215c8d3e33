"""Samples of a user's folder: pictures, described as Hugging Face's ImageFolder does it, and texts.

    photos/metadata.jsonl      {"file_name": "a/1.jpg", "text": "a dog runs", "prompt": "…", "answer": "…"}
    photos/a/1.jpg             PNG, JPEG or WebP, in any folder below
    photos/notes.txt           source text: one document; a .jsonl file: one in each row, {"text": …}

``text`` is a caption and ``answer`` what the model should say to ``prompt``; either may stand alone. A picture may have
several rows. ``metadata.json`` (a list) and ``metadata.csv`` are read too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from bitquake.noise import ImageError, NoiseError, NoiseSpec, SampleKey, load_rgb, pixel_hash

from .overlap import PIXELS
from .prompts import describe
from .sample import CalibrationError, CalibrationSample, SampleError, shuffled

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = ("metadata.jsonl", "metadata.json", "metadata.csv")
MAX_DOCUMENT = 1 << 16
"""Bytes of a text file that are read: far more than the tokens of one sample."""


class _Row(NamedTuple):
    """A picture and what is said about it; where: for messages."""

    file: str
    prompt: str
    answer: str | None
    where: str


class PictureFolder:
    """The pictures of a folder with what its metadata says about them.

    Args:
        folder: it.
        n: how many samples are wanted: the content of that many files is part of the identity.
        seed: of the order, and of the noise.
        pictures_only: asked for a caption, without an answer; the metadata is not read.
        needs: ``answer`` or ``prompt``: every row must have it.
        noise: name and severity, in native mode.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n: int,
        seed: int,
        model_type: str,
        block: bool = False,
        pictures_only: bool = False,
        needs: str | None = None,
        noise: tuple[str, int] | None = None,
    ) -> None:
        self.title = f"the folder {folder}"
        self._folder = folder
        try:
            self._noise = None if noise is None else NoiseSpec(*noise, seed=seed)
        except NoiseError as error:
            raise CalibrationError(f"calibration: {error}") from error
        asked = describe(model_type, block=block).prompt
        table = next((file for name in METADATA if (file := folder / name).is_file()), None)
        if pictures_only:
            rows = [_Row(file, asked, None, file) for file in _pictures(folder)]
        elif table is not None:
            rows = _described(table, asked, needs)
        else:
            extra = "; source self lets the model caption them itself" if needs == "answer" else ""
            raise CalibrationError(
                f"calibration: {folder}: nothing says what its pictures show. Put a metadata.jsonl beside them, one "
                f'line for each picture: {{"file_name": "1.jpg", "text": "a dog runs"}} (or "prompt" and "answer")'
                f"{extra}."
            )
        names = [f"{row.file}\0{row.prompt}\0{row.answer}" for row in rows]
        self._rows = shuffled(rows, names, seed)
        self._n = n

    @property
    def identity(self) -> Mapping[str, Any]:
        noise = None if self._noise is None else self._noise.to_mapping()
        files: dict[str, str] = {}
        for row in self._rows[: self._n]:
            if row.file not in files:
                files[row.file] = hashlib.blake2b(self._bytes(row), digest_size=16).hexdigest()
        return {"rows": [[files[row.file], *row[:3]] for row in self._rows[: self._n]], "noise": noise}

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> CalibrationSample:
        row = self._rows[index]
        try:
            pixels = load_rgb(self._bytes(row))
        except ImageError as error:
            raise CalibrationError(
                f"calibration: {self._folder / row.file}: {error} Mend the file, or take it out of the folder."
            ) from error
        name, prompt = PIXELS + pixel_hash(pixels), row.prompt
        if self._noise is not None:
            key = SampleKey("folder", "calibration", row.file)
            if self._noise.medium == "text":
                prompt = self._noise.apply_text(prompt, key)
            else:
                pixels = self._noise.apply(pixels, key)
        return CalibrationSample((Image.fromarray(pixels),), prompt, row.answer, (name,))

    def _bytes(self, row: _Row) -> bytes:
        try:
            return (self._folder / row.file).read_bytes()
        except OSError as error:
            raise CalibrationError(
                f"calibration: {self._folder / row.file} cannot be read ({error.strerror or error}; named by "
                f"{row.where}); put it there, or take it out of the metadata"
            ) from error


class TextFolder:
    """The texts of a folder: each ``.txt`` file, and each row of its ``.jsonl`` files, is a document."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        from bitquake.tasks.families import FamilyError
        from bitquake.tasks.sources import read_table

        self.title = f"the folder {folder}"
        found: list[tuple[str, str, str | None]] = []  # name, text or prompt, answer
        for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".txt", ".jsonl")):
            name = file.relative_to(folder).as_posix()
            if file.suffix.lower() == ".txt":
                found.append((name, _document(file), None))
                continue
            try:
                rows = read_table(file)
            except FamilyError as error:
                raise CalibrationError(f"calibration: {error}") from error
            for number, row in enumerate(rows, 1):
                prompt, answer = _text(row, "prompt"), _text(row, "answer")
                text = (prompt, answer) if prompt and answer else (_text(row, "text") or prompt or "", None)
                if not text[0]:
                    raise CalibrationError(
                        f'calibration: {file}: row {number} has no "text", nor a "prompt" with an "answer"; '
                        f"it has {', '.join(map(str, row))}"
                    )
                found.append((f"{name}:{number}", *text))
        self._documents = shuffled(found, [f"{name}\0{text}\0{answer}" for name, text, answer in found], seed)

    @property
    def identity(self) -> Mapping[str, Any]:
        content = "\0".join(f"{text}\0{answer}" for _, text, answer in self._documents)
        return {"texts": hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()}

    def __len__(self) -> int:
        return len(self._documents)

    def sample(self, index: int) -> CalibrationSample:
        name, text, answer = self._documents[index]
        if not text.strip():
            raise SampleError(f"{name} of {self.title} is empty")
        return CalibrationSample((), text, answer)


def _pictures(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in PICTURES)


def _described(table: Path, asked: str, needs: str | None) -> list[_Row]:
    """The rows of a metadata file; a row without a prompt is asked for a caption."""
    from bitquake.tasks.families import FamilyError
    from bitquake.tasks.sources import fill_pattern, read_table

    rows = []
    try:
        for number, row in enumerate(read_table(table), 1):
            where = f"{table}: row {number}"
            file = fill_pattern("{file_name}", row, where)
            prompt, answer = _text(row, "prompt"), _text(row, "answer") or _text(row, "text")
            if needs is not None and not {"prompt": prompt, "answer": answer}[needs]:
                what = '"text" (or "answer")' if needs == "answer" else '"prompt"'
                raise CalibrationError(f"calibration: {where}: {what} is missing; it has {', '.join(map(str, row))}")
            rows.append(_Row(file, prompt or asked, answer, where))
    except FamilyError as error:
        raise CalibrationError(f"calibration: {error}") from error
    return rows


def _text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    return str(value).strip() or None if value is not None else None


def _document(file: Path) -> str:
    """The beginning of a text file; a character that the limit cuts in two is left out."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_DOCUMENT)
        return data.decode("utf-8-sig", "strict" if len(data) < MAX_DOCUMENT else "ignore").strip()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"calibration: {file}: not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise CalibrationError(f"calibration: {file} cannot be read ({error.strerror or error})") from error
