"""``bitquake selector``: fit the learned confidence on runs of dev splits, and add it to the records of other runs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tabulate import tabulate

from bitquake import __version__
from bitquake.model_wrappers.calibration.overlap import ids_hash
from bitquake.model_wrappers.journal import digest
from bitquake.model_wrappers.selector.features import Features
from bitquake.model_wrappers.selector.model import (
    NAMES,
    OWN,
    Selector,
    SelectorCard,
    SelectorError,
    TrainedOn,
    answer_scalars,
    check_name,
    image_names,
)
from bitquake.quant_card import QuantCard
from bitquake.records import SampleRecord
from bitquake.selector_runs import (
    SampleFile,
    card_of,
    confidence_span,
    features_of,
    no_features,
    sample_files,
)

if TYPE_CHECKING:
    from bitquake.model_wrappers.selector.training import Options, TrainingRun

Target = Literal["score", "iou"]
APPLIED = "selectors.json"
"""In each folder that ``apply`` wrote: which Selectors it added, and to how many records."""
_SAME = 1e-6
"""Confidences this close are the same: a run that emitted it live, or an earlier ``apply``."""


class FitResult(NamedTuple):
    """A fitted Selector, where it lies, the epoch of each member, and the seconds that fitting took."""

    selector: Selector
    path: Path
    epochs: tuple[int, ...]
    seconds: float


@dataclass
class _Trained:
    """The usable samples of one model."""

    card: QuantCard
    records: list[SampleRecord] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)


def fit(
    runs: Sequence[Path],
    out: Path,
    options: Options,
    *,
    name: str | None = None,
    target: Target = "score",
    tasks: Sequence[str] = (),
    artifacts: Path | None = None,
    allow_task: bool = False,
) -> FitResult:
    """Fit a Selector on runs of ``*_dev`` tasks that kept their features, and write it.

    Args:
        runs: output folders of lmms-eval. One quantization: its own Selector; full precision: the one to transfer;
            several quantizations of one model: a mixture.
        name: one of ``NAMES``; None: as the runs are, see above (a full-precision model's own is ``selector``).
        target: what to predict: the score, or the IoU of the predicted box.
        tasks: only these; default every ``*_dev`` task of the runs.
        artifacts: folder with ``features/`` and ``quant_cards/``; None: the runs' own, then the user's cache.
        allow_task: let ``tasks`` name others than of a dev split.

    Raises:
        SelectorError: no such task, no features, runs of several models, too few samples, and the like.
    """
    from bitquake.model_wrappers.selector.training import check_width, fit_members

    if name is not None:
        check_name(name)
    started = time.monotonic()
    left_out: Counter[str] = Counter()
    trained = _trained(_chosen(runs, tasks, allow_task), artifacts, left_out)
    joint = _one_confidence(trained)
    _one_subject(trained)
    name = _name_of(trained, name)
    data = [_training_run(one, joint, target) for one in trained]
    hidden_size = data[0].features.first.shape[1]
    check_width(hidden_size, options)
    fitted = fit_members(data, options)

    used = [[one.records[i] for i in index] for one, index in zip(trained, fitted.used, strict=True)]
    every = [record for records in used for record in records]
    images = frozenset().union(*(image_names(r.dataset, r.image_id, r.pixel_hash) for r in every))
    card = SelectorCard(
        name=name,
        subject=trained[0].card.subject,
        hidden_size=hidden_size,
        joint=joint,
        target=target,
        projection=options.projection,
        trained_on=[_trained_on(one.card, records) for one, records in zip(trained, used, strict=True)],
        datasets_hash=digest(sorted({digest([r.dataset, r.dataset_revision, r.split, r.part]) for r in every})),
        image_ids_hash=ids_hash(images),
        validation=fitted.validation,
        options={**options.entries(), "threads": _threads()},
        n_left_out=dict(sorted(left_out.items())),
        bitquake=__version__,
    )
    selector = Selector(card, fitted.members, fitted.projection, images)
    return FitResult(selector, selector.save(out), fitted.epochs, time.monotonic() - started)


def fit_summary(done: FitResult) -> str:
    """What the command prints at the end."""
    card = done.selector.card
    told = card.validation
    difference = "no interval"
    if told.aurc_difference is not None:
        delta, lo, hi = (100 * value for value in told.aurc_difference)
        difference = f"{delta:+.3f} [{lo:+.3f}, {hi:+.3f}]"
    plain = "MaxProb" if card.joint == "joint" else card.joint
    table = tabulate(
        [
            [plain, f"{100 * told.aurc_maxprob:.3f}", "", f"{100 * told.ece_maxprob:.2f}"],
            [card.name, f"{100 * told.aurc:.3f}", difference, f"{100 * told.ece:.2f}"],
        ],
        ["confidence", "AURC, %", "difference (95 %)", "ECE, %"],
        disable_numparse=True,
    )
    runs = "\n".join(f"fitted on  {one.quant}: {one.n:,} samples of {', '.join(one.tasks)}" for one in card.trained_on)
    left = ", ".join(f"{n:,} {reason}" for reason, n in card.n_left_out.items()) or "none"
    return (
        f"{card.subject}, target {card.target}\n{runs}\nleft out   {left}\n"
        f"validation {told.n:,} samples on {told.n_images:,} pictures, each judged by a member not fitted on it\n"
        "           (only its epoch was chosen there, which flatters a little: test tasks decide)\n\n"
        f"{table}\n\nepochs     {', '.join(map(str, done.epochs))} (0: MaxProb as it is)\n"
        f"time       {done.seconds:.1f} s\nfile       {done.path} ({done.path.stat().st_size / 1e6:.1f} MB)"
    )


def _chosen(runs: Sequence[Path], tasks: Sequence[str], allow_task: bool) -> list[SampleFile]:
    """The sample files to fit on."""
    files = [file for folder in _distinct(runs) for file in sample_files(folder)]
    present = sorted({file.task for file in files})
    if tasks:
        absent = [task for task in tasks if task not in present]
        if absent:
            raise SelectorError(f"--tasks {absent[0]}: the runs have {', '.join(present)}")
        files = [file for file in files if file.task in tasks]
        other = sorted({file.task for file in files if not file.is_dev})
        if other and not allow_task:
            raise SelectorError(
                f"{other[0]}: is no *_dev task: what it is fitted on, a Selector must not be evaluated on, and no "
                "threshold be chosen on. Run the family's *_dev task, or say --allow-task"
            )
        return files
    files = [file for file in files if file.task.endswith("_dev") and file.is_dev]
    if not files:
        raise SelectorError(
            f"the runs have no *_dev task ({', '.join(present)}): evaluate one, as block_vqav2_dev, with "
            "features=true in model_args; or name others by --tasks and --allow-task"
        )
    return files


def _trained(files: Sequence[SampleFile], artifacts: Path | None, left_out: Counter[str]) -> list[_Trained]:
    """Usable samples by model, in the order of the files; the others are counted."""
    found: dict[str, _Trained] = {}
    seen: dict[tuple[str, ...], SampleRecord] = {}
    named = False
    for file in files:
        usable: dict[str, list[SampleRecord]] = {}
        for record in file.records:
            named = named or bool(record.features)
            reason = _unusable(record)
            if reason:
                left_out[reason] += 1
                continue
            key = (record.model_hash, record.task, record.sample_id, record.prompt_hash, *record.pixel_hash)
            known = seen.setdefault(key, record)
            if known is record:
                usable.setdefault(record.model_hash, []).append(record)
            elif (known.score, known.features) != (record.score, record.features):
                raise SelectorError(
                    f"{file.path}: a second, different answer to sample {record.sample_id!r}; give one of the two runs"
                )
        for model_hash, records in usable.items():
            places = file.artifacts(artifacts)
            if model_hash not in found:
                found[model_hash] = _Trained(card_of(model_hash, records[0].card, places))
            found[model_hash].records += records
            found[model_hash].features.append(features_of(records, places, str(file.path)))
    if not found:
        if not named:
            raise no_features(str(files[0].path))
        raise SelectorError(f"no sample can be used: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}")
    return list(found.values())


def _unusable(record: SampleRecord) -> str:
    if record.failure:
        return f"failed ({record.failure})"
    if not record.model_hash or record.primary is None:
        return "without a confidence"
    return "" if record.features else "without features"


def _one_confidence(trained: Sequence[_Trained]) -> str:
    tasks: dict[str, str] = {r.primary_confidence: r.task for one in trained for r in one.records}
    if len(tasks) > 1:
        told = ", ".join(f"{name} ({task})" for name, task in sorted(tasks.items()))
        raise SelectorError(
            f"the tasks' confidences are of several kinds: {told}; fit a Selector for each, with --tasks"
        )
    return next(iter(tasks))


def _one_subject(trained: Sequence[_Trained]) -> None:
    subjects = sorted({one.card.subject for one in trained})
    if len(subjects) > 1:
        raise SelectorError(f"the runs are of several models ({', '.join(subjects)}); a Selector is of one")


def _name_of(trained: Sequence[_Trained], name: str | None) -> str:
    quants = sorted({one.card.spec_name for one in trained})
    several, full = len(trained) > 1, all(one.card.method == "none" for one in trained)
    default = NAMES[2] if several else NAMES[1] if full else OWN
    possible = (NAMES[2],) if several else (OWN, NAMES[1]) if full else (OWN,)
    if name is not None and name not in possible:
        raise SelectorError(
            f"--name {name}: these runs ({', '.join(quants)}) give {' or '.join(possible)}: selector is fitted on one "
            "quantization, selector_transfer on the full-precision model, selector_mixture on several quantizations"
        )
    return name or default


def _training_run(one: _Trained, joint: str, target: Target) -> TrainingRun:
    from bitquake.model_wrappers.selector.training import TrainingRun

    if target == "iou" and (odd := [r.task for r in one.records if "iou" not in r.scores]):
        raise SelectorError(f"--target iou: the records of {odd[0]} have no IoU; tasks of grounding have")
    scalars = np.array([answer_scalars(record.confidence, joint) for record in one.records])
    goal = [record.scores["iou"] if target == "iou" else record.score for record in one.records]
    images = [f"{record.dataset}:{record.image_id}" for record in one.records]
    features = Features(*(np.concatenate(parts) for parts in zip(*one.features, strict=True)))
    return TrainingRun(features, scalars[:, 0], scalars[:, 1], np.array(goal, dtype=np.float64), images)


def _trained_on(card: QuantCard, records: Sequence[SampleRecord]) -> TrainedOn:
    return TrainedOn(
        quant=card.spec_name,
        model_hash=card.model_hash,
        weights_hash=card.weights_hash,
        tasks=sorted({record.task for record in records}),
        n=len(records),
    )


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Folders without repeats and without those inside another."""
    resolved = {folder.resolve(): folder for folder in folders}
    return [folder for path, folder in resolved.items() if not any(other in path.parents for other in resolved)]


class AppliedTask(NamedTuple):
    """What ``apply`` did to one task of one model: how many records got a Selector's confidence, and how many have
    none (failures; answers without features or probability). ``why`` is not "" where it added nothing at all."""

    run: str
    task: str
    quant: str
    name: str
    n: int
    n_without: int
    why: str = ""


def apply(
    selectors: Sequence[Path], runs: Sequence[Path], out: Path, *, artifacts: Path | None = None
) -> list[AppliedTask]:
    """Copy the results of runs to ``out``, the Selectors' confidences added to the records.

    ``<out>/<name of the run's folder>`` holds lmms-eval's results and samples, as ``bitquake report`` reads them; but
    for the entries added to the records' ``confidence`` each byte is the original's. A folder appears whole, and one
    that an earlier ``apply`` wrote is replaced. Each Selector goes to the tasks of its own confidence; a quantization's
    own goes to its own runs only. Tasks of dev splits are copied as they are.

    Args:
        selectors: files of ``fit``.
        runs: output folders of lmms-eval.
        artifacts: as in ``fit``.

    Raises:
        SelectorError: a Selector that is not for these runs, no features, a folder that is in use.
        OverlapError: a Selector was fitted on a picture of the run.
    """
    loaded = [(path, Selector.load(path)) for path in selectors]
    _refuse_ambiguous([selector for _, selector in loaded])
    told = [
        {"name": one.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "joint": one.card.joint}
        for path, one in loaded
    ]
    targets = _targets(_distinct(runs), out)
    done: list[AppliedTask] = []
    for run, target in targets:
        with _new_folder(target) as folder:
            found = [
                row
                for file in sample_files(run)
                for row in _apply_to_file(file, [s for _, s in loaded], folder / file.relative, artifacts, run)
            ]
            if not any(row.n for row in found):
                reasons = sorted({f"{row.task}: {row.why or 'no record could be judged'}" for row in found})
                raise SelectorError(f"{run}: nothing to add. {'; '.join(reasons[:5])}")
            for results in sorted(run.rglob("*_results.json")):
                _copy(results, folder / results.relative_to(run))
            added = Counter(row.name for row in found for _ in range(row.n))
            note = {"bitquake": __version__, "selectors": told, "n_added": dict(sorted(added.items()))}
            (folder / APPLIED).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        done += found
    return done


def apply_summary(done: Sequence[AppliedTask], out: Path) -> str:
    """What the command prints at the end."""
    rows = [
        [
            row.run,
            row.quant,
            row.task,
            row.name or "-",
            f"{row.n:,}" if not row.why else f"none: {row.why}",
            row.n_without,
        ]
        for row in done
    ]
    table = tabulate(rows, ["run", "quantization", "task", "confidence", "records", "without"], disable_numparse=True)
    written = sum(row.n for row in done)
    return f"{table}\n\n{written:,} confidences added in {out}\nbitquake report {out}"


def _refuse_ambiguous(selectors: Sequence[Selector]) -> None:
    """Two Selectors may have one name only where each knows its own runs: other confidences, or other weights."""
    seen: set[tuple[str, str, str]] = set()
    for one in selectors:
        weights = one.card.trained_on[0].weights_hash if one.name == OWN else ""
        key = one.name, one.card.joint, weights
        if key in seen:
            raise SelectorError(f"two Selectors are called {one.name} and judge {one.card.joint}; give one of them")
        seen.add(key)


def _targets(runs: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Each run and the folder that its copy goes to."""
    place = out.resolve()
    found: dict[Path, Path] = {}
    for run in runs:
        source = run.resolve()
        target = place / source.name
        if place == source or source in place.parents or target == source or target in source.parents:
            raise SelectorError(f"--out {out}: the copy of {run} would be written over or into it; give another folder")
        if target in found:
            raise SelectorError(f"{run} and {found[target]} have one name; give them to two calls with two --out")
        if target.exists() and not (target / APPLIED).is_file():
            raise SelectorError(f"{target}: is there and was not written by `selector apply`; give another --out")
        found[target] = run
    return [(run, target) for target, run in found.items()]


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``target`` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _apply_to_file(
    file: SampleFile, selectors: Sequence[Selector], target: Path, artifacts: Path | None, run: Path
) -> list[AppliedTask]:
    """Write the copy of one sample file; a row for each Selector and model."""
    rows: list[AppliedTask] = []
    added: dict[int, dict[str, float | None]] = {}
    groups: dict[str, list[int]] = {}
    for at, line in enumerate(file.lines):
        if line.record is not None and line.record.model_hash:
            groups.setdefault(line.record.model_hash, []).append(at)
    where = run.resolve().name
    if file.is_dev or not groups:
        why = "dev splits are fitted on" if file.is_dev else "its records name no model"
        _copy(file.path, target)
        return [AppliedTask(where, file.task, "", "", 0, 0, why)]
    places = file.artifacts(artifacts)
    for model_hash, places_of in groups.items():
        records = {i: record for i in places_of if (record := file.lines[i].record) is not None}
        first = records[places_of[0]]
        card = card_of(model_hash, first.card, places)
        usable = {i: record for i, record in records.items() if not _unusable(record)}
        fitting = [s for s in selectors if s.card.joint == first.primary_confidence and s.is_for(card)]
        why = _why_none(selectors, first, card, named=any(record.features for record in records.values()))
        if why or not usable:
            rows.append(AppliedTask(where, file.task, card.spec_name, "", 0, 0, why or "no answer has a confidence"))
            continue
        features = features_of(list(usable.values()), places, str(file.path))
        for selector in fitting:
            selector.check_model(card)
            for i, record in usable.items():
                names = image_names(record.dataset, record.image_id, record.pixel_hash)
                selector.refuse_overlap(names, f"{file.path}, line {i + 1}")
            scalars = np.array([answer_scalars(r.confidence, selector.card.joint) for r in usable.values()])
            judged = dict(zip(usable, selector.predict(features, scalars[:, 0], scalars[:, 1]).tolist(), strict=True))
            for i in records:
                value = judged.get(i, math.nan)
                added.setdefault(i, {})[selector.name] = None if math.isnan(value) else value
            n = sum(not math.isnan(value) for value in judged.values())
            rows.append(AppliedTask(where, file.task, card.spec_name, selector.name, n, len(records) - n))
    text = "\n".join(
        _with_confidences(line.text, added[i], f"{file.path}, line {i + 1}") if i in added else line.text
        for i, line in enumerate(file.lines)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode("utf-8"))
    return rows


def _why_none(selectors: Sequence[Selector], record: SampleRecord, card: QuantCard, *, named: bool) -> str:
    """Why no Selector can judge a task of this model, or ""."""
    kinds = [selector for selector in selectors if selector.card.joint == record.primary_confidence]
    if not kinds:
        known = ", ".join(sorted({selector.card.joint for selector in selectors}))
        return f"its confidence is {record.primary_confidence}, the Selectors judge {known}"
    if not any(selector.is_for(card) for selector in kinds):
        return f"the Selectors are of other quantizations than {card.spec_name}"
    if not named:
        return "no features were kept (features=true in model_args)"
    return ""


def _with_confidences(text: str, added: Mapping[str, float | None], where: str) -> str:
    """A line with entries added to its record's ``confidence``; all other characters stay."""
    begin, end = confidence_span(text)
    held: dict[str, Any] = json.loads(text[begin:end])
    new = {}
    for name, value in added.items():
        if name not in held:
            new[name] = value
        elif not _same(held[name], value):
            raise SelectorError(
                f"{where}: has a confidence {name} already, by another Selector ({held[name]}, not {value}); apply to "
                "the run as lmms-eval wrote it"
            )
    if not new:
        return text
    entries = json.dumps(new)[1:-1]
    inside = text[begin : end - 1].rstrip()
    return f"{text[:begin]}{inside}{', ' if held else ''}{entries}{text[end - 1 :]}"


def _same(held: float | None, value: float | None) -> bool:
    if held is None or value is None:
        return held is value
    return abs(held - value) <= _SAME
