"""How component processes start: as a fresh interpreter, or forked from the zygote."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from triptych.actors.supervision._child_process import ChildProcess, module_command, spawn_process
from triptych.actors.supervision._component_specs import PRELOAD
from triptych.actors.supervision._process_tree import adopt_orphans
from triptych.actors.supervision._zygote_client import ForkUnavailableError, ZygoteClient
from triptych.backoff import backoff_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FIRST_BACKOFF_S: Final = 0.5
_LAST_BACKOFF_S: Final = 60.0
_log = structlog.stdlib.get_logger("actors")


NO_CUDA: Final = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Environment variables that keep a process from opening the driver of the GPUs.

The model libraries query devices when they are imported. That alone makes CUDA unusable in every fork of the process,
and some queries take half a gigabyte of the GPU. Without the second variable, torch queries the driver even if no
device is visible.
"""


class LauncherClosedError(Exception):
    """The launcher is closed and starts no more processes."""


class Launcher:
    """Starts processes that run `python -m triptych.actors.supervision.component_process`, as children of this process.

    Args:
        preload: Modules that the zygote imports; with () there is no zygote, and every start is a fresh interpreter.
        environment: Variables that every child gets besides those of this process.

    A child that computes on a CUDA device is always a fresh interpreter, since CUDA does not survive a fork; no other
    child sees such a device.
    """

    def __init__(self, *, preload: Sequence[str] = PRELOAD, environment: Mapping[str, str] | None = None) -> None:
        self._preload = tuple(preload)
        # Processes that a child starts, such as compiler workers, must not import from the current folder either.
        own = {**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})}
        self._on_gpu = {**own, **gpu_environment(own)}
        self._environment = {**own, **NO_CUDA}
        self._zygote: ZygoteClient | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._fork_finished = asyncio.Event()
        self._closed = False

    @property
    def in_flight(self) -> bool:
        """Whether a fork runs whose pid is not known yet."""
        return self._in_flight > 0

    @property
    def zygote_pid(self) -> int:
        """Process id of the zygote, 0 if there is none."""
        return self._zygote.pid if self._zygote is not None else 0

    def open(self) -> None:
        """Start the zygote in the background, if modules are to be preloaded."""
        if self._preload and self._keeper is None:
            adopt_orphans()
            self._zygote = self._spawn_zygote()
            self._keeper = asyncio.get_running_loop().create_task(self._keep_zygote_alive(), name="zygote keeper")

    async def start(self, arguments: Sequence[str], *, forked: bool, on_gpu: bool = False) -> ChildProcess:
        """Start a component process with these arguments; `on_gpu`: it computes on a CUDA device.

        If the zygote cannot fork, a fresh interpreter starts instead, which is only slower. Raises
        `LauncherClosedError`, and `OSError` when the system has no room for a process.
        """
        if forked and self._preload and not on_gpu:
            try:
                return await self._fork(arguments)
            except ForkUnavailableError as gone:
                if not self._closed:
                    _log.warning("cannot fork, starting a fresh interpreter", reason=str(gone))
        if self._closed:
            raise LauncherClosedError("the supervisor is stopping")
        command = (
            *module_command("triptych.actors.supervision.component_process"),
            *arguments,
            "--parent",
            str(os.getpid()),
        )
        return ChildProcess(spawn_process(command, self._on_gpu if on_gpu else self._environment))

    async def close(self) -> None:
        """Kill the zygote; each waiting `start` gets its process or `LauncherClosedError` before this returns."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._zygote is not None:
            await self._zygote.kill()
        while self._in_flight:  # each fork that was asked for has a process by then, or has failed
            self._fork_finished.clear()
            await self._fork_finished.wait()

    async def _fork(self, arguments: Sequence[str]) -> ChildProcess:
        zygote = self._zygote
        if self._closed or zygote is None:
            raise ForkUnavailableError("there is no zygote")
        self._in_flight += 1
        try:
            pid = await zygote.fork((*arguments, "--parent", str(os.getpid())))
            return ChildProcess(pid)
        finally:
            self._in_flight -= 1
            self._fork_finished.set()

    def _spawn_zygote(self) -> ZygoteClient:
        return ZygoteClient(self._preload, self._environment)

    async def _keep_zygote_alive(self) -> None:
        """Restart the zygote whenever it ends, with backoff if it ends before it is warm."""
        pauses = 0
        while self._zygote is not None:
            ending = await self._zygote.wait()
            _log.warning("zygote ended, starting a new one", ending=str(ending), pid=self._zygote.pid)
            if self._zygote.was_warm:
                pauses = 0
            else:
                await asyncio.sleep(backoff_s(pauses, first_s=_FIRST_BACKOFF_S, longest_s=_LAST_BACKOFF_S))
                pauses += 1
            while True:
                try:
                    self._zygote = self._spawn_zygote()
                    break
                except OSError as error:  # until then, starts are fresh interpreters
                    _log.warning("the zygote cannot be started", error=str(error))
                    await asyncio.sleep(backoff_s(pauses, first_s=_FIRST_BACKOFF_S, longest_s=_LAST_BACKOFF_S))
                    pauses += 1


def gpu_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables for a process that computes on a GPU. Pure.

    Variables that the user has set are kept. Expandable segments reduce the fragmentation of memory by roles that share
    a GPU. With workspaces of a fixed size, cuBLAS gives the same bits each time.
    """
    wanted = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # its older name
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {key: value for key, value in wanted.items() if key not in environment}


QUIET: Final = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
"""Variables that silence the model libraries, which warn of optional packages at each import; errors still raise."""


def quiet_libraries() -> None:
    """Set the variables of `QUIET` in this process, except those that the user has set."""
    os.environ.update({name: level for name, level in QUIET.items() if name not in os.environ})


def usable_cores(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the cores that this process may use: its CPU affinity, bounded by the CPU time of its cgroups."""
    cores = float(len(os.sched_getaffinity(0)))
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents) if number == "0" else ():
            limit = cgroups / folder / "cpu.max"
            if limit.exists():  # "QUOTA PERIOD", in microseconds
                quota, period = limit.read_text().split()
                cores = cores if quota == "max" else min(cores, int(quota) / int(period))
    return max(1, int(cores))


def thread_environment(environment: Mapping[str, str], cores: int) -> dict[str, str]:
    """Return environment variables that give the computation of each process all cores. Pure.

    The number of threads that share a sum decides how it is rounded, so with all cores the bits are those of a plain
    pipeline on this machine; and a role that computes alone uses the cores that others leave idle. Waiting threads
    sleep: by default they spin, and processes that compute at the same time would take the cores from each other.

    Variables that the user has set are kept. OpenBLAS would start its threads when it is imported, before the fork.
    With huge pages, torch allocates large blocks of memory on the CPU in a fraction of the time.
    """
    wanted = {**QUIET, "OPENBLAS_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if "OMP_NUM_THREADS" not in environment:
        wanted |= {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    return {key: value for key, value in wanted.items() if key not in environment}
