"""Inject faults when their triggers are met, and wait until the victims have recovered."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass

from triptych.actors import AddressBook
from triptych.actors.child_state import ChildState
from triptych.actors.runtime.system_messages import ChildReport
from triptych.api.launch import Cluster
from triptych.bus import BusError, Outbox
from triptych.roles.head.job import RUNNING, State
from triptych.roles.messages.requests import ClusterQuery, ClusterView
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.faults import FAULTS, SYSTEM, FaultContext
from triptych.tools.chaos.plan import PlannedFault

POLL_S = 0.02
TRIGGER_TIMEOUT_S = 5.0
"""Most seconds to wait for a trigger; then the fault is injected anyway."""
RECOVERY_TIMEOUT_S = 60.0
_WITH_STORED_OUTPUTS = (State.DENOISING_WAITING, State.DENOISING_RUNNING, State.DECODER_WAITING)


@dataclass(slots=True)
class InjectedFault:
    """A fault that was injected."""

    fault: str
    victim: str
    at: float
    """Unix seconds."""
    lethal: bool
    """Whether the victim's process has to be replaced."""
    hit: bool = False
    """Whether the victim had a job assigned."""
    recovery_s: float | None = None
    """Seconds until the victim was ready again; None if it was not seen ready."""


class FaultInjector:
    """Injects faults into the components of one cluster."""

    def __init__(self, cluster: Cluster, seed: int, clock: Clock | None = None) -> None:
        self._cluster = cluster
        address_book = AddressBook(cluster.topology)
        self._context = FaultContext(cluster, address_book, random.Random(seed), clock)
        self._outbox = Outbox("chaos", options=address_book.socket_options)
        self._head = self._outbox.reference("head", address_book.address("head"))
        self._victim_locks = {component.name: asyncio.Lock() for component in cluster.topology.components}
        self.injected: list[InjectedFault] = []

    def close(self) -> None:
        """Close the sockets."""
        self._outbox.close()

    async def inject(self, planned: PlannedFault) -> None:
        """Wait for the trigger, inject, and wait until the victim has recovered; repeat if the plan says so."""
        # One fault at a time for each victim, which must be running; the end of a pause continues stalled ones.
        at_once = (
            self._victim_locks.values()
            if planned.fault == "pause"
            else [self._victim_locks.get(planned.victim, asyncio.Lock())]
        )
        async with AsyncExitStack() as stack:
            for lock in at_once:
                await stack.enter_async_context(lock)
            await self._wait_for_trigger(planned)
            for _ in range(1 + planned.twice):
                await self._inject(planned)

    async def _inject(self, planned: PlannedFault) -> None:
        fault = FAULTS[planned.fault]
        victim = None if planned.victim == SYSTEM else (await self._children())[planned.victim]
        at = time.time() + (self._context.clock.offset_s if self._context.clock else 0)
        injection = InjectedFault(
            planned.fault, planned.victim, at, fault.lethal, hit=await self._has_assigned(planned.victim)
        )
        self.injected.append(injection)
        began = time.monotonic()
        await fault.inject(self._context, victim)
        if victim is None:
            injection.recovery_s = 0.0
        else:
            await self._wait_for_recovery(victim, injection, began, ended=time.monotonic())

    async def _wait_for_recovery(
        self, before: ChildReport, injection: InjectedFault, began: float, ended: float
    ) -> None:
        while time.monotonic() - began < RECOVERY_TIMEOUT_S:
            now = (await self._children())[before.name]
            if has_recovered(before, now, since_s=time.monotonic() - ended, lethal=injection.lethal):
                injection.recovery_s = time.monotonic() - began
                return
            await asyncio.sleep(POLL_S)

    async def _children(self) -> dict[str, ChildReport]:
        while True:
            try:
                return await self._cluster.children()
            except BusError:  # the whole system is paused: ask again
                await asyncio.sleep(POLL_S)

    async def _has_assigned(self, victim: str) -> bool:
        try:
            view = await self._head.ask(ClusterQuery(), ClusterView, timeout_s=1.0)
        except BusError:  # without a head nobody knows
            return False
        return any(instance.name == victim and instance.running for instance in view.instances)

    async def _wait_for_trigger(self, planned: PlannedFault) -> None:
        began = time.monotonic()
        while planned.trigger != "any" and time.monotonic() - began < TRIGGER_TIMEOUT_S:
            try:
                view = await self._head.ask(ClusterQuery(), ClusterView, timeout_s=1.0)
            except BusError:  # a head that is down has no moments: look again
                continue
            if trigger_is_met(planned, view):
                return
            await asyncio.sleep(POLL_S / 4)


def has_recovered(before: ChildReport, now: ChildReport, *, since_s: float, lethal: bool) -> bool:
    """Whether the victim of a fault that ended `since_s` seconds ago is as before; pure.

    One that lives on must have been heard since: otherwise the supervisor would count the next fault with this one.
    """
    if now.state != ChildState.READY:
        return False
    return now.generation > before.generation if lethal else now.silence_s < since_s


def trigger_is_met(planned: PlannedFault, view: ClusterView) -> bool:
    """Whether the fault should be injected now; pure."""
    if planned.trigger == "running":
        assigned = {instance.name: bool(instance.running) for instance in view.instances}
        return assigned.get(planned.victim, any(state in RUNNING.values() for state in view.states))
    if planned.trigger == "stored":
        return any(state in _WITH_STORED_OUTPUTS for state in view.states)
    return not view.states
