"""Gaussian, shot, impulse and speckle noise against SciPy's distributions."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.seeding import RandomStream
from bitquake.noise.sensor import normal_quantiles, poisson_thresholds

KEY = SampleKey("d", "s", "sensor")


def test_normal_table_is_the_quantile_function() -> None:
    exact = stats.norm.ppf((np.arange(65536) + 0.5) / 65536)
    table = normal_quantiles() / 65536
    assert np.abs(table - exact).max() < 0.5 / 65536 + 1e-9
    assert abs(table.std() - 1) < 1e-4 and table.mean() == 0


def test_no_entry_of_the_normal_table_depends_on_the_last_bits_of_the_c_library() -> None:
    scaled = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) * 65536 for i in range(65536)])
    assert np.abs(np.abs(scaled % 1) - 0.5).min() > 1e-6  # the C library may err by 1e-10 here


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_adds_normal_numbers_of_the_published_sigma(severity: int) -> None:
    sigma = 255 * (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    image = np.full((300, 300, 3), 128, np.uint8)
    out = apply(image, "gaussian_noise", severity=severity, key=KEY).astype(float)
    edges = np.array([*np.arange(10, 250, 10) + 0.5])
    expected = np.diff(stats.norm.cdf(edges, 128, sigma), prepend=0, append=1)
    observed = np.histogram(out, bins=[-1, *edges, 256])[0]
    keep = expected * out.size > 5
    pooled = np.append(observed[keep], observed[~keep].sum()), np.append(expected[keep], expected[~keep].sum())
    pooled = pooled if (~keep).any() else (observed, expected)
    assert stats.chisquare(pooled[0], pooled[1] * out.size).pvalue > 1e-3
    channels = out.reshape(-1, 3).T
    assert np.abs(np.corrcoef(channels) - np.eye(3)).max() < 4 / np.sqrt(90_000)
    assert abs(np.corrcoef(out[:, :-1].ravel(), out[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(out.size)


def test_gaussian_noise_is_the_shared_field_times_sigma() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    uniform = (RandomStream(5, KEY, 1).uint16(image.size) + 0.5) / 65536
    for severity, sigma in zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38), strict=True):
        exact = image.ravel() + 255 * sigma * stats.norm.ppf(uniform)
        out = apply(image, "gaussian_noise", severity=severity, key=KEY, seed=5)
        assert np.abs(out.ravel() - exact.clip(0, 255)).max() < 0.501


@pytest.mark.parametrize("rate", [60, 25, 12, 5, 3])
def test_poisson_table_is_the_distribution_function(rate: int) -> None:
    exact = stats.poisson.cdf(np.arange(rate), rate * np.arange(256)[:, None] / 255)
    assert np.abs(poisson_thresholds(rate) / 65536 - exact).max() < 0.5 / 65536 + 1e-9


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_is_the_poisson_quantile_of_the_shared_field(severity: int) -> None:
    rate = (60, 25, 12, 5, 3)[severity - 1]
    assert image_noises()["shot_noise"].parameters[severity - 1] == {"rate": rate}
    image = np.random.default_rng(severity).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    uniform = (RandomStream(0, KEY, 2).uint16(image.size) + 0.5) / 65536
    count = stats.poisson.ppf(uniform, rate * (image.ravel() / 255))
    expected = np.rint(count * 255 / rate).clip(0, 255)
    out = apply(image, "shot_noise", severity=severity, key=KEY).ravel()
    assert (out != expected).mean() < 1e-3  # numbers within 2^-17 of a step of the distribution may fall on either side


@pytest.mark.parametrize("level", [0, 1, 40, 90])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_has_poisson_mean_and_variance(level: int, severity: int) -> None:
    rate = (60, 25, 12, 5, 3)[severity - 1]
    image = np.full((200, 200, 3), level, np.uint8)
    out = apply(image, "shot_noise", severity=severity, key=KEY)
    law = stats.poisson(rate * level / 255)
    values = np.rint(np.arange(400) * 255 / rate).clip(0, 255)
    mean = (values * law.pmf(np.arange(400))).sum()
    variance = ((values - mean) ** 2 * law.pmf(np.arange(400))).sum()
    fourth = ((values - mean) ** 4 * law.pmf(np.arange(400))).sum()
    assert abs(out.mean() - mean) <= 4 * np.sqrt(variance / out.size) + 0.01
    assert abs(out.var() - variance) <= 4 * np.sqrt(max(0, fourth - variance**2) / out.size) + 0.002 * variance


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_makes_the_published_share_white_and_black(severity: int) -> None:
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    assert image_noises()["impulse_noise"].parameters[severity - 1] == {"amount": amount}
    image = np.random.default_rng(severity).integers(1, 255, (300, 300, 3), dtype=np.uint8)
    out = apply(image, "impulse_noise", severity=severity, key=KEY)
    counts = [(out == 255).sum(), (out == 0).sum(), (out == image).sum()]
    assert sum(counts) == out.size
    assert stats.chisquare(counts, out.size * np.array([amount / 2, amount / 2, 1 - amount])).pvalue > 1e-3
    changed = (out != image).reshape(-1, 3).T.astype(float)
    assert np.abs(np.corrcoef(changed) - np.eye(3)).max() < 4 / np.sqrt(90_000)  # channels are hit independently


def test_impulse_noise_keeps_from_severity_to_severity_what_it_has_replaced() -> None:
    image = np.random.default_rng(0).integers(1, 255, (90, 80, 3), dtype=np.uint8)
    before = image
    for severity in SEVERITIES:
        out = apply(image, "impulse_noise", severity=severity, key=KEY)
        replaced = before != image
        assert np.array_equal(out[replaced], before[replaced])
        before = out


@pytest.mark.parametrize("severity", SEVERITIES)
def test_speckle_noise_is_the_pixel_times_the_normal_quantile_of_the_shared_field(severity: int) -> None:
    sigma = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    assert image_noises()["speckle_noise"].parameters[severity - 1] == {"sigma": sigma}
    image = np.random.default_rng(severity).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    x = image.ravel().astype(float)
    uniform = (RandomStream(5, KEY, 8).uint16(image.size) + 0.5) / 65536
    exact = x + sigma * x * stats.norm.ppf(uniform)
    out = apply(image, "speckle_noise", severity=severity, key=KEY, seed=5)
    assert np.abs(out.ravel() - exact.clip(0, 255)).max() < 0.51
    assert (out[image == 0] == 0).all()


@pytest.mark.parametrize("level", [20, 60, 120])
def test_speckle_noise_grows_with_the_pixel(level: int) -> None:
    out = apply(np.full((200, 200, 3), level, np.uint8), "speckle_noise", severity=1, key=KEY).astype(float)
    deviation = np.sqrt((0.15 * level) ** 2 + 1 / 12)  # of the noise and of rounding
    assert abs(out.mean() - level) < 4 * deviation / np.sqrt(out.size)
    assert abs(out.std() / deviation - 1) < 4 / np.sqrt(2 * out.size)
