"""From a suite's output folder to the page of its study: read, compute, render, write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from bitquake import __version__
from bitquake.reports.entries import LEVEL
from bitquake.reports.figures import Figure as Chart
from bitquake.reports.pages import environment
from bitquake.reports.problems import Problem, ReportError
from bitquake.reports.published import EVIDENCE, PublishedTable, published_numbers
from bitquake.reports.site import MARKER as REPORT_MARKER
from bitquake.reports.site import replace_file
from bitquake.reports.studies.overview import Overview, overview
from bitquake.reports.studies.page import StudyPage, StudySection, StudyTable
from bitquake.reports.studies.study import Study, read_study
from bitquake.suite_plan import PLAN_FILE, Page

MARKER = ".bitquake-study"
"""Lists the files of a study page, one a line: only these may be replaced."""
NUMBERS_VERSION = 1
_PAGES: dict[Page, str] = {
    "noise": "noise_page",
    "grounding": "grounding_page",
    "components": "components_page",
    "selective": "selective_page",
    "training": "training_page",
}


@dataclass(frozen=True)
class StudyResult:
    """A written study page.

    Attributes:
        index: path of the page to open.
        problems: what was left out, and remarks.
        table: the findings, for the terminal.
    """

    index: Path
    problems: tuple[Problem, ...]
    table: str

    @property
    def ok(self) -> bool:
        """True when nothing was left out."""
        return not any(problem.level == "error" for problem in self.problems)


def build_study(
    out: Path,
    site: Path,
    *,
    replicates: int = 2000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> StudyResult:
    """Write the page of a suite's study, from what is there: cells that failed or wait are named on it.

    The same inputs give the same bytes. Files beside the page (a general report in ``site/report``, say) stay.

    Args:
        out: folder that ``bitquake run`` wrote.
        site: folder of the page: ``index.html``, ``study.json`` with every number shown, ``style.css``.
        replicates: bootstrap replicates of every interval.
        seed: seed of the bootstrap.
        progress: told, in a line, what is being worked on.

    Raises:
        ReportError: no plan that can be read, no finished cell, or ``site`` holds somebody else's page.
    """
    if replicates < 1:
        raise ReportError(f"replicates must be at least 1, got {replicates}")
    out, site = Path(out), Path(site)
    _check_site(site)
    tell = progress or (lambda line: None)
    study = read_study(out, progress=tell)
    published = _published(study)
    if not study.finished:
        listed = "".join(f"\n  {cell.name}: {cell.failure or 'waits'}" for cell in study.cells)
        raise ReportError(f"{out}: no cell of suite {study.plan.suite!r} has finished, so there is no page{listed}")
    page, problems = study_page(study, replicates=replicates, seed=seed, progress=tell)
    frame = overview(study)
    problems = tuple(sorted({*study.problems, *problems}))
    settings = {"replicates": replicates, "seed": seed, "level": LEVEL}
    html = (
        environment()
        .get_template("study.html")
        .render(
            plan=study.plan,
            study=study,
            page=page,
            frame=frame,
            problems=problems,
            published=published,
            evidence=EVIDENCE,
            settings=settings,
            generator=f"bitquake {__version__}",
            digest=_digest(study),
        )
    )
    told = {
        "version": NUMBERS_VERSION,
        "generator": f"bitquake {__version__}",
        "settings": settings,
        "plan": study.plan.model_dump(mode="json", exclude={"cells"}),
        **_numbers(study, page, frame, problems),
        "inputs": {file.path: file.sha256 for file in sorted(study.files, key=lambda f: f.path)},
    }
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
    style = resources.files("bitquake.reports").joinpath("static/style.css").read_bytes()
    _write(site, {"style.css": style, "study.json": text.encode(), "index.html": html.encode()})
    return StudyResult(site / "index.html", problems, _terminal(study, page))


def study_page(
    study: Study, *, replicates: int, seed: int, progress: Callable[[str], None] | None = None
) -> tuple[StudyPage, tuple[Problem, ...]]:
    """What the study's own module makes of it, and what it had to leave out."""
    name = study.plan.page
    (progress or (lambda line: None))(f"computing the {name} page")
    make: Callable[..., StudyPage] = getattr(import_module(f"bitquake.reports.studies.{name}"), _PAGES[name])
    problems: list[Problem] = []
    page = make(study, problems, replicates=replicates, seed=seed)
    return page, tuple(problems)


