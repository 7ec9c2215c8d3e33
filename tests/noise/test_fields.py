"""Smoothing, interpolation and layer grids against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from bitquake.noise.fields import (
    LayerGrid,
    cell_centres,
    gaussian_kernel,
    interpolated,
    smoothed_bands,
    spread_left,
)
from bitquake.noise.resampling import mirrored, packed, sample


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.44, 7.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (70, 9), (300, 40)])
def test_smoothing_is_scipys(shape: tuple[int, int], sigma: float, mirror: bool) -> None:
    field = np.random.default_rng(0).integers(-65535, 65536, shape).astype(float)
    kernel = gaussian_kernel(sigma, 4)
    assert kernel.sum() == 1 << 14
    bands = list(smoothed_bands(shape[0], lambda rows: field[rows], kernel, mirror=mirror))
    ours = np.concatenate([rows for _, rows in bands]) / (1 << 28)
    theirs = ndimage.gaussian_filter(field, sigma, mode="reflect" if mirror else "nearest", truncate=4)
    assert [top for top, _ in bands] == list(np.cumsum([0, *[len(rows) for _, rows in bands[:-1]]]))
    assert np.abs(ours - theirs).max() < 65535 * 1e-3


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 12.0])
def test_white_noise_keeps_as_much_spread_as_promised(sigma: float) -> None:
    noise = np.random.default_rng(1).normal(size=(1200, 1200))
    assert ndimage.gaussian_filter(noise, sigma).std() == pytest.approx(spread_left(sigma, 4), rel=0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_interpolation_is_scipys(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    field = rng.integers(-(1 << 17), (1 << 17) + 1, (rows, columns)).astype(np.int32)
    y, x = (np.sort(rng.integers(0, 1024 * (cells - 1) + 1, n)) for cells, n in ((rows, height), (columns, width)))
    expected = ndimage.map_coordinates(field.astype(float), np.meshgrid(y / 1024, x / 1024, indexing="ij"), order=1)
    assert np.abs(interpolated(field, y, x) - expected).max() < 0.6


def test_cell_centres_are_those_of_pillow_and_opencv() -> None:
    for side, cells in ((12, 4), (640, 33), (5, 5), (7, 1)):
        centres = ((np.arange(side) + 0.5) * cells / side - 0.5).clip(0, cells - 1)
        assert np.abs(cell_centres(side, cells) / 1024 - centres).max() <= 1 / 1024


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 30))
def test_a_layer_covers_its_picture_and_its_unit_makes_up_for_the_whole_numbers(
    height: int, width: int, pixel: float
) -> None:
    grid = LayerGrid.over(height, width, pixel)
    cell = grid.enlarge / grid.divide  # in pixels
    assert grid.unit * cell == pytest.approx(pixel)
    assert (1 <= grid.unit < 2) or (grid.divide == 8 and grid.unit < 1)
    assert grid.shape[0] * cell >= height > (grid.shape[0] - 1) * cell
    layer = np.random.default_rng(0).integers(0, 65536, grid.shape).astype(np.uint16)
    fit = grid.fit(layer)
    rows = np.concatenate([fit(top, min(top + 7, height)) for top in range(0, height, 7)])
    assert rows.shape == (height, width)
    assert abs(int(rows.max()) - int(layer.max())) <= 1 or grid.enlarge > 1 or grid.divide > 1
    assert layer.min() <= rows.min() and rows.max() <= layer.max()


def test_fine_layers_are_averaged_and_coarse_ones_interpolated() -> None:
    rng = np.random.default_rng(2)
    fine = LayerGrid.over(10, 12, 0.4)
    layer = rng.integers(0, 65536, fine.shape).astype(np.uint16)
    assert fine.divide == 3 and np.array_equal(
        fine.fit(layer)(0, 10), np.rint(ndimage.uniform_filter(layer.astype(float), 3, mode="nearest")[1::3, 1::3])
    )
    coarse = LayerGrid.over(10, 12, 4.7)
    layer = rng.integers(0, 65536, coarse.shape).astype(np.uint16)
    places = [((np.arange(side) + 0.5) / 4 - 0.5).clip(0, n - 1) for side, n in zip((10, 12), layer.shape, strict=True)]
    expected = ndimage.map_coordinates(layer.astype(float), np.meshgrid(*places, indexing="ij"), order=1)
    assert coarse.enlarge == 4 and np.abs(coarse.fit(layer)(0, 10) - expected).max() < 0.6


def test_a_layer_is_not_made_finer_than_memory_allows() -> None:
    assert LayerGrid.over(200, 20_000, 0.5).divide == 1
    assert LayerGrid.over(200, 2_000, 0.5).divide == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(-(10**7), 10**7), min_size=1, max_size=20))
def test_mirroring_is_numpys_reflection(side: int, coordinates: list[int]) -> None:
    """Between whole pixels too: the mirrored ruler, in steps of 1/64, is what numpy.pad makes of it."""
    period = max(1, 2 * (side - 1) * 64)
    ruler = np.pad(np.arange((side - 1) * 64 + 1), (0, max(0, (side - 1) * 64 - 1)), mode="reflect")[:period]
    places = np.array(coordinates)
    mirrored(places, side)
    assert places.tolist() == [int(ruler[c % period]) for c in coordinates]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_sampling_is_scipys(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = (rng.integers(0, (side - 1) * 64 + 1, (8, 9)) for side in (height, width))
    expected = np.stack(
        [ndimage.map_coordinates(image[:, :, c].astype(float), [y / 64, x / 64], order=1) for c in range(3)], axis=2
    )
    out = np.empty((8, 9, 3), np.uint8)
    sample(packed(image), width, x.copy(), y.copy(), out)
    assert np.abs(out - expected).max() <= 0.5 + 1e-9
