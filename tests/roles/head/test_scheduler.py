"""The head's decisions, by example."""

from __future__ import annotations

import msgspec
import pytest

from tests.roles.factories import KINDS, a_block, after, failed, finished, make_scheduler, registration, request, stored
from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.roles.head.effects import Assign, Cancel, Effect, NotifyWaiters, ReleaseLeases
from triptych.roles.head.job import SUSPECT_AFTER, Job, State
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.head.scheduler import MAX_STALLS, JobScheduler
from triptych.roles.head.stored_outputs import LOOKAHEAD
from triptych.roles.messages.common import Attempt
from triptych.roles.messages.stages import RegisterInstance, StageOutputsStored, StageReturned, TransferFailed


@pytest.fixture
def scheduler() -> JobScheduler:
    scheduler = make_scheduler()
    for kind in KINDS:
        scheduler.register(registration(f"{kind}-0", slots=2), 0.0)
    return scheduler


def to_denoiser(scheduler: JobScheduler, id_: str = "r") -> Job:
    scheduler.accept(request(id_), 0.0)
    after(scheduler)
    job = scheduler.jobs[f"{id_}/0"]
    assert scheduler.started(job.current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    assert scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 2.0)
    after(scheduler)
    assert scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, 3.0)
    return job


def test_an_image_goes_through_three_stages(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    assert scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 4.0)
    effects = after(scheduler)
    assert ReleaseLeases((a_block(1).lease,)) in effects, (
        "the encoder's block is kept until the denoiser is done with it"
    )
    assert Assign("decoder-0", "r/0") in effects
    assert scheduler.finished("decoder-0", finished(job.current_attempt), 5.0)
    effects = after(scheduler)
    assert ReleaseLeases((a_block(2).lease,)) in effects
    assert NotifyWaiters("r") in effects
    view = scheduler.requests["r"].view()
    assert view.state == "DONE"
    assert [m.state for m in view.units[0].history][-1] == "DONE"
    assert view.units[0].instances == {"encoder": "encoder-0", "denoiser": "denoiser-0", "decoder": "decoder-0"}
    assert scheduler.tally.average_latency_s == 5.0


def test_nothing_is_sent_without_a_credit() -> None:
    scheduler = make_scheduler()
    scheduler.register(registration("encoder-0", slots=1), 0.0)
    scheduler.accept(request("a"), 0.0)
    scheduler.accept(request("b"), 0.0)
    assert after(scheduler) == [Assign("encoder-0", "a/0")]
    assert after(scheduler) == []
    attempt = scheduler.jobs["a/0"].current_attempt
    scheduler.stored("encoder-0", StageOutputsStored(attempt, Stage.ENCODER, a_block(1), 0.1, issued=2), 1.0)
    assert after(scheduler) == [Assign("encoder-0", "b/0")]


