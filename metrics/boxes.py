"""Calibration of a box's confidence: against "the box counts" and against how well it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .bootstrap import Estimate, evaluate
from .samples import FloatArray, check_score

BOX_METRICS = ("ece_15", "ece_mass_15", "rmsce_debiased_15", "signed_miscalibration", "brier", "nll")


class BoxCalibration(NamedTuple):
    """By metric key. hit: the score is 1[IoU >= threshold], the benchmark's own. iou: the score is the IoU itself."""

    hit: dict[str, Estimate]
    iou: dict[str, Estimate]


def box_calibration(
    iou: ArrayLike,
    confidence: ArrayLike | None,
    cluster: ArrayLike | None = None,
    *,
    threshold: float = 0.5,
    metrics: Sequence[str] = BOX_METRICS,
    replicates: int = 2000,
    seed: int,
    level: float = 0.95,
) -> BoxCalibration:
    """`evaluate` of a grounding run with both meanings of a box's confidence.

    iou: (n,) intersection over union of the answered with the true box, 0 where no box was found. A joint probability
    of a dozen coordinate tokens is small for its length alone: look at it after `fit_temperature` or `fit_platt` as
    well, fitted on other images with the same meaning of the score.
    """
    overlap = check_score(iou)
    hit = (overlap >= threshold).astype(np.float64)

    def judged(score: FloatArray) -> dict[str, Estimate]:
        return evaluate(score, confidence, cluster, metrics=metrics, replicates=replicates, seed=seed, level=level)

    return BoxCalibration(judged(hit), judged(overlap))
