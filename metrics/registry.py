"""The metrics by name, so that tasks, reports and the leaderboard mean the same thing by a key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from . import calibration, selective
from .samples import FloatArray, Resampled, guarded

Unit = Literal["percent", "fraction", "nats"]

# Tolerated risks and costs of a wrong answer that are reported (papers: arXiv 2204.13631).
RISKS = (0.005, 0.01, 0.05, 0.10, 0.20)
COSTS = (1, 10, 100)
BINS = 15


@dataclass(frozen=True)
class Metric:
    """One metric under its public key.

    unit: how a reader should see it ("percent": multiply by 100); values are always fractions (NLL: nats).
    higher_is_better: None where neither direction is (signed miscalibration: 0 is best).
    noise_layers: how many times sampling noise has been added to the square of a replicate but not of the truth, see
        `bitquake.metrics.bootstrap` (0: the metric is no error whose square grows with noise).
    bounds: the values it can take; values and intervals are cut to them.
    minimum_n: fewest samples for which runs may be ranked by it (0: no rule).
    """

    key: str
    title: str
    higher_is_better: bool | None
    unit: Unit
    definition: str
    source: str
    bounds: tuple[float, float]
    needs_confidence: bool = True
    noise_layers: int = 0
    minimum_n: int = 0
    core: Callable[[Resampled], FloatArray] | None = None
    cost: float | None = None

    @property
    def needs_threshold_split(self) -> bool:
        return self.cost is not None

    def compute(self, block: Resampled, threshold: Resampled | None = None) -> FloatArray:
        """(r,) values for a block of replicates; `threshold`: as many replicates of the threshold split."""
        if self.cost is not None:
            if threshold is None:
                raise ValueError(f"{self.key} needs the threshold split")
            cost = self.cost
            # The same split serves many tasks, and a draw of its images gives the same thresholds for all of them.
            chosen = threshold.samples.once(
                ("phi threshold", cost, threshold.digest),
                lambda: guarded(lambda b: selective.phi_threshold_of(b, cost), threshold),
            )
            return guarded(lambda b: selective.phi_of(b, cost, chosen), block)
        assert self.core is not None
        return guarded(self.core, block, needs_confidence=self.needs_confidence)


_RELIABLE_VQA = "Whitehead et al. 2022, arXiv 2204.13631"

_ALL = [
    Metric(
        "accuracy",
        "Accuracy",
        True,
        "percent",
        "Mean score over all samples (soft where the benchmark is).",
        "VQA: Antol et al. 2015",
        (0, 1),
        needs_confidence=False,
        core=selective.accuracy_of,
    ),
    Metric(
        "ece_15",
        "ECE (15 bins)",
        False,
        "percent",
        "Sum over 15 equal-width bins (lo, hi] of n_b/N * |mean score - mean confidence|.",
        "Guo et al. 2017, arXiv 1706.04599",
        (0, 1),
        noise_layers=2,
        core=partial(calibration.ece_of, bins=BINS),
    ),
    Metric(
        "ece_mass_15",
        "ECE (15 equal-mass bins)",
        False,
        "percent",
        "As ECE, over 15 bins of equal mass by rank of confidence; equal confidences share a bin.",
        "Nixon et al. 2019, arXiv 1904.01685",
        (0, 1),
        noise_layers=2,
        core=partial(calibration.ece_equal_mass_of, bins=BINS),
    ),
    Metric(
        "rmsce_debiased_15",
        "RMS calibration error, debiased",
        False,
        "percent",
        "Root of the n_b/N-weighted squared gaps of 15 equal-width bins, less their sampling variance (0 if negative).",
        "Kumar et al. 2019, arXiv 1909.10155",
        (0, 1),
        noise_layers=1,
        core=partial(calibration.rmsce_debiased_of, bins=BINS),
    ),
    Metric(
        "signed_miscalibration",
        "Over-confidence",
        None,
        "percent",
        "Mean confidence minus mean score; above 0 is over-confident.",
        "calibration in the large",
        (-1, 1),
        core=calibration.signed_miscalibration_of,
    ),
    Metric(
        "brier",
        "Brier score",
        False,
        "fraction",
        "Mean squared difference of confidence and score.",
        "Brier 1950",
        (0, 1),
        core=calibration.brier_of,
    ),
    Metric(
        "nll",
        "NLL",
        False,
        "nats",
        "Mean cross-entropy of the score under the confidence, which is kept 2^-24 away from 0 and 1.",
        "Guo et al. 2017, arXiv 1706.04599",
        (0, float("inf")),
        core=calibration.nll_of,
    ),
    Metric(
        "auroc",
        "AUROC",
        True,
        "fraction",
        "Probability that a right answer (score >= 0.5) has more confidence than a wrong one; ties count half.",
        "Hanley & McNeil 1982",
        (0, 1),
        core=selective.auroc_of,
    ),
    Metric(
        "aurc",
        "AURC",
        False,
        "percent",
        "Integral of the selective risk over coverage 0 to 1; ties count as answered in random order.",
        "Geifman & El-Yaniv 2018, arXiv 1805.08206",
        (0, 1),
        core=selective.aurc_of,
    ),
    Metric(
        "excess_aurc",
        "Excess AURC",
        False,
        "percent",
        "AURC minus the AURC of ranking the answers by their score.",
        "Geifman & El-Yaniv 2018, arXiv 1805.08206",
        (0, 1),
        core=selective.excess_aurc_of,
    ),
    *(
        Metric(
            f"coverage_at_risk_{risk * 100:g}",
            f"C@{risk * 100:g}%",
            True,
            "percent",
            f"Largest coverage with a mean risk of the answered samples of at most {risk * 100:g} %, ties kept whole.",
            _RELIABLE_VQA,
            (0, 1),
            # About 40 tolerated errors at 40 % coverage; fewer make the figure a small-count statistic.
            minimum_n=round(100 / risk),
            core=partial(selective.coverage_at_risk_of, risk=risk),
        )
        for risk in RISKS
    ),
    *(
        Metric(
            f"phi_{cost}",
            f"Φ{cost}",
            True,
            "percent",
            f"Mean of: the score if answered and above 0, -{cost} if answered with score 0, 0 if abstained; "
            "threshold fitted on the threshold split.",
            _RELIABLE_VQA,
            (-cost, 1),
            cost=cost,
        )
        for cost in COSTS
    ),
]

METRICS: dict[str, Metric] = {metric.key: metric for metric in _ALL}


def lookup(keys: list[str] | tuple[str, ...] | None) -> list[Metric]:
    """The metrics of these keys, in this order (None: all); ValueError that lists the known keys for another."""
    if keys is None:
        return list(METRICS.values())
    unknown = [key for key in keys if key not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {', '.join(map(repr, unknown))}; known: {', '.join(METRICS)}")
    return [METRICS[key] for key in keys]
