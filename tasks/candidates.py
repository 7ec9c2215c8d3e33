"""What a picture's own caption is ranked against: captions of other pictures, drawn by hash.

A picture's draw depends on the seed, its own id and the set of pictures it is drawn from: never on the order of the
rows, nor on which of them are evaluated. Every picture of the task's part can be drawn from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .schema import Candidates, FamilyError
from .scoring import TargetError
from .scoring.caption import reference_captions


class Draw(NamedTuple):
    """captions: the candidates; target: index of the picture's own one. A picture without captions has neither."""

    captions: list[str]
    target: int | None


@dataclass
class CandidatePool:
    """The captions of all pictures of a task's part.

    Args:
        wanted: how many candidates, and the seed.
        image_ids, references: of every row; rows with the same picture share their captions.

    Raises:
        FamilyError: fewer pictures with captions than candidates.
    """

    wanted: Candidates
    pictures: list[str]
    captions: dict[str, list[str]]

    @classmethod
    def of(cls, wanted: Candidates, image_ids: Sequence[str], references: Sequence[object]) -> CandidatePool:
        captions: dict[str, list[str]] = {}
        for image, values in zip(image_ids, references, strict=True):
            try:
                captions.setdefault(image, []).extend(reference_captions(values))
            except TargetError:  # the row's own failure, counted when it is scored
                continue
        # In an order that is the captions' own, whatever that of the rows.
        captions = {image: sorted(set(texts)) for image, texts in sorted(captions.items()) if texts}
        if len(captions) < wanted.n:
            raise FamilyError(
                f"candidates.n: {wanted.n} candidates need {wanted.n} pictures with captions, this part has "
                f"{len(captions)}; take a larger part, or fewer candidates"
            )
        return cls(wanted, list(captions), captions)

    def draw(self, image: str) -> Draw:
        """The candidates of one picture: never a text that, but for case and spaces, is one of its own, nor one twice.

        Raises:
            FamilyError: too few different captions in the whole part.
        """
        own = self.captions.get(image)
        if not own:
            return Draw([], None)
        seed = f"bitquake candidates {self.wanted.seed}\0{image}"
        numbers = _numbers(seed)
        target = int(next(numbers) % self.wanted.n)
        mine = own[int(next(numbers) % len(own))]
        taken = {_folded(text) for text in own}
        chosen: list[str] = []
        for index in _distinct(numbers, len(self.pictures), seed):
            other = self.captions[self.pictures[index]]
            # One caption of each picture: the drawn one, or the next that is not taken.
            start = int(next(numbers) % len(other))
            for text in other[start:] + other[:start]:
                if (folded := _folded(text)) not in taken:
                    taken.add(folded)
                    chosen.append(text)
                    break
            if len(chosen) == self.wanted.n - 1:
                return Draw([*chosen[:target], mine, *chosen[target:]], target)
        raise FamilyError(
            f"candidates.n: picture {image!r} finds only {len(chosen)} captions that differ from its own and from "
            f"each other, {self.wanted.n - 1} are needed; take a larger part, or fewer candidates"
        )


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _numbers(seed: str) -> Iterator[int]:
    """Endless 64-bit numbers from SHAKE-128 of the seed."""
    data = seed.encode("utf-8", "surrogatepass")
    for block in range(1 << 30):
        digest = hashlib.shake_128(data + block.to_bytes(4, "little")).digest(2048)
        yield from np.frombuffer(digest, dtype="<u8").tolist()


def _distinct(numbers: Iterator[int], n: int, seed: str) -> Iterator[int]:
    """The indices below ``n``, each once, in an order drawn by hash."""
    seen: set[int] = set()
    for _ in range(n):
        index = next(numbers) % n
        if index not in seen:
            seen.add(index)
            yield index
    # Hardly any are left; drawing would take ever longer to find them.
    yield from sorted(set(range(n)) - seen, key=lambda index: hashlib.blake2b(f"{seed}\0{index}".encode()).digest())
