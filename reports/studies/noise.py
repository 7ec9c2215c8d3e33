"""The noise study: does low precision amplify what noise does? Difference in differences, condition by condition.

A quantized model loses in noise what full precision loses, and perhaps more, or less. Its change against full precision
under a noise less its change on the clean images of the same samples is that more; the mean over noises and severities
is the verdict, in both directions. Sources: bitquake.metrics.robustness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitquake.metrics import METRICS, Figure, quantization_error, relative_robustness
from bitquake.reports import charts
from bitquake.reports.charts import Line, Point
from bitquake.reports.comparison import noise_group
from bitquake.reports.conditions import Part
from bitquake.reports.entries import LEVEL
from bitquake.reports.figures import Figure as Chart
from bitquake.reports.figures import Legend, Panel
from bitquake.reports.formatting import interval, number
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell
from bitquake.reports.studies.charts import heat_map
from bitquake.reports.studies.effects import EffectRow, effect_table
from bitquake.reports.studies.joint import METRIC_WORDS, STUDY_METRICS, corrected_by_key, difference_of, mean, value_of
from bitquake.reports.studies.naming import cell_titles, family_title, listing
from bitquake.reports.studies.noise_effects import NoiseGroup, noise_groups, noise_name, single_effects
from bitquake.reports.studies.page import (
    Compared,
    Finding,
    Shown,
    StudyPage,
    StudyPanels,
    StudyRow,
    StudySection,
    StudyTable,
    as_difference,
    difference,
    missing,
    numbers,
    tell,
    value,
    words,
)
from bitquake.reports.studies.study import Study
from bitquake.reports.tables import Column, TableCell

_GROUPS = {
    "imagenet_c": "ImageNet-C noises",
    "imagenet_c_extra": "further ImageNet-C noises",
    "camera": "camera noises",
    "text": "noises of the question",
    "other": "other noises",
}
_WORST = 10
_DARKEST = {"accuracy": 0.10, "ece_15": 0.10, "coverage_at_risk_5": 0.20, "aurc": 0.10}
"""Difference in differences at which a square of the heat map is fully tinted."""
_LITTLE_LEFT = 0.10
"""Clean accuracy lost to quantization above which a model has less to lose in noise."""


def noise_page(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> StudyPage:
    """Does low precision amplify noise?"""
    groups = noise_groups(study, problems, replicates=replicates, seed=seed)
    titles = cell_titles(study)
    findings: list[Finding] = []
    sections: list[StudySection] = []
    for at, group in enumerate(groups):
        prefix = f"g{at}-" if len(groups) > 1 else ""
        about = f"{group.twin.plan.model}, {family_title(group.family)}: " if len(groups) > 1 else ""
        found = _findings(group, titles, about)
        findings += found
        sections += [
            _verdicts(group, titles, prefix, about),
            _heat(group, titles, prefix, about),
            _curves(group, titles, prefix, about),
            _errors(group, titles, prefix, about),
        ]
    if not groups:
        text = "No quantized cell has a noisy task together with its full-precision control yet."
        findings.append(Finding(text, "open"))
    return StudyPage(findings, sections, {"conditions": _every(groups)})


def _findings(group: NoiseGroup, titles: Mapping[str, str], about: str) -> list[Finding]:
    pooled = {(name, metric): group.pooled(name, metric) for name in group.effects for metric in STUDY_METRICS}
    figures = {key: found for key, found in pooled.items() if found is not None}
    adjusted = corrected_by_key(figures)
    words_of = {"worse": "amplified", "better": "damped", "tied": "tied", "changed": "changed"}
    says = {
        "worse": "low precision amplifies noise",
        "better": "low precision loses less in noise than full precision",
        "tied": "nothing shows that low precision amplifies noise, or damps it",
        "changed": "it depends on the figure",
        "open": "no figure has an interval",
    }
    out = []
    for name in group.effects:
        compared = [
            Compared(METRIC_WORDS[m], figures[name, m], adjusted[name, m], METRICS[m].higher_is_better)
            for m in STUDY_METRICS
        ]
        told = tell(compared, words_of)
        text = f"{about}{titles[name]}: {says[told.verdict]}"
        if told.in_part and told.verdict in ("worse", "better"):
            text += f" in some figures ({listing(told.in_part)})"
        behind = (
            f"Over {len(group.of(name))} noisy conditions, points beyond full precision's own loss: {told.text}."
            f"{_little_left(group, name)}"
        )
        out.append(Finding(f"{text}.", told.verdict, behind))
    return out


def _little_left(group: NoiseGroup, name: str) -> str:
    lost = _clean_change(group, name)
    if lost is None or lost.value > -_LITTLE_LEFT:
        return ""
    shown = number(-lost.value, "percent")
    return f" It has lost {shown} points on clean images already, and so has less to lose."


def _clean_change(group: NoiseGroup, name: str, metric: str = "accuracy") -> Figure | None:
    part = group.drawn[Part(group.clean.task)]
    if name not in part.keys:
        return None
    return difference_of(part, name, group.twin.name, metric)


def _verdicts(group: NoiseGroup, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    names = list(group.effects)
    counts = {name: _count(group, name) for name in names}
    alike = len(set(counts.values())) == 1  # said once then, above the rows
    pooled = effect_table(
        "All noises and severities",
        "Difference in differences, mean over all noisy conditions: the change against full precision in noise less "
        f"the same change on clean images of the same samples.{f' {counts[names[0]]}.' if alike else ''}",
        STUDY_METRICS,
        [_effect_row(group, titles, name, note="" if alike else counts[name]) for name in names],
    )
    kinds = list(dict.fromkeys(noise_group(noise_name(cell)) for cell in group.noises.values()))
    by_kind = _grouped_table(
        group,
        titles,
        {_GROUPS[kind]: _of_kind(kind) for kind in kinds},
        "By kind of noise",
        "The same, over the noises of one kind.",
    )
    severities = sorted({cell.severity for cell in group.noises.values()})
    by_severity = _grouped_table(
        group,
        titles,
        {f"severity {s}": _of_severity(s) for s in severities},
        "By severity",
        "The same, over all noises at one severity.",
    )
    clean = _clean_table(group, titles)
    worst = _worst(group, titles)
    tables = [pooled, clean, *([by_kind] if len(kinds) > 1 else []), *([by_severity] if len(severities) > 1 else [])]
    tables += [worst[1]] if worst[1].rows else []
    sentences = [
        "A model that loses as much in noise as on clean images is worse, but not more fragile. Here stands what noise "
        "costs it beyond that: negative accuracy, or positive ECE and AURC, means that low precision amplifies noise.",
    ]
    return StudySection(
        f"{prefix}verdict",
        f"{about}does low precision amplify noise?",
        [*sentences, worst[0]],
        tables,
    )


def _count(group: NoiseGroup, name: str) -> str:
    tasks = group.of(name)
    sizes = sorted({len(group.parts[task][0].ids or group.noises[task].answers) for task in tasks})
    n = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"{len(tasks)} conditions of {n} samples"


def _of_kind(kind: str) -> Callable[[Cell], bool]:
    return lambda cell: noise_group(noise_name(cell)) == kind


def _of_severity(severity: int) -> Callable[[Cell], bool]:
    return lambda cell: cell.severity == severity


def _effect_row(
    group: NoiseGroup,
    titles: Mapping[str, str],
    name: str,
    keep: Callable[[Cell], bool] = lambda cell: True,
    note: str = "",
) -> EffectRow:
    return EffectRow(titles[name], [group.pooled(name, metric, keep) for metric in STUDY_METRICS], note)


def _grouped_table(
    group: NoiseGroup, titles: Mapping[str, str], kinds: Mapping[str, Callable[[Cell], bool]], label: str, caption: str
) -> StudyTable:
    """Every quantization below a line for each kind of noises; kinds: its name -> which noises."""
    rows = []
    for kind, keep in kinds.items():
        rows.append(EffectRow(kind[:1].upper() + kind[1:], group=True))
        rows += [_effect_row(group, titles, name, keep) for name in group.effects]
    return effect_table(label, caption, STUDY_METRICS, rows)


def _clean_table(group: NoiseGroup, titles: Mapping[str, str]) -> StudyTable:
    part, twin = group.drawn[Part(group.clean.task)], group.twin.name
    rows = [EffectRow(titles[twin], [value_of(part, twin, metric) for metric in STUDY_METRICS], values=True)]
    rows += [
        EffectRow(titles[name], [difference_of(part, name, twin, metric) for metric in STUDY_METRICS])
        for name in part.keys
        if name != twin
    ]
    n = len(group.clean.answers)
    caption = f"{group.clean.task}, {n:,} samples: full precision's values, and the change against them."
    return effect_table("On clean images", caption, STUDY_METRICS, rows)


def _worst(group: NoiseGroup, titles: Mapping[str, str]) -> tuple[str, StudyTable]:
    """In words how many single conditions stand, and the ten worst of them."""
    each = single_effects(group)
    judged = []
    counts = {"worse": 0, "better": 0, "tied": 0, "changed": 0}
    for (name, task, metric), (figure, p) in each.items():
        entry = as_difference(figure, METRICS[metric].higher_is_better, p)
        if entry:
            counts[entry.effect] += 1
            judged.append((entry.effect != "worse", p, -abs(figure.value), name, task, metric))
    standing = [item for item in sorted(judged) if not item[0]][:_WORST]
    rows = []
    for _, p, _, name, task, metric in standing:
        cell = group.noises[task]
        rows.append(
            StudyRow(
                titles[name],
                [
                    words(f"{noise_name(cell).replace('_', ' ')} {cell.severity or ''}"),
                    words(METRICS[metric].title),
                    difference(each[name, task, metric][0], METRICS[metric], power=True, adjusted=p),
                    Shown(words(_p(p)).cell, {"value": p}),
                ],
            )
        )
    text = (
        f"Of {sum(counts.values())} single effects (quantization × condition × figure) {counts['worse']} are "
        f"amplified, {counts['better']} damped and {counts['tied']} tied after correction for all of them together."
    )
    columns = [
        Column("Condition", text=True),
        Column("Figure", text=True),
        Column("Effect", "points", "difference in differences"),
        Column("p", "corrected"),
    ]
    label = "The ten worst single conditions" if len(rows) == _WORST else f"Amplified single conditions ({len(rows)})"
    return text, StudyTable(label, "Only those that stand after correction.", columns, rows)


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _heat(group: NoiseGroup, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    each = single_effects(group)
    noises = list(dict.fromkeys(noise_name(cell) for cell in group.noises.values()))
    severities = sorted({cell.severity for cell in group.noises.values()})
    at = {(noise_name(cell), cell.severity): task for task, cell in group.noises.items()}
    parts = []
    for metric in STUDY_METRICS:
        drawn = [_heat_chart(each, name, titles[name], metric, noises, severities, at) for name in group.effects]
        parts.append(StudyPanels(METRICS[metric].title, [Panel([], drawn)], folded=metric != "accuracy"))
    tints = listing(f"{100 * _DARKEST[metric]:.0f} points ({METRIC_WORDS[metric]})" for metric in STUDY_METRICS)
    text = (
        "One square for each noise and severity. Orange: the noise costs the quantized model more than full precision; "
        f"blue: less. The tint is full at {tints}. A dot: the effect stands after correction; without one nothing was "
        "shown. Its numbers: points, their 95 % interval, and p after correction."
    )
    return StudySection(f"{prefix}map", f"{about}noise by noise", [text], figures=parts)


def _heat_chart(
    each: Mapping[tuple[str, str, str], tuple[Figure, float]],
    name: str,
    title: str,
    metric: str,
    noises: Sequence[str],
    severities: Sequence[int],
    at: Mapping[tuple[str, int], str],
) -> Chart:
    tints: list[list[tuple[str, float, bool] | None]] = []
    table: list[list[str]] = []
    better = METRICS[metric].higher_is_better
    for noise in noises:
        row: list[tuple[str, float, bool] | None] = []
        told = [noise.replace("_", " ")]
        for severity in severities:
            found = each.get((name, at.get((noise, severity), ""), metric))
            entry = as_difference(found[0], better, found[1]) if found else None
            if entry is None or found is None:
                row.append(None)
                told.append("n/a")
                continue
            harmful = (entry.delta < 0) == bool(better)
            side = "worse" if harmful else "better"
            row.append((side, abs(entry.delta) / _DARKEST[metric], entry.effect != "tied"))
            shift = number(entry.delta, "percent", signed=True)
            limits = interval(entry.lo, entry.hi, "percent", signed=True)
            told.append(f"{shift} {limits}, p {_p(found[1])}")
        tints.append(row)
        table.append(told)
    shown = heat_map(
        f"{title}: {METRICS[metric].title} by noise and severity",
        "Difference in differences against full precision",
        [noise.replace("_", " ") for noise in noises],
        [str(severity or "–") for severity in severities],
        tints,
    )
    # Laid out as the squares are: a row for each of them would be most of the page.
    head = ["Noise", *(f"severity {s}" if s else "–" for s in severities)]
    return Chart(title, f"{METRIC_WORDS[metric]}, by severity", shown, head, table)


def _curves(group: NoiseGroup, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    """Values against severity, mean over the noises that stand at every severity."""
    severities = sorted({cell.severity for cell in group.noises.values() if cell.severity})
    tasks: dict[str, dict[int, str]] = {}
    for task, cell in group.noises.items():
        tasks.setdefault(noise_name(cell), {})[cell.severity] = task
    whole = [noise for noise, own in tasks.items() if set(severities) <= own.keys()]
    names = [group.twin.name, *group.effects]
    panels = []
    step = charts.N_STYLES - 1
    for start in range(0, max(1, len(names) - 1), step):
        chosen = [names[0], *names[1 + start : 1 + start + step]]
        figures = [
            _curve(group, titles, metric, chosen, severities, [tasks[noise] for noise in whole])
            for metric in STUDY_METRICS
            if whole and severities
        ]
        if figures:
            legend = [Legend(titles[name], charts.swatch(at)) for at, name in enumerate(chosen)]
            panels.append(Panel(legend, figures))
    text = f"Mean over {len(whole)} noises that were run at severities {listing(str(s) for s in severities)}."
    return StudySection(f"{prefix}severity", f"{about}severity", [text], figures=[StudyPanels("", panels)])


def _curve(
    group: NoiseGroup,
    titles: Mapping[str, str],
    metric: str,
    names: Sequence[str],
    severities: Sequence[int],
    tasks: Sequence[Mapping[int, str]],
) -> Chart:
    lines, table = [], []
    for style, name in enumerate(names):
        points = []
        for severity in [0, *severities]:
            parts = [group.parts[own[severity]][0] if severity else group.parts[own[severities[0]]][1] for own in tasks]
            if not all(name in group.drawn[part].keys for part in parts):
                continue
            found = mean([value_of(group.drawn[part], name, metric) for part in parts], METRICS[metric].bounds)
            if found.available:
                points.append(Point(severity, found.value, found.lo, found.hi))
                shown = interval(found.lo, found.hi, "percent")
                table.append([titles[name], str(severity or "clean"), number(found.value, "percent"), shown])
        if points:
            lines.append(Line(titles[name], style, points))
    title = METRICS[metric].title
    chart = charts.severity_chart(title, f"{title} by severity, mean over noises", f"{title}, %", lines)
    return Chart(title, "mean over noises", chart, ["Quantization", "Severity", f"{title}, %", "95 % interval"], table)


def _errors(group: NoiseGroup, titles: Mapping[str, str], prefix: str, about: str) -> StudySection:
    """qCE and mqCE, and relative robustness."""
    by_noise: dict[str, list[str]] = {}
    for task, cell in group.noises.items():
        by_noise.setdefault(noise_name(cell), []).append(task)
    names = list(group.effects)
    errors: dict[tuple[str, str], Figure] = {}
    kept: dict[tuple[str, str], Figure] = {}
    for noise, tasks in by_noise.items():
        for name in [group.twin.name, *names]:
            both = [group.parts[task] for task in tasks]
            if not all(name in group.drawn[part].keys for pair in both for part in pair):
                continue
            own = [group.twin.name, name]
            there = [group.drawn[part].of(own) for part, _ in both]
            here = [group.drawn[part].of(own) for _, part in both]
            each = [
                relative_robustness(plain, [noisy], run=1, level=LEVEL)
                for plain, noisy in zip(here, there, strict=True)
            ]
            kept[noise, name] = mean(each)
            if name != group.twin.name:
                errors[noise, name] = quantization_error(there, run=1, level=LEVEL)
    for name in names:
        every = [errors[noise, name] for noise in by_noise if (noise, name) in errors]
        if len(every) == len(by_noise):
            errors["", name] = mean(every)
    adjusted = corrected_by_key(errors, null=1.0)
    rows = [
        StudyRow(
            noise.replace("_", " ") or "Mean over the noises (mqCE)",
            [_error(errors.get((noise, name)), adjusted.get((noise, name), 1.0)) for name in names],
            twin=not noise,
        )
        for noise in ["", *by_noise]
    ]
    columns = [Column(titles[name], "qCE", "errors divided by full precision's errors") for name in names]
    table = StudyTable(
        "Errors in noise against full precision's (qCE)",
        "Errors summed over the severities of a noise, divided by full precision's: 1 is equal, 1.2 a fifth more.",
        columns,
        rows,
        "Noise",
    )
    everyone = [group.twin.name, *names]
    robust = StudyTable(
        "Relative robustness",
        "Accuracy in noise divided by the same model's accuracy on clean images; 1: nothing is lost. A model that is "
        "worse everywhere can stand high here.",
        [Column(titles[name], "of 1") for name in everyone],
        [
            StudyRow(
                noise.replace("_", " "),
                [
                    value(kept[noise, name], "fraction", digits=2) if (noise, name) in kept else missing()
                    for name in everyone
                ],
            )
            for noise in by_noise
        ],
        "Noise",
        folded=True,
    )
    return StudySection(f"{prefix}errors", f"{about}errors in noise", tables=[table, robust])


def _error(found: Figure | None, adjusted: float) -> Shown:
    """A quotient of errors, judged against 1."""
    if found is None or not found.available:
        return missing(found.note if found else "")
    stands = adjusted <= 1 - LEVEL
    effect = "worse" if stands and found.lo > 1 else "better" if stands and found.hi < 1 else "tied"
    share = abs(found.value - 1)
    css = effect if effect == "tied" else f"{effect} size{1 if share < 0.05 else 2 if share < 0.25 else 3}"
    close = effect != "tied" and share < 0.01  # more digits where a quotient that is not 1 would read as 1
    shown = value(found, "fraction", digits=4 if close else 2).cell
    word = "≈ tied" if effect == "tied" else effect
    cell = TableCell(shown.value, shown.interval, word=word, css=css)
    return Shown(cell, {**numbers(found), "verdict": effect, "p_adjusted": adjusted})


def _every(groups: Sequence[NoiseGroup]) -> list[dict[str, Any]]:
    """Every single effect, for ``study.json``."""
    out = []
    for group in groups:
        for (name, task, metric), (found, p) in single_effects(group).items():
            told = {"cell": name, "task": task, "metric": metric, **numbers(found)}
            out.append({**told, "p_adjusted": None if np.isnan(p) else p})
    return out
