"""Samples of a task family: rows of its ``calibration`` or ``train`` split, asked as the evaluation asks, answered by
the reference.

Rows, pictures, prompts, noise and references come from the functions that score the family's tasks.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from bitquake.noise import ImageError, NoiseSpec

from .overlap import PIXELS, document_image_ids
from .prompts import describe
from .sample import CalibrationError, CalibrationSample, SampleError, place

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

    from bitquake.tasks.families import Family, Loaded, Split
    from bitquake.tasks.glue import Task

Show = Literal["pictures and text", "pictures", "text"]
Role = Literal["calibration", "train", "test"]
Size = tuple[int, int]
CLEAN_TASK = "{}_clean"
_PURPOSE: dict[Role, str] = {"calibration": "calibration", "train": "training", "test": "training"}
"""What messages begin with."""


def is_family(name: str) -> bool:
    """Whether a task family of that name is registered."""
    from bitquake.tasks.expand import builtin_index

    return name in builtin_index().families


class FamilySource:
    """The rows of a family's calibration (or train) split, one of each picture before a second one of any.

    Args:
        name: the family's.
        role: which split.
        model_type: of the model, whose prompts and coordinate space are taken.
        seed: of the order, and of the noise.
        show: ``pictures`` are asked for a caption, without an answer; ``text`` goes without pictures.
        captions: the family must have captions.
        noise: name and severity of a noise, in the family's own mode.
        processed: (width, height) of a picture -> those of what the model's processor makes of it, or None.
    """

    def __init__(
        self,
        name: str,
        *,
        model_type: str,
        seed: int,
        role: Role = "calibration",
        show: Show = "pictures and text",
        captions: bool = False,
        noise: tuple[str, int] | None = None,
        processed: Callable[[Image], Size | None] = lambda picture: None,
    ) -> None:
        loaded = _load(name, role)
        family = loaded.family
        if captions and family.columns.captions is None:
            raise CalibrationError(
                f"calibration: source caption needs captions, and the family {name!r} (protocol {family.protocol}) has "
                "none; use source in-domain with it, or data= a family with captions such as coco_caption"
            )
        self.title = f"the {role} split of {name}"
        self._model_type, self._seed, self._show, self._processed = model_type, seed, show, processed
        self._task = _task_of(loaded, role, noise, seed)
        self._purpose = _PURPOSE[role]
        self._prompt = describe(model_type, block=family.world == "block").prompt if show == "pictures" else None
        self._kwargs = _prompt_kwargs(self._task, family, model_type)
        self._rows = _rows(loaded, self._task, self._purpose)
        self._order, self._pictures = _order(self._rows, seed)

    @property
    def identity(self) -> Mapping[str, Any]:
        task = self._task
        return {
            "family": task.contract.model_dump(mode="json"),
            "revision": task.revision or self._rows._fingerprint,
            "noise": None if task.noise is None else task.noise.to_mapping(),
            "show": [self._show, self._prompt],
            "prompt": json.loads(json.dumps(self._kwargs, default=str)),
        }

    def __len__(self) -> int:
        return len(self._order)

    def pictures(self) -> list[str]:
        """The dataset's name of each sample's picture, in order; "" for a sample without one."""
        if not self._task.contract.text_only_rows:
            return self._pictures
        column = self._task.contract.columns.image
        shown = self._rows.select_columns([column]).with_format("arrow")[:][column].is_valid().to_pylist()
        return [name if shown[row] else "" for name, row in zip(self._pictures, self._order, strict=True)]

    def sample(self, index: int) -> CalibrationSample:
        from bitquake.tasks.documents import IDS
        from bitquake.tasks.families import FamilyError
        from bitquake.tasks.scoring import TargetError

        doc, task = self._rows[self._order[index]], self._task
        name = f"sample {doc[IDS]['sample_id']} of {self.title}"
        images: list[Image] = []
        ids: set[str] = set()
        try:
            if self._show != "text":
                images = task.doc_to_visual(doc, self._kwargs)
                named = task.contract.columns.image_id is not None
                ids = document_image_ids(doc, [f"{task.contract.dataset}:{doc[IDS]['image_id']}"] if named else [])
            if self._prompt is not None:
                return CalibrationSample(tuple(images), self._prompt, None, tuple(sorted(ids)))
            prompt = task.doc_to_text(doc, self._kwargs)
            if not prompt.strip():
                raise SampleError(f"{name}: its question is empty")
            return CalibrationSample(tuple(images), prompt, self._answer(doc, images), tuple(sorted(ids)))
        except FamilyError as error:
            raise CalibrationError(f"{self._purpose}: {error}") from error
        except (ImageError, TargetError, OSError) as error:
            raise SampleError(f"{name}: {error}") from error

    def _answer(self, doc: Mapping[str, Any], images: list[Image]) -> str | None:
        """The reference answer as the model would give it."""
        from bitquake.tasks import answers
        from bitquake.tasks.contract import OPTIONS
        from bitquake.tasks.scoring.caption import reference_captions
        from bitquake.tasks.scoring.choice import correct_letter

        task, columns = self._task, self._task.contract.columns
        protocol = task.contract.protocol
        if protocol == "vqa":
            said = [str(one) for one in answers.target(task, doc) if one is not None and str(one).strip()]
            return Counter(said).most_common(1)[0][0] if said else None  # of equally common ones the first
        if protocol == "choice":
            return str(answers.target(task, doc))
        if columns.captions is not None:
            return reference_captions(doc[columns.captions])[0]
        if protocol == "grounding":
            return self._box(doc, images)
        extends = task.contract.extends
        if extends is not None and extends.options and columns.answer is not None:
            return correct_letter(doc[OPTIONS], answers.letter_index(doc[columns.answer]))
        return None  # a stock task's target is its own scorer's business, and need not be what a model would say

    def _box(self, doc: Mapping[str, Any], images: list[Image]) -> str:
        from bitquake.tasks import answers
        from bitquake.tasks.scoring.grounding import find_box

        # the reference in whole pixels of the picture that is shown, where the noise has moved it
        written = find_box(str(answers.target(self._task, doc)))
        assert written is not None  # it is our own writing
        spaces = self._task.contract.coordinates
        space = spaces.get(self._model_type, spaces["default"])
        if space == "pixels":
            return write_box(written.box, space, (1, 1))
        if not images:
            raise SampleError(f"{self.title}: a box in {space!r} coordinates needs the picture, and text has none")
        return write_box(written.box, space, images[0].size, self._processed(images[0]))


def write_box(
    box: tuple[float, float, float, float], space: str, size: tuple[int, int], processed: Size | None = None
) -> str:
    """A box in pixels of a (width, height) picture, as a model of a coordinate space writes it.

    The inverse of ``bitquake.tasks.scoring.grounding.to_pixels``: whole numbers ``[x1, y1, x2, y2]``, three decimals in
    ``unit`` space, and PaliGemma's location tokens, which go y1, x1, y2, x2.

    Raises:
        SampleError: the space is ``processed``, and that size is not known.
    """
    if space == "processed" and processed is None:
        raise SampleError("a box in pixels of the processed picture, whose size this model's processor does not tell")
    spans = {"unit": (1, 1), "thousand": (1000, 1000), "location_tokens": (1024, 1024), "processed": processed or size}
    span = spans.get(space, size)
    x1, y1, x2, y2 = (edge * span[i % 2] / size[i % 2] for i, edge in enumerate(box))
    if space == "location_tokens":
        return "".join(f"<loc{min(max(round(edge), 0), 1023):04d}>" for edge in (y1, x1, y2, x2))
    written = (f"{edge:.3f}" if space == "unit" else str(round(edge)) for edge in (x1, y1, x2, y2))
    return f"[{', '.join(written)}]"


def _load(name: str, role: Role) -> Loaded:
    """A registered family that has a split of that role."""
    from bitquake.config import load_config
    from bitquake.tasks.expand import builtin_index
    from bitquake.tasks.families import load_family
    from bitquake.tasks.split_ids import with_ids

    index, purpose = builtin_index(), _PURPOSE[role]
    if name not in index.families:
        close = difflib.get_close_matches(name, index.families, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        wrong = [line for line in index.problems if f"/{name}/" in line]
        broken = f" A family file of that name is broken: {wrong[0]}" if wrong else ""
        raise CalibrationError(
            f"{purpose}: data={name!r} is neither a folder nor a task family.{hint}{broken} Families with a "
            f"{role} split: {', '.join(with_split(role))}."
        )
    loaded = with_ids(load_family(index.families[name]), load_config().split_ids.get(name))
    if _split(loaded.family, role) is None:
        raise CalibrationError(
            f"{purpose}: the family {name!r} has no {role} split, and its other splits are what models are "
            f"tested on. Families with one: {', '.join(with_split(role))}. Or give a folder of pictures of your own."
        )
    return loaded


def _split(family: Family, role: Role) -> Split | None:
    return family.train if role == "train" else getattr(family.splits, role)


def with_split(role: Role) -> tuple[str, ...]:
    """The registered families that have a split of that role."""
    from bitquake.tasks.catalog import registered

    return tuple(one.family.family for one in registered() if _split(one.family, role) is not None)


def _task_of(loaded: Loaded, role: Role, noise: tuple[str, int] | None, seed: int) -> Task:
    """The family's clean task, turned to the split, perhaps with a noise."""
    from bitquake.noise import NoiseError
    from bitquake.tasks.variants import group_of, why_not

    family = loaded.family
    spec = None
    if noise is not None:
        name, severity = noise
        try:
            spec = NoiseSpec(name, severity, seed=seed)
            if group_of(name) != "text" and family.variants.noise is not None:
                spec = replace(spec, mode=family.variants.noise.mode)
        except NoiseError as error:
            raise CalibrationError(f"calibration: {error}") from error
        question = family.columns.question is not None
        if (reason := why_not(name, boxes=family.protocol == "grounding", question=question)) is not None:
            raise CalibrationError(f"calibration: {name} {reason}; choose another noise for {family.family}")
    split = _split(family, role)
    assert split is not None  # asked for when the family was loaded
    return _task_on(loaded, split, f"{family.family}_{role}", spec)


