"""``bitquake importance``: which factor of a grid of runs moves a metric, from anybody's table of results.

A row is a run, or with ``--sample`` a run's answer to one question. What tables are like, and what is done:

- A combination of levels without a row: it is named, and type II sums of squares take the place of the exact
  decomposition; ``--complete-only`` leaves levels out until none is missing.
- A row without a target (empty, ``nan``): left out and counted; its cell may then be missing. Infinity is an error.
- Several rows of one combination: repeats; the variance within cells is a share of its own, and ``--bootstrap`` takes
  the intervals from them.
- A factor of numbers is ordered by size (``4`` and ``4.0`` are one level); any other is a set of names.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitquake.metrics.importance import Grid, Share, VarianceShares
    from bitquake.metrics.pareto import Cheapest
    from bitquake.metrics.samples import BoolArray, FloatArray
    from bitquake.metrics.sensitivity import Sensitivity

VERSION = 1
SHARES_KEPT = (0.95, 0.98)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SHOWN = 6
_LISTED = 1000
_WAYS = {"anova": "ANOVA", "impurity": "impurity", "permutation": "permutation", "shap": "SHAP"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put ``importance`` into the command line."""
    parser = commands.add_parser("importance", help="which factor of a grid of runs moves a metric, from a table")
    parser.add_argument("file", type=Path, metavar="FILE.csv", help="one row a run (.csv or .tsv with a header)")
    parser.add_argument("--target", required=True, metavar="COLUMN", help="the metric")
    parser.add_argument("--factors", required=True, metavar="COLUMN,…", help="what was varied")
    parser.add_argument("--methods", default="anova,forest,shap", metavar="NAME,…", help="(default: %(default)s)")
    parser.add_argument("--group", metavar="COLUMN", help="a grid of its own for each value of this column")
    parser.add_argument("--sample", metavar="COLUMN", help="rows are single answers, and this is their question's id")
    parser.add_argument("--drop", action="append", default=[], metavar="COLUMN=VALUE", help="leave these rows out")
    parser.add_argument(
        "--complete-only", action="store_true", help="leave levels out until every combination has a run"
    )
    parser.add_argument("--cost", metavar="COLUMN", help="bits per weight, say: the Pareto front, and what is enough")
    parser.add_argument("--lower-is-better", action="store_true", help="of the target, for --cost")
    parser.add_argument(
        "--reference",
        choices=("full", "best"),
        default="full",
        help="with --cost: 95 and 98 %% of the run with all factors at their highest level, or of the best",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="intervals from N replicates (and at most 20 forests)"
    )
    parser.add_argument("--trees", type=int, default=100, metavar="N", help="of a forest (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")


@dataclass(frozen=True)
class _Part:
    """The runs of one group. draws: (replicates, n) of `--sample`."""

    name: str
    columns: Mapping[str, Sequence[str]]
    target: FloatArray
    cost: FloatArray | None
    draws: FloatArray | None
    notes: list[str]


@dataclass(frozen=True)
class _Found:
    """What was found in one group."""

    part: _Part
    runs: Grid
    everything: Sensitivity
    without_lowest: Sensitivity | None
    lowest: Mapping[str, float]
    one_level: Mapping[tuple[str, str | float], VarianceShares]
    pareto: _Pareto | None
    notes: Sequence[str]


@dataclass(frozen=True)
class _Pareto:
    places: Sequence[str]
    reference: float
    reference_of: str
    kept: Sequence[Cheapest]


