"""A study page as data: findings, sections, tables whose cells keep their numbers, figures; one template shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bitquake.metrics import METRICS, Figure, Metric, minimum_detectable_difference
from bitquake.reports import formatting
from bitquake.reports.entries import LEVEL, effect_of
from bitquake.reports.figures import Panel
from bitquake.reports.schema import DifferenceEntry, Unit
from bitquake.reports.tables import Column, TableCell, difference_cell


@dataclass(frozen=True)
class Shown:
    """A cell as it is laid out, and the number in it, for ``study.json``; number: None for words."""

    cell: TableCell
    number: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StudyRow:
    """A row: its head with a note below it, and its cells. twin: a full-precision row; group: a line above a group."""

    head: str
    cells: Sequence[Shown] = ()
    note: str = ""
    twin: bool = False
    group: bool = False


@dataclass(frozen=True)
class StudyTable:
    """A table. head: of the first column. folded: behind its label. spans: heads above columns that belong together."""

    label: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[StudyRow]
    head: str = "Quantization"
    folded: bool = False
    spans: Sequence[tuple[str, int]] = ()

    @property
    def one_line(self) -> bool:
        """Wide enough, and no wider, where each number stands on one line with its interval."""
        numbers = any(one.cell.interval or one.cell.delta_interval for row in self.rows for one in row.cells)
        few = 3 <= len(self.columns) <= 4 and not self.spans
        return numbers and few and not any(column.text for column in self.columns)


@dataclass(frozen=True)
class StudyPanels:
    """Figures under a heading of their own ("": none)."""

    title: str
    panels: Sequence[Panel]
    folded: bool = False


@dataclass(frozen=True)
class StudySection:
    """One question with its answer: sentences, tables, figures, notes in small print."""

    id: str
    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[StudyTable] = ()
    figures: Sequence[StudyPanels] = ()
    notes: Sequence[str] = ()


Verdict = Literal["worse", "better", "tied", "changed", "measured", "open"]


@dataclass(frozen=True)
class Finding:
    """A headline: a sentence made from numbers, and what it means. measured: a size that the samples settle, where
    neither direction is better; open: they do not decide it. figures: the differences behind it, in smaller print."""

    text: str
    verdict: Verdict
    figures: str = ""


@dataclass(frozen=True)
class StudyPage:
    """What a study's own module says; the frame (what was run, what is missing, published tables) is added to it.

    numbers: further numbers for ``study.json``, beside those of findings, tables and figures. cautions: what all
    findings must be read with.
    """

    findings: Sequence[Finding]
    sections: Sequence[StudySection]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    cautions: Sequence[str] = ()


def words(text: str) -> Shown:
    """A cell of words."""
    return Shown(TableCell(text))


def missing(note: str = "") -> Shown:
    """A cell without a number, and why."""
    return Shown(TableCell("n/a", note, css="na"), {"value": None, "note": note})


def value(figure: Figure, unit: Unit = "percent", *, digits: int | None = None, caution: str = "") -> Shown:
    """A value with its interval; caution: why it must not be ranked, marked with a dagger."""
    if not figure.available:
        return missing(figure.note)
    shown = formatting.number(figure.value, unit, digits=digits) + ("†" if caution else "")
    return Shown(TableCell(shown, formatting.interval(figure.lo, figure.hi, unit, digits=digits)), numbers(figure))


def value_and_change(own: Figure, change: Figure, metric: Metric, *, adjusted: float, caution: str = "") -> Shown:
    """A value, and below it its difference from what it is compared with."""
    if not own.available:
        return missing(own.note)
    first = value(own, metric.unit, caution=caution)
    second = difference(change, metric, power=True, adjusted=adjusted)
    if second.number is None or second.number["value"] is None:
        return first
    below, above = second.cell, first.cell
    cell = TableCell(above.value, above.interval, below.delta, below.word, below.delta_interval, below.css)
    return Shown(cell, {**(first.number or {}), "change": second.number})


def difference(
    figure: Figure,
    metric: Metric | None = None,
    unit: Unit = "percent",
    *,
    higher_is_better: bool | None = None,
    power: bool = False,
    adjusted: float | None = None,
) -> Shown:
    """A difference with its word and interval.

    metric: gives the unit and the better direction. power: with the smallest difference that would be found, before
    correction.
    adjusted: p-value corrected for the number of looks; an interval that excludes 0 is no verdict above 5 %.
    """
    if metric is not None:
        unit, higher_is_better = metric.unit, metric.higher_is_better
    entry = as_difference(figure, higher_is_better, adjusted)
    if entry is None:
        return missing(figure.note)
    cell = difference_cell(entry, unit)
    told = {**numbers(figure), "verdict": entry.effect}
    if adjusted is not None:
        told["p_adjusted"] = None if np.isnan(adjusted) else float(adjusted)
    if power:
        told["minimum_detectable"] = detectable(figure)
        cell = TableCell(
            cell.value,
            cell.interval,
            cell.delta,
            cell.word,
            f"{cell.delta_interval} · finds {formatting.number(detectable(figure), unit)}",
            cell.css,
        )
    return Shown(cell, told)


def as_difference(
    figure: Figure, higher_is_better: bool | None, adjusted: float | None = None
) -> DifferenceEntry | None:
    """A figure as the reports' difference, tied where its corrected p does not stand; None without an interval."""
    verdict = figure.verdict()
    if verdict == "unavailable":
        return None
    if adjusted is not None and not adjusted <= 1 - LEVEL:
        verdict = "tied"
    effect = effect_of(verdict, higher_is_better)
    return DifferenceEntry(delta=figure.value, lo=figure.lo, hi=figure.hi, verdict=verdict, effect=effect)


