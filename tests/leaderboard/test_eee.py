"""Every Eval Ever records, held against the schema that the coalition publishes (``every_eval_ever/``, MIT licence)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from board_inputs import board
from board_sites import board_files

from bitquake.leaderboard.eee import EEE_VERSION

SCHEMA = json.loads((Path(__file__).parent / "every_eval_ever" / "eval.schema.json").read_text())


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    found = board_files(board(4), date=1_700_000_000)
    return {name: json.loads(text) for name, text in found.items() if name.startswith("eee--")}


def test_a_record_for_each_submission_that_the_published_schema_takes(records: dict[str, dict[str, Any]]) -> None:
    assert SCHEMA["version"] == EEE_VERSION
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert len(records) == 4
    for record in records.values():
        jsonschema.validate(record, SCHEMA, jsonschema.Draft7Validator)
    damaged = json.loads(json.dumps(next(iter(records.values()))))
    del damaged["evaluation_results"][0]["score_details"]["score"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, SCHEMA, jsonschema.Draft7Validator)


def test_scores_carry_interval_bounds_and_what_was_quantized(records: dict[str, dict[str, Any]]) -> None:
    """What the collection checks beyond its schema: finite scores within bounds, unique ids, deployment facts."""
    for record in records.values():
        ids = [result["evaluation_result_id"] for result in record["evaluation_results"]]
        assert len(ids) == len(set(ids)) > 50
        for result in record["evaluation_results"]:
            metric, details = result["metric_config"], result["score_details"]
            low, high = (float(str(metric[key]).replace("Infinity", "inf")) for key in ("min_score", "max_score"))
            interval = details["uncertainty"]["confidence_interval"]
            assert low <= details["score"] <= high
            assert interval["lower"] <= details["score"] <= interval["upper"]
            assert interval["confidence_level"] == 0.95 and details["uncertainty"]["num_samples"] == 1000
        kinds = {
            r["metric_config"]["metric_kind"]: r["metric_config"]["lower_is_better"]
            for r in record["evaluation_results"]
        }
        assert kinds["accuracy"] is False and kinds["aurc"] is True and "signed_miscalibration" not in kinds
        model = record["model_info"]["additional_details"]
        assert model["execution"] in ("full-precision", "packed", "simulated")
        assert model["deployment_type"] == "self_deployed" and "bits_per_weight_effective" in model
    quantized = next(r for name, r in records.items() if "bf16" not in name)
    assert "difference_from_full_precision" in quantized["evaluation_results"][0]["score_details"]["details"]
    assert record["retrieved_timestamp"] == "1700000000"
