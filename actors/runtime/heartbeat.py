"""Reports changes of state and heartbeats of a process to its supervisor."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from triptych.actors.child_state import ChildState
from triptych.actors.runtime.system_messages import Ack, ChildHeartbeat, ChildStateChanged
from triptych.bus import BusError, MailboxFullError, Message, Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from triptych.actors.runtime.actor import Actor

_FINAL_REPORT_TIMEOUT_S: Final = 2.0
_log = structlog.stdlib.get_logger("actors")


class Heartbeat:
    """Reports the state of a process, and that it is alive, to its supervisor.

    A heartbeat means that the event loop of the process runs and that no actor has reported a hang.
    """

    def __init__(
        self,
        actors: Sequence[Actor],
        supervisor: str,
        every_s: float,
        *,
        on_crash: Callable[[Actor, BaseException], None],
    ) -> None:
        self._actors = actors
        self._supervisor = supervisor
        self._every_s = every_s
        self._on_crash = on_crash
        self._start_s: dict[str, float] | None = None
        self._last_reported: tuple[ChildState, str] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Send the first heartbeat, and the next ones until `stop`; the actors need their outboxes."""
        for actor in self._actors:
            actor._on_state = self._report_state
        self._send_heartbeat()

    def started(self, seconds: dict[str, float]) -> None:
        """Report that every actor has started, and the seconds of each part: from now on, silence counts as a hang."""
        self._start_s = seconds
        self._tell(ChildHeartbeat(seconds))

    def stop(self) -> None:
        """Send no more."""
        if self._timer is not None:
            self._timer.cancel()
        for actor in self._actors:
            actor._on_state = _ignore_state_change

    def _send_heartbeat(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._send_heartbeat)
        try:
            self._report_state()
            if self._last_reported is None or self._last_reported[0] != ChildState.HUNG:
                self._tell(ChildHeartbeat(self._start_s))
        except Exception as error:  # noqa: BLE001  `watchdog` is the actor's own code: its errors are crashes
            self._on_crash(self._actors[0], error)

    def _report_state(self) -> None:
        state = process_state(self._actors)
        if state == self._last_reported:
            return
        if state[0] == ChildState.HUNG:
            _log.error("work hangs, heartbeat withheld", reason=state[1])
        if self._tell(ChildStateChanged(*state)):
            self._last_reported = state

    def _tell(self, message: Message) -> bool:
        try:
            self._actors[0].reference(self._supervisor).tell(message)
        except MailboxFullError as error:
            _log.warning("the supervisor does not take messages", error=str(error))
            return False
        return True


def process_state(actors: Sequence[Actor]) -> tuple[ChildState, str]:
    """Return state and detail of a process: hung if work of any actor hangs, ready when every actor is. Pure."""
    for actor in actors:
        reason = actor.watchdog()
        if reason is not None:
            return ChildState.HUNG, f"{actor.name}: {reason}"
    waiting = [actor for actor in actors if actor.state != ChildState.READY]
    if not waiting:
        return ChildState.READY, actors[0].detail
    # While a process starts, its first actor mostly waits for another one, whose detail says more.
    first, *others = waiting
    telling = first if first.detail else next((actor for actor in others if actor.detail), first)
    about = f"{telling.name}: " if telling is not actors[0] and telling.detail else ""
    return first.state, about + telling.detail


def _ignore_state_change() -> None:
    """No-op, for actors whose heartbeat has stopped."""


async def report_final_state(sender: Outbox, supervisor: str, address: str, message: ChildStateChanged) -> None:
    """Report to the supervisor why this process is about to end; log a warning if it does not answer."""
    try:
        await sender.reference(supervisor, address).ask(message, Ack, timeout_s=_FINAL_REPORT_TIMEOUT_S)
    except BusError as error:
        _log.warning("the supervisor was not told", message=message, error=str(error))
