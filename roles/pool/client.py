"""The client of a buffer pool: leases blocks, and maps the memory of the pool."""

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
"""Most blocks that one message releases."""
AHEAD: Final = 1
"""`LeaseBlock.number` of a block that is leased while its bytes are still computed."""
RESUMED: Final = 2
"""`LeaseBlock.number` of a block for a checkpoint that comes from another pool."""
FAULTS: Final = "TRIPTYCH_TRANSFER_FAULTS"
"""Environment variable that makes transfers fail in tests, as `engines.transfer.FaultRates` reads it."""


def pool_full_reason(pool: str, full: PoolFull) -> str:
    """Return why a pool has no block of that size: now, or ever."""
    if full.needed > full.largest:
        return f"needs {full.needed} bytes, {pool} gives at most {full.largest}: raise [transfer] pool_size"
    return f"{pool} has no block of {full.needed} bytes, {full.free} are free"


class LeaseGoneError(Exception):
    """The block belongs to an earlier incarnation of the pool, whose memory is gone."""


class PoolClient:
    """Leases, seals and releases blocks for one actor. Each call raises FencedError when the pool has fenced the actor.

    Args:
        actor: Sends the messages.
        pool: Name of the pool.
        owner: The component whose end frees the blocks that it was writing.
    """

    def __init__(self, actor: Actor, pool: str, owner: str) -> None:
        self.pool = pool
        self._actor = actor
        self._owner = owner
        self._unanswered: dict[tuple[Attempt, int], LeaseBlock] = {}
        self._unreleased: deque[LeaseRef] = deque()
        self._sealing: set[asyncio.Task[None]] = set()

    async def describe(self) -> PoolDescription:
        """Return where the pool's memory is. Raises BusError."""
        return await self._ask(PoolQuery(), PoolDescription)

    async def lease(
        self, attempt: Attempt, nbytes: int, *, incoming: bool = False, number: int = 0
    ) -> LeaseRef | PoolFull:
        """Lease a block for writing, again the same one until it is sealed: see `LeaseBlock`.

        Raises BusError: then call this again, or `undo`.
        """
        message = LeaseBlock(attempt, self._owner, self._actor.generation, nbytes, incoming, number)
        try:
            answer = await self._lease(message)
        except AskTimeoutError:
            self._unanswered[attempt, number] = message
            raise
        self._unanswered.pop((attempt, number), None)
        return answer.lease if isinstance(answer, BlockLeased) else answer

    async def lease_ahead(self, attempt: Attempt, nbytes: int) -> LeaseRef | None:
        """Lease a block for outputs of an attempt that are expected, if the pool has one and answers.

        It is another block than that of `lease`. One whose answer is lost is released on behalf of the head, when the
        attempt has ended.
        """
        try:
            answer = await self._lease(LeaseBlock(attempt, self._owner, self._actor.generation, nbytes, number=AHEAD))
        except BusError as error:
            self._actor.log.info("no block leased ahead", attempt=str(attempt), error=str(error))
            return None
        return answer.lease if isinstance(answer, BlockLeased) else None

    async def lease_checkpoint(self, attempt: Attempt, nbytes: int) -> LeaseRef | PoolFull:
        """Lease a block for a checkpoint, if the pool has one now: it is another block than that of `lease`.

        One whose answer is lost is leased again for the next checkpoint, or released on behalf of the head. Raises
        BusError.
        """
        answer = await self._lease(LeaseBlock(attempt, self._owner, self._actor.generation, nbytes, checkpoint=True))
        return answer.lease if isinstance(answer, BlockLeased) else answer

    def undo(self, attempt: Attempt, number: int = 0) -> None:
        """Release, in the background, a block that the pool may have leased although its answer was lost."""
        if message := self._unanswered.pop((attempt, number), None):
            self._actor.spawn(self._undo(message), name=f"undo {attempt}")

    def undo_all(self) -> None:
        """Undo every lease whose answer was lost."""
        for attempt, number in tuple(self._unanswered):
            self.undo(attempt, number)

    def seal(self, lease: LeaseRef, checksum: int, nbytes: int) -> None:
        """Seal a block in the background, however long the pool takes; `all_sealed` waits for it.

        The block may be reported meanwhile: if this process ends before, the pool seals the block for it.
        """
        sealing = self._actor.spawn(self._seal(SealBlock(lease, checksum, nbytes)), name="seal")
        self._sealing.add(sealing)
        sealing.add_done_callback(self._sealing.discard)

    async def all_sealed(self) -> None:
        """Return when every block has been sealed, or its pool has ended."""
        if self._sealing:
            await asyncio.wait(tuple(self._sealing))

    async def pull(self, attempt: Attempt, source: LeaseRef, target: LeaseRef, nbytes: int, timeout_s: float) -> float:
        """Make the pool copy another pool's block; return the seconds that it took. Raises BusError."""
        message = PullBlock(source, target, nbytes, timeout_s, attempt)
        return (await self._ask(message, BlockPulled, timeout_s=timeout_s + 4 * POOL_ANSWER_S)).seconds

    def release(self, lease: LeaseRef) -> None:
        """Release a block in the background, however long the pool takes."""
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
            try:
                await self._ask_until_answered(ReleaseBlocks(batch), BlocksReleased)
            except BusError:
                self._actor.log.exception("blocks not released", blocks=len(batch))
            for _ in batch:
                self._unreleased.popleft()

    async def _undo(self, message: LeaseBlock) -> None:
        """Release the block that `message` leased: asked again, the pool returns the same one."""
        try:
            answer = await self._ask_until_answered(message, BlockLeased, PoolFull)
        except BusError:
            self._actor.log.exception("block not released", attempt=str(message.attempt))
            return
        if isinstance(answer, BlockLeased):
            self.release(answer.lease)

    async def _seal(self, message: SealBlock) -> None:
        try:
            await self._ask_until_answered(message, BlockSealed)
        except BusError as error:  # it has been released, because its job has ended meanwhile, or its pool has
            self._actor.log.info("block not sealed", lease=message.lease.lease_id, error=str(error))

    async def _ask_until_answered(self, message: Message, *replies: type[R]) -> R | None:
        """Ask until the pool answers; return None when it has ended, and with it all its blocks.

        Raises:
            BusError: The pool refuses for good.
        """
        tries = failures = 0
        while True:
            try:
                return await self._ask(message, *replies)
            except UnreachableError:  # its process has ended, and freed all its blocks
                return None
            except BusError as error:
                failures += isinstance(error, RemoteError) and error.code == "handler_failed"
                if delivery_outcome(error, failures) is not DeliveryOutcome.RETRY:
                    raise
                self._actor.log.warning("asked again", asked=type(message).__name__, error=str(error))
            await asyncio.sleep(backoff_s(tries))
            tries += 1


