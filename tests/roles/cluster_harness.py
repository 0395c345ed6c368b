"""A cluster on one loop, driven by hand from the head's end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triptych.actors.runtime.system_messages import Inspect, Inspection
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt, LeaseRef, Output, StoredPayload
from triptych.roles.messages.pool import BlocksReleased, LeaseQuery, LeaseReport, ReleaseBlocks
from triptych.roles.worker.instance import build

FAR = 4e9
INPUTS: dict[str, Any] = {
    "prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16,
}  # fmt: skip


def attempt(number: int, tries: int = 1) -> Attempt:
    return Attempt(f"r/{number}", tries)


class ClusterDriver:
    """A cluster on one loop, driven by hand from the head's end."""

    def __init__(self, h: Any, head: Any) -> None:
        self.h = h
        self.head = head
        self.inbox = head.inbox

    async def join(self, *names: str, generation: int = 1) -> list[stages.RegisterInstance]:
        for name in names:  # one by one: loading a model patches classes for the whole process
            await self.h.component(name, build, generation)
        return [await self.inbox.next(stages.RegisterInstance) for _ in names]

    async def assign(self, instance: str, of: Attempt, seed: int = 5, **changes: Any) -> None:
        message = stages.StageAssign(of, {**INPUTS, **changes}, seed, Output("png"), FAR)
        assert (await self.ask(instance, message, stages.StageTaken)).attempt == of

    async def push(self, instance: str, of: Attempt, source: StoredPayload, target: LeaseRef | None = None) -> None:
        message = stages.TransferPush(of, source, target, Output("png"), FAR)
        assert (await self.ask(instance, message, stages.StageTaken)).attempt == of

    async def ask(self, name: str, message: Any, *replies: Any) -> Any:
        return await self.head.reference(name).ask(message, *replies, timeout_s=10)

    def cancel(self, instance: str, of: Attempt) -> None:
        self.head.reference(instance).tell(stages.StageCancel(of, "by the test"))

    async def leases(self, name: str = "pool") -> LeaseReport:
        return await self.ask(name, LeaseQuery(), LeaseReport)

    async def release(self, *leases: LeaseRef) -> None:
        await self.ask(leases[0].pool, ReleaseBlocks(leases), BlocksReleased)

    async def stats(self, instance: str) -> dict[str, Any]:
        return (await self.ask(instance, Inspect(), Inspection)).actors[0].facts

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for what must come; the run's limit ends the waiting."""
        while not await condition():
            pass

    async def empty(self, *pools: str) -> None:
        """Wait until no block is held; nothing may be left behind."""
        for name in pools or ("pool",):
            await self.until(lambda name=name: self._none_held(name))

    async def _none_held(self, name: str) -> bool:
        # What is kept ready for the next arrival is for no job.
        return not any(view.attempt.job_id for view in (await self.leases(name)).leases)

    async def at_rest(self, instance: str) -> None:
        """Everything that was taken has ended, and nothing of it is kept."""
        facts = await self.stats(instance)
        assert (facts["active"], facts["credits"]) == (0, facts["slots"])

    async def encoded(self, of: Attempt, **changes: Any) -> StoredPayload:
        await self.assign("encoder-0", of, **changes)
        return (await self.inbox.next(stages.StageOutputsStored)).stored
