"""Runs cells on Ray: one task for each, on whatever machines the cluster has, or on a Ray of this machine alone.

The driver holds nothing but events. Workers write their cells to the output folder themselves, and a cell is there
whole or not at all, so that a worker that outlives its driver does no harm and a driver that is started again goes on
with what is missing. A worker process stays for many cells; one with a GPU ends with its cell, for only its end gives
the GPU back. What travels through Ray is the cell as JSON, the answer as JSON, and counts of samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bitquake import __version__
from bitquake.suite.driver import (
    GRACE_SECONDS,
    CellError,
    CellOptions,
    Event,
    Outcome,
    RunOptions,
    SuiteStopped,
    Tell,
    fail,
    next_cell,
    run_order,
    worker_environment,
)
from bitquake.suite.estimate import estimate, size
from bitquake.suite.local import last_lines
from bitquake.suite.mailbox import Beat, Mailbox
from bitquake.suite.store import Store, open_store
from bitquake.suite.worker_process import print_to
from bitquake.suite_plan import CellManifest, PlannedCell, SuitePlan

TRIES = 3
"""How often a cell is begun when workers or machines die under it; then it counts as failed."""
REACH_SECONDS = 15.0
"""For a cluster to answer."""
_LISTEN_SECONDS = 4.0
_LOCAL = re.compile(r"local:([1-9]\d*)")
_HOST = re.compile(r"(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_OBJECT_STORE_BYTES = 80_000_000
"""The least that Ray takes, nearly: what it holds are a cell's name and its answer."""
_POLL_SECONDS = 0.5
_NODES_SECONDS = 30.0
"""Between two looks at the machines of the cluster."""
_PATIENCE_SECONDS = 600.0
"""For a machine that fits a cell to join a cluster that has none."""
_PROGRESS_SECONDS = 2.0
_WATCH_SECONDS = 0.2
_GPU_BYTES, _GPU_ROOM = 80e9, 1.2
"""A GPU's memory and what a model needs beyond its weights, to guess how many a model on several GPUs takes."""
_MOST_CORES = 8
"""For a cell with a GPU: it prepares pictures on them."""
_PROBE = """\
import logging, sys
logging.disable()
import ray
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
"""


class RayUnavailable(ValueError):
    """A Ray that cannot be used: it is not installed, does not answer, or its address cannot be read."""


class _Need(NamedTuple):
    """What a cell takes of a machine: cores, GPUs, bytes of memory."""

    cores: float
    gpus: float
    memory: int

    def fits(self, machine: Mapping[str, float]) -> bool:
        return machine.get("CPU", 0.0) >= self.cores and machine.get("GPU", 0.0) >= self.gpus

    def __str__(self) -> str:
        return f"{self.cores:g} cores" + (f", {self.gpus:g} GPUs" if self.gpus else "") + f", {size(self.memory)}"


@dataclass
class _Running:
    """A cell that Ray has: its task, which try it is, since when and where it runs ("" while it waits)."""

    cell: PlannedCell
    task: Any
    tries: int
    need: _Need
    asked: float
    began: float = 0.0
    worker: str = ""
    overdue: bool = False


def run_on_ray(
    plan: SuitePlan, cells: Sequence[PlannedCell], out: str, options: RunOptions, tell: Tell, *, address: str
) -> Outcome:
    """Run cells on a Ray cluster; see ``driver.Driver``. A worker or machine that dies costs a try of its cell.

    Args:
        address: ``auto`` for the cluster that this machine belongs to, ``HOST:PORT`` of one, or ``local:N`` for one of
            this machine that begins and ends here and has N cells at once.
        options: ``threads``: cores of each cell (default: of ``local:N``, the machine's, shared; of a cluster, with a
            GPU, those that come with it, else one). ``jobs`` has no meaning here.

    Raises:
        RayUnavailable: Ray is not there.
        SuiteStopped: the cluster is lost, or no further cell can succeed.
    """
    device = options.cell.device or ""
    if device.startswith("cuda:"):
        raise RayUnavailable(f"--device {device}: Ray gives each cell its GPU; say --device cuda")
    with _connected(address, options.threads) as cluster:
        return _Run(plan, cells, out, options, tell, cluster).run()


