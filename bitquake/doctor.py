"""``bitquake doctor``: tries what Bitquake relies on, and says what works on this machine and what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Callable
from typing import Literal, NamedTuple

from tabulate import tabulate

State = Literal["ok", "absent", "broken"]


class Check(NamedTuple):
    """One finding; ``needed`` ones make the doctor's verdict negative unless they are ok."""

    what: str
    state: State
    detail: str
    needed: bool


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try(what: str, probe: Callable[[], str], *, package: str | None = None, needed: bool = False) -> Check:
    """Run a probe; an absent package, an error and success are three different findings."""
    if package is not None and _version(package) is None:
        return Check(what, "absent", f"pip install {package}", needed)
    try:
        return Check(what, "ok", probe(), needed)
    except Exception as error:  # a doctor reports every failure, whatever its kind
        return Check(what, "broken", f"{type(error).__name__}: {error}"[:160], needed)


def _torch() -> str:
    import torch

    parts = [torch.__version__, f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            parts.append(
                f"cuda:{i} {torch.cuda.get_device_name(i)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            )
    else:
        parts.append("no CUDA device: evaluation runs on the CPU")
    return "; ".join(parts)


def _registration() -> str:
    from lmms_eval.models import get_model_manifest
    from lmms_eval.tasks import TaskManager

    manifest = get_model_manifest("bitquake_hf")
    ours = [name for name in TaskManager().all_subtasks if name.startswith("block_")]
    if manifest is None or not ours:
        raise RuntimeError("lmms-eval does not see Bitquake's model or tasks; reinstall bitquake in this environment")
    return f"model {manifest.model_id} and {len(ours)} block-world tasks are registered"


def _round_trip(name: str) -> str:
    """Quantize one random layer with a named spec and report the relative error of its weights."""
    import torch

    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.model_wrappers.quantizers.replace import quantize_linear

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64)
    before = layer.weight.detach().clone()
    after = quantize_linear(layer, load_spec(name)).weight.detach()
    return f"relative weight error {((after - before).norm() / before.norm()).item():.3f} on a random layer"


def _library_round_trip(kinds: dict[str, str]) -> str:
    """The same by a library's layers (word -> spec), each also run once."""
    import torch

    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.model_wrappers.quantizers.libraries.facts import library_facts
    from bitquake.model_wrappers.quantizers.replace import library_linear

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, dtype=torch.bfloat16, device=device)
    before = layer.weight.detach().float()
    errors = []
    for kind, spec in kinds.items():
        quantized = library_linear(layer, load_spec(spec)).eval()
        with torch.inference_mode():
            if not quantized(torch.ones(2, 256, dtype=torch.bfloat16, device=device)).isfinite().all():
                raise RuntimeError(f"{kind}: a layer gave answers that are not finite")
        facts = library_facts(quantized)
        assert facts is not None
        errors.append(f"{kind} {((facts.weight().float() - before).norm() / before.norm()).item():.3f}")
    return f"relative weight error on a random layer, {device}: {', '.join(errors)}"


def _bitsandbytes() -> str:
    return _library_round_trip({"nf4": "bnb-nf4", "fp4": "bnb-fp4", "int8": "bnb-int8"})


def _torchao() -> str:
    import torch

    kinds = {"int8": "torchao-int8", "int8-dynamic": "torchao-int8-dynamic", "fp8": "torchao-fp8"}
    if torch.cuda.is_available():
        return _library_round_trip(kinds | {"int4": "torchao-int4-g128"})
    return f"{_library_round_trip(kinds)}; int4 (tinygemm) needs a CUDA device"


def _peft() -> str:
    """Put a random adapter on one quantized layer."""
    import torch
    from loguru import logger
    from peft import LoraConfig, get_peft_model

    from bitquake.model_wrappers.loading import put_adapter_on
    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.model_wrappers.quantizers.replace import quantize_linear

    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 8), torch.ones(1, 64)
    layer = quantize_linear(linear, load_spec("rtn-int4-g64"))
    lora = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    logger.disable("bitquake")
    try:
        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(torch.nn.ModuleDict({"layer": linear}), lora).save_pretrained(folder)
            adapted, _ = put_adapter_on(torch.nn.ModuleDict({"layer": layer}), folder)
    finally:
        logger.enable("bitquake")
    with torch.inference_mode():
        if torch.equal(adapted["layer"](x), layer(x)):
            raise RuntimeError("an adapter on a quantized layer changes nothing")
    return f"{_version('peft')}: an adapter works on a quantized layer"


