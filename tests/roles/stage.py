"""A cluster on one loop, driven by hand from the head's end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triptych.actors.system import Inspect, Inspection
from triptych.roles.instance import build
from triptych.roles.messages import stages
from triptych.roles.messages.pool import LeaseQuery, LeaseReport, ReleaseSlots, SlotsReleased
from triptych.roles.messages.work import LeaseRef, Output, Staged, Work

FAR = 4e9
INPUTS: dict[str, Any] = {
    "prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16,
}  # fmt: skip


def work(number: int, attempt: int = 1) -> Work:
    return Work(f"r/{number}", attempt)


class Stage:
    """A cluster on one loop, driven by hand from the head's end."""

    def __init__(self, h: Any, head: Any) -> None:
        self.h = h
        self.head = head
        self.inbox = head.inbox

    async def join(self, *names: str, generation: int = 1) -> list[stages.InstanceHello]:
        for name in names:  # one by one: loading a model patches classes for the whole process
            await self.h.component(name, build, generation)
        return [await self.inbox.next(stages.InstanceHello) for _ in names]

    async def assign(self, instance: str, of: Work, seed: int = 5, **changes: Any) -> None:
        message = stages.StageAssign(of, {**INPUTS, **changes}, seed, Output("png"), FAR)
        assert (await self.ask(instance, message, stages.StageTaken)).work == of

    async def push(self, instance: str, of: Work, source: Staged, target: LeaseRef | None = None) -> None:
        message = stages.TransferPush(of, source, target, Output("png"), FAR)
        assert (await self.ask(instance, message, stages.StageTaken)).work == of

    async def ask(self, name: str, message: Any, *replies: Any) -> Any:
        return await self.head.reference(name).ask(message, *replies, timeout_s=10)

    def cancel(self, instance: str, of: Work) -> None:
        self.head.reference(instance).tell(stages.StageCancel(of, "by the test"))

    async def leases(self, name: str = "pool") -> LeaseReport:
        return await self.ask(name, LeaseQuery(), LeaseReport)

    async def release(self, *leases: LeaseRef) -> None:
        await self.ask(leases[0].pool, ReleaseSlots(leases), SlotsReleased)

    async def facts(self, instance: str) -> dict[str, Any]:
        return (await self.ask(instance, Inspect(), Inspection)).actors[0].facts

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for what must come; the run's limit ends the waiting."""
        while not await condition():
            pass

    async def empty(self, *pools: str) -> None:
        """Wait until no slot is held; nothing may be left behind."""
        for name in pools or ("pool",):
            await self.until(lambda name=name: self._none_held(name))

    async def _none_held(self, name: str) -> bool:
        # What is kept ready for the next arrival is for no unit.
        return not any(view.work.unit_id for view in (await self.leases(name)).leases)

    async def at_rest(self, instance: str) -> None:
        """Everything that was taken has ended, and nothing of it is kept."""
        facts = await self.facts(instance)
        assert (facts["in_hand"], facts["workspace"], facts["credits"]) == (0, 0, facts["slots"])

    async def encoded(self, of: Work, **changes: Any) -> Staged:
        await self.assign("encoder-0", of, **changes)
        return (await self.inbox.next(stages.TransferStaged)).staged
