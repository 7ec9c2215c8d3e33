"""Difference in differences: what noise or a shift costs a quantized run more than it costs full precision."""

from __future__ import annotations

from collections.abc import Mapping

from bitquake.metrics import METRICS, Figure, difference_in_differences, mean_figure
from bitquake.reports.conditions import JOINT_METRICS, Conditions, Part
from bitquake.reports.entries import LEVEL, effect_of
from bitquake.reports.schema import DifferenceEntry, InteractionEntry


def interaction_entries(conditions: Conditions, ids: Mapping[str, str], *, twin: str) -> list[InteractionEntry]:
    """Every noise against its family's clean task, their mean, and every shift against the task it is shifted from.

    ids: run key -> id in the report. The mean over noises leaves out a noise on the whole split that stands on the
    subset as well, and stands only for runs that have all of them.
    """
    out: list[InteractionEntry] = []
    for clean in conditions.by_task:
        noises = conditions.noises_of(clean)
        shifts = conditions.shifts_of(clean)
        out += _noises(conditions, clean, noises, ids, twin)
        for task in shifts:
            parts = conditions.shared(task, clean)
            there, here = parts or (Part(task), Part(clean))
            found = _differences(conditions, [(there, here)], twin)
            out += _entries(
                conditions, clean, task, "shift", parts is not None, {k: f[0] for k, f in found.items()}, ids
            )
    return out


def _noises(
    conditions: Conditions, clean: str, noises: list[str], ids: Mapping[str, str], twin: str
) -> list[InteractionEntry]:
    shared = {task: parts for task in noises if (parts := conditions.shared(task, clean))}
    out = []
    if shared:
        found = _differences(conditions, list(shared.values()), twin)
        for at, task in enumerate(shared):
            own = {key: figures[at] for key, figures in found.items() if figures[at]}
            out += _entries(conditions, clean, task, "noise", True, own, ids)
        averaged = [at for at, task in enumerate(shared) if not conditions.repeats_subset(task)]
        means: dict[str, dict[str, Figure]] = {}
        for key, figures in found.items():
            if len(averaged) > 1 and all(figures[at] for at in averaged):
                means[key] = {
                    name: mean_figure([figures[at][name] for at in averaged], level=LEVEL) for name in JOINT_METRICS
                }
        out += _entries(conditions, clean, "", "noise", True, means, ids)
    return out


def _differences(
    conditions: Conditions, pairs: list[tuple[Part, Part]], twin: str
) -> dict[str, list[dict[str, Figure]]]:
    """Run key -> its figures by metric for each (condition, clean), empty where the run is missing in one."""
    together = conditions.together([part for pair in pairs for part in pair])
    metrics = [METRICS[name] for name in JOINT_METRICS]
    keys = dict.fromkeys(key for there, _ in pairs for key in together[there].keys if key != twin)
    out: dict[str, list[dict[str, Figure]]] = {key: [] for key in keys}
    for there, here in pairs:
        for key in keys:
            both = key in together[there].keys and key in together[here].keys
            chosen = [twin, key]
            out[key].append(
                difference_in_differences(
                    together[here].of(chosen), together[there].of(chosen), metrics, candidate=1, level=LEVEL
                )
                if both
                else {}
            )
    return out


def _entries(
    conditions: Conditions,
    clean: str,
    task: str,
    kind: str,
    shared: bool,
    found: Mapping[str, Mapping[str, Figure]],
    ids: Mapping[str, str],
) -> list[InteractionEntry]:
    cell = conditions.by_task[clean].twin
    out = []
    for key, figures in found.items():
        differences = {}
        for name, figure in figures.items():
            verdict = figure.verdict()
            if verdict != "unavailable":
                effect = effect_of(verdict, METRICS[name].higher_is_better)
                differences[name] = DifferenceEntry(
                    delta=figure.value, lo=figure.lo, hi=figure.hi, verdict=verdict, effect=effect
                )
        fields = {"run": ids[key], "world": cell.world, "family": cell.family, "task": task, "kind": kind}
        out.append(InteractionEntry.model_validate({**fields, "shared": shared, "differences": differences}))
    return out
