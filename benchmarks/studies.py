"""What the studies' block-world twins took and found, from the output folders of ``bitquake run``.

    for suite in suites/*.yaml; do bitquake run $suite --world block; done
    python benchmarks/studies.py suite-runs/*-block --json benchmarks/studies.json
    python benchmarks/studies.py suite-runs/components-block --tables 'What moves*'      # for docs/studies.md

Prints a row for each study, or tables of their pages; the file holds every cell with its samples and seconds, and the
findings.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bitquake.reports.studies.overview import duration

_UNITS = {"CIDEr": 1.0}
"""What a table's number is shown in, by a word of its column; all others are shares, and shown in percent."""


def numbers(folder: Path) -> dict[str, Any]:
    """``study.json`` of a study's page."""
    told: dict[str, Any] = json.loads((folder / "site" / "study.json").read_text(encoding="utf-8"))
    return told


def gathered(folder: Path) -> dict[str, Any]:
    """A study's cells and findings; the seconds of a training are not in them."""
    told = numbers(folder)
    evaluated: dict[str, Any] = {}
    for cell in told["cells"]:
        evaluated.setdefault(cell["hash"], cell)
    cells = [
        {
            "name": cell["name"],
            "state": cell["state"],
            "samples": sum(cell["samples"].values()),
            "seconds": cell["seconds"],
        }
        for cell in evaluated.values()
    ]
    findings = [" ".join(f"{found['text']} {found['figures']}".split()) for found in told["findings"]]
    return {"suite": told["plan"]["suite"], "cells": cells, "findings": findings}


def summary(study: dict[str, Any]) -> dict[str, str]:
    done = [cell for cell in study["cells"] if cell["state"] == "finished"]
    longest = max(done, key=lambda cell: cell["seconds"])
    return {
        "study": study["suite"],
        "cells": f"{len(done)} of {len(study['cells'])}",
        "answers": f"{sum(cell['samples'] for cell in done):,}",
        "wall time": duration(sum(cell["seconds"] for cell in done)),
        "longest cell": f"{duration(longest['seconds'])} ({longest['name']})",
    }


def markdown(table: dict[str, Any]) -> str:
    rows = []
    for row in table["rows"]:
        head = " · ".join(part for part in (row["head"], row["note"]) if part)
        cells = [shown(cell, title) for cell, title in zip(row["cells"], table["columns"][1:], strict=False)]
        rows.append([f"**{head}**" if not cells else head, *cells])
    lines = [table["columns"], ["---"] * len(table["columns"]), *rows]
    width = len(table["columns"])
    text = "\n".join(f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in lines)
    return f"**{table['label']}**\n\n{text}\n"


def shown(cell: Any, column: str) -> str:
    """``93.1 [91.0, 95.2]``, with its verdict where it is not tied."""
    if not isinstance(cell, dict):
        return str(cell)
    if cell.get("value") is None:
        return "n/a"
    times = next((unit for word, unit in _UNITS.items() if word in column), 100.0)
    digits, sign = (2 if times == 1 else 1), ("+" if "verdict" in cell else "")
    # + 0.0: no minus before a zero
    value, lo, hi = (
        "" if cell.get(key) is None else f"{round(times * cell[key], digits) + 0.0:{sign}.{digits}f}"
        for key in ("value", "lo", "hi")
    )
    verdict = cell.get("verdict", "tied")
    return f"{value} [{lo}, {hi}]" + (f" {verdict}" if verdict != "tied" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of bitquake run, with their pages")
    parser.add_argument("--tables", nargs="+", metavar="LABEL", help="print these tables of the pages (shell patterns)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write cells and findings to FILE")
    options = parser.parse_args()
    if options.tables:
        for folder in options.folders:
            tables = [table for section in numbers(folder)["sections"] for table in section["tables"]]
            for table in tables:
                if any(fnmatch.fnmatchcase(table["label"], pattern) for pattern in options.tables):
                    print(markdown(table))
        return
    studies = [gathered(folder) for folder in options.folders]
    print(tabulate([summary(study) for study in studies], headers="keys", tablefmt="github", disable_numparse=True))
    if options.json:
        options.json.write_text(json.dumps(studies, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
