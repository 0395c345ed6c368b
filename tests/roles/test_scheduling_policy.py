"""The order of jobs and runs under each policy."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.roles.scheduling_policy import (
    MAX_PASSED_OVER,
    MAX_STEP_TIMES,
    OwnerService,
    SchedulingFacts,
    StepTimes,
    overtaken,
    rank,
)

POLICIES = get_args(SchedulingPolicyName)
AMOUNTS = st.floats(0, 1e6)
FACTS = st.builds(
    SchedulingFacts,
    serial=st.just(0),
    priority=st.integers(-100, 100),
    owner_served=AMOUNTS,
    served=AMOUNTS,
    steps_left=st.none() | st.integers(0, 100),
    step_s=st.none() | st.floats(1e-3, 1e3),
    deadline_left_s=st.just(inf) | st.floats(-1e6, 1e6),
)


def order(policy: SchedulingPolicyName, *candidates: SchedulingFacts) -> list[int]:
    return [facts.serial for facts in sorted(candidates, key=lambda facts: rank(policy, facts))]


@given(st.sampled_from(POLICIES), st.lists(FACTS, max_size=4), st.lists(FACTS, max_size=3), st.integers(1, 3))
def test_nothing_starves_however_many_come_after_it(
    policy: SchedulingPolicyName, older: list[SchedulingFacts], newcomers: list[SchedulingFacts], choices_each: int
) -> None:
    """Every choice is followed by newcomers that the policy likes better, for ever."""
    waiting = [
        replace(facts, serial=serial) for serial, facts in enumerate([*older, SchedulingFacts(len(older), -100)])
    ]
    needed = dict.fromkeys(range(len(waiting)), choices_each)
    last, serial, choices = len(older), len(waiting), 0
    while last in needed:
        choices += 1
        assert choices <= (len(older) + 1) * choices_each * (MAX_PASSED_OVER + 1)
        for facts in newcomers:
            waiting.append(replace(facts, serial=serial, priority=100))
            serial += 1
        chosen = min(waiting, key=lambda facts: rank(policy, facts))
        waiting.remove(chosen)
        passed = overtaken(waiting, [chosen])
        waiting = [replace(f, passed_over=f.passed_over + 1) if f.serial == passed else f for f in waiting]
        if chosen.serial in needed:
            needed[chosen.serial] -= 1
            if needed[chosen.serial]:
                waiting.append(replace(chosen, passed_over=0))
            else:
                del needed[chosen.serial]


@given(st.sampled_from(POLICIES), FACTS, FACTS)
def test_a_higher_priority_goes_first_under_every_policy(
    policy: SchedulingPolicyName, one: SchedulingFacts, other: SchedulingFacts
) -> None:
    urgent = replace(one, serial=1, priority=7)
    assert order(policy, replace(other, serial=0, priority=6), urgent) == [1, 0]


@given(st.lists(FACTS, max_size=6))
def test_fifo_is_the_order_of_arrival(candidates: list[SchedulingFacts]) -> None:
    numbered = [replace(facts, serial=serial, priority=0) for serial, facts in enumerate(candidates)]
    assert order("fifo", *reversed(numbered)) == list(range(len(candidates)))


def test_fair_is_the_least_served_owner_then_its_least_served_request() -> None:
    assert order(
        "fair",
        SchedulingFacts(0, owner_served=9, served=0),
        SchedulingFacts(1, owner_served=2, served=5),
        SchedulingFacts(2, owner_served=2, served=1),
    ) == [2, 1, 0]


def test_shortest_remaining_is_the_least_time_left_and_what_is_unknown_comes_last() -> None:
    assert order(
        "shortest_remaining",
        SchedulingFacts(0),
        SchedulingFacts(1, steps_left=50, step_s=0.1),
        SchedulingFacts(2, steps_left=4, step_s=2.0),
        SchedulingFacts(3, steps_left=4),
    ) == [3, 1, 2, 0]


def test_deadline_is_the_earliest_that_can_still_be_met() -> None:
    assert order(
        "deadline",
        SchedulingFacts(0, deadline_left_s=-1),
        SchedulingFacts(1, deadline_left_s=4, steps_left=50, step_s=0.1),
        SchedulingFacts(2, deadline_left_s=600),
        SchedulingFacts(3, deadline_left_s=6, steps_left=50, step_s=0.1),
        SchedulingFacts(4, deadline_left_s=5),
    ) == [4, 3, 2, 0, 1]


def test_only_the_oldest_is_passed_over_and_one_that_goes_next_is_not_counted_again() -> None:
    first, second, third = (SchedulingFacts(serial) for serial in range(3))
    assert overtaken([first, second], [third]) == 0
    assert overtaken([third], [first, second]) is None
    assert overtaken([second], [first, third]) == 1
    assert overtaken([replace(first, passed_over=MAX_PASSED_OVER), second], [third]) == 1


def test_an_owner_that_comes_back_is_served_no_more_than_those_that_stayed() -> None:
    service = OwnerService()
    service.update({"a", "b"})
    service.add("a", 30)
    service.add("b", 10)
    service.update({"a"})
    service.update({"a", "b", "c"})
    assert [service.of(owner) for owner in "abc"] == [30, 30, 30]


def test_step_times_follow_what_was_measured_and_are_bounded() -> None:
    times = StepTimes()
    assert times.expected("small") is None
    times.learn("small", 1.0)
    times.learn("small", 2.0)
    assert times.expected("small") == pytest.approx(1.25)
    for kind in range(MAX_STEP_TIMES):
        times.learn(kind, 1.0)
    assert times.expected("small") is None
    assert times.expected(MAX_STEP_TIMES - 1) == 1.0
