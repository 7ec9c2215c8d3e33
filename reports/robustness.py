"""Robustness under noise: relative to a run's own clean accuracy, and to full precision's errors (mqCE)."""

from __future__ import annotations

from collections.abc import Mapping

from bitquake.metrics import Figure, mean_figure, quantization_error, relative_robustness
from bitquake.reports.conditions import JOINT_METRICS, Conditions, Part
from bitquake.reports.entries import LEVEL
from bitquake.reports.schema import RobustnessEntry, ValueEntry

_ACCURACY = JOINT_METRICS.index("accuracy")


def robustness_entries(conditions: Conditions, ids: Mapping[str, str], *, twin: str) -> list[RobustnessEntry]:
    """Each run under each noise of a family (over the severities that were run), and its mean over the noises.

    ids: run key -> id in the report. The mean stands only for runs that have all noises. Noises whose samples the clean
    task does not hold are left out, and so are those on the whole split that stand on the subset as well.
    """
    out = []
    for clean, condition in conditions.by_task.items():
        by_noise: dict[str, list[tuple[Part, Part]]] = {}
        for task in conditions.noises_of(clean):
            parts = conditions.shared(task, clean)
            if parts and not conditions.repeats_subset(task):
                told = conditions.by_task[task].twin.noise or {}
                by_noise.setdefault(str(told.get("name", task)), []).append(parts)
        if not by_noise:
            continue
        together = conditions.together([part for pairs in by_noise.values() for pair in pairs for part in pair])
        for key in condition.cells:
            relative: dict[str, Figure] = {}
            errors: dict[str, Figure] = {}
            severities: dict[str, list[int]] = {}
            for noise, pairs in by_noise.items():
                if not all(key in together[part].keys for pair in pairs for part in pair):
                    continue
                own = [twin, key]
                there = [together[part].of(own) for part, _ in pairs]
                # Where severities have samples of their own, each stands against the clean task on these samples.
                each = [
                    relative_robustness(together[here].of(own), [part], run=1, metric=_ACCURACY, level=LEVEL)
                    for (_, here), part in zip(pairs, there, strict=True)
                ]
                relative[noise] = mean_figure(each, level=LEVEL, bounds=(0.0, float("inf")))
                errors[noise] = quantization_error(there, run=1, metric=_ACCURACY, level=LEVEL)
                severities[noise] = sorted(conditions.by_task[part.task].twin.severity for part, _ in pairs)
            if len(by_noise) > 1 and len(relative) == len(by_noise):
                for figures in (relative, errors):
                    figures[""] = mean_figure(list(figures.values()), level=LEVEL, bounds=(0.0, float("inf")))
                severities[""] = sorted(set().union(*severities.values()))
            out += [
                RobustnessEntry.model_validate(
                    {
                        "run": ids[key],
                        "world": condition.twin.world,
                        "family": condition.twin.family,
                        "noise": noise,
                        "severities": severities[noise],
                        "relative": _value(relative[noise]),
                        "quantization_error": _value(errors[noise]),
                    }
                )
                for noise in relative
            ]
    return out


def _value(figure: Figure) -> ValueEntry:
    if not figure.available:
        return ValueEntry(value=None, lo=None, hi=None, note=figure.note)
    return ValueEntry(value=figure.value, lo=figure.lo, hi=figure.hi)
