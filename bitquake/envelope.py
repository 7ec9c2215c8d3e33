"""The response envelope: an answer, its confidences and what the model saw, as one versioned JSON text.

lmms-eval hands nothing but text from a model to a task: everything else is dropped when responses are unwrapped,
cached, logged or gathered from other ranks. So the wrappers put what belongs to an answer into the text itself.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ENVELOPE_VERSION = 1
_PREFIX = '{"bitquake_envelope":'

CONFIDENCES = ("joint", "joint_no_eos", "geometric_mean", "minimum", "first_token", "margin")
"""Confidences of every generated answer, each in [0, 1] (papers.md 1.4); choices and boxes add to them.

joint: product of the probabilities of the answer tokens and of the end-of-sequence token; joint_no_eos: without the
latter; geometric_mean: exp(mean log-probability); minimum: least token probability; first_token: probability of the
first answer token; margin: first token's probability minus that of the runner-up.
Further names: ``options`` (softmax over the option letters at the first answer position, probability of the chosen
one), ``box_joint``, ``box_geometric_mean``, ``box_minimum`` (the coordinate tokens only), ``candidates`` (retrieval:
softmax over the candidates' scores, probability of the first-ranked one).
"""


class Envelope(BaseModel):
    """One answer of a Bitquake wrapper.

    Attributes:
        version: envelope version, ``ENVELOPE_VERSION``.
        text: the decoded answer, special tokens removed.
        confidence: name -> probability in [0, 1], or None where it is not defined for this answer.
        option_probabilities: letter -> probability at the first answer position, softmax over the letters only.
        candidate_scores: retrieval: summed log-probability (or matching score) of each candidate, in the row's order.
        candidate_kind: ``log_probability``, or ``matching`` where a model's own image-text matching head gave them.
        entropy_first: entropy of the first answer token's distribution, in nats.
        n_tokens: number of generated tokens, end-of-sequence token included.
        truncated: True when generation stopped at the token limit, not at an end-of-sequence token.
        pixel_hash: hash (``bitquake.noise.pixel_hash``) of each image that was handed to the processor, after noise.
        image_sizes: (width, height) of each such image, in pixels.
        processed_sizes: (width, height) of each image as the model's processor resized it, in pixels; empty when the
            processor does not tell.
        prompt_hash: blake2 hex of the templated prompt text.
        model_hash: hash of the weights as loaded and of the quantization spec (``QuantCard.model_hash``).
        card: hash under which the quant card lies in the artifacts folder; a full-precision model has one too.
        model_type: architecture as transformers names it (``idefics3``, ``qwen2_vl``, …); decides how boxes are read.
        features: name of the states that a Selector reads (hash of model, prompt and pixels) in the artifacts folder's
            ``features/<model_hash>``; "" where they were not kept.
        error: None, or why there is no answer (then ``text`` is "" and no confidence is given).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = ENVELOPE_VERSION
    text: str
    confidence: dict[str, float | None] = Field(default_factory=dict)
    option_probabilities: dict[str, float] | None = None
    candidate_scores: list[float] | None = None
    candidate_kind: Literal["log_probability", "matching"] | None = None
    entropy_first: float | None = None
    n_tokens: int = 0
    truncated: bool = False
    pixel_hash: list[str] = Field(default_factory=list)
    image_sizes: list[tuple[int, int]] = Field(default_factory=list)
    processed_sizes: list[tuple[int, int]] = Field(default_factory=list)
    prompt_hash: str = ""
    model_hash: str = ""
    card: str = ""
    model_type: str = ""
    features: str = ""
    error: str | None = None

    def encode(self) -> str:
        """Return the envelope as one line of JSON that ``decode`` recognises."""
        return _PREFIX + self.model_dump_json() + "}"


class EnvelopeError(ValueError):
    """A text that announces itself as an envelope but is none that this version can read."""


def is_envelope(text: str) -> bool:
    """True when ``text`` announces itself as an envelope (whether or not it is a valid one)."""
    return text.lstrip().startswith(_PREFIX)


def decode(text: str) -> Envelope:
    """Read a response: an envelope, or plain text of any other model (then without confidences).

    Raises:
        EnvelopeError: the text begins like an envelope but is cut short, or is of another version.
    """
    if not is_envelope(text):
        return Envelope(text=text)
    try:
        payload: Any = json.loads(text)["bitquake_envelope"]
        version = payload.get("version") if isinstance(payload, dict) else None
        if version != ENVELOPE_VERSION:
            raise EnvelopeError(
                f"response envelope: expected version {ENVELOPE_VERSION}, got {version!r}; "
                "re-run the model with this version of bitquake, or read the run with the version that wrote it"
            )
        return Envelope.model_validate(payload)
    except EnvelopeError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, numbers or nesting past Python's limits, other fields
        raise EnvelopeError(
            f"response envelope is damaged ({error}); got {text[:80]!r}…; re-run this sample"
        ) from error
