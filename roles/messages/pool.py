"""Anyone to a buffer pool: leases on blocks, and moving bytes between pools."""

from __future__ import annotations

from typing import Final

from triptych.bus import Generation, Message
from triptych.roles.messages.common import Attempt, LeaseRef, Name, Natural, Seconds, Value, Word

POOL_ANSWER_S: Final = 2.0
"""A pool decides without waiting for anybody, so that one that is alive answers well within this. One that hangs must
not hold up those who ask, nor a thread of theirs."""


class PoolQuery(Message):
    """Asks for the PoolDescription."""


class PoolDescription(Message):
    """Where the arena is and how full."""

    name: Name
    generation: Generation
    capacity: Natural
    free: Natural
    leased: Natural
    session: str
    """How the transfer engine of another pool addresses this one; empty for shm."""
    base_address: Word
    """Of the arena in the pool's process, for one-sided reads."""
    transport: str
    """What really carries the bytes, in words."""
    arena: str = ""
    """`engines.memory.arena.ArenaAddress` as text: what a process of the same host needs to map the arena."""


class LeaseBlock(Message):
    """Lease a block for writing. Asks for BlockLeased or PoolFull.

    Asking again before it is sealed gives the same block, so that an answer that was lost loses no memory.
    """

    attempt: Attempt
    owner: Name
    """Component name. The block is taken back when this generation of it is gone."""
    owner_generation: Generation
    nbytes: Natural
    incoming: bool = False
    """For tensors to come from another pool, not for what the owner makes itself."""


class BlockLeased(Message):
    """A block in state `writing`."""

    lease: LeaseRef


class PoolFull(Message):
    """No block of that size now, or ever if `needed` exceeds `largest`."""

    needed: Natural
    free: Natural
    largest: Natural
    """Bytes of the largest block that an empty pool would give for this."""


class MemoryPressure(Message):
    """Pool to head: an encoder's output would fit, and there was no room. Told each time that it is asked for again."""

    pool: Name
    nbytes: Natural


class ReleasePreallocated(Message):
    """Pool to instance: an arrival would fit, and there was no room. Give back the blocks that you keep ready."""

    pool: Name


class SealBlock(Message):
    """The block is written: from now on it belongs to the request. Asks for BlockSealed."""

    lease: LeaseRef
    checksum: Word
    nbytes: Natural


class BlockSealed(Message):
    """The block will not change until it is released."""


class ReleaseBlocks(Message):
    """Give blocks back; one that is already free, or of an older pool, is no error. Asks for BlocksReleased."""

    leases: tuple[LeaseRef, ...]


class BlocksReleased(Message):
    """How many of them were still held."""

    count: Natural


class PullBlock(Message):
    """Read another pool's sealed block into one of yours. Asks for BlockPulled.

    A block that was taken in advance is from then on `attempt`'s. Refused with `wrong_state` when it is another
    attempt's, which may be loading it; with `source_gone` when the source pool has started anew since; with
    `transfer_failed` when the bytes did not come: the target may then be in quarantine, and is to be released like any
    other.
    """

    source: LeaseRef
    target: LeaseRef
    nbytes: Natural
    timeout_s: Seconds
    attempt: Attempt
    """What the bytes are for."""


class BlockPulled(Message):
    """The bytes have been written; whether they are right, the checksum tells."""

    seconds: Seconds


class LeaseQuery(Message):
    """Asks for a LeaseReport."""

    after: Word = 0
    """The last lease id of the page before."""


class LeaseView(Value):
    """A held block."""

    lease: LeaseRef
    state: Name
    owner: Name
    owner_generation: Generation
    attempt: Attempt


class LeaseReport(Message):
    """The held blocks of the pool, a page of them in the order of their lease ids."""

    leases: tuple[LeaseView, ...]
    more: bool = False
    """There are others after these."""
