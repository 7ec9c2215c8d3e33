"""Fitting a Selector: against logistic regression, a Bayes rule that is known, and its own promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bitquake.metrics import aurc, ece
from bitquake.model_wrappers.selector.features import Features
from bitquake.model_wrappers.selector.model import (
    Selector,
    SelectorCard,
    SelectorError,
    TrainedOn,
    logit,
    network_inputs,
    sigmoid,
)
from bitquake.model_wrappers.selector.training import (
    MIN_SAMPLES,
    Fitted,
    Options,
    TrainingRun,
    fit_members,
    image_place,
)

D = 6
SMALL = Options(folds=3, epochs=8, hidden=16)
QUICK: dict[str, Any] = {"batch": 32, "learning_rate": 5e-3}
"""So that few samples are enough."""


def make_run(n: int, *, seed: int, informative: bool = True, first_image: int = 0) -> TrainingRun:
    """Two questions on a picture; P(right) is a logistic function of the joint probability and, where ``informative``,
    of the direction of the first state."""
    rng = np.random.default_rng(seed)
    states = [rng.normal(size=(n, D)).astype(np.float32) for _ in range(3)]
    joint = rng.uniform(0.2, 0.99, size=n)
    direction = states[2][:, 0] - states[2][:, 1] if informative else np.zeros(n)
    right = rng.uniform(size=n) < sigmoid(0.5 * logit(joint) + 2.0 * direction)
    features = Features(*states, np.ones(n, dtype=np.bool_))
    images = [f"world:{first_image + i // 2}" for i in range(n)]
    return TrainingRun(features, joint, np.log(joint) / 2, right.astype(np.float64), images)


def as_selector(fitted: Fitted, width: int = D, name: str = "selector") -> Selector:
    card = SelectorCard(
        name=name, subject="tiny", hidden_size=width, joint="joint", datasets_hash="", image_ids_hash="",
        projection=None if fitted.projection is None else fitted.projection.shape[1],
        trained_on=[TrainedOn(quant="none", model_hash="m", weights_hash="w", tasks=["t_dev"], n=1)],
        validation=fitted.validation, options={}, bitquake="0",
    )  # fmt: skip
    return Selector(card, fitted.members, fitted.projection, frozenset())


def predict(selector: Selector, run: TrainingRun) -> np.ndarray:
    return selector.predict(run.features, run.joint, run.mean_log_prob)


@pytest.fixture(scope="module")
def informative() -> tuple[TrainingRun, Fitted]:
    run = make_run(3000, seed=1)
    return run, fit_members([run], Options(folds=3, epochs=12, hidden=32, **QUICK))


def test_it_ranks_as_logistic_regression_does_where_that_is_the_truth(informative: tuple[TrainingRun, Fitted]) -> None:
    """The answers are drawn from a logistic model, so that scikit-learn's regression is as good as any."""
    run, fitted = informative
    test = make_run(6000, seed=2, first_image=100_000)
    oracle = LogisticRegression(C=100.0, max_iter=1000)
    oracle.fit(network_inputs(run.features, run.joint, run.mean_log_prob, None), run.target)
    theirs = oracle.predict_proba(network_inputs(test.features, test.joint, test.mean_log_prob, None))[:, 1]
    ours = predict(as_selector(fitted), test)
    assert aurc(test.target, ours) == pytest.approx(aurc(test.target, theirs), abs=0.01)
    assert aurc(test.target, ours) < aurc(test.target, test.joint) - 0.05
    assert ece(test.target, ours, bins=15) < 0.04
    assert np.corrcoef(logit(ours), logit(theirs))[0, 1] > 0.95


def test_validation_is_out_of_fold_and_its_interval_holds_its_difference(
    informative: tuple[TrainingRun, Fitted],
) -> None:
    run, fitted = informative
    told = fitted.validation
    fold = np.array([int(image_place(image, 0) * 3) for image in run.image])
    inputs = network_inputs(run.features, run.joint, run.mean_log_prob, None).astype(np.float64)
    held_out = np.zeros(len(fold))
    for k, member in enumerate(fitted.members):
        held_out[fold == k] = sigmoid(member.logits(inputs, logit(run.joint)))[fold == k]
    assert told.aurc == pytest.approx(aurc(run.target, held_out), abs=1e-9)
    assert told.aurc_maxprob == pytest.approx(aurc(run.target, run.joint), abs=1e-9)
    assert (told.n, told.n_images) == (3000, 1500)
    assert told.aurc_difference is not None
    delta, lo, hi = told.aurc_difference
    assert delta == pytest.approx(told.aurc - told.aurc_maxprob, abs=1e-12)
    assert lo < delta < hi < 0


def test_no_picture_is_on_both_sides() -> None:
    run = make_run(400, seed=3)
    places = {image: image_place(image, 7) for image in run.image}
    again = make_run(400, seed=4)
    assert {image: image_place(image, 7) for image in again.image} == places
    assert min(places.values()) >= 0.0 and max(places.values()) < 1.0
    share = np.mean([place < 0.2 for place in places.values()])
    assert share == pytest.approx(0.2, abs=0.1)


