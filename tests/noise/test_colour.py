"""Brightness and saturation against colorsys, pixel by pixel in floating point."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquake.noise import SEVERITIES, SampleKey, apply

KEY = SampleKey("d", "s", "colour")
OFFSETS = (0.1, 0.2, 0.3, 0.4, 0.5)
SATURATION = ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))


def published(name: str, severity: int, image: np.ndarray) -> np.ndarray:
    """ImageNet-C's formula in hue, saturation and value, 0..255, neither rounded nor truncated."""
    out = []
    for pixel in image.reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        if name == "brightness":
            v = min(1.0, v + OFFSETS[severity - 1])
        else:
            gain, offset = SATURATION[severity - 1]
            s = min(1.0, s * gain + offset)
        out.append(colorsys.hsv_to_rgb(h, s, v))
    return 255 * np.array(out).reshape(image.shape)


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@settings(max_examples=40, deadline=None)
@given(severity=st.sampled_from(SEVERITIES), seed=st.integers(0, 2**32 - 1), steps=st.sampled_from((2, 4, 16, 256)))
def test_the_published_formula_to_half_a_level(name: str, severity: int, seed: int, steps: int) -> None:
    """Few steps between the levels make greys, primary colours, black and white frequent."""
    levels = np.linspace(0, 255, steps).round().astype(np.uint8)
    image = levels[np.random.default_rng(seed).integers(0, steps, (9, 13, 3))]
    out = apply(image, name, severity=severity, key=KEY)
    assert np.abs(out - published(name, severity, image)).max() < 0.505


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["brightness", "saturate"])
def test_every_grey(name: str, severity: int) -> None:
    """Brightened greys stay grey; saturated ones turn red where the formula adds saturation to colours without hue."""
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    out = apply(greys, name, severity=severity, key=KEY)
    assert np.abs(out - published(name, severity, greys)).max() < 0.505
    tinted = name == "saturate" and severity >= 4
    assert bool((out.max(axis=2) - out.min(axis=2) > 4).any()) == tinted
    assert np.array_equal(out[:, :, 0], np.maximum(greys[:, :, 0], out.max(axis=2)))


def test_saturation_keeps_the_largest_channel_and_brightness_keeps_the_ratios() -> None:
    image = np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for severity in SEVERITIES:
        assert np.array_equal(apply(image, "saturate", severity=severity, key=KEY).max(axis=2), image.max(axis=2))
        bright = apply(image, "brightness", severity=severity, key=KEY).astype(float)
        ratio = image.max(axis=2) / bright.max(axis=2)
        assert np.abs(bright * ratio[:, :, None] - image).max() <= 1  # both the channel and the largest are rounded
