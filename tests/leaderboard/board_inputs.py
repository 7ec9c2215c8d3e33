"""Boards of any size with figures from a seed, as the numbers of real submissions would stand in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitquake.leaderboard.board_file import BoardEntry, SubmissionEntry, TaskEntry
from bitquake.leaderboard.numbers import empty_report, settings_of
from bitquake.metrics import METRICS
from bitquake.reports.schema import (
    BinEntry,
    CardEntry,
    CellEntry,
    ConfidenceEntry,
    CurvePoint,
    DifferenceEntry,
    FlipBin,
    FlipEntry,
    InteractionEntry,
    RobustnessEntry,
    RunEntry,
    SummaryEntry,
    TransferEntry,
    ValueEntry,
)

METHODS = ("rtn", "hqq", "gptq", "awq", "mbq", "smoothquant", "uniform", "bnb")
BITS = (8, 4, 3, 2)
TASKS = (
    ("clean", "", 0),
    *((f"{noise}_{severity}", noise, severity) for noise in ("gaussian_noise", "frost") for severity in (1, 3, 5)),
    ("fog_3", "fog", 3),
)
FAMILY = "block_vqav2"
SHIFT = "block_advqa"


def card(method: str, bits: int, texts: dict[str, str] | None = None) -> CardEntry:
    """A quant card; texts: other values of text fields."""
    full = method == "none"
    fields: dict[str, Any] = {
        "pretrained": "bitquake/block-idefics3",
        "base": "",
        "adapter": "",
        "adapter_hash": "",
        "checkpoint_format": "",
        "image_processor": "Idefics3ImageProcessor",
        "revision": "",
        "architecture": "Idefics3ForConditionalGeneration",
        "dtype": "BF16",
        "spec_name": "full-precision" if full else f"{method}-int{bits}-g64",
        "spec": {} if full else {"bits": str(bits), "group_size": "64"},
        "method": method,
        "execution": "full-precision" if full else "simulated" if bits == 3 else "packed",
        "kernel": "torch",
        "device": "cpu",
        "nominal_bpw": float(bits),
        "effective_bpw": bits + (0 if full else 0.5),
        "bits": str(bits),
        "group_size": "" if full else "64",
        "n_quantized_modules": 0,
        "n_changed_modules": 0,
        "n_kept_modules": 1,
        "quantized_share": 0.0 if full else 0.8,
        "components": {"language": {"n_parameters": 100, "n_quantized": 0, "n_bytes": 200, "packed_bytes": 200}},
        "n_bytes": None if bits == 3 else 1_000_000 * bits,
        "places": [],
        "modules": [],
        "kept": {"lm_head": "bfloat16"},
        "calibration_source": "none",
        "calibration_data": "",
        "calibration_samples": 0,
        "calibration_hash": "",
        "weights_hash": "ab" * 16,
        "libraries": {"torch": "2.15.0"},
    }
    return CardEntry.model_validate({**fields, **(texts or {})})


class Figures:
    """Numbers with intervals; about a third of the differences are ties."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def difference(self, scale: float = 0.03) -> DifferenceEntry:
        delta = float(self.random.normal(0, scale))
        half = float(abs(self.random.normal(scale, scale / 3)) + 1e-4)
        lo, hi = delta - half, delta + half
        verdict = "higher" if lo > 0 else "lower" if hi < 0 else "tied"
        effect = "tied" if verdict == "tied" else "worse" if delta < 0 else "better"
        found = {"delta": delta, "lo": lo, "hi": hi, "verdict": verdict, "effect": effect}
        return DifferenceEntry.model_validate(found)

    def value(self, *, paired: bool, caution: str = "") -> ValueEntry:
        value, half = (float(x) for x in (self.random.uniform(0.2, 0.8), self.random.uniform(0.005, 0.04)))
        difference = self.difference() if paired else None
        return ValueEntry(value=value, lo=value - half, hi=value + half, caution=caution, difference=difference)

    def cell(self, run: str, family: str, variant: str, noise: str, severity: int, *, paired: bool) -> CellEntry:
        shift = family == SHIFT
        curve = [CurvePoint(coverage=c / 20, risk=0.4 * c / 20, threshold=1 - c / 20) for c in range(1, 21)]
        bins = [
            BinEntry(lower=b / 5, upper=(b + 1) / 5, count=40 + b, confidence=b / 5 + 0.1, score=b / 5, lo=0.0, hi=1.0)
            for b in range(5)
        ]
        fields: dict[str, Any] = {
            "run": run,
            "world": "block",
            "family": family,
            "variant": variant,
            "task": f"{family}_{variant}",
            "kind": "noise" if noise else "shift" if shift else "clean",
            "noise": noise,
            "noise_group": "imagenet_c" if noise else "",
            "severity": severity,
            "dataset": f"{family}.parquet",
            "split": "test",
            "shift_from": f"{FAMILY}_clean" if shift else "",
            "threshold_task": f"{FAMILY}_threshold",
            "protocol": "vqa",
            "headline": "Accuracy",
            "headline_unit": "percent",
            "pairing": "paired" if paired else "twin",
            "n": 1000,
            "n_clusters": 333,
            "n_missing_confidence": 2,
            "confidence_name": "joint",
            "failures": {"image": 1} if noise == "fog" else {},
            "failure_details": {},
            "parse_failures": 3,
            "truncated": 0,
            "metrics": {
                key: self.value(paired=paired, caution="too few samples" if key == "coverage_at_risk_1" else "")
                for key in METRICS
            },
            "scores": {},
            "parse_failure_rate": self.value(paired=paired),
            "chance_ece": 0.02,
            "curve": curve,
            "bins": bins,
            "source": run,
        }
        if not noise:
            keys = ("ece_15", "aurc", "coverage_at_risk_1", "coverage_at_risk_5", "auroc", "brier", "phi_10")
            fields["confidences"] = [
                ConfidenceEntry(
                    name="selector",
                    n_missing=0,
                    metrics={key: self.value(paired=paired) for key in keys},
                    beside={key: self.difference() for key in keys},
                )
            ]
        if paired:
            level = FlipBin(lower=0, upper=1, n=100, rate=0.2, lo=0.1, hi=0.3, right_to_wrong=10, wrong_to_right=5)
            fields["flips"] = FlipEntry(
                n=1000,
                right_to_wrong=60,
                wrong_to_right=40,
                rate=0.1,
                lo=0.08,
                hi=0.12,
                p_value=0.06,
                p_adjusted=0.09,
                n_tests=12,
                odds_ratio=0.67,
                effect="tied",
                by_confidence=[level, level],
            )
        return CellEntry.model_validate(fields)


