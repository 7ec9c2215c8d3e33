"""What a text noise declares about itself, the list of all of them, and how one chooses what it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np

from .question import Question
from .registry import SEVERITIES, image_noises
from .seeding import U16, RandomStream

TextCorruption = Callable[[Question, Mapping[str, float], RandomStream], str]
C = TypeVar("C", bound=TextCorruption)

FIRST_ID = 101  # text noises count from here, image noises below it: no id ever stands for two noises


@dataclass(frozen=True)
class TextNoise:
    """One text noise and everything a user or a report needs to know about it.

    Every text noise is exact, leaves geometry alone and belongs to the group ``text``.

    Attributes:
        name: the name used in YAML, task names and reports.
        id: stable integer, part of every seed; never reused.
        version: rises whenever the output changes for any question.
        parameters: one mapping per severity 1..5.
        corrupt: (question, parameters, random stream) -> the changed text.
    """

    name: str
    id: int
    version: int
    parameters: tuple[Mapping[str, float], ...]
    corrupt: TextCorruption
    exactness: ClassVar[Literal["exact"]] = "exact"
    group: ClassVar[Literal["text"]] = "text"
    geometry: ClassVar[Literal["preserved"]] = "preserved"

    @property
    def documentation(self) -> str:
        """What is changed, the parameters and what stays: the docstring of the function that does the work."""
        return self.corrupt.__doc__ or ""


_TEXT_NOISES: dict[str, TextNoise] = {}


def text_noise(*, id: int, version: int, parameters: Mapping[str, tuple[float, ...]]) -> Callable[[C], C]:
    """Register a text noise under its function's name.

    Args:
        id, version: see :class:`TextNoise`; ids begin at 101.
        parameters: for each parameter its five values, severity 1 first.

    Raises:
        ValueError: a name or id that is taken or out of range, or not five values for a parameter.
    """

    def register(corrupt: C) -> C:
        name = corrupt.__name__
        taken = name in _TEXT_NOISES or name in image_noises() or id in [other.id for other in _TEXT_NOISES.values()]
        if taken or id < FIRST_ID:
            raise ValueError(f"text noise {name!r} (id {id}): name or id is taken, or the id is below {FIRST_ID}")
        rows = tuple(dict(zip(parameters, row, strict=True)) for row in zip(*parameters.values(), strict=True))
        if len(rows) != len(SEVERITIES):
            raise ValueError(f"text noise {name!r}: needs {len(SEVERITIES)} values per parameter")
        _TEXT_NOISES[name] = TextNoise(name, id, version, rows, corrupt)
        return corrupt

    return register


def text_noises() -> dict[str, TextNoise]:
    """All text noises by name, in the order of their ids."""
    return dict(sorted(_TEXT_NOISES.items(), key=lambda item: item[1].id))


def chosen(uniform: U16, rate: float) -> list[int]:
    """The indices whose number is below ``rate`` of the range, the smallest number first.

    A higher rate only adds indices at the end. A noise that takes them in this order, and refuses one for reasons that
    lie in those before it, therefore keeps at each severity all that it changed at the one below.
    """
    order = np.argsort(uniform, kind="stable")
    return [int(index) for index in order[: int((uniform < round(rate * 65536)).sum())]]
