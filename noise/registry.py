"""What a corruption declares about itself, the list of all of them, and the one function that applies them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, overload

import numpy as np
from PIL import Image

from .errors import ImageError, NoiseError
from .pixels import RGB, load_rgb
from .seeding import RandomStream, SampleKey

Mode = Literal["native", "scaled"]
Exactness = Literal["exact", "build-dependent"]
Geometry = Literal["preserved", "changed"]
Corruption = Callable[[RGB, Mapping[str, float], RandomStream], RGB]
C = TypeVar("C", bound=Corruption)

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 224  # ImageNet-C's constants were chosen for 224 x 224 pictures


@dataclass(frozen=True)
class ImageNoise:
    """One image corruption and everything a user or a report needs to know about it.

    Attributes:
        name: the name used in YAML, task names and reports.
        id: stable integer, part of every seed; never reused.
        version: rises whenever the output bytes change for any input.
        exactness: ``exact``: equal bytes on every machine; ``build-dependent``: equal within one environment only.
        geometry: ``changed`` where things move in the picture, so that boxes must move with them.
        parameters: one mapping per severity 1..5, in ``native`` units.
        spatial: the parameters measured in pixels, which ``scaled`` mode multiplies by min(H, W) / 224.
        corrupt: (uint8 (H, W, 3) image, parameters, random stream) -> new uint8 (H, W, 3) image.
    """

    name: str
    id: int
    version: int
    exactness: Exactness
    geometry: Geometry
    parameters: tuple[Mapping[str, float], ...]
    spatial: frozenset[str]
    corrupt: Corruption

    @property
    def documentation(self) -> str:
        """Formula, parameters and differences from ImageNet-C: the docstring of the function that does the work."""
        return self.corrupt.__doc__ or ""

    def parameters_for(self, severity: int, mode: Mode, height: int, width: int) -> dict[str, float]:
        """The parameters that a (height, width) picture gets at a severity in a mode."""
        factor = min(height, width) / REFERENCE_SIDE if mode == "scaled" else 1.0
        chosen = self.parameters[severity - 1]
        return {name: value * factor if name in self.spatial else value for name, value in chosen.items()}


_IMAGE_NOISES: dict[str, ImageNoise] = {}


def image_noise(
    *,
    id: int,
    version: int,
    exactness: Exactness,
    parameters: Mapping[str, tuple[float, ...]],
    spatial: tuple[str, ...] = (),
    geometry: Geometry = "preserved",
) -> Callable[[C], C]:
    """Register a corruption under its function's name.

    Args:
        id, version, exactness, geometry, spatial: see :class:`ImageNoise`.
        parameters: for each parameter its five values, severity 1 first.

    Raises:
        ValueError: a name or id that is taken, or not five values for a parameter.
    """

    def register(corrupt: C) -> C:
        name = corrupt.__name__
        if name in _IMAGE_NOISES or any(other.id == id for other in _IMAGE_NOISES.values()):
            raise ValueError(f"noise {name!r} (id {id}): name or id is taken")
        rows = tuple(dict(zip(parameters, row, strict=True)) for row in zip(*parameters.values(), strict=True))
        if len(rows) != len(SEVERITIES) or not set(spatial) <= set(parameters):
            raise ValueError(f"noise {name!r}: needs {len(SEVERITIES)} values per parameter and known spatial names")
        _IMAGE_NOISES[name] = ImageNoise(name, id, version, exactness, geometry, rows, frozenset(spatial), corrupt)
        return corrupt

    return register


def image_noises() -> dict[str, ImageNoise]:
    """All image corruptions by name, in the order of their ids."""
    return dict(sorted(_IMAGE_NOISES.items(), key=lambda item: item[1].id))


def check_request(name: Any, severity: Any, seed: Any, version: Any, mode: Any, where: str = "noise") -> ImageNoise:
    """The corruption that a request names, once every part of the request has been found valid.

    Args:
        where: what the messages begin with, for example the file and key the request came from.

    Raises:
        NoiseError: an unknown name or mode, a severity outside 1..5, a negative seed, or another version than ours.
    """
    noises = image_noises()
    if not isinstance(name, str) or name not in noises:
        close = difflib.get_close_matches(str(name), noises, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise NoiseError(f"{where}.name: unknown noise {name!r}. {hint}Known: {', '.join(noises)}.")
    noise = noises[name]
    if not _is_int(severity) or severity not in SEVERITIES:
        raise NoiseError(f"{where}.severity: {name} has severities 1 to 5 (integers), got {severity!r}.")
    if not _is_int(seed) or seed < 0:
        raise NoiseError(f"{where}.seed: expected an integer of at least 0, got {seed!r}.")
    if mode not in get_args(Mode):
        raise NoiseError(f"{where}.mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}.")
    if not _is_int(version) or version != noise.version:
        raise NoiseError(
            f"{where}.version: this release implements {name} version {noise.version}, got {version!r}. "
            f"Write version: {noise.version} for new runs; for the old pixels install the release that made them."
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
    known = image_noises().get(name) if isinstance(name, str) else None
    noise = check_request(name, severity, seed, known.version if known and version is None else version, mode)
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
