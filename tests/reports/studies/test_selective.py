"""The page of reliable VQA: figures by loops written from the definitions, Selectors, mixtures and promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Task

from bitquake.reports.studies import build_study
from bitquake.reports.studies.selective import SELECTIVE_METRICS

N = 120
TASKS = [
    Task(variant="threshold", n=N),
    Task(n=N),
    Task("block_advqa", n=N, difficulty=1.1, shift_from="block_vqav2_clean"),
    Task("block_vizwiz", n=N, difficulty=1.6, shift_from="block_vqav2_clean"),
]


def sharp(task: str, records: list[Any]) -> list[Any]:
    """Answers that are right or wrong: half-right ones leave no room for small risks."""
    return [r.model_copy(update={"score": float(r.score > 0)}) for r in records]


def learned(task: str, records: list[Any]) -> list[Any]:
    """A Selector that knows the score but for a little noise."""
    noise = np.random.default_rng(len(task)).uniform(0, 0.3, len(records))
    records = sharp(task, records)
    return [
        r.model_copy(update={"confidence": {**r.confidence, "selector": float(0.7 * r.score + noise[i])}})
        for i, r in enumerate(records)
    ]


@pytest.fixture(scope="module")
def grown(shared_suite: Any) -> Any:
    suite = shared_suite
    suite.page = "selective"
    full = suite.add("m/full-precision", Model(), TASKS, edit=sharp, applied=learned)
    for method, bits, loss in (("hqq", 4, 0.1), ("mbq", 4, 0.05), ("hqq", 2, 1.8)):
        model = Model(f"{method}-int{bits}-g64", bits, loss, 0.4)
        spec = {"method": method, "bits": bits}
        suite.add(f"m/{model.quant}", model, TASKS, twin=full.name, edit=sharp, applied=learned, spec=spec)
    return suite


@pytest.fixture(scope="module")
def told(grown: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    site: Path = tmp_path_factory.mktemp("page") / "site"
    build_study(grown.write(), site, replicates=150)
    found: dict[str, Any] = json.loads((site / "study.json").read_text())
    return found


def table(told: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = [t for section in told["sections"] for t in section["tables"] if t["label"] == label]
    return dict(found)


def ranked(confidence: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Running risk of the answers by falling confidence."""
    return np.cumsum(1 - score[np.argsort(-confidence, kind="stable")]) / np.arange(1, score.size + 1)


def coverage(confidence: np.ndarray, score: np.ndarray, risk: float) -> float:
    reached = np.flatnonzero(ranked(confidence, score) <= risk + 1e-12)
    return float((reached[-1] + 1) / score.size) if reached.size else 0.0


@pytest.mark.parametrize(("title", "name"), [("MaxProb", "joint"), ("Selector", "selector")])
def test_figures_are_those_of_their_definitions(
    grown: Any, told: dict[str, Any], answers: Callable[..., Any], title: str, name: str
) -> None:
    out = grown.out
    at = {metric: i for i, metric in enumerate(SELECTIVE_METRICS)}
    for family, shown in (("block_vqav2", "block VQA-v2"), ("block_advqa", "block AdVQA")):
        rows = {row["head"]: row["cells"] for row in table(told, f"{shown}, {title}")["rows"]}
        for cell in grown.cells:
            row = next(
                cells for head, cells in rows.items() if head.startswith(cell.quantization[:8].replace("-p", " p"))
            )
            found = answers(out, cell, f"{family}_clean")
            by = found.confidences[name]
            assert row[at["accuracy"]]["value"] == pytest.approx(found.score.mean())
            assert row[at["coverage_at_risk_5"]]["value"] == pytest.approx(coverage(by, found.score, 0.05))
            assert row[at["aurc"]]["value"] == pytest.approx(ranked(by, found.score).mean(), abs=0.01)
            split = answers(out, cell, "block_vqav2_threshold")
            order = np.argsort(-split.confidences[name], kind="stable")
            gains = np.cumsum(np.where(split.score > 0, split.score, -10.0)[order])
            best = int(np.flatnonzero(gains == gains.max())[-1])
            threshold = split.confidences[name][order][best] if gains.max() >= 0 else np.inf
            phi = np.where(by >= threshold, np.where(found.score > 0, found.score, -10.0), 0.0).mean()
            assert row[at["phi_10"]]["value"] == pytest.approx(phi)


def test_a_selector_that_knows_is_better_and_a_broken_model_worse(told: dict[str, Any]) -> None:
    verdicts = {f["text"].split(" on ")[0].split(" against")[0]: f["verdict"] for f in told["findings"]}
    assert verdicts["Selector"] == "better"
    assert verdicts["INT2"] == "worse"
    rows = [row for row in table(told, "block VQA-v2: Selector less MaxProb")["rows"] if row["cells"]]
    aurc = [row["cells"][4]["verdict"] for row in rows]
    assert len(aurc) == 4 and "worse" not in aurc and aurc[-1] == "better"


def test_mixtures_run_from_one_task_to_the_other(grown: Any, told: dict[str, Any], answers: Callable[..., Any]) -> None:
    figures = [f for section in told["sections"] for f in section["figures"] if f["title"] == "Accuracy"]
    assert len(figures) == 4  # two shifts, and a panel for HQQ and one for MBQ
    cell = grown.cells[1]
    ends = [answers(grown.out, cell, task).score.mean() for task in ("block_vqav2_clean", "block_advqa_clean")]
    rows = {row[1]: row[2] for row in figures[0]["rows"] if row[0] == cell.quantization}
    assert list(rows) == ["0", "10", "25", "33", "50", "67", "75", "90", "100"]
    expected = {share: (1 - share) * ends[0] + share * ends[1] for share in (0.0, 0.25, 1.0)}
    assert [rows["0"], rows["25"], rows["100"]] == [f"{100 * value:.1f}" for value in expected.values()]


def test_promises_are_of_full_precisions_threshold(
    grown: Any, told: dict[str, Any], answers: Callable[..., Any]
) -> None:
    full, low = grown.cells[:2]
    split = answers(grown.out, full, "block_vqav2_threshold")
    order = np.argsort(-split.confidence, kind="stable")
    reached = np.flatnonzero(ranked(split.confidence, split.score) <= 0.10 + 1e-12)
    threshold = split.confidence[order][reached[-1]]
    found = answers(grown.out, low, "block_vqav2_clean")
    answered = found.confidence >= threshold
    assert answered.any()
    row = next(r for r in table(told, "Risk really taken, MaxProb")["rows"] if r["head"] == low.quantization)
    at = 2  # the first task, the third risk
    assert row["cells"][at]["threshold"] == pytest.approx(threshold)
    assert row["cells"][at]["value"] == pytest.approx(1 - found.score[answered].mean())
    assert row["cells"][at]["coverage"] == pytest.approx(answered.mean())
    promise = next(f for f in told["findings"] if "promises" in f["text"])
    assert "(36 promises)" in promise["text"]  # 4 models, 3 tasks, 3 risks
