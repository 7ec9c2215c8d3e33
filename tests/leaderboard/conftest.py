"""Fixtures of the leaderboard tests: real runs of the reference model (``fixtures/make.py``) and what they become."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import zstandard

from bitquake.leaderboard.boards import load_board
from bitquake.leaderboard.submit import submit

# pytest imports the tests by path (importmode=importlib), so they do not find their neighbours by themselves.
sys.path.insert(0, str(Path(__file__).parent))

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def boards() -> Path:
    """Boards ``tiny`` (five tasks, three protocols) and ``corpus`` (two of them), gold pinned."""
    return FIXTURES / "boards"


@pytest.fixture(scope="session")
def gold() -> Path:
    """The gold files of these boards."""
    return FIXTURES / "gold"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Output folders of lmms-eval: full precision and INT4, each in two parts (two limits)."""
    root = tmp_path_factory.mktemp("runs")
    for file in sorted((FIXTURES / "runs").rglob("*.zst")):
        target = root / file.parent.name / file.name.removesuffix(".zst")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(zstandard.ZstdDecompressor().decompress(file.read_bytes()))
    shutil.copytree(FIXTURES / "artifacts", root / "artifacts")
    return sorted(path for path in root.iterdir() if path.name != "artifacts")


@pytest.fixture(scope="session")
def submissions(runs: list[Path], boards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models' submissions to ``tiny``; nobody writes here."""
    root = tmp_path_factory.mktemp("tiny") / "submissions"
    submit(runs, load_board("tiny", boards), "acme", root, artifacts=runs[0].parent / "artifacts")
    return root


@pytest.fixture(scope="session")
def corpus(runs: list[Path], boards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models' submissions to ``corpus``; nobody writes here."""
    root = tmp_path_factory.mktemp("corpus") / "submissions"
    submit(runs, load_board("corpus", boards), "acme", root, artifacts=runs[0].parent / "artifacts")
    return root
