"""Accuracy, coverage and realised risk over the share of shifted questions, as charts with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitquake.reports import charts
from bitquake.reports.figures import Figure, Panel, panels
from bitquake.reports.formatting import number, value_text
from bitquake.reports.schema import MixtureEntry, RunEntry

CHARTED = (
    ("accuracy", "accuracy, %", None),
    ("coverage_at_risk_5", "coverage at 5 % risk, %", None),
    ("transfer_risk_5", "risk really taken, %", 0.05),
    ("aurc", "AURC, %", None),
)


def mixture_panels(
    mixtures: Sequence[MixtureEntry], runs: Sequence[RunEntry], title: str, headline: str = "accuracy"
) -> list[Panel]:
    """One chart for each quantity, one line for each run, of mixtures of two tasks under one confidence.

    runs: the full-precision run first. title: what is mixed. headline: what accuracy is called in these tasks.
    """
    by_run = {mixture.run: mixture for mixture in mixtures}

    def draw(chosen: Sequence[RunEntry], styles: Mapping[str, int]) -> list[Figure]:
        out = []
        for metric, y_label, target in CHARTED:
            label = f"{headline}, %" if metric == "accuracy" else y_label
            lines, table = [], []
            for run in chosen:
                points = []
                for point in by_run[run.id].points if run.id in by_run else []:
                    value = point.metrics.get(metric)
                    if value is None:
                        continue
                    share = f"{100 * point.ood_share:.3g}"
                    table.append([run.quantization, share, value_text(value, "percent")])
                    if value.value is not None and value.lo is not None and value.hi is not None:
                        points.append(charts.Point(point.ood_share, value.value, value.lo, value.hi))
                if points:
                    lines.append(charts.Line(run.quantization, styles[run.id], points))
            if not lines:
                continue
            name = f"{label[0].upper()}{label[1:-3]}, {title}"
            ends = [[number(p.y, "percent") for p in (line.points[0], line.points[-1])] for line in lines]
            words = "; ".join(f"{line.name} from {a} to {b}" for line, (a, b) in zip(lines, ends, strict=True))
            described = f"{label}, with 95 % intervals, against the share of shifted questions: {words}."
            subtitle = "threshold chosen on clean full precision for 5 %" if target else ""
            chart = charts.mixture_chart(name, described, label, lines, target=target)
            out.append(Figure(name, subtitle, chart, ["Quantization", "Shifted, %", label], table))
        return out

    return panels(runs, draw)
