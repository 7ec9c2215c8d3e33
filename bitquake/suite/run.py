"""A suite from its file to its page: plan, estimate, cells, Selectors, page."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from bitquake.suite.driver import CellOptions, Driver, Outcome, RunOptions, SuiteStopped, run_order
from bitquake.suite.estimate import estimate, shown
from bitquake.suite.plan import plan_suite
from bitquake.suite.progress import View
from bitquake.suite.reader import load_suite
from bitquake.suite.schema import SuiteError
from bitquake.suite.status import reason_of
from bitquake.suite.store import SCRATCH, WORK, Damage, Store, StoreError, open_store
from bitquake.suite.worker import noise_cache_arguments
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

EXIT_OK, EXIT_FAILED = 0, 1
SITE = "site"
COMMANDS = "commands"
"""Where the commands of a dry run write to: a cell's own folder is its worker's."""
_LOCK = "run.lock"


def run_suite(options: argparse.Namespace) -> int:
    """Carry out ``bitquake run``; the exit code is 0 (all cells are there) or 1 (not all).

    Raises:
        SuiteError: the suite or an option is no use; StoreError: the output folder is.
    """
    _check_options(options)
    plan = plan_suite(load_suite(options.suite, options.world), limit=options.limit)
    out = options.out or str(Path("suite-runs") / (plan.suite + ("-block" if plan.world == "block" else "")))
    store = open_store(out)
    store.check_version()
    scratch = _scratch(store, options.scratch)
    done, damaged = _finished(store, plan)
    chosen = _chosen(plan.cells, options, store)
    todo = [cell for cell in run_order(chosen) if cell.hash not in done]
    told = shown(estimate(plan, todo, done, options.jobs), plan, finished=len(done), jobs=options.jobs)
    print(told, flush=True)
    cell_options = CellOptions(
        device=options.device,
        noise_cache="" if options.noise_cache == "none" else options.noise_cache,
        noise_cache_gb=options.noise_cache_gb,
        minutes=plan.minutes,
    )
    if options.dry_run:
        return _dry_run(store, scratch, todo, cell_options)
    with _locked(store, scratch), _terminated_as_interrupted():
        store.write_plan(plan)
        _set_aside(store, damaged, plan)
        stopped = ""
        outcome = Outcome()
        if todo:
            _clear_work(store, scratch)
            settings = RunOptions(scratch, options.jobs, options.threads, cell_options)
            with View(todo, done) as view:
                try:
                    outcome = _driver(options.ray)(plan, todo, store.url, settings, view.tell)
                except SuiteStopped as error:
                    stopped = str(error)
        return _conclude(store, scratch, plan, chosen, outcome, stopped, options)


def _clear_work(store: Store, scratch: Path) -> None:
    """Remove what killed workers left: in the scratch folder, and beside the cells, where that is on another disk."""
    for folder in (scratch, *([store.local / SCRATCH] if store.local else [])):
        shutil.rmtree(folder / WORK, ignore_errors=True)


def _check_options(options: argparse.Namespace) -> None:
    if options.jobs < 1:
        raise SuiteError(f"--jobs: give at least 1, got {options.jobs}")
    if options.threads is not None and options.threads < 1:
        raise SuiteError(f"--threads: give at least 1, got {options.threads}")
    if options.ray and options.jobs != 1:
        raise SuiteError("--jobs: is for this machine alone; with --ray, local:N says how many cells at once")
    if options.ray is not None and not re.fullmatch(r"auto|local:[1-9]\d*|(?!local:).+", options.ray):
        raise SuiteError(f"--ray: expected auto, the address of a cluster, or local:N, got {options.ray!r}")


def _driver(ray: str | None) -> Driver:
    if ray is None:
        from bitquake.suite.local import run_locally

        return run_locally
    from functools import partial

    from bitquake.suite.ray_driver import run_on_ray

    return partial(run_on_ray, address=ray)


def _scratch(store: Store, told: Path | None) -> Path:
    """Folder of this machine for what is not finished: inside the output folder, or the user's cache for a url."""
    if told is not None:
        return told.expanduser().resolve()
    if store.local is not None:
        return store.local / SCRATCH
    import platformdirs

    name = hashlib.blake2b(store.url.encode(), digest_size=8).hexdigest()
    return platformdirs.user_cache_path("bitquake", appauthor=False) / "suites" / name


def _finished(store: Store, plan: SuitePlan) -> tuple[dict[str, CellManifest], dict[str, str]]:
    """What is there of the plan: manifests of finished cells, and why others that are there do not count."""
    done: dict[str, CellManifest] = {}
    damaged: dict[str, str] = {}
    for cell_hash, found in store.cells((cell.hash for cell in run_order(plan.cells)), deep=True).items():
        if isinstance(found, Damage):
            damaged[cell_hash] = found.reason
        else:
            done[cell_hash] = found
    return done, damaged


def _set_aside(store: Store, damaged: Mapping[str, str], plan: SuitePlan) -> None:
    names = {cell.hash: cell.name for cell in reversed(plan.cells)}
    for cell_hash, reason in damaged.items():
        place = store.set_aside(cell_hash)
        print(f"damaged   {names[cell_hash]}: {reason}; moved to {place}, it is run again", file=sys.stderr)


