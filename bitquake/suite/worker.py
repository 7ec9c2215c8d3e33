"""One cell, from loading its model to its folder in the output: what every worker does, here or on Ray.

The model is loaded once and answers all tasks of the cell through lmms-eval's own ``simple_evaluate``, with the
arguments that the printed command would have had, so that its folders are those of the command. Nothing is finished
that is not complete: samples are counted afterwards, whatever lmms-eval said.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import os
import platform
import random
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bitquake import __version__
from bitquake.suite import commands
from bitquake.suite.commands import Begin
from bitquake.suite.completeness import planned_counts, sample_counts
from bitquake.suite.driver import FULL_DISK, CellError, CellOptions, now
from bitquake.suite.store import WORK, Damage, Places, Store, disk_takes, file_hash, is_full_disk, open_store
from bitquake.suite_plan import CellManifest, PlannedCell

Progress = Callable[[int, int], None]
BEAT_SECONDS = 5.0
"""Between two heartbeats of a cell in work."""
_LIBRARIES = ("torch", "transformers", "lmms_eval")
_DEFAULTS = CellOptions()
_SEEDS = (0, 1234, 1234)
"""Of random, numpy and torch, as lmms-eval's command sets them before it loads a model."""


def run_cell(
    cell: PlannedCell,
    out: str,
    scratch: Path,
    progress: Progress = lambda done, total: None,
    options: CellOptions = _DEFAULTS,
) -> CellManifest:
    """Evaluate a cell and put it into the output folder; one that is there already is returned as it is.

    May be interrupted at any moment: what was answered is in the journal, and the next call goes on from there.

    Args:
        out: the suite's output folder: a path, or any url of fsspec.
        scratch: folder of this machine for what is not finished; for a path, best on the same disk.
        progress: called with samples answered and samples in all (0 while that is not known).
        options: device, cache of corrupted pictures, time.

    Raises:
        CellError: it has not finished; the reason, and what exactly.
    """
    store = open_store(out)
    done = store.cell(cell.hash)
    if isinstance(done, Damage):
        store.set_aside(cell.hash)
    elif done is not None:
        return done
    work = scratch / WORK / f"{cell.hash}-{uuid.uuid4().hex[:8]}"
    try:
        work.mkdir(parents=True)
        with _Heart(store, cell, progress) as heart:
            with _time_limit(options.minutes):
                manifest = _evaluate(cell, store, store.places(scratch), work, heart, options)
            store.publish_cell(work, manifest)  # in its own time: what is there must not be called a failure
        return manifest
    except CellError:
        raise
    except _TimeOver:
        told = f"not finished within {options.minutes:g} minutes; what was answered is kept for the next try"
        raise CellError("time", told) from None
    except Exception as error:
        traceback.print_exc()
        raise _as_cell_error(error, work) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _as_cell_error(error: Exception, work: Path) -> CellError:
    told = " ".join(str(error).split())[:600] or type(error).__name__
    if is_full_disk(error) or (work.is_dir() and not disk_takes(work)):
        return CellError(FULL_DISK, told)
    if isinstance(error, MemoryError) or "out of memory" in told.lower() or "can't allocate memory" in told:
        return CellError("out of memory", told)
    return CellError("error", f"{type(error).__name__}: {told}")


class _TimeOver(BaseException):
    """No Exception: what a model makes of its samples' errors must not swallow it."""


