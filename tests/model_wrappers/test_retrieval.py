"""Retrieval through the wrapper: tokens of a caption, chunks and memory, failures, the journal, quantized models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitquake.envelope import Envelope, decode
from bitquake.model_wrappers import bitquake_hf, retrieval
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.retrieval import AssistantTurn, CaptionError, assistant_turn, caption_tokens
from bitquake.noise import ImageError

Load = Callable[..., Any]
OURS = {"envelope": True, "protocol": "retrieval", "candidates_field": "captions"}
TASK = {"bitquake": OURS}
COLORS = ["red", "green", "blue", "yellow", "large", "small", "circle", "square", "star", "left", "right", "is", "a"]


@pytest.fixture
def rows(random_docs: Any) -> Callable[..., list[dict[str, Any]]]:
    def rows(n: int, n_captions: int = 10, **further: Any) -> list[dict[str, Any]]:
        rng = np.random.default_rng(7)
        return [
            {**doc, "captions": [" ".join(rng.choice(COLORS, rng.integers(1, 9))) for _ in range(n_captions)]}
            for doc in random_docs(n, **further)
        ]

    return rows


def run(task: Any, model: Any) -> list[Envelope]:
    return [decode(text) for text in task.run(model)]


def scores(envelopes: list[Envelope]) -> np.ndarray:
    return np.array([envelope.candidate_scores for envelope in envelopes])


# tokens


class Template:
    """A processor with a template of two functions: what opens an answer, and how a whole one is written."""

    def __init__(self, tokenizer: Any, opening: str, written: str) -> None:
        self.tokenizer, self.opening, self.written = tokenizer, opening, written

    def apply_chat_template(self, messages: list[Any], *, tokenize: bool, add_generation_prompt: bool = False) -> str:
        if len(messages) > 1 and not self.written:
            raise ValueError("conversation roles must alternate")
        answer = self.written.format(messages[1]["content"][0]["text"]) if len(messages) > 1 else ""
        return f"<s>user: question\n{answer}{self.opening if add_generation_prompt else ''}"


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<end>", "<eot>", "<unk>", "user", "question", "A", "dog"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", additional_special_tokens=["<end>", "<eot>"], **special
    )


@pytest.mark.parametrize(
    ("opening", "written", "eos", "expected"),
    [
        ("Assistant:", "Assistant: {}<end>\n", {1, 2}, AssistantTurn(" ", 2)),  # Idefics3
        ("<a>\n", "<a>\n{}<end>\n", {2}, AssistantTurn("", 2)),  # Qwen
        ("ASSISTANT:", "ASSISTANT: {} </s>", {1}, AssistantTurn(" ", 1)),  # LLaVA
        ("<a>", "<a><think>\n\n</think>{}<end>", {2}, AssistantTurn("", 2)),  # more than blanks is not repeated
        ("A:", "A:{}\n", {1, 3}, AssistantTurn("", 1)),  # the template writes no end: the tokenizer's
        ("A:", "A:{}\n", {2, 3}, AssistantTurn("", 2)),  # nor is the tokenizer's one of the model's
        ("A:", "", {3}, AssistantTurn("", 3)),  # a template that refuses assistant's turns
        ("A:", "B: {}", {1}, AssistantTurn("", 1)),  # or begins them otherwise
        ("A:", "A: {}", set(), AssistantTurn(" ", None)),
    ],
)
def test_what_stands_around_an_answer(opening: str, written: str, eos: set[int], expected: AssistantTurn) -> None:
    tokenizer = word_tokenizer(eos_token="</s>")
    assert assistant_turn(Template(tokenizer, opening, written), frozenset(eos)) == expected


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama's: a blank before the whole text, and blanks written as ▁."""
    words = ["<unk>", "</s>", "▁", ":", "A", "▁A", "▁dog", "dog", "▁assistant", "▁▁"]
    merges = []
    pieces = {word: i for i, word in enumerate(words)}
    for word in ("▁A", "▁dog", "▁assistant", "dog"):
        for end in range(2, len(word) + 1):
            for part in (word[: end - 1], word[end - 1], word[:end]):
                pieces.setdefault(part, len(pieces))
            merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: a blank belongs to the word after it."""
    words = [":", "A", "ĠA", "d", "o", "g", "do", "dog", "Ġ", "Ġdog", "</s>"]
    merges = [("Ġ", "A"), ("d", "o"), ("do", "g"), ("Ġ", "dog")]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "before", "expected"),
    [
        (sentence_piece(), "assistant :", " ", ["▁A", "▁dog", "</s>"]),  # by itself, " A dog" would begin with ▁▁
        (sentence_piece(), "assistant :", "", ["A", "▁dog", "</s>"]),
        (byte_level(), "A:", " ", ["ĠA", "Ġdog", "</s>"]),
        (byte_level(), "A:", "", ["A", "Ġdog", "</s>"]),
    ],
)
def test_a_caption_is_tokenized_where_it_stands(tokenizer: Any, prompt: str, before: str, expected: list[str]) -> None:
    turn = AssistantTurn(before, tokenizer.eos_token_id)
    (tokens,) = caption_tokens(tokenizer, prompt, [" A dog\n"], turn)
    assert tokenizer.convert_ids_to_tokens(tokens) == expected


def test_a_caption_that_would_merge_with_the_prompt_is_tokenized_by_itself() -> None:
    tokenizer = byte_level()
    (tokens,) = caption_tokens(tokenizer, "A:do", ["g A"], AssistantTurn("", None))
    assert tokenizer.convert_ids_to_tokens(tokens) == ["g", "ĠA"]


def test_a_special_token_in_a_caption_is_refused() -> None:
    tokenizer = word_tokenizer(eos_token="</s>")
    with pytest.raises(CaptionError, match="'dog <eot>' holds the special token '<eot>'"):
        caption_tokens(tokenizer, "user", ["dog", "dog <eot>"], AssistantTurn("", 1))
    assert caption_tokens(tokenizer, "user", ["dog cat"], AssistantTurn("", 1)) == [[8, 4, 1]]  # an unknown word is not


# the model


class Calls:
    """Counts the pictures that the vision tower sees, and the rows of each call of the language model."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures, self.rows = 0, list[int]()
        parts = model.model.model
        vision, language = parts.vision_model.forward, parts.text_model.forward

        def see(*args: Any, **inputs: Any) -> Any:
            self.pictures += len(inputs["pixel_values"])
            return vision(*args, **inputs)

        def read(*args: Any, **inputs: Any) -> Any:
            self.rows.append(len(inputs["inputs_embeds"]))
            return language(*args, **inputs)

        monkeypatch.setattr(parts.vision_model, "forward", see)
        monkeypatch.setattr(parts.text_model, "forward", read)


