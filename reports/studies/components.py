"""The components study: which part of a model needs its bits, for what it answers and for whether it knows.

Two kinds of grids, by method: widths of vision tower, connector and language model, and thirds of their blocks by
attention and MLP. Every number is of cells that answered the same samples; importances are shares of what the grid's
cells differ by, and say as much about the grid as about the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bitquake.metrics import Figure, Share, cheapest, pareto_front
from bitquake.metrics.pareto import Cheapest, Place
from bitquake.metrics.sensitivity import Sensitivity
from bitquake.reports import charts
from bitquake.reports.charts import Line, Point
from bitquake.reports.entries import LEVEL
from bitquake.reports.figures import Figure as Chart
from bitquake.reports.figures import Legend, Panel
from bitquake.reports.formatting import interval, number
from bitquake.reports.problems import Problem
from bitquake.reports.studies.component_grid import (
    MethodGrid,
    Moved,
    Outcomes,
    Target,
    Width,
    outcomes,
    place_grids,
    what_moved,
    width_grids,
    width_of,
)
from bitquake.reports.studies.joint import corrected, corrected_by_key
from bitquake.reports.studies.naming import listing, quantization_title
from bitquake.reports.studies.page import (
    Finding,
    Shown,
    StudyPage,
    StudyPanels,
    StudyRow,
    StudySection,
    StudyTable,
    Verdict,
    difference,
    missing,
    value,
    words,
)
from bitquake.reports.studies.study import Study, StudyCell
from bitquake.reports.tables import Column, TableCell

KEPT = (0.95, 0.98)
NOISY = 0.5
"""Where sampling accounts for so much of what the cells differ by, importances are not told in a sentence."""
_WAYS = {"anova": "ANOVA", "impurity": "impurity", "permutation": "permutation", "shap": "SHAP"}
_WAY_TEXTS = {
    "anova": "Shapley effects: own share of the variance, and an equal part of each interaction",
    "impurity": "random forest: share of the reduction of variance inside the trees",
    "permutation": "random forest: error on unseen cells when the factor is permuted",
    "shap": "random forest: mean |SHAP value|; of effects, not of their squares, so small factors get more",
}


def components_page(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> StudyPage:
    """Which component, which third, which kind of layer: what narrow weights cost there."""
    findings: list[Finding] = []
    sections: list[StudySection] = []
    found = outcomes(study, problems, replicates=replicates, seed=seed)
    for at, own in enumerate(found):
        prefix = f"m{at}-" if len(found) > 1 else ""
        about = f"{own.model}: " if len(found) > 1 else ""
        headlines = [target for target in own.targets if target.metric == "accuracy"]
        reliability = [target for target in own.targets if target.metric != "accuracy"]
        widths, places = width_grids(own.cells), place_grids(own.cells)
        if widths:
            moved = [what_moved(g, t, own, problems, seed=seed) for t in own.targets for g in widths]
            fronts = {(t, g.title): _front(g, t, own) for t in headlines for g in widths}
            findings += [
                _importance_finding(one, fronts.get((one.target, one.grid.title)), about)
                for one in moved
                if one.target.metric in ("accuracy", "aurc")
            ]
            sections.append(_widths(widths, own, headlines, fronts, prefix, about))
            sections.append(_importance(moved, headlines, f"{prefix}importance", f"{about}which component matters"))
            if reliability:
                title = f"{about}which component matters for knowing when it is wrong"
                sections.append(_importance(moved, reliability, f"{prefix}reliability", title))
        if places:
            moved = [what_moved(g, t, own, problems, seed=seed) for t in own.targets for g in places]
            findings += [one for t in headlines for one in _place_finding(places, t, own, about)]
            sections.append(_places(places, own, moved, prefix, about))
    if not sections:
        findings.append(Finding("No grid has two cells with their full-precision control yet.", "open"))
    return StudyPage(findings, sections)


# Widths: what each configuration answers and stores, and the front.


class Front:
    """The cells of a method's grid on a target, by what they cost (effective bits per weight)."""

    def __init__(self, own: MethodGrid, target: Target, found: Outcomes) -> None:
        sized = [(cell, width) for cell in own.cells if found.has(cell, target) and (width := width_of(cell))]
        unique = {found.same[cell.name]: (cell, width) for cell, width in sized}
        self.cells = [cell for cell, _ in unique.values()]
        self.cost = [width.effective for _, width in unique.values()]
        # Full precision in the same call: a replicate that is undefined in one of them is left out of all.
        values, draws = found.arrays([*self.cells, found.twin], target)
        self.values, self.reference = values[:-1], float(values[-1])
        self.draws = None if draws is None else draws[:, :-1]
        self.figures = [found.value(cell, target) for cell in self.cells]
        self.places: list[Place] = pareto_front(
            self.cost, self.values, draws=self.draws, higher_is_better=target.higher_is_better, level=LEVEL
        )
        self.kept: list[Cheapest] = []
        if self.reference > 0 and draws is not None:
            self.kept = [
                cheapest(
                    self.cost, self.values, self.reference, share, draws=self.draws, reference_draws=draws[:, -1],
                    level=LEVEL,
                )
                for share in KEPT
            ]  # fmt: skip


