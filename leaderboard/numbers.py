"""From validated submissions to numbers: pairs, intervals and ranks as a report has them, under the board's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bitquake import __version__
from bitquake.leaderboard.recompute import load_runs
from bitquake.leaderboard.submission import Submission
from bitquake.quant_card import QuantCard
from bitquake.reports.cards import card_entry
from bitquake.reports.comparison import compare_groups, run_id
from bitquake.reports.entries import LEVEL, metric_entries
from bitquake.reports.pairing import pair_runs, quantization_name
from bitquake.reports.runs import Run, public_subject
from bitquake.reports.schema import ProblemEntry, Report, RunEntry, Settings

GENERATOR = f"bitquake {__version__}"
_HAVE_RUNS = ("cells", "summaries", "transfers", "interactions", "robustness", "mixtures")


def settings_of(replicates: int, seed: int) -> Settings:
    """The settings of the bootstrap, as every report of the board states them."""
    return Settings(replicates=replicates, seed=seed, level=LEVEL, common_samples=False)


def group_report(
    submissions: Sequence[Submission],
    gold: Path | None,
    settings: Settings,
    *,
    boards: Path | None = None,
    title: str = "",
) -> Report:
    """Numbers of a full-precision submission and of those compared with it; a run's id is its submission's name.

    Args:
        submissions: validated and recomputable, the full-precision one first.
        gold: folder of the gold files.
        settings: of the bootstrap.
        boards: folder of board files; None: those of the package.
        title: of the report.
    """
    runs = load_runs(submissions, gold, boards=boards)
    named = [(submission.name, run) for submission, run in zip(submissions, runs, strict=True)]
    parts = [_report(part, settings, title) for part in _without_repeats(named)]
    return merged(parts, settings, title)


def merged(parts: Iterable[Report], settings: Settings, title: str) -> Report:
    """Several reports as one; what several of them hold stands once."""
    whole = empty_report(settings, title)
    known: set[str] = set()
    for part in parts:
        new = {run.id for run in part.runs} - known
        known |= new
        whole.runs += [run for run in part.runs if run.id in new]
        for name in _HAVE_RUNS:
            getattr(whole, name).extend(entry for entry in getattr(part, name) if entry.run in new)
        titles = {score.key for score in whole.scores}
        whole.scores += [score for score in part.scores if score.key not in titles]
        whole.problems += part.problems
    return whole


def empty_report(settings: Settings, title: str) -> Report:
    """A report without a run."""
    return Report(
        generator=GENERATOR,
        title=title,
        settings=settings,
        metrics=metric_entries(),
        scores=[],
        runs=[],
        cells=[],
        summaries=[],
        problems=[],
        inputs=[],
        inputs_digest="",
    )


def run_without_numbers(submission: Submission) -> RunEntry:
    """What can be said of a submission whose answers cannot be scored here."""
    card: QuantCard = submission.card
    label = public_subject(card)
    return RunEntry(
        id=submission.name,
        name=f"{label} {quantization_name(card)}",
        label=label,
        quantization=quantization_name(card),
        role="full-precision" if card.method == "none" else "quantized",
        twin=submission.manifest.twin or None,
        refused="",
        model_hash=submission.manifest.model_hash,
        card_hash=submission.manifest.card_hash,
        card=card_entry(card),
        commands=sorted(submission.manifest.commands),
    )


def _without_repeats(named: Sequence[tuple[str, Run]]) -> list[list[tuple[str, Run]]]:
    """Groups in which no model stands twice, each with the full-precision run at its head."""
    head, rest = named[0], list(named[1:])
    parts: list[list[tuple[str, Run]]] = [[head]]
    for name, run in rest:
        for part in parts:
            if all(run.key != other.key for _, other in part):
                part.append((name, run))
                break
        else:
            parts.append([head, (name, run)])
    return parts


def _report(named: Sequence[tuple[str, Run]], settings: Settings, title: str) -> Report:
    groups, problems = pair_runs([run for _, run in named])
    numbers = compare_groups(groups, replicates=settings.replicates, seed=settings.seed)
    report = empty_report(settings, title)
    report.scores = [numbers.scores[name] for name in sorted(numbers.scores)]
    report.runs = numbers.runs
    for entries in _HAVE_RUNS:
        setattr(report, entries, getattr(numbers, entries))
    report.problems = [
        ProblemEntry(level=p.level, where=p.where, what=p.what, fix=p.fix)
        for p in sorted({*problems, *numbers.problems})
    ]
    return _renamed(report, {run_id(run): name for name, run in named})


def _renamed(report: Report, names: dict[str, str]) -> Report:
    def entry(found: Any) -> Any:
        return found.model_copy(update={"run": names[found.run]})

    return report.model_copy(
        update={
            "runs": [
                run.model_copy(update={"id": names[run.id], "twin": names[run.twin] if run.twin else None})
                for run in report.runs
            ],
            **{name: [entry(found) for found in getattr(report, name)] for name in _HAVE_RUNS},
        }
    )
