"""The block-world study behind the leaderboard's submissions: every quantizer, bits 8 to 2, as a suite.

`bitquake run` evaluates each quantization of the reference model on the board's tasks and on the Selector's training
split, and adds the confidences of three Selectors (fitted on the quantization's own answers, on full precision, on a
mixture of bit widths); then the submissions are written. Run it again to go on.

    python benchmarks/block_study.py FOLDER [--quants NAME...] [--jobs N] [--submissions DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from bitquake.demo import PRETRAINED
from bitquake.leaderboard.boards import load_board
from bitquake.suite_plan import APPLIED, PLAN_FILE, PlannedCell, SuitePlan

FULL = "full-precision"
METHODS = ("rtn", "awq", "mbq", "gptq", "hqq")
QUANTS = (FULL, *(f"{method}-int{bits}-g64" for bits in (4, 3, 8, 2) for method in METHODS))
MIXTURE = (FULL, "rtn-int8-g64", "rtn-int4-g64", "rtn-int3-g64")
DEV = {"block_vqav2_dev": 4000}
MODEL = "block-idefics3"


def suite() -> str:
    """The study's suite file: all of its quantizations on the board's tasks."""
    tasks = {task.task: task.n for task in load_board("block").tasks} | DEV
    return yaml.safe_dump(
        {
            "suite": "block_study",
            "title": "Every quantizer on the block world's leaderboard",
            "page": "selective",
            "models": [{"name": MODEL, "pretrained": PRETRAINED}],
            "quantizations": list(QUANTS),
            "tasks": [{"name": name, "limit": n} for name, n in tasks.items()],
            "selectors": ["own", "transfer", "mixture"],
            "selector_mixture": list(MIXTURE),
            "block": {"arguments": {"dtype": "bfloat16", "batch_size": 64, "features": True}},
        },
        sort_keys=False,
    )


def submit(cell: PlannedCell, folder: Path, submissions: Path) -> None:
    twin = [] if cell.quantization == FULL else ["--twin", f"bitquake__{MODEL}__{FULL}"]
    where = ["--quantization", cell.quantization, "--model", MODEL, "--organisation", "bitquake"]
    bitquake(
        "leaderboard", "submit", folder / APPLIED / cell.hash, "--board", "block", *where, *twin, "--out", submissions
    )


def bitquake(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "bitquake", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quants", nargs="+", default=list(QUANTS), help="the mixture's are wanted by every Selector")
    parser.add_argument("--jobs", type=int, default=1, help="models evaluated at once (default 1)")
    parser.add_argument("--submissions", type=Path, default=Path("leaderboard/submissions"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "block_study.yaml"
    file.write_text(suite(), encoding="utf-8")
    wanted = [f"quantization={quant}" for quant in options.quants]
    bitquake("run", file, "--world", "block", "--out", folder, "--jobs", str(options.jobs), "--only", *wanted)
    plan = SuitePlan.model_validate_json((folder / PLAN_FILE).read_bytes())
    for cell in plan.cells:
        if cell.quantization in options.quants:
            submit(cell, folder, options.submissions)


if __name__ == "__main__":
    main()
