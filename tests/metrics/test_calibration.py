"""Calibration metrics against loops written from the definitions, scikit-learn, simulation and published figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, log_loss

from bitquake import metrics
from bitquake.metrics.calibration import NLL_CLIP, rmsce_debiased_of
from bitquake.metrics.samples import plain

Array = NDArray[Any]
Answers = tuple[Array, Array]  # score, confidence

# A coarse grid, so that ties, bin edges, 0, 1 and missing confidences all come up.
CONFIDENCE = st.one_of(st.integers(0, 30).map(lambda k: k / 30), st.just(math.nan))
SCORE = st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])
ANSWERS = st.lists(st.tuples(SCORE, CONFIDENCE), min_size=1, max_size=40).map(
    lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True))
)
BINS = st.integers(1, 16)


def ece_by_loop(score: Array, confidence: Array, bins: int) -> float:
    present = [(a, c) for a, c in zip(score, confidence, strict=True) if not math.isnan(c)]
    if not present:
        return math.nan
    total = 0.0
    for b in range(bins):
        members = [(a, c) for a, c in present if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if members:
            total += abs(sum(a for a, _ in members) - sum(c for _, c in members))
    return total / len(present)


def ece_equal_mass_by_loop(score: Array, confidence: Array, bins: int) -> float:
    present = [(a, c) for a, c in zip(score, confidence, strict=True) if not math.isnan(c)]
    if not present:
        return math.nan
    gap = [0.0] * bins
    for a, c in present:
        above = sum(other > c for _, other in present)
        level = sum(other == c for _, other in present)
        # the middle of the level's mass, in half samples, to stay in whole numbers
        gap[bins * (2 * above + level) // (2 * len(present))] += a - c
    return sum(map(abs, gap)) / len(present)


def rmsce_debiased_by_loop(score: Array, confidence: Array, bins: int) -> float:
    present = ~np.isnan(confidence)
    if not present.any():
        return math.nan
    total = 0.0
    for b in range(bins):
        inside = ((confidence > b / bins) & (confidence <= (b + 1) / bins)) | ((b == 0) & (confidence == 0))
        gap = (score - confidence)[inside]
        if gap.size > 1:
            total += gap.size * (gap.mean() ** 2 - gap.var(ddof=1) / gap.size)
    return math.sqrt(max(0.0, total / present.sum()))


def test_calibration_errors_over_many_tied_samples() -> None:
    """The same cases in every run: whether a slip in a tie rule shows must not hang on the examples drawn."""
    rng = np.random.default_rng(20)
    for _ in range(400):
        n, bins = int(rng.integers(1, 40)), int(rng.integers(1, 17))
        score = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], n)
        confidence = np.where(rng.random(n) < 0.05, math.nan, rng.integers(0, 31, n) / 30)
        for metric, oracle in (
            (metrics.ece, ece_by_loop),
            (metrics.ece_equal_mass, ece_equal_mass_by_loop),
        ):
            expected = oracle(score, confidence, bins)
            assert metric(score, confidence, bins=bins) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        # compared as squares: a root near 0 magnifies rounding
        squared = rmsce_debiased_by_loop(score, confidence, bins) ** 2
        assert metrics.rmsce_debiased(score, confidence, bins=bins) ** 2 == pytest.approx(
            squared, abs=1e-12, nan_ok=True
        )


@given(ANSWERS, BINS)
def test_ece_is_the_sum_over_bins(answers: Answers, bins: int) -> None:
    assert metrics.ece(*answers, bins=bins) == pytest.approx(ece_by_loop(*answers, bins), abs=1e-12, nan_ok=True)


@given(ANSWERS, BINS)
def test_equal_mass_ece_is_the_sum_over_rank_bins(answers: Answers, bins: int) -> None:
    expected = ece_equal_mass_by_loop(*answers, bins)
    assert metrics.ece_equal_mass(*answers, bins=bins) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_equal_mass_bins_hold_equally_many_samples_without_ties() -> None:
    rng = np.random.default_rng(1)
    score, confidence = rng.random(150), rng.random(150)
    order = np.argsort(confidence)
    parts = [(score[part] - confidence[part]).sum() for part in np.split(order, 15)]
    assert metrics.ece_equal_mass(score, confidence) == pytest.approx(np.abs(parts).sum() / 150)


def test_equal_mass_ece_never_parts_a_tie() -> None:
    # Parting the tie between its right and its wrong half would report a gap of 0.5 in each bin.
    score = np.repeat([1.0, 0.0], 50)
    assert metrics.ece_equal_mass(score, np.full(100, 0.5), bins=2) == 0


@pytest.mark.parametrize(
    ("confidence", "first_bin", "last_bin"), [(0.0, 1, 0), (0.1, 1, 0), (0.1 + 1e-9, 0, 0), (0.9, 0, 0), (1.0, 0, 1)]
)
def test_bins_are_open_below_and_closed_above(confidence: float, first_bin: int, last_bin: int) -> None:
    bins = metrics.reliability_bins([1.0], [confidence], bins=10)
    assert (bins.counts[0], bins.counts[-1]) == (first_bin, last_bin)
    assert bins.counts.sum() == 1


@given(ANSWERS)
def test_reliability_bins_add_up_to_the_ece(answers: Answers) -> None:
    score, confidence = answers
    bins = metrics.reliability_bins(score, confidence)
    missing = np.isnan(confidence).sum()
    assert bins.n_missing_confidence == missing
    assert bins.counts.sum() == score.size - missing
    gaps = np.nansum(bins.counts * np.abs(bins.mean_score - bins.mean_confidence))
    if missing < score.size:
        assert gaps / (score.size - missing) == pytest.approx(metrics.ece(score, confidence), abs=1e-12)
    assert (np.isnan(bins.mean_score) == (bins.counts == 0)).all()


@given(ANSWERS)
def test_calibration_errors_are_bounded_and_ignore_order_and_duplication(answers: Answers) -> None:
    score, confidence = answers
    for metric in (metrics.ece, metrics.ece_equal_mass):
        value = metric(score, confidence)
        assert math.isnan(value) or 0 <= value <= 1
        assert metric(score[::-1], confidence[::-1]) == pytest.approx(value, abs=1e-12, nan_ok=True)
        assert metric(np.tile(score, 3), np.tile(confidence, 3)) == pytest.approx(value, abs=1e-12, nan_ok=True)


@given(st.lists(st.integers(0, 10).map(lambda k: k / 10), min_size=1, max_size=30))
def test_confidence_equal_to_the_score_has_no_error(values: list[float]) -> None:
    for metric in (metrics.ece, metrics.ece_equal_mass, metrics.rmsce_debiased, metrics.brier):
        assert metric(values, values) == pytest.approx(0, abs=1e-12)


def test_brier_and_nll_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.random(300)
    score = (rng.random(300) < 0.6).astype(float)
    weights = rng.integers(0, 4, 300)
    assert metrics.brier(score, confidence) == pytest.approx(brier_score_loss(score, confidence))
    assert metrics.nll(score, confidence) == pytest.approx(log_loss(score, confidence))
    assert metrics.nll(score, confidence, weights=weights) == pytest.approx(
        log_loss(score, confidence, sample_weight=weights)
    )


def test_soft_scores_by_hand() -> None:
    score, confidence = [0.6, 0.0, 1.0], [0.8, 0.5, math.nan]
    assert metrics.brier(score, confidence) == pytest.approx((0.04 + 0.25) / 2)
    assert metrics.signed_miscalibration(score, confidence) == pytest.approx((0.2 + 0.5) / 2)
    cross_entropy = -(0.6 * math.log(0.8) + 0.4 * math.log(0.2)) - math.log(0.5)
    assert metrics.nll(score, confidence) == pytest.approx(cross_entropy / 2)


def test_nll_of_a_certain_wrong_answer_is_finite() -> None:
    assert metrics.nll([0.0, 1.0], [1.0, 0.0]) == pytest.approx(-math.log(NLL_CLIP), rel=1e-6)


@pytest.mark.parametrize(("n", "published"), [(200, 0.069), (500, 0.044), (1000, 0.031), (5000, 0.014)])
def test_a_calibrated_model_shows_the_published_noise_floor(n: int, published: float) -> None:
    """The project's published floor was simulated elsewhere; confidences uniform on [0.4, 1] reproduce it."""
    rng = np.random.default_rng(n)
    shown, expected = [], []
    for _ in range(400):
        confidence = rng.uniform(0.4, 1, n)
        shown.append(metrics.ece(rng.random(n) < confidence, confidence))
        expected.append(metrics.expected_ece_if_calibrated(confidence))
    noise = 4 * np.std(shown) / math.sqrt(len(shown))
    assert np.mean(shown) == pytest.approx(published, abs=0.0005 + noise)  # published to three decimals
    assert np.mean(expected) == pytest.approx(published, abs=0.0006)
    assert np.mean(expected) == pytest.approx(np.mean(shown), abs=noise)


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.2])
def test_the_debiased_error_is_unbiased_where_the_plain_one_is_not(gap: float) -> None:
    rng = np.random.default_rng(3)
    n, debiased, plug_in = 200, [], []
    for _ in range(1500):
        confidence = rng.uniform(0.3, 1, n)
        score = (rng.random(n) < confidence - gap).astype(float)
        signed = float(rmsce_debiased_of(plain(score, confidence), 15)[0])
        debiased.append(math.copysign(signed**2, signed))
        bins = metrics.reliability_bins(score, confidence)
        plug_in.append(np.nansum(bins.counts * (bins.mean_score - bins.mean_confidence) ** 2) / n)
    standard_error = np.std(debiased) / math.sqrt(len(debiased))
    assert np.mean(debiased) == pytest.approx(gap**2, abs=4 * standard_error)
    assert np.mean(plug_in) > gap**2 + 10 * standard_error


