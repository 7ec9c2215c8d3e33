"""Every Eval Ever records: one for each submission, with every metric of every task and its interval.

The schema is that of the EvalEval coalition's package ``every-eval-ever`` 0.3.0; the tests validate against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bitquake.leaderboard.board_file import BoardEntry, SubmissionEntry
from bitquake.metrics import METRICS
from bitquake.reports.formatting import clean_text
from bitquake.reports.schema import CellEntry, Report, RunEntry, ValueEntry

EEE_VERSION = "0.3.0"


def eee_record(
    board: BoardEntry,
    submission: SubmissionEntry,
    report: Report,
    run: RunEntry,
    *,
    generator: str,
    source_date: int | None,
) -> dict[str, Any]:
    """The record of one submission; ``report`` holds its cells. Time stamps are 0 without a ``source_date``."""
    stamp = str(source_date or 0)
    cells = [cell for cell in report.cells if cell.run == run.id]
    name, _, version = generator.partition(" ")
    return {
        "schema_version": EEE_VERSION,
        "evaluation_id": f"{board.board}/{submission.name}/{stamp}",
        "retrieved_timestamp": stamp,
        "source_metadata": {
            "source_name": clean_text(board.title),
            "source_type": "evaluation_run",
            "source_organization_name": submission.organisation,
            "evaluator_relationship": "other",
            "additional_details": _details(
                board=board.board,
                world=board.world,
                level=submission.level,
                twin=submission.twin,
                **{f"sha256 {file}": digest for file, digest in sorted(submission.files.items())},
            ),
        },
        "eval_library": {
            "name": name,
            "version": version or "unknown",
            "additional_details": _details(**submission.versions),
        },
        "model_info": _model(submission, run),
        "evaluation_results": [result for cell in cells for result in _results(submission, cell, report)],
    }


def _model(submission: SubmissionEntry, run: RunEntry) -> dict[str, Any]:
    card = run.card
    base = (card.base or card.pretrained) if card else ""
    details = {"deployment_type": "self_deployed", "model_availability": "unknown"}
    if card:
        details |= _details(
            quantization=run.quantization,
            quantization_method=card.method,
            quantization_bits=card.bits,
            quantization_group_size=card.group_size,
            bits_per_weight_nominal=card.nominal_bpw,
            bits_per_weight_effective=card.effective_bpw,
            execution=card.execution,
            kernel=card.kernel,
            dtype=card.dtype,
            architecture=card.architecture,
            base_model=base,
            base_revision=card.revision,
            weights_hash=card.weights_hash,
            model_hash=run.model_hash,
            quant_card_hash=run.card_hash,
            calibration=card.calibration_source,
        )
    return {
        "name": f"{submission.model} {submission.quantization}",
        "id": f"{submission.organisation}/{submission.model}-{submission.quantization}",
        "developer": submission.organisation,
        "inference_engine": {"name": "transformers", **_version(submission)},
        "additional_details": details,
    }


def _version(submission: SubmissionEntry) -> dict[str, str]:
    version = submission.versions.get("transformers")
    return {"version": version} if version else {}


def _results(submission: SubmissionEntry, cell: CellEntry, report: Report) -> Iterable[dict[str, Any]]:
    for key, value in cell.metrics.items():
        metric = METRICS.get(key)
        # A bias has no better direction, which the schema wants to know.
        if metric is None or metric.higher_is_better is None or not _finite(value):
            continue
        low, high = metric.bounds
        title = cell.headline if key == "accuracy" else metric.title
        difference = value.difference
        yield {
            "evaluation_result_id": f"{submission.name}/{cell.task}/{key}",
            "evaluation_name": cell.task,
            "source_data": {
                "dataset_name": clean_text(cell.dataset) or cell.family,
                "source_type": "other",
                "additional_details": _details(
                    split=cell.split,
                    part=cell.part,
                    revision=cell.dataset_revision,
                    noise=cell.noise,
                    severity=cell.severity or "",
                    shifted_from=cell.shift_from,
                ),
            },
            "metric_config": {
                "evaluation_description": metric.definition,
                "metric_id": f"bitquake.{key}" if key != "accuracy" else "accuracy",
                "metric_name": title,
                "metric_kind": key,
                "metric_unit": "nats" if metric.unit == "nats" else "proportion",
                "lower_is_better": not metric.higher_is_better,
                "score_type": "continuous",
                "min_score": _bound(low),
                "max_score": _bound(high),
            },
            "score_details": {
                "score": value.value,
                "details": _details(
                    clusters=cell.n_clusters,
                    confidence=cell.confidence_name,
                    caution=value.caution,
                    **(
                        {
                            "difference_from_full_precision": difference.delta,
                            "difference_lower": difference.lo,
                            "difference_upper": difference.hi,
                            "difference_verdict": difference.verdict,
                        }
                        if difference
                        else {}
                    ),
                ),
                "uncertainty": {
                    "confidence_interval": {
                        "lower": value.lo,
                        "upper": value.hi,
                        "confidence_level": report.settings.level,
                        "method": "percentile bootstrap, clustered by image",
                    },
                    "num_samples": cell.n,
                    "num_bootstrap_samples": report.settings.replicates,
                },
            },
        }


def _finite(value: ValueEntry) -> bool:
    return all(x is not None and math.isfinite(x) for x in (value.value, value.lo, value.hi))


def _bound(value: float) -> float | str:
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _details(**values: object) -> dict[str, str]:
    """Texts by name, without those that say nothing."""
    return {key: clean_text(str(value)) for key, value in values.items() if value is not None and str(value)}
