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
from functools import lru_cache, partial
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


def impulse_noise(image: RGB, severity: int) -> RGB:
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    x = image / 255.0
    hit, white = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    x[hit & white], x[hit & ~white] = 1, 0
    return eight_bit(x)


def speckle_noise(image: RGB, severity: int) -> RGB:
    x = image / 255.0
    return eight_bit(x + x * rng.normal(size=x.shape, scale=(0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]))


def gaussian_blur(image: RGB, severity: int) -> RGB:
    return eight_bit(cv2.GaussianBlur(image / 255.0, (0, 0), (1, 2, 3, 4, 6)[severity - 1]))


def glass_blur(image: RGB, severity: int) -> RGB:
    sigma, delta, iterations = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    x = eight_bit(cv2.GaussianBlur(image / 255.0, (0, 0), sigma))
    for _ in range(iterations):
        for y in range(image.shape[0] - delta, delta, -1):
            for z in range(image.shape[1] - delta, delta, -1):
                dx, dy = rng.integers(-delta, delta, 2)
                x[y, z], x[y + dy, z + dx] = x[y + dy, z + dx], x[y, z]
    return eight_bit(cv2.GaussianBlur(x / 255.0, (0, 0), sigma))


def smear(x: npt.NDArray[Any], radius: int, sigma: float, angle: float) -> npt.NDArray[Any]:
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    for i in range(2 * radius + 1):
        dy, dx = np.ceil(i * np.array([np.sin(angle), np.cos(angle)]) - 0.5).astype(int)
        kernel[2 * radius + dy, 2 * radius + dx] += np.exp(-i * i / (2 * sigma * sigma))
    return cv2.filter2D(x, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def motion_blur(image: RGB, severity: int) -> RGB:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return eight_bit(smear(image / 255.0, radius, sigma, np.radians(rng.uniform(-45, 45))))


def zoom_blur(image: RGB, severity: int) -> RGB:
    stop, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    height, width, _ = image.shape
    factors = np.arange(1, stop, step)
    x = (image / 255.0).astype(np.float32)
    total = x.copy()
    for factor in factors:
        h, w = int(np.ceil(height / factor)), int(np.ceil(width / factor))
        crop = x[(height - h) // 2 :, (width - w) // 2 :][:h, :w]
        large = cv2.resize(crop, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
        total += large[(large.shape[0] - height) // 2 :, (large.shape[1] - width) // 2 :][:height, :width]
    return eight_bit(total / (len(factors) + 1))


def low_light(image: RGB, severity: int) -> RGB:
    light, gain = ((1 / 4, 2.0), (1 / 8, 2.8), (1 / 16, 4.0), (1 / 32, 5.6), (1 / 64, 8.0))[severity - 1]
    x = image / 255.0
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    counts = rng.poisson(2000 * light * linear) + rng.normal(0, 3, x.shape)
    y = np.clip(gain * counts / 2000, 0, 1)
    return eight_bit(np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055))


def recompression(image: RGB, severity: int) -> RGB:
    rounds, quality = ((2, 75), (3, 60), (3, 40), (3, 25), (5, 18))[severity - 1]
    for turn in range(rounds):
        down, right = (int(shift) for shift in rng.integers(0, 8, 2))
        file = io.BytesIO()
        padded = Image.fromarray(np.pad(image, ((down, 0), (right, 0), (0, 0)), mode="edge"))
        padded.save(file, "WEBP" if turn % 2 else "JPEG", quality=quality)
        image = np.asarray(Image.open(file).convert("RGB"))[down:, right:]
    return image


def down_up_scaling(image: RGB, severity: int) -> RGB:
    factor = (2, 3, 4, 6, 8)[severity - 1]
    height, width, _ = image.shape
    small = cv2.resize(image, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def occlusion(image: RGB, severity: int) -> RGB:
    """Rectangles at random places, one after another, until the share is covered."""
    height, width, _ = image.shape
    out, hidden = image.copy(), np.zeros((height, width), bool)
    while hidden.mean() < severity / 10:
        aspect, area = rng.uniform(0.5, 2), rng.uniform(0.02, 0.1) * height * width
        down, across = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        top, left = int(rng.integers(height)), int(rng.integers(width))
        hidden[top : top + down, left : left + across] = True
        out[top : top + down, left : left + across] = rng.integers(16, 112)
    return out


def off_centre_crop(image: RGB, severity: int) -> RGB:
    keep = (0.95, 0.9, 0.84, 0.77, 0.71)[severity - 1]
    height, width = round(keep * image.shape[0]), round(keep * image.shape[1])
    top, left = (int(rng.integers(space + 1)) for space in (image.shape[0] - height, image.shape[1] - width))
    return image[top : top + height, left : left + width].copy()


def rotation(image: RGB, severity: int) -> RGB:
    angle = (5, 10, 15, 20, 30)[severity - 1] * rng.choice((-1, 1))
    height, width, _ = image.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), float(angle), 1)
    return np.asarray(cv2.warpAffine(image, matrix, (width, height), borderValue=(128, 128, 128)), np.uint8)


def snow(image: RGB, severity: int) -> RGB:
    mean, deviation, zoom, threshold, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    height, width, _ = image.shape
    layer = rng.normal(mean, deviation, (height, width))
    h, w = int(np.ceil(height / zoom)), int(np.ceil(width / zoom))
    crop = layer[(height - h) // 2 :, (width - w) // 2 :][:h, :w]
    layer = cv2.resize(crop, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_LINEAR)[:height, :width]
    layer[layer < threshold] = 0
    layer = eight_bit(smear(eight_bit(layer) / 255.0, radius, sigma, np.radians(rng.uniform(-135, -45))))[..., None]
    x = (image / 255.0).astype(np.float32)
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., None]
    x = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return eight_bit(x + layer / 255.0 + np.rot90(layer, k=2) / 255.0)


@lru_cache(maxsize=1)
def frosty_photo() -> RGB:
    return photo(1280, 960)  # stands for one of the five photographs, which are not ours


def frost(image: RGB, severity: int) -> RGB:
    keep, share = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    height, width, _ = image.shape
    y, x = (int(rng.integers(0, side)) for side in (960 - height + 1, 1280 - width + 1))
    crop = frosty_photo()[y : y + height, x : x + width][..., ::-1]
    return eight_bit((keep * image + share * crop) / 255)


def spatter(image: RGB, severity: int) -> RGB:
    mean, deviation, sigma, threshold, last = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[severity - 1]
    x = image / 255.0
    liquid = cv2.GaussianBlur(rng.normal(mean, deviation, image.shape[:2]), (0, 0), sigma)
    liquid[liquid < threshold] = 0
    if severity >= 4:
        m = cv2.GaussianBlur(np.where(liquid > threshold, 1.0, 0.0), (0, 0), last)[..., None]
        m[m < 0.8] = 0
        return eight_bit(x * (1 - m) + m * np.array([63, 42, 20]) / 255)
    layer = (liquid * 255).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(layer, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    distance = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    m = layer * cv2.blur(distance, (3, 3)).astype(np.float32)
    m *= last / m.max()
    return eight_bit(x + m[..., None] * np.array([175, 238, 238]) / 255)


def brightness(image: RGB, severity: int) -> RGB:
    x = cv2.cvtColor((image / 255.0).astype(np.float32), cv2.COLOR_RGB2HSV)
    x[:, :, 2] = np.clip(x[:, :, 2] + 0.1 * severity, 0, 1)
    return eight_bit(cv2.cvtColor(x, cv2.COLOR_HSV2RGB))


def saturate(image: RGB, severity: int) -> RGB:
    gain, offset = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    x = cv2.cvtColor((image / 255.0).astype(np.float32), cv2.COLOR_RGB2HSV)
    x[:, :, 1] = np.clip(x[:, :, 1] * gain + offset, 0, 1)
    return eight_bit(cv2.cvtColor(x, cv2.COLOR_HSV2RGB))


def elastic_transform(image: RGB, severity: int) -> RGB:
    alpha, sigma, jitter = (
        244 * np.array(((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)))
    )[severity - 1]
    height, width, _ = image.shape
    centre, third = np.array([width // 2, height // 2]), min(height, width) // 3
    before = np.array([centre + third, centre + np.array([third, -third]), centre - third], np.float32)
    moved = before + rng.uniform(-jitter, jitter, before.shape).astype(np.float32)
    x = cv2.warpAffine(
        image / 255.0, cv2.getAffineTransform(before, moved), (width, height), borderMode=cv2.BORDER_REFLECT_101
    )
    size = 2 * int(3 * sigma + 0.5) + 1
    dx, dy = (
        alpha
        * cv2.GaussianBlur(rng.uniform(-1, 1, (height, width)), (size, size), sigma, borderType=cv2.BORDER_REFLECT)
        for _ in range(2)
    )
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    places = (across + dx).astype(np.float32), (down + dy).astype(np.float32)
    return eight_bit(cv2.remap(x, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def pixelate(image: RGB, severity: int) -> RGB:
    factor = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width, _ = image.shape
    small = Image.fromarray(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX))


CLASSIC: dict[str, Callable[[RGB, int], RGB]] = {
    function.__name__: function
    for function in (
        *(gaussian_noise, shot_noise, defocus_blur, fog, contrast, jpeg_compression),
        *(impulse_noise, speckle_noise, gaussian_blur, glass_blur, motion_blur, zoom_blur),
        *(snow, frost, spatter, brightness, saturate, elastic_transform, pixelate),
        *(low_light, recompression, down_up_scaling, occlusion, off_centre_crop, rotation),
    )
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
    print(f"ours: slowest {summary['slowest']:.0f} (target 40, glass blur 30), median {summary['median']:.0f} (150)")
    if options.json:
        report = {"size": options.size, "machine": machine, "imagecorruptions": library_note, **summary, "rows": rows}
        unfinished = options.json.with_suffix(".partial")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(options.json)


if __name__ == "__main__":
    main()
