"""Promises about every corruption: same bytes everywhere, any size, input untouched, harder with severity.

``python tests/noise/test_apply.py`` prints the hashes of the exact corruptions; goldens.json holds them, and changes
only together with a corruption's version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitquake.noise import SEVERITIES, ImageError, ImageNoise, SampleKey, apply, image_noises, pixel_hash
from bitquake.noise.registry import image_noise

NOISES = list(image_noises())
MODES = ("native", "scaled")
SIZES = ((1, 1), (5, 7), (64, 64), (480, 640))
IN_ORDER_OF_ID = """
    gaussian_noise shot_noise defocus_blur fog contrast jpeg_compression impulse_noise speckle_noise gaussian_blur
    glass_blur motion_blur zoom_blur snow frost spatter brightness saturate elastic_transform pixelate
    low_light recompression down_up_scaling occlusion off_centre_crop rotation
"""
IDS = {name: number for number, name in enumerate(IN_ORDER_OF_ID.split(), 1)}  # part of the seeds: they never change
MOVING = ("zoom_blur", "elastic_transform", "off_centre_crop", "rotation")
BUILD_DEPENDENT = ("jpeg_compression", "recompression")
UNEVEN = ("frost", "saturate", "elastic_transform", "pixelate")  # ImageNet-C's constants: errors need not rise in order
CROPS = ("off_centre_crop",)  # the only corruptions whose result may be smaller than the picture
GOLDENS = Path(__file__).with_name("goldens.json")
any_noise = pytest.mark.parametrize("name", NOISES)
call: Any = apply  # the tests pass modes as plain strings


def key(sample: object) -> SampleKey:
    return SampleKey("goldens", "test", str(sample))


def scene(height: int, width: int) -> np.ndarray:
    """A picture made by integer arithmetic: a gradient, discs, a checkerboard, and texture."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    out = np.empty((height, width, 3), np.int64)
    for channel, (down, across) in enumerate(((160, 60), (90, 120), (30, 190))):
        out[:, :, channel] = 20 + down * y // height + across * x // width
    side = min(height, width)
    for cy, cx, colour in ((3, 3, (230, 40, 30)), (6, 5, (30, 60, 220)), (4, 7, (240, 230, 60))):
        inside = (10 * y - cy * height) ** 2 + (10 * x - cx * width) ** 2 < (2 * side) ** 2
        out[inside] = colour
    corner = (2 * y > height) & (4 * x > 3 * width)
    out[corner] = ((y * 16 // height + x * 16 // width) % 2 * 200 + 25)[corner][:, None]
    out += ((x * 7919 + y * 104729 + x * y * 31) % 17 - 8)[:, :, None]
    return out.clip(0, 255).astype(np.uint8)


def keeps_its_promise_of_size(name: str, out: np.ndarray, image: np.ndarray) -> bool:
    """The input's shape; a crop may cut, but neither grow nor leave nothing."""
    if name not in CROPS:
        return out.shape == image.shape
    return out.ndim == 3 and out.shape[2] == 3 and all(1 <= a <= b for a, b in zip(out.shape, image.shape, strict=True))


def damage(out: np.ndarray, image: np.ndarray) -> float:
    """Mean squared error; of a crop, which has no pixel to pixel error, the percentage of the picture that is gone."""
    if out.shape != image.shape:
        return 100 * (1 - out.size / image.size)
    return float(np.square(out - image.astype(float)).mean())


def observed() -> dict[str, list[str]]:
    """name@version/mode/HxW -> one hash per severity, for every corruption that declares itself exact."""
    hashes = {}
    for noise in image_noises().values():
        if noise.exactness == "exact":
            for mode in MODES:
                for height, width in SIZES:
                    image = scene(height, width)
                    hashes[f"{noise.name}@{noise.version}/{mode}/{height}x{width}"] = [
                        pixel_hash(call(image, noise.name, severity=s, key=key(height), mode=mode, seed=1))
                        for s in SEVERITIES
                    ]
    return hashes


def test_exact_corruptions_give_the_golden_bytes() -> None:
    assert observed() == json.loads(GOLDENS.read_text())


def test_the_instruction_set_does_not_change_a_byte() -> None:
    """A fresh process whose NumPy and OpenCV may use neither the vector instructions that this machine has, nor IPP,
    Intel's library of filters, which OpenCV has on some processors only."""
    vector = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    slow = {"NPY_DISABLE_CPU_FEATURES": " ".join(vector), "OPENCV_CPU_DISABLE": "AVX,AVX2,AVX512-SKX,FP16"}
    slow["OPENCV_IPP"] = "disabled"
    run = subprocess.run(
        [sys.executable, str(Path(__file__))], env=os.environ | slow, capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == json.loads(GOLDENS.read_text())


def test_a_fresh_process_in_another_order_gives_the_same_bytes() -> None:
    image = scene(40, 60)
    jobs = [(name, s) for name in NOISES for s in SEVERITIES]
    here = {f"{name}:{s}": pixel_hash(apply(image, name, severity=s, key=key(s))) for name, s in jobs}
    code = (
        "import sys, numpy as np; from bitquake.noise import *\n"
        "image = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(40, 60, 3)\n"
        "np.random.seed(3)\n"
        "for job in sys.argv[:0:-1]:\n"
        "    name, s = job.split(':')\n"
        "    print(job, pixel_hash(apply(image, name, severity=int(s), key=SampleKey('goldens', 'test', s))))\n"
    )
    command, env = [sys.executable, "-c", code, *here], os.environ | {"PYTHONHASHSEED": "77"}
    run = subprocess.run(command, input=image.tobytes(), env=env, capture_output=True, check=True)
    assert dict(line.split() for line in run.stdout.decode().splitlines()) == here


@any_noise
def test_threads_do_not_change_a_byte(name: str) -> None:
    image = scene(240, 320)
    jobs = [(s, i) for s in SEVERITIES for i in range(4)]
    alone = {job: pixel_hash(apply(image, name, severity=job[0], key=key(job[1]))) for job in jobs}
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        with ThreadPoolExecutor(4) as pool:
            together = pool.map(
                lambda job: pixel_hash(apply(image, name, severity=job[0], key=key(job[1]))), jobs[::-1]
            )
            assert dict(zip(jobs[::-1], together, strict=True)) == alone
        cv2.setNumThreads(1)
        assert pixel_hash(apply(image, name, severity=5, key=key(0))) == alone[5, 0]
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog"])
def test_distinct_samples_get_independent_noise(name: str) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    fields = np.stack([apply(grey, name, severity=2, key=key(i)).ravel() for i in range(40)]).astype(float)
    assert len({field.tobytes() for field in fields}) == 40
    pairs = np.corrcoef(fields)[np.triu_indices(40, 1)]
    assert abs(pairs.mean()) < 4 * pairs.std() / np.sqrt(40)
    if name != "fog":  # two fogs, each little more than a slope over 64 pixels, may well agree by chance
        assert np.abs(pairs).max() < 0.05


@pytest.mark.parametrize(
    ("name", "least"), [("gaussian_noise", 0.98), ("shot_noise", 0.9), ("speckle_noise", 0.98), ("fog", 0.7)]
)
def test_severities_share_one_field(name: str, least: float) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    fields = [apply(grey, name, severity=s, key=key(0)).ravel().astype(float) for s in (1, 2, 3)]
    assert np.corrcoef(fields).min() > least


@pytest.mark.parametrize("mode", MODES)
@any_noise
def test_quality_falls_with_severity(name: str, mode: str) -> None:
    """Mean squared error rises from severity to severity, on average over samples, in both modes and at both sizes."""
    for image in (scene(64, 64), scene(240, 320)):
        one, other = (call(image, name, severity=3, key=key(i), mode=mode) for i in range(2))
        samples = 1 if np.array_equal(one, other) else 16  # a noise that draws no numbers has one result
        errors = [
            np.mean([damage(call(image, name, severity=s, key=key(i), mode=mode), image) for i in range(samples)])
            for s in SEVERITIES
        ]
        if name in UNEVEN:  # frost darkens more as it whitens, saturate first fades, elastic stretches and then ripples
            assert max(errors) > 100, errors  # and scaled down to 64 pixels, all blocks but the largest are pixels
            continue
        # Scaled down to 64 pixels, glass blur's swaps stay whole pixels while its blur, which mends them, still grows.
        slack = 0.95 if (name, mode) == ("glass_blur", "scaled") else 1
        assert errors[0] > 5 and all(b >= slack * a for a, b in pairwise(errors)), errors
        assert errors[4] > 1.4 * errors[0]  # ImageNet-C's own zoom blur reaches 1.44 on the larger picture


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    name=st.sampled_from(NOISES),
    severity=st.sampled_from(SEVERITIES),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**64),
)
def test_any_size_keeps_shape_and_type_and_leaves_the_input_alone(
    height: int, width: int, name: str, severity: int, mode: str, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    image.flags.writeable = False
    out = call(image, name, severity=severity, key=key(0), mode=mode, seed=seed)
    assert out.dtype == np.uint8 and keeps_its_promise_of_size(name, out, image)
    assert np.array_equal(image, before)
    assert out.flags.writeable and out.flags.c_contiguous and not np.shares_memory(out, image)
    assert np.array_equal(out, call(image, name, severity=severity, key=key(0), mode=mode, seed=seed))


@any_noise
def test_extreme_shapes(name: str) -> None:
    for shape in ((1, 3000), (3000, 1), (2, 2), (1031, 9)):
        for mode in MODES:
            image = scene(*shape)
            assert keeps_its_promise_of_size(name, call(image, name, severity=5, key=key(0), mode=mode), image)


@any_noise
def test_flat_pictures_stay_finite(name: str) -> None:
    for level in (0, 255):
        flat = np.full((20, 30, 3), level, np.uint8)
        out = apply(flat, name, severity=5, key=key(0))
        if name.endswith("_blur") or name in ("contrast", "jpeg_compression"):
            assert np.array_equal(out, flat)


@any_noise
def test_scaled_equals_native_at_the_reference_size(name: str) -> None:
    image = scene(224, 300)
    for severity in (1, 5):
        native = apply(image, name, severity=severity, key=key(0))
        assert np.array_equal(native, apply(image, name, severity=severity, key=key(0), mode="scaled"))


def test_the_result_is_of_the_kind_given_and_its_pixels_do_not_depend_on_it() -> None:
    array = scene(20, 30)
    as_array = apply(array, "shot_noise", severity=2, key=key(0))
    as_image = apply(Image.fromarray(array), "shot_noise", severity=2, key=key(0))
    assert isinstance(as_image, Image.Image) and as_image.mode == "RGB" and as_image.size == (30, 20)
    assert isinstance(as_array, np.ndarray) and np.array_equal(as_array, np.asarray(as_image))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"):
        picture = Image.new(mode, (9, 6))
        assert apply(picture, "fog", severity=1, key=key(0)).mode == "RGB"
    assert apply(array[:, :, 0], "fog", severity=1, key=key(0)).shape == (20, 30, 3)
    assert apply(array[::2, ::-1], "fog", severity=1, key=key(0)).shape == (10, 30, 3)


@pytest.mark.parametrize("image", [None, b"", "photo.jpg", [[0]], np.zeros((4, 4, 3)), Image.new("RGB", (0, 1))])
def test_no_image_no_noise(image: object) -> None:
    with pytest.raises(ImageError):
        call(image, "fog", severity=1, key=key(0))


def test_every_corruption_declares_itself() -> None:
    noises = image_noises()
    assert {name: noise.id for name, noise in noises.items()} == IDS
    assert [noise.id for noise in noises.values()] == sorted(IDS.values())
    for name, noise in noises.items():
        assert isinstance(noise, ImageNoise) and noise.name == name
        assert noise.geometry == ("changed" if name in MOVING else "preserved")
        assert noise.exactness == ("build-dependent" if name in BUILD_DEPENDENT else "exact")
        extra = name in ("speckle_noise", "gaussian_blur", "spatter", "saturate")
        assert noise.group == ("camera" if noise.id >= 20 else "imagenet_c_extra" if extra else "imagenet_c")
        assert len(noise.parameters) == 5
        for word in ("Parameters:", "ImageNet-C", "spatial", *noise.parameters[0]):
            assert word in noise.documentation
    noises.clear()
    assert len(image_noises()) == len(IDS)  # the caller got a copy


def test_a_corruption_cannot_take_another_ones_name_or_id() -> None:
    values = {"amount": (1.0, 2.0, 3.0, 4.0, 5.0)}

    def fog(image: Any, parameters: Any, stream: Any) -> Any:
        return image

    def sleet(image: Any, parameters: Any, stream: Any) -> Any:
        return image

    for corrupt, number, table in ((fog, 99, values), (sleet, 4, values), (sleet, 99, {"amount": (1.0, 2.0)})):
        with pytest.raises(ValueError, match=corrupt.__name__):
            image_noise(id=number, version=1, exactness="exact", group="imagenet_c", parameters=table)(corrupt)
    assert list(image_noises()) == NOISES


def test_the_room_imports_nothing_heavy() -> None:
    code = "import sys, bitquake.noise; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lmms_eval", "datasets", "scipy", "transformers"} & set(run.stdout.split())


def test_working_memory_stays_below_eight_times_the_picture() -> None:
    """Measured by tracemalloc, which sees NumPy's buffers; OpenCV's and Pillow's own are a copy of the picture each."""
    import tracemalloc

    image = scene(480, 640)
    for name in NOISES:
        for mode in MODES:
            call(image, name, severity=5, key=key(0), mode=mode)  # tables are made once
            tracemalloc.start()
            call(image, name, severity=5, key=key(0), mode=mode)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 * image.nbytes, (name, mode, peak / image.nbytes)


if __name__ == "__main__":
    print(json.dumps(observed(), indent=1))
