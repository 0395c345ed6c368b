"""Pulls off the event loop: deadlines that hold, retries, and a peer that hangs holds up nobody but itself."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from weakref import WeakValueDictionary

from triptych.engines.transfer.backend import ByteRange, TransferBackend
from triptych.engines.transfer.errors import TransferError

ATTEMPTS = 4
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
# A pull that its backend does not end itself is given up this much after its deadline.
GRACE_S = 0.25
# The longest a sound backend holds a thread after the deadline is 60 s, for a peer that hangs.
OVERDUE_S = 120.0

_Ended = Callable[[BaseException | None], None]
_Call = tuple[Callable[[], None], _Ended]


def backoff(attempt: int, jitter: float) -> float:
    """Seconds to pause after failed attempt `attempt` (from 1): it doubles, `jitter` in [0, 1) takes up to half off."""
    longest: float = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S)
    return longest * (1 - jitter / 2)


class PullExecutor:
    """Runs the pulls of a backend on threads, one at a time for each peer. Use it on one event loop."""

    def __init__(self, backend: TransferBackend, *, attempts: int = ATTEMPTS) -> None:
        self.backend = backend
        self._attempts = attempts
        self._lanes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._under_way: dict[asyncio.Future[None], tuple[ByteRange, float]] = {}
        self._threads = _Threads()
        self._random = random.Random()  # noqa: S311 - jitter, no secret

    async def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Pull as TransferBackend does, on a thread, again after a retryable failure while time is left.

        Raises TransferError when it fails for good. Cancelling the caller does not stop what is under way:
        its range stays in `held` until it has ended. Raises ValueError for a local range outside the arena.
        """
        deadline = time.monotonic() + timeout_s
        quarantine = False
        for attempt in range(1, self._attempts + 1):
            try:
                await self._attempt(session, address, (offset, nbytes), deadline)
            except TransferError as error:
                # A write may be late from any attempt, whichever of them is the last.
                quarantine = quarantine or error.quarantine
                pause = backoff(attempt, self._random.random())
                if not error.retryable or attempt == self._attempts or time.monotonic() + pause >= deadline:
                    raise TransferError(error.reason, retryable=error.retryable, quarantine=quarantine) from error
                # Hazard 10: the pull that follows a rejected one may fail for that alone.
                await asyncio.sleep(pause)
            else:
                return

    def held(self) -> tuple[ByteRange, ...]:
        """List the local ranges that something may still write to; LeaseTable keeps their blocks from being leased."""
        return (*(local for local, _ in self._under_way.values()), *self.backend.late())

    def watchdog(self) -> str | None:
        """Say so when a pull has hung for so long that only a new process can help."""
        now = time.monotonic()
        for local, deadline in self._under_way.values():
            if now > deadline + OVERDUE_S:
                return f"a pull of {local[1]} bytes hangs since {now - deadline:.0f} s after its deadline"
        return None

    async def _attempt(self, session: str, address: int, local: ByteRange, deadline: float) -> None:
        lane = await self._enter_lane(session, deadline)
        offset, nbytes = local
        timeout_s = max(deadline - time.monotonic(), 0.0)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        self._under_way[answer] = (local, deadline)

        def ended(error: BaseException | None) -> None:
            # A thread that hung can come back when its loop is long gone, which is all that this refusal means.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._leave_lane, lane, answer, error)

        self._threads.call(lambda: self.backend.pull(session, address, offset, nbytes, timeout_s), ended)
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                await answer
        except TimeoutError as error:
            reason = f"{session} has not answered for {timeout_s:g} s"
            raise TransferError(reason, retryable=True, quarantine=True) from error

    async def _enter_lane(self, session: str, deadline: float) -> asyncio.Lock:
        lane = self._lanes.setdefault(session, asyncio.Lock())
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                await lane.acquire()
        except TimeoutError as error:
            raise TransferError(f"{session} has not answered an earlier pull", retryable=True) from error
        return lane

    def _leave_lane(self, lane: asyncio.Lock, answer: asyncio.Future[None], error: BaseException | None) -> None:
        del self._under_way[answer]
        lane.release()
        if answer.cancelled():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)


class _Threads:
    """Threads that are made when all others are busy and kept when they are done.

    They are daemons, unlike those of an executor: one that hangs must not hold up the end of the process.
    """

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[_Call]] = deque()

    def call(self, function: Callable[[], None], ended: _Ended) -> None:
        """Call `function` on a thread, and `ended` there with what it raised or None."""
        if self._idle:
            calls = self._idle.pop()
        else:
            calls = SimpleQueue()
            threading.Thread(target=self._serve, args=(calls,), name="transfer", daemon=True).start()
        calls.put((function, ended))

    def _serve(self, calls: SimpleQueue[_Call]) -> None:
        while True:
            function, ended = calls.get()
            error: BaseException | None = None
            try:
                function()
            except BaseException as raised:  # noqa: BLE001 - handed to whoever waits for the pull
                error = raised
            # Idle before its end is known, so that what is called next finds it.
            self._idle.append(calls)
            ended(error)
            del function, ended, error
