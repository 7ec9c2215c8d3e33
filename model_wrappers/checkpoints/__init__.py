"""Reference checkpoints: small real vision-language models that ship with the package (DESIGN.md, section 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquake.model_wrappers.checkpoints.architecture import Architecture

PREFIX = "bitquake/"
_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names under which the shipped checkpoints can be given as ``pretrained``."""
    return sorted(PREFIX + path.parent.name for path in _HERE.glob("*/config.json"))


def resolve(name: str) -> Path:
    """Folder of a shipped checkpoint, ready for ``from_pretrained``.

    Raises:
        ValueError: no such checkpoint ships with this version.
    """
    folder = _HERE / name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or not (folder / "config.json").is_file():
        raise ValueError(
            f"pretrained={name!r}: no such reference checkpoint; shipped are {', '.join(names()) or 'none'}. "
            "Give one of these, a folder, or a model id of the hub"
        )
    return folder


ARCHITECTURES = ("idefics3", "qwen2-vl")
"""Architectures of the reference models, by the name that ``bitquake train-reference --architecture`` takes."""


def architecture_named(name: str) -> Architecture:
    """How to build a reference model of that architecture.

    Raises:
        ValueError: none of that name.
    """
    from bitquake.model_wrappers.checkpoints.idefics3 import Idefics3
    from bitquake.model_wrappers.checkpoints.qwen2_vl import Qwen2VL

    for found in (Idefics3(), Qwen2VL()):
        if found.name == name:
            return found
    raise ValueError(f"architecture={name!r}: known are {', '.join(ARCHITECTURES)}")
