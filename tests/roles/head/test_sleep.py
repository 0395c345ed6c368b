"""What the head knows of a model that sleeps, and of one that has to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.roles.cluster_harness import ClusterDriver, attempt
from tests.roles.factories import KINDS, SIGNATURE, a_block, after, make_scheduler, registration, request, stored
from triptych.bus import RemoteError
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.roles.head.effects import Assign, ReleaseLeases, SetInstanceAwake
from triptych.roles.head.job import Job, State
from triptych.roles.head.scheduler import UNCOUNTED_REFUSALS, JobScheduler
from triptych.roles.messages import stages
from triptych.roles.messages.stages import InstanceWakeChanged
from triptych.roles.worker.stream_worker import ModelChangedError


def joined(*, awake: bool = True, cache: int = 0) -> JobScheduler:
    scheduler = make_scheduler(cache=cache)
    for kind in KINDS:
        scheduler.register(replace(registration(f"{kind}-0"), awake=awake), 0.0)
    return scheduler


def turned(*, awake: bool) -> InstanceWakeChanged:
    return InstanceWakeChanged(awake, SIGNATURE, 64, 0.5)


def encoded(scheduler: JobScheduler) -> Job:
    scheduler.accept(request(), 0.0)
    after(scheduler)
    job = scheduler.jobs["r/0"]
    assert scheduler.started(job.current_attempt, "encoder-0", Stage.ENCODER, 1.0)
    assert scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 2.0)
    return job


def test_an_instance_gets_no_work_from_when_it_is_told_to_sleep_until_it_is_awake() -> None:
    scheduler = joined()
    scheduler.set_awake(["encoder-0"], awake=False)
    scheduler.set_awake(["encoder-0"], awake=False)
    scheduler.accept(request(), 0.0)
    assert after(scheduler) == [SetInstanceAwake("encoder-0", awake=False)], "told once"
    assert scheduler.wake_changed("encoder-0", 1, turned(awake=False))
    scheduler.set_awake(["encoder-0"], awake=True)
    assert after(scheduler) == [SetInstanceAwake("encoder-0", awake=True)]
    assert not scheduler.wake_changed("encoder-0", 7, turned(awake=True)), "another incarnation"
    assert scheduler.wake_changed("encoder-0", 1, turned(awake=True))
    assert scheduler.registry.instances["encoder-0"].weights == 64
    assert after(scheduler) == [Assign("encoder-0", "r/0")]


def test_who_could_not_be_told_is_told_again_and_so_is_its_successor() -> None:
    scheduler = joined(awake=False)
    scheduler.set_awake(["encoder-0"], awake=True)
    scheduler.wake_change_failed("encoder-0", 1)
    scheduler.set_awake(["encoder-0"], awake=True)
    scheduler.instance_down("encoder-0", "its process ended", 1.0)
    scheduler.register(replace(registration("encoder-0", generation=2), awake=False), 2.0)
    scheduler.set_awake(["encoder-0"], awake=True)
    assert after(scheduler) == [SetInstanceAwake("encoder-0", awake=True)] * 3


def test_a_model_that_is_to_sleep_begins_nothing_and_finishes_what_it_has_begun() -> None:
    scheduler = joined(cache=1 << 20)
    job = encoded(scheduler)
    scheduler.paused = True
    scheduler.accept(request("s"), 2.0)
    scheduler.accept(request("same"), 2.0)  # what the prompt cache has is not begun either
    assert after(scheduler) == [Assign("denoiser-0", "r/0")]
    assert scheduler.begun
    assert scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 3.0)
    after(scheduler)
    scheduler.cancel("r", "enough", 4.0)
    assert not scheduler.begun
    scheduler.elapse(5.0, 9.0)
    assert scheduler.waiting_s == 5.0


def test_what_a_sleeping_model_has_in_a_full_pool_is_made_again() -> None:
    scheduler = joined()
    job = encoded(scheduler)
    scheduler.requeue_stored("pool", 3.0)
    assert job.state is State.DENOISING_WAITING, "its instances are awake"
    for kind in KINDS:
        scheduler.register(replace(registration(f"{kind}-0", generation=2), awake=False), 3.0)
    scheduler.requeue_stored("another", 3.0)
    assert job.state is State.DENOISING_WAITING
    scheduler.requeue_stored("pool", 3.0)
    assert (job.state, job.failures) == (State.ENCODER_WAITING, 0)
    assert ReleaseLeases((a_block(1).lease,)) in after(scheduler)


def test_an_instance_that_was_woken_makes_what_it_made_before(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(driver: ClusterDriver) -> None:
        (registration,) = await driver.join("monolithic-0")
        assert (registration.awake, registration.device) == (True, "cpu")
        assert registration.weights > 0
        before = await made(driver, 0)
        await driver.ask("monolithic-0", stages.Sleep(), stages.Acknowledged)
        asleep = await driver.inbox.next(stages.InstanceWakeChanged)
        assert (asleep.awake, asleep.trouble) == (False, "")
        worker = driver.h.actors["monolithic-0.stream"]
        assert worker._pipeline is None, "nothing holds the weights"
        with pytest.raises(RemoteError, match="no weights in memory") as refused:
            await driver.assign("monolithic-0", attempt(1))
        assert refused.value.code in UNCOUNTED_REFUSALS

        load = worker._load
        worker._load = out_of_memory
        await driver.ask("monolithic-0", stages.Wake(), stages.Acknowledged)
        assert "has too little memory" in (await driver.inbox.next(stages.InstanceWakeChanged)).trouble
        worker._load = load
        for _ in range(2):  # asked again, it does so once
            await driver.ask("monolithic-0", stages.Wake(), stages.Acknowledged)
        woken = await driver.inbox.next(stages.InstanceWakeChanged)
        assert (woken.awake, woken.trouble, woken.weights) == (True, "", registration.weights)
        assert await made(driver, 1) == before
        assert not [m for m in driver.inbox._unread if isinstance(m, stages.InstanceWakeChanged)]

        await driver.ask("monolithic-0", stages.Sleep(), stages.Acknowledged)
        await driver.inbox.next(stages.InstanceWakeChanged)
        monkeypatch.setattr("triptych.roles.worker.stream_worker.model_version", lambda files, by_content: "another")
        with pytest.raises(ModelChangedError, match="while it slept"):
            await worker._bring(worker._stream, worker.context.model)

    def out_of_memory(device: torch.device) -> StagePipeline:
        raise torch.OutOfMemoryError("others are there")

    async def made(driver: ClusterDriver, number: int) -> bytes:
        await driver.assign("monolithic-0", attempt(number))
        artifact = (await driver.inbox.next(stages.StageFinished)).artifact
        return bytes((driver.h.topology.state_dir / "artifacts" / artifact.name).read_bytes())

    cluster(body, kind="monolithic")
