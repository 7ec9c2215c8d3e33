"""The splits of the block world, disjoint by image: every split draws its scenes from seeds of its own range.

``rows`` yields the rows of one family and split with the column names and types of the real datasets, plus
``sample_id`` and ``image_id``; the shipped splits have the sizes in ``SIZES``. ``train`` has no end in sight and is
generated: the reference models learn from pictures anywhere in it, ``train_rows`` yields its first ones.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import captions, questions, scenes
from .annotators import N_ANNOTATORS, perceive
from .degradations import degrade

FAMILIES = (
    "block_vqav2",
    "block_advqa",
    "block_vizwiz",
    "block_refcocoplus",
    "block_scienceqa",
    "block_coco_caption",
    "block_flickr_retrieval",
)
"""New families go to the end: the place of a family decides its scenes' seeds."""
SPLITS = ("dev", "calibration", "threshold", "test")
"""The shipped splits; the place of a split decides its scenes' seeds too."""
TRAIN = "train"
SHIFTS: dict[tuple[str, str], tuple[int, int]] = {
    ("block_refcocoplus", "testA"): (2, 3),
    ("block_refcocoplus", "testB"): (5, 6),
}
"""Further test splits, of scenes that have so many objects: few, where RefCOCO+'s testA has people, and many for its
testB. New ones go to the end."""
WORLD_SEED = 20_261

_SPAN = 1 << 40
_TRAIN_BASE = 1 << 44
_SHIFT_PLACES, _TRAIN_PLACES = 1_000, 2_000


class Size(NamedTuple):
    """Number of questions (or pictures to describe), and how many are asked on one picture at most."""

    questions: int
    per_image: int


SIZES: dict[str, dict[str, Size]] = {
    "block_vqav2": {
        "test": Size(10_000, 5),
        "threshold": Size(2_000, 5),
        "calibration": Size(512, 4),
        "dev": Size(10_000, 5),
    },
    "block_advqa": {"test": Size(2_000, 4), "threshold": Size(1_000, 4), "calibration": Size(256, 4)},
    "block_vizwiz": {"test": Size(2_000, 2), "threshold": Size(1_000, 2), "calibration": Size(128, 2)},
    "block_refcocoplus": {
        "test": Size(2_000, 3),
        "threshold": Size(1_000, 3),
        "calibration": Size(256, 3),
        "dev": Size(4_000, 3),
        "testA": Size(500, 3),
        "testB": Size(500, 3),
    },
    "block_scienceqa": {
        "test": Size(2_000, 2),
        "threshold": Size(1_000, 2),
        "calibration": Size(128, 2),
        "dev": Size(2_800, 2),
    },
    "block_coco_caption": {"test": Size(1_000, 1), "threshold": Size(500, 1), "calibration": Size(128, 1)},
    "block_flickr_retrieval": {"test": Size(1_000, 1), "threshold": Size(500, 1), "calibration": Size(128, 1)},
}
TRAIN_PER_IMAGE = {"block_vqav2": 5, "block_refcocoplus": 3, "block_scienceqa": 2, "block_coco_caption": 1}
"""What models are trained on -> questions asked on one picture at most; the other families are shifts."""
_PICTURES = 10_000_000
"""Most pictures of one split."""


def train_seed(rng: random.Random) -> int:
    """A scene seed of the ``train`` split; no other split's range overlaps it."""
    return _TRAIN_BASE + rng.randrange(_SPAN)


def scene_seed(family: str, split: str, index: int) -> int:
    """Scene seed of picture ``index`` of a split; ranges of different families and splits do not overlap."""
    if split == TRAIN:
        return _TRAIN_BASE + FAMILIES.index(family) * _PICTURES + index
    return WORLD_SEED * 1_000_000_000 + _place(family, split) * _PICTURES + index


