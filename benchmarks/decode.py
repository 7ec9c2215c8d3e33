"""INT4 against BF16 (the peer): single layers by the number of rows, and a model of Qwen2-VL-7B's shape.

    python benchmarks/decode.py --json benchmarks/decode.json             # CPU: layers, and 2 of the model's 28 blocks
    python benchmarks/decode.py --device cuda --json benchmarks/decode_cuda.json

Layers: Qwen2-VL-7B's matrices times M rows. `packed` is `QuantizedLinear` in packed execution with its kernel, which
chooses between the two columns after it, the int4 kernel and de-quantizing; `simulated` holds de-quantized weights.
Every way runs in turn in one process over enough copies of the layer to outgrow the caches, as the layers of a model
do; medians, and the median of each turn's ratio.

Model: random weights (values do not matter for speed), from the published configuration; with fewer blocks than 28
the vision tower and the vocabulary shrink alike, so that every part keeps its share. A static cache for both; on CUDA
`--mode compile` (torch.compile with CUDA graphs) or `graph` (a CUDA graph of the plain operations). Its INT4 is RTN of
every Linear of the language model; with `--head` of the output layer too, which our specs leave alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import machine
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, StaticCache
from transformers.initialization import no_init_weights

from bitquake.model_wrappers.quantizers.kernels import Int4Kernel
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.rtn import rtn
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

SHAPES = [(3584, 3584), (18944, 3584), (3584, 18944)]  # (out, in): attention, up and gate, down
QUICK_SHAPES = [(768, 768), (2048, 768), (768, 2048)]
BLOCKS, VISION_BLOCKS, VOCABULARY = 28, 32, 152064
COLD_BYTES = 256 << 20  # of the bf16 copies: several times a last-level cache


def quantized(linear: nn.Linear, group: int, execution: Any) -> QuantizedLinear:
    """RTN INT4 on the weight's own device; a packed layer gets its kernel, or the reason is an error."""
    weight, bias = linear.weight.detach(), linear.bias
    parts = [rtn(part.float().reshape(-1, group), 4, False) for part in torch.split(weight, 1024)]
    codes, scale, zero = (torch.cat([p[i] for p in parts if p[i] is not None]) for i in range(3))  # type: ignore[misc]
    rows = len(weight)
    held = QuantizedWeight(codes.view_as(weight), scale.view(rows, -1), zero.view(rows, -1), 4, group)
    layer = QuantizedLinear.from_weight(held, bias=bias, dtype=weight.dtype, execution=execution)
    if execution == "packed" and (reason := layer.use_kernel()):
        raise SystemExit(f"no kernel for {tuple(weight.shape)} on {weight.device}: {reason}")
    return layer


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], object]) -> Any:
    """``call`` as a CUDA graph, so that launching its operations one by one is not what is measured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()  # lets libraries allocate before the capture
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def in_turn(
    ways: Mapping[str, Callable[[], object]], device: torch.device, turns: int, least: float
) -> dict[str, list[float]]:
    """Seconds of each way in each turn; a way that takes less than ``least`` is repeated within its turn."""
    if device.type == "cuda":
        ways = {name: captured(way).replay for name, way in ways.items()}
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        way()  # warms up
        synchronize(device)
        start = time.perf_counter()
        way()
        synchronize(device)
        repeats[name] = max(1, int(least / (time.perf_counter() - start + 1e-9)))
    for _ in range(turns):
        for name, way in ways.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                way()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def times_faster(peer: Sequence[float], own: Sequence[float]) -> float:
    return round(statistics.median(p / o for p, o in zip(peer, own, strict=True)), 2)


@torch.inference_mode()
def measure_layers(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], group: int, device: torch.device, turns: int
) -> list[dict[str, Any]]:
    found = []
    for out_features, in_features in shapes:
        copies = max(1, -(-COLD_BYTES // (2 * out_features * in_features)))
        linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
        packed_layer, simulated_layer = (quantized(linear, group, how) for how in ("packed", "simulated"))
        simulated_layer.forget_codes()
        packed, simulated, bf16 = (
            [copy.deepcopy(layer) for _ in range(copies)] for layer in (packed_layer, simulated_layer, linear)
        )
        kernels = [layer.kernel for layer in packed]
        for m in rows:
            x = torch.randn(m, in_features, device=device, dtype=torch.bfloat16)

            def over(layers: Sequence[Any], call: Callable[[Any, Tensor], Tensor], x: Tensor = x) -> Callable[[], None]:
                def run() -> None:
                    for layer in layers:
                        call(layer, x)

                return run

            ways = {
                "bf16": over(bf16, lambda layer, x: functional.linear(x, layer.weight)),
                "simulated": over(simulated, lambda layer, x: layer(x)),
                "packed": over(packed, lambda layer, x: layer(x)),
                "int4 kernel": over(kernels, lambda kernel, x: kernel._few(x)),
                "de-quantized": over(kernels, lambda kernel, x: kernel._many(x)),
            }
            times = in_turn(ways, device, turns, least=0.01)
            found.append(
                {
                    "out x in": f"{out_features}x{in_features}",
                    "M": m,
                    **{f"{name} ms": round(1e3 * statistics.median(t) / copies, 3) for name, t in times.items()},
                    "simulated / bf16": times_faster(times["simulated"], times["bf16"]),
                    "packed times faster": times_faster(times["bf16"], times["packed"]),
                    "bytes ratio": round(packed_layer.held_bytes / linear.weight.nbytes, 4),
                }
            )
            print(tabulate(found[-1:], headers="keys"), flush=True)
    return found


def build(blocks: int, device: torch.device) -> Any:
    """The model in bfloat16, random; ``blocks`` of 28, the rest in proportion."""
    share = blocks / BLOCKS
    vocabulary = max(256, round(VOCABULARY * share))
    config = Qwen2VLConfig(
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=False,
        vision_config={
            "depth": max(1, round(VISION_BLOCKS * share)), "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16,
            "mlp_ratio": 4,
        },
        text_config={
            "vocab_size": vocabulary, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": blocks,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device, no_init_weights():
            model = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model.eval().requires_grad_(False)


def int4_twin(model: Any, group: int, head: bool) -> tuple[Any, float]:
    """A copy with INT4 Linears in the language model, and bytes of these in ratio to bf16; the rest is shared."""
    linears = {n: m for n, m in model.model.language_model.named_modules() if isinstance(m, nn.Linear)}
    kept = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    before = after = 0
    for name, linear in linears.items():
        layer = quantized(linear, group, "packed")
        before, after = before + linear.weight.nbytes, after + layer.held_bytes
        twin.model.language_model.set_submodule(name, layer)
    if head:
        layer = quantized(model.lm_head, group, "packed")
        before, after = before + model.lm_head.weight.nbytes, after + layer.held_bytes
        twin.lm_head = layer
    return twin, after / before


def held_bytes(model: nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


@dataclass
class Session:
    """One model and batch with a static cache: ``prefill`` fills it, then ``decode`` makes tokens from it."""

    model: Any
    batch: int
    prompt: int
    tokens: int
    mode: str

    def __post_init__(self) -> None:
        device, text = self.model.device, self.model.config.text_config
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.prompt + self.tokens)
        self.cache.early_initialization(
            self.batch, text.num_key_value_heads, text.hidden_size // text.num_attention_heads, torch.bfloat16, device
        )
        self.ids = torch.randint(10, text.vocab_size, (self.batch, self.prompt), device=device)
        self.places = torch.arange(self.prompt, device=device).expand(3, self.batch, -1).contiguous()
        self.next_ids = torch.zeros(self.batch, 1, dtype=torch.long, device=device)
        self.next_place = torch.full((3, self.batch, 1), self.prompt, device=device)
        self.first = self.step
        self.again: Callable[[Tensor, Tensor], Tensor] = self.step
        self.graph: Any = None
        if self.mode == "compile":
            self.first = torch.compile(self.step, dynamic=False)
            graphs = "reduce-overhead" if device.type == "cuda" else None
            self.again = torch.compile(self.step, dynamic=False, mode=graphs)
        self.prefill()
        if self.mode == "graph":
            self.graph = captured(self.forward_one)
        for _ in range(2 if self.mode == "compile" else 1):  # a first call may compile, a second one again
            self.prefill()
            self.decode()

    def step(self, ids: Tensor, places: Tensor) -> Tensor:
        """The greedy next token of each row, shape (batch, 1)."""
        hidden = self.model.model.language_model(
            input_ids=ids, position_ids=places, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        token: Tensor = self.model.lm_head(hidden[:, -1:]).argmax(-1)
        return token

    def prefill(self) -> None:
        self.cache.reset()
        self.next_ids.copy_(self.first(self.ids, self.places))
        self.next_place.fill_(self.prompt)

    def forward_one(self) -> None:
        self.next_ids.copy_(self.again(self.next_ids, self.next_place))
        self.next_place.add_(1)

    def decode(self) -> None:
        for _ in range(self.tokens):
            if self.graph is not None:
                self.graph.replay()
            else:
                if self.mode == "compile":
                    torch.compiler.cudagraph_mark_step_begin()
                self.forward_one()

    def seconds(self) -> tuple[float, float]:
        """Of one prefill and of one decoded token of every row."""
        marks = []
        for part in (self.prefill, self.decode):
            synchronize(self.model.device)
            start = time.perf_counter()
            part()
            synchronize(self.model.device)
            marks.append(time.perf_counter() - start)
        return marks[0], marks[1] / self.tokens


@torch.inference_mode()
def measure_model(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    bf16 = build(arguments.layers, device)
    int4, linears_ratio = int4_twin(bf16, arguments.group, arguments.head)
    models = {"bf16": bf16, "int4": int4}
    sizes = {name: held_bytes(model) for name, model in models.items()}
    rows = []
    for batch in arguments.batches:
        sessions: dict[str, Session] = {}
        peaks: dict[str, int] = {}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for name, model in models.items():
            if device.type == "cuda":  # what the session adds, over what this model alone holds
                synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            sessions[name] = Session(model, batch, arguments.prompt, arguments.tokens, arguments.mode)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) - before + sizes[name]
        for _ in range(arguments.turns):
            for name, session in sessions.items():
                times[name].append(session.seconds())
        row: dict[str, Any] = {"batch": batch}
        for index, (phase, tokens) in enumerate((("prefill", arguments.prompt), ("decode", 1))):
            for name in models:
                seconds = statistics.median(t[index] for t in times[name])
                row[f"{phase} {name} tokens/s"] = float(f"{batch * tokens / seconds:.4g}")
            row[f"{phase} times faster"] = times_faster(*([t[index] for t in times[name]] for name in models))
        row.update({f"peak {name} GB": round(peak / 1e9, 3) for name, peak in peaks.items()})
        rows.append(row)
        print(tabulate(rows[-1:], headers="keys"), flush=True)
        del sessions
        if arguments.mode == "compile":
            torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "blocks": arguments.layers, "of blocks": BLOCKS, "prompt": arguments.prompt, "tokens": arguments.tokens,
        "mode": arguments.mode, "output layer quantized": arguments.head,
        "held GB": {name: round(size / 1e9, 3) for name, size in sizes.items()},
        "held ratio": round(sizes["int4"] / sizes["bf16"], 4), "quantized weights ratio": round(linears_ratio, 4),
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 64, 256], metavar="M")
    parser.add_argument("--group", type=int, default=128, help="group size")
    parser.add_argument("--layers-only", action="store_true", help="no model")
    parser.add_argument("--layers", type=int, help="blocks of the model; default 2 on the CPU, 28 on CUDA")
    parser.add_argument("--batches", type=int, nargs="+", help="default 1 8 64; on the CPU 1 8")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt; default 64 on the CPU, 512 on CUDA")
    parser.add_argument("--tokens", type=int, help="tokens to decode; default 8 on the CPU, 128 on CUDA")
    parser.add_argument("--mode", choices=["eager", "compile", "graph"], help="default eager; compile on CUDA")
    parser.add_argument("--head", action="store_true", help="quantize the output layer too")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="small matrices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    on_cuda = torch.device(arguments.device).type == "cuda"
    arguments.layers = arguments.layers or (BLOCKS if on_cuda else 2)
    arguments.batches = arguments.batches or ([1, 8, 64] if on_cuda else [1, 8])
    arguments.prompt = arguments.prompt or (512 if on_cuda else 64)
    arguments.tokens = arguments.tokens or (128 if on_cuda else 8)
    arguments.mode = arguments.mode or ("compile" if on_cuda else "eager")
    if arguments.mode == "graph" and not on_cuda:
        parser.error("--mode graph needs --device cuda")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    where: dict[str, Any] = dict(machine("torch", "transformers", "bitquake"))
    where |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    if on_cuda:
        where["gpu"] = torch.cuda.get_device_name(device)
    figures: dict[str, Any] = {
        "peer": "bf16 (torch F.linear)", "group_size": arguments.group, "turns": arguments.turns,
        "kernel": Int4Kernel.name_on(device), "machine": where,
    }  # fmt: skip
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.rows:
        figures["layers"] = measure_layers(shapes, arguments.rows, arguments.group, device, arguments.turns)
        print(tabulate(figures["layers"], headers="keys"))
    if not arguments.layers_only:
        figures["model"] = measure_model(arguments, device)
        print(tabulate(figures["model"]["rows"], headers="keys"))
        print({key: value for key, value in figures["model"].items() if key != "rows"})
    print(f"peer: {figures['peer']}, median of {arguments.turns}; {figures['kernel']}; {where}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
