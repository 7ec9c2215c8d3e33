"""Calibration, selective prediction and paired statistics: pure functions on arrays.

`METRICS` names every metric; `evaluate` gives all of them for one run with intervals, `compare` the differences of two
runs on the same samples. The plain functions (`ece`, `aurc`, ...) give one number each. Needs numpy and scipy only.
"""

from .bootstrap import Difference, Estimate, bootstrap, compare, evaluate, paired_difference
from .calibration import (
    ReliabilityBins,
    brier,
    ece,
    ece_equal_mass,
    expected_ece_if_calibrated,
    nll,
    reliability_bins,
    rmsce_debiased,
    signed_miscalibration,
)
from .ranking import ranking_caution
from .registry import METRICS, Metric
from .samples import Samples
from .selective import (
    OperatingPoint,
    RiskCoverageCurve,
    accuracy,
    aurc,
    aurc_oracle,
    auroc,
    coverage_at_risk,
    effective_reliability,
    excess_aurc,
    operating_point,
    phi_threshold,
    risk_coverage_curve,
)

__all__ = [
    "METRICS",
    "Difference",
    "Estimate",
    "Metric",
    "OperatingPoint",
    "ReliabilityBins",
    "RiskCoverageCurve",
    "Samples",
    "accuracy",
    "aurc",
    "aurc_oracle",
    "auroc",
    "bootstrap",
    "brier",
    "compare",
    "coverage_at_risk",
    "ece",
    "ece_equal_mass",
    "effective_reliability",
    "evaluate",
    "excess_aurc",
    "expected_ece_if_calibrated",
    "nll",
    "operating_point",
    "paired_difference",
    "phi_threshold",
    "ranking_caution",
    "reliability_bins",
    "risk_coverage_curve",
    "rmsce_debiased",
    "signed_miscalibration",
]
