"""The study of reliable VQA: does a quantized model know when it is wrong, by MaxProb and by a Selector?

Protocol of arXiv 2602.13289: accuracy, ECE, coverage at a tolerated risk, AURC (the paper's AUC) and effective
reliability in distribution; the same under shift, and on mixtures of both; and what it leaves out: thresholds that were
chosen on clean full precision, applied to every quantization and shift.
"""

from __future__ import annotations

from collections.abc import Mapping

from bitquake.metrics import METRICS, Estimate, Mixture, mixture_curve, ranking_caution
from bitquake.reports import charts
from bitquake.reports.charts import Line, Point
from bitquake.reports.entries import LEVEL
from bitquake.reports.evaluation import any_confidence, samples_of
from bitquake.reports.figures import Figure as Chart
from bitquake.reports.figures import Legend, Panel
from bitquake.reports.formatting import interval, number
from bitquake.reports.names import DEFINITIONS, confidence_title
from bitquake.reports.problems import Problem
from bitquake.reports.schema import TransferEntry
from bitquake.reports.studies.architectures import SELECTIVE_METRICS, Architecture, architectures
from bitquake.reports.studies.effects import EffectRow, effect_table
from bitquake.reports.studies.joint import METRIC_WORDS, corrected_by_key, mean
from bitquake.reports.studies.naming import bits_of, cell_titles, method_of, precision
from bitquake.reports.studies.page import (
    Compared,
    Finding,
    Shown,
    StudyPage,
    StudyPanels,
    StudyRow,
    StudySection,
    StudyTable,
    Verdict,
    metric_column,
    missing,
    overall,
    tell,
    value,
    value_and_change,
)
from bitquake.reports.studies.study import Study
from bitquake.reports.tables import Column
from bitquake.reports.transfer import TOLERATED, Fitted, transfer_entries
from bitquake.reports.transfer_views import risk_cell, worst_first

_BESIDE = SELECTIVE_METRICS[1:]
_MIXED = ("accuracy", "coverage_at_risk_1", "coverage_at_risk_5")
_CURVE_REPLICATES = 500
"""Of a curve's intervals: 9 shares for each quantization and confidence are for looking at, none is judged."""


