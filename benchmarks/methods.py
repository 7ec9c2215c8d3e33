"""Every quantization method at 8, 4, 3 and 2 bits on language model, vision tower and both, through lmms-eval.

    python benchmarks/methods.py [--pretrained NAME ...] [--limit N] [--jobs 2] [--work FOLDER]
                                 [--json FILE] [--markdown FILE]

Each cell is one lmms-eval evaluation of ``block_vqav2_clean`` by ``bitquake_hf``. Its peer is round to nearest with the
same bits, groups and components: the difference is paired by question, with a bootstrap interval clustered by picture.
With ``--work`` a killed run goes on where it was; use a new folder after a change of code or checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

PRETRAINED = ("bitquake/block-idefics3", "bitquake/block-qwen2vl")
COMPONENTS = ("language", "vision", "vision+language")
TASK = "block_vqav2_clean"
BITS = (8, 4, 3, 2)
GROUPED = ("rtn", "hqq", "gptq", "awq", "mbq")
OTHERS = {
    "uniform": tuple(f"uniform-int{bits}" for bits in BITS),
    "W8A8": ("rtn-w8a8", "smoothquant-w8a8"),
    "W4A8": ("rtn-w4a8", "mbq-w4a8"),
    "libraries": ("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int8-dynamic", "torchao-fp8"),
}
METRICS = ("accuracy", "ece_15", "coverage_at_risk_5")
SEED = 1


class Cell(NamedTuple):
    """One evaluation: a checkpoint, the text of ``quant=``, and the quantization that it is compared with."""

    pretrained: str
    quant: str
    peer: str | None


def cells(pretrained: str, group: int) -> Iterator[Cell]:
    """Full precision first, then peers before those that are compared with them."""
    yield Cell(pretrained, "none", None)
    for components in COMPONENTS:
        end = f":components={components}"
        for bits in BITS:
            peer = f"rtn-int{bits}-g{group}{end}"
            yield Cell(pretrained, peer, None)
            for method in GROUPED[1:]:
                yield Cell(pretrained, f"{method}-int{bits}-g{group}{end}", peer)
            yield Cell(pretrained, f"uniform-int{bits}{end}", peer)
        for names in (OTHERS["W8A8"], OTHERS["W4A8"]):
            yield Cell(pretrained, names[0] + end, None)
            yield Cell(pretrained, names[1] + end, names[0] + end)
        for name in OTHERS["libraries"]:
            bits = 4 if "4" in name else 8
            yield Cell(pretrained, name + end, f"rtn-int{bits}-g{group}{end}")


def evaluate(cell: Cell, limit: int | None, artifacts: str) -> dict[str, Any]:
    """Run one cell in this process; returns its samples and what its card says."""
    from lmms_eval.evaluator import simple_evaluate

    from bitquake.model_wrappers.quant_cards import load_card
    from bitquake.records import RECORD_KEY, SampleRecord

    results = simple_evaluate(
        model="bitquake_hf",
        model_args=f"pretrained={cell.pretrained},quant={cell.quant},artifacts={artifacts},batch_size=64",
        tasks=[TASK],
        limit=limit,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    records = [SampleRecord.model_validate(sample[RECORD_KEY]) for sample in results["samples"][TASK]]
    records.sort(key=lambda record: record.sample_id)
    card = load_card(records[0].card, Path(artifacts))
    return {
        "sample_id": [record.sample_id for record in records],
        "score": [record.score for record in records],
        "confidence": [record.primary for record in records],
        "cluster": [record.image_id for record in records],
        "failures": sum(record.failure is not None for record in records),
        "bits_per_weight": 8
        * sum(m.packed_bytes for m in card.modules)
        / max(1, sum(m.n_weights for m in card.modules)),
        "bytes": sum(part.packed_bytes for part in card.components.values()),
        "modules": len(card.modules),
        "weights_hash": card.weights_hash,
        "libraries": card.libraries,
    }


def file_of(cell: Cell, limit: int | None, work: Path) -> Path:
    """Where a finished cell lies."""
    name = "_".join([cell.pretrained.rpartition("/")[2], cell.quant, str(limit or "all")])
    return work / f"{name.replace(':', '_')}.json"


def work_on(numbers: Sequence[int], wanted: Sequence[Cell], limit: int | None, work: Path) -> None:
    """Evaluate the cells of these numbers that are not there yet, one after the other in this process."""
    for number in numbers:
        file = file_of(wanted[number], limit, work)
        if file.is_file():
            continue
        found = evaluate(wanted[number], limit, str(work / "artifacts"))
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(file)
        accuracy = sum(found["score"]) / len(found["score"])
        print(f"{wanted[number].pretrained} {wanted[number].quant}: {accuracy:.4f}", file=sys.stderr, flush=True)


def summary(cell: Cell, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Metrics with intervals, and the difference of accuracy from the peer's."""
    from bitquake.metrics.bootstrap import compare, evaluate
    from bitquake.metrics.samples import Samples

    mine = found[cell.quant]

    def samples(one: dict[str, Any]) -> Samples:
        return Samples(*(one[key] for key in ("score", "confidence", "cluster")))

    estimates = evaluate(mine["score"], mine["confidence"], mine["cluster"], metrics=list(METRICS), seed=SEED)
    row: dict[str, Any] = {
        "quant": cell.quant,
        "n": len(mine["score"]),
        "failures": mine["failures"],
        **{key: mine[key] for key in ("bytes", "bits_per_weight", "modules", "weights_hash")},
        **{key: [estimate.value, estimate.lo, estimate.hi] for key, estimate in estimates.items()},
    }
    if cell.peer is not None:
        peer = found[cell.peer]
        if peer["sample_id"] != mine["sample_id"]:
            raise SystemExit(f"{cell.quant} and {cell.peer} answered different questions")
        difference = compare(samples(mine), samples(peer), metrics=["accuracy"], seed=SEED)["accuracy"]
        row |= {"peer": cell.peer, "against_peer": [difference.delta, difference.lo, difference.hi]}
    return row


