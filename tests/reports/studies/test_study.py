"""Reading a suite's output folder: what finished, what failed, what waits, and what must not be believed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import Model, Task

from bitquake.reports.problems import ReportError
from bitquake.reports.studies import read_study

TASKS = [Task(variant="threshold"), Task()]


def test_finished_failed_and_waiting_cells_stand_side_by_side(suite: Any) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    suite.add("m/rtn-int4-g64", Model("rtn-int4-g64", 4, 0.1), TASKS, twin=full.name)
    broken = suite.plan("m/rtn-int2-g64", TASKS, twin=full.name)
    suite.fail(broken, "killed", "signal 9\nlast line")
    suite.plan("m/rtn-int3-g64", TASKS, twin=full.name)
    study = read_study(suite.write())
    assert [cell.name for cell in study.finished] == ["m/full-precision", "m/rtn-int4-g64"]
    assert [(cell.name, cell.failure) for cell in study.failed] == [("m/rtn-int2-g64", "killed: signal 9 last line")]
    assert [cell.name for cell in study.waiting] == ["m/rtn-int3-g64"]
    assert study.twin(study.cell("m/rtn-int4-g64")) is study.cells[0]
    assert study.cells[1].card is not None and study.cells[1].card.spec_name == "rtn-int4-g64"
    assert list(study.tasks()) == ["block_vqav2_threshold", "block_vqav2_clean"]
    assert not study.problems


def test_names_that_share_a_hash_are_one_result(suite: Any) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    suite.plan("m/uniform-v16-l16", TASKS, hash=full.hash, factors={"vision": 16})
    study = read_study(suite.write())
    assert len(study.finished) == 2
    assert study.cells[0].run is study.cells[1].run
    assert study.cells[1].plan.factors == {"vision": 16}


def test_no_plan_and_a_plan_of_another_version(suite: Any, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds no suite\.json.*bitquake run"):
        read_study(tmp_path)
    suite.add("m/full-precision", Model(), TASKS)
    out = suite.write()
    plan = json.loads((out / "suite.json").read_text())
    (out / "suite.json").write_text(json.dumps({**plan, "version": 99}))
    with pytest.raises(ReportError, match="version 99"):
        read_study(out)
    (out / "suite.json").write_text('{"version": 1')
    with pytest.raises(ReportError, match="cannot be read"):
        read_study(out)
    (out / "suite.json").write_text(json.dumps({**plan, "world": "moon"}))
    with pytest.raises(ReportError, match="world"):
        read_study(out)
    del plan["cells"][0]["twin"]
    (out / "suite.json").write_text(json.dumps({**plan, "cells": [{**plan["cells"][0], "twin": "m/gone"}]}))
    with pytest.raises(ReportError, match="names the twin 'm/gone'"):
        read_study(out)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda manifest: {**manifest, "hash": "0" * 32}, "of another cell"),
        (lambda manifest: {**manifest, "version": 7}, "version 7"),
        (lambda manifest: {k: v for k, v in manifest.items() if k != "samples"}, "samples: Field required"),
    ],
)
def test_a_manifest_that_does_not_fit_costs_only_its_cell(suite: Any, edit: Any, told: str) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    other = suite.add("m/rtn-int4-g64", Model("rtn-int4-g64", 4, 0.1), TASKS, twin=full.name)
    out = suite.write()
    path = out / "cells" / other.hash / "cell.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    study = read_study(out)
    assert [cell.name for cell in study.finished] == [full.name]
    assert told in study.failed[0].failure
    assert [problem.level for problem in study.problems] == ["error"]


def test_samples_that_are_not_those_of_the_manifest_are_left_out(suite: Any) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    out = suite.write()
    path = out / "cells" / full.hash / "cell.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "samples": {**manifest["samples"], "block_vqav2_clean": 61}}))
    study = read_study(out)
    assert list(study.cells[0].tasks) == ["block_vqav2_threshold"]
    assert any("60 samples, its cell.json says 61" in problem.what for problem in study.problems)


def test_a_planned_task_that_is_missing_is_a_problem_and_dev_tasks_are_not(suite: Any) -> None:
    more = {**{task.name: 60 for task in TASKS}, "block_advqa_clean": 60, "block_vqav2_dev": 60}
    full = suite.add("m/full-precision", Model(), TASKS)
    suite.cells[0] = full.model_copy(update={"tasks": more})
    problems = [problem.what for problem in read_study(suite.write()).problems]
    assert problems == ["holds no complete block_advqa_clean"]


def test_a_killed_write_leaves_the_other_tasks(suite: Any) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    out = suite.write()
    (file,) = (out / "cells" / full.hash).rglob("*_samples_block_vqav2_clean.jsonl")
    file.write_text("\n".join(file.read_text().splitlines()[:30]))
    study = read_study(out)
    assert list(study.cells[0].tasks) == ["block_vqav2_threshold"]
    assert any("30 of 60 samples" in problem.what for problem in study.problems)


def test_selectors_confidences_come_from_the_applied_copy(suite: Any) -> None:
    def learned(task: str, records: list[Any]) -> list[Any]:
        return [r.model_copy(update={"confidence": {**r.confidence, "selector": 0.25}}) for r in records]

    suite.add("m/full-precision", Model(), TASKS, applied=learned)
    study = read_study(suite.write())
    answer = next(iter(study.cells[0].tasks["block_vqav2_clean"].answers.values()))
    assert answer.confidences == {"selector": 0.25}
    assert not study.problems


@pytest.mark.parametrize("harm", ["missing", "cut short", "of another plan"])
def test_a_copy_that_is_not_whole_or_not_the_plans_is_left_out_and_named(suite: Any, harm: str) -> None:
    def learned(task: str, records: list[Any]) -> list[Any]:
        return [r.model_copy(update={"confidence": {**r.confidence, "selector": 0.25}}) for r in records]

    full = suite.add("m/full-precision", Model(), TASKS, applied=learned)
    out = suite.write(selectors=["own"])
    marker = out / "applied" / full.hash / "made_from.json"
    (name,) = json.loads(marker.read_text())
    assert name.endswith(".safetensors") and not read_study(out).problems
    if harm == "missing":
        marker.unlink()
    elif harm == "cut short":
        marker.write_text(marker.read_text()[:-2])
    else:
        plan = json.loads((out / "suite.json").read_text())
        (out / "suite.json").write_text(json.dumps({**plan, "selectors": ["own", "transfer"]}))
    study = read_study(out)
    (problem,) = study.problems
    assert problem.level == "error" and "not of this plan's Selectors" in problem.what and full.hash in problem.fix
    kept = study.cells[0].tasks["block_vqav2_clean"]
    assert "applied" not in kept.source
    assert all("selector" not in answer.confidences for answer in kept.answers.values())


def test_selectors_of_other_answers_are_refused(suite: Any) -> None:
    def other(task: str, records: list[Any]) -> list[Any]:
        changed = records[0].model_copy(update={"score": 1.0 - records[0].score})
        return [changed, *records[1:]] if task.endswith("clean") else records

    suite.add("m/full-precision", Model(), TASKS, applied=other)
    study = read_study(suite.write())
    assert [p.level for p in study.problems] == ["error"]
    assert "applied to other answers to block_vqav2_clean" in study.problems[0].what
    kept = study.cells[0].tasks["block_vqav2_clean"]
    assert "applied" not in kept.source and len(kept.answers) == 60


def test_two_models_in_one_cell_are_no_cell(suite: Any) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    out = suite.write()
    suite.add("m/full-precision", dataclasses.replace(Model(), loss=0.5), [Task(family="block_advqa")], hash=full.hash)
    study = read_study(out)
    assert "answers of 2 models in one cell" in study.failed[0].failure
