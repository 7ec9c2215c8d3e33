"""Arranges a board for reading: which tables there are, which rows they hold, and in which order.

A table is one kind of view (clean, noise, severity, shift, confidences, or one task) of all pairs of a board. Its cells
are made here, of numbers only; everything that stands in a submission's text fields goes through the templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from bitquake.leaderboard.board_file import BoardEntry, SubmissionEntry, TaskEntry
from bitquake.reports import formatting
from bitquake.reports.schema import (
    CellEntry,
    DifferenceEntry,
    MetricEntry,
    Report,
    RunEntry,
    Unit,
    ValueEntry,
)
from bitquake.reports.views import WORLDS, caution_note, condition_order, slug

BOARD_METRICS = (
    *("accuracy", "aurc", "coverage_at_risk_1", "coverage_at_risk_5", "phi_10", "phi_100"),
    *("rmsce_debiased_15", "ece_15"),
)
MOST_CHARTED = 8
"""Runs in one chart of a task's page: as many as there are marks that can be told apart."""
NOT_AVAILABLE = Markup('<td class="na">n/a</td>')


@dataclass(frozen=True)
class Column:
    """A column of numbers. better: ``higher``, ``lower`` or "" where neither is."""

    title: str
    unit: str
    definition: str
    better: str = ""


@dataclass(frozen=True)
class Head:
    """A heading over several columns."""

    text: str
    span: int


@dataclass(frozen=True)
class Row:
    """One submission in a table; cells: whole ``<td>`` elements."""

    submission: SubmissionEntry
    run: RunEntry
    cells: Markup


@dataclass(frozen=True)
class Table:
    """A table over the pairs of a board; twins: the full-precision runs, which stay on top."""

    id: str
    caption: str
    heads: list[Head]
    columns: list[Column]
    twins: list[Row]
    rows: list[Row]


@dataclass(frozen=True)
class ViewPage:
    """A view of a board on a page of its own."""

    key: str
    title: str
    page: str
    lead: str
    tables: list[Table]


@dataclass(frozen=True)
class TaskView:
    """One task of a board: its facts, and all pairs on it."""

    entry: TaskEntry
    cell: CellEntry | None
    name: str
    page: str
    table: Table | None
    notes: list[str] = field(default_factory=list)


Getter = Callable[[RunEntry], "Markup | None"]
"""A run's cell in a column; None where it has none."""
NOT_PARSED = Column("Not parsed", "%", "share of answers without the expected form; they score 0", "lower")


