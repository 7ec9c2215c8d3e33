"""What the protocols share: the error for a reference that nothing can be scored against, and how much text is read."""

from __future__ import annotations


class TargetError(ValueError):
    """The reference answer of a sample is missing, empty, of the wrong form or outside its picture."""


READ_CHARACTERS = 4096
"""Scorers read this much of a model's text: no answer is longer, and runaway text must not cost quadratic time."""


def readable(text: str) -> str:
    """The part of a model's text that is read, runs of blanks collapsed to one space."""
    return " ".join(text[:READ_CHARACTERS].split())
