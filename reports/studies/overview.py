"""What every study page says first: what was run and what it cost, what failed or is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bitquake.reports.formatting import megabytes
from bitquake.reports.studies.naming import (
    calibration_sources,
    calibration_title,
    cell_titles,
    family_title,
    task_title,
)
from bitquake.reports.studies.page import Shown, StudyRow, StudyTable, missing, words
from bitquake.reports.studies.study import Study, StudyCell
from bitquake.reports.tables import Column

_OPEN_ROWS = 24


@dataclass(frozen=True)
class Overview:
    """facts: name -> text. tables: models, tasks, cells. absent: cells without a result, each with its reason."""

    facts: Sequence[tuple[str, str]]
    tables: Sequence[StudyTable]
    absent: Sequence[tuple[str, str]]


def overview(study: Study) -> Overview:
    """The frame of a study's page."""
    titles = cell_titles(study)
    absent = [(titles[cell.name], cell.failure) for cell in study.failed]
    absent += [(titles[cell.name], "has not run yet") for cell in study.waiting]
    return Overview(_facts(study), [_models(study), _tasks(study), _cells(study, titles)], absent)


def _facts(study: Study) -> list[tuple[str, str]]:
    plan = study.plan
    done = list({cell.plan.hash: cell for cell in study.finished}.values())
    world = "real models and data sets" if plan.world == "real" else "the offline block world: small models, drawn data"
    facts = [("World", world)]
    counts = f"{len(study.finished)} of {len(study.cells)} finished"
    if study.failed:
        counts += f", {len(study.failed)} failed"
    if study.waiting:
        counts += f", {len(study.waiting)} have not run yet"
    facts.append(("Cells", f"{counts} (a cell: one loaded model with all its tasks)"))
    facts.append(("Quantizations", _distinct(cell.plan.quantization for cell in study.cells)))
    if sources := calibration_sources(study.cells):
        same = "" if len(sources) > 1 else ": the source of every calibrated cell"
        facts.append(("Calibration", f"{', '.join(sources)}{same}"))
    facts.append(("Seeds", ", ".join(str(seed) for seed in sorted({cell.plan.seed for cell in study.cells}))))
    manifests = [cell.manifest for cell in done if cell.manifest]
    seconds = sum(manifest.seconds for manifest in manifests)
    loading = sum(manifest.load_seconds for manifest in manifests)
    answers = sum(sum(manifest.samples.values()) for manifest in manifests)
    facts.append(("Answers", f"{answers:,}"))
    facts.append(
        ("Wall time", f"{duration(seconds)} over all cells, of which {duration(loading)} loading, quantizing, training")
    )
    caches = [manifest.noise_cache for manifest in manifests if manifest.noise_cache is not None]
    hits, misses = (sum(cache.get(kind, 0) for cache in caches) for kind in ("hits", "misses"))
    if hits + misses:
        facts.append(("Noise cache", f"{hits:,} of {hits + misses:,} corrupted images reused ({_rate(hits, misses)})"))
    machines = dict.fromkeys(_machine(manifest.machine) for manifest in manifests if manifest.machine)
    if machines:
        facts.append(("Machines" if len(machines) > 1 else "Machine", "; ".join(machines)))
    versions = sorted({plan.bitquake, *(manifest.bitquake for manifest in manifests)})
    facts.append(("Bitquake", ", ".join(versions)))
    return facts


def _machine(told: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in told.items() if not name.startswith("host"))


