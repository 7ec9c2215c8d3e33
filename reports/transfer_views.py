"""Threshold transfer for readers: the sentence, the worst rows, every row, and realised risk over severity and shifts.

Each function turns entries into tables and figures and knows no page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitquake.reports import charts
from bitquake.reports.figures import Figure, Panel, panels
from bitquake.reports.formatting import interval, number, value_text
from bitquake.reports.names import confidence_title
from bitquake.reports.schema import CellEntry, RunEntry, TransferEntry, ValueEntry
from bitquake.reports.tables import Column, Table, TableCell, TableRow, value_cell

WORST_ROWS = 10
CHARTED_RISK = 0.05
_WORDS = {"kept": "kept", "broken": "broken", "open": "not decided", "empty": "answers nothing"}


def excess(entry: TransferEntry) -> float:
    """By how much the risk really taken lies above the tolerated one; nothing answered takes none."""
    return -1.0 if entry.risk.value is None else entry.risk.value - entry.risk_target


def worst_first(transfers: Sequence[TransferEntry]) -> list[TransferEntry]:
    """Broken promises first, those that are broken by most at the top."""
    rank = {"broken": 0, "open": 1, "kept": 2, "empty": 3}
    return sorted(transfers, key=lambda t: (rank[t.verdict], -excess(t), t.risk_target, t.task, t.run, t.confidence))


def transfer_sentence(entry: TransferEntry, run: RunEntry, condition: str) -> str:
    """``A MaxProb threshold chosen on clean full precision for at most 5 % risk: in fog 3 INT4 really takes 9 % …``."""
    target = f"{100 * entry.risk_target:g} %"
    chosen = (
        f"A {confidence_title(entry.confidence)} threshold chosen on clean full precision for at most {target} risk"
    )
    start = f"{chosen}: in {condition} {run.quantization}"
    if entry.verdict == "empty":
        return f"{start} answers nothing with it."
    coverage = f"{_percent(entry.coverage)} of the questions"
    if entry.risk.value is None:
        return f"{start} takes a risk that these samples give no interval of, answering {coverage}."
    return f"{start} really takes {_percent(entry.risk)}, answering {coverage}."


def _percent(value: ValueEntry) -> str:
    if value.value is None or value.lo is None or value.hi is None:
        return "an unknown share"
    return f"{number(value.value, 'percent')} % {interval(value.lo, value.hi, 'percent')}"


def risk_cell(entry: TransferEntry | None) -> TableCell:
    """The risk really taken, tinted by what became of the promise."""
    if entry is None:
        return TableCell("–", css="na")
    if entry.risk.value is None:
        return TableCell(_WORDS["empty"] if entry.verdict == "empty" else "n/a", css="na")
    points = 100 * excess(entry)
    size = 1 if abs(points) < 2 else 2 if abs(points) < 10 else 3
    css = {"broken": f"worse size{size}", "kept": "better size1"}.get(entry.verdict, "tied")
    shown = value_cell(entry.risk, "percent")
    return TableCell(shown.value, shown.interval, word=_WORDS[entry.verdict], css=css)


def worst_table(
    transfers: Sequence[TransferEntry],
    runs: Mapping[str, RunEntry],
    conditions: Mapping[str, str],
    *,
    rows: int = WORST_ROWS,
    models: bool = False,
) -> Table:
    """The worst rows of the primary and the Selectors' confidences; conditions: task -> name; models: name the model
    in each row (for a table over several)."""
    worst: dict[tuple[str, str, str], TransferEntry] = {}
    for entry in worst_first(transfers):
        worst.setdefault((entry.run, entry.task, entry.confidence), entry)
    shown = [t for t in worst.values() if t.verdict in ("broken", "open")][:rows] or list(worst.values())[:1]
    columns = [
        *((Column("Model", text=True),) if models else ()),
        Column("Confidence", text=True),
        Column("Tolerated", "%", "the risk that was allowed when the threshold was chosen"),
        Column("Risk really taken", "%", "mean of 1 − score of the answers that are given", "down"),
        Column("Answered", "%", "share of all questions whose confidence reaches the threshold", "up"),
        Column(
            "With its own threshold: risk", "%", "the threshold chosen on the quantized model's own answers", "down"
        ),
        Column("answered", "%", "", "up"),
    ]
    table = []
    for entry in shown:
        run = runs[entry.run]
        cells = [
            *((TableCell(run.label, css="t"),) if models else ()),
            TableCell(confidence_title(entry.confidence), css="t"),
            TableCell(f"{100 * entry.risk_target:g}"),
            risk_cell(entry),
            value_cell(entry.coverage, "percent"),
            value_cell(entry.own_risk, "percent"),
            value_cell(entry.own_coverage, "percent"),
        ]
        table.append(TableRow(run, conditions[entry.task], cells))
    return Table(
        "Threshold transfer, worst first",
        "Of each model and condition the promise that is broken by most. The threshold was chosen on clean "
        "full-precision answers for the tolerated risk; risk and coverage are what the model in the row takes with it "
        "[95 % interval, with the luck of the threshold]. Broken: the whole interval lies above what was tolerated; "
        "kept: at or below; not decided: it holds it.",
        columns,
        table,
        text_head="Condition",
    )


def every_table(
    transfers: Sequence[TransferEntry],
    runs: Mapping[str, RunEntry],
    conditions: Mapping[str, str],
    *,
    confidence: str,
) -> Table:
    """Every run and condition under one confidence: risk really taken and coverage at each tolerated risk."""
    own = [t for t in transfers if t.confidence == confidence]
    risks = sorted({t.risk_target for t in own})
    by_place: dict[tuple[str, str], dict[float, TransferEntry]] = {}
    for entry in own:
        by_place.setdefault((entry.task, entry.run), {})[entry.risk_target] = entry
    columns = [
        column
        for risk in risks
        for column in (
            Column(f"Risk at {100 * risk:g} %", "%", f"risk really taken, {100 * risk:g} % being tolerated", "down"),
            Column("answered", "%", "share of all questions", "up"),
        )
    ]
    order = {task: at for at, task in enumerate(conditions)}
    place = {run: at for at, run in enumerate(runs)}
    rows = []
    for (task, run), found in sorted(by_place.items(), key=lambda item: (order[item[0][0]], place[item[0][1]])):
        cells = []
        for risk in risks:
            at = found.get(risk)
            cells += [risk_cell(at), value_cell(at.coverage if at else None, "percent")]
        rows.append(TableRow(runs[run], conditions[task], cells, runs[run].role == "full-precision"))
    return Table(
        f"Threshold transfer, every condition, {confidence_title(confidence)}",
        f"Every run and condition by {confidence_title(confidence)}: the risk really taken and the share answered with "
        "thresholds that were chosen on clean full-precision answers.",
        columns,
        [],
        rows,
        "Condition",
        f"Every condition by {confidence_title(confidence)} ({len(rows)} rows)",
    )


def severity_panels(
    transfers: Sequence[TransferEntry],
    runs: Sequence[RunEntry],
    cells: Mapping[tuple[str, str], CellEntry],
    *,
    noise: str,
    title: str,
    confidence: str,
    risk: float = CHARTED_RISK,
) -> list[Panel]:
    """Realised risk and coverage over the severities of a noise. runs: the full-precision run first; cells: by run and
    task, for the severities; title: of the noise."""
    own = [t for t in transfers if t.confidence == confidence and t.risk_target == risk]
    found = [t for t in own if cells[t.run, t.task].kind == "clean" or cells[t.run, t.task].noise == noise]
    position = {(t.run, t.task): float(cells[t.run, t.task].severity) for t in found}

    def draw(chosen: Sequence[RunEntry], styles: Mapping[str, int]) -> list[Figure]:
        out: list[Figure] = []
        if not _lines(found, chosen, styles, position, "risk"):
            return out  # nothing is answered anywhere
        for what, y_label, limit in _QUANTITIES:
            lines = _lines(found, chosen, styles, position, what)
            if not any(len(line.points) > 1 for line in lines):
                continue
            name = f"{y_label[0].upper()}{y_label[1:-3]} in {title}, {100 * risk:g} % tolerated"
            words = _words(lines)
            described = f"{y_label}, with 95 % intervals, against severity: {words}."
            target = risk if limit else None
            chart = charts.severity_chart(name, described, y_label, lines, target=target)
            names = {key: "clean" if x == 0 else f"{x:g}" for key, x in position.items()}
            out.append(
                Figure(name, "", chart, ["Quantization", "Severity", y_label], _rows(found, chosen, names, what))
            )
        return out

    return panels(runs, draw)


def shift_panels(
    transfers: Sequence[TransferEntry],
    runs: Sequence[RunEntry],
    conditions: Mapping[str, str],
    *,
    confidence: str,
    risk: float = CHARTED_RISK,
) -> list[Panel]:
    """Realised risk and coverage on the clean task and on its shifts, side by side; conditions: task -> short name."""
    found = [t for t in transfers if t.confidence == confidence and t.risk_target == risk and t.task in conditions]
    tasks = [task for task in conditions if any(t.task == task for t in found)]
    position = {(t.run, t.task): float(tasks.index(t.task)) for t in found}

    def draw(chosen: Sequence[RunEntry], styles: Mapping[str, int]) -> list[Figure]:
        out: list[Figure] = []
        if not _lines(found, chosen, styles, position, "risk"):
            return out  # nothing is answered anywhere
        for what, y_label, limit in _QUANTITIES:
            lines = _lines(found, chosen, styles, position, what)
            if len(tasks) < 2 or not any(line.points for line in lines):
                continue
            name = f"{y_label[0].upper()}{y_label[1:-3]} under shift, {100 * risk:g} % tolerated"
            shown = [conditions[task] for task in tasks]
            described = f"{y_label}, with 95 % intervals, on {', '.join(shown)}: {_words(lines)}."
            chart = charts.category_chart(name, described, y_label, lines, shown, target=risk if limit else None)
            names = {key: conditions[key[1]] for key in position}
            out.append(Figure(name, "", chart, ["Quantization", "Task", y_label], _rows(found, chosen, names, what)))
        return out

    return panels(runs, draw)


_QUANTITIES = (("risk", "risk really taken, %", True), ("coverage", "answered, %", False))


def _lines(
    found: Sequence[TransferEntry],
    runs: Sequence[RunEntry],
    styles: Mapping[str, int],
    position: Mapping[tuple[str, str], float],
    what: str,
) -> list[charts.Line]:
    lines = []
    for run in runs:
        points = []
        for entry in found:
            value: ValueEntry = getattr(entry, what)
            if entry.run == run.id and value.value is not None and value.lo is not None and value.hi is not None:
                points.append(charts.Point(position[entry.run, entry.task], value.value, value.lo, value.hi))
        if points:
            lines.append(charts.Line(run.quantization, styles[run.id], sorted(points, key=lambda p: p.x)))
    return lines


def _words(lines: Sequence[charts.Line]) -> str:
    ends = [[number(p.y, "percent") for p in (line.points[0], line.points[-1])] for line in lines]
    return "; ".join(f"{line.name} from {a} to {b}" for line, (a, b) in zip(lines, ends, strict=True))


def _rows(
    found: Sequence[TransferEntry], runs: Sequence[RunEntry], names: Mapping[tuple[str, str], str], what: str
) -> list[list[str]]:
    return [
        [run.quantization, names[entry.run, entry.task], value_text(getattr(entry, what), "percent")]
        for run in runs
        for entry in found
        if entry.run == run.id
    ]
