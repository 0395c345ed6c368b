"""A transfer actor, its workspace, and its instance's side of the conversation."""

from __future__ import annotations

from typing import Any

import torch

from triptych.actors import Actor
from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.pool import BlockLeased, BlocksReleased, LeaseBlock, LeaseQuery, LeaseReport, ReleaseBlocks
from triptych.roles.messages.worker import (
    ArtifactSaved,
    InputsLoaded,
    OutputsStored,
    StoreOutputs,
    TransferTaskFailed,
)
from triptych.roles.worker.transfer import TransferActor
from triptych.roles.worker.workspace import ProcessContext

W = Attempt("r/0", 1)
FAR = 4e9
VALUES: dict[str, object] = {
    "prompt_embeds": torch.arange(4096, dtype=torch.float32).reshape(1, 64, 64),
    "timesteps": torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
    "height": 64,
    "output_type": "pil",
}


class FakeInstance(Actor):
    """The instance's side of the conversation; also asks the pool on behalf of the test."""

    def __init__(self, name: str, inbox: Any) -> None:
        super().__init__(name)
        self.inbox = inbox

    async def hear(self, message: OutputsStored | InputsLoaded | TransferTaskFailed | ArtifactSaved) -> None:
        await self.inbox.put(message)

    def tell(self, message: Any) -> None:
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
    """One transfer actor, its workspace and the instance that it talks to."""

    def __init__(self, h: Any, name: str, inbox: Any) -> None:
        self.h = h
        self.fake_instance = FakeInstance(name, inbox())
        self.context = ProcessContext()
        self.transfer = TransferActor(h.topology.component(name), h.topology, self.context)

    async def start(self) -> TransferHarness:
        await self.h.start(self.fake_instance, self.transfer)
        return self

    def begin(self, attempt: Attempt = W, **values: object) -> None:
        self.context.workspace.begin(attempt, values or VALUES)

    async def store_outputs(self, attempt: Attempt = W, deadline: float = FAR) -> StoredPayload:
        self.fake_instance.tell(StoreOutputs(attempt, deadline))
        return (await self.fake_instance.inbox.next(OutputsStored)).stored

    async def fails(self, message: Any) -> TransferTaskFailed:
        self.fake_instance.tell(message)
        return await self.fake_instance.inbox.next(TransferTaskFailed)

    def values(self, attempt: Attempt = W) -> dict[str, object]:
        return self.context.workspace.get(attempt).values
