"""``bitquake demo``: quantize the reference model, evaluate it in noise through lmms-eval, report, build a board."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bitquake import __version__
from bitquake.suite.completeness import complete

if TYPE_CHECKING:
    from bitquake.leaderboard.site import SiteResult

PRETRAINED = "bitquake/block-idefics3"
QUANTS = ("full-precision", "rtn-int8-g64", "rtn-int4-g64", "rtn-int3-g64")
TASKS = (
    "block_vqav2_threshold",
    "block_vqav2_clean",
    *(f"block_vqav2_{noise}_{severity}" for noise in ("gaussian_noise", "frost") for severity in (1, 3, 5)),
    *(f"block_vqav2_{noise}_3" for noise in ("low_light", "keyboard_typos")),
    "block_advqa_clean",
    "block_vizwiz_clean",
    "block_refcocoplus_clean",
    "block_refcocoplus_rotation_3",
    "block_scienceqa_clean",
    "block_coco_caption_clean",
)
BOARD, ORGANISATION = "demo", "bitquake"
_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")
_DONE = "complete.json"


def command(quant: str, folder: Path, artifacts: Path, journal: Path, limit: int) -> list[str]:
    """The exact lmms-eval command that evaluates one quantization: what a user would type."""
    arguments = f"pretrained={PRETRAINED},quant={quant},artifacts={artifacts},journal={journal},dtype=bfloat16"
    return [
        *(sys.executable, "-m", "lmms_eval", "--model", "bitquake_hf", "--model_args", arguments),
        *("--tasks", ",".join(TASKS), "--batch_size", "64", "--limit", str(limit), "--device", "cpu"),
        *("--output_path", str(folder), "--log_samples"),
    ]


def _fingerprint(quant: str, limit: int) -> str:
    """What a finished run must have been made with to be kept: version, weights and command."""
    from bitquake.model_wrappers.checkpoints import resolve

    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(resolve(PRETRAINED).iterdir()):
        digest.update(path.read_bytes())
    return json.dumps([__version__, digest.hexdigest(), quant, TASKS, limit])


def _evaluate(quant: str, out: Path, limit: int, threads: int) -> bool:
    """Run one model in its own process, its output in a log file; True when all of its samples are there."""
    folder, fingerprint = out / "runs" / quant, _fingerprint(quant, limit)
    samples = dict.fromkeys(TASKS, limit)
    done = folder / _DONE
    if done.is_file() and done.read_text() == fingerprint and complete(folder, samples):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (out / "logs" / f"{quant}.log").open("wb") as log:
        arguments = command(quant, folder, out / "artifacts", out / "journal", limit)
        subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if not complete(folder, samples):
        return False
    done.write_text(fingerprint)
    return True


def _share_done(log: Path) -> float:
    """Share of a model's samples that its progress bar has reached, 0 before it appears."""
    if not log.exists():
        return 0.0
    with log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - 4096))
        found = _PROGRESS.findall(handle.read())
    return int(found[-1][0]) / max(1, int(found[-1][1])) if found else 0.0


def build_board(out: Path, limit: int) -> SiteResult:
    """Make submissions of the finished runs, the gold files they are scored against, and the board ``out/board``.

    The board is the package's own ``demo`` with ``limit`` samples of each task, its gold hashes pinned from what is
    built here. Earlier submissions of this demo are replaced: nobody has published them.
    """
    from bitquake.leaderboard.boards import load_board
    from bitquake.leaderboard.site import build_site
    from bitquake.leaderboard.submit import submit
    from bitquake.tasks.gold import build_gold

    boards = out / "boards"
    boards.mkdir(exist_ok=True)
    shipped = load_board(BOARD)
    tasks = [
        {"task": task.task, "n": limit, "gold": build_gold(task.task, out / "gold", limit).sha256}
        for task in shipped.tasks
    ]
    # JSON is YAML too.
    text = json.dumps({**shipped.model_dump(mode="json"), "tasks": tasks}, indent=1)
    (boards / f"{BOARD}.yaml").write_text(text, encoding="utf-8")
    board = load_board(BOARD, boards)
    shutil.rmtree(out / "submissions", ignore_errors=True)
    runs = [out / "runs" / quant for quant in QUANTS]
    submit(runs, board, ORGANISATION, out / "submissions", artifacts=out / "artifacts")
    return build_site(
        [board], out / "submissions", out / "gold", out / "board", boards_folder=boards, cache_folder=out / "cache"
    )


def run(out: Path, *, limit: int = 1000, jobs: int | None = None) -> int:
    """Evaluate every quantization (one process each), then write the report ``out/site`` and the leaderboard
    ``out/board``, whose path is printed last.

    Finished models of an interrupted demo are kept, and so are the answers of the others so far. Returns 0 when every
    run is complete and both are written, 1 otherwise (the reasons are printed).

    Raises:
        ValueError: ``limit`` or ``jobs`` is not positive, or ``limit`` exceeds the smallest task's samples.
    """
    from tqdm import tqdm

    from bitquake.reports import build

    if not 1 <= limit <= 2000:
        raise ValueError(f"--limit: every task of the demo has 2000 samples or more; give 1 to 2000, got {limit}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs: give at least 1, got {jobs}")
    out = out.resolve()
    began = time.monotonic()
    cores = os.cpu_count() or 1
    jobs = min(jobs or cores, len(QUANTS))
    for name in ("runs", "logs", "artifacts"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for log in (out / "logs").glob("*.log"):
        log.unlink()
    print(f"{len(QUANTS)} models x {len(TASKS)} tasks x {limit} samples, {jobs} models at a time", flush=True)
    form = "{l_bar}{bar}| {elapsed}"
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=100 * len(QUANTS), bar_format=form) as bar:
        futures = {q: pool.submit(_evaluate, q, out, limit, max(1, cores // jobs)) for q in QUANTS}
        while True:
            finished = {q for q, future in futures.items() if future.done()}
            shares = {q: 1.0 if q in finished else _share_done(out / "logs" / f"{q}.log") for q in QUANTS}
            names = (f"{q.removeprefix('rtn-').removesuffix('-g64')} {share:.0%}" for q, share in shares.items())
            bar.set_description("  ".join(names))
            bar.update(int(100 * sum(shares.values())) - bar.n)
            if len(finished) == len(QUANTS):
                break
            time.sleep(1)
    for quant, future in futures.items():
        if not future.result():
            print(f"{quant}: the run is not complete; see {out / 'logs' / f'{quant}.log'}")
    if all(future.result() for future in futures.values()):
        shutil.rmtree(out / "journal", ignore_errors=True)
    result = build(
        [out / "runs" / quant for quant in QUANTS],
        out / "site",
        artifacts=out / "artifacts",
        title="Bitquake demo: a reference model in the block world",
    )
    print(result.table)
    for problem in result.problems:
        print(problem)
    complete = result.ok and result.n_pairs == len(QUANTS) - 1
    print(f"report: {result.index.resolve()}", flush=True)
    if not complete:
        print("no leaderboard: a submission answers every sample, and not every run did")
        return 1
    print("building the leaderboard: reference answers, submissions, every figure from the answers", flush=True)
    board = build_board(out, limit)
    for name, reasons in board.refused:
        print(f"{name} refused: {'; '.join(reasons)}")
    print(f"{time.monotonic() - began:.0f} seconds")
    print(board.index.resolve())
    return 0 if board.n_rows == len(QUANTS) else 1
