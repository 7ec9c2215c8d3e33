"""A cell, evaluated for real: equal to lmms-eval's own command, whole or not at all, resumable, and never lost."""

from __future__ import annotations

import contextlib
import json
import resource
import shlex
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitquake.model_wrappers.training.config import load_training, training_hash
from bitquake.reports.runs import read_runs
from bitquake.suite import commands, worker
from bitquake.suite.completeness import complete, planned_counts, sample_counts
from bitquake.suite.driver import FULL_DISK, CellError, CellOptions
from bitquake.suite.store import Damage, Store, file_hash, open_store
from bitquake.suite.worker import noise_cache_arguments, run_cell
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

MINE = "block-idefics3/mine"


def _samples(folder: Path) -> dict[str, bytes]:
    """Task -> bytes of its sample log."""
    return {path.name.split("_samples_")[1]: path.read_bytes() for path in sorted(folder.rglob("*_samples_*.jsonl"))}


def test_a_cell_holds_what_the_printed_commands_write(evaluated: Any, tmp_path: Path) -> None:
    """The reference is lmms-eval's own way from its command line to its files."""
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args

    cell = evaluated.cell(MINE)
    places = open_store(tmp_path / "by hand").places(tmp_path)
    cached = noise_cache_arguments(CellOptions(noise_cache=str(tmp_path / "noise")))
    shown = commands.shown_commands(cell, places, tmp_path / "runs", "cpu", cached)
    assert len(shown) == 2  # two limits
    with pytest.MonkeyPatch.context() as patch:
        for command in shown:
            words = shlex.split(command)
            assert words[:3] == ["python", "-m", "lmms_eval"]
            patch.setattr(sys, "argv", words[2:])
            cli_evaluate_single(parse_eval_args()[1])
    ours = evaluated.out / "cells" / cell.hash / "runs"
    assert _samples(ours) == _samples(tmp_path / "runs") and len(_samples(ours)) == 3
    for path in (tmp_path / "runs").rglob("*_results.json"):
        (other,) = (ours / path.parent.parent.name).rglob("*_results.json")
        theirs, told = json.loads(path.read_text()), json.loads(other.read_text())
        assert told.keys() == theirs.keys() and told["results"].keys() == theirs["results"].keys()
        for key in ("model", "batch_size", "limit", "device", "model_backend", "gen_kwargs", "torch_seed"):
            assert told["config"][key] == theirs["config"][key]
        assert told["n-samples"] == theirs["n-samples"] and told["model_source"] == theirs["model_source"]


def test_reports_read_the_cells(evaluated: Any) -> None:
    inputs = read_runs([evaluated.out / "cells"], evaluated.out / "artifacts")
    assert not inputs.problems
    assert {run.label for run in inputs.runs if run.card} == {"bitquake/block-idefics3"}
    assert {run.card.spec_name for run in inputs.runs if run.card} == {"full-precision", "mine"}
    for run in inputs.runs:
        assert {task: len(cell.answers) for task, cell in run.cells.items()} == evaluated.manifests[MINE].samples
    assert "--model bitquake_hf --model_args pretrained=bitquake/block-idefics3" in inputs.runs[0].commands[0]


def test_the_manifest_says_what_is_there(evaluated: Any) -> None:
    for name, manifest in evaluated.manifests.items():
        folder = evaluated.out / "cells" / evaluated.cell(name).hash
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert there == {*manifest.files, "cell.json"}
        assert all(file_hash(folder / path) == told for path, told in manifest.files.items())
        assert manifest.samples == {"block_vqav2_clean": 24, "block_vqav2_low_light_3": 24, "block_scienceqa_clean": 8}
        assert manifest.task_seconds.keys() == manifest.samples.keys()
        assert 0 < sum(manifest.task_seconds.values()) < manifest.seconds and manifest.load_seconds > 0
        assert (manifest.peak_memory_bytes or 0) > 10**8
        assert manifest.machine["torch"] and manifest.name == name
    first, second = (evaluated.manifests[name].noise_cache for name in ("block-idefics3/full-precision", MINE))
    # two questions on one picture may find it made
    assert first["misses"] > 0 and first["hits"] + first["misses"] == 24
    assert second == {"hits": 24, "misses": 0}  # made once, whatever the quantization
    assert not list((evaluated.out / ".scratch" / "work").iterdir()) and not list((evaluated.out / "running").iterdir())


