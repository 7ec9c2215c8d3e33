"""Arranges a report for reading: worlds, families, conditions, and which run stands in which row."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from bitquake.reports import charts
from bitquake.reports.formatting import condition_name, interval, number, value_text
from bitquake.reports.schema import (
    CellEntry,
    CurvePoint,
    DifferenceEntry,
    MetricEntry,
    Report,
    RunEntry,
    SummaryEntry,
    ValueEntry,
)

PAIR_METRICS = (
    *("accuracy", "ece_15", "ece_mass_15", "brier", "aurc"),
    *("coverage_at_risk_1", "coverage_at_risk_5", "coverage_at_risk_10", "coverage_at_risk_20"),
    *("phi_1", "phi_10", "phi_100"),
)
OVERVIEW_METRICS = ("accuracy", "aurc", "ece_15")
# More columns than a reader can follow: then each noise stands with its highest severity only.
MOST_OVERVIEW_COLUMNS = 16
# With more pairs of a family and a full-precision model than this, charts stand on the families' pages only.
MOST_INDEX_CHARTS = 6
WORLDS = {
    "real": ("Real datasets", ""),
    "block": (
        "Block world",
        "Pictures drawn by Bitquake itself, answered by its small reference models. They show what quantization does "
        "to a real network and that every stage works; they say nothing about a large model on a public benchmark.",
    ),
}


@dataclass(frozen=True)
class Row:
    """A run in a condition's pair table."""

    run: RunEntry
    cell: CellEntry


@dataclass(frozen=True)
class RowGroup:
    """A full-precision run with the runs that are paired with it, or a run without a pair."""

    key: str
    label: str
    twin: RunEntry | None
    rows: list[Row]
    refused: str


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and the numbers behind it."""

    title: str
    subtitle: str
    chart: Markup
    head: list[str]
    table: list[list[str]]


@dataclass(frozen=True)
class Legend:
    name: str
    swatch: Markup


@dataclass(frozen=True)
class ConditionView:
    """All runs on one task."""

    id: str
    name: str
    task: str
    groups: list[RowGroup]
    sizes: str
    notes: list[str]


@dataclass(frozen=True)
class FamilyView:
    """All conditions of one family; ``main`` is the clean task where there is one."""

    key: str
    title: str
    page: str
    main: ConditionView
    conditions: list[ConditionView]


@dataclass(frozen=True)
class Head:
    """A table head over several columns."""

    text: str
    span: int


@dataclass(frozen=True)
class OverviewRow:
    run: RunEntry
    values: list[ValueEntry | None]


@dataclass(frozen=True)
class Overview:
    """One metric over all conditions: full precision by its value, the others by their change."""

    metric: MetricEntry
    families: list[Head]
    noises: list[Head]
    severities: list[str]
    groups: list[tuple[RunEntry, list[OverviewRow]]]
    left_out: int


@dataclass(frozen=True)
class Glance:
    """A run's mean change over the conditions of a family."""

    run: RunEntry
    summary: SummaryEntry
    differences: list[DifferenceEntry | None]

    @property
    def rank(self) -> str:
        low, high = self.summary.rank_lo, self.summary.rank_hi
        return "" if low is None else f"{low}" if low == high else f"{low}–{high}"


@dataclass(frozen=True)
class WorldView:
    key: str
    title: str
    note: str
    glances: list[tuple[str, list[Glance]]]
    overviews: list[Overview]
    families: list[FamilyView]


