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

_NO_SHARES = ("CIDEr", "Bits", "Nominal", "Effective", "Stored", "Beyond the noise")
"""Words of columns whose numbers are shown as they are; all others are shares, and shown in percent."""


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


def markdown(table: dict[str, Any], section: str) -> str:
    rows = []
    for row in table["rows"]:
        head = " · ".join(part for part in (row["head"], row["note"]) if part)
        cells = [shown(cell, title) for cell, title in zip(row["cells"], table["columns"][1:], strict=False)]
        rows.append([f"**{head}**" if not cells else head, *cells])
    lines = [table["columns"], ["---"] * len(table["columns"]), *rows]
    width = len(table["columns"])
    text = "\n".join(f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in lines)
    return f"**{table['label']}** ({section})\n\n{text}\n"


def shown(cell: Any, column: str) -> str:
    """``93.1 [91.0, 95.2]``; a difference with its sign and, where it is not tied, its verdict."""
    if not isinstance(cell, dict):
        return str(cell)
    if cell.get("value") is None:
        return "n/a"
    times, digits = (1, 2) if any(word in column for word in _NO_SHARES) else (100, 1)
    sign = "+" if "verdict" in cell else ""
    # + 0.0: no minus before a zero
    value, *bounds = (
        f"{round(times * cell[key], digits) + 0.0:{sign}.{digits}f}"
        for key in ("value", "lo", "hi")
        if cell.get(key) is not None
    )
    verdict = cell.get("change", cell).get("verdict", "tied")
    return value + (f" [{', '.join(bounds)}]" if bounds else "") + ("" if verdict == "tied" else f" {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of bitquake run, with their pages")
    parser.add_argument("--tables", nargs="+", metavar="LABEL", help="print these tables of the pages (shell patterns)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write cells and findings to FILE")
    options = parser.parse_args()
    if options.tables:
        for folder in options.folders:
            for section in numbers(folder)["sections"]:
                for table in section["tables"]:
                    if any(fnmatch.fnmatchcase(table["label"], pattern) for pattern in options.tables):
                        print(markdown(table, section["title"]))
        return
    studies = [gathered(folder) for folder in options.folders]
    print(tabulate([summary(study) for study in studies], headers="keys", tablefmt="github", disable_numparse=True))
    if options.json:
        options.json.write_text(json.dumps(studies, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
