"""Temperature and Platt scaling against SciPy's and scikit-learn's optimisers; boxes against the plain metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from bitquake import metrics
from bitquake.metrics import Platt, Temperature
from bitquake.metrics.recalibration import SCALES, TEMPERATURES

Array = NDArray[Any]


def answers(seed: int, n: int = 500, *, temperature: float = 1.0, offset: float = 0.0) -> tuple[Array, Array]:
    """Soft scores of answers whose right confidence is sigmoid(logit / temperature + offset)."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(3, 1, n)
    score = (rng.random(n) < expit(logit(confidence) / temperature + offset)).astype(float)
    return score * rng.choice([1.0, 0.6], n, p=[0.8, 0.2]), confidence


@pytest.mark.parametrize("seed", range(5))
def test_the_temperature_is_that_of_a_general_optimiser(seed: int) -> None:
    score, confidence = answers(seed, temperature=[0.5, 1, 2, 4, 1.5][seed])

    def loss(inverse: float) -> float:
        return metrics.nll(score, expit(inverse * logit(confidence)))

    expected = minimize_scalar(loss, bounds=(0.01, 20), method="bounded", options={"xatol": 1e-10})
    assert 1 / metrics.fit_temperature(score, confidence).temperature == pytest.approx(expected.x, rel=1e-5)


def test_a_temperature_is_found_again() -> None:
    for truth in (0.5, 1.0, 3.0):
        rng = np.random.default_rng(6)
        confidence = rng.beta(2, 1, 200_000)
        score = (rng.random(confidence.size) < expit(logit(confidence) / truth)).astype(float)
        fitted = metrics.fit_temperature(score, confidence)
        assert fitted.temperature == pytest.approx(truth, rel=0.02)
        mapped = fitted.apply(confidence)
        assert metrics.ece(score, mapped) < 0.01
        assert metrics.fit_temperature(score, mapped).temperature == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_platt_scaling_is_logistic_regression_without_penalty(seed: int) -> None:
    score, confidence = answers(seed, temperature=2, offset=0.5)
    # A soft score is a right answer of that weight and a wrong one of the rest.
    x = np.concatenate([logit(confidence)] * 2)[:, None]
    y = np.repeat([1, 0], score.size)
    model = LogisticRegression(C=1e12, tol=1e-12, max_iter=10_000)
    model.fit(x, y, sample_weight=np.concatenate([score, 1 - score]))
    fitted = metrics.fit_platt(score, confidence)
    assert fitted.scale == pytest.approx(model.coef_[0, 0], abs=1e-4)
    assert fitted.offset == pytest.approx(model.intercept_[0], abs=1e-4)
    expected = model.predict_proba(logit([[0.1], [0.5], [0.9]]))[:, 1]
    assert fitted.apply([0.1, 0.5, 0.9]) == pytest.approx(expected, abs=1e-4)
    # The slope of the loss vanishes: neither the mean nor the logit-weighted mean of score - confidence is left.
    gap = score - fitted.apply(confidence)
    assert gap.mean() == pytest.approx(0, abs=1e-8)
    assert (gap * logit(confidence)).mean() == pytest.approx(0, abs=1e-8)


GRID = st.integers(0, 10).map(lambda k: k / 10)
ROWS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.one_of(GRID, st.just(math.nan)), st.integers(0, 3)),
    min_size=0,
    max_size=25,
)


