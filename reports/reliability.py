"""The reliability page of a family: what becomes of thresholds, confidences, mixtures and flips, model by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitquake.reports.confidence_views import (
    SIDE_BY_SIDE,
    confidence_names,
    recalibration_table,
    side_by_side_table,
)
from bitquake.reports.figures import Panel
from bitquake.reports.flip_views import flip_panels, flip_sentence, flip_table
from bitquake.reports.formatting import condition_name
from bitquake.reports.mixture_views import mixture_panels
from bitquake.reports.names import confidence_title
from bitquake.reports.robustness_views import INTERACTION_METRICS, interaction_table, robustness_table
from bitquake.reports.schema import CellEntry, Report, RunEntry, TransferEntry
from bitquake.reports.tables import Table
from bitquake.reports.transfer_views import (
    every_table,
    severity_panels,
    shift_panels,
    transfer_sentence,
    worst_first,
    worst_table,
)
from bitquake.reports.views import MOST_OPEN_NOISES, Arrangement, FamilyView, condition_order, group_key

INDEX_ROWS = 8


@dataclass(frozen=True)
class Fold:
    """Panels under one heading that may stand folded."""

    title: str
    panels: list[Panel]
    open: bool = True


@dataclass(frozen=True)
class Section:
    """One question with its answer: sentences, tables, charts, then tables that stand folded."""

    id: str
    title: str
    sentences: list[str]
    tables: list[Table] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)


@dataclass(frozen=True)
class ReliabilityGroup:
    """A full-precision run and those paired with it."""

    label: str
    sections: list[Section]


@dataclass(frozen=True)
class ReliabilityPage:
    """All groups on a family, its noises, and whatever is shifted from it."""

    family: FamilyView
    page: str
    groups: list[ReliabilityGroup]


@dataclass(frozen=True)
class IndexTransfers:
    """What the overview page shows of threshold transfer in a world."""

    sentences: list[str]
    table: Table | None
    panels: list[Panel]


def reliability_pages(view: Arrangement, world: str) -> list[ReliabilityPage]:
    """One page for each family of a world that is in distribution for its tasks."""
    families = {family.key: family for w in view.worlds if w.key == world for family in w.families}
    pages = []
    for key, family in families.items():
        cells = [c for c in view.report.cells if c.world == world and home(c, view.report) == key]
        by_group: dict[str, list[CellEntry]] = {}
        for run in view.report.runs:
            own = [cell for cell in cells if cell.run == run.id]
            if own:
                by_group.setdefault(group_key(run), []).extend(own)
        groups = []
        for head, own in by_group.items():
            prefix = f"{head}-" if len(by_group) > 1 else ""
            sections = group_sections(view.report, key, own, prefix)
            if sections:
                groups.append(ReliabilityGroup(view.runs[head].label, sections))
        if groups:
            # No slug holds an underscore, so no other page has this name.
            pages.append(ReliabilityPage(family, family.page.replace(".html", "_reliability.html"), groups))
    return pages


def home(cell: CellEntry, report: Report) -> str:
    """The family that is in distribution for a cell: that of the task it is shifted from, where the report has it."""
    known = {c.task: c.family for c in report.cells if c.world == cell.world} if cell.shift_from else {}
    return known.get(cell.shift_from, cell.family)


def condition_names(cells: Sequence[CellEntry], family: str) -> dict[str, str]:
    """Task -> name of its condition on the page of a family, in the order of reading: clean, shifts, noises."""
    first = {cell.task: cell for cell in cells}
    order = sorted(first.values(), key=lambda c: (c.kind == "noise", c.family != family, condition_order(c)))
    names = {}
    for cell in order:
        name = condition_name(cell.kind, cell.noise, cell.severity, cell.variant, full=cell.full)
        other = cell.family.replace("_", " ")
        names[cell.task] = name if cell.family == family else other if name == "clean" else f"{other}, {name}"
    return names


def group_sections(report: Report, family: str, cells: Sequence[CellEntry], prefix: str = "") -> list[Section]:
    """What a page says about one full-precision run and its pairs.

    cells: of these runs on the family and on what is shifted from it, run by run, the full-precision run's first.
    prefix: of the sections' ids.
    """
    runs = {run.id: run for run in report.runs if any(cell.run == run.id for cell in cells)}
    names = condition_names(cells, family)
    place = {task: at for at, task in enumerate(names)}
    by_task = sorted(cells, key=lambda cell: place[cell.task])  # stable: the runs' order within a task
    sections = [
        _transfers(report, by_task, runs, names, prefix),
        _confidences(report, by_task, runs, names, prefix),
        _mixtures(report, by_task, runs, names, prefix),
        _robustness(report, by_task, runs, names, family, prefix),
        _flips(by_task, runs, names, prefix),
        _recalibration(report, by_task, runs, names, prefix),
    ]
    return [section for section in sections if section]


def index_transfers(view: Arrangement, world: str) -> IndexTransfers | None:
    """The worst rows over all models and families of a world; None where nobody was compared."""
    cells = {(c.run, c.task): c for c in view.report.cells if c.world == world}
    found = [t for t in view.report.transfers if (t.run, t.task) in cells]
    sentences = []
    if flipped := flip_sentence(list(cells.values())):
        sentences.append(flipped)
    if not found:
        return IndexTransfers(sentences, None, []) if sentences else None
    names: dict[str, str] = {}
    families = {c.family for c in cells.values()}
    for family in sorted(families):
        own = [c for c in cells.values() if c.family == family]
        title = family.replace("_", " ")
        shifted = {c.task for c in own if c.shift_from and c.kind == "clean"}
        for task, name in condition_names(own, family).items():
            names[task] = title if task in shifted else f"{title}, {name}" if len(families) > 1 else name
    several = len({group_key(view.runs[t.run]) for t in found}) > 1
    table = worst_table(found, view.runs, names, rows=INDEX_ROWS, models=several)
    sentences = [*_summary(found, view.runs, names), *sentences]
    shown: list[Panel] = []
    if view.charts_on_index and not several:
        primary = {t.confidence for t in found if not t.confidence.startswith("selector")}
        noises = list(dict.fromkeys(c.noise for c in cells.values() if c.kind == "noise"))
        for noise in noises:
            family = next((cells[t.run, t.task].family for t in found if cells[t.run, t.task].noise == noise), "")
            near = [t for t in found if cells[t.run, t.task].family == family and t.confidence in primary]
            group = [view.runs[run] for run in dict.fromkeys(t.run for t in near)]
            if near:
                title = noise.replace("_", " ")
                shown = severity_panels(near, group, cells, noise=noise, title=title, confidence=near[0].confidence)
            if shown:
                break
    return IndexTransfers(sentences, table, shown)


def _summary(found: Sequence[TransferEntry], runs: Mapping[str, RunEntry], names: Mapping[str, str]) -> list[str]:
    """The worst promise in words, of a quantized run where there is one, and how many were kept."""
    primary = [t for t in found if not t.confidence.startswith("selector")]
    judged = [t for t in primary if t.verdict != "empty"]
    if not judged:
        return ["No threshold reaches a tolerated risk on clean full precision, so nothing is answered anywhere."]
    worst = worst_first([t for t in judged if runs[t.run].role == "quantized"] or judged)[0]
    counts = {v: sum(t.verdict == v for t in judged) for v in ("kept", "broken", "open")}
    titles = ", ".join(dict.fromkeys(confidence_title(t.confidence) for t in judged))
    told = (
        f"Of {len(judged)} promises (model × condition × tolerated risk, {titles}) "
        f"{counts['kept']} are kept, {counts['broken']} broken, {counts['open']} not decided by these samples."
    )
    return [transfer_sentence(worst, runs[worst.run], names[worst.task]), told]


def _transfers(
    report: Report,
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    names: Mapping[str, str],
    prefix: str,
) -> Section | None:
    by_place = {(c.run, c.task): c for c in cells}
    found = [t for t in report.transfers if (t.run, t.task) in by_place]
    title = "Does a threshold keep its promise?"
    if not found:
        notes = [c.metrics["phi_1"].note for c in cells if c.pairing in ("twin", "paired") and c.metrics["phi_1"].note]
        if not notes:
            return None
        return Section(f"{prefix}transfer", title, [f"No threshold could be carried over: {notes[0]}."])
    confidences = list(dict.fromkeys(t.confidence for t in found))
    primary = [name for name in confidences if not name.startswith("selector")]
    tables = [worst_table(found, runs, names)]
    tables += [every_table(found, runs, names, confidence=name) for name in confidences]
    folds = []
    ordered = list(runs.values())
    plain = {
        t: n.removeprefix("block ") for t, n in names.items() if any(c.task == t and c.kind != "noise" for c in cells)
    }
    noises = list(dict.fromkeys((c.family, c.noise) for c in cells if c.kind == "noise"))
    for name in primary:
        if shown := shift_panels(found, ordered, plain, confidence=name):
            folds.append(Fold("Clean and shifted questions", shown))
        for family, noise in noises:
            own = [t for t in found if by_place[t.run, t.task].family == family]
            words = noise.replace("_", " ")
            if shown := severity_panels(own, ordered, by_place, noise=noise, title=words, confidence=name):
                folds.append(Fold(words[:1].upper() + words[1:], shown, len(noises) <= MOST_OPEN_NOISES))
    return Section(f"{prefix}transfer", title, _summary(found, runs, names), tables, folds)


def _confidences(
    report: Report,
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    names: Mapping[str, str],
    prefix: str,
) -> Section | None:
    held = confidence_names(cells)
    if not held:
        return None
    metrics = {metric.key: metric for metric in report.metrics}
    tables = [
        side_by_side_table(cells, runs, names, metrics[key], folded=key != SIDE_BY_SIDE[0]) for key in SIDE_BY_SIDE
    ]
    selectors = any(name.startswith("selector") for name in held)
    title = "Does a Selector know better?" if selectors else "Other confidences of the same answers"
    text = "The same answers, ranked by another confidence: only which of them are given changes, never what is said."
    return Section(f"{prefix}confidences", title, [text], tables)


def _mixtures(
    report: Report,
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    names: Mapping[str, str],
    prefix: str,
) -> Section | None:
    tasks = {cell.task for cell in cells}
    found = [m for m in report.mixtures if m.run in runs and {m.id_task, m.ood_task} <= tasks]
    if not found:
        return None
    headlines = {cell.task: cell.headline.lower() for cell in cells if cell.headline == "Accuracy"}
    folds = []
    for clean, shifted, confidence in dict.fromkeys((m.id_task, m.ood_task, m.confidence) for m in found):
        own = [m for m in found if (m.id_task, m.ood_task, m.confidence) == (clean, shifted, confidence)]
        other = names[shifted]
        if shown := mixture_panels(own, list(runs.values()), f"mixed with {other}", headlines.get(clean, "mean score")):
            by = "" if not confidence.startswith("selector") else f", {confidence_title(confidence)}"
            folds.append(Fold(f"Mixed with {other}{by}", shown, not confidence.startswith("selector")))
    text = (
        "What to expect when a share of the questions is shifted: exact expectations from the answers to both tasks, "
        "not one random mixture."
    )
    return Section(f"{prefix}mixtures", "What if some of the questions are shifted?", [text], [], folds)


def _robustness(
    report: Report,
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    names: Mapping[str, str],
    family: str,
    prefix: str,
) -> Section | None:
    metrics = {metric.key: metric for metric in report.metrics}
    world = cells[0].world
    own = [r for r in report.robustness if r.run in runs and (r.world, r.family) == (world, family)]
    inter = [i for i in report.interactions if i.run in runs and (i.world, i.family) == (world, family)]
    found = [
        robustness_table(own, runs),
        interaction_table(inter, runs, names, [metrics[key] for key in INTERACTION_METRICS]),
    ]
    tables = [table for table in found if table]
    if not tables:
        return None
    text = (
        "A model that loses as much in noise as on clean images is worse, but not more fragile; one that loses more is."
    )
    return Section(f"{prefix}robustness", "Is the quantized model more fragile?", [text], tables)


def _flips(
    cells: Sequence[CellEntry], runs: Mapping[str, RunEntry], names: Mapping[str, str], prefix: str
) -> Section | None:
    table = flip_table(cells, runs, names)
    if table is None:
        return None
    clean = next((task for task in names), "")
    shown = flip_panels([c for c in cells if c.task == clean], list(runs.values()), names[clean])
    folds = [Fold("Which answers flip, by full precision's confidence", shown)] if shown else []
    return Section(f"{prefix}flips", "Which answers flip?", [flip_sentence(cells)], [table], folds)


def _recalibration(
    report: Report,
    cells: Sequence[CellEntry],
    runs: Mapping[str, RunEntry],
    names: Mapping[str, str],
    prefix: str,
) -> Section | None:
    metrics = {metric.key: metric for metric in report.metrics}
    tables = [
        recalibration_table(cells, runs, names, metrics[key], folded=key != "ece_15") for key in ("ece_15", "nll")
    ]
    kept = [table for table in tables if table]
    if not kept:
        return None
    text = "Temperature and Platt scaling mend the stated probability, never the order of the answers."
    return Section(f"{prefix}recalibration", "Does recalibration carry over?", [text], kept)
