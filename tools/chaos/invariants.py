"""The invariants: pure functions of what was observed. Each returns one sentence for each violation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from triptych.roles.head.job import LEGAL_TRANSITIONS, TERMINAL_STATES, State
from triptych.roles.messages.pool import LeaseView
from triptych.tools.chaos.faults import FAULTS
from triptych.tools.chaos.injector import InjectedFault
from triptych.tools.chaos.load import Outcome
from triptych.tools.chaos.plan import ImageCase


def each_accepted_request_ended_once(outcomes: Iterable[Outcome]) -> list[str]:
    """Each accepted request has one terminal state, which is DONE if its client received an image."""
    broken = []
    for outcome in outcomes:
        number, unit = outcome.planned.number, first_job(outcome)
        if not outcome.status:
            broken.append(f"request {number} got no answer: {outcome.error}")
        elif outcome.request_ids and unit is None:
            broken.append(f"request {number} ({', '.join(outcome.request_ids)}) is not known any more")
        elif unit is not None:
            ends = [move["state"] for move in unit["history"] if move["state"] in TERMINAL_STATES]
            if len(ends) != 1 or (outcome.status == 200) != (ends == [State.DONE]):
                broken.append(f"request {number} was answered {outcome.status} and ended in {ends}")
    return broken


def each_client_saw_one_request(outcomes: Iterable[Outcome], ids_in_journal: Mapping[str, str]) -> list[str]:
    """A retry with the same key finds the same request. `ids_in_journal`: request id to idempotency key."""
    broken = [
        f"request {o.planned.number} was given {len(o.request_ids)} ids" for o in outcomes if len(o.request_ids) > 1
    ]
    keys = Counter(key for key in ids_in_journal.values() if key)
    return broken + [f"the key {key} was accepted {n} times" for key, n in keys.items() if n > 1]


def every_block_is_accounted_for(
    pools: Iterable[Mapping[str, Any]], leases: Iterable[LeaseView], kept: int
) -> list[str]:
    """In an idle pool free + leased == capacity, and leases are preallocated or belong to the prompt cache.

    `kept`: how many blocks the prompt cache says that it has.
    """
    broken = [
        f"{pool['name']}: {pool['free']} free + {pool['leased']} leased is not {pool['capacity']}"
        for pool in pools
        if pool["free"] + pool["leased"] != pool["capacity"]
    ]
    held = [view for view in leases if view.attempt.job_id]
    if len(held) == kept and all(view.state == "sealed" for view in held):
        return broken
    broken.append(f"{len(held)} blocks are held for requests, the prompt cache has {kept}")
    return broken + [f"{v.lease.pool} still holds a {v.state} block of {v.owner} for {v.attempt}" for v in held]


def no_stale_report_was_accepted(outcomes: Iterable[Outcome], *, clock_set: bool = False) -> list[str]:
    """Every history has legal transitions only, with increasing times unless the clock was set."""
    broken = []
    for outcome in outcomes:
        moves = (first_job(outcome) or {"history": []})["history"]
        states = ["PENDING", *(move["state"] for move in moves)]
        for a, b in pairwise(states):
            if State(b) not in LEGAL_TRANSITIONS[State(a)]:
                broken.append(f"request {outcome.planned.number} went from {a} to {b}")
        if not clock_set and [m["at"] for m in moves] != sorted(m["at"] for m in moves):
            broken.append(f"request {outcome.planned.number} went back in time")
    return broken


def every_victim_recovered(injected: Iterable[InjectedFault], bound_s: float) -> list[str]:
    """Each victim was ready again within `bound_s` seconds."""
    broken = []
    for injection in injected:
        if injection.recovery_s is None:
            broken.append(f"{injection.victim} was not back after {injection.fault}")
        elif injection.recovery_s > bound_s:
            broken.append(f"{injection.victim} took {injection.recovery_s:.1f} s to come back after {injection.fault}")
    return broken


def only_victims_restarted(
    restarts: Mapping[str, int], injected: Iterable[InjectedFault], zombies: Iterable[int]
) -> list[str]:
    """Each component restarted once for each lethal fault, and no process is a zombie.

    A component that was killed while the disk was full may need several starts. An instance that was parted from the
    head may be replaced once for that.
    """
    injected = list(injected)
    tries = any(FAULTS[injection.fault].hinders_starts for injection in injected)
    broken = []
    for name, n in restarts.items():
        # A host that was switched off counts from then on.
        began = max((k for k, injection in enumerate(injected) if name in injection.counts_anew), default=-1)
        since = injected[began + 1 :]
        lethal = sum(injection.lethal and injection.victim == name for injection in since)
        most = lethal + sum(name in injection.may_restart for injection in since)
        if n < lethal or (n > most and not (tries and lethal)):
            broken.append(f"{name} restarted {n} times after {lethal} lethal faults")
    return broken + [f"process {pid} is a zombie" for pid in zombies]


def same_seed_same_bytes(outcomes: Iterable[Outcome], baseline: Mapping[ImageCase, str]) -> list[str]:
    """Every image has the bytes that it has in a run without faults."""
    return [
        f"request {o.planned.number} differs from the undisturbed image"
        for o in outcomes
        if o.digest and o.digest != baseline[o.planned.image]
    ]


def no_mailbox_overflowed(depths: Mapping[str, tuple[int, int]]) -> list[str]:
    """No mailbox held more than its capacity. `depths`: actor to its greatest depth and its capacity."""
    return [f"{name} held {depth} messages of {bound}" for name, (depth, bound) in depths.items() if depth > bound]


def failed_only_when_at_fault(outcomes: Iterable[Outcome]) -> list[str]:
    """A request fails only after two deaths that it may have caused: a kill by the tool looks like a crash."""
    broken = []
    for outcome in outcomes:
        unit = first_job(outcome)
        if unit is None or unit["state"] == State.DONE:
            continue
        deaths = sum("process ended" in cause for cause in unit["causes"])
        if unit["state"] != State.FAILED or deaths < 2:
            broken.append(f"request {outcome.planned.number} ended {unit['state']} after {unit['causes']}")
    return broken


def no_request_stalled(outcomes: Iterable[Outcome], bound_s: float) -> list[str]:
    """While there are active requests, one of them ends at least every `bound_s` seconds."""
    ended = sorted((outcome for outcome in outcomes if outcome.ended), key=lambda outcome: outcome.ended)
    broken = []
    last = 0.0
    for k, outcome in enumerate(ended):
        waited = outcome.ended - max(last, min(other.began for other in ended[k:]))
        if waited > bound_s:
            broken.append(f"nothing ended for {waited:.1f} s, until request {outcome.planned.number} did")
        last = outcome.ended
    return broken


def first_job(outcome: Outcome) -> dict[str, Any] | None:
    """Return the only job of a request of this load."""
    units = outcome.final_view.get("units")
    return dict(units[0]) if units else None
