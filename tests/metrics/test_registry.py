"""The metrics by name, the rule for ranking them, and what the room may import."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from bitquake.metrics import METRICS, Estimate, Samples, evaluate, ranking_caution


def test_every_metric_that_the_first_report_names_is_there() -> None:
    named = ["accuracy", "ece_15", "ece_mass_15", "brier", "auroc", "aurc"]
    named += [f"coverage_at_risk_{r}" for r in (0.5, 1, 5, 10, 20)] + [f"phi_{c}" for c in (1, 10, 100)]
    assert set(named) <= set(METRICS)
    for key, metric in METRICS.items():
        assert metric.key == key
        assert metric.title and metric.definition and metric.source
        assert metric.needs_threshold_split == key.startswith("phi_")
        assert metric.needs_confidence == (key != "accuracy")


def test_the_direction_of_every_metric() -> None:
    """A run that is right more often, surer of its right answers and less sure of its wrong ones is better by each."""
    rng = np.random.default_rng(0)
    difficulty = rng.random(2000)

    def run(skill: float, prefix: str) -> Samples:
        right = difficulty < skill
        surety = np.where(right, 0.97, 0.2) if skill > 0.8 else rng.uniform(0.5, 1, right.size)
        return Samples(right.astype(float), surety, [f"{prefix}{i}" for i in range(right.size)])

    better = evaluate(*run(0.9, "x"), threshold=run(0.9, "t"), replicates=2, seed=0)
    worse = evaluate(*run(0.6, "x"), threshold=run(0.6, "t"), replicates=2, seed=0)
    for key, metric in METRICS.items():
        if metric.higher_is_better is not None:
            gain = better[key].value - worse[key].value
            assert gain > 0 if metric.higher_is_better else gain < 0, key


@pytest.mark.parametrize(
    ("key", "n", "half_width", "reason"),
    [
        ("coverage_at_risk_0.5", 19_999, 0.01, "at least 20,000 samples"),
        ("coverage_at_risk_1", 9_999, 0.01, "at least 10,000 samples"),
        ("coverage_at_risk_1", 10_000, 0.01, ""),
        ("coverage_at_risk_1", 10_000, 0.06, "12 points wide"),
        ("coverage_at_risk_5", 1_999, 0.01, "at least 2,000 samples"),
        ("coverage_at_risk_10", 1_000, 0.05, ""),
        ("accuracy", 50, 0.2, ""),
    ],
)
def test_small_counts_are_not_ranked(key: str, n: int, half_width: float, reason: str) -> None:
    caution = ranking_caution(key, Estimate(0.4, 0.4 - half_width, 0.4 + half_width, n, n, 0))
    assert reason in caution
    assert bool(caution) == bool(reason)


def test_what_is_not_available_is_not_ranked() -> None:
    missing = evaluate([1.0, 0.0], None, metrics=["aurc"], replicates=2, seed=0)["aurc"]
    assert ranking_caution("aurc", missing) == "no sample has a confidence"


def test_the_room_needs_numpy_and_scipy_only() -> None:
    heavy = ("scipy.stats", "torch", "lmms_eval", "datasets", "transformers", "pandas", "sklearn")
    code = f"import sys, bitquake.metrics; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
