"""Caption scores on nine architectures: key-value cache against full passes, the plain model and greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from bitquake.envelope import decode
from bitquake.model_wrappers.confidence import box_confidences, read_answer
from bitquake.model_wrappers.retrieval import CACHED

Load = Callable[..., Any]
TASK = {"bitquake": {"envelope": True, "protocol": "retrieval", "candidates_field": "captions"}}


def random_rows(words: list[str], n: int, n_captions: int) -> list[dict[str, Any]]:
    """Pictures of several shapes, prompts and captions of several lengths, a caption twice."""
    rng = np.random.default_rng(n)
    rows = []
    for _ in range(n):
        height, width = rng.integers(20, 70, 2)
        captions = [" ".join(rng.choice(words[3:], rng.integers(1, 13))) for _ in range(n_captions - 1)]
        rows.append(
            {
                "question": " ".join(rng.choice(words[3:], rng.integers(1, 6))),
                "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
                "captions": [*captions, captions[0]],
            }
        )
    return rows


class Oracle:
    """One caption at a time through the plain model: prompt, picture and caption in one pass, nothing cached."""

    def __init__(self, path: Path, template: str, end: int) -> None:
        self.processor, self.template, self.end = AutoProcessor.from_pretrained(path), template, end
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_probs(self, row: dict[str, Any], caption: str) -> np.ndarray:
        images = [] if row["image"] is None else [row["image"]]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": row["question"]}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, chat_template=self.template
        )
        inputs = dict(self.processor(text=[prompt], images=[images] if images else None, return_tensors="pt"))
        inputs.pop("labels", None)
        tokens = torch.tensor([[*self.processor.tokenizer.convert_tokens_to_ids(caption.split()), self.end]])
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "token_type_ids" in inputs:  # PaliGemma: an answer is of type 1
            inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.ones_like(tokens)], dim=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
        p = self.model(**inputs).logits[0].double().softmax(dim=-1)
        steps = range(start - 1, start - 1 + tokens.shape[1])
        return np.log([float(p[at, token]) for at, token in zip(steps, tokens[0].tolist(), strict=True)])


NAMES = [*sorted(CACHED), "paligemma2"]


def test_every_cached_architecture_is_tested(tiny_architectures: Any) -> None:
    from bitquake.model_wrappers.components import ARCHITECTURES

    assert set(ARCHITECTURES) == CACHED == set(tiny_architectures.names) == set(NAMES) - {"paligemma2"}


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_plain_model_one_caption_at_a_time(
    load: Load, tiny_architectures: Any, chat_task: Any, name: str
) -> None:
    path, rows = tiny_architectures.checkpoint(name), random_rows(tiny_architectures.words, 3, 9)
    rows.append({**rows[0], "question": "is", "image": None})  # answered last: it must not see the picture before it
    cached = load(pretrained=str(path), batch_size=4)
    oracle = Oracle(path, cached.processor.chat_template, tiny_architectures.end)
    got = [decode(text) for text in chat_task(rows, TASK).run(cached)]
    full = [
        decode(text) for text in chat_task(rows, TASK).run(load(pretrained=str(path), batch_size=4, use_cache=False))
    ]
    if cached.config.model_type in ("paligemma", "blip-2"):
        missing = f"image: a {cached.config.model_type} model answers about a picture, and this row has none"
        assert got.pop().error == full.pop().error == missing
        rows.pop()
    assert [e.error for e in got + full] == [None] * 2 * len(rows)
    for row, a, b in zip(rows, got, full, strict=True):
        steps = [oracle.log_probs(row, caption) for caption in row["captions"]]
        expected = [float(step.sum()) for step in steps]
        assert a.candidate_scores == pytest.approx(expected, abs=2e-4)
        assert b.candidate_scores == pytest.approx(expected, abs=2e-4)
        assert np.ptp(expected) > 1
        assert a.candidate_kind == "log_probability"
        best = int(np.argmax(expected))
        p = np.exp(steps[best])
        wanted = {
            "joint": math.prod(p), "joint_no_eos": math.prod(p[:-1]), "minimum": min(p[:-1]), "first_token": p[0],
            "geometric_mean": math.prod(p[:-1]) ** (1 / (len(p) - 1)), "margin": None,
            "candidates": float(np.exp(expected[best]) / np.exp(expected).sum()),
        }  # fmt: skip
        assert (a.text, a.n_tokens) == (row["captions"][best], len(p))
        assert a.confidence == pytest.approx(wanted, abs=1e-4)
        assert a.entropy_first == pytest.approx(b.entropy_first, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_scores_what_greedy_decoding_gave_it(
    load: Load, tiny_architectures: Any, chat_task: Any, name: str
) -> None:
    """The model's own answer as the only candidate: the same prompt, positions and attention as in generation."""
    model = load(pretrained=str(tiny_architectures.checkpoint(name)), batch_size=4)
    rows = random_rows(tiny_architectures.words, 10, 2)
    plain = {"bitquake": {"envelope": True}}
    answers = [decode(text) for text in chat_task(rows, plain).run(model, max_new_tokens=9)]
    said = [(row, e) for row, e in zip(rows, answers, strict=True) if e.text]
    assert len({e.text for _, e in said}) >= 5
    asked = [{**row, "captions": [e.text]} for row, e in said]
    for (_, answer), text in zip(said, chat_task(asked, TASK).run(model), strict=True):
        got = decode(text)
        shared = ["joint_no_eos", "geometric_mean", "minimum", "first_token", *([] if answer.truncated else ["joint"])]
        assert [got.confidence[key] for key in shared] == pytest.approx(
            [answer.confidence[key] for key in shared], abs=1e-5
        )
        assert math.exp(got.candidate_scores[0]) == pytest.approx(got.confidence["joint"], abs=1e-9)
        assert got.entropy_first == pytest.approx(answer.entropy_first, abs=1e-4)
        assert (got.prompt_hash, got.pixel_hash) == (answer.prompt_hash, answer.pixel_hash)
        assert (got.confidence["candidates"], got.text) == (1.0, answer.text)


def test_location_tokens_stay_in_the_text_and_count_as_coordinates(tiny_architectures: Any) -> None:
    """PaliGemma's processor adds <loc0000> to <loc1023> as tokens that decoding keeps; a box is four of them."""
    tokenizer, end = tiny_architectures.processor("paligemma").tokenizer, tiny_architectures.end
    tokens = tokenizer("<loc0102><loc0204><loc0511><loc0767> dog", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 5
    answer = read_answer(tokenizer, [*tokens, end], frozenset([end]), with_ends=True)
    got = box_confidences(answer.text, answer.ends, np.log([0.5, 0.9, 0.8, 0.7, 0.1, 0.2]))
    assert got == pytest.approx({
        "box_joint": 0.5 * 0.9 * 0.8 * 0.7, "box_geometric_mean": (0.5 * 0.9 * 0.8 * 0.7) ** 0.25, "box_minimum": 0.5,
    })  # fmt: skip
