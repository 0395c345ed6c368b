"""A role's way to its own buffer pool: blocks, and the mapping of the pool's memory."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from triptych.actors import Actor
from triptych.backoff import backoff_s
from triptych.bus import AskTimeoutError, BusError, Message, RemoteError, UnreachableError
from triptych.engines.memory.arena import Arena, ArenaAddress, ArenaError
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import (
    POOL_ANSWER_S,
    BlockLeased,
    BlockPulled,
    BlockSealed,
    BlocksReleased,
    LeaseBlock,
    PoolDescription,
    PoolFull,
    PoolQuery,
    PullBlock,
    ReleaseBlocks,
    SealBlock,
)
from triptych.roles.worker.reporter import DeliveryOutcome, FencedError, delivery_outcome, is_fenced

if TYPE_CHECKING:
    import torch

R = TypeVar("R", bound=Message)

BATCH: Final = 256
"""Blocks that are released at once."""
FAULTS: Final = "TRIPTYCH_TRANSFER_FAULTS"
"""Environment variable with which a drill damages what is transferred, as `engines.transfer.FaultRates` reads it."""


def pool_full_reason(pool: str, full: PoolFull) -> str:
    """Say that a pool has no block of that size now, or never will."""
    if full.needed > full.largest:
        return f"needs {full.needed} bytes, {pool} gives at most {full.largest}: raise [transfer] pool_size"
    return f"{pool} has no block of {full.needed} bytes, {full.free} are free"


class LeaseGoneError(Exception):
    """The block is of an earlier incarnation of the pool: its memory is gone."""


class PoolClient:
    """The conversation of one actor with its pool. Each question raises FencedError when the pool has given it up.

    Args:
        actor: who asks.
        pool: name of the pool.
        owner: component whose end frees what it was writing.

    """

    def __init__(self, actor: Actor, pool: str, owner: str) -> None:
        self.pool = pool
        self._actor = actor
        self._owner = owner
        self._unanswered: dict[Attempt, LeaseBlock] = {}
        self._unreleased: deque[LeaseRef] = deque()

    async def describe(self) -> PoolDescription:
        """Ask where the pool's memory is. Raises BusError."""
        return await self._ask(PoolQuery(), PoolDescription)

    async def lease(self, attempt: Attempt, nbytes: int, *, incoming: bool = False) -> LeaseRef | PoolFull:
        """Take a block for writing. Raises BusError; whoever then does not ask again has to `undo`."""
        message = LeaseBlock(attempt, self._owner, self._actor.generation, nbytes, incoming)
        try:
            answer = await self._lease(message)
        except AskTimeoutError:
            self._unanswered[attempt] = message
            raise
        self._unanswered.pop(attempt, None)
        return answer.lease if isinstance(answer, BlockLeased) else answer

    def undo(self, attempt: Attempt) -> None:
        """Give back, in the background, a block of which the pool may have said so in vain."""
        if message := self._unanswered.pop(attempt, None):
            self._actor.spawn(self._undo(message), name=f"undo {attempt}")

    def undo_all(self) -> None:
        """Undo every lease that is in doubt."""
        for attempt in tuple(self._unanswered):
            self.undo(attempt)

    async def seal(self, lease: LeaseRef, checksum: int, nbytes: int) -> None:
        """Close a block for writing. Raises BusError."""
        await self._ask(SealBlock(lease, checksum, nbytes), BlockSealed)

    async def pull(self, attempt: Attempt, source: LeaseRef, target: LeaseRef, nbytes: int, timeout_s: float) -> float:
        """Have the pool read another pool's block, and return the seconds that it took. Raises BusError."""
        message = PullBlock(source, target, nbytes, timeout_s, attempt)
        return (await self._ask(message, BlockPulled, timeout_s=timeout_s + 4 * POOL_ANSWER_S)).seconds

    def release(self, lease: LeaseRef) -> None:
        """Give a block back, in the background and however long the pool takes: nobody has to wait for it."""
        self._unreleased.append(lease)
        if len(self._unreleased) == 1:
            self._actor.spawn(self._release_all(), name="release")

    async def _lease(self, message: LeaseBlock) -> BlockLeased | PoolFull:
        return await self._ask(message, BlockLeased, PoolFull)

    async def _ask(self, message: Message, *replies: type[R], timeout_s: float | None = None) -> R:
        try:
            return await self._actor.reference(self.pool).ask(message, *replies, timeout_s=timeout_s or POOL_ANSWER_S)
        except RemoteError as error:
            if is_fenced(error):
                raise FencedError(f"{self.pool} has given this incarnation up ({error})") from error
            raise

    async def _release_all(self) -> None:
        while self._unreleased:
            batch = tuple(itertools.islice(self._unreleased, BATCH))
            await self._ask_until_answered(ReleaseBlocks(batch), BlocksReleased)
            for _ in batch:
                self._unreleased.popleft()

    async def _undo(self, message: LeaseBlock) -> None:
        """Find out which block it was: asked again, the pool gives the same."""
        answer = await self._ask_until_answered(message, BlockLeased, PoolFull)
        if isinstance(answer, BlockLeased):
            self.release(answer.lease)

    async def _ask_until_answered(self, message: Message, *replies: type[R]) -> R | None:
        """Ask until the pool answers; None when there is nothing to give back any more, or no way to."""
        tries = failures = 0
        while True:
            try:
                return await self._ask(message, *replies)
            except UnreachableError:  # its process has ended, and all its blocks with it
                return None
            except BusError as error:
                failures += isinstance(error, RemoteError) and error.code == "handler_failed"
                if delivery_outcome(error, failures) is not DeliveryOutcome.RETRY:
                    self._actor.log.exception("block not given back", asked=type(message).__name__)
                    return None
                self._actor.log.warning("block not given back yet", asked=type(message).__name__, error=str(error))
            await asyncio.sleep(backoff_s(tries))
            tries += 1