def _task_on(loaded: Loaded, split: Split, name: str, noise: NoiseSpec | None = None) -> Task:
    """The family's clean task, turned to a split that may be no task's."""
    from bitquake.tasks.expand import builtin_index
    from bitquake.tasks.glue import read_task
    from bitquake.tasks.schema import Train
    from bitquake.tasks.world.build import train_file

    family = loaded.family
    clean = read_task(builtin_index().tasks[CLEAN_TASK.format(family.family)])
    changes: dict[str, Any] = {
        "splits": family.splits.model_copy(update={"test": split}),  # a task's own rows are those of `test`
        "shifts": {},
        "candidates": None,
        "noise_subset": None,
    }
    if isinstance(split, Train) and split.dataset is not None:
        loaded = loaded._replace(family=family.model_copy(update={"dataset": split.dataset}))
        source = loaded.source(split.split)
        changes["sources"] = {} if source is None else {split.split: source}
    written = None if noise is None else noise.to_mapping()
    task = type(clean)(clean.file, name, split.split, noise, written, clean.contract.model_copy(update=changes))
    dataset = loaded.family.dataset
    if isinstance(split, Train) and split.pictures is not None:
        task.data_file = train_file(family.family, split.pictures)
    elif dataset is not None and dataset.path is None:
        task.data_file = loaded.split_file(split.split)
    return task


