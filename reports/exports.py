"""The report as files for other programs, and as a table for the terminal."""

from __future__ import annotations

import csv
import io
import json

from tabulate import tabulate

from bitquake.reports import formatting
from bitquake.reports.schema import CellEntry, DifferenceEntry, Report, ValueEntry
from bitquake.reports.views import OVERVIEW_METRICS, WORLDS, Arrangement, FamilyView, RowGroup

CSV_COLUMNS = (
    *("model", "quantization", "run", "twin", "execution", "nominal_bpw", "effective_bpw"),
    *("world", "family", "variant", "task", "noise", "severity", "pairing"),
    *("metric", "unit", "value", "lo", "hi", "n", "n_clusters"),
    *("delta", "delta_lo", "delta_hi", "verdict", "effect", "note"),
)
_SYMBOLS = {"better": "+", "worse": "!", "tied": "≈", "changed": "~"}
_NAME_WIDTH = 26


def to_json(report: Report) -> str:
    """The whole report; ASCII only, so that no foreign text can break a reader."""
    return json.dumps(report.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n"


def json_schema() -> str:
    """JSON schema of ``to_json``'s output."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"


def to_csv(report: Report) -> str:
    """One row per run, task and metric; numbers are fractions at full precision, empty where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    runs = {run.id: run for run in report.runs}
    units = {metric.key: metric.unit for metric in report.metrics}
    for cell in report.cells:
        run = runs[cell.run]
        card = run.card
        for key, value in cell.metrics.items():
            d = value.difference
            writer.writerow(
                [
                    *(
                        _text(run.label),
                        _text(run.quantization),
                        run.id,
                        run.twin or "",
                        card.execution if card else "",
                    ),
                    *(_number(card.nominal_bpw if card else None), _number(card.effective_bpw if card else None)),
                    *(cell.world, _text(cell.family), _text(cell.variant), _text(cell.task), _text(cell.noise)),
                    *(cell.severity or "", cell.pairing, key, units[key]),
                    *(_number(value.value), _number(value.lo), _number(value.hi), cell.n, cell.n_clusters),
                    *((_number(d.delta), _number(d.lo), _number(d.hi), d.verdict, d.effect) if d else ("",) * 5),
                    _text(value.note),
                ]
            )
    return buffer.getvalue()


def terminal_table(report: Report) -> str:
    """Each model's runs on each family in a few columns: the first condition, and the mean change over all of them."""
    view = Arrangement(report)
    parts = []
    for world in view.worlds:
        for family in world.families:
            parts += [_model_table(view, world.key, family, group) for group in family.main.groups]
    marks = ", ".join(f"{_SYMBOLS[effect]} {effect}" for effect in ("better", "worse", "tied"))
    parts.append(f"Percent; changes against the full-precision twin in points, with 95 % intervals. {marks}.")
    return "\n\n".join(parts)


def _model_table(view: Arrangement, world: str, family: FamilyView, group: RowGroup) -> str:
    summaries = {s.run: s for s in view.report.summaries if (s.world, s.family) == (world, family.key)}
    several = len(family.conditions) > 1
    head = ["quant", "bits", "acc", "Δacc", "ΔAURC", "ΔECE"]
    if several:
        head[4:] = ["Δacc, all", "ΔAURC, all", "ΔECE, all", "rank"]
    rows: list[list[str]] = []
    for row in group.rows:
        run, cell = row.run, row.cell
        accuracy = cell.metrics["accuracy"]
        line = [
            formatting.clean_text(run.quantization, _NAME_WIDTH),
            f"{run.card.effective_bpw:.1f}" if run.card else "?",
            _value(accuracy),
            _change(accuracy.difference) or _no_change(cell),
        ]
        if several:
            summary = summaries.get(run.id)
            line += [_change(summary.differences.get(key)) if summary else "" for key in OVERVIEW_METRICS]
            ranked = summary is not None and summary.rank_lo is not None
            line.append(f"{summary.rank_lo}-{summary.rank_hi}" if summary and ranked else "")
        else:
            line += [_change(cell.metrics[key].difference) for key in OVERVIEW_METRICS[1:]]
        rows.append(line)
    title = f"{WORLDS[world][0]}: {family.title}, {family.main.name}, {group.label}"
    if several:
        title += f" (all: mean over {len(family.conditions)} conditions)"
    return f"{formatting.clean_text(title)}\n" + tabulate(rows, head, disable_numparse=True)


def _value(value: ValueEntry) -> str:
    return formatting.number(value.value, "percent") if value.value is not None else "n/a"


def _change(difference: DifferenceEntry | None) -> str:
    if difference is None:
        return ""
    text = formatting.delta(difference, "percent")
    limits = formatting.delta_interval(difference, "percent").replace(" ", "").replace("+", "")
    return f"{text} {_SYMBOLS[difference.effect]} {limits}"


def _no_change(cell: CellEntry) -> str:
    return "twin" if cell.pairing == "twin" else "no pair" if cell.pairing == "unpaired" else ""


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _text(text: str) -> str:
    """Foreign text that no spreadsheet takes for a formula."""
    shown = formatting.clean_text(text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown
