"""Training examples: batches against samples one by one, order and resuming, and what is left out."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bitquake.model_wrappers.calibration import families
from bitquake.model_wrappers.calibration.encoding import Encoder
from bitquake.model_wrappers.calibration.sample import CalibrationError, CalibrationSample
from bitquake.model_wrappers.loading import load_processor
from bitquake.model_wrappers.training.config import load_training
from bitquake.model_wrappers.training.examples import (
    BatchEncoder,
    Conversations,
    Example,
    ExampleError,
    Examples,
    FamilyExamples,
    Place,
)
from bitquake.noise import pixel_hash
from bitquake.tasks.world import build

ARCHITECTURES = (
    "blip-2", "idefics3", "llava", "llava_onevision", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
SHARED = ("idefics3", "qwen2_vl")


def processor_of(tiny: Any, name: str) -> Any:
    return load_processor(str(tiny.checkpoint(name)), revision=None, trust_remote_code=False)


def examples_of(
    tiny: Any, folder: Path | list[Any], name: str = "idefics3", *, rank: int = 0, processes: int = 1, **keys: Any
) -> Examples:
    data = [str(folder)] if isinstance(folder, Path) else folder
    values = {"method": "qat", "pretrained": name, "bits": 4, "data": data, "steps": 1, "batch_size": 4,
              "validation_samples": 1, "loader_threads": 0, **keys}  # fmt: skip
    return Examples(load_training(values), tiny.make(name), processor_of(tiny, name), rank=rank, processes=processes)


def rows(loaded: Any) -> list[tuple[int, ...]]:
    inputs = loaded.batch.inputs
    return [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def one_epoch(examples: Examples, epoch: int = 0) -> list[tuple[int, ...]]:
    batches = itertools.islice(examples.batches(Place(epoch)), examples.batches_per_epoch)
    return [row for loaded in batches for row in rows(loaded)]


# encoding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_padded_batch_is_what_its_examples_are_one_by_one(tiny_architectures: Any, name: str) -> None:
    """Same tokens, labels and picture positions as the calibration's encoder gives, and the same logits."""
    model, processor = tiny_architectures.make(name), processor_of(tiny_architectures, name)
    rng = np.random.default_rng(3)
    examples = []
    for i in range(3):
        picture = Image.fromarray(rng.integers(0, 256, (24 + 9 * i, 50 - 11 * i, 3), dtype=np.uint8))
        words = rng.choice(tiny_architectures.words[3:], 12).tolist()
        examples.append(Example((picture,), (" ".join(words[: 2 + 2 * i]), " ".join(words[8 : 9 + i]))))
    batch, places, problems = BatchEncoder(model, processor).batch(examples, 4096)
    assert batch is not None and places == [0, 1, 2] and problems == []
    alone = Encoder(model, processor)
    with torch.no_grad():
        together = model(**batch.inputs, use_cache=False).logits
    for row, example in enumerate(examples):
        expected = alone.encode(CalibrationSample(example.images, *example.said))
        n = expected.inputs["input_ids"].shape[1]
        assert torch.equal(batch.inputs["input_ids"][row, :n], expected.inputs["input_ids"][0])
        assert batch.inputs["attention_mask"][row].tolist() == [1] * n + [0] * (batch.labels.shape[1] - n)
        assert torch.equal(batch.visual[row, :n], expected.vision) and not batch.visual[row, n:].any()
        learned = batch.labels[row] != -100
        assert torch.equal(learned[:n], expected.answer) and not learned[n:].any()
        assert torch.equal(batch.labels[row][learned], batch.inputs["input_ids"][row][learned])
        with torch.no_grad():
            single = model(**expected.inputs, use_cache=False).logits[0]
        torch.testing.assert_close(together[row, :n], single, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_every_turn_of_a_conversation_is_learned_and_nothing_else(tiny_architectures: Any, name: str) -> None:
    """Tokens are those of the template's own text of the whole conversation; the learned ones are the answers."""
    model, processor = tiny_architectures.make(name), processor_of(tiny_architectures, name)
    said = ("is there a dog", "the dog runs", "what is big", "a red ball", "and the man", "sits")
    picture = Image.new("RGB", (32, 32))
    batch, *_ = BatchEncoder(model, processor).batch([Example((picture,), said), Example((picture,), said[:2])], 4096)
    assert batch is not None
    turns = [
        {"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(said)
    ]
    turns[0]["content"].insert(0, {"type": "image"})  # type: ignore[attr-defined]
    text = processor.apply_chat_template(turns, tokenize=False)
    whole = processor(text=[text], images=[[picture]], return_tensors="pt")["input_ids"][0]
    n = int(batch.inputs["attention_mask"][0].sum())
    assert batch.inputs["input_ids"][0, :n].tolist() == whole[:n].tolist()
    assert not set(whole[n:].tolist()) - {tiny_architectures.end}  # the template may close the last turn twice
    ends = processor.tokenizer.decode([tiny_architectures.end])
    learned = batch.labels[0][batch.labels[0] != -100].tolist()
    assert processor.tokenizer.decode(learned).split() == [
        *said[1].split(),
        ends,
        *said[3].split(),
        ends,
        *said[5].split(),
        ends,
    ]


def test_too_long_and_unanswerable_examples_leave_the_others_as_they_are(tiny_architectures: Any) -> None:
    model, processor = tiny_architectures.make("llava"), processor_of(tiny_architectures, "llava")
    pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue", "white")]
    said = [("dog", "cat"), (" ".join(["dog"] * 40), "cat"), ("dog", "<image>"), ("ball", "big")]
    examples = [Example((picture,), pair) for picture, pair in zip(pictures, said, strict=True)]
    encoder = BatchEncoder(model, processor)
    batch, places, problems = encoder.batch(examples, 40)
    assert places == [0, 3] and len(problems) == 2
    assert "special token '<image>'" in problems[0] and "more than max_length=40" in problems[1]
    expected, *_ = encoder.batch([examples[0], examples[3]], 40)
    assert batch is not None and expected is not None
    assert all(torch.equal(batch.inputs[key], value) for key, value in expected.inputs.items())
    assert encoder.batch(examples[1:2], 40)[0] is None


# order


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(tiny_architectures: Any, conversations: Any) -> None:
    folder = conversations(20, words=tiny_architectures.words)
    examples = examples_of(tiny_architectures, folder, validation_samples=1)
    first, second = one_epoch(examples), one_epoch(examples, 1)
    assert len(first) == len(second) == 16 and examples.batches_per_epoch == 4  # 20 less one held out, whole batches
    everything = Counter(rows_of_pool(examples))
    assert Counter(first) <= everything and Counter(second) <= everything
    assert first != second
    assert first == one_epoch(examples_of(tiny_architectures, folder, validation_samples=1))
    assert first != one_epoch(examples_of(tiny_architectures, folder, validation_samples=1, seed=1))


def rows_of_pool(examples: Examples) -> list[tuple[int, ...]]:
    (pool,) = examples._pools
    batches = [examples._encoders[0].batch([pool.source.example(i)], 4096)[0] for i in pool.train]
    return [tuple(batch.inputs["input_ids"][0].tolist()) for batch in batches if batch is not None]


@pytest.mark.parametrize("threads", [0, 3])
def test_any_place_is_reached_without_what_comes_before(
    tiny_architectures: Any, conversations: Any, threads: int
) -> None:
    folder = conversations(18, words=tiny_architectures.words, texts=6)
    examples = examples_of(tiny_architectures, folder, loader_threads=threads)
    whole = list(itertools.islice(examples.batches(Place()), 12))
    for start in (0, 3, 7):
        place = whole[start - 1].following if start else Place()
        again = list(itertools.islice(examples.batches(place), 12 - start))
        assert [rows(one) for one in again] == [rows(one) for one in whole[start:]]
        assert [one.following for one in again] == [one.following for one in whole[start:]]
    assert {one.batch.visual.any(1).all().item() or not one.batch.visual.any().item() for one in whole} == {True}
    assert any(not one.batch.visual.any() for one in whole)  # text alone comes in batches of its own


def test_processes_share_an_epoch(tiny_architectures: Any, conversations: Any) -> None:
    folder = conversations(25, words=tiny_architectures.words)
    alone = examples_of(tiny_architectures, folder, batch_size=2)
    parts = [examples_of(tiny_architectures, folder, batch_size=2, rank=r, processes=3) for r in range(3)]
    together = [row for part in parts for row in one_epoch(part)]
    assert Counter(together) == Counter(one_epoch(alone)[: len(together)])
    held = [[batch.labels.tolist() for batch in part.held_out()] for part in parts]
    assert sum(map(len, held)) == len(list(alone.held_out()))
    with pytest.raises(ExampleError, match="fewer batches of 64 than the 3 processes"):
        examples_of(tiny_architectures, folder, batch_size=64, rank=0, processes=3)


def test_shares_and_a_number_of_samples(tiny_architectures: Any, conversations: Any) -> None:
    words = tiny_architectures.words
    dogs, cats = conversations(30, words=["dog"]), conversations(31, words=["cat"])
    data = [{"data": str(dogs), "share": 3}, {"data": str(cats), "share": 1}]
    examples = examples_of(tiny_architectures, data, samples=16, batch_size=4)
    dog, cat = (tiny_architectures.processor("idefics3").tokenizer.convert_tokens_to_ids(one) for one in ("dog", "cat"))
    assert words
    seen = [one_epoch(examples, epoch) for epoch in range(3)]
    for epoch in seen:
        assert sum(dog in row for row in epoch) == 12 and sum(cat in row for row in epoch) == 4
    assert Counter(seen[0]) == Counter(seen[1]) == Counter(seen[2])  # the same sixteen in every epoch


def test_pictures_that_are_held_out_are_in_no_training_example(tiny_architectures: Any, conversations: Any) -> None:
    folder = conversations(60, words=tiny_architectures.words, per_picture=3)
    examples = examples_of(tiny_architectures, folder, validation_samples=4)
    (pool,) = examples._pools
    names = pool.source.pictures()
    trained, held = {names[i] for i in pool.train}, {names[i] for i in pool.held_out}
    assert len(pool.held_out) == 4 and trained and held and not trained & held
    assert len(pool.train) == 60 - 3 * len(held)


# what is left out


def test_evaluated_pictures_of_a_family_are_not_trained_on(tiny_architectures: Any, conversations: Any) -> None:
    table = pq.read_table(build.data_file("block_vizwiz", "test")).slice(0, 40).to_pylist()
    folder = conversations(12, words=tiny_architectures.words)
    entries = json.loads((folder / "mix.json").read_text())
    evaluated = {row["image"]["bytes"] for row in table}
    for i, data in enumerate(sorted(evaluated)[:8]):
        (folder / f"test-{i}.webp").write_bytes(data)
        entries.append(
            {
                "image": f"test-{i}.webp",
                "conversations": [{"from": "human", "value": "<image>\ndog"}, {"from": "gpt", "value": "cat"}],
            }
        )
    (folder / "mix.json").write_text(json.dumps(entries))
    evaluated_names = families.evaluated_pictures("block_vizwiz")

    def epoch(**keys: Any) -> tuple[frozenset[str], Counter[str]]:
        loaded = list(itertools.islice(examples_of(tiny_architectures, folder, **keys).batches(Place()), 4))
        return frozenset().union(*(one.image_ids for one in loaded)), sum((one.skipped for one in loaded), Counter())

    names, skipped = epoch(without=["block_vizwiz"])
    assert names and not names & evaluated_names
    assert set(skipped) == {"its picture is one that tasks evaluate"} and skipped.total() >= 4
    names, skipped = epoch()
    assert len(names & evaluated_names) >= 4 and not skipped


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block families draw 30 pictures to train on."""
    load = families._load

    def few(name: str, role: families.Role) -> Any:
        loaded = load(name, role)
        train = loaded.family.train
        if train is None or train.pictures is None:
            return loaded
        return loaded._replace(
            family=loaded.family.model_copy(update={"train": train.model_copy(update={"pictures": 30})})
        )

    monkeypatch.setattr(families, "_load", few)


ANSWERS: dict[str, Callable[[dict[str, Any]], set[str]]] = {
    "block_vqav2": lambda row: {row["multiple_choice_answer"]},
    "block_scienceqa": lambda row: {"ABCDE"[row["answer"]]},
    "block_coco_caption": lambda row: set(row["answer"]),
    "block_refcocoplus": lambda row: {str([round(v) for v in (x, y, x + w, y + h)]) for x, y, w, h in [row["bbox"]]},
}


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("family", ANSWERS)
def test_a_family_is_answered_by_its_reference_in_the_model_s_own_format(family: str) -> None:
    source = FamilyExamples(family, model_type="idefics3", seed=0, processed=lambda picture: picture.size)
    table = {row["sample_id"]: row for row in pq.read_table(build.train_file(family, 30)).to_pylist()}
    assert len(source) == len(table) > 25 and len(set(source.pictures())) <= 30
    asked: Counter[str] = Counter()
    for index in range(25):
        example = source.example(index)
        fits = [
            row for row in table.values()
            if row["question"] in example.said[0] and example.said[1] in ANSWERS[family](row)
        ]  # fmt: skip
        assert fits, example.said
        asked[example.said[0]] += 1
        if family == "block_scienceqa":
            (hint,) = {row["hint"] for row in fits if row["hint"] in example.said[0]}
            assert example.said[0].startswith(f"{hint} ") and "(A) the " in example.said[0]
    assert len(asked) == 1 if family == "block_coco_caption" else len(asked) > 5


# bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "expected a list of .* got dict"),
        ("[]", "expected a list"),
        ('[{"conversations": "x"}]', "entry 0: expected a list"),
        ('[{"conversations": [{"from": "human"}]}]', "entry 0: expected a list"),
        ('[{"image": "../a.png", "conversations": []}]', "must be a path inside"),
        ('[{"image": ["a", "b"], "conversations": []}]', "one picture in each conversation is read, got 2"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(ExampleError, match=message):
        Conversations(tmp_path, seed=0)


def test_a_folder_with_several_files_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExampleError, match="must hold one JSON file with conversations, and holds none"):
        Conversations(tmp_path, seed=0)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text("[]")
    with pytest.raises(ExampleError, match=r"holds a.json, b.json; name the file itself"):
        Conversations(tmp_path, seed=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/such/folder", "there is no no/such/folder"),
        ("block_vqav", "Did you mean 'block_vqav2'"),
        ("block_vizwiz", "the family 'block_vizwiz' has no train split"),
        ("vqav2", "`bitquake data prepare vqav2_train` says what it needs"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named(
    tiny_architectures: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str, message: str
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(CalibrationError, match=message):
        examples_of(tiny_architectures, [data])


def test_a_few_bad_examples_are_counted_and_many_end_the_training(tiny_architectures: Any, conversations: Any) -> None:
    lost = [
        {"image": "gone.png", "conversations": [{"from": "human", "value": "dog"}, {"from": "gpt", "value": "cat"}]}
    ]
    mute = [{"conversations": [{"from": "human", "value": "dog"}]}]
    folder = conversations(20, words=tiny_architectures.words, texts=4, extra=lost + mute)
    loaded = itertools.islice(examples_of(tiny_architectures, folder, batch_size=2).batches(Place()), 12)
    skipped = sum((one.skipped for one in loaded), Counter())
    assert skipped.total() >= 1
    assert all("gone.png: No such file" in one or "no question of a human" in one for one in skipped)
    folder = conversations(100, words=tiny_architectures.words, extra=lost * 150)
    with pytest.raises(ExampleError, match=r"of the first examples cannot be used, more than half: entry \d+ of"):
        list(itertools.islice(examples_of(tiny_architectures, folder, batch_size=10).batches(Place()), 25))
    folder = conversations(0, words=["dog"], extra=lost * 4)
    with pytest.raises(ExampleError, match="none of the examples can be used"):
        next(examples_of(tiny_architectures, folder).batches(Place()))


def test_pictures_of_scienceqa_that_come_again_where_it_is_tested_are_left_out(
    tiny_architectures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the hub dataset's form; pictures 6 to 9 of ten come again in the test and validation splits."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)) for _ in range(10)]
    shown = {"train": range(10), "test": range(6, 9), "validation": range(9, 10)}

    def load_dataset(path: str, name: str | None = None, *, split: str, **_: Any) -> datasets.Dataset:
        assert (path, name) == ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG")
        rows = [
            {"image": pictures[i], "question": f"dog {i} ?", "choices": ["red", "big", "cat"], "answer": i % 3,
             "hint": "the ball" if i % 2 else ""}
            for i in shown[split]
        ]  # fmt: skip
        return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = examples_of(tiny_architectures, ["scienceqa"], batch_size=1)
    (pool,) = examples._pools
    taken = {i: pool.source.example(i) for i in pool.train}
    assert {one.said[1] for one in taken.values()} == {"A", "B", "C"}
    for example in taken.values():
        (number,) = (int(word) for word in example.said[0].split() if word.isdigit())
        context = "Context: the ball\n" if number % 2 else ""
        assert example.said[0] == (
            f"{context}dog {number} ?\nA. red\nB. big\nC. cat\nAnswer with the option's letter from the given choices "
            "directly."
        )
        assert example.said[1] == "ABC"[number % 3]
    loaded = list(itertools.islice(examples.batches(Place()), 2 * len(pool.train)))
    names = frozenset().union(*(one.image_ids for one in loaded))
    assert names and names <= {f"pixels:{pixel_hash(picture)}" for picture in pictures[:6]}
    assert sum((one.skipped for one in loaded), Counter()).total() > 0
