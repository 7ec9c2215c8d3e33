"""Contrast against its formula in float64, JPEG against Pillow called directly."""

from __future__ import annotations

import io

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
