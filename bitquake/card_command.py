"""``bitquake card``: the quant card of a checkpoint, of the runs in a folder, or in a file, as a person reads it."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bitquake.quant_card import CARD_FILE, PARTIAL, ModuleEntry, QuantCard

_OF_THE_MAKING = ("device", "image_processor", "libraries")
"""Fields that neither tensors nor config.json decide."""


class CardError(ValueError):
    """A path that has no quant card, or a card that cannot be read."""


@dataclass(frozen=True)
class FoundCard:
    """A card, where it was found, how it was checked, and what does not fit it.

    ``run_execution``: of the card of a checkpoint: how a run that says nothing else computes.
    """

    card: QuantCard
    where: str
    checked: str
    problems: tuple[str, ...] = ()
    run_execution: str = ""


def cards(path: Path, *, artifacts: Path | None = None, check: bool = True) -> Iterator[FoundCard]:
    """The cards at a path.

    - A checkpoint: its ``quant_card.json``, checked against its tensors (all of them are read and hashed as they
      compute) and its config.json; without that file, a card made from the tensors.
    - The output folder of runs: the card that their records name, by its hash.
    - A JSON file: the card in it.

    Args:
        artifacts: folder with ``quant_cards/``; None: the runs' own, then the user's cache.
        check: read a checkpoint's tensors; False shows its card unchecked.

    Raises:
        CardError: nothing there, no card in it, or a quantization that is not finished.
        ValueError: a checkpoint that cannot be loaded; runs without a complete result.
    """
    if path.is_file():
        run_execution = ""
        if path.name == CARD_FILE and (path.parent / "config.json").is_file():
            run_execution = _run_execution(path.parent)
        why = "not checked: a card alone has no tensors"
        yield FoundCard(_read(path), str(path), why, run_execution=run_execution)
    elif (path / "config.json").is_file():
        yield _of_checkpoint(path, check=check)
    elif (path / PARTIAL).is_dir():
        raise CardError(_unfinished(path))
    elif path.is_dir():
        yield from _of_runs(path, artifacts)
    else:
        raise CardError(
            f"{path}: is not there; give a checkpoint's folder, the output folder of runs, or a card's file"
        )


def _read(file: Path) -> QuantCard:
    try:
        return QuantCard.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise CardError(f"{file}: is no quant card ({str(error).splitlines()[0]})") from error


def _of_runs(folder: Path, artifacts: Path | None) -> Iterator[FoundCard]:
    from bitquake.reports import read_runs

    inputs = read_runs([folder], artifacts)
    problems = tuple(str(problem) for problem in inputs.problems)
    shown = False
    for run in inputs.runs:
        if run.card is not None:
            shown = True
            where = f"{', '.join(sorted(run.cells))} in {folder}"
            yield FoundCard(run.card, where, f"content hash {run.card_hash}, as the records say", problems)
    if not shown:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise CardError(f"{folder}: its runs name no quant card that can be found{listed}")


def _of_checkpoint(folder: Path, *, check: bool) -> FoundCard:
    file = folder / CARD_FILE
    stored = _read(file) if file.is_file() else None
    # with a config.json there is a whole checkpoint, which another quantization is about to replace
    problems = [_unfinished(folder)] if (folder / PARTIAL).is_dir() else []
    run_execution = _run_execution(folder)
    if stored is not None and not check:
        return FoundCard(stored, str(file), "not checked", tuple(problems), run_execution)
    made, unknown = _from_tensors(folder, stored)
    if stored is None:
        how = f"made from the tensors: the folder has no {CARD_FILE}"
        return FoundCard(made, str(folder), how, tuple(problems), run_execution)
    found = differences(stored, made)
    problems += [f"{file}: {problem}" for problem in found]
    unknown = (*_OF_THE_MAKING, *unknown, *(() if _same_kind_of_device(stored, made) else ("kernel",)))
    fits = (
        f"checked: weights hash and {len(stored.modules)} modules fit the tensors, the other fields tensors and "
        f"config.json; not in them: {', '.join(name.replace('_', ' ') for name in unknown)}"
    )
    checked = "does NOT fit the tensors and config.json" if found else fits
    return FoundCard(stored, str(file), checked, tuple(problems), run_execution)


def _run_execution(folder: Path) -> str:
    """How a run of a checkpoint computes that says nothing else, as ``loading.load_quantized`` takes it."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        quant = (config.get("quantization_config") or {}).get("quant") or {}
        return str(quant.get("execution", "simulated"))
    except (ValueError, AttributeError) as error:
        raise CardError(f"{file}: is no config of a model ({error})") from error


