"""Between the scheduler's decision and the message that carries it out, the world may have changed."""

from __future__ import annotations

import asyncio

from tests.roles.factories import after, make_scheduler, registration, request, single_model, stored
from triptych.actors import Actor
from triptych.engines.stages import Stage
from triptych.roles.head.effect_runner import EffectRunner
from triptych.roles.head.job import Job, State
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import Attempt


def assigned_to_a_denoiser() -> tuple[JobScheduler, Job]:
    scheduler = make_scheduler()
    for kind in ("encoder", "denoiser"):
        scheduler.register(registration(f"{kind}-0", slots=2), 0.0)
    scheduler.accept(request(), 0.0)
    after(scheduler)
    job = scheduler.jobs["r/0"]
    scheduler.started(job.current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 2.0)
    after(scheduler)
    assert job.instance == "denoiser-0"
    return scheduler, job


def send(scheduler: JobScheduler, attempt: Attempt) -> None:
    effect_runner = EffectRunner(Actor("head"), single_model(scheduler), notify=lambda _: None, on_outcome=lambda: None)
    asyncio.run(effect_runner._assign("denoiser-0", attempt))


def test_a_job_whose_tensors_are_lost_before_it_is_sent_starts_over_without_a_new_attempt() -> None:
    scheduler, job = assigned_to_a_denoiser()
    scheduler.pool_down("pool", 2, 3.0)
    send(scheduler, job.current_attempt)
    assert job.state is State.ENCODER_WAITING
    assert (job.instance, job.failures) == ("", 0)
    assert scheduler.registry.instances["denoiser-0"].credits == 2


def test_a_job_that_is_cancelled_before_it_is_sent_is_not_sent() -> None:
    scheduler, job = assigned_to_a_denoiser()
    attempt = job.current_attempt
    scheduler.cancel("r", "enough", 3.0)
    send(scheduler, attempt)
    assert job.state is State.CANCELLED
    assert scheduler.registry.instances["denoiser-0"].credits == 2
