"""The pages: complete without script, safe against whatever a submission may say, light, and well formed."""

from __future__ import annotations

import gzip
import re
import string
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from board_inputs import board
from board_sites import board_files
from hypothesis import given
from hypothesis import strategies as st

from bitquake.leaderboard import pages
from bitquake.leaderboard.board_file import BoardEntry, BoardFile, without_points
from bitquake.leaderboard.method import FORMULAS
from bitquake.leaderboard.numbers import GENERATOR
from bitquake.leaderboard.pages import http_address
from bitquake.leaderboard.views import BoardView
from bitquake.metrics import METRICS
from bitquake.reports.published import published_numbers

STATIC = Path(pages.__file__).parent / "static"
CSP = (
    "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; base-uri 'none'; form-action 'none'"
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "\u202eevil\u202c \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "{{ 7 * 7 }}{% raw %}<!--foot-->",
    "=HYPERLINK(1)",
    "nul\x00 bell\x07 surrogate\ud800",
    "https://evil.example/x",
]
TEXTS = ("contact", "version", "name", "label", "quantization", "command", "title", "about", "kernel", "device", "link")


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects tags, texts and tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[set[str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"<{tag}> says an attribute twice"
        if tag == "table":
            self.tables.append(set())
        if self.tables and "table" in self.open:
            self.tables[-1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Tags and the names of their attributes: what foreign text must not change."""
        return [(tag, tuple(attrs)) for tag, attrs in self.tags]


def html(files: dict[str, bytes]) -> Iterator[tuple[str, Page]]:
    for name, content in sorted(files.items()):
        if name.endswith(".html"):
            yield name, Page(content.decode())


@pytest.fixture(scope="module")
def plain() -> dict[str, bytes]:
    return board_files(board(11), n_refused=1)


def test_every_page_is_well_formed_and_asks_for_its_own_files_only(plain: dict[str, bytes]) -> None:
    for name, page in html(plain):
        tags = page.tags
        assert ("html", {"lang": "en"}) in tags, name
        assert [a["content"] for t, a in tags if t == "meta" and "http-equiv" in a] == [CSP], name
        assert not [t for t, _ in tags if t in ("style", "iframe", "object", "embed", "base")], name
        assert not [a for _, a in tags if any(key == "style" or key.startswith("on") for key in a)], name
        scripts = [a for t, a in tags if t == "script"]
        assert all(a == {"src": "board.js", "defer": None} for a in scripts) and len(scripts) <= 1, name
        ids = [a["id"] for _, a in tags if a.get("id")]
        assert len(ids) == len(set(ids)), f"{name}: {sorted(i for i in ids if ids.count(i) > 1)}"
        for tag, attrs in tags:
            for key in ("href", "src"):
                target = attrs.get(key)
                if target is None:
                    continue
                if "://" in target:
                    assert tag == "a" and target.startswith("https://") and "noopener" in (attrs["rel"] or ""), target
                    continue
                file, _, anchor = target.partition("#")
                assert not file or file in plain, f"{name}: {target}"
                if anchor:
                    linked = Page((plain[file] if file else plain[name]).decode())
                    assert anchor in {a.get("id") for _, a in linked.tags}, f"{name}: {target}"


def test_tables_say_what_they_are_and_figures_can_be_read_without_seeing(plain: dict[str, bytes]) -> None:
    for name, page in html(plain):
        text = plain[name].decode()
        assert all("th" in table for table in page.tables), name
        boards = re.findall(r'<table class="board".*?</table>', text, re.S)
        assert all("<caption>" in table for table in boards), name
        heads = [attrs for tag, attrs in page.tags if tag == "th"]
        assert all(attrs.get("scope") in ("col", "row", "colgroup", "rowgroup") for attrs in heads), name
        for chart in re.findall(r'<svg class="chart".*?</svg>', text, re.S):
            assert "<title>" in chart and "<desc>" in chart and 'role="img"' in chart
        n_charts = text.count('<svg class="chart"')
        assert text.count("<summary>Numbers</summary>") == n_charts, name


def test_a_model_page_shows_all_that_is_known(plain: dict[str, bytes]) -> None:
    name = next(n for n in plain if n.startswith("model--") and "bf16" not in n and n.endswith(".html"))
    text = " ".join(Page(plain[name].decode()).text)
    for part in (
        *("Severity", "rings: C@1, 5, 10, 20 %", "Does a threshold keep its promise?", "Which answers flip?"),
        *("Failures", "Quant card", "Reproduce and check", "lmms-eval --model bitquake_hf", "Weights hash"),
        *("samples per bin", "Every Eval Ever", "Is the quantized model more fragile?", "Model hash"),
    ):
        assert part in text, part


@pytest.fixture(scope="module")
def tame() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """The shapes of the pages of a board whose texts are harmless."""
    return {
        name: page.shape for name, page in html(board_files(board(2, texts=dict.fromkeys(TEXTS, "tame"), n_tasks=2)))
    }


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_adds_no_tag_no_attribute_and_no_link(
    hostile: str, tame: dict[str, list[tuple[str, tuple[str, ...]]]]
) -> None:
    wild = board_files(board(2, texts=dict.fromkeys(TEXTS, hostile), n_tasks=2))
    assert tame.keys() == {name for name in wild if name.endswith(".html")}
    linked = bool(http_address(hostile))
    for name, page in html(wild):
        if not linked:
            assert page.shape == tame[name], name
        for tag, attrs in page.tags:
            target = attrs.get("href") or ""
            assert not target.lower().startswith(("javascript:", "data:", "vbscript:")), name
            if target == hostile:
                assert attrs["rel"] == "nofollow noopener noreferrer" and tag == "a"
        text = wild[name].decode()
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x07]", text), name
        assert text.count("<footer") == 1, name
    if hostile.startswith("="):
        assert b",=HYPERLINK" not in wild["board.csv"] and b'"=HYPERLINK' not in wild["board.csv"]


@given(
    st.text(string.printable + "\u202e\u0000é", max_size=40), st.sampled_from(["http", "https", "javascript", "data"])
)
def test_an_address_is_http_or_nothing(rest: str, scheme: str) -> None:
    found = http_address(f"{scheme}://{rest}")
    assert found in ("", f"{scheme}://{rest}")
    if found:
        assert scheme in ("http", "https") and found.isascii() and not re.search(r"""[\s"'<>`\\]""", found)


def test_ordinary_addresses_pass() -> None:
    for address in ("https://example.org", "http://example.org:8080/a?b=c#d", "https://huggingface.co/a/b"):
        assert http_address(address) == address
    for address in ("", "example.org", "//example.org", "https://", "ftp://example.org", " https://example.org"):
        assert http_address(address) == ""


def rendered(entry: BoardEntry) -> dict[str, str]:
    """The pages of a board but for those of its models and the charts."""
    brief = entry.model_copy(update={"report": without_points(entry.report)})
    file = BoardFile(generator=GENERATOR, source_date=None, inputs_digest="0" * 64, n_refused=0, boards=[brief])
    return pages.render_board(file, entry.report.settings, {})


def test_two_hundred_rows_weigh_little() -> None:
    found = rendered(board(200, n_tasks=4))
    page = Page(found["index.html"])
    assert sum(tag == "tr" for tag, _ in page.tags) >= 201
    size = len(gzip.compress(found["index.html"].encode(), mtime=0))
    assert size <= 200_000
    assert max(len(gzip.compress(text.encode(), mtime=0)) for text in found.values()) <= 200_000
    assert len((STATIC / "board.js").read_bytes()) < 15_000


def test_rows_stand_by_retention_full_precision_first_and_worlds_apart() -> None:
    entry = board(20)
    other = entry.model_copy(update={"board": "elsewhere", "title": "Real models", "world": "real"})
    view = BoardView(entry)
    table = view.main_table()
    change = {s.run: s.differences["aurc"].delta for s in entry.report.summaries}
    order = [change[row.run.id] for row in table.rows]
    assert order == sorted(order) and len(order) == 17
    assert [row.run.role for row in table.twins] == ["full-precision"] * 3
    brief = [e.model_copy(update={"report": without_points(e.report)}) for e in (other, entry)]
    file = BoardFile(generator=GENERATOR, source_date=None, inputs_digest="", n_refused=0, boards=brief)
    index = pages.render_board(file, entry.report.settings, {})["index.html"]
    sections = re.findall(r'<section class="world (\w+)".*?</section>', index, re.S)
    assert sections == ["real", "block"]
    assert index.count("not a public benchmark") == 1 and index.count("they say nothing about a large model") == 1


def test_speed_and_memory_of_simulated_rows_are_not_shown() -> None:
    entry = board(11)
    simulated = [run for run in entry.report.runs if run.card and run.card.execution == "simulated"]
    assert simulated
    found = rendered(entry)["index.html"]
    for run in entry.report.runs:
        row = re.search(rf'<tr[^>]*data-name="{re.escape(run.id)}".*?</tr>', found, re.S)
        assert row is not None
        weights = re.findall(r'<td class="n">(.*?)</td>', row[0])[-1]
        assert (weights == "–") == (run in simulated)


def test_every_metric_has_a_formula() -> None:
    assert FORMULAS.keys() == METRICS.keys()
    for formula in FORMULAS.values():
        Page(f"<p>{formula}</p>")


def test_published_numbers_are_cited_and_stand_apart(plain: dict[str, bytes]) -> None:
    """The rows below are those of arXiv 2602.13289 and 2601.22709 as the project's notes have them."""
    tables = {table.id: table for table in published_numbers().tables}
    assert ["MBQ INT4", 78.1, 5.2, 18.0, 82.5, 3.7, 41.1] in tables["ptq-maxprob"].rows
    assert ["MBQ INT4", 2.6, 32.9, 2.2, 45.4] in tables["ptq-selector"].rows
    assert ["INT4", "GRACE", 78.3, 61.2, 59.2, 51.6, 85.2, 70.1, 65.0, 67.2] in tables["grace-llava"].rows
    text = plain["published.html"].decode()
    for table in tables.values():
        assert table.source.url in text and f"({table.source.year})" in text
        means = [row for row in table.rows if table.columns[-1] == "Mean"]
        for row in means:
            scores = [value for value in row[2:-1] if isinstance(value, float)]
            assert row[-1] == pytest.approx(sum(scores) / len(scores), abs=0.2), row
    others = [content for name, content in plain.items() if name.endswith(".html") and name != "published.html"]
    assert not [content for content in others if b"2602.13289" in content or b"Qwen2-VL-7B" in content]
