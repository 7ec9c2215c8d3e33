"""Image and text noises that are the same everywhere: seeded by the sample, versioned, and hashed.

    apply(image, "fog", severity=3, key=SampleKey("photos", "test", "42"), mode="native")
    apply_text("What is this?", "keyboard_typos", severity=3, key=SampleKey("photos", "test", "42"))

The numbers behind the severities of the image noises are those of ImageNet-C (Hendrycks & Dietterich, 2019,
arXiv 1903.12261) where it has them; the implementations are Bitquake's own, and ``image_noises()[name].documentation``
says where and why each differs. ``key`` names the sample, and is all that tells two samples' noise apart.
"""

from __future__ import annotations

from . import (  # noqa: F401  (each registers its noises)
    blur,
    camera,
    channel,
    characters,
    colour,
    digital,
    elastic,
    framing,
    frost,
    motion,
    sensor,
    snow,
    spatter,
    speech,
    weather,
    words,
)
from .cache import NoiseCache
from .errors import ImageError, NoiseError
from .pixels import as_picture, known_pixel_hash, load_rgb, pixel_hash
from .registry import SEVERITIES, Box, ImageNoise, Size, image_noises
from .request import GROUPS, apply, apply_text, move_box, noise_names
from .seeding import SampleKey
from .spec import NoiseSpec
from .text import TextNoise, text_noises

__all__ = [
    "GROUPS",
    "SEVERITIES",
    "Box",
    "ImageError",
    "ImageNoise",
    "NoiseCache",
    "NoiseError",
    "NoiseSpec",
    "SampleKey",
    "Size",
    "TextNoise",
    "apply",
    "apply_text",
    "as_picture",
    "image_noises",
    "known_pixel_hash",
    "load_rgb",
    "move_box",
    "noise_names",
    "pixel_hash",
    "text_noises",
]
