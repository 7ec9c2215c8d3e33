"""Nothing but the arguments changes a pixel or a letter: not order, process, rank, batch, resume, threads, or NumPy.

``python tests/noise/test_determinism.py START STOP STEP`` prints the hashes of that part of a study's samples, as one
process of many would compute it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

from bitquake.noise import SampleKey, apply, apply_text, image_noises, pixel_hash, text_noises

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 180, 240  # more than one of the bands and chunks that noises work in
QUESTION = "How many people in the picture are wearing red hats, and who is sitting on the wooden bench over there?"


class Sample(NamedTuple):
    """One row of a noisy task."""

    noise: str
    severity: int
    mode: str
    number: int


def study() -> list[Sample]:
    """Every image noise in both modes on two pictures, every text noise on twelve questions, at changing severities."""
    work = [(name, mode, k) for name in image_noises() for mode in ("native", "scaled") for k in range(2)]
    work += [(name, "native", k) for name in text_noises() for k in range(12)]
    rows = [Sample(name, 1 + i % 5, mode, number) for i, (name, mode, number) in enumerate(work)]
    random.Random(5).shuffle(rows)
    return rows


def picture(number: int) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.int64)
    waves = [(x * (3 + number) + y * k * k) % 97 * 2 + (x // 20 + y // (9 + k)) % 2 * 50 for k in (1, 2, 3)]
    return np.stack(waves, axis=2).clip(0, 255).astype(np.uint8)


def digest(sample: Sample, image: np.ndarray | None = None) -> str:
    key = SampleKey("study", "test", str(sample.number))
    if sample.noise in text_noises():
        text = apply_text(f"{QUESTION} {sample.number}", sample.noise, severity=sample.severity, key=key)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    mode: Any = sample.mode
    image = picture(sample.number) if image is None else image
    return pixel_hash(apply(image, sample.noise, severity=sample.severity, key=key, mode=mode))


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The hashes as one process computes them, one sample after the other."""
    return [digest(sample) for sample in study()]


def in_a_process(part: slice, **environment: str) -> list[str]:
    total = len(study())
    command = [sys.executable, __file__, *map(str, part.indices(total))]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    out: list[str] = json.loads(run.stdout)
    return out


def test_the_study_tells_samples_apart(expected: list[str]) -> None:
    """Were the hashes mostly equal, the tests below would prove nothing."""
    assert {sample.noise for sample in study()} == {*image_noises(), *text_noises()}
    assert len(set(expected)) > 0.95 * len(expected)


def test_ranks_with_other_hash_seeds_threads_and_memory(expected: list[str]) -> None:
    """Three processes share the samples. Each has its own hash seed and thread counts, and fresh memory full of bytes
    that would show in a result which reads memory before writing it."""
    for rank, threads in enumerate(("1", "2", "5")):
        part = slice(rank, None, 3)
        environment = {
            "PYTHONHASHSEED": str(rank + 1),
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "OPENCV_FOR_THREADS_NUM": threads,
            "MALLOC_PERTURB_": str(60 * rank + 7),
        }
        assert in_a_process(part, **environment) == expected[part]


def test_a_run_that_goes_on_in_the_middle(expected: list[str]) -> None:
    middle = slice(2 * len(expected) // 3, None)
    assert in_a_process(middle) == expected[middle]


def test_any_order_in_many_threads(expected: list[str]) -> None:
    places = list(enumerate(study()))
    random.Random(7).shuffle(places)
    np.random.seed(1)
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        with ThreadPoolExecutor(4) as pool:
            digests = list(pool.map(lambda place: digest(place[1]), places))
    finally:
        cv2.setNumThreads(before)
    assert digests == [expected[i] for i, _ in places]


def test_a_sample_in_a_batch_is_the_sample_alone(expected: list[str]) -> None:
    """Pictures that are views into one array, in both memory orders, beside others and beside themselves."""
    batch = np.stack([picture(0), picture(1), picture(0)])
    channels_first = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    for sample, alone in zip(study(), expected, strict=True):
        if sample.noise in image_noises() and sample.mode == "native":
            assert digest(sample, batch[sample.number]) == alone
            assert digest(sample, channels_first[sample.number].transpose(1, 2, 0)) == alone
    assert np.array_equal(batch, np.stack([picture(0), picture(1), picture(0)]))


@pytest.mark.network
def test_a_second_numpy_gives_the_golden_bytes_and_texts(tmp_path: Path) -> None:
    """Goldens again under the other major version of NumPy, with an OpenCV built for it, in a fresh environment."""
    old = np.__version__.startswith("2.")
    if old and sys.version_info >= (3, 13):
        pytest.skip("NumPy 1.26, the other version that is supported, has no wheels for Python 3.13")
    wanted = ["numpy==1.26.*", "opencv-python-headless<4.12"] if old else ["numpy>=2", "opencv-python-headless>=4.12"]
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted, "pillow", "pytest", "hypothesis"], check=True)
    package = tmp_path / "source" / "bitquake"
    package.mkdir(parents=True)
    (package / "__init__.py").symlink_to(ROOT / "bitquake" / "__init__.py")
    (package / "noise").symlink_to(ROOT / "noise")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}

    def output(*arguments: str) -> str:
        return subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, check=True).stdout

    other = output("-c", "import numpy; print(numpy.__version__)").strip()
    assert other.partition(".")[0] != np.__version__.partition(".")[0]
    for script, goldens in (("test_apply.py", "goldens.json"), ("test_text.py", "text_goldens.json")):
        written = json.loads(Path(__file__).with_name(goldens).read_text(encoding="utf-8"))
        assert json.loads(output(str(Path(__file__).with_name(script)))) == written, f"NumPy {other}"


if __name__ == "__main__":
    start, stop, step = map(int, sys.argv[1:])
    print(json.dumps([digest(sample) for sample in study()[start:stop:step]]))
