"""Builds the reference model of the Idefics3 architecture and its processor from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitquake.model_wrappers.checkpoints import architecture
from bitquake.model_wrappers.checkpoints.architecture import ASSISTANT, BOS, EOS, N_VISUAL, PAD, UNK, USER

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"


class Idefics3(architecture.Architecture):
    """SigLIP-style tower with learned positions, pixel-shuffle connector, Llama language model."""

    name = "idefics3"
    specials = (PAD, BOS, EOS, UNK, IMAGE, FAKE, GLOBAL, USER, ASSISTANT)
    image = IMAGE
    tower_knows_places = True
    prefix = USER + FAKE + GLOBAL + IMAGE * N_VISUAL + FAKE

    def build_processor(self, words: list[str]) -> Any:
        from transformers import Idefics3ImageProcessorPil, Idefics3Processor

        images = Idefics3ImageProcessorPil(
            do_image_splitting=False,
            do_resize=True,
            size={"longest_edge": architecture.SIDE},
            max_image_size={"longest_edge": architecture.SIDE},
            image_mean=list(architecture.MEAN),
            image_std=list(architecture.STD),
            return_row_col_info=False,
        )
        tokenizer = architecture.word_tokenizer(self.specials, words)
        template = architecture.chat_template(IMAGE)
        return Idefics3Processor(images, tokenizer, image_seq_len=N_VISUAL, chat_template=template)

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
        import torch
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration

        ids = self.ids()
        text = architecture.text_sizes(len(ids) + n_words, ids, width=width, depth=depth)
        config = Idefics3Config(
            vision_config={
                "hidden_size": vision_width,
                "intermediate_size": 3 * vision_width,
                "num_hidden_layers": vision_depth,
                "num_attention_heads": vision_width // 32,
                "image_size": architecture.SIDE,
                "patch_size": architecture.PATCH,
            },
            text_config={"model_type": "llama", **text},
            scale_factor=architecture.SHUFFLE,
            image_token_id=ids[IMAGE],
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
        architecture.set_generation_tokens(model, ids)
        return model

    def encode(self, model: Any, pixels: Tensor) -> Tensor:
        import torch

        side = architecture.SIDE // architecture.PATCH
        mask = torch.ones(pixels.shape[0], side, side, dtype=torch.bool)
        hidden = model.model.vision_model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
        features: Tensor = model.model.connector(hidden)
        return features
