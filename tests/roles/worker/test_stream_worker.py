from __future__ import annotations

import asyncio
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

from triptych.actors import Actor, StartDelayedError, StartError
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.engines.memory.streams import DeviceStream
from triptych.engines.stages import Stage
from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoising import Denoising
from triptych.engines.weights.placement import OutOfDeviceMemoryError
from triptych.roles.messages.common import Attempt, Images, Output, Rebind, SchedulingHints, Upload
from triptych.roles.messages.stages import Acknowledged, StageCancelled, StageFailed, StageProgress, StageStarted
from triptych.roles.messages.worker import (
    CancelAttempt,
    DeviceLost,
    RunStage,
    SaveArtifact,
    StoreCheckpoint,
    StoreOutputs,
    StorePreview,
)
from triptych.roles.worker.attempts import ActiveAttempt, EndReport, Phase
from triptych.roles.worker.process_context import ProcessContext
from triptych.roles.worker.stream_worker import StreamWorker

CPU = torch.device("cpu")
INPUTS: dict[str, object] = {
    "prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16,
}  # fmt: skip


def attempt(number: int) -> Attempt:
    return Attempt(f"r/{number}", 1)


COMPUTED: Any = (StoreOutputs, SaveArtifact)
"""Where the stream worker passes an attempt on to."""


class FakeTransfer(Actor):
    """Keeps what the stream worker passes on to the transfer actor."""

    def __init__(self, name: str, inbox: Any) -> None:
        super().__init__(name)
        self.inbox = inbox

    async def take(self, message: StoreOutputs | SaveArtifact | StoreCheckpoint | StorePreview) -> None:
        await self.inbox.put(message)


class FakeInstance(Actor):
    """Gives the stream worker one stage at a time, and keeps what comes of it."""

    def __init__(self, name: str, inbox: Any, context: ProcessContext) -> None:
        super().__init__(name)
        self.inbox = inbox
        self.context = context
        context.end_attempt = self._end_attempt

    async def started(self) -> None:
        self.spawn(self.context.reporter.run(self.deliver), name="reports")
        self.context.reporter.resume()

    def deliver(self, report: Any) -> Any:
        return self.reference("head").ask(report, Acknowledged, timeout_s=5)

    def _end_attempt(self, report: EndReport) -> None:
        self.spawn(self.inbox.put(report), name="report")

    async def take(self, message: DeviceLost) -> None:
        await self.inbox.put(message)

    def begin(
        self, number: int, inputs: dict[str, object], seed: int = 0, rebind: Rebind | None = None, **hints: Any
    ) -> None:
        item = ActiveAttempt(attempt(number), Phase.RUNNING, (), Output(), 4e9, dict(inputs), seed, rebind)
        item.hints = SchedulingHints(**hints)
        self.context.attempts.active[attempt(number)] = item

    def values(self, number: int) -> dict[str, Any]:
        return self.context.attempts.active[attempt(number)].values

    def run(self, number: int, stage: Stage) -> None:
        item = self.context.attempts.active[attempt(number)]
        item.stages, item.phase = (stage,), Phase.RUNNING
        self.reference(f"{self.name}.stream").tell(RunStage(attempt(number), stage))

    def stop(self, number: int) -> None:
        if item := self.context.attempts.active.get(attempt(number)):
            item.cancelled = True
        self.reference(f"{self.name}.stream").tell(CancelAttempt(attempt(number)))


async def stream_worker(h: Any, component: Any, inbox: Any, head: Any) -> tuple[FakeInstance, StreamWorker]:
    """Start a stream worker between a head, an instance and a transfer actor that put all they hear into one inbox."""
    context = ProcessContext(component)
    fake_instance = FakeInstance(component.name, inbox, context)
    worker = StreamWorker(component, h.topology, context)
    head.inbox = inbox
    await h.start(head)
    await h.start(fake_instance, worker, FakeTransfer(f"{component.name}.transfer", inbox))
    return fake_instance, worker


