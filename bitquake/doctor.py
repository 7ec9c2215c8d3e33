"""``bitquake doctor``: tries what Bitquake relies on, and says what works on this machine and what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
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
    importlib.import_module("awq")
    return f"{_version('autoawq')} (archived; cannot load vision-language models with transformers 5)"


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
        _try("LoRA adapters (peft)", _import("peft", "peft"), package="peft"),
        _try("autoawq", _autoawq, package="autoawq"),
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
