"""The cache of corrupted pictures: never another pixel, bounded, and indifferent to damage, kills and neighbours."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitquake.noise import ImageError, NoiseCache, NoiseError, NoiseSpec, SampleKey, image_noises, load_rgb, pixel_hash
from bitquake.noise import cache as module

GIGABYTE = 10**9
rng = np.random.default_rng(7)


def key(sample: object) -> SampleKey:
    return SampleKey("photos", "test", str(sample))


def encoded(height: int = 24, width: int = 32, *, seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.rgb"))


def on_disk(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.glob("??/*"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> NoiseCache:
    return NoiseCache(tmp_path_factory.mktemp("noise"), GIGABYTE)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(list(image_noises())),
    st.integers(1, 5),
    st.integers(0, 2),
    st.sampled_from(["native", "scaled"]),
    st.sampled_from(["PNG", "JPEG", "WEBP", "array", "picture"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 3),
)
def test_the_same_pixels_with_and_without(
    shared: NoiseCache, name: str, severity: int, seed: int, mode: str, kind: str, size: tuple[int, int], sample: int
) -> None:
    spec = NoiseSpec(name, severity, seed, mode=mode)  # type: ignore[arg-type]
    source: object = encoded(*size, seed=sample, kind="PNG" if kind in ("array", "picture") else kind)
    if kind in ("array", "picture"):
        source = load_rgb(source) if kind == "array" else Image.fromarray(load_rgb(source))
    expected = spec.apply(load_rgb(source), key(sample))
    before = shared.counts
    for _ in range(2):
        pixels, digest = shared.picture(spec, source, key(sample))
        assert digest == pixel_hash(expected)
        assert pixels.dtype == np.uint8
        assert pixels.shape == expected.shape
        assert np.array_equal(pixels, expected)
    after = shared.counts
    assert after["hits"] - before["hits"] >= 1  # the second time at least
    assert sum(after.values()) - sum(before.values()) == 2


def test_everything_that_decides_a_pixel_is_in_the_name(tmp_path: Path) -> None:
    cache = NoiseCache(tmp_path, GIGABYTE)
    asked = [
        (NoiseSpec("gaussian_noise", 3), encoded(), key(1)),
        (NoiseSpec("gaussian_noise", 4), encoded(), key(1)),
        (NoiseSpec("speckle_noise", 3), encoded(), key(1)),
        (NoiseSpec("gaussian_noise", 3, seed=1), encoded(), key(1)),
        (NoiseSpec("gaussian_noise", 3, mode="scaled"), encoded(), key(1)),
        (NoiseSpec("gaussian_noise", 3), encoded(seed=1), key(1)),
        (NoiseSpec("gaussian_noise", 3), encoded(), key(2)),
        (NoiseSpec("gaussian_noise", 3), encoded(), SampleKey("photos", "tes", "t1")),
        (NoiseSpec("gaussian_noise", 3), load_rgb(encoded()), key(1)),
        (NoiseSpec("gaussian_noise", 3), load_rgb(encoded()).reshape(32, 24, 3), key(1)),
    ]
    for spec, source, sample in asked:
        assert np.array_equal(cache.apply(spec, source, sample), spec.apply(load_rgb(source), sample))
    assert cache.counts == {"hits": 0, "misses": len(asked)}
    assert len(entries(tmp_path)) == len(asked)


def test_another_environment_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, cache = NoiseSpec("jpeg_compression", 3), NoiseCache(tmp_path, GIGABYTE)
    cache.apply(spec, encoded(), key(1))
    monkeypatch.setattr(module, "_environment", lambda: "another Pillow")
    cache.apply(spec, encoded(), key(1))
    assert cache.counts == {"hits": 0, "misses": 2}


def test_another_object_and_another_process_find_what_is_there(tmp_path: Path) -> None:
    spec = NoiseSpec("fog", 2)
    first = NoiseCache(tmp_path, GIGABYTE).apply(spec, encoded(), key(1))
    again = NoiseCache(tmp_path, GIGABYTE)
    assert np.array_equal(again.apply(spec, encoded(), key(1)), first)
    assert again.counts == {"hits": 1, "misses": 0}
    script = (
        "import sys; from pathlib import Path; from bitquake.noise import *\n"
        "cache = NoiseCache(Path(sys.argv[1]), 10**9)\n"
        "print(pixel_hash(cache.apply(NoiseSpec('fog', 2), Path(sys.argv[2]).read_bytes(), "
        "SampleKey('photos', 'test', '1'))), cache.counts['hits'])"
    )
    from bitquake.noise import pixel_hash

    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded())
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(picture)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [pixel_hash(first), "1"]


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "header", "pixel", "check", "another's", "a folder"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    spec, cache = NoiseSpec("gaussian_noise", 3), NoiseCache(tmp_path, GIGABYTE)
    expected = cache.apply(spec, encoded(), key(1)).copy()
    [path] = entries(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "another's":
        cache.apply(spec, encoded(), key(2))
        [other] = [entry for entry in entries(tmp_path) if entry != path]
        content[:] = other.read_bytes()
    elif damage in ("empty", "cut"):
        del content[0 if damage == "empty" else len(content) // 2 :]
    elif damage == "longer":
        content += b"x"
    else:
        at = {"header": 26, "pixel": 200, "check": len(content) - 1, "a folder": 0}[damage]
        content[at] ^= 1
    path.write_bytes(content)
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    before = cache.counts
    assert np.array_equal(cache.apply(spec, encoded(), key(1)), expected)
    assert cache.counts["misses"] == before["misses"] + 1
    if damage != "a folder":  # it cannot be replaced: the picture is made each time
        assert np.array_equal(cache.apply(spec, encoded(), key(1)), expected)
        assert cache.counts["hits"] == before["hits"] + 1


def test_what_cannot_be_made_is_not_stored(tmp_path: Path) -> None:
    cache = NoiseCache(tmp_path, GIGABYTE)
    for source in (b"", b"broken", None, encoded()[:60]):
        with pytest.raises(ImageError):
            cache.apply(NoiseSpec("fog", 1), source, key(1))
    with pytest.raises(NoiseError, match="text noise"):
        cache.apply(NoiseSpec("keyboard_typos", 1), encoded(), key(1))
    assert entries(tmp_path) == []


def in_one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """All entries in one folder, which gets all of the bound: a small cache can be filled with few pictures."""
    monkeypatch.setattr(module, "_SHARDS", 1)
    original = module._name
    monkeypatch.setattr(module, "_name", lambda *parts: "00" + original(*parts)[2:])


def test_it_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_shard(monkeypatch)
    bound = 40 * 4096  # 40 pictures
    cache, spec, source = NoiseCache(tmp_path, bound), NoiseSpec("contrast", 1), encoded()
    for sample in range(200):
        cache.apply(spec, source, key(sample))
        assert on_disk(tmp_path) <= bound
    assert on_disk(tmp_path) >= bound * 3 // 4


def test_of_a_suite_that_does_not_fit_the_same_part_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures in the same order again and again, twice as many as fit: near half of them must be hits."""
    in_one_shard(monkeypatch)
    spec, source, n = NoiseSpec("contrast", 1), encoded(), 160
    for turn in range(4):
        cache = NoiseCache(tmp_path, n // 2 * 4096)  # a process of its own, in effect
        for sample in range(n):
            cache.apply(spec, source, key(sample))
        if turn:
            assert cache.counts["hits"] >= 0.35 * n


def test_what_nobody_uses_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_shard(monkeypatch)
    spec, bound = NoiseSpec("contrast", 1), 64 * 4096
    cache = NoiseCache(tmp_path, bound)
    for sample in range(48):
        cache.apply(spec, encoded(), key(f"old {sample}"))
    month_ago = time.time() - 30 * 86_400
    for path in entries(tmp_path):
        os.utime(path, (month_ago, month_ago))
    kept = set(range(24))
    for sample in kept:  # used again: no longer old
        cache.apply(spec, encoded(), key(f"old {sample}"))
    for sample in range(28):
        NoiseCache(tmp_path, bound).apply(spec, encoded(), key(f"new {sample}"))
    again = NoiseCache(tmp_path, bound)
    for sample in kept:
        again.apply(spec, encoded(), key(f"old {sample}"))
    for sample in range(28):
        again.apply(spec, encoded(), key(f"new {sample}"))
    assert again.counts == {"hits": 24 + 28, "misses": 0}


def test_remains_of_a_killed_process_are_cleared_away(tmp_path: Path) -> None:
    spec, source = NoiseSpec("contrast", 1), encoded()
    NoiseCache(tmp_path, GIGABYTE).apply(spec, source, key(1))
    [path] = entries(tmp_path)
    old, new = path.with_name("old.part"), path.with_name("new.part")
    old.write_bytes(b"x" * 100)
    new.write_bytes(b"x" * 100)
    os.utime(old, (time.time() - 86_400,) * 2)
    path.unlink()
    NoiseCache(tmp_path, GIGABYTE).apply(spec, source, key(1))
    assert not old.exists()
    assert new.exists()  # perhaps being written right now
    assert path.exists()


def test_a_picture_larger_than_its_share_is_made_each_time(tmp_path: Path) -> None:
    cache, spec = NoiseCache(tmp_path, 256 * 4096), NoiseSpec("contrast", 1)
    large = encoded(64, 64)
    for _ in range(2):
        assert np.array_equal(cache.apply(spec, large, key(1)), spec.apply(load_rgb(large), key(1)))
    assert cache.counts == {"hits": 0, "misses": 2}
    assert cache.problem == ""
    assert not list(tmp_path.glob("??/*"))


def test_a_folder_that_cannot_be_written_is_told_and_costs_nothing_else(tmp_path: Path) -> None:
    cache, spec = NoiseCache(tmp_path, GIGABYTE), NoiseSpec("contrast", 1)
    names = [module._name(spec, encoded(), key(sample))[:2] for sample in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(b"a file where a folder should be")
    for sample in range(2):
        pixels = cache.apply(spec, encoded(), key(sample))
        assert np.array_equal(pixels, spec.apply(load_rgb(encoded()), key(sample)))
    assert cache.counts == {"hits": 0, "misses": 2}
    assert names[0] in cache.problem


@pytest.mark.parametrize("bound", [0, -1])
def test_a_cache_without_room_is_refused(tmp_path: Path, bound: int) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        NoiseCache(tmp_path, bound)


FILL = """
import random, sys
from pathlib import Path
import numpy as np
from bitquake.noise import NoiseCache, NoiseSpec, SampleKey, cache as module, load_rgb
module._SHARDS = 1
name = module._name
module._name = lambda *parts: "00" + name(*parts)[2:]
folder, bound, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cache, spec, source = NoiseCache(folder, bound), NoiseSpec("gaussian_noise", 2), Path(sys.argv[4]).read_bytes()
samples = list(range(60)) * 4
random.Random(seed).shuffle(samples)
for sample in samples:
    key = SampleKey("photos", "test", str(sample))
    assert np.array_equal(cache.apply(spec, source, key), spec.apply(load_rgb(source), key)), sample
    assert cache.problem == "", cache.problem
print(cache.counts["hits"])
"""


def test_processes_and_threads_write_read_and_delete_at_once(tmp_path: Path) -> None:
    picture, folder, bound = tmp_path / "picture.png", tmp_path / "cache", 32 * 4096
    picture.write_bytes(encoded())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(folder), str(bound), str(seed), str(picture)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for process in started:
        out, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
        assert int(out) > 0
    assert on_disk(folder) <= bound + 2 * max(4096, bound // 16)

    cache, spec = NoiseCache(folder, GIGABYTE), NoiseSpec("gaussian_noise", 2)
    expected = [spec.apply(load_rgb(encoded()), key(sample)) for sample in range(20)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda sample: cache.apply(spec, encoded(), key(sample % 20)), range(160)))
    assert all(np.array_equal(pixels, expected[at % 20]) for at, pixels in enumerate(made))
    assert sum(cache.counts.values()) == 160
