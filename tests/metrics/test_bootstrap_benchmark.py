"""The benchmark runs, agrees with its peer before it times anything, and writes what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bootstrap.py"


def test_it_writes_the_figures_of_every_row(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--samples", "1000", "--replicates", "20", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert (figures["samples"], figures["replicates"]) == (1000, 20)
    assert len(figures["results"]) == 12
    for name, result in figures["results"].items():
        assert name in done.stdout
        assert result["processor_seconds"] > 0
