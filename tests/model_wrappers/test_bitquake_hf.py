"""The wrapper against a teacher-forced oracle: one unpadded forward pass over prompt and answer, softmax by hand."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from bitquake.envelope import CONFIDENCES, Envelope, decode, is_envelope
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.quant_cards import load_card
from bitquake.noise import ImageError, NoiseError, pixel_hash

Load = Callable[..., Any]
OURS = {"bitquake": {"envelope": True, "protocol": "vqa"}}


class Oracle:
    """Greedy decoding by repeated full passes of the checkpoint, one sample at a time, no cache, no ``generate``."""

    def __init__(self, checkpoint: Path, eos: set[int]) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.eos = eos

    def prompt(self, doc: dict[str, Any]) -> str:
        content = [{"type": "image"}] * (doc["image"] is not None) + [{"type": "text", "text": doc["question"]}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    @torch.no_grad()
    def greedy(self, doc: dict[str, Any], limit: int) -> tuple[list[int], list[np.ndarray]]:
        """Tokens (with the end token, if any), and the probabilities of the whole vocabulary at each step."""
        images = None if doc["image"] is None else [doc["image"]]
        inputs = self.processor(text=[self.prompt(doc)], images=images, return_tensors="pt")
        tokens: list[int] = []
        distributions = []
        while len(tokens) < limit and not (tokens and tokens[-1] in self.eos):
            p = self.model(**inputs).logits[0, -1].double().softmax(-1).numpy()
            distributions.append(p)
            tokens.append(int(p.argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return tokens, distributions


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint: Path, load: Load) -> Oracle:
    return Oracle(tiny_checkpoint, set(load()._eos))


def envelopes(task: Any, model: Any, **gen_kwargs: object) -> list[Envelope]:
    responses = task.run(model, **gen_kwargs)
    assert all(is_envelope(response) for response in responses)
    return [decode(response) for response in responses]


def test_confidences_equal_the_oracle(load: Load, oracle: Oracle, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(24, text_only_every=7)
    answers = envelopes(chat_task(docs, OURS), load(batch_size=8))
    seen = {"ended": 0, "truncated": 0, "empty": 0}
    for doc, got in zip(docs, answers, strict=True):
        tokens, distributions = oracle.greedy(doc, 8)
        ended = tokens[-1] in oracle.eos
        words = tokens[:-1] if ended else tokens
        p = [float(d.max()) for d in distributions]
        body = p[: len(words)]
        first = np.sort(distributions[0])[::-1]
        expected = {
            "joint": math.prod(p),
            "joint_no_eos": math.prod(body) if body else None,
            "geometric_mean": math.prod(body) ** (1 / len(body)) if body else None,
            "minimum": min(body) if body else None,
            "first_token": p[0],
            "margin": float(first[0] - first[1]),
        }
        assert got.text == oracle.processor.tokenizer.decode(words, skip_special_tokens=True)
        assert got.confidence == pytest.approx(expected, abs=1e-5)
        assert set(got.confidence) == set(CONFIDENCES)
        assert got.entropy_first == pytest.approx(float(-(distributions[0] * np.log(distributions[0])).sum()), abs=1e-4)
        assert (got.n_tokens, got.truncated, got.error) == (len(tokens), not ended, None)
        seen["ended" if ended else "truncated"] += 1
        seen["empty"] += not words
    assert min(seen.values()) > 0, f"the test's answers must be of every kind, got {seen}"


def test_envelope_says_what_the_model_saw(
    load: Load, oracle: Oracle, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    import hashlib

    model = load(artifacts=str(tmp_path), batch_size=3)
    docs = random_docs(5, text_only_every=4)
    for doc, got in zip(docs, envelopes(chat_task(docs, OURS), model), strict=True):
        images = [] if doc["image"] is None else [doc["image"]]
        assert got.pixel_hash == [pixel_hash(image) for image in images]
        assert got.image_sizes == [image.size for image in images]
        assert got.processed_sizes == [(32, 32) for _ in images]
        assert got.prompt_hash == hashlib.blake2b(oracle.prompt(doc).encode(), digest_size=16).hexdigest()
        card = load_card(got.card, tmp_path)
        assert (card.model_hash, card.method, card.execution) == (got.model_hash, "none", "full-precision")


def test_shipped_generation_config_changes_nothing(
    load: Load, build_checkpoint: Any, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    """Sampling defaults, a repetition penalty and forbidden tokens are what hub models ship (papers.md 1.4)."""
    shipped = {
        "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 1, "suppress_tokens": list(range(20, 60)), "min_new_tokens": 4, "max_length": 21,
    }  # fmt: skip
    checkpoint = build_checkpoint(tmp_path / "sampling", generation=shipped)
    docs = random_docs(12)
    plain = envelopes(chat_task(docs, OURS), load(batch_size=4))
    other = envelopes(chat_task(docs, OURS), load(batch_size=4, pretrained=str(checkpoint)))
    for a, b in zip(plain, other, strict=True):
        assert (a.text, a.confidence, a.entropy_first) == (b.text, b.confidence, b.entropy_first)


def test_plain_text_for_tasks_that_are_not_ours(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(6)
    texts = [envelope.text for envelope in envelopes(chat_task(docs, OURS), load(batch_size=4))]
    for metadata in (None, [{"version": 0.0}], {"version": 1}, {"bitquake": {"envelope": False}}):
        assert chat_task(docs, metadata).run(load(batch_size=4)) == texts


def test_results_come_in_the_order_of_the_requests(
    load: Load, chat_task: Any, random_docs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = random_docs(40, text_only_every=3)
    model = load(batch_size=4)
    generated = 0
    generate = model._model.generate

    def counting(**inputs: Any) -> Any:
        nonlocal generated
        generated += len(inputs["input_ids"])
        return generate(**inputs)

    monkeypatch.setattr(model._model, "generate", counting)  # none is answered twice, either
    whole = chat_task(docs, OURS).run(model)
    assert len(whole) == generated == len(docs)
    for i in (0, 7, 23, 39):
        alone = decode(chat_task([docs[i]], OURS).run(model)[0])
        assert alone.prompt_hash == decode(whole[i]).prompt_hash
        assert alone.pixel_hash == decode(whole[i]).pixel_hash
        assert alone.text == decode(whole[i]).text


def test_tasks_and_limits_do_not_share_a_batch(load: Load, chat_task: Any, random_docs: Any) -> None:
    model = load(batch_size=16)
    short, long = chat_task(random_docs(5), OURS, name="short"), chat_task(random_docs(5), None, name="long")
    model.task_dict.update({"short": {"test": short.docs}, "long": {"test": long.docs}})
    mixed = [
        r for pair in zip(short.requests(max_new_tokens=1), long.requests(max_new_tokens=8), strict=True) for r in pair
    ]
    results = model.generate_until(mixed)
    assert [is_envelope(result.text) for result in results] == [True, False] * 5
    assert all(result.token_counts.output_tokens == 1 for result in results[::2])
    assert max(result.token_counts.output_tokens for result in results[1::2]) > 1
    assert [r.text for r in results[1::2]] == long.run(model)


def test_stop_string(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(30)
    model = load(batch_size=8)
    free = envelopes(chat_task(docs, OURS), model)
    words = [word for envelope in free for word in envelope.text.split()[1:]]
    stop = max(set(words), key=words.count)
    cut = envelopes(chat_task(docs, OURS), model, until=[f" {stop}", "never"])
    assert model.generate_until(chat_task(docs, OURS).requests(until=f" {stop}"))[0].text  # a bare string is one stop
    hits = 0
    for a, b in zip(free, cut, strict=True):
        if f" {stop}" not in a.text:
            assert a == b
            continue
        hits += 1
        assert b.text == a.text[: a.text.index(f" {stop}")].strip()
        assert not b.truncated
        assert b.n_tokens == len(b.text.split()) + 1
        # the stop's own token ends the answer; what would have followed it no longer counts
        assert a.confidence["joint"] <= b.confidence["joint"] <= b.confidence["joint_no_eos"]
        assert b.confidence["first_token"] == pytest.approx(a.confidence["first_token"], abs=1e-6)
    assert hits >= 3


def test_option_probabilities(load: Load, oracle: Oracle, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(20)
    choice = {"envelope": True, "protocol": "choice", "letters": list("ABCDE"), "options_field": "choices"}
    answers = envelopes(chat_task(docs, {"bitquake": choice}), load(batch_size=8))
    ids = {letter: oracle.processor.tokenizer.convert_tokens_to_ids(letter) for letter in "ABCDE"}
    for doc, got in zip(docs, answers, strict=True):
        letters = "ABCDE"[: len(doc["choices"])]
        _, distributions = oracle.greedy(doc, 1)
        p = {letter: float(distributions[0][ids[letter]]) for letter in letters}
        assert got.option_probabilities == pytest.approx({k: v / sum(p.values()) for k, v in p.items()}, abs=1e-5)
        named = [word for word in got.text.split() if word in letters]
        assert got.confidence["options"] == (got.option_probabilities[named[0]] if named else None)
    assert any(got.confidence["options"] is not None for got in answers), "no answer of the test names a letter"


def test_box_confidences_reach_the_envelope(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(6)
    grounding = {"bitquake": {"envelope": True, "protocol": "grounding"}}
    for got in envelopes(chat_task(docs, grounding), load(batch_size=4)):
        assert {"box_joint", "box_geometric_mean", "box_minimum"} <= set(got.confidence)


def test_prompt_of_the_model_replaces_the_default(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(3)
    asked = [{**doc, "question": f"question : {doc['question']} short answer"} for doc in docs]
    wanted = [{**doc, "question": f"what {doc['question']} word"} for doc in docs]
    prompts = {
        "default_prompt": {"pre_prompt": "question : ", "post_prompt": " short answer"},
        "prompts": {"idefics3": {"pre_prompt": "what ", "post_prompt": " word"}, "qwen2_vl": {"post_prompt": "no"}},
    }
    adapted = envelopes(chat_task(asked, {"bitquake": {**OURS["bitquake"], **prompts}}), load())
    assert [e.prompt_hash for e in adapted] == [e.prompt_hash for e in envelopes(chat_task(wanted, OURS), load())]


def test_quantized_model_differs_from_its_twin(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(8)
    twin, int2 = load(batch_size=4), load(batch_size=4, quant="rtn-int2-g64")
    a, b = envelopes(chat_task(docs, OURS), twin), envelopes(chat_task(docs, OURS), int2)
    assert {e.model_hash for e in a} == {twin.model_hash} != {e.model_hash for e in b}
    assert [e.confidence["joint"] for e in a] != [e.confidence["joint"] for e in b]
    assert [e.pixel_hash for e in a] == [e.pixel_hash for e in b]
    assert int2.card.method == "rtn"
    assert sum(entry.n_quantized for entry in int2.card.components.values()) > 0


def test_adapter_goes_on_top_of_the_quantized_model(
    load: Load, tiny_checkpoint: Path, chat_task: Any, random_docs: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    lora = peft.LoraConfig(r=4, target_modules=r".*text_model.*(q_proj|down_proj)", init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "lora")
    docs = random_docs(6)
    for quant in ("none", "rtn-int8-g64"):
        plain, adapted = load(quant=quant), load(quant=quant, adapter=str(tmp_path / "lora"))
        assert adapted.model_hash != plain.model_hash
        assert [m.hash_after for m in adapted.card.modules] == [m.hash_after for m in plain.card.modules]
        texts = [e.confidence["joint"] for e in envelopes(chat_task(docs, OURS), adapted)]
        assert texts != [e.confidence["joint"] for e in envelopes(chat_task(docs, OURS), plain)]
    # the full-precision one computes what peft itself computes
    merged = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, dtype=torch.float32), tmp_path / "lora"
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "merged")
    expected = envelopes(chat_task(docs, OURS), load(pretrained=str(tmp_path / "merged")))
    for a, b in zip(
        envelopes(chat_task(docs, OURS), load(quant="none", adapter=str(tmp_path / "lora"))), expected, strict=True
    ):
        assert a.text == b.text
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)


# failures


def test_bad_samples_are_named_and_cost_no_other(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(20)
    model = load(batch_size=8)
    good = chat_task(docs, OURS).run(model)
    broken = [dict(doc) for doc in docs]
    broken[2]["image"] = ImageError("image: the file is empty (0 bytes). Fetch it again.")
    broken[5]["image"] = ValueError("the question is empty")
    broken[9]["image"] = FileNotFoundError("no such file: cat.jpg")
    broken[11]["image"] = KeyError("picture")
    broken[13]["question"] += " <image>"  # one image, two places: the processor refuses the whole batch
    broken[17]["image"] = Image.new("RGB", (0, 5))
    responses = chat_task(broken, OURS).run(model)
    errors = {i: decode(r).error for i, r in enumerate(responses) if decode(r).error}
    assert list(errors) == [2, 5, 9, 11, 13, 17]
    assert errors[2] == "image: the file is empty (0 bytes). Fetch it again."
    assert errors[5] == "question: the question is empty"
    assert errors[9] == "image: no such file: cat.jpg"
    assert errors[11] == "model: 'picture'"
    assert errors[13].startswith("model: ")
    assert errors[17].startswith("image: ")
    for i, response in enumerate(responses):
        got = decode(response)
        if i in errors:
            assert (got.text, got.confidence, got.model_hash) == ("", {}, model.model_hash)
        else:
            assert got.text == decode(good[i]).text
            assert got.confidence == pytest.approx(decode(good[i]).confidence, abs=1e-5)


def test_a_failed_sample_of_a_plain_task_is_empty(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(3)
    docs[1]["image"] = ImageError("image: nothing there")
    responses = chat_task(docs).run(load(batch_size=2))
    assert responses[1] == ""


def test_failures_are_counted_in_one_line(load: Load, chat_task: Any, random_docs: Any, log: list[str]) -> None:
    docs = random_docs(6)
    docs[0]["image"], docs[4]["image"] = ImageError("image: nothing there"), ValueError("empty question")
    chat_task(docs, OURS).run(load(batch_size=2))
    assert any("2 of 6 samples failed (image 1, question 1)" in line for line in log)


def test_a_run_in_which_everything_fails_alike_is_given_up(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = [{**doc, "image": KeyError("picture")} for doc in random_docs(12)]
    with pytest.raises(
        RuntimeError, match=r"first \d+ samples of task 'task' all failed in the same way: model: 'picture'"
    ):
        chat_task(docs, OURS).run(load(batch_size=4))
    docs = [{**doc, "image": ImageError("image: nothing there")} for doc in random_docs(12)]
    assert len(chat_task(docs, OURS).run(load(batch_size=4))) == 12  # bad data is not a bug


def test_an_unknown_noise_ends_the_run_at_once(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(4)
    docs[2]["image"] = NoiseError("noise: severity must be 1 to 5, got 6")
    with pytest.raises(NoiseError, match="severity"):
        chat_task(docs, OURS).run(load())


def test_out_of_memory_halves_the_batch(
    load: Load, chat_task: Any, random_docs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = random_docs(20)
    expected = envelopes(chat_task(docs, OURS), load(batch_size=8))
    model = load(batch_size=8, use_cache="true")  # another object: its batch limit will change
    sizes: list[int] = []
    forward = model._model.generate

    def limited(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated limit of 3 sequences)")
        return forward(**inputs)

    monkeypatch.setattr(model._model, "generate", limited)
    got = envelopes(chat_task(docs, OURS), model)
    assert [e.text for e in got] == [e.text for e in expected]
    assert all(e.error is None for e in got)
    assert [size for size in sizes if size > 3] == [8, 4]  # learned once, not in every batch


def test_logits_that_are_not_finite_are_a_named_failure(
    load: Load, chat_task: Any, random_docs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(batch_size=4, use_cache="yes")
    weight = model._model.lm_head.weight
    monkeypatch.setattr(model._model.lm_head, "weight", torch.nn.Parameter(torch.full_like(weight, math.nan)))
    with pytest.raises(RuntimeError, match="the logits of step 1 are not finite"):  # all alike: the run is given up
        chat_task(random_docs(6), OURS).run(model)
    assert decode(chat_task(random_docs(1), OURS).run(model)[0]).error.startswith("model: the logits of step 1")


def test_images_and_tensors_are_let_go(load: Load, chat_task: Any, random_docs: Any) -> None:
    """A run of 100,000 pictures must hold those of a few batches only, also when samples fail."""
    alive: list[weakref.ref[Image.Image]] = []
    most = 0

    class FreshImages(chat_task):  # type: ignore[misc]
        def doc_to_messages(self, doc: dict[str, Any]) -> list[dict[str, Any]]:
            nonlocal most
            image = doc["image"].copy()
            alive.append(weakref.ref(image))
            most = max(most, sum(reference() is not None for reference in list(alive)))
            return super().doc_to_messages({**doc, "image": image})

    docs = random_docs(120)
    for doc in docs[::10]:
        doc["question"] += " <image>"  # fails in the processor, whose frames hold the batch
    FreshImages(docs, OURS).run(load(batch_size=2))
    assert len(alive) == 120
    # 24 ahead of the device, in the window and in encoded batches; a few more in tracebacks until they are collected
    assert most <= 40
    gc.collect()
    assert sum(reference() is not None for reference in alive) == 0


# arguments


def test_arguments_from_the_command_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = (
        f"pretrained={tiny_checkpoint},dtype=fp32,trust_remote_code=False,batch_size=4,workers=0,artifacts={tmp_path}"
    )
    model = BitquakeHF.create_from_arg_string(text, {"batch_size": 1, "max_batch_size": None, "device": "cpu"})
    assert (model.batch_size, model.dtype, model.device.type) == (4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="batch_size is 4 in model_args and '8'"):
        BitquakeHF.create_from_arg_string(text, {"batch_size": "8"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantt": "none"}, TypeError, "unknown argument 'quantt'. Did you mean 'quant'"),
        ({"max_num_frames": 3}, TypeError, "Known: pretrained, quant, execution, base"),
        ({"dtype": "auto"}, ValueError, "bfloat16, float16 or float32, got 'auto'"),
        ({"batch_size": "auto"}, ValueError, "whole number, got 'auto'. Automatic"),
        ({"batch_size": 0}, ValueError, "at least 1, got 0"),
        ({"trust_remote_code": "perhaps"}, ValueError, "true or false"),
        ({"revision": 12e4}, ValueError, "revision must be a string"),
        ({"quant": "rtn-int4-g12x"}, ValueError, "rtn-int4-g12x"),
        ({"max_pixels": 1000}, ValueError, "no such setting"),
        ({"pretrained": ""}, ValueError, "pretrained is empty"),
        ({"pretrained": "bitquake/no-such-model"}, ValueError, "bitquake/no-such-model"),
    ],
)
def test_arguments_that_cannot_be_honoured(
    load: Load, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(**arguments)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True},
        {"temperature": 0.7},
        {"num_beams": 3},
        {"n": 4},
        {"repetition_penalty": 1.1},
        {"max_new_tokens": -1},
    ],
)
def test_what_a_greedy_model_cannot_do_is_refused(
    load: Load, chat_task: Any, random_docs: Any, kwargs: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="task 'task': generation_kwargs"):
        chat_task(random_docs(1)).run(load(), **kwargs)


def test_harmless_generation_kwargs(load: Load, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(2)
    stock = {"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "image_aspect_ratio": "original"}
    assert chat_task(docs).run(load(), **stock) == chat_task(docs).run(load())


def test_other_request_types_are_refused(load: Load) -> None:
    for method in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="generate_until tasks only"):
            getattr(load(), method)([])
