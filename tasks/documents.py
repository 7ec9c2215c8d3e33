"""A dataset made ready for a task: the split's part, the subset, an id for every row and image, images left encoded.

lmms-eval reads rows with their images decoded, before any of our code sees them: one damaged file would end the run.
Here images stay encoded until ``doc_to_visual``, where a damaged one is one counted failure.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image

from bitquake.noise import ImageError, pixel_hash

from .families import Columns, FamilyError, Split, Subset

IDS = "bitquake"
"""Column that is added: {sample_id, image_id, width, height, subset}."""


@dataclass
class EncodedImage(datasets.Image):  # type: ignore[misc]
    """An image column whose rows are the bytes of the image file.

    Still a ``datasets.Image`` to lmms-eval, which drops such columns where pictures are not needed; and bytes, unlike
    the mapping of ``Image(decode=False)``, are kept out of its sample logs.
    """

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> bytes:
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        try:
            with datasets.utils.file_utils.xopen(value["path"], "rb") as file:
                return bytes(file.read())
        except Exception:  # a missing file is found out, and named, when the image is wanted
            return b""


def keep_encoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The dataset with an image column's rows as bytes; any other kind of column stays as it is."""
    if isinstance(dataset.features.get(column), datasets.Image):
        return dataset.cast_column(column, EncodedImage())
    return dataset


def prepare(
    dataset: datasets.Dataset, columns: Columns, split: Split, subset: Subset | None, *, need_size: bool
) -> datasets.Dataset:
    """The rows of a task, with the column ``bitquake`` that names each row and its image.

    Args:
        dataset: the whole split.
        columns: as the family declares them.
        split: which part of it, by image.
        subset: a fixed choice of images, or None for all.
        need_size: whether the pictures' sizes are wanted.

    Raises:
        FamilyError: a column is missing, or sample ids are not unique.
    """
    require_columns(dataset.column_names, columns)
    dataset = keep_encoded(dataset, columns.image)
    image_ids, sample_ids = _ids(dataset, columns)
    repeated = [sample_id for sample_id, n in Counter(sample_ids).items() if n > 1]
    if repeated:
        raise FamilyError(
            f"columns.sample_id: {columns.sample_id!r} has {repeated[0]!r} in more than one row; name a column whose "
            "values are unique in the split, or leave it out to use a hash of the row"
        )
    rows = _part(image_ids, split)
    if subset is not None:
        rows = _subset(rows, image_ids, subset)
    chosen = _ids_hash(sample_ids[row] for row in rows) if subset is not None else ""
    sizes = _sizes(dataset, columns, set(rows)) if need_size else {}
    added = [
        {
            "sample_id": sample_ids[row],
            "image_id": image_ids[row],
            "width": sizes.get(row, (None, None))[0],
            "height": sizes.get(row, (None, None))[1],
            "subset": chosen,
        }
        for row in range(len(dataset))
    ]
    # Fingerprints of our own: datasets would hash the whole new column. Added before rows are chosen, because a column
    # added after that makes datasets copy every image.
    name = _digest([dataset._fingerprint, columns.model_dump(), split.model_dump(), chosen, need_size])
    dataset = dataset.add_column(IDS, added, new_fingerprint=name)
    if len(rows) == len(dataset):
        return dataset
    return dataset.select(rows, new_fingerprint=_digest([name, "rows"]))


def require_columns(present: Iterable[str], columns: Columns) -> None:
    """Raise FamilyError unless every declared column is there."""
    have = list(present)
    for key, column in columns.model_dump(exclude_none=True).items():
        if column not in have:
            raise FamilyError(
                f"columns.{key}: the dataset has no column {column!r}; it has {', '.join(sorted(have))}. "
                f"Name the right column in the family file."
            )


def _ids(dataset: datasets.Dataset, columns: Columns) -> tuple[list[str], list[str]]:
    """Image ids and sample ids of all rows: the declared columns, else hashes of pixels and of content."""
    if columns.image_id is not None:
        images = ["" if value is None else str(value) for value in _values(dataset, columns.image_id)]
    else:
        images = _image_hashes(row[columns.image] for row in dataset.select_columns([columns.image]))
    if columns.sample_id is not None:
        samples = [str(value) for value in _values(dataset, columns.sample_id)]
    else:
        samples = _content_hashes(dataset, columns, images)
    # A row of text only, or whose image is damaged, is its own cluster.
    return [image or f"none-{sample}" for image, sample in zip(images, samples, strict=True)], samples


def _values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """A column as a list, read at once: row by row it takes minutes of a large split."""
    values: list[Any] = dataset.select_columns([column])[:][column]
    return values


def _image_hashes(images: Iterable[Any]) -> list[str]:
    """The pixel hash of each image, "" for one that is missing or damaged; a file that comes again is decoded once."""
    known: dict[bytes, str] = {}
    out = []
    for image in images:
        file = hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else b""
        if file not in known:
            try:
                known[file] = pixel_hash(image)
            except ImageError:
                known[file] = ""
        out.append(known[file])
    return out


def _content_hashes(dataset: datasets.Dataset, columns: Columns, images: Sequence[str]) -> list[str]:
    texts = dataset.remove_columns([columns.image])
    seen: Counter[str] = Counter()
    out = []
    for row, image in zip(texts, images, strict=True):
        name = _digest([row, image])
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return out


def _part(image_ids: Sequence[str], split: Split) -> list[int]:
    if split.part is None:
        return list(range(len(image_ids)))
    low, high = split.part
    return [row for row, image in enumerate(image_ids) if low <= _fraction("split", image) < high]


def _subset(rows: Sequence[int], image_ids: Sequence[str], subset: Subset) -> list[int]:
    """Whole images in the order of their hash, until there are ``n`` rows; in the dataset's order."""
    ordered = sorted(rows, key=lambda row: (_fraction(f"subset {subset.seed}", image_ids[row]), image_ids[row], row))
    return sorted(ordered[: subset.n])


def _fraction(purpose: str, image: str) -> float:
    """A number in [0, 1) that depends on the purpose and the image's id only."""
    digest = hashlib.blake2b(f"bitquake {purpose}\0{image}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _sizes(dataset: datasets.Dataset, columns: Columns, rows: set[int]) -> dict[int, tuple[int | None, int | None]]:
    """Row -> (width, height) of its picture as it is seen, from the declared columns or the picture's header."""
    if columns.width is not None and columns.height is not None:
        declared = dataset.select_columns([columns.width, columns.height])
        return {row: (declared[row][columns.width], declared[row][columns.height]) for row in rows}
    images = dataset.select_columns([columns.image])
    return {row: size for row in rows if (size := _header_size(images[row][columns.image])) is not None}


def _header_size(image: Any) -> tuple[int, int] | None:
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        width, height = opened.size
        turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that lie on their side
    except Exception:  # a damaged image is counted when it is asked about
        return None
    return (height, width) if turned else (width, height)


def _ids_hash(sample_ids: Iterable[str]) -> str:
    return _digest(sorted(sample_ids))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
