"""Joint replicates of several conditions against a loop, and the figures made of them against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitquake import metrics
from bitquake.metrics import METRICS, OrderedSamples, Replicates, Run, Samples

Array = NDArray[Any]
KEYS = ("accuracy", "aurc", "coverage_at_risk_20", "phi_1")
CHOSEN = [METRICS[key] for key in KEYS]


def run(samples: Samples, threshold: Samples | None = None) -> Run:
    return Run(OrderedSamples(*samples), None if threshold is None else OrderedSamples(*threshold))


def part(samples: Samples, keep: Array) -> Samples:
    return Samples(*(np.asarray(column)[keep] for column in samples))


def worse(rng: np.random.Generator, samples: Samples, share: float) -> Samples:
    """The same questions, where `share` of the answers become wrong."""
    lost = rng.random(np.size(samples.score)) < share
    return samples._replace(score=np.where(lost, 0.0, samples.score))


def test_one_draw_of_the_union_serves_every_condition(
    clustered: Callable[..., Samples], drawn_by_hand: Callable[..., Array], repeated: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(0)
    everything, fit, other_fit = clustered(rng, 30), clustered(rng, 20, prefix="f"), clustered(rng, 12, prefix="g")
    image = np.array([int(i.removeprefix("image-")) for i in everything.cluster])
    clean, noisy = part(everything, image < 20), part(everything, image >= 8)
    conditions = [[run(clean, fit), run(worse(rng, clean, 0.2), fit)], [run(noisy, other_fit)], [run(everything)]]
    found = metrics.replicate_jointly(conditions, CHOSEN, replicates=50, seed=3)
    names, fits = np.unique(everything.cluster), np.unique(np.concatenate([fit.cluster, other_fit.cluster]))
    draws, fit_draws = drawn_by_hand(30, 50, 3, 0), drawn_by_hand(32, 50, 3, 1)

    def counts_of(samples: Samples, union: Array, drawn: Array) -> Array:
        return drawn[np.searchsorted(union, np.unique(samples.cluster))]

    for samples, threshold, got, which in (
        (clean, fit, found[0], 0),
        (noisy, other_fit, found[1], 0),
        (everything, None, found[2], 0),
    ):
        for r in range(50):
            answers = repeated(samples, counts_of(samples, names, draws[r]))
            expected = [
                float(np.mean(answers[0])),
                metrics.aurc(*answers),
                metrics.coverage_at_risk(*answers, 0.2).coverage,
                math.nan,
            ]
            if threshold is not None:
                at = metrics.phi_threshold(*repeated(threshold, counts_of(threshold, fits, fit_draws[r])), 1)
                expected[3] = metrics.effective_reliability(*answers, 1, at)
            assert got.draws[which, :, r] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        alone = metrics.evaluate(*samples, threshold=threshold, metrics=KEYS, replicates=1, seed=0)
        assert got.values[which] == pytest.approx([alone[key].value for key in KEYS], nan_ok=True)


def test_with_the_same_images_everywhere_it_is_one_condition(clustered: Callable[..., Samples]) -> None:
    rng = np.random.default_rng(1)
    samples, fit = clustered(rng, 60), clustered(rng, 50, prefix="f")
    runs = [run(samples, fit), run(worse(rng, samples, 0.1), fit), run(worse(rng, samples, 0.3), fit)]
    chosen = list(METRICS.values())
    together = metrics.replicate(runs, chosen, replicates=40, seed=2)
    apart = metrics.replicate_jointly([[r] for r in runs], chosen, replicates=40, seed=2)
    assert np.array_equal(together.values, np.concatenate([a.values for a in apart]), equal_nan=True)
    assert np.array_equal(together.draws, np.concatenate([a.draws for a in apart]), equal_nan=True)
    assert metrics.replicate_jointly([], chosen, replicates=4, seed=0) == []
    assert metrics.replicate_jointly([[]], chosen, replicates=4, seed=0)[0].draws.shape == (0, len(chosen), 4)


def test_a_condition_of_one_image_or_none_has_values_only(clustered: Callable[..., Samples]) -> None:
    samples = clustered(np.random.default_rng(2), 20)
    single = part(samples, samples.cluster == "image-0")
    empty = part(samples, samples.cluster == "nothing")
    found = metrics.replicate_jointly([[run(samples)], [run(single)], [run(empty)]], CHOSEN[:1], replicates=10, seed=0)
    assert not np.isnan(found[0].draws).any()
    assert np.isnan(found[1].draws).all() and found[1].values[0, 0] == pytest.approx(np.mean(single.score))
    assert np.isnan(found[2].draws).all() and np.isnan(found[2].values).all()
    cost = metrics.difference_in_differences(
        *(Replicates(np.repeat(f.values, 2, 0), np.repeat(f.draws, 2, 0)) for f in found[:2]), CHOSEN[:1], candidate=1
    )["accuracy"]
    assert cost.value == 0 and not cost.available and cost.verdict() == "unavailable"
    assert "undefined in 100%" in cost.note


def test_difference_in_differences_by_its_formula(
    clustered: Callable[..., Samples], drawn_by_hand: Callable[..., Array]
) -> None:
    rng = np.random.default_rng(3)
    everything = clustered(rng, 50)
    image = np.array([int(i.removeprefix("image-")) for i in everything.cluster])
    kept = image >= 15
    clean = [everything, worse(rng, everything, 0.1)]
    noisy = [part(worse(rng, s, 0.2), kept) for s in clean]
    found = metrics.replicate_jointly(
        [[run(s) for s in clean], [run(s) for s in noisy]], CHOSEN[:1], replicates=300, seed=1
    )
    cost = metrics.difference_in_differences(*found, CHOSEN[:1], candidate=1)["accuracy"]
    first, second, third, fourth = (np.mean(s.score) for s in (*noisy, *clean))
    assert cost.value == pytest.approx((second - first) - (fourth - third))
    codes = np.unique(everything.cluster, return_inverse=True)[1]
    by_loop = []
    for counts in drawn_by_hand(50, 300, 1, 0):
        w = counts[codes]
        means = [np.average(s.score, weights=w[kept]) for s in noisy] + [np.average(s.score, weights=w) for s in clean]
        by_loop.append((means[1] - means[0]) - (means[3] - means[2]))
    assert (cost.lo, cost.hi) == pytest.approx(tuple(np.quantile(by_loop, [0.025, 0.975])))
    assert cost.draws == pytest.approx(by_loop)
    back = metrics.difference_in_differences(*found, CHOSEN[:1], candidate=0, baseline=1)["accuracy"]
    assert (back.value, back.lo, back.hi) == pytest.approx((-cost.value, -cost.hi, -cost.lo))


def test_equal_runs_differ_by_exactly_nothing_and_a_real_cost_shows(clustered: Callable[..., Samples]) -> None:
    rng = np.random.default_rng(4)
    clean, noisy = clustered(rng, 400), clustered(rng, 300, prefix="shifted", harm=0.2)
    still = metrics.replicate_jointly([[run(clean)] * 2, [run(noisy)] * 2], CHOSEN[:3], replicates=100, seed=0)
    for cost in metrics.difference_in_differences(*still, CHOSEN[:3], candidate=1).values():
        assert (cost.value, cost.lo, cost.hi, cost.verdict()) == (0, 0, 0, "tied")
    hurt = metrics.replicate_jointly(
        [[run(clean)] * 2, [run(noisy), run(worse(rng, noisy, 0.15))]], CHOSEN[:3], replicates=200, seed=0
    )
    costs = metrics.difference_in_differences(*hurt, CHOSEN[:3], candidate=1)
    assert costs["accuracy"].verdict() == "lower"
    assert costs["aurc"].verdict() == "higher"
    mean = metrics.mean_figure([costs["accuracy"], costs["aurc"]])
    assert mean.value == pytest.approx((costs["accuracy"].value + costs["aurc"].value) / 2)
    draws = (costs["accuracy"].draws + costs["aurc"].draws) / 2
    assert (mean.lo, mean.hi) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    with pytest.raises(ValueError, match="at least one figure"):
        metrics.mean_figure([])


def test_what_noise_and_quantization_take_by_hand() -> None:
    """Accuracies of full precision and INT4: clean 0.8 and 0.75, severities 1 and 2: 0.7, 0.5 and 0.6, 0.45."""

    def told(*values: float) -> Replicates:
        column = np.array(values)[:, None]
        return Replicates(column, np.repeat(column[:, :, None], 20, axis=2) + np.linspace(-0.01, 0.01, 20))

    clean, severities = told(0.8, 0.75), [told(0.7, 0.6), told(0.5, 0.45)]
    relative = [metrics.relative_robustness(clean, severities, run=r) for r in (0, 1)]
    assert relative[0].value == pytest.approx((0.7 / 0.8 + 0.5 / 0.8) / 2)
    assert relative[1].value == pytest.approx((0.6 / 0.75 + 0.45 / 0.75) / 2)
    own, theirs = (metrics.quantization_error(severities, run=r) for r in (1, 0))
    assert own.value == pytest.approx((0.4 + 0.55) / (0.3 + 0.5))
    assert own.verdict(1.0) == "higher"
    assert theirs[:3] == (1, 1, 1) and theirs.verdict(1.0) == "tied"
    assert (theirs.draws == 1).all()
    errors = np.array([(0.95 - 2 * d) / (0.8 - 2 * d) for d in np.linspace(-0.01, 0.01, 20)])
    assert own.draws == pytest.approx(errors)
    assert (own.lo, own.hi) == pytest.approx(tuple(np.quantile(errors, [0.025, 0.975])))
    mean = metrics.mean_figure([own, theirs])
    assert mean.value == pytest.approx((own.value + 1) / 2)
    assert mean.draws == pytest.approx((own.draws + 1) / 2)


def test_ratios_that_do_not_exist_say_why() -> None:
    def flat(*values: float) -> Replicates:
        column = np.array(values)[:, None]
        return Replicates(column, np.repeat(column[:, :, None], 5, axis=2))

    never_right = metrics.relative_robustness(flat(0.0), [flat(0.0)], run=0)
    assert math.isnan(never_right.value) and never_right.note == "the clean accuracy is 0"
    never_wrong = metrics.quantization_error([flat(1.0, 0.9)], run=1)
    assert math.isnan(never_wrong.value) and never_wrong.note == "full precision makes no error"
    assert (
        metrics.mean_figure([never_wrong, metrics.quantization_error([flat(0.9, 0.9)], run=1)]).note == never_wrong.note
    )
    missing = metrics.quantization_error([flat(math.nan, math.nan)], run=1)
    assert math.isnan(missing.value) and not missing.available and missing.note
    for call in (
        lambda: metrics.relative_robustness(flat(0.5), [], run=0),
        lambda: metrics.quantization_error([], run=0),
    ):
        with pytest.raises(ValueError, match="at least one condition"):
            call()


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([[run(Samples([1.0], None, ["a"]))], [run(Samples([1.0], None, [1]))]], "numbers in all conditions or texts"),
        ([[run(Samples([1.0], None, ["a"]))]], "at least 1, got 0"),
    ],
)
def test_bad_calls_are_refused(conditions: list[list[Run]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.replicate_jointly(conditions, CHOSEN[:1], replicates=5 if "texts" in message else 0, seed=0)
    with pytest.raises(ValueError, match="level must be"):
        metrics.figure(0.5, np.zeros(3), level=95)
