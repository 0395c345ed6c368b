"""What an instance is told with an attempt."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.roles.factories import a_block, after, make_scheduler, registration, request, scheduled, single_model, stored
from triptych.engines.memory.buddy import PAGE
from triptych.engines.stages import Stage
from triptych.roles.head.attempt_messages import message_for, source_of
from triptych.roles.head.reclaim import unneeded
from triptych.roles.messages.common import Attempt, Provenance, Rebind, SchedulingHints
from triptych.roles.messages.pool import LeaseView
from triptych.roles.messages.stages import StageAssign, TransferPush


@pytest.mark.parametrize("metadata", [True, False, None])
def test_the_decoder_alone_is_told_unless_there_is_to_be_no_metadata(metadata: bool | None) -> None:
    scheduler = make_scheduler()
    for name in ("encoder-0", "denoiser-0", "decoder-0"):
        scheduler.register(registration(name), 0.0)
    asked = request(seed=7, height=64)
    asked.output = replace(asked.output, metadata=metadata)
    scheduler.accept(asked, 0.0)
    (job,) = scheduler.jobs.values()
    told: dict[str, Provenance | None] = {}
    for lease, kind in enumerate(("encoder", "denoiser", "decoder")):
        after(scheduler)
        attempt, name = job.current_attempt, f"{kind}-0"
        message = message_for(scheduler, attempt, source_of(scheduler, attempt, name), None, "shapes")
        if isinstance(message, StageAssign):
            assert message.model == "shapes", "a monolithic instance has the rest"
        else:
            assert isinstance(message, TransferPush)
            told[kind] = message.provenance
            scheduler.started(attempt, name, Stage(kind), 1.0)
        if kind != "decoder":
            scheduler.stored(name, stored(attempt, kind, lease), 2.0)
    made = Provenance("shapes", {"prompt": "x", "height": 64}, 7)
    assert told == {"denoiser": None, "decoder": made if metadata else None}


def test_cached_outputs_come_with_the_seed_and_inputs_of_the_job() -> None:
    scheduler = make_scheduler(cache=PAGE)
    for kind in ("encoder", "denoiser"):
        scheduler.register(registration(f"{kind}-0", slots=2), 0.0)
    scheduler.accept(request(), 0.0)
    scheduler.accept(request("second", seed=7, num_inference_steps=9), 0.0)
    after(scheduler)
    scheduler.stored(
        "encoder-0", stored(scheduler.jobs["r/0"].current_attempt, "encoder", 1, seed_independent=True), 1.0
    )
    after(scheduler)
    models = single_model(scheduler)

    def pushed(job_id: str) -> TransferPush:
        attempt = scheduler.jobs[job_id].current_attempt
        message = message_for(scheduler, attempt, source_of(scheduler, attempt, "denoiser-0"), None)
        assert isinstance(message, TransferPush)
        return message

    first, second = pushed("r/0"), pushed("second/0")
    assert first.rebind is None
    assert second.rebind == Rebind({"prompt": "x", "num_inference_steps": 9}, 7)
    assert first.source == second.source

    views = [
        LeaseView(a_block(number).lease, "sealed", "encoder-0", 1, Attempt(job_id, attempt))
        for number, job_id, attempt in ((1, "r/0", 1), (2, "gone/0", 1), (3, "r/0", 0), (4, "r/0", 1))
    ]
    assert [lease.lease_id for lease in unneeded(models, views)] == [2, 3]
    scheduler.cancel("r", "enough", 2.0)
    scheduler.cancel("second", "enough", 2.0)
    assert not unneeded(models, views[:1]), "the cache keeps it"
    scheduler.clear_cache()
    assert unneeded(models, views[:1])


def test_a_job_keeps_the_bucket_of_its_first_denoise_and_instances_are_told_what_it_is_scheduled_by() -> None:
    scheduler = make_scheduler()
    for instance in (registration("encoder-0"), registration("denoiser-0", max_batch=8)):
        scheduler.register(instance, 0.0)
    scheduler.accept(scheduled("r", priority=3, deadline_s=20.0, steps=28, owner="alice"), 0.0)
    job = scheduler.jobs["r/0"]

    def hints() -> SchedulingHints:
        after(scheduler)
        return message_for(
            scheduler, job.current_attempt, source_of(scheduler, job.current_attempt, job.instance), None
        ).hints

    assert hints() == SchedulingHints(3, 20.0, 28, 1, "alice")
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 1.0)
    scheduler.elapse(5.0, 5.0)
    assert hints() == SchedulingHints(3, 15.0, 28, 8, "alice")
    scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, 2.0)
    scheduler.instance_down("denoiser-0", "its process ended", 3.0)
    scheduler.register(registration("denoiser-1", max_batch=4), 3.0)
    assert hints().bucket == job.view().bucket == 8
