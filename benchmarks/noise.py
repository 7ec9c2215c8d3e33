"""Images per second of every corruption and severity on one core, beside the classic way to compute it.

    python benchmarks/noise.py [--json FILE] [--repeats 9] [--size 640x480]

The peer "classic" is ImageNet-C's formula written straightforwardly with NumPy, OpenCV and Pillow, measured in the same
run, alternating with ours. The public library imagecorruptions (1.1.2, 2020) is a second peer where it can run; on
today's setuptools its import fails, and on NumPy 2 parts of it raise, so most environments show why it is absent.
Every figure is a median of processor time, of all threads together: work that spreads over cores does not look faster,
and other programs' share of the machine counts less (the load average is shown: they still take cache and clock).
"scaled" is our own speed in scaled mode, which at 640x480 blurs with 2.1 times the radius.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image
from tabulate import tabulate

from bitquake.noise import SEVERITIES, SampleKey, apply, image_noises
from bitquake.noise.pixels import RGB

rng = np.random.default_rng(0)


def photo(width: int, height: int) -> RGB:
    """Smooth structure, edges and a little grain: neither flat nor white noise, which flatter a codec or a cache."""
    blobs = cv2.resize(
        rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    for _ in range(40):
        centre, radius = (int(rng.integers(width)), int(rng.integers(height))), int(rng.integers(8, 60))
        cv2.circle(blobs, centre, radius, [int(v) for v in rng.integers(0, 256, 3)], -1)
    return eight_bit((blobs + rng.normal(0, 3, blobs.shape)) / 255)


def eight_bit(x: npt.NDArray[np.float64]) -> RGB:
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(image: RGB, severity: int) -> RGB:
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    x = image / 255.0
    return eight_bit(x + rng.normal(size=x.shape, scale=scale))


def shot_noise(image: RGB, severity: int) -> RGB:
    rate = (60, 25, 12, 5, 3)[severity - 1]
    return eight_bit(rng.poisson(image / 255.0 * rate) / rate)


def defocus_blur(image: RGB, severity: int) -> RGB:
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    reach, size = (8, 3) if radius <= 8 else (radius, 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (size, size), sigmaX=alias)
    pixels = image / 255.0
    blurred = np.stack([cv2.filter2D(pixels[:, :, channel], -1, kernel) for channel in range(3)], axis=2)
    return eight_bit(blurred)


def fog(image: RGB, severity: int) -> RGB:
    thickness, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width, _ = image.shape
    size = 1 << (max(height, width) - 1).bit_length()  # one map that covers the picture, as imagecorruptions does
    field, step, wibble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half = step // 2

        def jitter(total: RGB, reach: float = wibble) -> RGB:
            return total / 4 + reach * rng.uniform(-reach, reach, total.shape)

        corners = field[0:size:step, 0:size:step]
        square = corners + np.roll(corners, -1, axis=0)
        field[half:size:step, half:size:step] = jitter(square + np.roll(square, -1, axis=1))
        centres = field[half:size:step, half:size:step]
        field[0:size:step, half:size:step] = jitter(
            centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        )
        field[half:size:step, 0:size:step] = jitter(
            centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        )
        step, wibble = half, wibble / decay
    field -= field.min()
    field /= field.max()
    x = image / 255.0
    brightest = x.max()
    x += thickness * field[:height, :width, None]
    return eight_bit(x * brightest / (brightest + thickness))


def contrast(image: RGB, severity: int) -> RGB:
    gain = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    x = image / 255.0
    means = x.mean(axis=(0, 1), keepdims=True)
    return eight_bit((x - means) * gain + means)


def jpeg_compression(image: RGB, severity: int) -> RGB:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(file).convert("RGB"))


CLASSIC: dict[str, Callable[[RGB, int], RGB]] = {
    function.__name__: function
    for function in (gaussian_noise, shot_noise, defocus_blur, fog, contrast, jpeg_compression)
}


def imagecorruptions() -> tuple[Any, str]:
    """The library's ``corrupt``, or None, and a sentence about it."""
    try:
        return importlib.import_module("imagecorruptions").corrupt, "imagecorruptions: runs here"
    except Exception as error:  # whatever its import raises is the finding
        return None, f"imagecorruptions: does not run here ({type(error).__name__}: {error})"


def per_second(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float | None]:
    """Median images per second of each way, measured alternately; None for a way that raises."""
    times: dict[str, list[float] | None] = {}
    for name, way in ways.items():  # warm up: tables, caches
        try:
            way()
            times[name] = []
        except Exception:
            times[name] = None
    for _ in range(repeats):
        for name, way in ways.items():
            taken = times[name]
            if taken is not None:
                start = time.process_time()
                way()
                taken.append(time.process_time() - start)
    return {name: 1 / statistics.median(taken) if taken else None for name, taken in times.items()}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", default="640x480", help="WIDTHxHEIGHT")
    options = parser.parse_args()

    cv2.setNumThreads(1)
    image = photo(*map(int, options.size.split("x")))
    library, library_note = imagecorruptions()
    rows = []
    for name in image_noises():
        for severity in SEVERITIES:
            key = SampleKey("benchmark", "test", str(severity))
            ours = partial(apply, image, name, severity=severity, key=key)
            ways: dict[str, Callable[[], Any]] = {
                "ours": ours,
                "scaled": partial(ours, mode="scaled"),
                "classic": partial(CLASSIC[name], image, severity),
            }
            if library:
                ways["imagecorruptions"] = partial(library, image, corruption_name=name, severity=severity)
            speed = per_second(ways, options.repeats)
            ratio = speed["ours"] / speed["classic"] if speed["ours"] and speed["classic"] else None
            rows.append({"noise": name, "severity": severity, **speed, "ours / classic": ratio})
    machine = {
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    speeds = [row["ours"] for row in rows]
    summary = {"slowest": min(speeds), "median": statistics.median(speeds)}
    print(f"images per second at {options.size}, one core: {', '.join(f'{k} {v}' for k, v in machine.items())}")
    print(library_note)
    print(tabulate(rows, headers="keys", floatfmt=("", "", *[".0f"] * (len(rows[0]) - 3), ".1f")))
    print(f"ours: slowest {summary['slowest']:.0f} (target 40), median {summary['median']:.0f} (target 150)")
    if options.json:
        report = {"size": options.size, "machine": machine, "imagecorruptions": library_note, **summary, "rows": rows}
        unfinished = options.json.with_suffix(".partial")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(options.json)


if __name__ == "__main__":
    main()
