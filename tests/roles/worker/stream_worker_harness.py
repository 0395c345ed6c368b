"""A stream worker between a head, an instance and a transfer actor that keep what they hear."""

from __future__ import annotations

from typing import Any

import torch

from triptych.actors import Actor
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Attempt, Output, Rebind, SchedulingHints
from triptych.roles.messages.stages import Acknowledged, StageProgress, StageStarted
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
        context.tell_head = self._tell_head

    async def started(self) -> None:
        self.spawn(self.context.reporter.run(self.deliver), name="reports")
        self.context.reporter.resume()

    def deliver(self, report: Any) -> Any:
        return self.reference("head").ask(report, Acknowledged, timeout_s=5)

    def _tell_head(self, message: Message) -> None:
        self.reference("head").tell(message)

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


async def encoded(
    fake_instance: FakeInstance, worker: StreamWorker, number: int, bucket: int = 1, **changes: object
) -> None:
    """Encode a request; its hints say as many steps as its inputs."""
    inputs = {**INPUTS, **changes}
    fake_instance.begin(number, inputs, steps=inputs["num_inference_steps"], bucket=bucket)
    fake_instance.run(number, Stage.ENCODER)
    await fake_instance.inbox.next(COMPUTED)
    await fake_instance.inbox.next(StageStarted)


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


def out_of_memory(*_: Any) -> dict[str, object]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
