"""Tables as data: rows of formatted cells that a page only has to lay out, each number with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bitquake.reports import formatting
from bitquake.reports.schema import DifferenceEntry, RunEntry, Unit, ValueEntry


@dataclass(frozen=True)
class TableCell:
    """One cell: a value with its interval, below it a change with its word and interval. css: its effect."""

    value: str = ""
    interval: str = ""
    delta: str = ""
    word: str = ""
    delta_interval: str = ""
    css: str = ""


@dataclass(frozen=True)
class Column:
    """A column's head; arrow: ``up``, ``down`` or "", for which way is better; text: of words, not of numbers."""

    title: str
    unit: str = ""
    definition: str = ""
    arrow: str = ""
    text: bool = False


@dataclass(frozen=True)
class TableRow:
    """A row: its run (None: the text alone), a text cell such as the condition's name, and the numbers."""

    run: RunEntry | None
    text: str
    cells: Sequence[TableCell]
    twin: bool = False


@dataclass(frozen=True)
class Table:
    """A table; rows: those that stand open, further: those to be folded away. text_head: head of the text cells, "" for
    none. label: what it is, in a few words."""

    label: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[TableRow]
    further: Sequence[TableRow] = field(default_factory=list)
    text_head: str = ""
    further_label: str = ""


def value_cell(value: ValueEntry | None, unit: Unit, *, digits: int | None = None, css: str = "") -> TableCell:
    """A value with its interval, and its difference where it has one."""
    if value is None or value.value is None or value.lo is None or value.hi is None:
        return TableCell("n/a", css="na")
    shown = formatting.number(value.value, unit, digits=digits) + ("†" if value.caution else "")
    limits = formatting.interval(value.lo, value.hi, unit, digits=digits)
    if value.difference is None:
        return TableCell(shown, limits, css=css)
    change = difference_cell(value.difference, unit)
    return TableCell(shown, limits, change.delta, change.word, change.delta_interval, css or change.css)


def difference_cell(difference: DifferenceEntry | None, unit: Unit) -> TableCell:
    """A change with what it means and its interval."""
    if difference is None:
        return TableCell("n/a", css="na")
    return TableCell(
        delta=formatting.delta(difference, unit),
        word=formatting.effect_word(difference),
        delta_interval=formatting.delta_interval(difference, unit),
        css=formatting.effect_class(difference, unit),
    )
