"""The loop against plain torch, and interrupted in every way against itself undisturbed."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import get_cosine_schedule_with_warmup

from bitquake.model_wrappers.training.batch import TrainingBatch
from bitquake.model_wrappers.training.config import QatConfig, load_training
from bitquake.model_wrappers.training.examples import Loaded, Place
from bitquake.model_wrappers.training.loop import (
    CURVE_FILE,
    STATE_FOLDER,
    Outcome,
    Trainee,
    TrainingError,
    accelerator,
    rate_share,
    total_steps,
    train,
)

WIDTH = 5


class Points:
    """Batches of random points, as ``Examples`` gives batches of examples: any place is reached at once."""

    batches_per_epoch = 4

    def __init__(self, name: str = "points", broken: int | None = None) -> None:
        self.identity, self._broken = {"points": name}, broken

    def batches(self, place: Place) -> Iterator[Loaded]:
        epoch, batch = place
        while True:
            if batch == self.batches_per_epoch:
                epoch, batch = epoch + 1, 0
            number = epoch * self.batches_per_epoch + batch
            ids = frozenset({f"pixels:{number}"})
            yield Loaded(self.at(number), ids, Counter({"too long": 1}), 3, Place(epoch, batch + 1))
            batch += 1

    def at(self, number: int) -> TrainingBatch:
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(number))
        if number == self._broken:
            x[0, 0] = math.nan
        return TrainingBatch({"x": x}, torch.tensor([[-100, 1]] * 3), torch.zeros(3, 2, dtype=torch.bool))

    def held_out(self) -> Iterator[TrainingBatch]:
        yield self.at(1000)
        yield self.at(1001)


class SquaredOutput:
    """Mean square of what a layer makes, times a weight that grows with every step; dropout in between."""

    def __init__(self, model: Any) -> None:
        self.model, self.weight = model, 1.0

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        loss = self.weight * self.model(batch.inputs["x"]).square().mean()
        return loss, {"loss": loss.item(), "weight": self.weight}

    def after_step(self, parts: Mapping[str, float]) -> None:
        self.weight += 0.1 * parts["loss"]

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight = state["weight"]


def make_model(dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(WIDTH, 4), nn.Dropout(dropout), nn.Linear(4, 2))


def config_of(**keys: Any) -> QatConfig:
    values = {"method": "qat", "pretrained": "a", "bits": 4, "data": ["a"], "steps": 10, "rate": 0.05, "warmup": 0.2,
              "precision": "fp32", "save_every": 3, "batch_size": 3, **keys}  # fmt: skip
    config = load_training(values)
    assert isinstance(config, QatConfig)
    return config


def run(
    folder: Path, model: nn.Module | None = None, points: Points | None = None, **keys: Any
) -> tuple[nn.Module, Outcome]:
    call = {name: keys.pop(name) for name in ("minutes", "progress") if name in keys}
    config, model = config_of(**keys), model or make_model()
    first, second = model[0], model[2]  # type: ignore[index]
    groups = [
        {"name": "weights", "params": [first.weight, second.weight], "lr": config.rate, "weight_decay": 0.1},
        {"name": "vectors", "params": [first.bias, second.bias], "lr": 2 * config.rate, "weight_decay": 0.0},
    ]
    outcome = train(
        Trainee(model, groups, SquaredOutput),
        points or Points(),
        config,
        folder,
        on=accelerator(config),
        **call,  # type: ignore[arg-type]
    )
    return model, outcome


def weights(model: nn.Module) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in model.parameters()]


def test_the_rate_rises_and_falls_as_the_library_s() -> None:
    """transformers counts its first step as share 0; from the end of the rise on both are one."""
    steps, warmup = 40, 0.2
    model = nn.Linear(1, 1)
    library = get_cosine_schedule_with_warmup(torch.optim.SGD(model.parameters(), lr=1.0), 8, steps)
    theirs = library.lr_lambdas[0]
    ours = [rate_share(step, steps, warmup, "cosine") for step in range(steps)]
    assert ours[8:] == pytest.approx([theirs(step) for step in range(8, steps)])
    assert ours[:8] == pytest.approx([theirs(step + 1) for step in range(8)])
    assert {rate_share(step, steps, 0.0, "constant") for step in range(steps)} == {1.0}
    assert rate_share(0, 1, 0.03, "cosine") == 1.0


def test_number_of_steps() -> None:
    assert total_steps(config_of(steps=7), 100) == 7
    assert total_steps(config_of(steps=None, epochs=2.5, gradient_accumulation=4), 100) == round(250 / 4)
    assert total_steps(config_of(steps=None, epochs=0.001), 100) == 1


@pytest.mark.parametrize("passes", [1, 3])
def test_it_is_adamw_with_clipping_and_accumulation(tmp_path: Path, passes: int) -> None:
    keys = {"gradient_accumulation": passes, "clip_norm": 0.05, "steps": 6}
    trained, outcome = run(tmp_path, make_model(0.0), **keys)
    model, points, config = make_model(0.0), Points(), config_of(**keys)
    objective = SquaredOutput(model)
    first, second = model[0], model[2]  # type: ignore[index]
    plain = torch.optim.AdamW(
        [{"params": [first.weight, second.weight], "weight_decay": 0.1, "lr": config.rate},
         {"params": [first.bias, second.bias], "weight_decay": 0.0, "lr": 2 * config.rate}],
        foreach=False, fused=False,
    )  # fmt: skip
    for step in range(6):
        share = rate_share(step, 6, config.warmup, "cosine")
        for group, rate in zip(plain.param_groups, (config.rate, 2 * config.rate), strict=True):
            group["lr"] = share * rate
        losses = []
        for number in range(passes):
            loss, parts = objective(points.at(step * passes + number))
            (loss / passes).backward()  # type: ignore[no-untyped-call]
            losses.append(parts["loss"])
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))  # type: ignore[arg-type]
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.05 / (float(norm) + 1e-6))
        plain.step()
        plain.zero_grad()
        objective.after_step({"loss": sum(losses) / passes})
    for ours, theirs in zip(weights(trained), weights(model), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert outcome.finished and outcome.step == 6
    assert outcome.image_ids == {f"pixels:{n}" for n in range(6 * passes)}
    assert outcome.skipped == {"too long": 6 * passes}


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path, stop: int) -> None:
    whole, expected = run(tmp_path / "whole", validate_every=4)

    def die(step: int, steps: int) -> None:
        assert steps == 10
        if step == stop:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", progress=die, validate_every=4)
    again, outcome = run(tmp_path / "cut", validate_every=4)
    assert weights(again) == weights(whole)
    assert (outcome.image_ids, outcome.skipped) == (expected.image_ids, expected.skipped)
    assert outcome.parts == expected.parts and outcome.validation == expected.validation

    def curve(folder: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (tmp_path / folder / CURVE_FILE).read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert curve("cut") == curve("whole")
    assert [line["step"] for line in curve("whole") if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in curve("whole") if "validation_loss" in line] == [4, 8, 10]
    assert [file.name for file in (tmp_path / "cut" / STATE_FOLDER).glob("*.safetensors")] == ["step-10.safetensors"]


def test_a_killed_process_goes_on_where_it_saved(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import test_loop, pathlib\n"
        "test_loop.run(pathlib.Path(sys.argv[2]), progress=lambda step, steps: time.sleep(0.2))"
    )
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(folder)])
    progress = folder / STATE_FOLDER / "progress.json"
    deadline = time.monotonic() + 120
    while not progress.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    saved = json.loads(progress.read_text())["step"]
    assert 3 <= saved < 10
    again, outcome = run(folder)
    assert outcome.finished and weights(again) == weights(whole)


def test_validation_is_the_mean_over_what_is_kept_out(tmp_path: Path) -> None:
    model, outcome = run(tmp_path, steps=4)
    model.eval()
    objective = SquaredOutput(model)
    objective.weight = json.loads((tmp_path / STATE_FOLDER / "progress.json").read_text())["objective"]["weight"]
    with torch.no_grad():
        losses = [objective(batch)[1]["loss"] for batch in Points().held_out()]
    assert outcome.validation["loss"] == pytest.approx(sum(losses) / 2)
    last = [json.loads(line) for line in (tmp_path / CURVE_FILE).read_text().splitlines()][-1]
    assert last == {"step": 4, **{f"validation_{key}": value for key, value in outcome.validation.items()}}


def test_time_that_is_over_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    steps = []
    for _ in range(10):
        model, outcome = run(tmp_path / "short", minutes=0.0)
        steps.append(outcome.step)
        assert outcome.finished == (outcome.step == 10)
    assert steps == list(range(1, 11))
    assert weights(model) == weights(whole)


def test_a_loss_that_is_no_number_ends_the_training_and_keeps_the_last_state(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 6 of 10: the gradient's norm is nan \(loss nan.*state of step 3"):
        run(tmp_path, points=Points(broken=5))
    with pytest.raises(TrainingError, match="Nothing was saved"):
        run(tmp_path / "first", points=Points(broken=0))
    whole, _ = run(tmp_path / "whole")
    again, _ = run(tmp_path)  # with the data mended
    assert weights(again) == weights(whole)


def test_a_state_of_other_data_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    with pytest.raises(TrainingError, match="was begun on other data"):
        run(tmp_path, steps=3, points=Points("others"))
    state = tmp_path / STATE_FOLDER / "step-3.safetensors"
    whole = state.read_bytes()
    for content in (whole[: len(whole) // 2], b"", None):
        state.unlink() if content is None else state.write_bytes(content)
        with pytest.raises(TrainingError, match=r"is damaged; remove .* to begin again"):
            run(tmp_path, steps=3)
    (tmp_path / STATE_FOLDER / "progress.json").write_text("{")
    with pytest.raises(TrainingError, match="is damaged"):
        run(tmp_path, steps=3)


def test_a_full_disk_is_named_and_the_state_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitquake.model_wrappers.training import loop

    whole, _ = run(tmp_path / "whole")
    save, calls = loop.save_file, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(loop, "save_file", full)
    with pytest.raises(TrainingError, match=r"step 6: .* cannot be written .*No space left"):
        run(tmp_path / "cut")
    again, _ = run(tmp_path / "cut")
    assert weights(again) == weights(whole)


def test_what_is_frozen_computes_as_it_will_be_evaluated(tmp_path: Path) -> None:
    model = make_model()
    frozen = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).requires_grad_(False)
    model.insert(0, frozen)  # type: ignore[operator]
    before = copy.deepcopy(frozen.state_dict())
    config = config_of(steps=2)
    groups = [
        {"name": "w", "params": [p for p in model.parameters() if p.requires_grad], "lr": 0.1, "weight_decay": 0.0}
    ]
    train(Trainee(model, groups, SquaredOutput), Points(), config, tmp_path, on=accelerator(config))  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    assert model[2].training and not frozen[1].training  # type: ignore[index]


def test_the_caller_s_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(tmp_path, steps=2)
    assert torch.equal(torch.rand(3), expected)
