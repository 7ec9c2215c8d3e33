"""How often the intervals of transfers and of differences in differences hold the truth, in simulated studies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitquake import metrics
from bitquake.metrics import METRICS, OrderedSamples, Run, Samples

pytestmark = pytest.mark.slow

Array = NDArray[Any]
STUDIES = 400
REPLICATES = 300
# 95 % less what four standard errors of the simulation (4.4 points) allow.
LEAST = 0.95 - 4 * math.sqrt(0.95 * 0.05 / STUDIES)


def questions(rng: np.random.Generator, images: int, prefix: str, harm: float) -> Samples:
    """2.5 questions per image, which share half of their difficulty; confidence k/200, and `harm` over-confident."""
    image = np.sort(rng.integers(0, images, images * 5 // 2))
    shared = rng.beta(4, 1, images)[image]
    confidence = np.round(200 * np.where(rng.random(image.size) < 0.5, shared, rng.beta(4, 1, image.size))) / 200
    right = rng.random(image.size) < np.clip(confidence**1.2 - harm, 0, 1)
    return Samples(right.astype(float), confidence, np.char.add(prefix, image.astype(str)))


@pytest.mark.parametrize(("images", "harm", "risk"), [(400, 0.0, 0.1), (400, 0.05, 0.1), (1500, 0.05, 0.05)])
def test_the_risk_and_coverage_of_a_transfer(images: int, harm: float, risk: float) -> None:
    """The truth is the risk at the threshold that an endless fitting split would give."""
    rng = np.random.default_rng(1)
    endless_fit = questions(rng, 400_000, "f", 0.0)
    endless_test = questions(rng, 400_000, "t", harm)
    threshold = metrics.coverage_at_risk(endless_fit.score, endless_fit.confidence, risk).threshold
    truth = metrics.operating_point(endless_test.score, endless_test.confidence, threshold)
    held = {"risk": 0, "coverage": 0, "own": 0}
    wrong_verdicts = 0
    for study in range(STUDIES):
        found = metrics.transfer(
            questions(rng, images, "f", 0.0), questions(rng, images, "t", harm), risk, replicates=REPLICATES, seed=study
        )
        held["risk"] += found.risk_lo <= truth.risk <= found.risk_hi
        held["coverage"] += found.coverage_lo <= truth.coverage <= found.coverage_hi
        # what the threshold of this very study takes in the long run
        own = metrics.operating_point(endless_test.score[:50_000], endless_test.confidence[:50_000], found.threshold)
        held["own"] += found.risk_lo <= own.risk <= found.risk_hi
        wrong_verdicts += (found.verdict == "kept" and truth.risk > risk + 1e-3) or (
            found.verdict == "broken" and truth.risk < risk - 1e-3
        )
    print(f"transfer, {images} images, harm {harm}, risk {risk}: { ({k: v / STUDIES for k, v in held.items()}) }")
    print(f"true risk {truth.risk:.4f}, wrong verdicts {wrong_verdicts / STUDIES:.3f}")
    assert min(held.values()) / STUDIES >= LEAST
    assert wrong_verdicts / STUDIES <= 0.05


@pytest.mark.parametrize("shared", [True, False])
def test_difference_in_differences(shared: bool) -> None:
    """Clean and noisy answers of two runs; on the same questions (noise), or on others (shift)."""
    rng = np.random.default_rng(2)
    keys = ("accuracy", "aurc", "coverage_at_risk_20", "ece_15")
    chosen = [METRICS[key] for key in keys]

    def study(images: int) -> list[list[Samples]]:
        clean = questions(rng, images, "i", 0.0)
        noisy = clean if shared else questions(rng, images, "s", 0.0)
        out = []
        for base, cost in ((clean, 0.0), (noisy, 0.08)):
            u = rng.random(np.size(base.score))
            full = base.score * (u > cost)  # what noise takes from both runs
            candidate = full * (rng.random(u.size) > 0.03 + cost)  # and what quantization takes on top
            sure = np.round(200 * np.clip(base.confidence - cost / 2 * rng.random(u.size), 0, 1)) / 200
            out.append([base._replace(score=full), Samples(candidate, sure, base.cluster)])
        return out

    def cost_of(conditions: list[list[Samples]], replicates: int, seed: int) -> dict[str, metrics.Figure]:
        runs = [[Run(OrderedSamples(*s), None) for s in runs] for runs in conditions]
        clean, noisy = metrics.replicate_jointly(runs, chosen, replicates=replicates, seed=seed)
        return metrics.difference_in_differences(clean, noisy, chosen, candidate=1)

    truth = cost_of(study(400_000), 1, 0)
    held = dict.fromkeys(keys, 0)
    for k in range(STUDIES):
        for key, found in cost_of(study(500), REPLICATES, k).items():
            held[key] += found.lo <= truth[key].value <= found.hi
    print(f"difference in differences, shared {shared}: { ({k: v / STUDIES for k, v in held.items()}) }")
    assert min(held.values()) / STUDIES >= LEAST