@pytest.fixture
def on_worker(
    run: Any, make_topology: Any, local_cluster: Any, inbox: Any, scripted_head: Any, tiny_model: Path
) -> Any:
    """Run a test with a monolithic instance's stream worker, which has every stage."""

    def start(body: Any, **options: Any) -> None:
        async def all_of_it() -> None:
            async with local_cluster(make_topology(tiny_model, kind="monolithic")) as h:
                component = msgspec.structs.replace(h.topology.component("monolithic-0"), **options)
                await body(*await stream_worker(h, component, inbox(), scripted_head()))

        run(all_of_it())

    return start


def test_the_stages_make_an_image_of_each_others_outputs(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker.context.signature.parameter("num_inference_steps")
        fake_instance.begin(1, INPUTS, seed=3)
        for stage in Stage:
            fake_instance.run(1, stage)
            assert await fake_instance.inbox.next(StageStarted) == StageStarted(attempt(1), stage)
            passed_on = await fake_instance.inbox.next(COMPUTED)
            assert isinstance(passed_on, SaveArtifact if stage is Stage.DECODER else StoreOutputs)
            assert worker.context.attempts.active[attempt(1)].seconds > 0
        steps = [await fake_instance.inbox.next(StageProgress) for _ in range(3)]
        assert steps == [StageProgress(attempt(1), step, 3) for step in (1, 2, 3)]
        (image,) = fake_instance.values(1)["images"]
        assert isinstance(image, Image.Image)
        assert worker.stats()["stages_run"] == 3
        assert worker.watchdog() is None

    on_worker(body)


def test_what_was_encoded_for_another_makes_the_image_of_its_own_seed_and_steps(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:

        async def run(number: int, *stages: Stage) -> None:
            for stage in stages:
                fake_instance.run(number, stage)
                await fake_instance.inbox.next(COMPUTED)
                item = worker.context.attempts.active[attempt(number)]
                assert item.seed_independent == (stage is Stage.ENCODER)

        fake_instance.begin(1, INPUTS, seed=3)
        await run(1, Stage.ENCODER)
        own = {**INPUTS, "num_inference_steps": 4, "height": 48}
        # A file that is not there: images are left as they were encoded.
        rebind = Rebind({**own, "image": Images((Upload("gone.png", 1),))}, 8)  # type: ignore[dict-item]
        fake_instance.begin(2, fake_instance.values(1), rebind=rebind)
        await run(2, Stage.DENOISER, Stage.DECODER)
        fake_instance.begin(3, own, seed=8)
        await run(3, *Stage)
        images = [fake_instance.values(number)["images"][0] for number in (2, 3)]
        assert images[0].size == (32, 48)
        assert images[0].tobytes() == images[1].tobytes()

    on_worker(body)


def test_stages_run_in_the_order_in_which_they_were_told(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in range(4):
            fake_instance.begin(number, INPUTS)
            fake_instance.run(number, Stage.ENCODER)
        for kind in (StageStarted, StoreOutputs):
            found = [(await fake_instance.inbox.next(kind)).attempt for _ in range(4)]
            assert found == [attempt(number) for number in range(4)]

    on_worker(body)


async def encoded(
    fake_instance: FakeInstance, worker: StreamWorker, number: int, bucket: int = 1, **changes: object
) -> None:
    """Encode a request; its hints say as many steps as its inputs."""
    inputs = {**INPUTS, **changes}
    fake_instance.begin(number, inputs, steps=inputs["num_inference_steps"], bucket=bucket)
    fake_instance.run(number, Stage.ENCODER)
    await fake_instance.inbox.next(COMPUTED)
    await fake_instance.inbox.next(StageStarted)


def test_a_denoise_is_stopped_between_two_steps(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        await encoded(fake_instance, worker, 1, num_inference_steps=50)
        fake_instance.run(1, Stage.DENOISER)
        await fake_instance.inbox.next(StageProgress)
        fake_instance.stop(1)
        assert await fake_instance.inbox.next(StageCancelled) == StageCancelled(attempt(1), 0)
        assert len(fake_instance.inbox.of(StageProgress)) < 50
        assert not isinstance(fake_instance.values(1).get("latents"), torch.Tensor)
        await encoded(fake_instance, worker, 2)
        fake_instance.run(2, Stage.DENOISER)
        assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(2)

    on_worker(body)


def test_a_denoise_is_saved_while_it_runs_and_goes_on_from_there(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in (1, 2, 3):
            await encoded(fake_instance, worker, number, num_inference_steps=6)
        active = worker.context.attempts.active
        expected = await denoised(fake_instance, 1)
        assert (await fake_instance.inbox.next(StoreCheckpoint)).attempt == attempt(1)
        snapshot = active[attempt(1)].snapshot
        assert snapshot is not None
        # The next one waits until this one is stored.
        assert (snapshot.step, snapshot.values["step"]) == (1, 1)
        assert len(fake_instance.inbox.of(StoreCheckpoint)) == 1
        active[attempt(2)].resume = snapshot.values
        await told(fake_instance, 6)
        assert torch.equal(await denoised(fake_instance, 2), expected)
        assert active[attempt(2)].resumed_from == 1
        assert await told(fake_instance, 5) == [(2, step) for step in range(2, 7)]
        # A snapshot of another run is not used.
        active[attempt(3)].resume = {**snapshot.values, "total_steps": 7}
        assert torch.equal(await denoised(fake_instance, 3), expected)
        assert (await told(fake_instance, 7))[-1] == (3, 6)

    on_worker(body, checkpoint_s=1e-9)


def test_a_denoise_that_another_instance_is_to_take_is_saved_before_it_ends(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in (1, 2):
            await encoded(fake_instance, worker, number, num_inference_steps=50)
        fake_instance.run(1, Stage.DENOISER)
        await fake_instance.inbox.next(StageProgress)
        item = worker.context.attempts.active[attempt(1)]
        item.returned = True
        fake_instance.stop(1)
        assert await fake_instance.inbox.next(StoreCheckpoint) == StoreCheckpoint(attempt(1), returns=True)
        assert item.phase is Phase.STORING
        assert item.snapshot is not None
        assert 0 < item.snapshot.step < 50
        worker.context.attempts.active[attempt(2)].resume = item.snapshot.values
        resumed = await denoised(fake_instance, 2)
        await encoded(fake_instance, worker, 3, num_inference_steps=50)
        assert torch.equal(resumed, await denoised(fake_instance, 3))

    on_worker(body, checkpoint_s=1e9)


def test_a_denoise_that_is_to_be_parked_is_saved_also_while_another_goes_first(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in (1, 2):
            await encoded(fake_instance, worker, number, num_inference_steps=50)
        fake_instance.run(1, Stage.DENOISER)
        await fake_instance.inbox.next(StageProgress)
        items = worker.context.attempts.active
        items[attempt(2)].hints = SchedulingHints(priority=1, steps=50)
        items[attempt(1)].parking = True
        fake_instance.run(2, Stage.DENOISER)
        assert await fake_instance.inbox.next(StoreCheckpoint) == StoreCheckpoint(attempt(1))
        snapshot = items[attempt(1)].snapshot
        assert snapshot is not None
        assert 0 < snapshot.step < 50
        # It ends before that is stored: its result counts.
        assert {(await fake_instance.inbox.next(COMPUTED)).attempt for _ in range(2)} == {attempt(1), attempt(2)}
        assert not items[attempt(1)].parking

    on_worker(body, checkpoint_s=1e9)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], Any]:
    """What to call inside of a run, counted as they are prepared, when it has taken so many steps."""
    runs: list[Denoising] = []
    calls: dict[tuple[int, int], Any] = {}
    prepare, pause = Denoising.__init__, Denoising.pause

    def prepared(self: Denoising, *arguments: Any, **named: Any) -> None:
        prepare(self, *arguments, **named)
        runs.append(self)

    def paused(self: Denoising) -> None:
        calls.get((runs.index(self), self.step), lambda: None)()
        pause(self)

    monkeypatch.setattr(Denoising, "__init__", prepared)
    monkeypatch.setattr(Denoising, "pause", paused)
    return calls


async def denoised(fake_instance: FakeInstance, number: int) -> torch.Tensor:
    """Run a denoise; its latents."""
    fake_instance.run(number, Stage.DENOISER)
    await fake_instance.inbox.next(COMPUTED)
    latents = fake_instance.values(number)["latents"]
    assert isinstance(latents, torch.Tensor)
    return latents


async def told(fake_instance: FakeInstance, count: int) -> list[tuple[int, int]]:
    """The next steps that are told: of which attempt, and how many it has taken."""
    steps = [await fake_instance.inbox.next(StageProgress) for _ in range(count)]
    return [(int(each.attempt.job_id.partition("/")[2]), each.step) for each in steps]


async def until(fake_instance: FakeInstance, worker: StreamWorker, *, running: int, queued: int) -> None:
    """Wait until so many runs compute, and so many wait for their first step."""
    while [len(worker._current), worker.stats()["queued"]] != [running, queued]:
        await fake_instance.reference("monolithic-0.stream").ask(Inspect(), Inspection, timeout_s=5)


def test_a_denoise_has_previews_stored_that_decode_and_change_nothing(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in (1, 2):
            await encoded(fake_instance, worker, number, num_inference_steps=4)
        alone = await denoised(fake_instance, 1)
        worker.context.attempts.active[attempt(2)].previews = 2
        previewed = await denoised(fake_instance, 2)
        assert torch.equal(alone, previewed)
        made = [(await fake_instance.inbox.next(StorePreview)).preview for _ in range(2)]
        assert made == [Attempt("r/2.1", 1), Attempt("r/2.3", 1)]
        payloads = [worker.context.attempts.previews[preview].values for preview in made]
        for number, payload in enumerate([*payloads, fake_instance.values(2)], start=3):
            fake_instance.begin(number, payload)
            fake_instance.run(number, Stage.DECODER)
            await fake_instance.inbox.next(COMPUTED)
        images = [fake_instance.values(number)["images"][0].tobytes() for number in (3, 4, 5)]
        assert len(set(images)) == 3
        assert {len(image) for image in images} == {32 * 32 * 3}

    on_worker(body)


@pytest.mark.parametrize("problem", [CheckpointError("not this one"), RuntimeError("a defect")], ids=type)
def test_a_denoise_that_cannot_be_shown_goes_on_without(
    on_worker: Any, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    tries: list[int] = []

    def snapshot(self: Denoising) -> dict[str, object]:
        tries.append(self.step)
        raise problem

    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        await encoded(fake_instance, worker, 1, num_inference_steps=4)
        monkeypatch.setattr(Denoising, "snapshot", snapshot)
        worker.context.attempts.active[attempt(1)].previews = 3
        await denoised(fake_instance, 1)
        assert tries == [1], "it is not tried again"
        assert not worker.context.attempts.previews

    on_worker(body)


def test_a_denoise_that_is_alone_takes_short_steps_together_and_tells_each(
    on_worker: Any, at_step: dict[tuple[int, int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        monkeypatch.setattr("triptych.roles.worker.stream_worker.SHORT_STEPS_S", 60.0)
        await encoded(fake_instance, worker, 0, num_inference_steps=40)
        calls: list[int] = []
        advance_for = worker._executor.advance_for
        monkeypatch.setattr(worker._executor, "advance_for", lambda *given: calls.append(1) or advance_for(*given))
        await denoised(fake_instance, 0)
        assert len(calls) == 2, "the last step is a call of its own"
        assert await told(fake_instance, 40) == [(0, step) for step in range(1, 41)]
        loop, cancelled = asyncio.get_running_loop(), threading.Event()

        def cancel() -> None:
            fake_instance.stop(1)
            cancelled.set()

        at_step[1, 5] = lambda: (loop.call_soon_threadsafe(cancel), cancelled.wait(30))
        await encoded(fake_instance, worker, 1, num_inference_steps=40)
        fake_instance.run(1, Stage.DENOISER)
        await fake_instance.inbox.next(StageCancelled)
        assert await told(fake_instance, 5) == [(1, step) for step in range(1, 6)]

    on_worker(body)


@pytest.mark.parametrize(("bucket", "sizes"), [(1, [1] * 8), (2, [1, 2, 2, 1, 1, 1])])
def test_denoises_that_take_turns_or_share_batches_make_what_each_makes_alone(
    on_worker: Any, at_step: dict[tuple[int, int], Any], monkeypatch: pytest.MonkeyPatch, bucket: int, sizes: list[int]
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number, steps in enumerate((3, 5, 3, 5)):
            await encoded(fake_instance, worker, number, bucket, num_inference_steps=steps, prompt=f"{number % 2}")
        alone = [await denoised(fake_instance, number) for number in (0, 1)]
        await told(fake_instance, 8)
        rounds: list[int] = []
        advance = worker._executor.advance
        monkeypatch.setattr(worker._executor, "advance", lambda runs: rounds.append(len(runs)) or advance(runs))
        go_on = threading.Event()
        at_step[2, 1] = lambda: go_on.wait(30)
        for queued, number in enumerate((2, 3)):
            fake_instance.run(number, Stage.DENOISER)
            await until(fake_instance, worker, running=1, queued=queued)
        go_on.set()
        for number in (2, 3):
            assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(number)
        assert all(torch.equal(alone[k], fake_instance.values(k + 2)["latents"]) for k in (0, 1))
        turns = [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3), (3, 3), (3, 4), (3, 5)]
        assert (await told(fake_instance, 8), rounds) == (turns, sizes)

    on_worker(body, slots=4, policy="fair", max_batch=bucket)


@pytest.mark.parametrize("bucket", [1, 4])
def test_a_run_that_fails_or_is_cancelled_leaves_the_others_between_two_steps(
    on_worker: Any, at_step: dict[tuple[int, int], Any], bucket: int
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number, steps in enumerate((9, 9, 50, 50)):
            await encoded(fake_instance, worker, number, bucket, num_inference_steps=steps)
        alone = await denoised(fake_instance, 0)
        go_on, failed = threading.Event(), threading.Event()

        def fail() -> None:
            raise KeyError("at its second step")

        at_step[1, 1] = lambda: go_on.wait(30)
        at_step[2, 2] = fail
        at_step[3, 5] = lambda: failed.wait(30)
        for queued, number in enumerate((1, 2, 3)):
            fake_instance.run(number, Stage.DENOISER)
            await until(fake_instance, worker, running=1, queued=queued)
        go_on.set()
        failure = await fake_instance.inbox.next(StageFailed)
        assert failure.attempt == attempt(2)
        assert "at its second step" in failure.error
        fake_instance.stop(3)
        failed.set()
        assert await fake_instance.inbox.next(StageCancelled) == StageCancelled(attempt(3), 0)
        assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(1)
        assert torch.equal(fake_instance.values(1)["latents"], alone)
        assert (worker.stats()["running"], worker.stats()["queued"]) == ("", 0)

    on_worker(body, slots=4, policy="fair", max_batch=bucket)


def test_a_short_denoise_and_an_urgent_encode_go_before_the_rest_of_a_long_denoise(
    on_worker: Any, at_step: dict[tuple[int, int], Any]
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        await encoded(fake_instance, worker, 0, num_inference_steps=20)
        await encoded(fake_instance, worker, 1, num_inference_steps=3)
        reached, go_on = threading.Event(), threading.Event()
        at_step[0, 2] = lambda: (reached.set(), go_on.wait(30))
        fake_instance.run(0, Stage.DENOISER)
        assert await asyncio.to_thread(reached.wait, 30)
        fake_instance.run(1, Stage.DENOISER)
        fake_instance.begin(2, INPUTS, priority=1)
        fake_instance.run(2, Stage.ENCODER)
        await until(fake_instance, worker, running=1, queued=2)
        go_on.set()
        ended = [(await fake_instance.inbox.next(COMPUTED)).attempt for _ in range(3)]
        assert ended == [attempt(2), attempt(1), attempt(0)]
        assert await told(fake_instance, 6) == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (0, 3)]

    on_worker(body, slots=4, policy="shortest_remaining")


def test_a_queued_stage_is_cancelled_without_running(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        await encoded(fake_instance, worker, 1)
        for number in (2, 3):
            fake_instance.begin(number, INPUTS)
        fake_instance.run(1, Stage.DENOISER)
        fake_instance.run(2, Stage.ENCODER)
        fake_instance.run(3, Stage.ENCODER)
        fake_instance.stop(2)
        fake_instance.stop(9)
        assert (await fake_instance.inbox.next(StageCancelled)).attempt == attempt(2)
        assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(1)
        assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(3)
        assert attempt(2) not in [m.attempt for m in fake_instance.inbox.of(StageStarted)]

    on_worker(body)


def test_a_stage_that_cannot_be_interrupted_still_ends_as_cancelled(
    on_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        pipeline = worker._pipeline
        assert pipeline is not None
        go_on, encode = threading.Event(), pipeline.encode

        def held_up(*arguments: Any) -> dict[str, object]:
            assert go_on.wait(30)
            return encode(*arguments)

        monkeypatch.setattr(pipeline, "encode", held_up)
        fake_instance.begin(1, INPUTS)
        fake_instance.run(1, Stage.ENCODER)
        await fake_instance.inbox.next(StageStarted)
        fake_instance.stop(1)
        fake_instance.begin(2, INPUTS)
        fake_instance.run(2, Stage.ENCODER)  # after the stop: when it is queued, that was handled
        await until(fake_instance, worker, running=1, queued=1)
        go_on.set()
        assert (await fake_instance.inbox.next(StageCancelled)).attempt == attempt(1)
        assert fake_instance.values(1) == INPUTS

    on_worker(body)


def test_what_a_pipeline_raises_fails_the_request_and_nothing_else(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        fake_instance.begin(1, {**INPUTS, "no_such_input": 1})
        fake_instance.run(1, Stage.ENCODER)
        failed = await fake_instance.inbox.next(StageFailed)
        assert failed.error.startswith("InputError: ")
        assert "no_such_input" in failed.error
        assert (failed.invalid_request, failed.retryable) == (True, False)
        fake_instance.begin(3, INPUTS)
        fake_instance.run(3, Stage.ENCODER)
        assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(3)

    on_worker(body)


def test_an_image_that_is_gone_is_the_requests_fault_and_one_that_is_there_is_read(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        gone = Images((Upload(f"{'a' * 64}.png", 3),))
        fake_instance.begin(1, {**INPUTS, "image": gone})
        fake_instance.run(1, Stage.ENCODER)
        failed = await fake_instance.inbox.next(StageFailed)
        assert (failed.invalid_request, failed.retryable) == (True, False)
        assert "send the image again" in failed.error
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "PNG")
        there = Images((worker.uploads.save(file.getvalue(), "png"),))
        fake_instance.begin(2, {**INPUTS, "image": there})
        fake_instance.run(2, Stage.ENCODER)
        failed = await fake_instance.inbox.next(StageFailed)
        assert "takes no image" in failed.error  # this model makes images of text alone, but it has been read

    on_worker(body)


def test_after_a_lost_device_nothing_more_is_launched(on_worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        def lost(*_: Any) -> dict[str, object]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(worker._pipeline, "encode", lost)
        fake_instance.begin(1, INPUTS)
        fake_instance.begin(2, INPUTS)
        fake_instance.run(1, Stage.ENCODER)
        fake_instance.run(2, Stage.ENCODER)
        failed = await fake_instance.inbox.next(StageFailed)
        assert (failed.attempt, failed.retryable, failed.invalid_request) == (attempt(1), True, False)
        assert "illegal memory access" in (await fake_instance.inbox.next(DeviceLost)).error
        await asyncio.gather(*(t for t in worker._tasks if t.get_name().endswith("stages")))
        assert [m.attempt for m in fake_instance.inbox.of(StageStarted)] == [attempt(1)]

    on_worker(body)


def test_a_lost_device_ends_the_runs_that_it_has_begun_when_they_are_cancelled(
    on_worker: Any, at_step: dict[tuple[int, int], Any]
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in range(3):
            await encoded(fake_instance, worker, number, num_inference_steps=9)

        def lost() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        go_on = threading.Event()
        at_step[0, 1], at_step[0, 3] = lambda: go_on.wait(30), lost
        for queued, number in enumerate(range(3)):
            fake_instance.run(number, Stage.DENOISER)
            await until(fake_instance, worker, running=1, queued=queued)
        go_on.set()
        assert (await fake_instance.inbox.next(StageFailed)).attempt == attempt(0)
        await fake_instance.inbox.next(DeviceLost)
        for number in (1, 2):
            fake_instance.stop(number)
        ended = {(await fake_instance.inbox.next(StageCancelled)).attempt for _ in range(2)}
        assert ended == {attempt(1), attempt(2)}

    on_worker(body, slots=4, policy="fair")


def out_of_memory(*_: Any) -> dict[str, object]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_out_of_memory_ends_the_attempt_and_the_second_in_a_row_the_process(
    on_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker._pipeline is not None
        encode = worker._pipeline.encode
        for number in range(5):
            fake_instance.begin(number, INPUTS)
        for number, too_large in enumerate((True, False, True, True)):
            monkeypatch.setattr(worker._pipeline, "encode", out_of_memory if too_large else encode)
            fake_instance.run(number, Stage.ENCODER)
            if not too_large:
                assert (await fake_instance.inbox.next(COMPUTED)).attempt == attempt(number)
                continue
            failed = await fake_instance.inbox.next(StageFailed)
            assert (failed.attempt, failed.invalid_request) == (attempt(number), False)
        assert "out of memory" in (await fake_instance.inbox.next(DeviceLost)).error
        assert len(fake_instance.inbox.of(DeviceLost)) == 1

    on_worker(body)


def test_a_batch_that_is_out_of_memory_counts_once(on_worker: Any, at_step: dict[tuple[int, int], Any]) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in range(3):
            await encoded(fake_instance, worker, number, 2)
        go_on = threading.Event()
        at_step[0, 1] = lambda: go_on.wait(30)
        at_step[0, 2] = at_step[1, 1] = out_of_memory
        for queued, number in enumerate((0, 1)):
            fake_instance.run(number, Stage.DENOISER)
            await until(fake_instance, worker, running=1, queued=queued)
        go_on.set()
        failed = {(await fake_instance.inbox.next(StageFailed)).attempt for _ in range(2)}
        assert failed == {attempt(0), attempt(1)}
        await denoised(fake_instance, 2)
        assert not fake_instance.inbox.of(DeviceLost)

    on_worker(body, slots=4, max_batch=2)


class LateEvent:
    """The end of work that goes on until somebody waits for it."""

    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number, self.passed = log, number, False

    def synchronize(self) -> None:
        self.log.append(f"{self.number} ended")
        self.passed = True


def test_a_step_has_ended_when_it_is_told_and_the_next_is_launched_by_then(
    on_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker._stream is not None
        await encoded(fake_instance, worker, 1)
        log: list[str] = []

        def record() -> LateEvent:
            log.append(f"{len([line for line in log if 'launched' in line]) + 1} launched")
            return LateEvent(log, int(log[-1][0]))

        monkeypatch.setattr(worker._stream, "record", record)
        monkeypatch.setattr(worker, "_alone_s", lambda *_: 0.0)  # as on a GPU
        monkeypatch.setattr(worker, "_progress", lambda _work, step, _total: log.append(f"{step} told"))
        fake_instance.run(1, Stage.DENOISER)
        await fake_instance.inbox.next(COMPUTED)
        assert log[:9] == [
            "1 launched", "2 launched", "1 ended", "1 told", "3 launched", "2 ended", "2 told", "3 ended", "3 told",
        ]  # fmt: skip

    on_worker(body)


def test_a_call_that_hangs_is_overdue(on_worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        pipeline = worker._pipeline
        assert pipeline is not None
        go_on, encode = threading.Event(), pipeline.encode
        monkeypatch.setattr(pipeline, "encode", lambda *a: go_on.wait(30) and encode(*a))
        fake_instance.begin(1, INPUTS)
        fake_instance.run(1, Stage.ENCODER)
        await fake_instance.inbox.next(StageStarted)
        assert worker.watchdog() is None
        worker._bound_s = worker._start_timeout_s = 0.0
        assert "a step of r/1#1 (encoder) runs since" in (worker.watchdog() or "")
        go_on.set()
        await fake_instance.inbox.next(COMPUTED)
        assert worker.watchdog() is None
        assert worker.stats()["first_encoder_s"] == worker.first_s["encoder"] > 0
        assert worker.start_s["weights"] > 0
        worker._load_began = 0.0
        assert worker.watchdog() == "loading the model takes more than 0 s"

    on_worker(body)


def test_while_it_loads_it_says_how_much_of_the_weights_has_been_read(
    run: Any, make_topology: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.roles.worker.stream_worker.PROGRESS_EVERY_S", 0)
    topology = make_topology(tiny_model, kind="monolithic")
    component = topology.component("monolithic-0")
    worker = StreamWorker(component, topology, ProcessContext(component))

    async def body() -> None:
        said = asyncio.Event()
        worker._on_state = said.set
        telling = worker.spawn(worker._tell_progress(), name="progress")
        worker._load(CPU)
        async with asyncio.timeout(30):
            await said.wait()
        telling.cancel()

    run(body())
    total = sum(file.stat().st_size for file in tiny_model.rglob("*.safetensors"))
    assert (worker._reading.read, worker._reading.total) == (total, total)
    assert (worker.state, worker.detail) == ("loading", str(worker._reading))


@pytest.mark.parametrize(
    ("device", "says"), [("cuda:97", "cuda:97"), ("abacus", "abacus"), ("mps", "mps"), ("cpu", "nowhere")]
)
def test_a_model_that_can_never_be_served_is_refused_with_a_sentence(
    run: Any, make_topology: Any, local_cluster: Any, tiny_model: Path, tmp_path: Path, device: str, says: str
) -> None:
    async def body() -> None:
        model = tiny_model if device != "cpu" else tmp_path / "nowhere"
        async with local_cluster(make_topology(model, kind="monolithic")) as h:
            component = msgspec.structs.replace(h.topology.component("monolithic-0"), device=device)
            worker = StreamWorker(component, h.topology, ProcessContext(component))
            with pytest.raises(StartError, match=says):
                await h.start(worker)

    run(body())


def test_a_class_that_the_libraries_do_not_have_fails_the_start_with_a_sentence(
    run: Any, make_topology: Any, local_cluster: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "newer"))
    index = json.loads((model / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "T7EncoderModel"]
    (model / "model_index.json").write_text(json.dumps(index))

    async def body() -> None:
        async with local_cluster(make_topology(model, kind="monolithic")) as h:
            component = h.topology.component("monolithic-0")
            worker = StreamWorker(component, h.topology, ProcessContext(component))
            with pytest.raises(StartError, match=r"a T7EncoderModel of transformers, and .* has no such class"):
                await h.start(worker)

    run(body())


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (lambda: OutOfDeviceMemoryError("transformer", CPU, 17 << 30), StartError),
        (lambda: OutOfDeviceMemoryError("transformer", CPU, 9 << 30), StartDelayedError),
        (lambda: torch.OutOfMemoryError("CUDA out of memory."), StartDelayedError),
        (lambda: RuntimeError("something else"), RuntimeError),
    ],
)
def test_weights_wait_for_a_device_that_others_fill_and_not_for_one_that_is_too_small(
    run: Any,
    make_topology: Any,
    local_cluster: Any,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Any,
    failure: Any,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 << 30, 16 << 30))

    def device_full(_device: torch.device) -> Any:
        raise error()

    async def body() -> None:
        async with local_cluster(make_topology(tiny_model, kind="monolithic")) as h:
            component = h.topology.component("monolithic-0")
            worker = StreamWorker(component, h.topology, ProcessContext(component))
            monkeypatch.setattr(worker, "_load", device_full)
            stream = DeviceStream(CPU, "test")
            with pytest.raises(failure) as raised:
                await worker._loaded(stream)
            assert type(raised.value) is failure
            stream.close()

    run(body())
