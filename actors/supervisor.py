"""The supervisor: starts components, sees their ends, and carries out what `actors.restart` decides."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from typing import TYPE_CHECKING, Final

from triptych.actors import child as states
from triptych.actors.actor import Actor
from triptych.actors.child import Child
from triptych.actors.errors import OF_THE_MACHINE
from triptych.actors.launcher import Launcher, LauncherClosed
from triptych.actors.process import heartbeat_s
from triptych.actors.processes import Process
from triptych.actors.restart import (
    Action,
    ChildSpec,
    Exit,
    ExitKind,
    Leave,
    Restart,
    Spec,
    Start,
    Stop,
    Strategy,
    Wait,
    decide,
)
from triptych.actors.system import ChildHeartbeat, ChildReport, ChildState, Noted, SupervisorQuery, SupervisorReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from triptych.actors.components import Part
    from triptych.actors.generations import Generations
    from triptych.actors.topology import Component, Topology

_ASLEEP_AFTER: Final = 0.5  # of a heartbeat's timeout: a tick that is later than that forgives silence


class Supervisor(Actor):
    """Runs components of one topology as child processes; itself an actor like any other.

    Args:
        name: "supervisor", or "supervisor-NAME" for a component on its own.
        topology: of all components.
        components: those to run here, in start order.
        parts: how each kind of component is made.
        generations: where their generation numbers come from.
        launcher: not yet open.
        on_change: called with the report of a child whenever that changes.
    """

    def __init__(
        self,
        name: str,
        topology: Topology,
        components: Sequence[Component],
        *,
        parts: Mapping[str, Part],
        generations: Generations,
        launcher: Launcher,
        on_change: Callable[[ChildReport], None] | None = None,
    ) -> None:
        super().__init__(name)
        self.children = {component.name: Child(component, parts[component.kind]) for component in components}
        self.done = asyncio.Event()
        """Set when no child is to run any more, or when the system can never serve."""
        self.problem = ""
        """Why the system can never serve, "" while it may; see `actors.child.unservable`."""
        self._topology = topology
        self._generations = generations
        self._launcher = launcher
        self._on_change = on_change
        self._closing = False
        self._group = asyncio.Lock()
        options = topology.supervision
        self._spec = Spec(
            children=tuple(ChildSpec(c.name, Restart(c.restart)) for c in components),
            strategy=Strategy(options.strategy),
            intensity=options.intensity,
            period_s=options.period_s,
        )
        self._options = options

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of all children, some of which may have ended."""
        return tuple(child.process.pid for child in self.children.values() if child.process is not None)

    async def started(self) -> None:
        """Start every child, in order; one that waits for the zygote holds no other up."""
        self._launcher.open()
        for child in self.children.values():
            self.spawn(self._start(child), name=f"start {child.name}")
        self.spawn(self._watch_hearts(), name="hearts")

    async def stopping(self) -> None:
        """The ladder, in reverse start order; instances of one kind stop side by side."""
        self._closing = True
        await self._launcher.close()
        children = list(self.children.values())[::-1]
        for _, group in itertools.groupby(children, key=lambda child: child.component.kind):
            await asyncio.gather(*(self._stop_for_good(child) for child in group))

    async def child_state(self, message: ChildState) -> Noted:
        """A child says where it is."""
        child = self._incarnation(message.name, message.generation)
        if child is not None:
            child.says(message.state, message.detail, closing=self._closing)
            self._changed(child)
        return Noted()

    async def child_heartbeat(self, message: ChildHeartbeat) -> None:
        """A child says that it lives."""
        child = self._incarnation(message.name, message.generation)
        if child is not None and child.heard(message.start_s):
            self.log.info("child has started", child=child.name, **_rounded(child.start_s))
            self._changed(child)

    async def report(self, message: SupervisorQuery) -> SupervisorReport:
        """How every child is."""
        return SupervisorReport(tuple(child.report() for child in self.children.values()))

    def kill_all(self) -> None:
        """SIGKILL to every child, for whoever cannot wait for the drain."""
        for child in self.children.values():
            if child.process is not None:
                child.process.signal(signal.SIGKILL)

    def _incarnation(self, name: str, generation: int) -> Child | None:
        child = self.children.get(name)
        return child if child is not None and child.generation == generation else None

    async def _start(self, child: Child) -> None:
        if child.running or self._closing:
            return
        try:
            child.begin(self._generations.next(child.name))
            self._changed(child)
            forked, on_card = child.part.forked, child.component.on_card
            process = await self._launcher.start(self._arguments(child), forked=forked, on_card=on_card)
        except LauncherClosed:
            self._leave(child, states.STOPPED, "")
        except OSError as error:
            reason = f"no process could be started: {error.strerror or error}"
            kind = ExitKind.START_DELAYED if error.errno in OF_THE_MACHINE else ExitKind.CRASH
            self._act_on(child, Exit(child.name, kind, time.monotonic(), reason))
        else:
            child.launched(process)
            self.log.info("started", child=child.name, pid=process.pid, generation=child.generation)
            self._changed(child)
            self.spawn(self._watch(child, process), name=f"watch {child.name}")

    def _arguments(self, child: Child) -> tuple[str, ...]:
        return (
            f"--topology={self._topology.path}",
            f"--name={child.name}",
            f"--build={child.part.build}",
            f"--generation={child.generation}",
            f"--restarts={child.restarts}",
            f"--supervisor={self.name}",
        )

    async def _watch(self, child: Child, process: Process) -> None:
        ending = await process.wait()
        if child.stopping or self._closing:
            return  # it was asked to; whoever asked waits for it as well
        self._act_on(child, child.exit_of(ending))

    def _act_on(self, child: Child, exit_: Exit) -> None:
        child.reason = exit_.reason
        alive = frozenset(other.name for other in self.children.values() if other.state not in states.LEFT)
        jitter = random.random()  # noqa: S311  spreads restarts, keeps no secret
        decision = decide(self._spec, child.history, exit_, alive=alive, jitter=jitter, delays=child.delays)
        child.history = decision.history
        log = self.log.error if exit_.kind is ExitKind.START_FAILURE else self.log.warning
        actions = [type(action).__name__.lower() for action in decision.actions]
        log("child ended", child=child.name, reason=exit_.reason, kind=str(exit_.kind), actions=actions)
        match decision.actions:
            case (Leave(_, state, reason),):  # it is not started again, so it is never shown as if it were
                self._leave(child, state, reason)
                return
        child.state = states.BACKOFF
        if exit_.kind is ExitKind.START_DELAYED:
            child.delays += 1
            child.state = states.DELAYED
        for action in decision.actions:
            if isinstance(action, Stop):  # from now on its end is part of this plan, and no event of its own
                self.children[action.name].stopping = True
        self.spawn(self._carry_out(child, decision.actions), name=f"restart {child.name}")
        self._changed(child)

    async def _carry_out(self, child: Child, actions: tuple[Action, ...]) -> None:
        if self._spec.strategy is Strategy.ONE_FOR_ONE:
            await self._do_all(child, actions)
            return
        async with self._group:  # plans for a group overlap: one after the other
            await self._do_all(child, actions)

    async def _do_all(self, child: Child, actions: tuple[Action, ...]) -> None:
        for action in actions:
            match action:
                case Stop(name):
                    await self._stop(self.children[name])
                    self.children[name].state = states.BACKOFF
                    self._changed(self.children[name])
                case Wait(seconds):
                    await asyncio.sleep(seconds)
                case Start(name):
                    await self._start(self.children[name])
                case Leave(name, state, reason):
                    self._leave(self.children[name], state, reason)

    async def _stop_for_good(self, child: Child) -> None:
        await self._stop(child)
        if child.state not in states.LEFT:
            self._leave(child, states.STOPPED, "")

    async def _stop(self, child: Child) -> None:
        child.stopping = True
        if child.process is not None and not child.process.ended:
            ending = await child.process.stop(self._options.shutdown_s)
            if ending.signal == signal.SIGKILL:
                self.log.warning("child did not drain in time", child=child.name)

    def _leave(self, child: Child, state: str, reason: str) -> None:
        child.state, child.reason = state, reason
        self._changed(child)
        self.problem = self.problem or states.unservable(other.report() for other in self.children.values())
        if self.problem or all(other.state in states.LEFT for other in self.children.values()):
            self.done.set()

    def _changed(self, child: Child) -> None:
        if self._on_change is not None:
            self._on_change(child.report())

    async def _watch_hearts(self) -> None:
        every = heartbeat_s(self._topology)
        options = self._options
        due = time.monotonic() + every
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            late = time.monotonic() - due
            due = time.monotonic() + every
            for child in self.children.values():
                if late > _ASLEEP_AFTER * options.heartbeat_timeout_s:  # this process, or the machine, was stopped
                    child.forgive_silence()
                elif child.running and not child.stopping:
                    reason = child.hung(options.heartbeat_timeout_s, options.start_timeout_s)
                    if reason:
                        self._end_hung(child, reason)

    def _end_hung(self, child: Child, reason: str) -> None:
        self.log.error("killing", child=child.name, reason=reason)
        child.presume_hung(reason)
        if child.process is not None:
            child.process.signal(signal.SIGKILL)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}_s": round(value, 2) for part, value in seconds.items()}
