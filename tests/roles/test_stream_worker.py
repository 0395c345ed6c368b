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

from triptych.actors import Actor, StartDelayed, StartFailure
from triptych.actors.system import Inspect, Inspection
from triptych.engines.panels import Panel
from triptych.engines.placing import NoRoomError
from triptych.engines.streams import DeviceStream
from triptych.roles.messages.device import (
    CancelPanel,
    PanelCancelled,
    PanelFailed,
    PanelFinished,
    PanelStarted,
    PanelStepped,
    RunPanel,
)
from triptych.roles.messages.work import Pictures, Renewal, Upload, Work
from triptych.roles.stream_worker import StreamWorker
from triptych.roles.workspace import Premises

CPU = torch.device("cpu")
INPUTS: dict[str, object] = {
    "prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16,
}  # fmt: skip


def work(number: int) -> Work:
    return Work(f"r/{number}", 1)


class Desk(Actor):
    """The instance's side of the conversation."""

    def __init__(self, name: str, inbox: Any) -> None:
        super().__init__(name)
        self.inbox = inbox

    async def hear(
        self,
        message: PanelStarted | PanelStepped | PanelFinished | PanelFailed | PanelCancelled,
    ) -> None:
        await self.inbox.put(message)

    def run(self, number: int, panel: Panel) -> None:
        self.reference(f"{self.name}.stream").tell(RunPanel(work(number), panel.value))

    def stop(self, number: int) -> None:
        self.reference(f"{self.name}.stream").tell(CancelPanel(work(number)))


@pytest.fixture
def bench(run: Any, place: Any, house: Any, inbox: Any, tiny_model: Path) -> Any:
    """Run a test with a monolithic instance's stream worker, which has every panel."""

    def start(body: Any) -> None:
        async def all_of_it() -> None:
            async with house(place(tiny_model, kind="monolithic")) as h:
                component = h.topology.component("monolithic-0")
                desk = Desk("monolithic-0", inbox())
                worker = StreamWorker(component, h.topology, Premises())
                await h.start(desk, worker)
                await body(desk, worker)

        run(all_of_it())

    return start


