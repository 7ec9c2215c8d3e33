"""Intervals against replicates computed one by one, analytic standard errors and simulated coverage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from bitquake import metrics
from bitquake.metrics import METRICS, Samples
from bitquake.metrics.bootstrap import BLOCK, Run, cluster_draws, replicate
from bitquake.metrics.samples import OrderedSamples, Resampled

Array = NDArray[Any]
Answers = tuple[Array, Array]  # score, confidence

CALIBRATION_ERRORS = ("ece_15", "ece_mass_15", "rmsce_debiased_15")


def clustered(rng: np.random.Generator, images: int, *, prefix: str = "image", soft: bool = True) -> Samples:
    """Answers to 1-5 questions per image whose difficulty the questions share; tied and missing confidences."""
    sizes = rng.integers(1, 6, images)
    cluster = np.repeat([f"{prefix}-{i}" for i in range(images)], sizes)
    skill = np.repeat(rng.beta(4, 1, images), sizes)
    confidence = np.round(np.clip(skill + rng.normal(0, 0.1, cluster.size), 0, 1), 2)
    score = (rng.random(cluster.size) < skill).astype(float)
    if soft:
        score *= rng.choice([0.3, 0.6, 0.9, 1.0], cluster.size, p=[0.1, 0.1, 0.1, 0.7])
    confidence[rng.random(cluster.size) < 0.03] = math.nan
    order = rng.permutation(cluster.size)
    return Samples(score[order], confidence[order], cluster[order])


Draw = Callable[[int, int, int, int], Array]
Make = Callable[..., Samples]


def test_draws_are_multinomial_and_do_not_depend_on_the_block(drawn_by_hand: Draw) -> None:
    whole = np.concatenate(list(cluster_draws(7, 5, 100, seed=3, stream=1)))
    parts = np.concatenate(list(cluster_draws(7, 5, 2, seed=3, stream=1)))
    assert (whole == parts).all()
    assert (whole == drawn_by_hand(7, 5, 3, 1)).all()
    many = np.concatenate(list(cluster_draws(20, 20_000, 1000, seed=0, stream=0)))
    assert (many.sum(axis=1) == 20).all()
    # Multinomial(20, 1/20): variance 0.95, covariance -0.05
    covariance = np.cov(many.T)
    assert np.diag(covariance) == pytest.approx(0.95, abs=0.06)
    assert covariance[~np.eye(20, dtype=bool)] == pytest.approx(-0.05, abs=0.05)
    assert many.mean(axis=0) == pytest.approx(1, abs=0.04)


def test_replicates_are_those_of_repeated_samples(clustered: Make, drawn_by_hand: Draw) -> None:
    """Each replicate's samples are written out and given to the plain functions: the slow, obvious way."""
    rng = np.random.default_rng(0)
    samples, fitting = clustered(rng, 30), clustered(rng, 25, prefix="threshold")
    keys = [key for key in METRICS if key not in CALIBRATION_ERRORS]
    run = Run(OrderedSamples(*samples), OrderedSamples(*fitting))
    _, draws = replicate([run], [METRICS[key] for key in keys], replicates=40, seed=5)

    def repeated(data: Samples, counts: Array) -> Answers:
        times = counts[np.unique(data.cluster, return_inverse=True)[1]]
        return np.repeat(data.score, times), np.repeat(data.confidence, times)

    plain = {
        "accuracy": lambda a, c: a.mean(),
        "signed_miscalibration": metrics.signed_miscalibration,
        "brier": metrics.brier,
        "nll": metrics.nll,
        "auroc": lambda a, c: roc_auc_score(a >= 0.5, np.nan_to_num(c, nan=-1)),
        "aurc": metrics.aurc,
        "excess_aurc": metrics.excess_aurc,
        **{
            f"coverage_at_risk_{p}": lambda a, c, p=p: metrics.coverage_at_risk(a, c, p / 100).coverage
            for p in (0.5, 1, 5, 10, 20)
        },
    }
    tests, thresholds = drawn_by_hand(30, 40, 5, 0), drawn_by_hand(25, 40, 5, 1)
    for r in range(40):
        drawn, fit = repeated(samples, tests[r]), repeated(fitting, thresholds[r])
        for k, key in enumerate(keys):
            if key.startswith("phi"):
                cost = int(key.removeprefix("phi_"))
                expected = metrics.effective_reliability(*drawn, cost, metrics.phi_threshold(*fit, cost))
            else:
                expected = plain[key](*drawn)
            assert draws[0, k, r] == pytest.approx(expected, abs=1e-9), key