def run(options: argparse.Namespace) -> int:
    """Read, compute, print; exit code 0.

    Raises:
        ValueError: the table or an option cannot be used; the message says what, where and how to mend it.
        OSError: the file cannot be opened.
    """
    factors = _names(options.factors, "--factors")
    methods = _names(options.methods, "--methods")
    _check(options, factors, methods)
    header, rows = read_table(options.file)
    parts = _parts(options, factors, header, rows)
    found = [_analyse(part, factors, methods, options) for part in parts]
    print("\n\n\n".join(_text(one, options) for one in found))
    if options.json is not None:
        told = {
            "version": VERSION,
            "file": options.file.name,
            "target": options.target,
            "factors": factors,
            "methods": methods,
            "bootstrap": options.bootstrap,
            "trees": options.trees,
            "seed": options.seed,
            "groups": [_numbers(one) for one in found],
        }
        options.json.write_text(json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        print(options.json, file=sys.stderr)
    return 0


def read_table(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV (commas, or semicolons where the header has no comma) or TSV file.

    Raises:
        ValueError: it is empty, no UTF-8, cut short, names a column twice, or is of another kind.
        OSError: it cannot be opened.
    """
    kind = file.suffix.lower()
    if kind not in _DELIMITERS:
        raise ValueError(f"{file}: expected a table that ends in .csv or .tsv")
    with file.open(encoding="utf-8-sig", newline="") as stream:
        try:
            first = stream.readline()
            stream.seek(0)
            delimiter = ";" if kind == ".csv" and ";" in first and "," not in first else _DELIMITERS[kind]
            # strict: a quote that is not closed is an error, not a very long field
            lines = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(lines, [])]
            rows = list(_rows(lines, header, file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file}: no table ({error}); save it as CSV in UTF-8") from error
    if not header:
        raise ValueError(f"{file}: is empty; the first line names the columns")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{file}: the column {twice!r} is there twice; rename one")
    if not rows:
        raise ValueError(f"{file}: holds no rows")
    return header, rows


def _rows(lines: Iterator[list[str]], header: list[str], file: Path) -> Iterator[dict[str, str]]:
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{file}, row {number}: {len(cells)} fields, the header has {len(header)}; cut short, or a delimiter "
                "inside a text without quotes"
            )
        yield {name: cell.strip() for name, cell in zip(header, cells, strict=True)}


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{option}: expected names with commas between them, got {text!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{option}: {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return names


def _check(options: argparse.Namespace, factors: Sequence[str], methods: Sequence[str]) -> None:
    from bitquake.metrics.importance import nearest
    from bitquake.metrics.sensitivity import SENSITIVITY_METHODS

    for method in methods:
        if method not in SENSITIVITY_METHODS:
            raise ValueError(f"--methods: unknown method {method!r}{nearest(method, SENSITIVITY_METHODS)}")
    for option in ("target", "group", "sample", "cost"):
        if getattr(options, option) in factors:
            raise ValueError(f"--factors: {getattr(options, option)!r} is the --{option}; it cannot be a factor too")
    if options.bootstrap < 0 or options.trees < 10:
        raise ValueError("--bootstrap takes 0 or more replicates and --trees 10 or more trees")


def _parts(
    options: argparse.Namespace, factors: Sequence[str], header: Sequence[str], rows: Sequence[dict[str, str]]
) -> list[_Part]:
    """The rows by group, without those that were dropped or have no target."""
    from bitquake.metrics.importance import nearest

    named = [*factors, options.target, *filter(None, (options.group, options.sample, options.cost))]
    for name in named:
        if name not in header:
            raise ValueError(f"{options.file}: has no column {name!r}{nearest(name, header)}")
    kept = list(enumerate(rows, start=2))
    for told in options.drop:
        name, equals, value = told.partition("=")
        if not equals or name not in header:
            hint = nearest(name, header) if equals else "; expected COLUMN=VALUE"
            raise ValueError(f"--drop {told}: no column {name!r}{hint}")
        left = [(number, row) for number, row in kept if not _equal(row[name], value)]
        if len(left) == len(kept):
            known = list(dict.fromkeys(row[name] for _, row in kept))
            raise ValueError(f"--drop {told}: no row has it; {name} has {', '.join(known[:12])}")
        kept = left
    if not kept:
        raise ValueError("--drop: no row is left")
    groups: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in kept:
        groups.setdefault(row[options.group] if options.group else "", []).append((number, row))
    return [_part(options, factors, name, members) for name, members in groups.items()]


def _equal(cell: str, value: str) -> bool:
    try:
        return float(cell) == float(value)
    except ValueError:
        return cell == value


def _part(
    options: argparse.Namespace, factors: Sequence[str], name: str, members: Sequence[tuple[int, dict[str, str]]]
) -> _Part:
    import numpy as np

    where = f"{options.file}{f', {options.group} {name}' if options.group else ''}"
    notes = []
    targets = [_number(row[options.target], options.target, options.file, number) for number, row in members]
    rows = [row for (_, row), value in zip(members, targets, strict=True) if not math.isnan(value)]
    if len(rows) < len(members):
        notes.append(f"{len(members) - len(rows)} of {len(members)} rows have no {options.target} and are left out")
    if not rows:
        raise ValueError(f"{where}: no row has a {options.target}")
    for factor in factors:
        if empty := [number for number, row in members if not row[factor]]:
            raise ValueError(f"{options.file}, row {empty[0]}: {factor} is empty ({len(empty)} such rows)")
        if len({row[factor] for row in rows}) < 2:
            raise ValueError(
                f"{where}: the factor {factor} is {rows[0][factor]!r} in every row, so nothing can be said about it; "
                "leave it out of --factors"
            )
    values = np.array([value for value in targets if not math.isnan(value)])
    cost = None
    if options.cost:
        cost = np.array([_number(row[options.cost], options.cost, options.file, number) for number, row in members])
        cost = cost[[not math.isnan(value) for value in targets]]
        if np.isnan(cost).any():
            raise ValueError(f"{where}: {options.cost} is empty in {int(np.isnan(cost).sum())} rows")
    columns = {factor: [row[factor] for row in rows] for factor in factors}
    if not options.sample:
        return _Part(name, columns, values, cost, None, notes)
    return _of_samples(options, where, name, columns, [row[options.sample] for row in rows], values, cost, notes)


def _number(cell: str, column: str, file: Path, row: int) -> float:
    """A cell as a number, NaN where there is none."""
    if cell.lower() in ("", "nan", "na", "n/a", "none", "null"):
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        raise ValueError(f"{file}, row {row}: {column} is no number: {cell[:60]!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"{file}, row {row}: {column} is {cell}; a diverged run has no value: leave the cell empty")
    return value


def _of_samples(
    options: argparse.Namespace,
    where: str,
    name: str,
    columns: Mapping[str, Sequence[str]],
    samples: Sequence[str],
    values: FloatArray,
    cost: FloatArray | None,
    notes: list[str],
) -> _Part:
    """Single answers put together: a run for each combination, its mean, and replicates of the means."""
    import numpy as np

    from bitquake.metrics.bootstrap import cluster_draws

    cells: dict[tuple[str, ...], dict[str, int]] = {}
    for i, (levels, sample) in enumerate(zip(zip(*columns.values(), strict=True), samples, strict=True)):
        if sample in cells.setdefault(levels, {}):
            raise ValueError(f"{where}: sample {sample!r} is there twice for {_cell(columns, levels)}; one answer each")
        cells[levels][sample] = i
    ids = list(next(iter(cells.values())))
    for levels, own in cells.items():
        if own.keys() != set(ids):
            raise ValueError(
                f"{where}: {_cell(columns, levels)} answered {len(own)} samples and "
                f"{_cell(columns, next(iter(cells)))} {len(ids)}, not the same ones; compare what all of them answered"
            )
    order = np.array([[own[sample] for sample in ids] for own in cells.values()])
    scores = values[order]
    draws = None
    if options.bootstrap:
        blocks = cluster_draws(len(ids), options.bootstrap, 64, options.seed, stream=0)
        draws = np.concatenate([block @ scores.T / len(ids) for block in blocks])
    notes.append(f"{len(cells)} runs of {len(ids)} samples each")
    factors = {factor: [levels[i] for levels in cells] for i, factor in enumerate(columns)}
    return _Part(name, factors, scores.mean(axis=1), None if cost is None else cost[order[:, 0]], draws, notes)


def _cell(columns: Iterable[str], levels: Sequence[object]) -> str:
    return " ".join(f"{name}={_level(level)}" for name, level in zip(columns, levels, strict=True))


def _level(level: object) -> str:
    return f"{level:g}" if isinstance(level, float) else str(level)


def _analyse(part: _Part, factors: Sequence[str], methods: Sequence[str], options: argparse.Namespace) -> _Found:
    from bitquake.metrics.importance import complete_part, grid, leave_one_level, lowest_levels, without_lowest

    title = f"{options.group} {part.name}: " if options.group else ""
    notes = list(part.notes)
    try:
        runs = grid(part.columns)
        if options.complete_only and not runs.complete:
            kept = complete_part(runs)
            before, runs, part = runs, runs.rows(kept), _only(part, kept)
            notes.append(_left_out(before, runs))
            if not runs.factors:
                raise ValueError("no full sub-grid with a factor in it; leave --complete-only out")
        everything = _sensitivity(runs, part, methods, options)
        lowest: dict[str, float] = {}
        without = None
        kept = without_lowest(runs)
        rest = runs.rows(kept)
        if not kept.all() and rest.n >= 8 and rest.factors and part.target[kept].std() > 0:
            lowest = lowest_levels(runs)
            without = _sensitivity(rest, _only(part, kept), methods, options)
        one_level = leave_one_level(runs, part.target) if "anova" in methods and runs.complete else {}
    except ValueError as error:
        raise ValueError(f"{title}{error}") from error
    several = int((runs.counts > 1).sum())
    if several:
        notes.append(f"{several} of {runs.n_cells} cells have several runs: the variance within them is a share")
    if options.bootstrap and "anova" in methods and part.draws is None and not (runs.counts > 1).all():
        notes.append(
            "one run a cell: the variance shares are exact for these values, and have no interval; give runs of "
            "several seeds, or single answers with --sample"
        )
    pareto = None if part.cost is None else _pareto(part, runs, options)
    return _Found(part, runs, everything, without, lowest, one_level, pareto, [*notes, *everything.notes])


def _sensitivity(runs: Grid, part: _Part, methods: Sequence[str], options: argparse.Namespace) -> Sensitivity:
    from bitquake.metrics.sensitivity import SENSITIVITY_METHODS, sensitivity

    return sensitivity(
        runs, part.target,
        methods=[method for method in SENSITIVITY_METHODS if method in methods],
        draws=part.draws, replicates=options.bootstrap, refits=options.bootstrap, trees=options.trees,
        seed=options.seed,
    )  # fmt: skip


def _only(part: _Part, kept: BoolArray) -> _Part:
    return _Part(
        part.name,
        {
            name: [value for value, keep in zip(values, kept, strict=True) if keep]
            for name, values in part.columns.items()
        },
        part.target[kept],
        None if part.cost is None else part.cost[kept],
        None if part.draws is None else part.draws[:, kept],
        part.notes,
    )


def _left_out(before: Grid, after: Grid) -> str:
    lost = []
    for i, name in enumerate(before.factors):
        kept = after.levels[after.factors.index(name)] if name in after.factors else ()
        gone = [level for level in before.levels[i] if level not in kept]
        if not kept:
            lost.append(f"{name} (all levels but one)")
        elif gone:
            lost.append(f"{name} {', '.join(map(_level, gone))}")
    return f"left out, to have every combination: {'; '.join(lost)}; {after.n} of {before.n} runs stay"


def _pareto(part: _Part, runs: Grid, options: argparse.Namespace) -> _Pareto:
    import numpy as np

    from bitquake.metrics.pareto import cheapest, pareto_front

    assert part.cost is not None
    higher = not options.lower_is_better
    places = pareto_front(part.cost, part.target, draws=part.draws, higher_is_better=higher)
    full = np.ones(runs.n, dtype=bool)
    for i, name in enumerate(runs.factors):
        full &= (runs.codes[:, i] == len(runs.levels[i]) - 1) & runs.is_numeric(name)
    best = int(np.argmax(part.target if higher else -part.target))
    index = int(np.flatnonzero(full)[0]) if full.any() and options.reference == "full" else best
    reference_of = _cell(runs.factors, [runs.column(name)[index] for name in runs.factors])
    if not higher:
        return _Pareto(places, float(part.target[index]), reference_of, [])
    reference = float(part.target[index])
    if reference <= 0:
        raise ValueError(f"--cost: the reference {reference_of} has {options.target} {reference:g}; it must be above 0")
    drawn = None if part.draws is None else part.draws[:, index]
    kept = [
        cheapest(part.cost, part.target, reference, share, draws=part.draws, reference_draws=drawn)
        for share in SHARES_KEPT
    ]
    return _Pareto(places, reference, reference_of, kept)


def _text(found: _Found, options: argparse.Namespace) -> str:
    from tabulate import tabulate

    runs, part = found.runs, found.part
    title = f"{options.group} {part.name}: " if options.group else ""
    lines = [
        f"{title}{options.target} of {runs.n} runs, {len(runs.filled)} of {runs.n_cells} cells "
        f"({' x '.join(map(str, runs.shape))}), {part.target.min():.4g} to {part.target.max():.4g}"
    ]
    if runs.n_missing:
        shown = "; ".join(_cell(cell, list(cell.values())) for cell in runs.missing(_SHOWN))
        more = f" and {runs.n_missing - _SHOWN} more" if runs.n_missing > _SHOWN else ""
        lines.append(f"missing cells: {shown}{more}")
    lines += found.notes
    parts = ["\n".join(lines), tabulate(_table(found.everything), headers="keys", disable_numparse=True)]
    legend = (
        "In percent. * importances add up to 100 (ANOVA: Shapley effects); first order and total are of the variance"
    )
    parts[-1] += f"\n{legend}" + (". ** mean of the forest's three" if found.everything.consensus else "")
    variance = found.everything.variance
    if variance is not None:
        parts[-1] += "".join(f"\n{line}" for line in _variance_lines(variance))
    if found.without_lowest is not None:
        lowest = ", ".join(f"{name} {level:g}" for name, level in found.lowest.items())
        rest = found.without_lowest
        parts.append(
            f"Without the lowest levels ({lowest}): {rest.grid.n} runs\n"
            + tabulate(_table(rest), headers="keys", disable_numparse=True)
        )
    if found.one_level:
        parts.append("Importance (ANOVA, %) without one level at a time\n" + tabulate(_ranges(found), headers="keys"))
    if found.everything.agreement:
        parts.append("Agreement of the ways\n" + tabulate(_agreement(found.everything), headers="keys"))
    if found.pareto is not None:
        parts.append(_pareto_text(found, found.pareto, options))
    return "\n\n".join(parts)


def _table(found: Sensitivity) -> list[dict[str, str]]:
    """One row a factor; everything in percent."""
    rows = []
    for name in found.grid.factors:
        row = {"factor": name, "levels": str(len(found.grid.levels[found.grid.factors.index(name)]))}
        if found.variance is not None:
            row["first order"] = _percent(found.variance.first[name])
            row["total"] = _percent(found.variance.total[name])
        row |= {f"{_WAYS[way]}*": _percent(shares[name]) for way, shares in found.importance.items()}
        if found.consensus:
            row["consensus**"] = _percent(found.consensus[name])
        rows.append(row)
    return rows


def _percent(share: Share) -> str:
    bounds = f" [{100 * share.lo:.1f}, {100 * share.hi:.1f}]" if share.has_interval else ""
    return f"{100 * share.value:.1f}{bounds}"


def _variance_lines(variance: VarianceShares) -> list[str]:
    lines = []
    named = [f"{' x '.join(term)} {_percent(share)}" for term, share in variance.interactions.items()]
    more = f", and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    if named:
        lines.append(f"interactions {100 * variance.interaction:.1f}: {', '.join(named[:_SHOWN])}{more}")
    if variance.within is not None:
        lines.append(f"within cells {_percent(variance.within)}")
    if variance.unexplained is not None:
        lines.append(f"not explained by the model {_percent(variance.unexplained)}")
    if not math.isnan(variance.noise):
        lines.append(f"of the variance between cells, sampling alone accounts for about {100 * variance.noise:.1f}")
    return lines


def _ranges(found: _Found) -> list[dict[str, Any]]:
    rows = []
    for name in found.runs.factors:
        values = {at: shares.importance[name].value for at, shares in found.one_level.items()}
        low, high = min(values, key=lambda at: values[at]), max(values, key=lambda at: values[at])
        rows.append(
            {
                "factor": name,
                "from": f"{100 * values[low]:.1f}",
                "without": f"{low[0]} {_level(low[1])}",
                "to": f"{100 * values[high]:.1f}",
                "without ": f"{high[0]} {_level(high[1])}",
            }
        )
    return rows


def _agreement(found: Sensitivity) -> list[dict[str, str]]:
    return [
        {
            "ways": " and ".join(_WAYS[method] for method in one.methods),
            "rank correlation": "-" if math.isnan(one.rank_correlation) else f"{one.rank_correlation:.2f}",
            "largest difference, points": f"{100 * one.largest_difference:.1f}",
        }
        for one in found.agreement
    ]


def _pareto_text(found: _Found, pareto: _Pareto, options: argparse.Namespace) -> str:
    from tabulate import tabulate

    part, runs, cost = found.part, found.runs, found.part.cost
    assert cost is not None
    shown = sorted((i for i, place in enumerate(pareto.places) if place == "front"), key=lambda i: cost[i])
    rows = [
        {**{name: _level(runs.column(name)[i]) for name in runs.factors}, options.cost: f"{cost[i]:g}",
         options.target: f"{part.target[i]:.4g}"}
        for i in shown
    ]  # fmt: skip
    tied = sum(place == "tied" for place in pareto.places)
    lines = [
        f"Pareto front: {len(shown)} runs, {tied} tied with it, {len(pareto.places) - len(shown) - tied} dominated"
    ]
    lines.append(tabulate(rows, headers="keys", disable_numparse=True))
    for kept in pareto.kept:
        what = f"cheapest with {kept.share:.0%} of {pareto.reference:.4g} ({pareto.reference_of})"
        if kept.index is None:
            lines.append(f"{what}: none")
            continue
        where = _cell(runs.factors, [runs.column(name)[kept.index] for name in runs.factors])
        sure = ""
        if kept.sure is not None and kept.sure != kept.index:
            place = _cell(runs.factors, [runs.column(name)[kept.sure] for name in runs.factors])
            sure = f"; beyond the noise of the samples: {place} at {cost[kept.sure]:g}"
        lines.append(f"{what}: {where} at {cost[kept.index]:g}, keeps {kept.kept:.1%}{sure}")
    return "\n".join(lines)


def _numbers(found: _Found) -> dict[str, Any]:
    """All of it for JSON."""
    runs = found.runs
    told: dict[str, Any] = {
        "group": found.part.name,
        "n": runs.n,
        "levels": dict(zip(runs.factors, map(list, runs.levels), strict=True)),
        "cells": runs.n_cells,
        "complete": runs.complete,
        "balanced": runs.balanced,
        "n_missing": runs.n_missing,
        "missing": runs.missing(_LISTED),
        "notes": list(found.notes),
        "all": _sensitivity_numbers(found.everything),
        "without_lowest": None,
        "without_one_level": [
            {"factor": name, "level": level, "importance": {k: v.value for k, v in shares.importance.items()}}
            for (name, level), shares in found.one_level.items()
        ],
    }
    if found.without_lowest is not None:
        told["without_lowest"] = {"levels": dict(found.lowest), **_sensitivity_numbers(found.without_lowest)}
    if found.pareto is not None and found.part.cost is not None:
        cells = [[runs.column(name)[i] for name in runs.factors] for i in range(runs.n)]
        told["pareto"] = {
            "runs": [
                {"levels": dict(zip(runs.factors, levels, strict=True)), "cost": float(cost), "value": float(value),
                 "place": place}
                for levels, cost, value, place in zip(
                    cells, found.part.cost, found.part.target, found.pareto.places, strict=True
                )
            ],
            "reference": found.pareto.reference,
            "cheapest": [
                {"share": kept.share, "kept": _finite(kept.kept), "lo": _finite(kept.lo), "hi": _finite(kept.hi),
                 "levels": None if kept.index is None else dict(zip(runs.factors, cells[kept.index], strict=True)),
                 "cost": None if kept.index is None else float(found.part.cost[kept.index])}
                for kept in found.pareto.kept
            ],
        }  # fmt: skip
    return told


def _sensitivity_numbers(found: Sensitivity) -> dict[str, Any]:
    told: dict[str, Any] = {
        "n": found.grid.n,
        "importance": {
            way: {name: _share(share) for name, share in shares.items()} for way, shares in found.importance.items()
        },
        "consensus": {name: _share(share) for name, share in found.consensus.items()} or None,
        "agreement": [
            {"methods": list(one.methods), "rank_correlation": _finite(one.rank_correlation),
             "largest_difference": one.largest_difference}
            for one in found.agreement
        ],
    }  # fmt: skip
    if (variance := found.variance) is not None:
        told["variance"] = {
            "method": variance.method,
            "variance": variance.variance,
            "first": {name: _share(share) for name, share in variance.first.items()},
            "total": {name: _share(share) for name, share in variance.total.items()},
            "interactions": [{"factors": list(term), **_share(share)} for term, share in variance.interactions.items()],
            "within": None if variance.within is None else _share(variance.within),
            "unexplained": None if variance.unexplained is None else _share(variance.unexplained),
            "noise": _finite(variance.noise),
        }
    if found.forest is not None:
        told["forest"] = {"scores": found.forest.scores, "r2": _finite(found.forest.r2), "trees": found.forest.trees}
    return told


def _share(share: Share) -> dict[str, float | None]:
    return {"value": _finite(share.value), "lo": _finite(share.lo), "hi": _finite(share.hi)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