def _place(family: str, split: str) -> int:
    if split == TRAIN and family in TRAIN_PER_IMAGE:
        return _TRAIN_PLACES + FAMILIES.index(family)
    if (family, split) in SHIFTS:
        return _SHIFT_PLACES + list(SHIFTS).index((family, split))
    if family not in FAMILIES or split not in SPLITS:
        raise ValueError(f"no shipped split {split!r} of {family!r}; families are {FAMILIES}, splits {SPLITS}")
    return FAMILIES.index(family) * len(SPLITS) + SPLITS.index(split)


def encode_image(pixels: NDArray[np.uint8]) -> bytes:
    """Lossless WebP: exact pixels in two thirds of PNG's bytes (method 6 would save 13% more, 35 times slower)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def _vote(question: questions.Question, scene: scenes.Scene) -> list[str]:
    return [question.program(perceive(scene, annotator)) for annotator in range(N_ANNOTATORS)]


def _vqa_rows(family: str, split: str, index: int, per_image: int) -> Iterator[dict[str, Any]]:
    seed = scene_seed(family, split, index)
    rng = random.Random(seed * 3 + 1)
    scene = scenes.sample_scene(seed, 1 if family == "block_vqav2" else 3, 6)
    image = {"bytes": encode_image(scenes.render(scene)), "path": None}
    makers = questions.VQA if family == "block_vqav2" else questions.ADVERSARIAL
    picture = _place(family, split) * _PICTURES + index
    for k, question in enumerate(questions.ask(makers, scene, rng, per_image)):
        votes = _vote(question, scene)
        number = picture * 10 + k
        yield {
            "question_id": number,
            "image_id": picture,
            "question": question.text,
            "question_type": question.kind,
            "answer_type": question.answer_type,
            "multiple_choice_answer": Counter(votes).most_common(1)[0][0],
            "answers": [
                {"answer": vote, "answer_confidence": "yes", "answer_id": i + 1} for i, vote in enumerate(votes)
            ],
            "image": image,
            "sample_id": f"{split}-{number}",
        }


def _vizwiz_rows(split: str, index: int, per_image: int) -> Iterator[dict[str, Any]]:
    seed = scene_seed("block_vizwiz", split, index)
    rng = random.Random(seed * 3 + 1)
    scene = scenes.sample_scene(seed, 1, 2 if rng.random() < 0.3 else 1)
    scene = scenes.Scene(scene.seed, scene.blocks[-1:] + scene.blocks[:-1])
    photo = degrade(scenes.render(scenes.Scene(scene.seed, scene.blocks[1:] + scene.blocks[:1])), rng)
    image = {"bytes": encode_image(photo.pixels), "path": None}
    asked: set[str] = set()
    for k in range(per_image):
        question = questions.ask_aloud(scene, photo.harm < 0.75, rng)
        if question.text in asked:
            continue
        asked.add(question.text)
        # The worse the photo, the more people give up on it.
        votes = [
            questions.UNANSWERABLE if rng.random() < 0.5 * photo.harm**2 else vote for vote in _vote(question, scene)
        ]
        top = Counter(votes).most_common(1)[0][0]
        yield {
            "question_id": f"block_vizwiz_{split}_{index * 10 + k:08d}",
            "image": image,
            "question": question.text,
            "answers": votes,
            "category": questions.UNANSWERABLE if top == questions.UNANSWERABLE else question.answer_type,
            "sample_id": f"{split}-{index * 10 + k}",
            "image_id": f"{split}-{index}",
        }


def _refcoco_rows(split: str, index: int, per_image: int) -> Iterator[dict[str, Any]]:
    seed = scene_seed("block_refcocoplus", split, index)
    rng = random.Random(seed * 3 + 1)
    scene = scenes.sample_scene(seed, *SHIFTS.get(("block_refcocoplus", split), (2, 6)))
    image = {"bytes": encode_image(scenes.render(scene)), "path": None}
    for k, referral in enumerate(questions.refer(scene, rng, per_image)):
        block = scene.blocks[referral.target]
        yield {
            "question_id": f"{index * 10 + k}",
            "image": image,
            "question": f"find : {referral.expression}",
            "answer": [referral.expression],
            "bbox": [float(value) for value in (block.x, block.y, block.w, block.h)],
            "iscrowd": 0,
            "file_name": f"block_{split}_{index:06d}.webp",
            "sample_id": f"{split}-{index * 10 + k}",
            "image_id": f"{split}-{index}",
        }


def _science_rows(split: str, index: int, per_image: int) -> Iterator[dict[str, Any]]:
    seed = scene_seed("block_scienceqa", split, index)
    scene = scenes.sample_scene(seed, 3, 6)
    rng = random.Random(seed * 3 + 1)
    image = {"bytes": encode_image(scenes.render(scene)), "path": None}
    asked: set[str] = set()
    for k in range(per_image):
        question = questions.science(scene, rng)
        if question is None or question.hint in asked:
            continue
        asked.add(question.hint)
        yield {
            "image": image,
            "question": question.text,
            "choices": list(question.choices),
            "answer": question.answer,
            "hint": question.hint,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": question.topic,
            "category": "Properties of objects",
            "skill": question.skill,
            "lecture": "",
            "solution": "",
            "sample_id": f"{split}-{index * 10 + k}",
            "image_id": f"{split}-{index}",
        }


def _caption_rows(family: str, split: str, index: int) -> Iterator[dict[str, Any]]:
    seed = scene_seed(family, split, index)
    scene = scenes.sample_scene(seed, captions.MIN_OBJECTS, captions.MAX_OBJECTS)
    said = captions.captions(scene)
    number = _place(family, split) * _PICTURES + index
    image = {"bytes": encode_image(scenes.render(scene)), "path": None}
    name = f"block_{split}_{index:06d}.webp"
    ids = {"sample_id": f"{split}-{index}", "image_id": f"{split}-{index}"}
    if family == "block_coco_caption":
        asked = {"question_id": name, "image": image, "question": captions.PROMPT, "answer": said, "id": number}
        yield {**asked, "file_name": name, **ids}
    else:
        sentences = [str(number * len(said) + k) for k in range(len(said))]
        yield {"image": image, "caption": said, "sentids": sentences, "img_id": str(number), "filename": name, **ids}


def rows(family: str, split: str) -> Iterator[dict[str, Any]]:
    """All rows of a shipped split, in order. Raises ValueError for a family or split that is not shipped."""
    if split == TRAIN:
        raise ValueError(f"no shipped split {split!r} of {family!r}; train_rows generates it")
    scene_seed(family, split, 0)
    total, per_image = SIZES[family][split]
    given, index = 0, 0
    while given < total:
        for row in _picture_rows(family, split, index, per_image):
            if given < total:
                given += 1
                yield row
        index += 1


def train_rows(family: str, pictures: int) -> Iterator[dict[str, Any]]:
    """The rows on the first pictures of ``train``, in order.

    Raises:
        ValueError: a family that nothing is trained on, or more pictures than a split has.
    """
    if family not in TRAIN_PER_IMAGE:
        raise ValueError(f"{family!r} has no {TRAIN} split; families with one are {', '.join(TRAIN_PER_IMAGE)}")
    if not 1 <= pictures <= _PICTURES:
        raise ValueError(f"{TRAIN} of {family!r} has 1 to {_PICTURES:,} pictures, not {pictures:,}")
    for index in range(pictures):
        yield from _picture_rows(family, TRAIN, index, TRAIN_PER_IMAGE[family])


def _picture_rows(family: str, split: str, index: int, per_image: int) -> Iterator[dict[str, Any]]:
    if family in ("block_vqav2", "block_advqa"):
        return _vqa_rows(family, split, index, per_image)
    if family == "block_vizwiz":
        return _vizwiz_rows(split, index, per_image)
    if family == "block_refcocoplus":
        return _refcoco_rows(split, index, per_image)
    if family == "block_scienceqa":
        return _science_rows(split, index, per_image)
    return _caption_rows(family, split, index)
