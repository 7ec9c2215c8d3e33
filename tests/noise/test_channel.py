"""Recompression against Pillow alone, and loss of resolution against exact arithmetic and OpenCV."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from bitquake.noise import SEVERITIES, ImageError, SampleKey, apply
from bitquake.noise.channel import down_up_scaling
from bitquake.noise.seeding import RandomStream

KEY = SampleKey("d", "s", "channel")
FACTORS = (2, 3, 4, 6, 8)


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colour with discs and a little grain."""
    rng = np.random.default_rng(0)
    base = cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(20):
        centre = int(rng.integers(width)), int(rng.integers(height))
        cv2.circle(base, centre, int(rng.integers(3, 20)), [int(v) for v in rng.integers(0, 256, 3)], -1)
    return (base + rng.normal(0, 3, base.shape)).clip(0, 255).astype(np.uint8)


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(float) - b).mean())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_recompression_is_a_chain_of_files_on_shifted_grids(severity: int) -> None:
    """Both of Pillow's directions, and padding by NumPy; decoders may round a level differently."""
    rounds, quality = ((2, 75), (3, 60), (3, 40), (3, 25), (5, 18))[severity - 1]
    image = picture(90, 121)
    expected = image
    for turn, number in enumerate(RandomStream(2, KEY, 21).uint16(rounds)):
        down, right = int(number) % 8, int(number) // 8 % 8
        padded = np.pad(expected, ((down, 0), (right, 0), (0, 0)), mode="edge")
        file = io.BytesIO()
        if turn % 2 == 0:
            Image.fromarray(padded).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        else:
            Image.fromarray(padded).save(file, "WEBP", quality=quality, method=0, lossless=False)
        expected = np.asarray(Image.open(file).convert("RGB"))[down:, right:]
    out = apply(image, "recompression", severity=severity, key=KEY, seed=2)
    assert np.abs(out.astype(int) - expected).mean() < 0.5
    single = io.BytesIO()
    Image.fromarray(image).save(single, "JPEG", quality=quality)
    assert error(out, image) > 1.1 * error(np.asarray(Image.open(single)), image)  # the rounds add up


def test_recompression_moves_nothing() -> None:
    image = picture(160, 200)
    out = apply(image, "recompression", severity=5, key=KEY)
    core = out[8:-8, 8:-8]
    shifts = [(y, x) for y in range(-3, 4) for x in range(-3, 4)]
    errors = [error(image[8 + y : 152 + y, 8 + x : 192 + x], core) for y, x in shifts]
    assert shifts[int(np.argmin(errors))] == (0, 0)


def test_samples_are_passed_on_along_different_ways() -> None:
    image = picture(64, 64)
    ways = {apply(image, "recompression", severity=1, key=SampleKey("d", "s", str(i))).tobytes() for i in range(8)}
    assert len(ways) == 8


def test_recompression_refuses_what_webp_cannot_hold() -> None:
    assert apply(picture(1, 16_376), "recompression", severity=1, key=KEY).shape == (1, 16_376, 3)
    with pytest.raises(ImageError, match=r"16377x1 pixels.*at most 16383"):
        apply(picture(1, 16_377), "recompression", severity=1, key=KEY)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (48, 72), (61, 50), (3, 200)])
def test_down_up_scaling_is_area_mean_and_linear_interpolation(factor: int, shape: tuple[int, int]) -> None:
    height, width = shape
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows, columns = -(-height // factor), -(-width // factor)
    padded = np.pad(image, ((0, rows * factor - height), (0, columns * factor - width), (0, 0)), mode="edge")
    small = np.empty((rows, columns, 3))
    for y in range(rows):
        for x in range(columns):
            cell = padded[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].astype(int)
            small[y, x] = np.floor(cell.sum((0, 1)) / factor**2 + 0.5)
    centres = [(np.arange(count) + 0.5) * factor - 0.5 for count in (rows, columns)]
    wide = np.apply_along_axis(lambda line: np.interp(np.arange(width), centres[1], line), 1, small)
    exact = np.apply_along_axis(lambda line: np.interp(np.arange(height), centres[0], line), 0, wide)
    out = apply(image, "down_up_scaling", severity=FACTORS.index(factor) + 1, key=KEY)
    assert np.abs(out - exact).max() < 0.5 + 1e-6


@pytest.mark.parametrize("factor", FACTORS)
def test_down_up_scaling_agrees_with_opencv(factor: int) -> None:
    image = picture(48 * 4, 48 * 5)
    small = cv2.resize(image, (240 // factor, 192 // factor), interpolation=cv2.INTER_AREA)
    theirs = cv2.resize(small, (240, 192), interpolation=cv2.INTER_LINEAR)
    ours = down_up_scaling(image, {"factor": factor}, RandomStream(0, KEY, 22))
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_down_up_scaling_loses_detail_and_keeps_the_mean() -> None:
    checks = np.indices((96, 96)).sum(0) % 2 * 255
    image = np.repeat(checks.astype(np.uint8)[:, :, None], 3, axis=2)
    for severity in (1, 3, 4, 5):  # even factors: every cell is half white
        assert set(np.unique(apply(image, "down_up_scaling", severity=severity, key=KEY))) == {128}
    image = picture(96, 144)
    for severity in SEVERITIES:
        out = apply(image, "down_up_scaling", severity=severity, key=KEY)
        assert np.abs(out.mean((0, 1)) - image.mean((0, 1))).max() < 1.5
