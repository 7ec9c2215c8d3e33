"""What went wrong while a report was made: errors that end it, and problems that are shown and survived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class ReportError(ValueError):
    """No report can be made; the message says what, where and how to fix it."""


class RunError(ReportError):
    """A folder that cannot be read as a run of lmms-eval."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that keeps a result out of the report, or that a reader must know.

    level: ``error`` when a result is left out, ``warning`` when all results stand.
    """

    level: Literal["error", "warning"]
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")
