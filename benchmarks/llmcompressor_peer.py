"""llm-compressor's GPTQ of single layers, on request, in a process of its own: its pins do not fit our environment.

Each line of standard input is a JSON object ``{"file", "bits", "group_size", "symmetric", "threads", "out"}``. The file
holds ``weight`` and ``hessian``, ``group_size`` null is a row, and with ``out`` the rounded weight is written there. It
gets a line ``result {"seconds": …}``; a first such line holds the versions. ``quantization.py`` starts this.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def answer(**values: object) -> None:
    print("result", json.dumps(values), flush=True)


@torch.no_grad()
def quantize(request: dict[str, Any]) -> float:
    """Seconds from weight and Hessian to the rounded weight; group parameters (its observer's) included."""
    torch.set_num_threads(request["threads"])
    tensors = load_file(request["file"])
    weight, hessian = tensors["weight"], tensors["hessian"]
    group = request["group_size"]
    arguments = QuantizationArgs(
        num_bits=request["bits"], symmetric=request["symmetric"], strategy="group" if group else "channel",
        group_size=group,
    )  # fmt: skip
    working = hessian[None].clone()  # both are working buffers, which the library gets afresh for each layer
    copy = weight[None].clone()
    start = time.perf_counter()
    groups = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    rounded, _, fallback = quantize_weight(copy, working, scale[None], zero[None], None, arguments)
    seconds = time.perf_counter() - start
    if fallback.any():
        raise SystemExit("llm-compressor fell back to rounding to nearest")
    if request.get("out"):
        save_file({"weight": rounded[0].contiguous()}, request["out"])
    return seconds


if __name__ == "__main__":
    answer(**{name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors", "torch")})
    for line in sys.stdin:
        answer(seconds=quantize(json.loads(line)))