class BoardView:
    """Finds its way through one board."""

    def __init__(self, entry: BoardEntry) -> None:
        self.entry = entry
        self.report: Report = entry.report
        self.world_title, self.world_note = WORLDS[entry.world]
        self.id = slug(entry.board)
        self.submissions = {submission.name: submission for submission in entry.submissions}
        self.runs = {run.id: run for run in self.report.runs}
        self.metrics = {metric.key: metric for metric in self.report.metrics}
        self.cells = {(cell.run, cell.task): cell for cell in self.report.cells}
        self.by_task: dict[str, list[CellEntry]] = {}
        for cell in self.report.cells:
            self.by_task.setdefault(cell.task, []).append(cell)
        self.tasks = sorted(self.by_task, key=lambda task: condition_order(self.by_task[task][0]))
        self.families = _most_first(self.by_task[task][0].family for task in self.tasks)
        self.lead = self.families[0] if self.families else ""
        self.summaries = {s.run: s for s in self.report.summaries if s.family == self.lead}
        self.order = self._order()

    def _order(self) -> list[RunEntry]:
        """The best retention of reliability first: by the mean change of AURC in the leading family."""
        clean = f"{self.lead}_clean"

        def change(run: RunEntry) -> float:
            summary = self.summaries.get(run.id)
            cell = self.cells.get((run.id, clean))
            found = summary.differences.get("aurc") if summary else cell.metrics["aurc"].difference if cell else None
            return found.delta if found else float("inf")

        return sorted(self.runs.values(), key=lambda run: (change(run), -_bits(run), run.id))

    @property
    def n_conditions(self) -> int:
        return max((summary.n_conditions for summary in self.summaries.values()), default=0)

    @property
    def lead_title(self) -> str:
        return self.lead.replace("_", " ")

    def rank(self, run: RunEntry) -> str:
        """The range of ranks in the leading family among the quantizations of the same model, such as ``1–3``."""
        summary = self.summaries.get(run.id)
        if summary is None or summary.rank_lo is None or summary.rank_hi is None:
            return ""
        low, high = summary.rank_lo, summary.rank_hi
        return f"{low}" if low == high else f"{low}–{high}"

    def metric_columns(self, cell: CellEntry | None) -> list[tuple[str, MetricEntry]]:
        """Keys and definitions of the main columns, the accuracy under the name that the task's protocol gives it."""
        metrics = [(key, self.metrics[key]) for key in BOARD_METRICS]
        if cell is not None:
            update = {"title": cell.headline, "unit": cell.headline_unit}
            metrics[0] = ("accuracy", metrics[0][1].model_copy(update=update))
        return metrics

    @staticmethod
    def columns(metrics: Sequence[tuple[str, MetricEntry]]) -> list[Column]:
        """The main columns: the metrics, with the answers that could not be parsed after the accuracy."""
        found = [column_of(metric) for _, metric in metrics]
        return [*found[:1], NOT_PARSED, *found[1:]]

    def task_page(self, task: str) -> str:
        return f"task--{self.id}--{slug(task)}.html"

    def name_of(self, task: str) -> str:
        """A task for people, such as ``block vqav2: frost 3``."""
        if task not in self.by_task:
            return task.replace("_", " ")
        first = self.by_task[task][0]
        name = formatting.condition_name(first.kind, first.noise, first.severity, first.variant, full=first.full)
        return f"{first.family.replace('_', ' ')}: {name}"

    def table(
        self,
        identifier: str,
        caption: str,
        columns: Sequence[tuple[Column, Getter]],
        heads: Sequence[Head] = (),
        *,
        every_run: bool = False,
    ) -> Table:
        """A table of the runs that have a number in it, or of every run."""
        twins: list[Row] = []
        rows: list[Row] = []
        for run in self.order:
            cells = [get(run) for _, get in columns]
            if every_run or any(cell is not None for cell in cells):
                made = Markup("").join(NOT_AVAILABLE if cell is None else cell for cell in cells)
                (twins if run.role == "full-precision" else rows).append(Row(self.submissions[run.id], run, made))
        return Table(identifier, caption, list(heads), [column for column, _ in columns], twins, rows)

    def metric_column(self, task: str, key: str, metric: MetricEntry) -> tuple[Column, Getter]:
        """A metric on a task."""

        def get(run: RunEntry) -> Markup | None:
            cell = self.cells.get((run.id, task))
            return value_cell(cell.metrics[key], metric.unit) if cell else None

        return column_of(metric), get

    def task_table(self, task: str, *, every_run: bool = False) -> Table:
        """All pairs on one task; every_run: those without numbers on it too."""
        first = self.by_task[task][0]
        columns = [self.metric_column(task, key, metric) for key, metric in self.metric_columns(first)]

        def unparsed(run: RunEntry) -> Markup | None:
            cell = self.cells.get((run.id, task))
            return value_cell(cell.parse_failure_rate, "percent") if cell else None

        columns.insert(1, (NOT_PARSED, unparsed))
        n, images = span(c.n for c in self.by_task[task]), span(c.n_clusters for c in self.by_task[task])
        caption = f"{task}: {n} samples, {images} images, confidence: {first.confidence_name}."
        return self.table(f"{self.id}-{slug(task)}", caption, columns, every_run=every_run)

    @property
    def main_task(self) -> str:
        """The task of the table on the first page: the clean one of the leading family, or else the first."""
        clean = f"{self.lead}_clean"
        return clean if clean in self.by_task else self.tasks[0] if self.tasks else ""

    def main_table(self) -> Table:
        """The board's table on the first page, with a row for each submission, even one without numbers."""
        if self.main_task:
            return self.task_table(self.main_task, every_run=True)
        return self.table(f"{self.id}-main", "No submission has numbers yet.", [], every_run=True)

    def task_views(self) -> list[TaskView]:
        """The board's tasks in reading order: those with numbers, then the others."""
        entries = {entry.task: entry for entry in self.entry.tasks}
        others = [task for task in entries if task not in self.by_task]
        return [self.task_view(entries[task]) for task in [*(t for t in self.tasks if t in entries), *others]]

    def task_view(self, entry: TaskEntry) -> TaskView:
        name, page = self.name_of(entry.task), self.task_page(entry.task)
        cells = self.by_task.get(entry.task)
        if not cells:
            return TaskView(entry, None, name, page, None)
        notes = []
        shown = [cell.metrics[key] for cell in cells for key in BOARD_METRICS]
        cautions = {value.caution for value in shown if value.caution}
        if cautions:
            notes.append(caution_note(sorted(cautions)))
        missing = {
            value.note for cell in cells for value in cell.metrics.values() if value.value is None and value.note
        }
        notes += [f"Not available: {note}." for note in sorted(missing)]
        return TaskView(entry, cells[0], name, page, self.task_table(entry.task), notes)

    def charted(self, task: str) -> list[list[str]]:
        """Ids of the runs that share a chart of a task: each full-precision run with its best quantizations."""
        groups: dict[str, list[str]] = {}
        for run in self.order:
            if (run.id, task) in self.cells:
                groups.setdefault(run.twin or run.id, []).append(run.id)
        return [
            [head, *(run for run in members if run != head)][:MOST_CHARTED]
            for head, members in groups.items()
            if head in members
        ]


