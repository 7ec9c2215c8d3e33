"""Calibration, selective prediction and paired statistics: pure functions on arrays.

`METRICS` names every metric; `evaluate` gives all of them for one run with intervals, `compare` the differences of two
runs on the same samples. The plain functions (`ece`, `aurc`, ...) give one number each. Needs numpy and scipy only.
"""

from .bootstrap import (
    Difference,
    Estimate,
    Replicates,
    Run,
    bootstrap,
    cluster_draws,
    compare,
    evaluate,
    interval,
    paired_difference,
    replicate,
    replicate_jointly,
)
from .boxes import BoxCalibration, box_calibration
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
from .flips import FlipLevel, Flips, benjamini_hochberg, flips, flips_by_confidence, mcnemar
from .mixtures import MIXTURE_METRICS, SHARES, Mixture, mixture_curve
from .power import minimum_detectable_accuracy_change, minimum_detectable_difference, samples_needed
from .ranking import ranking_caution
from .recalibration import Platt, Temperature, fit_platt, fit_temperature
from .registry import METRICS, Metric
from .robustness import (
    Figure,
    difference_in_differences,
    figure,
    mean_figure,
    quantization_error,
    relative_robustness,
)
from .samples import OrderedSamples, Samples
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
from .transfer import Thresholds, Transfer, apply_thresholds, fit_thresholds, transfer

__all__ = [
    "METRICS",
    "MIXTURE_METRICS",
    "SHARES",
    "BoxCalibration",
    "Difference",
    "Estimate",
    "Figure",
    "FlipLevel",
    "Flips",
    "Metric",
    "Mixture",
    "OperatingPoint",
    "OrderedSamples",
    "Platt",
    "ReliabilityBins",
    "Replicates",
    "RiskCoverageCurve",
    "Run",
    "Samples",
    "Temperature",
    "Thresholds",
    "Transfer",
    "accuracy",
    "apply_thresholds",
    "aurc",
    "aurc_oracle",
    "auroc",
    "benjamini_hochberg",
    "bootstrap",
    "box_calibration",
    "brier",
    "cluster_draws",
    "compare",
    "coverage_at_risk",
    "difference_in_differences",
    "ece",
    "ece_equal_mass",
    "effective_reliability",
    "evaluate",
    "excess_aurc",
    "expected_ece_if_calibrated",
    "figure",
    "fit_platt",
    "fit_temperature",
    "fit_thresholds",
    "flips",
    "flips_by_confidence",
    "interval",
    "mcnemar",
    "mean_figure",
    "minimum_detectable_accuracy_change",
    "minimum_detectable_difference",
    "mixture_curve",
    "nll",
    "operating_point",
    "paired_difference",
    "phi_threshold",
    "quantization_error",
    "ranking_caution",
    "relative_robustness",
    "reliability_bins",
    "replicate",
    "replicate_jointly",
    "risk_coverage_curve",
    "rmsce_debiased",
    "samples_needed",
    "signed_miscalibration",
    "transfer",
]
