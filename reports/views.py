"""Arranges a report for reading: worlds, families, conditions, and which run stands in which row."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from bitquake.reports import charts, scores
from bitquake.reports.figures import Figure, Legend
from bitquake.reports.formatting import SCALE, condition_name, interval, number, value_text
from bitquake.reports.schema import (
    CellEntry,
    CurvePoint,
    DifferenceEntry,
    MetricEntry,
    Report,
    RunEntry,
    ScoreEntry,
    SummaryEntry,
    Unit,
    ValueEntry,
)

PAIR_METRICS = (
    *("accuracy", "ece_15", "ece_mass_15", "brier", "aurc"),
    *("coverage_at_risk_1", "coverage_at_risk_5", "coverage_at_risk_10", "coverage_at_risk_20"),
    *("phi_1", "phi_10", "phi_100"),
)
OVERVIEW_METRICS = ("accuracy", "aurc", "ece_15")
# More columns than a reader can follow: then each noise stands with its highest severity only, or not at all.
MOST_OVERVIEW_COLUMNS = 16
# With more pairs of a family and a full-precision model than this, charts stand on the families' pages only.
MOST_INDEX_CHARTS = 6
# A family with more noises has its severity charts folded by group, and none of them on the overview page.
MOST_OPEN_NOISES = 4
# With more severity charts than this, they stand on the pages of the noises only.
MOST_FAMILY_CHARTS = 150
NOISE_GROUPS = {
    "imagenet_c": "ImageNet-C corruptions",
    "imagenet_c_extra": "Extra ImageNet-C corruptions",
    "camera": "Camera and channel noises",
    "text": "Noises on the question's text",
    "other": "Other noises",
}
WORLDS = {
    "real": ("Real datasets", ""),
    "block": (
        "Block world",
        "Pictures drawn by Bitquake itself, answered by its small reference models. They show what quantization does "
        "to a real network and that every stage works; they say nothing about a large model on a public benchmark.",
    ),
}
CAUTION = "† Shown, but not to be ranked by: "


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
class ConditionView:
    """All runs on one task."""

    id: str
    name: str
    task: str
    groups: list[RowGroup]
    sizes: str
    rows: str
    notes: list[str]
    metrics: list[MetricEntry]
    scores: list[ScoreEntry]

    @property
    def headline(self) -> MetricEntry:
        """What ``accuracy`` is called, and in what it is shown."""
        return self.metrics[0]


@dataclass(frozen=True)
class NoiseView:
    """One noise at its severities; it has a page of its own."""

    key: str
    full: bool
    name: str
    page: str
    conditions: list[ConditionView]


@dataclass(frozen=True)
class NoiseGroupView:
    """Noises of one kind, with one overview for each metric."""

    id: str
    title: str
    noises: list[NoiseView]
    overviews: list[Overview]


@dataclass(frozen=True)
class FamilyView:
    """All conditions of one family; ``main``: the clean task where there is one, ``plain``: those without noise."""

    key: str
    title: str
    page: str
    main: ConditionView
    plain: list[ConditionView]
    noise_groups: list[NoiseGroupView]
    conditions: list[ConditionView]

    @property
    def noises(self) -> list[NoiseView]:
        return [noise for group in self.noise_groups for noise in group.noises]


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
    """One metric over several conditions: full precision by its value, the others by their change.

    units: how each column is shown. left_out: conditions without a column; highest: of each noise there is only the
    highest severity.
    """

    metric: MetricEntry
    units: list[Unit]
    families: list[Head]
    noises: list[Head]
    severities: list[str]
    groups: list[tuple[RunEntry, list[OverviewRow]]]
    left_out: int
    highest: bool


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
    """A world's families; glances: title, metrics of the columns, rows."""

    key: str
    title: str
    note: str
    glances: list[tuple[str, list[MetricEntry], list[Glance]]]
    overviews: list[Overview]
    families: list[FamilyView]