def value_cell(value: ValueEntry | None, unit: Unit, *, css: str = "") -> Markup:
    """A value with its interval, and its change against full precision with its own; css: where there is no change."""
    if value is None or value.value is None or value.lo is None or value.hi is None:
        return NOT_AVAILABLE
    d = value.difference
    css = formatting.effect_class(d, unit) if d else css
    named = f' class="{css}"' if css else ""
    mark = "<sup>†</sup>" if value.caution else ""
    shown = f"<b>{formatting.number(value.value, unit)}{mark}</b>"
    limits = f"<small>{formatting.interval(value.lo, value.hi, unit)}</small>"
    return Markup(f"<td{named}>{shown}{limits}{_difference(d, unit) if d else ''}</td>")  # noqa: S704 - numbers only


def difference_cell(difference: DifferenceEntry | None, unit: Unit) -> Markup:
    """A difference with its interval and what it means."""
    if difference is None:
        return NOT_AVAILABLE
    css = formatting.effect_class(difference, unit)
    return Markup(f'<td class="{css}">{_difference(difference, unit)}</td>')  # noqa: S704 - numbers only


def change_cell(value: ValueEntry | None, unit: Unit) -> Markup:
    """The change against full precision, or the value where there is none."""
    return difference_cell(value.difference, unit) if value and value.difference else value_cell(value, unit)


def _difference(d: DifferenceEntry, unit: Unit) -> str:
    shown = f"{formatting.delta(d, unit)} <i>{formatting.effect_word(d)}</i>"
    return f'<span class="d">{shown}</span><small>{formatting.delta_interval(d, unit)}</small>'


def column_of(metric: MetricEntry) -> Column:
    return Column(metric.title, _unit(metric.unit), metric.definition, _better(metric))


def _better(metric: MetricEntry) -> str:
    return "" if metric.higher_is_better is None else "higher" if metric.higher_is_better else "lower"


def _unit(unit: Unit) -> str:
    return {"percent": "%", "fraction": "0–1", "nats": "nats", "tenths": ""}[unit]


def _bits(run: RunEntry) -> float:
    return (run.card.effective_bpw if run.card else None) or 0.0


def _most_first(families: Iterable[str]) -> list[str]:
    counts: dict[str, int] = {}
    for family in families:
        counts[family] = counts.get(family, 0) + 1
    return sorted(counts, key=lambda family: (-counts[family], family))


def span(numbers: Iterable[int]) -> str:
    ordered = sorted(set(numbers))
    return f"{ordered[0]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,} to {ordered[-1]:,}"
