"""Fits a Selector: soft targets, one member for each part of the pictures, the epoch chosen by AURC on that part.

After the studies (papers.md 1.7): a two-layer MLP with dropout 0.1, binary cross-entropy on the soft accuracy, Adam
with clipped gradients and polynomial decay, chosen by AURC on pictures that it was not fitted on. What differs from
them (what each choice gave stands in ``benchmarks/selector.py``):

- the MLP is a residual on the logit of the joint probability, so that no epoch is worse than MaxProb by more than luck;
- the validation part goes round: pictures are cut into ``folds`` parts by their hash, member k is chosen on part k and
  fitted on the others, and the members' logits are averaged. Each number of the validation is of the one member that
  was not fitted on the picture; its epoch was chosen there, so that these numbers are slightly too good;
- a layer has 256 units, and a learning rate of 1e-3 with 12 epochs replaces 1e-4 with 128, for 10,000 samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bitquake.metrics import Run, aurc, ece, interval, replicate_jointly
from bitquake.metrics.registry import lookup
from bitquake.metrics.samples import OrderedSamples

from .features import STATES, Features
from .model import (
    Floats,
    Member,
    SelectorError,
    Singles,
    Validation,
    input_width,
    logit,
    network_inputs,
    sigmoid,
)

Ints = npt.NDArray[np.int64]

MIN_SAMPLES = 100
"""Fewest samples of a run that a Selector is fitted on."""
_BINS = 15
_REPLICATES = 1000


@dataclass(frozen=True)
class Options:
    """Hyper-parameters; the defaults are those of ``benchmarks/selector.py``.

    Attributes:
        seed: of the parts, the initial weights, the batches' order, dropout and the projection.
        folds: parts of the pictures, and members; each member is fitted on all parts but one.
        projection: width K of a random projection of the states, for large hidden sizes; None: none.
        limit: samples to fit on, whole pictures, evenly from the runs; None: all.
        hidden: units of each of the two layers.
    """

    seed: int = 0
    folds: int = 5
    epochs: int = 12
    projection: int | None = None
    limit: int | None = None
    hidden: int = 256
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    dropout: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        least = {"folds": 2, "epochs": 1, "projection": 1, "limit": MIN_SAMPLES, "hidden": 1, "batch": 1, "seed": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise SelectorError(f"--{name.replace('_', '-')} {value}: expected at least {smallest}")

    def entries(self) -> dict[str, float | int]:
        """As a card holds them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class TrainingRun(NamedTuple):
    """One run's answered samples of its dev tasks.

    Attributes:
        features: of n samples.
        joint, mean_log_prob: (n,), from ``answer_scalars``.
        target: (n,) in [0, 1], soft accuracy or IoU.
        image: n names of the samples' pictures; equal over runs.
    """

    features: Features
    joint: Floats
    mean_log_prob: Floats
    target: Floats
    image: Sequence[str]

    def rows(self, index: Ints) -> TrainingRun:
        """The samples of an index."""
        arrays = (self.joint[index], self.mean_log_prob[index], self.target[index])
        return TrainingRun(self.features.rows(index), *arrays, [self.image[i] for i in index.tolist()])


class Fitted(NamedTuple):
    """What ``fit_members`` found. ``epochs``: the chosen one of each member, 0 for MaxProb as it stands.

    used: for each run, the index of the samples that it was fitted on.
    """

    members: tuple[Member, ...]
    projection: Singles | None
    validation: Validation
    epochs: tuple[int, ...]
    used: list[Ints]


