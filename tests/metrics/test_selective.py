"""Selective prediction against brute force over every threshold, scikit-learn and examples worked by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from sklearn.metrics import auc, roc_auc_score

from bitquake import metrics

Array = NDArray[Any]
Answers = tuple[Array, Array]  # score, confidence

SCORES = {0.0: Fraction(0), 0.3: Fraction(3, 10), 0.6: Fraction(6, 10), 0.9: Fraction(9, 10), 1.0: Fraction(1)}
SCORE = st.sampled_from(sorted(SCORES))
# Few distinct confidences: most samples are tied.
TIED = st.integers(0, 8).map(lambda k: k / 8)
MAYBE = st.one_of(TIED, TIED, TIED, st.just(math.nan))


def answers(
    confidence: st.SearchStrategy[float] = TIED, min_size: int = 1, max_size: int = 30
) -> st.SearchStrategy[Answers]:
    return st.lists(st.tuples(SCORE, confidence), min_size=min_size, max_size=max_size).map(
        lambda rows: tuple(np.array(column, dtype=float) for column in zip(*rows, strict=True))
    )


def thresholds(confidence: Array) -> list[float]:
    return sorted({c for c in confidence if not math.isnan(c)}, reverse=True)


def coverage_at_risk_by_search(score: Array, confidence: Array, risk: Fraction) -> tuple[Fraction, float]:
    """Largest coverage over all thresholds, in exact arithmetic."""
    best = (Fraction(0), math.inf)
    for threshold in thresholds(confidence):
        risks = [1 - SCORES[a] for a, c in zip(score, confidence, strict=True) if c >= threshold]
        if sum(risks) <= risk * len(risks):
            best = max(best, (Fraction(len(risks), len(score)), -threshold), key=lambda pair: pair[0])
    return best[0], -best[1] if best[0] else math.inf


def coverage_at_risk_as_published(score: Array, confidence: Array, risk: float) -> float:
    """The stepping rule of the papers: largest k with R_k <= R, then back out of a tie."""
    order = sorted(range(len(score)), key=lambda i: -confidence[i])
    risks = [1 - SCORES[score[i]] for i in order]
    running = [sum(risks[: k + 1]) / (k + 1) for k in range(len(order))]
    limit = Fraction(risk).limit_denominator(1000)
    k = max((k for k in range(len(order)) if running[k] <= limit), default=-1)
    while k >= 0 and k + 1 < len(order) and confidence[order[k]] == confidence[order[k + 1]]:
        k -= 1
        while k >= 0 and running[k] > limit:
            k -= 1
    return (k + 1) / len(order)


def phi_by_loop(score: Array, confidence: Array, cost: float, threshold: float) -> Fraction:
    gains = []
    for a, c in zip(score, confidence, strict=True):
        answered = not math.isnan(c) and c >= threshold
        gains.append(0 if not answered else SCORES[a] if a > 0 else -Fraction(cost))
    return sum(gains, Fraction(0)) / len(gains)


def phi_threshold_by_search(score: Array, confidence: Array, cost: float) -> float:
    best, chosen = Fraction(0), math.inf
    for threshold in thresholds(confidence):
        value = phi_by_loop(score, confidence, cost, threshold)
        if value >= best:  # falling thresholds: the last maximum has the most coverage
            best, chosen = value, threshold
    return chosen


def trapezoid_as_published(score: Array, confidence: Array, order: Array | None = None) -> float:
    order = np.argsort(-confidence, kind="stable") if order is None else order
    k = np.arange(1, len(score) + 1)
    running = np.cumsum(1 - score[order]) / k
    return auc(k / len(score), running) if len(score) > 1 else 0.0


@given(answers(MAYBE), st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 1.0]))
def test_coverage_at_risk_is_the_best_threshold(data: Answers, risk: float) -> None:
    score, confidence = data
    point = metrics.coverage_at_risk(score, confidence, risk)
    if np.isnan(confidence).all():
        assert all(math.isnan(x) for x in point)
        return
    coverage, threshold = coverage_at_risk_by_search(score, confidence, Fraction(risk).limit_denominator(1000))
    assert point.coverage == pytest.approx(float(coverage), abs=1e-12)
    assert point.threshold == threshold
    if coverage:
        assert point == pytest.approx(metrics.operating_point(score, confidence, threshold))
        assert point.risk <= risk + 1e-9
    else:
        assert math.isnan(point.risk)


@given(answers(), st.sampled_from([0.01, 0.05, 0.1, 0.2]))
def test_coverage_at_risk_follows_the_published_rule(data: Answers, risk: float) -> None:
    expected = coverage_at_risk_as_published(*data, risk)
    assert metrics.coverage_at_risk(*data, risk).coverage == pytest.approx(expected)


def test_selective_metrics_over_many_tied_samples() -> None:
    """The same cases in every run: whether a slip in a tie rule shows must not hang on the examples drawn."""
    rng = np.random.default_rng(21)
    for _ in range(300):
        n, risk, cost = int(rng.integers(2, 30)), rng.choice([0.05, 0.1, 0.2, 0.4]), int(rng.choice([0, 1, 10]))
        score = rng.choice(sorted(SCORES), n, p=[0.2, 0.05, 0.05, 0.1, 0.6])
        confidence = np.where(rng.random(n) < 0.05, math.nan, rng.integers(0, 9, n) / 8)
        if np.isnan(confidence).all():
            continue
        coverage, threshold = coverage_at_risk_by_search(score, confidence, Fraction(risk).limit_denominator(1000))
        point = metrics.coverage_at_risk(score, confidence, risk)
        assert (point.coverage, point.threshold) == (pytest.approx(float(coverage)), threshold)
        chosen = metrics.phi_threshold(score, confidence, cost)
        assert chosen == phi_threshold_by_search(score, confidence, cost)
        value = metrics.effective_reliability(score, confidence, cost, chosen)
        assert value == pytest.approx(float(phi_by_loop(score, confidence, cost, chosen)), abs=1e-12)
        assert metrics.aurc(score, confidence) == pytest.approx(area_by_quadrature(score, confidence), abs=1e-7)
        right = score >= 0.5
        if 0 < right.sum() < n:
            expected = roc_auc_score(right, np.nan_to_num(confidence, nan=-1.0))
            assert metrics.auroc(score, confidence) == pytest.approx(expected, abs=1e-12)


def test_a_risk_met_exactly_is_met_whatever_the_rounding() -> None:
    # 1 - 0.9 is 0.09999999999999998 or more than 0.1, according to the order of the sum.
    for n in range(1, 200):
        assert metrics.coverage_at_risk(np.full(n, 0.9), np.linspace(0.5, 1, n), 0.1).coverage == 1


def test_a_wrong_most_confident_answer_does_not_end_the_search() -> None:
    """One wrong answer on top of 99 right ones: C@5% is everything (a known library gives NaN here)."""
    score = np.r_[0.0, np.ones(99)]
    assert metrics.coverage_at_risk(score, np.linspace(1, 0.1, 100), 0.05).coverage == 1


def test_coverage_at_risk_worked_by_hand() -> None:
    score = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    confidence = [0.9, 0.8, 0.7, 0.7, 0.5, 0.4]
    # answered 1, 2, 4, 5, 6 (0.7 is tied): risk 0, 0, 1/4, 1/5, 1/3
    assert metrics.coverage_at_risk(score, confidence, 0.2) == pytest.approx((0.5, 5 / 6, 0.2))
    assert metrics.coverage_at_risk(score, confidence, 0.19) == pytest.approx((0.8, 2 / 6, 0.0))
    curve = metrics.risk_coverage_curve(score, confidence)
    assert curve.threshold.tolist() == [0.9, 0.8, 0.7, 0.5, 0.4]
    assert curve.coverage == pytest.approx(np.array([1, 2, 4, 5, 6]) / 6)
    assert curve.risk == pytest.approx([0, 0, 1 / 4, 1 / 5, 1 / 3])


@given(answers(MAYBE), st.sampled_from([0, 1, 10, 100]))
def test_phi_threshold_is_the_best_of_all_and_of_abstaining(data: Answers, cost: int) -> None:
    score, confidence = data
    chosen = metrics.phi_threshold(score, confidence, cost)
    if np.isnan(confidence).all():
        assert math.isnan(chosen)
        return
    assert chosen == phi_threshold_by_search(score, confidence, cost)
    value = metrics.effective_reliability(score, confidence, cost, chosen)
    assert value == pytest.approx(float(phi_by_loop(score, confidence, cost, chosen)), abs=1e-12)
    assert value >= 0


@given(answers(MAYBE), st.sampled_from([1, 10, 100]), st.floats(0, 1))
def test_effective_reliability_at_any_threshold(data: Answers, cost: float, threshold: float) -> None:
    score, confidence = data
    if np.isnan(confidence).all():
        return
    value = metrics.effective_reliability(score, confidence, cost, threshold)
    assert value == pytest.approx(float(phi_by_loop(score, confidence, cost, threshold)), abs=1e-12)
    assert value <= metrics.accuracy(score) + 1e-12
    assert value >= metrics.effective_reliability(score, confidence, cost + 1, threshold) - 1e-12


def test_effective_reliability_worked_by_hand() -> None:
    """Answered right, partly right and wrong, and abstained from right and wrong, out of five."""
    score, confidence = [1.0, 1 / 3, 0.0, 1.0, 0.0], [0.9, 0.8, 0.7, 0.4, 0.3]
    for cost in (1, 10, 100):
        expected = (1 + 1 / 3 - cost + 0 + 0) / 5
        assert metrics.effective_reliability(score, confidence, cost, 0.5) == pytest.approx(expected)
    assert metrics.effective_reliability(score, confidence, 100, math.inf) == 0


def test_phi_threshold_may_abstain_on_everything() -> None:
    # The most confident answer is wrong: answering it costs more than all the rest can earn.
    assert metrics.phi_threshold([0.0, 1.0, 1.0], [0.9, 0.8, 0.7], 100) == math.inf
    # Answering both earns exactly nothing, as abstaining does: the maximum with the most coverage is taken.
    assert metrics.phi_threshold([0.0, 1.0], [0.9, 0.8], 1) == 0.8


def area_by_quadrature(score: Array, confidence: Array) -> float:
    confidence = np.where(np.isnan(confidence), -1.0, confidence)
    levels = sorted(set(confidence), reverse=True)
    t = [0.0, *((confidence >= c).mean() for c in levels)]
    accumulated = [0.0, *((1 - score)[confidence >= c].sum() / len(score) for c in levels)]
    pieces = [quad(lambda x: np.interp(x, t, accumulated) / x, a, b)[0] for a, b in itertools.pairwise(t)]
    return sum(pieces)


@given(answers(MAYBE, max_size=12))
def test_aurc_is_the_integral_of_the_risk(data: Answers) -> None:
    score, confidence = data
    if np.isnan(confidence).all():
        assert math.isnan(metrics.aurc(score, confidence))
    else:
        assert metrics.aurc(score, confidence) == pytest.approx(area_by_quadrature(score, confidence), abs=1e-7)


@given(st.lists(SCORE, min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_aurc_is_within_its_bound_of_the_published_trapezoid(scores: list[float], seed: int) -> None:
    score = np.array(scores)
    confidence = np.random.default_rng(seed).permutation(len(score)) / len(score)
    first_risk = 1 - score[np.argmax(confidence)]
    published = trapezoid_as_published(score, confidence)
    assert abs(metrics.aurc(score, confidence) - published) <= (first_risk + 0.2) / len(score) + 1e-12


@given(answers(max_size=6))
def test_aurc_is_the_published_one_averaged_over_the_orders_of_a_tie(data: Answers) -> None:
    score, confidence = data
    orders = [
        order
        for order in itertools.permutations(range(len(score)))
        if all(confidence[i] >= confidence[j] for i, j in itertools.pairwise(order))
    ]
    mean = np.mean([trapezoid_as_published(score, confidence, np.array(order)) for order in orders])
    assert abs(metrics.aurc(score, confidence) - mean) <= 1.2 / len(score) + 1e-12


def test_aurc_does_not_reward_coarse_confidence() -> None:
    # One sample set apart, the rest tied: a straight line between the two points would halve the area.
    score = np.r_[1.0, np.tile([1.0, 0.0], 500)]
    coarse = np.r_[1.0, np.full(1000, 0.5)]
    assert metrics.aurc(score, coarse) == pytest.approx(0.5, abs=0.01)


@given(answers())
def test_excess_aurc_is_zero_for_an_oracle_only(data: Answers) -> None:
    score, confidence = data
    assert metrics.excess_aurc(score, score) == pytest.approx(0, abs=1e-12)
    assert metrics.aurc(score, score) == pytest.approx(metrics.aurc_oracle(score), abs=1e-12)
    assert metrics.excess_aurc(score, confidence) >= 0
    expected = metrics.aurc(score, confidence) - metrics.aurc_oracle(score)
    assert metrics.excess_aurc(score, confidence) == pytest.approx(expected, abs=1e-12)


@given(answers(), st.lists(st.integers(0, 3), min_size=30, max_size=30))
def test_auroc_agrees_with_scikit_learn(data: Answers, weights: list[int]) -> None:
    score, confidence = data
    weight = np.array(weights[: len(score)], dtype=float)
    right = score >= 0.5
    if not (right.any() and (~right).any()):
        assert math.isnan(metrics.auroc(score, confidence))
        return
    assert metrics.auroc(score, confidence) == pytest.approx(roc_auc_score(right, confidence), abs=1e-12)
    if weight[right].sum() and weight[~right].sum():
        expected = roc_auc_score(right, confidence, sample_weight=weight)
        assert metrics.auroc(score, confidence, weights=weight) == pytest.approx(expected, abs=1e-12)


def ranked(score: Array, confidence: Array) -> list[float]:
    """Everything that depends on the order of the confidences only."""
    return [
        metrics.auroc(score, confidence),
        metrics.aurc(score, confidence),
        metrics.excess_aurc(score, confidence),
        *(metrics.coverage_at_risk(score, confidence, risk).coverage for risk in (0.01, 0.05, 0.1, 0.2)),
    ]


@given(answers(MAYBE), st.randoms(use_true_random=False))
def test_order_duplication_and_monotone_maps_change_nothing(data: Answers, generator: random.Random) -> None:
    score, confidence = data
    expected = ranked(score, confidence)
    order = list(range(len(score)))
    generator.shuffle(order)
    assert ranked(score[order], confidence[order]) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert ranked(np.tile(score, 3), np.tile(confidence, 3)) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert ranked(score, np.sqrt(confidence) / 2) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(answers(MAYBE))
def test_coverage_never_falls_with_the_risk_allowed(data: Answers) -> None:
    coverages = [metrics.coverage_at_risk(*data, risk).coverage for risk in np.linspace(0, 1, 21)]
    if not math.isnan(coverages[0]):
        assert (np.diff(coverages) >= 0).all()
        assert coverages[-1] == pytest.approx(np.mean(~np.isnan(data[1])))


@given(answers(MAYBE), st.lists(st.integers(0, 3), min_size=30, max_size=30))
def test_whole_weights_are_repeated_samples(data: Answers, weights: list[int]) -> None:
    score, confidence = data
    times = np.array(weights[: len(score)])
    repeated = np.repeat(score, times), np.repeat(confidence, times)
    functions = [
        metrics.ece,
        metrics.ece_equal_mass,
        metrics.rmsce_debiased,
        metrics.brier,
        metrics.auroc,
        metrics.aurc,
        metrics.excess_aurc,
        lambda a, c, **kw: metrics.coverage_at_risk(a, c, 0.1, **kw).coverage,
        lambda a, c, **kw: metrics.phi_threshold(a, c, 10, **kw),
        lambda a, c, **kw: metrics.effective_reliability(a, c, 10, 0.5, **kw),
    ]
    for function in functions:
        expected = function(*repeated)
        assert function(score, confidence, weights=times) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    weighted, plain = (
        metrics.risk_coverage_curve(score, confidence, weights=times),
        metrics.risk_coverage_curve(*repeated),
    )
    for ours, theirs in zip(weighted, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_missing_confidence_is_never_answered_and_never_dropped() -> None:
    score, confidence = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.9, 0.8, math.nan, math.nan])
    assert metrics.coverage_at_risk(score, confidence, 0.2).coverage == 0.5
    assert metrics.operating_point(score, confidence, 0.0) == (0.0, 0.5, 0.0)
    assert metrics.effective_reliability(score, confidence, 1, 0.0) == 0.5
    assert metrics.risk_coverage_curve(score, confidence).coverage[-1] == 0.5
    last = np.array([0.9, 0.8, 0.1, 0.1])
    assert metrics.auroc(score, confidence) == metrics.auroc(score, last)
    assert metrics.aurc(score, confidence) == metrics.aurc(score, last)


def test_edges_are_defined() -> None:
    n = 20
    flat, spread = np.full(n, 0.7), np.linspace(0, 1, n)
    for confidence in (flat, spread):
        assert metrics.aurc(np.ones(n), confidence) == 0
        assert metrics.aurc(np.zeros(n), confidence) == pytest.approx(1)
        assert metrics.excess_aurc(np.zeros(n), confidence) == 0
        assert metrics.coverage_at_risk(np.ones(n), confidence, 0.0).coverage == 1
        assert metrics.coverage_at_risk(np.zeros(n), confidence, 0.2) == pytest.approx(
            (math.inf, 0, math.nan), nan_ok=True
        )
        assert metrics.phi_threshold(np.zeros(n), confidence, 1) == math.inf
        assert math.isnan(metrics.auroc(np.ones(n), confidence))
        assert math.isnan(metrics.auroc(np.zeros(n), confidence))
    half = np.tile([1.0, 0.0], n // 2)
    assert metrics.auroc(half, flat) == 0.5
    assert metrics.aurc(half, flat) == 0.5
    assert metrics.coverage_at_risk(half, flat, 0.4).coverage == 0
    assert math.isnan(metrics.accuracy([]))
    assert math.isnan(metrics.aurc([], []))
    assert math.isnan(metrics.aurc_oracle([]))
    assert math.isnan(metrics.phi_threshold([], [], 1))
    assert math.isnan(metrics.effective_reliability([], [], 1, 0.5))
    assert all(math.isnan(x) for x in metrics.coverage_at_risk([], [], 0.1))
    assert metrics.risk_coverage_curve([], []).coverage.size == 0
    assert metrics.risk_coverage_curve([1.0], [math.nan]).coverage.size == 0
    assert math.isnan(metrics.operating_point([], [], 0.5).coverage)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.coverage_at_risk([1.0], [0.5], 5), r"fraction in \[0, 1\], got 5"),
        (lambda: metrics.phi_threshold([1.0], [0.5], -1), "cost must be"),
        (lambda: metrics.effective_reliability([1.0], [0.5], math.inf, 0.5), "cost must be"),
        (lambda: metrics.effective_reliability([1.0], [0.5], 1, math.nan), "threshold must be"),
        (lambda: metrics.operating_point([1.0], [0.5], math.nan), "threshold must be"),
    ],
)
def test_bad_settings_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
