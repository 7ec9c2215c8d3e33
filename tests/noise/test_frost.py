"""Frost: the published mixture, and ice that looks as promised: seamless, not repeating, thicker at the edges."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest

from bitquake.noise import SEVERITIES, SampleKey, apply
from bitquake.noise.frost import GROWN, MOST_HALVINGS, TINT, TURN, UNIT, Growth, ice, window
from bitquake.noise.seeding import RandomStream

call: Any = apply
MIXTURES = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))


def key(sample: object) -> SampleKey:
    return SampleKey("d", "s", str(sample))


def pane(height: int, width: int, pixel: float, sample: object) -> np.ndarray:
    return window(height, width, pixel, RandomStream(0, key(sample), 14))(0, height)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_the_published_mixture_with_the_pane(severity: int) -> None:
    keep, share = MIXTURES[severity - 1]
    image = np.random.default_rng(severity).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    grey = pane(90, 140, 1, 0)[:, :, None] / 255
    tint = np.array(TINT)
    ice_colour = 255 * grey * (tint + (1 - tint) * grey)
    expected = (keep * image + share * ice_colour).clip(0, 255)
    assert np.abs(apply(image, "frost", severity=severity, key=key(0)) - expected).max() < 0.53


@pytest.mark.parametrize("kind", list(GROWN))
def test_ice_continues_at_its_opposite_edges(kind: str) -> None:
    """The step over the edge is like the steps beside it, and the same ice is grown again from the same seed."""
    square = ice(kind).astype(int)
    assert square.shape == (GROWN[kind][0],) * 2
    for turned in (square, square.T):
        inside = np.abs(np.diff(turned, axis=0)).mean(axis=1)
        over = np.abs(turned[0] - turned[-1]).mean()
        assert over < 1.15 * max(inside[0], inside[-1])
    ice.cache_clear()
    assert np.array_equal(ice(kind), square)


def test_ice_is_made_of_thin_bright_lines_with_dark_gaps() -> None:
    *ferns, felt = (ice(kind) for kind in GROWN)
    for square in (*ferns, felt):
        lines = square.astype(float) - cv2.GaussianBlur(square.astype(float), (0, 0), 3)
        assert ((lines - lines.mean()) ** 3).mean() / lines.std() ** 3 > 0.5  # skewed to the bright side
        assert lines.std() > 5
    assert min((square < 25).mean() for square in ferns) > 0.1 > (felt < 25).mean()


def test_growth_stops_at_other_ice_and_stays_on_its_torus() -> None:
    growth = Growth(3, 96)
    growth.grow(growth.fans(12, 4, 60))
    owner, ink = growth.owner.reshape(96, 96), growth.ink.reshape(96, 96)
    assert np.array_equal(owner > 0, ink > 0) and ink.max() <= 255 and len(np.unique(owner)) > 24
    alone = Growth(3, 96)
    tips = alone.fans(12, 4, 60)
    free = {name: values[:4] for name, values in tips.items()}
    alone.grow(free)  # the first crystal with nothing in its way
    crowded, unhindered = (np.count_nonzero((field > 0) & (field <= 4)) for field in (owner, alone.owner))
    assert 0 < crowded < unhindered


@pytest.mark.parametrize("kind", list(GROWN))
def test_halved_ice_is_the_mean_of_four_cells(kind: str) -> None:
    for halvings in range(MOST_HALVINGS):
        full = ice(kind, halvings)
        half = len(full) // 2
        expected = full.reshape(half, 2, half, 2).mean(axis=(1, 3))
        assert np.abs(ice(kind, halvings + 1) - expected).max() <= 0.5


def test_no_direction_lies_near_a_rounding_boundary() -> None:
    for turn in range(TURN):
        for part in (math.cos, math.sin):
            value = part(2 * math.pi * turn / TURN) * UNIT
            assert abs(abs(value % 1) - 0.5) > 1e-7


def details(field: np.ndarray) -> np.ndarray:
    """What is finer than about 10 pixels: crystals, without where the ice is thick."""
    return field - cv2.GaussianBlur(field.astype(float), (0, 0), 10)


def test_a_large_pane_does_not_repeat_its_squares() -> None:
    """Shifted by the side of its squares, the pane is little like itself; one square alone, repeated, is the same."""
    large = details(pane(700, 2300, 1, 1))
    for side, _ in GROWN.values():
        assert alike(large[:, :-side], large[:, side:]) < 0.35
    plain = details(ice("ferns")[np.arange(700)][:, np.arange(2300) % 1024])
    assert alike(plain[:, 50:-1074], plain[:, 1074:-50]) > 0.999


def test_frost_is_thicker_towards_the_edges_in_places() -> None:
    panes = np.stack([pane(240, 320, 1, sample) for sample in range(40)]).astype(float)
    middle = panes[:, 80:160, 107:213].mean(axis=(1, 2))
    rim = (panes.sum(axis=(1, 2)) - panes[:, 30:-30, 30:-30].sum(axis=(1, 2))) / (240 * 320 - 180 * 260)
    assert rim.mean() > 1.1 * middle.mean()
    assert (rim < middle).any() and (rim > 1.3 * middle).any()  # in places, not everywhere
    assert 80 < panes.mean() < 140 and panes.std() > 40
    assert len({field.tobytes() for field in panes}) == 40


def test_crystals_grow_with_the_picture_in_scaled_mode() -> None:
    small, reference, large = (pane(side, side, side / 224, 2).astype(float) for side in (112, 224, 448))
    assert alike(cv2.resize(reference, (448, 448), interpolation=cv2.INTER_LINEAR), large) > 0.97
    assert alike(cv2.resize(reference, (112, 112), interpolation=cv2.INTER_AREA), small) > 0.97


def test_every_severity_has_the_same_ice_and_every_sample_another() -> None:
    black = np.zeros((100, 100, 3), np.uint8)
    fields = [apply(black, "frost", severity=s, key=key(0)).astype(float) for s in SEVERITIES]
    assert min(alike(fields[0], field) for field in fields) > 0.99
    others = [apply(black, "frost", severity=3, key=key(sample)) for sample in range(1, 12)]
    assert max(abs(alike(details(fields[2]), details(other))) for other in others) < 0.3


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (5, 7), (31, 2)])
def test_tiny_pictures_freeze_too(shape: tuple[int, int]) -> None:
    for mode in ("native", "scaled"):
        out = call(np.zeros((*shape, 3), np.uint8), "frost", severity=5, key=key(4), mode=mode)
        assert out.shape == (*shape, 3) and out.max() > 5
