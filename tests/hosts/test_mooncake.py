"""Mooncake between two hosts: engines that share no memory and no loopback, and a network that can be cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engines.transfer.peer_process import PeerProcess, peer, until
from triptych.tools.hosts import Hosts

NBYTES = 64 << 20
SLOW_MBIT = 400
"""At this rate the bytes take 1.4 s, so that a fault finds the pull under way."""


@contextmanager
def engine_on(hosts: Hosts, host: str) -> Iterator[PeerProcess]:
    def popen(command: list[str], **options: Any) -> Any:
        return hosts.popen(host, *command, **options)

    with peer(NBYTES, popen=popen, engine="mooncake", hostname=hosts.address(host), protocol="tcp") as started:
        yield started


@pytest.fixture
def pair(hosts: Hosts) -> Iterator[tuple[PeerProcess, PeerProcess]]:
    """An engine on b, which pulls, and one on a, which has the bytes."""
    with engine_on(hosts, "b") as puller, engine_on(hosts, "a") as source:
        yield puller, source
    hosts.heal()


def begin_pull(hosts: Hosts, puller: PeerProcess, source: PeerProcess) -> int:
    """Begin to pull everything over a slow link; returns once some of it has arrived."""
    hosts.limit_rate("b", SLOW_MBIT)
    before = received(hosts, "b")
    number = puller.send("pull", **source.source(0, NBYTES), offset=0, timeout_s=60)
    until(lambda: received(hosts, "b") > before + NBYTES // 8)
    return number


def received(hosts: Hosts, host: str) -> int:
    """The bytes that a host has received over its interface."""
    lines = hosts.run(host, "cat", "/proc/net/dev").splitlines()
    return int(next(line for line in lines if "eth0:" in line).split()[1])


def arrives(puller: PeerProcess, source: PeerProcess, byte: int) -> bool:
    expected = source.ask("fill", offset=0, nbytes=NBYTES, byte=byte)
    puller.ask("pull", **source.source(0, NBYTES), offset=0, timeout_s=60)
    return puller.ask("checksum", offset=0, nbytes=NBYTES) == expected


def test_a_pull_between_hosts_brings_the_right_bytes_also_when_it_is_cut_for_a_moment(
    hosts: Hosts, pair: tuple[PeerProcess, PeerProcess]
) -> None:
    puller, source = pair
    assert source.session.startswith(f"{hosts.address('a')}:")
    assert arrives(puller, source, 3)
    expected = source.ask("fill", offset=0, nbytes=NBYTES, byte=4)
    pulled = begin_pull(hosts, puller, source)
    hosts.flap("a", times=2, down_s=0.1, up_s=0.1)
    assert "error" not in puller.answer(pulled)
    assert puller.ask("checksum", offset=0, nbytes=NBYTES) == expected


def test_a_pull_from_a_host_that_dies_ends_with_an_error_and_its_successor_is_reached(
    hosts: Hosts, pair: tuple[PeerProcess, PeerProcess]
) -> None:
    puller, source = pair
    pulled = begin_pull(hosts, puller, source)
    source.process.kill()
    error = puller.answer(pulled)
    assert (error.get("retryable"), error.get("quarantine")) == (True, True), error
    hosts.heal()
    with engine_on(hosts, "a") as successor:
        assert arrives(puller, successor, 5)


@pytest.mark.hosts
def test_a_long_cut_ends_a_pull_and_those_after_it_and_the_first_after_the_heal_is_right(
    hosts: Hosts, pair: tuple[PeerProcess, PeerProcess]
) -> None:
    puller, source = pair
    pulled = begin_pull(hosts, puller, source)
    with hosts.partition("a", "b"):
        error = puller.answer(pulled)
        assert (error.get("retryable"), error.get("quarantine")) == (True, True), error
        later = puller.refused("pull", **source.source(0, 4096), offset=0, timeout_s=20)
        assert later["retryable"]
    hosts.heal()
    assert arrives(puller, source, 6)
    until(lambda: puller.ask("held") == [])


@pytest.mark.hosts
@pytest.mark.parametrize(("sender", "receiver"), [("a", "b"), ("b", "a")])
def test_a_pull_ends_where_one_direction_is_cut(
    hosts: Hosts, pair: tuple[PeerProcess, PeerProcess], sender: str, receiver: str
) -> None:
    puller, source = pair
    pulled = begin_pull(hosts, puller, source)
    with hosts.one_way(sender, receiver):
        error = puller.answer(pulled)
        assert error.get("retryable"), error
    hosts.heal()
    assert arrives(puller, source, 7)


@pytest.mark.hosts
def test_pulls_over_a_network_that_loses_packets_bring_the_right_bytes(
    hosts: Hosts, pair: tuple[PeerProcess, PeerProcess]
) -> None:
    puller, source = pair
    with hosts.lose(1), hosts.delay("a", 0.002, 0.001):
        assert arrives(puller, source, 8)
