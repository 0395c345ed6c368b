"""Dispatch policies: which instance gets a job. Pure. Which job goes next, `roles.scheduling_policy` decides.

A policy is a class here (or in its own module) and an entry in `POLICIES`, from which `[head] dispatch` of the topology
chooses; its name is one of `DispatchName`. A policy gets the job and its request, so that it can use the inputs: prefer
the instance that has the job's adapter.
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
    """Number of jobs that it would still take; at least 1."""
    slots: int
    load: int
    """Number of jobs that are assigned to it."""
    last_served: int
    """Serial number of the last assignment to it, 0 for never."""
    model: str = ""
    """Version of its weights."""


class DispatchPolicy:
    """To the instance that was served least recently."""

    def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """Choose the instance that gets a job.

        Args:
            job: The first of the queue.
            request: The request of the job.
            candidates: At least one; all have the weights that the job needs.
        """
        return min(candidates, key=lambda c: (c.last_served, c.name))


class MaxFreeSlots(DispatchPolicy):
    """To the instance with the most credits; in turn among equals."""

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
