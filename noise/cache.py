"""Corrupted pictures on disk, made once and shared by every run that wants the same ones.

    cache = NoiseCache(Path("pictures"), max_bytes=20 * 10**9)
    pixels = cache.apply(NoiseSpec("fog", 3), encoded_picture, SampleKey("photos", "test", "42"))

A picture's name is the hash of all that decides its pixels: the source, noise, severity, mode, seed and version, the
sample, and the libraries that decode and filter (some noises are equal within one environment only). So an entry is
never wrong, only missing; any number of threads and processes may read, write and delete at once, without a lock.

An entry is ``<2 hex digits>/<32 hex digits>.rgb``: a header with the name, the size and the pixels' hash, the raw
pixels, and a CRC-32 of all. Raw, because noise hardly compresses, and reading 640x480 pixels and checking them takes a
quarter of a millisecond, less than decoding the source takes, which a hit saves too (``benchmarks/noise_cache.py``).
With their hash, because every record has it, and hashing them takes four times as long as checking them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import struct
import threading
import time
import uuid
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
from PIL import features

from .pixels import RGB, load_rgb, pixel_hash
from .seeding import SampleKey, sample_digest
from .spec import NoiseSpec

_SHARDS = 256
"""Folders with a bound each: none needs to know how full the others are."""
_HEADER = struct.Struct("<8s16sII16s")
_MAGIC = b"bqnoise2"
_CHECK = struct.Struct("<I")
_BLOCK = 4096
_FRESH_SECONDS = 7 * 86_400.0
_TOUCH_SECONDS = 3_600.0
_ABANDONED_SECONDS = 3_600.0


class CachedPicture(NamedTuple):
    """Pixels, read-only where they come from disk, and their :func:`bitquake.noise.pixel_hash`."""

    pixels: RGB
    pixel_hash: str


class NoiseCache:
    """A bounded folder of corrupted pictures. May be used by several threads.

    Full, it deletes what nobody has used for a week, the oldest first, and then by name, the largest first; from there
    on, names as large are not stored any more. A name is as good as random: of a suite that does not fit, the same part
    stays from one model to the next, while of two suites each keeps its share. (Deleting the least recently used, a
    suite one picture too large would lose each just before it is wanted again.)

    Args:
        folder: made if it is not there.
        max_bytes: bound on what lies in the folder, files counted in blocks of 4 KiB. Each process that writes beside
            this one can exceed it by a sixteenth.

    Attributes:
        problem: why entries can no longer be written (a full disk, say); "" as long as they can.

    Raises:
        OSError: the folder cannot be made.
        ValueError: ``max_bytes`` below 1.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes: a cache of pictures needs at least 1 byte, got {max_bytes}.")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._share = max_bytes // _SHARDS
        self._lock = threading.Lock()  # of the numbers below; nothing waits for the disk under it but making room
        self._hits = self._misses = 0
        self._room: dict[str, int] = {}
        self._refused_from: dict[str, str] = {}
        self.problem = ""

    @property
    def counts(self) -> dict[str, int]:
        """``hits``: pictures read; ``misses``: pictures made, a damaged entry's too."""
        with self._lock:
            return {"hits": self._hits, "misses": self._misses}

    def apply(self, spec: NoiseSpec, source: Any, key: SampleKey) -> RGB:
        """The pixels of :meth:`picture`."""
        return self.picture(spec, source, key).pixels

    def picture(self, spec: NoiseSpec, source: Any, key: SampleKey) -> CachedPicture:
        """``spec.apply(load_rgb(source), key)``, from disk where it is there.

        Args:
            source: the bytes of an image file, which a hit does not decode, or anything else that ``load_rgb`` takes.

        Raises:
            NoiseError, ImageError: as :func:`bitquake.noise.apply` and :func:`load_rgb`. Nothing is stored then.
        """
        if not isinstance(source, bytes):
            source = load_rgb(source)
        name = _name(spec, source, key)
        path = self._folder / name[:2] / f"{name}.rgb"
        found = _read(path, name)
        if found is not None:
            with self._lock:
                self._hits += 1
            return found
        pixels: RGB = spec.apply(load_rgb(source), key)
        made = CachedPicture(pixels, pixel_hash(pixels))
        with self._lock:
            self._misses += 1
        self._store(path, name, made)
        return made

    def _store(self, path: Path, name: str, picture: CachedPicture) -> None:
        content = _entry(name, picture)
        if self.problem or not self._has_room(path.parent, name, _on_disk(len(content))):
            return
        part = path.with_name(f"{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            # no fsync: what a power failure cuts short is found out when it is read, and made again
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            self.problem = str(error)
            with contextlib.suppress(OSError):
                part.unlink()

    def _has_room(self, shard: Path, name: str, size: int) -> bool:
        """Whether an entry is to be written; room for it has been made then."""
        at = shard.name
        with self._lock:
            if name >= self._refused_from.get(at, "g"):
                return False
            if size > self._room.get(at, 0):
                try:
                    self._make_room(shard, size)
                except OSError as error:
                    self.problem = str(error)
                    return False
            if size > self._room[at] or name >= self._refused_from.get(at, "g"):
                return False
            self._room[at] -= size
            return True

    def _make_room(self, shard: Path, size: int) -> None:
        """Look what lies in a shard, delete what is too much, and grant this process what it may write until next time.

        A sixteenth of the bound at a time, so that processes notice what others write.
        """
        at, now, total = shard.name, time.time(), 0
        entries: list[tuple[bool, float, str, int]] = []
        for file, changed, length in _files(shard):
            total += _on_disk(length)
            if file.endswith(".part"):
                if now - changed > _ABANDONED_SECONDS:  # of a process that was killed
                    total -= _on_disk(length)
                    (shard / file).unlink(missing_ok=True)
                continue
            fresh = now - changed < _FRESH_SECONDS
            entries.append((fresh, 0.0 if fresh else -changed, file, _on_disk(length)))
        grant = max(size, self._share // 16)
        if total < self._share * 3 // 4:
            self._refused_from.pop(at, None)
        if total + grant > self._share:
            # stale ones by their age first, then fresh ones by name
            entries.sort(key=lambda entry: (not entry[0], entry[1], entry[2]))
            while entries and total > self._share - max(size, self._share // 8):
                fresh, _, file, length = entries.pop()
                (shard / file).unlink(missing_ok=True)
                total -= length
                if fresh:
                    self._refused_from[at] = file.removesuffix(".rgb")
        self._room[at] = min(self._share - total, grant)


@functools.cache
def _environment() -> str:
    """The libraries and processor features that a decoded or filtered pixel can depend on."""
    libraries = (np.__version__, cv2.__version__, PIL.__version__, features.version("jpg"), features.version("webp"))
    return "\n".join([*map(str, libraries), platform.machine(), cv2.getCPUFeaturesLine()])


def _name(spec: NoiseSpec, source: bytes | RGB, key: SampleKey) -> str:
    digest = hashlib.blake2b(digest_size=16)
    what = "file" if isinstance(source, bytes) else f"{source.shape[0]}x{source.shape[1]}"
    noise = f"{spec.name}\n{spec.severity}\n{spec.seed}\n{spec.version}\n{spec.mode}"
    head = f"{_environment()}\n{noise}\n{sample_digest(key)}\n{what}".encode()
    digest.update(len(head).to_bytes(8, "little"))
    digest.update(head)
    digest.update(source if isinstance(source, bytes) else source.data)
    return digest.hexdigest()


def _entry(name: str, picture: CachedPicture) -> bytes:
    pixels, digest = picture
    content = _HEADER.pack(_MAGIC, bytes.fromhex(name), *pixels.shape[:2], bytes.fromhex(digest)) + pixels.tobytes()
    return content + _CHECK.pack(zlib.crc32(content))


def _read(path: Path, name: str) -> CachedPicture | None:
    """An entry; None where there is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            content = file.read()
            if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_SECONDS:
                os.utime(path)
    except OSError:
        # deleted by another process; unreadable ones are made again like damaged ones
        return None
    if len(content) < _HEADER.size + _CHECK.size:
        return None
    magic, stored, height, width, digest = _HEADER.unpack_from(content)
    body = memoryview(content)[: -_CHECK.size]
    if magic != _MAGIC or stored.hex() != name or len(body) != _HEADER.size + 3 * height * width:
        return None
    if zlib.crc32(body) != _CHECK.unpack_from(content, len(body))[0]:
        return None
    pixels = np.frombuffer(body, np.uint8, offset=_HEADER.size).reshape(height, width, 3)
    return CachedPicture(pixels, digest.hex())


def _files(shard: Path) -> list[tuple[str, float, int]]:
    """Name, time of change and bytes of each file of a folder that others may write to."""
    found = []
    try:
        with os.scandir(shard) as entries:
            for entry in entries:
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found.append((entry.name, stat.st_mtime, stat.st_size))
    except FileNotFoundError:
        return []
    return found


def _on_disk(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
