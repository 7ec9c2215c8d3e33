"""The project's GitHub Actions: who may start them, what they may do, and that they run what runs here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
READ_ONLY = {"contents": "read"}


def load(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return found


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_three_workflows_are_there() -> None:
    assert [path.stem for path in FILES] == ["pages", "submissions", "tests"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_actions_are_pinned_and_the_token_reads_only(path: Path) -> None:
    workflow = load(path)
    triggers = workflow[True]  # YAML reads the key `on` as a truth
    assert not set(triggers) & {"pull_request_target", "workflow_run", "issue_comment"}
    assert workflow["permissions"] == READ_ONLY
    for name, job in workflow["jobs"].items():
        if "permissions" in job:
            assert (path.stem, name) == ("pages", "deploy")
            assert job["permissions"] == {"pages": "write", "id-token": "write"}
            assert not [step for step in job["steps"] if "run" in step], "a job that may write runs no code of ours"
        assert job["timeout-minutes"] <= 120
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), step
            if step["uses"].startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
        else:
            assert step["run"].startswith("make "), "workflows stay thin"
            assert "${{" not in step["run"], "what others chose goes through the environment, never into a script"
    pins = set(re.findall(r"uses: (\S+)@([0-9a-f]{40}) # v[\d.]+$", path.read_text(), re.M))
    assert len(pins) == len({name for name, _ in pins}), "one pin for each action"
    assert path.read_text().count("uses:") == len(
        re.findall(r"uses: \S+@[0-9a-f]{40} # v[\d.]+$", path.read_text(), re.M)
    )


def test_submissions_are_checked_by_the_code_of_the_base_branch() -> None:
    workflow = load(ROOT / ".github" / "workflows" / "submissions.yml")
    assert set(workflow[True]) == {"pull_request"}
    base, proposed = (step["with"] for step in steps(workflow) if "checkout" in step.get("uses", ""))
    assert base["ref"] == "${{ github.event.pull_request.base.sha }}" and base["path"] == "base"
    assert proposed["path"] == "proposed" and "ref" not in proposed
    (run,) = (step["run"] for step in steps(workflow) if "run" in step)
    assert run.startswith("make -C base board-check SUBMISSIONS=../proposed/")


def test_what_they_call_are_targets_of_the_makefile() -> None:
    called = {word for path in FILES for step in steps(load(path)) if "run" in step for word in step["run"].split()}
    targets = called & {"test", "board", "board-check"}
    assert targets == {"test", "board", "board-check"}
    command = ["make", "--dry-run", "--always-make", *sorted(targets), "BASE=abc"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "leaderboard validate --all --submissions leaderboard/submissions" in shown and "--base abc" in shown
    assert "leaderboard build" in shown and "--out board" in shown and "-m pytest" in shown
