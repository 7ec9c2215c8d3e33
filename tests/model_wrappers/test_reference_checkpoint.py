"""The shipped checkpoints: how they are stored, how they load, and that they do what their cards say."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bitquake.model_wrappers import checkpoints
from bitquake.tasks.world import captions

NAMES = ("bitquake/block-idefics3", "bitquake/block-qwen2vl")


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return checkpoints.resolve(request.param)


def test_both_are_listed() -> None:
    assert checkpoints.names() == list(NAMES)


def test_it_is_small_and_holds_nothing_that_runs_code(folder: Path) -> None:
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert "auto_map" not in (folder / "config.json").read_text()


def test_its_card_names_what_made_it(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for word in ("seed", "train-reference", "Hardware", "Curve", "block_vqav2", "block_coco_caption", "rtn-int3-g64"):
        assert word in card, word
    assert json.loads((folder / "training.json").read_text())["recipe"]["seed"] == 0


def test_its_tokenizer_knows_the_block_world_s_words_in_their_order(folder: Path) -> None:
    from bitquake.tasks.world import questions

    recipe = json.loads((folder / "training.json").read_text())["recipe"]
    specials = checkpoints.architecture_named(recipe.get("architecture", "idefics3")).specials
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.__getitem__) == [*specials, *questions.words()]
    assert json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"] == len(vocabulary)


def test_unknown_checkpoints_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"no such reference checkpoint; shipped are bitquake/block-idefics3, bitquake/block-qwen2vl"
    ):
        checkpoints.resolve("bitquake/block-llava")


def shipped_rows(family: str, n: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    from bitquake.tasks.world.build import data_file

    rows: list[dict[str, Any]] = pq.read_table(data_file(family, "test")).slice(0, n).to_pylist()
    return rows


def picture(row: dict[str, Any], *, blank: bool = False) -> Image.Image:
    found = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return Image.new("RGB", found.size, (100, 100, 100)) if blank else found


def loaded(folder: Path, quant: str) -> tuple[Any, Any]:
    """Model and processor as ``transformers`` reads them, the model quantized."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.model_wrappers.quantizers.replace import quantize_model

    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    quantize_model(model, load_spec(quant))
    return model, processor


def chat(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def answers(folder: Path, quant: str, rows: list[dict[str, Any]], *, tokens: int, blank: bool = False) -> list[str]:
    """Greedy answers to the rows' questions about their pictures."""
    import torch

    model, processor = loaded(folder, quant)
    texts = [chat(processor, row["question"]) for row in rows]
    images = [[picture(row, blank=blank)] for row in rows]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_answers_far_above_the_prior_and_int2_breaks_it(folder: Path) -> None:
    """Without lmms-eval: 100 questions, full precision against blank pictures and against INT2."""
    rows = shipped_rows("block_vqav2", 100)

    def accuracy(quant: str, *, blank: bool = False) -> float:
        pairs = zip(answers(folder, quant, rows, tokens=4, blank=blank), rows, strict=True)
        matches = [sum(a["answer"] == answer.strip() for a in row["answers"]) for answer, row in pairs]
        return sum(min(1.0, 0.3 * count) for count in matches) / len(rows)

    full = accuracy("none")
    assert full >= 0.80
    assert full >= accuracy("none", blank=True) + 0.25
    assert accuracy("rtn-int2-g64") <= full - 0.15


def test_it_describes_what_it_sees_and_int2_breaks_that(folder: Path) -> None:
    """CIDEr-D of 80 captions by ``pycocoevalcap``, whose tokenizer these plain words do not need."""
    from pycocoevalcap.cider.cider import Cider

    rows = shipped_rows("block_coco_caption", 80)

    def cider(captions: list[str]) -> float:
        references = {i: row["answer"] for i, row in enumerate(rows)}
        return float(Cider().compute_score(references, {i: [text.strip()] for i, text in enumerate(captions)})[0])

    full = cider(answers(folder, "none", rows, tokens=24))
    assert full >= 3.0
    assert full >= 3 * cider(["a red circle and a blue square"] * len(rows))
    assert full >= 3 * cider(answers(folder, "none", rows, tokens=24, blank=True))
    assert cider(answers(folder, "rtn-int2-g64", rows, tokens=24)) <= full / 2


def test_the_log_probability_of_a_caption_finds_its_picture(folder: Path) -> None:
    """Teacher forcing without lmms-eval: each of 20 pictures' first caption against those of the 19 others."""
    import torch

    model, processor = loaded(folder, "none")
    rows = shipped_rows("block_flickr_retrieval", 20)
    prompt = chat(processor, captions.PROMPT)
    texts = [prompt + row["caption"][0] + processor.tokenizer.eos_token for row in rows]
    found = 0
    for i, row in enumerate(rows):
        images = [[picture(row)]] * len(rows)
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
        start = processor(text=[prompt], images=images[:1], return_tensors="pt")["input_ids"].shape[1]
        with torch.no_grad():
            logs = model(**inputs).logits[:, start - 1 : -1].float().log_softmax(-1)
        chosen = logs.gather(-1, inputs["input_ids"][:, start:, None])[..., 0]
        found += int((chosen * inputs["attention_mask"][:, start:]).sum(1).argmax()) == i
    assert 0.5 <= found / len(rows) < 1
