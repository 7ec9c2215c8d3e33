"""What one of our tasks asks of the wrapper: ``metadata: {bitquake: {...}}`` of its YAML.

A task of anybody else has no such entry: it gets plain text. Extra keys in ``generation_kwargs`` would reach other
models' ``generate`` and crash them, so what only our wrapper understands stands in the metadata:

    metadata:
      bitquake:
        envelope: true                  # answer with an envelope (bitquake.envelope), not with plain text
        confidence: options             # the task's primary confidence, which Selectors go by; default joint
        protocol: choice                # vqa | choice | grounding | …: which further confidences are wanted; retrieval:
                                        # candidates are scored, nothing is generated
        letters: [A, B, C, D, E]        # choice: option letters, at most
        options_field: choices          # choice: column of the document that holds this question's options
        candidates_field: captions      # retrieval: column of the document that holds the candidate captions
        default_prompt: {pre_prompt: "", post_prompt: "\\nAnswer briefly."}   # as in lmms_eval_specific_kwargs
        prompts:                        # per model_type of transformers: what stands there instead
          qwen2_vl: {pre_prompt: "", post_prompt: "\\nAnswer with one word."}
        dataset: lmms-lab/VQAv2         # with columns.image_id: documents name their picture, and two tasks of one
        columns: {image_id: image_id}   # dataset name it alike
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_KEYS = (
    "envelope",
    "protocol",
    "confidence",
    "letters",
    "options_field",
    "candidates_field",
    "default_prompt",
    "prompts",
)
RETRIEVAL = "retrieval"
_IDS = "bitquake"
"""Column that our tasks add to a document: {sample_id, image_id, ...}."""


@dataclass(frozen=True)
class Prompt:
    """Text before and after the question."""

    pre_prompt: str = ""
    post_prompt: str = ""


@dataclass(frozen=True)
class TaskContract:
    """See the module's text; the default is the contract of a task that is not ours."""

    envelope: bool = False
    protocol: str | None = None
    confidence: str = "joint"
    letters: tuple[str, ...] = ()
    options_field: str | None = None
    candidates_field: str | None = None
    default_prompt: Prompt = Prompt()
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    image_dataset: str | None = None
    """The dataset whose ids name the documents' pictures; None where they are known by their pixels only."""

    @classmethod
    def of(cls, doc_to_messages: Any, task: str) -> TaskContract:
        """The contract of the task whose bound ``doc_to_messages`` lmms-eval put into a request.

        Raises:
            ValueError: the metadata is ours but malformed.
        """
        config = getattr(getattr(doc_to_messages, "__self__", None), "config", None)
        metadata = getattr(config, "metadata", None)
        ours = metadata.get("bitquake") if isinstance(metadata, Mapping) else None
        if ours is None:
            return cls()
        where = f"task {task!r}: metadata.bitquake"
        if not isinstance(ours, Mapping):
            raise ValueError(f"{where}: expected a mapping with keys among {_KEYS}, got {ours!r}.")
        prompts = ours.get("prompts") or {}
        if not isinstance(prompts, Mapping):
            raise ValueError(f"{where}.prompts: expected a mapping from model_type to prompts, got {prompts!r}.")
        if ours.get("protocol") == RETRIEVAL and not (ours.get("envelope") is True and ours.get("candidates_field")):
            raise ValueError(
                f"{where}: protocol retrieval needs envelope: true (scores travel in it) and candidates_field: the "
                f"column of the candidate captions; got envelope {ours.get('envelope')!r} and candidates_field "
                f"{ours.get('candidates_field')!r}."
            )
        letters = tuple(ours.get("letters") or ())
        if not all(isinstance(letter, str) and letter for letter in letters) or len(set(letters)) != len(letters):
            raise ValueError(f"{where}.letters: expected distinct strings, got {ours.get('letters')!r}.")
        return cls(
            envelope=ours.get("envelope") is True,
            protocol=ours.get("protocol"),
            confidence=str(ours.get("confidence") or "joint"),
            letters=letters,
            options_field=ours.get("options_field"),
            candidates_field=ours.get("candidates_field"),
            default_prompt=_prompt(ours.get("default_prompt"), f"{where}.default_prompt"),
            prompts={name: _prompt(prompt, f"{where}.prompts.{name}") for name, prompt in prompts.items()},
            image_dataset=ours.get("dataset") if (ours.get("columns") or {}).get("image_id") else None,
        )

    def question_letters(self, doc: Any) -> tuple[str, ...]:
        """The letters of this document's options: the first n of ``letters`` where ``options_field`` holds n options.

        Raises:
            ValueError: the document lacks that field, or holds more options than there are letters.
        """
        if self.options_field is None:
            return self.letters
        try:
            n = len(doc[self.options_field])
        except (KeyError, TypeError) as error:
            raise ValueError(f"options: the document has no list {self.options_field!r} ({error!r})") from error
        if n > len(self.letters):
            raise ValueError(f"options: {n} options but only {len(self.letters)} letters {self.letters}")
        return self.letters[:n]

    def candidates(self, doc: Any) -> tuple[str, ...]:
        """The document's candidate captions; none unless the protocol is retrieval.

        Raises:
            ValueError: the document lacks that field, or it is no list of texts, empty, or holds a blank one.
        """
        if self.protocol != RETRIEVAL or self.candidates_field is None:
            return ()
        try:
            found = doc[self.candidates_field]
        except (KeyError, TypeError) as error:
            raise ValueError(f"candidates: the document has no field {self.candidates_field!r} ({error!r})") from error
        if not isinstance(found, (list, tuple)) or not found:
            raise ValueError(f"candidates: {self.candidates_field!r} must be a list of captions, got {found!r}")
        if odd := [i for i, text in enumerate(found) if not isinstance(text, str) or not text.strip()]:
            raise ValueError(f"candidates: {self.candidates_field!r}[{odd[0]}] is no caption: {found[odd[0]]!r}")
        return tuple(found)

    def image_names(self, doc: Any) -> tuple[str, ...]:
        """``<dataset>:<image id>`` of the document's picture, where its dataset names pictures."""
        ids = doc.get(_IDS) if isinstance(doc, Mapping) else None
        if self.image_dataset is None or not isinstance(ids, Mapping):
            return ()
        return (f"{self.image_dataset}:{ids.get('image_id')}",)

    def adapt(self, text: str, model_type: str) -> str:
        """A question with the default prompt around it -> with this model's prompt around it.

        Raises:
            ValueError: the text does not carry the default prompt that the metadata declares.
        """
        prompt = self.prompts.get(model_type)
        if prompt is None:
            return text
        before, after = self.default_prompt.pre_prompt, self.default_prompt.post_prompt
        if not text.startswith(before) or not text.endswith(after) or len(text) < len(before) + len(after):
            raise ValueError(
                f"prompt: {text!r} does not begin with {before!r} and end with {after!r}, the default_prompt of the "
                "task's metadata; make it equal to lmms_eval_specific_kwargs.default"
            )
        return prompt.pre_prompt + text[len(before) : len(text) - len(after)] + prompt.post_prompt


def _prompt(value: Any, where: str) -> Prompt:
    if value is None:
        return Prompt()
    if not isinstance(value, Mapping) or not set(value) <= {"pre_prompt", "post_prompt"}:
        raise ValueError(f"{where}: expected {{pre_prompt: ..., post_prompt: ...}}, got {value!r}.")
    return Prompt(**{key: str(text or "") for key, text in value.items()})
