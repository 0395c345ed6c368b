from __future__ import annotations

import asyncio
import threading

import pytest

from tests.engines.transfer.peer_process import until
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import PullExecutor, TransferError, open_backend
from triptych.engines.transfer.pull_executor import FIRST_PAUSE_S

NBYTES = 1 << 16
WAIT_S = 20
SOON_S = 1.0
"""Long enough for a pull to begin on a busy machine: only what has begun can hang."""


class Troubled:
    """A real backend in front of which pulls fail or wait as a test says."""

    def __init__(self, backend):
        self.inner = backend
        self.failures: list[TransferError] = []
        self.gates: dict[str, threading.Event] = {}
        self.calls = 0
        self.entered = threading.Event()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def pull(self, session, address, offset, nbytes, timeout_s):
        self.calls += 1
        self.entered.set()
        if gate := self.gates.get(session):
            assert gate.wait(WAIT_S)
        if self.failures:
            raise self.failures.pop(0)
        self.inner.pull(session, address, offset, nbytes, timeout_s)


@pytest.fixture
def arenas():
    arenas = [Arena.create(NBYTES) for _ in range(3)]
    for number, arena in enumerate(arenas):
        arena.tensor(0, NBYTES).fill_(number)
    yield arenas
    for arena in arenas:
        arena.close()


@pytest.fixture
def backend(arenas):
    return Troubled(open_backend("shm", arena=arenas[0]))


def pulled(arenas) -> int:
    return arenas[0].view(0, 1)[0]


def failing(*, retryable: bool = True, quarantine: bool = False) -> TransferError:
    return TransferError("it broke", retryable=retryable, quarantine=quarantine)


def outcome(transfers, arena, timeout_s=WAIT_S) -> TransferError | None:
    try:
        asyncio.run(transfers.pull(str(arena.address), 0, 0, 100, timeout_s))
    except TransferError as error:
        return error
    return None


def test_a_pull_that_fails_is_tried_again(arenas, backend):
    backend.failures = [failing(), failing(quarantine=True)]
    transfers = PullExecutor(backend)
    assert outcome(transfers, arenas[1]) is None
    assert pulled(arenas) == 1
    assert backend.calls == 3
    assert transfers.held() == ()


def test_it_is_tried_a_bounded_number_of_times(arenas, backend):
    backend.failures = [failing() for _ in range(10)]
    error = outcome(PullExecutor(backend, attempts=3), arenas[1])
    assert (error.reason, error.retryable, backend.calls) == ("it broke", True, 3)


def test_what_fails_for_good_is_not_tried_again(arenas, backend):
    backend.failures = [failing(retryable=False)]
    error = outcome(PullExecutor(backend), arenas[1])
    assert (error.retryable, backend.calls) == (False, 1)


def test_quarantine_is_remembered_from_any_attempt(arenas, backend):
    backend.failures = [failing(quarantine=True), failing(retryable=False)]
    error = outcome(PullExecutor(backend), arenas[1])
    assert (error.retryable, error.quarantine) == (False, True)


def test_no_attempt_begins_after_the_deadline(arenas, backend):
    backend.failures = [failing() for _ in range(10)]
    error = outcome(PullExecutor(backend, attempts=10), arenas[1], timeout_s=FIRST_PAUSE_S / 4)
    assert error.retryable
    assert backend.calls == 1


def test_a_mistake_of_the_caller_is_raised_as_it_is(arenas, backend):
    with pytest.raises(ValueError, match="outside"):
        asyncio.run(PullExecutor(backend).pull(str(arenas[1].address), 0, NBYTES, 1, WAIT_S))


def test_a_pull_that_hangs_is_given_up_held_and_alone(arenas, backend):
    transfers = PullExecutor(backend)
    sessions = [str(arena.address) for arena in arenas]
    gate = backend.gates[sessions[1]] = threading.Event()

    async def calls():
        with pytest.raises(TransferError, match="not answered for") as caught:
            await transfers.pull(sessions[1], 0, 0, 100, SOON_S)
        assert (caught.value.retryable, caught.value.quarantine) == (True, True)
        assert transfers.held() == ((0, 100),)
        with pytest.raises(TransferError, match="earlier pull"):
            await transfers.pull(sessions[1], 0, 200, 100, 0.01)
        await transfers.pull(sessions[2], 0, 300, 100, WAIT_S)
        assert arenas[0].view(300, 1)[0] == 2
        gate.set()
        await transfers.pull(sessions[1], 0, 400, 100, WAIT_S)
        assert transfers.held() == ()
        assert arenas[0].view(400, 1)[0] == 1

    asyncio.run(calls())


def test_a_cancelled_pull_is_held_until_it_has_ended(arenas, backend):
    transfers = PullExecutor(backend)
    session = str(arenas[1].address)
    gate = backend.gates[session] = threading.Event()

    async def calls():
        pull = asyncio.create_task(transfers.pull(session, 0, 0, 100, WAIT_S))
        assert await asyncio.to_thread(backend.entered.wait, WAIT_S)
        pull.cancel()
        await asyncio.wait([pull])
        assert pull.cancelled()
        assert transfers.held() == ((0, 100),)
        gate.set()
        await transfers.pull(session, 0, 0, 100, WAIT_S)
        assert transfers.held() == ()

    asyncio.run(calls())


def test_a_thread_that_never_comes_back_is_overdue(arenas, backend, monkeypatch):
    transfers = PullExecutor(backend)
    session = str(arenas[1].address)
    gate = backend.gates[session] = threading.Event()

    async def calls():
        with pytest.raises(TransferError):
            await transfers.pull(session, 0, 0, 100, SOON_S)
        assert transfers.watchdog() is None
        monkeypatch.setattr("triptych.engines.transfer.pull_executor.OVERDUE_S", 0.0)
        assert "100 bytes" in transfers.watchdog()
        gate.set()
        await transfers.pull(session, 0, 0, 100, WAIT_S)
        assert transfers.watchdog() is None

    asyncio.run(calls())


def test_a_thread_may_come_back_after_its_loop_is_gone(arenas, backend):
    session = str(arenas[1].address)
    gate = backend.gates[session] = threading.Event()
    transfers = PullExecutor(backend)
    assert "not answered for" in outcome(transfers, arenas[1], timeout_s=SOON_S).reason
    gate.set()
    until(lambda: pulled(arenas) == 1)
    assert outcome(transfers, arenas[2]) is None


def test_threads_are_kept_for_the_next_pull(arenas, backend):
    transfers = PullExecutor(backend)
    before = threading.active_count()

    async def calls():
        for _ in range(20):
            for arena in arenas[1:]:
                await transfers.pull(str(arena.address), 0, 0, 100, WAIT_S)

    asyncio.run(calls())
    assert threading.active_count() == before + 1
