"""Finds each quantized run's full-precision twin, and refuses a pair that differs in more than the quantization.

Confidences depend on kernels, batch sizes and versions as well as on weights, so a difference of two runs tells of the
quantization only when nothing else differs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from bitquake.quant_card import QuantCard
from bitquake.reports.problems import Problem
from bitquake.reports.runs import Cell, Run

_SHOWN = 3


@dataclass
class Group:
    """A full-precision run and the quantized runs that are compared with it, or one run without a pair.

    cells: per task, the runs' cells by run key, all on the same samples where they are paired. unpaired: per run key
    and task, why a cell stands without a difference.
    """

    twin: Run | None
    runs: list[Run]
    refused: str = ""
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    unpaired: dict[tuple[str, str], str] = field(default_factory=dict)
    common: dict[str, str] = field(default_factory=dict)
    """Per task, what the restriction to common samples left out."""


def pair_runs(runs: Sequence[Run], *, common_samples: bool = False) -> tuple[list[Group], list[Problem]]:
    """Sort the runs into groups of one twin each; groups without a pair say why in ``refused``.

    Args:
        runs: what ``read_runs`` found.
        common_samples: compare runs of different sample sets on the samples that all runs of a group share.
    """
    problems: list[Problem] = []
    twins = [run for run in runs if run.is_full_precision]
    members: dict[str, list[Run]] = {twin.key: [] for twin in twins}
    alone: list[Group] = []
    for run in runs:
        if run.is_full_precision:
            continue
        twin, refusal = _find_twin(run, twins)
        if twin is not None:
            members[twin.key].append(run)
            continue
        alone.append(Group(None, [run], refusal))
        # A missing or damaged card has been reported with its file.
        if run.card is not None:
            fix = "run both with the same settings, and give both"
            problems.append(Problem("error", run_name(run), f"no pair: {refusal}", fix))
        elif not run.model_hash:
            problems.append(Problem("warning", run_name(run), f"no pair: {refusal}", "its accuracy is shown by itself"))
    groups = [Group(twin, [twin, *members[twin.key]]) for twin in twins]
    for group in [*groups, *alone]:
        _fill(group, common_samples, problems)
    return [*groups, *alone], problems


def run_name(run: Run) -> str:
    """Model and quantization, as in ``idefics3-tiny rtn-int4-g64``."""
    if run.card is None:
        return run.label
    return f"{run.label} {quantization_name(run.card)}"


def quantization_name(card: QuantCard) -> str:
    """The spec's name; the dtype's for full precision; what an import was told is marked as that."""
    if card.self_declared:
        return f"{card.spec_name} (imported)"
    return short_dtype(card.dtype) if card.method == "none" else card.spec_name


def short_dtype(dtype: str) -> str:
    """``BF16`` for ``bfloat16`` or ``torch.bfloat16``, and so on."""
    name = dtype.removeprefix("torch.")
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float64": "FP64"}.get(name, name)


def _find_twin(run: Run, twins: Sequence[Run]) -> tuple[Run | None, str]:
    card = run.card
    if card is None:
        return None, "its quant card is missing" if run.card_hash else "it has no quant card"
    model = f"{run.label}{f' (revision {card.revision})' if card.revision else ''}"
    same = [twin for twin in twins if twin.card is not None and made_from(card, twin.card)]
    if not same:
        return None, f"no full-precision run of {model} among the runs"
    differences = {twin.key: model_differences(run, twin) for twin in same}
    # Of several twins (BF16 and FP16, say) the one that differs in nothing; ties go to the one that shares more tasks.
    shared = {twin.key: len(run.cells.keys() & twin.cells.keys()) for twin in same}
    best = min(same, key=lambda twin: (len(differences[twin.key]), -shared[twin.key], twin.key))
    found = differences[best.key]
    return (None, f"differs from its full-precision twin in {'; '.join(found)}") if found else (best, "")


def made_from(card: QuantCard, twin: QuantCard) -> bool:
    """Whether a model was made from another one, as far as its card knows: a published checkpoint knows no revision."""
    unknown = bool(card.base) and not card.revision
    return card.subject == twin.subject and (unknown or card.revision == twin.revision)


def model_differences(run: Run, twin: Run) -> list[str]:
    """In what two loaded models differ besides the quantization, by their cards."""
    a, b = run.card, twin.card
    assert a is not None and b is not None
    found = [
        f"{name} {left or 'none'} vs {right or 'none'}"
        for name, left, right in (
            ("origin", *("imported, self-declared" if c.self_declared else "measured" for c in (a, b))),
            ("architecture", a.architecture, b.architecture),
            ("dtype", a.dtype, b.dtype),
            ("device", _device_kind(a.device), _device_kind(b.device)),
            ("adapter", a.adapter.hash if a.adapter else "", b.adapter.hash if b.adapter else ""),
            ("image processor", a.image_processor, b.image_processor),
        )
        if left != right
    ]
    # A library that only one of the two names is the quantization's own backend.
    for name in sorted(a.libraries.keys() & b.libraries.keys()):
        if a.libraries[name] != b.libraries[name]:
            found.append(f"{name} {a.libraries[name]} vs {b.libraries[name]}")
    return found


def _device_kind(device: str) -> str:
    return re.sub(r"(?<=[a-z]):\d+", "", device)


def cell_differences(cell: Cell, twin: Cell, *, common_samples: bool = False) -> list[str]:
    """In what two cells differ besides the quantization: settings, sample sets, images and prompts, with counts."""
    found = []
    for name in (
        *("family", "variant", "world", "protocol", "dataset", "split", "part", "shift_from", "noise", "subset"),
        "confidence_name",
    ):
        left, right = getattr(cell, name), getattr(twin, name)
        if left != right and not (common_samples and name == "subset"):
            nothing = "the whole split" if name == "part" else "none"
            found.append(f"{name.replace('_', ' ')} {left or nothing} vs {right or nothing}")
    left, right = cell.dataset_revision, twin.dataset_revision
    if left and right and left != right:  # "" where nothing told it
        found.append(f"dataset revision {left} vs {right}")
    for name in sorted(cell.settings.keys() | twin.settings.keys()):
        left, right = (c.settings.get(name, "not set") for c in (cell, twin))
        if left != right:
            found.append(f"{name} {left} vs {right}")
    shared = cell.answers.keys() & twin.answers.keys()
    if not common_samples:
        for what, missing in (
            ("samples missing here", twin.answers.keys() - shared),
            ("samples missing in the twin", cell.answers.keys() - shared),
        ):
            if missing:
                found.append(f"{what}: {len(missing)} of {len(shared) + len(missing)} ({_some(missing)})")
    elif not shared:
        found.append("no sample in common")
    for what, attribute in (("another image id", "image_id"), ("other pixels", "pixels"), ("another prompt", "prompt")):
        # A sample that failed was never seen by the model: it has no hashes to compare.
        other = [
            sample
            for sample in shared
            if getattr(cell.answers[sample], attribute) != getattr(twin.answers[sample], attribute)
            and not (attribute != "image_id" and (cell.answers[sample].failed or twin.answers[sample].failed))
        ]
        if other:
            found.append(f"{len(other)} of {len(shared)} samples have {what} ({_some(other)})")
    return found


def _some(samples: Sequence[str] | set[str]) -> str:
    ordered = sorted(samples)
    return "such as " + ordered[0] if len(ordered) > 1 else ordered[0]


def _fill(group: Group, common_samples: bool, problems: list[Problem]) -> None:
    """Choose each task's cells: those that form a pair, and those that stand alone with a reason."""
    for task in sorted({task for run in group.runs for task in run.cells}):
        found = {run.key: run.cells[task] for run in group.runs if task in run.cells}
        whole = {key: cell for key, cell in found.items() if not cell.damage or (common_samples and cell.answers)}
        if not whole:
            continue
        twin = whole.get(group.twin.key) if group.twin else None
        kept: dict[str, Cell] = {}
        paired: dict[str, Cell] = {}
        for run in group.runs:
            cell = whole.get(run.key)
            if cell is None:
                if twin is not None and run.key not in found:
                    what = f"did not run {task}, which its twin did"
                    problems.append(Problem("warning", run_name(run), what, "run it too"))
                continue
            if run is group.twin:
                paired[run.key] = cell
                continue
            if twin is None:
                reason = group.refused or f"the full-precision run has no complete {task}"
                if group.twin is not None:
                    what = f"{task} has no pair: {reason}"
                    problems.append(Problem("warning", run_name(run), what, "run the twin on it"))
            else:
                differences = cell_differences(cell, twin, common_samples=common_samples)
                if not differences:
                    paired[run.key] = cell
                    continue
                reason = "; ".join(differences)
                fix = "repeat it with the twin's settings and samples"
                if all(difference.startswith("samples missing") for difference in differences):
                    fix += " (or give --common-samples)"
                problems.append(Problem("error", run_name(run), f"{task} refused as a pair: {reason}", fix))
            group.unpaired[run.key, task] = reason
            if not cell.damage:
                kept[run.key] = cell
        if common_samples and len(paired) > 1:
            paired = _restrict(group, task, paired, problems)
        if len(paired) == 1 and group.twin and paired[group.twin.key].damage:
            paired = {}
        cells = {**paired, **kept}
        if cells:
            group.cells[task] = {run.key: cells[run.key] for run in group.runs if run.key in cells}


def _restrict(group: Group, task: str, paired: dict[str, Cell], problems: list[Problem]) -> dict[str, Cell]:
    """The cells on the samples that all of them hold; says what was left out."""
    sets = [cell.answers.keys() for cell in paired.values()]
    shared = sorted(set(sets[0]).intersection(*sets[1:]))
    sizes = sorted({len(s) for s in sets})
    if sizes == [len(shared)]:
        return paired
    if not shared:
        problems.append(Problem("error", task, "its runs have no sample in common", "run them on the same samples"))
        return {}
    left = f"{len(shared)} common samples of {' to '.join(str(n) for n in dict.fromkeys([sizes[0], sizes[-1]]))}"
    where = f"{group.runs[0].label} {task}"
    problems.append(Problem("warning", where, f"compared on {left} only", "the rest was left out (--common-samples)"))
    group.common[task] = left
    return {
        key: dataclasses.replace(cell, answers={sample: cell.answers[sample] for sample in shared})
        for key, cell in paired.items()
    }
