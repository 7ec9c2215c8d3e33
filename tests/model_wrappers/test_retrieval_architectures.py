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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    GenerationConfig,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
)

from bitquake.envelope import decode
from bitquake.model_wrappers.confidence import box_confidences, read_answer
from bitquake.model_wrappers.retrieval import CACHED

Load = Callable[..., Any]
SPECIAL = [
    "<pad>", "<unk>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<video>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)),
]  # fmt: skip
_WORDS = "user assistant : what is there red green blue dog cat man woman with a the on in hat ball runs sits big"
WORDS = _WORDS.split()
END = SPECIAL.index("</s>")
SIZE = {"height": 32, "width": 32}
TASK = {"bitquake": {"envelope": True, "protocol": "retrieval", "candidates_field": "captions"}}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS]
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
    tokenizer, template = _tokenizer(), _template("<image> ")
    if name in ("idefics3", "smolvlm"):  # SmolVLM's own processor needs num2words; it lays images out as Idefics3's
        tiles = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        return Idefics3Processor(tiles, tokenizer, image_seq_len=4, chat_template=template)
    if name.startswith("qwen"):
        grid = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 2048}
        template = _template("<|vision_start|><|image_pad|><|vision_end|> ")
        if name == "qwen3_vl":
            video = Qwen3VLVideoProcessor(patch_size=4, merge_size=2)
            return Qwen3VLProcessor(Qwen2VLImageProcessor(**grid), tokenizer, video, chat_template=template)
        return Qwen2VLProcessor(
            Qwen2VLImageProcessor(**grid), tokenizer, Qwen2VLVideoProcessor(**grid), chat_template=template
        )
    if name == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
        return LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=template,
        )  # fmt: skip
    if name == "llava_onevision":
        patches = LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
        return LlavaOnevisionProcessor(
            patches, tokenizer, LlavaOnevisionVideoProcessor(size=SIZE), num_image_tokens=16,
            vision_feature_select_strategy="full", chat_template=template,
        )  # fmt: skip
    if name.startswith("paligemma"):  # and no template: the wrapper's own
        images = SiglipImageProcessor(size=SIZE)
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, tokenizer)
    return Blip2Processor(BlipImageProcessor(size=SIZE), tokenizer, num_query_tokens=4)


def _text(vocabulary: int, **further: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3, "max_position_embeddings": 512, **further,
    }  # fmt: skip


TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
IDS = {word: i for i, word in enumerate(SPECIAL)}
QWEN = {
    "image_token_id": IDS["<|image_pad|>"], "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"], "vision_end_token_id": IDS["<|vision_end|>"],
}  # fmt: skip


