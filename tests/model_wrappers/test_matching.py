"""BLIP-2's image-text matching head through the wrapper, against the model class's own forward, one pair at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from bitquake.envelope import decode
from bitquake.model_wrappers.components import component_map
from bitquake.model_wrappers.quant_cards import load_card

Load = Callable[..., Any]
TASK = {"bitquake": {"envelope": True, "protocol": "retrieval", "candidates_field": "captions"}}
_WORDS = "red green blue dog cat man woman with a the on in hat ball runs sits big describe picture"
WORDS = _WORDS.split()
N_QUERIES = 4
QUANT = "rtn-int4-g64:components=vision+connector"


def build(path: Path, image_token: bool) -> Path:
    """As the published checkpoints are made; newer ones know an image token, which stands for each query."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 16, "width": 16}),
        tokenizer,
        num_query_tokens=N_QUERIES if image_token else None,
    )
    config = Blip2Config(
        vision_config={
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        },
        qformer_config={
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
            "encoder_hidden_size": 24, "cross_attention_frequency": 2, "vocab_size": len(words),
            "use_qformer_text_input": True, "max_position_embeddings": 32,
        },
        num_query_tokens=N_QUERIES,
        image_text_hidden_size=16,
        image_token_index=len(words) if image_token else None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0.0, 0.5 if "embed" in name or "query" in name else 1.2 / weight[0].numel() ** 0.5)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {kind: build(tmp_path_factory.mktemp("itm"), kind) for kind in (False, True)}


