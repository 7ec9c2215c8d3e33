"""A site built from real submissions: its numbers, its bytes, and what a bad submission can do to it (nothing)."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bitquake.leaderboard.boards import load_board
from bitquake.leaderboard.site import SiteResult, build_site
from bitquake.reports import ReportError
from bitquake.reports import build as build_report

REPLICATES = 60
MARK = "<script>alert(1)</script>"


def site(submissions: Path, gold: Path | None, boards: Path, folder: Path, **options: Any) -> SiteResult:
    chosen = {"replicates": REPLICATES, "cache_folder": folder / "cache", **options}
    return build_site([load_board("tiny", boards)], submissions, gold, folder / "out", boards_folder=boards, **chosen)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(submissions: Path, gold: Path, boards: Path, tmp_path_factory: pytest.TempPathFactory) -> SiteResult:
    return site(submissions, gold, boards, tmp_path_factory.mktemp("built"))


def test_its_numbers_are_those_of_a_report_on_the_same_runs(
    built: SiteResult, runs: list[Path], boards: Path, tmp_path: Path
) -> None:
    """The board knows answers and confidences of six digits only, and comes to the same figures."""
    report = build_report(
        runs, tmp_path / "report", artifacts=runs[0].parent / "artifacts", replicates=REPLICATES
    ).report
    quantization = {run.id: run.quantization.lower() for run in report.runs}
    expected = {(quantization[cell.run], cell.task): cell for cell in report.cells}
    (entry,) = built.board.boards
    found = {(cell.run.split("__")[2], cell.task): cell for cell in entry.report.cells}
    assert len(found) == 8 and found.keys() <= expected.keys()
    for place, cell in found.items():
        for key, value in cell.metrics.items():
            other = expected[place].metrics[key]
            assert value.value == pytest.approx(other.value, abs=1e-5), (place, key)
            assert (value.difference is None) == (other.difference is None)
            if value.difference and other.difference:
                assert value.difference.delta == pytest.approx(other.difference.delta, abs=1e-5)
        assert cell.metrics["accuracy"].value == expected[place].metrics["accuracy"].value
        assert cell.n == expected[place].n


def test_the_same_inputs_give_the_same_bytes_warm_and_cold(
    built: SiteResult, submissions: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    first = files(built.index.parent)
    cold = site(submissions, gold, boards, tmp_path)
    assert files(cold.index.parent) == first
    told: list[str] = []
    warm = site(submissions, gold, boards, tmp_path, progress=told.append)
    assert files(warm.index.parent) == first
    assert not [line for line in told if "submissions" in line and "of" in line], told
    for entry in (tmp_path / "cache").glob("*.json"):
        entry.write_bytes(entry.read_bytes()[:-20])
    mended = site(submissions, gold, boards, tmp_path)
    assert files(mended.index.parent) == first


def test_the_date_is_the_one_it_is_told(
    submissions: Path, gold: Path, boards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = site(submissions, gold, boards, tmp_path)
    assert "from the state of 2023-11-14" in made.index.read_text()
    record = json.loads(next(made.index.parent.glob("eee--*.json")).read_text())
    assert record["retrieved_timestamp"] == "1700000000"
    for wrong in ("yesterday", "-1", "9" * 30, "1.5"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(ReportError, match="SOURCE_DATE_EPOCH"):
            site(submissions, gold, boards, tmp_path)


def test_nothing_of_a_refused_submission_is_shown_and_the_others_stand(
    built: SiteResult, submissions: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "submissions"
    shutil.copytree(submissions, folder)
    good = sorted(path.name for path in folder.iterdir())
    evil = folder / "evil__model__rtn-int4"
    shutil.copytree(folder / good[1], evil)
    manifest = json.loads((evil / "manifest.json").read_text())
    manifest |= {"organisation": "evil", "model": "model", "quantization": "rtn-int4", "contact": MARK}
    (evil / "manifest.json").write_text(json.dumps(manifest))
    (folder / "not a submission").write_text(MARK)
    made = site(folder, gold, boards, tmp_path)
    assert sorted(name for name, _ in made.refused) == ["evil__model__rtn-int4", "not a submission"]
    assert all(reasons for _, reasons in made.refused)
    shown = files(made.index.parent)
    assert "2 submissions were refused and are not shown" in shown["index.html"].decode()
    for name, content in shown.items():
        assert b"evil__model" not in content and b"not a submission" not in content, name
        assert MARK.encode() not in content, name
    before = files(built.index.parent)
    assert shown.keys() == before.keys()
    # The foot is the same too: only what stands on the board goes into the digest.
    different = {name for name in shown if shown[name] != before[name]}
    assert different == {"index.html", "board.json"}


def test_without_reference_answers_rows_stand_without_figures(submissions: Path, boards: Path, tmp_path: Path) -> None:
    made = site(submissions, None, boards, tmp_path)
    (entry,) = made.board.boards
    assert {row.level for row in entry.submissions} == {"self-reported"}
    assert entry.report.cells == [] and len(entry.report.runs) == len(entry.submissions) == 2
    index = made.index.read_text()
    assert all(row.page in index for row in entry.submissions)
    assert "<td><b>" not in index and 'class="badge self-reported"' in index
    page = (made.index.parent / entry.submissions[1].page).read_text()
    assert "figures are not shown" in page and "Quant card" in page
    assert not list(made.index.parent.glob("eee--*.json"))


def test_data_files_hold_what_their_schemas_say(built: SiteResult) -> None:
    folder = built.index.parent

    def load(name: str) -> Any:
        return json.loads((folder / name).read_text())

    board = load("board.json")
    jsonschema.validate(board, load("board.schema.json"))
    (entry,) = board["boards"]
    for row in entry["submissions"]:
        jsonschema.validate(load(f"model--{row['name']}.json"), load("model.schema.json"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**board, "version": "one"}, load("board.schema.json"))
    rows = list(csv.DictReader(io.StringIO((folder / "board.csv").read_text())))
    cells = {(cell["run"], cell["task"]): cell for cell in entry["report"]["cells"]}
    assert {(row["submission"], row["task"]) for row in rows} == cells.keys()
    for row in rows:
        if row["metric"] == "aurc":
            assert float(row["value"]) == cells[row["submission"], row["task"]]["metrics"]["aurc"]["value"]
    manifest = load("manifest.json")
    assert manifest["inputs_digest"] == board["inputs_digest"]
    listed = {item["path"]: item["sha256"] for item in manifest["inputs"]}
    for row in entry["submissions"]:
        for name, digest in row["files"].items():
            assert listed[f"submissions/{row['name']}/{name}"] == digest


@pytest.mark.parametrize("which", ["foreign", "inside", "twice", "nowhere"])
def test_it_refuses_a_place_or_an_argument_that_cannot_be_right(
    which: str, submissions: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    board = load_board("tiny", boards)
    out, given, folder = tmp_path / "out", [board], submissions
    if which == "foreign":
        out.mkdir()
        (out / "letters.txt").write_text("mine")
    elif which == "inside":
        out = submissions.parent
    elif which == "twice":
        given = [board, board]
    else:
        folder = tmp_path / "nowhere"
    with pytest.raises(ReportError):
        build_site(given, folder, gold, out, boards_folder=boards, cache_folder=tmp_path / "cache")
    assert which != "foreign" or (out / "letters.txt").read_text() == "mine"


def test_what_the_cache_knows_holds_only_while_everything_behind_it_does(
    submissions: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    """A twin that goes, gold files that go and come back: verdicts follow at once."""
    folder = tmp_path / "submissions"
    shutil.copytree(submissions, folder)
    full, quantized = sorted(folder.iterdir())

    def levels(gold_folder: Path | None) -> list[str]:
        made = site(folder, gold_folder, boards, tmp_path)
        return [row.level for row in made.board.boards[0].submissions] + ["refused" for _ in made.refused]

    assert levels(gold) == ["recomputed"] * 2
    assert levels(None) == ["self-reported"] * 2
    assert levels(gold) == ["recomputed"] * 2
    shutil.move(full, tmp_path / full.name)
    assert levels(gold) == ["refused"]
    assert "twin" in str(site(folder, gold, boards, tmp_path).refused)
    shutil.move(tmp_path / full.name, full)
    records = quantized / "records.jsonl.zst"
    records.write_bytes(records.read_bytes()[:-1])
    assert levels(gold) == ["recomputed", "refused"]
