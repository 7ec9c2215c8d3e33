"""What a suite will cost and can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from bitquake.model_wrappers.checkpoints import resolve
from bitquake.suite.estimate import ASSUMED_FLIPS, duration, estimate, parameters_of, shown, size
from bitquake.suite_plan import SuitePlan

Plan = Callable[..., SuitePlan]
MODEL = {"name": "m", "pretrained": "bitquake/block-idefics3"}


def test_parameters_are_counted_in_the_checkpoint(plan: Plan) -> None:
    with safe_open(resolve("bitquake/block-idefics3") / "model.safetensors", "np") as tensors:
        n = sum(math.prod(tensors.get_slice(name).get_shape()) for name in list(tensors.keys()))
    assert parameters_of(plan(models=[MODEL]).cells[0]) == n
    hub = {"name": "m", "pretrained": "nobody/nothing", "parameters": 7e9}
    assert parameters_of(plan(models=[hub], quantizations=["full-precision"]).cells[0]) == 7e9


def test_speed_and_memory_are_measured_where_cells_are_finished(evaluated: Any) -> None:
    plan, full = evaluated.plan, evaluated.manifests["block-idefics3/full-precision"]
    guessed = estimate(plan, plan.cells, {}, 1)
    assert guessed.samples == 2 * 56 and guessed.cells == 2 and guessed.unsized == ()
    assert "assumed" in guessed.speeds["block-idefics3"].source
    found = estimate(plan, plan.cells[1:], {full.hash: full}, 1)
    speed = 56 / sum(full.task_seconds.values())
    assert found.speeds["block-idefics3"].answers == pytest.approx(speed)
    assert found.seconds == pytest.approx(56 / speed + full.load_seconds)
    assert found.memory_bytes == full.peak_memory_bytes and found.memory_of == "block-idefics3"
    assert "measured in 1 finished cells here" in shown(found, plan, finished=1, jobs=1)


def test_disk_is_of_the_size_that_it_takes(evaluated: Any) -> None:
    """Small limits weigh each task's results heavily, so within a factor of two."""
    told = estimate(evaluated.plan, evaluated.plan.cells, {}, 1).disk_bytes
    taken = sum(
        path.stat().st_size
        for name in ("cells", "journal")
        for path in (evaluated.out / name).rglob("*")
        if path.is_file()
    )
    assert 0.5 < told / taken < 2


def test_jobs_share_the_time_and_features_and_selectors_take_room(plan: Plan) -> None:
    made = plan(models=[MODEL], quantizations=["rtn-int4-g64", "rtn-int3-g64", "rtn-int8-g64"])
    one, two, many = (estimate(made, made.cells, {}, jobs).seconds for jobs in (1, 2, 99))
    assert two == pytest.approx(one / 2) and many == pytest.approx(one / 4)
    plain = estimate(made, made.cells, {}, 1).disk_bytes
    kept = plan(models=[{**MODEL, "arguments": {"features": True}}], quantizations=["rtn-int4-g64"])
    assert estimate(kept, kept.cells, {}, 1).disk_bytes > plain / 2


def test_power_agrees_with_simulated_studies(plan: Plan) -> None:
    """Studies whose true change is the smallest detectable one find it in about 80 % of the cases (McNemar)."""
    made = plan(
        models=[MODEL],
        quantizations=["rtn-int4-g64", "rtn-int3-g64"],
        tasks=[{"name": "block_vqav2_clean", "limit": 2000}, {"name": "block_vqav2_threshold", "limit": 10}],
    )
    (power,) = estimate(made, made.cells, {}, 1).power
    assert (power.n, power.comparisons) == (2000, 2)  # a threshold task compares nothing
    generator = np.random.default_rng(0)
    for flips, change in zip(ASSUMED_FLIPS, power.changes, strict=True):
        worse, better = (flips + change) / 2, (flips - change) / 2
        counts = generator.multinomial(2000, [worse, better, 1 - flips], size=4000)
        b, c = counts[:, 0], counts[:, 1]
        found = np.abs(b - c) > 1.96 * np.sqrt(np.maximum(b + c, 1))
        assert found.mean() == pytest.approx(0.8, abs=0.05)
    assert "2 comparisons at n = 2,000" in shown(estimate(made, made.cells, {}, 1), made, finished=0, jobs=1)


def test_tasks_of_unknown_size_are_named_as_such(plan: Plan) -> None:
    hub = {"name": "m", "pretrained": "nobody/nothing", "parameters": "7e9"}
    made = plan(models=[hub], tasks=["block_vqav2_clean"], quantizations=["full-precision"])
    cell = made.cells[0].model_copy(update={"n": {}})
    plan_without = made.model_copy(update={"cells": (cell,)})
    found = estimate(plan_without, [cell], {}, 1)
    assert found.unsized == ("block_vqav2_clean",)
    assert "1 tasks of unknown size" in shown(found, plan_without, finished=0, jobs=1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h"), (864_000, "10 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(n) for n in (900, 2.5e6, 3e9, 4e12)] == ["1 kB", "2.5 MB", "3.0 GB", "4.0 TB"]