def test_no_samples_and_no_confidences_are_not_available() -> None:
    for metric in (
        metrics.ece,
        metrics.ece_equal_mass,
        metrics.rmsce_debiased,
        metrics.signed_miscalibration,
        metrics.brier,
        metrics.nll,
    ):
        assert math.isnan(metric([], []))
        assert math.isnan(metric([1.0, 0.0], [math.nan, math.nan]))
        assert math.isnan(metric([1.0, 0.0], [0.5, 0.5], weights=[0, 0]))
    assert math.isnan(metrics.expected_ece_if_calibrated([]))
    assert metrics.reliability_bins([], []).counts.sum() == 0


@pytest.mark.parametrize(
    ("score", "confidence", "message"),
    [
        ([1.2], [0.5], r"score must be in \[0, 1\].*got 1.2 at position 0"),
        ([math.nan], [0.5], "score must be in"),
        ([1.0], [1.5], r"confidence must be in \[0, 1\] or NaN, got 1.5"),
        ([1.0], [-0.1], "confidence must be in"),
        ([1.0], [math.inf], "confidence must be in"),
        ([1.0, 0.0], [0.5], r"one entry per score \(2\), got 1"),
        ([[1.0]], [0.5], "score must be one-dimensional"),
        (["yes"], [0.5], "score must be an array of numbers"),
    ],
)
def test_bad_arrays_are_refused_with_the_place(score: list[object], confidence: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.ece(score, confidence)


@pytest.mark.parametrize("bins", [0, -1, 2.5])
def test_bad_bins_are_refused(bins: object) -> None:
    with pytest.raises(ValueError, match="bins must be a whole number of at least 1"):
        metrics.ece([1.0], [0.5], bins=bins)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, math.nan]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must"):
        metrics.ece([1.0, 0.0], [0.5, 0.5], weights=weights)
