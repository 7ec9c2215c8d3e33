"""The sample record: one scored answer, as it stands in lmms-eval's sample log under the key ``RECORD_KEY``."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RECORD_VERSION = 1
RECORD_KEY = "bitquake"
"""Key of the record in a line of lmms-eval's ``*_samples_*.jsonl`` (it is a metric of the task)."""

Protocol = Literal["vqa", "choice", "grounding", "caption", "retrieval", "stock"]
"""``stock``: the scorer of the lmms-eval task that a family extends."""
IMPORTER = "bitquake_import"
"""What the results file of imported answers names as the model, where lmms-eval's name a class of model."""
Failure = Literal["image", "question", "envelope", "model", "target"]
"""What made a sample fail: an unreadable image, an empty question, a damaged envelope, an error inside the model, or a
reference answer that cannot be scored. A failed sample scores 0, has no confidence, and is counted by name."""


def question_hash(question: str) -> str:
    """blake2b of a question, as 32 hex digits; "" for no question."""
    if not question:
        return ""
    return hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class SampleRecord(BaseModel):
    """One scored sample.

    Attributes:
        version: record version, ``RECORD_VERSION``.
        family, variant, task: ``block_vqav2``, ``gaussian_noise_3`` (or ``clean``, ``threshold``, ``dev``, a shift's
            name), and the registered task name.
        world: ``block`` for the offline block world, ``real`` otherwise; the two never share a table.
        dataset, split: dataset id or file stem, and split.
        dataset_revision: what was read: the commit of a dataset of the hub, or the hash of the file ("" when unknown).
        part: how the task's rows were chosen from the split, for people ("" for the whole split).
        shift_from: the task that is in distribution for this one ("" where this one is itself): ``vqav2_clean``.
        sample_id, image_id: ids that the family declares; ``image_id`` is the cluster of the bootstrap.
        protocol: scoring protocol; ``scored`` where an imported table brought the scores.
        score: in [0, 1]; soft accuracy for ``vqa``, 0/1 for ``choice``, 1[IoU >= 0.5] for ``grounding``,
            CIDEr-D / 10 for ``caption``, 1[true caption ranked first] for ``retrieval``.
        scores: further scores of the protocol (``strict``, ``lenient``, ``letter``, ``iou``, …), each in [0, 1].
        answer: parsed answer; text: the model's text.
        parse_failure: no answer of the expected form was found in the text (scored 0, counted).
        failure, failure_detail: see ``Failure``.
        confidence: name -> probability in [0, 1] or None; ``primary_confidence`` names the headline one.
        noise: ``NoiseSpec`` as a mapping, or None for clean images.
        pixel_hash, prompt_hash, model_hash, card: from the envelope; empty for models that answer with plain text.
        subset: hash of the ids that the task evaluates ("" when it evaluates the whole split).
        question_hash: ``question_hash`` of the question as the model got it, after text noise and without the prompt's
            own words; "" where rows have none.
        features: name under which the model's states for this answer lie in the artifacts folder ("" where none were
            asked for); see ``Envelope.features``.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = RECORD_VERSION
    family: str
    variant: str
    task: str
    world: Literal["block", "real"]
    dataset: str
    split: str
    dataset_revision: str = ""
    part: str = ""
    shift_from: str = ""
    sample_id: str
    image_id: str
    protocol: Protocol | Literal["scored"]
    score: float = Field(ge=0.0, le=1.0)
    scores: dict[str, float] = Field(default_factory=dict)
    answer: str | None = None
    text: str = ""
    parse_failure: bool = False
    failure: Failure | None = None
    failure_detail: str = ""
    confidence: dict[str, float | None] = Field(default_factory=dict)
    primary_confidence: str = "joint"
    noise: dict[str, str | int] | None = None
    pixel_hash: list[str] = Field(default_factory=list)
    prompt_hash: str = ""
    model_hash: str = ""
    card: str = ""
    subset: str = ""
    n_tokens: int = 0
    truncated: bool = False
    question_hash: str = ""
    features: str = ""

    @property
    def primary(self) -> float | None:
        """The headline confidence, or None where the model gave none."""
        return self.confidence.get(self.primary_confidence)
