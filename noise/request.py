"""A noise that is asked for by name: the request is checked, then carried out on an image, a box or a question."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, get_args, overload

import numpy as np
from PIL import Image

from .errors import ImageError, NoiseError
from .pixels import RGB, load_rgb
from .question import Question
from .registry import SEVERITIES, Box, Group, ImageNoise, Mode, Size, image_noises
from .seeding import RandomStream, SampleKey
from .text import TextNoise, text_noises

GROUPS = (*get_args(Group), "text", "all")
"""What :func:`noise_names` knows."""


def noise_names(group: str) -> list[str]:
    """The names of a group's noises in the order of their ids: ``imagenet_c`` (its 15), ``imagenet_c_extra`` (its 4
    validation corruptions), ``camera``, ``text``, or ``all``.

    Raises:
        NoiseError: an unknown group.
    """
    if group not in GROUPS:
        raise NoiseError(f"noise group: unknown group {group!r}. {_hint(group, GROUPS)}Known: {', '.join(GROUPS)}.")
    return [name for name, noise in _all_noises().items() if group in ("all", noise.group)]


def check_request(name: Any, severity: Any, seed: Any, version: Any, mode: Any) -> ImageNoise | TextNoise:
    """The noise that a request names, once every part of the request has been found valid.

    Args:
        version: None takes the current one.

    Raises:
        NoiseError: an unknown name or mode, a severity outside 1..5, a negative seed, another version than ours, or
            a mode other than ``native`` for a text noise.
    """
    noises = _all_noises()
    if not isinstance(name, str) or name not in noises:
        raise NoiseError(f"noise.name: unknown noise {name!r}. {_hint(name, noises)}Known: {', '.join(noises)}.")
    noise = noises[name]
    if not _is_int(severity) or severity not in SEVERITIES:
        raise NoiseError(f"noise.severity: {name} has severities 1 to 5 (integers), got {severity!r}.")
    if not _is_int(seed) or seed < 0:
        raise NoiseError(f"noise.seed: expected an integer of at least 0, got {seed!r}.")
    if mode not in get_args(Mode):
        raise NoiseError(f"noise.mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}.")
    if isinstance(noise, TextNoise) and mode != "native":
        raise NoiseError(
            f"noise.mode: {name} is a text noise and has no pixels to scale, got {mode!r}. "
            "Write mode: native, or leave it out."
        )
    if version is not None and (not _is_int(version) or version != noise.version):
        raise NoiseError(
            f"noise.version: this release implements {name} version {noise.version}, got {version!r}. "
            f"Write version: {noise.version} for new runs; for the old output install the release that made it."
        )
    return noise


@overload
def apply(
    image: Image.Image,
    name: str,
    *,
    severity: int,
    key: SampleKey,
    mode: Mode = "native",
    seed: int = 0,
    version: int | None = None,
) -> Image.Image: ...


@overload
def apply(
    image: np.ndarray[Any, Any],
    name: str,
    *,
    severity: int,
    key: SampleKey,
    mode: Mode = "native",
    seed: int = 0,
    version: int | None = None,
) -> RGB: ...


def apply(
    image: Any,
    name: str,
    *,
    severity: int,
    key: SampleKey,
    mode: Mode = "native",
    seed: int = 0,
    version: int | None = None,
) -> Any:
    """A corrupted copy of an image; the image itself is never modified.

    The result depends on the pixels and the arguments only: never on order, process, rank, thread or earlier calls.

    Args:
        image: a PIL image of any mode, or an array; see :func:`load_rgb` for how it becomes RGB.
        name: one of :func:`image_noises`.
        severity: 1 (mild) to 5.
        key: the sample; two samples get independent noise.
        mode: ``native`` (ImageNet-C's constants as they are) or ``scaled`` (spatial ones times min(H, W) / 224).
        seed: the suite's seed.
        version: the version of the corruption that the caller counts on; None takes the current one.

    Returns:
        A PIL image of mode RGB for a PIL image, a ``uint8`` array of shape (H, W, 3) for an array.

    Raises:
        NoiseError: a bad name, severity, mode, seed, version or key.
        ImageError: an image that is missing, empty or does not decode.
    """
    noise = _image_noise(name, severity, seed, version, mode)
    stream = RandomStream(seed, key, noise.id)
    if not isinstance(image, (Image.Image, np.ndarray)):
        if image is None:
            load_rgb(image)
        raise ImageError(
            f"image: expected a PIL image or an array, got {type(image).__name__}. Use load_rgb for bytes."
        )
    rgb = load_rgb(image)
    out = noise.corrupt(rgb, noise.parameters_for(severity, mode, *rgb.shape[:2]), stream)
    return Image.fromarray(out) if isinstance(image, Image.Image) else out


def move_box(
    box: Box,
    size: Size,
    name: str,
    *,
    severity: int,
    key: SampleKey,
    mode: Mode = "native",
    seed: int = 0,
    version: int | None = None,
) -> tuple[Box, Size] | None:
    """Where a box goes when :func:`apply` corrupts its picture with the same arguments.

    Args:
        box: x1, y1, x2, y2 in pixels from the top left corner, so that the whole picture is (0, 0, width, height).
        size: width and height of the picture before the corruption.
        name, severity, key, mode, seed, version: as for :func:`apply`.

    Returns:
        The box in the corrupted picture and that picture's (width, height), both unchanged where the corruption
        preserves the geometry; None where too little of the box is left to be asked about.

    Raises:
        NoiseError: a bad argument, or a corruption that moves things in a way that no box can follow.
    """
    noise = _image_noise(name, severity, seed, version, mode)
    stream = RandomStream(seed, key, noise.id)
    if len(size) != 2 or not all(_is_int(side) and side >= 1 for side in size):
        raise NoiseError(f"size: expected the picture's width and height in pixels, got {size!r}.")
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise NoiseError(f"box: expected finite x1 < x2 and y1 < y2 (x1, y1, x2, y2), got {box!r}.")
    if noise.geometry == "preserved":
        return box, size
    if noise.move_box is None:
        still = ", ".join(other.name for other in image_noises().values() if other.geometry == "preserved")
        raise NoiseError(
            f"noise.name: {name} moves things in the picture, and no box can say where. Choose one of {still}."
        )
    width, height = size
    return noise.move_box(box, size, noise.parameters_for(severity, mode, height, width), stream)


def apply_text(
    text: str, name: str, *, severity: int, key: SampleKey, seed: int = 0, version: int | None = None
) -> str:
    """A question with a text noise; what :class:`Question` names (numbers, option letters, ...) is never changed.

    The result depends on the text and the arguments only. Every severity keeps what the one below it changed.

    Args:
        text: the question alone, without prompt, hint and options. Any text, also empty, of any language.
        name: one of :func:`text_noises`.
        severity: 1 (mild) to 5. A short question may stay as it is: the rates are probabilities per letter or word.
        key: the sample; two samples get independent noise.
        seed: the suite's seed.
        version: the version of the noise that the caller counts on; None takes the current one.

    Raises:
        NoiseError: a bad name, severity, seed, version or key, or something that is no text.
    """
    noise = check_request(name, severity, seed, version, "native")
    if not isinstance(noise, TextNoise):
        raise NoiseError(f"noise.name: {name} is an image noise. Use apply for images; for text: {_names('text')}.")
    stream = RandomStream(seed, key, noise.id)
    if not isinstance(text, str):
        raise NoiseError(f"text: expected a string, got {type(text).__name__}. Give the question itself.")
    return noise.corrupt(Question(text), noise.parameters[severity - 1], stream)


def _image_noise(name: Any, severity: Any, seed: Any, version: Any, mode: Any) -> ImageNoise:
    noise = check_request(name, severity, seed, version, mode)
    if not isinstance(noise, ImageNoise):
        raise NoiseError(f"noise.name: {name} is a text noise. Use apply_text for the question.")
    return noise


def _all_noises() -> dict[str, ImageNoise | TextNoise]:
    return {**image_noises(), **text_noises()}


def _names(group: str) -> str:
    return ", ".join(noise_names(group))


def _hint(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
