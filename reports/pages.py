"""Renders a report as static pages: autoescape on, nothing undefined, no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from bitquake.reports import formatting
from bitquake.reports.reliability import index_transfers, reliability_pages
from bitquake.reports.schema import MetricEntry, Report, ScoreEntry, Unit, ValueEntry
from bitquake.reports.views import Arrangement

_LONG_TEXT = 2000


def render_pages(report: Report) -> dict[str, str]:
    """File name -> HTML of every page of the report."""
    templates = environment()
    view = Arrangement(report)
    families = [family for world in view.worlds for family in world.families]
    reliability = {world.key: reliability_pages(view, world.key) for world in view.worlds}
    shared = {"report": report, "view": view, "families": families}
    pages = {
        "index.html": templates.get_template("index.html").render(
            **shared,
            charts=view.charts_on_index,
            reliability=reliability,
            transfers={world.key: index_transfers(view, world.key) for world in view.worlds},
            n_pairs=len({cell.run for cell in report.cells if cell.pairing == "paired"}),
            n_tasks=len({cell.task for cell in report.cells}),
            n_answers=sum(cell.n for cell in report.cells),
            n_errors=sum(problem.level == "error" for problem in report.problems),
        ),
        "models.html": templates.get_template("models.html").render(**shared),
    }
    for world in view.worlds:
        found = {page.family.key: page for page in reliability[world.key]}
        for page in found.values():
            inside = {**shared, "world": world, "family": page.family, "page": page}
            pages[page.page] = templates.get_template("reliability.html").render(**inside)
        for family in world.families:
            inside = {**shared, "world": world, "family": family, "reliability": found.get(family.key)}
            pages[family.page] = templates.get_template("family.html").render(**inside)
            for noise in family.noises:
                pages[noise.page] = templates.get_template("noise.html").render(**inside, noise=noise)
    return pages


@cache
def environment() -> Environment:
    """What renders the pages, of a report and of the leaderboard: autoescape on, nothing undefined, its filters."""
    made = Environment(
        loader=PackageLoader("bitquake.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "user": _user_text,
        "long_user": lambda text: _user_text(text, _LONG_TEXT),
        "plain": formatting.clean_text,
        "capitalise": lambda text: text[:1].upper() + text[1:],
        "num": formatting.number,
        "value_interval": _value_interval,
        "delta": formatting.delta,
        "delta_interval": formatting.delta_interval,
        "effect_word": formatting.effect_word,
        "effect_class": formatting.effect_class,
        "megabytes": formatting.megabytes,
        "direction": _direction,
        "points": lambda unit: "points" if unit == "percent" else "",
        "unit_name": _unit_name,
        "run_page": lambda run: f"models.html#{run.id}",
    }
    made.filters.update(filters)
    return made


def _user_text(text: str, longest: int = formatting.LONGEST_TEXT) -> Markup:
    """Foreign text, isolated so that its writing direction cannot rearrange the page."""
    return Markup("<bdi>{}</bdi>").format(escape(formatting.clean_text(text, longest)))


def _value_interval(value: ValueEntry, unit: Unit) -> str:
    if value.lo is None or value.hi is None:
        return ""
    return formatting.interval(value.lo, value.hi, unit)


def _direction(metric: MetricEntry | ScoreEntry) -> Markup:
    """An arrow that says which way is better."""
    if metric.higher_is_better is None:
        return Markup("")
    arrow, words = ("↑", "higher is better") if metric.higher_is_better else ("↓", "lower is better")
    return Markup(' <span class="arrow" title="{}">{}</span>').format(words, arrow)


def _unit_name(metric: MetricEntry) -> str:
    return {"percent": "%", "fraction": "0–1", "nats": "nats", "tenths": ""}[metric.unit]
