"""Levels, copies, reproductions, history and the command line, on real submissions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from bad_submissions import Draft

from bitquake.cli import main
from bitquake.leaderboard import boards as board_files
from bitquake.leaderboard.boards import load_board
from bitquake.leaderboard.findings import Finding, SubmissionError
from bitquake.leaderboard.history import HistoryError, changed_since
from bitquake.leaderboard.recompute import load_runs
from bitquake.leaderboard.site import build_site
from bitquake.leaderboard.submission import read_submission
from bitquake.leaderboard.validate import Verdict, all_submissions, validate
from bitquake.quant_card import QuantCard
from bitquake.tasks.scoring.gold import GoldError

FULL, INT4 = "acme__block-idefics3__bf16", "acme__block-idefics3__rtn-int4-g64"


@pytest.fixture
def root(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus, tmp_path / "board" / "submissions")
    return tmp_path / "board" / "submissions"


def renamed(root: Path, name: str, new: str, **manifest: str) -> Draft:
    """The same submission under another name, to be written."""
    draft = Draft.of(root / name)
    organisation, model, quantization = new.split("__")
    draft.name = new
    draft.manifest |= {"organisation": organisation, "model": model, "quantization": quantization, **manifest}
    return draft


def judge(root: Path, gold: Path, boards: Path) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in validate(all_submissions(root), gold=gold, boards=boards)}


def codes(verdict: Verdict) -> list[str]:
    return [finding.code for finding in verdict.findings]


def test_a_refused_twin_refuses_what_names_it_and_nothing_else(root: Path, gold: Path, boards: Path) -> None:
    other = renamed(root, FULL, "other__block-idefics3__bf16")
    other.write(root)
    renamed(root, INT4, "other__block-idefics3__int4", twin="other__block-idefics3__bf16").write(root)
    (root / FULL / "records.jsonl.zst").write_bytes(b"broken")
    found = judge(root, gold, boards)
    assert codes(found[FULL]) == ["file-hash"] and codes(found[INT4]) == ["twin-refused"]
    assert found["other__block-idefics3__bf16"].ok and found["other__block-idefics3__int4"].ok


def test_a_twin_on_another_board_or_quantized(root: Path, submissions: Path, gold: Path, boards: Path) -> None:
    shutil.copytree(submissions / FULL, root / "big__block-idefics3__bf16")
    moved = Draft.of(root / "big__block-idefics3__bf16")
    shutil.rmtree(root / "big__block-idefics3__bf16")
    moved.name = "big__block-idefics3__bf16"
    moved.manifest["organisation"] = "big"
    moved.write(root)
    renamed(root, INT4, "a__block__int4", twin="big__block-idefics3__bf16").write(root)
    renamed(root, INT4, "b__block__int4", twin=INT4).write(root)
    full = renamed(root, FULL, "c__block__bf16", twin=FULL)
    full.write(root)
    found = judge(root, gold, boards)
    assert found["big__block-idefics3__bf16"].level == "recomputed"
    assert codes(found["a__block__int4"]) == ["twin-board"]
    assert codes(found["b__block__int4"]) == ["twin-quantized"]
    assert codes(found["c__block__bf16"]) == ["twin-unwanted"]


def test_two_that_name_each_other_are_both_refused(root: Path, gold: Path, boards: Path) -> None:
    renamed(root, INT4, "x__a__int4", twin="x__b__int4").write(root)
    renamed(root, INT4, "x__b__int4", twin="x__a__int4").write(root)
    found = judge(root, gold, boards)
    assert not found["x__a__int4"].ok and not found["x__b__int4"].ok and found[INT4].ok and found[FULL].ok


def test_the_same_records_cannot_be_two_models(root: Path, gold: Path, boards: Path) -> None:
    other = renamed(root, INT4, "zzz__block__int3")
    other.card["spec"]["bits"] = 3  # so it says that it is another model
    other.raw["records.jsonl.zst"] = (root / INT4 / "records.jsonl.zst").read_bytes()
    other.write(root)
    found = judge(root, gold, boards)
    assert codes(found["zzz__block__int3"]) == ["records-copied"] and found[INT4].ok


def test_what_is_compared_with_a_copy_falls_with_it(root: Path, gold: Path, boards: Path) -> None:
    copy = renamed(root, FULL, "zzz__block__bf16")
    copy.card["weights_hash"] = "0" * 32  # so it says that it is another model
    copy.raw["records.jsonl.zst"] = (root / FULL / "records.jsonl.zst").read_bytes()
    copy.write(root)
    quantized = renamed(root, INT4, "zzz__block__int4", twin="zzz__block__bf16")
    quantized.rows[0]["confidence"]["joint"] = 0.123456
    quantized.write(root)
    found = judge(root, gold, boards)
    assert codes(found["zzz__block__bf16"]) == ["records-copied"]
    assert codes(found["zzz__block__int4"]) == ["twin-refused"] and found[INT4].ok and found[FULL].ok
    board = load_board("corpus", boards)
    built = build_site(
        [board], root, gold, root.parent / "out", boards_folder=boards, replicates=20, cache_folder=root.parent / "c"
    )
    assert sorted(name for name, _ in built.refused) == ["zzz__block__bf16", "zzz__block__int4"]
    assert {entry.name for entry in built.board.boards[0].submissions} == {FULL, INT4}


def test_reproduced_only_when_listed_independent_and_equal(root: Path, gold: Path, boards: Path) -> None:
    other = renamed(root, FULL, "other__block-idefics3__bf16")
    other.rows[0]["confidence"]["joint"] = 0.123456  # another machine's rounding, exaggerated
    other.write(root)
    assert {v.level for v in judge(root, gold, boards).values()} == {"recomputed"}, "nobody has listed it"
    lists = root / "reproductions.yaml"
    lists.write_text(f"- {{submission: {FULL}, by: other__block-idefics3__bf16, note: run in March}}\n")
    found = judge(root, gold, boards)
    assert found[FULL].level == "reproduced" and found[FULL].reproduced_by == ("other__block-idefics3__bf16",)
    assert found["other__block-idefics3__bf16"].level == "recomputed"
    for by, reason in ((INT4, "same organisation"), ("nobody__x__y", "not there"), (FULL, "same organisation")):
        lists.write_text(f"- {{submission: {FULL}, by: {by}}}\n")
        verdict = judge(root, gold, boards)[FULL]
        assert verdict.level == "recomputed" and codes(verdict) == ["not-reproduced"]
        assert reason in verdict.findings[0].what
    shutil.rmtree(root / "other__block-idefics3__bf16")
    different = renamed(root, FULL, "other__block-idefics3__bf16")
    for row in different.rows[:40]:
        row["answer"] = "nothing"
    different.write(root)
    lists.write_text(f"- {{submission: {FULL}, by: other__block-idefics3__bf16}}\n")
    assert "have the same score" in judge(root, gold, boards)[FULL].findings[0].what
    lists.write_text("- {submission: '<b>', by: x}\n")
    with pytest.raises(HistoryError, match=r"reproductions\.yaml"):
        judge(root, gold, boards)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        *(("block_scienceqa_clean", answer) for answer in ("Z", "b", "AB", "", " A")),
        *(
            ("block_refcocoplus_clean", answer)
            for answer in ("[1, 2, 3]", "[nan, 1, 2, 3]", "[1e999, 1, 2, 3]", "1 2 3 4")
        ),
    ],
)
def test_an_answer_that_no_record_holds(
    task: str, answer: str, submissions: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    root = tmp_path / "submissions"
    shutil.copytree(submissions / FULL, root / FULL)
    draft = Draft.of(submissions / INT4)
    draft.of_task(task)[7]["answer"] = answer
    draft.write(root)
    found = judge(root, gold, boards)
    assert codes(found[INT4]) == ["answer-form"] and task in found[INT4].findings[0].where and found[FULL].ok


def test_a_parse_failure_is_counted_as_the_run_counted_it(
    submissions: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    """An answer taken back costs its score; to call it unread, or failed, gains nothing."""
    root = tmp_path / "submissions"
    shutil.copytree(submissions / FULL, root / FULL)
    draft = Draft.of(submissions / INT4)
    unread, failed = draft.of_task("block_scienceqa_clean")[:2]
    unread |= {"answer": None, "parse_failure": True, "confidence": {"options": None}}
    failed |= {"answer": None, "failure": "model", "confidence": {}}
    draft.write(root)
    assert judge(root, gold, boards)[INT4].ok
    (run,) = load_runs([read_submission(root / INT4)], gold, boards=boards)
    cell = run.cells["block_scienceqa_clean"]
    assert (cell.parse_failures, cell.failures) == (1, {"model": 1})
    for row in (unread, failed):
        assert cell.answers[row["id"]].score == 0 and cell.answers[row["id"]].confidence is None


def test_a_gold_file_that_is_not_the_pinned_one_ends_it(root: Path, gold: Path, boards: Path, tmp_path: Path) -> None:
    shutil.copytree(gold, tmp_path / "gold")
    name = "block_advqa_clean.jsonl.zst"
    (tmp_path / "gold" / name).write_bytes((gold / "block_vqav2_threshold.jsonl.zst").read_bytes())
    with pytest.raises(GoldError, match="expected 88ecc1cc"):
        judge(root, tmp_path / "gold", boards)
    (tmp_path / "gold" / name).write_bytes((gold / name).read_bytes()[:-9])
    with pytest.raises(GoldError, match=name):
        judge(root, tmp_path / "gold", boards)


def test_gold_of_the_board_itself_comes_first(root: Path, gold: Path, boards: Path, tmp_path: Path) -> None:
    shutil.copytree(gold, tmp_path / "gold" / "corpus")
    (tmp_path / "gold" / "block_advqa_clean.jsonl.zst").write_bytes(b"another board's")
    assert judge(root, tmp_path / "gold", boards)[INT4].level == "recomputed"


def test_the_pinned_gold_is_what_the_dataset_gives(boards: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from bitquake.tasks.gold import build_gold

    for task in load_board("corpus", boards).tasks:
        assert build_gold(task.task, tmp_path, task.n).sha256 == task.gold


def git(root: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    command = ["git", "-C", str(root), "-c", "core.autocrlf=false", *arguments]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **identity})


@pytest.fixture
def committed(root: Path) -> Path:
    """The submissions as a commit called ``base`` of a repository of their own."""
    git(root.parent, "init", "-q")
    git(root.parent, "add", "-A")
    git(root.parent, "commit", "-q", "-m", "submissions")
    git(root.parent, "tag", "base")
    return root


def test_history_takes_new_ones_and_keeps_old_ones(committed: Path, gold: Path, boards: Path) -> None:
    renamed(committed, FULL, "new__block-idefics3__bf16").write(committed)
    found = validate(all_submissions(committed), gold=gold, boards=boards, base="base")
    assert [verdict.level for verdict in found] == ["recomputed"] * 3

    shutil.rmtree(committed / INT4)
    renamed(committed, FULL, FULL, contact="changed").write(committed / "x")
    shutil.copytree(committed / "x" / FULL, committed / FULL, dirs_exist_ok=True)
    shutil.rmtree(committed / "x")
    by_name = {v.name: v for v in validate(all_submissions(committed), gold=gold, boards=boards, base="base")}
    assert codes(by_name[FULL]) == ["history-changed"] and "manifest.json has changed" in by_name[FULL].findings[0].what
    assert codes(by_name[INT4]) == ["history-removed"] and not by_name[INT4].ok
    assert by_name["new__block-idefics3__bf16"].ok

    (committed / "withdrawals.yaml").write_text(
        f"- {{submission: {INT4}, reason: its calibration saw the test images}}\n"
    )
    by_name = {v.name: v for v in validate(all_submissions(committed), gold=gold, boards=boards, base="base")}
    assert codes(by_name[INT4]) == ["history-removed"], "a proposal does not excuse itself"
    git(committed, "add", "withdrawals.yaml")
    git(committed, "commit", "-q", "-m", "listed by a maintainer", "--", "withdrawals.yaml")
    by_name = {v.name: v for v in validate(all_submissions(committed), gold=gold, boards=boards, base="HEAD")}
    assert by_name[INT4].level == "withdrawn" and "saw the test images" in by_name[INT4].findings[0].what
    assert not by_name[FULL].ok, "a list of withdrawals excuses no change"


def test_nobody_removes_all_of_them(committed: Path, gold: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(committed / INT4)
    shutil.rmtree(committed / FULL)
    (committed / "README.md").write_text("nothing is left")
    command = ["leaderboard", "validate", "--all", "--submissions", str(committed), "--gold", str(gold)]
    assert main(command) == 0
    assert main([*command, "--base", "base"]) == 1
    assert capsys.readouterr().out.count("history-removed") == 2


def test_a_link_to_the_accepted_submissions_proves_nothing(committed: Path, tmp_path: Path) -> None:
    (tmp_path / "proposed").mkdir()
    for link, target in (("proposed/submissions", committed), ("elsewhere", committed.parent)):
        (tmp_path / link).symlink_to(target)
    for root in (tmp_path / "proposed" / "submissions", tmp_path / "elsewhere" / "submissions"):
        with pytest.raises(HistoryError, match="is a link"):
            changed_since("base", root)


def test_history_notices_links_and_single_files(committed: Path) -> None:
    card = committed / FULL / "quant_card.json"
    text = card.read_bytes()
    card.unlink()
    assert [f.code for f in changed_since("base", committed)] == ["history-changed"]
    (committed.parent / "copy").write_bytes(text)
    card.symlink_to(committed.parent / "copy")
    assert "no regular file" in changed_since("base", committed)[0].what
    card.unlink()
    card.write_bytes(text)
    assert changed_since("base", committed) == [] and changed_since("HEAD", committed) == []


@pytest.mark.parametrize(
    "base", ["--output=x", "-x", "nothing", "$(touch x)", "base; touch x", "", "base:README", "a\nb"]
)
def test_a_base_that_is_no_commit(base: str, committed: Path, tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="--base"):
        changed_since(base, committed)
    assert not list(tmp_path.rglob("x"))


def test_the_environment_points_git_nowhere_else(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert changed_since("base", committed) == []


@pytest.fixture
def shipped(boards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' boards in the place of the package's."""
    monkeypatch.setattr(board_files, "SHIPPED", boards)


