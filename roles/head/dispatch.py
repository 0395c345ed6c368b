"""Which instance gets the next job: three policies, pure functions of what the head knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance that could take the work now."""

    name: str
    credits: int
    """jobs that it would still take; at least 1."""
    slots: int
    load: int
    """Jobs that are assigned to it."""
    last_served: int
    """Serial number of the last dispatch to it, 0 for never."""
    model: str = ""
    """Version of its weights."""


Policy = Callable[[Sequence[Candidate]], Candidate]


def round_robin(candidates: Sequence[Candidate]) -> Candidate:
    """The one whose last turn is longest ago."""
    return min(candidates, key=lambda c: (c.last_served, c.name))


def max_free_slots(candidates: Sequence[Candidate]) -> Candidate:
    """The one that can take most; in turn among equals."""
    return min(candidates, key=lambda c: (-c.credits, c.last_served, c.name))


def least_loaded(candidates: Sequence[Candidate]) -> Candidate:
    """The one with the smallest share of its slots in use; in turn among equals."""
    return min(candidates, key=lambda c: (c.load / max(c.slots, 1), c.last_served, c.name))


POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "max_free_slots": max_free_slots,
    "least_loaded": least_loaded,
}
