"""What the reference models share (word tokenizer, chat template, files, channels), and what each must provide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SIDE, PATCH, SHUFFLE = 64, 8, 2
HEAD = 16
"""Width of an attention head of the language model."""
N_VISUAL = (SIDE // PATCH // SHUFFLE) ** 2
"""Visual tokens of one picture: 4 x 4, one per 16 pixels."""
BOS, EOS, UNK, PAD = "<s>", "<end_of_utterance>", "<unk>", "<pad>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
"""The pictures' normalisation: (x / 255 - mean) / std."""


class Architecture(ABC):
    """How one architecture's reference model is built, and what its trainer must know about it."""

    name: str
    specials: tuple[str, ...]
    """Special tokens; they come first in the vocabulary."""
    image: str
    """The token that stands for one visual token."""
    tower_knows_places: bool
    """Whether the tower has absolute positions; else the language model must place what the tower sees."""
    prefix: str
    """Text that the chat template and the processor put before a question, visual tokens written out."""

    @abstractmethod
    def build_processor(self, words: list[str]) -> Any:
        """The processor, with a word-level tokenizer over the special tokens and ``words``."""

    @abstractmethod
    def build_model(
        self,
        n_words: int,
        *,
        width: int = 96,
        depth: int = 4,
        vision_width: int = 128,
        vision_depth: int = 4,
        seed: int = 0,
    ) -> PreTrainedModel:
        """A freshly initialised model for a vocabulary of ``n_words`` plus the special tokens."""

    @abstractmethod
    def encode(self, model: Any, pixels: Tensor) -> Tensor:
        """Normalised pictures ``(B, 3, 64, 64)`` to visual tokens ``(B, 16, width)``."""

    def positions(self, index: Tensor) -> Tensor:
        """Position ids of the tokens that stand at ``index`` (B, T) of a sequence which begins with the prefix."""
        return index

    def ids(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return {token: i for i, token in enumerate(self.specials)}


def text_sizes(vocabulary: int, ids: dict[str, int], *, width: int, depth: int) -> dict[str, Any]:
    """Entries of the text configuration that do not depend on the architecture."""
    return {
        "vocab_size": vocabulary,
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
    }


def set_generation_tokens(model: PreTrainedModel, ids: dict[str, int]) -> None:
    """Tell ``generate`` where an answer ends."""
    model.generation_config.eos_token_id = ids[EOS]
    model.generation_config.pad_token_id = ids[PAD]
    model.generation_config.bos_token_id = ids[BOS]


def word_tokenizer(specials: tuple[str, ...], words: list[str]) -> Any:
    """A word-level tokenizer: the special tokens, then ``words``; punctuation marks are words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        extra_special_tokens=[token for token in specials if token not in (BOS, EOS, UNK, PAD)],
        padding_side="left",
        model_max_length=512,
    )


def chat_template(image: str) -> str:
    """The chat template; ``image`` is what it writes for a picture."""
    return (
        "{% for message in messages %}"
        f"{{{{ '{USER}' if message['role'] == 'user' else '{ASSISTANT}' }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        f"{{% if message['role'] != 'user' %}}{{{{ '{EOS}' }}}}{{% endif %}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
    )


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write model (safetensors, in its dtype) and processor files to ``folder``."""
    model.save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)


def language_model(model: Any) -> nn.Module:
    """The language model inside a reference model, without its head."""
    inner: nn.Module = model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model
    return inner


def spread_channels(model: PreTrainedModel, sigma: float, seed: int = 0) -> None:
    """Give the language model the uneven channels of large language models, without changing what it computes.

    In large models a few channels behind each norm are many times larger than the rest, and round-to-nearest at low
    bits suffers from that (AWQ, SmoothQuant). A small model trained for an hour has even channels, and INT3 would look
    free. Here every input channel of the attention and MLP matrices is divided by a log-normal factor
    ``exp(sigma * z)``, and what feeds it (norm gain, value rows with their bias, up rows) is multiplied by the same
    factor: in exact arithmetic the function is the same. In place; ``sigma`` 0 changes nothing, and ``-sigma`` undoes
    ``sigma``.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def factors(n: int) -> torch.Tensor:
        return torch.exp(sigma * torch.randn(n, generator=generator))

    with torch.no_grad():
        layers: Any = language_model(model).layers
        for layer in layers:
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
                if writer.bias is not None:
                    writer.bias *= s
                reader.weight /= s
