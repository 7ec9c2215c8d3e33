"""Distillation losses against numbers by hand, literal loops, finite differences and what CKA promises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitquake.model_wrappers.training.distillation import (
    confidence_gate,
    decoupled_divergence,
    divergence,
    relational_loss,
)


def logits(*probabilities: Sequence[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def random_logits(seed: int, n: int, v: int, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(n, v, generator=rng, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(v, (n,), generator=rng)


# by hand


def test_gate_of_a_sure_and_of_a_guessing_teacher() -> None:
    # entropies 0, log 4, and that of (1/2, 1/4, 1/4, 0): 1/2 log 2 + 1/2 log 4 = 3/4 log 4
    gate = confidence_gate(logits((1, 0, 0, 0), (0.25, 0.25, 0.25, 0.25), (0.5, 0.25, 0.25, 0)))
    assert gate.tolist() == pytest.approx([1.0, math.exp(-1), math.exp(-0.75)])


def test_decoupled_divergence_by_hand() -> None:
    teacher, student = logits((0.5, 0.25, 0.25)), logits((0.25, 0.25, 0.5))
    target, others = decoupled_divergence(student, teacher, torch.tensor([0]), 1.0)
    # pairs (1/2, 1/2) and (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3
    assert target.item() == pytest.approx(0.5 * math.log(4 / 3))
    # the rest (1/2, 1/2) and (1/3, 2/3): 1/2 log 3/2 + 1/2 log 3/4 = 1/2 log 9/8
    assert others.item() == pytest.approx(0.5 * math.log(9 / 8))
    # another label: pairs (1/4, 3/4) and (1/2, 1/2); the rest (2/3, 1/3) and (1/2, 1/2)
    target, others = decoupled_divergence(student, teacher, torch.tensor([2]), 1.0)
    assert target.item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert others.item() == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3))


def test_temperature_by_hand() -> None:
    # probabilities 4/5 and 1/5 soften at T = 2 to 2/3 and 1/3
    teacher, student = logits((0.8, 0.2)), logits((0.5, 0.5))
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert divergence(student, teacher, 2.0).item() == pytest.approx(4 * expected)
    target, others = decoupled_divergence(student, teacher, torch.tensor([1]), 2.0)
    assert target.item() == pytest.approx(expected)
    assert others.item() == pytest.approx(0.0, abs=1e-12)  # one other class: nothing to tell apart


# against a literal loop, and what the definitions promise


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 4), v=st.integers(2, 7), temperature=st.sampled_from([0.5, 1.0, 2.0])
)
def test_a_literal_loop(seed: int, n: int, v: int, temperature: float) -> None:
    student, teacher, labels = random_logits(seed, n, v)
    target, others = decoupled_divergence(student, teacher, labels, temperature)
    gate = confidence_gate(teacher)
    for i in range(n):

        def softmax(row: list[float]) -> list[float]:
            total = sum(math.exp(x) for x in row)
            return [math.exp(x) / total for x in row]

        y = int(labels[i])
        ps, pt = (softmax([x / temperature for x in z[i].tolist()]) for z in (student, teacher))
        rest_s, rest_t = (sum(p[j] for j in range(v) if j != y) for p in (ps, pt))
        tckd = pt[y] * math.log(pt[y] / ps[y]) + rest_t * math.log(rest_t / rest_s)
        nckd = sum(pt[j] / rest_t * math.log((pt[j] / rest_t) / (ps[j] / rest_s)) for j in range(v) if j != y)
        assert target[i].item() == pytest.approx(tckd, rel=1e-8, abs=1e-10)
        assert others[i].item() == pytest.approx(nckd, rel=1e-8, abs=1e-10)
        plain = sum(t * math.log(t / s) for t, s in zip(pt, ps, strict=True))
        assert divergence(student, teacher, temperature)[i].item() == pytest.approx(
            temperature**2 * plain, rel=1e-8, abs=1e-10
        )
        assert plain == pytest.approx(tckd + rest_t * nckd, rel=1e-8, abs=1e-10)  # the paper's identity
        p = softmax(teacher[i].tolist())
        assert gate[i].item() == pytest.approx(math.exp(sum(x * math.log(x) for x in p) / math.log(v)))


def test_gradients_by_finite_differences() -> None:
    student, teacher, labels = random_logits(3, 3, 5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: decoupled_divergence(z, teacher, labels, 2.0), student)
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, 2.0), student)


def test_a_model_that_is_sure_is_no_special_case() -> None:
    """In float32, 1 - p of a sure model is 0; the loss and its gradient must not be 0, infinite or NaN for that."""
    exact, teacher = (torch.tensor([[40.0, 0.0, -1.0]], dtype=torch.float64) * k for k in (1.0, 0.5))
    student = exact.float().requires_grad_()
    label = torch.tensor([0])
    target, others = decoupled_divergence(student, teacher.float(), label, 1.0)
    expected = decoupled_divergence(exact, teacher, label, 1.0)
    assert target.item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert others.item() == pytest.approx(expected[1].item(), rel=1e-4)
    (target + others).sum().backward()
    assert student.grad is not None and bool(student.grad.isfinite().all()) and bool(student.grad.any())


def test_half_precision_logits_are_widened() -> None:
    student, teacher, labels = random_logits(5, 4, 6)
    low, high = (z.to(torch.bfloat16) for z in (student, teacher))
    for found, expected in zip(
        decoupled_divergence(low, high, labels, 2.0),
        decoupled_divergence(low.float(), high.float(), labels, 2.0),
        strict=True,
    ):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


# relations


def literal_cka(a: Tensor, b: Tensor) -> float:
    """With the centring matrix written out."""
    n = len(a)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    grams = []
    for rows in (a, b):
        unit = torch.stack([row / row.norm() for row in rows.double()])
        grams.append(h @ (unit @ unit.T) @ h)
    ours, theirs = grams
    return float((ours * theirs).sum() / ((ours * ours).sum() * (theirs * theirs).sum()).sqrt())


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relations_by_hand() -> None:
    # Rows e1, e1, e2, e2 give K = [[J, 0], [0, J]] (J: 2 x 2 ones), centred +-1/2, so <K, K> = 16 / 4 = 4. Rows e1,
    # e2, e1, e2 give +-1/2, too, in another order: the product is 0. Rows e2, e2, e1, e1 give the same K.
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    visual = torch.ones(1, 4, dtype=torch.bool)
    loss, n = relational_loss(a[None], a[[0, 2, 1, 3]][None], visual)
    assert (loss.item(), n) == (pytest.approx(1.0), 1)
    loss, n = relational_loss(a[None], a[[2, 3, 0, 1]][None], visual)
    assert (loss.item(), n) == (pytest.approx(0.0, abs=1e-6), 1)


def test_pictures_are_runs_of_visual_tokens() -> None:
    ours, theirs = states(1, 3, 12, 5), states(2, 3, 12, 9)
    rows = ["..vvvvv.....", "vvvv.vvvvvv.", "vvv......vvv"]  # the last row's pictures are too small
    visual = torch.tensor([[letter == "v" for letter in row] for row in rows])
    expected = [
        1 - literal_cka(ours[i, part], theirs[i, part])
        for i, part in ((0, slice(2, 7)), (1, slice(0, 4)), (1, slice(5, 11)))
    ]
    loss, n = relational_loss(ours, theirs, visual)
    assert n == 3
    assert loss.item() == pytest.approx(sum(expected) / 3)


def test_relations_do_not_see_rotation_and_length() -> None:
    theirs = states(3, 1, 8, 6)
    visual = torch.ones(1, 8, dtype=torch.bool)
    turned = theirs @ torch.linalg.qr(states(4, 6, 6))[0] * torch.rand(1, 8, 1, dtype=torch.float64).add(0.1)
    assert relational_loss(turned, theirs, visual)[0].item() == pytest.approx(0.0, abs=1e-12)
    # a picture with its tokens in another order is another one
    assert relational_loss(theirs.flip(1), theirs, visual)[0].item() > 0.1


def test_relations_gradient_by_finite_differences() -> None:
    ours, theirs = states(5, 2, 7, 3).requires_grad_(), states(6, 2, 7, 4)
    visual = torch.tensor([[True] * 5 + [False] * 2, [False] + [True] * 6])
    assert torch.autograd.gradcheck(lambda v: relational_loss(v, theirs, visual)[0], ours)


def test_pictures_without_relations_are_left_out() -> None:
    """A picture whose tokens are all one, or that has no tokens, gives neither loss nor a gradient that is NaN."""
    ours, theirs = states(7, 2, 6, 4), states(8, 2, 6, 4)
    ours[0] = ours[0, :1]
    ours.requires_grad_()
    visual = torch.ones(2, 6, dtype=torch.bool)
    loss, n = relational_loss(ours, theirs, visual)
    assert n == 1
    assert loss.item() == pytest.approx(1 - literal_cka(ours[1].detach(), theirs[1]))
    loss.backward()
    assert ours.grad is not None and not ours.grad[0].any() and bool(ours.grad[1].any())
    for nothing in (visual & torch.tensor([[True], [False]]), torch.zeros_like(visual)):
        loss, n = relational_loss(ours.detach(), theirs, nothing)
        assert (loss.item(), n) == (0.0, 0)


def test_relations_stay_in_float32_under_autocast() -> None:
    ours, theirs, visual = states(9, 1, 6, 4).float(), states(10, 1, 6, 4).float(), torch.ones(1, 6, dtype=torch.bool)
    expected = relational_loss(ours, theirs, visual)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relational_loss(ours, theirs, visual)[0], expected)
