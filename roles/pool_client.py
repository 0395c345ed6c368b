"""A role's way to its own buffer pool: slots, and the mapping of the pool's memory."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from triptych.actors import Actor
from triptych.bus import AskTimeout, BusError, Message, RemoteFailure, Unreachable
from triptych.engines.arena import Arena, ArenaAddress, ArenaError
from triptych.roles.messages.pool import (
    LeaseSlot,
    PoolDescription,
    PoolFull,
    PoolQuery,
    PullSlot,
    ReleaseSlots,
    SealSlot,
    SlotLeased,
    SlotPulled,
    SlotSealed,
    SlotsReleased,
)
from triptych.roles.messages.work import LeaseRef, Work
from triptych.roles.reporter import Fenced, Verdict, is_fence, pause_s, verdict

if TYPE_CHECKING:
    import torch

R = TypeVar("R", bound=Message)

ANSWER_S: Final = 2.0
"""What a pool decides without waiting for anybody, it answers well within this."""
BATCH: Final = 256
"""Slots that are given back at once."""
FAULTS: Final = "TRIPTYCH_TRANSFER_FAULTS"
"""Environment variable with which a drill damages what is transferred, as `engines.transfer.Faults` reads it."""


def why_full(pool: str, full: PoolFull) -> str:
    """Say that a pool has no slot of that size now, or never will."""
    if full.needed > full.largest:
        return f"needs {full.needed} bytes, {pool} gives at most {full.largest}: raise [transfer] pool_size"
    return f"{pool} has no slot of {full.needed} bytes, {full.free} are free"


class LeaseGone(Exception):  # noqa: N818  names what is the case
    """The slot is of an earlier incarnation of the pool: its memory is gone."""


class PoolClient:
    """The conversation of one actor with its pool. Each question raises Fenced when the pool has given it up.

    Args:
        actor: who asks.
        pool: name of the pool.
        owner: component whose end frees what it was writing.

    """

    def __init__(self, actor: Actor, pool: str, owner: str) -> None:
        self.pool = pool
        self._actor = actor
        self._owner = owner
        self._in_doubt: dict[Work, LeaseSlot] = {}
        self._unreleased: deque[LeaseRef] = deque()

    async def describe(self) -> PoolDescription:
        """Ask where the pool's memory is. Raises BusError."""
        return await self._ask(PoolQuery(), PoolDescription)

    async def lease(self, work: Work, nbytes: int, *, incoming: bool = False) -> LeaseRef | PoolFull:
        """Take a slot for writing. Raises BusError; whoever then does not ask again has to `settle`."""
        message = LeaseSlot(work, self._owner, self._actor.generation, nbytes, incoming)
        try:
            answer = await self._lease(message)
        except AskTimeout:
            self._in_doubt[work] = message
            raise
        self._in_doubt.pop(work, None)
        return answer.lease if isinstance(answer, SlotLeased) else answer

    def settle(self, work: Work) -> None:
        """Give back, in the background, a slot of which the pool may have said so in vain."""
        if message := self._in_doubt.pop(work, None):
            self._actor.spawn(self._undo(message), name=f"undo {work}")

    def settle_all(self) -> None:
        """Settle every slot that is in doubt."""
        for work in tuple(self._in_doubt):
            self.settle(work)

    async def seal(self, lease: LeaseRef, checksum: int, nbytes: int) -> None:
        """Close a slot for writing. Raises BusError."""
        await self._ask(SealSlot(lease, checksum, nbytes), SlotSealed)

    async def pull(self, work: Work, source: LeaseRef, target: LeaseRef, nbytes: int, timeout_s: float) -> float:
        """Have the pool read another pool's slot, and return the seconds that it took. Raises BusError."""
        message = PullSlot(source, target, nbytes, timeout_s, work)
        return (await self._ask(message, SlotPulled, timeout_s=timeout_s + 4 * ANSWER_S)).seconds

    def release(self, lease: LeaseRef) -> None:
        """Give a slot back, in the background and however long the pool takes: nobody has to wait for it."""
        self._unreleased.append(lease)
        if len(self._unreleased) == 1:
            self._actor.spawn(self._release_all(), name="release")

    async def _lease(self, message: LeaseSlot) -> SlotLeased | PoolFull:
        return await self._ask(message, SlotLeased, PoolFull)

    async def _ask(self, message: Message, *replies: type[R], timeout_s: float | None = None) -> R:
        try:
            return await self._actor.reference(self.pool).ask(message, *replies, timeout_s=timeout_s or ANSWER_S)
        except RemoteFailure as error:
            if is_fence(error):
                raise Fenced(f"{self.pool} has given this incarnation up ({error})") from error
            raise

    async def _release_all(self) -> None:
        while self._unreleased:
            batch = tuple(itertools.islice(self._unreleased, BATCH))
            await self._insist(ReleaseSlots(batch), SlotsReleased)
            for _ in batch:
                self._unreleased.popleft()

    async def _undo(self, message: LeaseSlot) -> None:
        """Find out which slot it was: asked again, the pool gives the same."""
        answer = await self._insist(message, SlotLeased, PoolFull)
        if isinstance(answer, SlotLeased):
            self.release(answer.lease)

    async def _insist(self, message: Message, *replies: type[R]) -> R | None:
        """Ask until the pool answers; None when there is nothing to give back any more, or no way to."""
        attempt = failures = 0
        while True:
            try:
                return await self._ask(message, *replies)
            except Unreachable:  # its process has ended, and all its slots with it
                return None
            except BusError as error:
                failures += isinstance(error, RemoteFailure) and error.code == "handler_failed"
                if verdict(error, failures) is not Verdict.RETRY:
                    self._actor.log.exception("slot not given back", asked=type(message).__name__)
                    return None
                self._actor.log.warning("slot not given back yet", asked=type(message).__name__, error=str(error))
            await asyncio.sleep(pause_s(attempt, random.random()))  # noqa: S311  jitter
            attempt += 1