def _config(name: str, n: int) -> dict[str, Any]:
    """``n``: size of the vocabulary."""
    if name in ("idefics3", "smolvlm"):
        text = _text(n, model_type="llama")
        return {"vision_config": TOWER, "text_config": text, "scale_factor": 2, "image_token_id": 4}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4}
    if name == "qwen2_vl":
        own = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        return {"vision_config": {**vision, **own}, "text_config": _text(n, **ROPE), **QWEN}
    if name == "qwen2_5_vl":
        own = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 40, "fullatt_block_indexes": [1],
               "window_size": 16}  # fmt: skip
        return {"vision_config": {**vision, **own}, "text_config": _text(n, **ROPE), **QWEN}
    if name == "qwen3_vl":
        own = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 40, "deepstack_visual_indexes": [0],
               "num_position_embeddings": 64}  # fmt: skip
        return {"vision_config": {**vision, **own}, "text_config": _text(n, **ROPE), **QWEN}
    if name == "llava":
        tower = {"model_type": "clip_vision_model", **TOWER}
        return {"vision_config": tower, "text_config": _text(n, model_type="llama"), "image_token_index": 4}
    if name == "llava_onevision":
        return {
            "vision_config": SIGLIP, "text_config": _text(n, model_type="qwen2"), "image_token_index": 4,
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]], "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }  # fmt: skip
    if name.startswith("paligemma"):
        # PaliGemma 2: layers that see 8 positions back only, fewer than the prompt and some captions have
        gemma = _text(n, model_type="gemma2", sliding_window=8) if name[-1] == "2" else _text(n, model_type="gemma")
        return {"vision_config": SIGLIP, "text_config": gemma, "image_token_index": 4, "projection_dim": 32}
    qformer = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
        "encoder_hidden_size": 24, "vocab_size": n,
    }  # fmt: skip
    text = {
        "model_type": "opt", "vocab_size": n, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    return {
        "vision_config": TOWER, "qformer_config": qformer, "text_config": text, "num_query_tokens": 4,
        "image_token_index": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name in made:
            return made[name]
        processor = _processor(name)
        config = CONFIG_MAPPING[name.removesuffix("2") if name == "paligemma2" else name](
            **_config(name, len(processor.tokenizer))
        )
        torch.manual_seed(5)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.ndim >= 2:  # the usual 0.02 leaves every logit at zero
                    weight.normal_(0.0, 0.5 if "embed" in key or "lm_head" in key else 1.2 / weight[0].numel() ** 0.5)
            head = model.get_output_embeddings().weight
            head[: len(SPECIAL)] = 0.0
            head[len(SPECIAL) + len(WORDS) :] = 0.0  # PaliGemma's locations
            head[END] = head[len(SPECIAL) : len(SPECIAL) + len(WORDS)].mean(dim=0) * 4
        model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=3, pad_token_id=0)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        processor.save_pretrained(made[name])
        return made[name]

    return checkpoint


def random_rows(n: int, n_captions: int) -> list[dict[str, Any]]:
    """Pictures of several shapes, prompts and captions of several lengths, a caption twice."""
    rng = np.random.default_rng(n)
    rows = []
    for _ in range(n):
        height, width = rng.integers(20, 70, 2)
        captions = [" ".join(rng.choice(WORDS[3:], rng.integers(1, 13))) for _ in range(n_captions - 1)]
        rows.append(
            {
                "question": " ".join(rng.choice(WORDS[3:], rng.integers(1, 6))),
                "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
                "captions": [*captions, captions[0]],
            }
        )
    return rows


class Oracle:
    """One caption at a time through the plain model: prompt, picture and caption in one pass, nothing cached."""

    def __init__(self, path: Path, template: str) -> None:
        self.processor, self.template = AutoProcessor.from_pretrained(path), template
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
        tokens = torch.tensor([[*(len(SPECIAL) + WORDS.index(word) for word in caption.split()), END]])
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


def test_every_cached_architecture_is_tested() -> None:
    from bitquake.model_wrappers.components import ARCHITECTURES

    assert set(ARCHITECTURES) == CACHED == set(NAMES) - {"paligemma2"}


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_plain_model_one_caption_at_a_time(
    load: Load, checkpoint: Callable[[str], Path], chat_task: Any, name: str
) -> None:
    path, rows = checkpoint(name), random_rows(3, 9)
    rows.append({**rows[0], "question": "is", "image": None})  # answered last: it must not see the picture before it
    cached = load(pretrained=str(path), batch_size=4)
    oracle = Oracle(path, cached.processor.chat_template)
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
    load: Load, checkpoint: Callable[[str], Path], chat_task: Any, name: str
) -> None:
    """The model's own answer as the only candidate: the same prompt, positions and attention as in generation."""
    model, rows = load(pretrained=str(checkpoint(name)), batch_size=4), random_rows(10, 2)
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


def test_location_tokens_stay_in_the_text_and_count_as_coordinates() -> None:
    """PaliGemma's processor adds <loc0000> to <loc1023> as tokens that decoding keeps; a box is four of them."""
    tokenizer = _processor("paligemma").tokenizer
    tokens = tokenizer("<loc0102><loc0204><loc0511><loc0767> dog", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 5
    answer = read_answer(tokenizer, [*tokens, END], frozenset([END]), with_ends=True)
    got = box_confidences(answer.text, answer.ends, np.log([0.5, 0.9, 0.8, 0.7, 0.1, 0.2]))
    assert got == pytest.approx({
        "box_joint": 0.5 * 0.9 * 0.8 * 0.7, "box_geometric_mean": (0.5 * 0.9 * 0.8 * 0.7) ** 0.25, "box_minimum": 0.5,
    })  # fmt: skip
