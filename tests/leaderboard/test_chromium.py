"""The built pages in a real browser: sorting, filters, shared links, and what happens without script or network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board_inputs import board
from board_sites import write_board
from chromium import EXECUTABLE, Chromium, Page

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on the path")

N_ROWS = 27
TABLE = "document.querySelector('table.board')"
ROWS = f"[...[...{TABLE}.tBodies].at(-1).rows]"
NAMES = f"{ROWS}.filter(r => !r.hidden).map(r => r.dataset.name)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_board(board(N_ROWS), tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser: Chromium) -> Page:
    return browser.page()


def first_numbers(page: Page, column: int) -> list[float]:
    """The sorted column as a person reads it."""
    texts = page.run(f"{ROWS}.filter(r => !r.hidden).map(r => r.cells[{column}].querySelector('b').textContent)")
    return [float(text.rstrip("†").replace("−", "-")) for text in texts]


def click_head(page: Page, column: int) -> None:
    page.run(f"{TABLE}.querySelector('th[data-column=\"{column}\"] button').click()")


def test_a_column_sorts_both_ways_and_back_by_keyboard_and_says_so(page: Page, site: Path) -> None:
    page.open(site / "index.html")
    first = page.run(NAMES)
    assert len(first) == N_ROWS - 3
    page.run(f"{TABLE}.querySelector('th[data-column=\"5\"] button').focus()")
    page.press("Enter", 13)
    assert page.run(f"{TABLE}.querySelector('th[data-column=\"5\"]').ariaSort") == "descending"
    falling = first_numbers(page, 5)
    assert falling == sorted(falling, reverse=True)
    page.press(" ", 32)
    assert page.run(f"{TABLE}.querySelector('th[data-column=\"5\"]').ariaSort") == "ascending"
    rising = first_numbers(page, 5)
    assert rising == sorted(rising) == sorted(falling)
    page.press("Enter", 13)
    assert page.run(NAMES) == first
    click_head(page, 7)  # AURC: lower is better, so it rises first
    aurc = first_numbers(page, 7)
    assert aurc == sorted(aurc)
    assert page.run(f"{TABLE}.tBodies[0].rows.length") == 3, "full precision stays on top"


@pytest.mark.parametrize("name", ["model", "method", "bits", "execution", "level"])
def test_a_filter_leaves_the_rows_that_fit(page: Page, site: Path, name: str) -> None:
    page.open(site / "index.html")
    fields = page.run(f"{ROWS}.map(r => [r.dataset.name, r.dataset.{name}])")
    value = fields[-1][1]
    wanted = sorted(row for row, found in fields if found == value)
    assert 0 < len(wanted) < len(fields)
    page.run(
        f"(() => {{ const s = document.querySelector('select[name={name}]'); s.value = {json.dumps(value)};"
        " s.dispatchEvent(new Event('change')); })()"
    )
    assert sorted(page.run(NAMES)) == wanted
    assert page.run("document.querySelector('.told').textContent") == f"{len(wanted)} of {len(fields)} rows"
    assert f"{name}=" in page.run("location.hash")


def test_a_shared_link_restores_order_filter_and_comparison(page: Page, site: Path) -> None:
    page.open(site / "index.html")
    chosen = page.run(NAMES)[3:6]
    for name in chosen:
        page.run(f"document.querySelector('tr[data-name=\"{name}\"] input').click()")
    page.run("document.querySelector('.compare').click()")
    click_head(page, 5)
    assert sorted(page.run(NAMES)) == sorted(chosen)
    link, order = page.run("location.hash"), page.run(NAMES)
    page.run("[...document.querySelectorAll('.controls button')].at(-1).click()")
    assert len(page.run(NAMES)) == N_ROWS - 3 and page.run("location.hash") == ""

    page.open(site / "index.html", link.removeprefix("#"))
    assert page.run(NAMES) == order
    assert page.run("document.querySelectorAll('input:checked').length") == 3
    assert page.run(f"{TABLE}.querySelector('th[data-column=\"5\"]').ariaSort") == "descending"
    # The other views take the choice along, their order is their own.
    href = page.run("document.querySelectorAll('a.view')[1].href")
    assert "rows=" in href and "sort=" not in href
    page.open(site / "synthetic--noise.html", href.partition("#")[2])
    assert sorted(page.run(NAMES)) == sorted(chosen)


@pytest.mark.parametrize(
    "fragment",
    [
        "sort=nowhere:5:down&bits=<img src=x onerror=alert(1)>&rows=a,b&only=1",
        "sort=synthetic-block-vqav2-clean:999:up&sort=a:b:c:d&model=__proto__",
        "sort=" + "x" * 5000,
        "%%%=&=&&",
    ],
)
def test_an_address_that_says_nonsense_changes_nothing(page: Page, site: Path, fragment: str) -> None:
    page.open(site / "index.html")
    first = page.run(NAMES)
    page.open(site / "index.html", fragment)
    assert page.run(NAMES) == first
    assert page.run("document.querySelectorAll('img').length") == 0
    assert not problems(page)


def test_no_page_complains_or_asks_for_anything_but_its_own_files(page: Page, site: Path) -> None:
    pages = sorted(path for path in site.glob("*.html") if not path.name.startswith("model--"))
    pages += sorted(site.glob("model--*.html"))[:2]
    for path in pages:
        page.open(path)
    assert not problems(page)
    asked = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
    allowed = site.resolve().as_uri() + "/"
    assert len(asked) >= 3 * len(pages)
    assert not [url for url in asked if not url.startswith((allowed, "about:blank"))]


def test_without_script_every_row_and_number_is_there(browser: Chromium, site: Path) -> None:
    page = browser.page(script=False)
    page.open(site / "index.html")
    page.call("DOM.enable")
    root = page.call("DOM.getDocument")["root"]["nodeId"]

    def count(selector: str) -> int:
        return len(page.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])

    assert count("table.board tbody tr") == N_ROWS
    assert count("table.board tbody td b") == N_ROWS * 9
    assert count("button, select, input, .told") == 0, "controls that would do nothing"


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_no_page_is_wider_than_the_window(page: Page, site: Path, width: int) -> None:
    wide = []
    for name in ("index.html", "method.html", "published.html", "tasks.html", "synthetic--severity.html"):
        page.open(site / name, width=width)
        found = page.run("document.documentElement.scrollWidth")
        if found > width:
            wide.append((name, found))
    model = sorted(site.glob("model--*.html"))[-1]
    page.open(model, width=width)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert not wide


def problems(page: Page) -> list[dict[str, Any]]:
    """Errors and warnings of the console, blocked contents, uncaught exceptions."""
    found = page.told("Runtime.exceptionThrown")
    found += [e for e in page.told("Runtime.consoleAPICalled") if e["type"] in ("error", "warning", "assert")]
    return found + [e for e in page.told("Log.entryAdded") if e["entry"]["level"] in ("error", "warning")]
