"""Builds the reference model of the Idefics3 architecture, its word tokenizer and its processor, from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIDE, PATCH, SHUFFLE = 64, 8, 2
HEAD = 16
"""Width of an attention head of the language model."""
N_VISUAL = (SIDE // PATCH // SHUFFLE) ** 2
"""Visual tokens of one picture: 4 x 4, one per 16 pixels."""
BOS, EOS, UNK, PAD = "<s>", "<end_of_utterance>", "<unk>", "<pad>"
IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BOS, EOS, UNK, IMAGE, FAKE, GLOBAL, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] != 'user' %}{{ '<end_of_utterance>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_processor(words: list[str]) -> Any:
    """An ``Idefics3Processor`` with a word-level tokenizer over ``words`` and the special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        extra_special_tokens=[IMAGE, FAKE, GLOBAL, USER, ASSISTANT],
        padding_side="left",
        model_max_length=512,
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        do_resize=True,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        return_row_col_info=False,
    )
    return Idefics3Processor(images, fast, image_seq_len=N_VISUAL, chat_template=CHAT_TEMPLATE)


def build_model(
    n_words: int, *, width: int = 96, depth: int = 4, vision_width: int = 128, vision_depth: int = 4, seed: int = 0
) -> PreTrainedModel:
    """A freshly initialised ``Idefics3ForConditionalGeneration`` for a vocabulary of ``n_words`` plus specials."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    size = len(SPECIALS) + n_words
    ids = {name: SPECIALS.index(name) for name in SPECIALS}
    config = Idefics3Config(
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 3 * vision_width,
            "num_hidden_layers": vision_depth,
            "num_attention_heads": vision_width // 32,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": size,
            "hidden_size": width,
            "intermediate_size": 8 * width // 3,
            "num_hidden_layers": depth,
            "num_attention_heads": width // HEAD,
            "num_key_value_heads": width // HEAD,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
            "pad_token_id": ids[PAD],
        },
        scale_factor=SHUFFLE,
        image_token_id=ids[IMAGE],
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids[EOS]
    model.generation_config.pad_token_id = ids[PAD]
    model.generation_config.bos_token_id = ids[BOS]
    return model


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write model (safetensors, in its dtype) and processor files to ``folder``."""
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


def spread_channels(model: PreTrainedModel, sigma: float, seed: int = 0) -> None:
    """Give the language model the uneven channels of large language models, without changing what it computes.

    In large models a few channels behind each norm are many times larger than the rest, and round-to-nearest at low
    bits suffers from that (AWQ, SmoothQuant). A small model trained for an hour has even channels, and INT3 would look
    free. Here every input channel of the attention and MLP matrices is divided by a log-normal factor
    ``exp(sigma * z)``, and what feeds it (norm gain, value rows, up rows) is multiplied by the same factor: in exact
    arithmetic the function is the same. In place; ``sigma`` 0 changes nothing.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> torch.Tensor:
        return torch.exp(sigma * torch.randn(n, generator=generator))

    with torch.no_grad():
        for layer in model.model.text_model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = factors(norm.weight.shape[0])
                norm.weight *= s
                for reader in readers:
                    reader.weight /= s
            for writer, reader in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
                s = factors(writer.weight.shape[0])
                writer.weight *= s[:, None]
                reader.weight /= s