def test_intervals_of_calibration_errors_have_the_resampling_noise_taken_off(
    clustered: Make, drawn_by_hand: Draw
) -> None:
    rng = np.random.default_rng(1)
    samples = clustered(rng, 40)
    draws = drawn_by_hand(40, 60, 9, 0)
    codes = np.unique(samples.cluster, return_inverse=True)[1]
    for key, function, layers in (("ece_15", metrics.ece, 2), ("ece_mass_15", metrics.ece_equal_mass, 2)):
        value = function(samples.score, samples.confidence)
        raw = np.array(
            [function(np.repeat(samples.score, w[codes]), np.repeat(samples.confidence, w[codes])) for w in draws]
        )
        square = raw**2 - layers * ((raw**2).mean() - value**2)
        corrected = np.sign(square) * np.sqrt(np.abs(square))
        lo, hi = np.quantile(corrected, [0.025, 0.975])
        got = metrics.evaluate(*samples, metrics=[key], replicates=60, seed=9)[key]
        assert got.value == pytest.approx(value)
        assert (got.lo, got.hi) == pytest.approx((np.clip(min(lo, value), 0, 1), max(hi, value)))


def test_values_are_those_of_the_plain_functions(clustered: Make) -> None:
    samples = clustered(np.random.default_rng(2), 200)
    fitting = clustered(np.random.default_rng(3), 150, prefix="threshold")
    result = metrics.evaluate(*samples, threshold=fitting, replicates=50, seed=0)
    assert list(result) == list(METRICS)
    a, c = samples.score, samples.confidence
    expected = {
        "accuracy": a.mean(),
        "ece_15": metrics.ece(a, c),
        "ece_mass_15": metrics.ece_equal_mass(a, c),
        "rmsce_debiased_15": metrics.rmsce_debiased(a, c),
        "brier": metrics.brier(a, c),
        "auroc": metrics.auroc(a, c),
        "coverage_at_risk_5": metrics.coverage_at_risk(a, c, 0.05).coverage,
        "phi_10": metrics.effective_reliability(a, c, 10, metrics.phi_threshold(*fitting[:2], 10)),
    }
    for key, value in expected.items():
        assert result[key].value == pytest.approx(value, abs=1e-12), key
    for estimate in result.values():
        assert estimate.lo <= estimate.value <= estimate.hi
        assert (estimate.n, estimate.n_clusters) == (a.size, 200)
        assert estimate.n_missing_confidence == np.isnan(c).sum() > 0


