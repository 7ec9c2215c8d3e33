"""The grounding page: shifts, calibration sources against each other, and boxes' calibration, by plain numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Task, noisy
from scipy.optimize import minimize

from bitquake.reports.studies import build_study, grounding

FAMILY = "block_refcocoplus"
N = 90
TASKS = [
    Task(FAMILY, "threshold", n=N),
    Task(FAMILY, n=N),
    Task(FAMILY, "testB", n=N, shift_from=f"{FAMILY}_clean", difficulty=0.8),
    noisy("fog", 3, family=FAMILY, n=N),
    noisy("contrast", 3, family=FAMILY, n=N),
]


def boxes(task: str, records: list[Any]) -> list[Any]:
    """The same answers as boxes: right or wrong, with a small confidence under the name of a box's."""
    out = []
    for r in records:
        told = {"box_joint": 0.2 * (r.confidence["joint"] or 0.0)}
        changes = {"protocol": "grounding", "score": float(r.score >= 0.5), "confidence": told}
        out.append(r.model_copy(update={**changes, "primary_confidence": "box_joint"}))
    return out


@pytest.fixture
def grown(suite: Any) -> Any:
    suite.page = "grounding"
    full = suite.add("m/full-precision", Model(), TASKS, edit=boxes)

    def add(method: str, source: str, loss: float) -> None:
        quant = f"{method}-int3-g64"
        model = Model(f"{quant}-{source}", 3, loss, changes={"calibration": {"source": source}})
        name = f"m/{quant}/{source}" if source != "none" else f"m/{quant}"
        calibration = "" if source == "none" else source
        spec = {"method": method, "bits": 3}
        suite.add(name, model, TASKS, twin=full.name, edit=boxes, spec=spec, calibration=calibration)

    add("rtn", "none", 0.5)
    for source, loss in (("text", 0.9), ("noise", 0.8), ("caption", 0.1), ("in-domain", 0.05)):
        add("awq", source, loss)
    return suite


def numbers(out: Path, site: Path) -> dict[str, Any]:
    build_study(out, site, replicates=200)
    told: dict[str, Any] = json.loads((site / "study.json").read_text())
    return told


