"""The page itself: written whole, from what is there, with nothing of anybody's that it should not hold."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import Model, Task, noisy

from bitquake.reports.problems import ReportError
from bitquake.reports.published import published_numbers
from bitquake.reports.site import replace_file
from bitquake.reports.studies import build_study
from bitquake.reports.studies.charts import heat_map

TASKS = [Task(variant="threshold"), Task(), noisy("fog", 3)]


class _Page(HTMLParser):
    """Tags, ids, texts by table, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        told = dict(attrs)
        assert not any(name.startswith("on") or name == "style" for name in told)
        self.ids += [told["id"] or ""] if "id" in told else []
        self.links += [told[name] or "" for name in ("href", "src") if name in told]
        if tag not in ("meta", "link", "br", "circle", "rect", "path", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "link", "br", "circle", "rect", "path", "line"):
            assert self.open.pop() == tag


@pytest.fixture
def grown(suite: Any) -> Any:
    full = suite.add("m/full-precision", Model(), TASKS)
    suite.add("m/rtn-int4-g64", Model("rtn-int4-g64", 4, 0.1), TASKS, twin=full.name)
    broken = suite.plan("m/rtn-int2-g64", TASKS, twin=full.name)
    suite.fail(broken, "<script>alert(1)</script>", "\u202eout of memory")
    suite.plan("m/rtn-int3-g64", TASKS, twin=full.name)
    return suite


def test_the_page_is_well_formed_and_tells_what_is_missing(grown: Any, tmp_path: Path) -> None:
    out = grown.write(title="A <b>trial</b>", published=["ptq-maxprob"])
    result = build_study(out, tmp_path / "site", replicates=50)
    html = result.index.read_text()
    page = _Page()
    page.feed(html)
    assert not page.open and "script" not in page.tags and len(page.ids) == len(set(page.ids))
    assert all(
        (link.startswith("#") and link[1:] in page.ids) or "/" not in link for link in page.links if "//" not in link
    )
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "<script>" not in html and "\u202e" not in html
    assert "has not run yet" in html and "A &lt;b&gt;trial&lt;/b&gt;" in html
    assert str(tmp_path) not in html
    assert "75 %" in html  # the noise cache: 30 of 40
    assert len(html) < 200_000


def test_published_numbers_stand_in_tables_of_their_own(grown: Any, tmp_path: Path) -> None:
    result = build_study(grown.write(published=["ptq-maxprob", "refcocoplus"]), tmp_path / "site", replicates=50)
    html = result.index.read_text()
    measured, _, rest = html.partition('<h2 id="published">')
    published, _, run = rest.partition('<h2 id="run">')
    for table in published_numbers().tables:
        assert (table.title in published) == (table.id in ("ptq-maxprob", "refcocoplus"))
        assert table.title not in measured + run
    assert "HQQ INT3" in published and "of other models" in published and "Wieczorek" in published


def test_every_table_of_the_page_is_in_study_json_with_its_numbers(grown: Any, tmp_path: Path) -> None:
    build_study(grown.write(), tmp_path / "site", replicates=50)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    html = (tmp_path / "site" / "index.html").read_text()
    tables = [*told["run"], *(table for section in told["sections"] for table in section["tables"])]
    assert html.count('<table class="pairs data') == len(tables)
    states = {cell["name"]: cell["state"] for cell in told["cells"]}
    assert list(states.values()) == ["finished", "finished", "failed", "waiting"]
    shown = [cell for table in tables for row in table["rows"] for cell in row["cells"] if isinstance(cell, dict)]
    assert len(shown) > 20
    for cell in shown:
        if cell["value"] is not None:
            assert cell["lo"] <= cell["value"] <= cell["hi"]
    assert told["settings"] == {"replicates": 50, "seed": 0, "level": 0.95}
    assert all(len(digest) == 64 for digest in told["inputs"].values()) and told["inputs"]


def test_the_same_inputs_give_the_same_bytes_and_foreign_files_stay(grown: Any, tmp_path: Path) -> None:
    out, site = grown.write(), tmp_path / "site"
    build_study(out, site, replicates=50)
    (site / "report").mkdir()
    (site / "report" / "index.html").write_text("a report")
    before = {name: (site / name).read_bytes() for name in ("index.html", "study.json", "style.css")}
    build_study(out, site, replicates=50)
    assert before == {name: (site / name).read_bytes() for name in before}
    assert (site / "report" / "index.html").read_text() == "a report"
    assert not list(site.glob("*.tmp")) and not list(site.glob(".*.tmp"))


