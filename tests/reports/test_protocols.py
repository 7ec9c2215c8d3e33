"""Each protocol's own scores, the rows they are about, thresholds across shifts, and families with every noise."""

from __future__ import annotations

import csv
import gzip
import html
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from run_folders import Model, Runs, Task, noisy

from bitquake.metrics import Samples, compare, evaluate
from bitquake.noise import SEVERITIES, noise_names
from bitquake.records import SampleRecord
from bitquake.reports import ReportResult, build
from bitquake.reports.schema import CellEntry

Edit = Callable[[str, list[SampleRecord]], list[SampleRecord]]
REPLICATES = 60
TWIN, QUANTIZED = Model(), Model("rtn-int4-g64", 4, 0.3)


def report(runs: Runs, tasks: list[Task], edit: Edit | None = None, **options: Any) -> ReportResult:
    folders = [runs.write(model, tasks, edit=edit) for model in (TWIN, QUANTIZED)]
    return build(folders, runs.root / "site", artifacts=runs.artifacts, **{"replicates": REPLICATES, **options})


def cell_of(result: ReportResult, task: str, pairing: str = "paired") -> CellEntry:
    [cell] = [cell for cell in result.report.cells if (cell.task, cell.pairing) == (task, pairing)]
    return cell


def logged(runs: Runs, model: Model, task: str) -> list[dict[str, Any]]:
    [path] = (runs.root / model.quant).rglob(f"*_samples_{task}.jsonl")
    found = [json.loads(line)["bitquake"] for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: str(record["sample_id"]))


def scored(protocol: str, names: tuple[str, ...]) -> Edit:
    """Records of a protocol: the score is kept, further ones are drawn, and of the wrong answers some do not parse."""

    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        rng = np.random.default_rng(len(task) + round(1000 * sum(record.score for record in found)))
        return [
            record.model_copy(
                update={
                    "protocol": protocol,
                    "scores": {name: float(rng.uniform(0, 1)) for name in names},
                    "parse_failure": record.score == 0 and rng.random() < 0.5,
                }
            )
            for record in found
        ]

    return edit


