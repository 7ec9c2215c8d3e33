"""The evaluation loop: one noisy task through lmms-eval's own ``huggingface`` wrapper (the peer) and through ours.

    OMP_NUM_THREADS=1 python benchmarks/eval_loop.py --json benchmarks/eval_loop.json

Both run the same checkpoint in bfloat16, greedily, in one process and in turn; every sample's answer is compared.
Two tasks: the block world's (64x64 pictures), and the same questions about 640x480 JPEGs, the size of the photographs
in VQA-v2, RefCOCO+ and VizWiz: what a loop has to load with real data. Ours runs without a noise cache, and with one
that an earlier run has filled: the state in which a suite evaluates every further quantization.

- "generate": seconds inside ``model.generate``, which is the same function for both; "outside" is the rest of the wall
  time. Where threads load pictures beside the model, their Python slows it down, and that time hides inside: so
- "alone" replays the ``generate`` calls of our run with nothing beside them, and "over alone" is what the whole loop
  takes more than that, as a share of its wall time. No loop on the same kernels and batches can be faster than alone:
  "at best" is the peer's wall time over it.
- "processor" is processor time of all threads. On a machine whose cores are all busy with other work, threads beside
  the model gain nothing, and wall times follow this column instead ("load" says how busy it was).

The peer as it is (lmms-eval 0.7.3) runs no checkpoint with transformers 5: it compares a model type's name with a list
of classes, so it loads every model by ``AutoModel``, which cannot generate; and it passes the processor ``audios``,
which is refused. Both are mended here from outside, and nothing of its loop is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cv2
import lmms_eval.models.chat.huggingface as peer
import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from machine import machine
from PIL import Image as Pillow
from tabulate import tabulate
from transformers import AutoModelForImageTextToText

from bitquake.envelope import decode
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.confidence import GreedyRecorder
from bitquake.model_wrappers.loading import resolve_pretrained
from bitquake.noise import load_rgb
from bitquake.tasks.rows import find_task, load_rows

FAMILY = """
family: loop_photos
title: Questions about pictures of photographs' size, for benchmarks/eval_loop.py
world: block
dataset: {files: {test: test.parquet, threshold: threshold.parquet}}
splits: {test: test, threshold: threshold}
columns: {answers: answers, sample_id: sample_id, image_id: image_id}
protocol: vqa
variants: {noise: {names: [NOISE], severities: [SEVERITY], mode: native}}
"""
NEAR_TIE = 0.05
"""Margin of the first token's probability below which bfloat16 may choose either of two tokens in another batch."""
LOOPS = ("huggingface", "bitquake_hf", "bitquake_hf, noise cache")


@dataclass
class Loop:
    """One wrapper, and what its runs of a task took."""

    model: Any
    walls: list[float] = field(default_factory=list)
    generates: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    _inside: float = 0.0

    def __post_init__(self) -> None:
        generate: Callable[..., Any] = self.model.model.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                self._inside += time.perf_counter() - began
                self.calls.append(kwargs)

        self.model.model.generate = timed
        self._generate = generate

    def run(self, task: Any, split: str) -> None:
        name, self._inside = task.instances[0].args[4], 0.0
        self.model.task_dict[name] = {split: task.eval_docs}
        self.calls.clear()
        with contextlib.redirect_stderr(io.StringIO()):
            began, spent = time.perf_counter(), time.process_time()
            responses = self.model.generate_until(task.instances)
            self.walls.append(time.perf_counter() - began)
            self.processor.append(time.process_time() - spent)
        self.generates.append(self._inside)
        envelopes = [decode(response.text) for response in responses]
        self.answers = [envelope.text.strip() for envelope in envelopes]
        self.margins = [envelope.confidence.get("margin") or 0.0 for envelope in envelopes]

    @torch.inference_mode()
    def alone(self) -> float:
        """Seconds of the last run's ``generate`` calls with nothing beside them."""
        began = time.perf_counter()
        for call in self.calls:
            self._generate(**call | {"logits_processor": [GreedyRecorder()]})
        return time.perf_counter() - began


