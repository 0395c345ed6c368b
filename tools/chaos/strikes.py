"""Cause faults at their moments, and see the victims back."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass

from triptych.actors import AddressBook
from triptych.actors.cluster import Cluster
from triptych.actors.system import ChildReport
from triptych.bus import BusError, Outbox
from triptych.roles.messages.requests import ClusterQuery, ClusterView
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.faults import FAULTS, SYSTEM, Scene
from triptych.tools.chaos.plan import Strike

POLL_S = 0.02
MOMENT_S = 5.0
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
    hit: bool = False
    """Whether a unit was in the victim's hands."""
    recovery_s: float | None = None
    """Until the victim was ready again; None if it was not seen to be."""


class Striker:
    """Strikes the components of one cluster."""

    def __init__(self, cluster: Cluster, seed: int, clock: Clock | None = None) -> None:
        self._cluster = cluster
        book = AddressBook(cluster.topology)
        self._scene = Scene(cluster, book, random.Random(seed), clock)
        self._outbox = Outbox("chaos", curve=book.keys)
        self._head = self._outbox.reference("head", book.address("head"))
        self._struck = {component.name: asyncio.Lock() for component in cluster.topology.components}
        self.blows: list[Blow] = []

    def close(self) -> None:
        """Let go of the bus."""
        self._outbox.close()

    async def strike(self, strike: Strike) -> None:
        """Wait for the moment, strike, and see the victim back; once more if it is to be struck twice."""
        # One strike at a time for each victim: what is not there cannot be struck. A pause would wake who is stopped.
        at_once = (
            self._struck.values() if strike.fault == "pause" else [self._struck.get(strike.victim, asyncio.Lock())]
        )
        async with AsyncExitStack() as stack:
            for lock in at_once:
                await stack.enter_async_context(lock)
            await self._moment(strike)
            for _ in range(1 + strike.twice):
                await self._blow(strike)

    async def _blow(self, strike: Strike) -> None:
        fault = FAULTS[strike.fault]
        victim = None if strike.victim == SYSTEM else (await self._children())[strike.victim]
        at = time.time() + (self._scene.clock.offset_s if self._scene.clock else 0)
        blow = Blow(strike.fault, strike.victim, at, fault.lethal, hit=await self._in_hand(strike.victim))
        self.blows.append(blow)
        began = time.monotonic()
        await fault.inject(self._scene, victim)
        if victim is None:
            blow.recovery_s = 0.0
        else:
            await self._back(victim, blow, began)

    async def _back(self, before: ChildReport, blow: Blow, began: float) -> None:
        while time.monotonic() - began < GIVE_UP_S:
            now = (await self._children())[before.name]
            if now.state == "ready" and (now.generation > before.generation or not blow.lethal):
                blow.recovery_s = time.monotonic() - began
                return
            await asyncio.sleep(POLL_S)

    async def _children(self) -> dict[str, ChildReport]:
        while True:
            try:
                return await self._cluster.children()
            except BusError:  # the whole system is paused: ask again
                await asyncio.sleep(POLL_S)

    async def _in_hand(self, victim: str) -> bool:
        try:
            view = await self._head.ask(ClusterQuery(), ClusterView, timeout_s=1.0)
        except BusError:  # without a head nobody knows
            return False
        return any(instance.name == victim and instance.running for instance in view.instances)

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


def is_moment(strike: Strike, view: ClusterView) -> bool:
    """Whether the strike should fall now; pure."""
    if strike.moment == "running":
        in_hand = {instance.name: bool(instance.running) for instance in view.instances}
        return in_hand.get(strike.victim, any(state.endswith("RUNNING") for state in view.states))
    if strike.moment == "staged":
        return any(state in ("DENOISING_WAITING", "DENOISING_RUNNING", "DECODER_WAITING") for state in view.states)
    return not view.states