def _front(own: MethodGrid, target: Target, found: Outcomes) -> Front | None:
    front = Front(own, target, found) if any(found.has(cell, target) and width_of(cell) for cell in own.cells) else None
    return front if front is not None and len(front.cells) > 1 else None


def _widths(
    grids: Sequence[MethodGrid],
    found: Outcomes,
    headlines: Sequence[Target],
    fronts: Mapping[tuple[Target, str], Front | None],
    prefix: str,
    about: str,
) -> StudySection:
    best = {
        (cell.name, target.name)
        for (target, _), front in fronts.items()
        if front is not None
        for cell, place in zip(front.cells, front.places, strict=True)
        if place == "front"
    }
    columns = [
        Column("Nominal", "bits", "bits of the codes over all parameters, scales and zero-points not counted"),
        Column("Effective", "bits", "with scales and zero-points"),
        Column("Stored", "bits", "bytes of the packed tensors, times eight, over all parameters"),
        *(Column(t.title, {"percent": "%", "tenths": ""}.get(t.unit, t.unit), t.task_title, "up") for t in headlines),
    ]
    whole: list[StudyRow] = [_width_row(found.twin, found, headlines, twin=True)]
    short = list(whole)
    for own in grids:
        head = StudyRow(own.title, group=True)
        cells = sorted(own.cells, key=lambda cell: (w.effective if (w := width_of(cell)) else math.inf, cell.name))
        rows = {cell.name: _width_row(cell, found, headlines) for cell in cells}
        whole += [head, *rows.values()]
        kept = [row for name, row in rows.items() if any((name, target.name) in best for target in headlines)]
        short += [head, *kept] if kept else []
    sizes = ", ".join(f"{t.task_title} n = {len(found.twin.tasks[t.task].answers):,}" for t in headlines)
    tables = [
        StudyTable("On the front of a task", f"{sizes}. Values with their intervals.", columns, short, "Bits of each"),
        *_kept_tables(grids, headlines, fronts),
        StudyTable(
            f"All {sum(len(own.cells) for own in grids)} configurations", f"{sizes}.", columns, whole, "Bits of each",
            folded=True,
        ),
    ]  # fmt: skip
    panels = [panel for target in headlines for panel in _front_panels(target, grids, fronts)]
    return StudySection(
        f"{prefix}widths",
        f"{about}method × bits of each component",
        [
            "On the front: nothing that costs no more is better. Tied with it: something is better, within the noise "
            "of the samples. Cost: effective bits per weight of the whole model."
        ],
        tables,
        [StudyPanels("", panels)] if panels else [],
    )


def _width_row(cell: StudyCell, found: Outcomes, headlines: Sequence[Target], *, twin: bool = False) -> StudyRow:
    width = width_of(cell)
    cells = [*_bits(width), *(_value(found.value(cell, target), target) for target in headlines)]
    return StudyRow(quantization_title(cell) if twin else _short(cell), cells, twin=twin)


