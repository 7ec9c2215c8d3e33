"""Whether a run of lmms-eval answered every sample: it can fail half-way and still end with code 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def sample_counts(folder: Path) -> dict[str, int]:
    """Task -> how many different samples a folder of lmms-eval's output holds; damaged lines do not count."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*_samples_*.jsonl")):
        known = found.setdefault(path.stem.split("_samples_", 1)[1], set())
        with path.open("rb") as lines:
            for line in lines:
                try:
                    known.add(str(json.loads(line)["doc_id"]))
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
    return {task: len(ids) for task, ids in found.items()}


def planned_counts(folder: Path) -> dict[str, int]:
    """Task -> samples that lmms-eval set out to answer, by its results files; a damaged one says nothing."""
    found: dict[str, int] = {}
    for path in sorted(folder.rglob("*_results.json")):
        try:
            told = json.loads(path.read_bytes())["n-samples"]
            found |= {str(task): int(n["effective"]) for task, n in told.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def complete(folder: Path, samples: Mapping[str, int]) -> bool:
    """Whether a run's folder holds so many samples of each task."""
    counts = sample_counts(folder)
    return all(counts.get(task, 0) == n for task, n in samples.items())
