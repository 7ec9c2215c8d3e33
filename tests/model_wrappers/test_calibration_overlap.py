"""A model must not be evaluated on pictures that it was calibrated on: by pixels, by a dataset's ids, under noise."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from bitquake.model_wrappers.calibration import (
    CalibratedOn,
    CalibrationError,
    OverlapError,
    load_image_ids,
    refuse_overlap,
    store_image_ids,
)
from bitquake.model_wrappers.calibration.sources import find_source
from bitquake.model_wrappers.generation import GenerationRequest
from bitquake.model_wrappers.loading import load_processor, resolve_pretrained
from bitquake.model_wrappers.quantizers.spec import CalibrationSpec
from bitquake.model_wrappers.samples import Sample, prepare
from bitquake.model_wrappers.task_contract import TaskContract
from bitquake.noise import pixel_hash
from bitquake.tasks.expand import builtin_index
from bitquake.tasks.glue import read_task
from bitquake.tasks.strict_yaml import load_task_yaml

BLOCK = "bitquake/block-idefics3"


class Asked:
    """A task of the block world as requests hold it: its config, and its documents."""

    def __init__(self, name: str, n: int = 40) -> None:
        file = builtin_index().tasks[name]
        base = load_task_yaml((file.parent / "_base_yaml").read_text())
        self.config = SimpleNamespace(metadata=base["metadata"])
        self.name, self.task = name, read_task(file)
        kwargs = {"pre_prompt": "", "post_prompt": "", "noise": self.task.noise_as_written}
        self.kwargs = kwargs
        rows = datasets.Dataset.from_parquet(str(self.task.data_file), split=self.task.split)
        self.docs = self.task.prepared(rows).select(range(n))

    def doc_to_messages(self, doc: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": one} for one in self.task.doc_to_visual(doc, self.kwargs)]
        text = {"type": "text", "text": self.task.doc_to_text(doc, self.kwargs)}
        return [{"role": "user", "content": [*content, text]}]

    def prepared(self, calibrated: CalibratedOn | None, trained: tuple[CalibratedOn, ...] = ()) -> list[Sample]:
        processor = load_processor(resolve_pretrained(BLOCK), revision=None, trust_remote_code=False)
        contract = TaskContract.of(self.doc_to_messages, self.name)
        documents = {self.name: {"test": self.docs}}
        return [
            prepare(
                Sample(i, self.name, contract, GenerationRequest(8)),
                ("", self.doc_to_messages, {}, i, self.name, "test"),
                documents,
                processor,
                "idefics3",
                calibrated,
                trained=trained,
            )
            for i in range(len(self.docs))
        ]


def calibrated_on(**spec: Any) -> CalibratedOn:
    config = SimpleNamespace(model_type="idefics3", vision_config=SimpleNamespace(image_size=64))
    source = find_source(CalibrationSpec(**spec), config, pretrained=BLOCK)
    samples = (source.sample(i) for i in range(len(source)))
    return CalibratedOn("gptq-int3-g64", frozenset(name for one in samples for name in one.image_ids))


@pytest.fixture(scope="module")
def calibration() -> CalibratedOn:
    """All of block_vqav2's calibration split."""
    return calibrated_on(source="in-domain")


@pytest.mark.parametrize("name", ["block_vqav2_clean", "block_vqav2_fog_3", "block_vqav2_threshold"])
def test_the_block_world_s_splits_share_no_picture(calibration: CalibratedOn, name: str) -> None:
    assert len(calibration.image_ids) > 200
    assert all(sample.error is None for sample in Asked(name).prepared(calibration))


@pytest.mark.parametrize("name", ["block_vqav2_clean", "block_vqav2_fog_5", "block_vqav2_keyboard_typos_1"])
@pytest.mark.parametrize("kind", ["pixels:", "block_vqav2:"])
def test_an_evaluation_on_a_calibration_picture_ends(name: str, kind: str) -> None:
    """The 20th document's picture, before its noise, or its id: known by either alone."""
    asked = Asked(name, 24)
    doc = asked.docs[20]
    names = {f"pixels:{pixel_hash(doc['image'])}", f"block_vqav2:{doc['image_id']}"}
    (known,) = (one for one in names if one.startswith(kind))
    with pytest.raises(OverlapError) as raised:
        asked.prepared(CalibratedOn("awq-int4-g128", frozenset({known, "pixels:other"})))
    message = str(raised.value)
    first = next(i for i in range(24) if asked.docs[i]["image_id"] == doc["image_id"])
    assert message.startswith(f"task {name!r}, document {first}: its picture {known} is one of")
    assert "awq-int4-g128 was calibrated on" in message and "calibration.data=FAMILY" in message
    assert asked.prepared(None)[20].error is None  # a model that saw nothing may answer


