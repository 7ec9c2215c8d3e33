"""What a gate says: one check for each rule and task, and the verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from bitquake.reports.formatting import number
from bitquake.reports.problems import ReportError
from bitquake.reports.schema import Unit

Verdict = Literal["pass", "fail", "cannot judge"]
PASS: Verdict = "pass"  # noqa: S105 - a verdict
FAIL: Verdict = "fail"
CANNOT_JUDGE: Verdict = "cannot judge"


class GateError(ReportError):
    """The gate was asked something that no runs can answer: bad rules or options."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Check(_Entry):
    """One rule on one task, in fractions (``unit`` says how they are shown).

    value: what is held against ``limit``: candidate minus baseline for ``may_fall`` and ``may_rise``, else the
    candidate's own; lo, hi: its one-sided bounds at the rule's confidence. too: whether ``low`` or ``high`` values are
    the bad ones. undecided: the samples did not decide, and ``verdict`` is what the rule says of that.
    """

    rule: int
    title: str
    task: str
    verdict: Verdict
    undecided: bool = False
    unit: Unit = "percent"
    baseline: float | None = None
    candidate: float | None = None
    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    limit: float
    too: Literal["low", "high"]
    n: int = 0
    n_images: int = 0
    why: str


class GateSettings(_Entry):
    replicates: int
    seed: int
    common_samples: bool
    multiple_testing: str


class GateResult(_Entry):
    """All checks, and the verdict: ``fail`` if one failed, else ``cannot judge`` if one could not be judged.

    rules: their titles; a check's ``rule`` is a position in them. problems: what was wrong with the runs as files.
    """

    version: Literal[1] = 1
    candidate: str
    baseline: str
    settings: GateSettings
    rules: list[str]
    checks: list[Check]
    problems: list[str]
    verdict: Verdict

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 cannot judge."""
        return {PASS: 0, FAIL: 1, CANNOT_JUDGE: 2}[self.verdict]

    def count(self, verdict: Verdict) -> int:
        return sum(check.verdict == verdict for check in self.checks)


def shown(value: float | None, unit: Unit, *, signed: bool = False) -> str:
    """A number of a check; ``–`` where there is none."""
    return "–" if value is None else number(value, unit, signed=signed)
