"""``bitquake card``: the quant card of a checkpoint, of the runs in a folder, or in a file, as a person reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bitquake.quant_card import CARD_FILE, ModuleEntry, QuantCard


class CardError(ValueError):
    """A path that has no quant card, or a card that cannot be read."""


@dataclass(frozen=True)
class FoundCard:
    """A card, where it was found, how it was checked, and what does not fit it."""

    card: QuantCard
    where: str
    checked: str
    problems: tuple[str, ...] = ()


def cards(path: Path, *, artifacts: Path | None = None, check: bool = True) -> Iterator[FoundCard]:
    """The cards at a path.

    - A checkpoint in the packed format: its ``quant_card.json``, checked against its tensors (all of them are read and
      hashed as they compute); without that file, a card made from the tensors.
    - The output folder of runs: the card that their records name, by its hash.
    - A JSON file: the card in it.

    Args:
        artifacts: folder with ``quant_cards/``; None: the runs' own, then the user's cache.
        check: read a checkpoint's tensors; False shows its card unchecked.

    Raises:
        CardError: nothing there, or no card in it.
        ValueError: a checkpoint that cannot be loaded; runs without a complete result.
    """
    if path.is_file():
        yield FoundCard(_read(path), str(path), "not checked: a card alone has no tensors")
    elif (path / "config.json").is_file():
        yield _of_checkpoint(path, check=check)
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
    if stored is not None and not check:
        return FoundCard(stored, str(file), "not checked")
    made = _from_tensors(folder, stored)
    if stored is None:
        return FoundCard(made, str(folder), f"made from the tensors: the folder has no {CARD_FILE}")
    problems = tuple(f"{file}: {problem}" for problem in differences(stored, made))
    n = len(stored.modules)
    checked = "does NOT fit the tensors" if problems else f"checked: weights hash and {n} modules fit the tensors"
    return FoundCard(stored, str(file), checked, problems)


def _from_tensors(folder: Path, stored: QuantCard | None) -> QuantCard:
    """A card of a checkpoint as it is loaded here, packed."""
    import torch

    from bitquake.model_wrappers.arguments import as_dtype
    from bitquake.model_wrappers.loading import load_quantized, without_progress_bars
    from bitquake.model_wrappers.quant_cards import build_card
    from bitquake.model_wrappers.quantizers import load_spec
    from bitquake.quant_card import Calibration

    with without_progress_bars():
        loaded = load_quantized(
            str(folder), load_spec("none"), revision=None, dtype=as_dtype(stored.dtype if stored else _dtype(folder)),
            device=torch.device("cpu"), device_map=None, attn_implementation=None, trust_remote_code=False,
            execution="packed",
        )  # fmt: skip
    return build_card(
        loaded.model, loaded.spec, pretrained=loaded.base or str(folder), revision=loaded.base_revision,
        before=loaded.before or {}, calibration=Calibration(**loaded.calibration) if loaded.calibration else None,
        checkpoint_format=loaded.checkpoint_format,
    )  # fmt: skip


def _dtype(folder: Path) -> str:
    from transformers import AutoConfig

    return str(getattr(AutoConfig.from_pretrained(folder), "dtype", None) or "bfloat16")


def differences(stored: QuantCard, made: QuantCard) -> list[str]:
    """What a stored card says that the tensors do not."""
    found = []
    theirs = {entry.name: entry for entry in made.modules}
    ours = {entry.name: entry for entry in stored.modules}
    if absent := sorted(ours.keys() - theirs.keys()):
        found.append(f"{len(absent)} modules that it calls quantized are not (first {absent[0]})")
    if more := sorted(theirs.keys() - ours.keys()):
        found.append(f"{len(more)} quantized modules are not in it (first {more[0]})")
    for name in sorted(ours.keys() & theirs.keys()):
        fields = [
            key for key in ("bits", "group_size", "symmetric", "packed_bytes", "hash_before", "hash_after")
            if getattr(ours[name], key) != getattr(theirs[name], key)
        ]  # fmt: skip
        if fields:
            told = "; ".join(f"{key} {getattr(ours[name], key)}, not {getattr(theirs[name], key)}" for key in fields)
            found.append(f"{name}: the card says {told}")
    if stored.weights_hash != made.weights_hash and not found:
        found.append("the weights that are not quantized are others than those that the card was made from")
    return found


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
        ("bits/weight", f"{card.nominal_bpw:.3f} nominal, {card.effective_bpw:.3f} with scales and zero-points"),
        ("execution", card.execution),
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
