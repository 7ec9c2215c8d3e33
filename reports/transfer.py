"""Thresholds that were chosen on full precision's clean threshold split, and what they do to every run and task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitquake.metrics import Samples, Thresholds, Transfer, apply_thresholds, fit_thresholds
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import any_confidence, further_confidences, samples_of
from bitquake.reports.runs import Cell
from bitquake.reports.schema import TransferEntry, ValueEntry

TOLERATED = (0.01, 0.05, 0.10)


class Fitted:
    """Thresholds of each run, threshold split and confidence; each is fitted once."""

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates, self.seed = replicates, seed
        self.found: dict[tuple[str, str, str], Thresholds | None] = {}

    def of(self, key: str, fitting: Cell, confidence: str) -> Thresholds | None:
        """At the tolerated risks; None where no sample of the split has the confidence."""
        place = (key, fitting.task, confidence)
        if place not in self.found:
            samples = samples_of(fitting, confidence)
            some = any_confidence(samples)
            self.found[place] = (
                fit_thresholds(samples, TOLERATED, replicates=self.replicates, seed=self.seed) if some else None
            )
        return self.found[place]


def transfer_entries(
    cells: Mapping[str, Cell], fitting: Mapping[str, Cell], ids: Mapping[str, str], fitted: Fitted, *, twin: str
) -> list[TransferEntry]:
    """The twin's thresholds on it and on the runs that are paired with it on one task, and what their own would do.

    For the primary confidence and each Selector's. ids: run key -> id in the report. Nothing without the twin's
    threshold split.
    """
    if twin not in cells or twin not in fitting:
        return []
    primary = cells[twin].confidence_name
    names = [primary, *(name for name in further_confidences(cells.values()) if name.startswith("selector"))]
    out = []
    for name in names:
        chosen = fitted.of(twin, fitting[twin], name)
        if chosen is None:
            continue
        samples = {key: samples_of(cell, name) for key, cell in cells.items()}
        samples = {key: found for key, found in samples.items() if any_confidence(found)}
        if not samples:
            continue
        shared = apply_thresholds(chosen, list(samples.values()), seed=fitted.seed, level=LEVEL)
        for key, taken in zip(samples, shared, strict=True):
            own = taken if key == twin else _own(key, samples[key], fitting, fitted, name)
            for k, risk in enumerate(TOLERATED):
                out.append(
                    _entry(ids[key], cells[key], fitting[twin].task, name, risk, taken[k], own[k] if own else None)
                )
    return out


def _own(
    key: str, samples: Samples, fitting: Mapping[str, Cell], fitted: Fitted, confidence: str
) -> list[Transfer] | None:
    """What thresholds do that were fitted on the run's own threshold split."""
    chosen = fitted.of(key, fitting[key], confidence) if key in fitting else None
    return apply_thresholds(chosen, [samples], seed=fitted.seed, level=LEVEL)[0] if chosen else None


def _entry(
    run: str, cell: Cell, threshold_task: str, confidence: str, risk: float, taken: Transfer, own: Transfer | None
) -> TransferEntry:
    return TransferEntry(
        run=run,
        task=cell.task,
        threshold_task=threshold_task,
        confidence=confidence,
        risk_target=risk,
        threshold=float(taken.threshold) if np.isfinite(taken.threshold) else None,
        n=taken.n,
        n_answered=taken.n_answered,
        risk=_value(taken.risk_taken, taken.risk_lo, taken.risk_hi, taken.note),
        coverage=_value(taken.coverage, taken.coverage_lo, taken.coverage_hi, taken.note),
        own_risk=_value(own.risk_taken, own.risk_lo, own.risk_hi, own.note) if own else None,
        own_coverage=_value(own.coverage, own.coverage_lo, own.coverage_hi, own.note) if own else None,
        verdict=taken.verdict,
    )


def _value(value: float, lo: float, hi: float, note: str) -> ValueEntry:
    if np.isnan(value) or np.isnan(lo) or np.isnan(hi):
        return ValueEntry(value=None, lo=None, hi=None, note=note or "nothing is answered")
    return ValueEntry(value=float(value), lo=float(lo), hi=float(hi), note=note)
