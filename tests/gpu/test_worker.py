"""A stream worker, which has every panel, on a card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.needed import require

require()

import msgspec

from tests.roles.test_stream_worker import INPUTS, Desk, work
from triptych.engines.panels import Panel
from triptych.engines.streams import StreamEvent
from triptych.roles import devices
from triptych.roles.messages.device import PanelFailed, PanelFinished
from triptych.roles.stream_worker import StreamWorker
from triptych.roles.workspace import Premises

STEPS = 20


@pytest.fixture
def worker(run: Any, place: Any, house: Any, inbox: Any, tiny_model: Any, device: torch.device) -> Any:
    def start(body: Any) -> None:
        async def all_of_it() -> None:
            async with house(place(tiny_model, kind="monolithic")) as h:
                component = msgspec.structs.replace(h.topology.component("monolithic-0"), device=str(device))
                desk, worker = Desk("monolithic-0", inbox()), StreamWorker(component, h.topology, Premises())
                await h.start(desk, worker)
                await body(desk, worker)

        run(all_of_it())

    return start


async def picture(desk: Desk, worker: StreamWorker, number: int, **changes: object) -> bytes:
    worker.premises.workspace.begin(work(number), {**INPUTS, **changes}, seed=3)
    for panel in Panel:
        desk.run(number, panel)
        await desk.inbox.next(PanelFinished)
    (made,) = worker.premises.workspace.get(work(number)).values["images"]  # type: ignore[misc]
    return made.tobytes()  # type: ignore[no-any-return]


def test_it_says_which_card_it_has_and_makes_the_same_picture_twice(worker: Any, device: torch.device) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        assert worker.facts()["device"] == str(device)
        assert await picture(desk, worker, 1) == await picture(desk, worker, 2)

    worker(body)


def test_a_step_has_ended_when_it_is_told(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        assert worker._stream is not None
        recorded: list[StreamEvent] = []
        record, told = worker._stream.record, []

        def remember() -> StreamEvent:
            recorded.append(record())
            return recorded[-1]

        worker.premises.workspace.begin(work(1), {**INPUTS, "num_inference_steps": STEPS})
        desk.run(1, Panel.ENCODER)
        await desk.inbox.next(PanelFinished)
        monkeypatch.setattr(worker._stream, "record", remember)
        monkeypatch.setattr(worker, "_progress", lambda _w, step, _t: told.append((step, recorded[step - 1].passed)))
        desk.run(1, Panel.DENOISER)
        await desk.inbox.next(PanelFinished)
        assert told == [(step, True) for step in range(1, STEPS + 1)]

    worker(body)


def test_out_of_memory_fails_one_picture_and_the_next_is_made(worker: Any, card: torch.device) -> None:
    async def body(desk: Desk, worker: StreamWorker) -> None:
        assert worker._stream is not None
        expected = await picture(desk, worker, 1)
        allocated = await worker._stream.run(devices.free_memory, card)
        total = torch.cuda.get_device_properties(card).total_memory
        # Room for a small picture; a large one takes 256 MiB in each layer of the VAE.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(card) + (64 << 20)) / total, card)
        try:
            large = {**INPUTS, "height": 2048, "width": 2048, "num_inference_steps": 1}
            worker.premises.workspace.begin(work(2), large)
            for panel in Panel:
                desk.run(2, panel)
                answer = await desk.inbox.next(PanelFinished | PanelFailed)
                if isinstance(answer, PanelFailed):
                    break
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, card)
        assert isinstance(answer, PanelFailed), "the large picture fitted"
        assert (answer.device_lost, answer.at_fault) == (False, False)
        worker.premises.workspace.clear(work(2))
        assert await worker._stream.run(devices.free_memory, card) < allocated + (64 << 20)
        assert await picture(desk, worker, 3) == expected

    worker(body)
