"""Writes a report's files all at once: a reader never meets half a report, and nobody's other files are touched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bitquake.reports.problems import ReportError

MARKER = ".bitquake-report"
"""Lists the files of a report, one a line: only a folder that holds these and no others may be replaced."""


def check_replaceable(out: Path) -> None:
    """Raise unless ``out`` is new, empty, or a report without anybody else's files.

    Raises:
        ReportError: it is a file, or a folder with files that are not the report's.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ReportError(f"{out}: is a file; give a folder for the report")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    marker = out / MARKER
    ours = set(marker.read_text(encoding="utf-8").splitlines()) | {MARKER} if marker.is_file() else set()
    foreign = sorted(found - ours)
    if foreign:
        what = "holds files that are not the report's" if ours else "is not empty and was not made by bitquake report"
        raise ReportError(f"{out}: {what} (such as {foreign[0]}); give another folder, or move them away")


def write_site(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files to a folder beside ``out``, then put it in ``out``'s place.

    Raises:
        ReportError: see ``check_replaceable``; or the folder cannot be written.
    """
    target = out.resolve()
    check_replaceable(target)
    listing = "".join(f"{name}\n" for name in sorted(files)).encode()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            for name, content in {**files, MARKER: listing}.items():
                with (building / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            # mkdtemp makes it private; a site is there to be served.
            building.chmod(0o755)
            _swap(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise ReportError(f"{out}: cannot be written: {error.strerror or error}; give a folder that can") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write one file into a folder that is there: whole, or as it was.

    Raises:
        OSError: it cannot be written.
    """
    handle, building = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:32]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(building, 0o644)  # mkstemp makes it private; a page is there to be served
        os.replace(building, path)
    except BaseException:
        Path(building).unlink(missing_ok=True)
        raise


def _swap(building: Path, target: Path) -> None:
    """Put the new folder in place; if that fails the old one is back where it was."""
    if not target.exists():
        building.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    target.rename(old)  # replaces the empty folder
    try:
        building.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
