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
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from bitquake.noise import ImageError, pixel_hash

from .candidates import CandidatePool
from .contract import CANDIDATES
from .schema import Candidates, Columns, FamilyError, Split, Subset
from .selection import Sample, choose, ids_hash, take_subset

IDS = "bitquake"
"""Column that is added: {sample_id, image_id, width, height, subset}, and for retrieval {target}."""


class EncodedPicture(bytes):
    """The bytes of an image file, as rows hold them; no other column's bytes are of this kind."""


@dataclass
class EncodedImage(datasets.Image):  # type: ignore[misc]
    """An image column whose rows are the bytes of the image file.

    Still a ``datasets.Image`` to lmms-eval, which drops such columns where pictures are not needed; and bytes, unlike
    the mapping of ``Image(decode=False)``, are kept out of its sample logs.
    """

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> EncodedPicture:
        if value.get("bytes") is not None:
            return EncodedPicture(value["bytes"])
        try:
            with datasets.utils.file_utils.xopen(value["path"], "rb") as file:
                return EncodedPicture(file.read())
        except Exception:  # a missing file is found out, and named, when the image is wanted
            return EncodedPicture()


def keep_encoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with every image column's rows as bytes; any other kind of column stays as it is."""
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) and not isinstance(feature, EncodedImage):
            dataset = dataset.cast_column(column, EncodedImage())
        elif isinstance(feature, datasets.Sequence) and isinstance(feature.feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Sequence(EncodedImage()))
    return dataset


@dataclass(frozen=True)
class Rows:
    """What a task wants of a split.

    split: which part of it; subset: a fixed choice of images, or None for all; explode: a column that holds a list,
    each of whose entries becomes a row; candidates: what captions are ranked against; need_size: whether the pictures'
    sizes are wanted; folder: where lists of sample ids lie.
    """

    split: Split
    subset: Subset | None = None
    explode: str | None = None
    candidates: Candidates | None = None
    need_size: bool = False
    folder: Path = Path()


def prepare(dataset: datasets.Dataset, columns: Columns, wanted: Rows) -> datasets.Dataset:
    """The rows of a task, with the column ``bitquake`` that names each row and its image.

    No image is decoded or copied: rows that an exploded list makes share the one they come from.

    Args:
        dataset: the whole split.
        columns: as the family declares them.
        wanted: which rows, and what is added to them.

    Raises:
        FamilyError: a column is missing, sample ids are not unique, no row is left, or see ``bitquake.tasks.selection``
            and ``bitquake.tasks.candidates``.
    """
    require_columns(dataset.column_names, columns)
    dataset = keep_encoded(dataset)
    image_ids, sample_ids = _ids(dataset, columns)
    repeated = [sample_id for sample_id, n in Counter(sample_ids).items() if n > 1]
    if repeated:
        raise FamilyError(
            f"columns.sample_id: {columns.sample_id!r} has {repeated[0]!r} in more than one row; name a column whose "
            "values are unique in the split, or leave it out to use a hash of the row"
        )
    lists = None if wanted.explode is None else _lists(dataset, wanted.explode)
    part = choose(_samples(sample_ids, image_ids, lists), sample_ids, dataset, wanted.split, wanted.folder)
    samples = part if wanted.subset is None else take_subset(part, wanted.subset)
    added = _added(dataset, columns, wanted, part, samples)
    # Fingerprints of our own: datasets would hash the whole new columns.
    name = _digest([dataset._fingerprint, columns.model_dump(), repr(wanted), [one.sample_id for one in samples]])
    # A copy of the table for each place in the lists, put one below the other: they share the images' memory. Columns
    # are added before rows are chosen, because one added after that makes datasets copy every image.
    n, copies = len(dataset), 1 + max(sample.entry or 0 for sample in samples)
    tables = []
    for copy in range(copies):
        table = dataset
        if lists is not None and wanted.explode is not None:
            kind = dataset.features.arrow_schema.field(wanted.explode).type.value_type
            entries = pa.array([one[copy] if one and len(one) > copy else None for one in lists], kind)
            table = table.remove_columns([wanted.explode])
            table = table.add_column(wanted.explode, entries, new_fingerprint=f"{name}-{copy}")
        places = {sample.row: place for place, sample in enumerate(samples) if (sample.entry or 0) == copy}
        for column, (values, kind) in added.items():
            filled = [values[places[row]] if row in places else None for row in range(n)]
            table = table.add_column(column, pa.array(filled, kind), new_fingerprint=f"{name}-{copy}-{column}")
        tables.append(table)
    dataset = tables[0] if copies == 1 else datasets.concatenate_datasets(tables)
    rows = [(sample.entry or 0) * n + sample.row for sample in samples]
    if rows == list(range(len(dataset))):
        return dataset
    return dataset.select(rows, new_fingerprint=_digest([name, "rows"]))


