"""Mixtures against copies of samples merged by hand, large random mixtures and a literal loop over replicates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitquake import metrics
from bitquake.metrics import Samples

Array = NDArray[Any]
KEYS = ["accuracy", "ece_15", "ece_mass_15", "brier", "nll", "auroc", "aurc", "excess_aurc", "coverage_at_risk_20"]


def plain(score: Array, confidence: Array) -> dict[str, float]:
    return {
        "accuracy": float(np.mean(score)),
        "ece_15": metrics.ece(score, confidence),
        "ece_mass_15": metrics.ece_equal_mass(score, confidence),
        "brier": metrics.brier(score, confidence),
        "nll": metrics.nll(score, confidence),
        "auroc": metrics.auroc(score, confidence),
        "aurc": metrics.aurc(score, confidence),
        "excess_aurc": metrics.excess_aurc(score, confidence),
        "coverage_at_risk_20": metrics.coverage_at_risk(score, confidence, 0.2).coverage,
    }


def drawn(seed: int, n: int, prefix: str, harm: float = 0.0) -> Samples:
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.beta(3, 1, n), 2)
    confidence[rng.random(n) < 0.05] = math.nan
    score = (rng.random(n) < np.nan_to_num(confidence, nan=0.5) - harm) * rng.choice([0.6, 1.0], n)
    return Samples(score, confidence, [f"{prefix}{i}" for i in rng.integers(0, n, n)])


@pytest.mark.parametrize(
    ("share", "copies"), [(0.0, (1, 0)), (1.0, (0, 1)), (0.5, (1, 2)), (1 / 3, (1, 1)), (2 / 3, (1, 4)), (0.2, (2, 1))]
)
def test_a_mixture_is_that_of_merged_copies(share: float, copies: tuple[int, int]) -> None:
    """40 and 20 samples: share s weighs them (1 - s) / 40 and s / 20, which is a ratio of whole numbers here."""
    near, far, fit = drawn(0, 40, "a"), drawn(1, 20, "b", 0.3), drawn(2, 30, "f")
    score = np.concatenate([np.tile(s.score, k) for s, k in zip((near, far), copies, strict=True)])
    confidence = np.concatenate([np.tile(s.confidence, k) for s, k in zip((near, far), copies, strict=True)])
    (found,) = metrics.mixture_curve(near, far, [share], KEYS, fit=fit, risks=[0.2, 0.4], replicates=2, seed=0)
    assert found.ood_share == share
    for key, expected in plain(score, confidence).items():
        assert found.metrics[key].value == pytest.approx(expected, abs=1e-9), key
    for risk in (0.2, 0.4):
        threshold = metrics.coverage_at_risk(fit.score, fit.confidence, risk).threshold
        point = metrics.operating_point(score, confidence, threshold)
        assert found.metrics[f"transfer_coverage_{100 * risk:g}"].value == pytest.approx(point.coverage)
        assert found.metrics[f"transfer_risk_{100 * risk:g}"].value == pytest.approx(point.risk)


def test_a_mixture_is_what_large_random_mixtures_tend_to() -> None:
    near, far, share = drawn(3, 200, "a"), drawn(4, 100, "b", 0.3), 0.3
    (found,) = metrics.mixture_curve(near, far, [share], KEYS, replicates=2, seed=0)
    rng = np.random.default_rng(5)
    n = 100_000
    shifted = rng.random(n) < share
    at = np.where(shifted, 200 + rng.integers(0, 100, n), rng.integers(0, 200, n))
    score, confidence = (np.concatenate([np.asarray(near[k]), np.asarray(far[k])])[at] for k in (0, 1))
    # C@20% steps from one tie to the next, so its neighbours count as well.
    around = [metrics.coverage_at_risk(score, confidence, r).coverage for r in (0.195, 0.205)]
    expected = plain(score, confidence)
    for key in KEYS[:-1]:
        assert found.metrics[key].value == pytest.approx(expected[key], abs=0.008), key
    assert around[0] - 0.005 <= found.metrics["coverage_at_risk_20"].value <= around[1] + 0.005


def test_intervals_redraw_the_images_of_each_source(
    clustered: Callable[..., Samples], drawn_by_hand: Callable[..., Array], repeated: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(6)
    near, far = clustered(rng, 25, prefix="a"), clustered(rng, 20, prefix="b", harm=0.2)
    fit, share, replicates = clustered(rng, 30, prefix="f"), 0.4, 80
    (found,) = metrics.mixture_curve(
        near, far, [share], ["aurc", "coverage_at_risk_20"], fit=fit, risks=[0.2], replicates=replicates, seed=7
    )
    draws = zip(*(drawn_by_hand(n, replicates, 7, stream) for n, stream in ((25, 0), (20, 2), (30, 1))), strict=True)
    values = []
    for near_counts, far_counts, fit_counts in draws:
        parts = [repeated(near, near_counts), repeated(far, far_counts)]
        weights = np.concatenate([np.full(s.size, w / s.size) for (s, _), w in zip(parts, (0.6, 0.4), strict=True)])
        score, confidence = (np.concatenate(column) for column in zip(*parts, strict=True))
        threshold = metrics.coverage_at_risk(*repeated(fit, fit_counts), 0.2).threshold
        values.append(
            [
                metrics.aurc(score, confidence, weights=weights),
                metrics.coverage_at_risk(score, confidence, 0.2, weights=weights).coverage,
                metrics.operating_point(score, confidence, threshold, weights=weights).coverage,
            ]
        )
    for key, column in zip(("aurc", "coverage_at_risk_20", "transfer_coverage_20"), np.array(values).T, strict=True):
        got = found.metrics[key]
        lo, hi = np.quantile(column, [0.025, 0.975])
        assert (got.lo, got.hi) == pytest.approx((min(lo, got.value), max(hi, got.value))), key


def test_the_ends_of_the_curve_are_the_two_tasks() -> None:
    near, far, fit = drawn(8, 120, "a"), drawn(9, 80, "b", 0.2), drawn(10, 150, "f")
    curve = metrics.mixture_curve(near, far, fit=fit, risks=[0.3], replicates=200, seed=1)
    assert [point.ood_share for point in curve] == list(metrics.SHARES)
    first = metrics.evaluate(*near, metrics=metrics.MIXTURE_METRICS, replicates=200, seed=1)
    last = metrics.evaluate(*far, metrics=metrics.MIXTURE_METRICS, replicates=200, seed=1)
    for key in metrics.MIXTURE_METRICS:
        assert curve[0].metrics[key][:3] == pytest.approx(first[key][:3], abs=1e-9), key
        assert curve[0].metrics[key][3:] == first[key][3:]
        assert curve[-1].metrics[key].value == pytest.approx(last[key].value, abs=1e-9)
    taken = metrics.transfer(fit, near, 0.3, replicates=200, seed=1)
    at_first = curve[0].metrics
    assert at_first["transfer_risk_30"][:3] == pytest.approx((taken.risk_taken, taken.risk_lo, taken.risk_hi))
    assert at_first["transfer_coverage_30"][:3] == pytest.approx((taken.coverage, taken.coverage_lo, taken.coverage_hi))
    accuracy = [point.metrics["accuracy"].value for point in curve]
    expected = [(1 - s) * first["accuracy"].value + s * last["accuracy"].value for s in metrics.SHARES]
    assert accuracy == pytest.approx(expected)
    sizes = [(p.metrics["accuracy"].n, p.metrics["accuracy"].n_clusters) for p in curve]
    clusters = [len(set(s.cluster)) for s in (near, far)]
    assert sizes == [(120, clusters[0]), *[(200, sum(clusters))] * 7, (80, clusters[1])]


def test_thresholds_may_be_fitted_before() -> None:
    near, far, fit = drawn(11, 60, "a"), drawn(12, 50, "b"), drawn(13, 70, "f")
    settings = {"replicates": 30, "seed": 2}
    fitted = metrics.fit_thresholds(fit, (0.1, 0.3), **settings)
    before = metrics.mixture_curve(near, far, [0.5], fit=fitted, **settings)
    assert repr(before) == repr(metrics.mixture_curve(near, far, [0.5], fit=fit, risks=(0.1, 0.3), **settings))


TIED = st.integers(0, 4).map(lambda k: k / 4)
ROWS = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.one_of(TIED, st.just(math.nan))), max_size=10)


@given(ROWS, ROWS, st.sampled_from([0.0, 0.3, 1.0]))
def test_a_mixture_is_total(near_rows: Any, far_rows: Any, share: float) -> None:
    near, far = (
        Samples([a for a, _ in rows], [c for _, c in rows], [f"{name}{i}" for i in range(len(rows))])
        for name, rows in (("a", near_rows), ("b", far_rows))
    )
    fit = Samples([1.0, 1.0, 0.0], [0.75, 0.5, 0.25], ["f0", "f1", "f2"])
    (found,) = metrics.mixture_curve(near, far, [share], fit=fit, risks=[0.1], replicates=5, seed=0)
    counted = ([near_rows] if share < 1 else []) + ([far_rows] if share > 0 else [])
    for key, estimate in found.metrics.items():
        assert math.isnan(estimate.value) or 0 <= estimate.value <= 1, key
        assert math.isnan(estimate.lo) or estimate.lo <= estimate.value <= estimate.hi
        assert estimate.available or estimate.note, key
        if not all(counted):
            assert math.isnan(estimate.value) and estimate.note.startswith("no samples")


def test_what_is_missing_is_said() -> None:
    near, far = drawn(14, 20, "a"), drawn(15, 20, "b")
    quiet = [s._replace(confidence=None) for s in (near, far)]
    (mute,) = metrics.mixture_curve(*quiet, [0.5], replicates=5, seed=0)
    assert mute.metrics["accuracy"].available
    assert mute.metrics["aurc"].note == "no sample has a confidence"
    silent = Samples([1.0, 0.0], None, ["f0", "f1"])
    (unfit,) = metrics.mixture_curve(near, far, [0.5], fit=silent, risks=[0.1], replicates=5, seed=0)
    assert unfit.metrics["transfer_risk_10"].note == "no sample of the threshold split has a confidence"
    assert math.isnan(unfit.metrics["transfer_coverage_10"].value)
    (one,) = metrics.mixture_curve(near, Samples([1.0], [0.5], ["b"]), [0.5], replicates=5, seed=0)
    assert one.metrics["accuracy"].note == "no interval from fewer than two images"


NEAR, FAR = drawn(16, 5, "a"), drawn(17, 5, "b")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mixture_curve(NEAR, FAR, [1.5], seed=0), r"must be in \[0, 1\], got 1.5"),
        (lambda: metrics.mixture_curve(NEAR, FAR, [0.5], ["phi_1"], seed=0), "phi_1 of a mixture is not offered"),
        (lambda: metrics.mixture_curve(NEAR, FAR, [0.5], ["rmsce_debiased_15"], seed=0), "counts whole samples"),
        (lambda: metrics.mixture_curve(NEAR, FAR, [0.5], ["nonsense"], seed=0), "unknown metric 'nonsense'"),
        (lambda: metrics.mixture_curve(NEAR, FAR, [0.5], fit=FAR, seed=0), "shares . images"),
        (lambda: metrics.mixture_curve(NEAR, FAR, [0.5], replicates=0, seed=0), "at least 1, got 0"),
        (
            lambda: metrics.mixture_curve(
                NEAR, FAR, [0.5], fit=metrics.fit_thresholds(drawn(1, 5, "f"), [0.1], replicates=3, seed=0), seed=0
            ),
            "thresholds have 3 replicates, not 2000",
        ),
    ],
)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
