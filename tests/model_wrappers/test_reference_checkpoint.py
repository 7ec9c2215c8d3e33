"""The shipped checkpoint: how it is stored, how it loads, and that it can do what its card says (on some questions)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitquake.model_wrappers import checkpoints

NAME = "bitquake/block-idefics3"


@pytest.fixture(scope="module")
def folder() -> Path:
    return checkpoints.resolve(NAME)


def test_it_is_small_and_holds_nothing_that_runs_code(folder: Path) -> None:
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert "auto_map" not in (folder / "config.json").read_text()


def test_its_card_names_what_made_it(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for word in ("seed", "train-reference", "Hardware", "Curve", "block_vqav2", "block_refcocoplus", "rtn-int3-g64"):
        assert word in card, word
    assert json.loads((folder / "training.json").read_text())["recipe"]["seed"] == 0


def test_unknown_checkpoints_are_named() -> None:
    with pytest.raises(ValueError, match=r"no such reference checkpoint; shipped are bitquake/block-idefics3"):
        checkpoints.resolve("bitquake/block-llava")


def test_it_answers_far_above_the_prior_and_int2_breaks_it(folder: Path) -> None:
    """Teacher-free check without lmms-eval: first answer word on 200 questions, full precision against INT2."""
    import io

    import pyarrow.parquet as pq
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.model_wrappers.quantizers.replace import quantize_model
    from bitquake.tasks.world.build import data_file

    rows = pq.read_table(data_file("block_vqav2", "test")).slice(0, 200).to_pylist()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"

    def accuracy(quant: str, blank: bool = False) -> float:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
        quantize_model(model, load_spec(quant))
        texts, images = [], []
        for row in rows:
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            message = {"role": "user", "content": content}
            texts.append(processor.apply_chat_template([message], add_generation_prompt=True))
            picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            images.append([Image.new("RGB", (64, 64), (100, 100, 100)) if blank else picture])
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs = zip(answers, rows, strict=True)
        matches = [sum(a["answer"] == answer.strip() for a in row["answers"]) for answer, row in pairs]
        return sum(min(1.0, 0.3 * count) for count in matches) / len(rows)

    full = accuracy("none")
    assert full >= 0.80
    assert full >= accuracy("none", blank=True) + 0.25
    assert accuracy("rtn-int2-g64") <= full - 0.15
