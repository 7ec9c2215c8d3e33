"""Own HQQ solver against the hqq library's (the peer) on the CPU: time to quantize one matrix, and its error.

    python benchmarks/hqq_solver.py --json benchmarks/hqq_solver.json

Both get the same float32 weights (normal, standard deviation 0.02, as in a language model; and, beside it, heavy-tailed
with outlier channels) and give codes, scales and zero-points. Runs alternate in one process, so that both see the same
machine; medians and their ratio are printed. The error is the relative Frobenius norm of what is lost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from machine import machine
from tabulate import tabulate

from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.replace import quantize_weight

GROUP = 64


def own(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales and zero-points by the own solver."""
    spec = load_spec({"method": "hqq", "bits": bits, "group_size": GROUP})
    return tuple(t for t in quantize_weight(weight, spec) if t is not None)


def own_weight(found: tuple[torch.Tensor, ...], bits: int) -> torch.Tensor:
    codes, scale, zero = found
    return QuantizedLinear.from_codes(
        codes, scale, zero, bits=bits, group_size=GROUP, bias=None, dtype=torch.float32, execution="packed"
    ).weight


def library(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """The same by hqq, with its defaults for these bits (early stop on)."""
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=GROUP, axis=1, round_zero=bits == 4, bitpack=False, device="cpu"
    )
    return codes, meta["scale"], meta["zero"]


def library_weight(found: tuple[torch.Tensor, ...], weight: torch.Tensor) -> torch.Tensor:
    codes, scale, zero = found
    return ((codes.reshape(-1, GROUP) - zero) * scale).reshape(weight.shape)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(kind: str, shape: tuple[int, int], bits: int, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    if kind == "outliers":
        weight = weight / torch.rand(shape, generator=generator).clamp(min=1e-3).sqrt()
        weight[:, ::61] *= 10
    mine, theirs = own(weight, bits), library(weight, bits)  # also warms both up
    times: dict[str, list[float]] = {"own": [], "hqq": []}
    for _ in range(repeats):
        times["own"].append(timed(lambda: own(weight, bits)))
        times["hqq"].append(timed(lambda: library(weight, bits)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    norm = float(weight.norm())
    return {
        "weights": kind,
        "shape": "x".join(map(str, shape)),
        "bits": bits,
        "own s": round(medians["own"], 4),
        "hqq s": round(medians["hqq"], 4),
        "times faster": round(medians["hqq"] / medians["own"], 2),
        "own error": round(float((own_weight(mine, bits) - weight).norm()) / norm, 6),
        "hqq error": round(float((library_weight(theirs, weight) - weight).norm()) / norm, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [
        measure(kind, (arguments.rows, arguments.columns), bits, arguments.repeats)
        for kind in ("normal", "outliers")
        for bits in arguments.bits
    ]
    where = machine("torch", "hqq", "bitquake")
    print(tabulate(rows, headers="keys"))
    print(
        f"peer: hqq {where['hqq']}, median of {arguments.repeats}; " + ", ".join(f"{k} {v}" for k, v in where.items())
    )
    if arguments.json:
        figures = {"peer": f"hqq {where['hqq']}", "repeats": arguments.repeats, "group_size": GROUP, "machine": where}
        arguments.json.write_text(json.dumps({**figures, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