def image_place(image: str, seed: int) -> float:
    """Where in [0, 1) a picture's hash puts it: parts and subsets are cut there, alike for all runs."""
    digest = hashlib.blake2b(f"{seed}:{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def fit_members(runs: Sequence[TrainingRun], options: Options) -> Fitted:
    """Fit the members; equal inputs, seed and number of torch threads give equal bits.

    Raises:
        SelectorError: too few samples or pictures; states of different widths.
    """
    if len({run.features.first.shape[1] for run in runs}) > 1:
        widths = sorted({run.features.first.shape[1] for run in runs})
        raise SelectorError(f"the runs' states have different widths ({widths}): they are of different models")
    used = [_subset(run, options, len(runs)) for run in runs]
    runs = [run.rows(index) for run, index in zip(runs, used, strict=True)]
    for run in runs:
        images = len(set(run.image))
        if len(run.target) < MIN_SAMPLES or images < 2 * options.folds:
            raise SelectorError(
                f"{len(run.target)} answered samples on {images} pictures are too few: a selector needs {MIN_SAMPLES} "
                f"samples on {2 * options.folds} pictures at least; thousands are the practical size"
            )
    width = runs[0].features.first.shape[1]
    projection = _projection(len(STATES) * width, options)
    inputs = np.concatenate([network_inputs(r.features, r.joint, r.mean_log_prob, projection) for r in runs])
    base = np.concatenate([logit(run.joint) for run in runs])
    target = np.concatenate([run.target for run in runs])
    place = np.array([image_place(image, options.seed) for run in runs for image in run.image])
    fold = np.floor(place * options.folds).astype(np.int64)
    source = np.repeat(np.arange(len(runs)), [len(run.target) for run in runs])

    held_out = np.full(len(target), np.nan)
    members, epochs = [], []
    for k in range(options.folds):
        mine = fold == k
        if not mine.any() or mine.all():
            raise SelectorError(f"part {k + 1} of {options.folds} of the pictures is empty; give fewer --folds")
        parts = Part(inputs[~mine], base[~mine], target[~mine]), Part(inputs[mine], base[mine], target[mine])
        member, epoch = _fit_one(*parts, source[mine], options, options.seed * 1009 + k)
        members.append(member)
        epochs.append(epoch)
        held_out[mine] = sigmoid(member.logits(inputs[mine].astype(np.float64), base[mine]))
    validation = _validate([held_out[source == i] for i in range(len(runs))], runs, options.seed)
    return Fitted(tuple(members), projection, validation, tuple(epochs), used)


class Part(NamedTuple):
    """Samples as the network sees them: inputs (n, i), logit of the joint probability (n,), target (n,)."""

    inputs: Singles
    base: Floats
    target: Floats


class _Network(nn.Module):
    def __init__(self, inputs: int, options: Options) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, options.hidden)
        self.second = nn.Linear(options.hidden, options.hidden)
        self.last = nn.Linear(options.hidden, 1)
        self.dropout = nn.Dropout(options.dropout)
        self.scale = nn.Parameter(torch.ones(1))
        self.offset = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.last.weight)  # it begins as MaxProb
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor, base: Tensor) -> Tensor:
        hidden = torch.relu(self.dropout(self.first(inputs)))
        hidden = torch.relu(self.dropout(self.second(hidden)))
        logits: Tensor = self.last(hidden)[:, 0] + self.scale * base + self.offset
        return logits

    def member(self) -> Member:
        def doubles(tensor: Tensor) -> Floats:
            array: Floats = tensor.detach().double().numpy().copy()
            return array

        one, two, three = self.first, self.second, self.last
        weights = doubles(one.weight), doubles(two.weight), doubles(three.weight)
        biases = doubles(one.bias), doubles(two.bias), doubles(three.bias)
        return Member(weights, biases, doubles(self.scale), doubles(self.offset))