def test_the_interval_of_a_mean_is_that_of_its_clustered_standard_error() -> None:
    rng = np.random.default_rng(4)
    images, size = 400, 6
    level = np.repeat(rng.beta(1, 1, images), size)
    score = (rng.random(images * size) < level).astype(float)
    cluster = np.repeat(np.arange(images), size)
    means = score.reshape(images, size).mean(axis=1)
    clustered_error = means.std(ddof=0) / math.sqrt(images)
    independent_error = score.std() / math.sqrt(score.size)
    got = metrics.evaluate(score, None, cluster, metrics=["accuracy"], replicates=8000, seed=1)["accuracy"]
    assert (got.hi - got.lo) / 2 == pytest.approx(1.96 * clustered_error, rel=0.05)
    assert clustered_error > 1.4 * independent_error  # else the clusters would not matter here
    alone = metrics.evaluate(score, None, None, metrics=["accuracy"], replicates=8000, seed=1)["accuracy"]
    assert (alone.hi - alone.lo) / 2 == pytest.approx(1.96 * independent_error, rel=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    runs, held = 300, {"accuracy": 0, "brier": 0, "auroc": 0}
    truth_rng = np.random.default_rng(6)
    confidence = truth_rng.beta(4, 1, 1_000_000)
    score = (truth_rng.random(confidence.size) < confidence).astype(float)
    truth = {"accuracy": 0.8, "brier": metrics.brier(score, confidence), "auroc": metrics.auroc(score, confidence)}
    for k in range(runs):
        confidence = rng.beta(4, 1, 300)
        score = (rng.random(300) < confidence).astype(float)
        result = metrics.evaluate(score, confidence, metrics=list(held), replicates=400, seed=k)
        for key, estimate in result.items():
            held[key] += estimate.lo <= truth[key] <= estimate.hi
    for key, count in held.items():
        assert 0.90 <= count / runs <= 0.985, key  # 95 % +- 4 standard errors, less the percentile method's own 1 %


@pytest.mark.parametrize(("error", "least"), [(0.0, 0.93), (0.03, 0.93), (0.1, 0.85)])
def test_intervals_of_calibration_errors_hold_the_truth(error: float, least: float) -> None:
    """`least` is four standard errors under the lowest coverage measured in 1,000 runs (0.976, 0.986, 0.924)."""
    rng = np.random.default_rng(7)
    runs, held, raw = 200, dict.fromkeys(CALIBRATION_ERRORS, 0), 0
    for k in range(runs):
        confidence = rng.beta(4, 1, 500)
        score = (rng.random(500) < np.clip(confidence - error, 0, 1)).astype(float)
        result = metrics.evaluate(score, confidence, metrics=CALIBRATION_ERRORS, replicates=200, seed=k)
        for key, estimate in result.items():
            held[key] += estimate.lo <= error <= estimate.hi
        block = Resampled(OrderedSamples(score, confidence), drawn_many(rng, 500, 200))
        raw += np.quantile(METRICS["ece_15"].compute(block), 0.025) <= error
    for key, count in held.items():
        assert count / runs >= least, key
    if error < 0.1:
        assert raw / runs < 0.2  # what the raw percentiles would have held: why the correction exists


def drawn_many(rng: np.random.Generator, clusters: int, replicates: int) -> Array:
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), replicates).astype(float)


def test_identical_runs_are_tied_with_a_difference_of_exactly_zero(clustered: Make) -> None:
    samples = clustered(np.random.default_rng(8), 120)
    fitting = clustered(np.random.default_rng(9), 100, prefix="threshold")
    result = metrics.compare(
        samples, samples, candidate_threshold=fitting, baseline_threshold=fitting, replicates=200, seed=2
    )
    assert list(result) == list(METRICS)
    for key, difference in result.items():
        assert (difference.delta, difference.lo, difference.hi) == (0, 0, 0), key
        assert difference.verdict == "tied"
        assert difference.candidate == difference.baseline


def noisy_pair(clustered: Make, rng: np.random.Generator, images: int, harm: float) -> tuple[Samples, Samples]:
    """A baseline, and a candidate that changes a few of its answers; `harm` of the right ones become wrong."""
    baseline = clustered(rng, images, soft=False)
    flipped = (rng.random(baseline.score.size) < harm) & (baseline.score == 1)
    return baseline._replace(score=np.where(flipped, 0.0, baseline.score)), baseline


def test_a_paired_difference_sees_what_two_intervals_cannot(clustered: Make) -> None:
    candidate, baseline = noisy_pair(clustered, np.random.default_rng(10), 500, 0.02)
    first = metrics.evaluate(*candidate, metrics=["accuracy"], replicates=1000, seed=0)["accuracy"]
    second = metrics.evaluate(*baseline, metrics=["accuracy"], replicates=1000, seed=0)["accuracy"]
    assert first.hi > second.lo  # apart, the two runs cannot be told apart
    difference = metrics.paired_difference("accuracy", candidate, baseline, replicates=1000, seed=0)
    assert difference.verdict == "lower"
    assert difference.delta == pytest.approx(candidate.score.mean() - baseline.score.mean())
    assert (difference.candidate, difference.baseline) == (first.value, second.value)
    back = metrics.paired_difference("accuracy", baseline, candidate, replicates=1000, seed=0)
    assert (back.verdict, back.delta, back.lo) == ("higher", -difference.delta, pytest.approx(-difference.hi))
    # analytic: mean of per-sample differences, clustered by image
    change = candidate.score - baseline.score
    codes = np.unique(baseline.cluster, return_inverse=True)[1]
    residual = np.bincount(codes, change - change.mean())
    error = math.sqrt((residual**2).sum()) / change.size
    assert (difference.hi - difference.lo) / 2 == pytest.approx(1.96 * error, rel=0.12)


