"""A role instance: registers with the head, takes attempts under its own credits, and reports how each ends.

The decisions are the `AttemptTracker`'s; here they meet the bus. Beside it in the process are the stream worker, which
computes, and the transfer actor, which moves tensors; they pass each attempt on to each other and back to here.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Final

from triptych.actors import Actor, Component, DeferredReply, Topology
from triptych.actors.child_state import ChildState
from triptych.backoff import backoff_s
from triptych.bus import BusError, MailboxFullError, Message, Reference, RefusedError, RemoteError
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import PoolFull, ReleaseBlocks, ReleasePreallocated
from triptych.roles.messages.stages import (
    HEAD_ANSWER_S,
    Acknowledged,
    AttemptQuery,
    AttemptsAssigned,
    BlocksOffered,
    InstanceHeartbeat,
    InstanceRegistered,
    InstanceStopping,
    RegisterInstance,
    StageAssign,
    StageCancel,
    StageTaken,
    TransferAlloc,
    TransferAllocated,
    TransferPush,
    TransferRejected,
)
from triptych.roles.messages.worker import DeviceLost, SetWeightsLoaded
from triptych.roles.pool.client import PoolClient, pool_full_reason
from triptych.roles.worker.attempts import AttemptRefusedError, EndReport
from triptych.roles.worker.preallocation import Preallocation
from triptych.roles.worker.process_context import STREAM, TRANSFER, ProcessContext
from triptych.roles.worker.reporter import FencedError, is_fenced

LAST_REPORTS_S: Final = 2.0
"""Seconds to deliver the last reports once the device is lost: the supervisor waits to start the next process."""
HAND_BACK_FACTOR: Final = 1.25
"""Times `shutdown_s`: what will take longer is given back at once when this instance is asked to end."""
DRAIN_SHARE: Final = 0.7
"""Of `shutdown_s`: what is not done by then is given back."""


class DeviceLostError(Exception):
    """Nothing can be computed on the device any more by this process."""


def build(component: Component, topology: Topology) -> list[Actor]:
    """Make the three actors of a role process."""
    from triptych.roles.worker.stream_worker import StreamWorker
    from triptych.roles.worker.transfer import TransferActor

    context = ProcessContext(component)
    return [
        Instance(component, topology, context),
        StreamWorker(component, topology, context),
        TransferActor(component, topology, context),
    ]


class Instance(Actor):
    """The first actor of a role process: an encoder, denoiser, decoder, or all of them in one."""

    def __init__(self, component: Component, topology: Topology, context: ProcessContext) -> None:
        super().__init__(component.name)
        self.component = component
        self.context = context
        self.attempts = context.attempts
        self.reporter = context.reporter
        self._shutdown_s = topology.supervision.shutdown_s
        self._heartbeat_every_s = topology.supervision.heartbeat_s
        self._client = PoolClient(self, component.pool, component.name)
        self._preallocation = Preallocation(topology.transfer.preallocated_slots)
        self._replenishing = asyncio.Lock()
        self._process = {component.name + STREAM, component.name + TRANSFER}
        self._draining = False
        self._leaving = False
        self._awake_target: bool | None = None
        """Whether it is on its way to be awake, or to be asleep."""
        self._idle = asyncio.Event()
        self._head_away = asyncio.Event()
        self._head_away.set()

    async def started(self) -> None:
        """Wait for the model and the pool, then offer itself to the head, whenever that comes."""
        await self.context.until_ready()
        self.set_state(ChildState.JOINING, "waiting for the head")
        self.spawn(self.reporter.run(self._deliver), name="reports")
        self.spawn(self._stay_registered(), name="head")

    async def stopping(self) -> None:
        """Take nothing more; finish what can be in time, give back the rest, if there is a head to take it."""
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
        """Credits, and the attempts that are assigned."""
        load = self.attempts
        return {
            "slots": load.slots,
            "credits": load.issued - load.taken,
            "in_hand": len(load.active),
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
        """Reserve a block in the own pool."""
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
            if preallocated:  # the head has crossed it off, and would never name it again
                self._client.release(preallocated)
            raise RefusedError(reason.code, str(reason)) from reason
        return StageTaken(message.attempt)

    async def sleep(self, _: stages.Sleep) -> Acknowledged:
        """Let go of the weights."""
        if self.attempts.active or self.attempts.reservations:
            raise RefusedError("busy", f"{self.name} has attempts assigned")
        self._set_awake(awake=False)
        return Acknowledged()

    async def wake(self, _: stages.Wake) -> Acknowledged:
        """Bring the weights back."""
        self._set_awake(awake=True)
        return Acknowledged()

    async def release_preallocated(self, _: ReleasePreallocated) -> None:
        """Give back the blocks that are kept ready: some arrival has no room.

        What the head has sent into one of them meanwhile is not taken, and is sent again.
        """
        for block in self._drop_preallocated():
            self._client.release(block)

    def _drop_preallocated(self) -> tuple[LeaseRef, ...]:
        preallocated = tuple(self._preallocation.clear())
        self._offer()
        return preallocated

    async def assigned(self, message: AttemptQuery) -> AttemptsAssigned:
        """Say which attempts this instance has, whose blocks must be kept."""
        load = self.attempts
        return AttemptsAssigned(
            tuple(attempt for attempt in message.attempts if attempt in load.active or attempt in load.reservations)
        )

    async def cancel(self, message: StageCancel) -> None:
        """Stop an attempt within one step."""
        self.log.info("cancelled", attempt=str(message.attempt), reason=message.reason)
        self._drop(message.attempt)

    # -- from this process

    async def attempt_ended(self, report: EndReport) -> None:
        """Report the end of an attempt, which gives its credit back."""
        self._check_sender()
        self._carry_out(self.attempts.end(report))

    async def device_lost(self, message: DeviceLost) -> None:
        """End this process: it can compute nothing more."""
        self._check_sender()
        self._draining = True
        self._carry_out(self.attempts.return_to_head(None))
        self.spawn(self._end(message.error), name="end")

    async def wake_changed(self, message: stages.InstanceWakeChanged) -> None:
        """Tell the head that the weights are there, or are not any more."""
        self._check_sender()
        self._awake_target = None
        self.reporter.add(message)
        if not self._head_away.is_set():
            self._show_wake_state()

    def _check_sender(self) -> None:
        """Raise RefusedError for what only an actor of this process may say."""
        if self.sender.name not in self._process:
            raise RefusedError("forbidden", f"{self.sender.name} is no actor of {self.name}")

    # -- carrying out

    def _carry_out(self, messages: tuple[Message, ...]) -> None:
        """Send each message that the tracker has decided on to whom it is for."""
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
        if self._head_away.is_set():
            return
        try:
            self.reference("head").tell(message)
        except MailboxFullError:  # the next one makes up for it
            self.log.debug("not told", message=type(message).__name__)

    def _drop(self, attempt: Attempt) -> None:
        self._carry_out(self.attempts.cancel(attempt))
        self._client.undo(attempt)

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise RefusedError("draining", f"{self.name} takes nothing more")
        if self._awake_target is not None or not self.context.awake:
            raise RefusedError("asleep", f"{self.name} has no weights in memory")

    def _set_awake(self, *, awake: bool) -> None:
        """Have the stream worker bring the weights, or let go of them; nothing where it does already."""
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
        """Lease blocks ahead of time, as many as there is room for, and tell the head."""
        async with self._replenishing:
            while self._preallocation.wanted and not self._draining:
                attempt = self._preallocation.next_attempt()
                try:
                    answer = await self._client.lease(attempt, self._preallocation.nbytes, incoming=True)
                except BusError as error:
                    self._client.undo(attempt)
                    self.log.info("no block to keep ready", error=str(error))
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
        """End this process once the head knows why, and has back what else was assigned."""
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
        """Stay registered with whichever head there is, for ever."""
        head = self.reference("head")
        while True:
            # Watched before it is asked, so that a death right after its answer is not missed.
            lost = self.spawn(head.down(), name="head down")
            registered = await self._register(head)
            for attempt in registered.unknown:
                self._drop(attempt)
            self.reporter.resume()
            self._head_away.clear()
            self._offer()
            self._show_wake_state()
            self.log.info("joined", unknown=len(registered.unknown))
            await self._send_heartbeats(head, lost)
            self._head_away.set()
            self.reporter.pause()
            self._show_state(ChildState.JOINING, "waiting for the head")
            self._client.undo_all()
            self._carry_out(self.attempts.drop_reservations())

    async def _register(self, head: Reference) -> InstanceRegistered:
        tries = 0
        while True:
            try:
                return await head.ask(self._registration(), InstanceRegistered, timeout_s=HEAD_ANSWER_S)
            except BusError as error:
                if is_fenced(error):
                    raise FencedError(f"the head has given this incarnation up ({error})") from error
                self.log.info("not joined yet", error=str(error))
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
            # What has ended without the head knowing it counts as assigned: it need not be done again.
            running=tuple(dict.fromkeys((*load.assigned, *self.reporter.attempts))),
            leaving=self._leaving,
            model=self.context.model,
            awake=self.context.awake and self._awake_target is None,
            device=self.context.device,
            weights=self.context.weights,
        )

    async def _send_heartbeats(self, head: Reference, lost: asyncio.Task[None]) -> None:
        """Send heartbeats until the head is gone."""
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
                self.log.warning("heartbeat not taken", error=str(error))
            except BusError as error:
                self.log.info("heartbeat not answered", error=str(error))

    def _show_wake_state(self) -> None:
        turning = None if self._awake_target is None else ChildState.WAKING if self._awake_target else ChildState.ASLEEP
        self._show_state(turning or (ChildState.READY if self.context.awake else ChildState.ASLEEP))

    def _show_state(self, state: ChildState, detail: str = "") -> None:
        if not self._draining:
            self.set_state(state, detail)