# the cluster


class _Cluster(NamedTuple):
    """A Ray that this process is connected to.

    Attributes:
        cells: at once, of a Ray of this machine; 0 for a cluster. threads: of each cell; None: not decided.
    """

    ray: Any
    cells: int
    threads: int | None

    def machines(self) -> list[dict[str, float]]:
        """Resources of every machine that is alive."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def _connected(address: str, threads: int | None) -> Iterator[_Cluster]:
    local = _LOCAL.fullmatch(address)
    if local is None:
        _check_address(address)
    ray = _import_ray()
    if ray.is_initialized():
        raise RayUnavailable("--ray: this process is connected to a Ray already; call ray.shutdown() first")
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    session = ""
    try:
        if local is None:
            _reach(address)
            ray.init(address=address, **quiet)
            cluster = _Cluster(ray, 0, threads)
        else:
            n = int(local[1])
            cores = threads or max(1, (os.cpu_count() or 1) // n)
            # of the loopback device: nobody else's business
            context = ray.init(
                address="local",
                num_cpus=n * cores,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
            session = context.address_info["session_dir"]
            cluster = _Cluster(ray, n, cores)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        logger.setLevel(level)
        if isinstance(error, RayUnavailable):
            raise
        raise RayUnavailable(f"--ray {address}: Ray cannot be started or joined: {_one_line(error)}") from error
    # Ray prints a paragraph over the live view for each worker that dies, and no option ends that
    ray._private.worker._worker_logs_enabled = False
    try:
        yield cluster
    finally:
        ray.shutdown()
        logger.setLevel(level)
        if session:
            shutil.rmtree(session, ignore_errors=True)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by the processes that Ray starts
    try:
        import ray
    except ImportError as error:
        raise RayUnavailable(f'--ray: Ray cannot be imported ({error}); pip install "bitquake[ray]"') from error
    return ray


def _check_address(address: str) -> None:
    """Refuse what is no address, and one where nothing listens, without waiting for Ray's own minutes.

    Raises:
        RayUnavailable: it says which.
    """
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise RayUnavailable(
            f"--ray {address}: Ray Client is not used; start `bitquake run --ray auto` on a machine of the cluster, or "
            "`ray job submit -- bitquake run … --ray auto`"
        )
    found = _HOST.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise RayUnavailable(f"--ray {address}: expected auto, HOST:PORT (Ray's port is 6379 by default), or local:N")
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=_LISTEN_SECONDS).close()
    except OSError as error:
        raise RayUnavailable(
            f"--ray {address}: nothing answers there ({_one_line(error)}); `ray status` on the head node tells "
            "whether the cluster is up, and `ray start --head` starts one"
        ) from error


def _reach(address: str) -> None:
    """Try in a process of its own: Ray itself takes minutes to give up, writing a line every second.

    Raises:
        RayUnavailable: no cluster answers.
    """
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=REACH_SECONDS, check=False
        )
        code, told = done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        code, told = -1, (error.stderr or b"").decode("utf-8", "replace") if error.stderr else ""
    if code == 0:
        return
    if "InvalidAuthToken" in told or "AuthenticationError" in told:
        raise RayUnavailable(
            f"--ray {address}: the cluster wants its token; put it into ~/.ray/auth_token and set RAY_AUTH_MODE=token"
        )
    lines = [line for line in told.splitlines() if line and not line.startswith((" ", "[", "Traceback"))]
    why = (
        f"no answer of a Ray cluster within {REACH_SECONDS:g} s" if code == -1 else lines[-1] if lines else "it failed"
    )
    raise RayUnavailable(
        f"--ray {address}: {why}; `ray start --head` starts a cluster, `--ray local:2` runs on this machine"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# the driver


class _Run:
    def __init__(
        self,
        plan: SuitePlan,
        cells: Sequence[PlannedCell],
        out: str,
        options: RunOptions,
        tell: Tell,
        cluster: _Cluster,
    ) -> None:
        self.cluster, self.ray = cluster, cluster.ray
        self.store: Store = open_store(out)
        self.places = self.store.places(options.scratch)
        self.options, self.tell = options, tell
        self.waiting = run_order(cells)
        self.tries: dict[str, int] = {}
        self.trained: dict[str, str] = {}
        """Hash of a training that is finished -> the machine where it was done."""
        self.running: dict[Any, _Running] = {}
        self.outcome = Outcome()
        self.needs = _needs(plan, self.waiting, cluster, options.cell)
        threads = {int(need.cores) for need in self.needs.values()} or {1}
        self.environment = worker_environment(plan, max(threads))
        self.fixed = {
            "out": self.store.url,
            "scratch": str(options.scratch),
            "options": dataclasses.asdict(options.cell),
            "bitquake": __version__,
            "driver": os.getpid() if cluster.cells else 0,
            "every": _PROGRESS_SECONDS,
        }
        # without cores of its own, and on this machine, where it is read
        mailbox = self.ray.remote(num_cpus=0, max_restarts=-1)(Mailbox)
        here = _on_node(self.ray.get_runtime_context().get_node_id())
        self.mailbox = mailbox.options(scheduling_strategy=here).remote()
        common = {"max_retries": 0, "runtime_env": {"env_vars": self.environment}}
        self.task = self.ray.remote(**common)(_work)
        self.gpu_task = self.ray.remote(num_gpus=1, max_calls=1, **common)(_work)
        self.looked, self.machines = -math.inf, list[dict[str, float]]()

    def run(self) -> Outcome:
        try:
            self._hand_out()
            while self.running:
                # all of them: what is ready is worked off at once, and Ray has the next cells already
                ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=_POLL_SECONDS)
                self._read_mailbox()
                for task in ready:
                    self._ended(self.running.pop(task))
                self._hand_out()
                self._end_overdue()
                self._give_up_unplaceable()
        except BaseException as error:
            self._cancel()
            if isinstance(error, self.ray.exceptions.RayError):
                raise SuiteStopped(_LOST) from error
            raise
        return self.outcome

    def _hand_out(self) -> None:
        """Give Ray every cell that waits for no training: it has the machines and knows which is free."""
        while True:
            working = [one.cell for one in self.running.values()]
            cell = next_cell(self.waiting, working, self.trained.__contains__)
            if cell is None:
                return
            self.waiting.remove(cell)
            need = self.needs[cell.model]
            tries = self.tries[cell.hash] = self.tries.get(cell.hash, 0) + 1
            task = self.gpu_task if need.gpus else self.task
            options: dict[str, Any] = {"num_cpus": need.cores, "memory": need.memory, "name": cell.name}
            if need.gpus:
                options["num_gpus"] = need.gpus
            if self.store.local is None and cell.training_hash in self.trained:
                options["scheduling_strategy"] = _on_node(self.trained[cell.training_hash])  # the model is there
            request = json.dumps({**self.fixed, "cell": cell.model_dump(mode="json"), "tries": tries})
            reference = task.options(**options).remote(request, self.mailbox)
            self.running[reference] = _Running(cell, reference, tries, need, time.monotonic())

    def _read_mailbox(self) -> None:
        try:
            beats = self.ray.get(self.mailbox.take.remote(), timeout=5.0)
        except self.ray.exceptions.RayError:  # its process has died and is begun anew: only counts are lost
            return
        by_hash = {one.cell.hash: one for one in self.running.values()}
        for cell_hash, beat in beats.items():
            one = by_hash.get(cell_hash)
            if one is not None and one.tries == beat.tries:
                self._heard(one, beat)

    def _heard(self, one: _Running, beat: Beat) -> None:
        self._started(one, beat.worker)
        if beat.done:
            if one.cell.training_hash:
                self.trained.setdefault(one.cell.training_hash, beat.node)
            self.tell(Event("progress", one.cell.hash, beat.worker, beat.done, beat.total))

    def _started(self, one: _Running, worker: str) -> None:
        if not one.began:
            one.began, one.worker = time.monotonic(), worker
            again = f"try {one.tries} of {TRIES}: its worker died" if one.tries > 1 else ""
            self.tell(Event("started", one.cell.hash, worker, detail=again))

    def _ended(self, one: _Running) -> None:
        errors = self.ray.exceptions
        try:
            answer = json.loads(self.ray.get(one.task))
        except errors.RayTaskError as error:
            self._broken(one, error)
        except errors.RuntimeEnvSetupError as error:
            raise SuiteStopped(f"a worker cannot start: {_one_line(error)}") from error
        except errors.LocalRayletDiedError as error:
            raise SuiteStopped(_LOST) from error
        except errors.RayError as error:
            self._lost(one, error)
        else:
            self._started(one, answer["worker"])
            if "manifest" in answer:
                self._finished(one, CellManifest.model_validate(answer["manifest"]), answer["node"], answer["host"])
            else:
                self._failed(one, answer["reason"], answer["detail"], answer["log"], answer["host"])

    def _finished(self, one: _Running, manifest: CellManifest, node: str, host: str) -> None:
        if not isinstance(self.store.cell(one.cell.hash), CellManifest):
            detail = f"{host} has finished it, but it is not in {self.store.url} as this machine sees it"
            self._failed(one, "not there", f"{detail}; give --out on a disk that all machines share, or a bucket")
            return
        if one.cell.training_hash:
            self.trained.setdefault(one.cell.training_hash, node)
        self.outcome.finished[one.cell.hash] = manifest
        self.tell(Event("finished", one.cell.hash, one.worker, manifest=manifest))

    def _broken(self, one: _Running, error: Any) -> None:
        """Not the cell but what is around it raised: an environment that differs from this one, as a rule."""
        if isinstance(error.cause, ImportError):
            raise SuiteStopped(
                f"a worker cannot start ({_one_line(error.cause)}); every machine of the cluster needs Bitquake "
                f"{__version__} with its extras in the environment that runs Ray"
            ) from error
        self._started(one, "")
        self._failed(one, "error", _one_line(error.cause or error))

    def _lost(self, one: _Running, error: BaseException) -> None:
        """A worker or its machine died: the cell goes back into the queue, unless it did so too often."""
        self.store.clear_heartbeat(one.cell.hash)
        if one.overdue:
            self._failed(one, "time", f"not finished within {self.options.cell.minutes:g} minutes, and stuck")
        elif one.tries < TRIES:
            self.waiting.append(one.cell)
        else:
            memory = isinstance(error, self.ray.exceptions.OutOfMemoryError)
            detail = f"its worker died {one.tries} times, the last time: {_one_line(error)}"
            self._started(one, "")
            self._failed(one, "out of memory" if memory else "worker died", detail)

    def _failed(self, one: _Running, reason: str, detail: str, log: str = "", host: str = "") -> None:
        log = log or last_lines(self.places.logs / f"{one.cell.hash}.log")
        error = CellError(reason, detail)
        fail(self.store, self.outcome, self.tell, one.cell, error, log=log, worker=one.worker, host=host)

    def _end_overdue(self) -> None:
        minutes = self.options.cell.minutes
        if minutes is None:
            return
        for one in self.running.values():
            if one.began and not one.overdue and time.monotonic() - one.began > 60 * minutes + GRACE_SECONDS:
                one.overdue = True
                self.ray.cancel(one.task, force=True)

    def _give_up_unplaceable(self) -> None:
        """Cells that no machine of the cluster can hold would wait for ever."""
        patience = 0.0 if self.cluster.cells else _PATIENCE_SECONDS
        moment = time.monotonic()
        if moment - self.looked >= _NODES_SECONDS:
            self.looked, self.machines = moment, self.cluster.machines()
        for task, one in list(self.running.items()):
            if one.began or moment - one.asked < patience or any(one.need.fits(machine) for machine in self.machines):
                continue
            self.ray.cancel(task)
            del self.running[task]
            there = sorted({f"{one.get('CPU', 0):g} cores and {one.get('GPU', 0):g} GPUs" for one in self.machines})
            self._started(one, "")
            detail = f"it needs {one.need}; the cluster's machines have {' or '.join(there) or 'nothing'}"
            self._failed(one, "no machine", detail)

    def _cancel(self) -> None:
        """End what still runs; no error of a Ray that is gone may hide why."""
        with contextlib.suppress(Exception):
            for task in self.running:
                self.ray.cancel(task, force=True)
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=3.0)
        for one in self.running.values():
            if one.began:
                self.store.clear_heartbeat(one.cell.hash)


_LOST = "the Ray cluster is lost. Finished cells are safe; run the same command again when it is back"


def _on_node(node: str) -> Any:
    """Scheduling strategy: on that machine, elsewhere only when it is gone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=True)


