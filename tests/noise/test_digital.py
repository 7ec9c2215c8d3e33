"""Contrast and pixelate against their formulas in float64, JPEG against Pillow called directly."""

from __future__ import annotations

import io
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitquake.noise import SEVERITIES, ImageError, SampleKey, apply

KEY = SampleKey("d", "s", "digital")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(SEVERITIES), st.integers(0, 2**32 - 1))
def test_contrast_is_its_formula(height: int, width: int, severity: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    x = image / 255
    means = x.mean(axis=(0, 1), keepdims=True)
    expected = ((x - means) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + means).clip(0, 1) * 255
    assert np.abs(apply(image, "contrast", severity=severity, key=KEY) - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_pillow_at_the_published_quality(severity: int) -> None:
    image = np.random.default_rng(severity).integers(0, 256, (45, 83, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=(25, 18, 15, 10, 7)[severity - 1])
    expected = np.asarray(Image.open(file).convert("RGB"))
    out = apply(image, "jpeg_compression", severity=severity, key=KEY)
    assert np.array_equal(out, expected)
    out[0, 0] = 0  # the result belongs to the caller


def test_a_side_no_jpeg_can_hold_is_a_clear_error() -> None:
    with pytest.raises(ImageError, match=r"65501x1 pixels.*at most 65500"):
        apply(np.zeros((1, 65_501, 3), np.uint8), "jpeg_compression", severity=1, key=KEY)
    assert apply(np.zeros((1, 65_500, 3), np.uint8), "jpeg_compression", severity=1, key=KEY).shape == (1, 65_500, 3)


def means_over(image: np.ndarray, count: int) -> np.ndarray:
    """The first axis in ``count`` equal spans: the mean over the pixels whose centres lie in each."""
    spans = [[] for _ in range(count)]  # type: list[list[np.ndarray]]
    for index, pixels in enumerate(image):
        spans[math.floor(Fraction(2 * index + 1, 2 * len(image)) * count)].append(pixels)
    return np.stack([np.mean(span, axis=0) for span in spans])


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 300), (45, 83), (3, 1), (480, 640)])
def test_pixelate_shows_the_mean_colour_of_every_cell(severity: int, height: int, width: int) -> None:
    factor = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    rows, columns = (max(1, math.floor(side * factor * (1 + 1e-12))) for side in (height, width))
    if (height, width) == (224, 224):
        assert rows == columns == (134, 112, 89, 67, 56)[severity - 1]
    image = np.random.default_rng(severity).integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = means_over(means_over(image, rows).swapaxes(0, 1), columns).swapaxes(0, 1)
    y, x = (((2 * np.arange(side) + 1) * count // (2 * side)) for side, count in ((height, rows), (width, columns)))
    out = apply(image, "pixelate", severity=severity, key=KEY)
    assert np.abs(out - coarse[y][:, x]).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_is_what_pillow_makes_of_imagenet_c(severity: int) -> None:
    """At the reference size, where no pixel's centre lies on the border between two cells but at a scale of 1/2."""
    image = np.random.default_rng(severity).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    small = int(224 * (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1])
    coarse = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    expected = np.asarray(coarse.resize((224, 224), Image.Resampling.BOX)).astype(int)
    out = apply(image, "pixelate", severity=severity, key=KEY)
    assert np.abs(out - expected).max() <= 1  # Pillow rounds twice


def test_pixelate_takes_more_from_a_smooth_picture_with_every_severity_and_mode() -> None:
    y, x = np.mgrid[0:480, 0:640]
    image = (127 + 60 * np.sin(x / 9)[..., None] + 60 * np.cos(y / 7 + x / 31)[..., None] * np.ones(3)).astype(np.uint8)
    losses = {
        mode: [
            np.square(apply(image, "pixelate", severity=s, key=KEY, mode=mode) - image.astype(float)).mean()  # type: ignore[call-overload]
            for s in SEVERITIES
        ]
        for mode in ("native", "scaled")
    }
    assert losses["native"] == sorted(losses["native"]) and losses["native"][0] > 0.5
    assert losses["scaled"] == sorted(losses["scaled"]) and losses["scaled"][0] > losses["native"][2]


def test_blocks_under_a_pixel_change_nothing() -> None:
    image = np.random.default_rng(1).integers(0, 256, (56, 60, 3), dtype=np.uint8)
    for severity in SEVERITIES:  # a quarter of the reference side: the largest block is one pixel
        assert np.array_equal(apply(image, "pixelate", severity=severity, key=KEY, mode="scaled"), image)
