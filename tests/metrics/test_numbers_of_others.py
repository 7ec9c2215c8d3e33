"""The same 300 answers given to other implementations, once; their numbers stand here with their versions.

netcal 1.4.0, torchmetrics 1.9.0, and the procedures of the reliable VQA evaluation script (at d9586afe of
facebookresearch/reliable_vqa). Each is compared where its definition is ours: distinct confidences, none on the edge of
a bin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitquake import metrics

Array = NDArray[Any]
INDEX = np.arange(300)
CONFIDENCE = (37 * INDEX % 307 + 0.5) / 307
RIGHT = ((53 * INDEX % 211) / 211 < 1.02 - (1 - CONFIDENCE) ** 2).astype(float)
SOFT = RIGHT * np.where(INDEX % 7 == 3, 0.6, 1.0)


def test_calibration_errors_are_those_of_netcal_and_torchmetrics() -> None:
    assert metrics.ece(RIGHT, CONFIDENCE, bins=15) == pytest.approx(0.20045602605863194, abs=1e-12)
    assert metrics.ece(RIGHT, CONFIDENCE, bins=10) == pytest.approx(0.20045602605863197, abs=1e-12)
    bins = metrics.reliability_bins(RIGHT, CONFIDENCE)
    squares = np.nansum(bins.counts * (bins.mean_score - bins.mean_confidence) ** 2) / 300
    assert np.sqrt(squares) == pytest.approx(0.22272629379703096, abs=1e-12)  # torchmetrics, norm="l2"
    assert metrics.auroc(RIGHT, CONFIDENCE) == pytest.approx(0.8885184526443481, abs=1e-6)  # in float32


def test_scaling_is_that_of_netcal() -> None:
    """Its optimiser stops at about four digits."""
    temperature = metrics.fit_temperature(RIGHT, CONFIDENCE)
    assert 1 / temperature.temperature == pytest.approx(0.90787286, abs=2e-4)
    assert temperature.apply([0.1, 0.5, 0.9]) == pytest.approx([0.11974991, 0.5, 0.88025009], abs=1e-4)
    platt = metrics.fit_platt(RIGHT, CONFIDENCE)
    assert platt == pytest.approx((1.25205847, 1.43818937), abs=2e-4)
    assert platt.apply([0.1, 0.5, 0.9]) == pytest.approx([0.21200794, 0.80817411, 0.98506857], abs=1e-4)


@pytest.mark.parametrize(
    ("risk", "coverage", "threshold"),
    [
        (0.005, 4 / 300, 0.988599348534202),
        (0.01, 4 / 300, 0.988599348534202),
        (0.05, 32 / 300, 0.8973941368078175),
        (0.1, 138 / 300, 0.5423452768729642),
        (0.2, 226 / 300, 0.24592833876221498),
    ],
)
def test_coverage_at_risk_is_that_of_reliable_vqa(risk: float, coverage: float, threshold: float) -> None:
    found = metrics.coverage_at_risk(SOFT, CONFIDENCE, risk)
    assert (found.coverage, found.threshold) == pytest.approx((coverage, threshold), abs=1e-12)


def test_aurc_is_that_of_reliable_vqa_within_its_bound() -> None:
    assert metrics.aurc(SOFT, CONFIDENCE) == pytest.approx(0.1386623848476034, abs=0.2 / 300)


@pytest.mark.parametrize(
    ("cost", "threshold", "phi", "coverage", "risk"),
    [
        (1, 0.1775244299674267, 0.4053333333333333, 0.8133333333333334, 0.27213114754098366),
        (10, 0.5456026058631922, 0.06266666666666665, 0.4533333333333333, 0.1264705882352941),
        (100, 0.5456026058631922, -2.9373333333333336, 0.4533333333333333, 0.1264705882352941),
    ],
)
def test_effective_reliability_is_that_of_reliable_vqa(
    cost: int, threshold: float, phi: float, coverage: float, risk: float
) -> None:
    """Thresholds from the even answers, figures on the odd ones."""
    even, odd = INDEX % 2 == 0, INDEX % 2 == 1
    chosen = metrics.phi_threshold(SOFT[even], CONFIDENCE[even], cost)
    assert chosen == pytest.approx(threshold, abs=1e-12)
    assert metrics.effective_reliability(SOFT[odd], CONFIDENCE[odd], cost, chosen) == pytest.approx(phi, abs=1e-12)
    point = metrics.operating_point(SOFT[odd], CONFIDENCE[odd], chosen)
    assert (point.coverage, point.risk) == pytest.approx((coverage, risk), abs=1e-12)
