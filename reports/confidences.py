"""Other confidences of the same answers (a Selector's, say) beside the primary one of the same run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitquake.reports.entries import difference_entry
from bitquake.reports.evaluation import (
    Evaluation,
    Splits,
    any_confidence,
    evaluate_runs,
    further_confidences,
    samples_of,
)
from bitquake.reports.runs import Cell
from bitquake.reports.schema import ConfidenceEntry

FURTHER_METRICS = ("ece_15", "aurc", "coverage_at_risk_1", "coverage_at_risk_5", "auroc", "brier", "phi_10")


def confidence_entries(
    cells: Mapping[str, Cell],
    fitting: Mapping[str, Cell],
    notes: Mapping[str, str],
    primary: Evaluation,
    splits: Splits,
    *,
    twin: str,
    replicates: int,
    seed: int,
) -> dict[str, list[ConfidenceEntry]]:
    """Run key -> its further confidences, for runs on the same samples; ``primary``: of the same runs, in their order.

    A run without a sample that has the confidence has no entry for it.
    """
    out: dict[str, list[ConfidenceEntry]] = {key: [] for key in cells}
    beside = primary.only(FURTHER_METRICS)
    for name in further_confidences(cells.values()):
        samples = {key: samples_of(cell, name) for key, cell in cells.items()}
        samples = {key: found for key, found in samples.items() if any_confidence(found)}
        chosen = splits.of({key: cell for key, cell in fitting.items() if key in samples}, name)
        missing = {key: f"no sample of the threshold split has {name}" for key in samples if key in fitting}
        why = {key: {**missing, **notes}.get(key, "") for key in samples if key not in chosen}
        values, own = evaluate_runs(
            samples, chosen, why, twin=twin, replicates=replicates, seed=seed, names=FURTHER_METRICS
        )
        for r, key in enumerate(samples):
            at = primary.keys.index(key)
            differences = {}
            for m, metric in enumerate(own.metrics):
                delta, draws = own.values[r, m] - beside.values[at, m], own.draws[r, m] - beside.draws[at, m]
                if entry := difference_entry(metric, float(delta), draws, own.n_clusters):
                    differences[metric.key] = entry
            n_missing = int(np.isnan(np.asarray(samples[key].confidence)).sum())
            out[key].append(ConfidenceEntry(name=name, n_missing=n_missing, metrics=values[key], beside=differences))
    return out
