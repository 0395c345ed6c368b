"""Which of some running denoises is parked for a more urgent job. Pure.

A parked denoise stores a checkpoint and goes back to the jobs that wait; any instance goes on with it. For which job
one is parked, and which denoises can give it their place, `Dispatcher` decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from triptych.roles.scheduling_policy import MAX_PASSED_OVER, SchedulingFacts

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


def least_worth(running: Iterable[RunningDenoise]) -> RunningDenoise | None:
    """Return the one to park first of those that may be parked; None if none may."""
    return min((each for each in running if each.may_park), key=_order, default=None)


def _order(each: RunningDenoise) -> tuple[float, ...]:
    """Return what orders the candidates: the lowest priority first, then what has not begun, then the most left."""
    facts = each.facts
    left = facts.remaining_s if facts.remaining_s is not None else facts.steps_left or 0
    return (facts.priority, each.begun, -left, -facts.serial)
