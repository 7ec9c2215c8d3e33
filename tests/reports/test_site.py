"""The written site: true to the numbers, safe against what stands in a run, reproducible, and careful with folders."""

from __future__ import annotations

import colorsys
import csv
import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from run_folders import Model, Runs, Task, noisy, records, standard_models, standard_tasks

from bitquake.metrics import Samples, compare, evaluate
from bitquake.records import SampleRecord
from bitquake.reports import ReportError, ReportResult, build
from bitquake.reports import site as site_module
from bitquake.reports.pages import render_pages
from bitquake.reports.schema import ValueEntry

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    '"><svg onload=alert(1)>',
    "'onmouseover='alert(1)",
    "\u202eevil\u202c \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "{{ 7 * 7 }}{% raw %}",
    "A" * 10_000,
    "=HYPERLINK(1)",
    "nul\x00 bell\x07 surrogate\ud800",
    "https://evil.example/x",
]


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects tags, attributes, text and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += f"{data} "

    def row(self, start: str, caption: str = "") -> list[str]:
        """The first row whose first cell begins so."""
        return next(
            [" ".join(cell.split()) for cell in row] for row in self.rows if row and row[0].strip().startswith(start)
        )


def pages(result: ReportResult) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(result.index.parent.glob("*.html"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, list[Path], ReportResult]:
    runs = Runs(tmp_path_factory.mktemp("written") / "results")
    folders = [runs.write(model, standard_tasks(60)) for model in standard_models()]
    return runs, folders, build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=100)


def arrays(model: Model, task: Task) -> Samples:
    found = records(model, task)
    return Samples(
        [r.score for r in found], [r.confidence["joint"] or np.nan for r in found], [r.image_id for r in found]
    )


def test_the_page_shows_independently_computed_numbers(written: tuple[Runs, list[Path], ReportResult]) -> None:
    twin, model = standard_models()[0], standard_models()[3]
    names = ("block-vqav2.html", "block-vqav2--contrast.html", "block-vqav2--gaussian-noise.html")
    found = [row for name in names for row in Page((written[2].index.parent / name).read_text()).rows]
    rows = [row for row in found if len(row) == 14 and row[0].startswith("rtn-int3-g64")]
    assert len(rows) == 7  # clean, two noises at three severities, in the order of the pages
    order = [Task(n=60), *(noisy(n, s, n=60) for n in ("contrast", "gaussian_noise") for s in (1, 3, 5))]
    for row, task in zip(rows, order, strict=True):
        samples, baseline = arrays(model, task), arrays(twin, task)
        value = evaluate(*samples, metrics=["accuracy", "aurc"], replicates=100, seed=0)
        change = compare(samples, baseline, metrics=["accuracy", "aurc"], replicates=100, seed=0)
        for column, key in ((1, "accuracy"), (6, "aurc")):
            v, d = value[key], change[key]
            numbers = re.findall(r"[+−]?\d+\.\d", row[column])
            expected = [f"{100 * x:.1f}" for x in (v.value, v.lo, v.hi)]
            expected += [f"{100 * x:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0") for x in (d.delta, d.lo, d.hi)]
            assert [n.replace("−", "-") for n in numbers] == expected, task.name
            word = "tied" if d.verdict == "tied" else "worse" if (d.delta < 0) == (key == "accuracy") else "better"
            assert word in row[column]


