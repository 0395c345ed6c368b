"""The process that `triptych up` is: one supervisor, or a small one for each component with `--only`."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
import uvloop
from setproctitle import setproctitle

from triptych.actors import diagnostics, places
from triptych.actors.addresses import SUPERVISOR, AddressBook, supervisor_of
from triptych.actors.components import PARTS, PRELOAD
from triptych.actors.errors import OF_THE_MACHINE, StartFailure
from triptych.actors.generations import Generations
from triptych.actors.keys import make_keys
from triptych.actors.launcher import Launcher, thread_environment, usable_cores
from triptych.actors.locks import exclusive
from triptych.actors.ownership import Owner, owned
from triptych.actors.prctl import adopt_orphans
from triptych.actors.runtime import Runtime
from triptych.actors.strangers import end_strangers
from triptych.actors.supervisor import Supervisor
from triptych.bus import AddressError, remove_if_stale

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from triptych.actors.components import Part
    from triptych.actors.system import ChildReport
    from triptych.actors.topology import Component, Topology

EXIT_NOTHING_LEFT: Final = 1
EXIT_CANNOT_SERVE: Final = 2
_STRANGERS_EVERY_S: Final = 1.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_log = structlog.stdlib.get_logger("actors")


class Supervision:
    """Runs components of a topology in this process until it is told to stop, or until none is left to run.

    Args:
        topology: of the whole cluster.
        only: names of components, each to run under a small supervisor of its own; () = all, under one.
        parts: how each kind of component is made.
        preload: what the zygote imports.
        on_change: called with the report of a child whenever that changes.
        beside: a coroutine function to run as long, on the same loop.

    Raises `UnknownName` for one in `only`.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        only: Sequence[str] = (),
        parts: Mapping[str, Part] = PARTS,
        preload: Sequence[str] = PRELOAD,
        on_change: Callable[[ChildReport], None] | None = None,
        beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.topology = topology
        self.components = tuple(topology.component(name) for name in only) or topology.components
        self._only = bool(only)
        self._parts = parts
        self._preload = preload
        self._on_change = on_change
        self._beside = beside or _nothing
        self._asked = 0
        self.problem = ""
        """Why `run` has ended with `EXIT_CANNOT_SERVE`, as a sentence for the person who runs it."""

    def run(self) -> int:
        """Run on a loop of its own; returns the exit code.

        That is 0 when it was told to stop, `EXIT_CANNOT_SERVE` when the components can never work as they are
        configured, and `EXIT_NOTHING_LEFT` when none is left to run for another reason.

        Raises `AlreadyRunning` and `StateBelongsToAnother`, `PermissionError`, and `StartFailure` when a folder or the
        key of the bus cannot be used.
        """
        setproctitle(f"triptych: {SUPERVISOR} of {self.topology.path.name}")
        os.umask(0o077)  # the children's as well: prompts and results are this user's alone
        adopt_orphans()
        try:
            with contextlib.ExitStack() as held:
                self._take_folders(held)
                make_keys(self.topology)
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    try:
                        return runner.run(self._serve())
                    finally:
                        self._remove_sockets()
        finally:
            with contextlib.suppress(OSError):  # another supervisor of the same topology still uses it
                self.topology.run_dir.rmdir()

    def _take_folders(self, held: contextlib.ExitStack) -> None:
        """Make the folders of the system, and hold them until the end."""
        topology = self.topology
        try:
            places.private_run_dir(topology.run_dir)
            places.private_state_dir(topology.state_dir)
            owner = Owner(
                topology=str(topology.path),
                state_dir=str(topology.state_dir.resolve()),
                run_dir=str(topology.run_dir),
                models=tuple(filter(None, (model.identity for model in topology.models))),
                pid=os.getpid(),
            )
            held.enter_context(owned(topology.state_dir, owner, keep=True))
            held.enter_context(owned(topology.run_dir, owner, keep=False))
            held.enter_context(exclusive(topology.state_dir, [component.name for component in self.components]))
            # systemd-tmpfiles leaves a locked folder and what is in it alone, however old.
            folder = os.open(topology.run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_SH)
        except PermissionError:
            raise
        except OSError as error:
            raise StartFailure(f"{error.filename} cannot be used: {error.strerror}") from error

    def _remove_sockets(self) -> None:
        """Those of processes that were killed; the others have removed their own."""
        for component in self.components:
            if component.address.startswith("ipc://"):
                with contextlib.suppress(AddressError):  # served: by no child of ours, since those have ended
                    remove_if_stale(Path(component.address.removeprefix("ipc://")))

    async def _serve(self) -> int:
        generations = Generations(self.topology.state_dir / "generations")
        launcher = self._launcher(usable_cores())
        supervisors = self._supervisors(generations, launcher)
        runtime = Runtime(
            supervisors[::-1],  # the one that was started last drains first
            book=AddressBook(self.topology),
            generation=max(generations.next(supervisor.name) for supervisor in supervisors),
            kind=SUPERVISOR,
            shutdown_s=None,  # the ladder bounds each child
        )
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started under nohup: it is to outlive its terminal
            loop.add_signal_handler(number, self._asked_to_stop, number, runtime, supervisors)
        loop.add_signal_handler(signal.SIGUSR1, diagnostics.dump, runtime)
        async with runtime:
            supervisors[0].spawn(_keep_strangers_out(supervisors, launcher), name="strangers")
            supervisors[0].spawn(self._beside(), name="beside")
            over = asyncio.ensure_future(runtime.wait())
            all_done = asyncio.ensure_future(_all_done(supervisors))
            await asyncio.wait({over, all_done}, return_when=asyncio.FIRST_COMPLETED)
            nothing_left = not over.done()
            for task in (over, all_done):
                task.cancel()
        await asyncio.gather(over, return_exceptions=True)  # a crash is raised by the runtime
        self.problem = next((supervisor.problem for supervisor in supervisors if supervisor.problem), "")
        if self.problem:
            return EXIT_CANNOT_SERVE
        return EXIT_NOTHING_LEFT if nothing_left else 0

    def _launcher(self, cores: int) -> Launcher:
        forks = any(self._parts[c.kind].forked and not c.on_card for c in self.components)
        threads = thread_environment(os.environ, cores)
        return Launcher(preload=self._preload if forks else (), environment=threads)

    def _supervisors(self, generations: Generations, launcher: Launcher) -> list[Supervisor]:
        def supervisor(name: str, components: Sequence[Component]) -> Supervisor:
            return Supervisor(
                name,
                self.topology,
                components,
                parts=self._parts,
                generations=generations,
                launcher=launcher,
                on_change=self._on_change,
            )

        if not self._only:
            return [supervisor(SUPERVISOR, self.components)]
        return [supervisor(supervisor_of(component.name), [component]) for component in self.components]

    def _asked_to_stop(self, number: signal.Signals, runtime: Runtime, supervisors: list[Supervisor]) -> None:
        self._asked += 1
        if self._asked == 1:
            runtime.stop(number.name)
            return
        _log.warning("asked again to stop, killing")
        for supervisor in supervisors:
            supervisor.kill_all()


async def _all_done(supervisors: list[Supervisor]) -> None:
    for supervisor in supervisors:
        await supervisor.done.wait()


async def _keep_strangers_out(supervisors: list[Supervisor], launcher: Launcher) -> None:
    while True:
        await asyncio.sleep(_STRANGERS_EVERY_S)
        if launcher.in_flight:
            continue
        pids = [pid for supervisor in supervisors for pid in supervisor.pids]
        try:
            end_strangers(frozenset((*pids, launcher.zygote_pid)))
        except OSError as error:
            if error.errno not in OF_THE_MACHINE:
                raise
            _log.warning("orphans not looked for", error=str(error))


async def _nothing() -> None:
    """Nobody looks on."""
