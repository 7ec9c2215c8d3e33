"""Low light against the published sensor model; occlusion against brute force, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.camera import Occluder, exposure_tables, occluders, srgb_levels, srgb_to_linear
from bitquake.noise.seeding import RandomStream

KEY = SampleKey("d", "s", "camera")
ELECTRONS, READ_NOISE = 2000.0, 3.0
LIGHT = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
GAIN = (2.0, 2.8, 4.0, 5.6, 8.0)


def decoded(levels: np.ndarray) -> np.ndarray:
    """sRGB to linear light, vectorised."""
    value = np.asarray(levels) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    """Linear light to 8-bit sRGB levels by the standard's encoding curve, clipped and not rounded."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_srgb_curve_is_the_standards() -> None:
    assert srgb_to_linear(0) == 0 and srgb_to_linear(255) == 1
    for level, linear in ((1, 0.000303527), (10, 0.003035270), (128, 0.215861), (188, 0.502886)):
        assert srgb_to_linear(level) == pytest.approx(linear, rel=1e-5)
    table = srgb_levels()
    assert np.array_equal(table[np.rint(65535 * decoded(np.arange(256))).astype(int)], np.arange(256))
    assert np.abs(table - encoded(np.arange(65536) / 65536)).max() < 0.501


def test_no_table_entry_depends_on_the_last_bits_of_the_c_library() -> None:
    steps = np.array([srgb_to_linear(level + 0.5) * 65536 for level in range(255)])
    assert np.abs(steps - np.rint(steps)).min() > 1e-6
    for light, gain in zip(LIGHT, GAIN, strict=True):
        counts = ELECTRONS * light * decoded(np.arange(256))
        unit = 65536 * gain / ELECTRONS
        tables = exposure_tables(light, gain, ELECTRONS, READ_NOISE)
        for exact, table in zip((unit * counts, unit * np.sqrt(counts + READ_NOISE**2)), tables, strict=True):
            assert np.abs(exact % 1 - 0.5).min() > 1e-6
            assert np.array_equal(np.rint(exact), table)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_low_light_is_the_formula_of_its_field(severity: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    z = stats.norm.ppf((RandomStream(4, KEY, 20).uint16(image.size) + 0.5) / 65536).reshape(image.shape)
    count = ELECTRONS * LIGHT[severity - 1] * decoded(image)
    exact = encoded(GAIN[severity - 1] * (count + np.sqrt(count + READ_NOISE**2) * z) / ELECTRONS)
    out = apply(image, "low_light", severity=severity, key=KEY, seed=4)
    assert np.abs(out - exact).max() < 0.6  # half a level, and fixed point where the curve is steep


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("level", [60, 128, 250])
def test_low_light_has_the_moments_of_poisson_counts_with_read_noise(severity: int, level: int) -> None:
    """A simulation that counts photons: mean and spread of the developed level, and how many pixels are black."""
    rng = np.random.default_rng(severity)
    light, gain = LIGHT[severity - 1], GAIN[severity - 1]
    counts = rng.poisson(ELECTRONS * light * decoded(np.array(level)), 200_000) + rng.normal(0, READ_NOISE, 200_000)
    simulated = np.rint(encoded(gain * counts / ELECTRONS))
    flat = np.full((200, 200, 3), level, np.uint8)
    out = apply(flat, "low_light", severity=severity, key=KEY).astype(float)
    assert abs(out.mean() - simulated.mean()) < 0.35
    assert out.std() == pytest.approx(simulated.std(), rel=0.03)
    assert abs((out == 0).mean() - (simulated == 0).mean()) < 0.01


def test_low_light_darkens_and_drowns_the_signal() -> None:
    ramp = np.repeat(np.tile(np.arange(256, dtype=np.uint8), (200, 1))[:, :, None], 3, axis=2)
    means, ratios = [], []
    for severity in SEVERITIES:
        out = decoded(apply(ramp, "low_light", severity=severity, key=KEY))
        means.append(out.mean())
        ratios.append(float((out.mean((0, 2)) / out.std((0, 2)))[200]))
    assert means == sorted(means, reverse=True) and ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 10 and 2 < ratios[4] < 5


def inside(shape: Occluder, growth: int, y: int, x: int) -> bool:
    """Whether the centre of pixel (y, x) lies in the grown shape, in Python's integers."""
    a, b = shape.across * growth >> 16, shape.down * growth >> 16
    dx, dy = abs(256 * x + 128 - shape.x), abs(256 * y + 128 - shape.y)
    if dy > b:
        return False
    return dx <= (a * math.isqrt(b * b - dy * dy) // b if shape.elliptic and b else a)


@pytest.mark.parametrize("sample", range(6))
def test_occlusion_covers_the_pixels_that_brute_force_finds(sample: int) -> None:
    key, (height, width) = SampleKey("d", "s", str(sample)), ((13, 19), (22, 9), (16, 16))[sample % 3]
    shapes = occluders(height, width, RandomStream(0, key, 23))
    magenta = np.tile(np.array([255, 0, 255], np.uint8), (height, width, 1))
    for severity in (1, 3, 5):
        target = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1] * height * width

        def mask(growth: int) -> np.ndarray:
            return np.array(
                [[any(inside(s, growth, y, x) for s in shapes) for x in range(width)] for y in range(height)]
            )

        low, high = 0, 256 * 64  # the largest growth that covers no more than the target, by halving
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if mask(middle).sum() <= target else (low, middle)
        out = apply(magenta, "occlusion", severity=severity, key=key)
        hidden = (out != magenta).any(axis=2)
        assert np.array_equal(hidden, mask(low)) and 0 < hidden.sum() <= target
        for y, x in np.argwhere(hidden):
            top = [shape.shade for shape in shapes if inside(shape, low, int(y), int(x))][-1]
            assert out[y, x].tolist() == [top] * 3


def test_occlusion_covers_its_share_and_higher_severities_cover_more_of_the_same() -> None:
    white = np.full((240, 320, 3), 255, np.uint8)
    seen, forms = np.zeros((240, 320)), set()
    for sample in range(60):
        key = SampleKey("d", "s", str(sample))
        before = np.zeros((240, 320), bool)
        for severity in SEVERITIES:
            out = apply(white, "occlusion", severity=severity, key=key)
            hidden = (out != white).any(axis=2)
            share = severity / 10
            assert share - 0.005 < hidden.mean() <= share
            assert hidden[before].all()
            shades = out[hidden]
            assert shades.min() >= 16 and shades.max() < 112 and (shades == shades[:, :1]).all()
            before = hidden
            seen += hidden
        shapes = occluders(240, 320, RandomStream(0, key, 23))
        forms |= {(len(shapes), shape.elliptic) for shape in shapes}
        for shape in shapes:
            assert 0 <= shape.x < 256 * 320 and 0 <= shape.y < 256 * 240
            assert 0.49 < shape.across / shape.down < 2.05
    assert forms == {(count, kind) for count in (1, 2, 3) for kind in (False, True)}
    assert seen.reshape(12, 20, 16, 20).mean((1, 3)).min() > 0  # no part of the picture is safe


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    sample=st.text(max_size=3),
    severity=st.sampled_from(SEVERITIES),
)
def test_occlusion_never_covers_more_than_its_share(height: int, width: int, sample: str, severity: int) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    out = apply(white, "occlusion", severity=severity, key=SampleKey("d", "s", sample))
    share = image_noises()["occlusion"].parameters[severity - 1]["share"]
    assert (out[:, :, 0] != 255).sum() <= share * height * width
