"""Which noises a family's variants have, how variants and their tags are called, and which names are taken."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from bitquake.noise import image_noises, text_noises

CLEAN = "clean"
THRESHOLD = "threshold"
DEV = "dev"
ALL = "all"
SHIFT = "shift"
FULL = "full"

TAGS = {
    "imagenet_c": "noise",
    "imagenet_c_extra": "noise_extra",
    "camera": "camera_noise",
    "text": "text_noise",
}
"""Group of noises -> tag of its tasks, without the family's name. ``noise`` alone is the standard study."""


def groups() -> dict[str, list[str]]:
    """Group -> its noises, in the order of their ids."""
    found: dict[str, list[str]] = {group: [] for group in TAGS}
    for name, noise in image_noises().items():
        found[noise.group].append(name)
    found["text"] = list(text_noises())
    return found


def group_of(noise: str) -> str:
    """The group of a noise."""
    return next(group for group, names in groups().items() if noise in names)


def why_not(noise: str, *, boxes: bool, question: bool) -> str | None:
    """Why a family cannot have a noise, or None where it can.

    Args:
        boxes: the family scores boxes, which must move when things in the picture do.
        question: the family's rows have a question of their own.
    """
    if noise in text_noises():
        return None if question else "changes the question, and columns.question is not set"
    known = image_noises()[noise]
    if boxes and known.geometry == "changed" and known.move_box is None:
        return "moves things in the picture and cannot say where to; boxes would be wrong"
    return None


def chosen_noises(wanted: str | Sequence[str], *, boxes: bool, question: bool) -> list[str]:
    """The noises that ``variants.noise.names`` asks for, in its order, each once.

    ``all`` and groups leave out what the family cannot have; a noise that is named must be possible.

    Raises:
        ValueError: an unknown name, one that comes twice, one that is not possible, or nothing is left.
    """
    by_group = groups()
    asked = list(by_group) if isinstance(wanted, str) else list(wanted)
    known = [name for names in by_group.values() for name in names]
    chosen: dict[str, None] = {}
    for name in asked:
        if name in by_group:
            fitting = [one for one in by_group[name] if why_not(one, boxes=boxes, question=question) is None]
            if not fitting and not isinstance(wanted, str):
                reason = why_not(by_group[name][0], boxes=boxes, question=question) if by_group[name] else "is empty"
                raise ValueError(f"no noise of the group {name!r} is possible here: it {reason}")
        elif name in known:
            reason = why_not(name, boxes=boxes, question=question)
            if reason is not None:
                raise ValueError(f"{name} {reason}; remove it")
            fitting = [name]
        else:
            close = difflib.get_close_matches(name, [*by_group, *known], n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"unknown noise {name!r}. {hint}Known groups: {', '.join(by_group)}; known noises: {', '.join(known)}"
            )
        for one in fitting:
            if one in chosen:
                raise ValueError(f"noise {one!r} is named twice")
            chosen[one] = None
    if not chosen:
        raise ValueError("expected at least one noise")
    return list(chosen)


def why_reserved(shift: str) -> str | None:
    """Why a shift cannot have a name, or None where it can: it would read as another variant, or as a tag."""
    if shift in (CLEAN, THRESHOLD, DEV, ALL, SHIFT, *TAGS.values()):
        return "is what another task or tag of every family is called"
    if shift.endswith(f"_{THRESHOLD}"):
        return "ends like a threshold task"
    for taken in (*TAGS.values(), *(name for names in groups().values() for name in names)):
        if shift == taken or shift.startswith(f"{taken}_"):
            return f"reads like the noise {taken!r}"
    return None


def dev_tag(world: str) -> str:
    """The tag of all tasks of a world that Selectors learn from; families share it."""
    return f"{world}_{DEV}"


def noise_tags(family: str, noise: str, severity: int, *, full: bool = False) -> list[str]:
    """The tags of a noisy task, beside ``<family>_all``."""
    tag, end = f"{family}_{TAGS[group_of(noise)]}", f"_{FULL}" if full else ""
    return [f"{tag}{end}", f"{tag}_{severity}{end}"]
