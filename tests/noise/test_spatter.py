"""Spatter against ImageNet-C's recipe in OpenCV and SciPy, given the same random integers."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from bitquake.noise import SEVERITIES, SampleKey, apply
from bitquake.noise.seeding import RandomStream
from bitquake.noise.spatter import capped_distance, equalising_table

call: Any = apply
CONSTANTS = (
    (0.65, 0.3, 4, 0.69, 0.6),
    (0.65, 0.3, 3, 0.68, 0.6),
    (0.65, 0.3, 2, 0.68, 0.5),
    (0.65, 0.3, 1, 0.65, 1.5),
    (0.67, 0.4, 1, 0.65, 1.5),
)


def key(sample: object) -> SampleKey:
    return SampleKey("d", "s", str(sample))


def published(image: np.ndarray, severity: int, numbers: RandomStream) -> np.ndarray:
    """0..255, neither rounded nor truncated at the end; OpenCV's distances are replaced by SciPy's exact ones."""
    mean, deviation, sigma, threshold, last = CONSTANTS[severity - 1]
    height, width, _ = image.shape
    z = stats.norm.ppf((numbers.uint16(height * width).reshape(height, width) + 0.5) / 65536)
    liquid = ndimage.gaussian_filter(mean + deviation * z, sigma, mode="nearest", truncate=4)
    liquid[liquid < threshold] = 0
    x = image / 255
    if severity >= 4:
        m = ndimage.gaussian_filter((liquid > threshold).astype(float), last, mode="nearest", truncate=4)[:, :, None]
        m[m < 0.8] = 0
        return 255 * (x * (1 - m) + m * np.array([63, 42, 20]) / 255)
    layer = (liquid * 255).astype(np.uint8)
    edges = cv2.Canny(layer, 50, 150)
    distance = ndimage.distance_transform_edt(edges == 0).clip(0, 20)
    distance = np.floor(ndimage.uniform_filter(distance, 3, mode="mirror") + 1e-6).astype(np.uint8)
    distance = cv2.equalizeHist(distance)
    distance = cv2.filter2D(distance, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    m = layer * cv2.blur(distance, (3, 3)).astype(float)
    m *= last / m.max()
    return 255 * (x + m[:, :, None] * np.array([175, 238, 238]) / 255).clip(0, 1)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (150, 333)])
def test_spatter_is_the_published_recipe(severity: int, height: int, width: int) -> None:
    image = np.random.default_rng(severity).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = apply(image, "spatter", severity=severity, key=key(1))
    expected = published(image, severity, RandomStream(0, key(1), 15))
    error = np.abs(out - expected)
    # a pixel within rounding of the threshold, or of a whole distance, may fall on the other side
    assert np.quantile(error, 0.99) < 1.5 and error.mean() < 0.5
    wet = np.abs(out - image.astype(float)).max(axis=2) > 3
    assert np.mean(wet == (np.abs(expected - image).max(axis=2) > 3)) > 0.99 and wet.mean() > 0.001


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(1, 45), st.floats(0, 0.1), st.integers(0, 2**32 - 1))
def test_distances_are_scipys(height: int, width: int, farthest: float, share: float, seed: int) -> None:
    edges = np.random.default_rng(seed).random((height, width)) < share
    expected = np.full((height, width), farthest)
    if edges.any():
        expected = ndimage.distance_transform_edt(~edges).clip(0, farthest)
    assert np.abs(capped_distance(edges, farthest) / 256 - expected).max() <= 0.5 / 256 + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=300))
def test_equalising_is_opencvs(levels: list[int]) -> None:
    layer = np.array([levels], np.uint8)
    ours = equalising_table(layer)[layer].astype(int)
    assert np.abs(ours - cv2.equalizeHist(layer)).max() <= 1  # OpenCV rounds a product in single precision
    assert np.array_equal(ours == ours.min(), layer == layer.min()) or len(set(levels)) > 128


def canny(layer: np.ndarray, low: int, high: int) -> np.ndarray:
    """Canny's detector as OpenCV specifies it, in integers: Sobel, thinning by sectors of 45 degrees, hysteresis."""
    padded = np.pad(layer.astype(np.int64), 1, mode="edge")
    smooth, slope = np.array([1, 2, 1]), np.array([-1, 0, 1])
    dx = ndimage.correlate(padded, smooth[:, None] * slope)[1:-1, 1:-1]
    dy = ndimage.correlate(padded, slope[:, None] * smooth)[1:-1, 1:-1]
    size = np.pad(np.abs(dx) + np.abs(dy), 1)

    def beside(down: int, right: int) -> np.ndarray:
        height, width = layer.shape
        return size[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    here, tangent = beside(0, 0), np.abs(dx) * 13573  # tan(22.5 degrees) in units of 2^-15
    level, steep = np.abs(dy) << 15 < tangent, np.abs(dy) << 15 > tangent + (np.abs(dx) << 16)
    rising = (dx < 0) != (dy < 0)
    peak = np.where(
        level,
        (here > beside(0, -1)) & (here >= beside(0, 1)),
        np.where(
            steep,
            (here > beside(-1, 0)) & (here >= beside(1, 0)),
            np.where(
                rising,
                (here > beside(-1, 1)) & (here > beside(1, -1)),
                (here > beside(-1, -1)) & (here > beside(1, 1)),
            ),
        ),
    )
    labels, _ = ndimage.label(peak & (here > low), np.ones((3, 3)))
    kept = np.unique(labels[peak & (here > high)])
    return 255 * np.isin(labels, kept[kept > 0]).astype(np.uint8)


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_opencvs_edge_detector_is_integer_arithmetic(severity: int) -> None:
    """Which is why spatter may call itself exact."""
    mean, deviation, sigma, threshold, _ = CONSTANTS[severity - 1]
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(mean, deviation, (90, 130))
        liquid = ndimage.gaussian_filter(noise, sigma, mode="nearest")
        layer = (np.where(liquid < threshold - 0.02 * seed, 0, liquid) * 255).astype(np.uint8)
        assert np.array_equal(cv2.Canny(layer, 50, 150), canny(layer, 50, 150))
        assert (cv2.Canny(layer, 50, 150) > 0).any()


def test_exact_distances_look_as_opencvs_do() -> None:
    """What the exact distances change: OpenCV's go by 5 x 5 steps, 2 % off at most."""
    edges = np.random.default_rng(0).random((200, 200)) < 0.004
    chamfer = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, 5).clip(0, 20)
    exact = capped_distance(edges, 20) / 256
    assert 0.01 < np.abs(chamfer - exact).max() < 0.025 * 20


