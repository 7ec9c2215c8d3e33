"""Whether a quant card's figures fit one another: what a forged or edited card gets wrong.

A card comes without its tensors, so nothing here proves that a model was quantized. But what a board shows of it (bits
per weight, bytes, packed or simulated) follows from its list of modules, and is computed again from there.
"""

from __future__ import annotations

import math
from collections import Counter

from bitquake.leaderboard.findings import Finding
from bitquake.quant_card import CARD_VERSION, ModuleEntry, QuantCard

_FULL_BITS = 16
_PARAMETER_BYTES = 8
"""Scale and zero point of a group take at most this (two float32)."""
_ROW_BYTES = 8
"""Input scale, column order and a library's statistics: at most this for each row and each column."""
_HEADER_BYTES = 1024
_PADDING = 1.25
"""Kernels pad a weight to their tiles."""
_FIX = "submit the card that the run made"


def check_card(card: QuantCard, where: str) -> list[Finding]:
    """Findings for each figure that contradicts another one of the same card."""
    if card.self_declared or card.execution == "unknown":
        what = "a card that somebody declared (`bitquake records import`): nothing in it was read from tensors"
        return [Finding("card-declared", where, what, fix="run the model through lmms-eval with bitquake_hf")]
    found = [*_totals(card, where), *_execution(card, where)]
    for module in card.modules:
        found += _module(module, f"{where}: modules {module.name}")
    return found


def _finding(code: str, where: str, what: str, got: object = "") -> Finding:
    return Finding(code, where, what, str(got), _FIX)


def _totals(card: QuantCard, where: str) -> list[Finding]:
    found = []
    if card.version != CARD_VERSION:
        found.append(_finding("card-version", where, f"a card of version {CARD_VERSION} is expected", card.version))
    twice = sorted(name for name, n in Counter(module.name for module in card.modules).items() if n > 1)
    if twice:
        found.append(_finding("card-modules", f"{where}: modules", "a module stands there twice", twice[0][:80]))
    if both := sorted({module.name for module in card.modules} & card.kept.keys()):
        found.append(_finding("card-modules", f"{where}: kept", "a module is both quantized and kept", both[0][:80]))
    of_component: dict[str, list[ModuleEntry]] = {}
    for module in card.modules:
        of_component.setdefault(module.component, []).append(module)
    for name, entry in card.components.items():
        modules = of_component.get(name, [])
        place = f"{where}: components.{name[:40]}"
        if min(entry.n_parameters, entry.n_quantized, entry.n_bytes, entry.packed_bytes) < 0:
            found.append(_finding("card-components", place, "a count is negative"))
        n, packed = sum(m.n_weights for m in modules), sum(m.packed_bytes for m in modules)
        if entry.n_quantized != n or entry.n_parameters < n:
            what = f"its modules hold {n:,} quantized weights"
            found.append(_finding("card-components", place, what, f"{entry.n_quantized:,} of {entry.n_parameters:,}"))
        rest = entry.packed_bytes - packed
        if rest < entry.n_parameters - n:  # what is not quantized takes a byte or more for each weight
            what = f"{entry.n_parameters - n:,} weights are not quantized, and {packed:,} bytes are the quantized ones'"
            found.append(_finding("card-bytes", place, what, f"packed_bytes {entry.packed_bytes:,}"))
        if entry.n_bytes - sum(m.n_bytes for m in modules) != rest:
            what = "what is not quantized takes the same bytes packed and in memory"
            found.append(
                _finding("card-bytes", place, what, f"n_bytes {entry.n_bytes:,}, packed {entry.packed_bytes:,}")
            )
    if unknown := sorted(of_component.keys() - card.components.keys()):
        found.append(_finding("card-components", where, "modules of a component that is not listed", unknown[0][:40]))
    n_parameters = sum(entry.n_parameters for entry in card.components.values())
    if n_parameters <= 0:
        return [*found, _finding("card-components", where, "the model has no weights")]
    packed = sum(entry.packed_bytes for entry in card.components.values())
    kept = 8 * (packed - sum(module.packed_bytes for module in card.modules))
    nominal = sum(module.bits * module.n_weights for module in card.modules) + kept
    for field, value in (("effective_bpw", 8 * packed / n_parameters), ("nominal_bpw", nominal / n_parameters)):
        said = getattr(card, field)
        if not math.isclose(said, value, rel_tol=1e-9):
            found.append(_finding("card-bits", f"{where}: {field}", f"its modules give {value:.4f} bits", said))
    return found


def _execution(card: QuantCard, where: str) -> list[Finding]:
    full, place = card.method == "none", f"{where}: execution"
    if full != (card.execution == "full-precision") or full != (not card.modules):
        what = f"method {card.method[:40]} with {len(card.modules)} quantized modules"
        return [_finding("card-execution", place, what, card.execution)]
    if card.execution != "packed":
        return []
    weights = sum(module.n_weights for module in card.modules)
    held, full_bytes = sum(module.n_bytes for module in card.modules), weights * _FULL_BITS // 8
    if held < 0.75 * full_bytes:
        return []
    what = f"its {weights:,} quantized weights are held in {held:,} bytes, and {full_bytes:,} would be 16 bits each"
    return [_finding("card-packed", place, what, "packed")]


def _module(module: ModuleEntry, where: str) -> list[Finding]:
    rows, columns = module.shape
    where = where[:240]
    if min(rows, columns, module.n_weights, module.group_size) < 1 or not 1 <= module.bits <= 8:
        what = "shape, weights, group size and bits (1 to 8) must be positive"
        return [_finding("card-module", where, what, f"{module.shape}, {module.n_weights}, {module.bits} bits")]
    if module.n_weights != rows * columns:
        return [
            _finding(
                "card-module", where, f"a {rows}x{columns} matrix has {rows * columns:,} weights", module.n_weights
            )
        ]
    if not module.hash_after:
        return [_finding("card-module", where, "the hash of its weight is missing")]
    least = module.bits * module.n_weights // 8
    groups = 1 if module.per_tensor else rows * -(-columns // module.group_size)
    most = _PADDING * (_container(module.bits) * module.n_weights / 8 + _PARAMETER_BYTES * groups)
    most += _ROW_BYTES * (rows + columns) + _HEADER_BYTES
    dense = module.format == "dense on a grid"  # labelled so: weights on a grid, kept at full precision
    if module.packed_bytes < least or (module.packed_bytes > most and not dense):
        said = f"packed_bytes {module.packed_bytes:,}"
        codes = f"{module.n_weights:,} weights of {module.bits} bits in groups of {module.group_size}"
        return [_finding("card-bytes", where, f"{codes} take {least:,} to {most:,.0f} bytes", said)]
    return []


def _container(bits: int) -> int:
    """Bits that a code may take in memory: kernels keep 3 bits in 4, and 5 to 7 in 8."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8
