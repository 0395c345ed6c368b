"""The buffer pool: owns the memory for tensors between two stages, and copies bytes from other pools.

It has its own process, so that stored tensors outlive the instance that made them. The lease table decides who may use
which bytes; the pool connects it to the bus, the clock and the transfer engine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from triptych.actors import Actor, Component, DeferredReply, StartDelayedError, StartError, Topology
from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.actors.topology import INCOMING
from triptych.bus import BusError, MailboxFullError, Reference, RefusedError, UnreachableError
from triptych.engines.memory.arena import Arena, ArenaError
from triptych.engines.memory.buddy import PAGE
from triptych.engines.memory.leases import ByteRange, Lease, LeaseError, LeaseState, LeaseTable
from triptych.engines.transfer import (
    QUARANTINE_S,
    PullExecutor,
    TransferBackend,
    TransferError,
    TransferSetupError,
    open_backend,
)
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import (
    POOL_ANSWER_S,
    BlockLeased,
    BlockPulled,
    BlockSealed,
    BlocksReleased,
    LeaseBlock,
    LeaseQuery,
    LeaseReport,
    LeaseView,
    MemoryPressure,
    PoolDescription,
    PoolFull,
    PoolQuery,
    PullBlock,
    ReleaseBlocks,
    ReleasePreallocated,
    SealBlock,
)
from triptych.roles.pool.client import FAULTS

DENOISED = "denoiser"
CHECKPOINT = "checkpoint"
LEASES_PER_REPORT = 2000
"""Leases in one LeaseReport: a message has at most 1 MiB."""
SWEEP_S = 0.5
"""Seconds between two checks whether a failed transfer still writes to its block."""


def build(component: Component, topology: Topology) -> list[Actor]:
    """Make the actors of a buffer pool's process."""
    return [BufferPool(component, topology)]


