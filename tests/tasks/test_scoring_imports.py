"""The scoring room is pure: it loads in an interpreter that has neither torch, lmms-eval nor datasets."""

from __future__ import annotations

import subprocess
import sys


def test_scoring_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, bitquake.tasks.scoring; "
        "print([n for n in ('torch', 'lmms_eval', 'datasets', 'transformers', 'pyarrow') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
