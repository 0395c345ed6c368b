"""Denoises step by step: stopped, saved, shown, and sharing a device with others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from tests.roles.worker.stream_worker_harness import (
    COMPUTED,
    INPUTS,
    FakeInstance,
    attempt,
    denoised,
    encoded,
    out_of_memory,
    told,
    until,
)
from triptych.engines.stages import Stage
from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoising import Denoising
from triptych.roles.messages.common import Attempt, SchedulingHints
from triptych.roles.messages.stages import StageCancelled, StageFailed, StageProgress
from triptych.roles.messages.worker import (
    DeviceLost,
    StoreCheckpoint,
    StorePreview,
)
from triptych.roles.worker.attempts import Phase
from triptych.roles.worker.stream_worker import StreamWorker


@pytest.fixture
def second_step(at_step: dict[tuple[int, int], Any]) -> Any:
    """`async with second_step:` holds the first denoise at its second step, however fast the steps are."""
    reached, go_on = threading.Event(), threading.Event()
    at_step[0, 2] = lambda: (reached.set(), go_on.wait(30))

    @asynccontextmanager
    async def held() -> AsyncIterator[None]:
        assert await asyncio.to_thread(reached.wait, 30)
        yield
        go_on.set()

    return held()


def test_a_denoise_is_stopped_between_two_steps(on_worker: Any, second_step: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        await encoded(fake_instance, worker, 1, num_inference_steps=50)
        fake_instance.run(1, Stage.DENOISER)
        async with second_step:
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


def test_a_denoise_that_another_instance_is_to_take_is_saved_before_it_ends(on_worker: Any, second_step: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in (1, 2):
            await encoded(fake_instance, worker, number, num_inference_steps=50)
        fake_instance.run(1, Stage.DENOISER)
        item = worker.context.attempts.active[attempt(1)]
        async with second_step:
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


def test_a_denoise_that_is_to_be_parked_is_saved_also_while_another_goes_first(
    on_worker: Any, second_step: Any
) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        for number in (1, 2):
            await encoded(fake_instance, worker, number, num_inference_steps=50)
        fake_instance.run(1, Stage.DENOISER)
        items = worker.context.attempts.active
        async with second_step:
            items[attempt(2)].hints = SchedulingHints(priority=1, steps=50)
            items[attempt(1)].parking = True
            fake_instance.run(2, Stage.DENOISER)
            await until(fake_instance, worker, running=1, queued=1)
        assert await fake_instance.inbox.next(StoreCheckpoint) == StoreCheckpoint(attempt(1))
        snapshot = items[attempt(1)].snapshot
        assert snapshot is not None
        assert 0 < snapshot.step < 50
        # It ends before that is stored: its result counts.
        assert {(await fake_instance.inbox.next(COMPUTED)).attempt for _ in range(2)} == {attempt(1), attempt(2)}
        assert not items[attempt(1)].parking

    on_worker(body, checkpoint_s=1e9)


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
