"""Delivers an instance's reports to the head: surely, in order, through any number of its restarts."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final, Protocol

from triptych.backoff import backoff_s
from triptych.bus import BusError, Message, MessageTooLongError, RemoteError
from triptych.roles.messages.common import Attempt
from triptych.roles.messages.stages import StageFailed, StageFinished, StageOutputsStored, TransferFailed

MAX_HEAD_FAILURES: Final = 3
"""A report at which the head itself failed this often is given up, or it would bring every new head down."""


class FencedError(Exception):
    """The head has declared this incarnation dead and given its work to others: it must end."""


class DeliveryOutcome(StrEnum):
    """What becomes of a report that was not acknowledged."""

    RETRY = "retry"
    DROP = "drop"
    FENCED = "fenced"


class Log(Protocol):
    """The part of a logger that is used here."""

    def error(self, event: str, **values: object) -> object:
        """Log an error."""


def delivery_outcome(error: BusError, failures: int) -> DeliveryOutcome:
    """Decide on `error`, when the head has failed at this report `failures` times, this one included.

    A head that is away, busy or stopping is asked again. One that cannot read the report never will; what is too
    long never gets there.
    """
    if isinstance(error, MessageTooLongError):
        return DeliveryOutcome.DROP
    if not isinstance(error, RemoteError):
        return DeliveryOutcome.RETRY
    if is_fenced(error):
        return DeliveryOutcome.FENCED
    if error.code == "handler_failed":
        return DeliveryOutcome.DROP if failures >= MAX_HEAD_FAILURES else DeliveryOutcome.RETRY
    if error.code in ("stopping", "deadline_exceeded", "mailbox_full"):
        return DeliveryOutcome.RETRY
    return DeliveryOutcome.DROP


def is_fenced(error: BusError) -> bool:
    """Whether the other side refuses everything from this incarnation: it was given up, or has a successor."""
    return isinstance(error, RemoteError) and error.code in ("fenced", "stale_generation", "stale_owner")


def shortened(report: Message, why: str) -> Message | None:
    """Say in a few words that work has ended whose report cannot be sent: it would end like that anywhere."""
    if not isinstance(report, (StageFailed, StageFinished, TransferFailed, StageOutputsStored)):
        return None
    stage = None if isinstance(report, TransferFailed) else report.stage
    error = f"its report cannot be sent: {why}"
    return StageFailed(report.attempt, stage, error, retryable=False, issued=report.issued)


class Reporter:
    """A queue of reports and the one task that delivers it.

    Args:
        log: for reports that had to be given up.

    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._queue: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._paused = True
        self.dropped = 0
        """Reports that the head could not take."""

    @property
    def paused(self) -> bool:
        """Whether the head is away."""
        return self._paused

    @property
    def pending(self) -> tuple[Message, ...]:
        """Reports that are not acknowledged yet, oldest first."""
        return tuple(self._queue)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Attempts that a pending report is about, each once."""
        found = (getattr(report, "attempt", None) for report in self.pending)
        return tuple(dict.fromkeys(attempt for attempt in found if isinstance(attempt, Attempt)))

    def add(self, report: Message) -> None:
        """Deliver `report` after all that were added before."""
        self._queue.append(report)
        self._empty.clear()
        self._wake.set()

    def pause(self) -> None:
        """Hold back until `resume`: the head is away. An ask that is under way may still be answered."""
        self._paused = True

    def resume(self) -> None:
        """Go on with the oldest report: the head has registered this instance."""
        self._paused = False
        self._wake.set()

    async def flushed(self) -> None:
        """Return when every report has been acknowledged."""
        await self._empty.wait()

    async def run(self, deliver: Callable[[Message], Awaitable[object]]) -> None:
        """Deliver for ever.

        Args:
            deliver: asks the head; returns when it has acknowledged, raises `BusError` when it has not.

        Raises:
            FencedError: the head refuses this incarnation.

        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue and not self._paused:
                await self._deliver_first(deliver)

    async def _deliver_first(self, deliver: Callable[[Message], Awaitable[object]]) -> None:
        report = self._queue[0]
        failures = 0
        tries = 0
        while not self._paused:
            try:
                await deliver(report)
                break
            except BusError as error:
                failures += isinstance(error, RemoteError) and error.code == "handler_failed"
                decision = delivery_outcome(error, failures)
                if decision is DeliveryOutcome.FENCED:
                    raise FencedError(f"the head has given this incarnation up ({error})") from error
                if decision is DeliveryOutcome.DROP:
                    self.dropped += 1
                    self._log.error("report given up", report=type(report).__name__, error=str(error))
                    brief = shortened(report, str(error)) if isinstance(error, MessageTooLongError) else None
                    if brief is None:
                        break
                    report = brief
                    self._queue[0] = report
                    continue
            await asyncio.sleep(backoff_s(tries))
            tries += 1
        else:
            return
        self._queue.popleft()
        if not self._queue:
            self._empty.set()