def random_rows(n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(n)
    return [
        {
            "question": "describe the picture",
            "image": Image.fromarray(rng.integers(0, 256, (*rng.integers(16, 50, 2), 3), dtype=np.uint8)),
            "captions": [" ".join(rng.choice(WORDS[:-2], rng.integers(1, 12))) for _ in range(9)],
        }
        for _ in range(n)
    ]


@torch.no_grad()
def oracle(path: Path, row: dict[str, Any]) -> list[float]:
    """Log-odds of a match, each pair in a forward of its own."""
    model = Blip2ForImageTextRetrieval.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    found = []
    for caption in row["captions"]:
        inputs = processor(images=row["image"], text=caption, return_tensors="pt")
        p = model(**inputs, use_image_text_matching_head=True).logits_per_image[0].double().softmax(dim=-1)
        found.append(float(p[1].log() - p[0].log()))
    return found


@pytest.mark.parametrize("image_token", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_odds_equal_the_models_own_forward(
    load: Load, checkpoints: dict[bool, Path], chat_task: Any, image_token: bool, attention: str
) -> None:
    path, rows = checkpoints[image_token], random_rows(3)
    model = load(pretrained=str(path), batch_size=4, attn_implementation=attention)
    for row, text in zip(rows, chat_task(rows, TASK).run(model), strict=True):
        got, expected = decode(text), oracle(path, row)
        assert got.candidate_scores == pytest.approx(expected, abs=1e-4)
        assert np.ptp(expected) > 0.1
        assert got.candidate_kind == "matching"
        best = int(np.argmax(expected))
        assert got.text == row["captions"][best]
        assert got.confidence == {
            "candidates": pytest.approx(float(np.exp(expected[best]) / np.exp(expected).sum()), abs=1e-5)
        }
        assert (got.n_tokens, got.entropy_first, got.processed_sizes) == (0, None, [(16, 16)])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision(
    load: Load, checkpoints: dict[bool, Path], chat_task: Any, dtype: str, tolerance: float
) -> None:
    rows = random_rows(3)
    got = [decode(t) for t in chat_task(rows, TASK).run(load(pretrained=str(checkpoints[True]), dtype=dtype))]
    expected = [oracle(checkpoints[True], row) for row in rows]
    np.testing.assert_allclose([e.candidate_scores for e in got], expected, atol=tolerance)


def test_chunks_change_nothing_and_the_picture_is_encoded_once(
    load: Load, checkpoints: dict[bool, Path], chat_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(3)
    one = [decode(t) for t in chat_task(rows, TASK).run(load(pretrained=str(checkpoints[True])))]
    model, sizes = load(pretrained=str(checkpoints[True]), batch_size=5), list[int]()
    vision = model.model.vision_model.forward

    def see(*args: Any, **inputs: Any) -> Any:
        sizes.append(len(inputs["pixel_values"]))
        return vision(*args, **inputs)

    monkeypatch.setattr(model.model.vision_model, "forward", see)
    five = [decode(t) for t in chat_task(rows, TASK).run(model)]
    np.testing.assert_allclose([e.candidate_scores for e in one], [e.candidate_scores for e in five], atol=1e-5)
    assert sizes == [1, 1, 1]


def test_quantized(load: Load, checkpoints: dict[bool, Path], chat_task: Any, tmp_path: Path) -> None:
    rows = random_rows(3)
    twin = [decode(t) for t in chat_task(rows, TASK).run(load(pretrained=str(checkpoints[True]), batch_size=4))]
    model = load(pretrained=str(checkpoints[True]), batch_size=4, quant=QUANT, artifacts=str(tmp_path))
    got = [decode(t) for t in chat_task(rows, TASK).run(model)]
    difference = np.abs(np.subtract([e.candidate_scores for e in got], [e.candidate_scores for e in twin]))
    assert 0.01 < difference.max() < 5
    card = load_card(got[0].card, tmp_path)
    assert card.architecture == "Blip2ForImageTextRetrieval"
    assert {entry.component for entry in card.modules} == {"vision", "connector"}
    assert card.model_hash == got[0].model_hash != twin[0].model_hash
    with pytest.raises(ValueError, match="no Linear module of Blip2ForImageTextRetrieval belongs to language"):
        load(pretrained=str(checkpoints[True]), quant="rtn-int4-g64:components=vision+language")


def test_every_linear_has_its_cell(checkpoints: dict[bool, Path]) -> None:
    """By hand: 3 vision blocks of 4; 3 Q-Former layers with 4 + 4 + 4 dense layers, cross-attention in 0 and 2."""
    model = Blip2ForImageTextRetrieval.from_pretrained(checkpoints[True])
    parts = component_map(model)
    cells = [parts.cell(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert Counter((cell.component, cell.kind) for cell in cells) == {
        ("vision", "attention"): 6, ("vision", "mlp"): 6, ("connector", "attention"): 4 * 3 + 4 * 2,
        ("connector", "mlp"): 4 * 3, ("other", "other"): 3,
    }  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"bitquake": {"envelope": True, "protocol": "vqa"}}])
def test_other_tasks_are_refused(load: Load, checkpoints: dict[bool, Path], chat_task: Any, metadata: Any) -> None:
    with pytest.raises(ValueError, match=r"task 'task': .* only ranks captions .* protocol 'retrieval'; this one's is"):
        chat_task(random_rows(1), metadata).run(load(pretrained=str(checkpoints[True])))


def test_failures_and_the_journal(
    load: Load, checkpoints: dict[bool, Path], chat_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(5)
    rows[1]["image"] = None
    rows[3]["captions"] = []
    arguments = {"pretrained": str(checkpoints[True]), "batch_size": 4, "journal": str(tmp_path)}
    first = chat_task(rows, TASK).run(load(**arguments))
    assert [decode(t).error for t in first] == [
        None,
        "image: a blip-2 model answers about a picture, and this row has none",
        None,
        "question: candidates: 'captions' must be a list of captions, got []",
        None,
    ]
    again = load(**arguments, workers=1)
    monkeypatch.setattr(again.model.qformer, "forward", lambda **_: pytest.fail("the journal has all answers"))
    assert chat_task(rows, TASK).run(again) == first


def test_out_of_memory_halves_the_chunks(
    load: Load, checkpoints: dict[bool, Path], chat_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(2)
    expected = [decode(t).candidate_scores for t in chat_task(rows, TASK).run(load(pretrained=str(checkpoints[True])))]
    model, sizes = load(pretrained=str(checkpoints[True]), batch_size=8), list[int]()
    qformer = model.model.qformer.forward

    def limited(**inputs: Any) -> Any:
        sizes.append(len(inputs["query_embeds"]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return qformer(**inputs)

    monkeypatch.setattr(model.model.qformer, "forward", limited)
    got = [decode(t).candidate_scores for t in chat_task(rows, TASK).run(model)]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert sizes == [8, 4, 4, 1, 4, 4, 1]