def _bits(width: Width | None) -> list[Shown]:
    if width is None:
        return [missing("card missing")] * 3
    numbers = (width.nominal, width.effective, width.measured)
    return [Shown(TableCell(f"{bits:.2f}"), {"value": bits}) for bits in numbers]


def _value(found: Figure | None, target: Target) -> Shown:
    return missing() if found is None else value(found, target.unit)


def _short(cell: StudyCell) -> str:
    """``vision 4, connector 16, language 3``."""
    told = [f"{name} {_level(cell.plan.factors[name])}" for name in _parts(cell)]
    return ", ".join(told)


def _parts(cell: StudyCell) -> list[str]:
    return [name for name in ("vision", "connector", "language") if name in cell.plan.factors]


def _level(level: object) -> str:
    return f"{level:g}" if isinstance(level, (int, float)) else str(level)


def _kept_tables(
    grids: Sequence[MethodGrid],
    headlines: Sequence[Target],
    fronts: Mapping[tuple[Target, str], Front | None],
) -> list[StudyTable]:
    """The cheapest configuration that keeps so much of full precision."""
    rows = []
    for target in headlines:
        found = [(own, front) for own in grids if (front := fronts.get((target, own.title))) is not None and front.kept]
        for at, share in enumerate(KEPT if found else ()):
            full = number(found[0][1].reference, target.unit)
            rows.append(StudyRow(target.name, note=f"at least {share:.0%} of full precision's {full}", group=True))
            rows += [StudyRow(own.title, _kept(front.kept[at], front)) for own, front in found]
    if not rows:
        return []
    columns = [
        Column("Configuration", text=True),
        Column("Bits", "effective"),
        Column("Keeps", "%"),
        Column("Beyond the noise", "bits", "effective bits of the cheapest whose whole interval keeps it"),
    ]
    caption = "By its value, and what it keeps with its interval; the last column asks the whole interval to keep it."
    return [StudyTable("The cheapest that keeps enough", caption, columns, rows, "Method")]


def _kept(kept: Cheapest, front: Front) -> list[Shown]:
    if kept.index is None:
        return [words("none"), missing("none keeps it"), missing("none keeps it"), missing("none keeps it")]
    bits = front.cost[kept.index]
    share = Figure(kept.kept, kept.lo, kept.hi, np.zeros(0))
    sure = missing("none") if kept.sure is None else Shown(
        TableCell(f"{front.cost[kept.sure]:.2f}", _short(front.cells[kept.sure])), {"value": front.cost[kept.sure]}
    )  # fmt: skip
    return [
        words(_short(front.cells[kept.index])),
        Shown(TableCell(f"{bits:.2f}"), {"value": bits}),
        value(share),
        sure,
    ]


def _front_panels(
    target: Target,
    grids: Sequence[MethodGrid],
    fronts: Mapping[tuple[Target, str], Front | None],
) -> list[Panel]:
    """One chart a method."""
    figures, legend = [], []
    for at, own in enumerate(grids):
        front = fronts.get((target, own.title))
        if front is None or front.draws is None:
            continue
        style = 1 + at % (charts.N_STYLES - 1)
        points: dict[Place, list[tuple[str, Point]]] = {"front": [], "tied": [], "dominated": []}
        for cell, cost, found, place in zip(front.cells, front.cost, front.figures, front.places, strict=True):
            if found is not None and found.available:
                points[place].append((_short(cell), Point(cost, found.value, found.lo, found.hi)))
        if not points["front"]:
            continue
        lines = {
            place: Line(own.title, style, [p for _, p in sorted(found, key=lambda named: named[1].x)])
            for place, found in points.items()
        }
        title = f"{target.name}, {own.title}"
        unit = {"percent": ", %", "tenths": ""}.get(target.unit, "")
        scale = {"percent": 100.0, "tenths": 10.0}.get(target.unit, 1.0)
        counts = {place: len(found) for place, found in points.items()}
        chart = charts.front_chart(
            title,
            f"{target.title} against effective bits per weight: {counts['front']} configurations on the front, "
            f"{counts['tied']} tied with it, {counts['dominated']} dominated.",
            ("effective bits per weight", f"{target.title}{unit}"),
            lines["front"],
            [lines["tied"], lines["dominated"]],
            scale,
        )
        table = [
            [name, place, f"{p.x:.2f}", number(p.y, target.unit), interval(p.lo, p.hi, target.unit)]
            for place, found in points.items()
            for name, p in sorted(found, key=lambda named: named[1].x)
        ]
        subtitle = f"{counts['front']} on the front, {counts['tied']} tied"
        figures.append(
            Chart(title, subtitle, chart, ["configuration", "place", "bits", target.title, "interval"], table)
        )
        legend.append(Legend(own.title, charts.swatch(style)))
    return [Panel(legend, figures)] if figures else []


