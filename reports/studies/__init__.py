"""Study pages: what a suite found, from its output folder.

``build_study`` writes the page of the suite's study; ``read_study`` gives what it is made from.
"""

from bitquake.reports.studies.build import StudyResult, build_study
from bitquake.reports.studies.study import Study, StudyCell, read_study

__all__ = ["Study", "StudyCell", "StudyResult", "build_study", "read_study"]
