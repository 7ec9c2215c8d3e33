"""Pictures that a quantization was calibrated on must not be evaluated on: they are named, kept, and looked for.

A picture's names are ``pixels:<hash>`` (of its decoded RGB pixels, before any noise: comparable over datasets) and
``<dataset>:<image id>`` where its dataset names it. All names of a calibration set lie in the artifacts folder, in
``calibration/<ids hash>.json``, so that another process that evaluates the model finds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..journal import digest
from .sample import CalibrationError

FOLDER = "calibration"
_INSTEAD = {
    "calibrated": (
        "Evaluate another split, or calibrate on other pictures: calibration.data=FAMILY takes a family's calibration "
        "split, which shares no picture with its test split; calibration.source=noise, text or self takes no picture "
        "of any benchmark."
    ),
    "trained": (
        "Evaluate another split, or train on other pictures: data: FAMILY takes a family's train split, and without: "
        "[FAMILY] leaves a family's evaluated pictures out of any other data."
    ),
}
PIXELS = "pixels:"


class OverlapError(CalibrationError):
    """A sample of the evaluation shows a picture that the model was calibrated or trained on: no test of it."""


@dataclass(frozen=True)
class CalibratedOn:
    """The pictures that a model was calibrated or trained on.

    Attributes:
        quant: the quantization (or the training), as messages call it.
        image_ids: their names.
        how: what was done with them.
    """

    quant: str
    image_ids: frozenset[str]
    how: Literal["calibrated", "trained"] = "calibrated"


def refuse_overlap(calibrated: CalibratedOn, image_ids: Iterable[str], where: str) -> None:
    """Raise when one of a sample's pictures is among those that the model was calibrated on.

    Args:
        image_ids: the names of the sample's pictures, from :func:`document_image_ids`.
        where: the sample, as the message calls it.

    Raises:
        OverlapError: it is.
    """
    common = sorted(calibrated.image_ids.intersection(image_ids))
    if common:
        n = sum(name.startswith(PIXELS) for name in calibrated.image_ids)
        raise OverlapError(
            f"{where}: its picture {common[0]} is one of the {n} that {calibrated.quant} was {calibrated.how} on, so "
            f"its results would not be those of unseen pictures, and none are published. {_INSTEAD[calibrated.how]}"
        )


def document_image_ids(doc: Any, names: Iterable[str] = (), pixel_hashes: Iterable[str] = ()) -> set[str]:
    """The names of a document's pictures.

    Args:
        doc: the row: pictures in its columns count as they are before any noise, encoded or decoded.
        names: further names of them, as ``<dataset>:<image id>``.
        pixel_hashes: of the pictures that the model is shown.
    """
    from bitquake.noise import ImageError, pixel_hash
    from bitquake.tasks.documents import image_hashes

    found = {*names, *(PIXELS + one for one in pixel_hashes)}
    for picture in _pictures(doc):
        if isinstance(picture, bytes):
            found |= {PIXELS + one for one in image_hashes([picture]) if one}
        else:
            try:
                found.add(PIXELS + pixel_hash(picture))
            except ImageError:  # a picture that does not decode is shown to no model
                continue
    return found


def _pictures(doc: Any) -> Iterator[Any]:
    from PIL import Image

    from bitquake.tasks.documents import EncodedPicture

    for value in doc.values() if isinstance(doc, Mapping) else ():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, (EncodedPicture, Image.Image)):
                yield one


def ids_hash(image_ids: Iterable[str]) -> str:
    """blake2 hex of the sorted names."""
    return digest(sorted(image_ids))


def store_image_ids(image_ids: Iterable[str], artifacts: Path) -> str:
    """Write the names to ``calibration/<ids hash>.json`` in the artifacts folder, atomically; returns the hash.

    Raises:
        CalibrationError: the folder cannot be written.
    """
    from bitquake.tasks.sources import replacing

    ids = sorted(image_ids)
    name = ids_hash(ids)
    file = artifacts / FOLDER / f"{name}.json"
    try:
        with replacing(file) as new:
            new.write_text(json.dumps({"image_ids": ids}, indent=0) + "\n", encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"calibration: {file} cannot be written ({error}); give another artifacts=") from error
    return name


def load_image_ids(name: str, *folders: Path) -> frozenset[str]:
    """The names behind an ids hash, from the first of several folders that has them.

    Args:
        name: the ids hash of a quant card.
        folders: artifacts folders, and the checkpoint's own.

    Raises:
        CalibrationError: none has them, or the file was changed: what the model must not be evaluated on is not known.
    """
    for folder in folders:
        file = folder / FOLDER / f"{name}.json"
        if not file.is_file():
            continue
        try:
            ids = json.loads(file.read_text(encoding="utf-8"))["image_ids"]
            found = frozenset(ids)
            intact = all(isinstance(one, str) for one in ids) and ids_hash(found) == name
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise CalibrationError(
                f"calibration: {file} is damaged: its content does not fit its name; copy it again from where the "
                "model was quantized, or quantize again"
            )
        return found
    looked = ", ".join(str(folder / FOLDER) for folder in folders)
    raise CalibrationError(
        f"calibration: the pictures that this model was calibrated on ({name}) are listed nowhere here (looked for "
        f"{name}.json in {looked}), so that an overlap with the evaluation could not be seen. Copy that file from "
        "where the model was quantized, or give its folder as artifacts="
    )
