"""Temperature and Platt scaling: confidences mapped so that they fit the scores of other, disjoint samples.

A map is fitted where samples may be looked at (a threshold split), and applied elsewhere: to the same model's test
answers, or to those of a quantized model in noise (recalibration transfer). Both work on the logit of the confidence
and minimise the cross-entropy of the soft scores. To judge a map, give `evaluate` or `compare` the mapped confidences;
their intervals then hold the map fixed, that is, leave out the luck of the samples that it was fitted on.

The fit is total: a ridge of 10^-6 of one sample's weight towards the map that changes nothing decides where the samples
do not (none at all, all right, all wrong, one single confidence), and moves no other fit in its sixth digit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from .calibration import NLL_CLIP
from .samples import FloatArray, check_confidence, check_score, check_weights

TEMPERATURES = (0.01, 100.0)
"""Bounds of a temperature: answers that are all right would send it to 0."""

SCALES = (-100.0, 100.0)
"""Bounds of a Platt scale: confidences that part right from wrong would send it to infinity."""

_RIDGE = 1e-6
_STEPS = 200


class Temperature(NamedTuple):
    """confidence -> sigmoid(logit(confidence) / temperature): above 1 makes less sure, and never changes an order.

    Source: Guo et al. 2017 (arXiv 1706.04599), on the binary logit of one confidence for each answer.
    """

    temperature: float

    def apply(self, confidence: ArrayLike) -> FloatArray:
        """(n,) mapped confidences; NaN stays NaN. ValueError outside [0, 1]."""
        return np.asarray(expit(_logit(confidence) / self.temperature))


class Platt(NamedTuple):
    """confidence -> sigmoid(scale * logit(confidence) + offset). Source: Platt 1999; no label smoothing."""

    scale: float
    offset: float

    def apply(self, confidence: ArrayLike) -> FloatArray:
        """(n,) mapped confidences; NaN stays NaN. ValueError outside [0, 1]."""
        return np.asarray(expit(self.scale * _logit(confidence) + self.offset))


def fit_temperature(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> Temperature:
    """The temperature with the least cross-entropy, within `TEMPERATURES`; 1 without any sample to fit.

    score, confidence, weights: as for `ece`. Samples without a confidence are left out.
    """
    a, z, w = _prepare(score, confidence, weights)
    inverse = _least_loss(a, w, z[:, None], np.zeros_like(z), np.ones(1))[0]
    low, high = TEMPERATURES
    return Temperature(float(1 / np.clip(inverse, 1 / high, 1 / low)))


def fit_platt(score: ArrayLike, confidence: ArrayLike | None, *, weights: ArrayLike | None = None) -> Platt:
    """The scale, within `SCALES`, and offset with the least cross-entropy; (1, 0) without any sample to fit.

    score, confidence, weights: as for `ece`. Samples without a confidence are left out. A scale below 0 says that the
    confidence points the wrong way.
    """
    a, z, w = _prepare(score, confidence, weights)
    ones = np.ones_like(z)
    scale, offset = _least_loss(a, w, np.stack([z, ones], axis=1), np.zeros_like(z), np.array([1.0, 0.0]))
    bounded = float(np.clip(scale, *SCALES))
    if bounded != scale:  # the loss is convex, so that the best map within the bounds lies on this bound
        offset = _least_loss(a, w, ones[:, None], bounded * z, np.zeros(1))[0]
    return Platt(bounded, float(offset))


def _logit(confidence: ArrayLike) -> FloatArray:
    array = np.asarray(confidence, dtype=np.float64)
    c = check_confidence(array, array.size)
    return np.asarray(logit(np.clip(c, NLL_CLIP, 1 - NLL_CLIP)))


def _prepare(
    score: ArrayLike, confidence: ArrayLike | None, weights: ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Scores, logits and weights of the samples that have a confidence."""
    a = check_score(score)
    z = _logit(check_confidence(confidence, a.size))
    w = check_weights(weights, a.size)
    kept = ~np.isnan(z) & (w > 0)
    return a[kept], z[kept], w[kept]


def _least_loss(a: FloatArray, w: FloatArray, x: FloatArray, fixed: FloatArray, neutral: FloatArray) -> FloatArray:
    """Coefficients b of least weighted cross-entropy of sigmoid(x b + fixed), with the ridge towards `neutral`.

    Newton's method on a strictly convex function, each step halved until the loss falls.
    """

    def loss(b: FloatArray) -> float:
        t = x @ b + fixed
        return float(w @ (np.logaddexp(0.0, t) - a * t) + _RIDGE / 2 * ((b - neutral) ** 2).sum())

    b: FloatArray = neutral.copy()
    now = loss(b)
    for _ in range(_STEPS):
        p = expit(x @ b + fixed)
        slope = x.T @ (w * (p - a)) + _RIDGE * (b - neutral)
        curvature = (x * (w * p * (1 - p))[:, None]).T @ x + _RIDGE * np.eye(b.size)
        step = np.linalg.solve(curvature, slope)
        while True:
            then = loss(b - step)
            if then <= now or np.abs(step).max(initial=0.0) < 1e-12:
                break
            step = step / 2
        if then > now:
            break
        b, now = b - step, then
        if np.abs(step).max(initial=0.0) < 1e-12:
            break
    return np.asarray(b)
