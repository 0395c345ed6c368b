"""Dispatch policies: which waiting job goes first, and which instance gets it. Pure.

A policy is a class here (or in a module of its own) and an entry in `POLICIES`, the table that the topology's
`[head] dispatch` chooses from; its name is one of `DispatchName`. A policy sees the job and its request, so that it can
go by the inputs: prefer the instance that has the job's adapter, or the requests of one owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from triptych.actors.topology.sections import DispatchName

if TYPE_CHECKING:
    from triptych.roles.head.job import Job, Request


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance that could take the job now."""

    name: str
    credits: int
    """Jobs that it would still take; at least 1."""
    slots: int
    load: int
    """Jobs that are assigned to it."""
    last_served: int
    """Serial number of the last assignment to it, 0 for never."""
    model: str = ""
    """Version of its weights."""


class DispatchPolicy:
    """First come, first served; to the instance whose last turn is longest ago."""

    def priority(self, job: Job, request: Request) -> float:
        """Return where a waiting job stands in the queue: the lowest goes first, and of equals the one that came first.

        Args:
            job: Waits for an instance of its stage.
            request: That it is of.
        """
        return 0.0

    def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """Choose the instance that gets a job.

        Args:
            job: The first of the queue.
            request: That it is of.
            candidates: At least one; all have the weights that the job needs.
        """
        return min(candidates, key=lambda c: (c.last_served, c.name))


class MaxFreeSlots(DispatchPolicy):
    """To the instance that can take most; in turn among equals."""

    def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """Choose the instance with the most credits."""
        return min(candidates, key=lambda c: (-c.credits, c.last_served, c.name))


class LeastLoaded(DispatchPolicy):
    """To the instance with the smallest share of its slots in use; in turn among equals."""

    def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """Choose the instance with the lowest load."""
        return min(candidates, key=lambda c: (c.load / max(c.slots, 1), c.last_served, c.name))


POLICIES: Final[Mapping[DispatchName, DispatchPolicy]] = {
    "round_robin": DispatchPolicy(),
    "max_free_slots": MaxFreeSlots(),
    "least_loaded": LeastLoaded(),
}
"""Every policy, by its name in the topology."""