def test_a_finished_cell_is_not_run_again(evaluated: Any, tmp_path: Path) -> None:
    cell = evaluated.cell(MINE)
    before = {path: path.stat().st_mtime_ns for path in (evaluated.out / "cells").rglob("*")}
    assert run_cell(cell, str(evaluated.out), tmp_path) == evaluated.manifests[MINE]
    assert {path: path.stat().st_mtime_ns for path in (evaluated.out / "cells").rglob("*")} == before


@pytest.fixture
def copy(evaluated: Any, tmp_path: Path) -> Path:
    """A copy of the evaluated folder, to do harm to."""
    return Path(shutil.copytree(evaluated.out, tmp_path / "out"))


def test_an_interrupted_cell_goes_on_from_the_journal_to_the_same_bytes(evaluated: Any, tmp_path: Path) -> None:
    cell, out = evaluated.cell(MINE), tmp_path / "out"
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, str(out), out / ".scratch", stop, evaluated.options)
    assert seen[0] == (0, 56) and seen[-1] == (32, 56)
    assert not (out / "cells").exists() and not list((out / ".scratch" / "work").iterdir())
    (journal,) = (out / "journal").rglob("*.jsonl")
    assert len(journal.read_bytes().splitlines()) >= 3
    manifest = run_cell(cell, str(out), out / ".scratch", options=evaluated.options)
    assert _samples(out / "cells") == _samples(evaluated.out / "cells" / cell.hash)
    keys = [json.loads(line)["key"] for file in (out / "journal").rglob("*.jsonl") for line in file.open()]
    assert len(keys) == 7 == len(set(keys))  # no batch was answered twice
    assert (
        isinstance(open_store(out).cell(cell.hash, deep=True), CellManifest)
        and manifest.samples["block_scienceqa_clean"]
    )


def test_a_damaged_cell_is_set_aside_and_made_again(evaluated: Any, copy: Path) -> None:
    cell = evaluated.cell(MINE)
    (victim,) = (copy / "cells" / cell.hash).rglob("*_samples_block_vqav2_clean.jsonl")
    victim.unlink()
    assert isinstance(open_store(copy).cell(cell.hash), Damage)
    run_cell(cell, str(copy), copy / ".scratch", options=evaluated.options)
    assert isinstance(open_store(copy).cell(cell.hash, deep=True), CellManifest)
    assert _samples(copy / "cells" / cell.hash) == _samples(evaluated.out / "cells" / cell.hash)
    (aside,) = (copy / "damaged").iterdir()
    assert aside.name.startswith(cell.hash) and (aside / "cell.json").is_file()


def test_a_cell_behind_fsspec_is_the_same(evaluated: Any, tmp_path: Path) -> None:
    cell, url = evaluated.cell(MINE), f"memory://bitquake-{uuid.uuid4().hex}/study"
    manifest = run_cell(cell, url, tmp_path / "scratch", options=evaluated.options)
    store = open_store(url)
    assert store.cell(cell.hash) == manifest
    assert run_cell(cell, url, tmp_path / "scratch", options=evaluated.options) == manifest
    mirror = store.mirror(tmp_path / "mirror")
    assert _samples(mirror / "cells") == _samples(evaluated.out / "cells" / cell.hash)
    inputs = read_runs([mirror / "cells"], mirror / "artifacts")
    assert not inputs.problems and inputs.runs[0].card is not None
    assert store.heartbeats() == {}


