"""Which runs of an instance advance next, and which of them together."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.engines.steps.executor import AloneKey
from triptych.roles.messages.common import Attempt, Output, SchedulingHints
from triptych.roles.scheduling_policy import MAX_PASSED_OVER
from triptych.roles.worker.attempts import ActiveAttempt, Phase
from triptych.roles.worker.step_scheduler import StepScheduler

POLICIES = get_args(SchedulingPolicyName)
DENOISE = (Stage.DENOISER,)


def attempt(number: int) -> Attempt:
    return Attempt(f"r/{number}", 1)


def held(number: int, stages: tuple[Stage, ...] = DENOISE, due: float = 1e6, **hints: object) -> ActiveAttempt:
    item = ActiveAttempt(attempt(number), Phase.RUNNING, stages, Output(), deadline=1e9)
    item.hints, item.due = SchedulingHints(**hints), due  # type: ignore[arg-type]
    return item


def numbers(attempts: tuple[Attempt, ...]) -> list[int]:
    return [int(each.job_id.partition("/")[2]) for each in attempts]


RUNS = st.lists(
    st.tuples(
        st.sampled_from([(Stage.ENCODER,), DENOISE, (Stage.DECODER,)]),
        st.builds(
            SchedulingHints,
            priority=st.integers(-2, 2),
            steps=st.integers(0, 9),
            bucket=st.sampled_from([1, 2, 4]),
            owner=st.sampled_from("ab"),
        ),
        st.sampled_from([None, "small", "large"]),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=7,
)


@given(st.sampled_from(POLICIES), st.integers(1, 4), RUNS, st.floats(0.001, 10))
def test_every_run_advances_to_its_end_and_batches_are_of_one_kind(
    policy: SchedulingPolicyName, max_batch: int, runs: list[tuple[tuple[Stage], SchedulingHints, str | None, int]],
    step_s: float,
) -> None:  # fmt: skip
    """While others come that go first: as many as rounds, of the highest priority and one step each."""
    scheduler = StepScheduler(policy, max_batch)
    left = {}
    for number, (stages, hints, _, steps) in enumerate(runs):
        item = held(number, stages)
        item.hints = hints
        scheduler.add(item)
        left[number] = steps if stages == DENOISE else 1
    bound, now, rounds = sum(left.values()) * (MAX_PASSED_OVER + 1), 0.0, 0
    while left:
        rounds += 1
        assert rounds <= bound
        scheduler.add(held(1000 + rounds, priority=100, steps=1, due=now))
        chosen = scheduler.next(now)
        assert 1 <= len(chosen) == len(set(chosen)) <= max_batch
        taken = [(number, runs[number] if number < 1000 else None) for number in numbers(chosen)]
        if len(taken) > 1:
            assert all(run is None or run[0] == DENOISE for _, run in taken)
            buckets = {run[1].bucket if run else 1 for _, run in taken}
            assert len(buckets) == 1
            assert len(taken) <= buckets.pop()
        known = {run[2] for number, run in taken if run and run[3] != left[number] and run[2]}
        assert len(known) <= 1
        now += step_s
        for number, run in taken:
            if run is None or left[number] == 1:
                scheduler.remove(attempt(number))
                left.pop(number, None)
            else:
                left[number] -= 1
                scheduler.stepped(attempt(number), run[3] - left[number], run[3], run[2])
        scheduler.ran(chosen, step_s)


@given(st.lists(st.integers(1, 4), max_size=6), st.integers(1, 3))
def test_fifo_with_one_run_a_batch_is_one_run_after_the_other(steps: list[int], bucket: int) -> None:
    scheduler = StepScheduler("fifo", 1)
    for number in range(len(steps)):
        scheduler.add(held(number, steps=9 - number, bucket=bucket, due=-number))
    for number, count in enumerate(steps):
        for _ in range(count):
            assert numbers(scheduler.next(0.0)) == [number]
        scheduler.remove(attempt(number))
    assert scheduler.next(0.0) == ()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_higher_priority_goes_first(policy: SchedulingPolicyName) -> None:
    scheduler = StepScheduler(policy, 1)
    scheduler.add(held(0, steps=1, due=1.0))
    scheduler.add(held(1, steps=50, due=9.0, priority=1))
    assert numbers(scheduler.next(0.0)) == [1]


def test_equal_runs_share_a_batch_and_one_of_unknown_kind_may_join_any() -> None:
    scheduler = StepScheduler("fifo", 3)
    for number in range(6):
        scheduler.add(held(number, bucket=4, steps=9))
    for number, key in enumerate(["small", "large", "small", None, "small"]):
        scheduler.stepped(attempt(number), 1, 9, key)
    assert numbers(scheduler.next(0.0)) == [0, 2, 3]
    scheduler.remove(attempt(0))
    assert numbers(scheduler.next(0.0)) == [1, 3, 5]


def test_jobs_of_another_bucket_or_of_bucket_1_and_other_stages_are_not_batched_together() -> None:
    scheduler = StepScheduler("fifo", 4)
    for number, bucket in enumerate([4, 1, 1, 2, 4, 2, 2]):
        scheduler.add(held(number, bucket=bucket))
    scheduler.add(held(7, (Stage.DECODER,), bucket=4))
    batches = []
    while scheduler:
        batches.append(numbers(scheduler.next(0.0)))
        for number in batches[-1]:
            scheduler.remove(attempt(number))
    assert batches == [[0, 4], [1], [2], [3, 5], [6], [7]]


def test_a_new_short_run_overtakes_long_ones_before_its_own_steps_were_timed() -> None:
    scheduler = StepScheduler("shortest_remaining", 1)
    scheduler.add(held(0, steps=50))
    for step in range(1, 4):
        chosen = scheduler.next(0.0)
        scheduler.stepped(attempt(0), step, 50, "small")
        scheduler.ran(chosen, 0.01)
    scheduler.add(held(1, steps=4))
    assert numbers(scheduler.next(0.0)) == [1]


def test_what_is_left_of_an_attempt_counts_the_stages_that_follow_here() -> None:
    scheduler = StepScheduler("shortest_remaining", 1)
    scheduler.add(held(0, (Stage.ENCODER, Stage.DENOISER, Stage.DECODER), steps=9))
    scheduler.add(held(1, (Stage.DENOISER, Stage.DECODER), steps=9))
    scheduler.add(held(2, (Stage.DECODER,), steps=9))
    order = []
    while scheduler:
        order += numbers(scheduler.next(0.0))
        scheduler.remove(attempt(order[-1]))
    assert order == [2, 1, 0]


def test_the_deadline_of_a_run_without_one_is_its_timeout() -> None:
    scheduler = StepScheduler("deadline", 1)
    scheduler.add(held(0, due=float("inf")))
    scheduler.add(held(1, due=1e8))
    assert numbers(scheduler.next(0.0)) == [1]


def test_the_time_of_a_run_that_is_computed_alone_is_its_own_and_ends_with_it() -> None:
    scheduler = StepScheduler("shortest_remaining", 1)
    again = AloneKey(7, 0)

    def take(number: int, key: AloneKey, seconds: float) -> None:
        scheduler.add(held(number, steps=9))
        scheduler.stepped(attempt(number), 5, 9, key)
        scheduler.ran((attempt(number),), seconds)

    take(0, again, 100.0)
    scheduler.remove(attempt(0))
    for number in range(1, 40):
        take(number, AloneKey(number + 7, 0), 0.01)
        scheduler.remove(attempt(number))
    scheduler.add(held(40, steps=4))
    scheduler.stepped(attempt(40), 5, 9, again)  # its `id` is that of the slow one
    scheduler.add(held(41, steps=5))
    assert numbers(scheduler.next(0.0)) == [40]
    take(42, AloneKey(99, 0), 5.0)
    take(43, AloneKey(98, 0), 0.001)
    assert numbers(scheduler.next(0.0)) == [43]
