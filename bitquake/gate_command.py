"""``bitquake gate``: reads the rules and the two runs, judges, and writes what a release pipeline wants to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from bitquake.reports.gate import GateError, GateResult, GateRules, GateSettings, judge, to_junit, unreadable
from bitquake.reports.gate.rules import TAG, FlipsRule, Rule, TransferRule
from bitquake.reports.problems import RunError
from bitquake.reports.runs import read_runs
from bitquake.tasks.strict_yaml import Place, line_of, load_mapping


def load_rules(file: Path) -> GateRules:
    """The rules in a YAML file.

    Raises:
        GateError: it cannot be read, is not plain YAML, or is no set of rules; each problem is named in a line, with
            the file, the line in it, the place, what was got and how to fix it.
    """
    data, lines = load_mapping(file, "with `rules:`, a list of rules", GateError)
    try:
        return GateRules.model_validate(data)
    except ValidationError as error:
        raise GateError("\n".join(_problems(error, file, lines))) from error


def gate(
    candidate: Sequence[Path],
    baseline: Sequence[Path],
    rules: Path,
    *,
    junit: Path | None = None,
    json_file: Path | None = None,
    artifacts: Path | None = None,
    common_samples: bool = False,
    replicates: int = 2000,
    seed: int = 0,
) -> GateResult:
    """Judge a candidate against a baseline, and write the verdict as JUnit XML and JSON where that is wanted.

    Args:
        candidate, baseline: folders with the runs of one model each (lmms-eval's, or ``bitquake records import``'s);
            no baseline for rules that need none.
        rules: a YAML file, see ``bitquake.reports.gate.rules``.
        artifacts: folder with the quant cards (default: where the runs put them).
        common_samples, replicates, seed: as for ``bitquake report``.

    Raises:
        GateError: the rules are not valid, or the options do not fit them. Runs that cannot be read are no error but a
            verdict: ``cannot judge``.
    """
    asked = load_rules(rules)
    if replicates < 1:
        raise GateError(f"--replicates: expected 1 or more, got {replicates}")
    tags = _tags(asked, rules)
    try:
        result = judge(
            asked,
            read_runs(candidate, artifacts),
            read_runs(baseline, artifacts) if baseline else None,
            tags=tags,
            common_samples=common_samples,
            replicates=replicates,
            seed=seed,
        )
    except RunError as error:
        settings = GateSettings(
            replicates=replicates,
            seed=seed,
            common_samples=common_samples,
            multiple_testing=asked.multiple_testing,
        )
        result = unreadable(asked, str(error), settings)
    data = json.dumps(result.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    for file, text in ((junit, to_junit(result)), (json_file, data)):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return result


def _tags(rules: GateRules, file: Path) -> dict[str, list[str]]:
    """The tasks of each tag that the rules name."""
    wanted = {name.removeprefix(TAG) for rule in rules.rules for name in rule.tasks if name.startswith(TAG)}
    if not wanted:
        return {}
    from bitquake.tasks.expand import builtin_index

    known = builtin_index().tags
    for tag in sorted(wanted - known.keys()):
        raise GateError(f"{file}: there is no tag {tag!r}; `bitquake tasks list --all` shows the tags of every task")
    return {tag: known[tag] for tag in sorted(wanted)}


def _problems(error: ValidationError, file: Path, lines: Mapping[Place, int]) -> list[str]:
    found: list[str] = []
    for problem in error.errors(include_url=False):
        place = list(problem["loc"])
        line = line_of(lines, place)
        at = str(file) if line is None else f"{file}:{line}"
        where = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        what = problem["msg"].removeprefix("Value error, ")
        got = "" if isinstance(problem["input"], dict) else f" (got {_short(problem['input'])})"
        if problem["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(place))
            what, got = f"unknown key; remove it, or check its spelling: known here are {known}", ""
        elif problem["type"] == "missing":
            what, got = "this key is missing; add it", ""
        elif where.endswith(".confidence") and isinstance(problem["input"], int | float) and problem["input"] > 1:
            what = "a share between 0.5 and 1 is expected, such as 0.95"
        text = f"{at}: {where}: {what}{got}" if where else f"{at}: {what}{got}"
        if text not in found:
            found.append(text)
    return found


def _known_keys(place: Sequence[str | int]) -> list[str]:
    inside = place[-2] if len(place) > 1 else ""
    models: dict[str, type[BaseModel]] = {"transfer": TransferRule, "flips": FlipsRule, "": GateRules}
    model = models.get(str(inside), Rule)
    return list(model.model_fields)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
