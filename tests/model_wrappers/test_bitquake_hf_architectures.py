"""What differs between architectures: processed sizes, tiles, pixel bounds, a second model family end to end."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    Idefics3ImageProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from bitquake.envelope import decode
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.generation import GenerationRequest
from bitquake.model_wrappers.loading import processed_sizes
from bitquake.model_wrappers.samples import Sample
from bitquake.model_wrappers.task_contract import TaskContract

Load = Callable[..., Any]
OURS = {"bitquake": {"envelope": True}}


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class WithImageProcessor:
    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (31, 900), (640, 480)])
def test_processed_size_of_a_patch_grid(size: tuple[int, int]) -> None:
    """Published rule of Qwen2-VL: both sides to the nearest multiple of 28, inside the pixel bounds here."""
    image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 1000)
    inputs = image_processor([picture(*size)], return_tensors="pt")
    expected = tuple(round(side / 28) * 28 for side in size)
    assert processed_sizes(WithImageProcessor(image_processor), inputs, [[], [size]]) == [[], [expected]]


def test_processed_size_of_tiles() -> None:
    """Idefics3 splits into tiles of ``max_image_size``; the tiles themselves say how large the picture was made."""
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    sizes = [[(64, 64), (100, 50)], [(20, 90)]]
    inputs = image_processor(
        [[picture(*size) for size in row] for row in sizes], return_tensors="pt", return_row_col_info=True
    )
    expected = [
        [(columns * 32, rows * 32) for rows, columns in zip(*each, strict=True)]
        for each in zip(inputs["rows"], inputs["cols"], strict=True)
    ]
    assert all(width > 32 or height > 32 for row in expected for width, height in row)
    assert processed_sizes(WithImageProcessor(image_processor), inputs, sizes) == expected


def test_processed_size_without_tiles_is_the_unpadded_picture() -> None:
    image_processor = Idefics3ImageProcessor(do_image_splitting=False, max_image_size={"longest_edge": 40})
    inputs = image_processor([[picture(64, 32)], [picture(10, 20)]], return_tensors="pt")
    assert processed_sizes(WithImageProcessor(image_processor), inputs, [[(64, 32)], [(10, 20)]]) == [
        [(40, 40)],
        [(40, 40)],
    ]


def test_processed_size_is_not_guessed() -> None:
    assert processed_sizes(WithImageProcessor(object()), {"pixel_values": torch.zeros(3, 7)}, [[(5, 5)]]) == [[]]
    assert processed_sizes(WithImageProcessor(object()), {}, [[(5, 5)]]) == [[]]


@pytest.fixture(scope="module")
def tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny_qwen2_vl")
    special = ["<pad>", "<unk>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = [*special, "user", "assistant", "what", "is", "there", "red", "green", "blue", *":?,.ABCD0123", *alphabet]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    template = (
        "{% for message in messages %}{{ message['role'] }} : {% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ content['text'] }}"
        "{% endif %}{% endfor %} <|im_end|> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    )
    bounds = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**bounds), tokenizer, Qwen2VLVideoProcessor(**bounds), chat_template=template
    ).save_pretrained(path)
    config = Qwen2VLConfig(
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        text_config={
            "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
    )  # fmt: skip
    torch.manual_seed(3)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(
                    0.0, 0.6 if "embed_tokens" in name or "lm_head" in name else 1.3 / weight[0].numel() ** 0.5
                )
        model.lm_head.weight[[0, 1, 3, 4, 5, 6]] = 0.0
    model.generation_config = GenerationConfig(
        eos_token_id=[2, *range(7, 12)],
        pad_token_id=0,
        do_sample=True,
        top_k=1,
        temperature=0.01,
        repetition_penalty=1.05,
    )
    model.save_pretrained(path)
    return path


def test_qwen2_vl_end_to_end(load: Load, tiny_qwen2_vl: Path, chat_task: Any, random_docs: Any) -> None:
    """Another family: own image tokens and positions, sampling defaults in its files, sizes that vary in a batch."""
    docs = random_docs(24, text_only_every=6)
    one = [decode(r) for r in chat_task(docs, OURS).run(load(pretrained=str(tiny_qwen2_vl), batch_size=1))]
    eight = [decode(r) for r in chat_task(docs, OURS).run(load(pretrained=str(tiny_qwen2_vl), batch_size=8))]
    for doc, a, b in zip(docs, one, eight, strict=True):
        assert a.error is None and b.error is None
        assert (a.text, a.n_tokens, a.truncated) == (b.text, b.n_tokens, b.truncated)
        assert a.confidence == pytest.approx(b.confidence, abs=1e-5)
        assert a.processed_sizes == b.processed_sizes
        assert len(a.processed_sizes) == (doc["image"] is not None)
        assert all(side % 8 == 0 for size in a.processed_sizes for side in size)
    assert len({e.text for e in one}) > 5
    assert len({e.processed_sizes[0] for e in one if e.processed_sizes}) > 3
    assert max(e.confidence["first_token"] for e in one) < 0.9999  # sampling with top_k=1 would make every one 1.0


def test_images_reach_the_processor_by_sample() -> None:
    """LLaVA-OneVision cuts a sample's only image into patches, and leaves the images of a sample of several whole."""
    words = ["<unk>", "<pad>", "</s>", "<image>", "<video>", "what"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [64, 64]]),
        PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", padding_side="left",
            additional_special_tokens=["<image>", "<video>"],
        ),
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    wrapper: Any = SimpleNamespace(
        processor=processor, _encode_lock=threading.Lock(), _positions=lambda samples, inputs: None
    )
    samples = [
        Sample(
            index, "task", TaskContract(), GenerationRequest(4),
            prompt="<image> " * count + "what", images=[picture(60, 60) for _ in range(count)],
        )
        for index, count in enumerate((2, 1))
    ]  # fmt: skip
    both = BitquakeHF._encode(wrapper, samples)
    assert both.exception is None
    assert both.inputs["batch_num_images"].tolist() == [2, 1]
    tokens = (both.inputs["input_ids"] == words.index("<image>")).sum(dim=1)
    # 64x64 in patches: 8 rows of 8 tokens and a line end, beside the whole image; without: 16 and an end for each image
    assert tokens.tolist() == [2 * (16 + 1), 16 + 8 * (8 + 1)]


def test_pixel_bounds_reach_the_processor(load: Load, tiny_qwen2_vl: Path, chat_task: Any) -> None:
    docs = [{"question": "what is there", "image": picture(64, 64)}]
    free = decode(chat_task(docs, OURS).run(load(pretrained=str(tiny_qwen2_vl)))[0])
    bounded = decode(chat_task(docs, OURS).run(load(pretrained=str(tiny_qwen2_vl), max_pixels="600"))[0])
    assert free.processed_sizes == [(64, 64)]
    assert math.prod(bounded.processed_sizes[0]) <= 600
    assert bounded.pixel_hash == free.pixel_hash  # the picture is the same; what the model made of it is not
