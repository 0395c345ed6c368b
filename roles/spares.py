"""Slots that a receiver leases ahead of time, so that the next arrival need not wait for one."""

from __future__ import annotations

from triptych.roles.messages.work import LeaseRef, Work


class Spares:
    """The slots kept ready, all of the size of the largest arrival so far. Pure: says what to lease and to release.

    Args:
        count: how many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.nbytes = 0
        """Size of the largest arrival; 0 before the first, and then there is nothing to keep ready for."""
        self.slots: list[LeaseRef] = []
        self._leased = 0

    @property
    def wanted(self) -> bool:
        """Whether one more should be leased."""
        return bool(self.nbytes) and len(self.slots) < self.count

    def next_work(self) -> Work:
        """Name the next lease: a spare slot is for no unit."""
        self._leased += 1
        return Work("", self._leased)

    def learn(self, nbytes: int) -> tuple[LeaseRef, ...]:
        """Take note of an arrival's size; returns slots that have become too small."""
        if nbytes <= self.nbytes:
            return ()
        self.nbytes = nbytes
        small, self.slots = tuple(self.slots), []
        return small

    def add(self, slot: LeaseRef) -> None:
        """Keep a slot ready; those of an earlier incarnation of the pool are gone."""
        self.slots = [kept for kept in self.slots if kept.pool_generation == slot.pool_generation]
        self.slots.append(slot)

    def clear(self) -> tuple[LeaseRef, ...]:
        """Keep none of them any more; returns them. The next arrival is a reason to lease others."""
        slots, self.slots = tuple(self.slots), []
        return slots

    def use(self, target: LeaseRef | None) -> bool:
        """An arrival takes this slot; False when it is none of these."""
        if target not in self.slots:
            return False
        self.slots.remove(target)
        return True
