"""A release gate: may this candidate replace that baseline? Each rule on each task passes, fails, or cannot be judged.

What a rule asks and when it passes: ``bitquake.reports.gate.rules``. What cannot be measured is not judged, and what is
not judged never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bitquake.metrics import samples_needed
from bitquake.reports.gate.measures import Asked, GateRuns
from bitquake.reports.gate.results import CANNOT_JUDGE, FAIL, PASS, Check, GateError, GateResult, GateSettings, Verdict
from bitquake.reports.gate.rules import GateRules, Rule
from bitquake.reports.runs import Inputs

_TAIL = 10
"""Replicates that should lie beyond a bound."""
_NO_NUMBER = 1 << 62


def judge(
    rules: GateRules,
    candidate: Inputs,
    baseline: Inputs | None,
    *,
    tags: Mapping[str, Sequence[str]] | None = None,
    common_samples: bool = False,
    replicates: int = 2000,
    seed: int = 0,
) -> GateResult:
    """Hold every rule against the runs.

    Args:
        rules: the gate.
        candidate, baseline: what ``read_runs`` found; one model each. baseline None: only for rules without one.
        tags: tasks of each tag that the rules name.
        common_samples: compare runs of different sample sets on what they share.
        replicates, seed: of the bootstrap.

    Raises:
        GateError: too few replicates for a rule's confidence, or a rule needs a baseline and there is none.
    """
    for rule in rules.rules:
        if rule.needs_baseline and baseline is None:
            raise GateError(f"the rule {rule.title!r} compares with a baseline; give --baseline RUN")
        if replicates * rule.alpha < _TAIL:
            least = math.ceil(_TAIL / rule.alpha - 1e-9)
            raise GateError(f"confidence {rule.confidence:g} needs {least:,} replicates, got {replicates:,}")
    runs = GateRuns(candidate, baseline, common_samples, replicates, seed)
    asked: list[Asked] = []
    for index, rule in enumerate(rules.rules):
        tasks = runs.tasks(rule, tags or {})
        asked += [Asked(index, rule, task) for task in tasks]
        if not tasks:
            missing = Asked(index, rule, ", ".join(rule.tasks))
            missing.reason = "no task of the runs has such a name"
            asked.append(missing)
    runs.measure([one for one in asked if not one.reason])
    checks = [_first_verdict(one) for one in asked]
    if rules.multiple_testing == "holm":
        _withdraw_failures(asked, checks)
    checks = [_by_rule(check, rules.rules[check.rule]) for check in checks]
    verdicts = {check.verdict for check in checks}
    problems = runs.problems()
    worst: Verdict = PASS
    if FAIL in verdicts:
        worst = FAIL
    elif CANNOT_JUDGE in verdicts or problems:
        worst = CANNOT_JUDGE
    return GateResult(
        candidate=runs.names[0],
        baseline=runs.names[1],
        settings=GateSettings(
            replicates=replicates, seed=seed, common_samples=common_samples, multiple_testing=rules.multiple_testing
        ),
        rules=[rule.title for rule in rules.rules],
        checks=checks,
        problems=[str(problem) for problem in problems],
        verdict=worst,
    )


def unreadable(rules: GateRules, reason: str, settings: GateSettings) -> GateResult:
    """The result where the runs cannot be read at all: nothing is judged."""
    checks = []
    for index, rule in enumerate(rules.rules):
        one = Asked(index, rule, ", ".join(rule.tasks))
        one.reason = reason
        checks.append(_first_verdict(one))
    titles = [rule.title for rule in rules.rules]
    return GateResult(
        candidate="",
        baseline="",
        settings=settings,
        rules=titles,
        checks=checks,
        problems=[reason],
        verdict=CANNOT_JUDGE,
    )


def images_needed(room: float, alpha: float) -> int:
    """Images below which a damage to ``room`` of all samples stays unseen with a chance of more than ``alpha``.

    (1 - room)^n <= alpha: with 95 % confidence and 2 points 149, the "rule of three". A bootstrap cannot know of what
    none of its samples shows, so a run without any error would pass with five samples.
    """
    if room >= 1:
        return 1
    return math.ceil(math.log(alpha) / math.log1p(-room) - 1e-9) if room > 0 else _NO_NUMBER


def _first_verdict(one: Asked) -> Check:
    rule, seen = one.rule, one.measured
    check = Check(
        rule=one.index,
        title=rule.title,
        task=one.task,
        verdict=CANNOT_JUDGE,
        limit=one.limit,
        too=one.bad,
        why=one.reason,
        unit=rule.of_metric.unit if rule.metric is not None else "percent",
    )
    if seen is None:
        return check
    lo, hi, note = seen.bounds(rule.alpha)
    found = {"value": seen.value, "lo": lo, "hi": hi, "candidate": seen.candidate, "baseline": seen.baseline}
    shown = {key: None if value is None or math.isnan(value) else float(value) for key, value in found.items()}
    check = check.model_copy(update=shown | {"n": seen.n, "n_images": seen.n_images})
    if math.isnan(lo) or math.isnan(hi) or math.isnan(seen.value):
        check.why = note or "not available"
        return check
    least = _minimum_n(rule)
    if seen.n < least:
        check.why = f"{seen.n:,} samples; {rule.of_metric.title} needs {least:,} (minimum_n)"
        return check
    if one.fails_at(rule.alpha):
        check.verdict, check.why = FAIL, "the whole interval lies beyond the limit"
    elif seen.n_images < (few := images_needed(one.room, rule.alpha)):
        check.undecided = True
        takes = f"it takes {few:,}" if few < _NO_NUMBER else "no number of images can: allow a little"
        check.why = f"{seen.n_images:,} images cannot exclude what none of them shows; {takes}"
    elif not one.within(hi if one.bad == "high" else lo):
        check.undecided = True
        check.why = "the interval holds the limit"
        if rule.criterion.startswith("may_"):
            needed = samples_needed(lo, hi, seen.n, one.room, level=2 * rule.confidence - 1)
            if needed > seen.n:
                check.why += f"; to see a change as small as the allowed one takes about {_rounded(needed)} samples"
    else:
        check.verdict, check.why = PASS, "the whole interval lies within the limit"
    return check


def _rounded(n: float) -> str:
    """Two figures of a number that is a rough one."""
    scale = 10 ** max(0, math.floor(math.log10(n)) - 1)
    return f"{math.ceil(n / scale) * scale:,}"


def _minimum_n(rule: Rule) -> int:
    if rule.minimum_n is not None:
        return rule.minimum_n
    return rule.of_metric.minimum_n if rule.metric is not None else 0


def _withdraw_failures(asked: Sequence[Asked], checks: list[Check]) -> None:
    """Holm's step-down procedure over all checks: failures that are not significant among so many become undecided."""
    judged = [i for i, check in enumerate(checks) if check.lo is not None and check.hi is not None]
    standing: set[int] = set()
    while True:
        left = len(judged) - len(standing)
        new = {
            i
            for i in judged
            if i not in standing and checks[i].verdict == FAIL and asked[i].fails_at(asked[i].rule.alpha / left)
        }
        if not new:
            break
        standing |= new
    for i in judged:
        if checks[i].verdict == FAIL and i not in standing:
            checks[i].verdict, checks[i].undecided = CANNOT_JUDGE, True
            checks[i].why = f"beyond the limit by itself, not after Holm's correction for {len(judged)} checks"


def _by_rule(check: Check, rule: Rule) -> Check:
    """What the rule makes of samples that did not decide it."""
    if check.undecided and rule.undecided != "cannot_judge":
        check.verdict = PASS if rule.undecided == "pass" else FAIL
        check.why += f"; undecided, which this rule takes for a {rule.undecided}"
    return check
