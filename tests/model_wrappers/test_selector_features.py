"""Hidden states of a run on disk: against plain forwards of one sample each, through kills, clamps and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitquake.envelope import Envelope, decode
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.generation import GenerationRequest
from bitquake.model_wrappers.loading import load_processor, resolve_pretrained
from bitquake.model_wrappers.samples import Sample, prepare
from bitquake.model_wrappers.selector import features as features_module
from bitquake.model_wrappers.selector.capture import CaptureError, PrefillStates, Tokens, question_mask
from bitquake.model_wrappers.selector.features import Features, FeaturesError, FeatureStore, load_features
from bitquake.model_wrappers.task_contract import TaskContract
from bitquake.noise import ImageError
from bitquake.tasks.expand import builtin_index
from bitquake.tasks.glue import read_task
from bitquake.tasks.strict_yaml import load_task_yaml

ARCHITECTURES = [
    "blip-2", "idefics3", "llava", "llava_onevision", "paligemma", "paligemma2", "qwen2_5_vl", "qwen2_vl", "qwen3_vl",
    "smolvlm",
]  # fmt: skip
SUFFIX = " dog on a hat"
OURS = {"bitquake": {"envelope": True, "protocol": "vqa", "default_prompt": {"post_prompt": SUFFIX}}}
QUESTIONS = ["what is there", "is what there in red there", "red ball", "is a big green cat with the blue hat there"]
LAST_BLOCK = {
    "blip-2": lambda m: m.language_model.model.decoder.layers[-1],
    "idefics3": lambda m: m.model.text_model.layers[-1],
    "smolvlm": lambda m: m.model.text_model.layers[-1],
}


def pictures(n: int, *, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 70, (n, 2))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def questions(n: int = 4, *, text_only: bool = False) -> list[dict[str, Any]]:
    docs: list[dict[str, Any]] = [
        {"question": QUESTIONS[i % 4] + SUFFIX, "image": picture} for i, picture in enumerate(pictures(n))
    ]
    if text_only:
        docs[1]["image"] = None
    return docs


def last_block(model: Any) -> Any:
    """The last block of the language model, by transformers' own names."""
    find = LAST_BLOCK.get(model.config.model_type, lambda m: m.model.language_model.layers[-1])
    return find(model)


