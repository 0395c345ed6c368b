"""Who may use which bytes of a pool: a pure table over a buddy allocator. No clock, no memory, no torch.

A lease is `writing` (owned by one generation of one actor), then `sealed` with its checksum (owned by its
request), then released. After a failed transfer it is `quarantined` until nothing can write to it any more.
Nothing else owns memory of the pool, so `free + leased == capacity` holds after every call.

Whoever is refused for want of room is served before those who ask later in the same zone, so that small leases never
overtake a large one for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final, TypeAlias

import msgspec

from triptych.engines.memory.buddy import PAGE, BuddyAllocator

# Pool generations are milliseconds, so ids of two incarnations could only meet after a million leases in
# each of them.
IDS_PER_GENERATION = 1 << 20

ByteRange: TypeAlias = tuple[int, int]
"""A range of an arena: its offset and its number of bytes."""

QUEUE_TIMEOUT_S: Final = 2.0
"""Seconds for which a refused asker keeps its place in the queue; asking again renews it."""

_Waiter: TypeAlias = tuple[str, int, str, int, str]  # owner, owner_generation, request_id, attempt, zone


class LeaseState(StrEnum):
    """Where a lease is in its life; a released one is no longer in the table."""

    WRITING = "writing"
    SEALED = "sealed"
    QUARANTINED = "quarantined"


class LeaseError(Exception):
    """A request that the table refuses.

    `code` is "unknown_lease" (never given, or released), "wrong_state", "too_large" (sealed with more bytes
    than it holds), or "stale_owner" (an older generation than one already reclaimed).
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Lease(msgspec.Struct, frozen=True):
    """One block of the pool.

    Offsets and sizes are bytes from the start of the arena; times are unix seconds.
    """

    id: int
    offset: int
    nbytes: int  # asked for; after seal, what was written
    capacity: int  # bytes that the block really takes
    state: LeaseState
    owner: str
    owner_generation: int
    request_id: str = ""  # "" for a block that its owner took in advance
    attempt: int = 0
    checksum: int = 0  # xxh3_64 of the first `nbytes`, once sealed
    zone: str = ""
    number: int = 0  # distinguishes the blocks of an owner for one attempt
    quarantined_until: float = 0.0

    @property
    def byte_range(self) -> ByteRange:
        """The bytes of its block."""
        return self.offset, self.capacity

    def overlaps(self, ranges: Iterable[ByteRange]) -> bool:
        """Whether one of `ranges` has bytes of its block."""
        end = self.offset + self.capacity
        return any(offset < end and self.offset < offset + nbytes for offset, nbytes in ranges)


@dataclass(slots=True)
class _ZoneAllocator:
    """A stretch of the pool and who waits for a block of it."""

    offset: int
    buddy: BuddyAllocator
    queue: dict[_Waiter, tuple[int, float]] = field(default_factory=dict)
    """Askers that were refused, the first one first: bytes wanted, and when it last asked."""


