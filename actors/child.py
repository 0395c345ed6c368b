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
_FIRST_SIGN_S: Final = 60.0  # a fresh interpreter on a busy machine imports for a long time before it can speak


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
        self._last_words = ""
        self._heard_at: float | None = None
        self._begun_at = 0.0

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
        self._last_words = ""
        self._heard_at = None
        self._begun_at = time.monotonic()

    def heard(self) -> None:
        """It has given a sign of life."""
        self._heard_at = time.monotonic()

    def says(self, state: str, detail: str) -> None:
        """It has told its state; those that announce its end are kept as the reason of it."""
        self.heard()
        if state in ("failed", "crashed", "hung"):
            self._last_words = f"hung: {detail}" if state == "hung" else detail
            return
        self._last_words = ""
        self.state = state

    def silent_for_too_long(self, timeout_s: float) -> bool:
        """Whether a running child has to be taken for hung."""
        if self._heard_at is None:
            return time.monotonic() - self._begun_at > max(timeout_s, _FIRST_SIGN_S)
        return time.monotonic() - self._heard_at > timeout_s

    def forgive_silence(self) -> None:
        """This process was itself not running: silence until now proves nothing."""
        if self._heard_at is not None:
            self.heard()
        self._begun_at = time.monotonic()

    def presume_hung(self, timeout_s: float) -> None:
        """It is about to be killed for its silence."""
        self._last_words = self._last_words or f"hung: no heartbeat for {timeout_s:g} s"

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
        )
