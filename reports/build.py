"""From lmms-eval's output folders to a report: read, pair, compare, render, write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bitquake import __version__
from bitquake.reports import exports
from bitquake.reports.comparison import compare_groups
from bitquake.reports.entries import LEVEL, metric_entries
from bitquake.reports.formatting import clean_text
from bitquake.reports.pages import render_pages
from bitquake.reports.pairing import pair_runs
from bitquake.reports.problems import Problem, ReportError
from bitquake.reports.reliability_csv import to_reliability_csv
from bitquake.reports.runs import Inputs, read_runs
from bitquake.reports.schema import InputEntry, ProblemEntry, Report, Settings
from bitquake.reports.site import check_replaceable, write_site


@dataclass(frozen=True)
class ReportResult:
    """A written report.

    Attributes:
        table: the main numbers, for the terminal.
        index: path of the page to open.
        report: the data behind it, as in ``report.json``.
        problems: what was left out, and remarks.
    """

    table: str
    index: Path
    report: Report
    problems: tuple[Problem, ...]

    @property
    def n_pairs(self) -> int:
        """Quantized runs that were compared with a twin on at least one task."""
        return len({cell.run for cell in self.report.cells if cell.pairing == "paired"})

    @property
    def ok(self) -> bool:
        """True when nothing was left out."""
        return not any(problem.level == "error" for problem in self.problems)


def build(
    runs: Sequence[Path],
    out: Path,
    *,
    artifacts: Path | None = None,
    title: str = "Bitquake report",
    replicates: int = 2000,
    seed: int = 0,
    common_samples: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ReportResult:
    """Read runs of lmms-eval, compare each quantized one with its full-precision twin, and write the report.

    The same inputs give the same bytes. A damaged result or a pair that differs in more than the quantization is left
    out and listed (``ReportResult.problems``, and on the page); the others stand.

    Args:
        runs: output folders of lmms-eval (``--output_path``, with ``--log_samples``), searched recursively.
        out: folder of the report; replaced when it is an earlier report.
        artifacts: folder with ``quant_cards/``; None looks where the runs put them, then into the user cache.
        title: heading of the page.
        replicates: bootstrap replicates of every interval.
        seed: seed of the bootstrap.
        common_samples: compare runs of different sample sets on the samples they share, and say so.
        progress: told, in a line, what is being worked on.

    Raises:
        ReportError: ``out`` must not be replaced, or (``RunError``) no folder holds a complete result.
    """
    tell = progress or (lambda line: None)
    runs = [Path(run) for run in runs]
    out = Path(out)
    if replicates < 1:
        raise ReportError(f"replicates must be at least 1, got {replicates}")
    for run in runs:
        if run.resolve() == out.resolve() or run.resolve().is_relative_to(out.resolve()):
            raise ReportError(f"{out}: holds the run {run.name}; give another folder for the report")
    check_replaceable(out.resolve())
    tell(f"reading {len(runs)} folders")
    inputs = read_runs(runs, None if artifacts is None else Path(artifacts))
    groups, refused = pair_runs(inputs.runs, common_samples=common_samples)
    numbers = compare_groups(groups, replicates=replicates, seed=seed, progress=tell)
    problems = tuple(sorted({*inputs.problems, *refused, *numbers.problems}))
    files = [InputEntry(path=file.path, sha256=file.sha256, n_bytes=file.n_bytes) for file in inputs.files]
    report = Report(
        generator=f"bitquake {__version__}",
        title=title,
        settings=Settings(replicates=replicates, seed=seed, level=LEVEL, common_samples=common_samples),
        metrics=metric_entries(),
        scores=[numbers.scores[name] for name in sorted(numbers.scores)],
        runs=numbers.runs,
        cells=numbers.cells,
        summaries=numbers.summaries,
        transfers=numbers.transfers,
        interactions=numbers.interactions,
        robustness=numbers.robustness,
        mixtures=numbers.mixtures,
        problems=[ProblemEntry(level=p.level, where=p.where, what=p.what, fix=p.fix) for p in problems],
        inputs=files,
        inputs_digest=_digest(inputs),
    )
    tell("writing pages")
    pages = {name: text.encode("utf-8") for name, text in render_pages(report).items()}
    pages["report.json"] = exports.to_json(report).encode()
    pages["report.schema.json"] = exports.json_schema().encode()
    pages["report.csv"] = exports.to_csv(report).encode()
    pages["reliability.csv"] = to_reliability_csv(report).encode()
    pages["style.css"] = resources.files("bitquake.reports").joinpath("static/style.css").read_bytes()
    write_site(out, pages)
    return ReportResult(exports.terminal_table(report), out / "index.html", report, problems)


def _digest(inputs: Inputs) -> str:
    """One hash over all input files and their names."""
    listing = "".join(f"{file.sha256}  {clean_text(file.path)}\n" for file in inputs.files)
    return hashlib.sha256(listing.encode()).hexdigest()