# Importance.


def _importance(moved: Sequence[Moved], targets: Sequence[Target], at: str, title: str) -> StudySection:
    tables, agreements, notes = [], [], []
    for target in targets:
        own = [one for one in moved if one.target == target]
        tables.append(_importance_table(own, target))
        agreements += [row for one in own for row in _agreement_rows(one)]
        notes += [f"{one.grid.title}, {target.name}: {one.why}." for one in own if one.all_levels is None]
        notes += [
            f"{one.grid.title}, {target.name}: {note}."
            for one in own
            if one.all_levels is not None
            for note in one.all_levels.notes
        ]
    if agreements:
        columns = [Column("Rank correlation"), Column("Largest difference", "points")]
        caption = "Of the importances of a grid, all levels; rank correlation is Spearman's."
        tables.append(StudyTable("Agreement of the ways", caption, columns, agreements, "Ways", folded=True))
    sentences = [
        "Shares are of the variance of the metric between the configurations of a grid; importances add up to 100. "
        "They say how much it moves over these widths: a grid whose lowest width breaks the model measures little "
        "else, so each table stands twice, the second time without the lowest levels."
    ]
    return StudySection(at, title, sentences, tables, notes=notes)


def _importance_table(own: Sequence[Moved], target: Target) -> StudyTable:
    ways = [way for way in _WAYS if any(one.all_levels and way in one.all_levels.importance for one in own)]
    together = any(one.all_levels and one.all_levels.consensus for one in own)
    columns = [
        Column("First order", "%", "the factor's own share of the variance"),
        Column("Total", "%", "with every interaction that the factor takes part in"),
        *(Column(_WAYS[way], "%", _WAY_TEXTS[way]) for way in ways),
        *(
            [Column("Mean of the forest's", "%", "impurity, permutation and SHAP, as arXiv 2601.15287")]
            if together
            else []
        ),
    ]
    rows: list[StudyRow] = []
    for one in own:
        parts = [("all levels", one.all_levels), (f"without {one.lowest}", one.narrow_left_out)]
        for name, found in parts:
            if found is None:
                continue
            rows.append(StudyRow(one.grid.title, note=f"{name}; {_about(found)}", group=True))
            rows += [StudyRow(factor, _shares(found, factor, ways, together)) for factor in found.grid.factors]
    spans = [("Variance", 2), ("Importance", len(columns) - 2)] if len(columns) > 2 else []
    return StudyTable(
        f"What moves {target.name}",
        "In percent, with intervals over the samples.",
        columns,
        rows,
        "Factor",
        spans=spans,
    )


def _about(found: Sensitivity) -> str:
    variance = found.variance
    told = f"{found.grid.n} cells"
    if variance is None:
        return told
    told += f", interactions {100 * variance.interaction:.0f} %"
    if not math.isnan(variance.noise):
        told += f", sampling noise about {100 * variance.noise:.0f} %"
    return told


def _shares(found: Sensitivity, factor: str, ways: Sequence[str], together: bool) -> list[Shown]:
    variance = found.variance
    cells = [
        _share(variance.first.get(factor) if variance else None),
        _share(variance.total.get(factor) if variance else None),
    ]
    cells += [_share(found.importance.get(way, {}).get(factor)) for way in ways]
    return [*cells, *([_share(found.consensus.get(factor))] if together else [])]