def _distinct(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    if len(found) <= _OPEN_ROWS:
        return ", ".join(found)
    return f"{len(found)}: {', '.join(found[:6])}, …, {found[-1]}"


def _models(study: Study) -> StudyTable:
    rows = []
    for name in dict.fromkeys(cell.plan.model for cell in study.cells):
        own = [cell for cell in study.cells if cell.plan.model == name]
        plan = own[0].plan
        card = next((cell.card for cell in own if cell.card), None)
        size = sum(entry.n_parameters for entry in card.components.values()) if card else plan.parameters
        training = str((plan.training or {}).get("method", "")) or "none"
        cells = [
            words(plan.pretrained),
            words(plan.revision or "newest"),
            words(_size(size) if size else "unknown"),
            words(card.architecture if card else "unknown"),
            words(training),
            words(str(len(own))),
        ]
        rows.append(StudyRow(name, cells))
    heads = ("Checkpoint", "Revision", "Parameters", "Architecture", "Training", "Cells")
    columns = [Column(title, text=title not in ("Parameters", "Cells")) for title in heads]
    return StudyTable("Models", "", columns, rows, "Model")


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _tasks(study: Study) -> StudyTable:
    rows = []
    for task, cell in study.tasks().items():
        holders = [one for one in study.finished if task in one.tasks]
        sizes = sorted({len(one.tasks[task].answers) for one in holders})
        images = len({answer.image_id for answer in cell.answers.values()})
        role = "threshold split" if cell.is_threshold else task_title(cell)
        rows.append(
            StudyRow(
                task,
                [
                    words(family_title(cell.family)),
                    words(role),
                    words(" to ".join(f"{n:,}" for n in dict.fromkeys([sizes[0], sizes[-1]]))),
                    words(f"{images:,}"),
                    words(f"{len(holders)} of {sum(task in one.plan.tasks for one in study.cells)}"),
                ],
            )
        )
    columns = [
        Column("Benchmark", text=True),
        Column("Condition", text=True),
        Column("n", definition="samples"),
        Column("Images"),
        Column("Cells"),
    ]
    return StudyTable(f"Tasks ({len(rows)})", "", columns, rows, "Task", folded=len(rows) > _OPEN_ROWS // 2)


def _cells(study: Study, titles: dict[str, str]) -> StudyTable:
    several = len(calibration_sources(study.cells)) > 1
    rows = [StudyRow(titles[cell.name], _cell_row(cell), note=_cell_note(cell, several)) for cell in study.cells]
    columns = [
        Column("State", text=True),
        Column("Bits", "effective", "bits per weight with scales and zeros, over all parameters"),
        Column("Answers"),
        Column("Wall time"),
        Column("Loading", definition="with quantization and training"),
        Column("Noise cache", "hits", "corrupted images that another cell had made before"),
        Column("Peak memory"),
    ]
    return StudyTable(
        f"Cells ({len(rows)})",
        "Wall time of the whole cell; memory is the highest resident set of its worker (the device's on CUDA).",
        columns,
        rows,
        "Cell",
        folded=len(rows) > _OPEN_ROWS,
    )


def _cell_note(cell: StudyCell, several_sources: bool) -> str:
    twin = f"against {cell.plan.twin}" if cell.plan.twin else ""
    return ", ".join(part for part in (calibration_title(cell) if several_sources else "", twin) if part)


def _cell_row(cell: StudyCell) -> list[Shown]:
    manifest = cell.manifest
    if manifest is None:
        return [words("failed" if cell.failure else "waits"), *[missing()] * 6]
    cache = manifest.noise_cache
    used = cache is not None and cache.get("hits", 0) + cache.get("misses", 0) > 0
    return [
        words("finished"),
        words(f"{cell.card.effective_bpw:.2f}") if cell.card else missing(),
        words(f"{sum(manifest.samples.values()):,}"),
        words(duration(manifest.seconds)),
        words(duration(manifest.load_seconds)),
        words(_rate(cache.get("hits", 0), cache.get("misses", 0))) if cache is not None and used else words("–"),
        words(megabytes(manifest.peak_memory_bytes)) if manifest.peak_memory_bytes else missing(),
    ]


def _rate(hits: int, misses: int) -> str:
    return f"{100 * hits / (hits + misses):.0f} %"


def duration(seconds: float) -> str:
    """``42 s``, ``7.5 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