def test_runs_that_differ_by_luck_only_are_mostly_tied() -> None:
    rng = np.random.default_rng(11)
    keys = ["accuracy", "ece_15", "rmsce_debiased_15", "aurc", "coverage_at_risk_10"]
    apart = dict.fromkeys(keys, 0)
    for k in range(100):
        confidence = rng.beta(4, 1, 400)
        first, second = ((rng.random(400) < confidence).astype(float) for _ in range(2))
        result = metrics.compare(
            Samples(first, confidence), Samples(second, confidence), metrics=keys, replicates=200, seed=k
        )
        for key, difference in result.items():
            apart[key] += difference.verdict != "tied"
    assert max(apart.values()) <= 13, apart  # 5 of 100 expected; 13 has a chance of 1 in 1,000


def test_phi_includes_the_luck_of_the_threshold(clustered: Make, drawn_by_hand: Draw) -> None:
    rng = np.random.default_rng(12)
    samples = clustered(rng, 400)
    few = clustered(rng, 20, prefix="threshold")
    with_luck = metrics.evaluate(*samples, threshold=few, metrics=["phi_10"], replicates=500, seed=0)["phi_10"]
    threshold = metrics.phi_threshold(few.score, few.confidence, 10)
    weights = drawn_by_hand(400, 500, 0, 0)[:, np.unique(samples.cluster, return_inverse=True)[1]]
    fixed = [
        metrics.effective_reliability(samples.score, samples.confidence, 10, threshold, weights=w) for w in weights
    ]
    assert with_luck.hi - with_luck.lo > 1.2 * np.subtract(*np.quantile(fixed, [0.975, 0.025]))


def test_the_order_of_the_samples_changes_nothing_and_the_seed_does(clustered: Make) -> None:
    samples = clustered(np.random.default_rng(13), 60)
    order = np.random.default_rng(14).permutation(samples.score.size)
    shuffled = Samples(*(column[order] for column in samples))
    keys = [key for key, metric in METRICS.items() if not metric.needs_threshold_split]
    first = metrics.evaluate(*samples, metrics=keys, replicates=100, seed=0)
    again = metrics.evaluate(*shuffled, metrics=keys, replicates=100, seed=0)
    other = metrics.evaluate(*samples, metrics=keys, replicates=100, seed=1)
    for key in keys:
        assert again[key][:3] == pytest.approx(first[key][:3], abs=1e-9), key
        assert other[key].value == first[key].value
    assert other["accuracy"] != first["accuracy"]
    assert metrics.evaluate(*samples, metrics=keys, replicates=100, seed=0) == first