class PoolMapping:
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
        on_map: Callable[[Arena], Awaitable[None]],
        on_unmap: Callable[[Arena], Awaitable[None]],
    ) -> None:
        self._actor = actor
        self._client = client
        self._on_map = on_map
        self._on_unmap = on_unmap
        self._arena: Arena | None = None
        self._generation = 0
        self._lock = asyncio.Lock()

    async def block(self, lease: LeaseRef, nbytes: int) -> torch.Tensor:
        """View the first `nbytes` bytes of a block: uint8, shape [nbytes], on the CPU.

        Raises:
            LeaseGoneError: the block is of an earlier incarnation of the pool, or lies outside it.
            BusError: the pool does not answer.
            ArenaError: its memory cannot be mapped.

        """
        async with self._lock:
            if self._arena is None or self._generation != lease.pool_generation or self._arena.stale:
                await self._renew()
            if self._arena is None or self._generation != lease.pool_generation:
                raise LeaseGoneError(
                    f"{self._client.pool} is at generation {self._generation}, the block is of {lease.pool_generation}"
                )
            try:
                return self._arena.tensor(lease.offset, nbytes)
            except ArenaError as error:
                raise LeaseGoneError(str(error)) from error

    async def open(self) -> None:
        """Map the pool's memory. Raises BusError and ArenaError."""
        async with self._lock:
            await self._renew()

    async def _renew(self) -> None:
        found = await self._client.describe()
        if self._arena is not None and found.generation == self._generation and not self._arena.stale:
            return
        await self._unmap()
        arena = await asyncio.to_thread(Arena.attach, ArenaAddress.parse(found.arena))
        await self._on_map(arena)
        self._arena, self._generation = arena, found.generation
        self._actor.spawn(self._watch(arena), name=f"watch the memory of {self._client.pool}")

    async def _watch(self, arena: Arena) -> None:
        await arena.until_stale()
        async with self._lock:
            if self._arena is arena:
                await self._unmap()

    async def _unmap(self) -> None:
        # What is computed from it meanwhile has views of its own, which keep it mapped until they are gone.
        old, self._arena = self._arena, None
        if old is not None:
            await self._on_unmap(old)
