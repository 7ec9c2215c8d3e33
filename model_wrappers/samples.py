"""One request of lmms-eval made ready for the processor: images after noise, prompt, hashes; or why that failed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lmms_eval.protocol import ChatMessages
from PIL import Image

from bitquake.noise import ImageError, NoiseCache, NoiseError, known_pixel_hash, load_rgb, pixel_hash

from .calibration.overlap import CalibratedOn, document_image_ids, refuse_overlap
from .generation import GenerationRequest
from .loading import ONLY_WITH_IMAGE
from .selector.live import Emitter, refuse_fitted
from .task_contract import Prompt, TaskContract

_IMAGE_ERRORS = (ImageError, OSError, Image.DecompressionBombError)
_PLACE = "\ue000question\ue001"
"""Stands for the question in a template: private characters, which nobody writes."""


@dataclass
class Sample:
    """A request on its way through the wrapper.

    ``error`` is None or begins with ``image: ``, ``question: `` or ``model: `` (what failed); ``exception`` is what was
    raised and ``origin`` its type and the line it came from. ``question`` is where the question begins and ends in
    ``prompt``, in characters; empty where nobody asked or it cannot be told. ``messages`` goes before the request's own
    ``doc_to_messages``.
    """

    index: int
    task: str
    contract: TaskContract
    request: GenerationRequest
    messages: Callable[..., Any] | None = None
    letters: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    prompt: str = ""
    question: tuple[int, ...] = ()
    images: list[Image.Image] = field(default_factory=list)
    pixel_hashes: list[str] = field(default_factory=list)
    error: str | None = None
    exception: BaseException | None = None
    origin: str = ""
    out_of_memory: bool = False

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [image.size for image in self.images]

    @property
    def size(self) -> tuple[int, int]:
        """Sort key of a batch: pixels first, they make more tokens than words do."""
        return sum(width * height for width, height in self.image_sizes), len(self.prompt)

    def fail(self, kind: str, exception: BaseException) -> None:
        message = " ".join(str(exception).split()) or type(exception).__name__
        # the room of the noise says "image: ..." itself
        self.error = message if message.startswith(f"{kind}: ") else f"{kind}: {message}"
        self.exception = exception
        trace = exception.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
        self.origin = f"{type(exception).__name__}{where}"

    def release(self) -> None:
        """Let go of the images, and of the exception, whose traceback holds the tensors of a whole batch."""
        self.images = []
        self.exception = None


def prompt_hash(prompt: str) -> str:
    """blake2 hex of the templated prompt."""
    return hashlib.blake2b(prompt.encode(), digest_size=16).hexdigest()


def from_noise_cache(doc_to_messages: Callable[..., Any], cache: NoiseCache) -> Callable[..., Any]:
    """The ``doc_to_messages`` of a request, its noisy pictures out of a cache; as it is where the task is not ours.

    Only the request's own task knows where its noise is applied (``bitquake.tasks.glue``). lmms-eval's task and its
    config are copied, not changed: whoever else holds them gets what they got before.
    """
    task: Any = getattr(doc_to_messages, "__self__", None)
    config = copy.copy(getattr(task, "config", None))
    cached = False
    for name in ("doc_to_visual", "doc_to_messages"):
        made = getattr(getattr(config, name, None), "with_noise_cache", None)
        if made is not None:
            setattr(config, name, made(cache))
            cached = True
    if not cached:
        return doc_to_messages
    task = copy.copy(task)
    task._config = config
    bound: Callable[..., Any] = getattr(task, doc_to_messages.__name__)
    return bound


def prepare(
    sample: Sample,
    arguments: tuple[Any, ...],
    task_dict: Mapping[str, Any],
    processor: Any,
    model_type: str,
    calibrated: CalibratedOn | None = None,
    *,
    trained: Sequence[CalibratedOn] = (),
    find_question: bool = False,
    emitters: Sequence[Emitter] = (),
) -> Sample:
    """Read the document, build its messages (images are loaded and corrupted there), template the prompt.

    Runs in worker threads. A failure of this one sample is written on it, not raised: an image that is missing or does
    not decode is ``image``, and so is one that the model cannot do without; a ``ValueError`` (an empty question, no
    candidates) is ``question``, anything else ``model``.

    Args:
        arguments: (ctx, doc_to_messages, gen_kwargs, doc_id, task, split) of the request.
        task_dict: lmms-eval's ``lm.task_dict``.
        calibrated: the pictures that the model was calibrated on; None for a model that was not.
        trained: those that it or its adapter was trained on.
        find_question: fill ``sample.question``.
        emitters: Selectors of the run.

    Raises:
        NoiseError: the task asks for a noise that does not exist: no sample of it could succeed.
        OverlapError: the model was calibrated or trained, or a Selector fitted, on one of the document's pictures: no
            result of the task would hold.
    """
    _, doc_to_messages, _, doc_id, task, split = arguments
    try:
        doc = task_dict[task][split][doc_id]
        messages = (sample.messages or doc_to_messages)(doc)
        sample.candidates = sample.contract.candidates(doc)
    except NoiseError:
        raise
    except _IMAGE_ERRORS as error:
        sample.fail("image", error)
        return sample
    except ValueError as error:
        sample.fail("question", error)
        return sample
    except Exception as error:  # one bad document must not lose the others; the wrapper logs and counts it
        sample.fail("model", error)
        return sample
    try:
        chat = ChatMessages(messages=messages)
        images, videos, audios = chat.extract_media()
        if videos or audios:
            raise ValueError("video and audio are not supported: bitquake_hf measures image tasks")
        if not images and model_type in ONLY_WITH_IMAGE:
            raise ImageError(f"image: a {model_type} model answers about a picture, and this row has none")
        if sample.contract.letters:
            sample.letters = sample.contract.question_letters(doc)
        for image in images:
            sample.images.append(image if _is_plain_rgb(image) else Image.fromarray(load_rgb(image)))
            sample.pixel_hashes.append(_pixel_hash(sample.images[-1]))
        conversation = _conversation(chat, sample.contract, model_type)
        sample.prompt = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        if find_question:
            own = sample.contract.prompts.get(model_type, sample.contract.default_prompt)
            sample.question = _question_span(processor, conversation, own, sample.prompt)
    except _IMAGE_ERRORS as error:
        sample.fail("image", error)
    except Exception as error:
        sample.fail("model", error)
    if calibrated is not None or trained or emitters:
        ids = document_image_ids(doc, sample.contract.image_names(doc), sample.pixel_hashes)
        where = f"task {task!r}, document {doc_id}"
        for seen in (*([] if calibrated is None else [calibrated]), *trained):
            refuse_overlap(seen, ids, where)
        refuse_fitted(emitters, ids, where)
    return sample


def _is_plain_rgb(image: Any) -> bool:
    # an EXIF orientation that nobody applied would be applied by load_rgb and not by the processor
    return isinstance(image, Image.Image) and image.mode == "RGB" and not image.info.get("exif")


def _pixel_hash(image: Image.Image) -> str:
    # without anything beside its pixels, RGB needs none of the work that load_rgb does on pictures
    return known_pixel_hash(image) or pixel_hash(image if image.info else np.asarray(image))


def _conversation(chat: ChatMessages, contract: TaskContract, model_type: str) -> list[dict[str, Any]]:
    """Messages for the chat template: places of images, and texts; the last user text with the model's own prompt."""
    conversation: list[dict[str, Any]] = []
    last_text: dict[str, Any] | None = None
    for message in chat.messages:
        content: list[dict[str, Any]] = []
        for part in message.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
                last_text = content[-1] if message.role == "user" else last_text
            else:
                content.append({"type": "image"})
        conversation.append({"role": message.role, "content": content})
    if last_text is not None:
        last_text["text"] = contract.adapt(last_text["text"], model_type)
    return conversation


