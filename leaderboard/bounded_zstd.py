"""Zstandard with bounds: exactly one whole frame, and never more memory or text than was agreed.

A compressed file of a few kilobytes can hold gigabytes. So the frame is walked from block to block before a byte of it
is decompressed (RFC 8878, section 3.1.1), and then decompressed in pieces.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import zstandard

MAX_WINDOW = 8 << 20
_LEVEL = 19
_PIECE = 1 << 20
_LAST, _RLE, _RESERVED = 1, 1, 3


class ZstdProblem(ValueError):
    """Bytes that are not one bounded frame; ``code`` as of a finding."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


def compress(text: bytes) -> bytes:
    """One frame with content size and checksum; equal texts give equal bytes (of one version of zstandard)."""
    options = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=MAX_WINDOW.bit_length() - 1, write_checksum=True, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=options).compress(text)


def lines(data: bytes, *, max_bytes: int, max_line: int) -> Iterator[bytes]:
    """The lines of a compressed text, each without its line feed.

    Args:
        data: the whole file.
        max_bytes: of the decompressed text.
        max_line: bytes of one line.

    Raises:
        ZstdProblem: ``zstd-format``, ``zstd-truncated``, ``zstd-trailing`` (anything behind the first frame),
            ``zstd-window`` (more than ``MAX_WINDOW`` of memory), ``zstd-damaged``, ``too-much-text``,
            ``line-too-long``, ``line-unfinished`` (the last line has no line feed).
    """
    _check_frame(data, max_bytes)
    left = b""
    total = 0
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    with decompressor.stream_reader(io.BytesIO(data), read_across_frames=False) as stream:
        while True:
            try:
                piece = stream.read(_PIECE)
            except zstandard.ZstdError as error:
                raise ZstdProblem("zstd-damaged", f"cannot be decompressed ({error})") from error
            if not piece:
                break
            total += len(piece)
            if total > max_bytes:
                raise ZstdProblem("too-much-text", f"holds more than {max_bytes:,} bytes of text")
            found = (left + piece).split(b"\n")
            left = found.pop()
            for line in found:
                if len(line) > max_line:
                    raise ZstdProblem("line-too-long", f"has a line of {len(line):,} bytes; {max_line:,} are allowed")
                yield line
            if len(left) > max_line:
                raise ZstdProblem("line-too-long", f"has a line of more than {max_line:,} bytes")
    if left:
        raise ZstdProblem("line-unfinished", "ends within a line: it was cut short")


def _check_frame(data: bytes, max_bytes: int) -> None:
    try:
        header = zstandard.get_frame_parameters(data)
        at = zstandard.frame_header_size(data)
    except zstandard.ZstdError as error:
        what = "is empty" if not data else f"is no zstd file ({error})"
        raise ZstdProblem("zstd-truncated" if len(data) < 18 else "zstd-format", what) from error
    if data[:4] != b"\x28\xb5\x2f\xfd":  # a skippable frame has parameters too
        raise ZstdProblem("zstd-format", "does not begin with a zstd frame")
    if header.dict_id:
        raise ZstdProblem("zstd-format", "needs a dictionary; compress it without one")
    if header.window_size > MAX_WINDOW:
        what = f"needs {header.window_size:,} bytes of memory to decompress; {MAX_WINDOW:,} are allowed"
        raise ZstdProblem("zstd-window", what)
    sized = header.content_size not in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR)
    if sized and header.content_size > max_bytes:
        raise ZstdProblem("too-much-text", f"holds {header.content_size:,} bytes of text; {max_bytes:,} are allowed")
    while True:
        block = int.from_bytes(data[at : at + 3], "little")
        kind = block >> 1 & 3
        if at + 3 > len(data):
            raise ZstdProblem("zstd-truncated", "is cut short")
        if kind == _RESERVED:
            raise ZstdProblem("zstd-damaged", f"has a block of no known kind at byte {at}")
        at += 3 + (1 if kind == _RLE else block >> 3)
        if block & _LAST:
            break
    at += 4 * header.has_checksum
    if at > len(data):
        raise ZstdProblem("zstd-truncated", "is cut short")
    if at < len(data):
        raise ZstdProblem("zstd-trailing", f"has {len(data) - at:,} bytes behind its frame")
