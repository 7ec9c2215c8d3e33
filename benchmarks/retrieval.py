"""Scoring 100 candidate captions of one picture: on one key-value cache against full passes (the peer), on the CPU.

    python benchmarks/retrieval.py --json benchmarks/retrieval.json

Two models, float32: the reference checkpoint (Idefics3, 64-pixel pictures), and a Qwen2-VL of random weights whose
picture takes 144 tokens, nearer to what a prompt of a large model costs. Both ways see the same captions, run in turn
in one process, and must give the same scores; medians of a picture's time and their ratio are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from PIL import Image
from tabulate import tabulate
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from bitquake.model_wrappers.loading import load_model, load_processor, resolve_pretrained
from bitquake.model_wrappers.retrieval import assistant_turn, caption_tokens, encode_prompt

REFERENCE = "bitquake/block-idefics3"
NOUNS, COLORS = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow")


def captions(n: int) -> list[str]:
    """Sentences of 7 to 19 words about coloured shapes."""
    rng = np.random.default_rng(0)
    phrases = [f"a large {color} {noun}" for color in COLORS for noun in NOUNS]
    return [" and ".join(["there is", *rng.choice(phrases, rng.integers(1, 4))]) for _ in range(n)]


def reference(n: int) -> tuple[Any, Any, list[list[int]]]:
    """Model, a prompt's inputs, and the tokens of ``n`` captions."""
    path = resolve_pretrained(REFERENCE)
    processor = load_processor(path, revision=None, trust_remote_code=False)
    model = load_model(
        path, revision=None, dtype=torch.float32, device=torch.device("cpu"), device_map=None,
        attn_implementation=None, trust_remote_code=False,
    )  # fmt: skip
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[[picture]], return_tensors="pt")
    turn = assistant_turn(processor, frozenset([model.generation_config.eos_token_id]))
    return model, inputs, caption_tokens(processor.tokenizer, prompt, captions(n), turn)


def qwen2_vl(n: int) -> tuple[Any, Any, list[list[int]]]:
    """The same of a random Qwen2-VL: 336x336 pixels in patches of 14, merged by 2, and captions of 8 to 24 tokens."""
    torch.manual_seed(0)
    vocabulary, picture_token, grid = 8192, 5, 24
    config = Qwen2VLConfig(
        image_token_id=picture_token, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        vision_config={"depth": 4, "embed_dim": 128, "hidden_size": 256, "num_heads": 4, "mlp_ratio": 2},
        text_config={
            "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    before, after = [7] * 14 + [3], [4] + [8] * 12
    ids = torch.tensor([[*before, *[picture_token] * (grid // 2) ** 2, *after]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == picture_token).long(),
        "pixel_values": torch.randn(grid * grid, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, grid, grid]]),
    }
    rng = np.random.default_rng(2)
    return model, inputs, [rng.integers(9, vocabulary, rng.integers(8, 25)).tolist() for _ in range(n)]


@torch.inference_mode()
def score(model: Any, inputs: Any, tokens: Sequence[Sequence[int]], batch: int, use_cache: bool) -> tuple[float, Any]:
    """Seconds, and the summed log-probability of each caption; chunks of like lengths, as the wrapper makes them."""
    start = time.perf_counter()
    prompt = encode_prompt(model, inputs, use_cache=use_cache)
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    found = np.zeros(len(tokens))
    for at in range(0, len(order), batch):
        chunk = order[at : at + batch]
        found[chunk] = [row.sum() for row in prompt.log_probs([tokens[i] for i in chunk])]
    return time.perf_counter() - start, found


def measure(name: str, parts: tuple[Any, Any, list[list[int]]], batch: int, repeats: int) -> dict[str, object]:
    model, inputs, tokens = parts
    times: dict[bool, list[float]] = {True: [], False: []}
    gap = 0.0
    for turn in range(repeats + 1):  # the first warms up
        scores = {}
        for use_cache in (True, False):
            seconds, scores[use_cache] = score(model, inputs, tokens, batch, use_cache)
            if turn:
                times[use_cache].append(seconds)
        gap = max(gap, float(np.abs(scores[True] - scores[False]).max()))
    if gap > 1e-3:
        raise SystemExit(f"{name}: the two ways differ by {gap} in a score")
    cached, full = (statistics.median(times[use_cache]) for use_cache in (True, False))
    return {
        "model": name,
        "prompt tokens": inputs["input_ids"].shape[1],
        "caption tokens": f"{min(map(len, tokens))} to {max(map(len, tokens))}",
        "batch_size": batch,
        "cache s": round(cached, 3),
        "full passes s": round(full, 3),
        "times faster": round(full / cached, 2),
        "largest difference": float(f"{gap:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(name, parts, batch, arguments.repeats)
        for name, parts in ((REFERENCE, reference(arguments.candidates)), ("qwen2_vl", qwen2_vl(arguments.candidates)))
        for batch in arguments.batch_sizes
    ]
    where = machine("torch", "transformers", "bitquake")
    print(tabulate(rows, headers="keys"))
    print(
        f"peer: full passes, {arguments.candidates} candidates, median of {arguments.repeats}; "
        + ", ".join(f"{key} {value}" for key, value in where.items())
    )
    if arguments.json:
        figures = {"peer": "full passes", "candidates": arguments.candidates, "repeats": arguments.repeats}
        arguments.json.write_text(json.dumps({**figures, "machine": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
