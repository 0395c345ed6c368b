"""What `triptych up` runs: a supervisor of all components, of those of one host, or with `--only` one for each."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop
from setproctitle import setproctitle

from triptych.actors.errors import OF_THE_MACHINE, StartError
from triptych.actors.runtime import diagnostics, logs
from triptych.actors.runtime.actor import Incarnation
from triptych.actors.runtime.address_book import CHILDREN, SUPERVISOR, AddressBook, supervisor_of
from triptych.actors.runtime.bus_keys import make_bus_keys
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.supervision._component_specs import COMPONENT_SPECS, PRELOAD
from triptych.actors.supervision._generation_counter import GenerationCounter
from triptych.actors.supervision._host_reporter import HostReporter
from triptych.actors.supervision._launcher import Launcher, thread_environment, usable_cores
from triptych.actors.supervision._ownership import Owner, lock_components, lock_folder
from triptych.actors.supervision._process_tree import adopt_orphans, kill_orphans
from triptych.actors.supervision._supervisor import Supervisor
from triptych.actors.topology import paths
from triptych.actors.topology.placed_hosts import read_placed_hosts
from triptych.bus import AddressError, remove_if_stale

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from triptych.actors.runtime.actor import Actor
    from triptych.actors.runtime.system_messages import ChildReport
    from triptych.actors.supervision._component_specs import ComponentSpec
    from triptych.actors.topology import Component, Topology

EXIT_NOTHING_LEFT: Final = 1
EXIT_CANNOT_SERVE: Final = 2
_ORPHANS_EVERY_S: Final = 1.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_log = structlog.stdlib.get_logger("actors")


class SupervisorProcess:
    """Supervises components of a topology until it is told to stop, or until no component is left to run.

    Args:
        topology: Of the whole system.
        only: Names of the components to run, each under a supervisor of its own; () runs all, under one.
        host: Name of the one of several hosts whose components to run; "" without `[[hosts]]`.
        until_eof: Whether the end of stdin asks it to stop, as SIGTERM does.
        specs: How each kind of component is built.
        preload: Modules that the zygote imports.
        on_change: Called with the report of a child whenever it changes.
        side_task: A coroutine function that runs on the same loop until the end.

    Raises `UnknownNameError` for a name in `only`, or a host, that the topology does not have.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        only: Sequence[str] = (),
        host: str = "",
        until_eof: bool = False,
        specs: Mapping[str, ComponentSpec] = COMPONENT_SPECS,
        preload: Sequence[str] = PRELOAD,
        on_change: Callable[[ChildReport], None] | None = None,
        side_task: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.topology = topology
        everything = topology.on_host(host) if host else topology.components
        self.components = tuple(topology.component(name) for name in only) or everything
        self._only = bool(only)
        self._host = host if len(topology.hosts) > 1 else ""
        self._runs_on = host or next((component.host for component in self.components), "")
        self._until_eof = until_eof
        self._specs = specs
        self._preload = preload
        self._on_change = on_change
        self._side_task = side_task or _no_side_task
        self._stop_requests = 0
        self.problem = ""
        """Why `run` ended with `EXIT_CANNOT_SERVE`, as a sentence for the user."""

    def run(self) -> int:
        """Run on a new event loop, and return the exit code.

        It is 0 after a stop that was asked for, `EXIT_CANNOT_SERVE` when the components can never work as configured,
        and `EXIT_NOTHING_LEFT` when none is left to run for another reason.

        Raises `AlreadyRunningError`, `ForeignStateError`, `PermissionError`, and `StartError` when a folder or the key
        of the bus cannot be used.
        """
        on = f" on {self._host}" if self._host else ""
        setproctitle(f"triptych: {SUPERVISOR} of {self.topology.path.name}{on}")
        os.umask(0o077)  # for the children as well: only this user may read prompts and results
        adopt_orphans()
        try:
            with contextlib.ExitStack() as held:
                self._acquire_folders(held)
                held.callback(logs.keep(self.topology.log_dir, self._log_name, 0, self.topology.log_bytes))
                make_bus_keys(self.topology, self._runs_on)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    try:
                        return runner.run(self._serve())
                    finally:
                        self._remove_sockets()
        finally:
            with contextlib.suppress(OSError):  # another supervisor of this topology still uses it
                self.topology.run_dir.rmdir()

    def _acquire_folders(self, held: contextlib.ExitStack) -> None:
        """Make the folders of the system, and hold their locks until the end."""
        topology = self.topology
        try:
            paths.private_run_dir(topology.run_dir)
            paths.private_state_dir(topology.state_dir)
            owner = Owner(
                topology=str(topology.path),
                state_dir=str(topology.state_dir.resolve()),
                run_dir=str(topology.run_dir),
                models=tuple(filter(None, (model.identity for model in topology.models))),
                pid=os.getpid(),
            )
            held.enter_context(lock_folder(topology.state_dir, owner, keep=True))
            held.enter_context(lock_folder(topology.run_dir, owner, keep=False))
            held.enter_context(lock_components(topology.state_dir, [component.name for component in self.components]))
            # systemd-tmpfiles does not remove a locked folder or its files, however old.
            folder = os.open(topology.run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_SH)
        except PermissionError:
            raise
        except OSError as error:
            raise StartError(f"{error.filename} cannot be used: {error.strerror}") from error

    def _remove_sockets(self) -> None:
        """Remove the sockets of killed processes; the others have removed their own."""
        for component in self.components:
            if component.address.startswith("ipc://"):
                with contextlib.suppress(AddressError):  # in use by a process that is not our child: ours have ended
                    remove_if_stale(Path(component.address.removeprefix("ipc://")))

    async def _serve(self) -> int:
        generations = self._generation_counter()
        launcher = self._launcher(usable_cores())
        supervisors = self._supervisors(generations, launcher)
        generation = max(generations.next(supervisor.name) for supervisor in supervisors)
        reporters: list[Actor] = [HostReporter(supervisor_of(self._host), supervisors[0])] if self._reports else []
        runtime = Runtime(
            [*reporters, *supervisors[::-1]],  # the last to start drains first
            Incarnation(AddressBook(self.topology, host=self._runs_on), generation, kind=SUPERVISOR),
            shutdown_s=None,  # each child has its own bound
        )
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started under nohup: it is to outlive its terminal
            loop.add_signal_handler(number, self._on_stop_signal, number, runtime, supervisors)
        loop.add_signal_handler(signal.SIGUSR1, diagnostics.dump_tasks, runtime)
        if self._until_eof:
            threading.Thread(target=_stop_at_eof, args=(loop, runtime), name="stdin", daemon=True).start()
        async with runtime:
            supervisors[0].spawn(_kill_orphans_forever(supervisors, launcher), name="orphans")
            supervisors[0].spawn(self._side_task(), name="side task")
            over = asyncio.ensure_future(runtime.wait())
            all_done = asyncio.ensure_future(_wait_all_done(supervisors))
            await asyncio.wait({over, all_done}, return_when=asyncio.FIRST_COMPLETED)
            nothing_left = not over.done()
            for task in (over, all_done):
                task.cancel()
        await asyncio.gather(over, return_exceptions=True)  # the runtime raises a crash itself
        self.problem = next((supervisor.problem for supervisor in supervisors if supervisor.problem), "")
        if self.problem:
            return EXIT_CANNOT_SERVE
        return EXIT_NOTHING_LEFT if nothing_left else 0

    @property
    def _reports(self) -> bool:
        """Whether this is the supervisor of one of several hosts, which the others ask how it is."""
        return bool(self._host) and not self._only

    @property
    def _log_name(self) -> str:
        """The name of this process in its log: with `--only` that of the first component's supervisor."""
        if self._reports:
            return supervisor_of(self._host)
        return supervisor_of(self.components[0].name) if self._only else SUPERVISOR

    def _generation_counter(self) -> GenerationCounter:
        placed = read_placed_hosts()
        if placed is None:
            return GenerationCounter(self.topology.state_dir / "generations")
        return GenerationCounter(Path(placed.generations), placed.clock_ahead_ms)

    def _launcher(self, cores: int) -> Launcher:
        forks = any(self._specs[c.kind].forked and not c.on_gpu for c in self.components)
        threads = thread_environment(os.environ, cores)
        return Launcher(preload=self._preload if forks else (), environment=threads)

    def _supervisors(self, generations: GenerationCounter, launcher: Launcher) -> list[Supervisor]:
        def supervisor(name: str, components: Sequence[Component]) -> Supervisor:
            return Supervisor(
                name,
                self.topology,
                components,
                specs=self._specs,
                generations=generations,
                launcher=launcher,
                on_change=self._on_change,
            )

        if self._reports:
            return [supervisor(supervisor_of(self._host) + CHILDREN, self.components)]
        if not self._only:
            return [supervisor(SUPERVISOR, self.components)]
        return [supervisor(supervisor_of(component.name), [component]) for component in self.components]

    def _on_stop_signal(self, number: signal.Signals, runtime: Runtime, supervisors: list[Supervisor]) -> None:
        self._stop_requests += 1
        if self._stop_requests == 1:
            runtime.stop(number.name)
            return
        _log.warning("asked again to stop, killing all children")
        for supervisor in supervisors:
            supervisor.kill_all()


def _stop_at_eof(loop: asyncio.AbstractEventLoop, runtime: Runtime) -> None:
    """Read stdin to its end on a thread, which suits a pipe, a file and a terminal alike; then ask to stop."""
    try:
        while os.read(0, 1 << 16):
            pass
    except OSError as error:  # a closed stdin or a terminal that is gone says no more, either
        _log.info("stdin cannot be read", reason=str(error))
    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
        loop.call_soon_threadsafe(runtime.stop, "the end of stdin")


async def _wait_all_done(supervisors: list[Supervisor]) -> None:
    for supervisor in supervisors:
        await supervisor.done.wait()


async def _kill_orphans_forever(supervisors: list[Supervisor], launcher: Launcher) -> None:
    while True:
        await asyncio.sleep(_ORPHANS_EVERY_S)
        if launcher.in_flight:
            continue
        pids = [pid for supervisor in supervisors for pid in supervisor.pids]
        try:
            kill_orphans(frozenset((*pids, launcher.zygote_pid)))
        except OSError as error:
            if error.errno not in OF_THE_MACHINE:
                raise
            _log.warning("cannot look for orphans", error=str(error))


async def _no_side_task() -> None:
    """No-op."""