def test_pages_are_well_formed_and_ask_nobody_for_anything(written: tuple[Runs, list[Path], ReportResult]) -> None:
    found = pages(written[2])
    families = {"block-vqav2.html", "block-advqa.html"}
    assert set(found) == {
        *("index.html", "models.html", "block-vqav2--contrast.html", "block-vqav2--gaussian-noise.html"),
        *families,
        *(name.replace(".html", "_reliability.html") for name in families),
    }
    for name, text in found.items():
        page = Page(text)
        assert "//" not in text, name
        assert not {tag for tag, _ in page.tags} & {
            "script",
            "iframe",
            "object",
            "embed",
            "img",
            "form",
            "base",
            "style",
        }
        for tag, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on") or key == "style"], (tag, attributes)
            target = attributes.get("href") or attributes.get("src")
            if target:
                path, _, anchor = target.partition("#")
                assert not path or (written[2].index.parent / path).is_file(), target
                if anchor:
                    assert f'id="{anchor}"' in (found[path] if path else text), target
        policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        assert policies and "default-src 'none'" in str(policies[0]) and "unsafe" not in str(policies[0])
        ids = [a["id"] for _, a in page.tags if a.get("id")]
        assert len(ids) == len(set(ids)), name
    assert "//" not in (written[2].index.parent / "style.css").read_text().replace("/*", "").replace("*/", "")


def test_charts_are_valid_drawings_within_their_frame(written: tuple[Runs, list[Path], ReportResult]) -> None:
    found = {
        name: re.findall(r'<svg class="chart".*?</svg>', text, re.S)
        for name, text in pages(written[2]).items()
        if name.startswith("block-vqav2")
    }
    # A condition has one curve and four diagrams, a noise three charts over its severities.
    expected = {"block-vqav2.html": 5 + 2 * 3, "block-vqav2--contrast.html": 3 + 3 * 5}
    # No threshold reaches the tolerated risk, so that only flips by confidence are left to draw.
    expected |= {"block-vqav2_reliability.html": 1}
    assert {name: len(charts) for name, charts in found.items()} == {
        **expected,
        "block-vqav2--gaussian-noise.html": 3 + 3 * 5,
    }
    for chart in itertools.chain(*found.values()):
        root = ElementTree.fromstring(chart)
        assert root.findtext("title") and root.findtext("desc")
        numbers = [float(n) for path in root.iter("path") for n in re.findall(r"[ML]([\d.]+) ", path.get("d", ""))]
        numbers += [float(line.get(k, "nan")) for line in root.iter("line") for k in ("x1", "x2")]
        assert all(0 <= n <= 360 for n in numbers)
        heights = [float(line.get(k, "nan")) for line in root.iter("line") for k in ("y1", "y2")]
        assert all(0 <= n <= 240 for n in heights)


def test_a_curve_is_drawn_where_its_points_are(written: tuple[Runs, list[Path], ReportResult]) -> None:
    """Reads accuracy back from a severity chart through its own axis labels."""
    chart = re.search(
        r'<svg class="chart"[^>]*><title>Accuracy under contrast.*?</svg>', pages(written[2])["index.html"], re.S
    )
    assert chart
    root = ElementTree.fromstring(chart[0])
    ticks = [
        (float(t.text or ""), float(t.get("y", "")) - 3.5) for t in root.iter("text") if t.get("text-anchor") == "end"
    ]
    (v0, y0), (v1, y1) = ticks[0], ticks[-1]
    assert v0 < v1 and y0 > y1  # upwards
    line = next(p for p in root.iter("path") if p.get("class") == "line s0")
    drawn = [v0 + (float(y) - y0) * (v1 - v0) / (y1 - y0) for y in re.findall(r" ([\d.]+)", line.get("d", ""))]
    tasks = [Task(n=60), *(noisy("contrast", s, n=60) for s in (1, 3, 5))]
    expected = [100 * np.mean([r.score for r in records(standard_models()[0], task)]) for task in tasks]
    assert drawn == pytest.approx(expected, abs=0.1)


