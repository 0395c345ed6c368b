"""A role instance: registers with the head, takes attempts under its own credits, and reports how each ends.

The `AttemptTracker` decides; the instance sends and receives the messages. The process also has the stream worker,
which computes, and the transfer actor, which moves tensors; the three pass each attempt on to each other, and the last
one has the instance report its end.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import time
from typing import Final

from triptych.actors import Actor, Component, DeferredReply, Topology
from triptych.actors.child_state import ChildState
from triptych.actors.topology import agreement
from triptych.backoff import backoff_s
from triptych.bus import (
    BusError,
    HandshakeRefusedError,
    MailboxFullError,
    Message,
    Reference,
    RefusedError,
    RemoteError,
)
from triptych.roles.media.location import has_store
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import PoolFull, ReleaseBlocks, ReleasePreallocated
from triptych.roles.messages.stages import (
    HEAD_ANSWER_S,
    Acknowledged,
    AttemptQuery,
    AttemptsAssigned,
    BlocksOffered,
    Hello,
    InstanceHeartbeat,
    InstanceRegistered,
    InstanceStopping,
    RegisterInstance,
    StageAssign,
    StageCancel,
    StagePark,
    StageTaken,
    TransferAlloc,
    TransferAllocated,
    TransferPush,
    TransferRejected,
)
from triptych.roles.messages.worker import DeviceLost, SetWeightsLoaded
from triptych.roles.pool.client import PoolClient, pool_full_reason
from triptych.roles.timeline import timeline_of
from triptych.roles.trace_exporter import exporter_of
from triptych.roles.worker.attempts import AttemptRefusedError, EndReport
from triptych.roles.worker.preallocation import Preallocation
from triptych.roles.worker.process_context import STREAM, TRANSFER, ProcessContext
from triptych.roles.worker.reporter import FencedError, is_fenced

LAST_REPORTS_S: Final = 2.0
"""Seconds to deliver the last reports once the device is lost: the supervisor waits to start the next process."""
HAND_BACK_FACTOR: Final = 1.25
"""Multiple of `shutdown_s`: on shutdown, an attempt that would take longer is returned to the head at once."""
DRAIN_SHARE: Final = 0.7
"""Share of `shutdown_s` after which unfinished attempts are returned to the head."""


class DeviceLostError(Exception):
    """This process cannot compute on its device any more."""


def build(component: Component, topology: Topology) -> list[Actor]:
    """Make the three actors of a role process, and those that write its timeline if the topology asks for it."""
    from triptych.roles.worker.stream_worker import StreamWorker
    from triptych.roles.worker.transfer import TransferActor

    timeline, writers = timeline_of(component, topology, exporter_of(component, topology))
    context = ProcessContext(component, timeline, fetches_uploads=not has_store(component, topology))
    return [
        Instance(component, topology, context),
        StreamWorker(component, topology, context),
        TransferActor(component, topology, context),
        *writers,  # last: it stops when the others have
    ]


class Instance(Actor):
    """The first actor of a role process: an encoder, denoiser, decoder, or all of them in one."""

    def __init__(self, component: Component, topology: Topology, context: ProcessContext) -> None:
        super().__init__(component.name)
        self.component = component
        self.context = context
        self.attempts = context.attempts
        self.reporter = context.reporter
        self._hello = Hello(importlib.metadata.version("triptych"), agreement(topology, component.name), component.host)
        self._shutdown_s = topology.supervision.shutdown_s
        self._heartbeat_every_s = topology.supervision.heartbeat_s
        self._host_lost_s = topology.supervision.host_lost_s
        self._client = PoolClient(self, component.pool, component.name)
        self._preallocation = Preallocation(topology.transfer.preallocated_slots)
        self._replenishing = asyncio.Lock()
        self._process = {component.name + STREAM, component.name + TRANSFER}
        context.end_attempt = self._end_attempt
        context.tell_head = self._tell_head
        self._draining = False
        self._leaving = False
        self._awake_target: bool | None = None
        """What the weights are changing to: True for awake, False for asleep; None while they do not change."""
        elsewhere = topology.head_host if topology.head_host != component.host else ""
        self._waiting = f"waiting for the head on host {elsewhere}" if elsewhere else "waiting for the head"
        self._idle = asyncio.Event()
        self._head_away = asyncio.Event()
        self._head_away.set()

    async def started(self) -> None:
        """Wait for the model and the pool, then register with the head as soon as there is one."""
        await self.context.until_ready()
        self.set_state(ChildState.JOINING, self._waiting)
        self.spawn(self.reporter.run(self._deliver), name="reports")
        self.spawn(self._stay_registered(), name="head")

    async def stopping(self) -> None:
        """Take no more attempts; finish those that end in time, and return the rest if the head is there."""
        self._draining = self._leaving = True
        self.reporter.add(InstanceStopping())
        self._carry_out(self.attempts.return_to_head(HAND_BACK_FACTOR * self._shutdown_s))
        ends = [asyncio.ensure_future(self._drained()), asyncio.ensure_future(self._head_away.wait())]
        try:
            first = asyncio.FIRST_COMPLETED
            ended, _ = await asyncio.wait(ends, timeout=DRAIN_SHARE * self._shutdown_s, return_when=first)
            if not ended:
                self._carry_out(self.attempts.return_to_head(None))
                await asyncio.wait(ends, return_when=first)
        finally:
            for end in ends:
                end.cancel()

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return the numbers of credits, attempts, reservations and reports."""
        load = self.attempts
        return {
            "slots": load.slots,
            "credits": load.issued - load.taken,
            "active": len(load.active),
            "taken": load.taken,
            "reserved": len(load.reservations),
            "reports_pending": len(self.reporter.pending),
            "reports_given_up": self.reporter.dropped,
        }

    # -- from the head

    async def assign(self, message: StageAssign) -> StageTaken:
        """Take a job at its first stage."""
        self._refuse_when_draining()
        try:
            self._carry_out(self.attempts.assign(message, time.monotonic()))
        except AttemptRefusedError as reason:
            raise RefusedError(reason.code, str(reason)) from reason
        return StageTaken(message.attempt)

    async def allocate(self, message: TransferAlloc) -> DeferredReply[TransferAllocated | TransferRejected]:
        """Reserve a block in this instance's pool."""
        self._refuse_when_draining()
        return DeferredReply(self._allocate(message))

    async def push(self, message: TransferPush) -> StageTaken:
        """Take a job that starts from stored tensors."""
        self._refuse_when_draining()
        preallocated = message.target if self._preallocation.use(message.target) else None
        if preallocated:
            self.spawn(self._replenish(), name="replenish")
        try:
            self._carry_out(self.attempts.push(message, time.monotonic(), preallocated=preallocated is not None))
        except AttemptRefusedError as reason:
            if preallocated:  # the head has removed it from its list, and will never use it again
                self._client.release(preallocated)
            raise RefusedError(reason.code, str(reason)) from reason
        return StageTaken(message.attempt)

    async def sleep(self, _: stages.Sleep) -> Acknowledged:
        """Release the weights."""
        if self.attempts.active or self.attempts.reservations:
            raise RefusedError("busy", f"{self.name} has attempts assigned")
        self._set_awake(awake=False)
        return Acknowledged()

    async def wake(self, _: stages.Wake) -> Acknowledged:
        """Load the weights again."""
        self._set_awake(awake=True)
        return Acknowledged()

    async def release_preallocated(self, _: ReleasePreallocated) -> None:
        """Release the preallocated blocks: the pool has no block for an arrival.

        An attempt that the head pushed into one of them meanwhile is refused, and the head pushes it again.
        """
        for block in self._drop_preallocated():
            self._client.release(block)

    def _drop_preallocated(self) -> tuple[LeaseRef, ...]:
        preallocated = tuple(self._preallocation.clear())
        self._offer()
        return preallocated

    async def assigned(self, message: AttemptQuery) -> AttemptsAssigned:
        """Return which of the attempts this instance has; their blocks must be kept."""
        load = self.attempts
        return AttemptsAssigned(
            tuple(
                attempt
                for attempt in message.attempts
                if attempt in load.active or attempt in load.reservations or attempt in load.previews
            )
        )

    async def cancel(self, message: StageCancel) -> None:
        """Stop an attempt within one step."""
        self.log.info("cancelled", attempt=str(message.attempt), reason=message.reason)
        self._drop(message.attempt)

    async def park(self, message: StagePark) -> None:
        """Give a denoise back for a more urgent job."""
        self.log.info("to be parked", attempt=str(message.attempt))
        self._carry_out(self.attempts.park(message.attempt))
        if message.attempt not in self.attempts.active:
            self._client.undo(message.attempt)

    # -- from this process

    async def device_lost(self, message: DeviceLost) -> None:
        """End this process, which cannot compute any more."""
        self._check_sender()
        self._draining = True
        self._carry_out(self.attempts.return_to_head(None))
        self.spawn(self._end(message.error), name="end")

    async def wake_changed(self, message: stages.InstanceWakeChanged) -> None:
        """Tell the head whether the weights are in memory now."""
        self._check_sender()
        self._awake_target = None
        self.reporter.add(message)
        if not self._head_away.is_set():
            self._show_wake_state()

    def _check_sender(self) -> None:
        """Raise RefusedError unless an actor of this process sent the message."""
        if self.sender.name not in self._process:
            raise RefusedError("forbidden", f"{self.sender.name} is not an actor of {self.name}")

    # -- carrying out

    def _end_attempt(self, report: EndReport) -> None:
        self._carry_out(self.attempts.end(report))

    def _carry_out(self, messages: tuple[Message, ...]) -> None:
        """Send each message of the tracker to its receiver."""
        for message in messages:
            match message:
                case ReleaseBlocks(leases):
                    for lease in leases:
                        self._client.release(lease)
                case _ if isinstance(message, EndReport):
                    self.reporter.add(message)
                case _:
                    self.context.pass_on(self, message)
        if not self.attempts.active:
            self._idle.set()

    def _tell_head(self, message: Message) -> None:
        """Tell the head what a later message says again, or the next registration."""
        if self._head_away.is_set():
            return
        try:
            self.reference("head").tell(message)
        except MailboxFullError:
            self.log.debug("not told", message=type(message).__name__)

    def _drop(self, attempt: Attempt) -> None:
        self._carry_out(self.attempts.cancel(attempt))
        self._client.undo(attempt)

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise RefusedError("draining", f"{self.name} is draining and takes no more attempts")
        if self._awake_target is not None or not self.context.awake:
            raise RefusedError("asleep", f"{self.name} has no weights in memory")

    def _set_awake(self, *, awake: bool) -> None:
        """Tell the stream worker to load or release the weights; no-op where it does so already."""
        if awake == (self.context.awake if self._awake_target is None else self._awake_target):
            return
        self._awake_target = awake
        if not awake:
            for block in self._drop_preallocated():
                self._client.release(block)
        self.set_state(ChildState.WAKING if awake else ChildState.ASLEEP)
        self.context.pass_on(self, SetWeightsLoaded(awake))

    async def _allocate(self, message: TransferAlloc) -> TransferAllocated | TransferRejected:
        attempt = message.attempt
        if not self.attempts.can_reserve(attempt):
            return TransferRejected(attempt, f"every block of {self.name} is in use", True)
        try:
            answer = await self._client.lease(attempt, message.nbytes, incoming=True)
        except BusError as error:
            return TransferRejected(attempt, f"{self.component.pool}: {error}", True)
        if isinstance(answer, PoolFull):
            return TransferRejected(
                attempt, pool_full_reason(self.component.pool, answer), answer.needed <= answer.largest
            )
        try:
            self._carry_out(self.attempts.reserve(attempt, answer))
        except AttemptRefusedError as reason:
            self._client.release(answer)
            raise RefusedError(reason.code, str(reason)) from reason
        for small in self._preallocation.require(message.nbytes):
            self._client.release(small)
        self.spawn(self._replenish(), name="replenish")
        return TransferAllocated(attempt, answer)

    async def _replenish(self) -> None:
        """Preallocate blocks until there are enough or the pool is full, and tell the head."""
        async with self._replenishing:
            while self._preallocation.wanted and not self._draining:
                attempt = self._preallocation.next_attempt()
                try:
                    answer = await self._client.lease(attempt, self._preallocation.nbytes, incoming=True)
                except BusError as error:
                    self._client.undo(attempt)
                    self.log.info("no block preallocated", error=str(error))
                    break
                if isinstance(answer, PoolFull):
                    break
                self._preallocation.add(answer)
            self._offer()

    def _offer(self) -> None:
        self._tell_head(BlocksOffered(tuple(self._preallocation.blocks)))

    async def _drained(self) -> None:
        while self.attempts.active:
            self._idle.clear()
            await self._idle.wait()
        await self.reporter.flushed()

    async def _end(self, error: str) -> None:
        """End this process once the head has the last reports and the other attempts."""
        try:
            async with asyncio.timeout(LAST_REPORTS_S):
                await self._drained()
        except TimeoutError:
            self.log.warning("the head was not told of the lost device", error=error)
        raise DeviceLostError(f"{self.component.device} cannot be used by this process any more: {error}")

    # -- the head

    async def _deliver(self, report: Message) -> None:
        await self.reference("head").ask(report, Acknowledged, timeout_s=HEAD_ANSWER_S)

    async def _stay_registered(self) -> None:
        """Register with the head, and with each one that replaces it; never returns."""
        head = self.reference("head")
        stopping = self.spawn(self._stop_without_head(), name="host lost")
        while True:
            # Watch before asking, so that the end of the head right after its answer is not missed.
            lost = self.spawn(head.down(), name="head down")
            registered = await self._register(head)
            stopping.cancel()
            for attempt in registered.unknown:
                self._drop(attempt)
            self._head_away.clear()
            for started in self.attempts.begun():  # which the head before may not have written down
                self._tell_head(started)
            self.reporter.resume()
            self._offer()
            self._show_wake_state()
            self.log.info("joined", unknown=len(registered.unknown))
            await self._send_heartbeats(head, lost)
            self._head_away.set()
            self.reporter.pause()
            self._show_state(ChildState.JOINING, self._waiting)
            self._client.undo_all()
            self._carry_out(self.attempts.drop_reservations())
            stopping = self.spawn(self._stop_without_head(), name="host lost")

    async def _stop_without_head(self) -> None:
        """Stop computing once the head has been away for `[supervision] host_lost_s`; it gets the attempts back."""
        await asyncio.sleep(self._host_lost_s)
        if self.attempts.active:
            self.log.warning("the head is away: attempts are stopped", seconds=self._host_lost_s)
            self._carry_out(self.attempts.return_to_head(None))

    async def _register(self, head: Reference) -> InstanceRegistered:
        tries = 0
        while True:
            try:
                await head.ask(self._hello, Acknowledged, timeout_s=HEAD_ANSWER_S)
                return await head.ask(self._registration(), InstanceRegistered, timeout_s=HEAD_ANSWER_S)
            except BusError as error:
                if is_fenced(error):
                    raise FencedError(f"the head has given this incarnation up ({error})") from error
                self.log.info("not joined yet", error=str(error))
                self._show_state(ChildState.JOINING, _why_not_joined(error) or self._waiting)
            await asyncio.sleep(backoff_s(tries))
            tries += 1

    def _registration(self) -> RegisterInstance:
        load = self.attempts
        return RegisterInstance(
            name=self.name,
            kind=self.component.kind,
            generation=self.generation,
            pid=os.getpid(),
            slots=load.slots,
            issued=load.issued,
            taken=load.taken,
            pool=self.component.pool,
            signature=self.context.signature,
            # An attempt whose end is not reported yet counts as assigned, so that it is not repeated.
            running=tuple(dict.fromkeys((*load.assigned, *self.reporter.attempts))),
            leaving=self._leaving,
            model=self.context.model,
            awake=self.context.awake and self._awake_target is None,
            device=self.context.device,
            weights=self.context.weights,
            max_batch=self.component.max_batch,
            stores_checkpoints=self.component.checkpoint_s > 0,
        )

    async def _send_heartbeats(self, head: Reference, lost: asyncio.Task[None]) -> None:
        """Send heartbeats until the head has ended."""
        while True:
            await asyncio.wait({lost}, timeout=self._heartbeat_every_s)
            if lost.done():
                return
            try:
                alive = InstanceHeartbeat(self.context.trouble)
                await head.ask(alive, Acknowledged, timeout_s=HEAD_ANSWER_S)
            except RemoteError as error:
                if is_fenced(error):
                    raise FencedError(f"the head has given this incarnation up ({error})") from error
                if error.code == "unknown":
                    lost.cancel()
                    return
                self.log.warning("heartbeat refused", error=str(error))
            except BusError as error:
                self.log.info("heartbeat not answered", error=str(error))

    def _show_wake_state(self) -> None:
        turning = None if self._awake_target is None else ChildState.WAKING if self._awake_target else ChildState.ASLEEP
        self._show_state(turning or (ChildState.READY if self.context.awake else ChildState.ASLEEP))

    def _show_state(self, state: ChildState, detail: str = "") -> None:
        if not self._draining:
            self.set_state(state, detail)


def _why_not_joined(error: BusError) -> str:
    """Return why an instance waits for the head, "" where that has only not come yet."""
    if isinstance(error, HandshakeRefusedError):
        return str(error)
    return error.detail if isinstance(error, RemoteError) else ""
