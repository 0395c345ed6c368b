"""Causing faults in real processes: real signals, real garbage, and watching the victims come back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from dataclasses import dataclass

import zmq

from actors import AddressBook
from actors.cluster import Cluster
from actors.system import ChildReport
from bus import BusError, Outbox
from roles.messages.requests import ClusterQuery, ClusterView
from tools.chaos.plan import Strike

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "head": signal.SIGKILL,
    "api": signal.SIGKILL,
    "pool": signal.SIGKILL,
}
POLL_S = 0.02
MOMENT_S = 3.0
"""Longest wait for the right moment; then the strike falls anyway."""
GIVE_UP_S = 60.0


@dataclass(slots=True)
class Blow:
    """A strike that fell."""

    fault: str
    victim: str
    at: float
    """Unix seconds."""
    lethal: bool
    """Whether the victim's process has to be replaced."""
    recovery_s: float | None = None
    """Until the victim was ready again; None if it was not seen to be."""


class Striker:
    """Strikes the components of one cluster."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._rng = random.Random(seed)
        self._book = AddressBook(cluster.topology)
        self._outbox = Outbox("chaos", curve=self._book.keys)
        self._head = self._outbox.reference("head", self._book.address("head"))
        self._struck: dict[str, asyncio.Lock] = {}
        self.blows: list[Blow] = []

    def close(self) -> None:
        """Let go of the bus."""
        self._outbox.close()

    async def strike(self, strike: Strike) -> None:
        """Wait for the moment, strike, and see the victim back; once more if it is to be struck twice."""
        # One strike at a time for each victim: what is not there cannot be struck.
        async with self._struck.setdefault(strike.victim, asyncio.Lock()):
            await self._moment(strike)
            for _ in range(1 + strike.twice):
                await self._blow(strike)

    async def _blow(self, strike: Strike) -> None:
        victim = (await self._cluster.children())[strike.victim]
        blow = Blow(strike.fault, strike.victim, time.time(), strike.fault in SIGNALS)
        self.blows.append(blow)
        began = time.monotonic()
        if strike.fault == "garbage":
            await asyncio.to_thread(self._throw_garbage, strike.victim)
        else:
            os.kill(victim.pid, SIGNALS[strike.fault])
        await self._back(victim, blow, began)

    async def _back(self, before: ChildReport, blow: Blow, began: float) -> None:
        while time.monotonic() - began < GIVE_UP_S:
            now = (await self._cluster.children())[before.name]
            if now.state == "ready" and (now.generation > before.generation or not blow.lethal):
                blow.recovery_s = time.monotonic() - began
                return
            await asyncio.sleep(POLL_S)

    async def _moment(self, strike: Strike) -> None:
        began = time.monotonic()
        while strike.moment != "any" and time.monotonic() - began < MOMENT_S:
            try:
                view = await self._head.ask(ClusterQuery(), ClusterView, timeout_s=1.0)
            except BusError:  # a head that is down has no moments: look again
                continue
            if is_moment(strike, view):
                return
            await asyncio.sleep(POLL_S / 4)

    def _throw_garbage(self, name: str) -> None:
        """Bytes that are no message, to the component's mailbox and to the HTTP port."""
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 200
            if keys := self._book.keys:  # from within: from without nothing reaches a mailbox over tcp
                dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = (
                    keys.public,
                    keys.secret,
                    keys.public,
                )
            dealer.connect(self._book.address(name))
            for _ in range(20):
                dealer.send_multipart([self._rng.randbytes(self._rng.randrange(1, 200)) for _ in range(2)])
        api = self._cluster.topology.api
        try:
            with socket.create_connection((api.host, api.port), timeout=5) as raw:
                raw.sendall(self._rng.randbytes(300) + b"\r\n\r\n")
        except ConnectionError:  # the API may be down from another strike
            return


def is_moment(strike: Strike, view: ClusterView) -> bool:
    """Whether the strike should fall now; pure."""
    if strike.moment == "running":
        in_hand = {instance.name: bool(instance.running) for instance in view.instances}
        return in_hand.get(strike.victim, any(state.endswith("RUNNING") for state in view.states))
    if strike.moment == "staged":
        return any(state in ("DENOISING_WAITING", "DENOISING_RUNNING", "DECODER_WAITING") for state in view.states)
    return not view.states
