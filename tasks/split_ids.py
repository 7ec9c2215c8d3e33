"""Splits given by lists of sample ids: published ones, which no hash can remake (reliable VQA's cut of val2014).

A family file names a list itself (``ids: dev.json``), or the user's configuration names a file with one list for each
role (``bitquake config set split_ids vqav2 FILE``). Either way they are copied beside the expanded task files, under
names that hold their hash, so that another list makes other tasks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .families import FamilyError, Loaded
from .schema import ROLES, Split, Splits


def read_roles(file: Path) -> dict[str, list[str]]:
    """The lists of a file ``{"test": [...], "threshold": [...], "calibration": [...], "dev": [...]}``.

    The last two may lack.

    Raises:
        FamilyError: not such a file, a list that is empty or holds anything but ids, or an id that comes twice.
    """
    data = _read_json(file)
    expected = 'expected {"test": [sample ids], "threshold": [...], "calibration": [...], "dev": [...]}'
    if not isinstance(data, dict):
        raise FamilyError(f"{file}: {expected}, got {type(data).__name__}")
    for role in data:
        if role not in ROLES:
            raise FamilyError(f"{file}: {role!r} is no role; {expected}")
    for role in ("test", "threshold"):
        if role not in data:
            raise FamilyError(f"{file}: the list {role!r} is missing, and its rows could be in the others; {expected}")
    return {role: _ids(data[role], f"{file}: {role}") for role in ROLES if role in data}


def read_ids(file: Path) -> list[str]:
    """The sample ids in a JSON file that holds a list of them.

    Raises:
        FamilyError: it cannot be read, is empty, or holds anything but ids, or an id that comes twice.
    """
    return _ids(_read_json(file), str(file))


def with_ids(loaded: Loaded, file: Path | None = None) -> Loaded:
    """The family with every list of ids read, and named after its content.

    Args:
        file: a file of ``read_roles`` that replaces the family's own parts, from the user's configuration. Without a
            list for ``calibration`` (or ``dev``) in it the family has no such split.

    Raises:
        FamilyError: a list cannot be read, or an id is both in what is measured and in what thresholds, quantizers or
            Selectors see.
    """
    family = loaded.family
    splits: dict[str, Split] = dict(family.splits.roles())
    shifts = family.variants.shifts
    stems: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    if file is not None:
        for role, ids in read_roles(file).items():
            lists[f"splits.{role}"], stems[f"splits.{role}"] = ids, f"{file.stem}-{role}"
        given = [role for role in ROLES if f"splits.{role}" in lists]
        splits = {role: splits.get(role, splits["test"]) for role in given}
    places = {f"splits.{role}": split for role, split in splits.items()}
    places |= {f"variants.shifts.{name}": shift for name, shift in shifts.items()}
    for place, split in places.items():
        if split.ids is not None and place not in lists:
            source = loaded.file.parent / split.ids
            try:
                lists[place], stems[place] = read_ids(source), source.stem
            except FamilyError as error:
                raise loaded.problem(f"{place}.ids", str(error)) from error
    if not lists:
        return loaded
    _refuse_overlaps({place: (places[place].split, ids) for place, ids in lists.items()}, loaded, file)
    texts: dict[str, str] = {}
    for place, ids in lists.items():
        text = json.dumps(ids)
        name = f"{stems[place]}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.json"
        texts[name] = text
        places[place] = places[place].model_copy(update={"part": None, "ids": name})
    replaced: dict[str, Any] = {role: places[f"splits.{role}"] for role in splits}
    variants = family.variants.model_copy(
        update={"shifts": {name: places[f"variants.shifts.{name}"] for name in shifts}}
    )
    family = family.model_copy(update={"splits": Splits.model_construct(**replaced), "variants": variants})
    try:
        family.check_shifts()
    except ValueError as error:
        raise loaded.problem("variants.shifts", str(error)) from error
    return loaded._replace(family=family, ids=texts)


def _refuse_overlaps(lists: Mapping[str, tuple[str, list[str]]], loaded: Loaded, file: Path | None) -> None:
    """Test and shift rows are measured, and may be the same rows; all else must be rows of its own."""
    for role in ROLES[1:]:
        place = f"splits.{role}"
        if place not in lists:
            continue
        split, ids = lists[place]
        for other, (other_split, other_ids) in lists.items():
            common = set(ids).intersection(other_ids) if other != place and other_split == split else set()
            if common:
                raise loaded.problem(
                    place,
                    f"shares {len(common)} sample ids with {other}{f' in {file}' if file else ''}, for example "
                    f"{min(common)!r}; what thresholds, quantizers or Selectors see must not be measured on",
                )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FamilyError(f"{file}: cannot be read ({error.strerror or error})") from error
    except json.JSONDecodeError as error:
        raise FamilyError(f"{file}:{error.lineno}: no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise FamilyError(f"{file}: no JSON: {error}") from error


def _ids(data: Any, where: str) -> list[str]:
    if not isinstance(data, list) or not data:
        raise FamilyError(f"{where}: expected a list of sample ids, got {str(data)[:60] or type(data).__name__}")
    for one in data:
        if not isinstance(one, str | int) or isinstance(one, bool):
            raise FamilyError(f"{where}: expected sample ids (texts or integers), got {str(one)[:60]!r}")
    ids = [str(one) for one in data]
    if len(set(ids)) < len(ids):
        repeated = next(one for one, n in Counter(ids).items() if n > 1)
        raise FamilyError(f"{where}: {repeated!r} comes more than once")
    return ids
