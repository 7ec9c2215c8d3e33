"""Writes a board whose numbers are known already, as ``build_site`` writes one that it has computed."""

from __future__ import annotations

from pathlib import Path

from bitquake.leaderboard import site
from bitquake.leaderboard.board_file import BoardEntry, BoardFile
from bitquake.leaderboard.numbers import GENERATOR
from bitquake.reports.site import write_site

DIGEST = "0123456789abcdef" * 4


def board_files(entry: BoardEntry, *, date: int | None = None, n_refused: int = 0) -> dict[str, bytes]:
    """File name -> content of a site with one board, all of whose submissions share one artifact."""
    artifact = site.render_artifact(entry, date)
    brief = entry.model_copy(update={"report": artifact.report})
    file = BoardFile(generator=GENERATOR, source_date=date, inputs_digest=DIGEST, n_refused=n_refused, boards=[brief])
    return site.render_files(file, entry.report.settings, [(entry.board, artifact)], [], DIGEST)


def write_board(entry: BoardEntry, folder: Path) -> Path:
    out = folder / "board"
    write_site(out, board_files(entry))
    return out
