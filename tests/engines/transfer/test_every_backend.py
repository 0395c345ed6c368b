"""What each backend of `engines.backends.BACKENDS` must do, between real processes. What is its own is tested apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec

import pytest

from tests.engines.transfer.peer_process import PeerProcess, arrives, peer
from triptych.engines.backends import BACKENDS

NBYTES = 1 << 20


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if (package := BACKENDS[name].package) and not find_spec(package):
        pytest.skip(f"{package} is not installed")
    return name


def peer_with(engine: str) -> AbstractContextManager[PeerProcess]:
    return peer(NBYTES, engine=engine)


@pytest.fixture(scope="module")
def puller(engine: str) -> Iterator[PeerProcess]:
    with peer_with(engine) as process:
        yield process


@pytest.fixture(scope="module")
def server(engine: str) -> Iterator[PeerProcess]:
    with peer_with(engine) as process:
        yield process


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 100_003, NBYTES])
def test_bytes_come_over(puller: PeerProcess, server: PeerProcess, nbytes: int) -> None:
    assert arrives(puller, server, NBYTES - nbytes, nbytes, nbytes % 251)


def test_bytes_beside_the_block_do_not_change(puller: PeerProcess, server: PeerProcess) -> None:
    before = puller.ask("fill", offset=4095, nbytes=4097, byte=77)
    for offset in (0, 8192):
        puller.ask("pull", **server.source(0, 4095), offset=offset, timeout_s=20)
    assert puller.ask("checksum", offset=4095, nbytes=4097) == before


def test_pulls_from_several_peers_run_side_by_side(engine: str, puller: PeerProcess, server: PeerProcess) -> None:
    with peer_with(engine) as third:
        sources = [server, third] * 4
        size = 65536
        expected = [source.ask("fill", offset=k * size, nbytes=size, byte=k) for k, source in enumerate(sources)]
        numbers = [
            puller.send("pull", **source.source(k * size, size), offset=k * size, timeout_s=20)
            for k, source in enumerate(sources)
        ]
        assert all("error" not in puller.answer(number) for number in numbers)
        assert [puller.ask("checksum", offset=k * size, nbytes=size) for k in range(len(sources))] == expected


@pytest.mark.parametrize("session", ["", "127.0.0.1:1", "nobody.invalid:12345", "nonsense", "memfd:1:1:1:1:1"])
def test_nothing_is_pulled_from_a_session_of_nobody(puller: PeerProcess, session: str) -> None:
    error = puller.refused("pull", session=session, address=4096, nbytes=1, offset=0, timeout_s=5)
    assert error["quarantine"] is False, error
    assert puller.ask("held") == []


def test_a_source_outside_the_arena_of_the_peer_is_refused(puller: PeerProcess, server: PeerProcess) -> None:
    before = puller.ask("fill", offset=0, nbytes=NBYTES, byte=3)
    error = puller.refused("pull", **server.source(NBYTES - 1, 2), offset=0, timeout_s=20)
    assert "retryable" in error, error
    assert puller.ask("checksum", offset=0, nbytes=NBYTES) == before


def test_a_target_outside_the_arena_is_a_mistake_of_the_caller(puller: PeerProcess, server: PeerProcess) -> None:
    error = puller.refused("pull", **server.source(0, 2), offset=NBYTES - 1, timeout_s=10)
    assert "outside" in error["error"]
    assert "retryable" not in error, "no TransferError"


def test_a_pull_without_time_copies_nothing(puller: PeerProcess, server: PeerProcess) -> None:
    before = puller.ask("fill", offset=0, nbytes=4096, byte=5)
    server.ask("fill", offset=0, nbytes=4096, byte=6)
    error = puller.refused("pull_once", **server.source(0, 4096), offset=0, timeout_s=0)
    assert (error.get("retryable"), error.get("quarantine")) == (True, False), error
    assert puller.ask("held") == []
    assert puller.ask("checksum", offset=0, nbytes=4096) == before


def test_nothing_is_pulled_from_a_peer_that_died(engine: str, puller: PeerProcess, server: PeerProcess) -> None:
    with peer_with(engine) as gone:
        assert arrives(puller, gone, 0, 4096, 1)
    error = puller.refused("pull", **gone.source(0, 4096), offset=0, timeout_s=5)
    assert "retryable" in error, error
    assert arrives(puller, server, 0, 4096, 2)


def test_a_closed_backend_pulls_nothing(engine: str, server: PeerProcess) -> None:
    with peer_with(engine) as closing:
        # Hazard 1 of Mooncake: a closed engine that is called ends the process.
        closing.ask("close")
        error = closing.refused("pull", **server.source(0, 1), offset=0, timeout_s=5)
        assert (error["error"], error["retryable"]) == ("the backend is closed", False)
        assert closing.ask("held") == []


def test_it_says_what_it_is_and_who_can_reach_it(engine: str, puller: PeerProcess, server: PeerProcess) -> None:
    line = puller.ask("describe")
    assert len(line.splitlines()) == 1
    assert bool(puller.ask("exposed")) is BACKENDS[engine].is_open_to_network
    assert puller.session != server.session
