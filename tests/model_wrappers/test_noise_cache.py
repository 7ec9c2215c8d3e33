"""``noise_cache=DIR`` of the wrapper, on block-world tasks inside the real lmms-eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitquake.model_wrappers.samples import from_noise_cache
from bitquake.noise import NoiseCache, SampleKey, known_pixel_hash, move_box, pixel_hash
from bitquake.noise import cache as cache_module

Load = Callable[..., Any]
N = 12
MOVES = "block_refcocoplus_off_centre_crop_5"
TEST = "test"
TASKS = ("block_vqav2_gaussian_noise_3", MOVES, "block_vqav2_keyboard_typos_3", "block_vqav2_clean")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    import lmms_eval.models  # noqa: F401  (registers our tasks)
    from lmms_eval.tasks import TaskManager, get_task_dict

    found: dict[str, Any] = get_task_dict(list(TASKS), TaskManager(include_defaults=False), "chat")
    for task in found.values():
        task.build_all_requests(limit=N, rank=0, world_size=1)
    return found


def evaluate(model: Any, tasks: dict[str, Any]) -> dict[str, list[str]]:
    responses = {}
    for name, task in tasks.items():
        model.task_dict[name] = {task.instances[0].args[5]: task.eval_docs}
        responses[name] = [result.text for result in model.generate_until(task.instances)]
    return responses


def test_answers_records_and_pixels_do_not_depend_on_it(
    load: Load, tasks: dict[str, Any], tmp_path: Path, log: list[str]
) -> None:
    plain = load(batch_size=5)
    expected = evaluate(plain, tasks)
    assert plain.noise_cache_counts is None
    first = load(batch_size=5, noise_cache=str(tmp_path / "noise"))
    assert evaluate(first, tasks) == expected
    assert first.noise_cache_counts == {"hits": 0, "misses": 2 * N}  # neither the clean pictures nor the typos'
    # another quantization of the same task, in other batches: the pictures are there
    second = load(batch_size=3, workers=0, quant="uniform-int4", noise_cache=str(tmp_path / "noise"))
    answers = evaluate(second, tasks)
    assert second.noise_cache_counts == {"hits": 2 * N, "misses": 0}
    told = [line for line in log if "noise cache" in line]
    assert sum(f"0 of {N} noisy pictures (0%) came from the noise cache" in line for line in told) == 2
    assert sum(f"{N} of {N} noisy pictures (100%) came from the noise cache" in line for line in told) == 2
    assert len(told) == 4
    assert sum(f"noise_cache_hits: {N}, noise_cache_misses: 0" in line for line in log) == 2

    for name, task in tasks.items():
        for at, doc in enumerate(task.eval_docs.select(range(N))):
            seen, then = (task.process_results(doc, [given[name][at]])["bitquake"] for given in (expected, answers))
            assert seen["pixel_hash"] == then["pixel_hash"]
            [picture] = task.doc_to_visual(doc)
            assert seen["pixel_hash"] == [pixel_hash(picture)]
            if name == MOVES:  # the picture on a hit is the one that boxes are moved into
                [cached] = pictures_of(from_noise_cache(task.doc_to_messages, second._noise_cache)(doc))
                ids = doc["bitquake"]
                size = ids["width"], ids["height"]
                key = SampleKey(task.config.metadata["bitquake"]["dataset"], TEST, ids["sample_id"])
                middle = (size[0] / 2 - 1, size[1] / 2 - 1, size[0] / 2 + 1, size[1] / 2 + 1)
                moved = move_box(middle, size, "off_centre_crop", severity=5, key=key, mode="scaled")
                assert moved is not None
                assert cached.size == moved[1] != size
                assert pixel_hash(cached) == seen["pixel_hash"][0]


def pictures_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    return [part["url"] for message in messages for part in message["content"] if part["type"] == "image"]


def test_requests_that_others_hold_are_not_touched(tasks: dict[str, Any], tmp_path: Path) -> None:
    task = tasks[TASKS[0]]
    cache = NoiseCache(tmp_path, 10**9)
    original = task.doc_to_messages
    cached = from_noise_cache(original, cache)
    doc = task.eval_docs[0]
    before = task.config.doc_to_visual
    pictures = [cached(doc)[0]["content"][0]["url"] for _ in range(2)]
    assert cache.counts == {"hits": 1, "misses": 1}
    pictures.append(original(doc)[0]["content"][0]["url"])
    assert cache.counts == {"hits": 1, "misses": 1}
    assert task.config.doc_to_visual is before
    assert all(np.array_equal(np.asarray(picture), np.asarray(pictures[0])) for picture in pictures)
    # a task of somebody else's
    stranger = lambda doc: doc  # noqa: E731
    assert from_noise_cache(stranger, cache) is stranger


def test_a_picture_that_fails_fails_alike(load: Load, tasks: dict[str, Any], tmp_path: Path) -> None:
    model = load(batch_size=4, noise_cache=str(tmp_path))
    name = TASKS[0]
    docs = [dict(doc) for doc in tasks[name].eval_docs.select(range(N))]
    docs[3]["image"] = b"broken"
    split = tasks[name].instances[0].args[5]
    model.task_dict[name] = {split: docs}
    responses = [result.text for result in model.generate_until(tasks[name].instances)]
    records = [tasks[name].process_results(doc, [text])["bitquake"] for doc, text in zip(docs, responses, strict=True)]
    assert [record["failure"] for record in records] == ["image" if at == 3 else None for at in range(N)]
    assert model.noise_cache_counts == {"hits": 0, "misses": N - 1}


def test_stock_tasks_with_our_noise_use_it(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A family that extends a stock task may have messages of its own; its pictures are PIL's."""
    from bitquake.noise import NoiseSpec, SampleKey
    from bitquake.tasks.extended import ExtendedTask

    task = object.__new__(ExtendedTask)
    task.noise, task.noise_cache = NoiseSpec("fog", 2), NoiseCache(tmp_path, 10**9)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    expected = task.noise.apply(np.asarray(picture), SampleKey("a", "b", "c"))
    for _ in range(2):
        made = task.picture(picture, SampleKey("a", "b", "c"))
        assert np.array_equal(np.asarray(made), expected)
        assert known_pixel_hash(made) == pixel_hash(expected)
        for other in (made.copy(), made.resize((30, 20)), made.crop((0, 0, 9, 9))):  # its pixels may be others
            assert known_pixel_hash(other) == ""
    assert task.noise_cache.counts == {"hits": 1, "misses": 1}


@pytest.mark.parametrize("gigabytes", ["none", "many", 0, -1, float("inf"), float("nan")])
def test_a_size_that_is_none_is_refused(load: Load, tmp_path: Path, gigabytes: Any) -> None:
    with pytest.raises(ValueError, match="noise_cache_gb must be a number above 0"):
        load(noise_cache=str(tmp_path), noise_cache_gb=gigabytes)


def test_a_folder_that_cannot_be_made_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"noise_cache=.*cannot be made"):
        load(noise_cache=str(tmp_path / "file" / "noise"))


def test_a_full_disk_costs_the_cache_and_nothing_else(
    load: Load, tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    name = TASKS[0]
    expected = evaluate(load(batch_size=5), {name: tasks[name]})
    model = load(batch_size=5, noise_cache=str(tmp_path / "full"))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.Path, "write_bytes", full)
        assert evaluate(model, {name: tasks[name]}) == expected
    assert model.noise_cache_counts == {"hits": 0, "misses": N}
    assert any("the noise cache is only read" in line and "No space left" in line for line in log)
