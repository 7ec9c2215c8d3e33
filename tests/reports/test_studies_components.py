"""The components page from a suite's folder whose answers have a known structure: what it must find, and say."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Runs, Task, blake

from bitquake.metrics import Samples, evaluate, grid, variance_shares
from bitquake.quant_card import ComponentEntry
from bitquake.records import SampleRecord
from bitquake.reports.problems import Problem
from bitquake.reports.studies import build_study, component_grid, read_study
from bitquake.reports.studies.component_grid import outcomes, place_grids, what_moved, width_grids, width_of
from bitquake.reports.studies.components import Front
from bitquake.suite_plan import CELL_FILE, PLAN_FILE, CellManifest, PlannedCell, SuitePlan

WIDTHS = {"vision": (16, 3, 2), "connector": (16, 2), "language": (16, 4, 2)}
COST = {"vision": {16: 0.0, 3: 0.05, 2: 0.25}, "connector": {16: 0.0, 2: 0.02}, "language": {16: 0.0, 4: 0.15, 2: 2.0}}
PARAMETERS = {"vision": 400_000, "connector": 100_000, "language": 1_100_000}
THIRDS, LAYERS = ("front", "middle", "end"), ("attention", "mlp")
VQA = Task(n=120)
CAPTION = Task(family="block_coco_caption", n=45, per_image=1)


def _card(bits: dict[str, int]) -> dict[str, Any]:
    total = sum(PARAMETERS.values())
    own = {name: bits.get(name, 16) for name in PARAMETERS}
    stored = {name: n * own[name] // 8 + (n // 32 if own[name] < 16 else 0) for name, n in PARAMETERS.items()}
    return {
        "nominal_bpw": sum(own[name] * n for name, n in PARAMETERS.items()) / total,
        "effective_bpw": sum((own[name] + 0.25 * (own[name] < 16)) * n for name, n in PARAMETERS.items()) / total,
        "components": {
            name: ComponentEntry(
                n_parameters=n, n_quantized=n if own[name] < 16 else 0, n_bytes=2 * n, packed_bytes=stored[name]
            )
            for name, n in PARAMETERS.items()
        },
    }


def _captions(name: str, records: list[SampleRecord]) -> list[SampleRecord]:
    if name != CAPTION.name:
        return records
    return [record.model_copy(update={"protocol": "caption", "score": record.score * 0.12}) for record in records]


class Suite:
    """Writes the folder of a components suite."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.runs = Runs(out)
        self.planned: list[PlannedCell] = []

    def cell(
        self, quantization: str, factors: dict[str, Any], loss: float, bits: dict[str, int], *, finished: bool = True
    ) -> None:
        full = not any(width < 16 for width in bits.values())
        key = blake("full") if full else blake(quantization)
        tasks: dict[str, int | None] = {VQA.name: None, CAPTION.name: None}
        self.planned.append(
            PlannedCell(
                name=f"m/{quantization}", hash=key, model="m", pretrained="bitquake/idefics3-tiny",
                quantization=quantization, spec={} if full else {"bits": 8}, factors=factors,
                twin="" if full else "m/full-precision", tasks=tasks,
            )
        )  # fmt: skip
        folder = self.out / "cells" / key
        if not finished or folder.exists():
            return
        name = "full-precision" if full else quantization
        model = Model(name, 16 if full else 4, loss, changes=_card(bits))
        self.runs.write(model, [VQA, CAPTION], name=f"cells/{key}/runs/all", edit=_captions)
        manifest = CellManifest(
            bitquake="0.1.0", hash=key, name=f"m/{quantization}", samples={VQA.name: VQA.n, CAPTION.name: CAPTION.n},
            files={}, seconds=10.0, load_seconds=2.0, began="2026-11-21T04:00:00+00:00",
        )  # fmt: skip
        (folder / CELL_FILE).write_text(manifest.model_dump_json())

    def done(self) -> Path:
        plan = SuitePlan(
            bitquake="0.1.0", suite="components", title="Which part needs its bits", world="block", page="components",
            published=("mmq-importance",), cells=tuple(self.planned),
        )  # fmt: skip
        (self.out / PLAN_FILE).write_text(plan.model_dump_json())
        return self.out


def _write(out: Path, *, methods: tuple[str, ...] = ("awq",), lacking: tuple[str, ...] = ()) -> Path:
    suite = Suite(out)
    suite.cell("full-precision", {"method": "none"}, 0.0, {})
    for method, widths in itertools.product(methods, itertools.product(*WIDTHS.values())):
        bits = dict(zip(WIDTHS, widths, strict=True))
        loss = sum(COST[name][width] for name, width in bits.items())
        name = f"{method}-v{widths[0]}-c{widths[1]}-l{widths[2]}"
        suite.cell(name, {"method": method, **bits}, loss, bits, finished=name not in lacking)
    for method, third, layers in itertools.product(methods, THIRDS, LAYERS):
        factors = {"method": method, "component": "language", "third": third, "layers": layers, "bits": 2}
        loss = 1.2 if (third, layers) == ("end", "mlp") else 0.02
        suite.cell(f"{method}-language-{third}-{layers}-int2", factors, loss, {"language": 2})
    return suite.done()