def _needs(plan: SuitePlan, cells: Sequence[PlannedCell], cluster: _Cluster, options: CellOptions) -> dict[str, _Need]:
    """Model -> what each of its cells takes, by the plan's estimate; no more memory than a machine that fits has."""
    machines = cluster.machines()
    gpus = max((machine.get("GPU", 0.0) for machine in machines), default=0.0)
    on_gpus = options.device == "cuda" or (options.device is None and gpus > 0)
    cores = cluster.threads or (_cores_of_a_gpu(machines) if on_gpus else 1)
    found = {}
    for model in {cell.model for cell in cells}:
        own = [cell for cell in cells if cell.model == model]
        # an estimate: it keeps cells apart, and refuses none
        weight = estimate(plan, own, {}, 1).memory_bytes or 0
        share = 0.0
        if on_gpus and cluster.cells:
            share = min(1.0, math.floor(1e4 * gpus / cluster.cells) / 1e4)
        elif on_gpus:
            spread = any("device_map" in cell.arguments for cell in own)
            share = float(max(1, math.ceil(weight * _GPU_ROOM / _GPU_BYTES))) if spread else 1.0
        need = _Need(float(cores), share, weight)
        rooms = [int(machine.get("memory", 0.0)) for machine in machines if need.fits(machine)]
        found[model] = need._replace(memory=min(weight, max(rooms, default=weight)))
    return found


