"""A denoise goes on from its newest checkpoint on another instance; one that is of no use is released."""

from __future__ import annotations

import msgspec

from tests.roles.factories import a_block, after, make_scheduler, registration, request, stored
from triptych.engines.stages import Stage
from triptych.roles.head.attempt_messages import message_for, source_of
from triptych.roles.head.dispatcher import Dispatcher
from triptych.roles.head.effects import ReleaseLeases
from triptych.roles.head.job import Checkpoint, Job, State
from triptych.roles.head.journal import decode_job, encode_job
from triptych.roles.head.registry import ExitCause
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import LeaseRef, StoredPayload
from triptych.roles.messages.stages import CheckpointStored, StageReturned, TransferFailed, TransferPush

DENOISERS = ("denoiser-0", "denoiser-1")


def denoising(*names: str) -> tuple[JobScheduler, Job]:
    """A scheduler whose one job is denoised by denoiser-0 at its 30th of 50 steps."""
    scheduler = make_scheduler()
    for name in ("encoder-0", *(names or DENOISERS), "decoder-0"):
        scheduler.register(registration(name), 0.0)
    scheduler.accept(request(), 0.0)
    (job,) = scheduler.jobs.values()
    after(scheduler)
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 1.0)
    after(scheduler)
    begin(scheduler, job, 30)
    return scheduler, job


def begin(scheduler: JobScheduler, job: Job, step: int) -> TransferPush:
    pushed = message_for(scheduler, job.current_attempt, source_of(scheduler, job.current_attempt, job.instance), None)
    assert isinstance(pushed, TransferPush)
    scheduler.started(job.current_attempt, job.instance, Stage.DENOISER, 2.0)
    scheduler.progress(job.current_attempt, step, 50, 2.0)
    return pushed


def save(scheduler: JobScheduler, job: Job, step: int, lease_id: int) -> bool:
    report = CheckpointStored(job.current_attempt, step, a_block(lease_id))
    return scheduler.checkpoint_stored(job.instance, report)


def released(scheduler: JobScheduler) -> list[int]:
    effects = after(scheduler)
    return [lease.lease_id for effect in effects if isinstance(effect, ReleaseLeases) for lease in effect.leases]


def test_the_newest_checkpoint_goes_to_the_next_denoiser_with_the_outputs_of_the_encoder() -> None:
    scheduler, job = denoising()
    assert save(scheduler, job, 10, 2)
    assert save(scheduler, job, 20, 3)
    assert released(scheduler) == [2]
    assert save(scheduler, job, 20, 3), "told again"
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    assert released(scheduler) == []
    assert (job.state, job.instance) == (State.DENOISING_WAITING, "denoiser-1")
    pushed = begin(scheduler, job, 21)
    assert (pushed.source, pushed.checkpoint) == (a_block(1), a_block(3))
    assert (job.resumed_from, job.steps_redone) == (20, 10)
    view = job.view()
    assert (view.checkpoint_step, view.resumed_from, view.steps_redone) == (20, 20, 10)
    scheduler.stored("denoiser-1", stored(job.current_attempt, "denoiser", 4), 4.0)
    assert sorted(released(scheduler)) == [1, 3]
    assert job.checkpoint is None
    assert begin_decode(scheduler, job).checkpoint is None
    assert job.resumed_from == 20


def begin_decode(scheduler: JobScheduler, job: Job) -> TransferPush:
    pushed = message_for(scheduler, job.current_attempt, source_of(scheduler, job.current_attempt, job.instance), None)
    assert isinstance(pushed, TransferPush)
    return pushed


def test_an_instance_that_returns_a_denoise_has_stored_all_of_its_steps() -> None:
    scheduler, job = denoising()
    assert save(scheduler, job, 30, 2)
    scheduler.returned("denoiser-0", StageReturned(job.current_attempt, 99), 3.0)
    after(scheduler)
    assert begin(scheduler, job, 31).checkpoint == a_block(2)
    assert (job.resumed_from, job.steps_redone) == (30, 0)


def test_a_denoiser_that_could_not_load_the_checkpoint_begins_again() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    after(scheduler)
    begin(scheduler, job, 1)
    assert (job.resumed_from, job.steps_redone) == (0, 30)


def test_steps_of_a_checkpoint_that_is_lost_before_anyone_goes_on_from_it_are_redone() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    scheduler.evict_checkpoints("pool", 1)
    after(scheduler)
    begin(scheduler, job, 1)
    assert (job.resumed_from, job.steps_redone) == (0, 30)


