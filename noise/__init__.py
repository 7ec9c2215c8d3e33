"""Image corruptions that are the same pixels everywhere: seeded by the sample, versioned, and hashed.

The numbers behind the severities are those of ImageNet-C (Hendrycks & Dietterich, 2019, arXiv 1903.12261); the
implementations are Bitquake's own, and ``image_noises()[name].documentation`` says where and why each differs.
"""

from __future__ import annotations

from . import blur, digital, sensor, weather  # noqa: F401  (each registers its corruptions)
from .errors import ImageError, NoiseError
from .pixels import load_rgb, pixel_hash
from .registry import SEVERITIES, ImageNoise, apply, image_noises
from .seeding import SampleKey
from .spec import NoiseSpec

__all__ = [
    "SEVERITIES",
    "ImageError",
    "ImageNoise",
    "NoiseError",
    "NoiseSpec",
    "SampleKey",
    "apply",
    "image_noises",
    "load_rgb",
    "pixel_hash",
]