def _unfinished(folder: Path) -> str:
    """That ``bitquake quantize`` is not done with a folder, and the command that goes on."""
    from bitquake.model_wrappers.quantizers.partial import IDENTITY
    from bitquake.model_wrappers.quantizers.spec import QuantSpecError, load_spec

    partial = folder / PARTIAL
    n_done = sum(not file.name.startswith(".") for file in partial.glob("*.safetensors"))
    said = f"{folder}: `bitquake quantize` into it is unfinished ({n_done} modules are done); "
    try:
        begun = json.loads((partial / IDENTITY).read_text(encoding="utf-8"))
        model, quant, dtype, revision = (begun[key] for key in ("model", "quant", "dtype", "revision"))
        name = quant["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{said}the command that began it goes on from there, without --overwrite"
    try:
        known = {key: value for key, value in load_spec(name).options().items() if key != "execution"} == quant
    except QuantSpecError:
        known = False
    words = ["bitquake", "quantize", model, "--quant", name if known else "FILE", "--out", str(folder)]
    words += [*(["--dtype", dtype] if dtype != "bfloat16" else []), *(["--revision", revision] if revision else [])]
    file = "" if known else f", where FILE is the one that says what {name} is"
    return f"{said}this goes on from there: {shlex.join(words)}{file}"


def _from_tensors(folder: Path, stored: QuantCard | None) -> tuple[QuantCard, tuple[str, ...]]:
    """A card of a checkpoint as it is loaded here, packed; and fields that its config.json does not know.

    Those are taken from ``stored``.
    """
    import torch

    from bitquake.model_wrappers.arguments import as_dtype
    from bitquake.model_wrappers.loading import load_quantized, without_progress_bars
    from bitquake.model_wrappers.quant_cards import build_card
    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.quant_card import Calibration

    with without_progress_bars():
        loaded = load_quantized(
            str(folder), load_spec("none"), revision=None, dtype=as_dtype(_dtype(folder)),
            device=torch.device("cpu"), device_map=None, attn_implementation=None, trust_remote_code=False,
            execution="packed",
        )  # fmt: skip
    origin = {"pretrained": loaded.base or str(folder), "base": "", "revision": loaded.base_revision}
    unknown = () if loaded.base else tuple(origin)
    if stored is not None:
        origin |= {field: getattr(stored, field) for field in unknown}
    card = build_card(
        loaded.model, loaded.spec, pretrained=origin["pretrained"], base=origin["base"], revision=origin["revision"],
        before=loaded.before or {},
        calibration=Calibration(**loaded.calibration) if loaded.calibration else None,
        checkpoint_format=loaded.checkpoint_format,
    )  # fmt: skip
    return card, unknown


def _dtype(folder: Path) -> str:
    """The floating dtype of most stored weights that are not quantized; without safetensors, the config's.

    The config's is the first parameter's alone, which some architectures keep in float32.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    from bitquake.model_wrappers.quantizers.linear import STORED

    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no mapping
                    tensor = opened.get_slice(key)
                    if tensor.get_dtype() in names and key.rpartition(".")[2] not in STORED:
                        counts[names[tensor.get_dtype()]] += math.prod(tensor.get_shape())
        except SafetensorError:
            continue  # loading tells which file is damaged, and what to do
    if counts:
        return max(counts, key=lambda name: (counts[name], name))
    return str(getattr(AutoConfig.from_pretrained(folder), "dtype", None) or "bfloat16")


def differences(stored: QuantCard, made: QuantCard) -> list[str]:
    """What a stored card says that a card made from the tensors and config.json does not.

    Every field counts except those of how the card was made: device, image processor, libraries; and the kernel of
    another kind of device. A card of the quantization itself has no ``checkpoint_format``.
    """
    found = _different_modules(stored, made)
    skipped = {"modules", "weights_hash", *_OF_THE_MAKING}
    if not _same_kind_of_device(stored, made):
        skipped.add("kernel")
    if not stored.checkpoint_format:
        skipped.add("checkpoint_format")
    theirs, ours = (
        _flat({**card.model_dump(mode="json", exclude=skipped), "spec": _spec(card)}) for card in (made, stored)
    )
    for field in sorted(ours.keys() | theirs.keys()):
        said, true = ours.get(field, "nothing"), theirs.get(field, "nothing")
        if said != true:
            found.append(f"{field}: the card says {said}, found {true}")
    if stored.weights_hash != made.weights_hash:
        why = ": the weights that are not quantized are others than those that the card was made from"
        same = [m.hash_after for m in stored.modules] == [m.hash_after for m in made.modules]
        found.append(
            f"weights_hash: the card says {stored.weights_hash}, found {made.weights_hash}{why if same else ''}"
        )
    return found


def _different_modules(stored: QuantCard, made: QuantCard) -> list[str]:
    found = []
    theirs = {entry.name: entry for entry in made.modules}
    ours = {entry.name: entry for entry in stored.modules}
    if twice := sorted(name for name, n in Counter(entry.name for entry in stored.modules).items() if n > 1):
        found.append(f"modules: {len(twice)} are in it more than once (first {twice[0]})")
    if absent := sorted(ours.keys() - theirs.keys()):
        found.append(f"modules: {len(absent)} modules that it calls quantized are not (first {absent[0]})")
    if more := sorted(theirs.keys() - ours.keys()):
        found.append(f"modules: {len(more)} quantized modules are not in it (first {more[0]})")
    for name in sorted(ours.keys() & theirs.keys()):
        fields = [key for key in ModuleEntry.model_fields if getattr(ours[name], key) != getattr(theirs[name], key)]
        if fields:
            told = "; ".join(f"{key} {getattr(ours[name], key)}, not {getattr(theirs[name], key)}" for key in fields)
            found.append(f"{name}: the card says {told}")
    return found


def _spec(card: QuantCard) -> dict[str, Any]:
    """A card's spec as it is written today: another version may write out another default."""
    from bitquake.model_wrappers.quantizers.spec import QuantSpecError, load_spec

    try:
        return load_spec(card.spec).options()
    except QuantSpecError:
        return card.spec


def _same_kind_of_device(stored: QuantCard, made: QuantCard) -> bool:
    """Of ``cpu`` and ``2 x cuda NVIDIA H200`` the kinds are ``cpu`` and ``cuda``."""
    kinds = [{part.rpartition(" x ")[2].split(" ")[0] for part in card.device.split(", ")} for card in (stored, made)]
    return kinds[0] == kinds[1]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Each leaf of nested mappings by its path; an empty mapping has none."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        name: leaf
        for key, below in value.items()
        for name, leaf in _flat(below, f"{path}.{key}" if path else key).items()
    }


