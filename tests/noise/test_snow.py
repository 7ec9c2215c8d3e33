"""Snow against ImageNet-C's recipe in floating point, given the same random integers."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage, stats

from bitquake.noise import SEVERITIES, SampleKey, apply
from bitquake.noise.seeding import RandomStream

call: Any = apply
CONSTANTS = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)


def key(sample: object) -> SampleKey:
    return SampleKey("d", "s", str(sample))


def imagemagick_motion(layer: np.ndarray, radius: float, sigma: float, degrees: float) -> np.ndarray:
    """MagickMotionBlurImage, from its definition: a one-sided Gaussian along a line, edge pixels repeated."""
    height, width = layer.shape
    taps = 2 * math.ceil(radius) + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    out = np.zeros(layer.shape)
    y, x = np.mgrid[0:height, 0:width]
    for i, weight in enumerate(weights / weights.sum()):
        dx = math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        dy = math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        out += weight * layer[(y + dy).clip(0, height - 1), (x + dx).clip(0, width - 1)]
    return out


def published(image: np.ndarray, severity: int, numbers: RandomStream) -> np.ndarray:
    """0..255, neither rounded nor truncated at the end."""
    mean, deviation, zoom, threshold, radius, sigma, keep = CONSTANTS[severity - 1]
    height, width, _ = image.shape
    degrees = 90 * (int(numbers.uint16(1)[0]) + 0.5) / 65536 - 135
    size = math.ceil(height / zoom), math.ceil(width / zoom)
    z = stats.norm.ppf((numbers.uint16(size[0] * size[1]).reshape(size) + 0.5) / 65536)
    layer = ndimage.zoom(mean + deviation * z, zoom, order=1)
    top, left = (layer.shape[0] - height) // 2, (layer.shape[1] - width) // 2
    layer = layer[top : top + height, left : left + width]
    layer[layer < threshold] = 0
    layer = (layer.clip(0, 1) * 255).astype(np.uint8)
    layer = imagemagick_motion(layer, radius, sigma, degrees).round()[:, :, None] / 255
    x = (image / 255).astype(np.float32)
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[:, :, None]
    x = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return 255 * (x + layer + np.rot90(layer, k=2)).clip(0, 1)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (130, 201), (7, 5)])
def test_snow_is_the_published_recipe(severity: int, height: int, width: int) -> None:
    image = np.random.default_rng(severity).integers(0, 160, (height, width, 3), dtype=np.uint8)
    out = apply(image, "snow", severity=severity, key=key(0))
    error = np.abs(out - published(image, severity, RandomStream(0, key(0), 13)))
    # a flake's edge may move where the enlarged noise, known to 1/1024 of a cell, is close to the threshold
    assert np.median(error) < 0.5 and np.quantile(error, 0.98) < 2 and error.mean() < 0.6


def fall(out: np.ndarray) -> float:
    """The direction that streaks have on average, in degrees off the vertical; positive leans right going down."""
    grey = out.mean(axis=2)
    dy, dx = np.gradient(ndimage.gaussian_filter(grey, 1))
    angle = 0.5 * math.atan2(2 * (dx * dy).mean(), (dx * dx - dy * dy).mean())  # of the steepest change
    return math.degrees(angle)


def test_snow_falls_in_directions_uniform_around_the_vertical() -> None:
    black = np.zeros((160, 160, 3), np.uint8)
    measured, drawn = [], []
    for sample in range(60):
        measured.append(fall(apply(black, "snow", severity=2, key=key(sample))))
        drawn.append(90 * (int(RandomStream(0, key(sample), 13).uint16(1)[0]) + 0.5) / 65536 - 45)
    assert np.corrcoef(np.abs(measured), np.abs(drawn))[0, 1] > 0.9
    assert np.abs(np.abs(measured) - np.abs(drawn)).mean() < 6
    assert stats.kstest(drawn, stats.uniform(-45, 90).cdf).pvalue > 0.001


def test_flakes_grow_with_the_picture_in_scaled_mode() -> None:
    """The picture twice as large shows the same statistics at twice the distance."""

    def reach(side: int) -> float:
        """The lag, in pixels across the fall, at which two pixels are half as alike as neighbours."""
        alike = np.zeros(side // 8)
        for sample in range(12):
            black = np.zeros((side, side, 3), np.uint8)
            grey = call(black, "snow", severity=1, key=key(sample), mode="scaled")[:, :, 0].astype(float)
            grey -= grey.mean()
            alike += [(grey[:, : side - lag] * grey[:, lag:]).mean() for lag in range(side // 8)]
        return float(np.interp(-0.5, -alike / alike[0], np.arange(side // 8)))

    assert reach(448) / reach(224) == pytest.approx(2, rel=0.2)
    assert reach(112) / reach(224) == pytest.approx(0.5, rel=0.3)  # averaged over pixels, which are twice as large


def test_a_line_of_pixels_scaled_down_takes_no_gigabytes() -> None:
    """Its flakes are hundreds of times finer than its pixels."""
    tracemalloc.start()
    apply(np.zeros((1, 30_000, 3), np.uint8), "snow", severity=5, key=SampleKey("d", "s", "line"), mode="scaled")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20