def test_all_steps_are_redone_for_a_decoder_that_cannot_load_what_was_made() -> None:
    scheduler, job = denoising()
    scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 3.0)
    after(scheduler)
    name = job.instance
    scheduler.transfer_failed(name, TransferFailed(job.current_attempt, "the decoder is away", False, 99), 4.0)
    after(scheduler)
    assert job.steps_lost_at == 0, "another decoder can load it"
    scheduler.transfer_failed(job.instance, TransferFailed(job.current_attempt, "damaged", True, 99), 5.0)
    after(scheduler)
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 5), 6.0)
    after(scheduler)
    begin(scheduler, job, 1)
    assert job.steps_redone == 50


def test_who_goes_on_from_a_checkpoint_is_scheduled_by_the_steps_that_are_left() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    assert scheduler.requests["r"].steps_left(job) == 30
    after(scheduler)
    pushed = message_for(scheduler, job.current_attempt, source_of(scheduler, job.current_attempt, job.instance), None)
    assert pushed.hints.steps == 30


def test_a_job_that_ends_lets_go_of_its_checkpoint() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.cancel("r", "enough", 3.0)
    assert sorted(released(scheduler)) == [1, 2]


def test_a_checkpoint_of_an_attempt_that_no_longer_counts_is_released() -> None:
    scheduler, job = denoising()
    old = job.current_attempt
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    after(scheduler)
    assert not scheduler.checkpoint_stored("denoiser-0", CheckpointStored(old, 20, a_block(2)))
    assert released(scheduler) == [2]
    assert job.checkpoint is None


def test_a_full_pool_has_the_room_of_checkpoints_first_of_jobs_that_run() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    assert scheduler.evict_checkpoints("other", 1) == 0
    assert scheduler.evict_checkpoints("pool", 1) > 0
    assert released(scheduler) == [2]
    assert job.checkpoint is None
    assert job.id in scheduler.dirty
    assert scheduler.evict_checkpoints("pool", 1) == 0


def test_a_lost_pool_loses_the_checkpoint() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.pool_down("pool", 2, 3.0)
    assert job.checkpoint is None
    assert job.instance == "denoiser-0", "which has loaded all that it needs"
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    assert job.state is State.ENCODER_WAITING


def test_a_checkpoint_outlives_the_outputs_of_the_encoder_which_are_the_same_again() -> None:
    scheduler, job = denoising()
    far = StoredPayload(LeaseRef("pool-denoiser", 1, 7, 0, 64), b"", 0, 64)
    scheduler.checkpoint_stored("denoiser-0", CheckpointStored(job.current_attempt, 20, far))
    scheduler.pool_down("pool", 2, 3.0)
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    after(scheduler)
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 5), 4.0)
    assert job.checkpoint == Checkpoint(20, far)
    after(scheduler)
    assert begin(scheduler, job, 21).checkpoint == far, "its pool copies it"
    assert job.resumed_from == 20


def test_a_checkpoint_outlives_damaged_outputs_of_the_encoder() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    after(scheduler)
    scheduler.transfer_failed("denoiser-1", TransferFailed(job.current_attempt, "damaged", True, 99), 4.0)
    assert job.state is State.ENCODER_WAITING
    assert released(scheduler) == [1]
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 5), 5.0)
    after(scheduler)
    assert begin(scheduler, job, 21).checkpoint == a_block(2)
    assert (job.resumed_from, job.steps_redone) == (20, 10)


def test_other_weights_do_not_go_on_with_it() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    scheduler.instance_down("denoiser-0", "killed", 3.0, ExitCause.CRASHED)
    job.model = "older"
    scheduler.changed(job)
    scheduler.registry.instances["denoiser-1"].model = "older"
    scheduler.registry.note_change("denoiser-1")
    after(scheduler)
    assert job.checkpoint, "the same weights"
    scheduler.instance_down("denoiser-1", "killed", 3.0, ExitCause.CRASHED)
    job.forget_stored()
    job.model = "other"
    scheduler.register(registration("denoiser-0", generation=2), 4.0)
    scheduler.stored_outputs.put(job, Stage.ENCODER, a_block(9))
    job.model = "oldest"
    Dispatcher(scheduler)._assign(job, Stage.DENOISER, "denoiser-0", 5.0)
    assert job.checkpoint is None


def test_the_journal_keeps_it() -> None:
    scheduler, job = denoising()
    save(scheduler, job, 20, 2)
    job.steps_redone, job.resumed_from = 5, 4
    read = decode_job(encode_job(job))
    assert (read.checkpoint, read.steps_redone, read.resumed_from) == (Checkpoint(20, a_block(2)), 5, 4)
    fields = msgspec.msgpack.decode(encode_job(job))
    del fields["checkpoint"], fields["resumed_from"], fields["steps_lost_at"], fields["steps_redone"]
    assert decode_job(msgspec.msgpack.encode(fields)).checkpoint is None, "as earlier versions wrote it"
    resumed = make_scheduler()
    taken = request()
    taken.jobs = [read]
    resumed.resume(taken, {"pool-denoiser"}, set(DENOISERS), 0.0)
    assert read.checkpoint is None, "the topology has no such pool any more"
