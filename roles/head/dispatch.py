"""Dispatch policies: which instance gets a job. Pure. Which job goes next, `roles.scheduling_policy` decides.

A policy is a class here (or in its own module) and an entry in `POLICIES`, from which `[head] dispatch` of the topology
chooses; its name is one of `DispatchName`. A policy gets the job and its request, so that it can use the inputs: prefer
the instance that has the job's adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    pool: str = ""
    """The pool that it maps."""


class DispatchPolicy(ABC):
    """Chooses the instance of a job."""

    @abstractmethod
    def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """Choose the instance that gets a job. Pure: the same one each time, in whatever order the candidates come.

        Args:
            job: The first of the queue.
            request: The request of the job.
            candidates: At least one; all have the weights that the job needs.
        """


class OrderedPolicy(DispatchPolicy):
    """To the first instance in an order, or to the first in a pool with tensors of the job if it has no more load.

    The order is the same for all jobs, so that the head keeps the instances in it, and `candidates` need not have more
    than the first of all and the first of each pool.
    """

    @abstractmethod
    def order(self, candidate: Candidate) -> tuple[float | str, ...]:
        """Return what orders the instances, the lowest first; no two have the same."""

    def load(self, candidate: Candidate) -> float:
        """Return the load that a nearer instance must not exceed: the share of its slots in use."""
        return candidate.load / max(candidate.slots, 1)

    def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """Choose the first, or a near one: one that shares the pool with the checkpoint or the input of the job."""
        first = min(candidates, key=self.order)
        for pool in pools_of(job):
            near = min((c for c in candidates if c.pool == pool), key=self.order, default=None)
            if near and self.load(near) <= self.load(first):
                return near
        return first


class RoundRobin(OrderedPolicy):
    """To the instance that was served least recently."""

    def order(self, candidate: Candidate) -> tuple[float | str, ...]:
        """Order by the last assignment."""
        return (candidate.last_served, candidate.name)


class MaxFreeSlots(OrderedPolicy):
    """To the instance with the most credits; in turn among equals."""

    def order(self, candidate: Candidate) -> tuple[float | str, ...]:
        """Order by credits."""
        return (-candidate.credits, candidate.last_served, candidate.name)

    def load(self, candidate: Candidate) -> float:
        """Return how few credits it has."""
        return -candidate.credits


class LeastLoaded(OrderedPolicy):
    """To the instance with the smallest share of its slots in use; in turn among equals."""

    def order(self, candidate: Candidate) -> tuple[float | str, ...]:
        """Order by load."""
        return (self.load(candidate), candidate.last_served, candidate.name)


def pools_of(job: Job) -> tuple[str, ...]:
    """Return the pools from whose instances a job has the shortest way: that of its checkpoint, that of its input."""
    return tuple(dict.fromkeys(lease.pool for lease in reversed(job.leases)))


POLICIES: Final[Mapping[DispatchName, DispatchPolicy]] = {
    "round_robin": RoundRobin(),
    "max_free_slots": MaxFreeSlots(),
    "least_loaded": LeastLoaded(),
}
"""Every policy, by its name in the topology."""