def _question_span(processor: Any, conversation: list[dict[str, Any]], own: Prompt, prompt: str) -> tuple[int, ...]:
    """Begin and end in ``prompt`` of the last user text without the prompt around it; () where there is none.

    The template is filled in once more, with a mark in the text's place: the same words may stand elsewhere too.
    """
    texts = [part for m in conversation if m["role"] == "user" for part in m["content"] if part["type"] == "text"]
    if not texts:
        return ()
    part, text = texts[-1], texts[-1]["text"]
    part["text"] = _PLACE
    try:
        marked = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    finally:
        part["text"] = text
    head, _, tail = marked.partition(_PLACE)
    begin, end = len(head), len(prompt) - len(tail)
    if marked.count(_PLACE) != 1 or begin > end or not (prompt.startswith(head) and prompt.endswith(tail)):
        return ()
    written = prompt[begin:end]
    first, last = 0, len(text)
    if text.startswith(own.pre_prompt) and text.endswith(own.post_prompt):
        first, last = len(own.pre_prompt), len(text) - len(own.post_prompt)
    if written.strip() != text.strip() or not text[first:last].strip():  # a template that rewrites its texts, or
        text, first, last = written, 0, len(written)  # nothing between the prompts: all that stands there
    core = text[first:last].strip()
    # a template may trim
    begin += text.find(core, first) - _lead(text) + _lead(written)
    return (begin, begin + len(core)) if core else ()


def _lead(text: str) -> int:
    return len(text) - len(text.lstrip())
