"""The supervisor: an actor that starts components, sees them exit, and runs the actions that `_restart` decides."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from typing import TYPE_CHECKING, Final

from triptych.actors.child_state import FINAL_STATES, ChildState
from triptych.actors.errors import OF_THE_MACHINE
from triptych.actors.runtime.actor import Actor
from triptych.actors.runtime.address_book import CHILDREN
from triptych.actors.runtime.handlers import DeferredReply
from triptych.actors.runtime.log_files import log_path, read_part
from triptych.actors.runtime.system_messages import (
    Ack,
    ChildHeartbeat,
    ChildReport,
    ChildStateChanged,
    LogPart,
    LogQuery,
    SupervisorQuery,
    SupervisorReport,
    SupervisorWait,
)
from triptych.actors.supervision._child import Child, unservable_reason
from triptych.actors.supervision._child_process import ChildProcess
from triptych.actors.supervision._launcher import Launcher, LauncherClosedError
from triptych.actors.supervision._restart import (
    Action,
    ChildExit,
    ChildSpec,
    ExitKind,
    RestartPolicy,
    Retire,
    Start,
    Stop,
    Strategy,
    SupervisorSpec,
    Wait,
    decide_restart,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from triptych.actors.supervision._component_specs import ComponentSpec
    from triptych.actors.supervision._generation_counter import GenerationCounter
    from triptych.actors.topology import Component, Topology

_LATE_TICK_FRACTION: Final = 0.5  # of the heartbeat timeout: after a tick that late, this process was stopped itself


class Supervisor(Actor):
    """Runs components of one topology as child processes.

    Args:
        name: "supervisor", "supervisor-HOST.children" on one of several hosts, or "supervisor-NAME" for a component on
            its own.
        topology: Of the whole system.
        components: Those to run here, in start order.
        specs: How each kind of component is built.
        generations: Gives each start its generation number.
        launcher: Starts the processes; not yet open.
        on_change: Called with the report of a child whenever it changes.
    """

    def __init__(
        self,
        name: str,
        topology: Topology,
        components: Sequence[Component],
        *,
        specs: Mapping[str, ComponentSpec],
        generations: GenerationCounter,
        launcher: Launcher,
        on_change: Callable[[ChildReport], None] | None = None,
    ) -> None:
        super().__init__(name)
        self.children = {component.name: Child(component, specs[component.kind]) for component in components}
        self.done = asyncio.Event()
        """Set when no child will run again, or when the system can never serve."""
        self.problem = ""
        """Why the system can never serve, "" while it may; see `actors.supervision._child.unservable_reason`."""
        self._topology = topology
        self._generations = generations
        self._launcher = launcher
        self._on_change = on_change
        self._changed = asyncio.Event()
        """Set at the next change of a child, and replaced by another one then."""
        self._revision = 0
        self._closing = False
        self._group = asyncio.Lock()
        options = topology.supervision
        self._spec = SupervisorSpec(
            children=tuple(ChildSpec(c.name, RestartPolicy(c.restart)) for c in components),
            strategy=Strategy(options.strategy),
            intensity=options.intensity,
            period_s=options.period_s,
        )
        self._options = options
        hosts = {component.host for component in components}
        self._elsewhere = {c.kind for c in topology.components if c.slots and c.host not in hosts}

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of all children, some of which may have ended."""
        return tuple(child.process.pid for child in self.children.values() if child.process is not None)

    async def started(self) -> None:
        """Start every child, in order; a child that waits for the zygote delays no other."""
        self._launcher.open()
        for child in self.children.values():
            self.spawn(self._start(child), name=f"start {child.name}")
        self.spawn(self._watch_heartbeats(), name="heartbeats")

    async def stopping(self) -> None:
        """Stop all children in reverse start order; instances of one kind stop together."""
        self._closing = True
        await self._launcher.close()
        children = list(self.children.values())[::-1]
        for _, group in itertools.groupby(children, key=lambda child: child.component.kind):
            await asyncio.gather(*(self._stop_and_retire(child) for child in group))

    async def child_state(self, message: ChildStateChanged) -> Ack:
        """Record the state of a child."""
        child = self._sending_child()
        if child is not None:
            child.record_state(message.state, message.detail, closing=self._closing)
            self._report_change(child)
        return Ack()

    async def child_heartbeat(self, message: ChildHeartbeat) -> None:
        """Record a heartbeat of a child."""
        child = self._sending_child()
        if child is not None and child.record_heartbeat(message.start_s):
            self.log.info("child has started", child=child.name, **_rounded(child.start_s))
            self._report_change(child)

    async def report(self, message: SupervisorQuery) -> SupervisorReport:
        """Return the report of every child."""
        return self._full_report()

    async def wait(self, message: SupervisorWait) -> DeferredReply[SupervisorReport]:
        """Return the report of every child once one of them has changed."""
        return DeferredReply(self._report_once_changed(message))

    async def _report_once_changed(self, message: SupervisorWait) -> SupervisorReport:
        try:
            async with asyncio.timeout(message.timeout_s):
                while message.revision == self._revision:
                    await self._changed.wait()
        except TimeoutError:  # the report says that nothing has changed
            pass
        return self._full_report()

    def _full_report(self) -> SupervisorReport:
        return SupervisorReport(tuple(child.report() for child in self.children.values()), self._revision)

    async def logs(self, message: LogQuery) -> LogPart:
        """Return lines of the log of a child or of this supervisor; none of any other name."""
        known = message.name in self.children or message.name in (self.name, self.name.removesuffix(CHILDREN))
        return read_part(log_path(self._topology.log_dir, message.name), message.position) if known else LogPart("", "")

    def kill_all(self) -> None:
        """Send SIGKILL to every child, without a drain."""
        for child in self.children.values():
            if child.process is not None:
                child.process.signal(signal.SIGKILL)

    def _sending_child(self) -> Child | None:
        child = self.children.get(self.sender.name)
        return child if child is not None and child.generation == self.sender.generation else None

    async def _start(self, child: Child) -> None:
        if child.running or self._closing:
            return
        try:
            child.begin_incarnation(self._generations.next(child.name))
            self._report_change(child)
            forked, on_gpu = child.spec.forked, child.component.on_gpu
            process = await self._launcher.start(self._arguments(child), forked=forked, on_gpu=on_gpu)
        except LauncherClosedError:
            self._retire(child, ChildState.STOPPED, "")
        except OSError as error:
            reason = f"no process could be started: {error.strerror or error}"
            kind = ExitKind.START_DELAYED if error.errno in OF_THE_MACHINE else ExitKind.CRASH
            self._handle_exit(child, ChildExit(child.name, kind, time.monotonic(), reason))
        else:
            child.process_started(process)
            self.log.info("started", child=child.name, pid=process.pid, generation=child.generation)
            self._report_change(child)
            self.spawn(self._watch(child, process), name=f"watch {child.name}")

    def _arguments(self, child: Child) -> tuple[str, ...]:
        return (
            f"--topology={self._topology.path}",
            f"--name={child.name}",
            f"--build={child.spec.build}",
            f"--generation={child.generation}",
            f"--restarts={child.restarts}",
            f"--supervisor={self.name}",
        )

    async def _watch(self, child: Child, process: ChildProcess) -> None:
        ending = await process.wait()
        if child.stopping or self._closing:
            return  # it was told to end, and who told it waits for it
        self._handle_exit(child, child.make_exit(ending))

    def _handle_exit(self, child: Child, exit_: ChildExit) -> None:
        child.reason = exit_.reason
        alive = frozenset(other.name for other in self.children.values() if other.state not in FINAL_STATES)
        jitter = random.random()  # noqa: S311  spreads restarts, keeps no secret
        decision = decide_restart(self._spec, child.history, exit_, alive=alive, jitter=jitter, delays=child.delays)
        child.history = decision.history
        log = self.log.error if exit_.kind is ExitKind.START_FAILURE else self.log.warning
        actions = [type(action).__name__.lower() for action in decision.actions]
        log("child ended", child=child.name, reason=exit_.reason, kind=str(exit_.kind), actions=actions)
        match decision.actions:
            case (Retire(_, state, reason),):  # it is not started again, so it must not be shown in backoff
                self._retire(child, state, reason)
                return
        child.state = ChildState.BACKOFF
        if exit_.kind is ExitKind.START_DELAYED:
            child.delays += 1
            child.state = ChildState.DELAYED
        for action in decision.actions:
            if isinstance(action, Stop):  # from now on its exit belongs to this plan, and needs no decision
                self.children[action.name].stopping = True
        self.spawn(self._run_actions(child, decision.actions), name=f"restart {child.name}")
        self._report_change(child)

    async def _run_actions(self, child: Child, actions: tuple[Action, ...]) -> None:
        if self._spec.strategy is Strategy.ONE_FOR_ONE:
            await self._run_each(child, actions)
            return
        async with self._group:  # plans for overlapping groups run one after the other
            await self._run_each(child, actions)

    async def _run_each(self, child: Child, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Stop(name):
                    await self._stop(self.children[name])
                    self.children[name].state = ChildState.BACKOFF
                    self._report_change(self.children[name])
                case Wait(seconds):
                    await asyncio.sleep(seconds)
                case Start(name):
                    await self._start(self.children[name])
                case Retire(name, state, reason):
                    self._retire(self.children[name], state, reason)

    async def _stop_and_retire(self, child: Child) -> None:
        await self._stop(child)
        if child.state not in FINAL_STATES:
            self._retire(child, ChildState.STOPPED, "")

    async def _stop(self, child: Child) -> None:
        child.stopping = True
        if child.process is not None and not child.process.ended:
            ending = await child.process.stop(self._options.shutdown_s)
            if ending.signal == signal.SIGKILL:
                self.log.warning("child did not drain in time", child=child.name)

    def _retire(self, child: Child, state: ChildState, reason: str) -> None:
        child.state, child.reason = state, reason
        self._report_change(child)
        reports = [other.report() for other in self.children.values()]
        self.problem = self.problem or unservable_reason(reports, self._elsewhere)
        if self.problem or all(other.state in FINAL_STATES for other in self.children.values()):
            self.done.set()

    def _report_change(self, child: Child) -> None:
        self._revision += 1
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_change is not None:
            self._on_change(child.report())

    async def _watch_heartbeats(self) -> None:
        every = self._options.heartbeat_s
        options = self._options
        due = time.monotonic() + every
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            late = time.monotonic() - due
            due = time.monotonic() + every
            for child in self.children.values():
                if late > _LATE_TICK_FRACTION * options.heartbeat_timeout_s:
                    child.reset_heartbeat_timer()
                elif child.running and not child.stopping:
                    reason = child.hang_reason(options.heartbeat_timeout_s, options.start_timeout_s)
                    if reason:
                        self._kill_hung(child, reason)

    def _kill_hung(self, child: Child, reason: str) -> None:
        self.log.error("killing a hung child", child=child.name, reason=reason)
        child.mark_hung(reason)
        if child.process is not None:
            child.process.signal(signal.SIGKILL)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}_s": round(value, 2) for part, value in seconds.items()}
