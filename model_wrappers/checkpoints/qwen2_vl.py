"""Builds the reference model of the Qwen2-VL architecture and its processor from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitquake.model_wrappers.checkpoints import architecture
from bitquake.model_wrappers.checkpoints.architecture import ASSISTANT, BOS, EOS, N_VISUAL, PAD, SHUFFLE, UNK, USER

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IMAGE, START, END, VIDEO = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
TEMPORAL = 2
"""Frames in one patch; a still picture is shown that often."""
SECTIONS = (1, 1, 6)
"""Rotary frequencies that turn with a token's time, row and column. Frequencies fall from 1 radian per step
by a factor of 2.4: a larger share for time and rows would leave columns with angles too small to tell apart."""
THETA = 1000.0
"""Base of the rotary frequencies, for the same reason smaller than usual."""
BEFORE = 2
"""Tokens before the first visual one."""


class Qwen2VL(architecture.Architecture):
    """Tower with two-dimensional rotary positions, merging MLP, Qwen2 language model with three-dimensional ones."""

    name = "qwen2-vl"
    specials = (PAD, BOS, EOS, UNK, IMAGE, START, END, USER, ASSISTANT, VIDEO)
    image = IMAGE
    tower_knows_places = False
    prefix = USER + START + IMAGE * N_VISUAL + END

    def build_processor(self, words: list[str]) -> Any:
        from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor, Qwen2VLVideoProcessor

        area = architecture.SIDE**2
        settings: dict[str, Any] = {
            "size": {"shortest_edge": area, "longest_edge": area},  # despite their names, numbers of pixels
            "patch_size": architecture.PATCH,
            "merge_size": SHUFFLE,
            "temporal_patch_size": TEMPORAL,
            "image_mean": list(architecture.MEAN),
            "image_std": list(architecture.STD),
        }
        tokenizer = architecture.word_tokenizer(self.specials, words)
        template = architecture.chat_template(START + IMAGE + END)
        # The processor class insists on a video processor; the model has never seen a video.
        videos = Qwen2VLVideoProcessor(**settings)
        return Qwen2VLProcessor(Qwen2VLImageProcessorPil(**settings), tokenizer, videos, chat_template=template)

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
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        ids = self.ids()
        text = architecture.text_sizes(len(ids) + n_words, ids, width=width, depth=depth)
        rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(SECTIONS)}
        config = Qwen2VLConfig(
            vision_config={
                "embed_dim": vision_width,
                "hidden_size": width,
                "mlp_ratio": 3,
                "depth": vision_depth,
                "num_heads": vision_width // 32,
                "patch_size": architecture.PATCH,
                "spatial_merge_size": SHUFFLE,
                "temporal_patch_size": TEMPORAL,
            },
            text_config={**text, "rope_parameters": rope, "rms_norm_eps": 1e-6},
            image_token_id=ids[IMAGE],
            video_token_id=ids[VIDEO],
            vision_start_token_id=ids[START],
            vision_end_token_id=ids[END],
            tie_word_embeddings=True,
        )
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
        architecture.set_generation_tokens(model, ids)
        return model

    def encode(self, model: Any, pixels: Tensor) -> Tensor:
        import torch

        side = architecture.SIDE // architecture.PATCH
        grid = torch.tensor([[1, side, side]]).expand(pixels.shape[0], -1)
        features: Tensor = model.model.visual(patches(pixels), grid_thw=grid).pooler_output
        return features.view(pixels.shape[0], N_VISUAL, -1)

    def positions(self, index: Tensor) -> Tensor:
        """Time, row and column ``(3, B, T)``: a picture's tokens share one time; the text goes on behind its grid."""
        import torch

        side = architecture.SIDE // architecture.PATCH // SHUFFLE
        cell = (index - BEFORE).clamp(0, N_VISUAL - 1)
        grid = BEFORE + torch.stack([torch.zeros_like(index), cell // side, cell % side])
        text = torch.where(index < BEFORE, index, index - N_VISUAL + side)
        return torch.where((index >= BEFORE) & (index < BEFORE + N_VISUAL), grid, text)


def patches(pixels: Tensor) -> Tensor:
    """Pictures ``(B, 3, 64, 64)`` as the processor flattens them: ``(B * 64, 3 * 2 * 8 * 8)``, merged ones together."""
    count, channels = pixels.shape[:2]
    side = architecture.SIDE // architecture.PATCH // SHUFFLE
    tiles = pixels.view(count, channels, side, SHUFFLE, architecture.PATCH, side, SHUFFLE, architecture.PATCH)
    tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    return tiles.expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1).reshape(count * N_VISUAL * SHUFFLE**2, -1)