def _added(
    dataset: datasets.Dataset, columns: Columns, wanted: Rows, part: Sequence[Sample], samples: Sequence[Sample]
) -> dict[str, tuple[list[Any], pa.DataType]]:
    """Column that is added -> its values, one for each sample, and their type."""
    chosen = ids_hash(sample.sample_id for sample in samples) if wanted.subset is not None else ""
    sizes = _sizes(dataset, columns, {sample.row for sample in samples}) if wanted.need_size else {}
    named: list[dict[str, Any]] = []
    for sample in samples:
        width, height = sizes.get(sample.row, (None, None))
        ids: dict[str, Any] = {"sample_id": sample.sample_id, "image_id": sample.image_id}
        named.append(ids | {"width": width, "height": height, "subset": chosen})
    kinds = dict.fromkeys(("sample_id", "image_id"), pa.string()) | dict.fromkeys(("width", "height"), pa.int64())
    kinds["subset"] = pa.string()
    added: dict[str, tuple[list[Any], pa.DataType]] = {}
    if wanted.candidates is not None and columns.captions is not None:
        references = _values(dataset, columns.captions)
        pool = CandidatePool.of(
            wanted.candidates, [sample.image_id for sample in part], [references[sample.row] for sample in part]
        )
        draws = [pool.draw(sample.image_id) for sample in samples]
        added[CANDIDATES] = [draw.captions for draw in draws], pa.list_(pa.string())
        for ids, draw in zip(named, draws, strict=True):
            ids |= {"target": draw.target}
        kinds["target"] = pa.int64()
    return {IDS: (named, pa.struct(kinds.items()))} | added


def _samples(sample_ids: Sequence[str], image_ids: Sequence[str], lists: Sequence[Any] | None) -> list[Sample]:
    """All samples of a split: the rows, or the entries of their lists, in order."""
    if lists is None:
        return [Sample(row, None, *ids) for row, ids in enumerate(zip(sample_ids, image_ids, strict=True))]
    return [
        Sample(row, entry, f"{sample_ids[row]}-{entry}", image_ids[row])
        for row, entries in enumerate(lists)
        for entry in range(len(entries or ()))
    ]


def _lists(dataset: datasets.Dataset, column: str) -> list[Any]:
    """The lists of a column that is to be taken apart."""
    kind = dataset.features.arrow_schema.field(column).type
    if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
        raise FamilyError(f"explode: column {column!r} must hold lists, it holds {kind}; name another, or none")
    return _values(dataset, column)


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
        images = image_hashes(row[columns.image] for row in dataset.select_columns([columns.image]))
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


_PIXEL_HASHES: dict[bytes, str] = {}
"""Hash of a file -> hash of its pixels: a family's hundred tasks see the same files, and decoding takes minutes."""


def image_hashes(images: Iterable[Any]) -> list[str]:
    """The pixel hash of each image, "" for one that is missing or damaged; a file that comes again is decoded once."""
    out = []
    for image in images:
        file = hashlib.blake2b(image, digest_size=16).digest() if isinstance(image, bytes) else b""
        if file not in _PIXEL_HASHES:
            try:
                _PIXEL_HASHES[file] = pixel_hash(image)
            except ImageError:
                _PIXEL_HASHES[file] = ""
        out.append(_PIXEL_HASHES[file])
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


def _sizes(dataset: datasets.Dataset, columns: Columns, rows: set[int]) -> dict[int, tuple[int | None, int | None]]:
    """Row -> (width, height) of its picture as it is seen, from the declared columns or the picture's header."""
    if columns.width is not None and columns.height is not None:
        widths, heights = _values(dataset, columns.width), _values(dataset, columns.height)
        for value in (*widths, *heights):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise FamilyError(
                    f"columns.width, columns.height: expected pixels (integers of 1 or more), got {value!r}; name the "
                    "right columns, or leave both out to read the pictures' own sizes"
                )
        return {row: (widths[row], heights[row]) for row in rows}
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


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_as_text)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _as_text(value: Any) -> str:
    return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)
