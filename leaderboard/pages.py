"""Renders a board as static pages: autoescape on, nothing undefined, one small script that they can do without.

Foreign text goes through the filters of `bitquake.reports.pages` (one line, no direction marks, isolated), addresses
through ``http``, which lets nothing but http and https pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from urllib.parse import urlsplit

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup

from bitquake.leaderboard.board_file import LEVELS, SAME_SCORES, BoardFile, SubmissionEntry, page_of
from bitquake.leaderboard.eee import EEE_VERSION
from bitquake.leaderboard.method import FORMULAS
from bitquake.leaderboard.model_page import ModelPage
from bitquake.leaderboard.view_pages import view_pages
from bitquake.leaderboard.views import BoardView, TaskView, ViewPage
from bitquake.metrics import METRICS
from bitquake.reports import formatting, pages
from bitquake.reports.published import EVIDENCE, published_numbers
from bitquake.reports.schema import RunEntry, Settings
from bitquake.reports.views import Arrangement

FOOT = Markup("<!--foot-->")
"""Stands where the foot of each page goes: it tells what the whole site was made from, so it is put in last."""


@dataclass(frozen=True)
class _Board:
    view: BoardView
    heads: dict[str, Markup]
    pages: list[ViewPage]
    tasks: list[TaskView]


def with_foot(html: str, foot: str) -> str:
    """A page with the foot that ``render_foot`` made."""
    return html.replace(str(FOOT), foot)


def render_foot(generator: str, source_date: int | None, n_inputs: int, inputs_digest: str) -> str:
    """The foot of all pages; its date is that of ``SOURCE_DATE_EPOCH``, never of the build."""
    date = "" if source_date is None else datetime.fromtimestamp(source_date, timezone.utc).strftime("%Y-%m-%d")
    told = {"generator": generator, "date": date, "n_inputs": n_inputs, "inputs_digest": inputs_digest}
    return environment().get_template("board_foot.html").render(site=told)


def render_board(
    board: BoardFile, settings: Settings, charts: Mapping[tuple[str, str], Sequence[str]]
) -> dict[str, str]:
    """File name -> HTML of every page but those of the models.

    Args:
        board: what ``board.json`` holds.
        settings: of the bootstrap, for the page on the method.
        charts: (board, task) -> chart fragments of the task's page, as ``render_task_chart`` made them.
    """
    made = environment()
    boards = []
    for entry in board.boards:
        view = BoardView(entry)
        row = made.get_template("board_row.html")
        # The heads came out of a template: escaped once is enough.
        heads = {
            run.id: Markup(row.render(view=view, run=run, submission=view.submissions[run.id]).strip())  # noqa: S704
            for run in view.order
        }
        boards.append(_Board(view, heads, view_pages(view), view.task_views()))
    runs = [run for entry in board.boards for run in entry.report.runs]
    shared = {"foot": FOOT, "levels": LEVELS}
    found = {
        "index.html": made.get_template("board_index.html").render(
            **shared,
            boards=[
                {"view": b.view, "heads": b.heads, "pages": b.pages, "tasks": b.tasks, "main": b.view.main_table()}
                for b in boards
            ],
            n_pairs=sum(run.role == "quantized" for run in runs),
            n_models=len({s.model for entry in board.boards for s in entry.submissions}),
            n_tasks=sum(len(entry.tasks) for entry in board.boards),
            n_refused=board.n_refused,
        ),
        "tasks.html": made.get_template("board_tasks.html").render(**shared, boards=boards),
        "method.html": made.get_template("board_method.html").render(
            **shared, metrics=list(METRICS.values()), formulas=FORMULAS, settings=settings, eee_version=EEE_VERSION
        ),
        "published.html": made.get_template("board_published.html").render(
            **shared, published=published_numbers(), evidence=EVIDENCE
        ),
    }
    for b in boards:
        inside = {**shared, "view": b.view, "heads": b.heads, "pages": b.pages}
        for page in b.pages:
            found[page.page] = made.get_template("board_view.html").render(**inside, page=page)
        for task in b.tasks:
            # Its charts came out of the templates, and stay what they are.
            fragments = [Markup(text) for text in charts.get((b.view.entry.board, task.entry.task), ())]  # noqa: S704
            found[task.page] = made.get_template("board_task.html").render(**inside, task=task, charts=fragments)
    return found


def render_model(
    view: BoardView,
    submission: SubmissionEntry,
    twin: SubmissionEntry | None,
    run: RunEntry,
    page: ModelPage,
) -> str:
    """The page of one submission."""
    return (
        environment()
        .get_template("board_model.html")
        .render(
            foot=FOOT,
            levels=LEVELS,
            same_scores=SAME_SCORES,
            view=view,
            submission=submission,
            twin=twin,
            run=run,
            page=page,
        )
    )


def render_task_chart(view: Arrangement, task: str, label: str) -> str:
    """Risk against coverage of the runs of a report on one task, as a fragment of the task's page; "" without any."""
    for world in view.worlds:
        for family in world.families:
            for condition in family.conditions:
                if condition.task == task:
                    figures = [f for group in condition.groups if (f := view.risk_coverage_figure(condition, group))]
                    legend = [entry for group in condition.groups for entry in view.legend(group)]
                    template = environment().get_template("board_chart.html")
                    return template.render(figures=figures, legend_entries=legend, label=label) if figures else ""
    return ""


@cache
def environment() -> Environment:
    """The environment of the report's pages, with the board's templates before its own, and the filter ``http``."""
    reports = pages.environment()
    made = reports.overlay(
        loader=ChoiceLoader([PackageLoader("bitquake.leaderboard"), PackageLoader("bitquake.reports")])
    )
    made.filters = {**reports.filters, "http": http_address, "run_page": lambda run: page_of(run.id)}
    return made


def http_address(address: str) -> str:
    """The address if it is http or https and fit to be shown, else ""."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    plain = address.isascii() and address.isprintable() and not set(address) & set(" \"'<>\\`{}|^")
    whole = formatting.clean_text(address, 2000) == address
    return address if parts.scheme in ("http", "https") and parts.hostname and plain and whole else ""
