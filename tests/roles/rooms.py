"""A transfer actor, its workspace, and its instance's side of the conversation."""

from __future__ import annotations

from typing import Any

import torch

from triptych.actors import Actor
from triptych.actors.system import Inspect, Inspection
from triptych.roles.messages.device import (
    ArtifactSaved,
    StageState,
    StateFailed,
    StateLoaded,
    StateStaged,
)
from triptych.roles.messages.pool import LeaseQuery, LeaseReport, LeaseSlot, ReleaseSlots, SlotLeased, SlotsReleased
from triptych.roles.messages.work import LeaseRef, Staged, Work
from triptych.roles.transfer import TransferActor
from triptych.roles.workspace import Premises

W = Work("r/0", 1)
FAR = 4e9
VALUES: dict[str, object] = {
    "prompt_embeds": torch.arange(4096, dtype=torch.float32).reshape(1, 64, 64),
    "timesteps": torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
    "height": 64,
    "output_type": "pil",
}


class Desk(Actor):
    """The instance's side of the conversation; also asks the pool on behalf of the test."""

    def __init__(self, name: str, inbox: Any) -> None:
        super().__init__(name)
        self.inbox = inbox

    async def hear(self, message: StateStaged | StateLoaded | StateFailed | ArtifactSaved) -> None:
        await self.inbox.put(message)

    def tell(self, message: Any) -> None:
        self.reference(f"{self.name}.transfer").tell(message)

    async def leases(self, pool: str) -> LeaseReport:
        return await self.reference(pool).ask(LeaseQuery(), LeaseReport, timeout_s=5)

    async def lease(self, pool: str, nbytes: int, *, incoming: bool = False, work: Work = W) -> LeaseRef:
        message = LeaseSlot(work, self.name, self.generation, nbytes, incoming)
        return (await self.reference(pool).ask(message, SlotLeased, timeout_s=5)).lease

    async def release(self, lease: LeaseRef) -> None:
        await self.reference(lease.pool).ask(ReleaseSlots((lease,)), SlotsReleased, timeout_s=5)

    async def until(self, pool: str, count: int) -> None:
        while len((await self.leases(pool)).leases) != count:
            pass

    async def until_busy(self, transfers: int) -> None:
        reference = self.reference(f"{self.name}.transfer")
        while True:
            found = await reference.ask(Inspect(), Inspection, timeout_s=5)
            if found.actors[-1].facts["transfers"] == transfers:
                return


class Room:
    """One transfer actor, its workspace and its instance's desk."""

    def __init__(self, h: Any, name: str, inbox: Any) -> None:
        self.h = h
        self.desk = Desk(name, inbox())
        self.premises = Premises()
        self.transfer = TransferActor(h.topology.component(name), h.topology, self.premises)

    async def start(self) -> Room:
        await self.h.start(self.desk, self.transfer)
        return self

    def begin(self, work: Work = W, **values: object) -> None:
        self.premises.workspace.begin(work, values or VALUES)

    async def stage(self, work: Work = W, deadline: float = FAR) -> Staged:
        self.desk.tell(StageState(work, deadline))
        return (await self.desk.inbox.next(StateStaged)).staged

    async def fails(self, message: Any) -> StateFailed:
        self.desk.tell(message)
        return await self.desk.inbox.next(StateFailed)

    def values(self, work: Work = W) -> dict[str, object]:
        return self.premises.workspace.get(work).values
