"""Figures as data: a chart with its caption and its numbers, and panels of figures that share one legend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bitquake.reports import charts
from bitquake.reports.schema import RunEntry

MOST_LINES = charts.N_STYLES
"""Runs in one chart: each has a colour and a marker of its own."""


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and the numbers behind it, whose first column names the series."""

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
class Panel:
    """Figures of the same runs, with their legend."""

    legend: list[Legend]
    figures: list[Figure]


def panels(
    runs: Sequence[RunEntry], draw: Callable[[Sequence[RunEntry], Mapping[str, int]], list[Figure]]
) -> list[Panel]:
    """Figures of so many runs at once as a reader can tell apart; the first run (full precision) stands in each.

    draw: makes the figures of some runs from their styles (run id -> style of ``charts``).
    """
    first, others = list(runs[:1]), list(runs[1:])
    step = MOST_LINES - 1
    out = []
    for start in range(0, max(1, len(others)), step):
        chosen = first + others[start : start + step]
        styles = {run.id: at for at, run in enumerate(chosen)}
        if figures := draw(chosen, styles):
            drawn = {row[0] for figure in figures for row in figure.table}
            legend = [
                Legend(run.quantization, charts.swatch(styles[run.id])) for run in chosen if run.quantization in drawn
            ]
            out.append(Panel(legend, figures))
    return out
