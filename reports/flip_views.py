"""Flipped answers as a sentence, a table and a chart over full precision's confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitquake.reports import charts
from bitquake.reports.figures import Figure, Panel, panels
from bitquake.reports.formatting import interval, number
from bitquake.reports.schema import CellEntry, FlipBin, FlipEntry, RunEntry
from bitquake.reports.tables import Column, Table, TableCell, TableRow


def flip_sentence(cells: Sequence[CellEntry]) -> str:
    """How many of the tests found flips that go one way; "" without a test."""
    found = [cell.flips for cell in cells if cell.flips is not None]
    if not found:
        return ""
    worse = sum(entry.effect == "worse" for entry in found)
    better = sum(entry.effect == "better" for entry in found)
    tests = "1 comparison" if len(found) == 1 else f"{len(found)} comparisons"
    return (
        f"In {worse + better} of {tests} more answers flip one way than the other: {worse} lose, {better} gain "
        f"(exact McNemar test, false discovery rate 5 % over all {found[0].n_tests} tests)."
    )


def flip_table(cells: Sequence[CellEntry], runs: Mapping[str, RunEntry], conditions: Mapping[str, str]) -> Table | None:
    """Flips of every run and condition, noises folded away; None without one."""
    rows: dict[bool, list[TableRow]] = {False: [], True: []}
    for cell in cells:
        if cell.flips is not None:
            rows[cell.kind == "noise"].append(TableRow(runs[cell.run], conditions[cell.task], _cells(cell.flips)))
    if not rows[False] and not rows[True]:
        return None
    n_tests = max(cell.flips.n_tests for cell in cells if cell.flips is not None)
    columns = [
        Column("Flipped", "%", "share of answers that are right in one and wrong in the other"),
        Column("Right → wrong", "answers"),
        Column("Wrong → right", "answers"),
        Column("p, adjusted", "", f"exact McNemar test, Benjamini-Hochberg over {n_tests} tests"),
    ]
    return Table(
        "Flipped answers",
        "Answers that are right (score of at least one half) at full precision and wrong here, or the other way. Equal "
        "accuracy can hide many of them. Tied: nothing shows that they go one way. The test takes the "
        "questions of one image for independent; the interval of the share does not.",
        columns,
        rows[False] or rows[True],
        rows[True] if rows[False] else [],
        "Condition",
        f"In noise ({len(rows[True])} rows)",
    )


def _cells(entry: FlipEntry) -> list[TableCell]:
    limits = "" if entry.lo is None or entry.hi is None else interval(entry.lo, entry.hi, "percent")
    p = "< 0.001" if entry.p_adjusted < 0.001 else f"{entry.p_adjusted:.3f}"
    css = entry.effect if entry.effect == "tied" else f"{entry.effect} size2"
    word = "≈ tied" if entry.effect == "tied" else entry.effect
    return [
        TableCell(number(entry.rate, "percent"), limits) if limits else TableCell("n/a", css="na"),
        TableCell(f"{entry.right_to_wrong:,}"),
        TableCell(f"{entry.wrong_to_right:,}"),
        TableCell(p, word=word, css=css),
    ]


def flip_panels(cells: Sequence[CellEntry], runs: Sequence[RunEntry], condition: str) -> list[Panel]:
    """Share of flipped answers by full precision's confidence, for runs on one task; runs: full precision first."""
    flipped = {cell.run: cell.flips for cell in cells if cell.flips is not None}

    def draw(chosen: Sequence[RunEntry], styles: Mapping[str, int]) -> list[Figure]:
        lines: list[charts.Line] = []
        table: list[list[str]] = []
        bounds: list[str] = []
        for run in chosen:
            levels = flipped[run.id].by_confidence if run.id in flipped else []
            points = [
                charts.Point(float(at), level.rate, level.lo, level.hi)
                for at, level in enumerate(levels)
                if level.lo is not None and level.hi is not None
            ]
            bounds = [f"to {_percent(level.upper)}" for level in levels] or bounds
            if points:
                lines.append(charts.Line(run.quantization, styles[run.id], points))
            table += [[run.quantization, _bounds(level), f"{level.n:,}", _rate(level)] for level in levels]
        if not lines:
            return []
        title = f"Flipped answers by confidence, {condition}"
        words = "; ".join(f"{x.name} {', '.join(number(p.y, 'percent') for p in x.points)}" for x in lines)
        described = f"Flipped answers in percent, least confident fifth first, with 95 % intervals: {words}."
        x_label = "full precision's confidence, %"
        chart = charts.category_chart(title, described, "flipped, %", lines, bounds, x_label=x_label)
        return [Figure(title, "", chart, ["Quantization", "Confidence, %", "Answers", "Flipped, %"], table)]

    return panels(runs, draw)


def _bounds(level: FlipBin) -> str:
    return f"{_percent(level.lower)}–{_percent(level.upper)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _rate(level: FlipBin) -> str:
    if level.lo is None or level.hi is None:
        return "not available"
    return f"{number(level.rate, 'percent')} {interval(level.lo, level.hi, 'percent')}"
