"""What becomes of the previews that denoisers store: a decoder gets them when it has nothing else to do."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.roles.factories import KINDS, a_block, after, finished, make_scheduler, registration, request, stored
from triptych.engines.stages import Stage
from triptych.roles.head.attempt_messages import SupersededError, message_for, source_of
from triptych.roles.head.effects import Assign, AssignPreview, Cancel, ReleaseLeases
from triptych.roles.head.job import Job
from triptych.roles.head.previews import Previews
from triptych.roles.head.registry import ExitCause
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import Artifact, Attempt
from triptych.roles.messages.stages import (
    PreviewStored,
    StageCancelled,
    StageFailed,
    StageFinished,
    TransferFailed,
    TransferPush,
)
from triptych.roles.previews import denoise_of, is_preview, preview_attempt, preview_steps

CASES = [(4, 0, ()), (4, 1, (2,)), (4, 3, (1, 2, 3)), (50, 3, (12, 25, 38)), (2, 3, (1,)), (1, 3, ()), (0, 2, ())]


@pytest.mark.parametrize(("total", "count", "steps"), CASES)
def test_previews_are_spread_over_the_steps(total: int, count: int, steps: tuple[int, ...]) -> None:
    found = preview_steps(total, count)
    assert found == steps or [abs(a - b) for a, b in zip(found, steps, strict=True)] == [0, 0, 1]


@given(st.integers(0, 100_000), st.integers(0, 3))
def test_previews_are_never_more_than_asked_for_and_never_of_the_last_step(total: int, count: int) -> None:
    steps = preview_steps(total, count)
    assert len(steps) <= count
    assert sorted(set(steps)) == list(steps)
    assert all(0 < step < total for step in steps)
    assert len(steps) == count or total <= count


def test_a_preview_has_an_attempt_of_its_own() -> None:
    attempt = Attempt("r/0", 3)
    preview = preview_attempt(attempt, 12)
    assert preview == Attempt("r/0.12", 3)
    assert denoise_of(preview) == (attempt, 12)
    assert denoise_of(attempt) == (attempt, 0)
    assert (is_preview(preview), is_preview(attempt)) == (True, False)
    for odd in ("r/0.", "r/0.x", "r/0.-1", "r/0.٣"):
        assert not is_preview(Attempt(odd, 1))


@pytest.fixture
def scheduler() -> JobScheduler:
    scheduler = make_scheduler()
    for kind in KINDS:
        scheduler.register(registration(f"{kind}-0", slots=2), 0.0)
    return scheduler


def denoising(scheduler: JobScheduler, id_: str = "r", previews: int = 2, lease: int = 1) -> Job:
    asked = request(id_)
    asked.partial_images = previews
    scheduler.accept(asked, 0.0)
    after(scheduler)
    job = scheduler.jobs[f"{id_}/0"]
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", lease), 2.0)
    after(scheduler)
    scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, 3.0)
    return job


def store_preview(scheduler: JobScheduler, job: Job, step: int, lease: int) -> Attempt:
    """Returns the attempt of the preview."""
    preview = preview_attempt(job.current_attempt, step)
    scheduler.preview_stored("denoiser-0", PreviewStored(preview, a_block(lease)))
    return preview


def an_image(attempt: Attempt, name: str = "r_0.1.png") -> StageFinished:
    return StageFinished(attempt, Stage.DECODER, Artifact(name, "image/png", 5), 0.1, 99)


def test_a_denoiser_is_told_how_many_and_an_idle_decoder_makes_them(scheduler: JobScheduler) -> None:
    job = denoising(scheduler)
    source = source_of(scheduler, job.current_attempt, "denoiser-0")
    assert message_for(scheduler, job.current_attempt, source, None).partial_images == 2
    second = store_preview(scheduler, job, 2, 12)
    first = store_preview(scheduler, job, 1, 11)
    assert after(scheduler) == [AssignPreview("decoder-0", second)], "one at a time, the oldest first"
    assert scheduler.is_current(second, "decoder-0")
    message = message_for(scheduler, second, source_of(scheduler, second, "decoder-0"), None)
    assert isinstance(message, TransferPush)
    assert (message.source, message.partial_images) == (a_block(12), 0)
    assert scheduler.started(second, "decoder-0", Stage.DECODER, 4.0)
    assert scheduler.finished("decoder-0", an_image(second, "r_0.2.png"), 5.0)
    assert after(scheduler) == [ReleaseLeases((a_block(12).lease,)), AssignPreview("decoder-0", first)]
    assert scheduler.finished("decoder-0", an_image(first), 6.0)
    (unit,) = scheduler.requests["r"].view().units
    assert [(view.step, view.artifact.name) for view in unit.previews] == [(1, "r_0.1.png"), (2, "r_0.2.png")]
    assert job.id in scheduler.dirty
    assert unit.state == "DENOISING_RUNNING"


def test_a_job_goes_before_a_preview(scheduler: JobScheduler) -> None:
    first, second = denoising(scheduler, "a"), denoising(scheduler, "b", lease=2)
    store_preview(scheduler, second, 1, 21)
    scheduler.stored("denoiser-0", stored(first.current_attempt, "denoiser", 3), 4.0)
    effects = after(scheduler)
    assert Assign("decoder-0", "a/0") in effects
    assert not [effect for effect in effects if isinstance(effect, AssignPreview)], "the decoder has a job"
    scheduler.finished("decoder-0", finished(first.current_attempt), 5.0)
    assert [effect for effect in after(scheduler) if isinstance(effect, AssignPreview)]


def test_no_more_are_kept_than_were_asked_for_and_none_twice(scheduler: JobScheduler) -> None:
    job = denoising(scheduler, previews=1)
    store_preview(scheduler, job, 1, 11)
    store_preview(scheduler, job, 1, 12)
    store_preview(scheduler, job, 2, 13)
    gone = [effect.leases for effect in after(scheduler) if isinstance(effect, ReleaseLeases)]
    assert gone == [(a_block(12).lease,), (a_block(13).lease,)]
    unasked = denoising(scheduler, "s", previews=0, lease=2)
    store_preview(scheduler, unasked, 1, 14)
    assert ReleaseLeases((a_block(14).lease,)) in after(scheduler)


def test_previews_of_an_attempt_that_is_not_current_are_released(scheduler: JobScheduler) -> None:
    job = denoising(scheduler)
    late = PreviewStored(preview_attempt(Attempt(job.id, 0), 1), a_block(11))
    assert not scheduler.preview_stored("denoiser-0", late)
    assert not scheduler.preview_stored(
        "denoiser-9", PreviewStored(preview_attempt(job.current_attempt, 1), a_block(12))
    )
    assert not scheduler.preview_stored("denoiser-0", PreviewStored(job.current_attempt, a_block(13)))
    assert len(scheduler.previews) == 0
    assert sum(isinstance(effect, ReleaseLeases) for effect in after(scheduler)) == 3


def test_a_preview_that_fails_is_not_tried_again_and_harms_nothing(scheduler: JobScheduler) -> None:
    job = denoising(scheduler, previews=3)
    reports = (
        lambda of: scheduler.stage_failed("decoder-0", StageFailed(of, Stage.DECODER, "boom", True, 99), 5.0),
        lambda of: scheduler.transfer_failed("decoder-0", TransferFailed(of, "gone", True, 99), 5.0),
        lambda of: scheduler.cancelled("decoder-0", StageCancelled(of, 99)),
        lambda of: scheduler.give_up(of, "decoder-0", "never fits", 5.0),
        lambda of: scheduler.attempt_refused("decoder-0", of, "no_credit", "busy", 5.0),
        lambda of: scheduler.instance_down("decoder-0", "killed", 5.0, ExitCause.CRASHED),
    )
    for step, report in enumerate(reports, start=1):
        preview = store_preview(scheduler, job, step, 10 + step)
        assert AssignPreview("decoder-0", preview) in after(scheduler)
        report(preview)
        assert ReleaseLeases((a_block(10 + step).lease,)) in after(scheduler)
        assert not scheduler.is_current(preview, "decoder-0")
    assert (job.failures, job.deaths, job.transfers_lost, job.causes, job.previews) == (0, 0, 0, [], [])
    assert job.instance == "denoiser-0"


def test_what_waits_is_dropped_when_the_denoise_is_done_and_the_rest_with_the_job(scheduler: JobScheduler) -> None:
    job = denoising(scheduler)
    first = store_preview(scheduler, job, 1, 11)
    after(scheduler)
    store_preview(scheduler, job, 2, 12)
    scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 4.0)
    effects = after(scheduler)
    assert ReleaseLeases((a_block(12).lease,)) in effects
    assert Assign("decoder-0", "r/0") in effects, "the preview has one slot, the image takes the other"
    scheduler.finished("decoder-0", finished(job.current_attempt), 5.0)
    effects = after(scheduler)
    assert Cancel("decoder-0", first, "the preview is not wanted any more") in effects
    assert ReleaseLeases((a_block(11).lease,)) in effects
    assert not scheduler.finished("decoder-0", an_image(first), 6.0), "its file is discarded"
    with pytest.raises(SupersededError):
        source_of(scheduler, first, "decoder-0")


def test_a_full_pool_gets_the_blocks_of_waiting_previews_first(scheduler: JobScheduler) -> None:
    job = denoising(scheduler)
    assigned = store_preview(scheduler, job, 1, 11)
    after(scheduler)
    store_preview(scheduler, job, 2, 12)
    assert scheduler.evict_checkpoints("pool", 1) >= 64
    assert ReleaseLeases((a_block(12).lease,)) in after(scheduler)
    assert scheduler.is_current(assigned, "decoder-0")
    scheduler.pool_down("pool", 2, 5.0)
    assert not scheduler.is_current(assigned, "decoder-0")


def test_a_decoder_that_comes_back_without_a_preview_does_not_get_it_again(scheduler: JobScheduler) -> None:
    job = denoising(scheduler)
    preview = store_preview(scheduler, job, 1, 11)
    after(scheduler)
    known = registration("decoder-0", generation=2, slots=2, running=(preview,))
    assert scheduler.register(known, 5.0) == ()
    assert scheduler.register(registration("decoder-0", generation=3, slots=2), 6.0) == ()
    assert not scheduler.is_current(preview, "decoder-0")
    assert scheduler.register(registration("decoder-0", generation=3, slots=2, running=(preview,)), 7.0) == (preview,)


def test_while_no_decoder_is_idle_the_previews_that_wait_are_not_looked_at(
    scheduler: JobScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = denoising(scheduler, previews=3)
    previews = [store_preview(scheduler, job, step, 10 + step) for step in (1, 2, 3)]
    monkeypatch.setattr(Previews, "waiting", waiting := Mock(wraps=scheduler.previews.waiting))
    assert after(scheduler) == [AssignPreview("decoder-0", previews[0])]
    assert waiting.call_count == 1
    assert after(scheduler) == []
    assert waiting.call_count == 1
    scheduler.finished("decoder-0", an_image(previews[0]), 5.0)
    assert AssignPreview("decoder-0", previews[1]) in after(scheduler)
