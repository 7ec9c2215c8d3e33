"""A contact sheet: one picture that shows what every noise does at each severity."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .errors import NoiseError
from .pixels import load_rgb
from .registry import SEVERITIES, ImageNoise, Mode
from .request import apply, apply_text, check_request, noise_names
from .seeding import SampleKey
from .text import TextNoise

QUESTION = "What color is the dog's collar, and how many of the 2 dogs are lying there? Answer with one word."
LEAST_WIDTH = 480
_LABELS = 170  # width of the column with the names
_GAP = 6
_LINE = 19
_INK, _GREY, _PAPER, _EMPTY = "#1c1c1c", "#666666", "#ffffff", "#eeeeee"


def contact_sheet(
    image: Any,
    *,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    mode: Mode = "native",
    key: SampleKey,
    seed: int = 0,
    question: str = QUESTION,
    width: int = 1280,
) -> Image.Image:
    """Rows of image noises, columns clean and each severity; below, the text noises applied to a question.

    The picture is shrunk to the size of a cell first and then corrupted, as shrinking afterwards would hide the noise:
    ``mode`` therefore acts on the small picture.

    Args:
        image: anything that :func:`load_rgb` takes.
        names: noises or groups of them (see :func:`noise_names`), in the order wanted; None for all.
        severities: the columns, each 1..5.
        mode, key, seed: as for :func:`apply`; text noises have no mode.
        question: what text noises are shown on; the sheet's font has Latin letters only.
        width: of the sheet in pixels, at least ``LEAST_WIDTH``.

    Returns:
        An RGB picture, ``width`` pixels wide.

    Raises:
        ImageError: the image is missing, empty or does not decode.
        NoiseError: an unknown name, or a severity, mode, seed, key or width out of range.
    """
    if width < LEAST_WIDTH:
        raise NoiseError(f"width: a sheet needs at least {LEAST_WIDTH} pixels for its labels, got {width}.")
    if not severities:
        raise NoiseError("severities: expected at least one of 1 to 5, got none.")
    noises = _noises(noise_names("all") if names is None else names, severities)
    columns = len(severities) + 1
    cell = (width - _LABELS - columns * _GAP) // columns
    small = _fitted(load_rgb(image), cell)
    rows = [_image_row(small, cell, noise, severities, mode, key, seed) for noise in noises["image"]]
    if rows:
        rows.insert(0, _header(cell, severities, mode, small.size))
    if noises["text"]:
        rows.append(_text_block(question, noises["text"], severities, width, key, seed))
    sheet = Image.new("RGB", (width, sum(row.height + _GAP for row in rows) + _GAP), _PAPER)
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + _GAP
    return sheet


def save_image(image: Image.Image, file: Path) -> None:
    """Write a picture in the format of the file's ending; a reader sees the whole file or none.

    Raises:
        ValueError: an ending that is no image format Pillow writes.
        OSError: the folder does not exist or cannot be written.
    """
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{file}: cannot write {file.suffix or 'a file without an ending'}. Use .png, .jpg or .webp.")
    data = io.BytesIO()
    image.save(data, kind)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.getvalue())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _noises(names: Sequence[str], severities: Sequence[int]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"image": [], "text": []}
    for name in dict.fromkeys(single for written in names for single in _expanded(written)):
        for severity in severities:
            noise = check_request(name, severity, 0, None, "native")
        out["text" if isinstance(noise, TextNoise) else "image"].append(noise)
    return out


def _expanded(name: str) -> list[str]:
    try:
        return noise_names(name)
    except NoiseError:
        return [name]


def _fitted(rgb: Any, cell: int) -> Image.Image:
    """The picture at most ``cell`` wide and high; a small one stays as it is."""
    picture = Image.fromarray(rgb)
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _image_row(
    small: Image.Image,
    cell: int,
    noise: ImageNoise,
    severities: Sequence[int],
    mode: Mode,
    key: SampleKey,
    seed: int,
) -> Image.Image:
    row = Image.new("RGB", (_LABELS + (cell + _GAP) * (len(severities) + 1), small.height), _PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((_GAP, 2), noise.name, _INK, _font(14))
    notes = [noise.group, noise.exactness] + ["geometry changed"] * (noise.geometry == "changed")
    for i, note in enumerate(notes):
        draw.text((_GAP, 21 + 14 * i), note, _GREY, _font(11))
    shown = [small] + [apply(small, noise.name, severity=s, key=key, mode=mode, seed=seed) for s in severities]
    for i, picture in enumerate(shown):
        if picture.width > cell or picture.height > small.height:
            picture.thumbnail((cell, small.height))
        left = _LABELS + i * (cell + _GAP)
        row.paste(_EMPTY, (left, 0, left + cell, small.height))
        row.paste(picture, (left + (cell - picture.width) // 2, (small.height - picture.height) // 2))
    return row


def _header(cell: int, severities: Sequence[int], mode: Mode, size: tuple[int, int]) -> Image.Image:
    row = Image.new("RGB", (_LABELS + (cell + _GAP) * (len(severities) + 1), _LINE), _PAPER)
    draw = ImageDraw.Draw(row)
    draw.text((_GAP, 0), f"{size[0]}x{size[1]}, {mode}", _GREY, _font(13))
    for i, title in enumerate(["clean", *(f"severity {severity}" for severity in severities)]):
        draw.text((_LABELS + i * (cell + _GAP), 0), title, _INK, _font(14))
    return row


def _text_block(
    question: str, noises: Sequence[TextNoise], severities: Sequence[int], width: int, key: SampleKey, seed: int
) -> Image.Image:
    lines: list[tuple[str, str, str]] = [("clean", "", part) for part in _wrapped(question, width)]
    for noise in noises:
        label = noise.name
        for severity in severities:
            number = str(severity)
            for part in _wrapped(apply_text(question, noise.name, severity=severity, key=key, seed=seed), width):
                lines.append((label, number, part))
                label = number = ""
    block = Image.new("RGB", (width, _LINE * len(lines) + _GAP), _PAPER)
    draw = ImageDraw.Draw(block)
    for i, (label, number, part) in enumerate(lines):
        if label and i:
            draw.line((_GAP, _LINE * i, width - _GAP, _LINE * i), _EMPTY)
        draw.text((_GAP, _LINE * i), label, _INK, _font(14))
        draw.text((_LABELS, _LINE * i), number, _GREY, _font(14))
        draw.text((_LABELS + 20, _LINE * i), part, _INK, _font(14))
    return block


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines that fit beside the labels; a word too long for a line has one of its own."""
    out: list[str] = []
    for line in text.split("\n"):
        out.append("")
        for word in line.split(" "):
            longer = f"{out[-1]} {word}" if out[-1] else word
            if out[-1] and _font(14).getlength(longer) > width - _LABELS - 20 - _GAP:
                out.append(word)
            else:
                out[-1] = longer
    return out


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