def _gemlite() -> str:
    import torch

    importlib.import_module("gemlite")
    where = "" if torch.cuda.is_available() else ", whose kernels need a CUDA device"
    return f"{_version('gemlite')}{where}"


def _checkpoints() -> str:
    from bitquake.model_wrappers import checkpoints

    found = checkpoints.names()
    if not found:
        raise RuntimeError("the package holds no reference checkpoint")
    return ", ".join(found)


def _import(module: str, package: str) -> Callable[[], str]:
    def probe() -> str:
        importlib.import_module(module)
        return str(_version(package))

    return probe


def _autoawq() -> str:
    """Pack a random layer with AutoAWQ, and read that as a published checkpoint is read."""
    import warnings

    import torch

    from bitquake.model_wrappers.quantizers.published.awq import read_awq

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its farewell
        try:
            gemm = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
        except Exception as error:
            raise RuntimeError(f"{_WITHOUT_AUTOAWQ}; it cannot be imported: {error}") from error
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 64, bias=False)
    scales, zeros = (torch.rand(2, 64) * 0.01 + 0.01).half().float(), torch.randint(0, 16, (2, 64))
    codes = torch.randint(0, 16, (64, 256))
    wide = [each.t().repeat_interleave(128, 1) for each in (scales, zeros)]
    layer.weight.data = (codes - wide[1]) * wide[0]
    packed = gemm.from_linear(layer, 4, 128, scales=scales, zeros=zeros)
    read = read_awq(dict(packed.named_buffers()), in_features=256, out_features=64, group_size=128)
    if not torch.equal(read.codes, codes.to(torch.uint8)):
        raise RuntimeError("a layer that autoawq packed is not read as it was packed")
    return f"{_version('autoawq')}: what it packs is read exactly; {_WITHOUT_AUTOAWQ}"


_WITHOUT_AUTOAWQ = (
    "archived and not needed: AWQ is quant=awq-int4-g128, and its checkpoints are read without it "
    "(it loads no vision-language model itself)"
)


def checks() -> list[Check]:
    """All findings, in the order of the table."""
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores", True),
        _try("torch", _torch, package="torch", needed=True),
        _try("transformers", _import("transformers", "transformers"), package="transformers", needed=True),
        _try("lmms-eval", _import("lmms_eval", "lmms-eval"), package="lmms-eval", needed=True),
        _try("registration in lmms-eval", _registration, package="lmms-eval", needed=True),
        _try("reference checkpoint", _checkpoints, needed=True),
        _try("quantizer rtn", lambda: _round_trip("rtn-int4-g64"), package="torch", needed=True),
        _try("quantizer hqq (own solver)", lambda: _round_trip("hqq-int4-g64"), package="torch", needed=True),
        _try("quantizer hqq (library backend)", lambda: _round_trip("hqq-int4-g64:backend=hqq"), package="hqq"),
        _try("quantizer bitsandbytes", _bitsandbytes, package="bitsandbytes"),
        _try("quantizer torchao", _torchao, package="torchao"),
        _try("gemlite", _gemlite, package="gemlite"),
        _try("LoRA adapters (peft)", _peft, package="peft"),
        _try("autoawq", _autoawq, package="autoawq")
        if _version("autoawq")
        else Check("autoawq", "absent", _WITHOUT_AUTOAWQ, False),
    ]


def run() -> bool:
    """Print the table; True when everything that evaluation needs works."""
    found = checks()
    signs = {"ok": "ok", "absent": "not installed", "broken": "BROKEN"}
    print(
        tabulate(
            [(c.what, signs[c.state], c.detail) for c in found],
            headers=("what", "state", "detail"),
            maxcolwidths=[None, None, 90],
        )
    )
    failing = [c.what for c in found if c.needed and c.state != "ok"]
    print(f"\nNot ready: {', '.join(failing)}." if failing else "\nReady: quantized models can be evaluated here.")
    return not failing
