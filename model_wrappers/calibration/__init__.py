"""Calibration data: pictures, prompts and answers that a calibrated quantizer sees, and what it may not be tested on.

``build_calibration`` finds the samples of a ``CalibrationSpec`` (``sources``), encodes them for a model (``encoding``)
and keeps them on disk by content (``cache``); ``refuse_overlap`` ends an evaluation on a picture that was among them.
Importing this loads neither torch nor datasets.
"""

from __future__ import annotations

from .build import CalibrationSet, build_calibration
from .overlap import CalibratedOn, OverlapError, load_image_ids, refuse_overlap, store_image_ids
from .sample import CalibrationError, CalibrationInputs, CalibrationSample

__all__ = [
    "CalibratedOn",
    "CalibrationError",
    "CalibrationInputs",
    "CalibrationSample",
    "CalibrationSet",
    "OverlapError",
    "build_calibration",
    "load_image_ids",
    "refuse_overlap",
    "store_image_ids",
]