def _fit_one(train: Part, judge: Part, source: Ints, options: Options, seed: int) -> tuple[Member, int]:
    """One member, at the epoch with the least AURC on ``judge`` (the mean over runs); the earliest of equals."""
    inputs, base, target = (torch.from_numpy(array.astype(np.float32)) for array in train)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _Network(inputs.shape[1], options)
        # decay would pull MaxProb's own share, scale and offset, to nothing
        optimizer = torch.optim.Adam(
            [
                {"params": [*_parameters(network)], "weight_decay": options.weight_decay},
                {"params": [network.scale, network.offset], "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
        )
        steps = options.epochs * math.ceil(len(target) / options.batch)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=1.0)
        loss = nn.BCEWithLogitsLoss()
        best, chosen = network.member(), 0
        least = _area(best, judge, source)
        for epoch in range(1, options.epochs + 1):
            network.train()
            for rows in torch.split(torch.randperm(len(target), generator=generator), options.batch):
                optimizer.zero_grad()
                loss(network(inputs[rows], base[rows]), target[rows]).backward()
                nn.utils.clip_grad_norm_(network.parameters(), options.clip)
                optimizer.step()
                schedule.step()
            member = network.member()
            area = _area(member, judge, source)
            if area < least:
                best, chosen, least = member, epoch, area
    return best, chosen


def _parameters(network: _Network) -> Iterator[Tensor]:
    for layer in (network.first, network.second, network.last):
        yield from layer.parameters()


def _area(member: Member, judge: Part, source: Ints) -> float:
    confidence = sigmoid(member.logits(judge.inputs.astype(np.float64), judge.base))
    each = [aurc(judge.target[source == i], confidence[source == i]) for i in np.unique(source)]
    return float(np.mean(each))


def _subset(run: TrainingRun, options: Options, n_runs: int) -> Ints:
    """Whole pictures, in the order of their hash, up to this run's share of the limit."""
    n = len(run.target)
    if options.limit is None or n * n_runs <= options.limit:
        return np.arange(n)
    # another seed than the parts', or the subset would lie in the first of them
    place = {image: image_place(image, options.seed + 1) for image in set(run.image)}
    order = sorted(range(n), key=lambda i: (place[run.image[i]], i))
    end = options.limit // n_runs
    while 0 < end < n and run.image[order[end]] == run.image[order[end - 1]]:
        end -= 1
    return np.sort(np.array(order[:end], dtype=np.int64))


def _projection(width: int, options: Options) -> Singles | None:
    """(width, K) Gaussian, scaled so that normalised states keep unit variance; None without one."""
    if options.projection is None:
        return None
    generator = torch.Generator().manual_seed(options.seed)
    matrix: Singles = (torch.randn(width, options.projection, generator=generator) / math.sqrt(width)).numpy()
    return matrix


def _validate(confidence: Sequence[Floats], runs: Sequence[TrainingRun], seed: int) -> Validation:
    """Means over runs; pictures are redrawn for all of them at once."""

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values))

    conditions = [
        [Run(OrderedSamples(run.target, each, list(run.image)), None) for each in (own, run.joint)]
        for run, own in zip(runs, confidence, strict=True)
    ]
    drawn = replicate_jointly(conditions, lookup(["aurc"]), replicates=_REPLICATES, seed=seed)
    ours, plain = (mean([float(one.values[i, 0]) for one in drawn]) for i in (0, 1))
    draws: Floats = np.mean([one.draws[0, 0] - one.draws[1, 0] for one in drawn], axis=0)
    n_images = len({image for run in runs for image in run.image})
    lo, hi, _ = interval(ours - plain, draws, n_images, 0.95, (-1.0, 1.0))
    return Validation(
        n=sum(len(run.target) for run in runs),
        n_images=n_images,
        aurc=ours,
        aurc_maxprob=plain,
        ece=mean([ece(run.target, own, bins=_BINS) for run, own in zip(runs, confidence, strict=True)]),
        ece_maxprob=mean([ece(run.target, run.joint, bins=_BINS) for run in runs]),
        aurc_difference=None if np.isnan([lo, hi]).any() else (ours - plain, lo, hi),
    )


def check_width(hidden_size: int, options: Options) -> int:
    """Inputs of a network for states of this width.

    Raises:
        SelectorError: a projection that widens.
    """
    if options.projection is not None and options.projection >= len(STATES) * hidden_size:
        raise SelectorError(
            f"--project {options.projection}: the states have {len(STATES) * hidden_size} numbers; give fewer, or none"
        )
    return input_width(hidden_size, options.projection)
