"""The pictures that a checkpoint or an adapter was trained on, so that it is not evaluated on them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from ..calibration.overlap import CalibratedOn, load_image_ids, store_image_ids
from ..calibration.sample import CalibrationError

SEEN_FILE = "trained_on.json"
"""``{training, ids_hash, pictures}``; the pictures' names lie beside it, in ``calibration/<ids_hash>.json``."""


def store_seen(image_ids: Collection[str], folder: Path, training: str) -> None:
    """Note in a checkpoint's folder what it was trained on.

    Args:
        image_ids: names of the pictures, as of a ``CalibrationSample``.
        training: hash of the training.
    """
    from bitquake.tasks.sources import replacing

    name = store_image_ids(image_ids, folder)
    with replacing(folder / SEEN_FILE) as new:
        told = {"training": training, "ids_hash": name, "pictures": len(image_ids)}
        new.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def load_seen(folder: Path, *folders: Path) -> CalibratedOn | None:
    """What a checkpoint or an adapter was trained on; None where its folder does not say that it was trained here.

    Args:
        folders: where else the pictures' names may lie: artifacts folders.

    Raises:
        CalibrationError: the note is damaged, or the names are nowhere.
    """
    file = folder / SEEN_FILE
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        training, name = str(told["training"]), str(told["ids_hash"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{file} is damaged ({error}); copy it again from where the model was trained"
        ) from error
    seen = load_image_ids(name, folder, *folders)
    return CalibratedOn(f"the {folder.name} of training {training[:8]}", seen, "trained")