def test_somebody_elses_page_is_not_replaced(grown: Any, tmp_path: Path) -> None:
    out, site = grown.write(), tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("mine")
    with pytest.raises(ReportError, match=r"index\.html that is no study's"):
        build_study(out, site, replicates=50)
    assert (site / "index.html").read_text() == "mine"
    with pytest.raises(ReportError, match="is a file"):
        build_study(out, site / "index.html", replicates=50)


def test_nothing_finished_is_an_error_that_names_the_cells(suite: Any, tmp_path: Path) -> None:
    cell = suite.plan("m/full-precision", TASKS)
    suite.fail(cell, "no memory")
    with pytest.raises(ReportError, match="m/full-precision: no memory"):
        build_study(suite.write(), tmp_path / "site", replicates=50)
    assert not (tmp_path / "site").exists()


def test_an_unknown_published_table_is_named(grown: Any, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no table 'ptq-nothing'; known: ptq-maxprob"):
        build_study(grown.write(published=["ptq-nothing"]), tmp_path / "site", replicates=50)


@pytest.mark.parametrize("page", ["noise", "grounding", "components", "selective", "training"])
def test_every_page_stands_with_nothing_but_the_base(suite: Any, tmp_path: Path, page: str) -> None:
    """Mid-run: one cell is there, nothing can be compared, and the page says so."""
    suite.page = page
    suite.add("m/full-precision", Model(), TASKS)
    result = build_study(suite.write(), tmp_path / "site", replicates=50)
    told = json.loads((tmp_path / "site" / "study.json").read_text())
    assert result.index.is_file() and {finding["verdict"] for finding in told["findings"]} == {"open"}


def test_the_detectable_difference_is_said_to_be_before_correction(grown: Any, tmp_path: Path) -> None:
    html = build_study(grown.write(), tmp_path / "site", replicates=50).index.read_text()
    (legend,) = re.findall(r"“Finds 1.2”: ([^.]*)\.", html)
    assert legend.endswith("before correction") and " · finds " in html


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    replace_file(tmp_path / "page", b"one")
    replace_file(tmp_path / "page", b"two")
    assert (tmp_path / "page").read_bytes() == b"two" and (tmp_path / "page").stat().st_mode & 0o777 == 0o644
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        replace_file(tmp_path / "folder", b"three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page"]


def test_a_heat_map_draws_each_square_once_in_its_tint() -> None:
    tints = [
        [("worse", 0.52, True), ("worse", 0.49, False), None],
        [("better", 0.0, False), ("better", 3.0, True), None],
    ]
    svg = str(heat_map("t", "d", ["fog", "snow"], ["1", "3", "5"], tints))
    paths = {
        (side, opacity): d.count("M")
        for side, opacity, d in re.findall(r'<path class="heat (\w+)"(?: fill-opacity="([\d.]+)")? d="([^"]*)"/>', svg)
    }
    # 0.52 and 0.49 are one step of a twentieth, and nothing is drawn for nothing
    assert paths == {("base", ""): 4, ("none", ""): 2, ("worse", "0.50"): 2, ("better", ""): 1}
    assert svg.count('class="stands"') == 2
    # A map of 34 noises at 5 severities took 29 kB when each square was an element of its own.
    many = [[("worse", (r * c % 7) / 7, False) for c in range(5)] for r in range(34)]
    assert len(heat_map("t", "d", ["fog"] * 34, list("12345"), many)) < 12_000


def test_a_calibration_source_that_all_share_is_said_once(suite: Any, tmp_path: Path) -> None:
    full = suite.add("m/full-precision", Model(), TASKS)
    suite.add("m/awq-int4-g64", Model("awq-int4-g64", 4, 0.1), TASKS, twin=full.name, calibration="caption")
    html = build_study(suite.write(), tmp_path / "site", replicates=50).index.read_text()
    assert "calibrated on" not in html
    assert "caption: the source of every calibrated cell" in html
    suite.add("m/gptq-int4-g64", Model("gptq-int4-g64", 4, 0.2), TASKS, twin=full.name, calibration="text")
    html = build_study(suite.write(), tmp_path / "site", replicates=50).index.read_text()
    assert "awq-int4-g64 · calibrated on caption" in html and "gptq-int4-g64 · calibrated on text" in html
    assert "every calibrated cell" not in html
