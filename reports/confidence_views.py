"""A run's confidences side by side, and its calibration before and after recalibration, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitquake.reports.names import DEFINITIONS, confidence_title
from bitquake.reports.schema import CellEntry, MetricEntry, RecalibratedEntry, RunEntry
from bitquake.reports.tables import Column, Table, TableCell, TableRow, value_cell

SIDE_BY_SIDE = ("aurc", "coverage_at_risk_1", "coverage_at_risk_5", "ece_15")


def confidence_names(cells: Sequence[CellEntry]) -> list[str]:
    """The further confidences that any cell has: Selectors first."""
    found = {entry.name for cell in cells for entry in cell.confidences}
    return sorted(found, key=lambda name: (not name.startswith("selector"), name))


def side_by_side_table(
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    conditions: Mapping[str, str],
    metric: MetricEntry,
    *,
    folded: bool = False,
) -> Table:
    """One metric under each confidence, each with its difference from the primary one of the same answers.

    cells: of runs that are compared, in the order of the rows; noises are folded away; folded: all rows are.
    """
    names = confidence_names(cells)
    arrow = {True: "up", False: "down", None: ""}[metric.higher_is_better]
    unit = {"percent": "%", "fraction": "0–1"}.get(metric.unit, metric.unit)
    primary = confidence_title(cells[0].confidence_name)
    titles = [primary, *map(confidence_title, names)]
    columns = [Column(title, unit, DEFINITIONS.get(title, ""), arrow) for title in titles]
    rows: dict[bool, list[TableRow]] = {False: [], True: []}
    for cell in cells:
        by_name = {entry.name: entry for entry in cell.confidences}
        if not by_name:
            continue
        found = [value_cell(cell.metrics[metric.key].model_copy(update={"difference": None}), metric.unit)]
        for name in names:
            entry = by_name.get(name)
            if entry is None:
                found.append(TableCell("–", css="na"))
                continue
            value = entry.metrics[metric.key].model_copy(update={"difference": entry.beside.get(metric.key)})
            found.append(value_cell(value, metric.unit))
        run = runs[cell.run]
        row = TableRow(run, conditions[cell.task], found, run.role == "full-precision")
        rows[cell.kind == "noise"].append(row)
    return Table(
        f"{metric.title} by confidence",
        f"{metric.title} of the same answers under each confidence; below a value its change against {primary} of the "
        "same model, paired [95 % interval]. †: too few samples, or too wide an interval, to rank by.",
        columns,
        *_open_and_folded(rows[False], rows[True], f"{metric.title} by confidence", folded),
    )


def recalibration_table(
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    conditions: Mapping[str, str],
    metric: MetricEntry,
    *,
    folded: bool = False,
) -> Table | None:
    """One calibration metric as it is and after each map; None where nothing was recalibrated."""
    unit = {"percent": "%", "fraction": "0–1"}.get(metric.unit, metric.unit)
    kinds = [(s, m) for s in ("own", "full-precision") for m in ("temperature", "platt")]
    words = {"temperature": "temperature", "platt": "Platt scaling"}
    whose = {"own": "own answers", "full-precision": "full precision's answers"}
    columns = [
        Column("As it is", unit, "the primary confidence"),
        *(
            Column(
                f"{words[m]}, {whose[s]}".capitalize(), unit, f"fitted on the clean threshold split, {whose[s]}", "down"
            )
            for s, m in kinds
        ),
    ]
    rows: dict[bool, list[TableRow]] = {False: [], True: []}
    for cell in cells:
        if not cell.recalibrated:
            continue
        found = [value_cell(cell.metrics[metric.key].model_copy(update={"difference": None}), metric.unit)]
        by_kind: dict[tuple[str, str], RecalibratedEntry] = {
            (entry.source, entry.method): entry for entry in cell.recalibrated
        }
        for kind in kinds:
            # The full-precision run's own split is full precision's.
            entry = by_kind.get(kind)
            found.append(value_cell(entry.metrics[metric.key], metric.unit) if entry else TableCell("–", css="na"))
        run = runs[cell.run]
        row = TableRow(run, conditions[cell.task], found, run.role == "full-precision")
        rows[cell.kind == "noise"].append(row)
    if not rows[False] and not rows[True]:
        return None
    return Table(
        f"{metric.title} after recalibration",
        f"{metric.title} after a map was fitted on clean threshold images: on the model's own answers, or on full "
        "precision's and carried over. Below a value its change, paired [95 % interval, the map held fixed].",
        columns,
        *_open_and_folded(rows[False], rows[True], f"{metric.title} after recalibration", folded),
    )


def _open_and_folded(
    plain: list[TableRow], noisy: list[TableRow], title: str, folded: bool
) -> tuple[list[TableRow], list[TableRow], str, str]:
    """The rows that stand open, those that do not, the text cells' head, and what the folded ones are called."""
    if folded:
        rows = [*plain, *noisy]
        return [], rows, "Condition", f"{title} ({len(rows)} rows)"
    return plain or noisy, noisy if plain else [], "Condition", f"In noise ({len(noisy)} rows)"
