"""What the page of one submission shows: every condition, its charts, and what becomes of its thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitquake.leaderboard.board_file import of_runs
from bitquake.leaderboard.views import BoardView, Column, value_cell
from bitquake.reports import formatting
from bitquake.reports.figures import Figure, Legend
from bitquake.reports.reliability import Section, group_sections, home
from bitquake.reports.schema import CellEntry, Report, RunEntry
from bitquake.reports.views import (
    CAUTION,
    Arrangement,
    FamilyView,
    RowGroup,
    caution_note,
    condition_order,
    slug,
)

MOST_OPEN_FIGURES = 12


@dataclass(frozen=True)
class ConditionRow:
    name: str
    page: str
    n: int
    cells: list[Markup]


@dataclass(frozen=True)
class FigureGroup:
    """Charts under one heading; folded where they are many."""

    title: str
    figures: list[Figure]
    open: bool


@dataclass(frozen=True)
class FamilySection:
    id: str
    title: str
    columns: list[Column]
    rows: list[ConditionRow]
    notes: list[str]
    legend: list[Legend]
    groups: list[FigureGroup]
    sections: list[Section]


@dataclass(frozen=True)
class FailureRow:
    """Counts of samples in one condition: all, failed, not parsed, cut at the token limit, without a confidence."""

    name: str
    why: str
    counts: tuple[int, int, int, int, int]


@dataclass(frozen=True)
class ModelPage:
    families: list[FamilySection]
    failures: list[FailureRow]


def model_page(view: BoardView, report: Report, run: RunEntry) -> ModelPage:
    """The page of a run. report: with the points of curves and diagrams, and with the run's twin where it has one."""
    own = of_runs(report, [run.id] + ([run.twin] if run.twin else []))
    arrangement = Arrangement(own)
    families = [_family(view, arrangement, family, run) for world in arrangement.worlds for family in world.families]
    cells = sorted((cell for cell in own.cells if cell.run == run.id), key=condition_order)
    return ModelPage([family for family in families if family.rows], _failures(cells))


def _family(view: BoardView, arrangement: Arrangement, family: FamilyView, run: RunEntry) -> FamilySection:
    rows: list[ConditionRow] = []
    notes: dict[str, None] = {}
    cautions: set[str] = set()
    columns: list[Column] = []
    group: RowGroup | None = None
    for condition in family.conditions:
        for candidate in condition.groups:
            for row in candidate.rows:
                if row.run.id != run.id:
                    continue
                group = group or candidate
                metrics = view.metric_columns(row.cell)
                made = [value_cell(row.cell.metrics[key], metric.unit) for key, metric in metrics]
                made.insert(1, value_cell(row.cell.parse_failure_rate, "percent"))
                page = view.task_page(condition.task)
                rows.append(ConditionRow(condition.name, page, row.cell.n, made))
                columns = columns or view.columns(metrics)
                # Those of a condition name every figure of the report; here they are said once, of the figures shown.
                notes.update(dict.fromkeys(note for note in condition.notes if not note.startswith(CAUTION)))
                cautions |= {row.cell.metrics[key].caution for key, _ in metrics} - {""}
    if cautions:
        notes[caution_note(sorted(cautions))] = None
    if group is None:
        return FamilySection("", family.title, columns, rows, [], [], [], [])
    severities = [figure for noise in family.noises for figure in arrangement.severity_figures(family, noise, group)]
    groups = [FigureGroup("Severity", severities, len(severities) <= MOST_OPEN_FIGURES)] if severities else []
    for condition in family.plain:
        for candidate in condition.groups:
            if any(row.run.id == run.id for row in candidate.rows):
                curve = arrangement.risk_coverage_figure(condition, candidate)
                figures = [curve] if curve else []
                figures += arrangement.reliability_figures(condition, candidate)
                if figures:
                    groups.append(FigureGroup(f"Risk, coverage and calibration, {condition.name}", figures, True))
    legend = arrangement.legend(group)
    identifier = f"family-{slug(family.key)}"
    report = arrangement.report
    about = [cell for cell in report.cells if home(cell, report) == family.key]
    sections = group_sections(report, family.key, about, f"{identifier}-") if about else []
    return FamilySection(identifier, family.title, columns, rows, list(notes), legend, groups, sections)


def _failures(cells: Sequence[CellEntry]) -> list[FailureRow]:
    """Conditions in which anything failed."""
    rows = []
    for cell in cells:
        counts = (cell.n, sum(cell.failures.values()), cell.parse_failures, cell.truncated, cell.n_missing_confidence)
        if any(counts[1:]):
            condition = formatting.condition_name(cell.kind, cell.noise, cell.severity, cell.variant, full=cell.full)
            why = ", ".join(f"{name} {count}" for name, count in sorted(cell.failures.items()))
            rows.append(FailureRow(f"{cell.family.replace('_', ' ')}, {condition}", why, counts))
    return rows
