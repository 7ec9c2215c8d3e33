"""``model_args`` as lmms-eval hands them over: strings, or what its parser made of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .quantizers.linear import Execution

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def refuse_unknown(unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first argument that nobody knows.

    Raises:
        TypeError: there is one; it names the closest and all known arguments.
    """
    known = list(known)
    for name in unknown:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"bitquake_hf: unknown argument {name!r}.{hint} Known: {', '.join(known)}.")


def as_bool(name: str, value: Any) -> bool:
    """``True``, ``"false"``, ``1``, ``"no"``, … as a bool.

    Raises:
        ValueError: anything else.
    """
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    key = str(value).strip().lower()
    if key not in known:
        raise ValueError(f"bitquake_hf: {name} must be true or false, got {value!r}.")
    return known[key]


def as_int(name: str, value: Any, *, minimum: int) -> int:
    """``8`` or ``"8"`` as an int, at least ``minimum``.

    Raises:
        ValueError: no whole number, or too small.
    """
    try:
        number = int(str(value))
    except ValueError:
        hint = " Automatic batch sizes are not supported." if "auto" in str(value) else ""
        raise ValueError(f"bitquake_hf: {name} must be a whole number, got {value!r}.{hint}") from None
    if number < minimum:
        raise ValueError(f"bitquake_hf: {name} must be at least {minimum}, got {number}.")
    return number


def as_positive(name: str, value: Any) -> float:
    """``0.5`` or ``"20"`` as a float above 0.

    Raises:
        ValueError: no number, not above 0, or infinite.
    """
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise ValueError(f"bitquake_hf: {name} must be a number above 0, got {value!r}.")
    return number


def as_text(name: str, value: Any) -> str | None:
    """A string; ``""`` and ``"none"`` are None; a whole number (a branch called ``2``, say) is its digits.

    Raises:
        ValueError: a float or a bool, into which lmms-eval's parser turns such strings as ``12e4``: the text is lost.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(
            f"bitquake_hf: {name} must be a string, got {value!r} ({type(value).__name__}). Quote or rename it."
        )
    return str(value).strip()


def as_execution(value: Any) -> Execution | None:
    """``"simulated"``, ``"packed"``, or None.

    Raises:
        ValueError: anything else.
    """
    name = as_text("execution", value)
    known: dict[str | None, Execution | None] = {None: None, "simulated": "simulated", "packed": "packed"}
    if name in known:
        return known[name]
    raise ValueError(f"bitquake_hf: execution must be simulated or packed, got {value!r}.")


def as_dtype(value: Any) -> torch.dtype:
    """``"bfloat16"``, ``"float16"``, ``"float32"`` or ``torch.…``.

    Raises:
        ValueError: another one; ``auto`` too, because the dtype of the full-precision twin must be named.
    """
    if isinstance(value, torch.dtype) and value in _DTYPES.values():
        return value
    name = str(value).strip().lower().removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"bitquake_hf: dtype must be bfloat16, float16 or float32, got {value!r}.")
    return _DTYPES[name]
