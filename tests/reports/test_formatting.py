"""Numbers and foreign text as a reader sees them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquake.reports import charts
from bitquake.reports.formatting import clean_text, delta, delta_interval, effect_class, effect_word, interval, number
from bitquake.reports.schema import DifferenceEntry
from bitquake.reports.views import slug


@pytest.mark.parametrize(
    ("value", "unit", "signed", "shown"),
    [
        (0.8123, "percent", False, "81.2"),
        (-0.0123, "percent", True, "−1.2"),
        (0.0123, "percent", True, "+1.2"),
        (-0.0004, "percent", True, "0.0"),
        (0.0, "percent", True, "0.0"),
        (-0.0, "fraction", False, "0.000"),
        (-31.5, "percent", False, "−3150.0"),
        (0.1466, "fraction", False, "0.147"),
        (1.5, "nats", True, "+1.500"),
    ],
)
def test_number(value: float, unit: str, signed: bool, shown: str) -> None:
    assert number(value, unit, signed=signed) == shown  # type: ignore[arg-type]


def test_interval() -> None:
    assert interval(-0.02, 0.004, "percent", signed=True) == "[−2.0, +0.4]"


@pytest.mark.parametrize(
    ("delta_", "verdict", "effect", "shown", "word", "css"),
    [
        (-0.012, "lower", "worse", "−1.2", "worse", "worse size1"),
        (0.03, "higher", "better", "+3.0", "better", "better size2"),
        (-0.2, "lower", "worse", "−20.0", "worse", "worse size3"),
        (0.0003, "higher", "worse", "+0.03", "worse", "worse size1"),
        (0.0003, "tied", "tied", "0.0", "≈ tied", "tied"),
        (0.05, "higher", "changed", "+5.0", "higher", "changed"),
    ],
)
def test_differences(delta_: float, verdict: str, effect: str, shown: str, word: str, css: str) -> None:
    entry = DifferenceEntry.model_validate(
        {"delta": delta_, "lo": delta_, "hi": delta_, "verdict": verdict, "effect": effect}
    )
    assert delta(entry, "percent") == shown
    assert delta_interval(entry, "percent") == f"[{shown}, {shown}]"
    assert effect_word(entry) == word
    assert effect_class(entry, "percent") == css


@given(st.text(), st.integers(min_value=1, max_value=50))
def test_clean_text_is_one_short_line_that_can_be_written(text: str, longest: int) -> None:
    shown = clean_text(text, longest)
    assert len(shown) <= longest
    assert shown.encode("utf-8").decode() == shown
    assert len(shown.splitlines()) <= 1
    assert clean_text(shown, longest) == shown


def test_clean_text_keeps_what_people_write() -> None:
    assert clean_text("Qwen/Qwen2-VL-7B é 漢字 العربية Φ") == "Qwen/Qwen2-VL-7B é 漢字 العربية Φ"


@given(st.text(max_size=80))
def test_slugs_are_safe_in_files_and_anchors(text: str) -> None:
    name = slug(text)
    assert 1 <= len(name) <= 60
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@given(st.lists(st.text(max_size=70), unique=True, max_size=20))
def test_slugs_do_not_collide(texts: list[str]) -> None:
    assert len({slug(text) for text in texts}) == len(texts)


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4))
def test_axis_ticks_enclose_the_range_in_few_round_steps(low: float, span: float) -> None:
    ticks = charts._ticks(low, low + span)
    assert ticks[0] <= low + 1e-6 and ticks[-1] >= low + span - 1e-6
    assert 2 <= len(ticks) <= 7
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3, abs=1e-6)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert any(math.isclose(mantissa, m, rel_tol=1e-3) for m in (1, 2, 2.5, 5, 10))