def table(told: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = [t for section in told["sections"] for t in section["tables"] if t["label"].startswith(label)]
    return dict(found)


def test_the_contrast_is_data_free_less_real_data_within_a_method(
    grown: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    out = grown.write()
    told = numbers(out, tmp_path / "site")
    cells = {cell.calibration or cell.quantization: cell for cell in grown.cells}

    def accuracy(source: str, tasks: list[str]) -> float:
        return float(np.mean([answers(out, cells[source], f"{FAMILY}_{task}").score.mean() for task in tasks]))

    rows = {row["head"]: row for row in table(told, "Acc@0.5: data-free less")["rows"]}
    assert set(rows) == {"awq INT3", "all methods, INT3"}
    for at, tasks in enumerate((["clean"], ["testB"], ["contrast_3", "fog_3"])):
        free, real = (
            [accuracy(s, tasks) for s in sources] for sources in (("text", "noise"), ("caption", "in-domain"))
        )
        assert rows["awq INT3"]["cells"][at]["value"] == pytest.approx(np.mean(free) - np.mean(real))
        both = [*free, accuracy("rtn-int3-g64", tasks)]
        assert rows["all methods, INT3"]["cells"][at]["value"] == pytest.approx(np.mean(both) - np.mean(real))
    assert rows["awq INT3"]["note"] == "text and noise less caption and in-domain"
    finding = next(f for f in told["findings"] if f["text"].startswith("awq INT3"))
    assert finding["verdict"] == "worse"
    assert not any(f["text"].startswith("all methods") for f in told["findings"])  # the methods differ as well


def test_the_shift_effect_is_a_difference_in_differences(
    grown: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    out = grown.write()
    shown = table(numbers(out, tmp_path / "site"), "Difference in differences")
    full, rtn = grown.cells[:2]

    def less(task: str) -> float:
        low, high = (answers(out, cell, f"{FAMILY}_{task}").score.mean() for cell in (rtn, full))
        return float(low - high)

    row = next(row for row in shown["rows"] if row["head"] == "rtn-int3-g64")
    assert row["cells"][0]["value"] == pytest.approx(less("testB") - less("clean"))
    noise = np.mean([less("fog_3"), less("contrast_3")]) - less("clean")
    assert row["cells"][3]["value"] == pytest.approx(noise)


def test_no_headline_stands_that_its_corrected_p_value_does_not(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says that of every word; intervals alone would let these stand."""

    def lost(task: str, records: list[Any]) -> list[Any]:
        """Every box on testB is a wrong one."""
        found = boxes(task, records)
        return [r.model_copy(update={"score": 0.0}) for r in found] if task.endswith("testB") else found

    suite.page = "grounding"
    full = suite.add("m/full-precision", Model(), TASKS, edit=boxes)
    suite.add("m/rtn-int3-g64", Model("rtn-int3-g64", 3, 0.05), TASKS, twin=full.name, edit=lost)
    out = suite.write()
    before = numbers(out, tmp_path / "before")["findings"]
    monkeypatch.setattr(grounding, "corrected", lambda figures: [1.0 for _ in figures])
    after = numbers(out, tmp_path / "after")["findings"]
    for start in ("testB: beyond what the shift does", "calibration of full precision's boxes"):
        (one,) = [f for f in before if f["text"].startswith(start)]
        (other,) = [f for f in after if f["text"].startswith(start)]
        assert one["verdict"] in ("worse", "better") and other["verdict"] == "tied"
    assert {f["verdict"] for f in after} == {"tied"} and "(mean over 1: tied)" in str(after)


def test_boxes_are_calibrated_on_the_threshold_split(grown: Any, answers: Callable[..., Any], tmp_path: Path) -> None:
    out = grown.write()
    shown = table(numbers(out, tmp_path / "site"), "ECE at IoU")
    full = grown.cells[0]
    split, clean = (answers(out, full, f"{FAMILY}_{task}") for task in ("threshold", "clean"))

    def logit(p: np.ndarray) -> np.ndarray:
        return np.log(p / (1 - p))

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] * logit(split.confidence) + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - split.score * z))

    def error(confidence: np.ndarray) -> float:
        total = 0.0
        for b in range(15):
            inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
            if inside.any():
                total += inside.mean() * abs(clean.score[inside].mean() - confidence[inside].mean())
        return total

    platt = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000}).x
    mended = 1 / (1 + np.exp(-(platt[0] * logit(clean.confidence) + platt[1])))
    as_it_is, _, after = (cell["value"] for cell in shown["rows"][0]["cells"][:3])
    assert as_it_is == pytest.approx(error(clean.confidence)) and as_it_is > 0.5
    assert after == pytest.approx(error(mended), abs=1e-3) and after < 0.25


def test_a_threshold_split_with_evaluated_images_fits_nothing(suite: Any, tmp_path: Path) -> None:
    def leaked(task: str, records: list[Any]) -> list[Any]:
        found = boxes(task, records)
        if not task.endswith("threshold"):
            return found
        return [r.model_copy(update={"image_id": r.image_id.replace("threshold", "test")}) for r in found]

    suite.page = "grounding"
    full = suite.add("m/full-precision", Model(), TASKS, edit=leaked)
    suite.add("m/rtn-int3-g64", Model("rtn-int3-g64", 3, 0.5), TASKS, twin=full.name, edit=leaked)
    result = build_study(suite.write(), tmp_path / "site", replicates=50)
    assert any("shares 30 images with the tasks" in problem.what for problem in result.problems)
    shown = table(json.loads((tmp_path / "site" / "study.json").read_text()), "ECE at IoU")
    assert shown["columns"][1:] == ["as it is"] * 3
