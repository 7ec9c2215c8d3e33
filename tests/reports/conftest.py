"""Fixtures of the report tests; ``run_folders`` beside this file writes runs as lmms-eval leaves them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# pytest imports the tests by path (importmode=importlib), so they do not find their neighbours by themselves.
sys.path.insert(0, str(Path(__file__).parent))

from run_folders import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "results")
