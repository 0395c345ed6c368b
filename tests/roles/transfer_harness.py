"""A transfer actor, and stand-ins for the instance and the stream worker of its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from triptych.actors import Actor
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.roles.messages.common import Attempt, LeaseRef, Output, StoredPayload
from triptych.roles.messages.pool import BlockLeased, BlocksReleased, LeaseBlock, LeaseQuery, LeaseReport, ReleaseBlocks
from triptych.roles.messages.stages import StageFailed, StageOutputsStored, TransferFailed
from triptych.roles.messages.worker import (
    CancelAttempt,
    FetchUploads,
    LoadInputs,
    RunStage,
    SaveArtifact,
    StoreCheckpoint,
    StoreOutputs,
)
from triptych.roles.worker.attempts import STAGES_OF_ROLE, ActiveAttempt, EndReport, Phase
from triptych.roles.worker.process_context import ProcessContext
from triptych.roles.worker.transfer import TransferActor

W = Attempt("r/0", 1)
FAR = 4e9
VALUES: dict[str, object] = {
    "prompt_embeds": torch.arange(4096, dtype=torch.float32).reshape(1, 64, 64),
    "timesteps": torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
    "height": 64,
    "output_type": "pil",
}


PHASES = {
    FetchUploads: Phase.FETCHING,
    LoadInputs: Phase.LOADING,
    StoreOutputs: Phase.STORING,
    SaveArtifact: Phase.SAVING,
}


class FakeStream(Actor):
    """Keeps what the transfer actor passes on to the stream worker."""

    def __init__(self, name: str, inbox: Any) -> None:
        super().__init__(name)
        self.inbox = inbox

    async def take(self, message: RunStage) -> None:
        await self.inbox.put(message)


class FakeInstance(Actor):
    """Passes attempts on to the transfer actor and keeps what comes back; also asks the pool on behalf of the test."""

    def __init__(self, name: str, inbox: Any, context: ProcessContext) -> None:
        super().__init__(name)
        self.inbox = inbox
        self.context = context

    def _report(self, end: EndReport) -> None:
        self.spawn(self.inbox.put(end), name="report")

    def tell(self, message: Any) -> None:
        item = self.context.attempts.active.get(message.attempt)
        if item and isinstance(message, CancelAttempt):
            item.cancelled = True
        elif item and not isinstance(message, StoreCheckpoint):
            item.phase = PHASES[type(message)]
        self.reference(f"{self.name}.transfer").tell(message)

    async def leases(self, pool: str) -> LeaseReport:
        return await self.reference(pool).ask(LeaseQuery(), LeaseReport, timeout_s=5)

    async def lease(self, pool: str, nbytes: int, *, incoming: bool = False, attempt: Attempt = W) -> LeaseRef:
        message = LeaseBlock(attempt, self.name, self.generation, nbytes, incoming)
        return (await self.reference(pool).ask(message, BlockLeased, timeout_s=5)).lease

    async def release(self, lease: LeaseRef) -> None:
        await self.reference(lease.pool).ask(ReleaseBlocks((lease,)), BlocksReleased, timeout_s=5)

    async def until(self, pool: str, count: int) -> None:
        while len((await self.leases(pool)).leases) != count:
            pass

    async def until_busy(self, transfers: int) -> None:
        reference = self.reference(f"{self.name}.transfer")
        while True:
            found = await reference.ask(Inspect(), Inspection, timeout_s=5)
            if found.actors[-1].facts["transfers"] == transfers:
                return


class TransferHarness:
    """One transfer actor, and the instance and the stream worker that it talks to."""

    def __init__(self, h: Any, name: str, inbox: Any, host: str = "", state_dir: Path | None = None) -> None:
        self.h = h
        component = msgspec.structs.replace(h.topology.component(name), host=host)
        self.context = ProcessContext(component)
        self.fake_instance = FakeInstance(name, inbox(), self.context)
        self.context.end_attempt = self.fake_instance._report
        topology = msgspec.structs.replace(h.topology, state_dir=state_dir or h.topology.state_dir)
        self.transfer = TransferActor(component, topology, self.context)

    async def start(self) -> TransferHarness:
        stream = FakeStream(f"{self.fake_instance.name}.stream", self.fake_instance.inbox)
        await self.h.start(self.fake_instance, stream, self.transfer)
        return self

    def begin(self, attempt: Attempt = W, **values: object) -> None:
        stages = STAGES_OF_ROLE[self.transfer.component.kind]
        item = ActiveAttempt(attempt, Phase.RUNNING, stages, Output(), FAR, dict(values or VALUES))
        self.context.attempts.active[attempt] = item

    def ahead(self, attempt: Attempt = W) -> None:
        """Say that its outputs are nearly computed."""
        self.context.lease_ahead(self.context.attempts.active[attempt])

    async def store_outputs(self, attempt: Attempt = W, deadline: float = FAR) -> StoredPayload:
        self.fake_instance.tell(StoreOutputs(attempt, deadline))
        stored = (await self.fake_instance.inbox.next(StageOutputsStored)).stored
        await self.transfer._client.all_sealed()
        return stored

    async def fails(self, message: Any) -> Any:
        self.fake_instance.tell(message)
        return await self.fake_instance.inbox.next((TransferFailed, StageFailed))

    def values(self, attempt: Attempt = W) -> dict[str, object]:
        return self.context.attempts.active[attempt].values
