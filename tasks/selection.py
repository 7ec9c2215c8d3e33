"""Which rows a task evaluates: a part of a split by image, listed samples, rows with given values, a fixed subset.

All of it is by hash or by name, so that neither the order of the rows nor what else is in the dataset matters.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from .schema import FamilyError, Split, Subset
from .split_ids import read_ids

SHOWN = 12
"""How many values or ids a message shows."""


class Sample(NamedTuple):
    """A row, or one entry of a row whose list is taken apart (``entry`` is then its index)."""

    row: int
    entry: int | None
    sample_id: str
    image_id: str


def choose(
    samples: Sequence[Sample],
    row_ids: Sequence[str],
    dataset: datasets.Dataset,
    split: Split,
    folder: Path,
) -> list[Sample]:
    """The samples of a split's part, in the dataset's order.

    Args:
        samples: all of the split.
        row_ids: row -> the sample id of the whole row.
        dataset: where the columns of ``split.where`` are read.
        split: as the family declares it.
        folder: where the file ``split.ids`` lies.

    Raises:
        FamilyError: a column of ``where`` or all its values are not there (some of them: a warning), ids are not, or
            nothing is left.
    """
    allowed = _rows_where(dataset, split)
    chosen = [sample for sample in samples if allowed is None or sample.row in allowed]
    if split.ids is not None:
        listed = set(read_ids(folder / split.ids))
        present = {sample.sample_id for sample in samples} | {row_ids[sample.row] for sample in samples}
        missing = sorted(listed - present)
        if missing:
            raise FamilyError(
                f"{split.ids}: {len(missing):,} of its {len(listed):,} sample ids are not in the split {split.split!r} "
                f"({len(samples):,} samples), for example {', '.join(missing[:3])}. The split's ids look like "
                f"{', '.join(sample.sample_id for sample in samples[:3])}: use the list that was made for this "
                "dataset, or name the right column as columns.sample_id"
            )
        chosen = [sample for sample in chosen if sample.sample_id in listed or row_ids[sample.row] in listed]
    elif split.part is not None:
        low, high = split.part
        chosen = [sample for sample in chosen if low <= fraction("split", sample.image_id) < high]
    if not chosen:
        raise FamilyError(f"{describe(split, folder) or split.split}: none of the split's {len(samples):,} samples")
    return chosen


def take_subset(samples: Sequence[Sample], subset: Subset) -> list[Sample]:
    """Whole images in the order of their hash, until there are ``n`` samples; in the dataset's order."""
    purpose = f"subset {subset.seed}"
    ordered = sorted(samples, key=lambda one: (fraction(purpose, one.image_id), one.image_id, one.row, one.entry or 0))
    return sorted(ordered[: subset.n], key=lambda one: (one.row, one.entry or 0))


def describe(split: Split, folder: Path) -> str:
    """How rows were chosen from a split, for people; "" for the whole split."""
    parts = []
    if split.ids is not None:
        ids = read_ids(folder / split.ids)
        parts.append(f"{len(ids):,} ids of {split.ids} ({ids_hash(ids)[:12]})")
    elif split.part is not None:
        low, high = split.part
        parts.append(f"pictures with hash in [{low:g}, {high:g})")
    for column, values in split.where.items():
        parts.append(f"rows where {column} is {' or '.join(map(str, values))}")
    return ", ".join([split.split, *parts]) if parts else ""


def ids_hash(ids: Iterable[str]) -> str:
    """Hash of sample ids, in whatever order they come."""
    text = json.dumps(sorted(ids), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def fraction(purpose: str, image: str) -> float:
    """A number in [0, 1) that depends on the purpose and the image's id only."""
    digest = hashlib.blake2b(f"bitquake {purpose}\0{image}".encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _rows_where(dataset: datasets.Dataset, split: Split) -> set[int] | None:
    """The rows that have one of the allowed values in every column; None for all."""
    allowed: set[int] | None = None
    for column, wanted in split.where.items():
        if column not in dataset.column_names:
            raise FamilyError(
                f"where.{column}: the dataset has no column {column!r}; "
                f"it has {', '.join(sorted(dataset.column_names))}"
            )
        values: list[Any] = dataset.select_columns([column])[:][column]
        try:
            there = Counter(values)
        except TypeError as error:
            raise FamilyError(
                f"where.{column}: expected a column of texts, integers or truth values, it holds for example "
                f"{str(values[0])[:60]}"
            ) from error
        absent = [value for value in wanted if value not in there]
        if absent:
            shown = ", ".join(f"{value!r} ({n:,})" for value, n in there.most_common(SHOWN))
            more = f" and {len(there) - SHOWN:,} more values" if len(there) > SHOWN else ""
            message = (
                f"where.{column}: {', '.join(map(repr, absent))} occurs in none of the {len(values):,} rows of the "
                f"split {split.split!r}; it has {shown}{more}. Correct the value, or remove it"
            )
            if len(absent) == len(wanted):
                raise FamilyError(message)
            warnings.warn(message, stacklevel=2)
        rows = {row for row, value in enumerate(values) if value in wanted}
        allowed = rows if allowed is None else allowed & rows
    return allowed
