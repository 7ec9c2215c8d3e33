"""The controller's path against numbers worked out by hand."""

from __future__ import annotations

import pytest

from bitquake.model_wrappers.training.controller import BottleneckController


def controller(**changes: float) -> BottleneckController:
    values = {"tau": 0.5, "eta": 0.1, "beta": 1.0, "beta_min": 0.2, "beta_max": 1.5, "decay": 0.9}
    return BottleneckController(**{**values, **changes})


def test_a_path_by_hand() -> None:
    one = controller()
    # average 2.5 -> 1 + 0.1 * 2.0; average 0.9 * 2.5 + 0.1 * 0.5 = 2.3 -> 1.2 + 0.18; average 2.07 -> 1.38 + 0.157,
    # which is beyond 1.5
    assert [one.update(loss) for loss in (2.5, 0.5, 0.0)] == pytest.approx([1.2, 1.38, 1.5])
    assert one.average == pytest.approx(2.07)
    for _ in range(20):  # the average falls as 0.9^n and is below tau from the 14th on: 2.07 * 0.9^14 = 0.4736
        one.update(0.0)
    assert one.average == pytest.approx(2.07 * 0.9**20)
    falls = sum(0.1 * (2.07 * 0.9**n - 0.5) for n in range(14, 21))
    assert one.beta == pytest.approx(1.5 + falls)


def test_it_stays_within_its_bounds() -> None:
    high, low = controller(eta=10.0), controller(eta=10.0)
    assert high.update(100.0) == 1.5
    assert low.update(0.0) == 0.2
    assert low.update(0.49) == 0.2


def test_a_loss_at_tau_leaves_beta() -> None:
    one = controller(beta=0.7)
    assert [one.update(0.5) for _ in range(3)] == [0.7, 0.7, 0.7]


def test_it_goes_on_where_it_was() -> None:
    one, whole, other = controller(), controller(), controller()
    losses = [1.0, 0.3, 0.9, 0.1]
    expected = [whole.update(loss) for loss in losses]
    assert [one.update(loss) for loss in losses[:2]] == expected[:2]
    other.load_state_dict(one.state_dict())
    assert [other.update(loss) for loss in losses[2:]] == expected[2:]
    fresh = controller(beta=0.9)
    fresh.load_state_dict(controller().state_dict())  # before the first loss
    assert (fresh.beta, fresh.average) == (1.0, None)
