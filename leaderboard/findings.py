"""What is wrong with a submission: findings with a code that tests and people can rely on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from bitquake.reports.formatting import clean_text

MOST_SHOWN = 20
"""Findings of one submission that are kept; whoever has more has one cause for them."""

_CODES = {
    "extra_forbidden": "field-unknown",
    "missing": "field-missing",
    "string_too_long": "field-too-long",
    "string_too_short": "field-too-short",
    "too_long": "field-too-long",
    "too_short": "field-too-short",
    "string_pattern_mismatch": "field-form",
    "literal_error": "field-value",
    "finite_number": "number-not-finite",
    "greater_than_equal": "field-range",
    "greater_than": "field-range",
    "less_than_equal": "field-range",
    "less_than": "field-range",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that a reader must know.

    code: stable name of the kind of finding. where: submission, file and place in it. what, fix: in our own words.
    got: what stood there, made harmless: one line without control characters, cut short. level: an ``error`` keeps the
    submission off the board, a ``warning`` does not.
    """

    code: str
    where: str
    what: str
    got: str = ""
    fix: str = ""
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        got = f", got {self.got}" if self.got else ""
        return f"{self.level} [{self.code}] {self.where}: {self.what}{got}" + (f"; {self.fix}" if self.fix else "")


class SubmissionError(ValueError):
    """A submission that cannot be taken; ``findings`` say why."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = tuple(findings)


def refuse(code: str, where: str, what: str, *, got: object = "", fix: str = "") -> SubmissionError:
    """One error, ready to be raised."""
    return SubmissionError([Finding(code, where, what, shown(got), fix)])


def shown(value: object, longest: int = 80) -> str:
    """Foreign data in a message: one ASCII line, without control characters, at most ``longest`` characters."""
    if isinstance(value, str) and not value:
        return ""
    text = value if isinstance(value, str) else repr(value) if _is_small(value) else type(value).__name__
    return clean_text(ascii(text[: 4 * longest]).strip("'\""), longest)


def of_schema(error: ValidationError, where: str, fix: str) -> list[Finding]:
    """A finding for each place that is not as its schema says."""
    found = []
    for detail in error.errors(include_url=False)[:MOST_SHOWN]:
        kind = detail["type"]
        code = _CODES.get(kind, "field-type" if kind.endswith(("_type", "_parsing", "_from_float")) else "field-value")
        # An error of the whole object would show all of it, and a missing field has no value to show.
        got = "" if kind in ("missing", "value_error") else shown(detail["input"])
        found.append(Finding(code, f"{where}: {path_of(detail['loc'])}", detail["msg"], got, fix))
    return found


def path_of(parts: Iterable[str | int]) -> str:
    """``tasks.block_vqav2_clean.n``; names come from foreign data."""
    return shown(".".join(map(str, parts)), 120) or "the whole"


def _is_small(value: Any) -> bool:
    """Whether ``repr`` of it is cheap."""
    if isinstance(value, (list, dict)):
        return len(value) <= 8 and not any(isinstance(v, (list, dict, str)) for v in _values(value))
    return isinstance(value, (int, float, bool)) or value is None


def _values(value: list[Any] | dict[Any, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
