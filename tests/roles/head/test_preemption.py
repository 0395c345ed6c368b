"""Which denoise is parked for a more urgent job, and what the scheduler and its jobs make of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.roles.factories import a_block, after, make_scheduler, registration, scheduled, stored
from triptych.engines.stages import Stage
from triptych.roles.head.attempt_messages import message_for, source_of
from triptych.roles.head.effects import Assign, Effect, Park
from triptych.roles.head.job import SUSPECT_AFTER, Job, State
from triptych.roles.head.preemption import MAX_PARKED, MIN_LEFT_S, MIN_STEPS_LEFT, RunningDenoise, least_worth
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.stages import CheckpointStored, StageReturned, TransferPush
from triptych.roles.scheduling_policy import MAX_PASSED_OVER, SchedulingFacts

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


@given(running=st.lists(RUNNING, max_size=6))
def test_only_what_may_be_is_parked(running: list[RunningDenoise]) -> None:
    chosen = least_worth(running)
    if chosen is None:
        assert not any(each.may_park for each in running)
        return
    assert chosen in running
    assert all(chosen.facts.priority <= each.facts.priority for each in running if each.may_park)
    assert chosen.stores_checkpoints
    assert not chosen.protected
    assert chosen.parked < MAX_PARKED
    assert chosen.facts.passed_over < MAX_PASSED_OVER
    if chosen.begun:
        assert chosen.facts.steps_left is not None
        assert chosen.facts.steps_left >= MIN_STEPS_LEFT
        assert chosen.facts.remaining_s is None or chosen.facts.remaining_s >= MIN_LEFT_S


def test_the_least_urgent_is_parked_and_of_those_the_one_with_the_most_left() -> None:
    def running(serial: int, priority: int, steps_left: int, *, begun: bool = True) -> RunningDenoise:
        return RunningDenoise(SchedulingFacts(serial, priority, steps_left=steps_left, step_s=1.0), "a", begun)

    short, long, low = running(0, 1, 10), running(1, 1, 40), running(2, 0, 8)
    assert least_worth([short, long, low]) == low
    assert least_worth([short, long]) == long
    assert least_worth([short, long, waits := running(3, 1, 5, begun=False)]) == waits
    assert least_worth([running(0, 0, MIN_STEPS_LEFT - 1)]) is None


def scheduler_of(*, slots: int = 1, denoisers: int = 1, **options: bool) -> JobScheduler:
    """Denoisers that have as many jobs of 50 steps as they have slots, begun at step 10."""
    scheduler = make_scheduler(**options)
    for name in ("encoder-0", *(f"denoiser-{k}" for k in range(denoisers)), "decoder-0"):
        scheduler.register(registration(name, slots=slots if name.startswith("denoiser") else 4), 0.0)
    for k in range(slots * denoisers):
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
    message = message_for(scheduler, job.current_attempt, source_of(scheduler, job.current_attempt, job.instance), None)
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


def test_each_of_those_that_wait_has_another_denoise_parked_for_it() -> None:
    scheduler = scheduler_of(denoisers=2)
    lows = [scheduler.jobs[f"low{k}/0"] for k in range(2)]
    effects = [effect for k in range(2) for effect in denoised(scheduler, f"high{k}", 1)[1]]
    assert {effect.instance for effect in effects if isinstance(effect, Park)} == {job.instance for job in lows}
    assert len(effects) == 2
    assert denoised(scheduler, "high", 1)[1] == [], "each instance parks one"