def zones(capacity: int, needed: Collection[str]) -> dict[str, int]:
    """Return the bytes set apart for each of the zones that a pool needs (`Topology.zones`): equal parts, whole pages.

    A denoiser keeps its input until its output is stored, so outputs must never wait for memory that inputs take; and
    what comes in must never wait for either, so that outputs can go on into another pool. So stored tensors only delay
    more of their own kind, and are released as the next stage proceeds. The last zone, with the outputs of denoisers if
    there are any, has the rest.
    """
    apart = sorted(needed, key=DENOISED.__eq__)[:-1]
    return {zone: capacity // len(needed) // PAGE * PAGE for zone in apart}


@dataclass(frozen=True, slots=True)
class _Memory:
    """The parts of an open pool."""

    arena: Arena
    backend: TransferBackend
    table: LeaseTable
    transfers: PullExecutor


class BufferPool(Actor):
    """The actor of a pool: one per host; with mooncake and no `[[hosts]]` one per kind of role, so bytes are copied."""

    def __init__(self, component: Component, topology: Topology) -> None:
        super().__init__(component.name)
        self.topology = topology
        self.component = component
        self.capacity = topology.pool_bytes(component) // PAGE * PAGE
        self._kinds = {c.name: c.kind for c in topology.components}
        self._owners: dict[str, int] = {}
        self._filling: set[ByteRange] = set()
        self._sweeping = False
        self._opened: _Memory | None = None

    async def started(self) -> None:
        """Allocate the memory and start the transfer engine.

        Raises:
            StartError: The engine does not run here.
            StartDelayedError: There is too little memory now; other processes still map that of an earlier pool.
        """
        try:
            self._opened = await asyncio.to_thread(self._open)
        except ArenaError as error:
            host = self.topology.host_of(self.component)
            where = f'[[hosts]] "{host.name}"' if host is not None and host.pool_size else "[transfer]"
            size = self.topology.pool_size(self.component)
            raise StartDelayedError(f"{error} ({where} pool_size is {size})") from error
        except TransferSetupError as error:
            raise StartError(str(error)) from error
        self.log.info("pool is open", nbytes=self.capacity, transport=self._opened.backend.describe())
        if exposed := self._opened.backend.exposed():
            self.log.warning(exposed)

    async def stopping(self) -> None:
        """Stop the transfer engine. The memory stays until every process has unmapped it."""
        if self._opened is not None:
            await asyncio.to_thread(self._opened.backend.close)

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return how full the pool is, in bytes, and its transport."""
        if self._opened is None:
            return {"capacity": self.capacity}
        table = self._opened.table
        return {
            "capacity": table.capacity,
            "free": table.free,
            "leased": table.leased,
            "leases": len(table.leases),
            "quarantined": len(table.in_state(LeaseState.QUARANTINED)),
            "transport": self._opened.backend.describe(),
        }

    def metrics(self) -> Iterable[Metric]:
        """Return how full the pool is."""
        used = GaugeMetricFamily("triptych_pool_bytes", "Bytes of a pool by what they are.", labels=["state"])
        if self._opened is not None:
            used.add_metric(["leased"], self._opened.table.leased)
            used.add_metric(["free"], self._opened.table.free)
        return [used]

    def watchdog(self) -> str | None:
        """Return a reason when a transfer hangs for good, else None."""
        return self._opened.transfers.watchdog() if self._opened else None

    # -- questions

    async def describe(self, _: PoolQuery) -> PoolDescription:
        """Return where the memory is and how full."""
        store = self._store
        return PoolDescription(
            name=self.name,
            generation=self.generation,
            capacity=store.table.capacity,
            free=store.table.free,
            leased=store.table.leased,
            session=store.backend.session,
            base_address=store.backend.base,
            transport=store.backend.describe(),
            arena=str(store.arena.address),
        )

    async def list_leases(self, message: LeaseQuery) -> LeaseReport:
        """Return a page of the held blocks."""
        page = self._store.table.page(message.after, LEASES_PER_REPORT + 1)
        return LeaseReport(
            tuple(self._view(lease) for lease in page[:LEASES_PER_REPORT]), len(page) > LEASES_PER_REPORT
        )

    # -- blocks

    async def lease(self, message: LeaseBlock) -> BlockLeased | PoolFull:
        """Lease a block for writing."""
        table, zone = self._store.table, self._zone(message)
        self._watch_owner(message.owner, message.owner_generation)
        held = self._existing_lease(message, zone)
        if held is not None and held.capacity >= message.nbytes:
            return BlockLeased(self._lease_ref(held))
        # A payload larger than the smallest pool on its way could not reach the last stage.
        largest = min(table.largest_block(zone), self.topology.largest_payload)
        if message.nbytes > largest:
            return PoolFull(message.nbytes, table.free, largest)
        attempt = message.attempt
        try:
            lease = table.lease(
                message.owner,
                message.owner_generation,
                attempt.job_id,
                attempt.number,
                message.nbytes,
                zone,
                number=message.number,
                now=time.monotonic(),
                waits=not message.checkpoint,
            )
        except LeaseError as error:
            raise RefusedError(error.code, error.detail) from error
        if lease is None:
            if not message.checkpoint:
                self._request_memory(zone)
            return PoolFull(message.nbytes, table.free, largest)
        return BlockLeased(self._lease_ref(lease))

    async def seal(self, message: SealBlock) -> BlockSealed:
        """Seal a block; asking again is no error."""
        lease = self._find(message.lease)
        written = (LeaseState.SEALED, message.checksum, message.nbytes)
        if (lease.state, lease.checksum, lease.nbytes) != written:
            try:
                self._store.table.seal(lease.id, message.checksum, message.nbytes)
            except LeaseError as error:
                raise RefusedError(error.code, error.detail) from error
        return BlockSealed()

    async def release(self, message: ReleaseBlocks) -> BlocksReleased:
        """Release blocks."""
        return BlocksReleased(sum(self._release(reference) for reference in message.leases))

    async def pull(self, message: PullBlock) -> DeferredReply[BlockPulled]:
        """Copy a sealed block of another pool; the pool handles other messages meanwhile."""
        target = self._find(message.target)
        if target.state is not LeaseState.WRITING or message.nbytes > target.capacity:
            raise RefusedError("wrong_state", f"lease {target.id} is {target.state}, of {target.capacity} bytes")
        if target.byte_range in self._filling:
            raise RefusedError("wrong_state", f"lease {target.id} is being filled already")
        attempt = message.attempt
        if not target.request_id:
            target = self._store.table.assign(target.id, attempt.job_id, attempt.number)
        elif (target.request_id, target.attempt) != (attempt.job_id, attempt.number):  # which may be loading it
            raise RefusedError(
                "wrong_state", f"lease {target.id} is for {target.request_id}#{target.attempt}, not {attempt}"
            )
        return DeferredReply(self._pull(message, target))

    async def _pull(self, message: PullBlock, target: Lease) -> BlockPulled:
        began = time.monotonic()
        self._filling.add(target.byte_range)
        try:
            source = await self._describe(message.source)
            await self._store.transfers.pull(
                source.session,
                source.base_address + message.source.offset,
                target.offset,
                message.nbytes,
                message.timeout_s,
            )
        except TransferError as error:
            if error.quarantine:
                self._store.table.quarantine(target.id, time.monotonic() + QUARANTINE_S)
            raise RefusedError("transfer_failed", error.reason) from error
        finally:
            self._filling.discard(target.byte_range)
            self._sweep()
        return BlockPulled(time.monotonic() - began)

    async def _describe(self, source: LeaseRef) -> PoolDescription:
        """Ask the source's pool where its bytes are; it answers only while it lives."""
        try:
            reference = self.reference(source.pool)
        except UnknownNameError as error:
            raise RefusedError("source_gone", f"the topology has no {source.pool} any more") from error
        try:
            try:
                found = await reference.ask(PoolQuery(), PoolDescription, timeout_s=POOL_ANSWER_S)
            except UnreachableError:  # it has just ended; its successor may answer in time
                found = await reference.ask(PoolQuery(), PoolDescription, timeout_s=POOL_ANSWER_S)
        except BusError as error:
            raise RefusedError("transfer_failed", f"{source.pool} does not answer: {error}") from error
        if found.generation != source.pool_generation:
            raise RefusedError("source_gone", f"{source.pool} has restarted: its stored tensors are lost")
        return found

    # -- inside

    def _open(self) -> _Memory:
        topology, settings = self.topology, self.topology.transfer
        host = topology.host_of(self.component)
        hostname, ib_device, ports = settings.hostname, settings.ib_device, None
        if host is not None:
            hostname, ib_device = host.transfer_address or host.address, host.ib_device or ib_device
            ports = topology.transfer_ports(host.name)
        arena = Arena.create(self.capacity)
        backend = open_backend(
            topology.engine,
            arena=arena,
            hostname=hostname,
            ports=ports,
            protocol=settings.protocol,
            ib_device=ib_device,
            faults=os.environ.get(FAULTS, ""),
        )
        apart = zones(self.capacity, topology.zones(self.component))
        table = LeaseTable(self.capacity, generation=self.generation, zones=apart)
        return _Memory(arena, backend, table, PullExecutor(backend))

    @property
    def _store(self) -> _Memory:
        if self._opened is None:
            raise RefusedError("not_ready", f"{self.name} is not open yet")
        return self._opened

    def _request_memory(self, zone: str) -> None:
        """Ask holders of spare blocks to release some for the first lease in the queue."""
        table = self._store.table
        try:
            if (wanted := table.first_waiting_bytes(zone)) and zone == "encoder":
                self.reference("head").tell(MemoryPressure(self.name, wanted))
            elif wanted and zone != INCOMING and any(lease.zone == CHECKPOINT for lease in table.leases):
                self.reference("head").tell(MemoryPressure(self.name, wanted, checkpoints=True))
            elif wanted:
                writing = table.in_state(LeaseState.WRITING)
                for owner in {lease.owner for lease in writing if lease.zone == zone and not lease.request_id}:
                    self.reference(owner).tell(ReleasePreallocated(self.name))
        except MailboxFullError:  # the client repeats its lease, and this request with it
            self.log.debug("memory not requested", zone=zone)

    def _zone(self, message: LeaseBlock) -> str:
        kind = self._kinds.get(message.owner)
        if kind is None:
            raise RefusedError("unknown_owner", f"{message.owner} is not a component of this topology")
        # It has the room of the denoisers' outputs, which is not set apart.
        return CHECKPOINT if message.checkpoint else INCOMING if message.incoming else kind

    def _existing_lease(self, message: LeaseBlock, zone: str) -> Lease | None:
        """Return the block that the same message leased before, whose answer was lost; else None."""
        attempt = message.attempt
        wanted = (message.owner, message.owner_generation, attempt.job_id, attempt.number, zone, message.number)
        for lease in self._store.table.in_state(LeaseState.WRITING):
            found = (lease.owner, lease.owner_generation, lease.request_id, lease.attempt, lease.zone, lease.number)
            if found == wanted:
                return lease
        return None

    def _lease_ref(self, lease: Lease) -> LeaseRef:
        return LeaseRef(self.name, self.generation, lease.id, lease.offset, lease.nbytes)

    def _view(self, lease: Lease) -> LeaseView:
        attempt = Attempt(lease.request_id, lease.attempt)
        return LeaseView(self._lease_ref(lease), lease.state.value, lease.owner, lease.owner_generation, attempt)

    def _find(self, reference: LeaseRef) -> Lease:
        asked, here = (reference.pool, reference.pool_generation), (self.name, self.generation)
        if asked != here:
            raise RefusedError(
                "stale_pool", f"a block of {asked[0]} generation {asked[1]}, this is {here[0]} {here[1]}"
            )
        try:
            lease = self._store.table.get(reference.lease_id)
        except LeaseError as error:
            raise RefusedError(error.code, error.detail) from error
        if lease.offset != reference.offset:
            raise RefusedError("unknown_lease", f"lease {lease.id} is at {lease.offset}, not {reference.offset}")
        return lease

    def _release(self, reference: LeaseRef) -> bool:
        try:
            lease = self._find(reference)
        except RefusedError:  # it is free already, or of an earlier pool, whose memory is gone
            return False
        if lease.overlaps(self._held()):
            self._store.table.quarantine(lease.id)
            self._sweep()
        else:
            self._store.table.release(lease.id)
        return lease.state is not LeaseState.QUARANTINED

    def _held(self) -> tuple[ByteRange, ...]:
        """Return the ranges that a transfer writes to, or may still write to."""
        return (*self._filling, *self._store.transfers.held())

    def _sweep(self) -> None:
        if not self._sweeping and self._store.table.in_state(LeaseState.QUARANTINED):
            self._sweeping = True
            self.spawn(self._sweep_loop(), name="sweep")

    async def _sweep_loop(self) -> None:
        """Free quarantined blocks once no transfer writes to them, until none is left."""
        table = self._store.table
        while True:
            table.expire(time.monotonic(), self._held())
            if not table.in_state(LeaseState.QUARANTINED):
                break
            await asyncio.sleep(SWEEP_S)
        self._sweeping = False

    # -- owners

    def _watch_owner(self, owner: str, generation: int) -> None:
        """Record an owner's incarnation, reclaim what earlier ones were writing, and watch it."""
        known = self._owners.get(owner, 0)
        if generation > known:
            self._owners[owner] = generation
            self._reclaim(owner, generation)
        if not known:
            self.spawn(self._watch(owner), name=f"watch {owner}")

    async def _watch(self, owner: str) -> None:
        reference = self.reference(owner)
        while True:
            await reference.down()
            generation = self._owners[owner]
            if not await self._is_alive(reference, owner, generation):
                self._reclaim(owner, generation + 1)

    async def _is_alive(self, reference: Reference, owner: str, generation: int) -> bool:
        """Return whether that incarnation answers: over TCP a connection can be lost while the process lives."""
        try:
            found = await reference.ask(Inspect(), Inspection, timeout_s=POOL_ANSWER_S)
        except BusError:  # no process answers
            return False
        return any(a.name == owner and a.generation == generation for a in found.actors)

    def _reclaim(self, owner: str, older_than: int) -> None:
        taken = self._store.table.reclaim_owner(owner, older_than, self._held())
        if taken:
            self.log.info("blocks reclaimed", owner=owner, older_than=older_than, blocks=len(taken))
        self._sweep()