class PoolMapping:
    """The mapping of the pool's memory in this process, renewed for each incarnation of the pool.

    It is unmapped as soon as the pool's process has ended: while it is mapped, the next pool may have too little memory
    to start.

    Args:
        actor: Its tasks watch the memory.
        client: The client of the pool.
        on_map: Prepares a new mapping for the device.
        on_unmap: Unmaps the memory of a pool that has ended.
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
            LeaseGoneError: The block belongs to an earlier incarnation of the pool, or lies outside its memory.
            BusError: The pool does not answer.
            ArenaError: The memory of the pool cannot be mapped.
        """
        if not self._maps(lease):
            async with self._lock:
                if not self._maps(lease):
                    await self._renew()
        if self._arena is None or self._generation != lease.pool_generation:
            raise LeaseGoneError(
                f"{self._client.pool} is at generation {self._generation}, the block is of {lease.pool_generation}"
            )
        try:
            return self._arena.tensor(lease.offset, nbytes)
        except ArenaError as error:
            raise LeaseGoneError(str(error)) from error

    def _maps(self, lease: LeaseRef) -> bool:
        return self._arena is not None and self._generation == lease.pool_generation and not self._arena.stale

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
        # Tensors that still use the memory are views of it, and keep it mapped until they are freed.
        old, self._arena = self._arena, None
        if old is not None:
            await self._on_unmap(old)
