"""A supervisor's record of one child, and the decision whether a system can ever serve."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from triptych.actors.child_state import EXIT_REASON_STATES, GIVEN_UP_STATES, ChildState
from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.supervision._child_process import EXIT_START_DELAYED, EXIT_START_FAILURE, ChildProcess, ExitStatus
from triptych.actors.supervision._restart import ChildExit, ExitKind, RestartHistory

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from triptych.actors.supervision._component_specs import ComponentSpec
    from triptych.actors.topology import Component


class Child:
    """State of one child; the supervisor acts on it."""

    def __init__(self, component: Component, spec: ComponentSpec) -> None:
        self.component = component
        self.spec = spec
        self.name = component.name
        self.state = ChildState.STARTING
        self.reason = ""
        self.detail = ""
        """More about the state, as the process told it."""
        self.generation = 0
        self.restarts = 0
        self.started_at = 0.0
        self.process: ChildProcess | None = None
        self.history: RestartHistory = ()
        self.delays = 0
        """Consecutive starts that failed for a reason that may pass."""
        self.stopping = False
        self.start_s: dict[str, float] = {}
        self._reported_reason = ""
        self._started = False
        self._last_heartbeat_at = 0.0
        self._launch_seconds = 0.0

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and not self.process.ended

    def begin_incarnation(self, generation: int) -> None:
        """Reset the record for a new start."""
        self.restarts += self.generation != 0
        self.generation = generation
        self.state = ChildState.STARTING
        self.detail = ""
        self.stopping = False
        self.started_at = time.time()
        self.start_s = {}
        self._reported_reason = ""
        self._started = False
        self._last_heartbeat_at = time.monotonic()

    def process_started(self, process: ChildProcess) -> None:
        """Record its new process; the heartbeat timer starts now."""
        self.process = process
        now = time.monotonic()
        self._launch_seconds, self._last_heartbeat_at = now - self._last_heartbeat_at, now

    def record_heartbeat(self, start_s: dict[str, float] | None) -> bool:
        """Record a heartbeat; return whether it is the first with the times of the start."""
        self._last_heartbeat_at = time.monotonic()
        if start_s is None or self.start_s:
            return False
        self._mark_started()
        self.start_s = {"launch": self._launch_seconds, **start_s}
        return True

    def record_state(self, state: ChildState, detail: str, *, closing: bool = False) -> None:
        """Record a reported state; keep one of `EXIT_REASON_STATES` as the reason of the coming exit.

        While the system stops (`closing`), only draining is recorded: an instance whose head has stopped before it
        would otherwise be shown as joining.
        """
        self._last_heartbeat_at = time.monotonic()
        if state in EXIT_REASON_STATES:
            self._reported_reason = f"hung: {detail}" if state == ChildState.HUNG else detail
            return
        self._reported_reason = ""
        if closing and state != ChildState.DRAINING:
            return
        self.state, self.detail = state, detail
        if state == ChildState.READY:
            self._mark_started()

    def _mark_started(self) -> None:
        self._started = True
        self.delays = 0

    def hang_reason(self, heartbeat_timeout_s: float, start_timeout_s: float) -> str:
        """Return why a running child counts as hung, "" if it does not."""
        # While a process starts, imports, reading weights or compiling may block its loop for minutes. A process that
        # has itself reported a hang gets the short timeout.
        starting = not self._started and not self._reported_reason
        timeout_s = start_timeout_s if starting else heartbeat_timeout_s
        if time.monotonic() - self._last_heartbeat_at <= timeout_s:
            return ""
        return f"hung: no heartbeat for {timeout_s:g} s{' while it started' * starting}"

    def reset_heartbeat_timer(self) -> None:
        """Forgive the silence until now: this process was itself stopped."""
        self._last_heartbeat_at = time.monotonic()

    def mark_hung(self, reason: str) -> None:
        """Record why it is about to be killed."""
        self._reported_reason = self._reported_reason or reason

    def make_exit(self, ending: ExitStatus) -> ChildExit:
        """Return its exit, for the restart decision."""
        kind = ExitKind.CRASH
        if ending.code == EXIT_START_FAILURE:
            kind = ExitKind.START_FAILURE
        elif ending.code == EXIT_START_DELAYED:
            kind = ExitKind.START_DELAYED
        elif ending.code == 0:
            kind = ExitKind.CLEAN
        if kind in (ExitKind.START_FAILURE, ExitKind.START_DELAYED):
            reason = self._reported_reason or "it cannot start; its log says why"
        else:
            reason = f"{ending}: {self._reported_reason}" if self._reported_reason else str(ending)
        return ChildExit(self.name, kind, time.monotonic(), reason)

    def report(self) -> ChildReport:
        """Return its entry of a `SupervisorReport`."""
        return ChildReport(
            name=self.name,
            kind=self.component.kind,
            pid=self.process.pid if self.process is not None and self.running else 0,
            generation=self.generation,
            state=self.state,
            restarts=self.restarts,
            reason=self.reason,
            started_at=self.started_at,
            start_s=self.start_s,
            detail=self.detail if self.running else "",
            silence_s=time.monotonic() - self._last_heartbeat_at if self.running else 0.0,
        )


def unservable_reason(children: Iterable[ChildReport], elsewhere: Collection[str] = ()) -> str:
    """Return why a system, or the part of it on this host, can never serve as configured, "" while it may. Pure.

    It cannot serve when all instances of some kind are given up and at least one of them cannot start: its model,
    device or options are wrong, which waiting does not mend. Without a kind that only crashed too often, the rest goes
    on: it may have served before.

    Args:
        children: All components that run here.
        elsewhere: Kinds of roles that other hosts have instances of, too. This host is of use as long as an instance
            of any of them may run here.
    """
    kinds: dict[str, list[ChildReport]] = {}
    for child in children:
        kinds.setdefault("" if child.kind in elsewhere else child.kind, []).append(child)
    for of_kind in kinds.values():
        failed = [child for child in of_kind if child.state == ChildState.FAILED]
        if failed and all(child.state in GIVEN_UP_STATES for child in of_kind):
            return f"{failed[0].name} cannot start: {failed[0].reason}"
    return ""