def test_the_panels_make_a_picture_of_each_others_outputs(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        workspace = worker.premises.workspace
        assert worker.premises.signature.parameter("num_inference_steps")
        workspace.begin(work(1), INPUTS, seed=3)
        for panel in Panel:
            desk.run(1, panel)
            assert await desk.inbox.next(PanelStarted) == PanelStarted(work(1), panel.value)
            finished = await desk.inbox.next(PanelFinished)
            assert (finished.panel, finished.seconds > 0) == (panel.value, True)
        steps = [(s.step, s.total_steps) for s in desk.inbox.of(PanelStepped)]
        assert steps == [(1, 3), (2, 3), (3, 3)]
        (picture,) = workspace.get(work(1)).values["images"]  # type: ignore[misc]
        assert isinstance(picture, Image.Image)
        assert worker.facts()["panels_run"] == 3
        assert worker.overdue() is None

    bench(body)


def test_what_was_encoded_for_another_makes_the_picture_of_its_own_seed_and_steps(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        workspace = worker.premises.workspace

        async def run(number: int, *panels: Panel) -> None:
            for panel in panels:
                desk.run(number, panel)
                assert (await desk.inbox.next(PanelFinished)).seedless == (panel is Panel.ENCODER)

        workspace.begin(work(1), INPUTS, seed=3)
        await run(1, Panel.ENCODER)
        own = {**INPUTS, "num_inference_steps": 4, "height": 48}
        # A file that is not there: pictures are left as they were encoded.
        renewal = Renewal({**own, "image": Pictures((Upload("gone.png", 1),))}, 8)  # type: ignore[dict-item]
        workspace.begin(work(2), renewal=renewal)
        workspace.replace(work(2), workspace.get(work(1)).values)
        await run(2, Panel.DENOISER, Panel.DECODER)
        workspace.begin(work(3), own, seed=8)
        await run(3, *Panel)
        pictures = [workspace.get(work(number)).values["images"][0] for number in (2, 3)]  # type: ignore[index]
        assert pictures[0].size == (32, 48)
        assert pictures[0].tobytes() == pictures[1].tobytes()

    bench(body)


def test_panels_run_in_the_order_in_which_they_were_told(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        for number in range(4):
            worker.premises.workspace.begin(work(number), INPUTS)
            desk.run(number, Panel.ENCODER)
        finished = [(await desk.inbox.next(PanelFinished)).work for _ in range(4)]
        assert finished == [work(number) for number in range(4)]
        kinds = [type(m) for m in desk.inbox.all]
        assert kinds == [PanelStarted, PanelFinished] * 4

    bench(body)


async def encoded(desk: Desk, worker: StreamWorker, number: int, **changes: object) -> None:
    worker.premises.workspace.begin(work(number), {**INPUTS, **changes})
    desk.run(number, Panel.ENCODER)
    await desk.inbox.next(PanelFinished)
    await desk.inbox.next(PanelStarted)


def test_a_denoise_is_stopped_between_two_steps(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        await encoded(desk, worker, 1, num_inference_steps=50)
        desk.run(1, Panel.DENOISER)
        await desk.inbox.next(PanelStepped)
        desk.stop(1)
        assert await desk.inbox.next(PanelCancelled) == PanelCancelled(work(1))
        assert len(desk.inbox.of(PanelStepped)) < 50
        assert "latents" not in worker.premises.workspace.get(work(1)).values or not isinstance(
            worker.premises.workspace.get(work(1)).values["latents"], torch.Tensor
        )
        await encoded(desk, worker, 2)
        desk.run(2, Panel.DENOISER)
        assert (await desk.inbox.next(PanelFinished)).work == work(2)

    bench(body)


def test_work_in_the_queue_is_stopped_without_running(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        await encoded(desk, worker, 1)
        for number in (2, 3):
            worker.premises.workspace.begin(work(number), INPUTS)
        desk.run(1, Panel.DENOISER)
        desk.run(2, Panel.ENCODER)
        desk.run(3, Panel.ENCODER)
        desk.stop(2)
        desk.stop(9)
        assert (await desk.inbox.next(PanelCancelled)).work == work(2)
        assert (await desk.inbox.next(PanelFinished)).work == work(1)
        assert (await desk.inbox.next(PanelFinished)).work == work(3)
        assert work(2) not in [m.work for m in desk.inbox.of(PanelStarted)]

    bench(body)


def test_a_panel_that_cannot_be_interrupted_still_ends_as_cancelled(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        pipeline = worker._pipeline
        assert pipeline is not None
        go_on, encode = threading.Event(), pipeline.encode

        def held_up(*arguments: Any) -> dict[str, object]:
            assert go_on.wait(30)
            return encode(*arguments)

        monkeypatch.setattr(pipeline, "encode", held_up)
        worker.premises.workspace.begin(work(1), INPUTS)
        desk.run(1, Panel.ENCODER)
        await desk.inbox.next(PanelStarted)
        desk.stop(1)
        desk.run(2, Panel.ENCODER)  # handled after the stop, so its place in the queue shows that that was handled
        while not worker.facts()["queued"]:
            await desk.reference("monolithic-0.stream").ask(Inspect(), Inspection, timeout_s=5)
        go_on.set()
        assert (await desk.inbox.next(PanelCancelled)).work == work(1)
        assert worker.premises.workspace.get(work(1)).values == INPUTS

    bench(body)


def test_what_a_pipeline_raises_fails_the_request_and_nothing_else(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        worker.premises.workspace.begin(work(1), {**INPUTS, "no_such_input": 1})
        desk.run(1, Panel.ENCODER)
        failed = await desk.inbox.next(PanelFailed)
        assert failed.error.startswith("InputError: ")
        assert "no_such_input" in failed.error
        assert (failed.at_fault, failed.device_lost) == (True, False)
        desk.run(2, Panel.ENCODER)
        failed = await desk.inbox.next(PanelFailed)
        assert failed.error.startswith("NotInWorkspace")
        assert not failed.at_fault
        worker.premises.workspace.begin(work(3), INPUTS)
        desk.run(3, Panel.ENCODER)
        assert (await desk.inbox.next(PanelFinished)).work == work(3)

    bench(body)


def test_a_picture_that_is_gone_is_the_requests_fault_and_one_that_is_there_is_read(bench: Any) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        gone = Pictures((Upload(f"{'a' * 64}.png", 3),))
        worker.premises.workspace.begin(work(1), {**INPUTS, "image": gone})
        desk.run(1, Panel.ENCODER)
        failed = await desk.inbox.next(PanelFailed)
        assert (failed.at_fault, failed.device_lost) == (True, False)
        assert "send the picture again" in failed.error
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "PNG")
        there = Pictures((worker.uploads.save(file.getvalue(), "png"),))
        worker.premises.workspace.begin(work(2), {**INPUTS, "image": there})
        desk.run(2, Panel.ENCODER)
        failed = await desk.inbox.next(PanelFailed)
        assert "takes no image" in failed.error  # this model makes pictures of text alone, but it has been read

    bench(body)


def test_after_a_lost_device_nothing_more_is_launched(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        def lost(*_: Any) -> dict[str, object]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(worker._pipeline, "encode", lost)
        worker.premises.workspace.begin(work(1), INPUTS)
        worker.premises.workspace.begin(work(2), INPUTS)
        desk.run(1, Panel.ENCODER)
        desk.run(2, Panel.ENCODER)
        failed = await desk.inbox.next(PanelFailed)
        assert (failed.work, failed.device_lost, failed.at_fault) == (work(1), True, False)
        await asyncio.gather(*(t for t in worker._tasks if t.get_name().endswith("panels")))
        assert [m.work for m in desk.inbox.of(PanelStarted)] == [work(1)]

    bench(body)


def out_of_memory(*_: Any) -> dict[str, object]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_out_of_memory_ends_the_attempt_and_the_second_in_a_row_the_process(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        assert worker._pipeline is not None
        encode = worker._pipeline.encode
        for number in range(5):
            worker.premises.workspace.begin(work(number), INPUTS)
        for number, too_large in enumerate((True, False, True, True)):
            monkeypatch.setattr(worker._pipeline, "encode", out_of_memory if too_large else encode)
            desk.run(number, Panel.ENCODER)
            if not too_large:
                assert (await desk.inbox.next(PanelFinished)).work == work(number)
                continue
            failed = await desk.inbox.next(PanelFailed)
            assert (failed.work, failed.at_fault) == (work(number), False)
            assert failed.device_lost == (number == 3)

    bench(body)


class LateEvent:
    """The end of work that goes on until somebody waits for it."""

    def __init__(self, log: list[str], number: int) -> None:
        self.log, self.number, self.passed = log, number, False

    def synchronize(self) -> None:
        self.log.append(f"{self.number} ended")
        self.passed = True


def test_a_step_has_ended_when_it_is_told_and_the_next_is_launched_by_then(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        assert worker._stream is not None
        await encoded(desk, worker, 1)
        log: list[str] = []

        def record() -> LateEvent:
            log.append(f"{len([line for line in log if 'launched' in line]) + 1} launched")
            return LateEvent(log, int(log[-1][0]))

        monkeypatch.setattr(worker._stream, "record", record)
        monkeypatch.setattr(worker, "_progress", lambda _work, step, _total: log.append(f"{step} told"))
        desk.run(1, Panel.DENOISER)
        await desk.inbox.next(PanelFinished)
        assert log[:9] == [
            "1 launched", "2 launched", "1 ended", "1 told", "3 launched", "2 ended", "2 told", "3 ended", "3 told",
        ]  # fmt: skip

    bench(body)


def test_a_call_that_hangs_is_overdue(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        pipeline = worker._pipeline
        assert pipeline is not None
        go_on, encode = threading.Event(), pipeline.encode
        monkeypatch.setattr(pipeline, "encode", lambda *a: go_on.wait(30) and encode(*a))
        worker.premises.workspace.begin(work(1), INPUTS)
        desk.run(1, Panel.ENCODER)
        await desk.inbox.next(PanelStarted)
        assert worker.overdue() is None
        worker._bound_s = worker._start_timeout_s = 0.0
        assert "a step of r/1#1 (encoder) runs since" in (worker.overdue() or "")
        go_on.set()
        await desk.inbox.next(PanelFinished)
        assert worker.overdue() is None
        assert worker.facts()["first_encoder_s"] == worker.first_s["encoder"] > 0
        assert worker.start_s["weights"] > 0
        worker._load_began = 0.0
        assert worker.overdue() == "loading the model takes more than 0 s"

    bench(body)


def test_while_it_loads_it_says_how_much_of_the_weights_has_been_read(
    run: Any, place: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.roles.stream_worker.PROGRESS_EVERY_S", 0)
    topology = place(tiny_model, kind="monolithic")
    worker = StreamWorker(topology.component("monolithic-0"), topology, Premises())

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
def test_what_can_never_work_is_a_sentence(
    run: Any, place: Any, house: Any, tiny_model: Path, tmp_path: Path, device: str, says: str
) -> None:
    async def body() -> None:
        model = tiny_model if device != "cpu" else tmp_path / "nowhere"
        async with house(place(model, kind="monolithic")) as h:
            component = msgspec.structs.replace(h.topology.component("monolithic-0"), device=device)
            worker = StreamWorker(component, h.topology, Premises())
            with pytest.raises(StartFailure, match=says):
                await h.start(worker)

    run(body())


def test_a_class_that_the_libraries_do_not_have_is_a_failed_start_in_words(
    run: Any, place: Any, house: Any, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "newer"))
    index = json.loads((model / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "T7EncoderModel"]
    (model / "model_index.json").write_text(json.dumps(index))

    async def body() -> None:
        async with house(place(model, kind="monolithic")) as h:
            worker = StreamWorker(h.topology.component("monolithic-0"), h.topology, Premises())
            with pytest.raises(StartFailure, match=r"a T7EncoderModel of transformers, and .* has no such class"):
                await h.start(worker)

    run(body())


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (lambda: NoRoomError("transformer", CPU, 17 << 30), StartFailure),
        (lambda: NoRoomError("transformer", CPU, 9 << 30), StartDelayed),
        (lambda: torch.OutOfMemoryError("CUDA out of memory."), StartDelayed),
        (lambda: RuntimeError("something else"), RuntimeError),
    ],
)
def test_weights_wait_for_a_card_that_others_fill_and_not_for_one_that_is_too_small(
    run: Any, place: Any, house: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Any, failure: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1 << 30, 16 << 30))

    def no_room(_device: torch.device) -> Any:
        raise error()

    async def body() -> None:
        async with house(place(tiny_model, kind="monolithic")) as h:
            worker = StreamWorker(h.topology.component("monolithic-0"), h.topology, Premises())
            monkeypatch.setattr(worker, "_load", no_room)
            stream = DeviceStream(CPU, "test")
            with pytest.raises(failure) as raised:
                await worker._loaded(stream)
            assert type(raised.value) is failure
            stream.close()

    run(body())
