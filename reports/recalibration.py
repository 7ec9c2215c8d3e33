"""Calibration after temperature and Platt scaling, fitted on a run's own threshold split and on its twin's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from bitquake.metrics import Platt, Samples, Temperature, fit_platt, fit_temperature
from bitquake.reports.entries import difference_entry
from bitquake.reports.evaluation import Evaluation, any_confidence, evaluate_runs, samples_of
from bitquake.reports.runs import Cell
from bitquake.reports.schema import RecalibratedEntry

RECALIBRATED_METRICS = ("ece_15", "rmsce_debiased_15", "signed_miscalibration", "brier", "nll")
Source = Literal["own", "full-precision"]
Method = Literal["temperature", "platt"]


class Maps:
    """The maps that were fitted on threshold splits, each once."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[Temperature, Platt]] = {}

    def of(self, key: str, fitting: Cell) -> tuple[Temperature, Platt]:
        """Temperature and Platt scaling of a run's primary confidence on its cell of a threshold split."""
        place = (key, fitting.task)
        if place not in self.found:
            score, confidence, _ = samples_of(fitting)
            self.found[place] = fit_temperature(score, confidence), fit_platt(score, confidence)
        return self.found[place]


def recalibrated_entries(
    cells: Mapping[str, Cell],
    fitting: Mapping[str, Cell],
    primary: Evaluation,
    maps: Maps,
    *,
    twin: str,
    replicates: int,
    seed: int,
) -> dict[str, list[RecalibratedEntry]]:
    """Run key -> its recalibrated metrics; ``primary``: of the same runs, in their order.

    Each difference is from the confidences as they were. The intervals hold the map fixed: they leave out the luck of
    the threshold split. A run without a confidence, or without a split to fit on, has no entries.
    """
    out: dict[str, list[RecalibratedEntry]] = {key: [] for key in cells}
    before = primary.only(RECALIBRATED_METRICS)
    plain = {key: samples_of(cell) for key, cell in cells.items()}
    sources: list[tuple[Source, dict[str, Cell]]] = [("own", dict(fitting))]
    if twin in fitting:
        sources.append(("full-precision", {key: fitting[twin] for key in cells if key != twin}))
    methods: tuple[Method, Method] = ("temperature", "platt")
    for source, splits in sources:
        for m, method in enumerate(methods):
            mapped: dict[str, Samples] = {}
            chosen: dict[str, Temperature | Platt] = {}
            for key, split in splits.items():
                if not any_confidence(plain[key]):
                    continue
                chosen[key] = maps.of(key if source == "own" else twin, split)[m]
                mapped[key] = plain[key]._replace(confidence=chosen[key].apply(np.asarray(plain[key].confidence)))
            if not mapped:
                continue
            values, after = evaluate_runs(
                mapped, {}, {}, twin="", replicates=replicates, seed=seed, names=RECALIBRATED_METRICS
            )
            for r, key in enumerate(mapped):
                at = primary.keys.index(key)
                for i, metric in enumerate(after.metrics):
                    delta, draws = after.values[r, i] - before.values[at, i], after.draws[r, i] - before.draws[at, i]
                    values[key][metric.key].difference = difference_entry(metric, float(delta), draws, after.n_clusters)
                out[key].append(
                    RecalibratedEntry(
                        method=method, source=source, parameters=chosen[key]._asdict(), metrics=values[key]
                    )
                )
    return out