class Mapping:
    """The memory of the pool as this process sees it; mapped anew for each incarnation of the pool.

    It is let go of as soon as the pool's process has ended: as long as anybody maps it, its successor may find too
    little memory to start.

    Args:
        actor: whose tasks watch the pools.
        client: of the pool.
        adopt: makes a new mapping ready for the device.
        retire: lets go of one whose pool has ended.

    """

    def __init__(
        self,
        actor: Actor,
        client: PoolClient,
        adopt: Callable[[Arena], Awaitable[None]],
        retire: Callable[[Arena], Awaitable[None]],
    ) -> None:
        self._actor = actor
        self._client = client
        self._adopt = adopt
        self._retire = retire
        self._arena: Arena | None = None
        self._generation = 0
        self._lock = asyncio.Lock()

    async def slot(self, lease: LeaseRef, nbytes: int) -> torch.Tensor:
        """View the first `nbytes` bytes of a slot: uint8, shape [nbytes], on the CPU.

        Raises:
            LeaseGone: the slot is of an earlier incarnation of the pool, or lies outside it.
            BusError: the pool does not answer.
            ArenaError: its memory cannot be mapped.

        """
        async with self._lock:
            if self._arena is None or self._generation != lease.pool_generation or self._arena.stale:
                await self._renew()
            if self._arena is None or self._generation != lease.pool_generation:
                raise LeaseGone(
                    f"{self._client.pool} is at generation {self._generation}, the slot is of {lease.pool_generation}"
                )
            try:
                return self._arena.tensor(lease.offset, nbytes)
            except ArenaError as error:
                raise LeaseGone(str(error)) from error

    async def open(self) -> None:
        """Map the pool's memory. Raises BusError and ArenaError."""
        async with self._lock:
            await self._renew()

    async def _renew(self) -> None:
        found = await self._client.describe()
        if self._arena is not None and found.generation == self._generation and not self._arena.stale:
            return
        await self._let_go()
        arena = await asyncio.to_thread(Arena.attach, ArenaAddress.parse(found.arena))
        await self._adopt(arena)
        self._arena, self._generation = arena, found.generation
        self._actor.spawn(self._watch(arena), name=f"watch the memory of {self._client.pool}")

    async def _watch(self, arena: Arena) -> None:
        await arena.until_stale()
        async with self._lock:
            if self._arena is arena:
                await self._let_go()

    async def _let_go(self) -> None:
        # What is computed from it meanwhile has views of its own, which keep it mapped until they are gone.
        old, self._arena = self._arena, None
        if old is not None:
            await self._retire(old)
