"""Writes the shipped splits as parquet: ``python -m bitquake.tasks.world.build [FOLDER [FAMILY…]]``.

The ``train`` split is written to the user's cache when it is wanted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import splits

DATA = Path(__file__).parent / "data"
TRAIN_VERSION = 1
"""Rises when the same pictures of ``train``, or the questions on them, come out otherwise."""


def data_file(family: str, split: str) -> Path:
    """The shipped parquet file of a family's split."""
    return DATA / family / f"{split}.parquet"


def _schema(family: str) -> Any:
    """Arrow schema with the metadata by which Hugging Face ``datasets`` decodes the image column."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    image = pa.struct({"bytes": pa.binary(), "path": text})
    votes = pa.list_(pa.struct({"answer": text, "answer_confidence": text, "answer_id": number}))
    ids = {"sample_id": text}
    columns: dict[str, dict[str, Any]] = {
        "vqa": {
            "question_id": number,
            "image_id": number,
            "question": text,
            "question_type": text,
            "answer_type": text,
            "multiple_choice_answer": text,
            "answers": votes,
            "image": image,
            **ids,
        },
        "block_vizwiz": {
            "question_id": text,
            "image": image,
            "question": text,
            "answers": pa.list_(text),
            "category": text,
            **ids,
            "image_id": text,
        },
        "block_refcocoplus": {
            "question_id": text,
            "image": image,
            "question": text,
            "answer": pa.list_(text),
            "bbox": pa.list_(pa.float64()),
            "iscrowd": number,
            "file_name": text,
            **ids,
            "image_id": text,
        },
        "block_scienceqa": {
            "image": image,
            "question": text,
            "choices": pa.list_(text),
            "answer": number,
            **dict.fromkeys(
                ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), text
            ),
            **ids,
            "image_id": text,
        },
        "block_coco_caption": {
            "question_id": text,
            "image": image,
            "question": text,
            "answer": pa.list_(text),
            "id": number,
            "file_name": text,
            **ids,
            "image_id": text,
        },
        "block_flickr_retrieval": {
            "image": image,
            "caption": pa.list_(text),
            "sentids": pa.list_(text),
            "img_id": text,
            "filename": text,
            **ids,
            "image_id": text,
        },
    }
    fields = columns.get(family, columns["vqa"])

    def feature(kind: Any) -> Any:
        if kind == image:
            return {"_type": "Image"}
        if pa.types.is_list(kind):
            return {"feature": feature(kind.value_type), "_type": "List"}
        if pa.types.is_struct(kind):
            return {field.name: feature(field.type) for field in kind}
        return {"dtype": "float64" if kind == pa.float64() else str(kind), "_type": "Value"}

    features = {name: feature(kind) for name, kind in fields.items()}
    return pa.schema(list(fields.items()), metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write(family: str, split: str, folder: Path = DATA) -> Path:
    """Write one split, atomically. Equal pictures of neighbouring rows are stored once (dictionary encoding)."""
    from bitquake.tasks.sources import replacing

    target = folder / family / f"{split}.parquet"
    with replacing(target) as new:
        _write(family, splits.rows(family, split), new)
    return target


def _write(family: str, rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=_schema(family)),
        file,
        compression="zstd",
        compression_level=12,
        dictionary_pagesize_limit=1 << 26,
        row_group_size=1 << 20,
    )


def train_file(family: str, pictures: int) -> Path:
    """The parquet file with the first pictures of a family's ``train`` split, in the user's cache.

    The first call writes it, at 1 to 3 ms a picture; the next ones find it.

    Raises:
        ValueError: see ``splits.train_rows``.
        OSError: the cache cannot be written.
    """
    from platformdirs import user_cache_path

    from bitquake.tasks.sources import replacing

    folder = user_cache_path("bitquake", appauthor=False) / "world"
    file = folder / f"{family}-{splits.TRAIN}-{pictures}-v{TRAIN_VERSION}.parquet"
    if not file.is_file():
        rows = splits.train_rows(family, pictures)
        with replacing(file) as new:
            _write(family, rows, new)
    return file


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else DATA
    for family in arguments[1:] or splits.FAMILIES:
        for split in splits.SIZES[family]:
            path = write(family, split, folder)
            print(f"{path} {path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
