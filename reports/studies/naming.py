"""How cells and conditions are called on a study page, and the order in which they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from bitquake.reports.formatting import condition_name
from bitquake.reports.pairing import short_dtype
from bitquake.reports.runs import Cell
from bitquake.reports.studies.study import Study, StudyCell


def cell_titles(study: Study) -> dict[str, str]:
    """Cell name -> a name that is short and still unique: without the parts that all cells share."""
    models = {cell.plan.model for cell in study.cells}
    seeds = {cell.plan.seed for cell in study.cells}
    sources = calibration_sources(study.cells)
    titles = {}
    for cell in study.cells:
        parts = [cell.plan.model] if len(models) > 1 else []
        parts += [quantization_title(cell)]
        parts += [calibration_title(cell)] if cell.plan.calibration and len(sources) > 1 else []
        if len(seeds) > 1:
            parts.append(f"seed {cell.plan.seed}")
        titles[cell.name] = " · ".join(parts)
    if len(set(titles.values())) < len(titles):
        return {cell.name: cell.name for cell in study.cells}
    return titles


def quantization_title(cell: StudyCell) -> str:
    """``rtn-int4-g64``; full precision by its dtype, where the card tells."""
    if is_full_precision(cell) and cell.card is not None and cell.card.dtype:
        return f"full precision ({short_dtype(cell.card.dtype)})"
    return cell.plan.quantization.replace("full-precision", "full precision")


def calibration_title(cell: StudyCell) -> str:
    return "" if not cell.plan.calibration else f"calibrated on {cell.plan.calibration}"


def calibration_sources(cells: Iterable[StudyCell]) -> list[str]:
    """Of the cells that are calibrated. A single one goes without saying in names: the page tells it once."""
    return sorted({cell.plan.calibration for cell in cells if cell.plan.calibration})


def is_full_precision(cell: StudyCell) -> bool:
    """Nothing of it is quantized (a trained model may be its own full-precision control)."""
    return bits_of(cell) == 16


def bits_of(cell: StudyCell) -> int:
    """Bits of the quantized weights as planned: of the spec, of the training, or told by a name; 16 for none."""
    plan = cell.plan
    if plan.spec or plan.training is None:
        return _told_bits(plan.quantization, plan.spec, plan.factors)
    told = plan.training.get("quant")
    return _told_bits(str(told or ""), plan.training, told if isinstance(told, dict) else {})


def _told_bits(name: str, *told: Mapping[str, object]) -> int:
    for mapping in told:
        bits = mapping.get("bits")
        if isinstance(bits, int) and not isinstance(bits, bool):
            return bits
    match = re.search(r"(?:int|nf|fp|w)(\d{1,2})(?!\d)", name)
    return int(match[1]) if match else 16


def precision(bits: int) -> str:
    """``INT4``; ``full precision``."""
    return "full precision" if bits == 16 else f"INT{bits}"


def method_of(cell: StudyCell) -> str:
    """``rtn``, ``mbq``, …: by the spec, or what its name begins with; "" for full precision."""
    told = cell.plan.factors.get("method") or cell.plan.spec.get("method")
    if told:
        return str(told)
    name = cell.plan.quantization
    return "" if name in ("full-precision", "as-trained") else name.split("-")[0]


def task_title(cell: Cell, home: str = "") -> str:
    """A condition: ``clean``, ``gaussian noise 3``, ``testB``; with its family where that is not the page's."""
    kind = "noise" if cell.noise else "clean" if cell.is_clean else "shift"
    noise = str((cell.noise or {}).get("name", cell.variant))
    name = condition_name(kind, noise, cell.severity, cell.variant, full=cell.is_full)
    if not home or cell.family == home:
        return name
    family = family_title(cell.family)
    return family if name == "clean" else f"{family}, {name}"


def family_title(family: str) -> str:
    """``VQA-v2``, ``RefCOCO+``; of the block world ``block RefCOCO+``."""
    known = {
        "vqav2": "VQA-v2",
        "advqa": "AdVQA",
        "vizwiz": "VizWiz",
        "refcocoplus": "RefCOCO+",
        "scienceqa": "ScienceQA",
        "scienceqa_full": "ScienceQA with text-only questions",
    }
    block = family.startswith("block_")
    name = family.removeprefix("block_")
    return f"{'block ' if block else ''}{known.get(name, name.replace('_', ' '))}"


def listing(items: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    found = list(items)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else "nothing"
