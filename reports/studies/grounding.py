"""The grounding study: boxes under quantization, shift and noise, and what the calibration data have to do with it.

Score: 1 where the box's IoU with the annotated one is at least 0.5 (Acc@0.5). Confidence: the joint probability of the
coordinate tokens, which is small for its length alone, so its calibration is shown after temperature and Platt scaling
as well. Conditions: the clean task, what is shifted from it, and the mean over the noises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from bitquake.metrics import Figure
from bitquake.reports import charts
from bitquake.reports.charts import Line, Point
from bitquake.reports.figures import Figure as Chart
from bitquake.reports.figures import Legend, Panel
from bitquake.reports.formatting import interval, number
from bitquake.reports.problems import Problem
from bitquake.reports.studies.effects import EffectRow, effect_table
from bitquake.reports.studies.grounding_draws import (
    DATA_FREE,
    REAL_DATA,
    SCALINGS,
    Grounding,
    groundings,
    source_of,
)
from bitquake.reports.studies.joint import STUDY_METRICS, corrected, less, mean
from bitquake.reports.studies.naming import (
    bits_of,
    calibration_title,
    cell_titles,
    family_title,
    listing,
    method_of,
    precision,
)
from bitquake.reports.studies.page import (
    Compared,
    Finding,
    StudyPage,
    StudyPanels,
    StudySection,
    StudyTable,
    as_difference,
    in_words,
    overall,
    tell,
)
from bitquake.reports.studies.study import Study, StudyCell

_ALL = "all methods,"
_HEADS = {"accuracy": "Acc@0.5", "ece_15": "ECE", "coverage_at_risk_5": "C@5%", "aurc": "AURC"}


def grounding_page(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> StudyPage:
    """Does a quantized model still point at the right thing, and does it know when not?"""
    titles = cell_titles(study)
    findings: list[Finding] = []
    sections: list[StudySection] = []
    groups = groundings(study, problems, replicates, seed)
    for at, group in enumerate(groups):
        prefix = f"g{at}-" if len(groups) > 1 else ""
        about = f"{group.twin.plan.model}: " if len(groups) > 1 else ""
        found, contrast = _contrast(group, prefix, about)
        findings += [*_losses(group, titles, about), *_shifts(group, about), *found, *_calibrated(group, about)]
        sections += [
            _boxes(group, titles, prefix, about),
            _fragility(group, titles, prefix, about),
            *([contrast] if contrast else []),
            _calibration(group, titles, prefix, about),
        ]
    if not groups:
        findings.append(Finding("No quantized cell has a task together with its full-precision control yet.", "open"))
    return StudyPage(findings, sections)


def _rows(
    group: Grounding, titles: Mapping[str, str], figures: Callable[[StudyCell], Iterable[Figure | None]]
) -> list[EffectRow]:
    """One row for each cell, under a line for each width."""
    rows: list[EffectRow] = []
    width = 0
    for cell in group.others:
        if bits_of(cell) != width:
            width = bits_of(cell)
            rows.append(EffectRow(precision(width), group=True))
        rows.append(EffectRow(_head(cell, titles), list(figures(cell)), _note(cell)))
    return rows


def _changes(group: Grounding, metric: str) -> Callable[[StudyCell], list[Figure | None]]:
    return lambda cell: [group.change(cell.name, condition, metric) for condition in group.conditions]


def _head(cell: StudyCell, titles: Mapping[str, str]) -> str:
    return titles[cell.name].replace(f" · {calibration_title(cell)}", "")


def _note(cell: StudyCell) -> str:
    source = source_of(cell)
    return "needs no data" if source == "none" else f"calibrated: {source}"


def _boxes(group: Grounding, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    conditions = list(group.conditions)
    tables = []
    for metric in STUDY_METRICS:
        full = [group.value(group.twin.name, condition, metric) for condition in conditions]
        rows = [EffectRow(titles[group.twin.name], full, values=True)]
        rows += _rows(group, titles, _changes(group, metric))
        tables.append(
            effect_table(
                f"{_HEADS[metric]}, and its change against full precision",
                _sizes(group),
                [metric] * len(conditions),
                rows,
                titles=[group.titles[condition] for condition in conditions],
                folded=metric in ("ece_15", "coverage_at_risk_5"),
            )
        )
    figures = StudyPanels("", _panels(group, titles))
    return StudySection(
        f"{prefix}boxes",
        f"{about}boxes: method × bits × calibration source",
        ["A box counts where its IoU with the annotated one is at least 0.5; no box is a wrong one."],
        tables,
        [figures],
    )


def _sizes(group: Grounding) -> str:
    parts = []
    for condition, tasks in group.conditions.items():
        sizes = sorted({len(group.twin.tasks[task].answers) for task in tasks})
        n = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        parts.append(f"{group.titles[condition]} n = {n}{' each' if len(tasks) > 1 else ''}")
    return f"{', '.join(parts)}. Full precision: value; below: change, paired."


def _panels(group: Grounding, titles: Mapping[str, str]) -> list[Panel]:
    """Acc@0.5 by condition, full precision beside the sources of one method and width."""
    kinds = list(dict.fromkeys((bits_of(cell), method_of(cell)) for cell in group.others))
    conditions = list(group.conditions)
    names = [group.titles[condition] for condition in conditions]
    panels = []
    calibrated = [k for k in kinds if sum((bits_of(c), method_of(c)) == k for c in group.others) > 1]
    for bits, method in calibrated or kinds[:2]:
        chosen = [cell for cell in group.others if (bits_of(cell), method_of(cell)) == (bits, method)]
        chosen = chosen[: charts.N_STYLES - 1]
        lines, table = [], []
        for style, cell in enumerate([group.twin, *chosen]):
            points = []
            label = "full precision" if cell is group.twin else source_of(cell)
            for x, condition in enumerate(conditions):
                found = group.value(cell.name, condition, "accuracy")
                if found is not None and found.available:
                    points.append(Point(x, found.value, found.lo, found.hi))
                    limits = interval(found.lo, found.hi, "percent")
                    table.append([label, names[x], number(found.value, "percent"), limits])
            if points:
                lines.append(Line(label, style, points))
        title = f"{method} {precision(bits)}"
        chart = charts.category_chart(title, "Acc@0.5 by condition and calibration source", "Acc@0.5, %", lines, names)
        shown = Chart(title, "Acc@0.5", chart, ["Calibration", "Condition", "Acc@0.5, %", "95 % interval"], table)
        legend = [Legend(line.name, charts.swatch(line.style)) for line in lines]
        panels.append(Panel(legend, [shown]))
    return panels


def _fragility(group: Grounding, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    conditions = list(group.conditions)[1:]
    metrics = ("accuracy", "ece_15", "aurc")
    rows = _rows(group, titles, lambda cell: [group.effect(cell.name, c, m) for c in conditions for m in metrics])
    table = effect_table(
        "Difference in differences",
        "The change against full precision under the condition less the change on val.",
        [metric for _ in conditions for metric in metrics],
        rows,
        titles=[_HEADS[metric] for _ in conditions for metric in metrics],
        spans=[(group.titles[condition], len(metrics)) for condition in conditions],
    )
    return StudySection(
        f"{prefix}shift",
        f"{about}does a shift cost the quantized model more?",
        ["Negative Acc@0.5, or positive ECE and AURC: the shift costs the quantized model more than full precision."],
        [table] if conditions else [],
    )


def _kind(cell: StudyCell) -> str:
    source = source_of(cell)
    return "free" if source in DATA_FREE else "real" if source in REAL_DATA else ""


def _contrast(group: Grounding, prefix: str, about: str) -> tuple[list[Finding], StudySection | None]:
    """Calibration without real data less calibration with real data, within each method and width."""
    widths = list(dict.fromkeys(bits_of(cell) for cell in group.others))
    wanted: list[tuple[str, str, list[StudyCell], list[StudyCell]]] = []
    for bits in widths:
        own = [cell for cell in group.others if bits_of(cell) == bits]
        for method in dict.fromkeys(method_of(cell) for cell in own):
            members = [cell for cell in own if method_of(cell) == method]
            free, real = ([c for c in members if _kind(c) == kind] for kind in ("free", "real"))
            if free and real:
                wanted.append((f"{method} {precision(bits)}", _sources(free, real), free, real))
        free, real = ([c for c in own if _kind(c) == kind] for kind in ("free", "real"))
        several = {method_of(cell) for cell in own}
        if free and real and len(several) > 1:
            note = "every cell without real data, RTN and HQQ too, less every one with it"
            wanted.append((f"{_ALL} {precision(bits)}", note, free, real))
    if not wanted:
        return [], None
    conditions = list(group.conditions)
    tables = []
    metrics = ("accuracy", "ece_15", "aurc")
    effects = {
        (i, condition, metric): _less(group, free, real, condition, metric)
        for i, (_, _, free, real) in enumerate(wanted)
        for condition in conditions
        for metric in metrics
    }
    for metric in metrics:
        rows = [
            EffectRow(head, [effects[i, condition, metric] for condition in conditions], note)
            for i, (head, note, _, _) in enumerate(wanted)
        ]
        tables.append(
            effect_table(
                f"{_HEADS[metric]}: data-free less real-data calibration",
                "Mean of the cells calibrated without real data, less the mean of those calibrated with it.",
                [metric] * len(conditions),
                rows,
                titles=[group.titles[condition] for condition in conditions],
                head="Method",
                folded=metric == "ece_15",
            )
        )
    findings = []
    for i, (head, _, _, _) in enumerate(wanted):
        if head.startswith(_ALL):  # methods differ as well: a row, not a verdict on calibration
            continue
        by_condition = {c: effects[i, c, "accuracy"] for c in conditions}
        findings.append(_contrast_finding(group, f"{about}{head}", by_condition))
    section = StudySection(
        f"{prefix}contrast",
        f"{about}does calibration need real data?",
        [
            f"Data-free: {listing(DATA_FREE)} (nothing, text alone, random images, the model's own captions). "
            f"Real data: {listing(REAL_DATA)}."
        ],
        tables,
    )
    return findings, section


def _sources(free: Sequence[StudyCell], real: Sequence[StudyCell]) -> str:
    return f"{listing(source_of(cell) for cell in free)} less {listing(source_of(cell) for cell in real)}"


def _less(
    group: Grounding, free: Sequence[StudyCell], real: Sequence[StudyCell], condition: str, metric: str
) -> Figure | None:
    sides = [[group.value(cell.name, condition, metric) for cell in cells] for cells in (free, real)]
    whole = [[found for found in side if found is not None] for side in sides]
    if any(len(kept) < len(side) for kept, side in zip(whole, sides, strict=True)):
        return None
    return less(mean(whole[0]), mean(whole[1]))


def _contrast_finding(group: Grounding, head: str, own: Mapping[str, Figure | None]) -> Finding:
    found = {c: figure for c, figure in own.items() if figure is not None}
    adjusted = corrected(list(found.values()))
    told = tell(Compared(group.titles[c], found[c], p) for c, p in zip(found, adjusted, strict=True))
    says = {
        "tied": "calibration without real data is tied with real data",
        "worse": "calibration without real data costs accuracy",
        "better": "calibration without real data does better",
        "changed": "it depends on the condition",
        "open": "no condition has an interval",
    }[told.verdict]
    if told.in_part and told.verdict in ("worse", "better"):
        says += f" in some conditions ({listing(told.in_part)})"
    return Finding(f"{head}: {says}.", told.verdict, f"Acc@0.5 against real data: {told.text}.")


def _losses(group: Grounding, titles: Mapping[str, str], about: str) -> list[Finding]:
    """What quantization costs on val, width by width: the mean over the cells of a width."""
    findings = []
    for bits in dict.fromkeys(bits_of(cell) for cell in group.others):
        own = [cell for cell in group.others if bits_of(cell) == bits]
        changes = {c.name: f for c in own if (f := group.change(c.name, "clean", "accuracy")) is not None}
        if not changes:
            continue
        p = dict(zip(changes, corrected(list(changes.values())), strict=True))
        entries = {name: as_difference(found, True, p[name]) for name, found in changes.items()}
        counts = [sum(e is not None and e.effect == kind for e in entries.values()) for kind in ("worse", "tied")]
        best, worst = (pick(changes, key=lambda name: changes[name].value) for pick in (max, min))
        ends = [f"{titles[name]} ({in_words(changes[name], True, p[name])})" for name in (best, worst)]
        text = (
            f"{about}{precision(bits)} on val: of {len(changes)} quantizations {counts[0]} lose Acc@0.5 against full "
            f"precision and {counts[1]} are tied; from {ends[0]} to {ends[1]}."
        )
        findings.append(Finding(text, "worse" if counts[0] == len(changes) else "changed" if counts[0] else "tied"))
    return findings


def _shifts(group: Grounding, about: str) -> list[Finding]:
    """What each shift costs the quantized cells beyond full precision: their mean, and how many stand one by one."""
    single = {
        (condition, cell.name): found
        for condition in list(group.conditions)[1:]
        for cell in group.others
        if (found := group.effect(cell.name, condition, "accuracy")) is not None
    }
    means = {at: mean([f for (c, _), f in single.items() if c == at]) for at in dict.fromkeys(c for c, _ in single)}
    p_single = corrected(list(single.values()))
    entries = {key: as_difference(single[key], True, p) for key, p in zip(single, p_single, strict=True)}
    findings = []
    for (condition, average), p in zip(means.items(), corrected(list(means.values())), strict=True):
        own = [entry for (c, _), entry in entries.items() if c == condition]
        counts = {kind: sum(e is not None and e.effect == kind for e in own) for kind in ("worse", "better", "tied")}
        effect = as_difference(average, True, p)
        word = effect.effect if effect else "open"
        text = (
            f"{about}{group.titles[condition]}: beyond what the shift does to full precision, quantized models change "
            f"by {in_words(average, True, p)} points of Acc@0.5 (mean over {len(own)}: {word}); one by one "
            f"{counts['worse']} are hurt more, {counts['better']} less, {counts['tied']} tied."
        )
        findings.append(Finding(text, effect.effect if effect else "open"))
    return findings


def _calibrated(group: Grounding, about: str) -> list[Finding]:
    name = group.twin.name
    found = {s: group.miscalibration(name, "clean", s) for s in SCALINGS if s in group.scaled}
    told = {s: f for s, f in found.items() if f is not None and f.available}
    if len(told) < 2:
        return []
    changes = {s: less(f, told["as it is"]) for s, f in told.items() if s != "as it is"}
    shown = "; ".join(f"{s} {number(f.value, 'percent')} {interval(f.lo, f.hi, 'percent')}" for s, f in told.items())
    adjusted = corrected(list(changes.values()))
    entries = [as_difference(f, False, p) for f, p in zip(changes.values(), adjusted, strict=True)]
    effects = [entry.effect for entry in entries if entry]
    text = f"{about}calibration of full precision's boxes on val (ECE at IoU ≥ 0.5): {shown}."
    return [Finding(text, overall(effects))]


def _calibration(group: Grounding, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    conditions = list(group.conditions)
    scalings = [scaling for scaling in SCALINGS if scaling in group.scaled]
    rows = [
        EffectRow(
            titles[group.twin.name],
            [group.miscalibration(group.twin.name, c, s) for c in conditions for s in scalings],
            values=True,
        )
    ]
    rows += [
        EffectRow(row.head, row.figures, row.note, values=not row.group, group=row.group)
        for row in _rows(
            group, titles, lambda cell: [group.miscalibration(cell.name, c, s) for c in conditions for s in scalings]
        )
    ]
    table: StudyTable = effect_table(
        "ECE at IoU ≥ 0.5",
        "As the model states it, and after temperature and Platt scaling fitted on the cell's own threshold split. "
        "The intervals hold the map fixed.",
        ["ece_15" for _ in conditions for _ in scalings],
        rows,
        titles=[scaling for _ in conditions for scaling in scalings],
        spans=[(group.titles[condition], len(scalings)) for condition in conditions],
    )
    text = (
        "The joint probability of a dozen coordinate tokens is small for its length alone. Scaling mends the stated "
        f"probability, never the order of the boxes: {family_title(group.family)}'s AURC above is the same after it."
    )
    return StudySection(f"{prefix}calibration", f"{about}does it know when the box is wrong?", [text], [table])