def selective_page(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> StudyPage:
    """Does a quantized model still know when it is wrong?"""
    titles = cell_titles(study)
    groups = architectures(study, problems, replicates, seed)
    findings: list[Finding] = []
    sections: list[StudySection] = []
    for at, group in enumerate(groups):
        prefix = f"g{at}-" if len(groups) > 1 else ""
        about = f"{group.twin.plan.model}: " if len(groups) > 1 else ""
        short = {name: title.removeprefix(f"{group.twin.plan.model} · ") for name, title in titles.items()}
        promises, transfer = _transfer(group, short, prefix, about, replicates, seed)
        findings += [*_quantized(group, short, about), *_learned(group, about), *promises]
        sections.append(_in_distribution(group, short, prefix, about))
        if len(group.confidences) > 1:
            sections.append(_selectors(group, short, prefix, about))
        sections += [transfer] if transfer else []
        if group.shifts:
            sections.append(_mixtures(group, short, prefix, about, replicates, seed))
    if not groups:
        findings.append(Finding("No quantized cell has a task together with its full-precision control yet.", "open"))
    return StudyPage(findings, sections)


def _in_distribution(group: Architecture, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    tables = []
    for confidence in group.confidences:
        tables.append(_value_table(group, titles, group.clean.task, confidence, confidence != group.confidences[0]))
    for task in group.shifts:
        for confidence in group.confidences:
            tables.append(_value_table(group, titles, task, confidence, True))
    notes = [
        "†: too few samples, or too wide an interval, to rank by. C@1% rests on a handful of errors.",
        "Φ: score with a penalty of 10 or 100 for each wrong answer, its threshold fitted on the cell's own threshold "
        "split, in distribution.",
    ]
    return StudySection(
        f"{prefix}id", f"{about}{group.title(group.clean.task)} and its shifts", [], tables, notes=notes
    )


def _value_table(
    group: Architecture, titles: Mapping[str, str], task: str, confidence: str, folded: bool
) -> StudyTable:
    rows = []
    metrics = SELECTIVE_METRICS
    names = [cell.name for cell in group.members if group.value(cell.name, confidence, task, "accuracy") is not None]
    changes = {
        (name, metric): found
        for name in names
        for metric in metrics
        if name != group.twin.name and (found := group.change(name, confidence, task, metric)) is not None
    }
    adjusted = corrected_by_key(changes)
    n = len(group.cells[task][group.twin.name].answers)
    for name in names:
        cells: list[Shown] = []
        for metric in metrics:
            found = group.value(name, confidence, task, metric)
            if found is None:
                cells.append(missing())
                continue
            caution = ranking_caution(metric, Estimate(found.value, found.lo, found.hi, n, n, 0))
            caution = caution if found.available else ""
            if (name, metric) in changes:
                change, p = changes[name, metric], adjusted[name, metric]
                cells.append(value_and_change(found, change, METRICS[metric], adjusted=p, caution=caution))
            else:
                cells.append(value(found, METRICS[metric].unit, caution=caution))
        rows.append(StudyRow(titles[name], cells, twin=name == group.twin.name))
    title = confidence_title(confidence)
    definition = DEFINITIONS.get(title, "")
    return StudyTable(
        f"{group.title(task)}, {title}",
        f"{task}, n = {n:,}. {title}: {definition}. Value; below it the change against full precision's {title}.",
        [metric_column(metric) for metric in metrics],
        rows,
        folded=folded,
    )


def _selectors(group: Architecture, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    tables = []
    for task in [group.clean.task, *group.shifts]:
        rows: list[EffectRow] = []
        for confidence in group.confidences[1:]:
            own = []
            for cell in group.members:
                found = [group.beside(cell.name, confidence, task, metric) for metric in _BESIDE]
                if any(one is not None for one in found):
                    own.append(EffectRow(titles[cell.name], found))
            rows += [EffectRow(confidence_title(confidence), group=True), *own] if own else []
        table = effect_table(
            f"{group.title(task)}: Selector less MaxProb",
            "The same answers, ranked by a learned confidence instead of the model's own probability.",
            _BESIDE,
            rows,
            folded=task != group.clean.task,
        )
        tables.append(table)
    text = "A Selector changes which answers are given, never what is said: accuracy is the same by construction."
    return StudySection(f"{prefix}selector", f"{about}does a Selector know better?", [text], tables)


def _transfer(
    group: Architecture, titles: Mapping[str, str], prefix: str, about: str, replicates: int, seed: int
) -> tuple[list[Finding], StudySection | None]:
    """Thresholds chosen on clean full precision, on every cell and task."""
    fitted = Fitted(replicates, seed)
    split = group.clean.threshold_task
    fitting = {cell.name: cell.tasks[split] for cell in group.members if split in cell.tasks}
    names = {cell.name: cell.name for cell in group.members}
    entries: list[TransferEntry] = []
    for found in group.cells.values():
        images = {answer.image_id for cell in found.values() for answer in cell.answers.values()}
        own = {
            name: cell
            for name, cell in fitting.items()
            if not images & {answer.image_id for answer in cell.answers.values()}
        }
        entries += transfer_entries(found, own, names, fitted, twin=group.twin.name)
    if not entries:
        return [], None
    tasks = list(group.cells)
    tables = []
    for confidence in group.confidences:
        by_place = {(e.run, e.task, e.risk_target): e for e in entries if e.confidence == confidence}
        if not by_place:
            continue
        rows = []
        for cell in group.members:
            shown = [_promise(by_place.get((cell.name, task, risk))) for task in tasks for risk in TOLERATED]
            rows.append(StudyRow(titles[cell.name], shown, twin=cell is group.twin))
        tables.append(
            StudyTable(
                f"Risk really taken, {confidence_title(confidence)}",
                "A threshold chosen on clean full-precision answers for a tolerated risk, applied to the model in the "
                "row: the risk it really takes, with the luck of the threshold in the interval, and how many questions "
                "it answers.",
                [Column(f"{100 * risk:g} % tolerated", "risk, %", arrow="down") for _ in tasks for risk in TOLERATED],
                rows,
                folded=confidence != group.confidences[0],
                spans=[(group.title(task), len(TOLERATED)) for task in tasks],
            )
        )
    primary = [e for e in entries if e.confidence == group.confidences[0]]
    counts = {v: sum(e.verdict == v for e in primary) for v in ("kept", "broken", "open", "empty")}
    verdict: Verdict = "worse" if counts["broken"] else "tied" if counts["open"] else "better"
    worst = worst_first(primary)[0]
    told = ""
    if worst.verdict == "broken" and worst.risk.value is not None and worst.risk.lo is not None and worst.risk.hi:
        limits = interval(worst.risk.lo, worst.risk.hi, "percent")
        told = (
            f" Worst: {titles[worst.run]} on {group.title(worst.task)} takes {number(worst.risk.value, 'percent')} % "
            f"{limits} where {100 * worst.risk_target:g} % was tolerated."
        )
    text = (
        f"{about}MaxProb thresholds chosen on clean full precision, applied to every quantization and shift "
        f"({len(primary)} promises): {counts['kept']} kept, {counts['broken']} broken, {counts['open']} not decided, "
        f"{counts['empty']} answer nothing.{told}"
    )
    section = StudySection(f"{prefix}transfer", f"{about}does a threshold keep its promise?", [], tables)
    return [Finding(text, verdict)], section


def _promise(entry: TransferEntry | None) -> Shown:
    if entry is None:
        return missing()
    told = {
        "value": entry.risk.value,
        "lo": entry.risk.lo,
        "hi": entry.risk.hi,
        "verdict": entry.verdict,
        "coverage": entry.coverage.value,
        "threshold": entry.threshold,
    }
    cell = risk_cell(entry)
    if entry.coverage.value is not None:
        answered = f"answers {number(entry.coverage.value, 'percent')} %"
        cell = type(cell)(cell.value, cell.interval, cell.delta, cell.word, answered, cell.css)
    return Shown(cell, told)


def _quantized(group: Architecture, titles: Mapping[str, str], about: str) -> list[Finding]:
    """What each quantization does to accuracy and to reliability, in distribution and under MaxProb."""
    task, confidence = group.clean.task, group.confidences[0]
    metrics = tuple(METRIC_WORDS)
    changes = {
        (cell.name, metric): found
        for cell in group.others
        for metric in metrics
        if (found := group.change(cell.name, confidence, task, metric)) is not None
    }
    adjusted = corrected_by_key(changes)
    findings = []
    for bits in dict.fromkeys(bits_of(cell) for cell in group.others):
        parts: list[str] = []
        effects: list[str] = []
        for cell in [one for one in group.others if bits_of(one) == bits]:
            keys = {m: key for m in metrics if (key := (cell.name, m)) in changes}
            told = tell(
                Compared(METRIC_WORDS[m], changes[key], adjusted[key], METRICS[m].higher_is_better)
                for m, key in keys.items()
            )
            effects += told.effects.values()
            parts.append(f"{titles[cell.name]}: {told.text or 'not available'}.")
        on = f"{precision(bits)} on {group.title(task)} against full precision, MaxProb"
        findings.append(Finding(f"{about}{on}.", overall(effects), " ".join(parts)))
    return findings


def _learned(group: Architecture, about: str) -> list[Finding]:
    """Each kind of Selector against MaxProb: mean over the quantizations, in and out of distribution."""
    wanted = {}
    for confidence in group.confidences[1:]:
        for task in group.cells:
            found = [group.beside(cell.name, confidence, task, "aurc") for cell in group.others]
            kept = [one for one in found if one is not None]
            if kept:
                wanted[confidence, task] = (mean(kept), len(kept))
    adjusted = corrected_by_key({key: found for key, (found, _) in wanted.items()})
    findings = []
    for confidence in group.confidences[1:]:
        told = tell(
            Compared(group.title(task), average, adjusted[name, task], False, f"mean over {n}")
            for (name, task), (average, n) in wanted.items()
            if name == confidence
        )
        if told.effects:
            text = f"{about}{confidence_title(confidence)} against MaxProb, AURC: {told.text}."
            findings.append(Finding(text, told.verdict))
    return findings


def _mixtures(
    group: Architecture, titles: Mapping[str, str], prefix: str, about: str, replicates: int, seed: int
) -> StudySection:
    """Accuracy and coverage from all in distribution to all shifted."""
    parts = []
    for task in group.shifts:
        for confidence in group.confidences[:2]:
            curves = _mixture_curves(group, task, confidence, replicates, seed)
            if not curves:
                continue
            learned = confidence != group.confidences[0]
            panels = _mixture_panels(group, titles, curves, learned)
            heading = f"Mixed with {group.title(task)}, {confidence_title(confidence)}"
            parts.append(StudyPanels(heading, panels, folded=learned))
    text = (
        "From 100;0 (all in distribution) to 0;100 (all shifted): exact expectations from the answers to both tasks, "
        f"not one random mixture; intervals of {min(replicates, _CURVE_REPLICATES):,} replicates."
    )
    return StudySection(
        f"{prefix}mixtures", f"{about}what if some of the questions are shifted?", [text], figures=parts
    )


def _mixture_curves(
    group: Architecture, task: str, confidence: str, replicates: int, seed: int
) -> dict[str, list[Mixture]]:
    out = {}
    plain, shifted = group.cells[group.clean.task], group.cells[task]
    for cell in group.members:
        if cell.name not in plain or cell.name not in shifted:
            continue
        inside, outside = (samples_of(side[cell.name], confidence) for side in (plain, shifted))
        if any_confidence(inside) and any_confidence(outside):
            learned = confidence != group.confidences[0]
            out[cell.name] = mixture_curve(
                inside,
                outside,
                metrics=_MIXED[1:] if learned else _MIXED,
                replicates=min(replicates, _CURVE_REPLICATES),
                seed=seed,
                level=LEVEL,
            )
    return out


def _mixture_panels(
    group: Architecture, titles: Mapping[str, str], curves: Mapping[str, list[Mixture]], learned: bool
) -> list[Panel]:
    """One panel for each method: full precision and the method's widths."""
    methods: dict[str, list[str]] = {}
    for cell in group.others:
        if cell.name in curves:
            methods.setdefault(method_of(cell), []).append(cell.name)
    panels = []
    for names in methods.values():
        chosen = [name for name in [group.twin.name, *names] if name in curves][: charts.N_STYLES]
        figures = []
        for metric in _MIXED[1:] if learned else _MIXED:
            lines, table = [], []
            for style, name in enumerate(chosen):
                points = []
                for mixture in curves[name]:
                    found = mixture.metrics[metric]
                    if found.available:
                        points.append(Point(mixture.ood_share, found.value, found.lo, found.hi))
                        shown = [number(found.value, "percent"), interval(found.lo, found.hi, "percent")]
                        table.append([titles[name], f"{100 * mixture.ood_share:.0f}", *shown])
                if points:
                    lines.append(Line(titles[name], style, points))
            title = METRICS[metric].title
            if lines:
                chart = charts.mixture_chart(title, f"{title} by share of shifted questions", f"{title}, %", lines)
                head = ["Quantization", "Shifted, %", f"{title}, %", "95 % interval"]
                figures.append(Chart(title, "", chart, head, table))
        legend = [Legend(titles[name], charts.swatch(style)) for style, name in enumerate(chosen)]
        panels.append(Panel(legend, figures))
    return panels
