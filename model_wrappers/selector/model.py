"""The Selector: a small network that reads how sure a model's hidden states look, in one safetensors file.

The studies' learned confidence (papers.md 1.7; arXiv 2204.13631, 2306.08751). Inputs are the pooled states of a sample
(``features``), the joint probability of its answer and the mean log-probability of the answer's tokens; the output is
the accuracy to expect, in [0, 1]. The network is a residual on the joint probability:

    logit = scale * logit(joint) + offset + MLP(LayerNorm(image), LayerNorm(question), LayerNorm(first), scalars)

so that MaxProb is where it starts from, and what it falls back to where the states tell nothing. A file holds several
members, each fitted on another part of the pictures (``training``); their logits are averaged.

Prediction is numpy in float64 on states rounded to float16 as they are stored, so that a sample gets the same
confidence live, in whatever batch, and from its saved features. Reading and applying a Selector needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitquake.quant_card import QuantCard

from ..calibration.overlap import PIXELS, OverlapError, ids_hash
from .features import STATES, Features, as_stored

SELECTOR_VERSION = 1
NAMES = ("selector", "selector_transfer", "selector_mixture")
"""Names of the confidences: fitted on the very quantization that it judges, on the full-precision model, on a mixture
of bit widths."""
OWN = "selector"
SCALARS = 3
"""Inputs besides the states: logit of the joint probability, mean log-probability, whether there is a picture."""

_META = "bitquake"
_CLIP = 1e-6
"""Probabilities are kept that far from 0 and 1 before their logit: float32 log-probabilities are not exacter."""
_NORM_EPSILON = 1e-5
_ROWS = 4096
"""Samples predicted at a time."""

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]


class SelectorError(ValueError):
    """A Selector that cannot be fitted, read, or applied to these answers."""


class TrainedOn(BaseModel):
    """One run that a Selector was fitted on. ``weights_hash`` is the same for every device and execution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant: str
    model_hash: str
    weights_hash: str
    tasks: list[str]
    n: int


class Validation(BaseModel):
    """AURC (a fraction, lower is better) and ECE on pictures that the judging member was not fitted on.

    aurc_difference: Selector minus MaxProb, its 95 % interval by the bootstrap clustered by picture (None: undefined).
    With several runs the first three are means over them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    n_images: int
    aurc: float
    aurc_maxprob: float
    ece: float
    ece_maxprob: float
    aurc_difference: tuple[float, float, float] | None = None


class SelectorCard(BaseModel):
    """What a Selector file says of itself (JSON in its metadata).

    Attributes:
        name: name of the confidence that it gives (``NAMES``).
        subject: the model whose answers it judges, as ``QuantCard.subject``.
        states: the pooled states that it reads, in the order of its inputs.
        hidden_size: width d of each of them.
        joint: the confidence that is its joint probability and its MaxProb baseline: the tasks' primary one
            (``joint``; ``options`` for choices, ``box_joint`` for boxes). It judges no task of another one.
        target: what it predicts: the record's ``score``, or ``iou`` of the predicted box.
        projection: width K of the random projection of the states, or None.
        trained_on: the runs.
        datasets_hash: hash over their datasets, revisions and splits.
        image_ids_hash: hash of the pictures' names (``calibration.overlap``).
        options: hyper-parameters, and the number of torch threads, which with the seed decide the bits.
        n_left_out: samples of these runs without an answer, a confidence or features, by reason.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["selector"] = "selector"
    version: Literal[1] = 1
    name: str
    subject: str
    states: tuple[str, ...] = STATES
    hidden_size: int = Field(gt=0)
    joint: str
    target: Literal["score", "iou"] = "score"
    projection: int | None = None
    trained_on: list[TrainedOn]
    datasets_hash: str
    image_ids_hash: str
    validation: Validation
    options: dict[str, float | int]
    n_left_out: dict[str, int] = Field(default_factory=dict)
    bitquake: str


