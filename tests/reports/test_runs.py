"""Reading lmms-eval's folders: what is complete, what is damaged, and that damage never spreads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import Model, Runs, Task, blake, noisy, records, sample_line

from bitquake.reports import RunError, read_runs
from bitquake.reports.runs import Cell, Inputs, command_line, expected_samples, public_name, settings_of

FULL, INT4 = Model(), Model("rtn-int4-g64", 4, 0.3)


def sample_file(folder: Path, task: str) -> Path:
    [path] = folder.rglob(f"*_samples_{task}.jsonl")
    return path


def results_file(folder: Path) -> Path:
    [path] = folder.rglob("*_results.json")
    return path


def cells(inputs: Inputs) -> dict[str, Cell]:
    return {name: cell for run in inputs.runs for name, cell in run.cells.items()}


def whole(inputs: Inputs) -> set[str]:
    return {name for name, cell in cells(inputs).items() if not cell.damage}


def errors(inputs: Inputs) -> list[str]:
    return [str(problem) for problem in inputs.problems if problem.level == "error"]


@pytest.fixture
def folder(runs: Runs) -> Path:
    return runs.write(INT4, [Task(), noisy("fog", 3)])


def test_reads_what_was_written(runs: Runs, folder: Path) -> None:
    inputs = read_runs([folder], runs.artifacts)
    [run] = inputs.runs
    assert not inputs.problems
    assert run.card == INT4.card()
    assert run.cells.keys() == {"block_vqav2_clean", "block_vqav2_fog_3"}
    written = records(INT4, noisy("fog", 3))
    cell = run.cells["block_vqav2_fog_3"]
    assert (cell.family, cell.variant, cell.noise) == ("block_vqav2", "fog_3", written[0].noise)
    assert {s: (a.score, a.confidence, a.image_id) for s, a in cell.answers.items()} == {
        r.sample_id: (r.score, r.confidence["joint"], r.image_id) for r in written
    }


@pytest.mark.parametrize("level", ["", "..", "bitquake__idefics3-tiny"])
def test_finds_runs_at_any_level_and_reads_each_once(runs: Runs, folder: Path, level: str) -> None:
    inputs = read_runs([folder / level, folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_clean", "block_vqav2_fog_3"}
    assert not inputs.problems


def test_two_quantizations_in_one_folder_are_two_runs(runs: Runs) -> None:
    # lmms-eval names the folder after `pretrained` only, so two quantizations may share it.
    folder = runs.write(FULL, [Task()], name="same")
    assert runs.write(INT4, [Task()], name="same") == folder
    assert {run.card_hash for run in read_runs([folder], runs.artifacts).runs} == {
        FULL.card().content_hash,
        INT4.card().content_hash,
    }


def test_tasks_of_one_model_from_several_folders_are_one_run(runs: Runs) -> None:
    folders = [runs.write(INT4, [Task()], name="a"), runs.write(INT4, [noisy("fog", 3)], name="b")]
    [run] = read_runs(folders, runs.artifacts).runs
    assert len(run.cells) == 2
    assert len(run.commands) == 2


@pytest.mark.parametrize("cut", [1, 200, 5000])
def test_sample_file_cut_short_by_a_kill(runs: Runs, folder: Path, cut: int) -> None:
    path = sample_file(folder, "block_vqav2_fog_3")
    path.write_bytes(path.read_bytes()[:-cut])
    inputs = read_runs([folder], runs.artifacts)
    if cut == 1:  # only the last line's end is missing: all 60 samples are there
        assert whole(inputs) == {"block_vqav2_clean", "block_vqav2_fog_3"}
        return
    assert whole(inputs) == {"block_vqav2_clean"}
    [error] = errors(inputs)
    assert path.name in error
    assert " of 60 samples" in error
    assert "run the same lmms-eval command again" in error


def test_whole_lines_missing_are_noticed(runs: Runs, folder: Path) -> None:
    path = sample_file(folder, "block_vqav2_clean")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:48]))
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_3"}
    assert "48 of 60 samples" in errors(inputs)[0]


@pytest.mark.parametrize("content", ["", '{"results": {"blo', "[]", "null", '{"results": {}}', "\x00\x00"])
def test_results_file_cut_short_by_a_kill(runs: Runs, folder: Path, content: str) -> None:
    other = runs.write(FULL, [Task()])
    results_file(folder).write_text(content)
    inputs = read_runs([folder, other], runs.artifacts)
    assert [run.is_full_precision for run in inputs.runs] == [True]
    [error] = errors(inputs)
    assert results_file(folder).name in error


def test_missing_results_file(runs: Runs, folder: Path) -> None:
    other = runs.write(FULL, [Task()])
    results_file(folder).unlink()
    inputs = read_runs([folder, other], runs.artifacts)
    assert len(inputs.runs) == 1
    assert "is missing" in errors(inputs)[0]


def test_missing_sample_file_is_told_by_the_results(runs: Runs, folder: Path) -> None:
    sample_file(folder, "block_vqav2_clean").unlink()
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_3"}
    assert "no sample file for task 'block_vqav2_clean'" in errors(inputs)[0]
    assert "--log_samples" in errors(inputs)[0]


def test_killed_before_anything_was_written(runs: Runs, folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "killed"
    empty.mkdir()
    inputs = read_runs([folder, empty], runs.artifacts)
    assert len(whole(inputs)) == 2
    assert "killed: holds no result" in errors(inputs)[0]


def test_nothing_usable_is_one_error_that_lists_why(runs: Runs, folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.jsonl"):
        path.write_text('{"doc_id": 0, "bitq')
    with pytest.raises(RunError) as caught:
        read_runs([folder], runs.artifacts)
    assert "no complete result" in str(caught.value)
    assert "block_vqav2_clean.jsonl" in str(caught.value)
    with pytest.raises(RunError, match="no complete result"):
        read_runs([tmp_path / "results" / "artifacts"])
    with pytest.raises(RunError, match="no folder at all"):
        read_runs([])


def test_a_file_that_cannot_be_read_costs_no_other(runs: Runs, folder: Path) -> None:
    path = sample_file(folder, "block_vqav2_clean")
    path.unlink()
    path.mkdir()  # root may read any file, so that its mode cannot be what is wrong
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_3"}
    [error] = errors(inputs)
    assert path.name in error and "cannot be read" in error


def test_paths_that_are_no_folders(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        read_runs([tmp_path / "file"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "line 61"),
        ('{"bitquake": "text"}', "no sample record"),
        ('{"bitquake": {"version": 7}}', "version 7"),
        ('{"bitquake": {"version": 1, "score": 2}}', "sample record: "),
        ("7", "no sample record"),
        ('{"doc_id": 3}', "without a record"),
        ("\udcff", "line 61"),
    ],
)
def test_a_damaged_line_damages_its_cell_only(runs: Runs, folder: Path, line: str, reason: str) -> None:
    path = sample_file(folder, "block_vqav2_clean")
    path.write_bytes(path.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_3"}
    assert reason in errors(inputs)[0]


def test_samples_logged_twice_count_once(runs: Runs, folder: Path) -> None:
    path = sample_file(folder, "block_vqav2_clean")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, *lines[:5]]))
    inputs = read_runs([folder], runs.artifacts)
    assert len(cells(inputs)["block_vqav2_clean"].answers) == 60
    assert not errors(inputs)
    assert "5 samples stand there twice" in str(inputs.problems[0])


def test_contradicting_answers_to_one_sample_damage_the_cell(runs: Runs, folder: Path) -> None:
    path = sample_file(folder, "block_vqav2_clean")
    first = records(INT4, Task())[0]
    other = first.model_copy(update={"score": 1.0 - first.score})
    with path.open("a") as file:
        file.write(json.dumps(sample_line(other, 0)) + "\n")
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_3"}
    assert f"different answer to sample '{first.sample_id}'" in errors(inputs)[0]
    assert first.sample_id not in cells(inputs)["block_vqav2_clean"].answers


def test_a_sample_that_the_dataset_holds_twice_counts_twice(runs: Runs) -> None:
    def repeat(task: str, found: list[Any]) -> list[Any]:
        return [*found[:-1], found[0].model_copy()]  # the last document equals the first

    folder = runs.write(INT4, [Task()], edit=repeat)
    inputs = read_runs([folder], runs.artifacts)
    assert not inputs.problems
    assert len(cells(inputs)["block_vqav2_clean"].answers) == 60


def test_a_replaced_checkpoint_under_an_old_cache_is_refused(runs: Runs) -> None:
    def mix(task: str, found: list[Any]) -> list[Any]:
        if task.endswith("fog_3"):
            return [r.model_copy(update={"model_hash": blake("old")}) if i < 20 else r for i, r in enumerate(found)]
        return found

    bad, good = runs.write(INT4, [Task(), noisy("fog", 3)], edit=mix), runs.write(FULL, [Task()])
    inputs = read_runs([bad, good], runs.artifacts)
    assert [run.is_full_precision for run in inputs.runs] == [True]
    [error] = errors(inputs)
    assert "several models in one run" in error
    assert "--use_cache" in error


def test_failed_samples_are_counted_and_are_no_other_model(runs: Runs) -> None:
    def fail(task: str, found: list[Any]) -> list[Any]:
        lost = {
            "failure": "envelope",
            "failure_detail": "cut short",
            "score": 0.0,
            "confidence": {},
            "model_hash": "",
            "card": "",
        }
        return [r.model_copy(update=lost) if i in (4, 9) else r for i, r in enumerate(found)]

    inputs = read_runs([runs.write(INT4, [Task()], edit=fail)], runs.artifacts)
    [problem] = inputs.problems
    assert problem.level == "warning"
    assert problem.what == "2 of 60 samples of block_vqav2_clean failed (envelope 2), such as: cut short"
    cell = cells(inputs)["block_vqav2_clean"]
    assert not cell.damage and len(cell.answers) == 60
    assert cell.failures == {"envelope": 2}
    assert cell.failure_details == {"cut short": 2}
    assert sum(answer.confidence is None for answer in cell.answers.values()) == 2


def test_a_repeated_run_replaces_its_damaged_first_attempt(runs: Runs) -> None:
    first, second = (runs.write(INT4, [Task()], name=name) for name in ("first", "second"))
    path = sample_file(first, "block_vqav2_clean")
    path.write_bytes(path.read_bytes()[:-100])
    for order in ([first, second], [second, first]):
        inputs = read_runs(order, runs.artifacts)
        assert cells(inputs)["block_vqav2_clean"].source.startswith("second/")
        assert whole(inputs) == {"block_vqav2_clean"}


def test_equal_repeats_count_once_and_different_ones_are_refused(runs: Runs) -> None:
    one, two = (runs.write(INT4, [Task(), noisy("fog", 1)], name=name) for name in ("one", "two"))
    inputs = read_runs([one, two], runs.artifacts)
    assert {p.level for p in inputs.problems} == {"warning"}
    assert len(whole(inputs)) == 2

    def flip(task: str, found: list[Any]) -> list[Any]:
        return [r.model_copy(update={"score": 0.0}) for r in found] if task.endswith("clean") else found

    three = runs.write(INT4, [Task(), noisy("fog", 1)], name="three", edit=flip)
    inputs = read_runs([one, three], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_1"}
    assert "two results for block_vqav2_clean that differ in" in errors(inputs)[0]
    changed = sum(record.score > 0 for record in records(INT4, Task()))
    assert f"differ in {changed} answers: one/" in errors(inputs)[0]


def test_tasks_of_others_are_left_alone(runs: Runs, folder: Path) -> None:
    path = sample_file(folder, "block_vqav2_fog_3")
    path.with_name(path.name.replace("block_vqav2_fog_3", "mme")).write_text('{"doc_id": 0, "mme_score": 1}\n')
    inputs = read_runs([folder], runs.artifacts)
    assert len(whole(inputs)) == 2
    assert "holds no Bitquake records" in str(inputs.problems[0])
    assert not errors(inputs)


def test_missing_and_changed_quant_cards(runs: Runs, folder: Path, tmp_path: Path) -> None:
    inputs = read_runs([folder], tmp_path / "elsewhere")
    assert inputs.runs[0].card is None
    assert f"quant card {INT4.card().content_hash[:12]} is missing" in errors(inputs)[0]
    assert len(whole(inputs)) == 2
    card = runs.artifacts / "quant_cards" / f"{INT4.card().content_hash}.json"
    card.write_text(card.read_text().replace('"execution":"simulated"', '"execution":"packed"'))
    inputs = read_runs([folder], runs.artifacts)
    assert inputs.runs[0].card is None
    assert "was changed after the run" in errors(inputs)[0]
    card.write_text("{")
    assert "cannot be read" in errors(read_runs([folder], runs.artifacts))[0]


def test_card_is_found_where_the_run_put_it(runs: Runs) -> None:
    args = f"pretrained=x,quant=rtn-int4-g64,artifacts={runs.artifacts}"
    folder = runs.write(INT4, [Task()], config={"model_args": args})
    assert read_runs([folder]).runs[0].card == INT4.card()


@pytest.mark.parametrize(
    ("original", "limit", "offset", "answered"),
    [
        (500, None, 0, 500),
        (500, 100, 0, 100),
        (500, 100, 450, 50),
        (500, None, 450, 50),
        (50, 100, 0, 50),
        (50, 5, 60, 0),
    ],
)
def test_expected_samples_follow_limit_and_offset(original: int, limit: int | None, offset: int, answered: int) -> None:
    # lmms-eval: "effective" is min(limit, original); the documents are original[offset : offset + limit].
    documents = list(range(original))[offset : None if limit is None else offset + limit]
    assert len(documents) == answered
    counts = {"original": original, "effective": min(limit or original, original)}
    assert expected_samples(counts, {"limit": limit, "offset": offset}) == answered


def test_a_results_file_that_tells_no_number_of_samples(runs: Runs, folder: Path) -> None:
    path = results_file(folder)
    results = json.loads(path.read_text())
    results["n-samples"]["block_vqav2_clean"] = {"original": "many"}
    path.write_text(json.dumps(results))
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_fog_3"}
    assert "60 of an unknown number" in errors(inputs)[0]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        ("/data/models/tiny", "tiny"),
        ("../tiny/", "tiny"),
        ("~/x/tiny", "tiny"),
        ("./tiny", "tiny"),
    ],
)
def test_local_folders_are_not_published(told: str, shown: str) -> None:
    assert public_name(told) == shown


def test_the_command_shows_nobodys_folders() -> None:
    quant = "awq-int4-g64:calibration.data=/somebody/pictures:bits=3"
    told = f"pretrained=/somebody/model,quant={quant},batch_size=8"
    shown = command_line({"config": {"model": "bitquake_hf", "model_args": told}})
    assert "somebody" not in shown
    assert "pretrained=model,quant=awq-int4-g64:calibration.data=pictures:bits=3,batch_size=8" in shown


def test_what_selectors_learn_from_is_neither_shown_nor_judged(runs: Runs) -> None:
    """A dev task leaves no cell and no problem, even where it is damaged; other tasks of the run stay."""
    folder = runs.write(INT4, [Task(), Task(variant="dev", n=30)])
    results = json.loads(results_file(folder).read_text())
    for config in results["configs"].values():
        config["metadata"]["bitquake"]["family"] = "block_vqav2"
    results_file(folder).write_text(json.dumps(results))
    sample_file(folder, "block_vqav2_dev").write_text("{cut sh")
    inputs = read_runs([folder], runs.artifacts)
    assert whole(inputs) == {"block_vqav2_clean"} and not inputs.problems
    assert not any("dev" in file.path for file in inputs.files)
    sample_file(folder, "block_vqav2_dev").unlink()
    assert not read_runs([folder], runs.artifacts).problems
    sample_file(folder, "block_vqav2_clean").unlink()
    results["n-samples"].pop("block_vqav2_clean")
    results_file(folder).write_text(json.dumps(results))
    with pytest.raises(RunError, match="no complete result"):
        read_runs([folder], runs.artifacts)


def test_a_split_for_selectors_is_no_setting_of_other_tasks() -> None:
    """A run from before the family had one is still a pair of a run from after."""
    splits: dict[str, Any] = {"test": {"split": "test"}, "threshold": {"split": "threshold"}}
    metadata = {"version": 1, "bitquake": {"family": "a", "splits": splits}}
    newer = {"version": 1, "bitquake": {"family": "a", "splits": splits | {"dev": {"split": "dev"}}}}
    moved = {"version": 1, "bitquake": {"family": "a", "splits": splits | {"threshold": {"split": "dev"}}}}
    before, after, other = (settings_of({"configs": {"t": {"metadata": one}}}, "t") for one in (metadata, newer, moved))
    assert before == after != other and "dev" in newer["bitquake"]["splits"]  # type: ignore[operator]