class Arrangement:
    """Finds its way through a report: runs by id, metrics by key, cells by what they are about."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.runs = {run.id: run for run in report.runs}
        self.metrics = {metric.key: metric for metric in report.metrics}
        self.pair_metrics = [self.metrics[key] for key in PAIR_METRICS]
        members: dict[str, list[str]] = {}
        for run in report.runs:
            members.setdefault(group_key(run), []).append(run.id)
        self.styles = {run: index if len(ids) > 1 else 0 for ids in members.values() for index, run in enumerate(ids)}
        self.worlds = [self.world(key) for key in WORLDS if any(cell.world == key for cell in report.cells)]

    @property
    def charts_on_index(self) -> bool:
        shown = {(cell.world, cell.family, group_key(self.runs[cell.run])) for cell in self.report.cells}
        return len(shown) <= MOST_INDEX_CHARTS

    def world(self, key: str) -> WorldView:
        cells = [cell for cell in self.report.cells if cell.world == key]
        title, note = WORLDS[key]
        families = [
            self.family(key, family, [cell for cell in cells if cell.family == family])
            for family in sorted({cell.family for cell in cells}, key=lambda f: self.family_order(cells, f))
        ]
        overviews = [self.overview(self.metrics[metric], cells, families) for metric in OVERVIEW_METRICS]
        return WorldView(key, title, note, self.glances(key, families), overviews, families)

    @staticmethod
    def family_order(cells: Sequence[CellEntry], family: str) -> tuple[int, str]:
        """Families with many conditions first: those that only serve as a shift come after what they are a shift of."""
        return (-len({cell.task for cell in cells if cell.family == family}), family)

    def family(self, world: str, family: str, cells: Sequence[CellEntry]) -> FamilyView:
        order = {cell.task: condition_order(cell) for cell in cells}
        tasks = sorted(order, key=lambda task: order[task])
        conditions = [self.condition([cell for cell in cells if cell.task == task]) for task in tasks]
        page = f"{slug(family if family.startswith(world) else f'{world}-{family}')}.html"
        return FamilyView(family, family.replace("_", " "), page, conditions[0], conditions)

    def condition(self, cells: Sequence[CellEntry]) -> ConditionView:
        first = cells[0]
        groups = []
        for key, rows in self.by_group(cells):
            head = self.runs[key]
            twin = head if head.role == "full-precision" else None
            groups.append(RowGroup(key, head.label, twin, rows, head.refused))
        n = sorted({cell.n for cell in cells})
        images = sorted({cell.n_clusters for cell in cells})
        notes = [f"Compared on {cell.common} only: the runs hold different samples." for cell in cells if cell.common]
        cautions: dict[str, str] = {}
        missing: dict[str, dict[str, None]] = {}
        for cell in cells:
            for metric in self.pair_metrics:
                value = cell.metrics[metric.key]
                if value.value is None:
                    missing.setdefault(value.note, {})[metric.title] = None
                elif value.caution:
                    cautions.setdefault(metric.key, value.caution)
            if cell.n_missing_confidence:
                notes.append(f"{self.runs[cell.run].name}: {cell.n_missing_confidence} samples without a confidence.")
            if cell.reason:
                notes.append(f"{self.runs[cell.run].name} stands without a comparison: {cell.reason}.")
        notes += [f"{', '.join(titles)} not available: {note}." for note, titles in missing.items()]
        if cautions:
            notes.append(f"† Shown, but not to be ranked by: {'; '.join(cautions.values())}.")
        name = condition_name(first.kind, first.noise, first.severity, first.variant)
        sizes = f"{_span(n)} samples, {_span(images)} images, confidence: {first.confidence_name}"
        return ConditionView(slug(first.task), name, first.task, groups, sizes, list(dict.fromkeys(notes)))

    def by_group(self, cells: Sequence[CellEntry]) -> list[tuple[str, list[Row]]]:
        position = {run: index for index, run in enumerate(self.runs)}
        rows = [Row(self.runs[c.run], c) for c in sorted(cells, key=lambda c: position[c.run])]
        return [(key, list(group)) for key, group in groupby(rows, key=lambda row: group_key(row.run))]

    def glances(self, world: str, families: Sequence[FamilyView]) -> list[tuple[str, list[Glance]]]:
        found = []
        for family in families:
            rows = [
                Glance(self.runs[s.run], s, [s.differences.get(metric) for metric in OVERVIEW_METRICS])
                for s in self.report.summaries
                if s.world == world and s.family == family.key
            ]
            if rows and len(family.conditions) > 1:
                found.append((f"{family.title}, mean over {len(family.conditions)} conditions", rows))
        return found

    def overview(self, metric: MetricEntry, cells: Sequence[CellEntry], families: Sequence[FamilyView]) -> Overview:
        first = {cell.task: cell for cell in cells}
        tasks = [condition.task for family in families for condition in family.conditions]
        chosen = _columns([first[task] for task in tasks])
        shown = [first[task] for task in chosen]
        by_place = {(cell.run, cell.task): cell.metrics[metric.key] for cell in cells}
        with_cells = {cell.run for cell in cells}
        groups: dict[str, list[OverviewRow]] = {}
        for run in self.report.runs:
            if run.id in with_cells:
                row = OverviewRow(run, [by_place.get((run.id, task)) for task in chosen])
                groups.setdefault(group_key(run), []).append(row)
        return Overview(
            metric,
            [Head(f.replace("_", " "), len(list(g))) for f, g in groupby(shown, key=lambda c: c.family)],
            [Head(name, len(list(g))) for (_, name), g in groupby(shown, key=lambda c: (c.family, _noise_head(c)))],
            [str(cell.severity) if cell.kind == "noise" and cell.severity else "" for cell in shown],
            [(self.runs[key], rows) for key, rows in groups.items()],
            len(tasks) - len(chosen),
        )

    def legend(self, group: RowGroup) -> list[Legend]:
        return [Legend(row.run.quantization, charts.swatch(self.styles[row.run.id])) for row in group.rows]

    def severity_figures(self, family: FamilyView, group: RowGroup) -> list[Figure]:
        """For each noise the overview metrics against severity, with the clean task as severity 0."""
        ids = [row.run.id for row in group.rows]
        groups = [g for condition in family.conditions for g in condition.groups if g.key == group.key]
        cells = {(row.cell.task, row.run.id): row.cell for g in groups for row in g.rows}
        clean = {cell.run: cell for cell in cells.values() if cell.kind == "clean"}
        figures = []
        for noise in sorted({cell.noise for cell in cells.values() if cell.kind == "noise"}):
            for metric in (self.metrics[key] for key in OVERVIEW_METRICS):
                lines, table = [], []
                for run in ids:
                    name = self.runs[run].quantization
                    own = [c for (_, r), c in cells.items() if r == run and c.kind == "noise" and c.noise == noise]
                    own = [*([clean[run]] if run in clean else []), *sorted(own, key=lambda c: c.severity)]
                    points = [point for cell in own if (point := _point(cell, metric.key))]
                    if points:
                        lines.append(charts.Line(name, self.styles[run], points))
                    for cell in own:
                        value = value_text(cell.metrics[metric.key], metric.unit)
                        table.append([name, str(cell.severity or "clean"), value])
                if any(len(line.points) > 1 for line in lines):
                    title, label = f"{metric.title} under {noise.replace('_', ' ')}", f"{metric.title}, %"
                    ends = [[number(p.y, "percent") for p in (line.points[0], line.points[-1])] for line in lines]
                    words = "; ".join(f"{line.name} from {a} to {b}" for line, (a, b) in zip(lines, ends, strict=True))
                    chart = charts.severity_chart(title, f"In percent, with 95 % intervals: {words}.", label, lines)
                    figures.append(Figure(title, "", chart, ["Quantization", "Severity", label], table))
        return figures

    def risk_coverage_figure(self, condition: ConditionView, group: RowGroup) -> Figure | None:
        rows = [row for row in group.rows if row.cell.curve]
        if not rows:
            return None
        title = f"Risk–coverage, {condition.name}"
        described = "; ".join(
            f"{row.run.quantization} AURC {value_text(row.cell.metrics['aurc'], 'percent')} %" for row in rows
        )
        curves = [(row.run.quantization, self.styles[row.run.id], row.cell.curve) for row in rows]
        table = []
        for row in rows:
            for p in _thinned(row.cell.curve, 10):
                numbers = [number(p.coverage, "percent"), number(p.risk, "percent"), number(p.threshold, "fraction")]
                table.append([row.run.quantization, *numbers])
        return Figure(
            title,
            "lower is better",
            charts.risk_coverage_chart(title, f"Lower is better. {described}.", curves),
            ["Quantization", "Coverage, %", "Risk, %", "Answered from confidence"],
            table,
        )

    def reliability_figures(self, condition: ConditionView, group: RowGroup) -> list[Figure]:
        figures = []
        for row in group.rows:
            if not row.cell.bins:
                continue
            title = f"{row.run.quantization}, {condition.name}"
            subtitle = f"ECE {value_text(row.cell.metrics['ece_15'], 'percent')} %"
            if row.cell.chance_ece is not None:
                subtitle += f", by chance {number(row.cell.chance_ece, 'percent')}"
            described = f"Accuracy against confidence in bins; calibrated on the diagonal. {subtitle}."
            table = []
            for b in row.cell.bins:
                bounds = f"{number(b.lower, 'percent', digits=0)}–{number(b.upper, 'percent', digits=0)}"
                score = number(b.score, "percent")
                if b.lo is not None and b.hi is not None:
                    score += f" {interval(b.lo, b.hi, 'percent')}"
                table.append([bounds, str(b.count), number(b.confidence, "percent"), score])
            chart = charts.reliability_chart(title, described, row.cell.bins, self.styles[row.run.id])
            figures.append(Figure(title, subtitle, chart, ["Bin, %", "Samples", "Confidence, %", "Accuracy, %"], table))
        return figures

    def failure_rows(self) -> list[tuple[RunEntry, CellEntry, str]]:
        """Cells with failed samples, and why they failed."""
        return [
            (self.runs[cell.run], cell, ", ".join(f"{name} {count}" for name, count in cell.failures.items()))
            for cell in self.report.cells
            if cell.failures
        ]

    def answer_counts(self) -> list[tuple[RunEntry, Counter[str]]]:
        """Per run: samples, failures, answers that could not be parsed, answers cut at the token limit."""
        counts: dict[str, Counter[str]] = {}
        for cell in self.report.cells:
            counts.setdefault(cell.run, Counter()).update(
                samples=cell.n,
                failed=sum(cell.failures.values()),
                parse_failures=cell.parse_failures,
                truncated=cell.truncated,
            )
        return [(run, counts[run.id]) for run in self.report.runs if run.id in counts]


def group_key(run: RunEntry) -> str:
    """Id of the run that heads this run's group."""
    return run.twin or run.id