@contextlib.contextmanager
def _files_no_larger_than(n_bytes: int) -> Iterator[None]:
    """What the system says of a larger write is EFBIG, as of a full quota: a disk as good as full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_costs_no_finished_cell(evaluated: Any, copy: Path) -> None:
    first, second = evaluated.plan.cells
    shutil.rmtree(copy / "cells" / second.hash)
    shutil.rmtree(copy / "journal")
    with _files_no_larger_than(60_000), pytest.raises(CellError) as caught:  # a sample log has 84 kB
        run_cell(second, str(copy), copy / ".scratch", options=evaluated.options)
    assert caught.value.reason == FULL_DISK
    assert open_store(copy).cell(second.hash) is None
    assert open_store(copy).cell(first.hash, deep=True) == evaluated.manifests[first.name]
    run_cell(second, str(copy), copy / ".scratch", options=evaluated.options)
    assert _samples(copy / "cells" / second.hash) == _samples(evaluated.out / "cells" / second.hash)


def test_time_that_is_over_ends_a_cell(evaluated: Any, tmp_path: Path) -> None:
    cell, out = evaluated.cell(MINE), tmp_path / "out"
    hurried = CellOptions(device="cpu", noise_cache="", minutes=0.1 / 60)
    with pytest.raises(CellError) as caught:
        run_cell(cell, str(out), out / ".scratch", options=hurried)
    assert caught.value.reason == "time" and not (out / "cells").exists()


def test_what_ends_while_it_is_put_away_is_finished(
    evaluated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm may come once the cell's folder is in its place."""
    cell, published = evaluated.cell(MINE), Store.publish_cell

    def evaluate(cell: PlannedCell, store: Store, places: Any, work: Path, *more: Any) -> CellManifest:
        shutil.copytree(evaluated.out / "cells" / cell.hash, work, dirs_exist_ok=True)
        (work / "cell.json").unlink()
        return evaluated.manifests[MINE]

    def publish(store: Store, folder: Path, manifest: CellManifest) -> None:
        published(store, folder, manifest)
        left.append(signal.getitimer(signal.ITIMER_REAL)[0])

    monkeypatch.setattr(worker, "_evaluate", evaluate)
    monkeypatch.setattr(Store, "publish_cell", publish)
    left: list[float] = []
    assert run_cell(cell, str(tmp_path), tmp_path / "scratch", options=CellOptions(minutes=1.0)).name == MINE
    assert left == [0.0]  # no alarm is set any more
    assert isinstance(open_store(tmp_path).cell(cell.hash, deep=True), CellManifest)