def evaluated_pictures(name: str) -> frozenset[str]:
    """``pixels:<hash>`` of every picture that a family's tasks evaluate or fit thresholds on; each is decoded.

    Raises:
        CalibrationError: no such family, or its data is not there.
    """
    from bitquake.tasks.documents import image_hashes
    from bitquake.tasks.schema import Split

    loaded = _load(name, "test")
    family = loaded.family
    parts: list[Split] = [family.splits.test, family.splits.threshold, *family.variants.shifts.values()]
    parts += [shift.threshold for shift in family.variants.shifts.values() if shift.threshold is not None]
    found: set[str] = set()
    for split in dict.fromkeys(one.split for one in parts):
        whole = Split(split=split)  # its parts and more: nobody trains on the rest
        rows = _rows(loaded, _task_on(loaded, whole, f"{name}_{split}"), "training")
        column = family.columns.image
        found |= {PIXELS + one for one in image_hashes(row[column] for row in rows.select_columns([column])) if one}
    return frozenset(found)


def _prompt_kwargs(task: Task, family: Family, model_type: str) -> dict[str, Any]:
    """What lmms-eval would hand to the task's functions, with the prompt of this kind of model."""
    noise = task.noise_as_written
    if family.extends is None:
        around = family.prompts.get(model_type, family.prompts["default"])
        return {"noise": noise, **around.model_dump()}
    from bitquake.tasks.extended import stock_functions
    from bitquake.tasks.stock import with_noise

    kwargs: dict[str, Any] = with_noise(stock_functions(family.extends.task).get("lmms_eval_specific_kwargs"), noise)[
        "default"
    ]
    return kwargs