def test_a_picture_that_the_model_or_its_adapter_was_trained_on_is_refused() -> None:
    asked = Asked("block_vqav2_clean", n=6)
    nothing = CalibratedOn("the model of training 01234567", frozenset({"pixels:other"}), "trained")
    assert all(not sample.error for sample in asked.prepared(None, (nothing,)))
    known = CalibratedOn(
        "the adapter of training 89abcdef", frozenset({f"pixels:{pixel_hash(asked.docs[5]['image'])}"}), "trained"
    )
    with pytest.raises(
        OverlapError, match=r"that the adapter of training 89abcdef was trained on.*without: \[FAMILY\]"
    ):
        asked.prepared(None, (nothing, known))


def test_a_corrupted_calibration_picture_is_known_by_the_clean_one(calibration: CalibratedOn) -> None:
    noisy = calibrated_on(source="corrupted-in-domain", noise="glass_blur", severity=5)
    assert noisy.image_ids == calibration.image_ids


def test_any_other_task_s_pictures_are_looked_at(chat_task: Any, random_docs: Any, load: Any) -> None:
    """Rows of a stock task: pictures that lmms-eval has decoded, in any column."""
    docs, model = random_docs(4), load()
    crop = docs[2]["image"].crop((0, 0, 9, 9))
    docs[2] = {**docs[2], "all": [docs[2]["image"]], "image": crop}
    task = chat_task(docs)
    for one in (crop, docs[2]["all"][0]):
        seen = CalibratedOn("q", frozenset({f"pixels:{pixel_hash(one)}"}))
        for i in range(4):
            sample = Sample(i, "task", TaskContract(), GenerationRequest(8))
            arguments = ("", task.doc_to_messages, {}, i, "task", "test")
            if i == 2:
                with pytest.raises(OverlapError, match="task 'task', document 2"):
                    prepare(sample, arguments, {"task": {"test": docs}}, model.processor, "idefics3", seen)
            else:
                prepare(sample, arguments, {"task": {"test": docs}}, model.processor, "idefics3", seen)
                assert sample.error is None


def test_the_run_ends_without_results(
    chat_task: Any, random_docs: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs, model = random_docs(12), load()
    seen = CalibratedOn("gptq-int3-g64", frozenset({f"pixels:{pixel_hash(docs[9]['image'])}"}))
    monkeypatch.setattr(model, "_calibrated", seen)
    with pytest.raises(OverlapError, match=r"task 'task', document 9: .*gptq-int3-g64"):
        chat_task(docs).run(model)
    assert len(chat_task(docs[:9]).run(model)) == 9


def test_a_picture_that_does_not_decode_costs_one_sample(chat_task: Any, load: Any) -> None:
    docs = [{"question": "what", "image": OSError("gone"), "other": Image.new("RGB", (0, 0))}]
    sample = Sample(0, "task", TaskContract(), GenerationRequest(8))
    arguments = ("", chat_task(docs).doc_to_messages, {}, 0, "task", "test")
    prepare(
        sample, arguments, {"task": {"test": docs}}, load().processor, "idefics3", CalibratedOn("q", frozenset("x"))
    )
    assert (sample.error or "").startswith("image: gone")


def test_names_are_kept_by_their_content(tmp_path: Path) -> None:
    ids = frozenset({"pixels:1", "coco:2", "ü:3"})
    name = store_image_ids(ids, tmp_path / "artifacts")
    assert store_image_ids(sorted(ids, reverse=True), tmp_path / "artifacts") == name
    assert load_image_ids(name, tmp_path / "none", tmp_path / "artifacts") == ids
    assert store_image_ids(ids | {"x"}, tmp_path / "artifacts") != name
    file = tmp_path / "artifacts" / "calibration" / f"{name}.json"
    assert set(json.loads(file.read_text())["image_ids"]) == ids
    for text in (file.read_text().replace("coco", "moco"), "{", '{"image_ids": [1]}', "[]"):
        file.write_text(text)
        with pytest.raises(CalibrationError, match="is damaged"):
            load_image_ids(name, tmp_path / "artifacts")
    file.unlink()
    with pytest.raises(CalibrationError, match=r"(?s)listed nowhere here.*artifacts"):
        load_image_ids(name, tmp_path / "artifacts")


def test_several_processes_may_store_at_once(tmp_path: Path) -> None:
    ids = {f"pixels:{i}" for i in range(3000)}
    threads = [threading.Thread(target=store_image_ids, args=(ids, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = (tmp_path / "calibration").iterdir()
    assert load_image_ids(file.stem, tmp_path) == ids


def test_refusal_counts_pictures_not_names() -> None:
    seen = CalibratedOn("q", frozenset({"pixels:1", "a:1", "pixels:2", "a:2"}))
    refuse_overlap(seen, ["pixels:3", "b:1"], "here")
    with pytest.raises(OverlapError, match="here: its picture a:2 is one of the 2 that q was calibrated on"):
        refuse_overlap(seen, ["pixels:3", "a:2"], "here")
    refuse_overlap(CalibratedOn("text only", frozenset()), [f"pixels:{np.random.default_rng().integers(9)}"], "here")
