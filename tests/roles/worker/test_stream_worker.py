"""Stages in their order, what they raise, and the weights that they need."""

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

from tests.roles.worker.stream_worker_harness import (
    COMPUTED,
    CPU,
    INPUTS,
    FakeInstance,
    attempt,
    denoised,
    encoded,
    out_of_memory,
    told,
    until,
)
from triptych.actors import StartDelayedError, StartError
from triptych.engines.memory.streams import DeviceStream
from triptych.engines.stages import Stage
from triptych.engines.weights.placement import OutOfDeviceMemoryError
from triptych.roles.messages.common import Images, Rebind, Upload
from triptych.roles.messages.stages import StageCancelled, StageFailed, StageProgress, StageStarted
from triptych.roles.messages.worker import (
    DeviceLost,
    SaveArtifact,
    StoreOutputs,
)
from triptych.roles.worker import stream_worker
from triptych.roles.worker.process_context import ProcessContext
from triptych.roles.worker.stage_run import RunLeftError
from triptych.roles.worker.stream_worker import StreamWorker


def test_the_stages_make_an_image_of_each_others_outputs(on_worker: Any) -> None:
    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        assert worker.context.signature.parameter("num_inference_steps")
        fake_instance.begin(1, INPUTS, seed=3)
        for stage in Stage:
            fake_instance.run(1, stage)
            started = await fake_instance.inbox.next(StageStarted)
            assert (started.attempt, started.stage) == (attempt(1), stage)
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


def test_files_are_read_while_others_compute_and_a_stop_is_answered_meanwhile(
    on_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, ended = threading.Event(), threading.Event()

    def gated(*_: Any, check: Any, **__: Any) -> dict[str, object]:
        assert go_on.wait(30)
        try:
            check()
        except RunLeftError:
            ended.set()
            raise
        return {}

    async def body(fake_instance: FakeInstance, worker: StreamWorker) -> None:
        await encoded(fake_instance, worker, 1)
        resolve = stream_worker.resolve_inputs
        monkeypatch.setattr(stream_worker, "resolve_inputs", gated)
        fake_instance.begin(2, {**INPUTS, "image": Images((Upload(f"{'a' * 64}.png", 3),))})
        fake_instance.run(2, Stage.ENCODER)
        await denoised(fake_instance, 1)
        assert await told(fake_instance, 3) == [(1, 1), (1, 2), (1, 3)]
        fake_instance.stop(2)
        assert await fake_instance.inbox.next(StageCancelled) == StageCancelled(attempt(2), 0)
        assert attempt(2) not in [m.attempt for m in fake_instance.inbox.of(StageStarted)]
        go_on.set()
        assert await asyncio.to_thread(ended.wait, 30), "who reads for it is told"
        monkeypatch.setattr(stream_worker, "resolve_inputs", resolve)
        await encoded(fake_instance, worker, 3)

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
        assert worker.context.attempts.active[attempt(2)].began_at is None

    on_worker(body)


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
