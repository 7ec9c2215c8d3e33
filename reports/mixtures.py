"""What a run does when a share of its questions is shifted: mixtures of two tasks' samples by weights."""

from __future__ import annotations

from collections.abc import Mapping

from bitquake.metrics import mixture_curve
from bitquake.reports.conditions import Conditions
from bitquake.reports.entries import LEVEL, estimate_entry
from bitquake.reports.evaluation import any_confidence, fitting_splits, further_confidences, samples_of
from bitquake.reports.pairing import Group
from bitquake.reports.problems import Problem
from bitquake.reports.schema import MixtureEntry, MixturePoint
from bitquake.reports.transfer import Fitted


def mixture_entries(
    conditions: Conditions, group: Group, fitted: Fitted, ids: Mapping[str, str], *, twin: str
) -> list[MixtureEntry]:
    """Every shifted task mixed with the task it is shifted from, for each run.

    Under the primary confidence and the first Selector's.

    ids: run key -> id in the report. The transferred thresholds are the full-precision run's.
    """
    out = []
    told: list[Problem] = []  # the tasks themselves have told them
    for clean in conditions.by_task:
        for task in conditions.shifts_of(clean):
            plain, shifted = conditions.by_task[clean].cells, conditions.by_task[task].cells
            if plain[twin].confidence_name != shifted[twin].confidence_name:
                continue
            both = {key: cell for key, cell in shifted.items() if key in plain}
            fitting = [fitting_splits(group, cells, told)[0].get(twin) for cells in (plain, shifted)]
            split = fitting[0] if fitting[0] is fitting[1] else None
            selectors = [name for name in further_confidences(both.values()) if name.startswith("selector")]
            for key in both:
                for name in [plain[twin].confidence_name, *selectors[:1]]:
                    sources = samples_of(plain[key], name), samples_of(shifted[key], name)
                    if not all(any_confidence(source) for source in sources):
                        continue
                    chosen = fitted.of(twin, split, name) if split else None
                    points = mixture_curve(
                        *sources, fit=chosen, replicates=conditions.replicates, seed=conditions.seed, level=LEVEL
                    )
                    entries = [
                        MixturePoint(
                            ood_share=point.ood_share,
                            metrics={metric: estimate_entry(found) for metric, found in point.metrics.items()},
                        )
                        for point in points
                    ]
                    out.append(
                        MixtureEntry(run=ids[key], id_task=clean, ood_task=task, confidence=name, points=entries)
                    )
    return out