def test_report_json_fits_its_published_schema(written: tuple[Runs, list[Path], ReportResult]) -> None:
    site = written[2].index.parent
    schema = json.loads((site / "report.schema.json").read_text())
    report = json.loads((site / "report.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema)
    assert report["schema_version"] == 4
    del report["cells"][0]["n"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema)


def test_the_same_inputs_give_the_same_bytes_anywhere(
    written: tuple[Runs, list[Path], ReportResult], tmp_path: Path
) -> None:
    runs, folders, result = written
    moved = shutil.copytree(runs.root, tmp_path / "moved" / "elsewhere")
    again = build(
        [moved / folder.name for folder in reversed(folders)],
        tmp_path / "again",
        artifacts=moved / "artifacts",
        replicates=100,
    )
    names = sorted(path.name for path in result.index.parent.iterdir())
    assert names == sorted(path.name for path in again.index.parent.iterdir())
    for name in names:
        assert (result.index.parent / name).read_bytes() == (again.index.parent / name).read_bytes(), name
    assert str(tmp_path) not in "".join(pages(again).values())


def test_inputs_are_listed_with_their_sha256(written: tuple[Runs, list[Path], ReportResult]) -> None:
    runs, folders, result = written
    import hashlib

    listed = {entry.path: entry.sha256 for entry in result.report.inputs}
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    expected = {f"{p.relative_to(runs.root)}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert expected.items() <= listed.items()
    assert len(listed) == len(expected) + 4  # and the four quant cards


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_makes_no_tags_and_breaks_nothing(runs: Runs, text: str) -> None:
    model = Model(text, 4, 0.3, pretrained="org/model", changes={"revision": text, "kernel": text, "dtype": text})
    twin = Model(pretrained="org/model", changes={"revision": text, "dtype": text})

    def spoil(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        lost = {"failure": "model", "failure_detail": text, "score": 0.0, "confidence": {}}
        new = {"family": text, "task": f"{text}_{found[0].variant}", "dataset": text, "part": text, "shift_from": text}
        new |= {"scores": {text: 1.0}, "protocol": "stock"}
        return [r.model_copy(update={**new, **(lost if i < 2 else {})}) for i, r in enumerate(found)]

    def plain(task: str, found: list[SampleRecord]) -> list[SampleRecord]:
        return spoil(task, [r.model_copy(update={"text": "x"}) for r in found])

    tasks = [Task(), noisy("fog", 3), Task(variant="night")]
    surrogate = "\ud800" in text  # not even UTF-8: lmms-eval could write it as JSON escapes only
    if surrogate:
        text_in_files = text.replace("\ud800", "")
        model = Model("q", 4, 0.3, pretrained="org/model", changes={"kernel": text_in_files})
        twin = Model(pretrained="org/model")
    folders = [runs.write(twin, tasks, name="a", edit=None if surrogate else spoil)]
    folders.append(runs.write(model, tasks, name="b", edit=None if surrogate else plain))
    if surrogate:
        for path in [p for folder in folders for p in folder.rglob("*.jsonl")]:
            path.write_text(path.read_text().replace('"joint"', '"jo\\ud800int\\u0000"'))
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20, title=text)
    assert result.n_pairs == 1
    kinds = {"iframe", "object", "embed", "img", "form", "base", "style", "script"}
    for name, html in pages(result).items():
        page = Page(html)
        assert not {tag for tag, _ in page.tags} & kinds, name
        for tag, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on") or key == "style"], (tag, attributes)
            for key in ("href", "src"):
                assert not str(attributes.get(key) or "").lower().startswith(("javascript:", "http", "data:", "//"))
        assert "A" * 3000 not in html
        assert "49" not in re.findall(r"<h1>(.*?)</h1>", html)[0]
        for bad in ("\u202e", "\x00", "\x07", "\ud800"):
            assert bad not in html
    json.loads((result.index.parent / "report.json").read_text())
    for row in csv.DictReader((result.index.parent / "report.csv").open()):
        assert not row["quantization"].startswith(("=", "+", "@"))


def test_block_world_and_real_rows_never_share_a_table(runs: Runs) -> None:
    tasks = [Task(), Task(family="vqav2", world="real")]
    folders = [runs.write(model, tasks) for model in (Model(), Model("rtn-int4-g64", 4))]
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20)
    text = result.index.read_text()
    assert text.index("Real datasets</h2>") < text.index("Block world</h2>")
    for table in re.findall(r"<table.*?</table>", text, re.S):
        assert not ("block vqav2" in table and re.search(r">(<bdi>)?vqav2<", table))
    assert "Real datasets: vqav2, clean" in result.table
    assert "Block world: block vqav2, clean" in result.table


def test_simulated_runs_show_neither_memory_nor_speed(runs: Runs) -> None:
    models = [Model(), Model("sim-int4", 4), Model("packed-int4", 4, 0.1, execution="packed")]
    folders = [runs.write(m, [Task()], results_fields={"throughput": {"avg_speed": 123.456}}) for m in models]
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20)
    sections = re.split(r'<section class="model"', pages(result)["models.html"])[1:]
    memory = {re.findall(r"<bdi>(.*?)</bdi>", s)[0].split()[-1]: "in memory" in s.lower() for s in sections}
    assert memory == {"BF16": True, "sim-int4": False, "packed-int4": True}
    stored = {run.quantization: run.card for run in result.report.runs}
    assert stored["sim-int4"] is not None and stored["sim-int4"].n_bytes is None
    assert "n_bytes" not in stored["sim-int4"].components["language"]
    assert "123.4" not in "".join(pages(result).values())


def test_what_was_left_out_stands_on_the_page_and_the_rest_too(runs: Runs) -> None:
    folders = [runs.write(Model(), standard_tasks(30)), runs.write(Model("rtn-int4-g64", 4), standard_tasks(30))]
    [path] = folders[1].rglob("*_samples_block_vqav2_contrast_3.jsonl")
    path.write_bytes(path.read_bytes()[:-300])
    result = build(folders, runs.root / "site", artifacts=runs.artifacts, replicates=20)
    assert not result.ok
    text = " ".join("".join(Page(result.index.read_text()).text).split())
    assert "1 result left out" in text
    assert path.name in text
    assert "29 of 30 samples" in text
    assert len([c for c in result.report.cells if c.pairing == "paired"]) == 7


def test_an_earlier_report_is_replaced_and_nothing_else(runs: Runs, tmp_path: Path) -> None:
    folder = runs.write(Model(), [Task()])
    out = tmp_path / "site"
    arguments: dict[str, Any] = {"artifacts": runs.artifacts, "replicates": 5}
    build([folder], out, title="first", **arguments)
    build([folder], out, title="second", **arguments)
    assert "second" in (out / "index.html").read_text()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ReportError, match=r"not the report's \(such as notes.txt\)"):
        build([folder], out, title="third", **arguments)
    assert (out / "notes.txt").read_text() == "mine"
    assert "second" in (out / "index.html").read_text()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "index.html").write_text("years of work")
    with pytest.raises(ReportError, match="was not made by bitquake report"):
        build([folder], other, **arguments)
    with pytest.raises(ReportError, match="is a file"):
        build([folder], other / "index.html", **arguments)
    assert (other / "index.html").read_text() == "years of work"
    with pytest.raises(ReportError, match="holds the run"):
        build([folder], runs.root, **arguments)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert build([folder], empty, **arguments).index.is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failed_write_leaves_the_old_report(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.write(Model(), [Task()])
    out = tmp_path / "out" / "site"
    build([folder], out, artifacts=runs.artifacts, replicates=5, title="first")
    written: list[int] = []

    def full_disk(handle: int) -> None:
        written.append(handle)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(site_module.os, "fsync", full_disk)
    with pytest.raises(ReportError, match="No space left on device"):
        build([folder], out, artifacts=runs.artifacts, replicates=5, title="second")
    assert "first" in (out / "index.html").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["site"]


def test_a_failed_swap_brings_the_old_report_back(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.write(Model(), [Task()])
    out = tmp_path / "out" / "site"
    build([folder], out, artifacts=runs.artifacts, replicates=5, title="first")
    rename = Path.rename

    def fails_once(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(ReportError, match="Input/output error"):
        build([folder], out, artifacts=runs.artifacts, replicates=5, title="second")
    assert "first" in (out / "index.html").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["site"]


def test_the_site_can_be_served(written: tuple[Runs, list[Path], ReportResult]) -> None:
    out = written[2].index.parent
    assert os.stat(out).st_mode & 0o777 == 0o755
    assert all(os.stat(path).st_mode & 0o444 == 0o444 for path in out.iterdir())


def test_two_hundred_pairs_fit_the_budget(written: tuple[Runs, list[Path], ReportResult]) -> None:
    """anchors.md C.9: index at most 200 KB compressed for 200 rows (here with eight conditions each)."""
    one = written[2].report
    rng = np.random.default_rng(0)  # other numbers in every copy, so that they do not compress as repeats

    def jitter(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {k: jitter(v) for k, v in entry.items()}
        return entry + float(rng.normal(0, 0.05)) if isinstance(entry, float) else entry

    runs, cells, summaries = [], [], []
    for copy in range(67):
        runs += [
            r.model_copy(
                update={"id": f"{r.id}-{copy}", "label": f"org/model-{copy}", "twin": r.twin and f"{r.twin}-{copy}"}
            )
            for r in one.runs
        ]
        for cell in one.cells:
            values = {k: ValueEntry.model_validate(jitter(v.model_dump())) for k, v in cell.metrics.items()}
            cells.append(cell.model_copy(update={"run": f"{cell.run}-{copy}", "metrics": values}))
        summaries += [s.model_copy(update={"run": f"{s.run}-{copy}"}) for s in one.summaries]
    report = one.model_copy(update={"runs": runs, "cells": cells, "summaries": summaries})
    assert sum(run.role == "quantized" for run in runs) == 201
    index = render_pages(report)["index.html"]
    Page(index)
    assert '<svg class="chart"' not in index  # with so many models the charts stand on the families' pages
    assert len(gzip.compress(index.encode(), mtime=0)) <= 200_000


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    low, high = sorted([_luminance(a), _luminance(b)])
    return (high + 0.05) / (low + 0.05)


def test_colours_have_enough_contrast(written: tuple[Runs, list[Path], ReportResult]) -> None:
    """WCAG 2.2: text 4.5:1 on every background that it stands on, marks of charts 3:1; no two series alike."""
    css = (written[2].index.parent / "style.css").read_text()
    parts = css.split("@media")[:2]
    assert "prefers-color-scheme: dark" in parts[1]
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in parts)
    assert len(light) == len(dark) == 22
    for scheme in (light, dark):
        for text, grounds in {
            "ink": ["paper", "raised", "worse1", "worse2", "worse3", "better1", "better2", "better3"],
            "soft": ["paper", "raised", "worse1", "better1"],
            "link": ["paper", "raised"],
            "worse": ["paper", "raised", "worse1", "worse2", "worse3"],
            "better": ["paper", "better1", "better2", "better3"],
        }.items():
            for ground in grounds:
                assert _contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground, scheme[text], scheme[ground])
        hues = [
            colorsys.rgb_to_hsv(*(int(scheme[f"s{i}"][j : j + 2], 16) / 255 for j in (1, 3, 5)))[0] for i in range(1, 8)
        ]
        assert all(_contrast(scheme[f"s{i}"], scheme["paper"]) >= 3 for i in range(8))
        assert len({round(hue, 2) for hue in hues}) == 7


@pytest.mark.parametrize(
    "module",
    ["bitquake.reports", "bitquake.reports.gate", "bitquake.leaderboard.site", "bitquake.leaderboard.submit"],
)
def test_needs_neither_torch_nor_lmms_eval(module: str) -> None:
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'lmms_eval', 'datasets', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
