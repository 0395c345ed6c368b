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


@pytest.mark.parametrize("session", ["", "127.0.0.1:12345", "memfd:1:1:1:1:1"])
def test_a_session_of_nobody_is_refused_for_good(backend, session):
    assert not failure(backend, session=session, address=0, nbytes=1).retryable


def test_it_says_what_it_is(backend, arena):
    assert backend.describe() == "shared memory of this host"
    assert (backend.session, backend.base) == (str(arena.address), 0)
    assert str(os.getpid()) in backend.session


def test_other_engines_are_refused(arena):
    with pytest.raises(TransferSetupError, match="carrier pigeon"):
        open_backend("carrier pigeon", arena=arena)