def test_samples_without_room_are_no_result_and_the_next_try_mends_them(
    tmp_path: Path, plan: Callable[..., SuitePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from bitquake.model_wrappers.bitquake_hf import BitquakeHF

    made = plan(quantizations=["full-precision"], tasks=[{"name": "block_vqav2_clean", "limit": 12}])
    (cell,), options = made.cells, CellOptions(device="cpu", noise_cache="")
    generate = BitquakeHF._generate

    def cramped(model: Any, encoded: Any) -> Any:
        if any(sample.index == 2 for sample in encoded.samples):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(BitquakeHF, "_generate", cramped)
        with pytest.raises(CellError) as caught:
            run_cell(cell, str(tmp_path), tmp_path / "scratch", options=options)
    assert caught.value.reason == "out of memory" and caught.value.detail.startswith("1 of 12 samples")
    assert open_store(tmp_path).cell(cell.hash) is None
    run_cell(cell, str(tmp_path), tmp_path / "scratch", options=options)
    lines = [json.loads(line) for line in next(iter(_samples(tmp_path / "cells").values())).splitlines()]
    assert len(lines) == 12 and not any(line["bitquake"]["failure"] for line in lines)


def test_a_machine_takes_the_training_that_another_has_finished(tmp_path: Path, plan: Callable[..., SuitePlan]) -> None:
    """A finished training is one whose result.json fits: here it is written by hand, and no model is needed."""
    base = {"method": "rtn", "bits": 4, "group_size": 64}
    training = {"method": "lora", "quant": base, "data": ["block_vqav2"], "steps": 5}
    made = plan(models=[{"name": "m", "pretrained": "bitquake/block-idefics3", "training": training}])
    (cell,), store = made.cells, open_store(f"memory://bitquake-{uuid.uuid4().hex}")
    first, second = (store.places(tmp_path / name) for name in ("first", "second"))
    folder = first.models / cell.training_hash
    told = {"hash": training_hash(load_training(cell.training)), "model": None, "base": None, "adapter": "adapter"}
    for name, data in {
        "result.json": json.dumps({**told, "pretrained": cell.pretrained, "quant": "base.yaml"}),
        "base.yaml": json.dumps(base),
        "adapter/adapter_model.safetensors": "weights",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(data)

    def begin(places: Any) -> commands.Begin:
        return worker._begin(cell, store, places, worker._Heart(store, cell, lambda done, total: None))

    assert begin(first) == commands.begin_of(cell, first)
    shutil.rmtree(first.models)
    assert begin(second) == commands.begin_of(cell, second)  # nothing is trained: it would take data and a model
    theirs = second.models / cell.training_hash
    assert (theirs / "adapter" / "adapter_model.safetensors").read_text() == "weights"
    assert begin(second).quant == str(theirs / "base.yaml") and (theirs / "base.yaml").is_file()


def test_what_is_wrong_is_the_reason(evaluated: Any, tmp_path: Path) -> None:
    def reason(**changes: Any) -> CellError:
        cell = PlannedCell.model_validate({**evaluated.cell(MINE).model_dump(), **changes})
        with pytest.raises(CellError) as caught:
            run_cell(cell, str(tmp_path / "out"), tmp_path / "scratch", options=evaluated.options)
        return caught.value

    empty = tmp_path / "empty"
    empty.mkdir()
    assert reason(pretrained=str(empty)).reason == "error"
    assert "unknown argument 'batch_sise'" in str(reason(arguments={"batch_sise": 3}))
    training = {"method": "qat", "bits": 3, "pretrained": str(empty), "data": ["block_vqav2"], "steps": 1}
    told = reason(training=training, training_hash="f" * 32, quantization="as-trained", spec={})
    assert told.reason == "training" and told.detail


def test_completeness_is_the_set_of_samples(tmp_path: Path) -> None:
    lines = [json.dumps({"doc_id": i % 3}) for i in range(4)]
    (tmp_path / "x_samples_a_samples_b.jsonl").write_text("\n".join([*lines, '{"doc_', '{"other": 1}', "7"]))
    (tmp_path / "x_results.json").write_text(
        json.dumps({"n-samples": {"a_samples_b": {"effective": 3, "original": 9}}})
    )
    (tmp_path / "y_results.json").write_text("{")
    assert sample_counts(tmp_path) == {"a_samples_b": 3} and planned_counts(tmp_path) == {"a_samples_b": 3}
    assert complete(tmp_path, {"a_samples_b": 3}) and not complete(tmp_path, {"a_samples_b": 4})
    assert not complete(tmp_path, {"a_samples_b": 3, "c": 1})


def test_a_run_without_a_samples_file_is_not_complete(
    evaluated: Any, tmp_path: Path, plan: Callable[..., SuitePlan]
) -> None:
    """lmms-eval swallows what goes wrong when it writes; here its file cannot be made."""
    cell = evaluated.cell(MINE)
    from lmms_eval.loggers import EvaluationTracker

    written = EvaluationTracker.save_results_samples

    def lose(tracker: Any, task_name: str, samples: Any) -> None:
        written(tracker, task_name, samples[:-1] if task_name == "block_scienceqa_clean" else samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationTracker, "save_results_samples", lose)
        with pytest.raises(CellError, match="not complete") as caught:
            run_cell(cell, str(tmp_path / "out"), tmp_path / "scratch", options=evaluated.options)
    assert caught.value.detail == "samples are missing in 1 of 3 tasks: block_scienceqa_clean 7 of 8"
    assert open_store(tmp_path / "out").cell(cell.hash) is None