@pytest.mark.parametrize("side", [64, 150, 448, 620])
def test_as_much_of_the_picture_gets_wet_at_any_size_in_scaled_mode(side: int) -> None:
    def wet(size: int, severity: int) -> float:
        grey = np.full((size, size, 3), 128, np.uint8)
        outs = [call(grey, "spatter", severity=severity, key=key(i), mode="scaled").astype(float) for i in range(12)]
        return float(np.mean([np.abs(out - grey).mean() for out in outs]))

    for severity in (1, 3, 5):
        assert wet(side, severity) == pytest.approx(wet(224, severity), rel=0.5 if severity == 1 else 0.3), severity


def test_water_only_adds_light_and_mud_only_covers() -> None:
    image = np.random.default_rng(3).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for severity in (1, 2, 3):
        assert (apply(image, "spatter", severity=severity, key=key(2)) >= image).all()
    for severity in (4, 5):
        out = apply(image, "spatter", severity=severity, key=key(2)).astype(int)
        mud = np.array([63, 42, 20])
        low, high = np.minimum(image, mud), np.maximum(image, mud)
        assert ((low <= out) & (out <= high)).all() and (np.abs(out - mud).max(axis=2) <= 51).any()


def test_a_picture_without_a_drop_stays_as_it_is() -> None:
    """One pixel is wet, and then as bright as can be, or dry, where ImageNet-C would divide by 0."""
    image = np.full((1, 1, 3), 77, np.uint8)
    for severity, water in ((1, 0.6), (2, 0.6), (3, 0.5)):
        mean, deviation, _, threshold, _ = CONSTANTS[severity - 1]
        seen = set()
        for sample in range(30):
            z = stats.norm.ppf((int(RandomStream(0, key(sample), 15).uint16(1)[0]) + 0.5) / 65536)
            wet = mean + deviation * z >= threshold
            expected = image + wet * water * np.array([175, 238, 238])
            assert np.abs(apply(image, "spatter", severity=severity, key=key(sample)) - expected).max() <= 0.51
            seen.add(wet)
        assert len(seen) == 2
