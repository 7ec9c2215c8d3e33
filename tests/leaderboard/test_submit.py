"""From real runs to submissions, and back: complete, repeatable, nobody's folders in them, exactly the runs' scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import zstandard

from bitquake.leaderboard.boards import Board, load_board
from bitquake.leaderboard.findings import SubmissionError
from bitquake.leaderboard.recompute import load_runs
from bitquake.leaderboard.submission import FILES, MAX_SUBMISSION, read_submission
from bitquake.leaderboard.submit import SubmitError, public_card, slug, submit
from bitquake.leaderboard.validate import validate
from bitquake.quant_card import QuantCard
from bitquake.records import RECORD_KEY
from bitquake.reports import read_runs
from bitquake.reports.pairing import pair_runs
from bitquake.tasks.scoring.gold import GoldError

FULL, INT4 = "acme__block-idefics3__bf16", "acme__block-idefics3__rtn-int4-g64"


@pytest.fixture
def tiny(boards: Path) -> Board:
    return load_board("tiny", boards)


def artifacts(runs: list[Path]) -> Path:
    return runs[0].parent / "artifacts"


def again(runs: list[Path], board: Board, out: Path, **options: Any) -> list[Path]:
    written = submit(runs, board, "acme", out, artifacts=artifacts(runs), **options)
    return [one.folder for one in written]


def copied(runs: list[Path], root: Path) -> list[Path]:
    shutil.copytree(runs[0].parent, root / "runs")
    return sorted(path for path in (root / "runs").iterdir() if path.name != "artifacts")


def test_recomputed_scores_are_the_runs_own(runs: list[Path], submissions: Path, gold: Path, boards: Path) -> None:
    """Three protocols, 440 answers: score, further scores, image and parse failure, each to the bit."""
    recomputed = load_runs([read_submission(submissions / name) for name in (FULL, INT4)], gold, boards=boards)
    original = {run.card_hash: run for run in read_runs(runs, artifacts(runs)).runs}
    assert len(recomputed) == len(original) == 2
    n = 0
    for run in recomputed:
        other = original[run.card_hash]
        assert run.key == other.key and run.cells.keys() == other.cells.keys()
        for task, cell in run.cells.items():
            mine, theirs = cell.answers, other.cells[task].answers
            assert mine.keys() == theirs.keys()
            for sample, answer in mine.items():
                told = theirs[sample]
                assert (answer.score, answer.image_id, answer.parse_failure) == (
                    (told.score, told.image_id, told.parse_failure)
                )
                assert answer.scores.items() <= told.scores.items()
                assert answer.confidence == pytest.approx(told.confidence, rel=1e-5)
                assert told.pixels.startswith(answer.pixels) and told.prompt.startswith(answer.prompt)
                n += 1
    assert n == 440


def test_a_submission_pairs_with_its_twin_as_its_run_does(submissions: Path, gold: Path, boards: Path) -> None:
    runs = load_runs([read_submission(submissions / name) for name in (FULL, INT4)], gold, boards=boards)
    groups, problems = pair_runs(runs)
    assert not problems and [len(group.runs) for group in groups] == [2]
    assert all(len(cells) == 2 for cells in groups[0].cells.values()) and len(groups[0].cells) == 5


def test_a_submission_holds_no_score_and_no_gold_answer(submissions: Path) -> None:
    text = zstandard.ZstdDecompressor().decompress((submissions / INT4 / "records.jsonl.zst").read_bytes())
    keys = {key for line in text.splitlines() for key in json.loads(line)}
    assert keys <= {"task", "id", "answer", "confidence", "pixels", "question", "prompt", "parse_failure", "truncated"}


def test_submissions_name_nobodys_folder(submissions: Path, runs: list[Path]) -> None:
    for name in (FULL, INT4):
        manifest = (submissions / name / "manifest.json").read_text()
        card = (submissions / name / "quant_card.json").read_text()
        assert str(runs[0].parent) not in manifest + card and "artifacts" not in manifest
        assert "lmms-eval --model bitquake_hf --model_args pretrained=bitquake/block-idefics3" in manifest


def test_a_card_from_a_local_folder_loses_the_folder(submissions: Path) -> None:
    card = QuantCard.model_validate_json((submissions / INT4 / "quant_card.json").read_bytes())
    assert public_card(card) == card
    local = card.model_copy(
        update={
            "pretrained": "/data/models/x",
            "spec": {**card.spec, "calibration": {"data": "~/secret/pictures", "source": "self"}},
            "spec_name": "awq-int4:calibration.data=/data/pictures",
        }
    )
    shown = public_card(local)
    assert (shown.pretrained, shown.spec["calibration"]["data"]) == ("x", "pictures")
    assert shown.spec_name == "awq-int4:calibration.data=pictures" and "/data" not in shown.to_json()


def test_the_same_runs_give_the_same_bytes(runs: list[Path], submissions: Path, tiny: Board, tmp_path: Path) -> None:
    folders = again(list(reversed(runs)), tiny, tmp_path)
    assert [folder.name for folder in folders] == [FULL, INT4]
    for folder in folders:
        for file in FILES:
            assert (folder / file).read_bytes() == (submissions / folder.name / file).read_bytes()
    assert [one.changed for one in submit(runs, tiny, "acme", tmp_path, artifacts=artifacts(runs))] == [False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FULL, INT4]


def test_what_stands_there_is_never_changed(runs: list[Path], tiny: Board, tmp_path: Path) -> None:
    again(runs, tiny, tmp_path)
    before = (tmp_path / INT4 / "manifest.json").read_bytes()
    with pytest.raises(SubmitError, match="another submission stands there"):
        again(runs, tiny, tmp_path, contact="me")
    assert (tmp_path / INT4 / "manifest.json").read_bytes() == before


def test_a_twin_that_was_submitted_before(
    runs: list[Path], tiny: Board, tmp_path: Path, gold: Path, boards: Path
) -> None:
    full = [run for run in runs if "full" in run.name]
    quantized = [run for run in runs if "int4" in run.name]
    with pytest.raises(SubmitError, match="needs its full-precision twin"):
        again(quantized, tiny, tmp_path)
    with pytest.raises(SubmitError, match="submit the full-precision run first"):
        again(quantized, tiny, tmp_path, twin=FULL)
    again(full, tiny, tmp_path)
    (folder,) = again(quantized, tiny, tmp_path, twin=FULL, model="mine", quantization="int4")
    assert folder.name == "acme__mine__int4"
    assert [verdict.level for verdict in validate([folder], gold=gold, boards=boards)] == ["recomputed"]


def test_incomplete_runs_are_not_submitted(runs: list[Path], tiny: Board, tmp_path: Path) -> None:
    part = [run for run in runs if run.name != "rtn-int4-g64-60"]
    with pytest.raises(SubmitError, match="block_advqa_clean was not run") as error:
        again(part, tiny, tmp_path / "out")
    assert "--tasks block_advqa_clean --limit 60" in str(error.value)
    cut = copied(runs, tmp_path)
    (file,) = (tmp_path / "runs" / "rtn-int4-g64-40").glob("*_samples_block_scienceqa_clean.jsonl")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-1]))
    with pytest.raises(SubmitError, match="39 of 40 samples"):
        submit(cut, tiny, "acme", tmp_path / "out", artifacts=tmp_path / "runs" / "artifacts")
    assert not (tmp_path / "out").exists()


def test_of_a_longer_run_the_first_samples_are_taken(
    runs: list[Path], tiny: Board, boards: Path, submissions: Path, tmp_path: Path
) -> None:
    """As ``--limit`` takes them: in the order of the documents, not of the ids."""
    tasks = [task.model_copy(update={"n": 25, "gold": None}) for task in tiny.tasks[:1]]
    folders = again(runs, tiny.model_copy(update={"tasks": tasks}), tmp_path)
    (file,) = next(run for run in runs if run.name == "rtn-int4-g64-60").glob("*_samples_block_advqa_clean.jsonl")
    first = [json.loads(line) for line in file.read_text().splitlines()]
    expected = {line[RECORD_KEY]["sample_id"] for line in first if line["doc_id"] < 25}
    assert {row.id for row in read_submission(folders[1]).rows()} == expected and len(expected) == 25


def test_a_quantized_run_without_a_card_or_tasks(runs: list[Path], boards: Path, tiny: Board, tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match="no quant card"):
        submit(runs, tiny, "acme", tmp_path / "out", artifacts=tmp_path)
    with pytest.raises(SubmitError, match="no run of a task of the board"):
        tasks = [tiny.tasks[0].model_copy(update={"task": "block_vqav2_fog_2"})]
        again(runs, tiny.model_copy(update={"tasks": tasks}), tmp_path / "out")
    with pytest.raises(SubmitError, match="name one submission"):
        again(runs, tiny, tmp_path / "out", model="x")


@pytest.mark.parametrize("organisation", ["../../etc", "Acme", "a__b", "", "a b", "<b>", "-"])
def test_names_that_are_no_folder(organisation: str, runs: list[Path], tiny: Board, tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match="give names of"):
        submit(runs, tiny, organisation, tmp_path / "out", artifacts=artifacts(runs))
    assert not (tmp_path / "out").exists()


def test_a_link_that_runs_code_is_not_written(runs: list[Path], tiny: Board, tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="text-script"):
        again(runs, tiny, tmp_path / "out", link="javascript:alert(1)")
    assert not (tmp_path / "out").exists()


def test_too_large_a_submission_is_not_written(
    runs: list[Path], tiny: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitquake.leaderboard.submission.MAX_SUBMISSION", 9_000)
    with pytest.raises(SubmissionError, match="9,000 are allowed"):
        again(runs, tiny, tmp_path / "out")
    assert MAX_SUBMISSION == 20_000_000 and not (tmp_path / "out").exists()


def test_control_characters_of_a_model_do_not_keep_it_from_submitting(
    runs: list[Path], tiny: Board, tmp_path: Path, gold: Path, boards: Path
) -> None:
    mine = copied(runs, tmp_path)
    (file,) = (tmp_path / "runs" / "rtn-int4-g64-60").glob("*_samples_block_advqa_clean.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0][RECORD_KEY]["answer"] = "<b>\u202ered\x1b[2J"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    written = submit(mine, tiny, "acme", tmp_path / "out", artifacts=tmp_path / "runs" / "artifacts")
    assert [v.level for v in validate([one.folder for one in written], gold=gold, boards=boards)] == ["recomputed"] * 2
    assert "<b>\ufffdred\ufffd[2J" in [row.answer for row in read_submission(written[1].folder).rows()]


def test_without_gold_nothing_is_recomputed(submissions: Path, boards: Path, tmp_path: Path) -> None:
    verdicts = validate([submissions / INT4], gold=tmp_path, boards=boards)
    assert [verdict.level for verdict in verdicts] == ["self-reported"]
    assert [finding.code for finding in verdicts[0].findings] == ["gold-missing"]
    with pytest.raises(GoldError, match="no pinned gold file"):
        load_runs([read_submission(submissions / INT4)], tmp_path, boards=boards)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bitquake/block-idefics3", "block-idefics3"),
        ("BF16", "bf16"),
        ("rtn-int4:bits=3", "rtn-int4-bits-3"),
        ("Ü_x.", "x"),
    ],
)
def test_slugs(name: str, expected: str) -> None:
    assert slug(name) == expected
