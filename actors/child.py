"""One child of a supervisor: what it is, and where it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from actors.processes import EXIT_START_FAILURE, Ending, Process
from actors.restart import Exit, ExitKind, History
from actors.system import ChildReport

if TYPE_CHECKING:
    from actors.components import Part
    from actors.topology import Component

STARTING: Final = "starting"
BACKOFF: Final = "backoff"
STOPPED: Final = "stopped"
LEFT: Final = frozenset({STOPPED, "failed", "gave_up"})
"""States in which a child is not to run any more."""


class Child:
    """Plain bookkeeping; `actors.supervisor` does what is to be done."""

    def __init__(self, component: Component, part: Part) -> None:
        self.component = component
        self.part = part
        self.name = component.name
        self.state = STARTING
        self.reason = ""
        self.generation = 0
        self.restarts = 0
        self.started_at = 0.0
        self.process: Process | None = None
        self.history: History = ()
        self.stopping = False
        self.start_s: dict[str, float] = {}
        self._last_words = ""
        self._heard_at: float | None = None
        self._begun_at = 0.0
        self._launch_s = 0.0

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and not self.process.ended

    def begin(self, generation: int) -> None:
        """A new incarnation is being started."""
        self.restarts += self.generation != 0
        self.generation = generation
        self.state = STARTING
        self.stopping = False
        self.started_at = time.time()
        self.start_s = {}
        self._last_words = ""
        self._heard_at = None
        self._begun_at = time.monotonic()

    def launched(self, process: Process) -> None:
        """There is a process; what it takes to start is counted from here."""
        self.process = process
        now = time.monotonic()
        self._launch_s, self._begun_at = now - self._begun_at, now

    def heard(self, start_s: dict[str, float] | None) -> bool:
        """It lives; returns whether it has just told that it has started."""
        if start_s is None:
            return False
        first = self._heard_at is None
        self._heard_at = time.monotonic()
        if first:
            self.start_s = {"launch": self._launch_s, **start_s}
        return first

    def says(self, state: str, detail: str) -> None:
        """It has told its state; those that announce its end are kept as the reason of it."""
        if self._heard_at is not None:
            self._heard_at = time.monotonic()
        if state in ("failed", "crashed", "hung"):
            self._last_words = f"hung: {detail}" if state == "hung" else detail
            return
        self._last_words = ""
        self.state = state

    def hung(self, heartbeat_timeout_s: float, start_timeout_s: float) -> str:
        """Why a running child has to be taken for hung, "" if it does not have to be."""
        now = time.monotonic()
        if self._heard_at is None:
            # An import, weights that are read or a compiler may keep the loop from turning for minutes.
            late = now - self._begun_at > start_timeout_s
            return f"hung: not started within {start_timeout_s:g} s" if late else ""
        late = now - self._heard_at > heartbeat_timeout_s
        return f"hung: no heartbeat for {heartbeat_timeout_s:g} s" if late else ""

    def forgive_silence(self) -> None:
        """This process was itself not running: silence until now proves nothing."""
        now = time.monotonic()
        if self._heard_at is not None:
            self._heard_at = now
        self._begun_at = now

    def presume_hung(self, reason: str) -> None:
        """It is about to be killed for its silence."""
        self._last_words = self._last_words or reason

    def exit_of(self, ending: Ending) -> Exit:
        """Its end, for the restart decision."""
        kind = ExitKind.CRASH
        if ending.code == EXIT_START_FAILURE:
            kind = ExitKind.START_FAILURE
        elif ending.code == 0:
            kind = ExitKind.CLEAN
        if kind is ExitKind.START_FAILURE:
            reason = self._last_words or "it cannot start, its log says why"
        else:
            reason = f"{ending}: {self._last_words}" if self._last_words else str(ending)
        return Exit(self.name, kind, time.monotonic(), reason)

    def report(self) -> ChildReport:
        """For a `SupervisorReport`."""
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
        )
