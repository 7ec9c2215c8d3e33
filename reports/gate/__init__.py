"""A release gate on two runs: rules in YAML, a verdict with reasons, JUnit XML for build servers."""

from bitquake.reports.gate.judging import judge, unreadable
from bitquake.reports.gate.junit import to_junit
from bitquake.reports.gate.results import Check, GateError, GateResult, GateSettings
from bitquake.reports.gate.rules import GateRules, Rule, rules_schema
from bitquake.reports.gate.text import verdict_text

__all__ = [
    "Check",
    "GateError",
    "GateResult",
    "GateRules",
    "GateSettings",
    "Rule",
    "judge",
    "rules_schema",
    "to_junit",
    "unreadable",
    "verdict_text",
]
