"""GRACE's distillation losses (arXiv 2601.22709; papers.md 3.1): of answers, and of relations between visual tokens.

All in float32 (float64 stays), whatever the models compute in. Logits are those of label positions alone, (N, V).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LEAST_TOKENS = 4
"""Pictures of fewer visual tokens say nothing about relations."""
DEGENERATE = 1e-8
"""Least <K, K> of a centred Gram matrix; below it, all tokens of a picture are one."""


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def confidence_gate(teacher: Tensor) -> Tensor:
    """``exp(-H / log V)`` of the teacher's own distributions (temperature 1): 1 where it is sure, 1/e where it guesses.

    Args:
        teacher: logits (N, V).

    Returns:
        (N,)
    """
    entropy = torch.special.entr(wide(teacher).softmax(-1)).sum(-1)
    return torch.exp(-entropy / math.log(teacher.shape[-1]))


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || student)`` of the softened distributions (Hinton et al. 2015).

    Args:
        student, teacher: logits (N, V).

    Returns:
        (N,)
    """
    ours, theirs = (wide(logits) / temperature for logits in (student, teacher))
    p = theirs.softmax(-1)
    cross = (p * ours).sum(-1) - ours.logsumexp(-1)
    result: Tensor = temperature**2 * (-torch.special.entr(p).sum(-1) - cross)
    return result


def decoupled_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence's two parts (decoupled knowledge distillation, Zhao et al. 2022, arXiv 2203.08679).

    ``KL = TCKD + (1 - p_y) NCKD`` with the teacher's p: of the pair (label, everything else), and of the distributions
    over everything else. No probability is taken from 1, so that a sure model's are exact.

    Args:
        student, teacher: logits (N, V).
        labels: int64 (N,).

    Returns:
        TCKD and NCKD, each (N,), of softened distributions and not times T^2.
    """
    ours, theirs = (wide(logits) / temperature for logits in (student, teacher))
    label = labels.unsqueeze(-1)
    our_label, their_label = (logits.gather(-1, label).squeeze(-1) for logits in (ours, theirs))
    our_rest, their_rest = (logits.scatter(-1, label, -torch.inf).logsumexp(-1) for logits in (ours, theirs))
    target = torch.zeros_like(our_rest)
    for sign in (1, -1):  # log p of the label is the log sigmoid of how far it is above the rest
        ours_log, theirs_log = (
            functional.logsigmoid(sign * (one - rest))
            for one, rest in ((our_label, our_rest), (their_label, their_rest))
        )
        target = target + theirs_log.exp() * (theirs_log - ours_log)
    p = theirs.scatter(-1, label, -torch.inf).softmax(-1)
    others = -torch.special.entr(p).sum(-1) - ((p * ours).sum(-1) - our_rest)
    return target, others


def relational_loss(student: Tensor, teacher: Tensor, visual: Tensor) -> tuple[Tensor, int]:
    """``1 - CKA`` between the relations of a picture's tokens in two models (RCKA), averaged over pictures.

    A picture is a run of visual tokens (a tile of one, where a processor puts tokens between tiles). Its rows are
    l2-normalised, ``K = V V^T`` is centred on both sides, and
    ``CKA = <K_t, K_s> / sqrt(<K_t, K_t> <K_s, K_s>)`` (Kornblith et al. 2019). Pictures of fewer than ``LEAST_TOKENS``
    tokens, and those where a ``<K, K>`` is below ``DEGENERATE``, are left out.

    Args:
        student, teacher: hidden states (B, T, d) of one layer; their d may differ.
        visual: bool (B, T).

    Returns:
        The loss, 0 without pictures, and the number of pictures.
    """
    rows = _runs(visual)
    if not len(rows):
        return student.new_zeros((), dtype=wide(student).dtype), 0
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_centred_gram(wide(states).flatten(0, 1), rows) for states in (student, teacher))
        cross, own, other = ((a * b).sum((1, 2)) for a, b in ((ours, theirs), (ours, ours), (theirs, theirs)))
        kept = (own >= DEGENERATE) & (other >= DEGENERATE)
        # where, and not a choice afterwards: the gradient of what is left out must not be 0/0
        cka = torch.where(kept, cross, 0.0) / torch.where(kept, own * other, 1.0).sqrt()
        n = kept.sum()
        return (n - cka.sum()) / n.clamp(min=1), int(n)


def _runs(visual: Tensor) -> Tensor:
    """Runs of at least ``LEAST_TOKENS`` visual positions: flat positions int64 (runs, longest), filled up with -1."""
    edges = functional.pad(visual.to(torch.int8), (1, 1)).diff(dim=1)  # (B, T + 1)
    begins, ends = (edges == 1).nonzero(), (edges == -1).nonzero()  # in the same order: row by row
    lengths = ends[:, 1] - begins[:, 1]
    kept = lengths >= LEAST_TOKENS
    first, lengths = (begins[:, 0] * visual.shape[1] + begins[:, 1])[kept], lengths[kept]
    if not len(first):
        return first.new_empty((0, 0))
    steps = torch.arange(int(lengths.max()), device=visual.device)
    return torch.where(steps < lengths.unsqueeze(1), first.unsqueeze(1) + steps, -1)


def _centred_gram(states: Tensor, rows: Tensor) -> Tensor:
    """``H V V^T H`` of each run, (runs, longest, longest); V is states (positions, d) l2-normalised, absent rows 0."""
    there = (rows >= 0).unsqueeze(-1)
    values = functional.normalize(states[rows.clamp(min=0)], dim=-1) * there
    centred = (values - values.sum(1, keepdim=True) / there.sum(1, keepdim=True)) * there
    return centred @ centred.transpose(1, 2)
