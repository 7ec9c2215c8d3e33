"""What an image corruption declares about itself, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from .pixels import RGB
from .seeding import RandomStream

Mode = Literal["native", "scaled"]
Exactness = Literal["exact", "build-dependent"]
Geometry = Literal["preserved", "changed"]
Group = Literal["imagenet_c", "imagenet_c_extra", "camera"]
Corruption = Callable[[RGB, Mapping[str, float], RandomStream], RGB]
Box = tuple[float, float, float, float]
Size = tuple[int, int]
MoveBox = Callable[[Box, Size, Mapping[str, float], RandomStream], "tuple[Box, Size] | None"]
"""(x1, y1, x2, y2) in a picture of (width, height) -> the box in the corrupted picture and that picture's size, or None
where too little of it is left to be asked about. Gets the same parameters and a fresh stream of the same seed as the
corruption, so that both draw the same numbers."""
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
        group: ``imagenet_c`` (its 15), ``imagenet_c_extra`` (its 4 validation corruptions), ``camera`` (beyond it).
        geometry: ``changed`` where things move in the picture, so that boxes must move with them.
        parameters: one mapping per severity 1..5, in ``native`` units.
        spatial: the parameters measured in pixels, which ``scaled`` mode multiplies by min(H, W) / 224.
        corrupt: (uint8 (H, W, 3) image, parameters, random stream) -> new uint8 image, (H, W, 3) unless cropped.
        move_box: where a box goes; None where ``geometry`` is ``preserved``, or where no box could say it.
    """

    name: str
    id: int
    version: int
    exactness: Exactness
    group: Group
    geometry: Geometry
    parameters: tuple[Mapping[str, float], ...]
    spatial: frozenset[str]
    corrupt: Corruption
    move_box: MoveBox | None = None

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
    group: Group,
    parameters: Mapping[str, tuple[float, ...]],
    spatial: tuple[str, ...] = (),
    geometry: Geometry = "preserved",
    move_box: MoveBox | None = None,
) -> Callable[[C], C]:
    """Register a corruption under its function's name.

    Args:
        id, version, exactness, group, geometry, spatial, move_box: see :class:`ImageNoise`.
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
        if move_box is not None and geometry != "changed":
            raise ValueError(f"noise {name!r}: move_box is for noises whose geometry is 'changed'")
        _IMAGE_NOISES[name] = ImageNoise(
            name, id, version, exactness, group, geometry, rows, frozenset(spatial), corrupt, move_box
        )
        return corrupt

    return register


def image_noises() -> dict[str, ImageNoise]:
    """All image corruptions by name, in the order of their ids."""
    return dict(sorted(_IMAGE_NOISES.items(), key=lambda item: item[1].id))