@pytest.mark.parametrize(
    ("batch_size", "use_cache", "pictures", "chunks"),
    [(4, True, 1, [1, 4, 4, 2]), (64, True, 1, [1, 10]), (4, False, 10, [4, 4, 2])],
)
def test_chunks_change_nothing_and_the_picture_is_encoded_once(
    load: Load, chat_task: Any, rows: Any, monkeypatch: pytest.MonkeyPatch,
    batch_size: int, use_cache: bool, pictures: int, chunks: list[int],
) -> None:  # fmt: skip
    """float32: within 1e-4 of a sum of up to 9 log-probabilities (measured 1.6e-5); never more rows than a batch."""
    docs = rows(5)
    expected = scores(run(chat_task(docs, TASK), load(batch_size=1)))
    model = load(batch_size=batch_size, use_cache=use_cache)
    calls = Calls(model, monkeypatch)
    np.testing.assert_allclose(scores(run(chat_task(docs, TASK), model)), expected, atol=1e-4)
    assert (calls.pictures, calls.rows) == (pictures * len(docs), chunks * len(docs))


@pytest.mark.parametrize("quant", ["rtn-int4-g64", "rtn-int3-g64:execution=packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_models(load: Load, chat_task: Any, rows: Any, quant: str, dtype: str) -> None:
    """Cached and full passes agree: float32 1e-4, bfloat16 0.5 in sums of 8 to 108 nats (measured 0.23)."""
    docs = rows(4)
    twin = run(chat_task(docs, TASK), load(batch_size=4, dtype=dtype))
    cached = run(chat_task(docs, TASK), load(batch_size=4, dtype=dtype, quant=quant))
    full = run(chat_task(docs, TASK), load(batch_size=4, dtype=dtype, quant=quant, use_cache=False))
    np.testing.assert_allclose(scores(cached), scores(full), atol=1e-4 if dtype == "float32" else 0.5)
    assert np.abs(scores(cached) - scores(twin)).max() > 0.5
    assert cached[0].model_hash != twin[0].model_hash
    assert [e.pixel_hash for e in cached] == [e.pixel_hash for e in twin]


def test_adapter(load: Load, tiny_checkpoint: Path, chat_task: Any, rows: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, target_modules=r".*text_model.*(q_proj|down_proj)", init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "lora")
    docs, adapter = rows(3), str(tmp_path / "lora")
    cached = scores(run(chat_task(docs, TASK), load(batch_size=4, adapter=adapter)))
    np.testing.assert_allclose(
        cached, scores(run(chat_task(docs, TASK), load(batch_size=4, adapter=adapter, use_cache=False))), atol=1e-4
    )
    assert np.abs(cached - scores(run(chat_task(docs, TASK), load(batch_size=4)))).max() > 0.1


def test_an_architecture_without_proof_runs_full_passes_and_says_so(
    load: Load, chat_task: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    docs, model = rows(2), load(batch_size=4, workers=2)
    expected = scores(run(chat_task(docs, TASK), model))
    assert not any("full pass" in line for line in log)
    for module in (bitquake_hf, retrieval):
        monkeypatch.setattr(module, "CACHED", frozenset())
    np.testing.assert_allclose(scores(run(chat_task(docs, TASK), model)), expected, atol=1e-4)
    assert sum("retrieval with 'idefics3'" in line and "in a full pass" in line for line in log) == 1


def test_of_equal_candidates_the_first_is_answered(load: Load, chat_task: Any, rows: Any) -> None:
    docs = [{**doc, "captions": ["red star", " red star "]} for doc in rows(2)]
    for got in run(chat_task(docs, TASK), load(batch_size=2)):
        assert got.text == "red star"
        assert got.candidate_scores[0] == pytest.approx(got.candidate_scores[1], abs=1e-6)
        assert got.confidence["candidates"] == pytest.approx(0.5, abs=1e-6)


def test_retrieval_and_generation_in_one_run(load: Load, chat_task: Any, rows: Any) -> None:
    docs, model = rows(6, text_only_every=4), load(batch_size=4)
    ranked, said = chat_task(docs, TASK, name="ranked"), chat_task(docs, {"bitquake": {"envelope": True}}, name="said")
    model.task_dict.update({"ranked": {"test": docs}, "said": {"test": docs}})
    mixed = [r for pair in zip(ranked.requests(), said.requests(), strict=True) for r in pair]
    results = model.generate_until(mixed)
    assert [r.text for r in results[::2]] == ranked.run(model)
    assert [r.text for r in results[1::2]] == said.run(model)
    for result in results[::2]:
        envelope = decode(result.text)
        assert result.token_counts.output_tokens == envelope.n_tokens == len(envelope.text.split()) + 1
        assert result.token_counts.input_tokens > 0


# failures


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (None, r"question: candidates: the document has no field 'captions'"),
        ([], r"question: candidates: 'captions' must be a list of captions, got \[\]"),
        ("red star", r"question: candidates: 'captions' must be a list of captions, got 'red star'"),
        (["red", "  "], r"question: candidates: 'captions'\[1\] is no caption: ' '"),
        (["red", 7], r"question: candidates: 'captions'\[1\] is no caption: 7"),
        (["red", "a <image> here"], r"question: candidate 'a <image> here' holds the special token '<image>'"),
    ],
)
def test_candidates_that_cannot_be_scored(load: Load, chat_task: Any, rows: Any, captions: Any, message: str) -> None:
    docs = rows(6)
    good = chat_task(docs, TASK).run(load(batch_size=4))
    broken = [dict(doc) for doc in docs]
    broken[2]["captions"] = captions
    if captions is None:
        del broken[2]["captions"]
    broken[4]["image"] = ImageError("image: the file is empty (0 bytes).")
    got = chat_task(broken, TASK).run(load(batch_size=4))
    assert [i for i, text in enumerate(got) if decode(text).error] == [2, 4]
    assert [text for i, text in enumerate(got) if i not in (2, 4)] == [t for i, t in enumerate(good) if i not in (2, 4)]
    failed = decode(got[2])
    assert re.match(message, failed.error or "")
    assert (failed.text, failed.confidence, failed.candidate_scores) == ("", {}, None)
    assert decode(got[4]).error == "image: the file is empty (0 bytes)."


@pytest.mark.parametrize("lacking", ["envelope", "candidates_field"])
def test_a_task_that_cannot_work_is_refused(load: Load, chat_task: Any, rows: Any, lacking: str) -> None:
    ours = {key: value for key, value in OURS.items() if key != lacking}
    with pytest.raises(
        ValueError, match=r"metadata.bitquake: protocol retrieval needs envelope: true .* candidates_field"
    ):
        chat_task(rows(1), {"bitquake": ours}).run(load())


def out_of_memory_beyond(limit: int, error: Exception, monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """Sizes of the model's calls; one of more than ``limit`` rows raises."""
    sizes: list[int] = []
    forward = model._model.forward

    def limited(*args: Any, **inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > limit:
            raise error
        return forward(*args, **inputs)

    monkeypatch.setattr(model._model, "forward", limited)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "cublas"],
)
def test_out_of_memory_halves_the_chunks(
    load: Load, chat_task: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    docs = rows(3)
    expected = scores(run(chat_task(docs, TASK), load(batch_size=8)))
    model = load(batch_size=8, max_new_tokens=11 if isinstance(error, torch.OutOfMemoryError) else 12)  # its own object
    sizes = out_of_memory_beyond(3, error, monkeypatch, model)
    np.testing.assert_allclose(scores(run(chat_task(docs, TASK), model)), expected, atol=1e-4)
    assert sizes == [1, 8, 4, 2, 2, 2, 2, 2] + [1, 2, 2, 2, 2, 2] * 2  # learned once


def test_no_memory_for_one_candidate_is_a_named_failure(
    load: Load, chat_task: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(batch_size=2, max_new_tokens=13)
    out_of_memory_beyond(0, torch.OutOfMemoryError("CUDA out of memory"), monkeypatch, model)
    got = run(chat_task(rows(3), TASK), model)
    assert [e.error for e in got] == ["model: CUDA out of memory"] * 3


def test_scores_that_are_not_finite_are_a_named_failure(
    load: Load, chat_task: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(batch_size=4, max_new_tokens=14)
    weight = model._model.lm_head.weight.clone()
    weight[model.tokenizer.convert_tokens_to_ids("star")] = float("inf")
    monkeypatch.setattr(model._model.lm_head, "weight", torch.nn.Parameter(weight))
    (got,) = run(chat_task(rows(1), TASK), model)
    assert (got.error or "").startswith(
        "model: the score of candidate 0 is not finite (torch.float32, quant full-precision)"
    )


# the journal


def test_a_resumed_run_gives_the_same_bits(
    tiny_checkpoint: Path, chat_task: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def new() -> tuple[Any, list[int]]:
        model = BitquakeHF(
            pretrained=str(tiny_checkpoint), dtype="float32", device="cpu", batch_size=4,
            artifacts=str(tmp_path / "artifacts"), journal=str(tmp_path / "journal"),
        )  # fmt: skip
        return model, out_of_memory_beyond(1000, RuntimeError(), monkeypatch, model)

    docs = rows(6)
    first = chat_task(docs, TASK).run(new()[0])
    (shard,) = (tmp_path / "journal").glob("*/*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6  # a sample and its candidates are one entry
    shard.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    model, sizes = new()
    assert chat_task(docs, TASK).run(model) == first
    assert sizes == [1, 4, 4, 2] * 2
    model, sizes = new()
    changed = [
        {**doc, "captions": [*doc["captions"][:-1], "red star"]} if i == 3 else doc for i, doc in enumerate(docs)
    ]
    again = chat_task(changed, TASK).run(model)
    assert sizes == [1, 4, 4, 2]
    assert [a == b for a, b in zip(again, first, strict=True)] == [True, True, True, False, True, True]


def test_the_kind_of_model_decides_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in ("CachedPrompt", "RepeatedPrompt"):
        monkeypatch.setattr(retrieval, name, lambda model, inputs, name=name: made.append(f"{name} {sorted(inputs)}"))
    for model_type, use_cache in (("llava", True), ("llava", False), ("mistral3", True)):
        model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        retrieval.encode_prompt(model, {"input_ids": 1, "labels": 2}, use_cache=use_cache)
    assert made == ["CachedPrompt ['input_ids']", "RepeatedPrompt ['input_ids']", "RepeatedPrompt ['input_ids']"]
