"""Tables of effects: differences that are judged together, each with interval, power and a corrected verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitquake.metrics import METRICS, Figure
from bitquake.reports.studies.joint import corrected_by_key
from bitquake.reports.studies.page import StudyRow, StudyTable, difference, metric_column, missing, value
from bitquake.reports.tables import Column


@dataclass(frozen=True)
class EffectRow:
    """figures: for each column a difference, or of a row of values a value; None: not measured."""

    head: str
    figures: Sequence[Figure | None] = ()
    note: str = ""
    values: bool = False
    group: bool = False


def effect_table(
    label: str,
    caption: str,
    metrics: Sequence[str],
    rows: Sequence[EffectRow],
    *,
    titles: Sequence[str] = (),
    head: str = "Quantization",
    folded: bool = False,
    spans: Sequence[tuple[str, int]] = (),
    power: bool = True,
) -> StudyTable:
    """metrics: of each column; titles: their heads, where the metric's own does not tell. All differences of the table
    are corrected together; rows of values are not judged."""
    judged = {
        (r, c): found
        for r, row in enumerate(rows)
        for c, found in enumerate(row.figures)
        if found is not None and not row.values
    }
    adjusted = corrected_by_key(judged)
    shown = []
    for r, row in enumerate(rows):
        cells = []
        for c, found in enumerate(row.figures):
            metric = METRICS[metrics[c]]
            if found is None:
                cells.append(missing())
            elif row.values:
                cells.append(value(found, metric.unit))
            else:
                cells.append(difference(found, metric, power=power, adjusted=adjusted[r, c]))
        shown.append(StudyRow(row.head, cells, row.note, twin=row.values, group=row.group))
    change = not any(row.values for row in rows)
    columns: list[Column] = []
    for c, name in enumerate(metrics):
        columns.append(metric_column(name, titles[c] if titles else "", change=change))
    return StudyTable(label, caption, columns, shown, head, folded, spans)
