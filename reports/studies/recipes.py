"""How a study's models were trained: recipes side by side, and the curves of their losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitquake.reports import charts
from bitquake.reports.charts import Line, Point
from bitquake.reports.figures import Figure as Chart
from bitquake.reports.figures import Legend, Panel
from bitquake.reports.problems import Problem
from bitquake.reports.studies.arms import recipe_title
from bitquake.reports.studies.naming import listing
from bitquake.reports.studies.page import (
    StudyPanels,
    StudyRow,
    StudySection,
    StudyTable,
    words,
)
from bitquake.reports.studies.study import Study
from bitquake.reports.tables import Column

_POINTS = 60
_VALIDATION = "validation_"
_CURVES = {
    "loss": "loss",
    "ce": "cross-entropy",
    "gdkd": "distillation",
    "rcka": "relations (1 − CKA)",
    "beta": "weight of distillation",
}
_NOT_RECIPE = ("pretrained", "revision", "trust_remote_code", "save_every", "loader_threads", "seed")


def _trainings(study: Study) -> dict[str, tuple[str, dict[str, Any]]]:
    """Training hash -> the model entry's name and the configuration, each training once."""
    return {c.plan.training_hash: (c.plan.model, c.plan.training) for c in study.cells if c.plan.training}


def recipe_section(study: Study) -> StudySection | None:
    trainings = _trainings(study)
    if not trainings:
        return None
    keys = [key for key in dict.fromkeys(k for _, t in trainings.values() for k in t) if key not in _NOT_RECIPE]
    told = {key: [_plain(t.get(key)) for _, t in trainings.values()] for key in keys}
    varying = [key for key in keys if len(set(told[key])) > 1]
    same = [f"{key.replace('_', ' ')} {told[key][0]}" for key in keys if key not in varying and told[key][0] != "–"]
    rows = [
        StudyRow(name, [words(_plain(training.get(key))) for key in varying], recipe_title(training))
        for name, training in trainings.values()
    ]
    columns = [Column(key.replace("_", " "), text=True) for key in varying]
    table = StudyTable("Recipes", "What differs between the trainings.", columns, rows, "Training")
    return StudySection(
        "recipe", "Recipes", [], [table], notes=[f"The same in all: {'; '.join(same)}."] if same else []
    )


def _plain(told: Any) -> str:
    if told is None:
        return "–"
    if isinstance(told, bool):
        return "yes" if told else "no"
    if isinstance(told, float):
        return f"{told:g}"
    if isinstance(told, list):
        return listing(_plain(one) for one in told) if told else "–"
    if isinstance(told, dict):
        named = told.get("name") or told.get("data")
        share = f" × {told['share']:g}" if isinstance(told.get("share"), int | float) and told["share"] != 1 else ""
        return f"{named}{share}" if named else ", ".join(f"{key} {_plain(one)}" for key, one in told.items())
    return str(told)


def curve_section(study: Study, problems: list[Problem]) -> StudySection | None:
    """The losses of every training, by step."""
    found = {}
    for training_hash, (name, _) in _trainings(study).items():
        path = study.out / "models" / training_hash / "curve.jsonl"
        if not path.is_file():
            continue
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            found[name] = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
        except (OSError, ValueError) as error:
            fix = "the training can be run again"
            problems.append(Problem("warning", f"models/{training_hash}", f"its curve cannot be read ({error})", fix))
    keys = list(dict.fromkeys(key for lines in found.values() for line in lines for key in line))
    keys = [key for key in keys if key not in ("step", "seconds", "rate")]
    keys.sort(key=lambda key: (key.removeprefix(_VALIDATION) != "loss", key.startswith(_VALIDATION)))
    first = [key for key in keys if key.removeprefix(_VALIDATION) in _CURVES]
    parts = [
        StudyPanels("", _curve_panels(first, found)),
        StudyPanels("Parts of the losses", _curve_panels([k for k in keys if k not in first], found), folded=True),
    ]
    if not parts[0].panels:
        return None
    text = f"Means over the steps between two points; at most {_POINTS} points of each curve are drawn."
    return StudySection("curves", "Training curves", [text], figures=[part for part in parts if part.panels])


def _curve_panels(keys: Sequence[str], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    panels = []
    names = list(found)
    for start in range(0, len(names), charts.N_STYLES):
        chosen = names[start : start + charts.N_STYLES]
        figures = [chart for key in keys if (chart := _curve(key, {name: found[name] for name in chosen}))]
        if figures:
            legend = [Legend(name, charts.swatch(style)) for style, name in enumerate(chosen)]
            panels.append(Panel(legend, figures))
    return panels


def _curve(key: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart | None:
    lines, table = [], []
    for style, (name, told) in enumerate(found.items()):
        numbers = [(line["step"], float(line[key])) for line in told if isinstance(line.get(key), int | float)]
        numbers = [(step, y) for step, y in numbers if abs(y) < float("inf")]
        size = max(1, -(-len(numbers) // _POINTS))
        points = []
        for at in range(0, len(numbers), size):
            block = numbers[at : at + size]
            y = sum(one for _, one in block) / len(block)
            points.append(Point(block[-1][0], y, y, y))
        if points:
            lines.append(Line(name, style, points))
            table += [[name, str(points[0].x), f"{points[0].y:.4g}"], [name, str(points[-1].x), f"{points[-1].y:.4g}"]]
    heights = {point.y for line in lines for point in line.points}
    if len(heights) < 2 or all(len(line.points) < 2 for line in lines):  # nothing that moves
        return None
    known = _CURVES.get(key.removeprefix(_VALIDATION), key.replace("_", " "))
    title = f"{known}, held out" if key.startswith(_VALIDATION) else known
    chart = charts.curve_chart(title, f"{title} by step", title, lines, "step")
    return Chart(title, "first and last point in the numbers", chart, ["Training", "Step", title], table)
