"""A gate's verdict for a terminal or a CI log."""

from __future__ import annotations

from tabulate import tabulate

from bitquake.reports.formatting import clean_text
from bitquake.reports.gate.results import CANNOT_JUDGE, FAIL, PASS, GateResult, shown


def verdict_text(result: GateResult) -> str:
    """A table for each rule, then one line that says it all."""
    unnamed = "none" if result.candidate else "unknown"  # nothing was read: neither model has a name
    parts = [
        f"candidate  {clean_text(result.candidate) or 'unknown'}\nbaseline   {clean_text(result.baseline) or unnamed}"
    ]
    for index, title in enumerate(result.rules):
        checks = [check for check in result.checks if check.rule == index]
        rows = []
        for check in checks:
            change = check.baseline is not None
            unit = check.unit
            rows.append(
                [
                    check.verdict.upper(),
                    clean_text(check.task, 60),
                    shown(check.baseline, unit),
                    shown(check.candidate, unit),
                    shown(check.value, unit, signed=True) if change else "",
                    f"[{shown(check.lo, unit, signed=change)}, {shown(check.hi, unit, signed=change)}]"
                    if check.lo is not None
                    else "–",
                    ("≥ " if check.too == "low" else "≤ ") + shown(check.limit, unit, signed=change),
                    f"{check.n:,}" if check.n else "–",
                    "see below" if check.why in result.problems else clean_text(check.why, 300),
                ]
            )
        head = ["", "task", "baseline", "candidate", "change", "bounds", "allowed", "samples", "why"]
        parts.append(f"{index + 1}. {clean_text(title, 240)}\n{tabulate(rows, head, disable_numparse=True)}")
    if result.problems:
        parts.append(
            "\n".join(["The runs could not be read in full:", *(f"  {problem}" for problem in result.problems)])
        )
    counts = ", ".join(
        f"{result.count(verdict)} {word}"
        for verdict, word in ((PASS, "passed"), (FAIL, "failed"), (CANNOT_JUDGE, "cannot be judged"))
        if result.count(verdict)
    )
    checked = "1 check" if len(result.checks) == 1 else f"{len(result.checks)} checks"
    parts.append(f"{result.verdict.upper()}: of {checked} {counts}")
    return "\n\n".join(parts)