def plain_forward(model: Any, prompt: str, image: Image.Image | None, question: str) -> Features:
    """One sample alone, unpadded: what its features are by definition, read off the output of the last block."""
    inputs = model.processor(
        text=[prompt], images=None if image is None else [[image]], return_tensors="pt", add_special_tokens=True
    )
    inputs.pop("labels", None)
    seen: list[torch.Tensor] = []
    handle = last_block(model.model).register_forward_hook(
        lambda _m, _a, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.inference_mode():
        model.model(**inputs)
    handle.remove()
    ids, words = inputs["input_ids"][0].tolist(), model.tokenizer.convert_tokens_to_ids(question.split())
    (states,) = (one[0].float().numpy() for one in seen)
    token = model.tokenizer.convert_tokens_to_ids("<|image_pad|>" if "qwen" in model.config.model_type else "<image>")
    at = [i for i in range(len(ids)) if ids[i : i + len(words)] == words][-1]
    where = np.array(ids) == token
    pooled = states[where].max(axis=0) if where.any() else np.zeros(states.shape[1], np.float32)
    return Features(
        pooled[None], states[at : at + len(words)].max(axis=0)[None], states[-1:], np.array([bool(where.any())])
    )


def kept(model: Any, answers: list[str], artifacts: Path) -> Features:
    return load_features(artifacts, model.model_hash, [decode(answer).features for answer in answers])


def assert_plain(model: Any, task: Any, answers: list[str], artifacts: Path) -> None:
    stored = kept(model, answers, artifacts)
    for row, doc in enumerate(task.docs):
        (message,) = task.doc_to_messages(doc)
        content = [{**part, "type": part["type"]} for part in message["content"]]
        prompt = model.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        alone = plain_forward(model, prompt, doc["image"], doc["question"].removesuffix(SUFFIX))
        assert stored.has_image[row] == alone.has_image[0]
        for name in features_module.STATES:
            got, expected = getattr(stored, name)[row], getattr(alone, name)[0]
            assert np.abs(got - expected).max() <= 2**-10 * np.abs(expected).max() + 1e-6, name


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def new(tiny_checkpoint: Path, artifacts: Path) -> Callable[..., Any]:
    """``new(**arguments)``: another wrapper that keeps features, as another process would load it."""

    def new(**arguments: Any) -> Any:
        defaults = {"pretrained": str(tiny_checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 4}
        return BitquakeHF(**{**defaults, "artifacts": str(artifacts), "features": True, **arguments})

    return new


# what is captured


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_plain_forward_of_each_sample_gives_the_stored_features(
    name: str, new: Any, artifacts: Path, tiny_architectures: Any, chat_task: Any
) -> None:
    """A batch of prompts of unlike lengths, padded; with a prompt without a picture where the model takes one."""
    task = chat_task(questions(text_only=not name.startswith(("paligemma", "blip"))), OURS)
    model = new(pretrained=str(tiny_architectures.checkpoint(name)))
    assert_plain(model, task, task.run(model), artifacts)


@pytest.mark.parametrize(
    "arguments",
    [
        {"quant": "rtn-int4-g64:group_size=16"},
        {"quant": "rtn-int4-g64:group_size=16:execution=packed"},
        {"use_cache": False},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_however_the_model_runs(
    arguments: dict[str, Any], new: Any, artifacts: Path, tiny_architectures: Any, chat_task: Any
) -> None:
    task = chat_task(questions(text_only=True), OURS)
    model = new(pretrained=str(tiny_architectures.checkpoint("qwen2_vl")), **arguments)
    assert_plain(model, task, task.run(model), artifacts)


def test_with_an_adapter(new: Any, artifacts: Path, tiny_architectures: Any, chat_task: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=3, lora_alpha=12, target_modules=r".*text_model.*(q|down)_proj", init_lora_weights=False)
    peft.get_peft_model(tiny_architectures.make("idefics3"), lora).save_pretrained(tmp_path / "lora")
    task, pretrained = chat_task(questions(), OURS), str(tiny_architectures.checkpoint("idefics3"))
    model = new(pretrained=pretrained, adapter=str(tmp_path / "lora"))
    answers = task.run(model)
    assert_plain(model, task, answers, artifacts)
    bare = new(pretrained=pretrained)
    assert not np.array_equal(kept(bare, task.run(bare), artifacts).first, kept(model, answers, artifacts).first)


def test_batch_and_order_change_no_key_and_no_feature(
    new: Any, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    docs, runs = random_docs(30, text_only_every=7), []
    order = np.random.default_rng(1).permutation(30)
    for i, (size, some) in enumerate([(1, range(30)), (8, range(30)), (5, order)]):
        model = new(artifacts=str(tmp_path / str(i)), batch_size=size)
        answers = dict(zip(some, chat_task([docs[at] for at in some], OURS).run(model), strict=True))
        keys = [decode(answers[at]).features for at in range(30)]
        runs.append((keys, load_features(tmp_path / str(i), model.model_hash, keys)))
    assert len(set(runs[0][0])) == 30
    for keys, found in runs[1:]:
        assert keys == runs[0][0]
        for one, other in zip(found, runs[0][1], strict=True):
            np.testing.assert_allclose(one, other, rtol=2**-10, atol=2e-5)


def test_answers_are_those_of_a_run_without_features(load: Any, new: Any, chat_task: Any, random_docs: Any) -> None:
    task = chat_task(random_docs(12), OURS)
    with_them, without = ([decode(one) for one in task.run(model)] for model in (new(batch_size=4), load(batch_size=4)))
    assert all(one.features for one in with_them) and not any(one.features for one in without)
    assert [one.model_copy(update={"features": ""}) for one in with_them] == without


def test_failures_and_plain_answers_have_none(new: Any, artifacts: Path, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(8)
    docs[3]["image"] = ImageError("image: gone")
    model = new()
    found = [decode(one) for one in chat_task(docs, OURS).run(model)]
    assert [bool(one.features) for one in found] == [i != 3 for i in range(8)]
    assert not chat_task(random_docs(4, seed=1)).run(model)[0].startswith("{")
    assert len(FeatureStore(artifacts, model.model_hash)._where) == 7


def test_states_that_are_no_numbers_are_not_kept(new: Any, artifacts: Path, chat_task: Any, random_docs: Any) -> None:
    model = new(batch_size=2)
    with torch.no_grad():
        last_block(model.model).mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        chat_task(random_docs(3), OURS).run(model)
    assert not list(artifacts.glob("features/*/*"))


def test_a_language_model_with_an_encoder_is_refused(tiny_architectures: Any) -> None:
    model = tiny_architectures.make("idefics3")
    model.config.text_config.is_encoder_decoder = True
    with pytest.raises(CaptureError, match="Idefics3ForConditionalGeneration reads its prompt with an encoder"):
        PrefillStates(model)


# where the question is


PROMPTS: dict[str, Any] = {
    "default_prompt": {"pre_prompt": "\nQuestion: ", "post_prompt": "\nAnswer with a single word."},
    "prompts": {"qwen2_vl": {"pre_prompt": "what is it? ", "post_prompt": " what is it? yes or no "}},
}


class Asked:
    """A task of the block world as requests hold it, its documents, and each document's text without prompts."""

    def __init__(self, name: str, n: int) -> None:
        file = builtin_index().tasks[name]
        base = load_task_yaml((file.parent / "_base_yaml").read_text())
        self.config = SimpleNamespace(metadata={"bitquake": {**base["metadata"]["bitquake"], **PROMPTS}})
        self.name, self.task = name, read_task(file)
        self.kwargs = {**PROMPTS["default_prompt"], "noise": self.task.noise_as_written}
        rows = datasets.Dataset.from_parquet(str(self.task.data_file), split=self.task.split)
        self.docs = self.task.prepared(rows).select(range(n))

    def doc_to_messages(self, doc: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": one} for one in self.task.doc_to_visual(doc, self.kwargs)]
        text = {"type": "text", "text": self.task.doc_to_text(doc, self.kwargs)}
        return [{"role": "user", "content": [*content, text]}]

    def bare(self, doc: Any) -> str:
        return self.task.doc_to_text(doc, {**self.kwargs, "pre_prompt": "", "post_prompt": ""})


@pytest.mark.parametrize("pretrained", ["bitquake/block-idefics3", "bitquake/block-qwen2vl"])
@pytest.mark.parametrize("name", ["block_vqav2_clean", "block_scienceqa_clean", "block_refcocoplus_clean"])
def test_the_question_s_tokens_decode_to_the_question(pretrained: str, name: str) -> None:
    asked = Asked(name, 12)
    processor = load_processor(resolve_pretrained(pretrained), revision=None, trust_remote_code=False)
    model_type = {"Idefics3Processor": "idefics3", "Qwen2VLProcessor": "qwen2_vl"}[type(processor).__name__]
    contract = TaskContract.of(asked.doc_to_messages, name)
    for i, doc in enumerate(asked.docs):
        sample = Sample(i, name, contract, GenerationRequest(8))
        arguments = ("", asked.doc_to_messages, {}, i, name, "test")
        prepare(sample, arguments, {name: {"test": asked.docs}}, processor, model_type, find_question=True)
        begin, end = sample.question
        assert sample.prompt[begin:end] == asked.bare(doc).strip()
        images = [sample.images] if sample.images else None
        (ids,) = processor(text=[sample.prompt], images=images, return_tensors="pt")["input_ids"].tolist()
        written = processor.tokenizer(sample.prompt, add_special_tokens=False, return_offsets_mapping=True)
        tokens = Tokens(written["input_ids"], written["offset_mapping"])
        mask = question_mask(ids, tokens, sample.question, [False] * len(ids))
        decoded = processor.tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside])
        assert "".join(decoded.split()) == "".join(asked.bare(doc).split())


@given(st.data())
def test_the_question_is_found_in_an_expanded_prompt(data: Any) -> None:
    """Prompts over two words, so that the question's words stand elsewhere too; placeholders grow into frames."""
    words = st.lists(st.sampled_from([1, 2]), max_size=4)
    question = data.draw(words.filter(len))
    ids: list[int] = []
    grown: list[int] = []
    expected: list[bool] = []
    begin = 0
    for piece in (*data.draw(st.lists(words, max_size=3)), question, *data.draw(st.lists(words, max_size=2))):
        own = piece is question
        begin = len(ids) if own else begin
        # a placeholder (0) before each piece, or none
        tokens = [8, *[9] * data.draw(st.integers(1, 5)), 8] if (placeholder := data.draw(st.booleans())) else []
        ids += [0] * placeholder + piece
        begin += placeholder * own
        grown += tokens + piece
        expected += [False] * len(tokens) + [own] * len(piece)
    prompt = Tokens(ids, [(i, i + 1) for i in range(len(ids))])
    assert question_mask(grown, prompt, (begin, begin + len(question)), [False] * len(grown)) == expected


def test_all_of_the_text_where_the_question_cannot_be_told(chat_task: Any, new: Any, random_docs: Any) -> None:
    tokens = Tokens([5, 6, 7], [(0, 2), (2, 4), (4, 6)])
    assert question_mask([9, 5, 6, 7], tokens, (2, 4), [False] * 4) == [False, False, True, False]
    for prompt, span, ids in [(None, (2, 4), [9, 5, 6, 7]), (tokens, (), [9, 5, 6, 7]), (tokens, (2, 4), [9, 5, 8, 7])]:
        assert question_mask(ids, prompt, span, [False, True, True, True]) == [False, True, True, True]


# on disk


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import ChatTask, random_docs
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.selector import features

features.SHARD_ROWS = 32
model = BitquakeHF(
    pretrained=sys.argv[2], artifacts=sys.argv[3], journal=sys.argv[4], dtype="float32", device="cpu", batch_size=4,
    features=True,
)
ChatTask(random_docs(240, text_only_every=7), {"bitquake": {"envelope": True, "protocol": "vqa"}}).run(model)
"""


def test_a_killed_run_resumes_and_no_answer_lacks_its_features(
    new: Any, artifacts: Path, tiny_checkpoint: Path, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    places = [Path(__file__).parent, tiny_checkpoint, artifacts, tmp_path / "journal"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, places)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        journals = list((tmp_path / "journal").glob("*/*.jsonl"))
        if journals and journals[0].read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    task = chat_task(random_docs(240, text_only_every=7), {"bitquake": {"envelope": True, "protocol": "vqa"}})
    resumed = new(journal=str(tmp_path / "journal"))
    batches = _count_batches(resumed)
    answers = task.run(resumed)
    assert 30 < sum(batches) <= 240 - 8 * 4 and sum(batches) % 4 == 0
    again = new(artifacts=str(tmp_path / "undisturbed"))
    assert task.run(again) == answers
    for one, other in zip(
        kept(resumed, answers, artifacts), kept(again, answers, tmp_path / "undisturbed"), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def _count_batches(model: Any) -> list[int]:
    sizes: list[int] = []
    generate = model._model.generate

    def counted(**arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        return generate(**arguments)

    model._model.generate = counted
    return sizes


def test_a_journal_line_comes_after_its_features(
    new: Any, artifacts: Path, chat_task: Any, random_docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every line the features of its answers are on disk already, here and for a reader in another process."""
    from bitquake.model_wrappers.journal import Journal

    monkeypatch.setattr(features_module, "SHARD_ROWS", 10)
    model, added, lines = new(journal=str(tmp_path / "journal")), Journal.add, []

    def checked(self: Any, key: str, answers: Any) -> None:
        keys = [decode(answer.text).features for answer in answers]
        lines.append(load_features(artifacts, model.model_hash, keys))
        added(self, key, answers)

    monkeypatch.setattr(Journal, "add", checked)
    chat_task(random_docs(30), OURS).run(model)
    assert [len(one.first) for one in lines] == [4, 4, 4, 4, 4, 4, 4, 2]
    assert len(list(artifacts.glob("features/*/*.safetensors"))) == 3  # of 12, 12 and 6 rows


def test_answers_without_their_features_are_computed_again(
    new: Any, artifacts: Path, chat_task: Any, random_docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "SHARD_ROWS", 8)
    task, journal = chat_task(random_docs(24), OURS), str(tmp_path / "journal")
    first = task.run(new(journal=journal))
    gone, broken, _ = sorted(artifacts.glob("features/*/*.safetensors"))
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    model = new(journal=journal)
    batches = _count_batches(model)
    assert task.run(model) == first
    assert batches == [4, 4, 4, 4]
    assert len(kept(model, first, artifacts).first) == 24


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_journals_of_runs_with_and_without_features_do_not_mix(
    order: tuple[bool, bool], new: Any, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    task = chat_task(random_docs(8), OURS)
    for wanted in order:
        model = new(journal=str(tmp_path / "journal"), features=wanted)
        batches = _count_batches(model)
        assert all(bool(decode(one).features) == wanted for one in task.run(model))
        assert batches == [4, 4]


def some(n: int, *, seed: int = 0, d: int = 5) -> Features:
    rng = np.random.default_rng(seed)
    image, question, first = rng.standard_normal((3, n, d)).astype(np.float32)
    return Features(image, question, first, rng.integers(0, 2, n).astype(bool))


def test_numbers_beyond_float16_are_clamped_and_counted(tmp_path: Path) -> None:
    features = some(2)
    features.image[0, :3] = 65504.0, 65505.0, float("inf")
    features.first[1, :2] = -7e4, 2.0**-30
    store = FeatureStore(tmp_path, "m")
    held = store.put(["a", "b"], features)
    assert store.write() and store.clamped == 3
    found = load_features(tmp_path, "m", ["b", "a"])
    assert found.image[1, :3].tolist() == [65504.0] * 3
    assert found.first[0, :2].tolist() == [-65504.0, 0.0]
    for one, other in zip(held.rows([1, 0]), found, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.question, features.question[::-1].astype(np.float16).astype(np.float32))


def test_a_known_key_keeps_its_features(tmp_path: Path) -> None:
    one, other = some(3), some(3, seed=1)
    store = FeatureStore(tmp_path, "m")
    store.put(["a", "b", "a"], one)
    np.testing.assert_array_equal(store.put(["b"], other).first, one.first[1:2].astype(np.float16))
    assert "a" not in store and store.write() and "a" in store
    again = FeatureStore(tmp_path, "m")
    held = again.put(["c", "a", "b"], other)
    np.testing.assert_array_equal(held.first[1:], one.first[:2].astype(np.float16))
    np.testing.assert_array_equal(held.has_image, [other.has_image[0], *one.has_image[:2]])
    again.write()
    found = load_features(tmp_path, "m", ["a", "c", "a", "b"])
    np.testing.assert_array_equal(found.first[[0, 2, 1]], held.first[[1, 1, 0]])
    assert sorted(len(keys) for _, keys in features_module._shards(tmp_path / "features" / "m", "m", [])) == [1, 2]
    assert not [path for path in (tmp_path / "features" / "m").iterdir() if path.name.startswith(".")]


def test_processes_write_into_one_folder(tmp_path: Path) -> None:
    """Two that know nothing of each other, with a sample in common; then one more that knows both."""
    stores, features = [FeatureStore(tmp_path, "m") for _ in range(2)], some(6)
    for store, rows in zip(stores, ([0, 1, 2, 3], [3, 4, 5]), strict=True):
        store.put([f"{row}" for row in rows], features.rows(rows))
    assert all(store.write() for store in stores)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    found = load_features(tmp_path, "m", [f"{row}" for row in range(6)])
    np.testing.assert_array_equal(found.first, features.first.astype(np.float16))
    assert all(f"{row}" in FeatureStore(tmp_path, "m") for row in range(6))


def test_a_shard_waits_until_it_is_full_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "SHARD_ROWS", 4)
    store, features = FeatureStore(tmp_path, "m"), some(11)
    store.put([f"{i}" for i in range(3)], features.rows(slice(3)))
    assert not store.write(always=False) and not list(tmp_path.rglob("*.safetensors"))
    store.put([f"{i}" for i in range(3, 11)], features.rows(slice(3, None)))
    assert store.write(always=False)
    sizes = [len(keys) for _, keys in features_module._shards(tmp_path / "features" / "m", "m", [])]
    assert sizes == [11]
    found = load_features(tmp_path, "m", [f"{i}" for i in range(11)])
    np.testing.assert_array_equal(found.question, features.question.astype(np.float16))
    monkeypatch.setattr(features_module, "SHARD_SECONDS", 0.0)
    store.put(["x"], some(1))
    assert store.write(always=False) and "x" in store


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "m")
    store.put(["a", "b"], some(2))
    store.write()
    with pytest.raises(FeaturesError) as raised:
        load_features(tmp_path, "m", ["a", "z", "z", ""])
    message = str(raised.value)
    assert message.startswith("features: 3 of 4 samples of model m have none in") and "features=true" in message
    assert "1 record no features" in message and isinstance(raised.value, KeyError)
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(FeaturesError, match=f"2 of 2 .*damaged, and left out: {shard.name}"):
        load_features(tmp_path, "m", ["a", "b"])
    with pytest.raises(FeaturesError, match="1 of 1 samples of model other"):
        load_features(tmp_path, "other", ["a"])
    assert [array.shape for array in load_features(tmp_path, "m", [])] == [(0, 0), (0, 0), (0, 0), (0,)]


def test_an_envelope_carries_the_key() -> None:
    assert decode(Envelope(text="a", features="f0").encode()).features == "f0"
    assert decode(Envelope(text="a").encode()).features == ""