def describe(found: FoundCard, *, modules: bool = False) -> str:
    """A card as tables: how it was quantized, bytes by component, and with ``modules`` each quantized module."""
    card = found.card
    changed = sum(module.changed for module in card.modules)
    rows = [
        ("card", f"{card.content_hash} ({found.where})"),
        ("check", found.checked),
        ("model", " ".join(filter(None, [card.pretrained, f"revision {card.revision}" if card.revision else ""]))),
        ("made from", card.base),
        ("architecture", f"{card.architecture}, {card.dtype}"),
        ("adapter", "" if card.adapter is None else f"{card.adapter.source} (hash {card.adapter.hash})"),
        ("quantization", card.spec_name),
        ("method", _method(card)),
        ("came as", card.checkpoint_format),
        ("bits", _counted(card.modules, lambda m: f"{m.bits}")),
        ("group size", _counted(card.modules, _group)),
        (
            "activations",
            _counted([m for m in card.modules if m.activation_bits], lambda m: f"{m.activation_bits} bits"),
        ),
        ("components", ", ".join(name for name, entry in card.components.items() if entry.n_quantized)),
        ("modules", f"{len(card.modules)} quantized, {changed} changed, {len(card.modules) - changed} unchanged"),
        ("kept", _kept(card.kept)),
        ("origin", "imported, self-declared" if card.self_declared else ""),
        (
            "bits/weight",
            "unknown"
            if card.self_declared
            else f"{card.nominal_bpw:.3f} nominal, {card.effective_bpw:.3f} with scales and zero-points",
        ),
        ("execution", _execution(found)),
        ("kernel", card.kernel),
        ("calibration", _calibration(card)),
        ("image processor", card.image_processor),
        ("device", card.device),
        ("libraries", ", ".join(f"{name} {version}" for name, version in sorted(card.libraries.items()))),
        ("weights hash", card.weights_hash),
    ]
    parts = [tabulate([row for row in rows if row[1]], tablefmt="plain"), _components(card)]
    if modules:
        parts.append(_modules(card.modules))
    return "\n\n".join(parts)


