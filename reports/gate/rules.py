"""What a release gate asks: rules on a candidate's metrics, on flips and on threshold transfer.

A rule holds a quantity against a limit with a confidence 1 - a. It *passes* when the one-sided 1 - a bound of the
quantity lies within the limit (a test of non-inferiority: the burden of proof is the candidate's), it *fails* when the
one-sided 1 - a bound on the other side lies beyond the limit, and otherwise the samples do not decide it: that is not
a pass. "May not fall by more than 2 points, with 95 % confidence" thus means: we are 95 % sure that the loss is at most
2 points, and not: no loss of more than 2 points was proved.

Bounds are those of the bootstrap clustered by image; of accuracy and flips never narrower than the exact binomial ones
(with few errors, all one way, a percentile bootstrap at 95 % passes 9 to 20 % of the candidates that lie at the limit),
and of transfer as in ``bitquake.metrics.transfer``.

A gate passes when all of its checks pass, each at its own level, so that many checks make passing by luck no likelier
(intersection-union test: Berger 1982). They do make failing by luck likelier; ``multiple_testing: holm`` corrects for
that (Holm 1979) over all checks of the gate.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from bitquake.metrics import METRICS, Metric
from bitquake.reports.formatting import SCALE, number

TAG = "tag:"
_AMOUNT = r"^\s*(-?\d+(\.\d*)?|-?\.\d+)\s*(points?|percent|%)?\s*$"
_CRITERIA = ("may_fall", "may_rise", "at_least", "at_most")
MAX_RULES = 1000


def _amount(value: Any) -> Any:
    """``2``, ``2 points`` and ``70 %`` as a number."""
    if isinstance(value, bool):
        raise ValueError("expected a number, such as 2 or `2 points`")
    if isinstance(value, str):
        found = re.match(_AMOUNT, value)
        if found is None:
            raise ValueError("expected a number, such as 2 or `2 points`")
        return float(found[1])
    return value


_NUMBER_OR_TEXT = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": _AMOUNT}]}
Amount = Annotated[
    float, BeforeValidator(_amount), Field(allow_inf_nan=False), WithJsonSchema(_NUMBER_OR_TEXT, mode="validation")
]
Percent = Annotated[Amount, Field(ge=0, le=100)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TransferRule(_Model):
    """A threshold chosen on the baseline's clean threshold split at ``risk`` (percent), applied to the candidate: the
    risk that is then taken, or the share that is then answered, in percent."""

    risk: Annotated[Amount, Field(gt=0, lt=100)]
    realised_at_most: Percent | None = None
    coverage_at_least: Percent | None = None

    @model_validator(mode="after")
    def _one(self) -> TransferRule:
        if (self.realised_at_most is None) == (self.coverage_at_least is None):
            raise ValueError("give one of `realised_at_most` and `coverage_at_least`; a second rule takes the other")
        return self


class FlipsRule(_Model):
    """Share of samples, in percent, that are right in one run and wrong in the other."""

    rate_at_most: Annotated[Percent, Field(gt=0)]


class Rule(_Model):
    """One rule on some tasks.

    Attributes:
        name: what the verdict calls it.
        tasks: names, patterns (``vqav2_*_3``) and tags (``tag:vqav2_noise_3``, every task of it); default: all tasks of
            the runs but those on threshold splits.
        confidence: 1 - a; between 0.5 and 1.
        confidence_name: which confidence of the answers (``selector``); default: the task's primary one.
        minimum_n: samples below which nothing is judged; default: what the metric needs to be ranked.
        undecided: what to make of samples that do not decide the rule.
        metric: a key of ``bitquake.metrics``. Limits of metrics in percent are points (2 is 2 points); those of others
            are in the metric's own unit.
        may_fall, may_rise: how far the candidate may lie below or above the baseline, more than 0.
        at_least, at_most: limits of the candidate alone.
    """

    name: str = Field(default="", max_length=200)
    tasks: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(min_length=1, max_length=MAX_RULES),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, mode="validation"
        ),
    ] = ["*"]
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    confidence_name: str = Field(default="", pattern=r"^[a-z0-9_]*$", max_length=40)
    minimum_n: int | None = Field(default=None, ge=0)
    undecided: Literal["cannot_judge", "pass", "fail"] = "cannot_judge"
    metric: str | None = Field(default=None, json_schema_extra={"enum": [*METRICS, None]})
    may_fall: Annotated[Amount, Field(gt=0)] | None = None
    may_rise: Annotated[Amount, Field(gt=0)] | None = None
    at_least: Amount | None = None
    at_most: Amount | None = None
    transfer: TransferRule | None = None
    flips: FlipsRule | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if [self.metric, self.transfer, self.flips].count(None) != 2:
            raise ValueError("give one of `metric`, `transfer` and `flips`; further ones are rules of their own")
        given = [name for name in _CRITERIA if getattr(self, name) is not None]
        if self.metric is None:
            if given:
                raise ValueError(f"{given[0]}: belongs to a `metric`; remove it")
            if self.flips is not None and self.confidence_name:
                raise ValueError("confidence_name: flips have nothing to do with confidences; remove it")
            return self
        if self.metric not in METRICS:
            raise ValueError(f"metric: unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(f'`{name}`' for name in _CRITERIA)} for {self.metric}")
        metric = METRICS[self.metric]
        wrong = ("may_rise", "at_most") if metric.higher_is_better else ("may_fall", "at_least")
        if metric.higher_is_better is not None and given[0] in wrong:
            instead = _CRITERIA[_CRITERIA.index(given[0]) ^ 1]
            better = "higher" if metric.higher_is_better else "lower"
            raise ValueError(f"{given[0]}: {better} is better of {self.metric}; did you mean `{instead}`?")
        low, high = metric.bounds
        if given[0].startswith("at_") and not low <= self.limit <= high:
            scale = SCALE[metric.unit]
            raise ValueError(f"{given[0]}: {self.metric} lies between {scale * low:g} and {scale * high:g}")
        return self

    @property
    def criterion(self) -> str:
        """``may_fall``, ``may_rise``, ``at_least``, ``at_most`` of a metric's rule."""
        return next((name for name in _CRITERIA if getattr(self, name) is not None), "")

    @property
    def of_metric(self) -> Metric:
        """The rule's metric; KeyError for a rule on something else."""
        return METRICS[self.metric or ""]

    @property
    def limit(self) -> float:
        """The limit of a metric's rule as a fraction, or in the metric's own unit."""
        value: float = getattr(self, self.criterion)
        return value / SCALE[self.of_metric.unit]

    @property
    def alpha(self) -> float:
        """Chance of a wrong decision, on each side."""
        return 1 - self.confidence

    @property
    def needs_baseline(self) -> bool:
        return not self.criterion.startswith("at_")

    @property
    def title(self) -> str:
        """The rule in words, without its tasks."""
        return self.name or f"{self.asks}, with {100 * self.confidence:g} % confidence"

    @property
    def asks(self) -> str:
        """What is asked, without confidence and tasks."""
        of = f" of the confidence {self.confidence_name}" if self.confidence_name else ""
        if self.flips is not None:
            return f"at most {self.flips.rate_at_most:g} % of the answers may flip"
        if self.transfer is not None:
            chosen = f"with the baseline's threshold for {self.transfer.risk:g} % risk{of}"
            if self.transfer.realised_at_most is not None:
                return f"risk taken {chosen}: at most {self.transfer.realised_at_most:g} %"
            return f"coverage {chosen}: at least {self.transfer.coverage_at_least:g} %"
        metric, value = self.of_metric, getattr(self, self.criterion)
        if self.criterion.startswith("may_"):
            points = ("point" if value == 1 else "points") if metric.unit == "percent" else ""
            amount = f"{value:g} {points}".strip()
            return f"{metric.title}{of} may not {self.criterion[4:]} by more than {amount}"
        return f"{metric.title}{of}: {self.criterion.replace('_', ' ')} {number(self.limit, metric.unit)}" + (
            " %" if metric.unit == "percent" else ""
        )


class GateRules(_Model):
    """A gate: its rules, and whether failing is corrected for their number."""

    version: Literal[1] = 1
    multiple_testing: Literal["none", "holm"] = "none"
    rules: list[Rule] = Field(min_length=1, max_length=MAX_RULES)


def rules_schema() -> str:
    """JSON schema of a gate's YAML file, for editors; ``gate.schema.json`` holds it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **GateRules.model_json_schema(mode="validation"),
        "title": "Rules of bitquake gate",
    }
    return json.dumps(schema, indent=2) + "\n"