def _share(share: Share | None) -> Shown:
    if share is None:
        return missing()
    if not share.has_interval:
        return missing("no interval")
    return value(Figure(share.value, share.lo, share.hi, np.zeros(0)))


def _agreement_rows(one: Moved) -> list[StudyRow]:
    if one.all_levels is None:
        return []
    rows = []
    for pair in one.all_levels.agreement:
        rank = "n/a" if math.isnan(pair.rank_correlation) else f"{pair.rank_correlation:.2f}"
        cells = [words(rank), words(f"{100 * pair.largest_difference:.1f}")]
        rows.append(StudyRow(" and ".join(_WAYS[way] for way in pair.methods), cells))
    head = StudyRow(f"{one.grid.title}, {one.target.name}", group=True)
    return [head, *rows] if rows else []


def _importance_finding(one: Moved, front: Front | None, about: str) -> Finding:
    head = f"{about}{one.grid.title}, {one.target.name}"
    if one.all_levels is None or one.all_levels.variance is None:
        return Finding(f"{head}: {one.why or 'no importance'}.", "open")
    found = one.all_levels
    assert found.variance is not None
    cheap = _cheap_sentence(front) if front is not None else ""
    if len(found.grid.factors) < 2:
        only = found.grid.factors[0]
        return Finding(f"{head}: only {only} varies, so there is nothing to weigh it against.{cheap}", "open")
    noise = found.variance.noise
    if noise > NOISY:
        text = f"{head}: sampling accounts for about {100 * noise:.0f} % of what the cells differ by"
        return Finding(f"{text}; nothing is told apart.{cheap}", "open")
    shares = sorted(found.importance["anova"].items(), key=lambda item: -item[1].value)
    (first, most), (second, next_) = shares[0], shares[1]
    apart = most.has_interval and next_.has_interval and most.lo > next_.hi
    text = f"{head}: {first} moves it most, {_told(most)} of the importance (ANOVA), {second} {_told(next_)}"
    text += "".join(f", {name} {_told(share)}" for name, share in shares[2:])
    others = {way: max(scores, key=lambda name: scores[name].value) for way, scores in found.importance.items()}
    disagree = [_WAYS[way] for way, name in others.items() if name != first]
    text += f"; {listing(disagree)} put another first" if disagree else ""
    if one.narrow_left_out is not None and one.narrow_left_out.variance is not None:
        rest = one.narrow_left_out
        left = max(rest.importance["anova"].items(), key=lambda item: item[1].value)
        noisy = rest.variance is not None and rest.variance.noise > NOISY
        text += f". Without {one.lowest}: "
        text += "sampling noise" if noisy else f"{left[0]}, {_told(left[1])}"
    verdict: Verdict = "measured" if apart else "open"
    return Finding(f"{text}.{cheap}", verdict)


def _told(share: Share) -> str:
    limits = f" {interval(share.lo, share.hi, 'percent', digits=0)}" if share.has_interval else ""
    return f"{number(share.value, 'percent', digits=0)} %{limits}"


def _cheap_sentence(front: Front) -> str:
    parts = []
    for kept in front.kept:
        if kept.index is None:
            parts.append(f"none keeps {kept.share:.0%}")
            continue
        sure = f"{front.cost[kept.sure]:.2f}" if kept.sure is not None else "none"
        parts.append(
            f"{kept.share:.0%} of full precision: {_short(front.cells[kept.index])} at "
            f"{front.cost[kept.index]:.2f} bits (beyond the noise: {sure})"
        )
    return f" Cheapest that keeps {'; '.join(parts)}." if parts else ""


# Thirds of the blocks, attention and MLP.


