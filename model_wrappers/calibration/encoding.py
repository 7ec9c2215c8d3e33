"""A calibration sample as a model's inputs: picture, prompt and answer in one sequence, and what each position is.

The chat template, the assistant's turn and the answer's tokens are those with which retrieval scores a caption.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..generation import eos_ids
from ..loading import ONLY_WITH_IMAGE, matches_captions, processed_sizes
from ..retrieval import CaptionError, assistant_turn, caption_tokens, continued
from .sample import CalibrationError, CalibrationInputs, CalibrationSample, SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

DOCUMENT_TOKENS = 512
"""A document is cut after that many tokens, as in AWQ's calibration."""


class Encoder:
    """Encodes samples for one model.

    Args:
        model: its config and special tokens are read.
        processor: from ``load_processor``.

    Raises:
        CalibrationError: a model that matches captions and writes none.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        if matches_captions(model):
            raise CalibrationError(
                f"calibration: {type(model).__name__} matches captions with pictures and has no language model, which "
                "calibrated methods need; use a data-free method (rtn, hqq), or quantize the generating model"
            )
        # a copy, because calls leave traces in a tokenizer, and what is evaluated must not depend on the cache's state
        self._processor = copy.deepcopy(processor)
        self.model_type = str(model.config.model_type)
        self._image_token = getattr(model.config, "image_token_id", None)
        ends = eos_ids(model.generation_config) or frozenset({processor.tokenizer.eos_token_id})
        self._turn = assistant_turn(processor, ends)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """JSON of all that decides the encoding, without the traces that calls leave in a tokenizer."""
        tokenizer = self._processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
        for trace in ("padding", "truncation") if backend is not None else ():
            vocabulary.pop(trace, None)
        return {
            "model_type": self.model_type,
            "image_token": self._image_token,
            "turn": [self._turn.before, self._turn.end],
            "processor": json.loads(self._processor.to_json_string()),
            "template": self._processor.chat_template,
            "tokenizer": vocabulary,
            "transformers": transformers.__version__,
        }

    def encode(self, sample: CalibrationSample) -> CalibrationInputs:
        """The sample's inputs, floating ones as the processor makes them (float32).

        Raises:
            SampleError: the answer holds a special token, or nothing.
            CalibrationError: the model takes no text without a picture, or its processor gives pictures no tokens.
        """
        if not sample.images and self.model_type in ONLY_WITH_IMAGE:
            raise CalibrationError(
                f"calibration: a {self.model_type} model takes no text without a picture; use another source than text"
            )
        if not sample.images and sample.answer is None:
            return self._document(sample.prompt)
        prompt = self._templated(len(sample.images), [sample.prompt])
        inputs = self._processed([prompt], [sample.images])
        n_answer = 0
        if sample.answer is not None:
            tokens = self._answer_tokens(prompt, sample.answer)
            inputs, n_answer = continued(inputs, torch.tensor([tokens]), self.model_type), len(tokens)
        ids = inputs["input_ids"][0]
        vision = self._vision(ids)
        if sample.images and not vision.any():
            raise CalibrationError(self._no_image_tokens())
        return CalibrationInputs(inputs, vision, torch.arange(len(ids)) >= len(ids) - n_answer)

    def processed_size(self, picture: Image) -> tuple[int, int] | None:
        """(width, height) of a picture after the processor, where its outputs tell."""
        prompt = self._templated(1, [""])
        (sizes,) = processed_sizes(self._processor, self._processed([prompt], [(picture,)]), [[picture.size]])
        return sizes[0] if sizes else None

    def _templated(self, n_images: int, said: Sequence[str]) -> str:
        """The conversation up to where the model goes on; what was said is the user's, the model's, the user's, ...

        Pictures stand before the first text.
        """
        conversation = [
            {"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": text}]}
            for i, text in enumerate(said)
        ]
        conversation[0]["content"] = [*({"type": "image"} for _ in range(n_images)), *conversation[0]["content"]]
        return str(self._processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def _processed(self, prompts: Sequence[str], images: Sequence[Sequence[Image]]) -> dict[str, Any]:
        """Inputs of prompts that all have pictures, or none; shorter ones are padded on the left."""
        bos = self._processor.tokenizer.bos_token
        # a template that writes the start token must not get a second one
        special = {"add_special_tokens": False} if bos is not None and prompts[0].startswith(bos) else {}
        pictures = [list(one) for one in images] if images[0] else None
        batch = self._processor(text=list(prompts), images=pictures, return_tensors="pt", padding=True, **special)
        return {name: value for name, value in batch.items() if name != "labels"}  # PaliGemma's processor adds them

    def _answer_tokens(self, prompt: str, answer: str) -> list[int]:
        try:
            (tokens,) = caption_tokens(self._processor.tokenizer, prompt, [answer], self._turn)
        except CaptionError as error:
            raise SampleError(f"the answer {answer!r} cannot be encoded: {error}") from error
        return tokens

    def _vision(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are those of pictures."""
        return ids == self._image_token if self._image_token is not None else torch.zeros_like(ids, dtype=torch.bool)

    def _no_image_tokens(self) -> str:
        return (
            f"calibration: the processor {type(self._processor).__name__} gives pictures no tokens in the text "
            f"(image token {self._image_token} of a {self.model_type} model); its files are older than "
            "transformers 5 wants, or do not belong to this model"
        )

    def _document(self, text: str) -> CalibrationInputs:
        ids = torch.tensor([self._processor.tokenizer(text)["input_ids"][:DOCUMENT_TOKENS]])
        if not ids.numel():
            raise SampleError(f"the text {text[:40]!r} has no tokens")
        nothing = torch.zeros(ids.shape[1], dtype=torch.bool)
        return CalibrationInputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, nothing, nothing.clone())
