"""Tiny models with random weights, saved and loaded like any hub model: own tokenizer, processor, chat template."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


SPECIAL = [
    "<pad>", "<unk>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<video>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)),
]  # fmt: skip
_CAPTION_WORDS = (
    "user assistant : what is there red green blue dog cat man woman with a the on in hat ball runs sits big"
)
CAPTION_WORDS = _CAPTION_WORDS.split()
END = SPECIAL.index("</s>")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *CAPTION_WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=SPECIAL[4:],
    )  # fmt: skip


def _template(image: str) -> str:
    return (
        "{% for message in messages %}{{ message['role'] }} : {% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}" + image + "{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
        " </s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    )


def _processor(name: str) -> Any:
    import transformers as hf

    tokenizer, template, size = _tokenizer(), _template("<image> "), {"height": 32, "width": 32}
    if name in ("idefics3", "smolvlm"):  # SmolVLM's own processor needs num2words; it lays images out as Idefics3's
        tiles = hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        return hf.Idefics3Processor(tiles, tokenizer, image_seq_len=4, chat_template=template)
    if name.startswith("qwen"):
        grid = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 2048}
        images, template = hf.Qwen2VLImageProcessor(**grid), _template("<|vision_start|><|image_pad|><|vision_end|> ")
        if name == "qwen3_vl":
            video = hf.Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
            return hf.Qwen3VLProcessor(images, tokenizer, video, chat_template=template)
        return hf.Qwen2VLProcessor(images, tokenizer, hf.Qwen2VLVideoProcessor(**grid), chat_template=template)
    if name == "llava":
        images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        return hf.LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=template,
        )  # fmt: skip
    if name == "llava_onevision":
        patches = hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
        return hf.LlavaOnevisionProcessor(
            patches, tokenizer, hf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16,
            vision_feature_select_strategy="full", chat_template=template,
        )  # fmt: skip
    if name.startswith("paligemma"):  # and no template: the wrapper's own
        images = hf.SiglipImageProcessor(size=size)
        images.image_seq_length = 16
        return hf.PaliGemmaProcessor(images, tokenizer)
    return hf.Blip2Processor(hf.BlipImageProcessor(size=size), tokenizer, num_query_tokens=4)


def _config(name: str, *, n_vocabulary: int, vision_blocks: int, text_blocks: int) -> dict[str, Any]:
    text = {
        "vocab_size": n_vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": text_blocks,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3, "max_position_embeddings": 512,
    }  # fmt: skip
    tower = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": vision_blocks, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    siglip = {"model_type": "siglip_vision_model", "vision_use_head": False, **tower}
    if name in ("idefics3", "smolvlm"):
        return {
            "vision_config": tower, "text_config": {"model_type": "llama", **text}, "scale_factor": 2,
            "image_token_id": 4,
        }  # fmt: skip
    if name.startswith("qwen"):
        vision = {"depth": vision_blocks, "num_heads": 2, "patch_size": 4, "hidden_size": 32} | {
            "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
            "qwen2_5_vl": {"out_hidden_size": 32, "intermediate_size": 40, "fullatt_block_indexes": [1],
                           "window_size": 16},
            "qwen3_vl": {"out_hidden_size": 32, "intermediate_size": 40, "num_position_embeddings": 64,
                         "deepstack_visual_indexes": list(range(0, vision_blocks, 2))},
        }[name]  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        ids = {word: i for i, word in enumerate(SPECIAL)}
        return {
            "vision_config": vision, "text_config": text | {"rope_parameters": rope},
            "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        }  # fmt: skip
    if name == "llava":
        clip = {"model_type": "clip_vision_model", **tower}
        return {"vision_config": clip, "text_config": {"model_type": "llama", **text}, "image_token_index": 4}
    if name == "llava_onevision":
        return {
            "vision_config": siglip, "text_config": {"model_type": "qwen2", **text}, "image_token_index": 4,
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }  # fmt: skip
    if name.startswith("paligemma"):
        # PaliGemma 2: layers that see 8 positions back only, fewer than the prompt and some captions have
        gemma = {"model_type": "gemma2", "sliding_window": 8} if name[-1] == "2" else {"model_type": "gemma"}
        return {"vision_config": siglip, "text_config": gemma | text, "image_token_index": 4, "projection_dim": 32}
    return {
        "vision_config": tower, "num_query_tokens": 4, "image_token_index": 4,
        "qformer_config": {"hidden_size": 24, "num_hidden_layers": vision_blocks, "num_attention_heads": 2,
                           "intermediate_size": 40, "encoder_hidden_size": 24, "cross_attention_frequency": 2,
                           "vocab_size": n_vocabulary},
        "text_config": {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256,
                        **{key: text[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id",
                                                      "num_attention_heads", "bos_token_id", "eos_token_id")}},
    }  # fmt: skip


class TinyExample(NamedTuple):
    """One picture, question and answer, ready for ``model(**inputs)``: float32 on the CPU, a batch of 1."""

    inputs: dict[str, Any]
    image: Any  # bool (T,): positions of the image tokens in the language model's sequence
    answer: Any  # bool (T,): positions of the answer's four words and its end


class TinyArchitectures:
    """Tiny random models of the nine mapped architectures (and ``paligemma2``), by their ``model_type``.

    The names are ``components.ARCHITECTURES``'. Weights are large enough that logits vary; the same arguments give the
    same weights. A model has 40,000 to 90,000 parameters, and its tokenizer knows ``SPECIAL`` and ``CAPTION_WORDS``.
    """

    names = (
        "blip-2", "idefics3", "llava", "llava_onevision", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm",
    )  # fmt: skip
    special, words, end = SPECIAL, CAPTION_WORDS, END

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._processors: dict[str, Any] = {}
        self._checkpoints: dict[str, Path] = {}

    def processor(self, name: str) -> Any:
        """Processor of an architecture (read it; do not change it)."""
        if name not in self._processors:
            self._processors[name] = _processor(name)
        return self._processors[name]

    def config(self, name: str, *, vision_blocks: int = 2, text_blocks: int = 3) -> Any:
        from transformers import CONFIG_MAPPING

        n_vocabulary = len(self.processor(name).tokenizer)
        return CONFIG_MAPPING[name.removesuffix("2") if name == "paligemma2" else name](
            **_config(name, n_vocabulary=n_vocabulary, vision_blocks=vision_blocks, text_blocks=text_blocks)
        )

    def make(self, name: str, *, vision_blocks: int = 2, text_blocks: int = 3, seed: int = 5) -> Any:
        """A fresh model in float32 on the CPU, in evaluation mode."""
        import torch
        from transformers import AutoModelForImageTextToText, GenerationConfig

        config = self.config(name, vision_blocks=vision_blocks, text_blocks=text_blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(config).eval()
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if weight.ndim >= 2:  # the usual 0.02 leaves every logit at zero
                        embeds = "embed" in key or "lm_head" in key
                        weight.normal_(0.0, 0.5 if embeds else 1.2 / weight[0].numel() ** 0.5)
                head = model.get_output_embeddings().weight
                head[: len(SPECIAL)] = 0.0
                head[len(SPECIAL) + len(CAPTION_WORDS) :] = 0.0  # PaliGemma's locations
                head[END] = head[len(SPECIAL) : len(SPECIAL) + len(CAPTION_WORDS)].mean(dim=0) * 4
        model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=3, pad_token_id=0)
        return model

    def checkpoint(self, name: str) -> Path:
        """Folder of ``make(name)`` and its processor, saved as a hub model is."""
        if name not in self._checkpoints:
            path = self._folder(name)
            self.make(name).save_pretrained(path)
            self.processor(name).save_pretrained(path)
            self._checkpoints[name] = path
        return self._checkpoints[name]

    def example(self, name: str, *, seed: int = 0) -> TinyExample:
        """Inputs with a random picture, question and answer; another seed, another example of another length."""
        import torch

        rng, processor = np.random.default_rng(seed), self.processor(name)
        height, width = rng.integers(20, 70, 2)
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        question = " ".join(rng.choice(CAPTION_WORDS[3:], rng.integers(2, 6)))
        prompt = question
        if processor.chat_template is not None:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        elif name.startswith("paligemma"):
            prompt = f"<image>{question}"
        inputs = dict(processor(text=[prompt], images=[picture], return_tensors="pt"))
        inputs.pop("labels", None)
        answer = torch.from_numpy(rng.choice(np.arange(3, len(CAPTION_WORDS)), (1, 4)) + len(SPECIAL))
        answer = torch.cat([answer, torch.tensor([[END]])], dim=1)
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key, kind in (("token_type_ids", 1), ("mm_token_type_ids", 0)):  # PaliGemma: an answer is of type 1
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.full_like(answer, kind)], dim=1)
        image_token = SPECIAL.index("<|image_pad|>" if name.startswith("qwen") else "<image>")
        tokens = inputs["input_ids"][0]
        return TinyExample(inputs, tokens == image_token, torch.arange(len(tokens)) >= start)


@pytest.fixture(scope="session")
def tiny_architectures(tmp_path_factory: pytest.TempPathFactory) -> TinyArchitectures:
    return TinyArchitectures(tmp_path_factory.mktemp)


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
