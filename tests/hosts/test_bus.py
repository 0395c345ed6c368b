"""The bus between two hosts: a loss is seen, a short one is not, and after a heal the peers meet again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from triptych.bus import CurveKeys
from triptych.tools.hosts import HostProcess, Hosts, NetworkFault

PROGRAM = str(Path(__file__).with_name("bus_peer.py"))
KEYS = CurveKeys.new()
QUICK_S = 0.1
"""Heartbeat of tests in which a loss is to be seen."""
PATIENT_S = 20.0
"""Heartbeat of tests in which none is."""


class Ends:
    """A mailbox on a, and an outbox on b that does what it is told."""

    def __init__(self, hosts: Hosts, heartbeat_s: float, stack: ExitStack) -> None:
        self.hosts = hosts
        self.stack = stack
        self.heartbeat_s = heartbeat_s
        self.server = self.start("a", "serve")
        self.pid = self.server.stdout.readline().strip()
        self.client = self.start("b", "ask")

    def start(self, host: str, mode: str) -> HostProcess:
        address = f"tcp://{self.hosts.address('a')}:5555"
        keys = (KEYS.public.decode(), KEYS.secret.decode())
        command = (sys.executable, PROGRAM, mode, address, *keys, str(self.heartbeat_s))
        process = self.hosts.popen(host, *command, stdin=-1, stdout=-1)
        self.stack.callback(process.communicate)
        self.stack.callback(process.kill)
        return process

    def restart(self) -> None:
        self.server = self.start("a", "serve")
        self.pid = self.server.stdout.readline().strip()

    def tell(self, *words: str) -> None:
        self.client.stdin.write("".join(f"{word}\n" for word in words))
        self.client.stdin.flush()

    def heard(self, count: int = 1) -> list[str]:
        return sorted(self.client.stdout.readline().strip() for _ in range(count))

    def meet(self) -> None:
        """Ask until there is an answer of the present peer."""
        while True:
            self.tell("ask")
            (said,) = self.heard()
            if said == f"ask {self.pid}":
                return
            assert said == "ask UnreachableError", said


@pytest.fixture
def ends(hosts: Hosts) -> Iterator[Callable[[float], Ends]]:
    with ExitStack() as stack:
        yield lambda heartbeat_s: Ends(hosts, heartbeat_s, stack)
    hosts.heal()


FAULTS: dict[str, Callable[[Hosts], NetworkFault]] = {
    "cable pulled": lambda hosts: hosts.link_down("a"),
    "own cable pulled": lambda hosts: hosts.link_down("b"),
    "cut": lambda hosts: hosts.partition("a", "b"),
    "requests lost": lambda hosts: hosts.one_way("b", "a"),
    "answers lost": lambda hosts: hosts.one_way("a", "b"),
}


def test_a_loss_of_any_kind_is_seen_and_the_peers_meet_again(hosts: Hosts, ends: Any) -> None:
    pair = ends(QUICK_S)
    for fault in FAULTS.values():
        pair.meet()
        pair.tell("watch", "hold")
        with fault(hosts):
            assert pair.heard(2) == ["hold UnreachableError", "watch down"]
    pair.meet()


def test_a_process_that_dies_or_stops_on_another_host_is_seen(hosts: Hosts, ends: Any) -> None:
    pair = ends(QUICK_S)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        pair.meet()
        pair.tell("watch", "hold")
        pair.server.send_signal(number)
        assert pair.heard(2) == ["hold UnreachableError", "watch down"]
        pair.server.kill()
        pair.server.wait()
        pair.restart()
    pair.meet()


def test_a_host_that_is_switched_off_is_seen_and_reached_when_it_is_back(hosts: Hosts, ends: Any) -> None:
    pair = ends(QUICK_S)
    pair.meet()
    pair.tell("watch", "hold")
    hosts.kill("a")
    assert pair.heard(2) == ["hold UnreachableError", "watch down"]
    hosts.start("a")
    pair.restart()
    pair.meet()


def test_a_cut_that_is_shorter_than_the_heartbeats_fails_nothing(hosts: Hosts, ends: Any) -> None:
    pair = ends(PATIENT_S)
    pair.meet()
    pair.tell("watch")
    with hosts.partition("a", "b"):
        pair.tell("hold", "hold")
    hosts.flap("b", times=3, down_s=0.05, up_s=0.05)
    with hosts.lose(20):
        pair.tell("ask")
        assert pair.heard(3) == [f"ask {pair.pid}", f"hold {pair.pid}", f"hold {pair.pid}"]


@pytest.mark.hosts
@pytest.mark.timeout(180)
@pytest.mark.parametrize("cut_s", [2.0, 40.0])
def test_after_a_cut_of_some_time_the_peers_meet_at_once(hosts: Hosts, ends: Any, cut_s: float) -> None:
    # Without a timeout of its own, a connection would be tried again with the kernel's backoff: after half a minute.
    pair = ends(1.0)
    pair.meet()
    with hosts.partition("a", "b"):
        pair.tell("hold")
        hosts.run("b", "sleep", f"{cut_s:g}")
        said = pair.heard() if cut_s > 3 else []
    if said:
        assert said == ["hold UnreachableError"]
    pair.tell("ask")
    limit = hosts.popen("b", "sleep", "10")
    assert pair.heard(1 if said else 2)[0] == f"ask {pair.pid}"
    assert limit.poll() is None, "that took longer than ten seconds"
    limit.kill()