@pytest.fixture(scope="module", autouse=True)
def few_forests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component_grid, "REFITS", 2)
        yield


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("suite"))


def _told(site: Path) -> Any:
    return json.loads((site / "study.json").read_text())


@pytest.fixture(scope="module")
def site(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_study(study_folder, tmp_path_factory.mktemp("page") / "site", replicates=200).index.parent


def test_importances_are_those_of_the_cells_own_values(study_folder: Path) -> None:
    """The grid's corner of 16 bits is full precision itself, evaluated once."""
    problems: list[Problem] = []
    study = read_study(study_folder)
    (found,) = outcomes(study, problems, replicates=100, seed=0)
    (own,) = width_grids(found.cells)
    assert (own.title, own.factors, len(own.cells)) == ("awq", ("vision", "connector", "language"), 18)
    assert found.same["m/awq-v16-c16-l16"] == "m/full-precision"
    assert [target.name for target in found.targets] == [
        "VQA: Accuracy", "VQA: ECE", "VQA: AURC", "captioning: CIDEr-D",
    ]  # fmt: skip
    for target in found.targets:
        moved = what_moved(own, target, found, problems, seed=0)
        assert moved.all_levels is not None and moved.all_levels.variance is not None and moved.lowest
        values = []
        for cell in own.cells:
            answers = cell.tasks[target.task].answers.values()
            samples = Samples(
                [a.score for a in answers], [a.confidence for a in answers], [a.image_id for a in answers]
            )
            values.append(evaluate(*samples, metrics=[target.metric], replicates=1, seed=0)[target.metric].value)
        columns = {name: [cell.plan.factors[name] for cell in own.cells] for name in WIDTHS}
        expected = variance_shares(grid(columns), values)
        for name in WIDTHS:
            share = moved.all_levels.variance.first[name]
            assert share.value == pytest.approx(expected.first[name].value)
            assert share.lo <= share.value <= share.hi
        assert moved.lowest == "vision 2, language 2"
        assert moved.narrow_left_out is not None and moved.narrow_left_out.grid.shape == (2, 2, 2)
    assert not problems


def test_widths_are_read_from_the_cards(study_folder: Path) -> None:
    study = read_study(study_folder)
    width = width_of(study.cell("m/awq-v3-c16-l4"))
    n = PARAMETERS
    assert width is not None
    assert width.nominal == pytest.approx((3 * n["vision"] + 16 * n["connector"] + 4 * n["language"]) / 1.6e6)
    assert width.effective == pytest.approx(width.nominal + 0.25 * 1.5 / 1.6)
    bytes_ = n["vision"] * 3 // 8 + n["vision"] // 32 + 2 * n["connector"] + n["language"] // 2 + n["language"] // 32
    assert width.measured == pytest.approx(8 * bytes_ / 1.6e6)
    (own,) = place_grids(study.finished)
    assert own.factors == ("third", "layers") and len(own.cells) == 6


def test_the_page_finds_what_was_put_in(site: Path) -> None:
    told = _told(site)
    findings = [finding["text"] for finding in told["findings"]]
    (vqa,) = [text for text in findings if text.startswith("awq, VQA: Accuracy: ")]
    assert (
        "language moves it most" in vqa and "Without vision 2, language 2:" in vqa and "Cheapest that keeps 95%" in vqa
    )
    (place,) = [text for text in findings if text.startswith("VQA: Accuracy, one place")]
    assert "awq: 1 of 6, most language, end, 2 bits, mlp" in place or "most language, end, mlp" in place
    sections = {section["id"]: section for section in told["sections"]}
    assert set(sections) == {"widths", "importance", "reliability", "places"}
    table = next(t for t in sections["importance"]["tables"] if t["label"] == "What moves VQA: Accuracy")
    rows = {row["head"]: row["cells"] for row in table["rows"][1:4]}
    assert rows["language"][0]["value"] > 0.8 > 0.2 > rows["vision"][0]["value"]
    ways = table["columns"][3:]
    assert ways == ["ANOVA", "impurity", "permutation", "SHAP", "Mean of the forest's"]
    for cells in rows.values():
        assert all(cell["lo"] <= cell["value"] <= cell["hi"] for cell in cells)
    for column in range(2, 7):
        assert sum(cells[column]["value"] for cells in rows.values()) == pytest.approx(1)
    charts = [figure["title"] for figure in sections["widths"]["figures"]]
    assert charts == ["VQA: Accuracy, awq", "captioning: CIDEr-D, awq"]
    html = (site / "index.html").read_text()
    assert "arxiv.org/abs/2601.15287" in html and "<svg" in html


def test_the_front_and_what_is_enough_are_consistent(site: Path) -> None:
    sections = {section["id"]: section for section in _told(site)["sections"]}
    (kept,) = [t for t in sections["widths"]["tables"] if t["label"] == "The cheapest that keeps enough"]
    whole = next(t for t in sections["widths"]["tables"] if t["label"].startswith("All 18"))
    rows = {row["head"]: row["cells"] for row in whole["rows"] if row["cells"]}
    full = next(cells for head, cells in rows.items() if "full precision" in head)
    own = {head: cells for head, cells in rows.items() if head.startswith("vision")}
    assert len(own) == 18
    cells = next(row["cells"] for row in kept["rows"] if row["cells"])
    enough = {head: row for head, row in own.items() if row[3]["value"] >= 0.95 * full[3]["value"]}
    cheapest = min(enough, key=lambda head: enough[head][1]["value"])
    assert cells[0] == cheapest and cells[1]["value"] == enough[cheapest][1]["value"]
    assert cells[2]["value"] == pytest.approx(enough[cheapest][3]["value"] / full[3]["value"])
    assert cells[3]["value"] is None or cells[3]["value"] >= cells[1]["value"]


def test_a_cell_that_failed_leaves_a_hole_and_the_page_says_so(tmp_path: Path) -> None:
    out = _write(tmp_path / "out", lacking=("awq-v2-c2-l4",))
    told = _told(build_study(out, tmp_path / "site", replicates=50).index.parent)
    notes = (tmp_path / "site" / "index.html").read_text()
    assert "1 of 18 cells have no run: type II sums of squares" in notes
    assert {cell["state"] for cell in told["cells"]} == {"finished", "waiting"}


def test_without_the_extra_the_variance_shares_stay(
    tmp_path: Path, study_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    done = build_study(study_folder, tmp_path / "site", replicates=50)
    assert any("bitquake[importance]" in problem.fix for problem in done.problems)
    sections = {section["id"]: section for section in _told(tmp_path / "site")["sections"]}
    assert sections["importance"]["tables"][0]["columns"][3:] == ["ANOVA"]


def test_without_full_precision_nothing_is_shown(tmp_path: Path) -> None:
    suite = Suite(tmp_path)
    suite.cell("full-precision", {}, 0.0, {}, finished=False)
    suite.cell("awq-v3-c16-l4", {"method": "awq", "vision": 3, "language": 4}, 0.1, {"vision": 3, "language": 4})
    done = build_study(suite.done(), tmp_path / "site", replicates=50)
    assert any("full-precision cell is missing" in problem.what for problem in done.problems)
    assert "No grid has two cells" in done.table


def test_the_same_inputs_give_the_same_bytes(study_folder: Path, tmp_path: Path, site: Path) -> None:
    again = build_study(study_folder, tmp_path / "again", replicates=200).index
    assert again.read_bytes() == (site / "index.html").read_bytes()
    assert (again.parent / "study.json").read_bytes() == (site / "study.json").read_bytes()


def test_a_grid_with_one_factor_that_varies_says_which(tmp_path: Path) -> None:
    suite = Suite(tmp_path / "out")
    suite.cell("full-precision", {"method": "none"}, 0.0, {})
    for width, loss in ((8, 0.0), (4, 0.2), (3, 0.6), (2, 2.0)):
        bits = {"vision": 16, "language": width}
        suite.cell(f"awq-v16-l{width}", {"method": "awq", **bits}, loss, bits)
    told = _told(build_study(suite.done(), tmp_path / "site", replicates=50).index.parent)
    found = [finding for finding in told["findings"] if finding["text"].startswith("awq, VQA: ")]
    assert len(found) == 2 and {finding["verdict"] for finding in found} == {"open"}
    assert all("only language varies" in finding["text"] for finding in found)
    assert "Cheapest that keeps 95%" in found[0]["text"]


def test_what_is_kept_is_compared_replicate_by_replicate(study_folder: Path) -> None:
    """Replicates that are undefined in some cells only must not shift the others against full precision's."""
    (found,) = outcomes(read_study(study_folder), [], replicates=400, seed=0)
    (own,) = width_grids(found.cells)
    target = found.targets[0]
    evaluation = found.evaluations[target.task]
    full = evaluation.keys.index(found.twin.name)
    evaluation.draws[full, 0, :9] = math.nan
    evaluation.draws[(full + 1) % len(evaluation.keys), 0, -5:] = math.nan
    front = Front(own, target, found)
    assert front.draws is not None and len(front.draws) == 386
    kept = front.kept[0]
    assert kept.index is not None
    cheapest = evaluation.draws[evaluation.keys.index(found.same[front.cells[kept.index].name]), 0]
    quotient = (cheapest / evaluation.draws[full, 0])[9:-5]
    assert [kept.lo, kept.hi] == pytest.approx(np.quantile(quotient, [0.025, 0.975]))
