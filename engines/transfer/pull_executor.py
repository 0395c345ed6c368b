"""Run pulls on threads, off the event loop, with deadlines and retries; a peer that hangs blocks no other peer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from weakref import WeakValueDictionary

from triptych.backoff import backoff_s
from triptych.engines.memory.leases import ByteRange
from triptych.engines.transfer.backend import TransferBackend, TransferError

ATTEMPTS = 4
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
GRACE_S = 0.25
"""Seconds after its deadline at which a pull is given up that its backend has not ended."""
OVERDUE_S = 120.0
"""Seconds after its deadline at which a pull counts as hung: twice the longest time of a backend that works."""

_Ended = Callable[[BaseException | None], None]
_Call = tuple[Callable[[], None], _Ended]


class PullExecutor:
    """Runs the pulls of a backend on threads, one at a time for each peer. For one event loop."""

    def __init__(self, backend: TransferBackend, *, attempts: int = ATTEMPTS) -> None:
        self.backend = backend
        self._attempts = attempts
        self._lanes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._under_way: dict[asyncio.Future[None], tuple[ByteRange, float]] = {}
        self._threads = _Threads()

    async def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Pull on a thread, and retry while time is left; see `TransferBackend.pull` for the arguments.

        A cancelled caller does not stop a pull that has begun: its range stays in `held` until it has ended.

        Raises:
            TransferError: The last attempt has failed.
            ValueError: The local range is outside the arena.
        """
        deadline = time.monotonic() + timeout_s
        quarantine = False
        for attempt in range(1, self._attempts + 1):
            try:
                await self._attempt(session, address, (offset, nbytes), deadline)
            except TransferError as error:
                # Any of the attempts may still write late, not just the last.
                quarantine = quarantine or error.quarantine
                pause = backoff_s(attempt - 1, first_s=FIRST_PAUSE_S, longest_s=LONGEST_PAUSE_S)
                if not error.retryable or attempt == self._attempts or time.monotonic() + pause >= deadline:
                    raise TransferError(error.reason, retryable=error.retryable, quarantine=quarantine) from error
                # The pull after a rejected one may fail for no other reason (hazard 10).
                await asyncio.sleep(pause)
            else:
                return

    def held(self) -> tuple[ByteRange, ...]:
        """Return the local ranges that something may still write to, which must not be leased."""
        return (*(local for local, _ in self._under_way.values()), *self.backend.late())

    def watchdog(self) -> str | None:
        """Return what hangs if a pull has hung for so long that only a new process can help, else None."""
        now = time.monotonic()
        for local, deadline in self._under_way.values():
            if now > deadline + OVERDUE_S:
                return f"a pull of {local[1]} bytes still hangs {now - deadline:.0f} s after its deadline"
        return None

    async def _attempt(self, session: str, address: int, local: ByteRange, deadline: float) -> None:
        lane = await self._enter_lane(session, deadline)
        offset, nbytes = local
        timeout_s = max(deadline - time.monotonic(), 0.0)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        self._under_way[answer] = (local, deadline)

        def ended(error: BaseException | None) -> None:
            # RuntimeError means that the loop is closed: a thread that hung can return later than that.
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
    """A pool of threads that grows while all are busy.

    They are daemons, unlike those of an executor: a thread that hangs must not block the exit of the process.
    """

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[_Call]] = deque()

    def call(self, function: Callable[[], None], ended: _Ended) -> None:
        """Call `function` on a thread, then `ended` on the same thread with the exception that it raised, or None."""
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
            except BaseException as raised:  # noqa: BLE001 - raised where the pull is awaited
                error = raised
            # Become idle before `ended`, so that the next call finds this thread.
            self._idle.append(calls)
            ended(error)
            del function, ended, error
