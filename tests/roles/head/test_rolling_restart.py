"""Changed weights: no mix of them is served, and a reload goes over to new ones without losing a request."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.roles.factories import KINDS, a_block, after, finished, make_scheduler, registration, request, stored
from triptych.engines.stages import Stage
from triptych.roles.head.effects import Assign, ReleaseLeases, RestartInstance
from triptych.roles.head.job import Job, State
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.stages import RegisterInstance

OLD, NEW = "old", "new"


def joins(scheduler: JobScheduler, name: str, model: str, generation: int = 1) -> bool:
    message: RegisterInstance = replace(registration(name, generation=generation, slots=2), model=model)
    admitted = scheduler.admit(name, model)
    if admitted:
        scheduler.register(message, 0.0)
    return admitted


@pytest.fixture
def scheduler() -> JobScheduler:
    scheduler = make_scheduler(cache=1 << 20)
    for kind in KINDS:
        assert joins(scheduler, f"{kind}-0", OLD)
    return scheduler


def encoded(scheduler: JobScheduler, id_: str, lease: int) -> Job:
    """A request whose encoder's output is at rest."""
    scheduler.accept(request(id_, prompt=id_), 0.0)
    after(scheduler)
    job = scheduler.jobs[f"{id_}/0"]
    assert scheduler.started(job.current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    assert scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", lease, seed_independent=True), 2.0)
    return job


def comes_back(scheduler: JobScheduler, name: str) -> None:
    scheduler.instance_down(name, "its process ended", 5.0)
    assert joins(scheduler, name, NEW, generation=2)


def test_an_instance_with_other_weights_than_the_rest_is_turned_away(scheduler: JobScheduler) -> None:
    scheduler.instance_down("encoder-0", "its process ended", 1.0)
    assert not joins(scheduler, "encoder-0", NEW)
    assert scheduler.refused == {"encoder-0": NEW}
    assert joins(scheduler, "encoder-0", OLD), "the files are as they were again"
    assert not scheduler.refused


def test_when_nobody_is_left_with_the_old_weights_the_new_ones_are_taken(scheduler: JobScheduler) -> None:
    job = encoded(scheduler, "r", 1)
    for kind in KINDS:
        scheduler.instance_down(f"{kind}-0", "its process ended", 3.0)
    assert joins(scheduler, "denoiser-0", NEW)
    effects = after(scheduler)
    assert ReleaseLeases((a_block(1).lease,)) in effects, "what old weights made is of no use to new ones"
    assert job.state is State.ENCODER_WAITING
    assert not job.failures


def test_a_reload_finishes_what_was_begun_and_restarts_one_idle_instance_after_the_other(
    scheduler: JobScheduler,
) -> None:
    begun = encoded(scheduler, "begun", 1)
    assert scheduler.reload(NEW) == ("decoder-0", "denoiser-0", "encoder-0")
    scheduler.accept(request("fresh"), 3.0)
    effects = after(scheduler)
    assert [e for e in effects if isinstance(e, Assign | RestartInstance)] == [
        RestartInstance("encoder-0"),
        Assign("denoiser-0", "begun/0"),
    ]
    assert not [e for e in after(scheduler) if isinstance(e, RestartInstance)], "one at a time"
    comes_back(scheduler, "encoder-0")
    assert Assign("encoder-0", "fresh/0") in after(scheduler)
    fresh = scheduler.jobs["fresh/0"]
    assert scheduler.stored("encoder-0", stored(fresh.current_attempt, "encoder", 2, seed_independent=True), 6.0)
    assert not [e for e in after(scheduler) if isinstance(e, Assign | RestartInstance)], (
        "the old denoiser has work, the new none"
    )
    assert scheduler.stored("denoiser-0", stored(begun.current_attempt, "denoiser", 3), 7.0)
    assert [e for e in after(scheduler) if isinstance(e, Assign | RestartInstance)] == [
        RestartInstance("denoiser-0"),
        Assign("decoder-0", "begun/0"),
    ]
    comes_back(scheduler, "denoiser-0")
    assert Assign("denoiser-0", "fresh/0") in after(scheduler)
    assert scheduler.finished("decoder-0", finished(begun.current_attempt), 8.0)
    assert RestartInstance("decoder-0") in after(scheduler)
    comes_back(scheduler, "decoder-0")
    after(scheduler)
    assert not scheduler.reloading
    assert scheduler.reload(NEW) == ()
    assert {i.model for i in scheduler.registry.instances.values()} == {NEW}


def test_prompts_that_old_encoders_encoded_are_encoded_anew(scheduler: JobScheduler) -> None:
    job = encoded(scheduler, "r", 1)
    assert len(scheduler.stored_outputs.cache) == 1
    scheduler.reload(NEW)
    assert len(scheduler.stored_outputs.cache) == 0
    scheduler.accept(request("again", prompt="r"), 3.0)
    after(scheduler)
    assert scheduler.jobs["again/0"].state is State.ENCODER_WAITING
    assert scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 3), 7.0) is not None


def test_what_an_old_encoder_makes_during_a_reload_is_not_kept_for_others(scheduler: JobScheduler) -> None:
    scheduler.accept(request("r"), 0.0)
    after(scheduler)
    job = scheduler.jobs["r/0"]
    assert scheduler.started(job.current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    scheduler.reload(NEW)
    assert scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1, seed_independent=True), 2.0)
    assert len(scheduler.stored_outputs.cache) == 0
    assert Assign("denoiser-0", "r/0") in after(scheduler)


def test_a_unit_starts_over_when_the_last_instance_with_its_weights_dies(scheduler: JobScheduler) -> None:
    job = encoded(scheduler, "r", 1)
    scheduler.reload(NEW)
    after(scheduler)
    comes_back(scheduler, "encoder-0")
    comes_back(scheduler, "denoiser-0")
    assert Assign("encoder-0", "r/0") in after(scheduler)
    assert (job.state, job.model) == (State.ENCODER_WAITING, NEW)
    assert not job.deaths
