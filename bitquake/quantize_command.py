"""``bitquake quantize``: a model in, a checkpoint in the packed format out; a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from bitquake import __version__
from bitquake.model_wrappers.arguments import as_dtype
from bitquake.model_wrappers.journal import digest
from bitquake.model_wrappers.loading import (
    REFERENCE_PREFIX,
    LoadedModel,
    commit,
    load_processor,
    load_quantized,
    resolve_pretrained,
    without_progress_bars,
)
from bitquake.model_wrappers.quant_cards import build_card, calibration_entry
from bitquake.model_wrappers.quantizers import QuantSpec, load_spec
from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.partial import PartialQuantization
from bitquake.model_wrappers.quantizers.spec import LIBRARIES
from bitquake.model_wrappers.quantizers.transformers_quantizer import LoadingHooks, make_savable
from bitquake.model_wrappers.saving import move_in, save_aside
from bitquake.quant_card import CARD_FILE, PARTIAL, Calibration, QuantCard

if TYPE_CHECKING:
    from bitquake.model_wrappers.quantizers.weight import QuantizedWeight


class QuantizeError(ValueError):
    """A quantization that cannot be started or went out of memory."""


@dataclass(frozen=True)
class Quantized:
    """What ``quantize`` did.

    Attributes:
        folder: the checkpoint.
        card: its quant card.
        n_resumed: modules that an earlier, killed run had finished.
        was_done: an earlier run had finished all of it, and this one did nothing.
        seconds: this run's time.
        peak_bytes: greatest resident memory of this process; ``peak_device_bytes`` of the accelerator, or None.
        full_bytes, packed_bytes: the model's weights before and after.
    """

    folder: Path
    card: QuantCard
    n_resumed: int
    seconds: float
    peak_bytes: int
    peak_device_bytes: int | None
    full_bytes: int
    packed_bytes: int
    was_done: bool = False


def quantize(
    pretrained: str,
    quant: str,
    out: Path,
    *,
    dtype: str = "bfloat16",
    device: str | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Quantized:
    """Quantize a model and write it as a checkpoint that ``from_pretrained`` and ``pretrained=`` take.

    Each finished module is written at once. The same call after a kill or want of memory goes on from there, and ends
    with the same bytes as one that was not disturbed; after a call that ended well it does nothing. A call that fails
    before its first module is finished leaves no folder behind.

    Args:
        pretrained: hub name, folder, or ``bitquake/…`` of a reference checkpoint.
        quant: a spec as ``quant=`` takes it; library methods cannot be saved.
        out: a new or empty folder, or one that this very quantization began.
        dtype: of what stays at full precision, and of the weights that are quantized.
        device: ``cpu``, ``cuda:0``; None: the accelerator if there is one.
        max_shard_size: of a file of the checkpoint: a number and KB, MB, GB or TB.
        overwrite: a checkpoint that is in ``out`` makes room, finished modules of another quantization too.

    Raises:
        ValueError: a spec that cannot be saved, a folder in use, a model that is quantized already, out of memory, and
            whatever loading or quantizing refuses.
    """
    started = time.monotonic()
    spec, weights_dtype = load_spec(quant), as_dtype(dtype)
    if spec.is_full_precision or spec.method in (*LIBRARIES, "checkpoint"):
        why = "quantizes nothing" if spec.is_full_precision else f"is {spec.method}'s own format, which is not saved"
        raise QuantizeError(f"--quant {spec.name}: it {why}; use quant={spec.name} when the model is evaluated")
    _check_shard_size(max_shard_size)
    where = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = resolve_pretrained(pretrained)
    if not overwrite:
        card = _finished(
            out, spec, pretrained=pretrained, source=source, dtype=weights_dtype, revision=revision,
            remote=trust_remote_code,
        )  # fmt: skip
        if card is not None:
            return _quantized(out, card, weights_dtype, started, where, n_resumed=0, was_done=True)
    absent = [folder for folder in (out, *out.parents) if not folder.exists()]
    partial = _open_folder(out, overwrite=overwrite)

    # Codes are the same in both executions, and packed needs the least memory.
    packed = spec.model_copy(update={"execution": "packed"})
    identity: dict[str, Any] = {
        "model": pretrained, "revision": revision or "", "dtype": dtype, "bitquake": __version__,
        "quant": {key: value for key, value in spec.options().items() if key != "execution"},
    }  # fmt: skip
    hooks = _Bookkeeping(spec, partial, identity, progress=progress)
    try:
        processor = load_processor(source, revision=revision, trust_remote_code=trust_remote_code)
        with without_progress_bars():
            loaded = load_quantized(
                source, packed, revision=revision, dtype=weights_dtype, device=where, device_map=None,
                attn_implementation=None, trust_remote_code=trust_remote_code, hooks=hooks,
            )  # fmt: skip
        if loaded.checkpoint_format:
            raise QuantizeError(
                f"{pretrained} is quantized already ({loaded.spec.name}); give the full-precision model"
            )
        before, calibration = loaded.before, None
        if before is None:
            before, calibration = _calibrate(loaded, processor, pretrained, hooks, out)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        kept = f"They are kept in {partial}: the same command goes on from there," if hooks.n_done else "Run it"
        raise QuantizeError(
            f"out of memory after {hooks.n_done} of {hooks.n_modules or 'all'} modules. {kept} on a machine with more "
            "memory or with another --device"
        ) from error
    finally:
        hooks.close()
        _remove_unused(partial, absent)
    model = loaded.model
    base_revision = commit(model, revision)
    card = build_card(
        model, packed, pretrained=pretrained, revision=base_revision, before=before, calibration=calibration,
        image_processor=type(processor.image_processor).__name__,
    )  # fmt: skip
    make_savable(
        model, spec, before, base=pretrained, base_revision=base_revision,
        calibration=None if calibration is None else calibration.model_dump(),
    )  # fmt: skip
    _save(model, card, source, out, max_shard_size=max_shard_size, revision=revision, remote=trust_remote_code)
    return _quantized(out, card, weights_dtype, started, where, n_resumed=hooks.n_resumed)


def _quantized(
    out: Path, card: QuantCard, dtype: torch.dtype, started: float, device: torch.device, *, n_resumed: int,
    was_done: bool = False,
) -> Quantized:  # fmt: skip
    packed = sum(entry.packed_bytes for entry in card.components.values())
    return Quantized(
        folder=out,
        card=card,
        n_resumed=n_resumed,
        seconds=time.monotonic() - started,
        peak_bytes=_peak_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        full_bytes=sum(m.n_weights * dtype.itemsize - m.packed_bytes for m in card.modules) + packed,
        packed_bytes=packed,
        was_done=was_done,
    )


def summary(done: Quantized) -> str:
    """What the command prints at the end."""
    card = done.card
    resumed = f" ({done.n_resumed} of them by an earlier run)" if done.n_resumed else ""
    changed = sum(module.changed for module in card.modules)
    device = "" if done.peak_device_bytes is None else f", {done.peak_device_bytes / 1e9:.2f} GB on the device"
    world = "block_" if card.pretrained.startswith(REFERENCE_PREFIX) else ""
    lines = [
        f"{card.spec_name}: {len(card.modules)} modules quantized{resumed}, {changed} changed, {len(card.kept)} Linear "
        "modules kept",
        f"weights   {done.full_bytes / 1e6:,.1f} MB -> {done.packed_bytes / 1e6:,.1f} MB "
        f"({card.effective_bpw:.2f} bits per weight)",
        f"time      {done.seconds:.1f} s, peak memory of this process {done.peak_bytes / 1e9:.2f} GB{device}",
        f"card      {done.folder / CARD_FILE}  (bitquake card {done.folder})",
        f"evaluate  lmms-eval --model bitquake_hf --model_args pretrained={done.folder} --tasks {world}vqav2_clean",
    ]
    if done.was_done:
        lines[2] = f"done      by an earlier run, in {done.folder}; --overwrite quantizes anew"
    return "\n".join(lines)


def _peak_bytes() -> int:
    """Greatest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage begins with the greatest of the process that started this one
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Bookkeeping(LoadingHooks):
    """Finished modules on disk, and the progress bar.

    Args:
        identity: what decides the result; more may be put into it before ``start``.
    """

    def __init__(self, spec: QuantSpec, folder: Path, identity: dict[str, Any], *, progress: bool) -> None:
        self._spec, self._folder, self._progress = spec, folder, progress
        self.identity = identity
        self.store: PartialQuantization | None = None
        self._bar: Any = None
        self.n_modules = self.n_done = self.n_resumed = 0

    def start(self, n_modules: int) -> None:
        self.n_modules = n_modules
        self.store = PartialQuantization(self._folder, self.identity)
        self._bar = tqdm(
            total=n_modules, desc=f"quantizing {self._spec.name}", unit="module", disable=not self._progress,
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # a log needs no line for each module
        )  # fmt: skip

    def find(self, name: str, before: str) -> QuantizedWeight | None:
        assert self.store is not None
        found = self.store.find(name, before)
        if found is not None:
            self.n_resumed += 1
            self._step()
        return found

    def finished(self, name: str, before: str, weight: QuantizedWeight) -> None:
        assert self.store is not None
        self.store.put(name, before, weight)
        self._step()

    def _step(self) -> None:
        self.n_done += 1
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _calibrate(
    loaded: LoadedModel, processor: Any, pretrained: str, hooks: _Bookkeeping, out: Path
) -> tuple[dict[str, str], Calibration]:
    """Carry out a calibrated method on a model that was loaded whole."""
    from bitquake.model_wrappers.calibration import build_calibration
    from bitquake.model_wrappers.quantizers.replace import quantization_targets, quantize_model

    spec, model = loaded.spec, loaded.model
    assert spec.calibration is not None
    targets = quantization_targets(model, spec)  # a plan that matches nothing must not cost a calibration set
    data = build_calibration(spec.calibration, model, processor, pretrained=pretrained)
    # What a module becomes depends on the others, so all weights decide.
    hashes = {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}
    hooks.identity |= {"weights": digest(hashes), "calibration": data.content_hash}
    hooks.start(len(targets))
    assert hooks.store is not None
    for name in hooks.store:
        hooks.find(name, hashes[f"{name}.weight"])
    before = quantize_model(
        model, spec, calibration=data, done=hooks.store,
        emit=lambda name, weight: hooks.finished(name, hashes[f"{name}.weight"], weight),
    )  # fmt: skip
    data.store_image_ids(out)
    return before, calibration_entry(data)


