from __future__ import annotations

import os

import pytest

from tests.engines.transfer.peer_process import peer
from triptych.engines.codec.checksum import checksum
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import TransferError, TransferSetupError, open_backend

NBYTES = 1 << 20


@pytest.fixture
def arena():
    arena = Arena.create(NBYTES)
    yield arena
    arena.close()


@pytest.fixture
def backend(arena):
    backend = open_backend("shm", arena=arena)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def other():
    with peer(NBYTES, engine="shm") as process:
        yield process


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_003, NBYTES])
def test_bytes_come_over_from_another_process(arena, backend, other, nbytes):
    expected = other.ask("fill", offset=NBYTES - nbytes, nbytes=nbytes, byte=nbytes)
    arena.tensor(0, NBYTES).fill_(0xEE)
    backend.pull(**other.source(NBYTES - nbytes, nbytes), offset=0, timeout_s=10)
    assert checksum(arena.view(0, nbytes)) == expected
    assert set(arena.view(nbytes, NBYTES - nbytes)) <= {0xEE}, "bytes beside the block changed"


def test_large_pulls_come_in_pieces(backend):
    nbytes = 40 << 20
    with peer(nbytes, engine="shm") as other:
        expected = other.ask("fill", offset=0, nbytes=nbytes, byte=1)
        large = Arena.create(nbytes)
        open_backend("auto", arena=large).pull(**other.source(0, nbytes), offset=0, timeout_s=20)
        assert checksum(large.view(0, nbytes)) == expected
        large.close()


def failure(backend, **pull) -> TransferError:
    with pytest.raises(TransferError) as caught:
        backend.pull(**({"offset": 0, "timeout_s": 10} | pull))
    return caught.value


def test_a_dead_pool_is_seen_though_its_memory_is_still_mapped(backend):
    with peer(NBYTES, engine="shm") as other:
        backend.pull(**other.source(0, 10), offset=0, timeout_s=10)
        other.kill()
        error = failure(backend, **other.source(0, 10))
        assert not error.retryable
        assert "gone" in error.reason


def test_a_pool_that_came_back_is_another(backend, arena):
    with peer(NBYTES, engine="shm") as other:
        backend.pull(**other.source(0, 10), offset=0, timeout_s=10)
    with peer(NBYTES, engine="shm") as again:
        assert again.session != other.session
        expected = again.ask("fill", offset=0, nbytes=10, byte=9)
        backend.pull(**again.source(0, 10), offset=0, timeout_s=10)
        assert checksum(arena.view(0, 10)) == expected


def test_a_source_outside_the_arena_is_refused_for_good(backend, other):
    error = failure(backend, session=other.session, address=NBYTES - 1, nbytes=2)
    assert (error.retryable, error.quarantine) == (False, False)


def test_a_target_outside_the_arena_is_a_mistake_of_the_caller(backend, other):
    with pytest.raises(ValueError, match="outside"):
        backend.pull(**other.source(0, 2), offset=NBYTES - 1, timeout_s=10)


@pytest.mark.parametrize("session", ["", "127.0.0.1:12345", "memfd:1:1:1:1:1"])
def test_a_session_of_nobody_is_refused_for_good(backend, session):
    assert not failure(backend, session=session, address=0, nbytes=1).retryable


def test_a_pull_without_time_copies_nothing(backend, arena, other):
    other.ask("fill", offset=0, nbytes=10, byte=9)
    error = failure(backend, **other.source(0, 10), timeout_s=0)
    assert (error.retryable, error.quarantine) == (True, False)
    assert not any(arena.view(0, 10))
    assert backend.late() == ()


def test_a_closed_backend_pulls_nothing(backend, other):
    backend.close()
    assert not failure(backend, **other.source(0, 1)).retryable


def test_it_says_what_it_is(backend, arena):
    assert backend.describe() == "shared memory of this host"
    assert (backend.session, backend.base) == (str(arena.address), 0)
    assert str(os.getpid()) in backend.session


def test_other_engines_are_refused(arena):
    with pytest.raises(TransferSetupError, match="carrier pigeon"):
        open_backend("carrier pigeon", arena=arena)
