"""A stream worker, which has every stage, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.requirements import require

require()

import msgspec

from tests.roles.worker.stream_worker_harness import COMPUTED, INPUTS, FakeInstance, attempt, stream_worker
from triptych.engines.memory.streams import StreamEvent
from triptych.engines.stages import Stage
from triptych.roles.messages.stages import StageFailed
from triptych.roles.messages.worker import DeviceLost
from triptych.roles.worker import devices
from triptych.roles.worker.stream_worker import StreamWorker

STEPS = 20


@pytest.fixture
def worker(
    run: Any,
    make_topology: Any,
    local_cluster: Any,
    inbox: Any,
    scripted_head: Any,
    tiny_model: Any,
    device: torch.device,
) -> Any:
    def start(body: Any) -> None:
        async def all_of_it() -> None:
            async with local_cluster(make_topology(tiny_model, kind="monolithic")) as h:
                component = msgspec.structs.replace(h.topology.component("monolithic-0"), device=str(device))
                await body(*await stream_worker(h, component, inbox(), scripted_head()))

        run(all_of_it())

    return start


async def make_image(fake_instance: FakeInstance, worker: StreamWorker, number: int, **changes: object) -> bytes:
    fake_instance.begin(number, {**INPUTS, **changes}, seed=3)
    for stage in Stage:
        fake_instance.run(number, stage)
        await fake_instance.inbox.next(COMPUTED)
    (made,) = fake_instance.values(number)["images"]
    return made.tobytes()  # type: ignore[no-any-return]


def test_it_says_which_gpu_it_has_and_makes_the_same_image_twice(worker: Any, device: torch.device) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker.stats()["device"] == str(device)
        assert await make_image(fake_instance, worker, 1) == await make_image(fake_instance, worker, 2)

    worker(body)


def test_a_step_has_ended_when_it_is_told(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker._stream is not None
        recorded: list[StreamEvent] = []
        record, told = worker._stream.record, []

        def remember() -> StreamEvent:
            recorded.append(record())
            return recorded[-1]

        fake_instance.begin(1, {**INPUTS, "num_inference_steps": STEPS})
        fake_instance.run(1, Stage.ENCODER)
        await fake_instance.inbox.next(COMPUTED)
        monkeypatch.setattr(worker._stream, "record", remember)
        monkeypatch.setattr(worker, "_progress", lambda _w, step, _t: told.append((step, recorded[step - 1].passed)))
        fake_instance.run(1, Stage.DENOISER)
        await fake_instance.inbox.next(COMPUTED)
        assert told == [(step, True) for step in range(1, STEPS + 1)]

    worker(body)


def test_out_of_memory_fails_one_image_and_the_next_is_made(worker: Any, gpu: torch.device) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker._stream is not None
        expected = await make_image(fake_instance, worker, 1)
        allocated = await worker._stream.run(devices.free_memory, gpu)
        total = torch.cuda.get_device_properties(gpu).total_memory
        # Room for a small image; a large one takes 256 MiB in each layer of the VAE.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(gpu) + (64 << 20)) / total, gpu)
        try:
            large = {**INPUTS, "height": 2048, "width": 2048, "num_inference_steps": 1}
            fake_instance.begin(2, large)
            for stage in Stage:
                fake_instance.run(2, stage)
                answer = await fake_instance.inbox.next((*COMPUTED, StageFailed))
                if isinstance(answer, StageFailed):
                    break
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)
        assert isinstance(answer, StageFailed), "the large image fitted"
        assert not answer.invalid_request
        assert not fake_instance.inbox.of(DeviceLost)
        del worker.context.attempts.active[attempt(2)]
        assert await worker._stream.run(devices.free_memory, gpu) < allocated + (64 << 20)
        assert await make_image(fake_instance, worker, 3) == expected

    worker(body)