PROTOCOLS = {
    "vqa": ("Accuracy", ("reliable_vqa", "lmms_eval"), ["reliable_vqa", "lmms-eval"]),
    "choice": ("Accuracy", ("strict", "lenient", "letter"), ["Strict", "Lenient", "Letter logit"]),
    "grounding": ("Acc@0.5", ("iou",), ["Mean IoU"]),
    "caption": ("CIDEr-D", ("cider",), []),
    "retrieval": (
        "Recall@1-of-100",
        ("recall_1_of_100", "recall_5_of_100", "recall_10_of_100", "reciprocal_rank"),
        ["Recall@5-of-100", "Recall@10-of-100", "Reciprocal rank"],
    ),
    "stock": ("Score", (), []),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_score_stands_beside_the_headline_with_its_paired_difference(runs: Runs, protocol: str) -> None:
    headline, names, titles = PROTOCOLS[protocol]
    result = report(runs, [Task()], scored(protocol, names))
    assert result.ok
    cell = cell_of(result, "block_vqav2_clean")
    assert (cell.protocol, cell.headline) == (protocol, headline)
    ours, twins = (logged(runs, model, cell.task) for model in (QUANTIZED, TWIN))
    images = [record["image_id"] for record in ours]
    columns = {name: [[r["scores"][name] for r in side] for side in (ours, twins)] for name in cell.scores}
    columns[""] = [[float(r["parse_failure"]) for r in side] for side in (ours, twins)]
    entries = {**cell.scores, "": cell.parse_failure_rate}
    for name, (own, base) in columns.items():
        entry = entries[name]
        value = evaluate(own, None, images, metrics=["accuracy"], replicates=REPLICATES, seed=0)["accuracy"]
        change = compare(
            Samples(own, None, images), Samples(base, None, images), metrics=["accuracy"], replicates=REPLICATES, seed=0
        )["accuracy"]
        assert entry.value == pytest.approx(np.mean(own))
        assert (entry.lo, entry.hi) == pytest.approx((value.lo, value.hi))
        difference = entry.difference
        assert difference is not None
        assert difference.delta == pytest.approx(np.mean(own) - np.mean(base))
        assert (difference.lo, difference.hi) == pytest.approx((change.lo, change.hi))
        assert difference.verdict == change.verdict
    page = (result.index.parent / "block-vqav2.html").read_text()
    head = re.findall(r"<thead>.*?</thead>", page, re.S)
    assert headline in head[0] and "Not parsed" in head[0]
    shown = re.findall(r"<th[^>]*><abbr[^>]*><bdi>(.*?)</bdi>", head[1]) if titles else []
    assert shown == titles
    assert "Flickr-1k" not in page
    rows = list(csv.DictReader((result.index.parent / "report.csv").open()))
    written = {row["metric"]: row for row in rows if row["run"] == cell.run}
    assert written["parse_failure_rate"]["value"] == repr(cell.parse_failure_rate.value)
    for name, entry in cell.scores.items():
        assert written[f"score.{name}"]["value"] == repr(entry.value)
    assert written["accuracy"]["title"] == ("CIDEr-D / 10" if protocol == "caption" else headline)


def test_more_unparsed_answers_are_worse_and_more_of_a_score_is_better(runs: Runs) -> None:
    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        lost = found[0].card != TWIN.card().content_hash
        return [
            r.model_copy(
                update={"protocol": "choice", "parse_failure": lost, "scores": {"strict": float(lost), "own": 1.0}}
            )
            for r in found
        ]

    cell = cell_of(report(runs, [Task()], edit), "block_vqav2_clean")
    effects = [
        value.difference and value.difference.effect for value in (cell.parse_failure_rate, *cell.scores.values())
    ]
    assert effects == ["worse", "better", "tied"]


def test_cider_d_is_shown_as_published(runs: Runs) -> None:
    result = report(runs, [Task(), noisy("fog", 5)], scored("caption", ("cider",)))
    ours, twins = (logged(runs, model, "block_vqav2_clean") for model in (QUANTIZED, TWIN))
    means = [10 * float(np.mean([record["score"] for record in side])) for side in (ours, twins)]
    page = (result.index.parent / "block-vqav2.html").read_text()
    for mean in means:
        assert f"<b>{mean:.2f}</b>" in page
    assert f"{means[0] - means[1]:+.2f}".replace("-", "−") in page
    assert "risk is 1 − CIDEr-D / 10" in page
    assert f"{means[0]:.2f}" in result.table
    noise = (result.index.parent / "block-vqav2--fog.html").read_text()
    foggy = 10 * float(np.mean([record["score"] for record in logged(runs, TWIN, "block_vqav2_fog_5")]))
    chart = re.search(r"<title>CIDEr-D under fog</title><desc>(.*?)</desc>.*?</svg>", noise, re.S)
    assert chart and f"BF16 from {means[1]:.2f} to {foggy:.2f}" in chart[1]
    ticks = [float(tick) for tick in re.findall(r'text-anchor="end">([\d.]+)</text>', chart[0])]
    assert min(ticks) <= min(foggy, *means) and max(means) <= max(ticks) <= 10


def test_a_score_that_one_run_lacks_is_not_available_there(runs: Runs) -> None:
    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        plain = found[0].card != TWIN.card().content_hash
        given = {"strict": 1.0} if plain else {"strict": 1.0, "letter": 0.5}
        failed = {"failure": "model", "failure_detail": "lost", "score": 0.0, "confidence": {}, "scores": {}}
        return [
            r.model_copy(update={"protocol": "choice", **(failed if i < 6 else {"scores": given})})
            for i, r in enumerate(found)
        ]

    result = report(runs, [Task()], edit)
    cell, twin = (cell_of(result, "block_vqav2_clean", pairing) for pairing in ("paired", "twin"))
    assert cell.scores["letter"].value is None and cell.scores["letter"].difference is None
    assert twin.scores["letter"].value == pytest.approx(0.5 * 54 / 60)  # a failed sample scores 0
    assert cell.scores["strict"].value == pytest.approx(54 / 60)
    assert "Letter logit not available: no answer has it." in (result.index.parent / "block-vqav2.html").read_text()


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_score_outside_its_range_is_named_and_costs_its_own_cell(runs: Runs, value: float) -> None:
    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return [r.model_copy(update={"scores": {"iou": value if i == 3 else 0.5}}) for i, r in enumerate(found)]

    folder = runs.write(TWIN, [Task(), Task(family="block_advqa")], edit=lambda t, f: edit(t, f) if "vqav2" in t else f)
    result = build([folder], runs.root / "site", artifacts=runs.artifacts, replicates=5)
    assert "scores.iou: expected a number from 0 to 1" in "\n".join(map(str, result.problems))
    assert [cell.task for cell in result.report.cells] == ["block_advqa_clean"]


def test_which_rows_is_on_the_page_and_in_the_files(runs: Runs) -> None:
    part = "validation, 107,394 ids of reliable_vqa.json (0123456789ab)"

    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return [
            r.model_copy(update={"part": part, "shift_from": "other_clean", "dataset_revision": "0123abcd"})
            for r in found
        ]

    result = report(runs, [Task()], edit)
    cell = cell_of(result, "block_vqav2_clean")
    assert (cell.part, cell.shift_from, cell.split) == (part, "other_clean", "test")
    page = (result.index.parent / "block-vqav2.html").read_text()
    assert f"Rows of block_vqav2.parquet: {part}. Revision 0123abcd. Shifted from other_clean." in page
    row = next(csv.DictReader((result.index.parent / "report.csv").open()))
    assert (row["part"], row["shift_from"], row["dataset_revision"]) == (part, "other_clean", "0123abcd")
    whole = report(Runs(runs.root / "whole"), [Task()])
    assert "Rows of block_vqav2.parquet: test, all of it." in (whole.index.parent / "block-vqav2.html").read_text()


def test_rows_of_two_parts_in_one_run_are_refused(runs: Runs) -> None:
    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return [r.model_copy(update={"part": f"test, hash in [{i % 2}, 1)"}) for i, r in enumerate(found)]

    folder = runs.write(TWIN, [Task(), noisy("fog", 3)], edit=lambda t, f: edit(t, f) if t.endswith("clean") else f)
    result = build([folder], runs.root / "site", artifacts=runs.artifacts, replicates=5)
    assert "samples of different part" in "\n".join(map(str, result.problems))
    assert [cell.task for cell in result.report.cells] == ["block_vqav2_fog_3"]


def shifted(task: Task, origin: str) -> Edit:
    def edit(name: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return [r.model_copy(update={"shift_from": origin}) for r in found] if name == task.name else found

    return edit


FITTED = {
    "clean and noise: the family's": (noisy("fog", 3), "", "block_vqav2_threshold"),
    "a text noise": (noisy("keyboard_typos", 3), "", "block_vqav2_threshold"),
    "a shift: what it is shifted from": (Task(variant="testA"), "block_vqav2_clean", "block_vqav2_threshold"),
    "in distribution itself: its own": (Task(variant="grades"), "", "block_vqav2_grades_threshold"),
    "shifted from such a one": (Task(variant="topics"), "block_vqav2_grades", "block_vqav2_grades_threshold"),
    "another family": (Task(family="block_advqa"), "block_vqav2_clean", "block_vqav2_threshold"),
    "its noise": (noisy("fog", 3, family="block_advqa"), "block_vqav2_clean", "block_vqav2_threshold"),
}


@pytest.mark.parametrize("case", FITTED)
def test_a_threshold_is_chosen_in_distribution(runs: Runs, case: str) -> None:
    """Against the metrics room with the samples of the task that the record's shift_from leads to."""
    task, origin, expected = FITTED[case]
    thresholds = [Task(variant=variant) for variant in ("threshold", "grades_threshold")]
    thresholds.append(Task(family="block_advqa", variant="threshold"))

    def edit(name: str, found: list[SampleRecord]) -> list[SampleRecord]:
        # run_folders knows one threshold split; the others have other answers on other images of their own.
        found = shifted(task, origin)(name, found)
        if name.endswith("grades_threshold"):
            found = [
                r.model_copy(update={"image_id": f"g-{r.image_id}", "confidence": {"joint": r.score / 2}})
                for r in found
            ]
        return found

    result = report(runs, [*thresholds, task], edit)
    cell = cell_of(result, task.name)
    assert cell.threshold_task == expected
    own, fitted = (
        Samples([r["score"] for r in found], [r["confidence"]["joint"] for r in found], [r["image_id"] for r in found])
        for found in (logged(runs, QUANTIZED, name) for name in (task.name, expected))
    )
    for key in ("phi_1", "phi_10"):
        value = evaluate(*own, threshold=fitted, metrics=[key], replicates=REPLICATES, seed=0)[key]
        entry = cell.metrics[key]
        assert (entry.value, entry.lo, entry.hi) == pytest.approx((value.value, value.lo, value.hi))
    assert {c.task for c in result.report.cells} == {task.name}  # a threshold task is no condition


def test_without_the_in_distribution_threshold_there_is_no_phi(runs: Runs) -> None:
    """A shifted family's own threshold would be one that is chosen after the shift."""
    task = Task(family="block_advqa")
    tasks = [Task(family="block_advqa", variant="threshold"), task]
    result = report(runs, tasks, shifted(task, "block_vqav2_clean"))
    phi = cell_of(result, task.name).metrics["phi_10"]
    assert (phi.value, phi.note) == (None, "no complete block_vqav2_threshold run")


def test_noises_of_the_whole_split_stand_apart_from_those_of_the_subset(runs: Runs) -> None:
    tasks = [Task(), noisy("fog", 1), noisy("fog", 5)]
    full = Task(variant="fog_5_full", noise=noisy("fog", 5).noise, n=90, difficulty=1.25)
    result = report(runs, [*tasks, full])
    site = result.index.parent
    assert {"block-vqav2--fog.html", "block-vqav2--fog--full.html"} <= {path.name for path in site.iterdir()}
    assert "fog 5, whole split" in (site / "block-vqav2--fog--full.html").read_text().lower()
    assert "whole split" not in (site / "block-vqav2--fog.html").read_text()
    assert "clean: 60 samples, noise: 90" in (site / "block-vqav2--fog--full.html").read_text()
    # The same noise must not count twice in a family's mean.
    assert [summary.n_conditions for summary in result.report.summaries] == [3]


@pytest.fixture(scope="module")
def every_noise(tmp_path_factory: pytest.TempPathFactory) -> ReportResult:
    names = [*noise_names("all"), "noise_of_tomorrow"]
    tasks = [Task(n=12), Task(variant="threshold", n=12), Task(variant="testA", n=12)]
    tasks += [noisy(name, severity, n=12) for name in names for severity in SEVERITIES]
    return report(Runs(tmp_path_factory.mktemp("every") / "results"), tasks, replicates=4)


def test_a_family_with_every_noise_stays_readable(every_noise: ReportResult) -> None:
    site = every_noise.index.parent
    cells = {cell.task: cell for cell in every_noise.report.cells}
    assert len(cells) == 2 + 5 * (len(noise_names("all")) + 1)
    page = (site / "block-vqav2.html").read_text()
    titles = re.findall(r'<h2 id="group-[^>]*>(.*?)</h2>', html.unescape(page))
    assert titles == [
        "ImageNet-C corruptions",
        "Extra ImageNet-C corruptions",
        "Camera and channel noises",
        "Noises on the question's text",
        "Other noises",
    ]
    sections = re.findall(r'<h2 id="group-[^>]*>.*?</h2>(.*?)</section>', page, re.S)
    groups = {name: noise_names(name) for name in ("imagenet_c", "imagenet_c_extra", "camera", "text")}
    groups["other"] = ["noise_of_tomorrow"]
    for section, (group, members) in zip(sections, groups.items(), strict=True):
        links = re.findall(r'<a href="(block-vqav2--[a-z0-9-]+\.html)"><bdi>(.*?)</bdi></a>', section)
        assert [label.replace(" ", "_") for _, label in links] == sorted(members), group
        assert all((site / target).is_file() for target, _ in links)
        # Three small matrices stand open, of at most as many columns as the group has noises; charts are folded.
        assert section.count('<table class="matrix">') == 3
        opened = section.partition('<details class="fold">')[0]
        assert opened != section and "<svg" not in opened.replace('<svg class="swatch"', "")
        assert section.count("<figure>") == 3 * len(members)
        assert {cells[f"block_vqav2_{member}_1"].noise_group for member in members} == {group}


def test_the_overview_and_the_pages_of_every_noise_stay_small(every_noise: ReportResult) -> None:
    """anchors.md C.9 gives the overview 200 KB compressed; a page of a noise holds five conditions and no more."""
    site = every_noise.index.parent
    sizes = {path.name: len(gzip.compress(path.read_bytes(), mtime=0)) for path in site.glob("*.html")}
    assert sizes["index.html"] <= 200_000
    assert max(sizes.values()) <= 400_000
    index = every_noise.index.read_text()
    assert "noisy conditions are on the pages of their families" in index
    tables = re.findall(r'<table class="matrix">.*?</table>', index, re.S)
    heads = [re.findall(r'scope="colgroup" class="edge"><bdi>(.*?)</bdi>', table) for table in tables]
    assert heads == [["clean", "testA"]] * 3
    for path in site.glob("block-vqav2--*.html"):
        assert len(re.findall(r"<h2 id=", path.read_text())) == 5, path.name


def test_names_of_pages_never_meet(runs: Runs) -> None:
    """A family may be called like another one's noise."""
    tasks = [
        Task(family="a", variant="clean"),
        noisy("fog", 3, family="a"),
        Task(family="a_fog"),
        Task(family="a__fog"),
    ]
    result = report(runs, tasks, replicates=5)
    names = {path.name for path in result.index.parent.glob("*.html")}
    assert len(names) == 2 + 3 + 1 + 3  # the families' pages of reliability
    assert {"block-a--fog.html"} <= {re.sub("-[0-9a-f]{8}", "", name) for name in names}


def test_titles_of_scores_are_safe_text(runs: Runs) -> None:
    bad = "</script><img src=x onerror=alert(1)>"

    def edit(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        update = {"scores": {bad: 0.5, "=1+1": 1.0}, "protocol": "stock", "part": bad, "shift_from": bad}
        return [r.model_copy(update=update) for r in found]

    result = report(runs, [Task(), noisy("fog", 3)], edit, replicates=5)
    for path in result.index.parent.glob("*.html"):
        assert "<img" not in path.read_text()
    for row in csv.DictReader((result.index.parent / "report.csv").open()):
        assert not any(str(value).startswith("=") for value in row.values())
