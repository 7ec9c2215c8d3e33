"""Scores of a checkpoint on the block world, through lmms-eval as a user would run it; the model cards' tables.

    python benchmarks/reference_checkpoint.py [--pretrained bitquake/block-qwen2vl] [--limit N] [--json FILE]

Two processes at a time, each on one thread. Peers: the same model on blank pictures (its answer prior), one caption for
all pictures, and each quantization beside full precision in the same run. The blank pictures are a family of their own,
written to a temporary folder: the shipped test split with every picture replaced by a uniform grey.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

QUANTS = ("none", "rtn-int8-g64", "rtn-int4-g64", "rtn-int3-g64", "rtn-int2-g64", "hqq-int3-g64", "hqq-int2-g64")
NOISES = ("gaussian_noise", "shot_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
FAMILIES = ("block_vqav2", "block_advqa", "block_vizwiz", "block_refcocoplus", "block_scienceqa")
DESCRIBED = ("block_coco_caption", "block_flickr_retrieval")
SEVERITIES = (1, 3, 5)


class Job(NamedTuple):
    """One lmms-eval process: a quantization and its tasks, with a limit of samples per task (None: all)."""

    quant: str
    tasks: tuple[str, ...]
    limit: int | None


def write_blank_family(folder: Path) -> None:
    """A family ``blank_vqav2``: the test questions of ``block_vqav2``, every picture a uniform grey."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from bitquake.tasks.world.build import data_file

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (100, 100, 100)).save(buffer, "PNG")
    target = folder / "blank_vqav2"
    target.mkdir(parents=True)
    for split in ("test", "threshold"):
        table = pq.read_table(data_file("block_vqav2", split))
        at = table.schema.get_field_index("image")
        image = pa.array(
            [{"bytes": buffer.getvalue(), "path": None}] * table.num_rows, type=table.schema.field(at).type
        )
        pq.write_table(table.set_column(at, table.schema.field(at), image), target / f"{split}.parquet")
    (target / "family.yaml").write_text(
        "family: blank_vqav2\nworld: block\n"
        f"dataset: {{files: {{test: {target / 'test.parquet'}, threshold: {target / 'threshold.parquet'}}}}}\n"
        "splits: {test: test, threshold: threshold}\n"
        "columns: {answers: answers, sample_id: sample_id, image_id: image_id}\nprotocol: vqa\n"
    )


def constant_caption(tried: int = 100) -> tuple[str, float]:
    """The caption of the calibration split that suits its pictures best, of ``tried``; and its CIDEr-D / 10 on test."""
    import pyarrow.parquet as pq

    from bitquake.tasks.scoring.caption import Corpus, score_caption
    from bitquake.tasks.world.build import data_file

    def mean(text: str, references: list[list[str]]) -> float:
        corpus = Corpus.of(references)
        return sum(score_caption(text, texts, corpus).score for texts in references) / len(references)

    splits = ("calibration", "test")
    known, new = (pq.read_table(data_file(DESCRIBED[0], split))["answer"].to_pylist() for split in splits)
    best = max(sorted({text for texts in known for text in texts})[:tried], key=lambda text: mean(text, known))
    return best, mean(best, new)


def evaluate(job: Job, pretrained: str, out: Path, include: str) -> dict[str, dict[str, float]]:
    """Run one job; returns task -> metric -> value."""
    arguments = [
        *(sys.executable, "-m", "lmms_eval", "--model", "bitquake_hf", "--device", "cpu", "--batch_size", "64"),
        *("--model_args", f"pretrained={pretrained},quant={job.quant},artifacts={out / 'artifacts'}"),
        *("--tasks", ",".join(job.tasks), "--output_path", str(out / job.quant / job.tasks[0]), "--log_samples"),
        *("--include_path", include),
        *(("--limit", str(job.limit)) if job.limit else ()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, float]] = {}
    for path in (out / job.quant / job.tasks[0]).rglob("*_results.json"):
        for task, values in json.loads(path.read_text())["results"].items():
            found[task] = {
                key.split(",")[0]: value
                for key, value in values.items()
                if isinstance(value, (int, float)) and "," in key
            }
    if set(found) != set(job.tasks):
        raise SystemExit(f"{job}: incomplete\n{done.stderr[-3000:]}")
    print(f"done: {job.quant} {', '.join(job.tasks)[:80]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="bitquake/block-idefics3")
    parser.add_argument("--limit", type=int, help="samples of each task (default: all)")
    parser.add_argument("--noise-limit", type=int, default=1000, help="samples of each noisy task (default 1000)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    clean = tuple(f"{family}_clean" for family in (*FAMILIES, *DESCRIBED))
    jobs = [Job(quant, clean, options.limit) for quant in QUANTS]
    jobs.insert(1, Job("none", ("blank_vqav2_clean",), options.limit))
    noisy = tuple(f"block_vqav2_{noise}_{severity}" for noise in NOISES for severity in SEVERITIES)
    jobs.insert(1, Job("none", noisy, options.noise_limit))
    grainy = tuple(f"{family}_{NOISES[0]}_{severity}" for family in DESCRIBED for severity in SEVERITIES)
    jobs.insert(1, Job("none", grainy, options.noise_limit))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_blank_family(folder / "families")
        path = [sys.executable, "-m", "bitquake", "tasks", "path", "--families", str(folder / "families")]
        include = subprocess.run(path, capture_output=True, text=True, check=True).stdout.strip()
        with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
            results = list(pool.map(lambda job: evaluate(job, options.pretrained, folder / "runs", include), jobs))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for job, result in zip(jobs, results, strict=True):
        scores.setdefault(job.quant, {}).update(result)

    def cell(quant: str, task: str, metric: str = "accuracy") -> str:
        return f"{100 * scores[quant][task][metric]:.1f}"

    full = scores["none"]
    answered, described = clean[: len(FAMILIES)], clean[len(FAMILIES) :]
    print(tabulate([[q, *(cell(q, task) for task in answered)] for q in QUANTS], headers=["accuracy, %", *FAMILIES]))
    caption, constant = constant_caption()
    rows = [[q, *(cell(q, task) for task in described)] for q in QUANTS]
    noise = NOISES[0]
    rows += [[f"none, {noise} {s}", *(cell("none", f"{f}_{noise}_{s}") for f in DESCRIBED)] for s in SEVERITIES]
    rows.append(["one caption, or a guess", f"{100 * constant:.1f}", "1.0"])
    print("\n" + tabulate(rows, headers=["", "captions: 10 x CIDEr-D", "retrieval: Recall@1-of-100, %"]))
    print(f"the one caption: {caption}")
    print(f"\nblank pictures, block_vqav2: {cell('none', 'blank_vqav2_clean')}")
    print(f"AUROC of the confidence, block_vqav2: {full['block_vqav2_clean']['auroc']:.3f}\n")
    rows = [[noise, *(cell("none", f"block_vqav2_{noise}_{s}") for s in SEVERITIES)] for noise in NOISES]
    print(tabulate(rows, headers=["block_vqav2, %", "severity 1", "3", "5"]))
    if options.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        payload = {"pretrained": options.pretrained, "machine": machine, "limit": options.limit, "scores": scores}
        payload["noise_limit"] = options.noise_limit
        payload["constant_caption"] = {"text": caption, "score": constant}
        options.json.write_text(json.dumps(payload, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
