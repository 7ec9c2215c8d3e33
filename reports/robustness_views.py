"""Robustness under noise and difference in differences as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitquake.reports.schema import InteractionEntry, MetricEntry, RobustnessEntry, RunEntry, ValueEntry
from bitquake.reports.tables import Column, Table, TableCell, TableRow, difference_cell, value_cell

INTERACTION_METRICS = ("accuracy", "aurc", "ece_15", "coverage_at_risk_1")


def robustness_table(entries: Sequence[RobustnessEntry], runs: Mapping[str, RunEntry]) -> Table | None:
    """mqCE, mean relative robustness, and qCE under each noise; None without an entry."""
    if not entries:
        return None
    noises = list(dict.fromkeys(entry.noise for entry in entries if entry.noise))
    means = any(not entry.noise for entry in entries)
    by_place = {(entry.run, entry.noise): entry for entry in entries}
    columns = []
    if means:
        columns = [
            Column("mqCE", "", "errors under noise over full precision's errors, mean over the noises", "down"),
            Column("Relative robustness", "%", "accuracy in noise over the model's own clean accuracy, mean", "up"),
        ]
    columns += [
        Column(f"qCE, {noise.replace('_', ' ')}", "", "errors over full precision's", "down") for noise in noises
    ]
    if not means:
        columns += [Column("Relative robustness", "%", "accuracy in noise over the model's own clean accuracy", "up")]
    rows = []
    for run in runs.values():
        if not any(entry.run == run.id for entry in entries):
            continue
        mean = by_place.get((run.id, ""))
        errors = [_error_cell(by_place.get((run.id, noise)), run) for noise in noises]
        cells = [_error_cell(mean, run), value_cell(mean.relative if mean else None, "percent"), *errors]
        if not means:
            only = by_place.get((run.id, noises[0]))
            cells = [*errors, value_cell(only.relative if only else None, "percent")]
        rows.append(TableRow(run, "", cells, run.role == "full-precision"))
    return Table(
        "Robustness under noise",
        "qCE: errors summed over the severities, divided by full precision's errors on the same noise (1: as many; "
        "1.2: a fifth more). mqCE: their mean over the noises. Relative robustness: accuracy in noise as a share of "
        "the model's own clean accuracy. [95 % interval]",
        columns,
        rows,
    )


def _error_cell(entry: RobustnessEntry | None, run: RunEntry) -> TableCell:
    value: ValueEntry | None = entry.quantization_error if entry else None
    if value is None or value.value is None or value.lo is None or value.hi is None:
        return TableCell("n/a", css="na")
    if run.role == "full-precision":
        return TableCell("1", css="tied")
    effect = "worse" if value.lo > 1 else "better" if value.hi < 1 else "tied"
    share = abs(value.value - 1)
    css = effect if effect == "tied" else f"{effect} size{1 if share < 0.05 else 2 if share < 0.25 else 3}"
    shown = value_cell(value, "fraction", digits=2)
    return TableCell(shown.value, shown.interval, word="≈ tied" if effect == "tied" else effect, css=css)


def interaction_table(
    entries: Sequence[InteractionEntry],
    runs: Mapping[str, RunEntry],
    conditions: Mapping[str, str],
    metrics: Sequence[MetricEntry],
) -> Table | None:
    """Difference in differences: the mean over noises and each shift open, each noise folded; None without an entry."""
    if not entries:
        return None
    arrows = {True: "up", False: "down", None: ""}
    columns = [
        Column(m.title, "points" if m.unit == "percent" else "", m.definition, arrows[m.higher_is_better])
        for m in metrics
    ]
    place = {run: at for at, run in enumerate(runs)}
    order = {"": -1, **{task: at for at, task in enumerate(conditions)}}
    rows: dict[bool, list[TableRow]] = {False: [], True: []}
    several = any(not entry.task for entry in entries)
    for entry in sorted(entries, key=lambda e: (order[e.task], place[e.run])):
        name = conditions[entry.task] if entry.task else "mean over the noises"
        cells = [difference_cell(entry.differences.get(m.key), m.unit) for m in metrics]
        folded = several and entry.kind == "noise" and bool(entry.task)
        rows[folded].append(TableRow(runs[entry.run], name, cells))
    return Table(
        "Does quantization make the model more fragile?",
        "Difference in differences: the change against full precision in the condition, less the same change on clean "
        "images. Tied: nothing shows that the condition costs the quantized model more than full precision, or less. "
        "One that has little left to lose looks better here: read it beside the values. [95 % interval]",
        columns,
        rows[False],
        rows[True],
        "Condition",
        f"Every noise and severity ({len(rows[True])} rows)",
    )
