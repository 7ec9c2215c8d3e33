"""What each protocol takes from a row as the reference, and what it makes of a model's answer.

A row goes through here twice: as lmms-eval's ``doc_to_target``, for logs, and to be scored. Whatever is wrong with a
reference is a ``TargetError``; no output of a model raises anything but ``CandidateError``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitquake.envelope import Envelope

from .contract import CANDIDATES
from .documents import IDS
from .scoring import TargetError, score_box, score_choice, score_vqa
from .scoring.caption import reference_captions, score_caption
from .scoring.choice import correct_letter
from .scoring.grounding import Box, exact_box, format_box, target_box
from .scoring.retrieval import score_retrieval

if TYPE_CHECKING:
    from .glue import Task

Doc = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a protocol makes of one answer; remark: what a reader of the record should know of it."""

    score: float
    scores: dict[str, float]
    answer: str | None
    parse_failure: bool = False
    remark: str = ""


def outcome(task: Task, doc: Doc, envelope: Envelope) -> Outcome:
    """Score an answer.

    Raises:
        TargetError: nothing can be scored against the row's reference.
        CandidateError: the model's scores of candidates cannot be ranked.
    """
    return _OUTCOMES[task.contract.protocol](task, doc, envelope)


def target(task: Task, doc: Doc) -> Any:
    """The reference answer, as logs show it.

    Raises:
        TargetError: there is none that could be scored.
    """
    return _TARGETS[task.contract.protocol](task, doc)


def vqa_outcome(task: Task, doc: Doc, envelope: Envelope) -> Outcome:
    vqa = score_vqa(envelope.text, reference_answers(task, doc), task.contract.annotators)
    return Outcome(vqa.score, {"reliable_vqa": vqa.reliable_vqa, "lmms_eval": vqa.lmms_eval}, vqa.answer)


def choice_outcome(options: list[str], correct: int, envelope: Envelope) -> Outcome:
    """Of a question with lettered options, wherever they stand in a row."""
    choice = score_choice(envelope.text, options, correct, envelope.option_probabilities)
    scores = {"strict": choice.strict, "lenient": choice.lenient}
    if choice.letter is not None:
        scores["letter"] = choice.letter
    return Outcome(choice.score, scores, choice.answer, choice.parse_failure)


def grounding_outcome(task: Task, doc: Doc, envelope: Envelope) -> Outcome:
    box, size = reference_box(task, doc)
    seen = envelope.image_sizes[0] if envelope.image_sizes else None
    if size is not None and seen is not None and tuple(seen) != size:
        raise TargetError(
            f"box: it is one in a picture of {size[0]}x{size[1]} pixels, and the model was shown one of "
            f"{seen[0]}x{seen[1]}; correct columns.width and columns.height, or leave them out"
        )
    spaces = task.contract.coordinates
    space = spaces.get(envelope.model_type, spaces["default"])
    processed = envelope.processed_sizes[0] if envelope.processed_sizes else None
    found = score_box(envelope.text, box, space, size, processed)
    answer = None if found.box is None else exact_box(found.box)
    return Outcome(found.score, {"iou": found.iou}, answer, found.parse_failure)


def caption_outcome(task: Task, doc: Doc, envelope: Envelope) -> Outcome:
    caption = score_caption(envelope.text, _captions(task, doc), task.corpus())
    return Outcome(caption.score, {"cider": caption.score}, caption.tokens or None, caption.parse_failure)


def retrieval_outcome(task: Task, doc: Doc, envelope: Envelope) -> Outcome:
    assert task.contract.candidates is not None  # the family's schema sees to it
    candidates, n = doc[CANDIDATES], task.contract.candidates.n
    ranked = score_retrieval(envelope.candidate_scores, doc[IDS]["target"], n)
    answer = None if ranked.answer is None else candidates[ranked.answer]
    remark = ""
    if ranked.parse_failure:
        remark = (
            "retrieval: the model gave no scores of the candidates, and a text cannot be ranked; "
            "only models that answer with candidate_scores in an envelope can be asked (bitquake_hf)"
        )
    return Outcome(ranked.score, ranked.scores(n), answer, ranked.parse_failure, remark)


def letter_index(value: Any) -> Any:
    """A reference given as a letter, in either case, becomes its index; anything else stays, to be checked."""
    text = value.strip().upper() if isinstance(value, str) else ""
    return ord(text) - ord("A") if len(text) == 1 and "A" <= text <= "Z" else value


def _captions(task: Task, doc: Doc) -> list[str]:
    column = task.contract.columns.captions
    assert column is not None  # the family's schema sees to it
    return reference_captions(doc[column])


def options_and_answer(task: Task, doc: Doc) -> tuple[list[str], int]:
    """choice: the options' texts, and the index of the right one."""
    columns = task.contract.columns
    assert columns.choices is not None and columns.answer is not None  # the family's schema sees to it
    return doc[columns.choices], doc[columns.answer]


def reference_answers(task: Task, doc: Doc) -> list[Any]:
    """vqa: the annotators' answers.

    Raises:
        TargetError: there are none.
    """
    column = task.contract.columns.answers
    answers = doc[column] if column is not None else None
    if isinstance(answers, str) and task.contract.annotators == 1:
        return [answers]
    if not isinstance(answers, list) or not answers:
        raise TargetError(f"answers: column {column!r} holds no answers, got {answers!r}")
    return [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]


def reference_box(task: Task, doc: Doc) -> tuple[Box, tuple[int, int] | None]:
    """grounding: the annotated box where the task's noise leaves it, and the size of the picture that models are shown.

    Raises:
        TargetError: the box is not one in its picture, or the noise leaves too little of it there.
    """
    column = task.contract.columns.box
    assert column is not None  # the family's schema sees to it
    width, height = doc[IDS]["width"], doc[IDS]["height"]
    size = None if width is None or height is None else (int(width), int(height))
    box = target_box(doc[column], task.contract.box_format, size)
    noise = task.noise
    if noise is None or noise.noise().geometry == "preserved":
        return box, size
    if size is None:
        raise TargetError(f"box: {noise.name} moves it, and the picture's size, which that needs, is not known")
    moved = noise.move_box(box, size, task.key(doc))
    if moved is None:
        raise TargetError(f"box: {noise.name} at severity {noise.severity} leaves too little of {box} in the picture")
    return moved


_OUTCOMES: dict[str, Callable[[Task, Doc, Envelope], Outcome]] = {
    "vqa": vqa_outcome,
    "choice": lambda task, doc, envelope: choice_outcome(*options_and_answer(task, doc), envelope),
    "grounding": grounding_outcome,
    "caption": caption_outcome,
    "retrieval": retrieval_outcome,
}
_TARGETS: dict[str, Callable[[Task, Doc], Any]] = {
    "vqa": reference_answers,
    "choice": lambda task, doc: correct_letter(*options_and_answer(task, doc)),
    "grounding": lambda task, doc: format_box(reference_box(task, doc)[0]),
    "caption": _captions,
    "retrieval": lambda task, doc: doc[CANDIDATES][doc[IDS]["target"]] if doc[IDS]["target"] is not None else "",
}
