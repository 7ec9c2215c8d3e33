"""One calibration sample, before and after the model's processor, and where samples come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Item = TypeVar("Item")


class CalibrationError(ValueError):
    """Calibration data that does not exist or cannot be used; the message says what to write instead."""


@dataclass(frozen=True)
class CalibrationSample:
    """What a model is shown.

    Attributes:
        images: RGB pictures; none for text.
        prompt: the user's turn, as evaluation would write it for this model. Without pictures and answer: a document,
            which is read as it stands, without a chat template.
        answer: the assistant's turn; None where there is none.
        image_ids: names of the pictures, each as ``pixels:<hash>`` of what it is before any noise, and as
            ``<dataset>:<image id>`` where its dataset names it.
    """

    images: tuple[Image.Image, ...]
    prompt: str
    answer: str | None
    image_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationInputs:
    """A sample as a model's ``forward`` takes it, on the CPU.

    Attributes:
        inputs: keyword arguments, a batch of one; floating ones in the model's dtype.
        vision: bool (T,): positions of the language model's sequence that hold image features.
        answer: bool (T,): positions that hold the answer's tokens and the one that ends the turn.
    """

    inputs: dict[str, Tensor]
    vision: Tensor
    answer: Tensor


class Source(Protocol):
    """Samples in a fixed order that a seed decides, the ones to take first; each is made when it is asked for.

    ``title`` names the source in messages. ``identity`` is JSON of everything that decides its samples: the spec is
    not part of it.
    """

    title: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> CalibrationSample:
        """The sample at a place.

        Raises:
            SampleError: this one cannot be used, others may be.
            CalibrationError: something that the user has to mend.
        """


class SampleError(CalibrationError):
    """One sample that cannot be used: it is left out, and the next one takes its place."""


def shuffled(items: Iterable[Item], names: Iterable[str], seed: int) -> list[Item]:
    """Items in an order that depends on the seed and their names only, not on the order in which they are given."""
    named = sorted(zip(names, range(len(items := list(items))), items, strict=True), key=lambda one: one[:2])
    return [item for *_, item in sorted(named, key=lambda one: place(seed, one[0]))]


def place(seed: int, name: str) -> bytes:
    """Sort key of a name in the order of a seed."""
    return hashlib.blake2b(f"bitquake calibration {seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
