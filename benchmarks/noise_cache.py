"""A corrupted picture read from the noise cache against the same picture decoded and corrupted (the peer), per noise.

    python benchmarks/noise_cache.py --json benchmarks/noise_cache.json

Both ways start with the bytes of an image file and end with the same pixels (checked). 64x64 is the block world's size
(WebP, scaled mode), 640x480 that of the photographs in VQA-v2 and RefCOCO+ (JPEG, native mode). Medians of processor
time on one core; files are in the page cache, as they are when several quantizations run one after another. "zstd" is
what compressing the stored pixels (level 1) would save in bytes and cost to undo, where the module zstandard is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from machine import machine
from PIL import Image
from tabulate import tabulate

from bitquake.noise import NoiseCache, NoiseSpec, SampleKey, image_noises, load_rgb
from bitquake.noise.registry import Mode
from noise import photo

SIZES: tuple[tuple[int, int, str, Mode], ...] = ((64, 64, "WEBP", "scaled"), (640, 480, "JPEG", "native"))


def seconds(way: Callable[[SampleKey], Any], keys: list[SampleKey]) -> float:
    taken = []
    for key in keys:
        start = time.process_time()
        way(key)
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def zstd(pixels: list[Any]) -> tuple[float, float] | None:
    """Compressed share of the bytes, and seconds to undo it."""
    if importlib.util.find_spec("zstandard") is None:
        return None
    import zstandard

    packed = [zstandard.ZstdCompressor(level=1).compress(image.tobytes()) for image in pixels]
    undo = zstandard.ZstdDecompressor()
    start = time.process_time()
    for one in packed:
        undo.decompress(one)
    taken = (time.process_time() - start) / len(packed)
    return sum(map(len, packed)) / sum(image.nbytes for image in pixels), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    rows: list[dict[str, Any]] = []
    for width, height, kind, mode in SIZES:
        file = io.BytesIO()
        Image.fromarray(photo(width, height)).save(file, kind, quality=90)
        source = file.getvalue()
        keys = [SampleKey("benchmark", "test", str(i)) for i in range(arguments.repeats)]
        for name in image_noises():
            spec = NoiseSpec(name, arguments.severity, mode=mode)
            with tempfile.TemporaryDirectory() as folder:
                cache = NoiseCache(Path(folder), 10**10)

                def make(key: SampleKey, spec: NoiseSpec = spec, source: bytes = source) -> Any:
                    return spec.apply(load_rgb(source), key)

                def read(
                    key: SampleKey, cache: NoiseCache = cache, spec: NoiseSpec = spec, source: bytes = source
                ) -> Any:
                    return cache.apply(spec, source, key)

                first = seconds(read, keys)
                made, found = seconds(make, keys), seconds(read, keys)
                pixels = [make(key) for key in keys]
                if not all(np.array_equal(one, read(key)) for one, key in zip(pixels, keys, strict=True)):
                    raise SystemExit(f"{name}: the cache gives other pixels")
                if cache.counts["misses"] != len(keys):
                    raise SystemExit(f"{name}: {cache.counts} where each picture should be made once")
            packed = zstd(pixels)
            rows.append(
                {
                    "size": f"{width}x{height}",
                    "noise": name,
                    "made ms": made * 1e3,
                    "first time ms": first * 1e3,
                    "hit ms": found * 1e3,
                    "made / hit": made / found,
                    "zstd share": packed[0] if packed else None,
                    "zstd ms": packed[1] * 1e3 if packed else None,
                }
            )
    print(tabulate(rows, headers="keys", floatfmt=("", "", ".3f", ".3f", ".3f", ".1f", ".2f", ".3f")))
    summary = {}
    for size in dict.fromkeys(row["size"] for row in rows):
        ratios = [row["made / hit"] for row in rows if row["size"] == size]
        summary[size] = {"least": min(ratios), "median": statistics.median(ratios), "most": max(ratios)}
        least, middle, most = summary[size].values()
        print(f"{size}: a hit is {least:.1f} to {most:.1f} times faster, median {middle:.1f}")
    where = machine("numpy", "opencv-python-headless", "pillow", "bitquake")
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    if arguments.json:
        figures = {"severity": arguments.severity, "machine": where, "summary": summary, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