def test_a_death_reruns_only_the_lost_stage_from_its_upstream_lease(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    scheduler.register(registration("denoiser-1"), 3.0)
    first = job.current_attempt
    scheduler.instance_down("denoiser-0", "its process ended", 4.0)
    effects = after(scheduler)
    assert Assign("denoiser-1", "r/0") in effects
    assert not [e for e in effects if isinstance(e, ReleaseLeases)]
    assert job.state is State.DENOISING_WAITING
    assert job.current_attempt == Attempt("r/0", first.number + 1)
    assert not scheduler.stored("denoiser-0", stored(first, "denoiser", 9), 5.0), "the old attempt no longer counts"
    assert after(scheduler) == [ReleaseLeases((a_block(9).lease,))]


def test_a_lost_pool_sends_waiting_work_back_to_the_start(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    scheduler.pool_down("pool", 2, 4.0)
    assert job.state is State.DENOISING_RUNNING, "it may have loaded its tensors already"
    scheduler.instance_down("denoiser-0", "its process ended", 5.0)
    assert job.state is State.ENCODER_WAITING
    assert job.failures == 1


def test_a_unit_that_kills_twice_fails_and_others_go_on(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    scheduler.instance_down("denoiser-0", "its process ended", 4.0)
    scheduler.register(registration("denoiser-0", generation=2, slots=2), 5.0)
    after(scheduler)
    scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, 5.5)
    scheduler.instance_down("denoiser-0", "its process ended", 6.0)
    assert job.state is State.FAILED
    assert len(job.causes) == 2
    assert job.instance == ""
    assert NotifyWaiters("r") in after(scheduler)


def compute_all(scheduler: JobScheduler, poison: str) -> list[list[str]]:
    """Compute all jobs, each instance those that it has at once, where one job kills its denoiser.

    Return the jobs that each of the killed denoisers was computing.
    """
    crashes: list[list[str]] = []
    lease_id = 0
    while scheduler.jobs:
        after(scheduler)
        names = sorted({job.instance for job in scheduler.jobs.values() if job.instance})
        assert names, "stalled"
        for name in names:
            stage = Stage(name.partition("-")[0])
            jobs = [job for job in scheduler.jobs.values() if job.instance == name]
            for job in jobs:
                assert scheduler.started(job.current_attempt, name, stage, 1.0)
            if stage is Stage.DENOISER and poison in [job.id for job in jobs]:
                crashes.append([job.id for job in jobs])
                scheduler.instance_down(name, "its process ended", 2.0)
                scheduler.register(registration(name, generation=1 + len(crashes), slots=4), 2.0)
                continue
            for job in jobs:
                lease_id += 1
                if stage is Stage.DECODER:
                    scheduler.finished(name, finished(job.current_attempt), 3.0)
                else:
                    scheduler.stored(name, stored(job.current_attempt, stage, lease_id), 3.0)
    return crashes


@pytest.mark.parametrize("poison", ["r/0", "r/2"])
@pytest.mark.parametrize("denoisers", [1, 2])
def test_neighbours_of_a_job_that_kills_its_instances_are_done(denoisers: int, poison: str) -> None:
    scheduler = make_scheduler()
    for name in ("encoder-0", *(f"denoiser-{k}" for k in range(denoisers)), "decoder-0"):
        scheduler.register(registration(name, slots=4), 0.0)
    asked = request(n=4)
    scheduler.accept(asked, 0.0)
    crashes = compute_all(scheduler, poison)
    assert {job.id: job.state for job in asked.jobs if job.id != poison} == {
        job.id: State.DONE for job in asked.jobs if job.id != poison
    }
    job = next(job for job in asked.jobs if job.id == poison)
    assert job.state is State.FAILED
    assert crashes[-1] == [poison]
    assert len(crashes) <= 1 + SUSPECT_AFTER
    if denoisers == 1:
        assert [len(jobs) for jobs in crashes] == [4, 4, 1]
        assert job.causes[0] == "denoiser-0: its process ended while it computed 4 jobs"
        assert "died while it computed this job alone, after 2 instances" in job.history[-1].reason
        assert {(job.failures, job.shared_deaths) for job in asked.jobs if job.id != poison} == {(0, 2)}


def test_an_instance_is_reserved_for_a_suspect_and_takes_nothing_beside_it() -> None:
    scheduler = make_scheduler()
    for name in ("encoder-0", "encoder-1"):
        scheduler.register(registration(name, slots=2), 0.0)
    scheduler.accept(request("r", n=4), 0.0)
    assert [e.instance for e in after(scheduler) if isinstance(e, Assign)] == ["encoder-0", "encoder-1"] * 2
    scheduler.accept(request("s"), 0.0)
    scheduler.accept(request("t", n=3), 0.0)
    scheduler.jobs["s/0"].shared_deaths = SUSPECT_AFTER
    scheduler.changed(scheduler.jobs["s/0"])

    def end(job_id: str, issued: int) -> list[Effect]:
        job = scheduler.jobs[job_id]
        report = stored(job.current_attempt, "encoder", issued + 10 * int(job.instance[-1]), issued)
        assert scheduler.stored(job.instance, report, 1.0)
        return after(scheduler)

    assert after(scheduler) == []
    assert end("r/0", 3) == [], "it is reserved"
    assert end("r/1", 3) == [Assign("encoder-1", "t/0")], "one of them is"
    assert end("r/2", 4) == [Assign("encoder-0", "s/0")]
    assert scheduler.registry.instances["encoder-0"].credits
    assert end("r/3", 4) == [Assign("encoder-1", "t/1")]
    assert end("s/0", 5) == [Assign("encoder-0", "t/2")]


def lose_denoiser(scheduler: JobScheduler, job: Job, generation: int, now: float) -> None:
    """Its connection is lost while it computes the job; the next incarnation has the job again."""
    assert scheduler.connection_lost("denoiser-0", generation, now)
    scheduler.register(registration("denoiser-0", generation=generation + 1, slots=2), now)
    after(scheduler, now)
    if not job.terminal:
        assert scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, now)


def test_an_orderly_end_is_not_the_works_fault_however_often(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    for generation in range(1, 6):
        scheduler.registry.leave("denoiser-0", generation - 1)
        assert not scheduler.registry.instances["denoiser-0"].draining, "an earlier incarnation said so"
        scheduler.registry.leave("denoiser-0", generation)
        assert not scheduler.free_instances().any(Stage.DENOISER, "")
        if generation % 2:
            assert scheduler.returned("denoiser-0", StageReturned(job.current_attempt, 3), 4.0)
            assert not job.instance
        lose_denoiser(scheduler, job, generation, 5.0)
    assert job.state is State.DENOISING_RUNNING
    assert (job.deaths, job.failures, job.stalls) == (0, 0, 0)
    assert "asked to end" in job.causes[0]


def test_an_instance_that_was_silent_before_its_end_was_stopped_and_not_brought_down_by_its_work(
    scheduler: JobScheduler,
) -> None:
    job = to_denoiser(scheduler)
    for generation in (1, 2):
        assert scheduler.expire_silent(0.6 * scheduler.heartbeat_timeout_s, 4.0) == []
        for name in ("encoder-0", "decoder-0"):
            assert scheduler.registry.heard(name, 1)
        lose_denoiser(scheduler, job, generation, 5.0)
    assert (job.deaths, job.failures, job.stalls) == (0, 0, 2)
    for generation in (3, 4):
        scheduler.expire_silent(0.4 * scheduler.heartbeat_timeout_s, 6.0)
        for name in ("encoder-0", "decoder-0"):
            assert scheduler.registry.heard(name, 1)
        lose_denoiser(scheduler, job, generation, 7.0)
    assert job.state is State.FAILED, "it was heard, and then its process ended: twice"
    assert job.causes[-1] == "denoiser-0: its process ended"


def test_silence_fences_and_costs_no_attempt_but_does_not_go_on_for_ever(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    for generation in range(1, MAX_STALLS + 1):
        assert not job.terminal
        assert not scheduler.registry.heard("denoiser-0", generation + 1)
        assert "denoiser-0" in scheduler.expire_silent(scheduler.heartbeat_timeout_s + 1, 4.0)
        assert scheduler.registry.fenced("denoiser-0", generation)
        scheduler.register(registration("denoiser-0", generation=generation + 1, slots=2), 5.0)
        after(scheduler)
        scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, 5.0)
    assert job.state is State.FAILED
    assert (job.deaths, job.failures) == (0, 0)
    assert "fell silent" in job.history[-1].reason


def test_attempts_are_bounded_and_every_cause_is_kept(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    for k in range(3):
        assert not job.terminal
        assert scheduler.stage_failed("denoiser-0", failed(job.current_attempt, f"boom {k}", retryable=True), 4.0)
        after(scheduler)
    assert job.state is State.FAILED
    assert job.causes == ["denoiser-0: boom 0", "denoiser-0: boom 1", "denoiser-0: boom 2"]


def test_damaged_transfers_cost_no_attempt_but_do_not_go_on_for_ever(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    for k in range(11):
        assert job.state is State.DENOISING_WAITING or k == 0
        assert scheduler.transfer_failed("denoiser-0", TransferFailed(job.current_attempt, "damaged", False, 99), 4.0)
        after(scheduler)
    assert job.state is State.FAILED
    assert job.failures == 0


def test_a_request_at_fault_fails_at_once_with_its_cause(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    scheduler.stage_failed("denoiser-0", failed(job.current_attempt, "ValueError: bad size", retryable=False), 4.0)
    assert job.view().at_fault
    assert job.state is State.FAILED
    assert job.history[-1].reason == "ValueError: bad size"


def test_an_instance_that_drains_gets_nothing_more_and_the_refusal_costs_no_attempt(scheduler: JobScheduler) -> None:
    scheduler.register(registration("encoder-1"), 0.0)
    scheduler.accept(request(), 0.0)
    (assigned,) = after(scheduler)
    assert isinstance(assigned, Assign)
    job = scheduler.jobs["r/0"]
    scheduler.attempt_refused(assigned.instance, job.current_attempt, "draining", "it ends", 1.0)
    (again,) = after(scheduler)
    assert isinstance(again, Assign)
    assert again.instance != assigned.instance
    assert (job.failures, job.attempt) == (0, 2)
    scheduler.attempt_refused(again.instance, job.current_attempt, "draining", "it ends", 1.0)
    assert after(scheduler) == []
    scheduler.register(registration(assigned.instance, generation=2), 2.0)
    assert after(scheduler) == [Assign(assigned.instance, "r/0")]


@pytest.mark.parametrize("code", ["mailbox_full", "deadline_exceeded", "draining", "stopping", "no_credit"])
def test_a_refusal_before_anything_was_done_costs_no_attempt(scheduler: JobScheduler, code: str) -> None:
    scheduler.accept(request(), 0.0)
    after(scheduler)
    job = scheduler.jobs["r/0"]
    scheduler.attempt_refused("encoder-0", job.current_attempt, code, "not now", 1.0)
    assert (job.state, job.failures) == (State.ENCODER_WAITING, 0)


def test_cancel_stops_the_work_and_returns_the_leases(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    attempt = job.current_attempt
    scheduler.cancel("r", "enough", 4.0)
    effects = after(scheduler)
    assert Cancel("denoiser-0", attempt, "enough") in effects
    assert ReleaseLeases((a_block(1).lease,)) in effects
    assert NotifyWaiters("r") in effects
    assert not scheduler.stored("denoiser-0", stored(attempt, "denoiser", 2), 5.0)
    assert after(scheduler) == [ReleaseLeases((a_block(2).lease,))]
    assert scheduler.requests["r"].state is State.CANCELLED


def test_a_request_times_out_by_elapsed_time_and_by_no_clock(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    scheduler.requests["r"].times_out_at = job.expires_at = 10.0
    scheduler.changed(job)
    scheduler.elapse(9.9, now=1e12)
    assert not job.terminal
    scheduler.elapse(0.1, now=-1e12)
    assert job.state is State.TIMED_OUT
    assert job.history[-1].reason == "still DENOISING_RUNNING after 10 s ([head] request_timeout_s = 10)"


def test_a_stage_times_out_by_itself_where_it_has_a_bound() -> None:
    scheduler = make_scheduler(waiting_timeout_s=5, running_timeout_s=50)
    scheduler.accept(request("waits"), 0.0)
    scheduler.accept(request("runs"), 0.0)
    runs = scheduler.jobs["runs/0"]
    runs.instance = "encoder-0"
    scheduler.changed(runs)
    assert scheduler.started(runs.current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    scheduler.elapse(4.0, 5.0)
    assert runs.stage_s == 4.0
    scheduler.elapse(1.0, 5.0)
    assert scheduler.requests["waits"].state is State.TIMED_OUT
    assert not runs.terminal
    scheduler.elapse(45.0, 51.0)
    assert runs.state is State.TIMED_OUT
    assert runs.history[-1].reason == "ENCODER_RUNNING for 50 s ([head] running_timeout_s = 50)"
    assert Cancel("encoder-0", runs.current_attempt, runs.history[-1].reason) in after(scheduler)


def test_a_forgotten_request_frees_its_key(scheduler: JobScheduler) -> None:
    kept = request("r")
    kept.idempotency_key = "k"
    scheduler.accept(kept, 0.0)
    scheduler.forget(["r"])
    assert scheduler.by_key == {"k": kept}
    scheduler.cancel("r", "enough", 1.0)
    scheduler.forget(["r"])
    assert scheduler.by_key == {}
    assert scheduler.requests == {}


def test_a_restarted_head_keeps_what_an_instance_still_runs(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    restarted = make_scheduler()
    restarted.accept(scheduler.requests["r"], 4.5)
    assert restarted.register(
        registration("denoiser-0", slots=2, running=(job.current_attempt, Attempt("gone/0", 1))), 5.0
    ) == (Attempt("gone/0", 1),)
    restarted.requeue_orphans(9.0)
    assert job.state is State.DENOISING_RUNNING
    assert restarted.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 10.0)


def test_a_restarted_head_reruns_what_nobody_claims(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    restarted = make_scheduler()
    restarted.accept(scheduler.requests["r"], 4.5)
    restarted.requeue_orphans(9.0)
    assert job.state is State.DENOISING_WAITING
    assert job.failures == 0


def test_what_was_accepted_just_before_the_head_died_starts_with_the_next_one() -> None:
    """The journal has it as PENDING: it was written, and nothing else had been done."""
    restarted = make_scheduler()
    restarted.accept(request(), 1.0)
    restarted.register(registration("encoder-0"), 2.0)
    assert after(restarted) == [Assign("encoder-0", "r/0")]
    assert restarted.jobs["r/0"].current_attempt == Attempt("r/0", 1)


def test_a_repeated_report_does_not_release_what_is_in_use(scheduler: JobScheduler) -> None:
    job = to_denoiser(scheduler)
    assert not scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 5.0)
    assert [e for e in after(scheduler) if isinstance(e, ReleaseLeases)] == []
    assert job.state is State.DENOISING_RUNNING


def test_encoders_wait_when_enough_is_stored_for_the_denoisers() -> None:
    scheduler = make_scheduler()
    scheduler.register(registration("encoder-0", slots=50), 0.0)
    scheduler.register(registration("denoiser-0", slots=1), 0.0)
    for k in range(20):
        scheduler.accept(request(f"r{k}"), 0.0)
    assert len(after(scheduler)) == 3


def test_a_monolithic_instance_passes_through_every_state() -> None:
    scheduler = make_scheduler()
    scheduler.register(
        RegisterInstance("mono-0", "monolithic", 1, 1, 1, 1, 0, pool="", signature=Signature(), running=()), 0.0
    )
    scheduler.accept(request(), 0.0)
    assert after(scheduler) == [Assign("mono-0", "r/0")]
    job = scheduler.jobs["r/0"]
    for stage in Stage:
        assert scheduler.started(job.current_attempt, "mono-0", stage, 1.0)
    assert scheduler.finished("mono-0", finished(job.current_attempt), 2.0)
    assert [m.state for m in job.history] == [s.value for s in State][1:10]


def test_while_no_denoiser_is_there_no_more_is_encoded_than_for_those_of_the_topology() -> None:
    scheduler = make_scheduler()
    scheduler.registry = InstanceRegistry({Stage.DENOISER: 2})
    scheduler.register(registration("encoder-0", slots=20), 0.0)
    scheduler.accept(request(n=20), 0.0)
    assert len(after(scheduler)) == 2 * (LOOKAHEAD + 1)


def test_what_runs_out_of_time_says_what_its_instance_waited_for() -> None:
    scheduler = make_scheduler()
    scheduler.register(registration("encoder-0"), 0.0)
    scheduler.accept(request(), 0.0)
    after(scheduler)
    scheduler.started(scheduler.jobs["r/0"].current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    assert scheduler.registry.heard("encoder-0", 1, "the disk is full")
    assert scheduler.instance_views()[0].trouble == "the disk is full"
    scheduler.elapse(1e10, 2.0)
    last = scheduler.requests["r"].jobs[0].history[-1]
    assert last.state == "TIMED_OUT"
    assert last.reason.endswith(": the disk is full")


def test_every_slot_of_a_denoiser_is_used_however_few_the_decoder_has() -> None:
    scheduler = make_scheduler()
    for instance in (
        registration("encoder-0", slots=9),
        registration("denoiser-0", slots=8),
        registration("decoder-0"),
    ):
        scheduler.register(instance, 0.0)
    scheduler.accept(request(n=9), 0.0)
    after(scheduler)
    for k, job in enumerate(scheduler.jobs.values()):
        assert scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", k), 1.0)
    assert len(after(scheduler)) == 8


def test_instances_whose_pool_has_ended_get_no_jobs_until_it_is_back(scheduler: JobScheduler) -> None:
    other = msgspec.structs.replace(registration("encoder-1"), pool="pool-b")
    scheduler.register(other, 0.0)
    scheduler.registry.set_pool_away("pool", away=True)
    for id_ in "abc":
        scheduler.accept(request(id_), 0.0)
    assert [effect for effect in after(scheduler) if isinstance(effect, Assign)] == [Assign("encoder-1", "a/0")]
    scheduler.registry.set_pool_away("pool", away=False)
    assert {effect.instance for effect in after(scheduler) if isinstance(effect, Assign)} == {"encoder-0"}
