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
from triptych.bus import BusError, Outbox
from triptych.roles.head.job import RUNNING, State
from triptych.roles.messages.requests import ClusterQuery, ClusterView
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.faults import FAULTS, SYSTEM, FaultContext, components_of_victim, hosts_of_victim
from triptych.tools.chaos.plan import PlannedFault
from triptych.tools.chaos.target import Target
from triptych.tools.hosts.cluster import HostsCluster

POLL_S = 0.02
TRIGGER_TIMEOUT_S = 5.0
"""Most seconds to wait for a trigger; then the fault is injected anyway."""
RECOVERY_TIMEOUT_S = 120.0
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
    may_restart: tuple[str, ...] = ()
    """Components, besides the victim, whose process may be replaced because of it: instances that it parted from the
    head."""
    counts_anew: tuple[str, ...] = ()
    """Components whose supervisor was itself replaced, and knows of no earlier restarts."""


class FaultInjector:
    """Injects faults into the components of one cluster."""

    def __init__(self, cluster: Target, seed: int, clock: Clock | None = None) -> None:
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
        # One fault at a time for each component, which must be running; the end of a pause continues stalled ones.
        alone = planned.victim != SYSTEM or FAULTS[planned.fault].alone
        hit = components_of_victim(self._cluster.topology, planned.fault, planned.victim) if alone else []
        async with AsyncExitStack() as stack:
            for name in hit:
                await stack.enter_async_context(self._victim_locks[name])
            await self._wait_for_trigger(planned)
            for _ in range(1 + planned.twice):
                await self._inject(planned)

    async def _inject(self, planned: PlannedFault) -> None:
        fault = FAULTS[planned.fault]
        of_process = planned.victim != SYSTEM and fault.into_hosts is None
        hit = await self._has_assigned(planned.victim)
        victim = await self._running(planned.victim) if of_process else None
        # Dated once nothing is left to ask: the report counts from here until the head has seen it.
        at = time.time() + (self._context.clock.offset_s if self._context.clock else 0)
        injection = InjectedFault(planned.fault, planned.victim, at, fault.lethal, hit=hit)
        self.injected.append(injection)
        if fault.into_hosts is not None:
            await self._inject_into_hosts(planned, injection)
            return
        began = time.monotonic()
        await fault.inject(self._context, victim)
        if victim is None:
            injection.recovery_s = 0.0
        else:
            await self._wait_for_recovery(victim, injection, began, ended=time.monotonic())

    async def _inject_into_hosts(self, planned: PlannedFault, injection: InjectedFault) -> None:
        into_hosts, cluster = FAULTS[planned.fault].into_hosts, self._cluster
        if into_hosts is None or not isinstance(cluster, HostsCluster):
            raise ValueError(f"{planned.fault} needs several hosts")
        topology = cluster.topology
        hit = components_of_victim(topology, planned.fault, planned.victim)
        hosts = hosts_of_victim(planned.victim)
        instances = tuple(name for name in hit if topology.component(name).slots)
        if FAULTS[planned.fault].ends_supervisors:
            injection.counts_anew = tuple(hit)
        elif topology.head_host in hosts or len(hosts) == 1:
            injection.may_restart = instances
        began = time.monotonic()
        await into_hosts(self._context, cluster, hosts)
        if await self._joined(cluster, hit, instances, began):
            injection.recovery_s = time.monotonic() - began

    async def _joined(
        self, cluster: HostsCluster, components: list[str], instances: tuple[str, ...], began: float
    ) -> bool:
        """Wait until all are ready, and the head has those that are instances; return whether it came to that."""
        while time.monotonic() - began < RECOVERY_TIMEOUT_S:
            await asyncio.to_thread(cluster.start_ended)  # one that was started while the disk was full
            ready = [await self._is_ready(name) for name in components]
            view = await self._look()
            if all(ready) and view and set(instances) <= {instance.name for instance in view.instances}:
                return True
            await asyncio.sleep(POLL_S)
        return False

    async def _wait_for_recovery(
        self, before: ChildReport, injection: InjectedFault, began: float, ended: float
    ) -> None:
        while time.monotonic() - began < RECOVERY_TIMEOUT_S:
            now = await self._child(before.name)
            if has_recovered(before, now, since_s=time.monotonic() - ended, lethal=injection.lethal):
                injection.recovery_s = time.monotonic() - began
                return
            await asyncio.sleep(POLL_S)

    async def _child(self, name: str) -> ChildReport:
        while True:
            try:
                return await self._cluster.child(name)
            except BusError:  # its host, or the whole system, is paused or off: ask again
                await asyncio.sleep(POLL_S)

    async def _is_ready(self, name: str) -> bool:
        try:
            return (await self._cluster.child(name)).state == ChildState.READY
        except BusError:  # its supervisor has not started
            return False

    async def _running(self, name: str) -> ChildReport:
        while True:
            child = await self._child(name)
            if child.pid:
                return child
            await asyncio.sleep(POLL_S)

    async def _look(self) -> ClusterView | None:
        try:
            return await self._head.ask(ClusterQuery(), ClusterView, timeout_s=1.0)
        except BusError:  # a head that is down says nothing
            return None

    async def _has_assigned(self, victim: str) -> bool:
        view = await self._look()
        return view is not None and any(instance.name == victim and instance.running for instance in view.instances)

    async def _wait_for_trigger(self, planned: PlannedFault) -> None:
        began = time.monotonic()
        while planned.trigger != "any" and time.monotonic() - began < TRIGGER_TIMEOUT_S:
            view = await self._look()
            if view is None:  # a head that is down has no moments: look again
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