def slug(text: str) -> str:
    """A safe, short and unique name for files and anchors."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain and plain == text.replace("_", "-") and len(plain) <= 60:
        return plain
    return f"{plain[:50]}-{hashlib.blake2b(text.encode(errors='replace'), digest_size=4).hexdigest()}".lstrip("-")


def condition_order(cell: CellEntry) -> tuple[int, str, int, str]:
    """Sorts conditions: clean, the noises by severity, the shifts."""
    return (("clean", "noise", "shift").index(cell.kind), cell.noise, cell.severity, cell.task)


def _columns(cells: Sequence[CellEntry]) -> list[str]:
    """Tasks that an overview shows: all, or of each noise the highest severity only where all are too many."""
    if len(cells) <= MOST_OVERVIEW_COLUMNS:
        return [cell.task for cell in cells]
    highest: dict[tuple[str, str], CellEntry] = {}
    for cell in cells:
        best = highest.setdefault((cell.family, cell.noise), cell)
        if cell.severity > best.severity:
            highest[cell.family, cell.noise] = cell
    return [cell.task for cell in cells if cell.kind != "noise" or highest[cell.family, cell.noise] is cell]


def _noise_head(cell: CellEntry) -> str:
    return condition_name(cell.kind, cell.noise, 0, cell.variant)


def _point(cell: CellEntry, key: str) -> charts.Point | None:
    value = cell.metrics[key]
    if value.value is None or value.lo is None or value.hi is None:
        return None
    return charts.Point(float(cell.severity), value.value, value.lo, value.hi)


def _thinned(items: Sequence[CurvePoint], step: int) -> list[CurvePoint]:
    return [*items[:-1:step], items[-1]]


def _span(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,} to {ordered[-1]:,}"
