"""Fog against a slow, literal diamond-square in float64 that is given the same random integers."""

from __future__ import annotations

import numpy as np
import pytest

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.seeding import RandomStream
from bitquake.noise.weather import plasma

KEY = SampleKey("d", "s", "fog")
CONSTANTS = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))


def literal_plasma(rows: int, columns: int, wave: int, decay: float, stream: RandomStream) -> np.ndarray:
    """Diamond-square on a torus, point by point, as in the textbook; amplitude 1 for the longest wave."""

    def uniform(count: int) -> np.ndarray:
        return stream.uint16(count).view(np.int16) / 32768

    height, width = rows * wave, columns * wave
    field = np.full((height, width), np.nan)
    field[::wave, ::wave] = uniform(rows * columns).reshape(rows, columns)
    step, amplitude = wave, 1.0

    def at(y: int, x: int) -> float:
        return field[y % height, x % width]

    while step > 1:
        half = step // 2
        tall, wide = height // step, width // step
        draws = uniform(3 * tall * wide).reshape(3, tall, wide) * amplitude
        for i in range(tall):
            for j in range(wide):
                y, x = i * step, j * step
                square = at(y, x) + at(y + step, x) + at(y, x + step) + at(y + step, x + step)
                field[y + half, x + half] = square / 4 + draws[0, i, j]
        for i in range(tall):
            for j in range(wide):
                for dy, dx, which in ((0, half, 1), (half, 0, 2)):
                    y, x = i * step + dy, j * step + dx
                    diamond = at(y - half, x) + at(y + half, x) + at(y, x - half) + at(y, x + half)
                    field[y, x] = diamond / 4 + draws[which, i, j]
        amplitude /= (
            decay * decay
        )  # ImageNet-C: the random term is wibble * U(-wibble, wibble), and wibble falls by decay
        step = half
    return field


@pytest.mark.parametrize(
    ("rows", "columns", "wave", "decay"), [(1, 1, 64, 2.0), (2, 3, 32, 1.4), (3, 1, 1, 2.0), (1, 2, 2, 1.7)]
)
def test_plasma_is_diamond_square(rows: int, columns: int, wave: int, decay: float) -> None:
    ours = plasma(rows, columns, wave, decay, RandomStream(0, KEY, 4)) / 2**26
    theirs = literal_plasma(rows, columns, wave, decay, RandomStream(0, KEY, 4))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4 * np.ptp(theirs)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 300), (5, 7)])
def test_fog_is_the_published_formula(severity: int, height: int, width: int) -> None:
    thickness, decay = CONSTANTS[severity - 1]
    image = np.random.default_rng(severity).integers(0, 231, (height, width, 3), dtype=np.uint8)
    field = literal_plasma(-(-height // 256), -(-width // 256), 256, decay, RandomStream(0, KEY, 4))
    field = (field - field.min()) / np.ptp(field)
    x, brightest = image / 255, image.max() / 255
    foggy = (x + thickness * field[:height, :width, None]) * brightest / (brightest + thickness)
    out = apply(image, "fog", severity=severity, key=KEY)
    assert np.abs(out - 255 * foggy.clip(0, 1)).max() < 0.55


def test_scaled_mode_shortens_the_waves() -> None:
    """Neighbouring pixels agree less where the waves are shorter; the 64-pixel picture sees a whole wave."""
    image = np.full((64, 64, 3), 128, np.uint8)
    spans, steps = {}, {}
    for mode in ("native", "scaled"):
        outs = [apply(image, "fog", severity=1, key=SampleKey("d", "s", str(i)), mode=mode) for i in range(20)]  # type: ignore[call-overload]
        spans[mode] = np.mean([np.ptp(out) for out in outs])
        steps[mode] = np.mean([np.abs(np.diff(out.astype(int), axis=1)).mean() for out in outs])
    assert spans["scaled"] > 1.3 * spans["native"] and steps["scaled"] > 2 * steps["native"]
    wave = image_noises()["fog"].parameters_for(3, "scaled", 64, 64)["wave"]
    assert wave == pytest.approx(256 * 64 / 224)


def test_nothing_repeats_on_pictures_larger_than_the_longest_wave() -> None:
    out = apply(np.full((300, 800, 3), 128, np.uint8), "fog", severity=3, key=KEY).astype(float)
    assert np.abs(out[:, :256] - out[:, 256:512]).mean() > 5


def test_black_stays_black_and_one_pixel_is_finite() -> None:
    assert (apply(np.zeros((9, 9, 3), np.uint8), "fog", severity=5, key=KEY) == 0).all()
    one = np.full((1, 1, 3), 200, np.uint8)
    for mode in ("native", "scaled"):
        assert apply(one, "fog", severity=5, key=KEY, mode=mode).shape == (1, 1, 3)  # type: ignore[call-overload]