def test_a_chosen_member_is_no_worse_than_maxprob_on_its_part_even_where_the_states_say_nothing() -> None:
    run = make_run(600, seed=5, informative=False)
    fitted = fit_members([run], SMALL)
    fold = np.array([int(image_place(image, 0) * SMALL.folds) for image in run.image])
    inputs = network_inputs(run.features, run.joint, run.mean_log_prob, None).astype(np.float64)
    for k, member in enumerate(fitted.members):
        mine = fold == k
        ours = sigmoid(member.logits(inputs[mine], logit(run.joint[mine])))
        assert aurc(run.target[mine], ours) <= aurc(run.target[mine], run.joint[mine])


def test_with_constant_states_it_is_a_function_of_the_joint_probability() -> None:
    run = make_run(800, seed=6, informative=False)
    same = Features(*(np.ones_like(states) for states in run.features[:3]), run.features.has_image)
    run = run._replace(features=same)
    selector = as_selector(fit_members([run], SMALL))
    grid = np.linspace(0.2, 0.99, 50)
    told = selector.predict(same.rows(slice(0, 50)), grid, np.log(grid) / 2)
    assert (np.diff(told) > 0).all(), "more probable answers are right more often, and nothing else is known"


def test_equal_seed_gives_equal_bits_another_seed_others_and_the_callers_generator_is_left_alone() -> None:
    run = make_run(300, seed=7)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (predict(as_selector(fit_members([run], SMALL)), run) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, second)
    other = predict(as_selector(fit_members([run], Options(folds=3, epochs=8, hidden=16, seed=1))), run)
    assert np.abs(other - first).max() > 1e-3


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_only_is_defined(value: float) -> None:
    run = make_run(200, seed=8)
    fitted = fit_members([run._replace(target=np.full(200, value))], SMALL)
    told = predict(as_selector(fitted), run)
    assert ((told >= 0) & (told <= 1)).all()
    assert fitted.validation.aurc == pytest.approx(1 - value)
    assert fitted.epochs == (0, 0, 0), "no epoch can be better than MaxProb: it stays"


def test_soft_targets_are_met_on_average() -> None:
    """Binary cross-entropy on a soft target is least at that target."""
    run = make_run(900, seed=9, informative=False)
    soft = run._replace(target=np.full(900, 0.3), joint=np.full(900, 0.9), mean_log_prob=np.full(900, -0.05))
    varied = soft._replace(target=np.where(soft.features.first[:, 0] > soft.features.first[:, 1], 0.45, 0.15))
    told = predict(as_selector(fit_members([varied], Options(folds=2, epochs=15, hidden=16, **QUICK))), varied)
    assert told.mean() == pytest.approx(0.3, abs=0.06)


def test_limit_takes_whole_pictures_evenly_from_the_runs() -> None:
    runs = [make_run(400, seed=10), make_run(600, seed=11)]
    fitted = fit_members(runs, Options(folds=3, epochs=1, hidden=8, limit=240))
    assert [len(index) for index in fitted.used] == [120, 120]
    for run, index in zip(runs, fitted.used, strict=True):
        taken = [run.image[i] for i in index]
        assert all(taken.count(image) == 2 for image in taken)
    images = [{run.image[i] for i in index} for run, index in zip(runs, fitted.used, strict=True)]
    shared = {image for image in images[0] if int(image.split(":")[1]) < 200}
    assert len(images[0] & images[1]) > len(shared) / 3, "runs are cut alike, so that they keep pictures in common"
    assert fitted.validation.n == 240


def test_a_mixture_is_judged_run_by_run() -> None:
    runs = [make_run(600, seed=12), make_run(600, seed=13, informative=False)]
    told = fit_members(runs, SMALL).validation
    each = [aurc(run.target, run.joint) for run in runs]
    assert told.aurc_maxprob == pytest.approx(np.mean(each), abs=1e-12)


def test_projection_keeps_what_is_told_and_is_part_of_the_result() -> None:
    run = make_run(2000, seed=14)
    fitted = fit_members([run], Options(folds=2, epochs=12, hidden=16, projection=12, **QUICK))
    assert fitted.projection is not None and fitted.projection.shape == (3 * D, 12)
    normal = np.random.default_rng(0).normal(size=(4000, 3 * D)) @ fitted.projection
    assert normal.std() == pytest.approx(1.0, abs=0.25)
    assert fitted.validation.aurc < fitted.validation.aurc_maxprob - 0.02


def test_too_little_is_refused_by_name() -> None:
    run = make_run(MIN_SAMPLES - 2, seed=15)
    with pytest.raises(SelectorError, match=r"98 answered samples on 49 pictures are too few"):
        fit_members([run], SMALL)
    many = make_run(400, seed=16)
    with pytest.raises(SelectorError, match="400 answered samples on 1 pictures"):
        fit_members([many._replace(image=["world:0"] * 400)], SMALL)
    wide = many._replace(features=Features(*(np.ones((400, D + 1), np.float32),) * 3, many.features.has_image))
    with pytest.raises(SelectorError, match=r"different widths \(\[6, 7\]\)"):
        fit_members([many, wide], SMALL)


@pytest.mark.parametrize(
    ("name", "value"), [("folds", 1), ("epochs", 0), ("limit", 5), ("projection", 0), ("seed", -1)]
)
def test_options_that_mean_nothing_are_refused(name: str, value: int) -> None:
    with pytest.raises(SelectorError, match=f"--{name}"):
        Options(**{name: value})
