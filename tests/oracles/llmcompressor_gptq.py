"""llm-compressor's GPTQ of a whole model, run in a process of its own that has its pinned compressed-tensors.

    PYTHONPATH=FOLDER python llmcompressor_gptq.py MODEL INPUTS OUT [{"num_bits": 3, ...}, ...]

INPUTS: safetensors, ``<sample>.<name>`` -> tensor of a model's input. For each of the quantization arguments (JSON) the
model is loaded afresh, and ``OUT/<i>.safetensors`` then holds the rounded weight of each Linear module.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText


class Processor:
    """Stands where llm-compressor wants a processor although the inputs are ready."""


def samples(path: str) -> list[dict[str, torch.Tensor]]:
    """Inputs of each sample."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(path).items():
        sample, _, name = key.partition(".")
        found[sample][name] = tensor
    return list(found.values())


def quantize(model: str, inputs: list[dict[str, torch.Tensor]], arguments: dict[str, Any], out: Path) -> None:
    """One GPTQ of the model, everything that is Linear except lm_head."""
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    weights = {"type": "int", **arguments}
    actorder = weights.pop("actorder", None)
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["re:.*lm_head"],
        actorder=actorder,
    )
    oneshot(
        model=loaded, recipe=[recipe], dataset=DataLoader(inputs, batch_size=None), num_calibration_samples=len(inputs),
        processor=Processor(), pipeline="basic",
    )  # fmt: skip
    linears = {n: m.weight.detach() for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)}
    save_file({name: weight.contiguous() for name, weight in linears.items()}, out)


if __name__ == "__main__":
    model, inputs, out, runs = sys.argv[1:]
    for i, arguments in enumerate(json.loads(runs)):
        quantize(model, samples(inputs), arguments, Path(out) / f"{i}.safetensors")
