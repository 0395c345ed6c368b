"""Anyone to a buffer pool: leases on slots, and moving bytes between pools."""

from __future__ import annotations

from bus import Message

from roles.messages.work import LeaseRef, Value, Work


class PoolQuery(Message):
    """Asks for the PoolDescription."""


class PoolDescription(Message):
    """Where the arena is and how full."""

    name: str
    generation: int
    pid: int
    fd: int
    """The memfd's number in the pool's process; mapped through /proc/PID/fd/FD."""
    capacity: int
    free: int
    leased: int
    session: str
    """How the transfer engine of another pool addresses this one; empty for shm."""
    base_address: int
    """Of the arena in the pool's process, for one-sided reads."""
    transport: str
    """What really carries the bytes, in words."""


class LeaseSlot(Message):
    """Lease a slot for writing. Asks for SlotLeased or PoolFull."""

    work: Work
    owner: str
    """Taken back when this generation of this actor is gone."""
    owner_generation: int
    nbytes: int


class SlotLeased(Message):
    """A slot in state `writing`."""

    lease: LeaseRef


class PoolFull(Message):
    """No slot of that size now, or ever if `needed` exceeds `capacity`."""

    needed: int
    free: int
    capacity: int


class SealSlot(Message):
    """The slot is written: from now on it belongs to the request. Asks for SlotSealed."""

    lease: LeaseRef
    checksum: int
    nbytes: int


class SlotSealed(Message):
    """The slot will not change until it is released."""


class ReleaseSlots(Message):
    """Give slots back; one that is already free, or of an older pool, is no error. Asks for SlotsReleased."""

    leases: tuple[LeaseRef, ...]


class SlotsReleased(Message):
    """How many of them were still held."""

    count: int


class PullSlot(Message):
    """Read another pool's sealed slot into one of yours. Asks for SlotPulled; refused with `transfer_failed`."""

    source: LeaseRef
    target: LeaseRef
    nbytes: int
    timeout_s: float


class SlotPulled(Message):
    """The bytes have been written; whether they are right, the checksum tells."""

    seconds: float


class LeaseQuery(Message):
    """Asks for the LeaseReport."""


class LeaseView(Value):
    """A held slot."""

    lease: LeaseRef
    state: str
    owner: str
    owner_generation: int
    work: Work


class LeaseReport(Message):
    """Every held slot of the pool."""

    leases: tuple[LeaseView, ...]
