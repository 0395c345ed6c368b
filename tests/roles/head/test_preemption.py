"""Which denoise is parked for a more urgent job, and what the scheduler and its jobs make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from tests.roles.factories import a_block, after, make_scheduler, registration, scheduled, stored
from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.roles.head.effects import Assign, Effect, Park
from triptych.roles.head.job import SUSPECT_AFTER, Job, State
from triptych.roles.head.preemption import MAX_PARKED, MIN_LEFT_S, MIN_STEPS_LEFT, RunningDenoise, to_park
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.stages import CheckpointStored, StageReturned, TransferPush
from triptych.roles.scheduling_policy import MAX_PASSED_OVER, SchedulingFacts

POLICIES = st.sampled_from(get_args(SchedulingPolicyName))
FACTS = st.builds(
    SchedulingFacts,
    serial=st.integers(0, 1000),
    priority=st.integers(-2, 2),
    steps_left=st.none() | st.integers(0, 50),
    step_s=st.none() | st.floats(0.0, 2.0),
    passed_over=st.integers(0, MAX_PASSED_OVER),
)
RUNNING = st.builds(
    RunningDenoise,
    FACTS,
    instance=st.sampled_from("abc"),
    begun=st.booleans(),
    stores_checkpoints=st.booleans(),
    parked=st.integers(0, MAX_PARKED),
    parking=st.booleans(),
    protected=st.booleans(),
)
WAITING = st.lists(FACTS, max_size=4)


def distinct(
    waiting: list[SchedulingFacts], running: list[RunningDenoise]
) -> tuple[list[SchedulingFacts], list[RunningDenoise]]:
    count = len(running)
    jobs = [replace(each, facts=replace(each.facts, serial=k)) for k, each in enumerate(running)]
    return [replace(facts, serial=count + k) for k, facts in enumerate(waiting)], jobs


@given(policy=POLICIES, waiting=WAITING, running=st.lists(RUNNING, max_size=6), free=st.integers(0, 2))
def test_only_what_may_be_is_parked_and_only_for_a_higher_priority(
    policy: SchedulingPolicyName, waiting: list[SchedulingFacts], running: list[RunningDenoise], free: int
) -> None:
    waiting, running = distinct(waiting, running)
    chosen = to_park(policy, waiting, running, free)
    if chosen is None:
        return
    assert chosen in running
    assert any(facts.priority > chosen.facts.priority for facts in waiting)
    assert len(waiting) > free + sum(each.parking for each in running)
    assert not any(each.parking and each.instance == chosen.instance for each in running)
    assert chosen.stores_checkpoints
    assert not chosen.protected
    assert chosen.parked < MAX_PARKED
    assert chosen.facts.passed_over < MAX_PASSED_OVER
    if chosen.begun:
        assert chosen.facts.steps_left is not None
        assert chosen.facts.steps_left >= MIN_STEPS_LEFT
        assert chosen.facts.remaining_s is None or chosen.facts.remaining_s >= MIN_LEFT_S


@given(policy=POLICIES, waiting=WAITING, running=st.lists(RUNNING, max_size=6))
def test_nobody_is_parked_for_ever_and_an_instance_parks_one_at_a_time(
    policy: SchedulingPolicyName, waiting: list[SchedulingFacts], running: list[RunningDenoise]
) -> None:
    waiting, running = distinct(waiting, running)
    told = dict.fromkeys(range(len(running)), 0)
    for _ in range(MAX_PARKED + 1):
        parked = []
        while chosen := to_park(policy, waiting, running, 0):
            running[chosen.facts.serial] = replace(chosen, parking=True, parked=chosen.parked + 1)
            told[chosen.facts.serial] += 1
            parked.append(chosen.instance)
        assert len(parked) == len(set(parked))
        running = [replace(each, parking=False) for each in running]  # all come back and run again
    assert max(told.values(), default=0) <= MAX_PARKED
    assert to_park(policy, waiting, [replace(each, parking=False, parked=MAX_PARKED) for each in running], 0) is None


def test_the_least_urgent_is_parked_and_of_those_the_one_with_the_most_left() -> None:
    def running(serial: int, priority: int, steps_left: int, on: str = "a", *, begun: bool = True) -> RunningDenoise:
        return RunningDenoise(SchedulingFacts(serial, priority, steps_left=steps_left, step_s=1.0), on, begun)

    urgent = [SchedulingFacts(9, 5)]
    short, long, low = running(0, 1, 10), running(1, 1, 40), running(2, 0, 8, "b")
    assert to_park("fifo", urgent, [short, long, low], 0) == low
    assert to_park("fifo", urgent, [short, long], 0) == long
    assert to_park("fifo", urgent, [short, long, waits := running(3, 1, 5, begun=False)], 0) == waits
    assert to_park("fifo", urgent, [short, long], 1) is None, "a slot is free"
    assert to_park("fifo", urgent, [short, replace(long, parking=True), low], 0) is None, "it gets the slot of that one"
    assert to_park("fifo", [*urgent, SchedulingFacts(10, 5)], [replace(long, parking=True), short, low], 0) == low
    assert to_park("fifo", [SchedulingFacts(9, 1)], [short, long], 0) is None
    assert to_park("fifo", urgent, [running(0, 0, MIN_STEPS_LEFT - 1)], 0) is None


def scheduler_of(*, slots: int = 1, **options: bool) -> JobScheduler:
    """One denoiser, which has as many jobs of 50 steps as it has slots, begun at step 10."""
    scheduler = make_scheduler(**options)
    for name in ("encoder-0", "denoiser-0", "decoder-0"):
        scheduler.register(registration(name, slots=slots if name == "denoiser-0" else 4), 0.0)
    for k in range(slots):
        job, _ = denoised(scheduler, f"low{k}", 0)
        pushed(scheduler, job)
        scheduler.progress(job.current_attempt, 10, 50, 2.0)
    return scheduler


def denoised(scheduler: JobScheduler, id_: str, priority: int) -> tuple[Job, list[Effect]]:
    """A job whose prompt is encoded, and what follows."""
    scheduler.accept(scheduled(id_, priority=priority, steps=50), 0.0)
    job = scheduler.jobs[f"{id_}/0"]
    after(scheduler)
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", len(scheduler.requests)), 1.0)
    return job, after(scheduler)


def pushed(scheduler: JobScheduler, job: Job) -> TransferPush:
    message = scheduler.message_for(job.current_attempt, scheduler.source_of(job.current_attempt, job.instance), None)
    assert isinstance(message, TransferPush)
    scheduler.started(job.current_attempt, job.instance, Stage.DENOISER, 2.0)
    return message


def test_a_parked_job_keeps_its_checkpoint_waits_again_and_has_not_failed() -> None:
    scheduler = scheduler_of()
    low = scheduler.jobs["low0/0"]
    high, effects = denoised(scheduler, "high", 1)
    assert effects == [Park("denoiser-0", low.current_attempt)]
    assert after(scheduler) == [], "it is told once"
    assert scheduler.checkpoint_stored("denoiser-0", CheckpointStored(low.current_attempt, 12, a_block(7)))
    scheduler.progress(low.current_attempt, 12, 50, 2.0)
    assert scheduler.returned("denoiser-0", StageReturned(low.current_attempt, 2), 3.0)
    assert after(scheduler) == [Assign("denoiser-0", "high/0")]
    assert (low.state, low.failures, low.deaths, low.parked, low.parking) == (State.DENOISING_WAITING, 0, 0, 1, False)
    assert low.causes == ["denoiser-0: parked for a more urgent job"]
    pushed(scheduler, high)
    scheduler.stored("denoiser-0", stored(high.current_attempt, "denoiser", 8, 3), 4.0)
    assert Assign("denoiser-0", "low0/0") in after(scheduler)
    assert pushed(scheduler, low).checkpoint == a_block(7)
    assert (low.resumed_from, low.steps_redone, low.view().parked) == (12, 0, 1)


def test_a_job_is_not_parked_for_ever() -> None:
    scheduler = scheduler_of()
    low = scheduler.jobs["low0/0"]
    for k in range(MAX_PARKED):
        high, effects = denoised(scheduler, f"high{k}", 1)
        assert effects == [Park("denoiser-0", low.current_attempt)]
        scheduler.returned("denoiser-0", StageReturned(low.current_attempt, 2 + 2 * k), 3.0)
        after(scheduler)
        pushed(scheduler, high)
        scheduler.stored("denoiser-0", stored(high.current_attempt, "denoiser", 90 + k, 3 + 2 * k), 4.0)
        after(scheduler)
        pushed(scheduler, low)
        scheduler.progress(low.current_attempt, 10, 50, 2.0)
    _, effects = denoised(scheduler, "high", 1)
    assert effects == []


def test_nothing_is_parked_without_need() -> None:
    assert denoised(scheduler_of(), "equal", 0)[1] == []
    assert denoised(scheduler_of(preempt=False), "high", 1)[1] == []
    scheduler = scheduler_of()
    scheduler.registry.instances["denoiser-0"].stores_checkpoints = False
    assert denoised(scheduler, "high", 1)[1] == []
    scheduler = scheduler_of()
    scheduler.registry.drain("denoiser-0")
    assert denoised(scheduler, "high", 1)[1] == []
    scheduler = scheduler_of()
    scheduler.registry.instances["denoiser-0"].model = "older"
    scheduler.registry.note_change("denoiser-0")
    assert denoised(scheduler, "high", 1)[1] == []
    scheduler = scheduler_of()
    scheduler.jobs["low0/0"].shared_deaths = SUSPECT_AFTER
    scheduler.changed(scheduler.jobs["low0/0"])
    assert denoised(scheduler, "high", 1)[1] == [], "it is computed alone: its slot would serve nobody"
    scheduler = scheduler_of(slots=2)
    assert len(denoised(scheduler, "high", 1)[1]) == 1
    assert denoised(scheduler, "higher", 2)[1] == [], "one at a time"


def test_a_run_that_ends_before_it_is_parked_counts() -> None:
    scheduler = scheduler_of()
    low = scheduler.jobs["low0/0"]
    denoised(scheduler, "high", 1)
    assert scheduler.stored("denoiser-0", stored(low.current_attempt, "denoiser", 9, 2), 3.0)
    assert low.state is State.DECODER_WAITING
    assert not low.parking
    assert Assign("denoiser-0", "high/0") in after(scheduler)
