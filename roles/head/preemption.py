"""Which running denoise is parked for a more urgent job that waits. Pure.

A parked denoise stores a checkpoint and goes back to the jobs that wait; any instance goes on with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.roles.scheduling_policy import MAX_PASSED_OVER, SchedulingFacts, rank

MAX_PARKED: Final = 2
"""A job that was told this often to park is not told again."""
MIN_STEPS_LEFT: Final = 4
"""A denoise with fewer steps left ends before parking it is worth it: it has to be begun again up to its loop."""
MIN_LEFT_S: Final = 0.5
"""The same in seconds: about what a checkpoint, and to go on from it, cost."""


@dataclass(frozen=True, slots=True)
class RunningDenoise:
    """A job that an instance has for its denoise."""

    facts: SchedulingFacts
    instance: str
    begun: bool = True
    """Whether it has begun to compute; one that has not loses nothing."""
    stores_checkpoints: bool = True
    """Whether its instance does."""
    parked: int = 0
    """How often it was told to park."""
    parking: bool = False
    """Whether it was told to park, and its instance has it still."""
    protected: bool = False
    """Whether the aging rule had chosen it."""

    @property
    def may_park(self) -> bool:
        """Return whether parking it is safe and worth it."""
        facts = self.facts
        if not self.stores_checkpoints or self.protected or self.parked >= MAX_PARKED:
            return False
        if facts.passed_over >= MAX_PASSED_OVER:
            return False
        if not self.begun:
            return True
        enough = facts.steps_left is not None and facts.steps_left >= MIN_STEPS_LEFT
        return enough and (facts.remaining_s is None or facts.remaining_s >= MIN_LEFT_S)


def to_park(
    policy: SchedulingPolicyName, waiting: Collection[SchedulingFacts], running: Collection[RunningDenoise], free: int
) -> RunningDenoise | None:
    """Return the denoise to park next; None if none is.

    It is one of a lower priority than a job that waits and that neither a free credit nor an earlier parking serves;
    of the lowest priority, and of those the one with the most left. An instance parks one at a time.

    Args:
        policy: Orders the waiting jobs.
        waiting: The jobs that wait for their denoise.
        running: The denoises that instances have.
        free: Free credits of instances.
    """
    served = free + sum(each.parking for each in running)
    unserved = sorted(waiting, key=lambda facts: rank(policy, facts))[served:]
    if not unserved:
        return None
    urgent = max(facts.priority for facts in unserved)
    busy = {each.instance for each in running if each.parking}
    return least_worth(each for each in running if each.instance not in busy and each.facts.priority < urgent)


def least_worth(running: Iterable[RunningDenoise]) -> RunningDenoise | None:
    """Return the one to park first of those that may be parked; None if none may."""
    return min((each for each in running if each.may_park), key=_order, default=None)


def _order(each: RunningDenoise) -> tuple[float, ...]:
    """Return what orders the candidates: the lowest priority first, then what has not begun, then the most left."""
    facts = each.facts
    left = facts.remaining_s if facts.remaining_s is not None else facts.steps_left or 0
    return (facts.priority, each.begun, -left, -facts.serial)
