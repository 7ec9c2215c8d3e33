"""Time to quantize layers by each method, beside a named peer, on the CPU, and the error of both.

    python benchmarks/quantization.py --json benchmarks/quantization.json [--python COMMAND] [--sections NAME ...]

The layers are those of Qwen2-VL-2B's language model (1536x1536, 8960x1536, 1536x8960; random weights) and of the
reference checkpoint's. A method and its peer get the same tensors and run in turn, so that both see the same machine;
medians and their ratio are printed.

- ``hqq``: own solver; peer: the hqq library with its defaults. Error: relative Frobenius norm of what the weight loses.
- ``rtn``: peer: torchao's ``choose_qparams_affine`` and ``quantize_affine``.
- ``gptq``: from the Hessian on; peer: llm-compressor's ``quantize_weight``, in a process of its own, started by
  ``--python COMMAND`` (a Python that has llm-compressor, for example ``--python "env PYTHONPATH=FOLDER python"``).
  Error: relative Frobenius norm of what the outputs on the calibration inputs lose.
- ``search``: AWQ and MBQ from the calibration samples to the codes, without MBQ's gradients, which cost both the same
  (its ratio is 1); peer: the published search written literally (``tests/model_wrappers/literal_scale_search.py``).
  ``same scales`` counts the layers whose scales are the peer's.

``--quick`` takes a quarter of each dimension, 512 tokens and one repeat. The JSON file is brought up to date section by
section, so that they can be measured one at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from machine import machine
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from bitquake.model_wrappers.calibration import CalibrationInputs, build_calibration
from bitquake.model_wrappers.loading import load_model, load_processor, resolve_pretrained
from bitquake.model_wrappers.quantizers import QuantSpec, load_spec
from bitquake.model_wrappers.quantizers.blocks import BlockRunner, ordered_blocks
from bitquake.model_wrappers.quantizers.calibrated import quantize
from bitquake.model_wrappers.quantizers.gptq import HessianSum, gptq
from bitquake.model_wrappers.quantizers.options import GptqOptions
from bitquake.model_wrappers.quantizers.plan import quantizable
from bitquake.model_wrappers.quantizers.replace import quantize_weight
from bitquake.model_wrappers.quantizers.spec import CalibrationSpec
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

REFERENCE = "bitquake/block-idefics3"
HERE = Path(__file__).parent
Row = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """How much is measured."""

    repeats: int
    threads: int
    divisor: int  # of Qwen2-VL-2B's dimensions
    tokens: int
    bits: tuple[int, ...]

    @property
    def hidden(self) -> int:
        return 1536 // self.divisor

    @property
    def intermediate(self) -> int:
        return 8960 // self.divisor // 128 * 128

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features)."""
        return [
            (self.hidden, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(repeats: int, own: Callable[[], object], peer: Callable[[], object | None] | None) -> tuple[float, float]:
    """Median seconds of both; a peer that returns a number has timed itself, NaN without one."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        times[0].append(timed(own))
        if peer is not None:
            start = time.perf_counter()
            own_clock = peer()
            times[1].append(own_clock if isinstance(own_clock, float) else time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1]) if times[1] else float("nan")


def row(label: dict[str, object], seconds: tuple[float, float], errors: tuple[float, float] | None) -> Row:
    own, peer = seconds
    made: Row = {**label, "own s": float(f"{own:.4g}")}
    if peer == peer:
        made |= {"peer s": float(f"{peer:.4g}"), "times faster": round(peer / own, 2)}
    if errors is not None:
        made |= {"own error": float(f"{errors[0]:.5g}")}
        if errors[1] == errors[1]:
            made |= {"peer error": float(f"{errors[1]:.5g}")}
    return made


def random_weight(shape: tuple[int, int], kind: str) -> Tensor:
    """``normal``: standard deviation 0.02, as in a language model; ``outliers``: heavy tails and outlier channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    if kind == "outliers":
        weight = weight / torch.rand(shape, generator=generator).clamp(min=1e-3).sqrt()
        weight[:, ::61] *= 10
    return weight


def random_inputs(tokens: int, features: int) -> Tensor:
    """Inputs whose features hang together and differ in size."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 128, generator=generator) @ torch.randn(128, features, generator=generator)
    sizes = torch.randn(features, generator=generator).exp()
    return (hidden / 128**0.5 + 0.3 * torch.randn(tokens, features, generator=generator)) * sizes


def total_error(weights: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    lost = sum(float((a - b).square().sum()) for a, b in zip(rounded, weights, strict=True))
    return (lost / sum(float(w.square().sum()) for w in weights)) ** 0.5


class Reference:
    """The reference checkpoint, and what its processor makes of calibration samples; loaded when it is needed."""

    def __init__(self) -> None:
        path = resolve_pretrained(REFERENCE)
        self.processor = load_processor(path, revision=None, trust_remote_code=False)
        self.model = load_model(
            path, revision=None, dtype=torch.float32, device=torch.device("cpu"), device_map=None,
            attn_implementation=None, trust_remote_code=False,
        )  # fmt: skip
        self.linears = language_linears(self.model)

    def samples(self, n: int) -> list[CalibrationInputs]:
        with tempfile.TemporaryDirectory() as cache:
            spec = CalibrationSpec(source="caption", samples=n)
            return list(build_calibration(spec, self.model, self.processor, pretrained=REFERENCE, cache=Path(cache)))


def language_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in quantizable(model).items() if "language_model" in n or "text_model" in n}


def weight_cases(setting: Setting, kinds: Sequence[str]) -> Iterator[tuple[Row, list[Tensor], int]]:
    """Labels, weights and group size."""
    for kind in kinds:
        for shape in setting.shapes:
            yield {"layers": "x".join(map(str, shape)), "weights": kind}, [random_weight(shape, kind)], 64
    linears = Reference().linears.values()
    yield {"layers": f"{len(linears)} of {REFERENCE}", "weights": "its own"}, [m.weight.detach() for m in linears], 32


def measure_hqq(setting: Setting) -> tuple[list[Row], str]:
    from hqq.core.quantize import Quantizer

    def library(weights: Sequence[Tensor], bits: int, group: int) -> list[Tensor]:
        rounded = []
        for weight in weights:
            codes, meta = Quantizer.quantize(
                weight, nbits=bits, group_size=group, axis=1, round_zero=bits == 4, bitpack=False, device="cpu"
            )
            rounded.append((codes, meta))
        return rounded

    rows = []
    for label, weights, group in weight_cases(setting, ("normal", "outliers")):
        for bits in setting.bits:
            spec = load_spec({"method": "hqq", "bits": bits, "group_size": group})

            def own(weights: Sequence[Tensor] = weights, spec: QuantSpec = spec) -> list[QuantizedWeight]:
                return [quantize_weight(weight, spec) for weight in weights]

            def peer(weights: Sequence[Tensor] = weights, bits: int = bits, group: int = group) -> list[Any]:
                return library(weights, bits, group)

            theirs = [
                ((codes.reshape(-1, group) - meta["zero"]) * meta["scale"]).reshape(weight.shape)
                for weight, (codes, meta) in zip(weights, peer(), strict=True)
            ]
            errors = (
                total_error(weights, [found.dequantize(torch.float32) for found in own()]),
                total_error(weights, theirs),
            )
            rows.append(row({**label, "bits": bits, "group": group}, in_turn(setting.repeats, own, peer), errors))
    return rows, "hqq"


def measure_rtn(setting: Setting) -> tuple[list[Row], str]:
    from torchao.quantization import quant_primitives as primitives

    def torchao(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
        bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scale, zero = primitives.choose_qparams_affine(
            weight, primitives.MappingType.ASYMMETRIC, (1, group), torch.int8, *bounds, eps=1e-9,
            scale_dtype=torch.float32, zero_point_dtype=torch.int8,
        )  # fmt: skip
        return primitives.quantize_affine(weight, (1, group), scale, zero, torch.int8, *bounds), scale, zero

    rows = []
    for label, weights, group in weight_cases(setting, ("normal",)):
        for bits in setting.bits:
            spec = load_spec({"method": "rtn", "bits": bits, "group_size": group})

            def own(weights: Sequence[Tensor] = weights, spec: QuantSpec = spec) -> list[QuantizedWeight]:
                return [quantize_weight(weight, spec) for weight in weights]

            def peer(weights: Sequence[Tensor] = weights, bits: int = bits, group: int = group) -> list[Any]:
                return [torchao(weight, bits, group) for weight in weights]

            bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            theirs = [
                primitives.dequantize_affine(codes, (1, group), scale, zero, torch.int8, *bounds)
                for codes, scale, zero in peer()
            ]
            errors = (
                total_error(weights, [found.dequantize(torch.float32) for found in own()]),
                total_error(weights, theirs),
            )
            rows.append(row({**label, "bits": bits, "group": group}, in_turn(setting.repeats, own, peer), errors))
    return rows, "torchao"


class LlmCompressor:
    """``llmcompressor_peer.py`` under another Python."""

    def __init__(self, command: str, threads: int) -> None:
        self._threads = threads
        self._process = subprocess.Popen(
            [*shlex.split(command), str(HERE / "llmcompressor_peer.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("result "):
                answer: dict[str, Any] = json.loads(line.removeprefix("result "))
                return answer
        raise SystemExit(f"the llm-compressor process ended with {self._process.wait()}; run it by hand to see why")

    def quantize(self, **request: object) -> float:
        """Seconds of the call itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**request, "threads": self._threads}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def gptq_cases(setting: Setting) -> Iterator[tuple[Row, Tensor, Tensor, int]]:
    """Labels, weight, Hessian and group size."""
    for shape in setting.shapes:
        total = HessianSum(shape[1])
        total.add(random_inputs(setting.tokens, shape[1]))
        yield {"layer": "x".join(map(str, shape))}, random_weight(shape, "normal"), total.hessian(), 64
    reference = Reference()
    name = next(name for name in reference.linears if name.endswith("down_proj"))
    linear = reference.linears[name]
    total = HessianSum(linear.in_features)
    hook = linear.register_forward_pre_hook(lambda _, arguments: total.add(arguments[0]))
    with torch.no_grad():
        for sample in reference.samples(32):
            reference.model(**sample.inputs)
    hook.remove()
    yield {"layer": f"{name} of {REFERENCE}"}, linear.weight.detach(), total.hessian(), 32


def measure_gptq(setting: Setting, command: str | None) -> tuple[list[Row], str]:
    compressor = LlmCompressor(command, setting.threads) if command else None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "layer.safetensors", Path(folder) / "rounded.safetensors"
        for label, weight, hessian, group in gptq_cases(setting):
            save_file({"weight": weight.contiguous(), "hessian": hessian}, file)
            for bits in setting.bits:
                # llm-compressor fits all groups before the first column
                options = GptqOptions(static_groups=True)

                def own(weight: Tensor = weight, hessian: Tensor = hessian, bits: int = bits, group: int = group,
                        options: GptqOptions = options) -> QuantizedWeight:  # fmt: skip
                    return gptq(weight, hessian, bits=bits, group_size=group, symmetric=False, options=options)

                def lost(rounded: Tensor, weight: Tensor = weight, hessian: Tensor = hessian) -> float:
                    gap = rounded - weight
                    return float(((gap @ hessian) * gap).sum() / ((weight @ hessian) * weight).sum()) ** 0.5

                request = {"file": str(file), "bits": bits, "group_size": group, "symmetric": False}
                theirs, peer = float("nan"), None
                if compressor is not None:
                    compressor.quantize(**request, out=str(out))
                    theirs = lost(load_file(out)["weight"])

                    def peer(request: dict[str, Any] = request, compressor: LlmCompressor = compressor) -> float:
                        return compressor.quantize(**request)

                errors = (lost(own().dequantize(torch.float32)), theirs)
                seconds = in_turn(setting.repeats, own, peer)
                rows.append(row({**label, "bits": bits, "group": group}, seconds, errors))
    if compressor is None:
        return rows, "none (llm-compressor needs --python)"
    compressor.close()
    return rows, ", ".join(f"{name} {version}" for name, version in compressor.versions.items())


def qwen_layer(setting: Setting) -> tuple[nn.Module, list[CalibrationInputs]]:
    """A Qwen2-VL with one decoder layer of the 2B model's shape, and samples: half of the positions count as vision."""
    torch.manual_seed(0)
    hidden = setting.hidden
    heads = hidden // 128
    config = Qwen2VLConfig(
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 2},
        text_config={
            "vocab_size": 1024, "hidden_size": hidden, "intermediate_size": setting.intermediate,
            "num_hidden_layers": 1, "num_attention_heads": heads, "bos_token_id": 1, "eos_token_id": 2,
            "num_key_value_heads": max(1, heads // 6),
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:  # features of very different size, as in real models
                parameter.copy_(torch.randn_like(parameter).exp())
    length, samples = 128, []
    for _ in range(max(2, setting.tokens // length)):
        ids = torch.randint(10, 1024, (1, length))
        vision = torch.arange(length) < length // 2
        answer = torch.arange(length) >= length * 3 // 4
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        samples.append(CalibrationInputs(inputs, vision, answer))
    return model, samples


def literal_search() -> ModuleType:
    path = HERE.parent / "tests" / "model_wrappers" / "literal_scale_search.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def by_literal(literal: ModuleType, model: Any, samples: list[CalibrationInputs], spec: QuantSpec) -> dict[str, Tensor]:
    """Input scale of each layer by the published search; what has no scale is left out."""
    scales: dict[str, Tensor] = {}
    blocks = ordered_blocks(model, language_linears(model))
    for block, inputs in BlockRunner(model, blocks, samples, propagate="original"):
        balanced = {} if spec.awq else {"masks": [(one.vision, one.answer) for one in inputs],
                                        "rho": {"attention": 1.0, "mlp": 1.0}}  # fmt: skip
        found = literal.search(
            block.module, [(one.args, one.kwargs) for one in inputs], literal.LLAMA, method=spec.method, bits=spec.bits,
            group=spec.group_size, clip=spec.awq is not None and spec.awq.clip, **balanced,
        )  # fmt: skip
        scales |= {f"{block.name}.{name}": scale for name, scale in found.scales.items()}
    return scales


def by_own(model: Any, samples: list[CalibrationInputs], spec: QuantSpec) -> dict[str, Tensor]:
    results: dict[str, QuantizedWeight] = {}
    linears = language_linears(model)
    quantize(model, linears, dict.fromkeys(linears, spec), spec, samples, results.__setitem__)
    return {name: found.input_scale for name, found in results.items() if found.input_scale is not None}


SEARCHES: tuple[dict[str, Any], ...] = (
    {"name": "awq", "method": "awq"},
    {"name": "awq without clipping", "method": "awq", "awq": {"clip": False}},
    {"name": "mbq", "method": "mbq", "mbq": {"reweight": False}},
)


def measure_search(setting: Setting) -> tuple[list[Row], str]:
    literal = literal_search()
    model, samples = qwen_layer(setting)
    reference = Reference()
    cases = [
        (f"one decoder layer of hidden size {setting.hidden}", model, samples, 128),
        (f"4 decoder layers of {REFERENCE}", reference.model, reference.samples(32), 32),
    ]
    rows = []
    for label, model, samples, group in cases:
        for options in SEARCHES:
            spec = load_spec({**options, "bits": 3, "group_size": group})
            found: dict[str, dict[str, Tensor]] = {}

            def own(model: Any = model, samples: Any = samples, spec: Any = spec, found: Any = found) -> None:
                found["own"] = by_own(model, samples, spec)

            def peer(model: Any = model, samples: Any = samples, spec: Any = spec, found: Any = found) -> None:
                found["peer"] = by_literal(literal, model, samples, spec)

            seconds = in_turn(setting.repeats, own, peer)
            mine, theirs = found["own"], found["peer"]
            ones = torch.ones(1)
            same = sum(torch.allclose(mine.get(name, ones), scale, rtol=1e-4) for name, scale in theirs.items())
            tokens = sum(len(sample.vision) for sample in samples)
            made = row({"layers": label, "tokens": tokens, "method": options["name"], "bits": 3, "group": group},
                       seconds, None)  # fmt: skip
            rows.append({**made, "same scales": f"{same} of {len(theirs)}"})
    return rows, "the published search written literally"


SECTIONS: dict[str, Callable[[Setting, str | None], tuple[list[Row], str]]] = {
    "hqq": lambda setting, _: measure_hqq(setting),
    "rtn": lambda setting, _: measure_rtn(setting),
    "gptq": measure_gptq,
    "search": lambda setting, _: measure_search(setting),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens of GPTQ and of the searches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--python", metavar="COMMAND", help="starts a Python that has llm-compressor")
    parser.add_argument("--quick", action="store_true", help="a quarter of each dimension, one repeat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        repeats=1 if arguments.quick else arguments.repeats, threads=arguments.threads,
        divisor=4 if arguments.quick else 1, tokens=512 if arguments.quick else arguments.tokens,
        bits=tuple(arguments.bits),
    )  # fmt: skip
    where = machine("torch", "transformers", "bitquake", "hqq")
    print(", ".join(f"{key} {value}" for key, value in where.items()) + f"; median of {setting.repeats}")
    for name in arguments.sections:
        rows, peer = SECTIONS[name](setting, arguments.python)
        print(f"\n{name}; peer: {peer}\n{tabulate(rows, headers='keys')}", flush=True)
        if arguments.json:
            known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
            known[name] = {"peer": peer, "repeats": setting.repeats, "machine": where, "rows": rows}
            if name in ("gptq", "search"):
                known[name]["tokens"] = setting.tokens
            arguments.json.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
