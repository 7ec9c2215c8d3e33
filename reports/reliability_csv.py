"""What ``report.csv`` does not hold, one row for each number: confidences, recalibration, flips, transfer, mixtures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from bitquake.reports.formatting import spreadsheet_text
from bitquake.reports.schema import CellEntry, DifferenceEntry, Report, TransferEntry, ValueEntry

COLUMNS = (
    *("model", "quantization", "run", "world", "family", "task", "noise", "severity"),
    *("about", "confidence", "metric", "value", "lo", "hi"),
    *("delta", "delta_lo", "delta_hi", "verdict", "effect", "note"),
)
Row = dict[str, object]


def to_reliability_csv(report: Report) -> str:
    """Numbers are fractions at full precision, empty where there is none.

    about: ``confidence`` (delta: from the same confidence of full precision), ``beside`` (delta: from the primary
    confidence of the same run), ``recalibrated`` (metric ``<map>.<fitted on>.<metric>``, delta: from before the map),
    ``flips``, ``transfer`` (metric ``<what>_<tolerated risk in %>``), ``interaction`` (delta: the difference in
    differences; no task: mean over the noises), ``robustness``, ``mixture`` (metric ``<share>.<metric>``; task: the
    shifted one).
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    runs = {run.id: run for run in report.runs}
    cells = {(cell.run, cell.task): cell for cell in report.cells}
    for run, where, row in _rows(report, cells):
        entry = runs[run]
        writer.writerow(
            {
                "model": spreadsheet_text(entry.label),
                "quantization": spreadsheet_text(entry.quantization),
                "run": run,
                **{key: _cell(value) for key, value in {**where, **row}.items()},
            }
        )
    return buffer.getvalue()


def _cell(value: object) -> object:
    return spreadsheet_text(value) if isinstance(value, str) else repr(value) if isinstance(value, float) else value


def _rows(report: Report, cells: dict[tuple[str, str], CellEntry]) -> Iterator[tuple[str, Row, Row]]:
    """(run, where, numbers) of every row."""
    for cell in report.cells:
        for row in _of_cell(cell):
            yield cell.run, _place(cell), row
    for entry in report.transfers:
        for row in _of_transfer(entry):
            yield entry.run, _place(cells[entry.run, entry.task]), row
    for inter in report.interactions:
        there = cells.get((inter.run, inter.task))
        where: Row = _place(there) if there else {"world": inter.world, "family": inter.family}
        for key, difference in inter.differences.items():
            yield inter.run, where, {"about": "interaction", "metric": key, **_difference(difference)}
    for robust in report.robustness:
        where = {"world": robust.world, "family": robust.family, "noise": robust.noise}
        for key, value in (("relative", robust.relative), ("quantization_error", robust.quantization_error)):
            yield robust.run, where, {"about": "robustness", "metric": key, **_value(value)}
    for mixture in report.mixtures:
        where = _place(cells[mixture.run, mixture.ood_task])
        for point in mixture.points:
            for key, value in point.metrics.items():
                metric = f"{point.ood_share:.4g}.{key}"
                told: Row = {"about": "mixture", "confidence": mixture.confidence, "metric": metric}
                yield mixture.run, where, {**told, **_value(value)}


def _of_cell(cell: CellEntry) -> Iterator[Row]:
    for entry in cell.confidences:
        for key, value in entry.metrics.items():
            yield {"about": "confidence", "confidence": entry.name, "metric": key, **_value(value)}
        for key, difference in entry.beside.items():
            yield {"about": "beside", "confidence": entry.name, "metric": key, **_difference(difference)}
    for map_ in cell.recalibrated:
        for key, value in map_.metrics.items():
            metric = f"{map_.method}.{map_.source}.{key}"
            yield {"about": "recalibrated", "confidence": cell.confidence_name, "metric": metric, **_value(value)}
    if cell.flips is not None:
        flips = cell.flips
        rate: Row = {"value": flips.rate, "lo": _empty(flips.lo), "hi": _empty(flips.hi), "effect": flips.effect}
        yield {"about": "flips", "metric": "rate", **rate}
        for key in ("right_to_wrong", "wrong_to_right", "p_value", "p_adjusted"):
            yield {"about": "flips", "metric": key, "value": getattr(flips, key)}


def _of_transfer(entry: TransferEntry) -> Iterator[Row]:
    for key in ("risk", "coverage", "own_risk", "own_coverage"):
        value: ValueEntry | None = getattr(entry, key)
        if value is not None:
            metric = f"{key}_{100 * entry.risk_target:g}"
            row: Row = {"about": "transfer", "confidence": entry.confidence, "metric": metric, **_value(value)}
            yield {**row, "verdict": entry.verdict} if key == "risk" else row


def _place(cell: CellEntry) -> Row:
    where: Row = {"world": cell.world, "family": cell.family, "task": cell.task, "noise": cell.noise}
    return {**where, "severity": cell.severity or ""}


def _value(value: ValueEntry) -> Row:
    told: Row = {"value": _empty(value.value), "lo": _empty(value.lo), "hi": _empty(value.hi), "note": value.note}
    return {**told, **_difference(value.difference)} if value.difference else told


def _difference(d: DifferenceEntry) -> Row:
    return {"delta": d.delta, "delta_lo": d.lo, "delta_hi": d.hi, "verdict": d.verdict, "effect": d.effect}


def _empty(value: float | None) -> float | str:
    return "" if value is None else value