class Arrangement:
    """Finds its way through a report: runs by id, metrics by key, cells by what they are about."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.runs = {run.id: run for run in report.runs}
        self.metrics = {metric.key: metric for metric in report.metrics}
        self.scores = {score.key: score for score in report.scores}
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
        tasks = [condition.task for family in families for condition in family.conditions]
        overviews = [self.overview(metric, cells, tasks, across=True) for metric in OVERVIEW_METRICS]
        return WorldView(key, title, note, self.glances(key, families), overviews, families)

    @staticmethod
    def family_order(cells: Sequence[CellEntry], family: str) -> tuple[int, str]:
        """Families with many conditions first: those that only serve as a shift come after what they are a shift of."""
        return (-len({cell.task for cell in cells if cell.family == family}), family)

    def family(self, world: str, family: str, cells: Sequence[CellEntry]) -> FamilyView:
        order = {cell.task: condition_order(cell) for cell in cells}
        tasks = sorted(order, key=lambda task: order[task])
        by_task: dict[str, list[CellEntry]] = {}
        for cell in cells:
            by_task.setdefault(cell.task, []).append(cell)
        conditions = {task: self.condition(by_task[task]) for task in tasks}
        first = {task: by_task[task][0] for task in tasks}
        stem = slug(family if family.startswith(world) else f"{world}-{family}")
        groups = []
        for group, members in groupby((t for t in tasks if first[t].kind == "noise"), lambda t: first[t].noise_group):
            own = list(members)
            noises = []
            for (noise, full), same in groupby(own, lambda t: (first[t].noise, first[t].full)):
                name = condition_name("noise", noise, 0, "", full=full)
                # No slug holds two hyphens in a row, so no other page has this name.
                page = f"{stem}--{slug(noise)}{'--full' if full else ''}.html"
                noises.append(NoiseView(noise, full, name, page, [conditions[task] for task in same]))
            overviews = [self.overview(metric, cells, own) for metric in OVERVIEW_METRICS]
            title = NOISE_GROUPS.get(group, NOISE_GROUPS["other"])
            groups.append(NoiseGroupView(f"group-{slug(group)}", title, noises, overviews))
        plain = [conditions[task] for task in tasks if first[task].kind != "noise"]
        main = conditions[tasks[0]]
        return FamilyView(
            family, family.replace("_", " "), f"{stem}.html", main, plain, groups, list(conditions.values())
        )

    def condition(self, cells: Sequence[CellEntry]) -> ConditionView:
        first = cells[0]
        metrics = [self.headline(first), *(self.metrics[key] for key in PAIR_METRICS[1:])]
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
            for metric in metrics:
                value = cell.metrics[metric.key]
                if value.value is None:
                    missing.setdefault(value.note, {})[metric.title] = None
                elif value.caution:
                    cautions.setdefault(metric.key, value.caution)
            for score, value in cell.scores.items():
                if value.value is None:
                    missing.setdefault(value.note, {})[self.scores[score].title] = None
            if cell.n_missing_confidence:
                notes.append(f"{self.runs[cell.run].name}: {cell.n_missing_confidence} samples without a confidence.")
            if cell.reason:
                notes.append(f"{self.runs[cell.run].name} stands without a comparison: {cell.reason}.")
        notes += [f"{', '.join(titles)} not available: {note}." for note, titles in missing.items()]
        if cautions:
            notes.append(caution_note(cautions.values()))
        if caution := scores.headline(first.protocol, ()).caution:
            notes.append(caution)
        if first.threshold_task != f"{first.family}_threshold" and first.metrics["phi_1"].value is not None:
            notes.append(f"Φ: the threshold was chosen in distribution, on {first.threshold_task}.")
        name = condition_name(first.kind, first.noise, first.severity, first.variant, full=first.full)
        chosen = first.part or (f"{first.split}, all of it" if first.split else "")
        which = f"Rows of {first.dataset}: {chosen}." if chosen else f"Rows of {first.dataset}."
        if first.dataset_revision:
            which += f" Revision {first.dataset_revision}."
        if first.shift_from:
            which += f" Shifted from {first.shift_from}."
        further = scores.further({name for cell in cells for name in cell.scores})
        sizes = f"{_span(n)} samples, {_span(images)} images, confidence: {first.confidence_name}"
        return ConditionView(
            slug(first.task),
            name,
            first.task,
            groups,
            sizes,
            which,
            list(dict.fromkeys(notes)),
            metrics,
            [self.scores[score] for score in further],
        )

    def headline(self, cell: CellEntry) -> MetricEntry:
        """The accuracy of a protocol under the name that it has there."""
        definition = scores.headline(cell.protocol, ()).definition
        return self.metrics["accuracy"].model_copy(
            update={"title": cell.headline, "unit": cell.headline_unit, "definition": definition}
        )

    def by_group(self, cells: Sequence[CellEntry]) -> list[tuple[str, list[Row]]]:
        position = {run: index for index, run in enumerate(self.runs)}
        rows = [Row(self.runs[c.run], c) for c in sorted(cells, key=lambda c: position[c.run])]
        return [(key, list(group)) for key, group in groupby(rows, key=lambda row: group_key(row.run))]

    def glances(self, world: str, families: Sequence[FamilyView]) -> list[tuple[str, list[MetricEntry], list[Glance]]]:
        found = []
        for family in families:
            rows = [
                Glance(self.runs[s.run], s, [s.differences.get(metric) for metric in OVERVIEW_METRICS])
                for s in self.report.summaries
                if s.world == world and s.family == family.key
            ]
            if rows and len(family.conditions) > 1:
                metrics = [family.main.headline, *(self.metrics[key] for key in OVERVIEW_METRICS[1:])]
                n = max(row.summary.n_conditions for row in rows)
                found.append((f"{family.title}, mean over {n} conditions", metrics, rows))
        return found

    def overview(self, key: str, cells: Sequence[CellEntry], tasks: Sequence[str], *, across: bool = False) -> Overview:
        """One metric on tasks, in their order; across: several families, so that noises may have to go altogether."""
        first = {cell.task: cell for cell in cells}
        chosen = _columns([first[task] for task in tasks], across=across)
        shown = [first[task] for task in chosen]
        metric = self.metrics[key]
        units: list[Unit] = [cell.headline_unit if key == "accuracy" else metric.unit for cell in shown]
        names = {cell.headline for cell in shown}
        if key == "accuracy" and len(names) == 1:
            metric = self.headline(shown[0])
        by_place = {(cell.run, cell.task): cell.metrics[metric.key] for cell in cells}
        with_cells = {cell.run for cell in cells}
        groups: dict[str, list[OverviewRow]] = {}
        for run in self.report.runs:
            if run.id in with_cells:
                row = OverviewRow(run, [by_place.get((run.id, task)) for task in chosen])
                groups.setdefault(group_key(run), []).append(row)
        families = []
        for (family, title), same in groupby(shown, key=lambda cell: (cell.family, cell.headline)):
            text = family.replace("_", " ")
            families.append(Head(f"{text}, {title}" if key == "accuracy" and len(names) > 1 else text, len(list(same))))
        return Overview(
            metric,
            units,
            families,
            [Head(name, len(list(g))) for (_, name), g in groupby(shown, key=lambda c: (c.family, _noise_head(c)))],
            [str(cell.severity) if cell.kind == "noise" and cell.severity else "" for cell in shown],
            [(self.runs[key], rows) for key, rows in groups.items()],
            len(tasks) - len(chosen),
            any(cell.kind == "noise" for cell in shown),
        )

    def legend(self, group: RowGroup) -> list[Legend]:
        return [Legend(row.run.quantization, charts.swatch(self.styles[row.run.id])) for row in group.rows]

    @staticmethod
    def few_noises(family: FamilyView) -> bool:
        """Whether severity charts stand open, and on the overview page too."""
        return 0 < len(family.noises) <= MOST_OPEN_NOISES

    def severity_charts_fit(self, family: FamilyView) -> bool:
        """Whether the family's own page shows the severity charts of all its noises."""
        return len(family.noises) * len(OVERVIEW_METRICS) * len(family.main.groups) <= MOST_FAMILY_CHARTS

    def severity_figures(self, family: FamilyView, noise: NoiseView, group: RowGroup) -> list[Figure]:
        """The overview metrics against the severity of a noise, with the clean task as severity 0."""
        clean = [c for c in family.plain[:1] if c.groups[0].rows[0].cell.kind == "clean"]
        groups = [g for condition in [*clean, *noise.conditions] for g in condition.groups if g.key == group.key]
        sizes = {kind: {r.cell.n for g in groups for r in g.rows if r.cell.kind == kind} for kind in ("clean", "noise")}
        subtitle = ""
        if sizes["clean"] and sizes["noise"] and sizes["clean"] != sizes["noise"]:
            subtitle = f"clean: {_span(sizes['clean'])} samples, noise: {_span(sizes['noise'])}"
        figures = []
        for metric in (family.main.headline, *(self.metrics[key] for key in OVERVIEW_METRICS[1:])):
            label = f"{metric.title}, %" if metric.unit == "percent" else metric.title
            lines, table = [], []
            for run in (row.run for row in group.rows):
                own = [row.cell for g in groups for row in g.rows if row.run is run]
                points = [point for cell in own if (point := _point(cell, metric.key))]
                if points:
                    lines.append(charts.Line(run.quantization, self.styles[run.id], points))
                for cell in own:
                    value = value_text(cell.metrics[metric.key], metric.unit)
                    table.append([run.quantization, str(cell.severity or "clean"), f"{cell.n:,}", value])
            if any(len(line.points) > 1 for line in lines):
                title = f"{metric.title} under {noise.name}"
                ends = [[number(p.y, metric.unit) for p in (line.points[0], line.points[-1])] for line in lines]
                words = "; ".join(f"{line.name} from {a} to {b}" for line, (a, b) in zip(lines, ends, strict=True))
                described = f"{label}, with 95 % intervals: {words}."
                chart = charts.severity_chart(title, described, label, lines, SCALE[metric.unit])
                figures.append(Figure(title, subtitle, chart, ["Quantization", "Severity", "Samples", label], table))
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
        marks = [
            (self.styles[row.run.id], value.value, risk)
            for row in rows
            for risk in charts.TOLERATED
            if (value := row.cell.metrics.get(f"coverage_at_risk_{risk * 100:g}")) and value.value
        ]
        return Figure(
            title,
            "lower is better; rings: C@1, 5, 10, 20 %",
            charts.risk_coverage_chart(title, f"Lower is better. {described}.", curves, marks),
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
            described = f"{row.cell.headline} against confidence in bins; calibrated on the diagonal. {subtitle}."
            table = []
            for b in row.cell.bins:
                bounds = f"{number(b.lower, 'percent', digits=0)}–{number(b.upper, 'percent', digits=0)}"
                score = number(b.score, "percent")
                if b.lo is not None and b.hi is not None:
                    score += f" {interval(b.lo, b.hi, 'percent')}"
                table.append([bounds, str(b.count), number(b.confidence, "percent"), score])
            tenths = row.cell.headline_unit == "tenths"
            label = f"{row.cell.headline} / 10, %" if tenths else f"{row.cell.headline}, %"
            chart = charts.reliability_chart(title, described, row.cell.bins, self.styles[row.run.id], label)
            figures.append(Figure(title, subtitle, chart, ["Bin, %", "Samples", "Confidence, %", label], table))
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


def caution_note(cautions: Iterable[str]) -> str:
    """Why the figures that a dagger marks must not be ranked by, in one note."""
    return f"{CAUTION}{'; '.join(cautions)}."


def slug(text: str) -> str:
    """A safe, short and unique name for files and anchors."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain and plain == text.replace("_", "-") and len(plain) <= 60:
        return plain
    return f"{plain[:50]}-{hashlib.blake2b(text.encode(errors='replace'), digest_size=4).hexdigest()}".lstrip("-")


def condition_order(cell: CellEntry) -> tuple[int, int, str, bool, int, str]:
    """Sorts conditions: clean, the shifts, the noises by group, name and severity."""
    group = list(NOISE_GROUPS).index(cell.noise_group) if cell.noise_group in NOISE_GROUPS else len(NOISE_GROUPS)
    kind = ("clean", "shift", "noise").index(cell.kind)
    return (kind, group, cell.noise, cell.full, cell.severity, cell.task)


def _columns(cells: Sequence[CellEntry], *, across: bool) -> list[str]:
    """Tasks that an overview shows: all; of each noise the highest severity only; or ``across`` families no noise."""
    if len(cells) <= MOST_OVERVIEW_COLUMNS:
        return [cell.task for cell in cells]
    highest: dict[tuple[str, str, bool], CellEntry] = {}
    for cell in cells:
        best = highest.setdefault((cell.family, cell.noise, cell.full), cell)
        if cell.severity > best.severity:
            highest[cell.family, cell.noise, cell.full] = cell
    few = [c for c in cells if c.kind != "noise" or highest[c.family, c.noise, c.full] is c]
    plain = [cell for cell in few if cell.kind != "noise"]
    return [cell.task for cell in (plain if across and plain and len(few) > MOST_OVERVIEW_COLUMNS else few)]


def _noise_head(cell: CellEntry) -> str:
    return condition_name(cell.kind, cell.noise, 0, cell.variant, full=cell.full)


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