class _Heart:
    """Says in ``running/<hash>.json`` that a cell is in work, and how far it is; a context manager.

    Attributes:
        done, total: samples. doing: what else it does, as ``training, step 300 of 1000``.
        task_seconds: task -> seconds that its answers took.
    """

    def __init__(self, store: Store, cell: PlannedCell, progress: Progress) -> None:
        self._store, self._cell, self._progress = store, cell, progress
        self._began, self._stop = now(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._last = time.monotonic()
        self.done, self.total = 0, sum(cell.n.values())
        self.doing = ""
        self.task_seconds: dict[str, float] = {}

    def __enter__(self) -> _Heart:
        self._write()
        self._progress(0, self.total)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._store.clear_heartbeat(self._cell.hash)

    def trained(self, step: int, steps: int) -> None:
        """So many steps of the cell's training are done."""
        self.doing = f"training, step {step:,} of {steps:,}"

    def begin_answers(self) -> None:
        """What comes next is answers: the first counts from here."""
        self._last = time.monotonic()

    def answered(self, task: str, n: int) -> None:
        """So many more samples of a task have their answer."""
        moment = time.monotonic()
        self.task_seconds[task] = self.task_seconds.get(task, 0.0) + moment - self._last
        self._last = moment
        self.done += n
        self._progress(self.done, max(self.total, self.done))

    def _beat(self) -> None:
        # a remote folder is not written to every few seconds
        while not self._stop.wait(BEAT_SECONDS if self._store.local else 6 * BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        told = {
            "name": self._cell.name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "done": self.done,
            "total": self.total,
            "doing": self.doing,
            "began": self._began,
            "beat": now(),
        }
        with contextlib.suppress(OSError):  # a full disk is found by those who must write
            self._store.write_heartbeat(self._cell.hash, told)


@contextlib.contextmanager
def _time_limit(minutes: float | None) -> Iterator[None]:
    """Raise in the body once its time is over; only the main thread can be interrupted."""
    if minutes is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: object) -> None:
        raise _TimeOver

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _evaluate(
    cell: PlannedCell, store: Store, places: Places, work: Path, heart: _Heart, options: CellOptions
) -> CellManifest:
    import torch

    began, started = now(), time.monotonic()
    _forget_peak_memory()
    begin = _begin(cell, store, places, heart)
    cached = noise_cache_arguments(options)
    arguments = commands.model_args(cell, begin, places, cached)
    model = _load(arguments, cell, options)
    model.progress = heart.answered
    load_seconds = time.monotonic() - started
    failure: Exception | None = None
    try:
        for group in commands.limit_groups(cell):
            folder = work / "runs" / group.folder
            heart.begin_answers()
            _answer(model, commands.evaluation_arguments(cell, group, arguments, folder, options.device))
            model.task_dict.clear()
    except Exception as error:  # complete or not: the samples decide
        traceback.print_exc()
        failure = error.with_traceback(None)  # whose frames would hold the model
    counts, forgone = model.noise_cache_counts, model.out_of_memory_samples
    device = str(model.device)
    peak = _peak_memory(device)
    model.progress = None
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    samples = _complete_samples(cell, work / "runs", failure)
    if forgone:
        raise CellError(
            "out of memory",
            f"{forgone} of {sum(samples.values())} samples had no room, one at a time; the other answers are kept for "
            "the next try",
        )
    store.follow(places)
    files = {path.relative_to(work).as_posix(): file_hash(path) for path in sorted(work.rglob("*")) if path.is_file()}
    return CellManifest(
        bitquake=__version__,
        hash=cell.hash,
        name=cell.name,
        samples=samples,
        files=files,
        seconds=round(time.monotonic() - started, 3),
        load_seconds=round(load_seconds, 3),
        task_seconds={task: round(seconds, 3) for task, seconds in heart.task_seconds.items()},
        peak_memory_bytes=peak,
        noise_cache=counts,
        began=began,
        machine=_machine(device),
    )


def _complete_samples(cell: PlannedCell, runs: Path, failure: Exception | None) -> dict[str, int]:
    """Task -> samples that are there.

    Raises:
        CellError: not all of them are, and why as far as that is known.
    """
    planned, found = planned_counts(runs), sample_counts(runs)
    lacking = [task for task in cell.tasks if task not in planned or found.get(task) != planned[task]]
    if not lacking:
        return {task: found[task] for task in cell.tasks}
    if failure is not None:
        raise _as_cell_error(failure, runs.parent) from failure
    if not disk_takes(runs.parent):
        raise CellError(FULL_DISK, f"{runs.parent} cannot be written")
    told = ", ".join(f"{task} {found.get(task, 0)} of {planned.get(task, '?')}" for task in lacking[:3])
    raise CellError("not complete", f"samples are missing in {len(lacking)} of {len(cell.tasks)} tasks: {told}")


def _begin(cell: PlannedCell, store: Store, places: Places, heart: _Heart) -> Begin:
    """What the model is loaded from, after its training where it has one; cells that share it wait for the first.

    Raises:
        CellError: the training failed.
    """
    if cell.training is None:
        return Begin(cell.pretrained)
    from bitquake.model_wrappers.training.config import load_training
    from bitquake.model_wrappers.training.loop import STATE_FOLDER
    from bitquake.model_wrappers.training.run import RESULT_FILE, alone, run_training

    folder = places.models / cell.training_hash
    try:
        if store.local is None:
            with alone(folder):
                if not (folder / RESULT_FILE).is_file():
                    store.fetch_training(cell.training_hash, folder, RESULT_FILE)
        trained = run_training(load_training(cell.training), folder, progress=heart.trained)
    except Exception as error:
        traceback.print_exc()
        told = _as_cell_error(error, places.models)
        raise (CellError("training", told.detail) if told.reason == "error" else told) from error
    finally:
        heart.doing = ""
    store.follow_training(cell.training_hash, folder, STATE_FOLDER)
    return commands.as_trained(
        cell, trained.pretrained, quant=trained.quant, adapter=trained.adapter or "", base=trained.base or ""
    )


def noise_cache_arguments(options: CellOptions) -> list[str]:
    """``model_args`` of the cache of corrupted pictures, which all cells of a machine share."""
    if options.noise_cache == "":
        return []
    import platformdirs

    folder = options.noise_cache or str(platformdirs.user_cache_path("bitquake", appauthor=False) / "noise")
    bound = [] if options.noise_cache_gb is None else [f"noise_cache_gb={options.noise_cache_gb:g}"]
    return [f"noise_cache={folder}", *bound]


def prepare() -> None:
    """Import what every cell needs and read lmms-eval's index of tasks: half of a minute, once in a process."""
    import lmms_eval.evaluator  # noqa: F401
    from loguru import logger

    import bitquake.model_wrappers.bitquake_hf  # noqa: F401

    logger.remove()
    # through sys.stderr as it is then: a worker gives each cell a log of its own
    logger.add(lambda line: print(line, end="", file=sys.stderr), level="INFO", colorize=False)
    _task_manager()


@cache
def _task_manager() -> Any:
    """lmms-eval's index of tasks: made once in a process."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("INFO", model_name=commands.MODEL)


def _load(arguments: str, cell: PlannedCell, options: CellOptions) -> Any:
    import numpy as np
    import torch
    from lmms_eval.models import get_model

    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[2])
    wrapper = get_model(commands.MODEL)
    model = wrapper.create_from_arg_string(
        arguments, {"batch_size": cell.arguments.get("batch_size", 1), "device": options.device}
    )
    # lmms-eval drops a model's weights after the first evaluation, and there may be more
    model.clean = lambda: None
    return model


def _answer(model: Any, words: list[str]) -> None:
    """What ``lmms-eval WORDS`` does, with a model that is loaded already."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.utils import get_datetime_str

    told = _parsed(words)
    moment = get_datetime_str(timezone=told.timezone)
    tracker = EvaluationTracker(output_path=told.output_path)
    results = simple_evaluate(
        model=model,
        model_args=told.model_args,
        tasks=_task_manager().match_tasks(told.tasks.split(",")),
        num_fewshot=told.num_fewshot,
        batch_size=told.batch_size,
        device=told.device,
        limit=told.limit,
        log_samples=True,
        evaluation_tracker=tracker,
        gen_kwargs=told.gen_kwargs,
        task_manager=_task_manager(),
        verbosity=told.verbosity,
        random_seed=told.seed[0],
        numpy_random_seed=told.seed[1],
        torch_random_seed=told.seed[2],
        fewshot_random_seed=told.seed[3],
        cli_args=told,
        datetime_str=moment,
        process_docs_parallel=told.process_docs_parallel,
    )
    samples = results.pop("samples")
    # of a model that is passed in they note the object, which the files of a command do not hold
    results["config"]["model"] = tracker.general_config_tracker.model_source = told.model
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=moment)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])


def _parsed(words: list[str]) -> argparse.Namespace:
    """lmms-eval's options as its command would have them; its parser reads the command line and nothing else."""
    from lmms_eval.__main__ import parse_eval_args

    before = sys.argv
    sys.argv = ["lmms-eval", *words]
    try:
        told: argparse.Namespace = parse_eval_args()[1]
    finally:
        sys.argv = before
    return told


def _machine(device: str) -> dict[str, str]:
    import torch

    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    shown = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "device": shown,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
        "host": hashlib.blake2b(socket.gethostname().encode(), digest_size=6).hexdigest(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _forget_peak_memory() -> None:
    """Let the peak of memory begin anew: a worker's earlier cell may have been a larger one."""
    with contextlib.suppress(OSError):  # Linux only, and not where it is forbidden
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(device: str) -> int:
    """Bytes: of the device on CUDA, else of this process."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
