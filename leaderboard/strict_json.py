"""JSON that means one thing: UTF-8, no key twice, finite numbers of a sane size, not nested without end.

Python's reader takes ``NaN``, lets the last of two equal keys win, and reads numbers of any length. And the texts in
it: those that are shown to people may hold nothing that acts on a page, a terminal or a reader's eye.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

MAX_DEPTH = 12
LONGEST_NUMBER = 24

_ACTIVE = re.compile(r"\b(?:javascript|vbscript)\s*:|\bdata\s*:\s*text/html", re.IGNORECASE)
# Marks that change the direction in which what follows is read (Unicode Bidirectional Algorithm, UAX #9).
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class JsonProblem(ValueError):
    """A text that is not JSON of this kind; ``code`` as of a finding."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


def load_json(data: bytes) -> Any:
    """The data in a JSON text.

    Raises:
        JsonProblem: ``json-encoding`` (not UTF-8, a byte order mark, NUL), ``json-duplicate-key``, ``json-number``
            (NaN, an infinity, or more than ``LONGEST_NUMBER`` characters), ``json-depth`` (more than ``MAX_DEPTH``
            levels), ``json-syntax``.
    """
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise JsonProblem("json-encoding", "begins with a byte order mark; write UTF-8 without one")
    if b"\0" in data:
        raise JsonProblem("json-encoding", f"holds a NUL byte (at byte {data.index(0)})")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonProblem("json-encoding", f"is not UTF-8 (byte {error.start}: {error.reason})") from error
    try:
        value = json.loads(
            text, object_pairs_hook=_once, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
    except RecursionError as error:
        raise JsonProblem("json-depth", f"nested more than {MAX_DEPTH} levels deep") from error
    except json.JSONDecodeError as error:
        what = f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise JsonProblem("json-syntax", what) from error
    if _too_deep(value):
        raise JsonProblem("json-depth", f"nested more than {MAX_DEPTH} levels deep")
    return value


def text_problem(text: str, *, free: bool = False) -> tuple[str, str] | None:
    """(code, what) of a text that must not stand in a submission, or None.

    Args:
        free: a model's own answer: it may say anything but control characters, direction marks and broken Unicode.
    """
    if text.isascii() and text.isprintable():  # nearly all
        harmless = free or not ("<" in text or ">" in text or ":" in text)
        if harmless:
            return None
    for sign in text:
        kind = unicodedata.category(sign)
        if sign in _DIRECTION:
            return "text-direction", f"holds a direction mark (U+{ord(sign):04X})"
        if kind in ("Cc", "Cs") or (not free and kind in ("Cf", "Co", "Cn", "Zl", "Zp")):
            return "text-control", f"holds a character that cannot be shown (U+{ord(sign):04X})"
    if free:
        return None
    if "<" in text or ">" in text:
        return "text-markup", "holds < or >, which nothing here needs"
    if _ACTIVE.search(text):
        return "text-script", "holds an address that runs code"
    return None


def clean_answer(text: str, longest: int) -> str:
    """A model's answer as a submission may hold it: what ``text_problem`` refuses becomes U+FFFD."""
    text = text[:longest]
    if text_problem(text, free=True) is None:
        return text
    return "".join("\ufffd" if text_problem(sign, free=True) else sign for sign in text)


def texts_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text in JSON data, keys too, with its place."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield (*path, key), key
            yield from texts_of(below, (*path, key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from texts_of(below, (*path, i))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonProblem("json-duplicate-key", f"gives the key {twice[:40]!a} twice")
    return found


def _constant(name: str) -> Any:
    raise JsonProblem("json-number", f"holds {name}, which is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise JsonProblem("json-number", f"holds a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if len(digits) > LONGEST_NUMBER or not math.isfinite(value):
        raise JsonProblem("json-number", f"holds the number {digits[:40]}, which is too large or too long")
    return value


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            below
            for held in level
            if isinstance(held, (dict, list))
            for below in (held.values() if isinstance(held, dict) else held)
        ]
        if not level:
            return False
    return any(isinstance(held, (dict, list)) for held in level)
