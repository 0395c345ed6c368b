"""Blocks that a receiver leases ahead of time, so that the next arrival need not wait for one."""

from __future__ import annotations

from triptych.roles.messages.common import Attempt, LeaseRef


class Preallocation:
    """The blocks kept ready, all of the size of the largest arrival so far. Pure: says what to lease and to release.

    Args:
        count: how many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.nbytes = 0
        """Size of the largest arrival; 0 before the first, and then there is nothing to keep ready for."""
        self.blocks: list[LeaseRef] = []
        self._leased = 0

    @property
    def wanted(self) -> bool:
        """Whether one more should be leased."""
        return bool(self.nbytes) and len(self.blocks) < self.count

    def next_attempt(self) -> Attempt:
        """Name the next lease: a preallocated block is for no job."""
        self._leased += 1
        return Attempt("", self._leased)

    def require(self, nbytes: int) -> tuple[LeaseRef, ...]:
        """Take note of an arrival's size; returns blocks that have become too small."""
        if nbytes <= self.nbytes:
            return ()
        self.nbytes = nbytes
        small, self.blocks = tuple(self.blocks), []
        return small

    def add(self, block: LeaseRef) -> None:
        """Keep a block ready; those of an earlier incarnation of the pool are gone."""
        self.blocks = [kept for kept in self.blocks if kept.pool_generation == block.pool_generation]
        self.blocks.append(block)

    def clear(self) -> tuple[LeaseRef, ...]:
        """Keep none of them any more; returns them. The next arrival is a reason to lease others."""
        blocks, self.blocks = tuple(self.blocks), []
        return blocks

    def use(self, target: LeaseRef | None) -> bool:
        """An arrival takes this block; False when it is none of these."""
        if target not in self.blocks:
            return False
        self.blocks.remove(target)
        return True
