"""Blocks that a receiver leases ahead of time, so that the next arrival need not wait for one."""

from __future__ import annotations

from triptych.roles.messages.common import Attempt, LeaseRef


class Preallocation:
    """Preallocated blocks, all of the size of the largest arrival so far. Pure: says what to lease and to release.

    Args:
        count: How many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.nbytes = 0
        """Bytes of the largest arrival; 0 before the first one, and then no block is kept."""
        self.blocks: list[LeaseRef] = []
        self._leased = 0

    @property
    def wanted(self) -> bool:
        """Return whether to lease one more block."""
        return bool(self.nbytes) and len(self.blocks) < self.count

    def next_attempt(self) -> Attempt:
        """Return the attempt for the next lease, which has no job."""
        self._leased += 1
        return Attempt("", self._leased)

    def require(self, nbytes: int) -> tuple[LeaseRef, ...]:
        """Record the bytes of an arrival; return the blocks that are too small now."""
        if nbytes <= self.nbytes:
            return ()
        self.nbytes = nbytes
        small, self.blocks = tuple(self.blocks), []
        return small

    def add(self, block: LeaseRef) -> None:
        """Add a block; forget those of an earlier incarnation of the pool."""
        self.blocks = [kept for kept in self.blocks if kept.pool_generation == block.pool_generation]
        self.blocks.append(block)

    def clear(self) -> tuple[LeaseRef, ...]:
        """Remove and return all blocks. The next arrival leases new ones."""
        blocks, self.blocks = tuple(self.blocks), []
        return blocks

    def use(self, target: LeaseRef | None) -> bool:
        """Remove a block for an arrival; return False when it is not one of these."""
        if target not in self.blocks:
            return False
        self.blocks.remove(target)
        return True
