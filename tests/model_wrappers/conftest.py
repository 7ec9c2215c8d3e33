"""A tiny Idefics3 with random weights, saved and loaded like any hub model: own tokenizer, processor, chat template."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR = 32, 8, 2
_WORDS = (
    "user assistant question answer what color shape is the how many are there where object red green blue yellow "
    "circle square triangle star large small left right above below yes no none of image with or and short word box "
    "a b c d e A B C D E 0 1 2 3 4 5 6 7 8 9 10 . , : ? ! ; [ ] ( ) one two three four five"
)
WORDS = _WORDS.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_tiny_idefics3(path: Path, *, seed: int = 0, generation: dict[str, object] | None = None) -> Path:
    """Write a checkpoint of 60 k parameters to ``path``; the words that end an answer are common, so answers vary.

    ``generation``: further entries of ``generation_config.json``.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<unk>", "<s>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="<end_of_utterance>",
        additional_special_tokens=special[4:],
    )  # fmt: skip
    image_processor = Idefics3ImageProcessor(
        size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        image_processor,
        tokenizer,
        image_seq_len=(IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    config = Idefics3Config(
        image_token_id=vocabulary["<image>"],
        scale_factor=SCALE_FACTOR,
        pad_token_id=0,
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:  # the usual 0.02 leaves every logit at zero and every answer the same
                weight.normal_(0.0, 0.6 if "embed" in name or "lm_head" in name else 1.3 / weight[0].numel() ** 0.5)
        # never answers with an image token: a full pass over such an answer would miss an image
        model.lm_head.weight[[0, 1, 2, 4, 5, 6]] = 0.0
    model.generation_config = GenerationConfig(
        bos_token_id=2,
        eos_token_id=[3, *(vocabulary[word] for word in (".", "none", "short", "!", ";", "or", "and"))],
        pad_token_id=0,
        **(generation or {}),
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_idefics3(tmp_path_factory.mktemp("tiny_idefics3"))


class FakeConfig:
    def __init__(self, metadata: object) -> None:
        self.metadata = metadata


class ChatTask:
    """What requests hold of an lmms-eval task: ``doc_to_messages`` bound to an object with a ``config``, and documents.

    Documents: ``{"question": str, "image": PIL image | None | exception to raise, ...}``.
    """

    def __init__(self, docs: list[dict[str, Any]], metadata: object = None, name: str = "task") -> None:
        self.docs, self.config, self.name = docs, FakeConfig(metadata), name

    def doc_to_messages(self, doc: dict[str, Any]) -> list[dict[str, Any]]:
        if isinstance(doc["image"], BaseException):
            raise doc["image"]
        images = [] if doc["image"] is None else [{"type": "image", "url": doc["image"]}]
        return [{"role": "user", "content": [*images, {"type": "text", "text": doc["question"]}]}]

    def requests(self, **gen_kwargs: object) -> list[Any]:
        from lmms_eval.api.instance import Instance

        gen_kwargs = {"max_new_tokens": 8, **gen_kwargs}
        return [
            Instance(
                request_type="generate_until",
                arguments=(doc["question"], self.doc_to_messages, dict(gen_kwargs), i, self.name, "test"),
                idx=0,
                metadata={"task": self.name, "doc_id": i, "repeats": 1},
            )
            for i, doc in enumerate(self.docs)
        ]

    def run(self, model: Any, **gen_kwargs: object) -> list[str]:
        """Responses of a model to all documents."""
        model.task_dict[self.name] = {"test": self.docs}
        return [result.text for result in model.generate_until(self.requests(**gen_kwargs))]


def random_docs(n: int, *, seed: int = 0, text_only_every: int = 0) -> list[dict[str, Any]]:
    """Questions of 1 to 12 words on noise pictures of several sizes."""
    rng = np.random.default_rng(seed)
    docs: list[dict[str, Any]] = []
    for i in range(n):
        height, width = rng.integers(16, 80, 2)
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        text_only = text_only_every and i % text_only_every == 0
        question = " ".join(rng.choice(WORDS[3:40], rng.integers(1, 13)))
        docs.append(
            {"question": question, "image": None if text_only else picture, "choices": ["x"] * int(rng.integers(2, 6))}
        )
    return docs


@pytest.fixture(scope="session")
def load(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``load(**arguments)``: the wrapper on the tiny checkpoint, float32, CPU; equal arguments give one object."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    loaded: dict[str, Any] = {}

    def load(**arguments: Any) -> Any:
        from bitquake.model_wrappers.bitquake_hf import BitquakeHF

        key = repr(sorted(arguments.items()))
        if key not in loaded:
            defaults = {
                "pretrained": str(tiny_checkpoint),
                "dtype": "float32",
                "device": "cpu",
                "artifacts": str(artifacts),
            }
            loaded[key] = BitquakeHF(**{**defaults, **arguments})
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def build_checkpoint() -> Callable[..., Path]:
    return build_tiny_idefics3


@pytest.fixture(scope="session")
def chat_task() -> type[ChatTask]:
    return ChatTask


@pytest.fixture(scope="session", name="random_docs")
def random_docs_fixture() -> Callable[..., list[dict[str, Any]]]:
    return random_docs


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Lines of loguru, which lmms-eval and we log to."""
    from loguru import logger

    lines: list[str] = []
    handler = logger.add(lambda message: lines.append(str(message)), level="INFO")
    yield lines
    logger.remove(handler)
