"""Order, hand-out, commands, the view, and which Selectors a plan wants: what needs no model."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitquake.model_wrappers.quantizers.spec import load_spec
from bitquake.model_wrappers.training import loop as training_loop
from bitquake.model_wrappers.training import run as training_run
from bitquake.suite import commands
from bitquake.suite.driver import CellError, Event, next_cell, record_failure, run_order, worker_environment
from bitquake.suite.progress import View
from bitquake.suite.run import matches
from bitquake.suite.status import read_status
from bitquake.suite.store import CURVE_FILE, open_store
from bitquake.suite_plan import CellManifest, SuitePlan, planned_fits

Plan = Callable[..., SuitePlan]
MODEL = {"name": "m", "pretrained": "bitquake/block-idefics3"}
RTN = {"method": "rtn", "bits": "{bits}", "group_size": 64}
TRAINING = {"method": "qat", "bits": 16, "group_size": 64, "data": ["block_vqav2"], "steps": 5}


def _grid(plan: Plan) -> SuitePlan:
    return plan(
        models=[MODEL, {**MODEL, "name": "n", "arguments": {"dtype": "float32"}}],
        quantizations=[{"name": "rtn-{bits}", "grid": {"bits": [16, 4, 3]}, "spec": RTN}],
    )


def test_controls_come_first_and_each_hash_once(plan: Plan) -> None:
    made = _grid(plan)
    order = run_order(made.cells)
    assert [cell.name for cell in order] == [
        *("m/full-precision", "n/full-precision", "m/rtn-4", "m/rtn-3", "n/rtn-4", "n/rtn-3"),
    ]
    assert {cell.hash for cell in order} == {cell.hash for cell in made.cells} and len(made.cells) == 8


def test_no_two_workers_wait_for_one_training(plan: Plan) -> None:
    made = plan(
        models=[{**MODEL, "training": TRAINING, "quantizations": ["rtn-int4-g64"]}, {**MODEL, "name": "n"}],
        quantizations=["full-precision"],
    )
    trained, quantized, plain = run_order(made.cells)[0], made.cell("m/rtn-int4-g64"), made.cell("n/full-precision")
    never, done = (lambda training: False), (lambda training: True)
    assert next_cell([quantized, plain], [trained], never) is plain
    assert next_cell([quantized, plain], [trained], done) is quantized
    assert next_cell([quantized], [trained], never) is None and next_cell([quantized], [], never) is quantized


def test_every_limit_is_a_command_and_its_arguments_are_the_cells(plan: Plan, tmp_path: Path) -> None:
    made = plan(
        models=[{**MODEL, "revision": "main"}],
        quantizations=["awq-int4-g64", {"name": "mine", "spec": {"method": "rtn", "bits": 3, "group_size": 32}}],
        calibration=["own", "text"],
        arguments={"batch_size": 8, "features": True, "max_pixels": 1024},
    )
    places = open_store(tmp_path).places(tmp_path)
    named = commands.model_args(made.cell("m/awq-int4-g64"), commands.Begin(MODEL["pretrained"]), places)
    assert named == (
        "pretrained=bitquake/block-idefics3,revision=main,quant=awq-int4-g64,features=true,max_pixels=1024,"
        f"artifacts={tmp_path}/artifacts,journal={tmp_path}/journal"
    )
    for name in ("m/awq-int4-g64/text", "m/mine"):
        cell = made.cell(name)
        file = Path(commands.quant_of(cell, places))
        assert load_spec(str(file)) == load_spec(cell.spec)
    groups = commands.limit_groups(made.cells[0])
    assert {group.folder: len(group.tasks) for group in groups} == {"24": 2, "8": 1}
    words = commands.evaluation_arguments(made.cells[0], groups[0], "x=1", tmp_path, None)
    assert words == [
        *("--model", "bitquake_hf", "--model_args", "x=1", "--tasks", "block_vqav2_clean,block_vqav2_low_light_3"),
        *("--batch_size", "8", "--limit", "24", "--output_path", str(tmp_path), "--log_samples"),
    ]
    unlimited = commands.LimitGroup(None, ("t",))
    assert unlimited.folder == "all" and "--limit" not in commands.evaluation_arguments(
        made.cells[0], unlimited, "x=1", tmp_path, "cpu"
    )


def test_commands_of_trained_models_name_what_the_training_makes(plan: Plan, tmp_path: Path) -> None:
    lora = {"method": "lora", "quant": "rtn-int4-g64", "data": ["block_vqav2"], "steps": 5}
    made = plan(
        models=[
            {**MODEL, "training": {**TRAINING, "bits": 3}},
            {**MODEL, "name": "twin", "training": TRAINING, "quantizations": ["rtn-int3-g64"]},
            {**MODEL, "name": "lora", "training": lora, "twin": "twin"},
        ]
    )
    places = open_store(tmp_path).places(tmp_path)
    begins = {cell.name: commands.begin_of(cell, places) for cell in made.cells}
    model = {cell.name: places.models / cell.training_hash for cell in made.cells}
    assert commands.TRAINED_MODEL == training_run.MODEL_FOLDER
    assert commands.TRAINED_ADAPTER == training_run.ADAPTER_FOLDER
    assert commands.BASE_SPEC == training_run.BASE_FILE and CURVE_FILE == training_loop.CURVE_FILE
    name = "m/as-trained"
    assert begins[name] == (str(model[name] / "model"), "none", "", MODEL["pretrained"])
    name = "twin/rtn-int3-g64"
    assert begins[name] == (str(model[name] / "model"), "", "", "")
    name = "lora/as-trained"
    assert begins[name] == (MODEL["pretrained"], "rtn-int4-g64", str(model[name] / "adapter"), "")
    shown = commands.shown_commands(made.cell(name), places, tmp_path / "runs", None)
    assert shown[0].startswith("bitquake train lora --config ")
    config = yaml.safe_load(Path(shown[0].split()[4]).read_text())
    assert config["quant"] == "rtn-int4-g64" and config["pretrained"] == MODEL["pretrained"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("m/*", ["m/full-precision", "m/rtn-16", "m/rtn-4", "m/rtn-3"]),
        ("bits=3", ["m/rtn-3", "n/rtn-3"]),
        ("bits=*", ["m/rtn-16", "m/rtn-4", "m/rtn-3", "n/rtn-16", "n/rtn-4", "n/rtn-3"]),
        ("model=n", ["n/full-precision", "n/rtn-16", "n/rtn-4", "n/rtn-3"]),
        ("quantization=rtn-1*", ["m/rtn-16", "n/rtn-16"]),
        ("colour=3", []),
    ],
)
def test_patterns_choose_cells_by_name_and_by_factor(plan: Plan, pattern: str, names: list[str]) -> None:
    assert [cell.name for cell in _grid(plan).cells if matches(cell, pattern)] == names


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(CellError("time", "too long")))
    assert (error.reason, error.detail, str(error)) == ("time", "too long", "time: too long")


def test_workers_of_the_block_world_reach_for_no_network(plan: Plan) -> None:
    made = plan()
    assert worker_environment(made, 3)["OMP_NUM_THREADS"] == "3"
    assert worker_environment(made, 1)["HF_HUB_OFFLINE"] == "1"
    real = made.model_copy(update={"world": "real"})
    assert "HF_HUB_OFFLINE" not in worker_environment(real, 1)


def test_failures_are_counted_and_status_tells_every_state(plan: Plan, tmp_path: Path) -> None:
    made = _grid(plan)
    store = open_store(tmp_path)
    store.write_plan(made)
    for _ in range(2):
        record_failure(store, made.cell("m/rtn-4"), "out of memory", "9 GB", log="last line")
    told = json.loads((tmp_path / "failures" / f"{made.cell('m/rtn-4').hash}.json").read_text())
    assert told["attempts"] == 2 and told["log"] == "last line" and told["reason"] == "out of memory"
    store.write_heartbeat(
        made.cell("n/rtn-4").hash, {"host": "elsewhere", "pid": 1, "beat": "2020-01-01T00:00:00+00:00"}
    )
    (tmp_path / "cells" / made.cell("n/rtn-3").hash).mkdir(parents=True)
    status = read_status(str(tmp_path))
    assert status.failed == [
        {"name": "m/rtn-4", "reason": "out of memory", "detail": "9 GB", "attempts": 2, "when": told["when"]}
    ]
    assert [(one["name"], one["stale"]) for one in status.running] == [("n/rtn-4", True)]
    assert status.damaged == [{"name": "n/rtn-3", "reason": "cell.json is missing"}]
    assert status.waiting == ["m/full-precision", "n/full-precision", "m/rtn-3"] and not status.finished


def test_a_failure_is_counted_without_reading_the_others(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cell = open_store(tmp_path), plan().cells[0]
    for i in range(3):
        store.write_failure(f"{i:032x}", {"attempts": 5})
    read, seen = store._files.read, []
    monkeypatch.setattr(store._files, "read", lambda key: seen.append(key) or read(key))
    for _ in range(2):
        record_failure(store, cell, "time", "")
    assert set(seen) == {f"failures/{cell.hash}.json"}
    assert store.failure(cell.hash)["attempts"] == 2


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, _Terminal])
def test_the_view_counts_cells_samples_and_pictures(plan: Plan, stream: type[io.StringIO], evaluated: Any) -> None:
    made, seen = _grid(plan), stream()
    one, two = made.cells[0], made.cell("m/rtn-3")
    manifest = evaluated.manifests["block-idefics3/mine"]
    with View([one, two], {}, seen) as view:
        for event in (
            Event("started", one.hash, "7"),
            Event("started", two.hash, "8"),
            Event("progress", one.hash, "7", 20, 56),
            Event("progress", two.hash, "8", 56, 56),
            Event("finished", two.hash, manifest=manifest),
            Event("failed", one.hash, reason="time", detail="over"),
        ):
            view.tell(event)
    text = seen.getvalue()
    assert "1/2 cells, noise cache 100%" in text and "failed    m/full-precision" in text and "time: over" in text
    assert "1/2 cells, 1 failed" in text
    if stream is _Terminal:
        assert "112/112" in text  # all samples are accounted for, in the end
    else:
        assert len(text.splitlines()) == 4


def test_which_selectors_a_cell_gets(plan: Plan) -> None:
    made = plan(
        models=[MODEL],
        quantizations=["rtn-int4-g64", "awq-int3-g64"],
        calibration=["own", "text"],
        selectors=["own", "transfer", "mixture"],
        selector_mixture=["full-precision", "awq-int3-g64"],
        tasks=["block_vqav2_dev", "block_vqav2_clean"],
        arguments={"features": True},
    )

    def fits(name: str) -> dict[str, list[str]]:
        return {fit.name: [cell.name for cell in fit.cells] for fit in planned_fits(made, made.cell(name))}

    assert fits("m/rtn-int4-g64") == {
        "selector": ["m/rtn-int4-g64"],
        "selector_transfer": ["m/full-precision"],
        "selector_mixture": ["m/full-precision", "m/awq-int3-g64"],
    }
    assert fits("m/full-precision")["selector_transfer"] == ["m/full-precision"]
    assert fits("m/awq-int3-g64/text")["selector_mixture"] == ["m/full-precision", "m/awq-int3-g64/text"]
    files = [fit.file for cell in made.cells for fit in planned_fits(made, cell)]
    assert len(set(files)) == len(made.cells) + 1 + 2  # own ones, one transfer, and a mixture for each calibration


def test_manifests_and_plans_survive_json(evaluated: Any) -> None:
    for one in itertools.chain([evaluated.plan], evaluated.manifests.values()):
        assert type(one).model_validate_json(one.model_dump_json()) == one
    assert isinstance(evaluated.manifests["block-idefics3/mine"], CellManifest)
