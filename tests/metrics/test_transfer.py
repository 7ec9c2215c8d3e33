"""Transferred thresholds against a literal loop over written-out replicates, and the exact binomial interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from bitquake import metrics
from bitquake.metrics import Samples
from bitquake.metrics.transfer import exact_interval

Array = NDArray[Any]
RISKS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)


def loop(
    fit: Samples, test: Samples, risk: float, fits: Array, tests: Array, repeated: Callable[..., Any]
) -> tuple[list[float], list[float], list[float]]:
    """Threshold, coverage and risk of each replicate, the slow and obvious way."""
    out: tuple[list[float], list[float], list[float]] = ([], [], [])
    for fit_counts, test_counts in zip(fits, tests, strict=True):
        threshold = metrics.coverage_at_risk(*repeated(fit, fit_counts), risk).threshold
        point = metrics.operating_point(*repeated(test, test_counts), threshold)
        for values, value in zip(out, (threshold, point.coverage, point.risk), strict=True):
            values.append(value)
    return out


@pytest.mark.parametrize("soft", [False, True])
def test_each_replicate_refits_the_threshold_and_takes_its_risk(
    soft: bool, clustered: Callable[..., Samples], drawn_by_hand: Callable[..., Array], repeated: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(0)
    fit, test = clustered(rng, 30, prefix="fit", soft=soft), clustered(rng, 40, soft=soft, harm=0.1)
    fits, tests = drawn_by_hand(30, 120, 3, 1), drawn_by_hand(40, 120, 3, 0)
    fitted = metrics.fit_thresholds(fit, RISKS, replicates=120, seed=3)
    undecided = 0
    for k, risk in enumerate(RISKS):
        thresholds, coverages, risks = loop(fit, test, risk, fits, tests, repeated)
        assert fitted.draws[k].tolist() == thresholds
        assert fitted.values[k] == metrics.coverage_at_risk(fit.score, fit.confidence, risk).threshold
        found = metrics.transfer(fit, test, risk, replicates=120, seed=3)
        point = metrics.operating_point(test.score, test.confidence, fitted.values[k])
        assert (found.threshold, found.coverage) == (fitted.values[k], pytest.approx(point.coverage))
        assert found.n == np.size(test.score)
        assert found.n_answered == round(point.coverage * found.n)
        lo, hi = np.quantile(coverages, [0.025, 0.975])
        assert (found.coverage_lo, found.coverage_hi) == pytest.approx(
            (min(lo, point.coverage), max(hi, point.coverage))
        )
        if found.n_answered == 0 or np.isnan(risks).mean() > 0.05:
            undecided += 1
            assert math.isnan(found.risk_lo)
            continue
        assert found.risk_taken == pytest.approx(point.risk)
        lo, hi = np.nanquantile(risks, [0.025, 0.975])
        least, most = exact_interval(point.risk * found.n_answered, found.n_answered, 0.95)
        expected = min(lo, point.risk, least), max(hi, point.risk, most)
        assert (found.risk_lo, found.risk_hi) == pytest.approx(expected)
    assert undecided <= 3


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.8, 0.95]))
def test_the_exact_interval_is_that_of_scipy(errors: int, more: int, level: float) -> None:
    n = errors + more
    expected = binomtest(errors, n).proportion_ci(level, method="exact")
    assert exact_interval(errors, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)
    everything = binomtest(n, n).proportion_ci(level, method="exact")
    assert exact_interval(n, n, level) == pytest.approx((everything.low, everything.high), abs=1e-9)


def test_runs_share_a_draw_and_get_what_they_get_alone(clustered: Callable[..., Samples]) -> None:
    rng = np.random.default_rng(1)
    fit, first = clustered(rng, 80, prefix="fit"), clustered(rng, 90)
    second = Samples(rng.permutation(first.score), rng.random(np.size(first.score)), first.cluster)
    order = rng.permutation(np.size(first.score))
    shuffled = Samples(*(np.asarray(column)[order] for column in second))
    fitted = metrics.fit_thresholds(fit, (0.05, 0.2), replicates=100, seed=0)
    together = metrics.apply_thresholds(fitted, [first, shuffled], seed=0)
    for run, found in zip((first, second), together, strict=True):
        for risk, one in zip((0.05, 0.2), found, strict=True):
            alone = metrics.transfer(fit, run, risk, replicates=100, seed=0)
            assert one[:-2] == pytest.approx(alone[:-2], abs=1e-12, nan_ok=True)
            assert one[-2:] == alone[-2:]
    assert metrics.apply_thresholds(fitted, [], seed=0) == []


def sure(n_right: int, n_wrong: int, confidence: float, prefix: str) -> Samples:
    n = n_right + n_wrong
    return Samples(
        np.r_[np.ones(n_right), np.zeros(n_wrong)], np.full(n, confidence), [f"{prefix}{i}" for i in range(n)]
    )


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        (sure(990, 10, 0.9, "t"), "kept"),
        (sure(700, 300, 0.9, "t"), "broken"),
        (sure(900, 100, 0.9, "t"), "open"),
        (sure(20, 0, 0.9, "t"), "open"),  # no error in 20 answers does not show a risk below 10 %
        (sure(40, 0, 0.9, "t"), "kept"),  # in 40 it does: the exact interval ends at 8.8 %
        (sure(0, 50, 0.9, "t"), "broken"),
        (sure(500, 500, 0.2, "t"), "empty"),
    ],
)
def test_the_verdict_follows_the_whole_interval(test: Samples, verdict: str) -> None:
    fit = Samples([1.0] * 95 + [0.0] * 5 + [0.0] * 50, [0.8] * 100 + [0.3] * 50, [f"f{i}" for i in range(150)])
    found = metrics.transfer(fit, test, 0.1, replicates=400, seed=0)
    assert found.threshold == 0.8
    assert found.verdict == verdict
    if verdict == "kept":
        assert found.risk_hi <= 0.1
    elif verdict == "broken":
        assert found.risk_lo > 0.1
    elif verdict == "open":
        assert found.risk_lo <= 0.1 < found.risk_hi
    else:
        assert (found.n_answered, found.coverage) == (0, 0.0)
        assert math.isnan(found.risk_taken) and math.isnan(found.risk_lo)


def test_everything_is_withheld_where_no_threshold_reaches_the_risk() -> None:
    found = metrics.transfer(sure(0, 30, 0.9, "f"), sure(30, 0, 0.9, "t"), 0.05, replicates=50, seed=0)
    assert found[:3] == pytest.approx((math.inf, 0.0, math.nan), nan_ok=True)
    assert (found.coverage_lo, found.coverage_hi, found.verdict) == (0.0, 0.0, "empty")


def test_the_luck_of_a_small_threshold_split_widens_the_interval(clustered: Callable[..., Samples]) -> None:
    rng = np.random.default_rng(2)
    test = clustered(rng, 600)
    few, many = (
        metrics.transfer(clustered(rng, n, prefix="fit"), test, 0.2, replicates=300, seed=0) for n in (30, 3000)
    )
    assert few.coverage_hi - few.coverage_lo > 2 * (many.coverage_hi - many.coverage_lo)


TIED = st.integers(0, 6).map(lambda k: k / 6)
ROWS = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0]), st.one_of(TIED, st.just(math.nan))), max_size=15)


@given(ROWS, ROWS, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_a_transfer_is_total_and_ignores_monotone_maps(fit_rows: Any, test_rows: Any, risk: float) -> None:
    fit, test = (
        Samples([a for a, _ in rows], [c for _, c in rows], [f"{name}{i}" for i in range(len(rows))])
        for name, rows in (("f", fit_rows), ("t", test_rows))
    )
    found = metrics.transfer(fit, test, risk, replicates=10, seed=0)
    values = [found.coverage, found.risk_taken, found.coverage_lo, found.coverage_hi, found.risk_lo, found.risk_hi]
    assert all(math.isnan(v) or 0 <= v <= 1 for v in values)
    assert found.verdict in ("kept", "broken", "open", "empty")
    if not math.isnan(found.risk_lo):
        assert found.risk_lo <= found.risk_taken <= found.risk_hi
    if math.isnan(found.coverage):
        assert found.note
    squeezed = [s._replace(confidence=[math.sqrt(c) / 2 if c == c else c for c in s.confidence]) for s in (fit, test)]
    mapped = metrics.transfer(*squeezed, risk, replicates=10, seed=0)
    assert mapped[1:9] == pytest.approx(found[1:9], abs=1e-12, nan_ok=True)
    assert mapped[9:] == found[9:]
    # On the samples that it was fitted on, a threshold keeps its promise.
    own = metrics.transfer(
        fit, fit._replace(cluster=[f"x{i}" for i in range(len(fit_rows))]), risk, replicates=2, seed=0
    )
    assert math.isnan(own.risk_taken) or own.risk_taken <= risk + 1e-9


def test_what_is_missing_is_said() -> None:
    fit, test = sure(20, 1, 0.9, "f"), sure(20, 1, 0.9, "t")
    for one, other, verdict, note in (
        (fit, Samples([], [], []), "empty", "no samples"),
        (fit, test._replace(confidence=None), "empty", "no sample has a confidence"),
        (fit._replace(confidence=None), test, "open", "no sample of the threshold split has a confidence"),
        (Samples([], [], []), test, "open", "no sample of the threshold split has a confidence"),
    ):
        found = metrics.transfer(one, other, 0.1, replicates=5, seed=0)
        assert (found.verdict, found.note, found.n_answered) == (verdict, note, 0)
        assert math.isnan(found.coverage) and math.isnan(found.risk_taken)
    lonely = metrics.transfer(fit._replace(cluster=["f"] * 21), test, 0.1, replicates=5, seed=0)
    assert lonely.coverage == 1 and math.isnan(lonely.coverage_lo) and lonely.verdict == "open"
    assert "undefined in 100%" in lonely.note
    one_image = metrics.transfer(fit, test._replace(cluster=["t"] * 21), 0.1, replicates=5, seed=0)
    assert one_image.note == "no interval from fewer than two images"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.transfer(sure(2, 0, 0.9, "x"), sure(1, 0, 0.9, "x"), 0.1, seed=0), "shares 1 images.*'x0'"),
        (lambda: metrics.transfer(sure(2, 0, 0.9, "x"), sure(1, 0, 0.9, "y"), 10, seed=0), r"fraction in \[0, 1\]"),
        (lambda: metrics.fit_thresholds(sure(2, 0, 0.9, "x"), [0.1], replicates=0, seed=0), "at least 1, got 0"),
        (
            lambda: metrics.apply_thresholds(
                metrics.fit_thresholds(sure(2, 0, 0.9, "x"), [0.1], replicates=2, seed=0),
                [sure(2, 0, 0.9, "y"), sure(2, 0, 0.9, "z")],
                seed=0,
            ),
            "about the same images",
        ),
        (
            lambda: metrics.transfer(sure(2, 0, 0.9, "x"), sure(1, 0, 0.9, "y"), 0.1, seed=0, level=95),
            "level must be",
        ),
    ],
)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
