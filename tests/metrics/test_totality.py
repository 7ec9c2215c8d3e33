"""Every public function of the room on samples that have nothing to measure: a value, NaN or a note, never an error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bitquake import metrics
from bitquake.metrics import METRICS, OrderedSamples, Run, Samples

N = 8
FLAT, SPREAD, GONE = np.full(N, 0.7), np.linspace(0, 1, N), np.full(N, math.nan)
MIXED = np.tile([1.0, 0.0], N // 2)
CASES = {
    "no samples": Samples([], [], []),
    "one sample": Samples([1.0], [0.4], ["i0"]),
    "one image": Samples(MIXED, SPREAD, ["i0"] * N),
    "constant confidence": Samples(MIXED, FLAT, [f"i{k}" for k in range(N)]),
    "confidence 0": Samples(MIXED, np.zeros(N), [f"i{k}" for k in range(N)]),
    "confidence 1": Samples(MIXED, np.ones(N), [f"i{k}" for k in range(N)]),
    "all right": Samples(np.ones(N), SPREAD, [f"i{k}" for k in range(N)]),
    "all wrong": Samples(np.zeros(N), SPREAD, [f"i{k}" for k in range(N)]),
    "all right and constant": Samples(np.ones(N), FLAT, [f"i{k}" for k in range(N)]),
    "ties": Samples(MIXED, np.repeat([0.2, 0.8], N // 2), [f"i{k // 2}" for k in range(N)]),
    "no confidence": Samples(MIXED, None, [f"i{k}" for k in range(N)]),
    "missing confidences": Samples(MIXED, GONE, [f"i{k}" for k in range(N)]),
    "some missing": Samples(MIXED, np.where(np.arange(N) < 3, math.nan, SPREAD), [f"i{k}" for k in range(N)]),
    "no images": Samples(MIXED, SPREAD),
}
SETTINGS = {"replicates": 12, "seed": 0}
FITTING = Samples([1.0, 0.0, 1.0, 1.0], [0.9, 0.3, 0.7, 0.6], ["f0", "f1", "f2", "f3"])


def run(samples: Samples) -> Run:
    return Run(OrderedSamples(*samples), None)


def jointly(samples: Samples) -> object:
    chosen = [METRICS[key] for key in ("accuracy", "aurc", "ece_15")]
    clean, noisy = metrics.replicate_jointly([[run(samples)] * 2] * 2, chosen, **SETTINGS)
    costs = metrics.difference_in_differences(clean, noisy, chosen, candidate=1)
    return [
        *costs.values(),
        metrics.mean_figure(list(costs.values())),
        metrics.relative_robustness(clean, [noisy], run=1),
        metrics.quantization_error([noisy], run=1),
    ]


def plain(name: str) -> Callable[[Samples], object]:
    return lambda samples: getattr(metrics, name)(*samples[:2])


PLAIN = ["ece", "ece_equal_mass", "rmsce_debiased", "signed_miscalibration", "brier", "nll"]
PLAIN += ["auroc", "aurc", "excess_aurc"]
CALLS: dict[str, Callable[[Samples], object]] = {
    "evaluate": lambda s: metrics.evaluate(*s, **SETTINGS),
    "evaluate with threshold": lambda s: metrics.evaluate(*s, threshold=FITTING, **SETTINGS),
    "threshold of": lambda s: metrics.evaluate(*FITTING, threshold=s, **SETTINGS),
    "bootstrap": lambda s: metrics.bootstrap(["aurc"], *s, **SETTINGS),
    "compare": lambda s: metrics.compare(s, s, **SETTINGS),
    "paired_difference": lambda s: metrics.paired_difference("brier", s, s, **SETTINGS),
    "jointly": jointly,
    "flips": lambda s: metrics.flips(s, s, **SETTINGS),
    "flips_by_confidence": lambda s: metrics.flips_by_confidence(s, s, 3, **SETTINGS),
    "fit_temperature": lambda s: metrics.fit_temperature(*s[:2]),
    "fit_platt": lambda s: metrics.fit_platt(*s[:2]),
    "transfer to": lambda s: metrics.transfer(FITTING, s, 0.1, **SETTINGS),
    "transfer from": lambda s: metrics.transfer(s, FITTING, 0.1, **SETTINGS),
    "mixture of": lambda s: metrics.mixture_curve(s, FITTING, [0.0, 0.4, 1.0], **SETTINGS),
    "mixture with": lambda s: metrics.mixture_curve(FITTING, s, [0.0, 0.4, 1.0], **SETTINGS),
    "mixture from": lambda s: metrics.mixture_curve(FITTING, FITTING, [0.4], fit=s, **SETTINGS),
    "box_calibration": lambda s: metrics.box_calibration(*s, **SETTINGS),
    "reliability_bins": lambda s: metrics.reliability_bins(*s[:2]),
    "risk_coverage_curve": lambda s: metrics.risk_coverage_curve(*s[:2]),
    "expected_ece_if_calibrated": lambda s: metrics.expected_ece_if_calibrated(s[1] if s[1] is not None else []),
    "aurc_oracle": lambda s: metrics.aurc_oracle(s[0]),
    "accuracy": lambda s: metrics.accuracy(s[0]),
    "operating_point": lambda s: metrics.operating_point(*s[:2], 0.5),
    "coverage_at_risk": lambda s: metrics.coverage_at_risk(*s[:2], 0.1),
    "phi": lambda s: (
        metrics.effective_reliability(*s[:2], 1, metrics.phi_threshold(*s[:2], 1))
        if not math.isnan(metrics.phi_threshold(*s[:2], 1))
        else math.nan
    ),
    **{name: plain(name) for name in PLAIN},
}


def numbers(found: Any) -> list[float]:
    """All numbers of a nested result, and a check that what is not available says so."""
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    if hasattr(found, "available") and not found.available:
        assert found.note, found
    if isinstance(found, list | tuple):
        return [n for value in found for n in numbers(value)]
    if isinstance(found, np.ndarray):
        return found.astype(float).reshape(-1).tolist()
    return [float(found)] if isinstance(found, int | float) else []


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_to_measure_is_an_answer(call: Callable[[Samples], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by zero in NumPy is a warning
        for name, samples in CASES.items():
            for value in numbers(call(samples)):
                assert math.isnan(value) or abs(value) <= 100 or value == math.inf, name


def test_every_function_of_the_room_is_asked() -> None:
    """A function that takes samples and is not in the list above would not be known to be total."""
    without_samples = {
        *("mcnemar", "benjamini_hochberg", "cluster_draws", "interval", "figure", "ranking_caution"),
        *("minimum_detectable_difference", "minimum_detectable_accuracy_change", "samples_needed"),
        # asked together: "jointly", "transfer", "phi"
        *("replicate", "replicate_jointly", "mean_figure", "difference_in_differences", "relative_robustness"),
        *("quantization_error", "fit_thresholds", "apply_thresholds", "transfer", "mixture_curve"),
        *("phi_threshold", "effective_reliability"),
        # of grids of runs
        *("grid", "decompose", "variance_shares", "type_two", "leave_one_level", "without_lowest", "complete_part"),
        *("forest_importance", "sensitivity", "agreement", "consensus", "pareto_front", "cheapest"),
    }
    public = {name for name in metrics.__all__ if callable(getattr(metrics, name)) and name[0].islower()}
    assert public - without_samples == {name for name in CALLS if " " not in name} - {"jointly", "phi"}
