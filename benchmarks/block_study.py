"""The block-world study behind the leaderboard's submissions: every quantizer, bits 8 to 2, through lmms-eval.

Each quantization of the reference model is evaluated with the commands that `bitquake leaderboard board block
--command` prints, on the Selector's training split too, and keeps its features. Then Selectors are fitted (on the
quantization's own answers, on full precision, on a mixture of bit widths), their confidences added to the records, and
the submissions written. Finished steps are kept: run it again to go on, or with more quantizations.

    python benchmarks/block_study.py FOLDER [--quants NAME...] [--jobs N] [--submissions DIR] [--evaluate-only]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitquake.demo import PRETRAINED
from bitquake.leaderboard.boards import load_board, tasks_by_limit
from bitquake.suite.completeness import complete

FULL = "full-precision"
METHODS = ("rtn", "awq", "mbq", "gptq", "hqq")
QUANTS = (FULL, *(f"{method}-int{bits}-g64" for bits in (4, 3, 8, 2) for method in METHODS))
MIXTURE = (FULL, "rtn-int8-g64", "rtn-int4-g64", "rtn-int3-g64")
DEV = {"block_vqav2_dev": 4000}
DONE = "done"
_talk = threading.Lock()


def commands(quant: str, folder: Path) -> list[tuple[Path, dict[str, int], list[str]]]:
    """(output folder, tasks with their samples, command) for each --limit."""
    tasks = {task.task: task.n for task in load_board("block").tasks} | DEV
    found = []
    for limit, names in sorted(tasks_by_limit(tasks).items()):
        chosen = dict.fromkeys(names, limit)
        out = folder / "runs" / quant / str(limit)
        arguments = (
            f"pretrained={PRETRAINED},quant={quant},dtype=bfloat16,features=true,"
            f"artifacts={folder / 'artifacts'},journal={folder / 'journal'}"
        )
        command = [
            *(sys.executable, "-m", "lmms_eval", "--model", "bitquake_hf", "--model_args", arguments),
            *("--tasks", ",".join(chosen), "--batch_size", "64", "--limit", str(limit), "--device", "cpu"),
            *("--output_path", str(out), "--log_samples"),
        ]
        found.append((out, chosen, command))
    return found


def evaluate(quant: str, folder: Path, threads: int) -> bool:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    for out, tasks, command in commands(quant, folder):
        if (out / DONE).is_file():
            continue
        began = time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with (out / "log").open("wb") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
        if not complete(out, tasks):
            say(f"{quant}: not complete, see {out / 'log'}")
            return False
        (out / DONE).touch()
        say(f"{quant} --limit {out.name}: {sum(tasks.values()):,} samples in {time.monotonic() - began:.0f} s")
    return True


def say(line: str) -> None:
    with _talk:
        print(line, flush=True)


def bitquake(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "bitquake", *map(str, arguments)], check=True)


def dev_run(quant: str, folder: Path) -> Path:
    return folder / "runs" / quant / str(next(iter(DEV.values())))


def fit(folder: Path, name: str, trained_on: list[str], file: Path) -> Path:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        runs = [dev_run(quant, folder) for quant in trained_on]
        bitquake("selector", "fit", *runs, "--name", name, "--out", file)
    return file


def submit(quant: str, folder: Path, submissions: Path) -> None:
    """Add the Selectors' confidences to the quantization's records, and write its submission."""
    selectors = folder / "selectors"
    files = [
        fit(folder, "selector", [quant], selectors / f"{quant}.safetensors"),
        fit(folder, "selector_transfer", [FULL], selectors / "transfer.safetensors"),
        fit(folder, "selector_mixture", list(MIXTURE), selectors / "mixture.safetensors"),
    ]
    applied = folder / "applied" / quant
    if not (applied / DONE).is_file():
        shutil.rmtree(applied, ignore_errors=True)
        bitquake("selector", "apply", *files, folder / "runs" / quant, "--out", applied)
        (applied / DONE).touch()
    twin = [] if quant == FULL else ["--twin", f"bitquake__block-idefics3__{FULL}"]
    where = ["--quantization", quant, "--model", "block-idefics3", "--organisation", "bitquake", "--out", submissions]
    bitquake("leaderboard", "submit", applied, "--board", "block", *where, *twin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quants", nargs="+", default=list(QUANTS))
    parser.add_argument("--jobs", type=int, default=1, help="models evaluated at once (default 1)")
    parser.add_argument("--submissions", type=Path, default=Path("leaderboard/submissions"))
    parser.add_argument("--evaluate-only", action="store_true", help="no Selectors and no submissions yet")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        done = dict(
            zip(options.quants, pool.map(lambda quant: evaluate(quant, folder, threads), options.quants), strict=True)
        )
    if not options.evaluate_only:
        for quant in [quant for quant, ok in done.items() if ok]:
            submit(quant, folder, options.submissions)
    sys.exit(0 if all(done.values()) else 1)


if __name__ == "__main__":
    main()