@pytest.mark.usefixtures("shipped")
def test_the_command_line_says_it_with_its_exit_code(
    root: Path, gold: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["leaderboard", "validate", "--gold", str(gold)]
    assert main([*command, str(root / INT4)]) == 0
    assert "recomputed" in capsys.readouterr().out
    (root / "acme__x__y").mkdir()
    assert main([*command, "--all", "--submissions", str(root)]) == 1
    out = capsys.readouterr().out
    assert "error [file-missing] acme__x__y/manifest.json" in out and "2 valid, 1 refused" in out
    assert main([*command, str(root / "absent__x__y")]) == 2
    assert "is no folder" in capsys.readouterr().err
    for wrong in ([], [str(root / INT4), "--all"], ["--all", "--submissions", str(tmp_path / "none")]):
        assert main([*command, *wrong]) == 2
    assert main(["leaderboard", "validate", "--gold", str(tmp_path / "none"), str(root / INT4)]) == 2
    assert main([*command, str(root / INT4), "--base", "nothing"]) == 2
    capsys.readouterr()


@pytest.mark.usefixtures("shipped")
def test_from_runs_to_a_verdict_on_the_command_line(
    runs: list[Path], gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "submissions"
    given = [
        "--board",
        "tiny",
        "--organisation",
        "acme",
        "--out",
        str(out),
        "--artifacts",
        str(runs[0].parent / "artifacts"),
    ]
    assert main(["leaderboard", "submit", *map(str, runs), *given]) == 0
    assert f"{INT4}: 220 answers" in capsys.readouterr().out
    assert main(["leaderboard", "validate", "--all", "--submissions", str(out), "--gold", str(gold)]) == 0
    assert "2 valid, 0 refused" in capsys.readouterr().out
    assert main(["leaderboard", "submit", str(runs[0]), *given]) == 2
    assert "block_advqa_clean was not run" in capsys.readouterr().err
    assert main(["leaderboard", "board", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "--tasks block_advqa_clean --limit 60" in shown and "88ecc1cc344e" in shown
    assert main(["leaderboard", "board", "../tiny"]) == 2


@pytest.mark.usefixtures("shipped")
def test_gold_is_built_and_pinned_on_the_command_line(
    gold: Path, boards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "corpus.yaml"
    text = (boards / "corpus.yaml").read_text()
    file.write_text(text.replace(f'"{load_board("corpus", boards).tasks[0].gold}"', "null"))
    assert load_board("corpus", tmp_path).tasks[0].gold is None
    assert main(["leaderboard", "gold", "--board", "corpus", "--out", str(tmp_path / "gold"), "--pin", str(file)]) == 0
    assert file.read_text() == text
    built = tmp_path / "gold" / "corpus" / "block_advqa_clean.jsonl.zst"
    assert built.is_file() and "88ecc1cc344e" in capsys.readouterr().out
    assert main(["leaderboard", "gold"]) == 2
    assert main(["leaderboard", "gold", "block_coco_caption_clean", "--out", str(tmp_path)]) == 2
    assert main(["leaderboard", "gold", "x", "--pin", str(file)]) == 2


def test_a_digest_is_of_all_three_files(root: Path) -> None:
    first = read_submission(root / INT4).digest
    manifest = json.loads((root / INT4 / "manifest.json").read_bytes())
    (root / INT4 / "manifest.json").write_text(json.dumps(manifest | {"contact": "someone"}))
    assert read_submission(root / INT4).digest != first


def test_a_check_that_fails_itself_ends_at_its_submission(
    root: Path, gold: Path, boards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(card: QuantCard, where: str) -> list[Finding]:
        if card.method != "none":
            raise ZeroDivisionError("a bug that hostile data found")
        return []

    monkeypatch.setattr("bitquake.leaderboard.validate.check_card", broken)
    found = judge(root, gold, boards)
    assert codes(found[INT4]) == ["check-failed"] and "ZeroDivisionError" in found[INT4].findings[0].what
    assert found[FULL].level == "recomputed"


def test_rows_are_counted_while_they_are_read(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitquake.leaderboard.submission.MAX_ROWS", 99)
    rows = read_submission(corpus / INT4).rows()
    assert len([next(rows) for _ in range(99)]) == 99
    with pytest.raises(SubmissionError, match="too-many-rows"):
        next(rows)
