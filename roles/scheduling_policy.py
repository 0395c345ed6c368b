"""Scheduling policies: which of several jobs or runs goes next. Pure.

The head orders the jobs that wait for an instance by it (`[head] policy`), and a worker the runs that it holds
(`[[roles]] policy`). Both describe each candidate by `SchedulingFacts`; the one with the lowest `rank` goes next.

Under every policy a higher priority goes first, and nothing starves: `overtaken` names the candidate that a choice
passes over, and one that was passed over `MAX_PASSED_OVER` times goes before all others. Only the oldest candidate is
counted, so that this takes at most one in `MAX_PASSED_OVER + 1` choices from the policy, however many wait. Hence the
bound: if a candidate and all that are older need n choices together (a job one, a run one for each step), it has had
its last after at most `n * (MAX_PASSED_OVER + 1)` choices.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Final

from triptych.actors.topology.sections import SchedulingPolicyName

MAX_PASSED_OVER: Final = 15
"""A candidate that was passed over this often goes next."""
MAX_STEP_TIMES: Final = 256
"""Most kinds of steps whose time is remembered."""
_LATEST_WEIGHT: Final = 0.25
"""Weight of the latest step in the moving average of step times."""


@dataclass(frozen=True, slots=True)
class SchedulingFacts:
    """What a policy knows of a job or run."""

    serial: int
    """Counts arrivals; unique among the candidates."""
    priority: int = 0
    """A higher one goes first."""
    owner_served: float = 0.0
    """How much its owner was served, as `OwnerService` counts it."""
    served: float = 0.0
    """How much its request was served: steps done of a run, jobs begun of a request."""
    steps_left: int | None = None
    """Denoising steps that it still needs; None if unknown, which counts as many."""
    step_s: float | None = None
    """Expected seconds of one of its steps; None if unknown."""
    deadline_left_s: float = inf
    """Seconds until its deadline, below 0 after it; of a request without a deadline, until its timeout."""
    passed_over: int = 0
    """How often `overtaken` has named it since it was last chosen."""

    @property
    def remaining_s(self) -> float | None:
        """Return the expected seconds of the steps that are left; None if unknown."""
        return None if self.steps_left is None or self.step_s is None else self.steps_left * self.step_s

    @property
    def hopeless(self) -> bool:
        """Return whether its deadline cannot be met any more."""
        return self.deadline_left_s < (self.remaining_s or 0.0)


def rank(policy: SchedulingPolicyName, facts: SchedulingFacts) -> tuple[float, ...]:
    """Return the rank of a candidate under a policy; the lowest goes next. No two candidates have the same.

    - `fifo`: the earliest arrival.
    - `fair`: of the owner that was served least; then of the request that was served least.
    - `shortest_remaining`: the least time left to compute. A step of unknown time counts as one second.
    - `deadline`: the earliest deadline; those that cannot be met any more come after all that can.
    """
    if facts.passed_over >= MAX_PASSED_OVER:
        return (0, facts.serial)
    order: tuple[float, ...] = ()
    match policy:
        case "fifo":
            pass
        case "fair":
            order = (facts.owner_served, facts.served)
        case "shortest_remaining":
            steps_left = inf if facts.steps_left is None else facts.steps_left
            order = (steps_left * facts.step_s if facts.step_s else steps_left,)
        case "deadline":
            order = (facts.hopeless, facts.deadline_left_s)
    return (1, -facts.priority, *order, facts.serial)


def overtaken(waiting: Iterable[SchedulingFacts], chosen: Iterable[SchedulingFacts]) -> int | None:
    """Return the serial of the candidate that a choice passes over, whose `passed_over` grows by one; None if none is.

    It is the oldest of those that wait on, if one that was chosen is younger. One that goes next anyway is not counted
    again: it may be unable to go now, and the others must not wait for it. Whoever is chosen starts from 0 again.

    Args:
        waiting: The candidates that were not chosen.
        chosen: Those that were; several if they go together.
    """
    oldest = min((facts.serial for facts in waiting if facts.passed_over < MAX_PASSED_OVER), default=inf)
    youngest_chosen = max((facts.serial for facts in chosen), default=-inf)
    return int(oldest) if oldest < youngest_chosen else None


class OwnerService:
    """How much each owner was served, for `fair`."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def update(self, owners: Collection[str]) -> None:
        """Keep the owners that have something to do now, and only those.

        An owner that comes, or comes back, counts as served as much as the one served least: idle time earns nothing.
        """
        kept = {owner: served for owner, served in self._served.items() if owner in owners}
        least = min(kept.values(), default=0.0)
        self._served = {owner: kept.get(owner, least) for owner in owners}

    def add(self, owner: str, amount: float) -> None:
        """Count `amount`, such as a number of steps, for an owner."""
        self._served[owner] = self._served.get(owner, 0.0) + amount

    def of(self, owner: str) -> float:
        """Return how much an owner was served; 0 for one that `update` was not told of."""
        return self._served.get(owner, 0.0)


class StepTimes:
    """Expected seconds of a step: moving averages, by kind of step."""

    def __init__(self) -> None:
        self._times: dict[Hashable, float] = {}

    def learn(self, kind: Hashable, step_s: float) -> None:
        """Record that a step of `kind`, such as one of a certain size, took `step_s` seconds."""
        known = self._times.pop(kind, step_s)
        self._times[kind] = known + _LATEST_WEIGHT * (step_s - known)
        if len(self._times) > MAX_STEP_TIMES:
            del self._times[next(iter(self._times))]

    def expected(self, kind: Hashable) -> float | None:
        """Return the expected seconds of a step of `kind`; None if none was recorded."""
        return self._times.get(kind)
