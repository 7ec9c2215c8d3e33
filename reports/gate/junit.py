"""A gate's verdict as JUnit XML, which build servers show: a suite for each rule, a case for each task.

Only what every reader of the format knows (Jenkins' XSD, GitLab, GitHub actions): a check that fails is a ``failure``,
one that cannot be judged an ``error``. Its numbers stand in the case's ``system-out`` and as properties of the suite.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from bitquake.reports.gate.results import CANNOT_JUDGE, FAIL, Check, GateResult, shown

# What XML 1.0 cannot hold, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(result: GateResult) -> str:
    """The document, with its XML declaration; the same result gives the same text."""
    root = ElementTree.Element("testsuites", {"name": "bitquake gate", **_counts(result.checks), "time": "0"})
    for index, title in enumerate(result.rules):
        checks = [check for check in result.checks if check.rule == index]
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(title), **_counts(checks), "time": "0"})
        properties = ElementTree.SubElement(suite, "properties")
        facts = {"candidate": result.candidate, "baseline": result.baseline, "rule": title}
        for check in checks:
            facts |= {f"{check.task}: {name}": value for name, value in _numbers(check).items()}
        for name, value in facts.items():
            ElementTree.SubElement(properties, "property", {"name": _xml(name), "value": _xml(value)})
        for check in checks:
            _case(suite, check)
    if result.problems:
        what = "; ".join(result.problems)
        check = Check(rule=0, title="", task="files", verdict=CANNOT_JUDGE, limit=0, too="high", why=what)
        counts = _counts([check])
        suite = ElementTree.SubElement(root, "testsuite", {"name": "the runs' files", **counts, "time": "0"})
        _case(suite, check.model_copy(update={"title": "the runs' files"}))
        root.attrib |= _counts([*result.checks, check])
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, check: Check) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", {"classname": _xml(check.title), "name": _xml(check.task), "time": "0"}
    )
    if check.verdict in (FAIL, CANNOT_JUDGE):
        kind = "failure" if check.verdict == FAIL else "error"
        found = ElementTree.SubElement(case, kind, {"message": _xml(check.why), "type": _xml(check.verdict)})
        found.text = _xml(f"{check.title}\n{check.task}: {check.why}")
    lines = [f"{name}: {value}" for name, value in _numbers(check).items()]
    if lines:
        ElementTree.SubElement(case, "system-out").text = _xml("\n".join([*lines, f"why: {check.why}"]))


def _counts(checks: list[Check]) -> dict[str, str]:
    return {
        "tests": str(len(checks)),
        "failures": str(sum(check.verdict == FAIL for check in checks)),
        "errors": str(sum(check.verdict == CANNOT_JUDGE for check in checks)),
    }


def _numbers(check: Check) -> dict[str, str]:
    """What was measured, as people read it; nothing where nothing was."""
    if check.value is None:
        return {}
    side = "at least" if check.too == "low" else "at most"
    found = {
        "value": check.value,
        "lower bound": check.lo,
        "upper bound": check.hi,
        side: check.limit,
        "candidate": check.candidate,
        "baseline": check.baseline,
    }
    numbers = {}
    for name, value in found.items():
        if value is not None:
            is_change = check.baseline is not None and name not in ("candidate", "baseline")
            unit = "" if check.unit != "percent" else " points" if is_change else " %"
            numbers[name] = shown(value, check.unit).replace("−", "-") + unit
    return numbers | {"samples": f"{check.n}", "images": f"{check.n_images}"}


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
