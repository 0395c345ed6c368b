"""`Runtime`: the actors of one process, from start to drain."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any, Self

import structlog

from triptych.actors.child_state import ChildState
from triptych.actors.errors import ActorCrashedError
from triptych.actors.runtime._actor_cell import ActorCell
from triptych.actors.runtime.heartbeat import Heartbeat
from triptych.actors.runtime.metrics import REGISTRY, actor_metrics, exposition
from triptych.actors.runtime.system_messages import (
    ActorStatus,
    Inspect,
    Inspection,
    MetricsQuery,
    MetricsReport,
    Shutdown,
    ShuttingDown,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from triptych.actors.runtime.actor import Actor, Incarnation
    from triptych.bus import Delivery, Mailbox

_log = structlog.stdlib.get_logger("actors")


class Runtime:
    """Runs several actors on the current loop; the first one gives the process its name.

    Either `await runtime.run()`, which returns after a stop has been asked for, or `async with runtime:` around
    other code. All mailboxes are open before any actor starts, and the actors start concurrently, so they may ask
    each other.

    Args:
        actors: each runs at most once; the address book has their addresses by name.
        incarnation: of their component.
        supervisor: name of the supervisor to report to, "" for none.
        shutdown_s: bound in seconds of the drain, None for no bound.
        heartbeat_s: seconds between two heartbeats.
        import_s: seconds from the start of this process until the actors were made.
    """

    def __init__(
        self,
        actors: Sequence[Actor],
        incarnation: Incarnation,
        *,
        supervisor: str = "",
        shutdown_s: float | None = 10.0,
        heartbeat_s: float = 1.0,
        import_s: float = 0.0,
    ) -> None:
        self.actors = tuple(actors)
        self._incarnation = incarnation
        self._shutdown_s = shutdown_s
        self._import_s = import_s
        self._started_at = time.monotonic()
        self._stop_reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        local: dict[str, Mailbox] = {}
        self._cells = [
            ActorCell(actor, incarnation, local=local, on_system=self._answer_system_message, on_crash=self._on_crash)
            for actor in self.actors
        ]
        self.heartbeat: Heartbeat | None = None
        if supervisor:
            self.heartbeat = Heartbeat(self.actors, supervisor, heartbeat_s, on_crash=self._on_crash)

    async def run(self) -> None:
        """Start, serve until `stop` is called or a `Shutdown` comes, drain.

        Raises `StartError` when an actor cannot start, `StartDelayedError` when it cannot now, such as when the address
        of its mailbox is taken, and `ActorCrashedError` when one crashes.
        """
        async with self:
            await self.wait()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._has_crashed():
                await self._drain()
        finally:
            await self._close()
        if error is None:
            self._raise_crash()

    async def wait(self) -> str:
        """Wait until the runtime is to stop and return the reason; raises `ActorCrashedError`."""
        return await asyncio.shield(self._stop_reason)

    def stop(self, reason: str) -> None:
        """Begin to drain, as after SIGTERM; only the first reason counts."""
        if not self._stop_reason.done():
            _log.info("stopping", reason=reason)
            self._stop_reason.set_result(reason)

    def inspection(self) -> Inspection:
        """Return the status of every actor."""
        return Inspection(tuple(self._status(cell) for cell in self._cells))

    def metrics(self) -> str:
        """Return the metrics of this process, in Prometheus' text format."""
        own = (family for actor in self.actors for family in actor.metrics())
        return exposition([*REGISTRY.collect(), *own, *actor_metrics(self.inspection().actors)])

    async def _start(self) -> None:
        for cell in self._cells:
            await cell.open()
        if self.heartbeat is not None:
            self.heartbeat.start()
        starting = asyncio.ensure_future(_start_all(self._cells))
        first: set[asyncio.Future[Any]] = {starting, self._stop_reason}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        else:  # asked to stop, or crashed, while loading: what it loads is of no use any more
            starting.cancel()
            await asyncio.wait({starting})
        self._raise_crash()
        if self.heartbeat is not None and not self._stop_reason.done():
            parts = {part: seconds for actor in self.actors for part, seconds in actor.start_s.items()}
            start_s = time.monotonic() - self._started_at
            self.heartbeat.started({"import": self._import_s, "start": start_s, **parts})

    async def _drain(self) -> None:
        if not self._stop_reason.done():
            self._stop_reason.set_result("left")
        for cell in self._cells:
            cell.actor.set_state(ChildState.DRAINING)
        try:
            async with asyncio.timeout(self._shutdown_s):
                for cell in self._cells:
                    if cell.started:
                        await self._stop_one(cell.actor)
        except TimeoutError:
            _log.warning("not drained in time", shutdown_s=self._shutdown_s)

    async def _stop_one(self, actor: Actor) -> None:
        try:
            await actor.stopping()
        except Exception as error:  # noqa: BLE001  logged; the other actors still have to drain
            self._on_crash(actor, error)

    async def _close(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.stop()
        for cell in reversed(self._cells):
            await cell.close()
        if not self._stop_reason.done():
            self._stop_reason.cancel()

    def _answer_system_message(self, cell: ActorCell, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, Inspect):
            delivery.reply(self.inspection())
        elif isinstance(message, MetricsQuery):
            delivery.reply(MetricsReport(self.metrics()))
        elif isinstance(message, Shutdown):
            delivery.reply(ShuttingDown())
            self.stop(f"shutdown asked of {cell.actor.name}: {message.reason}")

    def _on_crash(self, actor: Actor, error: BaseException) -> None:
        crash = ActorCrashedError(actor.name, error)
        crash.__cause__ = error
        if self._stop_reason.done():  # it drains already, or another one was first
            _log.error("crashed while ending", actor=actor.name, exc_info=error)
            return
        self._stop_reason.set_exception(crash)

    def _has_crashed(self) -> bool:
        return (
            self._stop_reason.done() and not self._stop_reason.cancelled() and self._stop_reason.exception() is not None
        )

    def _raise_crash(self) -> None:
        if self._has_crashed():
            self._stop_reason.result()

    def _status(self, cell: ActorCell) -> ActorStatus:
        actor = cell.actor
        return ActorStatus(
            name=actor.name,
            kind=self._incarnation.kind,
            pid=os.getpid(),
            generation=actor.generation,
            state=actor.state,
            detail=actor.detail,
            restarts=actor.restarts,
            uptime_s=time.monotonic() - self._started_at,
            mailbox_depth=cell.mailbox.depth,
            mailbox_capacity=actor.mailbox_capacity,
            dead_letters=cell.mailbox.dead_letters.count + actor.outbox.dead_letters.count,
            facts=actor.stats(),
        )


async def _start_all(cells: list[ActorCell]) -> None:
    starting = [asyncio.ensure_future(cell.start()) for cell in cells]
    try:
        for first in asyncio.as_completed(starting):
            await first
    finally:
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