class LeaseTable:
    """Leases over `capacity` bytes.

    `generation` is that of the pool's incarnation: it makes lease ids unique across restarts. `zones` maps a zone's
    name to the bytes, a multiple of `min_block`, that are set apart for its leases. They lie there and nowhere else,
    and nothing else does, so that leases of one stage are never in the way of another's. The leases of all zones not
    named there share the rest. Raises ValueError as BuddyAllocator does.
    """

    def __init__(
        self,
        capacity: int,
        *,
        min_block: int = PAGE,
        generation: int = 0,
        zones: Mapping[str, int] | None = None,
    ) -> None:
        self.capacity = capacity
        """Bytes of the pool."""
        self._zones: dict[str, _ZoneAllocator] = {}
        start = 0
        for zone, nbytes in (zones or {}).items():
            self._zones[zone] = _ZoneAllocator(start, BuddyAllocator(nbytes, min_block))
            start += nbytes
        self._rest = _ZoneAllocator(start, BuddyAllocator(capacity - start, min_block))
        self._next_id = generation * IDS_PER_GENERATION + 1
        self._leases: dict[int, Lease] = {}
        self._oldest_allowed: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Bytes that no lease holds."""
        return sum(allocator.buddy.free_bytes for allocator in self._allocators)

    @property
    def leased(self) -> int:
        """Bytes held by leases, quarantined ones included."""
        return sum(lease.capacity for lease in self._leases.values())

    @property
    def leases(self) -> tuple[Lease, ...]:
        """All leases, oldest first."""
        return tuple(self._leases.values())

    def in_state(self, state: LeaseState) -> tuple[Lease, ...]:
        """List the leases in `state`, oldest first."""
        return tuple(lease for lease in self._leases.values() if lease.state is state)

    def get(self, lease_id: int) -> Lease:
        """Return the lease of that id. Raises LeaseError("unknown_lease")."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseError("unknown_lease", f"lease {lease_id} was never given, or has been released")
        return lease

    def page(self, after: int, count: int) -> tuple[Lease, ...]:
        """List the first `count` leases of an id above `after`, in the order of their ids."""
        return tuple(islice((lease for lease in self._leases.values() if lease.id > after), count))

    def largest_block(self, zone: str = "") -> int:
        """Bytes of the largest lease that an empty pool could give in `zone`: asking for more is in vain."""
        return self._allocator(zone).buddy.largest_block

    def first_waiting_bytes(self, zone: str = "") -> int:
        """Bytes that the first in the queue for `zone` was refused; 0 when nobody waits."""
        return next((nbytes for nbytes, _ in self._allocator(zone).queue.values()), 0)

    def lease(
        self,
        owner: str,
        owner_generation: int,
        request_id: str,
        attempt: int,
        nbytes: int,
        zone: str = "",
        *,
        number: int = 0,
        now: float = 0.0,
        waits: bool = True,
    ) -> Lease | None:
        """Give a new `writing` lease of at least `nbytes` bytes; None when there is no room, or others wait for it.

        Who is refused at `now` (monotonic seconds) has a place in the queue for QUEUE_TIMEOUT_S seconds, unless the
        lease is for no request, to be kept ready, or the asker does not wait. Raises LeaseError("stale_owner") for an
        owner older than a generation of it that was already reclaimed, and ValueError for negative `nbytes`.
        """
        if owner_generation < self._oldest_allowed.get(owner, 0):
            raise LeaseError("stale_owner", f"{owner} generation {owner_generation} has been succeeded by a newer one")
        allocator, asker = self._allocator(zone), (owner, owner_generation, request_id, attempt, zone)
        for gone in [other for other, (_, asked_at) in allocator.queue.items() if asked_at + QUEUE_TIMEOUT_S < now]:
            del allocator.queue[gone]
        offset = allocator.buddy.allocate(nbytes) if next(iter(allocator.queue), asker) == asker else None
        if offset is None:
            if request_id and waits:
                allocator.queue[asker] = (nbytes, now)
            return None
        allocator.queue.pop(asker, None)
        lease = Lease(
            id=self._next_id,
            offset=allocator.offset + offset,
            nbytes=nbytes,
            capacity=allocator.buddy.block_size(offset),
            state=LeaseState.WRITING,
            owner=owner,
            owner_generation=owner_generation,
            request_id=request_id,
            attempt=attempt,
            zone=zone,
            number=number,
        )
        self._next_id += 1
        self._leases[lease.id] = lease
        return lease

    def assign(self, lease_id: int, request_id: str, attempt: int) -> Lease:
        """Give a block that was taken in advance to a request.

        Raises LeaseError unless it is `writing` and unassigned.
        """
        lease = self._in_state(lease_id, LeaseState.WRITING)
        if lease.request_id:
            raise LeaseError("wrong_state", f"lease {lease_id} already belongs to request {lease.request_id}")
        return self._put(lease, request_id=request_id, attempt=attempt)

    def seal(self, lease_id: int, checksum: int, nbytes: int) -> Lease:
        """Close the block for writing: from here on it belongs to its request.

        Raises LeaseError: "unknown_lease", "wrong_state" or "too_large" (the block holds less than `nbytes`).
        """
        lease = self._in_state(lease_id, LeaseState.WRITING)
        if not 0 <= nbytes <= lease.capacity:
            raise LeaseError("too_large", f"lease {lease_id} holds {lease.capacity} bytes, not {nbytes}")
        return self._put(lease, state=LeaseState.SEALED, checksum=checksum, nbytes=nbytes)

    def release(self, lease_id: int) -> Lease:
        """Free a lease and return it as it was; a quarantined one stays: only `expire` frees it.

        Raises LeaseError("unknown_lease"), a second release included.
        """
        lease = self.get(lease_id)
        if lease.state is not LeaseState.QUARANTINED:
            self._drop(lease)
        return lease

    def quarantine(self, lease_id: int, until: float = 0.0) -> Lease:
        """Keep the bytes of a lease from being leased again, since something may still write there.

        It is freed by the first `expire` from `until` (unix seconds) on that finds nobody
        writing. Raises LeaseError("unknown_lease").
        """
        return self._put(self.get(lease_id), state=LeaseState.QUARANTINED, quarantined_until=until)

    def expire(self, now: float, held: Collection[ByteRange] = ()) -> list[Lease]:
        """Free the quarantined leases whose time is up and that overlap no (offset, nbytes) in `held`."""
        return self._drop_all(
            lease
            for lease in self.in_state(LeaseState.QUARANTINED)
            if lease.quarantined_until <= now and not lease.overlaps(held)
        )

    def reclaim_owner(self, owner: str, older_than_generation: int, held: Collection[ByteRange] = ()) -> list[Lease]:
        """Take back what dead incarnations of `owner` were writing, and give them nothing from here on.

        A block that has a request is sealed as it is: the owner may have reported it before it was sealed, so whoever
        knows the request decides when it is released. A block that overlaps a range in `held` (a transfer is still
        filling it) is quarantined in place of freed, and goes with the first `expire` that no longer finds it held.
        Returns the leases taken back, as they were.
        """
        fence = max(older_than_generation, self._oldest_allowed.get(owner, 0))
        self._oldest_allowed[owner] = fence
        for allocator in self._allocators:
            for asker in [a for a in allocator.queue if a[0] == owner and a[1] < fence]:
                del allocator.queue[asker]
        taken = [
            lease
            for lease in self.in_state(LeaseState.WRITING)
            if lease.owner == owner and lease.owner_generation < older_than_generation
        ]
        for lease in taken:
            if lease.overlaps(held):
                self.quarantine(lease.id)
            elif lease.request_id:
                self._put(lease, state=LeaseState.SEALED)
            else:
                self._drop(lease)
        return taken

    @property
    def _allocators(self) -> tuple[_ZoneAllocator, ...]:
        return (*self._zones.values(), self._rest)

    def _allocator(self, zone: str) -> _ZoneAllocator:
        return self._zones.get(zone, self._rest)

    def _in_state(self, lease_id: int, state: LeaseState) -> Lease:
        lease = self.get(lease_id)
        if lease.state is not state:
            raise LeaseError("wrong_state", f"lease {lease_id} is {lease.state}, not {state}")
        return lease

    def _put(self, lease: Lease, **changes: object) -> Lease:
        changed = msgspec.structs.replace(lease, **changes)
        self._leases[lease.id] = changed
        return changed

    def _drop(self, lease: Lease) -> None:
        del self._leases[lease.id]
        allocator = self._allocator(lease.zone)
        allocator.buddy.free(lease.offset - allocator.offset)

    def _drop_all(self, leases: Iterable[Lease]) -> list[Lease]:
        dropped = list(leases)
        for lease in dropped:
            self._drop(lease)
        return dropped