def _places(
    grids: Sequence[MethodGrid], found: Outcomes, moved: Sequence[Moved], prefix: str, about: str
) -> StudySection:
    tables = [_place_table(grids, target, found) for target in found.targets]
    section = _importance(moved, found.targets, "", "")
    notes = section.notes
    return StudySection(
        f"{prefix}places",
        f"{about}thirds of the blocks, attention and MLP",
        [
            "One place at a time is quantized and everything else left at full precision: the change is what that "
            "place alone costs, and it grows with the number of its weights, too."
        ],
        [*tables, *section.tables],
        notes=notes,
    )


def _place_table(grids: Sequence[MethodGrid], target: Target, found: Outcomes) -> StudyTable:
    kinds = sorted({str(cell.plan.factors["layers"]) for own in grids for cell in own.cells})
    placed: list[tuple[str, str, dict[str, StudyCell]]] = []
    for own in grids:
        for key in dict.fromkeys(_place(cell) for cell in own.cells):
            members = {str(cell.plan.factors["layers"]): cell for cell in own.cells if _place(cell) == key}
            placed.append((own.title, key, members))
    changes = {
        (i, kind): change
        for i, (_, _, members) in enumerate(placed)
        for kind in kinds
        if kind in members and (change := found.change(members[kind], target)) is not None
    }
    adjusted = corrected_by_key(changes)
    rows: list[StudyRow] = []
    for i, (title, key, members) in enumerate(placed):
        if i == 0 or title != placed[i - 1][0]:
            rows.append(StudyRow(title, group=True))
        cells = []
        for kind in kinds:
            width = width_of(members[kind]) if kind in members else None
            cells.append(words(f"{width.effective:.2f}") if width else missing())
            cells.append(_change(changes.get((i, kind)), target, adjusted.get((i, kind))))
        rows.append(StudyRow(key, cells))
    unit = {"percent": "points", "tenths": ""}.get(target.unit, target.unit)
    columns = [
        column
        for _ in kinds
        for column in (Column("Bits", "effective"), Column(target.title, unit, arrow=_arrow(target)))
    ]
    caption = "Change against full precision, paired; verdicts corrected for the number of changes."
    spans = [(kind, 2) for kind in kinds]
    return StudyTable(target.name, caption, columns, rows, "Quantized", folded=target.metric != "accuracy", spans=spans)


def _change(found: Figure | None, target: Target, adjusted: float | None) -> Shown:
    if found is None:
        return missing()
    return difference(found, unit=target.unit, higher_is_better=target.higher_is_better, power=True, adjusted=adjusted)


def _arrow(target: Target) -> str:
    return "up" if target.higher_is_better else "down"


def _place(cell: StudyCell) -> str:
    """``vision, front, 2 bits``."""
    told = [str(cell.plan.factors[name]) for name in ("component", "third") if name in cell.plan.factors]
    bits = cell.plan.factors.get("bits")
    return ", ".join([*told, *([f"{_level(bits)} bits"] if bits is not None else [])])


def _place_finding(grids: Sequence[MethodGrid], target: Target, found: Outcomes, about: str) -> list[Finding]:
    """How many places cost more than the noise, and which one costs most, method by method."""
    parts, counts = [], []
    for own in grids:
        changes = [(cell, change) for cell in own.cells if (change := found.change(cell, target)) is not None]
        if not changes:
            continue
        told = corrected([change for _, change in changes])
        hurt = sum(p <= 1 - LEVEL and change.value < 0 for p, (_, change) in zip(told, changes, strict=True))
        cell, worst = min(changes, key=lambda pair: pair[1].value)
        size = number(worst.value, target.unit, signed=True)
        limits = interval(worst.lo, worst.hi, target.unit, signed=True)
        place = f"{_place(cell)}, {cell.plan.factors['layers']}"
        parts.append(f"{own.title}: {hurt} of {len(changes)}, most {place} ({size} {limits})")
        counts.append((hurt, len(changes)))
    if not parts:
        return []
    every, some = all(hurt == n for hurt, n in counts), any(hurt for hurt, _ in counts)
    text = (
        f"{about}{target.name}, one place at a time quantized: how many cost more than the noise, {'; '.join(parts)}."
    )
    return [Finding(text, "worse" if every else "changed" if some else "tied")]
