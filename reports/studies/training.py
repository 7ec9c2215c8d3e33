"""The training studies: quantization-aware training and adapters against quantizing afterwards.

Every arm is compared with the public base and with its own full-precision twin, trained the same way: what training
adds is not what quantization costs (the fair control of GRACE, arXiv 2601.22709).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitquake.metrics import METRICS, Figure
from bitquake.reports.problems import Problem
from bitquake.reports.studies.arms import SWITCHES, Arm, Bench, benches
from bitquake.reports.studies.effects import EffectRow, effect_table
from bitquake.reports.studies.joint import STUDY_METRICS, corrected, corrected_by_key, judged
from bitquake.reports.studies.naming import listing, precision
from bitquake.reports.studies.page import (
    Compared,
    Finding,
    Shown,
    StudyPage,
    StudyRow,
    StudySection,
    StudyTable,
    difference,
    metric_column,
    missing,
    tell,
    value,
    value_and_change,
    words,
)
from bitquake.reports.studies.recipes import curve_section, recipe_section
from bitquake.reports.studies.study import Study
from bitquake.reports.tables import Column

_FULL_BITS = 16
_Judged = dict[tuple[str, str], tuple[Figure, float]]
"""(key of a row, metric) -> a difference, and its p-value corrected for all those of its table."""


def training_page(study: Study, problems: list[Problem], *, replicates: int, seed: int) -> StudyPage:
    """Is it worth training with the quantizer, and does what it gains know when it is wrong?"""
    found = benches(study, problems, STUDY_METRICS, replicates=replicates, seed=seed)
    findings: list[Finding] = []
    sections: list[StudySection] = []
    for at, bench in enumerate(found):
        prefix = f"g{at}-" if len(found) > 1 else ""
        about = f"{bench.base.cells[0].plan.model}: " if len(found) > 1 else ""
        told, beaten = _against_ptq(bench, prefix, about)
        findings += [*told, *_twins(bench, about)]
        sections.append(_rows(bench, prefix, about))
        sections += [beaten] if beaten else []
        told, adapter = _same_base(bench, prefix, about)
        findings += told
        more = (_noise(bench, prefix, about), adapter, _ablation(bench, prefix, about))
        sections += [section for section in more if section]
    if not found:
        text = "The public base at full precision has no result yet, so nothing can be compared with it."
        findings.append(Finding(text, "open"))
    if recipe := recipe_section(study):
        sections.append(recipe)
    if curves := curve_section(study, problems):
        sections.append(curves)
    return StudyPage(findings, sections, cautions=_seed_cautions(found))


def _seed_cautions(found: Sequence[Bench]) -> list[str]:
    """What the intervals of trained models leave out."""
    arms = [arm for bench in found for arm in bench.arms]
    cautions = []
    if any(arm.kind != "ptq" and len(arm.cells) == 1 for arm in arms):
        cautions.append(
            "Verdicts on what was trained with one seed are of these trained models; another seed trains another model."
        )
    if any(len(arm.cells) > 1 for arm in arms):
        cautions.append(
            "A mean over seeds: its interval holds the sampling of images, with the models of these seeds held fixed; "
            "the spread between seeds is not in it."
        )
    return cautions


def _widths(bench: Bench) -> list[int]:
    return [_FULL_BITS, *bench.widths]


def _rows(bench: Bench, prefix: str, about: str) -> StudySection:
    tables = []
    for condition in bench.conditions:
        tables.append(_base_table(bench, condition))
        if any(arm.twin and bench.twin(arm) is not bench.base for arm in bench.arms):
            tables.append(_twin_table(bench, condition))
    notes = ["C@5%: share of the questions that can be answered while at most 5 % are wrong."]
    text = (
        "Against the public base a row shows what a user gets; against its own full-precision twin, trained the same "
        "way, what quantization costs."
    )
    return StudySection(f"{prefix}rows", f"{about}quantized afterwards, or trained for it", [text], tables, notes=notes)


def _judged(differences: Mapping[tuple[str, str], Figure | None]) -> _Judged:
    return judged({key: found for key, found in differences.items() if found is not None})


def _base_changes(bench: Bench, condition: str) -> _Judged:
    pairs = [(arm, metric) for arm in bench.arms for metric in STUDY_METRICS]
    return _judged({(arm.key, metric): bench.less(arm, bench.base, condition, metric) for arm, metric in pairs})


def _twin_changes(bench: Bench, condition: str) -> _Judged:
    pairs = [(arm, metric) for arm in bench.arms if arm.bits in bench.widths for metric in STUDY_METRICS]
    return _judged({(arm.key, metric): bench.less(arm, bench.twin(arm), condition, metric) for arm, metric in pairs})


def _base_table(bench: Bench, condition: str) -> StudyTable:
    changes = _base_changes(bench, condition)
    rows: list[StudyRow] = []
    for bits in _widths(bench):
        rows.append(StudyRow(precision(bits).capitalize() if bits == _FULL_BITS else precision(bits), group=True))
        for arm in [*([bench.base] if bits == _FULL_BITS else []), *(a for a in bench.arms if a.bits == bits)]:
            cells: list[Shown] = []
            for metric in STUDY_METRICS:
                own = bench.value(arm, condition, metric)
                if own is None:
                    cells.append(missing())
                elif (arm.key, metric) in changes:
                    change, p = changes[arm.key, metric]
                    cells.append(value_and_change(own, change, METRICS[metric], adjusted=p))
                else:
                    cells.append(value(own, METRICS[metric].unit))
            rows.append(StudyRow(arm.title, cells, arm.note, twin=arm is bench.base))
    return StudyTable(
        f"{condition}: against the public base",
        f"{_sizes(bench, condition)}. Value; below it the change against the public base at full precision.",
        [metric_column(metric) for metric in STUDY_METRICS],
        rows,
        "Method",
    )


def _sizes(bench: Bench, condition: str) -> str:
    tasks = bench.conditions[condition]
    cell = bench.base.cells[0]
    sizes = sorted({len(cell.tasks[task].answers) for task in tasks})
    n = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"{tasks[0]}, n = {n}" if len(tasks) == 1 else f"mean over {len(tasks)} noisy tasks, n = {n} each"


def _twin_table(bench: Bench, condition: str) -> StudyTable:
    rows: list[EffectRow] = []
    for bits in bench.widths:
        own = [arm for arm in bench.arms if arm.bits == bits]
        if not own:
            continue
        rows.append(EffectRow(precision(bits), group=True))
        for arm in own:
            twin = bench.twin(arm)
            figures = [bench.less(arm, twin, condition, metric) for metric in STUDY_METRICS]
            rows.append(EffectRow(arm.title, figures, f"twin: {twin.title}" if twin else "no twin"))
    return effect_table(
        f"{condition}: against its own full-precision twin",
        "What quantization costs each row: its twin was trained the same way at full precision.",
        STUDY_METRICS,
        rows,
        head="Method",
    )


def _ptq(bench: Bench, bits: int) -> list[Arm]:
    return [arm for arm in bench.arms if arm.kind == "ptq" and arm.bits == bits]


def _against_ptq(bench: Bench, prefix: str, about: str) -> tuple[list[Finding], StudySection | None]:
    """Each trained arm less the best quantization afterwards at its width, and less each of them."""
    wanted = [(bits, arm) for bits in bench.widths for arm in bench.arms if arm.bits == bits and arm.kind == "trained"]
    wanted = [(bits, arm) for bits, arm in wanted if _ptq(bench, bits)]
    if not wanted:
        return [], None
    tables = []
    standing: dict[tuple[str, str], tuple[Figure, float, Arm]] = {}
    for condition in bench.conditions:
        for metric in STUDY_METRICS:
            best = {
                arm.key: found
                for bits, arm in wanted
                if (found := bench.less_best(arm, _ptq(bench, bits), condition, metric)) is not None
            }
            if not best:
                continue
            each = {
                (arm.key, other.key): less
                for bits, arm in wanted
                for other in _ptq(bench, bits)
                if (less := bench.less(arm, other, condition, metric)) is not None
            }
            p = corrected([*(found for found, _ in best.values()), *each.values()])
            p_best, p_each = dict(zip(best, p, strict=False)), dict(zip(each, p[len(best) :], strict=True))
            if metric == "accuracy":
                standing |= {(condition, key): (best[key][0], p_best[key], best[key][1]) for key in best}
            tables.append(_ptq_table(bench, condition, metric, wanted, best, p_best, each, p_each))
    findings = [_beaten(bench, bits, arm, standing, about) for bits, arm in wanted if _headline(bench, arm)]
    text = (
        "The best quantization afterwards is chosen on these very samples. Its interval holds both: that choice held "
        "fixed, and made anew in each replicate, so that no verdict owes anything to it."
    )
    title = f"{about}does training beat the best quantization afterwards?"
    return findings, StudySection(f"{prefix}ptq", title, [text], tables)


def _headline(bench: Bench, arm: Arm) -> bool:
    """GRACE where the study has it, else every trained arm."""
    whole = [one for one in bench.arms if one.kind == "trained" and _all_on(one)]
    return _all_on(arm) if whole else True


def _all_on(arm: Arm) -> bool:
    training = arm.cells[0].plan.training or {}
    return all(training.get(name) for name in SWITCHES)


def _ptq_table(
    bench: Bench,
    condition: str,
    metric: str,
    wanted: Sequence[tuple[int, Arm]],
    best: Mapping[str, tuple[Figure, Arm]],
    p_best: Mapping[str, float],
    each: Mapping[tuple[str, str], Figure],
    p_each: Mapping[tuple[str, str], float],
) -> StudyTable:
    methods = list(dict.fromkeys(_method(other) for bits, _ in wanted for other in _ptq(bench, bits)))
    rows: list[StudyRow] = []
    for bits in dict.fromkeys(bits for bits, _ in wanted):
        rows.append(StudyRow(precision(bits), group=True))
        for width, arm in wanted:
            if width != bits:
                continue
            cells = [missing(), words("–")]
            if arm.key in best:
                found, which = best[arm.key]
                cells = [difference(found, METRICS[metric], power=True, adjusted=p_best[arm.key]), words(which.title)]
            for method in methods:
                others = [other for other in _ptq(bench, bits) if _method(other) == method]
                pair = (arm.key, others[0].key) if others else ("", "")
                shown = pair in each
                cells.append(
                    difference(each[pair], METRICS[metric], power=True, adjusted=p_each[pair]) if shown else missing()
                )
            rows.append(StudyRow(arm.title, cells, arm.note))
    columns = [
        metric_column(metric, "less the best", change=True),
        Column("which is", text=True),
        *(metric_column(metric, f"less {method}", change=True) for method in methods),
    ]
    return StudyTable(
        f"{condition}, {METRICS[metric].title}: trained less quantized afterwards",
        "",
        columns,
        rows,
        "Trained",
        folded=metric != "accuracy",
    )


def _method(arm: Arm) -> str:
    """A quantizer without its width: ``mbq``, and with a calibration source of its own where the suite varies it."""
    spec = arm.cells[0].plan.spec
    source = arm.title.partition(", calibrated on ")[2]
    return f"{spec.get('method', arm.title)}{f' ({source})' if source else ''}"


def _beaten(
    bench: Bench,
    bits: int,
    arm: Arm,
    standing: Mapping[tuple[str, str], tuple[Figure, float, Arm]],
    about: str,
) -> Finding:
    found = {c: standing[c, arm.key] for c in bench.conditions if (c, arm.key) in standing}
    told = tell(Compared(c, less, p, note=f"the best is {which.title}") for c, (less, p, which) in found.items())
    says = {
        "better": "beats the best quantization afterwards",
        "worse": "loses against the best quantization afterwards",
        "tied": "is tied with the best quantization afterwards",
        "changed": "against the best quantization afterwards: better on some, worse or tied on others",
        "open": "cannot be compared with quantization afterwards yet",
    }[told.verdict]
    if told.in_part and told.verdict in ("worse", "better"):
        says += f" on some ({listing(told.in_part)}), and is tied on the rest"
    text = f"{about}{arm.title} at {precision(bits)} {says}."
    return Finding(text, told.verdict, f"Accuracy: {told.text or 'no result'}.")


def _twins(bench: Bench, about: str) -> list[Finding]:
    """What quantization costs trained arms against their own twins, and what training alone gives."""
    against_base = {condition: _base_changes(bench, condition) for condition in bench.conditions}
    against_twin = {condition: _twin_changes(bench, condition) for condition in bench.conditions}
    findings = []
    for arm in bench.arms:
        twin = bench.twin(arm)
        if arm.kind != "trained" or not _headline(bench, arm):
            continue
        low = arm.bits < _FULL_BITS
        other, changes = (twin, against_twin) if low else (bench.base, against_base)
        if other is None or other is arm:
            continue
        found = {c: changes[c][arm.key, "accuracy"] for c in bench.conditions if (arm.key, "accuracy") in changes[c]}
        told = tell(Compared(condition, change, p) for condition, (change, p) in found.items())
        if not told.effects:
            continue
        what = (
            f"{arm.title} at {precision(arm.bits)} against its own full-precision twin"
            if low
            else f"{arm.title} at full precision against the public base (what training alone gives)"
        )
        findings.append(Finding(f"{about}{what}, accuracy: {told.text}.", told.verdict))
    return findings


def _noise(bench: Bench, prefix: str, about: str) -> StudySection | None:
    """Does noise cost the quantized arms more than their twins?"""
    tables = []
    for condition in bench.clean:
        rows: list[EffectRow] = []
        for bits in bench.widths:
            own = [arm for arm in bench.arms if arm.bits == bits and bench.twin(arm) is not None]
            if not own:
                continue
            rows.append(EffectRow(precision(bits), group=True))
            for arm in own:
                twin = bench.twin(arm)
                figures = [bench.effect(arm, twin, condition, metric) for metric in STUDY_METRICS]
                rows.append(EffectRow(arm.title, figures, f"twin: {twin.title}" if twin else ""))
        if rows:
            caption = "The change against its own full-precision twin in noise, less the same change on clean images."
            tables.append(effect_table(f"{condition}: difference in differences", caption, STUDY_METRICS, rows))
    if not tables:
        return None
    return StudySection(f"{prefix}noise", f"{about}does noise cost the quantized ones more?", [], tables)


def _same_base(bench: Bench, prefix: str, about: str) -> tuple[list[Finding], StudySection | None]:
    """Adapters trained on a quantized base, less the full-precision adapter put on the same base afterwards."""
    pairs = []
    for arm in bench.arms:
        quant = (arm.cells[0].plan.training or {}).get("quant")
        name = quant.get("name") if isinstance(quant, dict) else quant
        if arm.kind != "trained" or not name or name == "full-precision":
            continue
        others = [one for one in bench.arms if one.kind == "trained-ptq" and one.cells[0].plan.quantization == name]
        plain = [one for one in bench.arms if one.kind == "ptq" and one.cells[0].plan.quantization == name]
        pairs += [(arm, other) for other in [*others, *plain]]
    if not pairs:
        return [], None
    tables = []
    for condition in bench.conditions:
        rows = [
            EffectRow(arm.title, [bench.less(arm, other, condition, m) for m in STUDY_METRICS], f"less {other.title}")
            for arm, other in pairs
        ]
        caption = "Both on the same quantized weights."
        tables.append(effect_table(condition, caption, STUDY_METRICS, rows, head="Trained"))
    title = f"{about}is an adapter better trained on the quantized base?"
    return _adapter_findings(bench, pairs, about), StudySection(f"{prefix}adapter", title, [], tables)


def _adapter_findings(bench: Bench, pairs: Sequence[tuple[Arm, Arm]], about: str) -> list[Finding]:
    """Trained on the quantized base against put on it afterwards, in accuracy."""
    judged = {}
    for condition in bench.conditions:
        wanted = [(arm, other, metric) for arm, other in pairs for metric in STUDY_METRICS]
        judged[condition] = _judged(
            {(f"{arm.key} {other.key}", m): bench.less(arm, other, condition, m) for arm, other, m in wanted}
        )
    findings = []
    for arm, other in pairs:
        if other.kind != "trained-ptq":
            continue
        key = f"{arm.key} {other.key}", "accuracy"
        found = {condition: changes[key] for condition, changes in judged.items() if key in changes}
        told = tell(Compared(condition, change, p) for condition, (change, p) in found.items())
        if told.effects:
            text = f"{about}{arm.title} against {other.title}, accuracy: {told.text}."
            findings.append(Finding(text, told.verdict))
    return findings


def _ablation(bench: Bench, prefix: str, about: str) -> StudySection | None:
    """What each part of the recipe gives: every recipe of a width beside the one with all parts."""
    tables = []
    metrics = ("accuracy", "aurc")
    for bits in _widths(bench):
        own = [arm for arm in bench.arms if arm.bits == bits and arm.kind == "trained" and _switches(arm) is not None]
        whole = next((arm for arm in own if _all_on(arm)), None)
        if whole is None or len(own) < 2:
            continue
        conditions = [c for c in bench.conditions if c not in bench.clean]
        changes = {
            (arm.key, condition, metric): found
            for arm in own
            for condition in conditions
            for metric in metrics
            if arm is not whole and (found := bench.less(arm, whole, condition, metric)) is not None
        }
        adjusted = corrected_by_key(changes)
        rows = []
        for arm in [whole, *(one for one in own if one is not whole)]:
            switches = _switches(arm) or {}
            cells = [words("✓" if switches.get(name) else "–") for name in SWITCHES]
            for condition in conditions:
                for metric in metrics:
                    key = (arm.key, condition, metric)
                    found = bench.value(arm, condition, metric)
                    if found is None:
                        cells.append(missing())
                    elif key in changes:
                        shown = value_and_change(found, changes[key], METRICS[metric], adjusted=adjusted[key])
                        cells.append(shown)
                    else:
                        cells.append(value(found, METRICS[metric].unit))
            rows.append(StudyRow(arm.title, cells, arm.note, twin=arm is whole))
        columns = [Column(name) for name in SWITCHES]
        columns += [metric_column(metric) for _ in conditions for metric in metrics]
        spans = [("parts", len(SWITCHES)), *((condition, len(metrics)) for condition in conditions)]
        caption = "Value; below it the change against the recipe with every part."
        title = f"Parts of the recipe at {precision(bits)}"
        tables.append(StudyTable(title, caption, columns, rows, "Recipe", spans=spans))
    if not tables:
        return None
    return StudySection(f"{prefix}ablation", f"{about}which part does it?", [], tables)


def _switches(arm: Arm) -> dict[str, bool] | None:
    training = arm.cells[0].plan.training or {}
    return {name: bool(training[name]) for name in SWITCHES} if all(name in training for name in SWITCHES) else None