def tables(pretrained: str, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one table for each choice of components."""

    def percent(values: Sequence[float], signed: bool = False) -> str:
        value, lo, hi = (100 * v for v in values)
        sign = "+" if signed else ""
        return f"{value:{sign}.1f} [{lo:{sign}.1f}, {hi:{sign}.1f}]"

    full = rows[0]
    parts = [
        f"### {pretrained}\n\nFull precision (BF16), {full['n']:,} questions: accuracy {percent(full['accuracy'])}, "
        f"ECE {percent(full['ece_15'])}, coverage at 5 % risk {percent(full['coverage_at_risk_5'])}; "
        f"{full['bytes'] / 1e3:,.0f} kB."
    ]
    for components in COMPONENTS:
        mine = [row for row in rows if row["quant"].endswith(f":components={components}")]
        table = tabulate(
            [
                [
                    row["quant"].partition(":")[0],
                    percent(row["accuracy"]),
                    percent(row["against_peer"], signed=True) if "against_peer" in row else "(peer)",
                    percent(row["ece_15"]),
                    percent(row["coverage_at_risk_5"]),
                    f"{row['bits_per_weight']:.2f}",
                    f"{row['bytes'] / 1e3:,.0f}",
                ]
                for row in mine
            ],
            [
                "quantization",
                "accuracy, %",
                "against RTN, points",
                "ECE, %",
                "coverage at 5 % risk, %",
                "bits/weight",
                "kB",
            ],
            tablefmt="github",
            disable_numparse=True,
        )
        parts.append(f"#### {components.replace('+', ' and ')}\n\n{table}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", nargs="+", default=PRETRAINED)
    parser.add_argument("--limit", type=int, default=2000, help="questions of each cell, 0 for all (default 2000)")
    parser.add_argument("--group", type=int, default=64, choices=(64, 128))
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each (default 2)")
    parser.add_argument("--only", default="", help="cells whose quantization begins so (and their peers), to try out")
    parser.add_argument("--work", type=Path, help="folder that keeps finished cells")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    limit = options.limit or None
    report: dict[str, Any] = {"task": TASK, "limit": limit, "models": {}}
    texts = []
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for pretrained in options.pretrained:
            chosen = [c for c in cells(pretrained, options.group) if c.quant.startswith(options.only)]
            known = {c.quant for c in chosen}
            peers = [Cell(pretrained, c.peer, None) for c in chosen if c.peer and c.peer not in known]
            wanted = [Cell(pretrained, "none", None), *dict.fromkeys(peers), *(c for c in chosen if c.quant != "none")]
            shares = [range(first, len(wanted), options.jobs) for first in range(options.jobs)]
            with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                for done in [pool.submit(work_on, share, wanted, limit, work) for share in shares]:
                    done.result()
            found = {cell.quant: json.loads(file_of(cell, limit, work).read_text()) for cell in wanted}
            rows = [summary(cell, found) for cell in wanted]
            report["models"][pretrained] = rows
            report["libraries"] = found["none"]["libraries"]
            texts.append(tables(pretrained, rows))
    text = "\n\n".join(texts)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(
            "<!-- written by benchmarks/methods.py -->\n# Quantization methods on the reference models\n\n"
            f"`{TASK}`, greedy, through lmms-eval; 95 % intervals, bootstrap clustered by picture; differences paired "
            f"by question, against round to nearest of the same bits, groups of {options.group} and components.\n\n"
            f"{text}\n"
        )


if __name__ == "__main__":
    main()