def _rows(loaded: Loaded, task: Task, purpose: str) -> datasets.Dataset:
    """The rows of the task's split, read as lmms-eval reads a task's."""
    import datasets

    from bitquake.tasks import sources
    from bitquake.tasks.families import FamilyError

    family = loaded.family
    try:
        task.see_to_data()
        if family.extends is not None:
            from bitquake.tasks.extended import stock_functions

            config = stock_functions(family.extends.task)
            path, name = str(config["dataset_path"]), config.get("dataset_name")
            further = dict(config.get("dataset_kwargs") or {})
        elif task.data_file is not None:
            path, name, further = "parquet", None, {"data_files": {task.split: str(task.data_file)}}
        else:
            train = family.train if task.part == family.train else None
            dataset_of = family.dataset if train is None or train.dataset is None else train.dataset
            assert dataset_of is not None and dataset_of.path is not None
            path, name = dataset_of.path, dataset_of.name
            further = {"revision": dataset_of.revision} if dataset_of.revision else {}
        try:
            dataset = datasets.load_dataset(path, name, split=task.split, **further)
        except Exception as error:  # the hub's, the file system's, the format's: whatever its kind
            raise CalibrationError(
                f"{purpose}: the dataset of {family.family} ({path}, split {task.split}) cannot be loaded "
                f"({type(error).__name__}: {error}). Without network, fetch it beforehand: "
                f"`hf download --repo-type dataset {path}`"
            ) from error
        task.revision = sources.revision(dataset, task.data_file)
        return task.prepared(dataset)
    except FamilyError as error:
        raise CalibrationError(f"{purpose}: {family.family}: {error}") from error


def _order(rows: datasets.Dataset, seed: int) -> tuple[list[int], list[str]]:
    """Row numbers: the first row of every picture, then the second ones, ..., pictures and their rows by hash.

    And the id of each row's picture, in that order.
    """
    from bitquake.tasks.documents import IDS

    ids = rows.select_columns([IDS])[:][IDS]
    samples = sorted(range(len(ids)), key=lambda row: (place(seed, ids[row]["sample_id"]), row))
    seen: Counter[str] = Counter()
    ranked = []
    for row in samples:
        image = ids[row]["image_id"]
        ranked.append((seen[image], place(seed, image), row))
        seen[image] += 1
    order = [row for *_, row in sorted(ranked)]
    return order, [ids[row]["image_id"] for row in order]