def board(n_rows: int, seed: int = 0, *, texts: dict[str, str] | None = None, n_tasks: int = len(TASKS)) -> BoardEntry:
    """A board of ``n_rows`` submissions, models of nine each with their full precision; texts: for free text fields."""
    figures = Figures(seed)
    free = texts or {}
    settings = settings_of(2000, 0)
    report = empty_report(settings, "a board")
    submissions = []
    n_models = -(-n_rows // 9)
    for row in range(n_rows):
        model, place = row % n_models, row // n_models
        method = "none" if place == 0 else METHODS[(place + model) % len(METHODS)]
        bits = 16 if place == 0 else BITS[place % len(BITS)]
        twin = f"org__model-{model}__bf16"
        name = twin if place == 0 else f"org{place % 3}__model-{model}__{method}-int{bits}-{place}"
        organisation, label, quantization = name.split("__")
        submissions.append(
            SubmissionEntry(
                name=name,
                organisation=organisation,
                model=label,
                quantization=quantization,
                twin="" if place == 0 else twin,
                level="reproduced" if place == 1 else "recomputed",
                link=free.get("link", "https://example.org/model"),
                contact=free.get("contact", "somebody"),
                versions={"torch": free.get("version", "2.15.0")},
                files={"records.jsonl.zst": f"{row:064x}"},
            )
        )
        report.runs.append(
            RunEntry(
                id=name,
                name=free.get("name", f"{label} {quantization}"),
                label=free.get("label", label),
                quantization=free.get("quantization", quantization),
                role="full-precision" if place == 0 else "quantized",
                twin=None if place == 0 else twin,
                refused="",
                model_hash="cd" * 16,
                card_hash="ef" * 16,
                card=card(method, bits, {key: free[key] for key in ("kernel", "device") if key in free}),
                commands=[free.get("command", "lmms-eval --model bitquake_hf --tasks block_vqav2_clean")],
            )
        )
        paired = place > 0
        for variant, noise, severity in TASKS[:n_tasks]:
            report.cells.append(figures.cell(name, FAMILY, variant, noise, severity, paired=paired))
        report.cells.append(figures.cell(name, SHIFT, "clean", "", 0, paired=paired))
        report.transfers += [_transfer(figures, name, task, risk) for task in _tasks(n_tasks) for risk in (0.01, 0.05)]
        if paired:
            report.summaries.append(_summary(figures, name, n_tasks))
            report.interactions += _interactions(figures, name)
            report.robustness += [_robustness(figures, name, noise) for noise in ("", "frost")]
    tasks = [TaskEntry(task=task, n=1000, gold="0" * 64) for task in [*_tasks(n_tasks), f"{FAMILY}_threshold"]]
    return BoardEntry(
        board="synthetic",
        title=free.get("title", "A board"),
        world="block",
        about=free.get("about", "Figures from a seed."),
        tasks=tasks,
        submissions=submissions,
        report=report,
    )


def _tasks(n_tasks: int) -> list[str]:
    return [*(f"{FAMILY}_{variant}" for variant, _, _ in TASKS[:n_tasks]), f"{SHIFT}_clean"]


def _transfer(figures: Figures, run: str, task: str, risk: float) -> TransferEntry:
    value = figures.value(paired=False)
    return TransferEntry(
        run=run,
        task=task,
        threshold_task=f"{FAMILY}_threshold",
        confidence="joint",
        risk_target=risk,
        threshold=0.9,
        n=1000,
        n_answered=500,
        risk=value,
        coverage=value,
        verdict="broken" if risk < 0.02 else "open",
    )


def _summary(figures: Figures, run: str, n_tasks: int) -> SummaryEntry:
    differences = {key: figures.difference() for key in ("accuracy", "aurc", "ece_15")}
    low = int(figures.random.integers(1, 5))
    return SummaryEntry(
        run=run,
        world="block",
        family=FAMILY,
        n_conditions=n_tasks,
        differences=differences,
        rank_lo=low,
        rank_hi=low + int(figures.random.integers(0, 3)),
    )


def _interactions(figures: Figures, run: str) -> list[InteractionEntry]:
    keys = ("accuracy", "aurc", "ece_15", "coverage_at_risk_1")
    found = []
    for family, kind, task in ((FAMILY, "noise", ""), (SHIFT, "shift", f"{SHIFT}_clean")):
        differences = {key: figures.difference() for key in keys}
        fields = {"run": run, "world": "block", "family": family, "task": task, "kind": kind, "shared": kind == "noise"}
        found.append(InteractionEntry.model_validate({**fields, "differences": differences}))
    return found


def _robustness(figures: Figures, run: str, noise: str) -> RobustnessEntry:
    value = figures.value(paired=False)
    return RobustnessEntry(
        run=run,
        world="block",
        family=FAMILY,
        noise=noise,
        severities=[1, 3, 5],
        relative=value,
        quantization_error=value,
    )