@given(ROWS)
def test_a_fit_is_total_never_worse_than_no_map_and_takes_weights_for_copies(rows: list[Any]) -> None:
    score, confidence, times = (
        (np.array(column, dtype=float) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
    )
    times = times.astype(int)
    copies = np.repeat(score, times), np.repeat(confidence, times)
    for fit in (metrics.fit_temperature, metrics.fit_platt):
        fitted = fit(score, confidence)
        assert all(math.isfinite(value) for value in fitted)
        mapped = fitted.apply(confidence)
        assert (np.isnan(mapped) == np.isnan(confidence)).all()
        assert ((mapped >= 0) & (mapped <= 1) | np.isnan(mapped)).all()
        if not np.isnan(confidence).all():
            assert metrics.nll(score, mapped) <= metrics.nll(score, confidence) + 1e-6
        weighted = fit(score, confidence, weights=times).apply(confidence)
        assert weighted == pytest.approx(fit(*copies).apply(confidence), abs=1e-6, nan_ok=True)
    if not np.isnan(confidence).all():
        mapped = metrics.fit_temperature(score, confidence).apply(confidence)
        kept = len(set(mapped[~np.isnan(mapped)])) == len(set(confidence[~np.isnan(confidence)]))
        if kept:  # a temperature at its bound may round confidences together
            assert metrics.aurc(score, mapped) == pytest.approx(metrics.aurc(score, confidence), abs=1e-9)


def test_where_the_samples_do_not_decide_nothing_is_changed() -> None:
    assert metrics.fit_temperature([], []) == Temperature(1.0)
    assert metrics.fit_platt([], []) == Platt(1.0, 0.0)
    assert metrics.fit_temperature([1.0, 0.0], [math.nan, math.nan]) == Temperature(1.0)
    assert metrics.fit_temperature([1.0, 1.0, 0.0], [0.5, 0.5, 0.5]).temperature == 1  # 0.5 stays 0.5 at any
    assert metrics.fit_platt([1.0, 0.0], None) == Platt(1.0, 0.0)


def test_one_single_confidence_becomes_the_accuracy() -> None:
    score = np.r_[np.ones(30), np.zeros(10)]
    for confidence in (0.5, 0.9, 0.99):
        fitted = metrics.fit_platt(score, np.full(40, confidence))
        assert fitted.apply([confidence]) == pytest.approx([0.75], abs=1e-6)
    assert metrics.fit_temperature(score, np.full(40, 0.9)).apply([0.9]) == pytest.approx([0.75], abs=1e-6)


def test_fits_stay_within_their_bounds() -> None:
    confidence = np.linspace(0.6, 0.9, 20)
    assert metrics.fit_temperature(np.ones(20), np.full(20, 0.50001)).temperature == TEMPERATURES[0]
    assert metrics.fit_temperature(np.zeros(20), confidence).temperature == TEMPERATURES[1]
    for score in (np.ones(20), np.zeros(20)):
        fitted = metrics.fit_platt(score, confidence)
        assert SCALES[0] <= fitted.scale <= SCALES[1]
        assert fitted.apply(confidence) == pytest.approx(score, abs=1e-5)
    parted = metrics.fit_platt(confidence > 0.749, np.where(confidence > 0.749, 0.7501, 0.75))
    assert parted.scale == SCALES[1]
    assert parted.apply([0.7501]) > 0.5 > parted.apply([0.75])
    # On its bound, the offset is still the best one for this scale.
    gap = (confidence > 0.749) - parted.apply(np.where(confidence > 0.749, 0.7501, 0.75))
    assert gap.mean() == pytest.approx(0, abs=1e-5)
    backwards = metrics.fit_platt([0.0, 0.0, 1.0, 0.0, 1.0, 1.0], [0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    assert backwards.scale < 0


def test_certain_confidences_and_missing_ones() -> None:
    score, confidence = np.array([1.0, 1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0, math.nan])
    fitted = metrics.fit_temperature(score, confidence)
    mapped = fitted.apply(confidence)
    assert fitted.temperature > 5  # a certain wrong answer must be made unsure
    assert math.isnan(mapped[4]) and ((mapped[:4] > 0) & (mapped[:4] < 1)).all()
    with pytest.raises(ValueError, match="confidence must be in"):
        fitted.apply([1.2])
    with pytest.raises(ValueError, match="weights must"):
        metrics.fit_platt([1.0], [0.5], weights=[-1.0])


def test_a_box_is_judged_by_its_hit_and_by_its_overlap() -> None:
    rng = np.random.default_rng(3)
    iou, confidence, image = rng.random(300), rng.random(300), rng.integers(0, 120, 300)
    found = metrics.box_calibration(iou, confidence, image, replicates=50, seed=1)
    for score, estimates in ((iou >= 0.5, found.hit), (iou, found.iou)):
        assert list(estimates) == list(metrics.boxes.BOX_METRICS)
        assert estimates["ece_15"].value == pytest.approx(metrics.ece(score.astype(float), confidence))
        assert estimates["brier"].value == pytest.approx(np.mean((score - confidence) ** 2))
        assert estimates["signed_miscalibration"].value == pytest.approx(confidence.mean() - score.mean())
        assert all(e.lo <= e.value <= e.hi for e in estimates.values())
    # A confidence that is the overlap itself is calibrated as to the overlap, and not as to the hit.
    own = metrics.box_calibration(iou, iou, image, replicates=50, seed=1)
    assert own.iou["ece_15"].value == pytest.approx(0, abs=1e-12)
    assert own.hit["ece_15"].value == pytest.approx(0.25, abs=0.02)
    exact = metrics.box_calibration([0.5, 0.49999], [1.0, 0.0], replicates=2, seed=0)
    assert exact.hit["brier"].value == 0
    strict = metrics.box_calibration([0.5, 0.8], [0.0, 1.0], threshold=0.75, replicates=2, seed=0)
    assert strict.hit["brier"].value == 0


def test_boxes_are_total() -> None:
    empty = metrics.box_calibration([], [], [], replicates=2, seed=0)
    assert all(math.isnan(e.value) and e.note == "no samples" for e in (*empty.hit.values(), *empty.iou.values()))
    silent = metrics.box_calibration([0.4, 0.7], None, replicates=2, seed=0)
    assert silent.hit["ece_15"].note == "no sample has a confidence"


@pytest.mark.parametrize("fit", [metrics.fit_temperature, metrics.fit_platt])
def test_bad_arrays_are_refused(fit: Callable[..., object]) -> None:
    for score, confidence in (([2.0], [0.5]), ([1.0], [1.5]), ([1.0, 0.0], [0.5])):
        with pytest.raises(ValueError, match="must"):
            fit(score, confidence)
