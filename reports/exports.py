"""The report as files for other programs, and as a table for the terminal."""

from __future__ import annotations

import csv
import io
import json

from tabulate import tabulate

from bitquake.reports import formatting
from bitquake.reports.formatting import spreadsheet_text as _text
from bitquake.reports.schema import CellEntry, DifferenceEntry, Report, Unit, ValueEntry
from bitquake.reports.views import OVERVIEW_METRICS, WORLDS, Arrangement, FamilyView, RowGroup

CSV_COLUMNS = (
    *("model", "quantization", "run", "twin", "execution", "nominal_bpw", "effective_bpw"),
    *("world", "family", "variant", "task", "noise", "noise_group", "severity", "pairing"),
    *("dataset", "dataset_revision", "split", "part", "shift_from", "threshold_task", "protocol"),
    *("metric", "title", "unit", "value", "lo", "hi", "n", "n_clusters"),
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
    """One row per run, task and metric, then one per further score: ``score.<name>``, and ``parse_failure_rate``.

    Numbers are fractions at full precision, empty where there is none; ``title`` says what they are called.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    runs = {run.id: run for run in report.runs}
    defined = {metric.key: metric for metric in report.metrics}
    titles = {score.key: score.title for score in report.scores}
    for cell in report.cells:
        run = runs[cell.run]
        card = run.card
        rows = [(key, defined[key].title, defined[key].unit, value) for key, value in cell.metrics.items()]
        headline = f"{cell.headline} / 10" if cell.headline_unit == "tenths" else cell.headline
        rows = [(key, headline if key == "accuracy" else title, unit, value) for key, title, unit, value in rows]
        rows.append(("parse_failure_rate", "Not parsed", "percent", cell.parse_failure_rate))
        rows += [(f"score.{name}", titles[name], "percent", value) for name, value in cell.scores.items()]
        for key, title, unit, value in rows:
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
                    *(cell.noise_group, cell.severity or "", cell.pairing),
                    *map(_text, (cell.dataset, cell.dataset_revision, cell.split)),
                    *map(_text, (cell.part, cell.shift_from, cell.threshold_task)),
                    *(cell.protocol, _text(key), _text(title), unit),
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
    percent = "Percent (CIDEr-D as published)" if any(c.headline_unit == "tenths" for c in report.cells) else "Percent"
    parts.append(f"{percent}; changes against the full-precision twin in points, with 95 % intervals. {marks}.")
    return "\n\n".join(parts)


def _model_table(view: Arrangement, world: str, family: FamilyView, group: RowGroup) -> str:
    summaries = {s.run: s for s in view.report.summaries if (s.world, s.family) == (world, family.key)}
    several = len(family.conditions) > 1
    name = "acc" if family.main.headline.title == "Accuracy" else family.main.headline.title
    units: list[Unit] = [family.main.headline.unit, "percent", "percent"]  # of OVERVIEW_METRICS
    head = ["quant", "bits", name, f"Δ{name}", "ΔAURC", "ΔECE"]
    if several:
        head[4:] = [f"Δ{name}, all", "ΔAURC, all", "ΔECE, all", "rank"]
    rows: list[list[str]] = []
    for row in group.rows:
        run, cell = row.run, row.cell
        accuracy = cell.metrics["accuracy"]
        line = [
            formatting.clean_text(run.quantization, _NAME_WIDTH),
            f"{run.card.effective_bpw:.1f}" if run.card and run.card.effective_bpw is not None else "?",
            _value(accuracy, units[0]),
            _change(accuracy.difference, units[0]) or _no_change(cell),
        ]
        if several:
            summary = summaries.get(run.id)
            changes = [summary.differences.get(key) if summary else None for key in OVERVIEW_METRICS]
            line += [_change(change, unit) for change, unit in zip(changes, units, strict=True)]
            ranked = summary is not None and summary.rank_lo is not None
            line.append(f"{summary.rank_lo}-{summary.rank_hi}" if summary and ranked else "")
        else:
            line += [_change(cell.metrics[key].difference, "percent") for key in OVERVIEW_METRICS[1:]]
        rows.append(line)
    title = f"{WORLDS[world][0]}: {family.title}, {family.main.name}, {group.label}"
    if several:
        title += f" (all: mean over {max((s.n_conditions for s in summaries.values()), default=0)} conditions)"
    return f"{formatting.clean_text(title)}\n" + tabulate(rows, head, disable_numparse=True)


def _value(value: ValueEntry, unit: Unit) -> str:
    return formatting.number(value.value, unit) if value.value is not None else "n/a"


def _change(difference: DifferenceEntry | None, unit: Unit) -> str:
    if difference is None:
        return ""
    text = formatting.delta(difference, unit)
    limits = formatting.delta_interval(difference, unit).replace(" ", "").replace("+", "")
    return f"{text} {_SYMBOLS[difference.effect]} {limits}"


def _no_change(cell: CellEntry) -> str:
    return "twin" if cell.pairing == "twin" else "no pair" if cell.pairing == "unpaired" else ""


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))
