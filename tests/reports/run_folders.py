"""Runs as lmms-eval 0.7.3 leaves them: folders, file names and keys of its evaluation tracker, answers from a seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitquake.quant_card import Calibration, ComponentEntry, ModuleEntry, QuantCard
from bitquake.records import RECORD_KEY, SampleRecord

PRETRAINED = "bitquake/idefics3-tiny"


def blake(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


@dataclass
class Model:
    """A model to pretend: how much it loses, its quant card, and its confidences beside the primary one."""

    quant: str = "full-precision"
    bits: int = 16
    loss: float = 0.0
    overconfidence: float = 0.0
    pretrained: str = PRETRAINED
    execution: str = "simulated"
    changes: dict[str, Any] = field(default_factory=dict)
    further: tuple[str, ...] = ()

    def card(self) -> QuantCard:
        full = self.bits == 16
        n = 1_200_000
        module = ModuleEntry(
            name="model.text_model.layers.0.self_attn.q_proj",
            component="language",
            shape=(192, 192),
            bits=self.bits,
            group_size=64,
            symmetric=False,
            n_weights=36864,
            n_bytes=73728,
            packed_bytes=36864 * self.bits // 8 + 2304,
            hash_before=blake("before"),
            hash_after=blake("after", self.bits),
        )
        fields: dict[str, Any] = {
            "pretrained": self.pretrained,
            "revision": "a1b2c3",
            "architecture": "Idefics3ForConditionalGeneration",
            "dtype": "bfloat16",
            "spec_name": self.quant,
            "spec": {} if full else {"method": "rtn", "bits": self.bits, "group_size": 64, "components": "language"},
            "method": "none" if full else "rtn",
            "execution": "full-precision" if full else self.execution,
            "kernel": "torch F.linear on bfloat16" + ("" if full else " de-quantized before the run"),
            "modules": [] if full else [module],
            "kept": {"lm_head": "bfloat16"},
            "components": {
                "language": ComponentEntry(
                    n_parameters=n, n_quantized=0 if full else 900_000, n_bytes=2 * n, packed_bytes=n * self.bits // 8
                ),
                "vision": ComponentEntry(n_parameters=400_000, n_quantized=0, n_bytes=800_000, packed_bytes=800_000),
            },
            "nominal_bpw": 16.0 if full else (self.bits * 900_000 + 16 * 700_000) / 1_600_000,
            "effective_bpw": 16.0 if full else ((self.bits + 0.5) * 900_000 + 16 * 700_000) / 1_600_000,
            "weights_hash": blake("weights", self.quant, self.loss),
            "calibration": Calibration(),
            "libraries": {"bitquake": "0.1.0", "torch": "2.15.0", "transformers": "5.23.0"},
            "device": "cpu",
        }
        return QuantCard.model_validate({**fields, **self.changes})


@dataclass
class Task:
    """A task of the tracker: its family, variant, noise and how hard it is."""

    family: str = "block_vqav2"
    variant: str = "clean"
    noise: dict[str, str | int] | None = None
    difficulty: float = 0.0
    n: int = 60
    world: str = "block"
    per_image: int = 3
    shift_from: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}_{self.variant}"

    def images(self) -> list[str]:
        split = "threshold" if self.variant == "threshold" else "test"
        return [f"{self.family}-{split}-img{i // self.per_image}" for i in range(self.n)]


def noisy(name: str, severity: int, **changes: Any) -> Task:
    noise: dict[str, str | int] = {"name": name, "severity": severity, "seed": 0, "version": 1}
    return Task(variant=f"{name}_{severity}", noise=noise, **{"difficulty": 0.25 * severity, **changes})


def records(model: Model, task: Task, seed: int = 0) -> list[SampleRecord]:
    """Soft-scored answers whose difficulty all models share, so that differences are paired ones."""
    card = model.card()
    split = "threshold" if task.variant == "threshold" else "test"
    shared = np.random.default_rng([seed, sum(map(ord, task.family + split))])
    own = np.random.default_rng([seed, sum(map(ord, task.name + model.quant))])
    ease = shared.normal(1.8, 1.6, task.n) - task.difficulty - model.loss
    luck = shared.normal(0, 1.0, task.n) + own.normal(0, 0.15 + 0.3 * model.loss, task.n)
    right = ease + luck > 0
    soft = shared.choice([1.0, 1.0, 1.0, 0.6, 0.3], task.n)
    confidence = 1 / (1 + np.exp(-(ease * 1.2 + model.overconfidence + own.normal(0, 0.4, task.n))))
    learned = {
        name: np.random.default_rng([seed, sum(map(ord, name + task.name + model.quant))]).beta(2 + 6 * right, 3)
        for name in model.further
    }
    split = "threshold" if task.variant == "threshold" else "test"
    out = []
    for i, image in enumerate(task.images()):
        sample = f"{split}-{i:05d}"
        out.append(
            SampleRecord.model_validate(
                {
                    "family": task.family,
                    "variant": task.variant,
                    "task": task.name,
                    "world": task.world,
                    "dataset": f"{task.family}.parquet",
                    "split": split,
                    "sample_id": sample,
                    "image_id": image,
                    "protocol": "vqa",
                    "score": float(soft[i]) if right[i] else 0.0,
                    "answer": "red",
                    "text": "red",
                    "confidence": {"joint": float(confidence[i]), **{k: float(v[i]) for k, v in learned.items()}},
                    "shift_from": task.shift_from,
                    "noise": task.noise,
                    "pixel_hash": [blake("pixels", image, task.noise)],
                    "prompt_hash": blake("prompt", sample),
                    "model_hash": card.model_hash,
                    "card": card.content_hash,
                    "subset": blake("subset", task.family, task.n),
                    "n_tokens": 2,
                }
            )
        )
    return out


def sample_line(record: SampleRecord, index: int) -> dict[str, Any]:
    """A line of ``*_samples_*.jsonl`` as ``save_results_samples`` leaves it."""
    return {
        "doc_id": index,
        "target": "red",
        "filtered_resps": [record.text],
        "token_counts": [None],
        "doc_hash": "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b",
        RECORD_KEY: record.model_dump(mode="json"),
        "input": "What colour is the circle?",
    }


class Runs:
    """Writes runs below a folder, and the quant cards into its ``artifacts``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.artifacts = root / "artifacts"
        self.count = 0

    def write(
        self,
        model: Model,
        tasks: list[Task],
        *,
        name: str | None = None,
        edit: Any = None,
        config: dict[str, Any] | None = None,
        results_fields: dict[str, Any] | None = None,
    ) -> Path:
        """One process of lmms-eval; ``edit(task name, records)`` may change the answers. Returns its output folder."""
        card = model.card()
        cards = self.artifacts / "quant_cards"
        cards.mkdir(parents=True, exist_ok=True)
        (cards / f"{card.content_hash}.json").write_text(card.to_json())
        self.count += 1
        output = self.root / (name or model.quant)
        folder = output / model.pretrained.replace("/", "__")
        folder.mkdir(parents=True, exist_ok=True)
        stamp = f"20261121_04{self.count // 60:02d}{self.count % 60:02d}"
        args = f"pretrained={model.pretrained},quant={model.quant},batch_size=8,attn_implementation=sdpa"
        answers = {task.name: records(model, task) for task in tasks}
        if edit is not None:
            answers = {key: edit(key, value) for key, value in answers.items()}
        results = {
            "results": {task.name: {"alias": task.name, "accuracy,none": 0.5} for task in tasks},
            "group_subtasks": {task.name: [] for task in tasks},
            "configs": {
                task.name: {
                    "task": task.name,
                    "generation_kwargs": {"max_new_tokens": 16, "do_sample": False, "until": ["\n\n"]},
                    "metric_list": [{"metric": RECORD_KEY, "aggregation": "<function bitquake>"}],
                    "metadata": {"version": 1.0, "bitquake": {"envelope": True}},
                }
                for task in tasks
            },
            "versions": {task.name: 1.0 for task in tasks},
            "n-shot": {task.name: 0 for task in tasks},
            "higher_is_better": {task.name: {"accuracy": True} for task in tasks},
            "n-samples": {task.name: {"original": task.n, "effective": task.n} for task in tasks},
            "config": {
                "model": "bitquake_hf",
                "model_args": args,
                "batch_size": "8",
                "batch_sizes": [],
                "device": None,
                "use_cache": None,
                "limit": None,
                "offset": 0,
                "gen_kwargs": "",
                "random_seed": 0,
                **(config or {}),
            },
            "git_hash": None,
            "lmms_eval_version": "unknown@unknown",
            "date": stamp,
            "task_hashes": {},
            "model_source": "bitquake_hf",
            "model_name": model.pretrained,
            "model_name_sanitized": model.pretrained.replace("/", "__"),
            "system_instruction": None,
            "system_instruction_sha": None,
            "chat_template_sha": None,
            "total_evaluation_time_seconds": "12.5",
            **(results_fields or {}),
        }
        (folder / f"{stamp}_results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False))
        for task in tasks:
            lines = [json.dumps(sample_line(r, i), ensure_ascii=False) for i, r in enumerate(answers[task.name])]
            (folder / f"{stamp}_samples_{task.name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return output


def standard_models() -> list[Model]:
    return [
        Model(),
        Model("rtn-int8-g64", 8, 0.02, 0.0),
        Model("rtn-int4-g64", 4, 0.12, 0.15),
        Model("rtn-int3-g64", 3, 0.55, 0.5),
    ]


def standard_tasks(n: int) -> list[Task]:
    return [
        Task(variant="threshold", n=n),
        Task(n=n),
        *(noisy(name, severity, n=n) for name in ("gaussian_noise", "contrast") for severity in (1, 3, 5)),
        Task(family="block_advqa", difficulty=1.1, n=n),
    ]