@dataclass(frozen=True)
class Member:
    """One fitted network: ``weights`` (out, in) and ``biases`` (out,) of its three layers, scale and offset (1,)."""

    weights: tuple[Floats, Floats, Floats]
    biases: tuple[Floats, Floats, Floats]
    scale: Floats
    offset: Floats

    def fits(self, inputs: int) -> bool:
        """Whether the layers fit one another and that many inputs, and hold finite numbers only."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if weight.shape != (bias.size, inputs):
                return False
            inputs = bias.size
        arrays = (*self.weights, *self.biases, self.scale, self.offset)
        return inputs == 1 and all(np.isfinite(array).all() for array in arrays)

    def logits(self, inputs: Floats, joint_logit: Floats) -> Floats:
        """(n, inputs), (n,) -> (n,)."""
        hidden = inputs
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = np.maximum(hidden @ weight.T + bias, 0.0)
        last: Floats = (hidden @ self.weights[-1].T + self.biases[-1])[:, 0]
        result: Floats = last + self.scale * joint_logit + self.offset
        return result


@dataclass(frozen=True)
class Selector:
    """A fitted Selector.

    Attributes:
        card: what it says of itself.
        members: the networks whose logits are averaged.
        projection: (3 d, K) random projection of the normalised states, or None.
        image_ids: names of the pictures that it was fitted on, comparable with ``document_image_ids``.
    """

    card: SelectorCard
    members: tuple[Member, ...]
    projection: Singles | None
    image_ids: frozenset[str]

    @property
    def name(self) -> str:
        """Name of the confidence that it gives."""
        return self.card.name

    def renamed(self, name: str) -> Selector:
        """The same network under another name of ``NAMES``, as the full-precision model's own and its transfer."""
        return replace(self, card=self.card.model_copy(update={"name": check_name(name)}))

    def predict(self, features: Features, joint: npt.ArrayLike, mean_log_prob: npt.ArrayLike) -> Floats:
        """(n,) confidences in [0, 1]; NaN where an input of the sample is missing or not finite.

        Args:
            features: of n samples, as the model gave them or as ``load_features`` read them.
            joint, mean_log_prob: (n,), from :func:`answer_scalars`; NaN where the answer has none.

        Raises:
            SelectorError: states of another width.
        """
        n, width = features.first.shape
        if n and width != self.card.hidden_size:
            raise SelectorError(
                f"{self.name}: fitted on states of {self.card.hidden_size} numbers ({self.card.subject}), got {width}: "
                "these features are of another model"
            )
        joints, means = np.asarray(joint, dtype=np.float64), np.asarray(mean_log_prob, dtype=np.float64)
        confidence = np.full(n, np.nan)
        for begin in range(0, n, _ROWS):
            part = slice(begin, begin + _ROWS)
            inputs = network_inputs(features.rows(part), joints[part], means[part], self.projection).astype(np.float64)
            whole: npt.NDArray[np.bool_] = np.asarray(np.isfinite(inputs).all(axis=1))
            base = logit(joints[part])[whole]
            logits = np.mean([member.logits(inputs[whole], base) for member in self.members], axis=0)
            confidence[part][whole] = sigmoid(logits)
        return confidence

    def check_model(self, card: QuantCard, hidden_size: int | None = None) -> None:
        """Raise for a model that this Selector was not made for.

        Args:
            card: the model's quant card.
            hidden_size: width of its states, where it is known before the first of them.

        Raises:
            SelectorError: another model, another width, or, for a quantization's own Selector, other weights.
        """
        if card.subject != self.card.subject:
            raise SelectorError(f"{self.name}: fitted on {self.card.subject}; this run is of {card.subject}")
        if hidden_size is not None and hidden_size != self.card.hidden_size:
            raise SelectorError(
                f"{self.name}: fitted on states of {self.card.hidden_size} numbers, those of {card.subject} have "
                f"{hidden_size}"
            )
        if not self.is_for(card):
            trained = ", ".join(one.quant for one in self.card.trained_on)
            raise SelectorError(
                f"{self.name}: fitted on {trained}, and this run is of {card.spec_name}, or of other weights. Fit one "
                "on its own *_dev run, or call this one selector_transfer (bitquake selector fit --name)"
            )

    def is_for(self, card: QuantCard) -> bool:
        """Whether a run of this model is what it is called for: its own weights, or any under another name."""
        return self.name != OWN or any(one.weights_hash == card.weights_hash for one in self.card.trained_on)

    def refuse_overlap(self, image_ids: Iterable[str], where: str) -> None:
        """Raise when one of a sample's pictures is among those that the Selector was fitted on.

        Args:
            image_ids: names of the sample's pictures (``calibration.overlap.document_image_ids``, :func:`image_names`).
            where: the sample, as the message calls it.

        Raises:
            OverlapError: it is.
        """
        common = sorted(self.image_ids.intersection(image_ids))
        if common:
            raise OverlapError(
                f"{where}: its picture {common[0]} is one of those that {self.name} was fitted on "
                f"({', '.join(sorted({t for one in self.card.trained_on for t in one.tasks}))}), so its confidence "
                "there would not be that of unseen pictures. Evaluate another split, or fit on one that is disjoint by "
                "image: a family's *_dev task"
            )

    def save(self, path: Path) -> Path:
        """Write one safetensors file, atomically; equal Selectors give equal bytes.

        Raises:
            OSError: the folder cannot be written.
        """
        from safetensors.numpy import save_file

        from bitquake.tasks.sources import replacing

        tensors: dict[str, Any] = {}
        for number, member in enumerate(self.members):
            for layer, (weight, bias) in enumerate(zip(member.weights, member.biases, strict=True)):
                tensors[f"member.{number}.layer.{layer}.weight"] = weight.astype(np.float32)
                tensors[f"member.{number}.layer.{layer}.bias"] = bias.astype(np.float32)
            tensors[f"member.{number}.scale"] = member.scale.astype(np.float32)
            tensors[f"member.{number}.offset"] = member.offset.astype(np.float32)
        if self.projection is not None:
            tensors["projection"] = self.projection
        names = json.dumps(sorted(self.image_ids)).encode()
        tensors["image_ids"] = np.frombuffer(names, dtype=np.uint8).copy()
        with replacing(path) as new:
            save_file(tensors, str(new), metadata={_META: self.card.model_dump_json()})
        return path

    @classmethod
    def load(cls, path: Path) -> Selector:
        """Read a file of :meth:`save`.

        Raises:
            SelectorError: no such file, or none of ours, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                said = json.loads((file.metadata() or {})[_META])
                if not isinstance(said, dict) or said.get("kind") != "selector":
                    raise SelectorError(f"{path}: is no selector (`bitquake selector fit` writes them)")
                if said.get("version") != SELECTOR_VERSION:
                    raise SelectorError(
                        f"{path}: a selector of version {said.get('version')!r}, this Bitquake reads "
                        f"{SELECTOR_VERSION}; fit it again"
                    )
                card = SelectorCard.model_validate(said)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SelectorError:
            raise
        except (OSError, SafetensorError) as error:
            what = "is not there" if not Path(path).exists() else f"cannot be read ({error})"
            raise SelectorError(f"{path}: {what}; give a file that `bitquake selector fit` wrote") from error
        except (KeyError, ValidationError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SelectorError(f"{path}: is no selector, or a damaged one ({reason}); fit it again") from error
        try:
            return cls._from_tensors(card, tensors)
        except (KeyError, ValueError) as error:
            raise SelectorError(
                f"{path}: its tensors do not fit what it says of itself ({error}); fit it again"
            ) from error

    @classmethod
    def _from_tensors(cls, card: SelectorCard, tensors: Mapping[str, Any]) -> Selector:
        projection = tensors["projection"] if card.projection is not None else None
        members = []
        number = 0
        while f"member.{number}.scale" in tensors:
            name = f"member.{number}."
            doubles = {
                key.removeprefix(name): value.astype(np.float64)
                for key, value in tensors.items()
                if key.startswith(name)
            }
            weights, biases = (tuple(doubles[f"layer.{i}.{what}"] for i in range(3)) for what in ("weight", "bias"))
            members.append(Member(weights, biases, doubles["scale"], doubles["offset"]))
            number += 1
        inputs = input_width(card.hidden_size, card.projection)
        if not members or not all(member.fits(inputs) for member in members):
            raise ValueError(f"expected networks of {inputs} inputs and finite weights")
        if projection is not None and projection.shape != (len(STATES) * card.hidden_size, card.projection):
            raise ValueError(f"a projection of shape {projection.shape}")
        names = frozenset(json.loads(tensors["image_ids"].tobytes()))
        if ids_hash(names) != card.image_ids_hash:
            raise ValueError("the pictures' names are not those of its image_ids_hash")
        return cls(card, tuple(members), projection, names)


def check_name(name: str) -> str:
    """A name of ``NAMES``.

    Raises:
        SelectorError: it is none.
    """
    if name not in NAMES:
        raise SelectorError(f"--name {name}: expected one of {', '.join(NAMES)}")
    return name


def logit(probability: Floats) -> Floats:
    """log(p / (1 - p)), p kept 1e-6 away from 0 and 1; NaN stays NaN."""
    clipped = np.clip(probability, _CLIP, 1 - _CLIP)
    result: Floats = np.log(clipped) - np.log1p(-clipped)
    return result


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(logits))
    result: Floats = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return result


def answer_scalars(confidence: Mapping[str, float | None], joint: str) -> tuple[float, float]:
    """Joint probability and mean log-probability of an answer, NaN where there is none.

    An empty answer has no mean; that of its end token stands for it.

    Args:
        confidence: of an envelope or a record.
        joint: ``SelectorCard.joint``.
    """
    primary, mean = confidence.get(joint), confidence.get("geometric_mean")
    if primary is None:
        return np.nan, np.nan
    least = float(np.finfo(np.float64).tiny)
    return primary, float(np.log(max(least, primary if mean is None else mean)))


def input_width(hidden_size: int, projection: int | None) -> int:
    """Number of a network's inputs."""
    return (len(STATES) * hidden_size if projection is None else projection) + SCALARS


def network_inputs(features: Features, joint: Floats, mean_log_prob: Floats, projection: Singles | None) -> Singles:
    """(n, inputs): the states, rounded as they are stored, normalised one by one, projected; then the scalars.

    Each state is normalised over its own numbers (LayerNorm without parameters): a residual stream has outliers of
    its own in each model, and INT3's are not those of full precision. A missing picture's state is all zeros.
    """
    parts = []
    for states in features[:3]:
        values = as_stored(states)[0].astype(np.float32)
        centred = values - values.mean(axis=1, keepdims=True)
        parts.append(centred / np.sqrt(centred.var(axis=1, keepdims=True) + _NORM_EPSILON))
    normal: Singles = np.concatenate(parts, axis=1)
    if projection is not None:
        normal = normal @ projection
    scalars = np.stack([logit(joint), mean_log_prob, features.has_image.astype(np.float64)], axis=1)
    inputs: Singles = np.concatenate([normal, scalars.astype(np.float32)], axis=1)
    return inputs


def image_names(dataset: str, image_id: str, pixel_hash: Sequence[str]) -> set[str]:
    """Names of a record's pictures, as ``document_image_ids`` gives them for the row."""
    return {f"{dataset}:{image_id}", *(PIXELS + one for one in pixel_hash)}