def _published(study: Study) -> list[PublishedTable]:
    known = {table.id: table for table in published_numbers().tables}
    unknown = [name for name in study.plan.published if name not in known]
    if unknown:
        raise ReportError(
            f"{study.out / PLAN_FILE}: published: no table {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
        )
    return [known[name] for name in study.plan.published]


def _numbers(study: Study, page: StudyPage, frame: Overview, problems: tuple[Problem, ...]) -> Mapping[str, Any]:
    return {
        "cells": [
            {
                "name": cell.name,
                "hash": cell.plan.hash,
                "state": "finished" if cell.finished else "failed" if cell.failure else "waiting",
                "reason": cell.failure,
                "factors": cell.plan.factors,
                "samples": {task: len(found.answers) for task, found in cell.tasks.items()},
                "seconds": cell.manifest.seconds if cell.manifest else None,
            }
            for cell in study.cells
        ],
        "findings": [{"text": f.text, "verdict": f.verdict, "figures": f.figures} for f in page.findings],
        "cautions": list(page.cautions),
        "run": [_table(table) for table in frame.tables],
        "sections": [_section(section) for section in page.sections],
        "further": page.numbers,
        "problems": [{"level": p.level, "where": p.where, "what": p.what, "fix": p.fix} for p in problems],
    }


def _section(section: StudySection) -> dict[str, Any]:
    return {
        "id": section.id,
        "title": section.title,
        "sentences": list(section.sentences),
        "tables": [_table(table) for table in section.tables],
        "figures": [_chart(chart) for part in section.figures for panel in part.panels for chart in panel.figures],
    }


def _table(table: StudyTable) -> dict[str, Any]:
    return {
        "label": table.label,
        "columns": [table.head, *(column.title for column in table.columns)],
        "rows": [
            {
                "head": row.head,
                "note": row.note,
                "cells": [cell.cell.value if cell.number is None else cell.number for cell in row.cells],
            }
            for row in table.rows
        ],
    }


def _chart(chart: Chart) -> dict[str, Any]:
    return {"title": chart.title, "columns": chart.head, "rows": chart.table}


def _plain(value: Any) -> Any:
    """A number of numpy as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot stand in study.json")


def _terminal(study: Study, page: StudyPage) -> str:
    counts = f"{len(study.finished)} of {len(study.cells)} cells finished, {len(study.failed)} failed"
    if study.waiting:
        counts += f", {len(study.waiting)} wait"
    return "\n".join(
        [
            f"{study.plan.title} ({study.plan.world} world): {counts}",
            *(f"- {f.text} {f.figures}".rstrip() for f in page.findings),
        ]
    )


def _digest(study: Study) -> str:
    """One hash over the plan and all files that were read."""
    listing = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(study.files, key=lambda f: f.path))
    return hashlib.sha256((study.plan.model_dump_json() + listing).encode()).hexdigest()


def _check_site(site: Path) -> None:
    """Raise where a page would be replaced that is no study's."""
    if site.exists() and not site.is_dir():
        raise ReportError(f"{site}: is a file; give a folder for the page")
    if (site / REPORT_MARKER).exists():
        raise ReportError(f"{site}: holds a report; give another folder for the study's page")
    if (site / "index.html").exists() and not (site / MARKER).is_file():
        raise ReportError(f"{site}: holds an index.html that is no study's; give another folder, or move it away")


def _write(site: Path, files: Mapping[str, bytes]) -> None:
    """Each file whole or as it was; the page comes last."""
    marker = "".join(f"{name}\n" for name in sorted(files)).encode()
    try:
        site.mkdir(parents=True, exist_ok=True)
        for name, content in {MARKER: marker, **files}.items():
            replace_file(site / name, content)
    except OSError as error:
        raise ReportError(f"{site}: cannot be written: {error.strerror or error}; give a folder that can") from error
