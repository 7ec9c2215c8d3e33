"""Pairs: formed when nothing but the quantization differs, refused with the difference named otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import PRETRAINED, Model, Runs, Task, blake, noisy

from bitquake.metrics import Samples, compare
from bitquake.records import SampleRecord
from bitquake.reports import ReportResult, build
from bitquake.reports.schema import CellEntry

Edit = Callable[[str, list[SampleRecord]], list[SampleRecord]]
TASKS = [Task(variant="threshold"), Task(), noisy("fog", 3)]
CLEAN, FOG = "block_vqav2_clean", "block_vqav2_fog_3"


def report(runs: Runs, *folders: Path, **options: Any) -> ReportResult:
    return build(list(folders), runs.root / "site", artifacts=runs.artifacts, replicates=40, **options)


def quantized(result: ReportResult, task: str = CLEAN) -> CellEntry:
    names = {run.id: run.role for run in result.report.runs}
    [cell] = [c for c in result.report.cells if c.task == task and names[c.run] != "full-precision"]
    return cell


def errors(result: ReportResult) -> str:
    return "\n".join(str(problem) for problem in result.problems if problem.level == "error")


def test_a_pair(runs: Runs) -> None:
    result = report(runs, runs.write(Model(), TASKS), runs.write(Model("rtn-int4-g64", 4, 0.3), TASKS))
    assert result.ok
    assert result.n_pairs == 1
    assert quantized(result).pairing == "paired"
    assert quantized(result).metrics["accuracy"].difference is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float16"}, "dtype float16 vs bfloat16"),
        ({"device": "cuda:0 NVIDIA H200"}, "device cuda NVIDIA H200 vs cpu"),
        ({"architecture": "Other"}, "architecture Other vs Idefics3ForConditionalGeneration"),
        ({"libraries": {"torch": "2.15.0", "transformers": "5.17.0"}}, "transformers 5.17.0 vs 5.23.0"),
        ({"revision": "zzz"}, "no full-precision run of bitquake/idefics3-tiny (revision zzz)"),
        ({"pretrained": "other/model"}, "no full-precision run of other/model"),
    ],
)
def test_another_model_or_environment_is_refused_by_name(runs: Runs, changes: dict[str, Any], named: str) -> None:
    other = Model("rtn-int4-g64", 4, 0.3, changes=changes)
    result = report(runs, runs.write(Model(), TASKS), runs.write(other, TASKS))
    assert result.n_pairs == 0
    assert named in errors(result)
    cell = quantized(result)
    assert cell.pairing == "unpaired"
    assert all(value.difference is None for value in cell.metrics.values())
    assert cell.metrics["accuracy"].value is not None


def test_a_quantized_checkpoint_is_paired_with_what_it_was_made_from(runs: Runs) -> None:
    other = Model("rtn-int4-g64", 4, 0.3, pretrained="/somewhere/mine", changes={"base": PRETRAINED})
    result = report(runs, runs.write(Model(), TASKS), runs.write(other, TASKS))
    assert result.n_pairs == 1 and quantized(result).pairing == "paired"
    assert quantized(result).metrics["accuracy"].difference is not None


def test_a_published_checkpoint_knows_no_revision_of_its_base(runs: Runs) -> None:
    changes = {"base": PRETRAINED, "revision": ""}
    other = Model("gptq-int4-g128", 4, 0.3, pretrained="somebody/model-GPTQ", changes=changes)
    assert report(runs, runs.write(Model(), TASKS), runs.write(other, TASKS)).n_pairs == 1
    stranger = Model("awq-int4-g128", 4, 0.3, pretrained="somebody/other", changes={"base": "x/y", "revision": ""})
    assert report(runs, runs.write(Model(), TASKS), runs.write(stranger, TASKS)).n_pairs == 0


def test_another_image_processor_makes_no_pair(runs: Runs) -> None:
    twin = Model(changes={"image_processor": "FastOne"})
    other = Model("rtn-int4-g64", 4, 0.3, changes={"image_processor": "SlowOne"})
    result = report(runs, runs.write(twin, TASKS), runs.write(other, TASKS))
    assert result.n_pairs == 0 and "image processor SlowOne vs FastOne" in errors(result)


def test_an_adapter_makes_another_model(runs: Runs) -> None:
    """A quantized model with an adapter is compared with the full-precision one that has the same adapter."""
    adapter = {"adapter": {"source": "lora", "hash": "1"}}
    other = Model("rtn-int4-g64", 4, 0.3, changes=adapter)
    result = report(runs, runs.write(Model(), TASKS), runs.write(other, TASKS))
    assert result.n_pairs == 0 and "no full-precision run of bitquake/idefics3-tiny + lora" in errors(result)


def test_what_belongs_to_the_quantization_may_differ(runs: Runs) -> None:
    changes = {
        "device": "cuda:1 NVIDIA H200",
        "libraries": {"bitquake": "0.1.0", "torch": "2.15.0", "transformers": "5.23.0", "hqq": "0.2.8"},
        "kernel": "marlin",
    }
    twin = Model(changes={"device": "cuda:0 NVIDIA H200"})
    result = report(runs, runs.write(twin, TASKS), runs.write(Model("hqq-int4", 4, changes=changes), TASKS))
    assert result.ok
    assert result.n_pairs == 1


def test_the_twin_that_differs_in_nothing_is_chosen(runs: Runs) -> None:
    half = {"dtype": "float16"}
    folders = [
        runs.write(Model(), TASKS, name="bf16"),
        runs.write(Model(changes=half), TASKS, name="fp16"),
        runs.write(Model("rtn-int4-g64", 4, changes=half), TASKS),
    ]
    result = report(runs, *folders)
    [run] = [run for run in result.report.runs if run.role == "quantized"]
    twins = {entry.id: entry.quantization for entry in result.report.runs}
    assert twins[run.twin or ""] == "FP16"


@pytest.mark.parametrize(
    ("config", "fields", "named"),
    [
        ({"batch_size": "1", "model_args": "pretrained=x,quant=y"}, {}, 'batch size "1" vs "8"'),
        ({"gen_kwargs": "temperature=0.7"}, {}, "generation arguments"),
        ({"model": "qwen2_vl"}, {}, 'model wrapper "qwen2_vl" vs "bitquake_hf"'),
        ({"model_args": "pretrained=x,batch_size=8,attn_implementation=eager"}, {}, '"eager" vs "sdpa"'),
        ({}, {"versions": {CLEAN: 2.0, FOG: 2.0}}, "task version 2.0 vs 1.0"),
        ({}, {"chat_template_sha": "abc"}, "chat template"),
        ({}, {"n-shot": {CLEAN: 4, FOG: 4}}, "few-shot examples 4 vs 0"),
    ],
)
def test_other_settings_are_refused_by_name(
    runs: Runs, config: dict[str, Any], fields: dict[str, Any], named: str
) -> None:
    other = runs.write(Model("rtn-int4-g64", 4), TASKS, config=config, results_fields=fields)
    result = report(runs, runs.write(Model(), TASKS), other)
    assert named in errors(result)
    assert quantized(result).pairing == "unpaired"


def change(task: str, count: int, **update: Any) -> Edit:
    def edit(name: str, found: list[SampleRecord]) -> list[SampleRecord]:
        if name != task:
            return found
        return [r.model_copy(update=update) if i < count else r for i, r in enumerate(found)]

    return edit


def drop(task: str, keep: slice) -> Edit:
    return lambda name, found: found[keep] if name == task else found


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (change(CLEAN, 37, pixel_hash=[blake("other")]), "37 of 60 samples have other pixels"),
        (change(CLEAN, 2, prompt_hash=blake("other")), "2 of 60 samples have another prompt"),
        (change(CLEAN, 3, image_id="other"), "3 of 60 samples have another image id"),
        (change(CLEAN, 60, noise={"name": "fog", "severity": 1, "seed": 7, "version": 1}), "noise"),
        (change(CLEAN, 60, subset="abc"), "subset abc vs "),
        (change(CLEAN, 60, split="val"), "split val vs test"),
        (change(CLEAN, 60, part="test, 40 ids of mine.json"), "part test, 40 ids of mine.json vs the whole split"),
        (change(CLEAN, 60, shift_from="other_clean"), "shift from other_clean vs none"),
    ],
)
def test_other_pictures_prompts_or_data_refuse_that_task_only(runs: Runs, edit: Edit, named: str) -> None:
    other = runs.write(Model("rtn-int4-g64", 4), TASKS, edit=edit)
    result = report(runs, runs.write(Model(), TASKS), other)
    assert named in errors(result)
    assert quantized(result, CLEAN).pairing == "unpaired"
    assert quantized(result, CLEAN).metrics["accuracy"].difference is None
    assert quantized(result, FOG).metrics["accuracy"].difference is not None


def test_two_revisions_of_a_dataset_are_not_paired_and_an_unknown_one_is(runs: Runs) -> None:
    one, two = ("a" * 40, "b" * 40)
    twin = runs.write(Model(), TASKS, edit=change(CLEAN, 60, dataset_revision=one))
    other = runs.write(Model("rtn-int4-g64", 4), TASKS, edit=change(CLEAN, 60, dataset_revision=two))
    result = report(runs, twin, other)
    assert f"dataset revision {two} vs {one}" in errors(result)
    assert quantized(result, CLEAN).pairing == "unpaired" and quantized(result, FOG).pairing == "paired"
    unknown = runs.write(Model("rtn-int4-g64", 4), TASKS, name="unknown")
    assert quantized(report(runs, twin, unknown), CLEAN).pairing == "paired"


def test_samples_that_failed_have_no_pixels_to_compare(runs: Runs) -> None:
    edit = change(CLEAN, 5, failure="image", pixel_hash=[], prompt_hash="", score=0.0, confidence={})
    result = report(runs, runs.write(Model(), TASKS), runs.write(Model("rtn-int4-g64", 4), TASKS, edit=edit))
    assert result.ok
    assert quantized(result).failures == {"image": 5}
    assert quantized(result).n_missing_confidence == 5


def smaller(n: int) -> dict[str, Any]:
    return {"n-samples": {task.name: {"original": 60, "effective": n if task.name == CLEAN else 60} for task in TASKS}}


def test_different_sample_sets_are_refused_with_counts(runs: Runs) -> None:
    other = runs.write(
        Model("rtn-int4-g64", 4),
        TASKS,
        edit=drop(CLEAN, slice(0, 48)),
        results_fields=smaller(48),
        config={"limit": 48},
    )
    result = report(runs, runs.write(Model(), TASKS), other)
    assert "samples missing here: 12 of 60 (such as test-00048)" in errors(result)
    assert "--common-samples" in errors(result)
    assert quantized(result, CLEAN).pairing == "unpaired"
    assert quantized(result, FOG).pairing == "paired"


def test_common_samples_compares_the_intersection_and_says_so(runs: Runs) -> None:
    twin = runs.write(Model(), TASKS, edit=drop(CLEAN, slice(6, 60)), results_fields=smaller(54), config={"offset": 6})
    model = Model("rtn-int4-g64", 4, 0.5)
    other = runs.write(model, TASKS, edit=drop(CLEAN, slice(0, 48)), results_fields=smaller(48), config={"limit": 48})
    result = report(runs, twin, other, common_samples=True)
    cell = quantized(result, CLEAN)
    assert cell.n == 42
    assert cell.common == "42 common samples of 48 to 54"
    assert "42 common samples of 48 to 54" in result.index.read_text()
    expected = compare(
        arrays(model, slice(6, 48)), arrays(Model(), slice(6, 48)), metrics=["accuracy"], replicates=40, seed=0
    )["accuracy"]
    found = cell.metrics["accuracy"].difference
    assert found is not None
    assert (found.delta, found.lo, found.hi) == pytest.approx((expected.delta, expected.lo, expected.hi))


def arrays(model: Model, keep: slice) -> Samples:
    from run_folders import records

    found = records(model, Task())[keep]
    return Samples(
        [r.score for r in found], [r.confidence["joint"] or np.nan for r in found], [r.image_id for r in found]
    )


def test_common_samples_uses_what_a_killed_run_left(runs: Runs) -> None:
    folders = [runs.write(Model(), TASKS), runs.write(Model("rtn-int4-g64", 4), TASKS)]
    [path] = folders[1].rglob(f"*_samples_{CLEAN}.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:30]) + b'{"doc_id": 30, "bit')
    strict = report(runs, *folders)
    assert not [c for c in strict.report.cells if c.task == CLEAN and c.pairing == "paired"]
    assert quantized(strict, FOG).pairing == "paired"
    assert quantized(report(runs, *folders, common_samples=True), CLEAN).n == 30


def test_no_common_sample_at_all(runs: Runs) -> None:
    twin = runs.write(Model(), TASKS, edit=drop(CLEAN, slice(0, 30)), results_fields=smaller(30), config={"limit": 30})
    other = runs.write(
        Model("rtn-int4-g64", 4),
        TASKS,
        edit=drop(CLEAN, slice(30, 60)),
        results_fields=smaller(30),
        config={"offset": 30},
    )
    result = report(runs, twin, other, common_samples=True)
    assert "no sample in common" in errors(result)
    assert quantized(result, FOG).pairing == "paired"


def test_a_missing_card_forms_no_pair_and_is_shown(runs: Runs) -> None:
    model = Model("rtn-int4-g64", 4)
    folders = [runs.write(Model(), TASKS), runs.write(model, TASKS)]
    (runs.artifacts / "quant_cards" / f"{model.card().content_hash}.json").unlink()
    result = report(runs, *folders)
    assert result.n_pairs == 0
    assert quantized(result).reason == "its quant card is missing"
    assert "card missing" in result.index.read_text()
    assert "Card missing" in (result.index.parent / "models.html").read_text()


def test_a_task_that_only_one_of_the_two_ran(runs: Runs) -> None:
    result = report(
        runs, runs.write(Model(), [Task()]), runs.write(Model("rtn-int4-g64", 4), [Task(), noisy("fog", 3)])
    )
    assert result.ok
    assert quantized(result, CLEAN).pairing == "paired"
    assert quantized(result, FOG).pairing == "unpaired"
    assert any("has no complete block_vqav2_fog_3" in str(problem) for problem in result.problems)


def test_models_that_answer_in_plain_text_stand_alone(runs: Runs) -> None:
    def plain(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return [r.model_copy(update={"model_hash": "", "card": "", "confidence": {}, "pixel_hash": []}) for r in found]

    folder = runs.write(Model("none", 4, pretrained="other/vlm"), [Task()], edit=plain)
    result = report(runs, runs.write(Model(), [Task()]), folder)
    cell = quantized(result)
    assert cell.reason == "it has no quant card"
    assert cell.metrics["accuracy"].value is not None
    assert cell.metrics["ece_15"].value is None
    assert cell.metrics["ece_15"].note == "no sample has a confidence"
