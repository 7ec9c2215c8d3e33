"""The command line as a user meets it: wrong arguments, unknown names, and the commands that need no model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bitquake import __version__, cli


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bitquake", *arguments], capture_output=True, text=True, check=False)


def test_help_and_version_are_light() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bitquake", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"bitquake {__version__}"
    assert "torch" not in done.stderr and "jinja2" not in done.stderr and "numpy" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("report",), ("report", "runs"), ("tasks",), ("quants", "show"), ("frobnicate",)]
)
def test_wrong_usage_ends_with_code_2_and_says_what_is_missing(arguments: tuple[str, ...]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quants", "show", "rtn-int5-g64"), "did you mean"),
        (("report", "no/such/folder", "--out", "x"), "no/such/folder"),
        (("tasks", "validate", "no/such.yaml"), "no/such.yaml"),
        (("tasks", "list", "--families", "no/such"), "no/such: is no folder"),
        (("tasks", "path", "--families", "."), "holds no family.yaml"),
        (("report", ".", "--out", "x"), "no complete result"),
        (("report", ".", "--out", "x", "--replicates", "0"), "replicates must be at least 1, got 0"),
        (("demo", "--limit", "0"), "--limit"),
        (("demo", "--limit", "99999"), "2000"),
        (("train-reference", "x", "--set", "rat=1"), "unknown key 'rat'"),
        (("train-reference", "x", "--set", "rate=fast"), "expected a float, got 'fast'"),
    ],
)
def test_bad_input_gets_one_clear_line(
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code in (1, 2)
    assert said in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_quants_list_names_every_bit_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quants", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{method}-int{bits}-g64" in listed for method in ("rtn", "hqq") for bits in (8, 4, 3, 2))


def test_tasks_path_holds_the_expanded_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "path"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert list(folder.rglob("block_vqav2_gaussian_noise_3.yaml"))


def test_an_unknown_noise_and_severity_6_are_named_and_hide_no_other_family(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "family.yaml").write_text(
        "family: mine\nworld: real\ndataset: {path: someone/data}\nsplits: {test: test, threshold: val}\n"
        "columns: {answers: answers}\nprotocol: vqa\nvariants: {noise: {names: [rain, fog], severities: [1, 6]}}\n"
    )
    for arguments in (
        ["validate", str(tmp_path / "mine")],
        *([a, "--families", str(tmp_path)] for a in ("list", "path")),
    ):
        assert cli.main(["tasks", *arguments]) == 1
        captured = capsys.readouterr()
        said = captured.err + captured.out
        assert "unknown noise 'rain'" in said
        assert "has severities 1 to 5 (integers), got 6" in said
        if arguments[0] == "list":
            assert "block_vqav2" in captured.out
        if arguments[0] == "path":  # what a shell puts behind --include_path
            assert list(Path(captured.out.strip()).rglob("block_vqav2_fog_1.yaml"))


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m bitquake tasks list | true", shell=True, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr and "Errno" not in done.stderr
