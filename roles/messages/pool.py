"""Messages to and from buffer pools: leases on blocks, and copies between pools."""

from __future__ import annotations

from typing import Final

from triptych.bus import Generation, Message
from triptych.roles.messages.common import Attempt, LeaseRef, Name, Natural, Seconds, Value, Word

POOL_ANSWER_S: Final = 2.0
"""Seconds to wait for a pool. A pool answers without waiting for other processes; one that hangs must not block its
clients for longer."""


class PoolQuery(Message):
    """Asks for the PoolDescription."""


class PoolDescription(Message):
    """Where the arena of a pool is and how full."""

    name: Name
    generation: Generation
    capacity: Natural
    free: Natural
    leased: Natural
    session: str
    """Address of this pool for the transfer engine of another one; "" for shm."""
    base_address: Word
    """Of the arena in the pool's process, for one-sided reads."""
    transport: str
    """The transport that carries the bytes, in words."""
    arena: str = ""
    """`engines.memory.arena.ArenaAddress` as text: what a process of the same host needs to map the arena."""


class LeaseBlock(Message):
    """Lease a block for writing. Asks for BlockLeased or PoolFull.

    Asking again before the block is sealed returns the same one, so that a lost answer leaks no memory.
    """

    attempt: Attempt
    owner: Name
    """Component name. The pool reclaims the block when this generation of the component has ended."""
    owner_generation: Generation
    nbytes: Natural
    incoming: bool = False
    """The block is for tensors from another pool, not for outputs of the owner."""
    number: Natural = 0
    """0 for the block of the attempt's inputs or outputs; others for further blocks that the owner leases for it."""
    checkpoint: bool = False
    """The block is for a checkpoint: an output that nobody waits for, and that is left out if the pool is full."""


class BlockLeased(Message):
    """A block in state `writing`."""

    lease: LeaseRef


class PoolFull(Message):
    """There is no block of that size now, or ever if `needed` exceeds `largest`."""

    needed: Natural
    free: Natural
    largest: Natural
    """Bytes of the largest block that the pool would lease if it were empty."""


class MemoryPressure(Message):
    """Pool to head: the pool is too full for an encoder's output, or for what has to share room with checkpoints.

    Sent at each try to lease its block.
    """

    pool: Name
    nbytes: Natural
    checkpoints: bool = False
    """Whether checkpoints are in the way; else cached outputs of encoders are."""


class ReleasePreallocated(Message):
    """Pool to instance: release your preallocated blocks, since the pool is too full for an arrival."""

    pool: Name


class SealBlock(Message):
    """Seal a block that is written: it belongs to the request from then on. Asks for BlockSealed."""

    lease: LeaseRef
    checksum: Word
    nbytes: Natural


class BlockSealed(Message):
    """The block will not change until it is released."""


class ReleaseBlocks(Message):
    """Release blocks; one that is already free, or of an older pool, is no error. Asks for BlocksReleased."""

    leases: tuple[LeaseRef, ...]


class BlocksReleased(Message):
    """How many of the blocks were still leased."""

    count: Natural


class PullBlock(Message):
    """Copy another pool's sealed block into a block of this pool. Asks for BlockPulled.

    A preallocated block belongs to `attempt` from then on. Refused with `wrong_state` when it belongs to another
    attempt, which may be loading it; with `source_gone` when the source pool has restarted since; with
    `transfer_failed` when the copy failed: the target may then be in quarantine, and must be released like any other.
    """

    source: LeaseRef
    target: LeaseRef
    nbytes: Natural
    timeout_s: Seconds
    attempt: Attempt
    """What the bytes are for."""


class BlockPulled(Message):
    """The bytes have been copied; the reader verifies their checksum."""

    seconds: Seconds


class LeaseQuery(Message):
    """Asks for a LeaseReport."""

    after: Word = 0
    """The last lease id of the previous page."""


class LeaseView(Value):
    """A leased block."""

    lease: LeaseRef
    state: Name
    owner: Name
    owner_generation: Generation
    attempt: Attempt


class LeaseReport(Message):
    """A page of the leased blocks of the pool, ordered by lease id."""

    leases: tuple[LeaseView, ...]
    more: bool = False
    """Whether there are more pages."""
