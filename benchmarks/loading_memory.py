"""Peak memory of loading a quantized model: while loading against after it, and against transformers' own way.

    python benchmarks/loading_memory.py --json benchmarks/loading_memory.json

A Qwen2-VL of random weights (the 2B's widths, fewer layers) is written to a temporary folder in bfloat16, in shards.
Each way of loading it runs in a process of its own, which then touches every weight: the greatest resident memory
(mapped file pages count) minus what the process held before. ``quantize_model`` after loading and bitsandbytes' NF4 in
transformers are the peers; both reloads are of the checkpoint that ``bitquake quantize`` writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from tabulate import tabulate
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from bitquake.model_wrappers.loading import load_model, load_quantized
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.replace import quantize_model
from bitquake.model_wrappers.quantizers.transformers_quantizer import make_savable

QUANT = "rtn-int4-g64:components=vision+connector+language"
WAYS = {
    "full": "full precision",
    "after-packed": "quantized after loading, packed",
    "while-packed": "quantized while loading, packed",
    "after-simulated": "quantized after loading, simulated",
    "while-simulated": "quantized while loading, simulated",
    "reload-packed": "saved checkpoint, packed",
    "reload-simulated": "saved checkpoint, simulated",
    "bitsandbytes": "transformers with bitsandbytes NF4",
}


def write_model(folder: Path, layers: int, shard: str) -> int:
    """Write the model; returns the bytes of its weights."""
    config = Qwen2VLConfig(
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True,
        vision_config={"depth": max(1, layers // 2), "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        text_config={
            "vocab_size": 32768, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": layers,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "full", max_shard_size=shard)
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    spec = load_spec(QUANT)
    make_savable(model, spec, quantize_model(model, load_spec(f"{QUANT}:execution=packed")))
    model.save_pretrained(folder / "packed", max_shard_size=shard)
    return n_bytes


def load(way: str, folder: Path) -> Any:
    """Load in one way."""
    kind, _, execution = way.partition("-")
    arguments: dict[str, Any] = {
        "revision": None, "dtype": torch.bfloat16, "device": torch.device("cpu"), "device_map": None,
        "attn_implementation": None, "trust_remote_code": False,
    }  # fmt: skip
    full = str(folder / "full")
    if kind == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        return AutoModelForImageTextToText.from_pretrained(
            full, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
    if kind == "reload":
        packed = str(folder / "packed")
        return load_quantized(packed, load_spec(None), execution=execution, **arguments).model  # type: ignore[arg-type]
    if kind == "full":
        return load_model(full, **arguments)
    spec = load_spec(f"{QUANT}:execution={execution}")
    if kind == "while":
        return load_quantized(full, spec, **arguments).model
    model = load_model(full, **arguments)
    quantize_model(model, spec)
    return model


def _status(*keys: str) -> int:
    """Bytes of entries of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as lines:
        held = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    return sum(1024 * int(held[key][0]) for key in keys)


def measure(way: str, folder: Path) -> dict[str, float]:
    """Load in this process; seconds, and bytes beyond what it held before."""
    own = ("RssAnon", "RssShmem")  # what is not pages of a file
    before, before_own, peak_own, done = _status("VmRSS"), _status(*own), 0, threading.Event()

    def watch() -> None:
        nonlocal peak_own
        while not done.wait(0.002):
            peak_own = max(peak_own, _status(*own))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load(way, folder)
    seconds = time.perf_counter() - start
    tensors = {id(t): t.detach() for t in (*model.parameters(), *model.buffers())}.values()
    for tensor in tensors:  # as a forward pass would: what is only mapped is in memory from now on
        tensor.flatten().view(torch.uint8)[::4096].sum()
    done.set()
    watcher.join()
    held = sum(tensor.nbytes for tensor in tensors)
    return {
        "seconds": seconds,
        "peak": _status("VmHWM") - before,  # not getrusage's, which begins with the parent's
        "peak_without_file_pages": peak_own - before_own,
        "held": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the language model (default 8: 0.9 GB)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]))))
        return
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = write_model(folder, options.layers, "200MB")
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{way}: {done.stderr}")
            figures[way] = json.loads(done.stdout.splitlines()[-1])
    rows = [
        {
            "loaded": WAYS[way],
            "seconds": f"{one['seconds']:.1f}",
            "peak MB": f"{one['peak'] / 1e6:.0f}",
            "of full": f"{one['peak'] / n_bytes:.2f}",
            "without file pages MB": f"{one['peak_without_file_pages'] / 1e6:.0f}",
            "held in tensors MB": f"{one['held'] / 1e6:.0f}",
        }
        for way, one in figures.items()
    ]
    print(f"Qwen2-VL, {options.layers} layers, {n_bytes / 1e6:.0f} MB of bfloat16 weights; {QUANT}\n")
    print(tabulate(rows, headers="keys", colalign=("left", *["right"] * 5)))
    if options.json:
        result = {"machine": machine(), "quant": QUANT, "layers": options.layers, "weight_bytes": n_bytes, **figures}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