def test_more_samples_than_a_block_holds() -> None:
    n = BLOCK + 5
    score = np.tile([1.0, 0.0], n)[:n]
    got = metrics.evaluate(score, None, np.arange(n) // 2, metrics=["accuracy"], replicates=3, seed=0)["accuracy"]
    assert got.value == pytest.approx(0.5, abs=1e-4)
    assert got.n_clusters == n // 2 + 1


def test_whatever_is_undefined_says_why() -> None:
    no_samples = metrics.evaluate([], [], [], replicates=5, seed=0)
    assert all(math.isnan(e.value) and e.note == "no samples" and not e.available for e in no_samples.values())
    assert no_samples["accuracy"].n == 0

    plain_text = metrics.evaluate([1.0, 0.0, 0.6], None, ["a", "b", "c"], replicates=50, seed=0)
    assert plain_text["accuracy"].available
    assert plain_text["accuracy"].n_missing_confidence == 3
    without = [e.note for key, e in plain_text.items() if key != "accuracy"]
    assert without == ["no sample has a confidence"] * (len(METRICS) - 1)

    one_image = metrics.evaluate([1.0, 0.0], [0.9, 0.5], ["a", "a"], replicates=5, seed=0)
    assert one_image["accuracy"].value == 0.5
    assert one_image["accuracy"].note == "no interval from fewer than two images"
    assert one_image["phi_1"].note == "no threshold split"

    silent = Samples([1.0], None, ["z"])
    unfit = metrics.evaluate([1.0, 0.0], [0.9, 0.5], ["a", "b"], threshold=silent, replicates=5, seed=0)
    assert unfit["phi_1"].note == "no sample of the threshold split has a confidence"

    # Two of five draws in e hold no wrong answer: AUROC has a value, but no interval.
    rare = metrics.evaluate(np.r_[0.0, np.ones(49)], np.linspace(0, 1, 50), metrics=["auroc"], replicates=500, seed=0)
    assert rare["auroc"].value == 1
    assert "undefined in 3" in rare["auroc"].note
    assert math.isnan(rare["auroc"].lo)
    assert not rare["auroc"].available

    everything_right = metrics.evaluate(np.ones(9), np.full(9, 0.5), replicates=20, seed=0)
    assert math.isnan(everything_right["auroc"].value)
    assert everything_right["auroc"].note == "undefined on these samples"
    assert everything_right["coverage_at_risk_1"][:3] == (1, 1, 1)
    assert everything_right["aurc"][:3] == (0, 0, 0)


def test_a_difference_without_confidence_on_one_side_is_unavailable() -> None:
    result = metrics.compare(
        Samples([1.0, 0.0, 1.0], None, [1, 2, 3]),
        Samples([1.0, 1.0, 1.0], [0.9, 0.8, 0.7], [1, 2, 3]),
        replicates=50,
        seed=0,
    )
    assert result["accuracy"].n_missing_confidence == (3, 0)
    assert result["accuracy"].delta == pytest.approx(-1 / 3)
    assert (result["ece_15"].verdict, result["ece_15"].note) == ("unavailable", "no sample has a confidence")
    assert result["phi_1"].verdict == "unavailable"


PAIR = Samples([1.0, 0.0], [0.5, 0.5], ["a", "b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.compare(PAIR, PAIR._replace(cluster=["b", "a"]), seed=0), "cluster ids differ"),
        (lambda: metrics.compare(PAIR, Samples([1.0], [0.5], ["a"]), seed=0), "got 2 and 1 samples"),
        (lambda: metrics.compare(PAIR, PAIR._replace(cluster=None), seed=0), "both carry cluster ids"),
        (
            lambda: metrics.compare(
                PAIR,
                PAIR,
                candidate_threshold=Samples([1.0], [0.5], ["c"]),
                baseline_threshold=Samples([1.0], [0.5], ["d"]),
                seed=0,
            ),
            "threshold splits of a pair",
        ),
        (lambda: metrics.evaluate(*PAIR, threshold=Samples([1.0], [0.5], ["b"]), seed=0), "shares 1 images.*'b'"),
        (lambda: metrics.evaluate(*PAIR, threshold=Samples([2.0], [0.5], ["c"]), seed=0), "threshold split: score"),
        (lambda: metrics.evaluate([1.0], [0.5], ["a", "b"], seed=0), "one id per score"),
        (lambda: metrics.evaluate([1.0, 0.0], None, ["a", None], seed=0), "cluster id is missing at position 1"),
        (lambda: metrics.evaluate([1.0, 0.0], None, [1.0, math.nan], seed=0), "cluster id is missing at position 1"),
        (lambda: metrics.evaluate(*PAIR, metrics=["acuracy"], seed=0), "unknown metric 'acuracy'; known: accuracy"),
        (lambda: metrics.evaluate(*PAIR, replicates=0, seed=0), "replicates must be at least 1"),
        (lambda: metrics.evaluate(*PAIR, level=95, seed=0), "level must be between 0 and 1"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