def _chosen(cells: Sequence[PlannedCell], options: argparse.Namespace, store: Store) -> list[PlannedCell]:
    """The cells that this run is about.

    Raises:
        SuiteError: a pattern that matches nothing.
    """
    kept = list(cells)
    for option, patterns in (("--only", options.only), ("--exclude", options.exclude)):
        matched: set[str] = set()
        for pattern in patterns:
            found = {cell.name for cell in cells if matches(cell, pattern)}
            if not found:
                names = ", ".join(cell.name for cell in cells[:3])
                raise SuiteError(f"{option} {pattern!r}: matches no cell; they are called {names}, …")
            matched |= found
        if patterns:
            kept = [cell for cell in kept if (cell.name in matched) == (option == "--only")]
    if options.retry_failed:
        failed = store.failures()
        kept = [cell for cell in kept if cell.hash in failed]
    return kept


def matches(cell: PlannedCell, pattern: str) -> bool:
    """Whether a cell has a name of that form (``*/rtn-*``), or a factor with a level of that form (``bits=4``)."""
    factor, equals, level = pattern.partition("=")
    if equals and factor in ("model", "quantization", "calibration", "seed"):
        return fnmatch.fnmatchcase(str(getattr(cell, factor)), level)
    if equals and factor in cell.factors:
        return fnmatch.fnmatchcase(str(cell.factors[factor]), level)
    return fnmatch.fnmatchcase(cell.name, pattern)


def _dry_run(store: Store, scratch: Path, todo: Sequence[PlannedCell], options: CellOptions) -> int:
    from bitquake.suite.commands import shown_commands

    places = store.places(scratch)
    root = Path(store.local or scratch)
    for cell in todo:
        runs = root / COMMANDS / cell.hash
        print(f"\n# {cell.name}")
        for command in shown_commands(cell, places, runs, options.device, noise_cache_arguments(options)):
            print(command)
    return EXIT_OK


def _conclude(
    store: Store,
    scratch: Path,
    plan: SuitePlan,
    chosen: Sequence[PlannedCell],
    outcome: Outcome,
    stopped: str,
    options: argparse.Namespace,
) -> int:
    """Selectors and page from what is there, then what is missing, then the exit code."""
    there = store.cells(cell.hash for cell in plan.cells)
    done = {cell_hash for cell_hash, found in there.items() if isinstance(found, CellManifest)}
    code = EXIT_OK if all(cell.hash in done for cell in chosen) and not stopped else EXIT_FAILED
    page = ""
    if done and not stopped and not options.no_report:
        from bitquake.reports.problems import ReportError

        folder = store.mirror(scratch / "mirror")
        problems = _add_selectors(plan, sorted(done), folder, options.threads)
        try:
            page = str(_build_page(folder))
        except ReportError as error:
            problems.append(f"no page: {error}")
        if store.local is None:
            for name in (SITE, "selectors", "applied"):
                if (folder / name).is_dir():
                    store.upload(folder / name, name)
        for problem in problems:
            print(problem, file=sys.stderr)
        code = max(code, EXIT_FAILED if problems else EXIT_OK)
    failures = store.failures()
    for cell in run_order(chosen):
        if cell.hash not in done:
            why = outcome.failed.get(cell.hash) or reason_of(failures.get(cell.hash, {})) or "has not been run"
            print(f"missing   {cell.name}: {why}", file=sys.stderr)
    if stopped:
        print(f"bitquake run: {stopped}", file=sys.stderr)
    distinct = {cell.hash for cell in plan.cells}
    print(f"{len(done)} of {len(distinct)} cells are finished in {store.url}")
    if page:
        print(page)
    return code


def _add_selectors(plan: SuitePlan, done: Sequence[str], folder: Path, threads: int | None) -> list[str]:
    if not plan.selectors:
        return []
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from bitquake.suite.selectors import fit_and_apply

    return fit_and_apply(plan, done, folder, tell=lambda line: print(line, file=sys.stderr, flush=True))


def _build_page(folder: Path) -> Path:
    from bitquake.reports.studies import build_study

    result = build_study(folder, folder / SITE, progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(result.table)
    for problem in result.problems:
        print(problem, file=sys.stderr)
    return result.index.resolve()


@contextlib.contextmanager
def _locked(store: Store, scratch: Path) -> Iterator[None]:
    """One run at a time in a folder of this machine: in an output folder two would do everything twice, in a scratch
    folder each would remove what the other has in work.

    Raises:
        StoreError: another run is at work in one of them.
    """
    import filelock

    folders = {} if store.local is None else {store.local: "--out"}
    folders.setdefault(scratch, "--scratch")
    with contextlib.ExitStack() as stack:
        for folder, option in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(filelock.FileLock(str(folder / _LOCK), timeout=0))
            except filelock.Timeout as error:
                raise StoreError(
                    f"{folder}: another `bitquake run` is at work there (`bitquake status {store.url}`); wait for it, "
                    f"or give another {option}"
                ) from error
        yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does: workers are ended and nothing is left half-written."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