def in_words(figure: Figure, higher_is_better: bool | None, adjusted: float | None = None) -> str:
    """A difference of a percentage for a sentence: ``−0.5 [−1.0, −0.1], finds 0.6``."""
    entry = as_difference(figure, higher_is_better, adjusted)
    if entry is None:
        return "not available"
    shown = f"{formatting.delta(entry, 'percent')} {formatting.delta_interval(entry, 'percent')}"
    return f"{shown}, finds {formatting.number(detectable(figure), 'percent')}"


@dataclass(frozen=True)
class Compared:
    """A difference that a headline tells. name: of what. adjusted: its corrected p-value. note: beside its word."""

    name: str
    figure: Figure
    adjusted: float
    higher_is_better: bool | None = True
    note: str = ""


@dataclass(frozen=True)
class Told:
    """Differences in words, and name -> effect of those that have an interval."""

    text: str
    effects: Mapping[str, str]

    @property
    def verdict(self) -> Verdict:
        return overall(self.effects.values())

    @property
    def in_part(self) -> list[str]:
        """Names of those that stand where others are tied; empty where all stand, or none does."""
        stand = [name for name, effect in self.effects.items() if effect != "tied"]
        return stand if len(stand) < len(self.effects) else []


def tell(differences: Iterable[Compared], says: Mapping[str, str] | None = None) -> Told:
    """``clean −0.5 [−1.0, −0.1], finds 0.6 (worse); …`` for a headline. says: other words for effects."""
    parts, effects = [], {}
    for one in differences:
        entry = as_difference(one.figure, one.higher_is_better, one.adjusted)
        if entry is None:
            continue
        effects[one.name] = entry.effect
        word = (says or {}).get(entry.effect, entry.effect)
        note = f"; {one.note}" if one.note else ""
        parts.append(f"{one.name} {in_words(one.figure, one.higher_is_better, one.adjusted)} ({word}{note})")
    return Told("; ".join(parts), effects)


def overall(effects: Iterable[str]) -> Verdict:
    """What several effects mean together: ``changed`` where they point both ways, ``open`` without any."""
    found = set(effects)
    if not found:
        return "open"
    stand = found - {"tied"}
    if not stand:
        return "tied"
    return "worse" if stand == {"worse"} else "better" if stand == {"better"} else "changed"


def numbers(figure: Figure) -> dict[str, Any]:
    """A figure for ``study.json``: value and interval in its own unit (fractions, never percentages)."""
    if not figure.available:
        return {"value": None, "lo": None, "hi": None, "note": figure.note}
    return {"value": float(figure.value), "lo": float(figure.lo), "hi": float(figure.hi)}


def detectable(figure: Figure) -> float:
    """The smallest true difference that a comparison with this interval finds in 4 of 5 studies, before correction for
    the number of differences: what must survive that has to be larger."""
    return minimum_detectable_difference(figure.lo, figure.hi, level=LEVEL)


def metric_column(key: str, title: str = "", *, change: bool = False) -> Column:
    """A metric's column head; change: of differences, whose unit is points."""
    metric = METRICS[key]
    arrow = "" if metric.higher_is_better is None else "up" if metric.higher_is_better else "down"
    unit = ("points" if change else "%") if metric.unit == "percent" else metric.unit
    return Column(title or metric.title, unit, metric.definition, arrow)
