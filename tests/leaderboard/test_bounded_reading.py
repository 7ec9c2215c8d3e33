"""The readers under the submissions, against the libraries' own: zstd frames, JSON, texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquake.leaderboard.bounded_zstd import MAX_WINDOW, ZstdProblem, compress, lines
from bitquake.leaderboard.findings import shown
from bitquake.leaderboard.strict_json import JsonProblem, clean_answer, load_json, text_problem, texts_of

LIMITS = {"max_bytes": 1 << 24, "max_line": 1 << 16}
TEXTS = st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 19), st.booleans(), st.booleans())
def test_every_single_frame_of_the_library_is_read(found: list[bytes], level: int, checksum: bool, size: bool) -> None:
    text = b"".join(line + b"\n" for line in found)
    frame = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size).compress(text)
    assert list(lines(frame, **LIMITS)) == found


def test_a_text_of_many_blocks_is_read_and_repeats_its_bytes() -> None:
    found = [f'{{"id":"{i}","answer":"{i * i % 97}"}}'.encode() for i in range(12_000)]
    text = b"".join(line + b"\n" for line in found)
    data = compress(text)
    assert list(lines(data, **LIMITS)) == found and compress(text) == data
    assert zstandard.ZstdDecompressor().decompress(data) == text
    streamed = zstandard.ZstdCompressor(level=3).compressobj()
    assert list(lines(streamed.compress(text) + streamed.flush(), **LIMITS)) == found  # without its size


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=6))
def test_no_part_of_a_frame_and_nothing_behind_it_is_read(at: int, tail: bytes) -> None:
    data = compress(b"".join(b"%d,%d\n" % (i, i * 7919 % 1009) for i in range(300)))
    with pytest.raises(ZstdProblem) as cut:
        list(lines(data[: min(at, len(data) - 1)], **LIMITS))
    assert cut.value.code == "zstd-truncated"
    with pytest.raises(ZstdProblem, match="behind its frame"):
        list(lines(data + tail, **LIMITS))


def test_limits_are_exact() -> None:
    text = b"abcd\n" * 10
    assert len(list(lines(compress(text), max_bytes=50, max_line=4))) == 10
    for limits, code in (
        ({"max_bytes": 49, "max_line": 4}, "too-much-text"),
        ({"max_bytes": 50, "max_line": 3}, "line"),
    ):
        with pytest.raises(ZstdProblem) as error:
            list(lines(compress(text), **limits))
        assert error.value.code.startswith(code)
    options = zstandard.ZstdCompressionParameters(window_log=MAX_WINDOW.bit_length())
    wide = zstandard.ZstdCompressor(compression_params=options).compressobj()
    with pytest.raises(ZstdProblem, match="bytes of memory"):
        list(lines(wide.compress(text) + wide.flush(), **LIMITS))


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_plain_json_is_read_as_the_library_reads_it(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        found = load_json(text)
    except JsonProblem as problem:
        assert problem.code in ("json-number", "json-encoding")  # 25 digits; a lone surrogate
    else:
        assert found == json.loads(text)


def test_json_depth_is_counted_and_not_guessed() -> None:
    for depth, fits in ((12, True), (13, False), (400, False), (100_000, False)):
        text = b"[" * depth + b"]" * depth
        if fits:
            assert load_json(text) == json.loads(text)
        else:
            with pytest.raises(JsonProblem) as error:
                load_json(text)
            assert error.value.code == "json-depth"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_a_cleaned_answer_is_one_that_is_accepted(text: str) -> None:
    cleaned = clean_answer(text, 30)
    assert text_problem(cleaned, free=True) is None and len(cleaned) == min(30, len(text))
    assert cleaned == text[:30] or text_problem(text[:30], free=True) is not None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | VALUES)
def test_what_is_shown_is_one_printable_ascii_line(value: Any) -> None:
    text = shown(value)
    assert len(text) <= 80 and text.isprintable() and "\n" not in text
    assert text.replace("…", "").isascii()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a<b", "text-markup"), ("JaVaScRiPt :x", "text-script"), ("data: text/html,x", "text-script"),
        ("\u202e", "text-direction"), ("\u200f", "text-direction"), ("\ufeffx", "text-control"),
        ("\x7f", "text-control"),
        ("\u2028", "text-control"), ("a\tb", "text-control"), ("\ue000", "text-control"),
        ("temperature: 3 °C, naïve café 中文 🙂", None), ("http://x.org?a=b&c=d", None), ("data=block_vqav2", None),
    ],
)  # fmt: skip
def test_texts_that_act(text: str, code: str | None) -> None:
    found = text_problem(text)
    assert (found[0] if found else None) == code


def test_every_text_of_a_tree_is_looked_at() -> None:
    tree = {"a": ["b", {"c": "d", "e": [["f"]]}], "g": {"h": 1}}
    assert sorted(text for _, text in texts_of(tree)) == ["a", "b", "c", "d", "e", "f", "g", "h"]