class MendedProcessor:
    """A processor that the peer can call: without the keywords that transformers refuses, pictures by sample."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, text: list[str], images: list[Any], videos: list[Any], audios: list[Any], **kwargs: Any) -> Any:
        assert not videos and not audios and len(images) == len(text)
        return self._processor(text=text, images=[[image] for image in images], **kwargs)


def loops(pretrained: str, batch_size: int, cache: Path, artifacts: Path) -> dict[str, Loop]:
    peer.AutoModel = AutoModelForImageTextToText
    stock = peer.Huggingface(
        pretrained=resolve_pretrained(pretrained), device="cpu", device_map="cpu", batch_size=batch_size
    )
    stock.processor = MendedProcessor(stock.processor)
    ours: dict[str, Any] = {
        "pretrained": pretrained, "dtype": "bfloat16", "device": "cpu", "batch_size": batch_size,
        "artifacts": str(artifacts),
    }  # fmt: skip
    wrappers = stock, BitquakeHF(**ours), BitquakeHF(**ours, noise_cache=str(cache))
    return {name: Loop(wrapper) for name, wrapper in zip(LOOPS, wrappers, strict=True)}


def photos(folder: Path, samples: int, noise: str, severity: int) -> str:
    """A family whose pictures are the block world's as 640x480 JPEGs; returns the noisy task's name."""
    rng, seen = np.random.default_rng(0), dict[str, bytes]()
    rows = load_rows(find_task("block_vqav2_clean"))

    def photo(row: dict[str, Any]) -> bytes:
        name = row["bitquake"]["image_id"]
        if name not in seen:
            large = cv2.resize(load_rgb(row["image"]), (640, 480), interpolation=cv2.INTER_CUBIC).astype(np.float64)
            pixels = np.clip(large + rng.normal(0, 3, large.shape), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Pillow.fromarray(pixels).save(file, "JPEG", quality=90)
            seen[name] = file.getvalue()
        return seen[name]

    for split, part in (("test", range(samples)), ("threshold", range(samples, samples + 8))):
        made = [
            {
                "question": row["question"],
                "answers": row["answers"],
                "sample_id": f"{split}-{i}",
                "image_id": f"{split}-{row['bitquake']['image_id']}",
                "image": {"bytes": photo(row), "path": None},
            }
            for i, row in ((i, rows[i]) for i in part)
        ]
        features = Features(
            {"question": Value("string"), "answers": rows.features["answers"], "sample_id": Value("string")}
            | {"image_id": Value("string"), "image": Image()}
        )
        Dataset.from_list(made, features=features).to_parquet(folder / f"{split}.parquet")
    (folder / "family.yaml").write_text(FAMILY.replace("NOISE", noise).replace("SEVERITY", str(severity)))
    return f"loop_photos_{noise}_{severity}"


def tasks(folder: Path, samples: int, noise: str, severity: int) -> Iterator[tuple[str, Any]]:
    named = {
        "64x64": (f"block_vqav2_{noise}_{severity}", None),
        "640x480": (photos(folder, samples, noise, severity), str(folder)),
    }
    for size, (name, include) in named.items():
        manager = TaskManager(include_path=include, include_defaults=False, model_name="bitquake_hf")
        task = get_task_dict([name], manager, "chat")[name]
        task.build_all_requests(limit=samples, rank=0, world_size=1)
        if len(task.instances) != samples:
            raise SystemExit(f"{name}: {len(task.instances)} samples, {samples} were asked for")
        yield size, task


def measure(size: str, task: Any, batch_size: int, all_loops: dict[str, Loop], repeats: int) -> list[dict[str, Any]]:
    split, alone = task.instances[0].args[5], []
    for turn in range(repeats + 1):  # the first warms up, and fills the noise cache
        order = list(all_loops.values())
        for loop in order if turn % 2 else reversed(order):
            loop.run(task, split)
        if turn:
            alone.append(all_loops[LOOPS[1]].alone())
    for loop in all_loops.values():
        del loop.walls[0], loop.generates[0], loop.processor[0]
    stock = all_loops[LOOPS[0]]
    bare = statistics.median(alone)
    rows = []
    for name, loop in all_loops.items():
        wall, generate = statistics.median(loop.walls), statistics.median(loop.generates)
        different = [i for i, pair in enumerate(zip(stock.answers, loop.answers, strict=True)) if len(set(pair)) > 1]
        clear = [i for i in different if loop.margins[i] >= NEAR_TIE]
        for i in different:
            print(
                f"{task.instances[i].args[0]!r}: {stock.answers[i]!r} from the peer, {loop.answers[i]!r} from {name} "
                f"(margin of its first token {loop.margins[i]:.3f})"
            )
        if clear:
            raise SystemExit(f"{len(clear)} answers differ that are no near ties")
        ratios = [one / other for one, other in zip(stock.walls, loop.walls, strict=True)]
        rows.append(
            {
                "pictures": size,
                "batch": batch_size,
                "loop": name,
                "wall s": wall,
                "processor s": statistics.median(loop.processor),
                "generate s": generate,
                "outside": 1 - generate / wall,
                "alone s": bare,
                "over alone": 1 - bare / wall,
                "times faster": statistics.median(ratios),
                "at best": statistics.median(stock.walls) / bare,
                "same answers": len(loop.answers) - len(different),
            }
        )
    for loop in all_loops.values():
        loop.walls.clear()
        loop.generates.clear()
        loop.processor.clear()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="bitquake/block-idefics3")
    parser.add_argument("--noise", default="gaussian_noise")
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "family").mkdir()
        noise = arguments.noise, arguments.severity
        chosen = dict(tasks(folder / "family", arguments.samples, *noise))
        for batch_size in arguments.batch_sizes:
            all_loops = loops(arguments.pretrained, batch_size, folder / "noise", folder / "artifacts")
            for size, task in chosen.items():
                rows += measure(size, task, batch_size, all_loops, arguments.repeats)
    formats = ("", "", "", ".2f", ".2f", ".2f", ".1%", ".2f", ".1%", ".2f", ".2f", "")
    shown = [{key: format(value, how) for (key, value), how in zip(row.items(), formats, strict=True)} for row in rows]
    print(tabulate(shown, headers="keys", disable_numparse=True))
    where = {**machine("torch", "transformers", "lmms_eval", "bitquake"), "load": round(os.getloadavg()[0], 1)}
    print(
        f"peer: lmms-eval's huggingface, {arguments.pretrained}, {'_'.join(map(str, noise))}, {arguments.samples} "
        f"samples, medians of {arguments.repeats}; " + ", ".join(f"{key} {value}" for key, value in where.items())
    )
    if arguments.json:
        told = {key: getattr(arguments, key) for key in ("pretrained", "noise", "severity", "samples", "repeats")}
        figures = {"peer": "lmms-eval's huggingface, mended", **told, "machine": where, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
