"""Reports: lmms-eval's output folders, compared pairwise and written as a static page, JSON, CSV and a table.

``build`` does all of it. Needs neither torch nor lmms-eval.
"""

from bitquake.reports.build import ReportResult, build
from bitquake.reports.problems import Problem, ReportError, RunError
from bitquake.reports.runs import read_runs
from bitquake.reports.schema import Report

__all__ = ["Problem", "Report", "ReportError", "ReportResult", "RunError", "build", "read_runs"]