def _check_shard_size(size: str) -> None:
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[KMGT]B", size.strip(), re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise QuantizeError(f"--max-shard-size {size}: expected a number and KB, MB, GB or TB, such as 500MB or 5GB")


def _device(name: str) -> torch.device:
    """A device that tensors can be put on.

    Raises:
        QuantizeError: it is none, or none of this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch, by the kind of the device
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise QuantizeError(
            f"--device {name}: cannot be used here ({str(error).splitlines()[0]}); this machine has {', '.join(here)}"
        ) from error
    return device


def _finished(
    out: Path, spec: QuantSpec, *, pretrained: str, source: str, dtype: torch.dtype, revision: str | None, remote: bool
) -> QuantCard | None:
    """The card of the checkpoint in ``out``, if this very quantization made it and the model is what it was."""
    config, told = out / "config.json", out / CARD_FILE
    if not config.is_file() or not told.is_file() or (out / PARTIAL).exists():
        return None
    try:
        card = QuantCard.model_validate_json(told.read_bytes())
        quant = json.loads(config.read_bytes()).get("quantization_config", {}).get("quant")
    except ValueError:
        return None
    made = (card.pretrained, quant, card.dtype, card.libraries.get("bitquake"))
    if made != (pretrained, spec.options(), str(dtype).removeprefix("torch."), __version__):
        return None
    model = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=remote)
    written = config.stat().st_mtime
    newer = any(file.stat().st_mtime > written for file in Path(source).glob("*.safetensors"))
    return None if newer or commit(SimpleNamespace(config=model), revision) != card.revision else card


def _remove_unused(partial: Path, absent: Sequence[Path] = ()) -> None:
    """Take back a folder of finished modules that holds none, and the folders that were ``absent`` before."""
    if any(partial.glob("*.safetensors")):
        return
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty
        for folder in absent:
            folder.rmdir()


def _open_folder(out: Path, *, overwrite: bool) -> Path:
    """Check the output folder before anything is loaded; returns its folder of finished modules."""
    partial = out / PARTIAL
    if out.exists() and not out.is_dir():
        raise QuantizeError(f"--out {out}: is a file; give a folder")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if overwrite and there and not {PARTIAL, "config.json"} & set(there):
        raise QuantizeError(
            f"--out {out}: holds {there[0]} and no checkpoint; it is not overwritten. Give another folder"
        )
    if overwrite:
        shutil.rmtree(partial, ignore_errors=True)
    elif there and PARTIAL not in there:
        raise QuantizeError(
            f"--out {out}: is not empty ({there[0]}{' …' if len(there) > 1 else ''}); give another folder, or "
            "--overwrite to replace the checkpoint in it"
        )
    else:
        _remove_unused(partial)  # of a run killed before it had finished a module, perhaps another quantization
    out.mkdir(parents=True, exist_ok=True)  # that it cannot be written must not come out after hours
    return partial


def _save(
    model: Any, card: QuantCard, source: str, out: Path, *, max_shard_size: str, revision: str | None, remote: bool
) -> None:
    """Write the checkpoint aside, then move it in; ``config.json``, without which it is none, comes last."""
    aside = out / PARTIAL / "checkpoint"
    save_aside(model, aside, source=source, max_shard_size=max_shard_size, revision=revision, trust_remote_code=remote)
    move_in(aside, out, texts={CARD_FILE: card.to_json() + "\n", "README.md": _readme(card)})
    shutil.rmtree(out / PARTIAL)


def _readme(card: QuantCard) -> str:
    """A model card to fill in."""
    hub_name = card.pretrained.count("/") == 1 and not card.pretrained.startswith((".", "/", "~", REFERENCE_PREFIX))
    base = f"base_model: {card.pretrained}\n" if hub_name else ""
    calibration = card.calibration
    data = "none" if calibration.source == "none" else f"{calibration.n_samples} samples, source {calibration.source}"
    components = ", ".join(name for name, entry in card.components.items() if entry.n_quantized)
    return f"""---
library_name: transformers
{base}tags: [bitquake, quantized]
---

# {card.pretrained.rstrip("/").rpartition("/")[2]}, {card.spec_name}

{card.architecture} quantized with Bitquake: method {card.method}, {len(card.modules)} Linear modules ({components}),
{card.effective_bpw:.2f} bits per weight over the whole model, calibration: {data}. The rest is {card.dtype}.
What was done to each module, with hashes, is in `{CARD_FILE}`; `bitquake card FOLDER` shows and checks it.

```python
import bitquake.model_wrappers.quantizers.transformers_quantizer  # registers the format
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype="{card.dtype}")
```

How well it answers, and whether it knows when it is wrong:
`lmms-eval --model bitquake_hf --model_args pretrained=FOLDER --tasks vqav2_clean,vqav2_noise_3`.
"""


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
