"""The views of a board beside the clean one: noise, severity, shift, and other confidences of the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from markupsafe import Markup

from bitquake.leaderboard.views import (
    BoardView,
    Column,
    Getter,
    Head,
    Table,
    ViewPage,
    change_cell,
    column_of,
    difference_cell,
    span,
    value_cell,
)
from bitquake.reports.formatting import condition_name
from bitquake.reports.names import confidence_title
from bitquake.reports.schema import CellEntry, ConfidenceEntry, DifferenceEntry, MetricEntry, RunEntry, ValueEntry
from bitquake.reports.views import slug

# More columns than a reader can follow: then a noise stands with its highest severity only.
MOST_COLUMNS = 16
TRANSFER_RISK = 0.05
_SUMMARY = ("accuracy", "aurc", "ece_15")
_COSTS = ("accuracy", "aurc", "ece_15", "coverage_at_risk_1")
_SHIFT = ("accuracy", "aurc", "ece_15", "coverage_at_risk_5")
_CONFIDENCE = ("aurc", "coverage_at_risk_5", "phi_10", "ece_15")
_BESIDE = ("aurc", "coverage_at_risk_5")


def view_pages(view: BoardView) -> list[ViewPage]:
    """The views that have anything to show."""
    found = [
        ViewPage(
            "noise",
            "Noise",
            f"{view.id}--noise.html",
            "Each quantization under noise on image and question, against its full-precision twin on the same pixels. "
            "The last columns ask apart from the clean loss: is the gap to full precision larger in noise?",
            _noise(view),
        ),
        ViewPage(
            "severity",
            "Severity",
            f"{view.id}--severity.html",
            "Severity by severity, because a corruption's number does not say how much it hurts. The curves are on the "
            "page of each model.",
            _severity(view),
        ),
        ViewPage(
            "shift",
            "Shift",
            f"{view.id}--shift.html",
            "Questions and pictures from elsewhere. Thresholds are chosen in distribution, on clean full-precision "
            "data at 5 % risk, and applied as they are: this is the risk that a deployer really takes.",
            _shift(view),
        ),
        ViewPage(
            "confidences",
            "Confidences",
            f"{view.id}--confidences.html",
            "Other confidences of the same answers beside the primary one: what a learned Selector adds.",
            _confidences(view),
        ),
    ]
    return [page for page in found if page.tables]


def _noise(view: BoardView) -> list[Table]:
    family = view.lead
    if not any(cell.kind == "noise" and cell.family == family for cell in view.report.cells):
        return []
    means = {run: summary.differences for run, summary in view.summaries.items()}
    robust = {e.run: e for e in view.report.robustness if e.family == family and not e.noise}
    costs = {
        e.run: e.differences for e in view.report.interactions if (e.family, e.kind, e.task) == (family, "noise", "")
    }
    columns = [_change_column(view.metrics[key], means) for key in _SUMMARY]
    heads = [Head(f"mean change over {view.n_conditions} conditions", len(columns))]
    if robust:
        kept = Column("Kept", "%", "mean over severities and noises of accuracy in noise / accuracy clean", "higher")
        error = Column("mqCE", "%", "errors in noise as a share of full precision's, mean over the noises", "lower")
        columns.append((kept, _value_getter({run: e.relative for run, e in robust.items()})))
        columns.append((error, _value_getter({run: e.quantization_error for run, e in robust.items()})))
        heads.append(Head("robustness", 2))
    if costs:
        columns += [_change_column(view.metrics[key], costs) for key in _COSTS]
        heads.append(Head("noise costs it more than full precision by", len(_COSTS)))
    caption = f"{view.lead_title}: all noises and severities together. Changes in points."
    return [view.table(f"{view.id}-noise", caption, columns, heads)]


def _severity(view: BoardView) -> list[Table]:
    first = {task: cells[0] for task, cells in view.by_task.items()}
    tasks = [
        task
        for task in view.tasks
        if first[task].family == view.lead and not first[task].full and first[task].kind in ("clean", "noise")
    ]
    if not any(first[task].kind == "noise" for task in tasks):
        return []
    shown = _at_most(tasks, first)
    names = [condition_name(first[t].kind, first[t].noise, 0, first[t].variant) for t in shown]
    heads = [Head(name, len(list(same))) for name, same in groupby(names)]
    tables = []
    for key in ("accuracy", "aurc", "coverage_at_risk_5"):
        metric = dict(view.metric_columns(first[shown[0]])).get(key, view.metrics[key])
        columns = [_severity_column(view, task, key, metric) for task in shown]
        caption = f"{metric.title}: full precision by its value, the others by their change."
        if len(shown) < len(tasks):
            caption += " Each noise at its highest severity; the others are on the pages of the tasks."
        tables.append(view.table(f"{view.id}-severity-{slug(key)}", caption, columns, heads))
    return tables


def _severity_column(view: BoardView, task: str, key: str, metric: MetricEntry) -> tuple[Column, Getter]:
    def get(run: RunEntry) -> Markup | None:
        cell = view.cells.get((run.id, task))
        return change_cell(cell.metrics[key], metric.unit) if cell else None

    severity = view.by_task[task][0].severity
    return replace(column_of(metric), title=str(severity) if severity else "–", definition=task), get


def _shift(view: BoardView) -> list[Table]:
    costs: dict[str, dict[str, Mapping[str, DifferenceEntry]]] = {}
    for cost in view.report.interactions:
        if cost.kind == "shift":
            costs.setdefault(cost.task, {})[cost.run] = cost.differences
    risks: dict[str, dict[str, ValueEntry]] = {}
    coverages: dict[str, dict[str, ValueEntry]] = {}
    for entry in view.report.transfers:
        cell = view.cells.get((entry.run, entry.task))
        if cell and entry.risk_target == TRANSFER_RISK and entry.confidence == cell.confidence_name:
            risks.setdefault(entry.task, {})[entry.run] = entry.risk
            coverages.setdefault(entry.task, {})[entry.run] = entry.coverage
    tables = []
    for task in view.tasks:
        first = view.by_task[task][0]
        if first.kind != "shift" and not first.shift_from:
            continue
        metrics = dict(view.metric_columns(first))
        columns = [view.metric_column(task, key, metrics.get(key, view.metrics[key])) for key in _SHIFT]
        if task in costs:
            column = Column("Shift costs more by", "points", "accuracy: what the shift costs beyond full precision")
            columns.append((column, _difference_getter(costs[task], "accuracy")))
        if task in risks:
            taken = Column("Risk taken", "%", "with the threshold of 5 % risk on clean full precision", "lower")
            columns.append((taken, _value_getter(risks[task])))
            columns.append((Column("Coverage", "%", "with that threshold", "higher"), _value_getter(coverages[task])))
        shifted = f", shifted from {first.shift_from}" if first.shift_from else ""
        caption = f"{task}{shifted}: {span(cell.n for cell in view.by_task[task])} samples."
        tables.append(view.table(f"{view.id}-shift-{slug(task)}", caption, columns))
    return tables


def _confidences(view: BoardView) -> list[Table]:
    """One table for each further confidence on the main task."""
    task = view.main_task
    found: dict[str, dict[str, ConfidenceEntry]] = {}
    for cell in view.by_task.get(task, []):
        for entry in cell.confidences:
            found.setdefault(entry.name, {})[cell.run] = entry
    tables = []
    for name, entries in found.items():
        columns = []
        for key in _CONFIDENCE:
            metric = view.metrics[key]
            values = {run: entry.metrics[key] for run, entry in entries.items() if key in entry.metrics}
            columns.append((column_of(metric), _value_getter(values)))
        beside = {run: entry.beside for run, entry in entries.items()}
        columns += [_change_column(view.metrics[key], beside) for key in _BESIDE]
        title = confidence_title(name)
        heads = [Head(title, len(_CONFIDENCE)), Head("minus the primary confidence", len(_BESIDE))]
        caption = f"{task}: the same answers by {title}."
        tables.append(view.table(f"{view.id}-confidence-{slug(name)}", caption, columns, heads))
    return tables


def _change_column(
    metric: MetricEntry, differences: Mapping[str, Mapping[str, DifferenceEntry]]
) -> tuple[Column, Getter]:
    return column_of(metric), _difference_getter(differences, metric.key)


def _difference_getter(differences: Mapping[str, Mapping[str, DifferenceEntry]], key: str) -> Getter:
    def get(run: RunEntry) -> Markup | None:
        found = differences.get(run.id, {}).get(key)
        return difference_cell(found, "percent") if found else None

    return get


def _value_getter(values: Mapping[str, ValueEntry]) -> Getter:
    def get(run: RunEntry) -> Markup | None:
        return value_cell(values[run.id], "percent") if run.id in values else None

    return get


def _at_most(tasks: Sequence[str], first: Mapping[str, CellEntry]) -> list[str]:
    """The tasks, or of each noise the one of the highest severity where they are too many."""
    if len(tasks) <= MOST_COLUMNS:
        return list(tasks)
    highest: dict[str, str] = {}
    for task in tasks:
        noise = first[task].noise
        if noise not in highest or first[task].severity > first[highest[noise]].severity:
            highest[noise] = task
    return [task for task in tasks if task in set(highest.values())]
