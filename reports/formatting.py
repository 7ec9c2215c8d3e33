"""How numbers and foreign text look on a page and in a terminal."""

from __future__ import annotations

import re
import unicodedata

from bitquake.reports.schema import DifferenceEntry, Unit, ValueEntry

LONGEST_TEXT = 160
_DIGITS: dict[str, int] = {"percent": 1, "fraction": 3, "nats": 3, "tenths": 2}
SCALE: dict[str, float] = {"percent": 100.0, "fraction": 1.0, "nats": 1.0, "tenths": 10.0}
"""What a number is multiplied by to be shown."""


def clean_text(text: str, longest: int = LONGEST_TEXT) -> str:
    """One line of at most ``longest`` of foreign text, without control characters, direction marks and surrogates."""
    start = text[: 4 * longest]
    shown = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in re.sub(r"\s+", " ", start)
    )
    return shown if len(shown) <= longest and len(start) == len(text) else shown[: longest - 1] + "…"


def spreadsheet_text(text: str) -> str:
    """Foreign text that no spreadsheet takes for a formula."""
    shown = clean_text(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


def number(value: float, unit: Unit, *, signed: bool = False, digits: int | None = None) -> str:
    """``0.8123`` as ``81.2`` (percent), ``8.12`` (tenths) or ``0.812``; a real minus sign, none before zero."""
    places = _DIGITS[unit] if digits is None else digits
    text = f"{SCALE[unit] * value:.{places}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def interval(lo: float, hi: float, unit: Unit, *, signed: bool = False, digits: int | None = None) -> str:
    """``[79.8, 82.5]``."""
    return f"[{number(lo, unit, signed=signed, digits=digits)}, {number(hi, unit, signed=signed, digits=digits)}]"


def difference_digits(difference: DifferenceEntry, unit: Unit) -> int:
    """One more digit where a difference that is no tie, or the end of its interval next to zero, would read as zero."""
    digits = _DIGITS[unit]
    scaled = min(abs(difference.delta), abs(difference.lo), abs(difference.hi)) * SCALE[unit]
    return digits + 1 if difference.effect != "tied" and scaled < 0.5 * 10**-digits else digits


def delta(difference: DifferenceEntry, unit: Unit) -> str:
    """``+1.2``."""
    return number(difference.delta, unit, signed=True, digits=difference_digits(difference, unit))


def delta_interval(difference: DifferenceEntry, unit: Unit) -> str:
    """``[+0.4, +2.0]``."""
    return interval(difference.lo, difference.hi, unit, signed=True, digits=difference_digits(difference, unit))


def effect_word(difference: DifferenceEntry) -> str:
    """``≈ tied``, ``worse``, ``better``, or ``higher``/``lower`` where neither is better."""
    if difference.effect == "tied":
        return "≈ tied"
    return difference.verdict if difference.effect == "changed" else difference.effect


def effect_class(difference: DifferenceEntry, unit: Unit) -> str:
    """CSS class of a difference: its effect and, for a tint, how large it is (1 to 3)."""
    if difference.effect in ("tied", "changed"):
        return difference.effect
    points = abs(difference.delta) * 100
    if unit != "percent":
        points /= 2
    return f"{difference.effect} size{1 if points < 2 else 2 if points < 10 else 3}"


def value_text(value: ValueEntry, unit: Unit) -> str:
    """``81.2 [79.8, 82.5]`` or ``not available``."""
    if value.value is None or value.lo is None or value.hi is None:
        return "not available"
    return f"{number(value.value, unit)} {interval(value.lo, value.hi, unit)}"


def condition_name(kind: str, noise: str, severity: int, variant: str, *, full: bool = False) -> str:
    """``clean``, ``gaussian noise 3``, ``gaussian noise 3, whole split``, ``night shift``."""
    if kind == "noise":
        name = noise.replace("_", " ")
        return f"{name}{f' {severity}' if severity else ''}{', whole split' if full else ''}"
    return variant.replace("_", " ")


def megabytes(n_bytes: int) -> str:
    """Bytes as ``3.9 MB`` (10^6), below one of them as ``36.9 kB``."""
    return f"{n_bytes / 1e3:,.1f} kB" if n_bytes < 1e6 else f"{n_bytes / 1e6:,.1f} MB"