def _cores_of_a_gpu(machines: Sequence[Mapping[str, float]]) -> int:
    ratios = [machine.get("CPU", 0.0) / machine["GPU"] for machine in machines if machine.get("GPU", 0.0) >= 1]
    return max(1, min(_MOST_CORES, int(min(ratios, default=1.0))))


# the worker


def _work(request: str, mailbox: Any) -> str:
    """A task: one cell in a worker process. Takes and gives JSON; what the cell printed is in its log."""
    import ray

    told = json.loads(request)
    cell = PlannedCell.model_validate(told["cell"])
    logs = open_store(told["out"]).places(Path(told["scratch"])).logs
    context = ray.get_runtime_context()
    host = socket.gethostname()
    who = {"worker": f"{host}:{os.getpid()}", "node": context.get_node_id(), "host": host}
    if told["bitquake"] != __version__:
        detail = f"{host} has Bitquake {__version__}, the driver {told['bitquake']}; install the same on both"
        return json.dumps({**who, "reason": "version", "detail": detail, "log": ""})
    if told["driver"]:
        _end_with(told["driver"])
    last = -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == 0 or time.monotonic() - last >= told["every"]:
            last = time.monotonic()
            mailbox.put.remote(cell.hash, Beat(told["tries"], who["worker"], who["node"], done, total))

    progress(0, sum(cell.n.values()))
    log = logs / f"{cell.hash}.log"
    with contextlib.suppress(OSError):  # without a log then; a full disk is found by those who must write
        logs.mkdir(parents=True, exist_ok=True)
    print_to(log)
    _prepare()
    from bitquake.suite.worker import run_cell

    try:
        manifest = run_cell(cell, told["out"], Path(told["scratch"]), progress, CellOptions(**told["options"]))
    except CellError as error:
        return json.dumps({**who, "reason": error.reason, "detail": error.detail, "log": last_lines(log)})
    return json.dumps({**who, "manifest": manifest.model_dump(mode="json")})


@cache
def _prepare() -> None:
    """What every cell needs, once in a process."""
    from bitquake.suite.worker import prepare

    prepare()


@cache
def _end_with(driver: int) -> None:
    """End this process as soon as the driver has: Ray takes seconds to, and a new driver may be there by then."""

    def watch() -> None:
        while True:
            try:
                os.kill(driver, 0)
            except OSError:
                os._exit(3)
            time.sleep(_WATCH_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