def _execution(found: FoundCard) -> str:
    """Of a checkpoint's card it is how the folder is stored, which is not how a run computes."""
    card, runs = found.card, found.run_execution
    if not runs or card.execution == "full-precision":
        return card.execution
    other = "simulated" if runs == "packed" else "packed"
    how = {"packed": "from the codes", "simulated": "on weights de-quantized before"}
    return f"{card.execution}: so it is stored; a run of it is {runs} ({how[runs]}) unless it says execution={other}"


def _method(card: QuantCard) -> str:
    options = card.spec.get(card.method)
    given = ", ".join(f"{key} {value}" for key, value in options.items()) if isinstance(options, Mapping) else ""
    return f"{card.method} ({given})" if given else card.method


def _group(module: ModuleEntry) -> str:
    if module.per_tensor:
        kind = "per tensor"
    else:
        kind = "per row" if module.group_size == module.shape[1] else str(module.group_size)
    return f"{kind}, {'symmetric' if module.symmetric else 'asymmetric'}"


def _counted(modules: Sequence[ModuleEntry], what: Any) -> str:
    """Each value, with its number of modules where there are several."""
    counts = Counter(what(module) for module in modules)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return "; ".join(f"{value} ({n} modules)" for value, n in sorted(counts.items()))


def _kept(kept: Mapping[str, str]) -> str:
    if not kept:
        return "no Linear module"
    dtypes = Counter(kept.values())
    shown = ", ".join(f"{n} in {dtype}" for dtype, n in sorted(dtypes.items()))
    names = sorted(kept)
    return f"{len(kept)} Linear modules at full precision ({shown}): {', '.join(names[:3])}{' …' if names[3:] else ''}"


def _calibration(card: QuantCard) -> str:
    seen = card.calibration
    if seen.source == "none":
        return "none"
    data = f" of {seen.data}" if seen.data else ""
    return f"{seen.source}{data}, {seen.n_samples} samples (hash of their image ids {seen.ids_hash})"


def _components(card: QuantCard) -> str:
    rows = [
        {
            "component": name,
            "weights": f"{entry.n_parameters:,}",
            "quantized": f"{entry.n_quantized:,}",
            # bytes of a simulated run are those of its de-quantized weights, and mean nothing
            "bytes in memory": f"{entry.n_bytes:,}" if card.execution != "simulated" else "(simulated)",
            "bytes packed": f"{entry.packed_bytes:,}",
            "bits/weight": f"{8 * entry.packed_bytes / entry.n_parameters:.2f}" if entry.n_parameters else "-",
        }
        for name, entry in card.components.items()
    ]
    return tabulate(rows, headers="keys", colalign=("left", *["right"] * 5))


def _modules(modules: Sequence[ModuleEntry]) -> str:
    rows = [
        {
            "module": module.name,
            "cell": "/".join(filter(None, [module.component, module.third, module.layer])),
            "shape": "x".join(map(str, module.shape)),
            "bits": module.bits,
            "group": _group(module),
            "packed": f"{module.packed_bytes:,}",
            "before": module.hash_before[:8] or "?",
            "after": module.hash_after[:8],
        }
        for module in modules
    ]
    return tabulate(rows, headers="keys")
