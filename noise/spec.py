"""A noise as it stands in a task's YAML: one small mapping, checked strictly."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .errors import NoiseError
from .registry import Box, ImageNoise, Mode, Size
from .request import apply, apply_text, check_request, move_box
from .seeding import SampleKey
from .text import TextNoise


@dataclass(frozen=True)
class NoiseSpec:
    """Which noise a task variant applies; two equal specs make equal pixels, or equal words.

    Attributes:
        name: one of :func:`image_noises` or of :func:`text_noises`.
        severity: 1..5.
        seed: the suite's seed, at least 0.
        version: must be the version this release implements; None stands for it and is replaced by it.
        mode: ``native`` or ``scaled``; ``native`` for a text noise.

    Raises:
        NoiseError: any field is invalid.
    """

    name: str
    severity: int
    seed: int = 0
    version: int | None = None
    mode: Mode = "native"

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.noise().version)

    @classmethod
    def from_mapping(cls, mapping: Any, where: str = "noise") -> NoiseSpec:
        """Read ``{name: gaussian_noise, severity: 3, seed: 0, version: 1, mode: native}``; the last three may lack.

        Args:
            mapping: what the YAML holds.
            where: what error messages begin with, for example ``vqav2.yaml: noise``.

        Raises:
            NoiseError: no mapping, an unknown or missing key, or an invalid value.
        """
        if not isinstance(mapping, Mapping):
            raise NoiseError(f"{where}: expected a mapping such as {{name: fog, severity: 3}}, got {mapping!r}.")
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"Did you mean {close[0]!r}? " if close else ""
                raise NoiseError(f"{where}: unknown key {key!r}. {hint}Known: {', '.join(known)}.")
        for key in ("name", "severity"):
            if key not in mapping:
                raise NoiseError(f"{where}: {key!r} is missing. Write for example {{name: fog, severity: 3}}.")
        try:
            return cls(**mapping)
        except NoiseError as error:
            raise NoiseError(where + str(error).removeprefix("noise")) from None

    def to_mapping(self) -> dict[str, Any]:
        """The complete mapping, every key present, for YAML and records."""
        return asdict(self)

    def noise(self) -> ImageNoise | TextNoise:
        """The noise itself: id, exactness, geometry, parameters, documentation."""
        return check_request(self.name, self.severity, self.seed, self.version, self.mode)

    @functools.cached_property
    def medium(self) -> Literal["image", "text"]:
        """What the noise changes: the picture (``apply``) or the question (``apply_text``)."""
        return "text" if isinstance(self.noise(), TextNoise) else "image"

    def apply(self, image: Any, key: SampleKey) -> Any:
        """:func:`bitquake.noise.apply` with this spec; NoiseError for a text noise."""
        return apply(
            image, self.name, severity=self.severity, key=key, mode=self.mode, seed=self.seed, version=self.version
        )

    def apply_text(self, text: str, key: SampleKey) -> str:
        """:func:`bitquake.noise.apply_text` with this spec; NoiseError for an image noise."""
        return apply_text(text, self.name, severity=self.severity, key=key, seed=self.seed, version=self.version)

    def move_box(self, box: Box, size: Size, key: SampleKey) -> tuple[Box, Size] | None:
        """:func:`bitquake.noise.move_box` with this spec: where a box of a (width, height) picture goes."""
        return move_box(
            box, size, self.name, severity=self.severity, key=key, mode=self.mode, seed=self.seed, version=self.version
        )
