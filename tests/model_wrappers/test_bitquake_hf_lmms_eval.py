"""The wrapper inside the real lmms-eval: ``simple_evaluate``, its response cache, and two processes of accelerate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TASK = """
task: tiny_pictures
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_pictures_functions.doc_to_visual
doc_to_text: !function tiny_pictures_functions.doc_to_text
doc_to_target: "answer"
process_results: !function tiny_pictures_functions.process_results
generation_kwargs: {{max_new_tokens: 6, do_sample: false}}
metric_list:
  - {{metric: joint, aggregation: mean, higher_is_better: true}}
metadata:
  version: 1
  bitquake: {{envelope: true, protocol: vqa}}
"""
FUNCTIONS = """
from bitquake.envelope import decode

def doc_to_visual(doc):
    return [doc["image"]]

def doc_to_text(doc):
    return doc["question"]

def process_results(doc, results):
    return {"joint": decode(results[0]).confidence["joint"]}
"""
RUN = """
import json, os, sys
from pathlib import Path
import lmms_eval.models
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

folder, checkpoint, out, cache = sys.argv[1:5]
results = simple_evaluate(
    model="bitquake_hf", model_args=f"pretrained={checkpoint},dtype=float32,artifacts={folder}/artifacts",
    batch_size="4", device="cpu", tasks=["tiny_pictures"],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    log_samples=True, bootstrap_iters=0, use_cache=cache or None,
)
if int(os.environ.get("RANK", 0)) == 0:
    kept = {key: results.get(key) for key in ("results", "throughput")}
    kept["world_size"] = int(os.environ.get("WORLD_SIZE", 1))
    if kept["world_size"] > 1:
        import torch.distributed

        group = torch.distributed.distributed_c10d._get_default_group()
        kept["timeout_s"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    kept["samples"] = {s["doc_id"]: s["resps"][0][0] for s in results["samples"]["tiny_pictures"]}
    Path(out).write_text(json.dumps(kept, default=str))
"""
LAUNCH_TWO = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_docs: Any) -> Path:
    from datasets import Dataset

    path = tmp_path_factory.mktemp("tiny_pictures")
    docs = [{"question": doc["question"], "image": doc["image"], "answer": ""} for doc in random_docs(23)]
    Dataset.from_list(docs).to_parquet(path / "test.parquet")
    (path / "tiny_pictures.yaml").write_text(TASK.format(data=path / "test.parquet"))
    (path / "tiny_pictures_functions.py").write_text(FUNCTIONS)
    (path / "run.py").write_text(RUN)
    return path


def evaluate(folder: Path, checkpoint: Path, name: str, *launcher: str, cache: str = "") -> dict[str, Any]:
    command = [
        sys.executable,
        *launcher,
        str(folder / "run.py"),
        str(folder),
        str(checkpoint),
        str(folder / name),
        cache,
    ]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads((folder / name).read_text())
    return result


@pytest.fixture(scope="module")
def single(folder: Path, tiny_checkpoint: Path) -> dict[str, Any]:
    """One process: this one. Its responses also go into a cache."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    results = simple_evaluate(
        model="bitquake_hf",
        model_args=f"pretrained={tiny_checkpoint},dtype=float32,artifacts={folder}/artifacts",
        batch_size="4",
        device="cpu",
        tasks=["tiny_pictures"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        use_cache=str(folder / "cache"),
    )
    assert results is not None
    kept = {key: results.get(key) for key in ("results", "throughput")}
    samples = {s["doc_id"]: s["resps"][0][0] for s in results["samples"]["tiny_pictures"]}
    read: dict[str, Any] = json.loads(json.dumps({**kept, "samples": samples}, default=str))
    return read


def test_simple_evaluate(single: dict[str, Any], load: Any, random_docs: Any, chat_task: Any) -> None:
    ours = {"bitquake": {"envelope": True, "protocol": "vqa"}}
    expected = chat_task(random_docs(23), ours, name="x").run(load(batch_size=4), max_new_tokens=6)
    assert [single["samples"][str(i)] for i in range(23)] == expected
    joints = [json.loads(text)["bitquake_envelope"]["confidence"]["joint"] for text in expected]
    assert single["results"]["tiny_pictures"]["joint,none"] == pytest.approx(sum(joints) / 23)
    counted = sum(json.loads(text)["bitquake_envelope"]["n_tokens"] for text in expected)
    assert single["throughput"]["total_gen_tokens"] == counted
    assert single["throughput"]["avg_latency"] > 0


def test_a_second_run_is_answered_from_the_cache(folder: Path, tiny_checkpoint: Path, single: dict[str, Any]) -> None:
    again = evaluate(folder, tiny_checkpoint, "again.json", cache=str(folder / "cache"))
    assert single["throughput"] and not again["throughput"]  # the model was not asked
    assert again["samples"] == single["samples"]


def test_two_processes_give_the_samples_of_one(folder: Path, tiny_checkpoint: Path, single: dict[str, Any]) -> None:
    double = evaluate(folder, tiny_checkpoint, "double.json", *LAUNCH_TWO)
    assert double["world_size"] == 2
    # a rank that loads the data or answers longer than the others must not end the run (torch: after 10 to 30 minutes)
    assert double["timeout_s"] > 30 * 24 * 3600
    assert double["samples"].keys() == single["samples"].keys()
    for doc_id, text in single["samples"].items():
        a, b = (json.loads(t)["bitquake_envelope"] for t in (text, double["samples"][doc_id]))
        confidence_a, confidence_b = a.pop("confidence"), b.pop("confidence")
        assert a.pop("entropy_first") == pytest.approx(b.pop("entropy_first"), abs=1e-4)
        assert a == b
        assert confidence_a == pytest.approx(confidence_b, abs=1e-5)
