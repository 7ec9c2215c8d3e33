"""Append-only: what was submitted stays as it was, unless a maintainer wrote down why it went.

The files of a commit are compared with those on disk, byte for byte and by their kind, through git's plumbing: no file
of the submissions is ever given to git to run or to read.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitquake.leaderboard.findings import Finding, shown
from bitquake.leaderboard.submission import FOLDER
from bitquake.tasks.strict_yaml import StrictYamlError, load_strict, read_bounded

WITHDRAWALS_FILE = "withdrawals.yaml"
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./~^@{}-]{0,199}")
_REGULAR = ("100644", "100755")


class HistoryError(ValueError):
    """A base that git does not know, or a list that cannot be read."""


class Withdrawal(BaseModel):
    """A submission that was taken back, as a whole."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    submission: Annotated[str, Field(pattern=rf"^{FOLDER.pattern}$")]
    reason: Annotated[str, Field(min_length=10, max_length=1000)]


def read_entries(file: Path, kind: type[Any]) -> list[Any]:
    """A YAML list of entries of one kind.

    Raises:
        HistoryError: the file is not that.
    """
    try:
        return _entries(file.name, read_bounded(file), kind)
    except StrictYamlError as error:
        raise HistoryError(f"{file.name}: {error}") from error


def _entries(name: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        data = load_strict(text)
        if data is not None and not isinstance(data, list):
            raise HistoryError(f"{name}: expected a list of entries, got {type(data).__name__}")
        return [kind.model_validate(entry) for entry in data or []]
    except (StrictYamlError, ValidationError) as error:
        raise HistoryError(f"{name}: {error}") from error


def changed_since(base: str, root: Path) -> list[Finding]:
    """Submissions of a commit that are not on disk as they were.

    What was withdrawn stands in the commit's own list: nobody removes a submission and excuses it in one proposal.

    Args:
        base: a commit, branch or tag of the repository that holds ``root``.
        root: the folder of all submissions.

    Raises:
        HistoryError: git does not know the base, or ``root`` is in no repository, or a link, which may lead to another.
    """
    if not _REF.fullmatch(base):
        raise HistoryError(f"--base {shown(base)}: is no name of a commit; give a branch, a tag or a hash")
    if root.is_symlink() or root.parent.is_symlink():
        raise HistoryError(f"{root}: is a link, or lies in one; what it leads to is not what is proposed")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}").strip().decode()
    algorithm = _git(root, "rev-parse", "--show-object-format").strip().decode()
    listing = _git(root, "ls-tree", "-r", "-z", "--end-of-options", commit, "--", ".")
    withdrawn: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    gone: dict[str, bool] = {}
    for entry in filter(None, listing.split(b"\0")):
        facts, _, raw = entry.partition(b"\t")
        mode, _, blob = facts.decode().split(" ")
        path = Path(os.fsdecode(raw))
        if len(path.parts) < 2:  # a file beside the submissions
            if path.name == WITHDRAWALS_FILE and mode in _REGULAR:
                text = _git(root, "cat-file", "blob", blob).decode(errors="replace")
                withdrawn = {
                    e.submission: e.reason for e in _entries(f"{WITHDRAWALS_FILE} of {base}", text, Withdrawal)
                }
            continue
        change = _change(root / path, mode, blob, algorithm)
        gone[path.parts[0]] = gone.get(path.parts[0], True) and change == "is gone"
        if change:
            found.setdefault(path.parts[0], []).append(f"{'/'.join(path.parts[1:])} {change}")
    return [_finding(name, changes, gone[name], withdrawn) for name, changes in sorted(found.items())]


def _finding(name: str, changes: list[str], gone: bool, withdrawn: Mapping[str, str]) -> Finding:
    what = f"was submitted before and must stay as it was: {shown(', '.join(changes), 200)}"
    if not gone:
        fix = "put it back as it was, and submit the new one under another name"
        return Finding("history-changed", shown(name, 200), what, fix=fix)
    if name in withdrawn:
        what = f"was withdrawn: {shown(withdrawn[name], 200)}"
        return Finding("history-withdrawn", name, what, level="warning")
    fix = f"put it back, or have a maintainer list it in {WITHDRAWALS_FILE} of the base, with a reason, first"
    return Finding("history-removed", shown(name, 200), what, fix=fix)


def _change(path: Path, mode: str, blob: str, algorithm: str) -> str:
    """What happened to a file since the commit, or ""."""
    if not os.path.lexists(path):
        return "is gone"
    if path.is_symlink() or not path.is_file() or mode not in _REGULAR:
        return "is no regular file" if mode in _REGULAR else ""
    data = path.read_bytes()
    digest = hashlib.new(algorithm, f"blob {len(data)}\0".encode() + data).hexdigest()
    return "" if digest == blob else "has changed"


def _git(folder: Path, *arguments: str) -> bytes:
    # Nothing of the environment may point git at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program, arguments checked, no shell
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            check=False,
            env=environment | {"LC_ALL": "C"},
        )
    except OSError as error:
        raise HistoryError(f"--base: git cannot be run ({error.strerror}); install it") from error
    if done.returncode:
        said = shown(done.stderr.decode(errors="replace"), 200) or "git does not know it"
        raise HistoryError(f"--base {shown(arguments[-1])} in {folder}: {said}; fetch it, or give another commit")
    return done.stdout
