"""Time and weight of a leaderboard of 200 rows, against their budgets and beside the peer that everybody has.

200 submissions are made from the two real ones of the tests (twenty organisations, each a full-precision model and nine
quantizations whose confidences differ a little), and built twice: cold, where every submission is validated and every
figure computed, and warm, where only pages are rendered. The first page is weighed with figures that differ from row to
row, as in the tests (``board_inputs``); the peer writes the same figures with ``pandas.DataFrame.to_html``: no
differences, no marks, no links. Processor time of one process, which is the wall time
on a core of one's own, and the wall time that this machine took beside its other work.

    python benchmarks/leaderboard.py [--rows N] [--replicates R] [--rounds K] [--json FILE]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import zstandard
from tabulate import tabulate

from bitquake.leaderboard import pages
from bitquake.leaderboard.board_file import BoardEntry, BoardFile, without_points
from bitquake.leaderboard.boards import load_board
from bitquake.leaderboard.numbers import GENERATOR
from bitquake.leaderboard.site import SiteResult, build_site
from bitquake.leaderboard.submission import encode, read_submission
from bitquake.leaderboard.submit import submit
from bitquake.leaderboard.views import BOARD_METRICS

TESTS = Path(__file__).parents[1] / "tests" / "leaderboard"
FIXTURES = TESTS / "fixtures"
sys.path.insert(0, str(TESTS))
BOARD = "tiny"
A_GROUP = 10
BUDGET_SECONDS, BUDGET_BYTES = 5.0, 200_000


def real_submissions(folder: Path) -> Path:
    """The two submissions of the tests: full precision and INT4, from real runs of the reference model."""
    for file in sorted((FIXTURES / "runs").rglob("*.zst")):
        target = folder / "runs" / file.parent.name / file.name.removesuffix(".zst")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(zstandard.ZstdDecompressor().decompress(file.read_bytes()))
    board = load_board(BOARD, FIXTURES / "boards")
    submit([folder / "runs"], board, "acme", folder / "real", artifacts=FIXTURES / "artifacts")
    return folder / "real"


def multiply(real: Path, out: Path, n_rows: int) -> None:
    """``n_rows`` valid submissions: each quantized one another model, with confidences of its own."""
    full, quantized = (read_submission(path) for path in sorted(real.iterdir()))
    rows = {one.name: list(one.rows()) for one in (full, quantized)}
    for number in range(n_rows):
        group, place = divmod(number, A_GROUP)
        source = quantized if place else full
        card = source.card
        if place:
            digest = hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()
            card = card.model_copy(update={"weights_hash": digest})
        organisation = f"org-{group}"
        manifest = source.manifest.model_dump(mode="json", exclude={"files"}) | {
            "organisation": organisation,
            "quantization": source.manifest.quantization + (f"-{place}" if place else ""),
            "twin": f"{organisation}__{full.manifest.model}__{full.manifest.quantization}" if place else "",
            "card_hash": card.content_hash,
            "model_hash": card.model_hash,
        }
        shrink = 1 - 0.0002 * number if place else 1.0
        changed = [
            row.model_copy(
                update={
                    "confidence": {
                        name: None if value is None else float(f"{value * shrink:.6g}")
                        for name, value in row.confidence.items()
                    }
                }
            )
            for row in rows[source.name]
        ]
        folder = out / f"{organisation}__{manifest['model']}__{manifest['quantization']}"
        folder.mkdir(parents=True)
        for name, data in encode(manifest, card, changed).items():
            (folder / name).write_bytes(data)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, processor seconds and wall seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    found = call()
    return found, time.process_time() - processor, time.perf_counter() - wall


def first_page(entry: BoardEntry) -> str:
    """The first page of a board."""
    brief = entry.model_copy(update={"report": without_points(entry.report)})
    file = BoardFile(generator=GENERATOR, source_date=None, inputs_digest="0" * 64, n_refused=0, boards=[brief])
    return pages.render_board(file, entry.report.settings, {})["index.html"]


def plain_table(entry: BoardEntry) -> str:
    """The peer: values and intervals of the first page as pandas writes a table."""
    task = entry.tasks[0].task
    cells = {cell.run: cell for cell in entry.report.cells if cell.task == task}
    rows = []
    for run in entry.report.runs:
        row: dict[str, Any] = {"model": run.name, "bits": run.card.effective_bpw if run.card else None}
        for key in BOARD_METRICS:
            value = cells[run.id].metrics[key]
            row[key] = f"{value.value:.3f} [{value.lo:.3f}, {value.hi:.3f}]"
        rows.append(row)
    return str(pd.DataFrame(rows).to_html())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=200, help="of the cold build; the warm one needs none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        multiply(real_submissions(folder), folder / "submissions", options.rows)
        board = load_board(BOARD, FIXTURES / "boards")

        def build() -> SiteResult:
            return build_site(
                [board],
                folder / "submissions",
                FIXTURES / "gold",
                folder / "site",
                boards_folder=FIXTURES / "boards",
                replicates=options.replicates,
                cache_folder=folder / "cache",
            )

        result, cold, cold_wall = timed(build)
        assert result.n_rows == options.rows and not result.refused, result.refused[:1]
        rounds = [timed(build)[1:] for _ in range(options.rounds)]
        warm, warm_wall = (statistics.median(values) for values in zip(*rounds, strict=True))
        script = (folder / "site" / "board.js").stat().st_size
    finally:
        shutil.rmtree(folder)
    from board_inputs import board as board_of

    entry = board_of(options.rows)
    peer, peer_time, peer_wall = timed(lambda: plain_table(entry))
    weight, peer_weight = (len(gzip.compress(text.encode(), mtime=0)) for text in (first_page(entry), peer))
    table = [
        ["cold build", f"{cold:.1f} s", f"{cold_wall:.1f} s", "", f"{cold / warm:.0f} x warm"],
        ["warm build", f"{warm:.2f} s", f"{warm_wall:.2f} s", f"{BUDGET_SECONDS:g} s", f"{warm / BUDGET_SECONDS:.0%}"],
        ["pandas to_html, the same figures", f"{peer_time:.2f} s", f"{peer_wall:.2f} s", "", ""],
        [
            "first page, gzip",
            f"{weight / 1e3:.1f} kB",
            "",
            f"{BUDGET_BYTES / 1e3:g} kB",
            f"{weight / BUDGET_BYTES:.0%}",
        ],
        ["pandas to_html, gzip", f"{peer_weight / 1e3:.1f} kB", "", "", f"ours {weight / peer_weight:.1f} x"],
        ["script", f"{script / 1e3:.1f} kB", "", "15 kB", f"{script / 15_000:.0%}"],
    ]
    print(tabulate(table, [f"{options.rows} rows", "processor, size", "wall", "budget", "ratio"]))
    figures = {
        "rows": options.rows,
        "replicates": options.replicates,
        "cold_seconds": cold,
        "warm_seconds": warm,
        "warm_wall_seconds": warm_wall,
        "index_gzip_bytes": weight,
        "pandas_seconds": peer_time,
        "pandas_gzip_bytes": peer_weight,
        "script_bytes": script,
        "python": platform.python_version(),
        "jinja2": jinja2.__version__,
        "pandas": pd.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if warm <= BUDGET_SECONDS and weight <= BUDGET_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
