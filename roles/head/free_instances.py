"""The instances that would take a job now, kept in the order of the dispatch policy. Pure.

So a job is assigned without a look at all instances.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TypeAlias

from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import Candidate, DispatchPolicy, OrderedPolicy

_Ordered: TypeAlias = list[tuple[tuple[float | str, ...], Candidate]]
_Group: TypeAlias = tuple[Stage, str, str, bool]
"""Stage, version of the weights, pool ("" for all), and whether only those without a job."""


class FreeInstances:
    """Candidates by stage, weights and pool.

    Args:
        policy: Orders them; of one that orders no instances, all are its candidates.
    """

    def __init__(self, policy: DispatchPolicy) -> None:
        self._ordered = policy if isinstance(policy, OrderedPolicy) else None
        self._groups: dict[_Group, _Ordered] = {}
        self._filed: dict[str, tuple[Stage, Candidate]] = {}
        self._credits: Counter[tuple[Stage, str]] = Counter()
        self._idle: Counter[Stage] = Counter()
        """How many of a stage have no job, whichever weights they have."""

    def file(self, name: str, stage: Stage, candidate: Candidate) -> None:
        """Record an instance that would take a job, in place of what was known of it."""
        if self._filed.get(name) == (stage, candidate):
            return
        self.remove(name)
        self._filed[name] = (stage, candidate)
        for group in _groups_of(stage, candidate):
            insort(self._groups.setdefault(group, []), (self._order(candidate), candidate), key=_first)
        self._credits[stage, candidate.model] += candidate.credits
        self._idle[stage] += not candidate.load

    def remove(self, name: str) -> None:
        """Record that an instance takes no job now."""
        stage, candidate = self._filed.pop(name, (None, None))
        if stage is None or candidate is None:
            return
        order = self._order(candidate)
        for group in _groups_of(stage, candidate):
            members = self._groups[group]
            del members[bisect_left(members, order, key=_first)]
            if not members:
                del self._groups[group]
        self._credits[stage, candidate.model] -= candidate.credits
        self._idle[stage] -= not candidate.load

    def _order(self, candidate: Candidate) -> tuple[float | str, ...]:
        return self._ordered.order(candidate) if self._ordered else (candidate.name,)

    def contenders(
        self, stage: Stage, model: str, pools: Collection[str] = (), closed: Collection[str] = (), *, idle: bool = False
    ) -> list[Candidate]:
        """Return the instances that the policy has to choose among; none if no instance can take the job.

        Args:
            stage: The stage of the job.
            model: Version of the weights that the job needs.
            pools: The pools that it has tensors in.
            closed: Instances that do not count.
            idle: Whether only instances without a job count.
        """
        if self._ordered is None:
            return list(self._members((stage, model, "", idle), closed))
        firsts = (next(self._members((stage, model, pool, idle), closed), None) for pool in ("", *pools))
        return [candidate for candidate in firsts if candidate]

    def _members(self, group: _Group, closed: Collection[str]) -> Iterator[Candidate]:
        return (candidate for _, candidate in self._groups.get(group, ()) if candidate.name not in closed)

    def any(self, stage: Stage, model: str, closed: Collection[str] = (), *, idle: bool = False) -> bool:
        """Return whether there is one."""
        return next(self._members((stage, model, "", idle), closed), None) is not None

    def any_idle(self, stage: Stage) -> bool:
        """Return whether there is one without a job, whichever weights it has."""
        return self._idle[stage] > 0

    def credits(self, stage: Stage, model: str, closed: Collection[str] = ()) -> int:
        """Return how many jobs they would take together."""
        found = (self._filed[name] for name in closed if name in self._filed)
        gone = sum(c.credits for at, c in found if (at, c.model) == (stage, model))
        return self._credits[stage, model] - gone


def _first(entry: tuple[tuple[float | str, ...], Candidate]) -> tuple[float | str, ...]:
    return entry[0]


def _groups_of(stage: Stage, candidate: Candidate) -> Iterator[_Group]:
    for idle in (False, True) if not candidate.load else (False,):
        yield (stage, candidate.model, "", idle)
        if candidate.pool:
            yield (stage, candidate.model, candidate.pool, idle)
