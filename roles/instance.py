"""A role instance: offers itself to the head, takes work under its own credits, and reports how each piece ends.

The decisions are the workload's; here they meet the bus. Beside it in the process are the stream worker, which
computes, and the transfer actor, which moves tensors.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Final

from triptych.actors import Actor, Component, Later, Topology
from triptych.actors.actor import ASLEEP, READY
from triptych.bus import BusError, MailboxFull, Message, Reference, Refused, RemoteFailure
from triptych.roles import workload_effects as do
from triptych.roles.messages import device, stages
from triptych.roles.messages.pool import PoolFull, SparesWanted
from triptych.roles.messages.stages import (
    Acknowledged,
    InstanceAlive,
    InstanceHello,
    InstanceLeaving,
    InstanceWelcome,
    SlotsOffered,
    StageAssign,
    StageCancel,
    StageTaken,
    TransferAlloc,
    TransferAllocated,
    TransferPush,
    TransferRejected,
    WorkInHand,
    WorkQuery,
)
from triptych.roles.messages.work import LeaseRef, Work
from triptych.roles.pool_client import PoolClient, why_full
from triptych.roles.reporter import Fenced, Reporter, is_fence, pause_s
from triptych.roles.spares import Spares
from triptych.roles.workload import NotTaken, Workload
from triptych.roles.workspace import Premises

ANSWER_S: Final = 5.0
"""A head that is there acknowledges well within this."""
ALIVE_EVERY_S: Final = 1.0
LAST_REPORTS_S: Final = 2.0
CLEARLY: Final = 1.25
"""Times `shutdown_s`: what will take longer is given back at once when this instance is asked to end."""
LAST_CALL: Final = 0.7
"""Of `shutdown_s`: what is not done by then is given back."""
WAKING: Final = "waking"
"""The state of an instance that brings its weights into memory."""
JOINING: Final = "joining"
"""The state of an instance that could work and is not in the head's books."""


class DeviceLost(Exception):  # noqa: N818  names what happened
    """Nothing can be computed on the device any more by this process."""


def build(component: Component, topology: Topology) -> list[Actor]:
    """Make the three actors of a role process."""
    from triptych.roles.stream_worker import StreamWorker
    from triptych.roles.transfer import TransferActor

    premises = Premises()
    return [
        Instance(component, topology, premises),
        StreamWorker(component, topology, premises),
        TransferActor(component, topology, premises),
    ]


class Instance(Actor):
    """The first actor of a role process: an encoder, denoiser, decoder, or all of them in one."""

    def __init__(self, component: Component, topology: Topology, premises: Premises) -> None:
        super().__init__(component.name)
        self.component = component
        self.premises = premises
        self.workload = Workload(component.name, component.kind, component.slots)
        self.reporter = Reporter(self._deliver, self.log)
        self._shutdown_s = topology.supervision.shutdown_s
        self._alive_every_s = min(ALIVE_EVERY_S, topology.supervision.heartbeat_timeout_s / 4)
        self._client = PoolClient(self, component.pool, component.name)
        self._spares = Spares(topology.transfer.preallocated_slots)
        self._replenishing = asyncio.Lock()
        self._stream = f"{component.name}.stream"
        self._transfer = f"{component.name}.transfer"
        self._draining = False
        self._leaving = False
        self._turning: bool | None = None
        """Whether it is on its way to be awake, or to be asleep."""
        self._idle = asyncio.Event()
        self._away = asyncio.Event()
        self._away.set()

    async def started(self) -> None:
        """Wait for the model and the pool, then offer itself to the head, whenever that comes."""
        await self.premises.complete()
        self.set_state(JOINING, "waiting for the head")
        self.spawn(self.reporter.run(), name="reports")
        self.spawn(self._attend(), name="head")

    async def stopping(self) -> None:
        """Take nothing more; finish what can be in time, give back the rest, if there is a head to take it."""
        self._draining = self._leaving = True
        self.reporter.add(InstanceLeaving(self.name, self.generation))
        self._carry_out(self.workload.hand_back(CLEARLY * self._shutdown_s))
        ends = [asyncio.ensure_future(self._drained()), asyncio.ensure_future(self._away.wait())]
        try:
            first = asyncio.FIRST_COMPLETED
            ended, _ = await asyncio.wait(ends, timeout=LAST_CALL * self._shutdown_s, return_when=first)
            if not ended:
                self._carry_out(self.workload.hand_back(None))
                await asyncio.wait(ends, return_when=first)
        finally:
            for end in ends:
                end.cancel()

    def facts(self) -> dict[str, int | float | str | bool]:
        """Credits, and what is in hand."""
        load = self.workload
        return {
            "slots": load.slots,
            "credits": load.issued - load.taken,
            "in_hand": len(load.items),
            "taken": load.taken,
            "reserved": len(load.reservations),
            "reports_pending": len(self.reporter.pending),
            "reports_given_up": self.reporter.given_up,
            "workspace": len(self.premises.workspace),
        }

    # -- from the head

    async def assign(self, message: StageAssign) -> StageTaken:
        """Take a unit at its first panel."""
        self._refuse_when_draining()
        try:
            self._carry_out(self.workload.assign(message, time.monotonic()))
        except NotTaken as reason:
            raise Refused(reason.code, str(reason)) from reason
        return StageTaken(message.work)

    async def allocate(self, message: TransferAlloc) -> Later[TransferAllocated | TransferRejected]:
        """Reserve a slot in the own pool."""
        self._refuse_when_draining()
        return Later(self._allocate(message))

    async def push(self, message: TransferPush) -> StageTaken:
        """Take a unit that starts from staged tensors."""
        self._refuse_when_draining()
        spare = message.target if self._spares.use(message.target) else None
        if spare:
            self.spawn(self._replenish(), name="replenish")
        try:
            self._carry_out(self.workload.push(message, time.monotonic(), spare=spare is not None))
        except NotTaken as reason:
            if spare:  # the head has crossed it off, and would never name it again
                self._client.release(spare)
            raise Refused(reason.code, str(reason)) from reason
        return StageTaken(message.work)

    async def sleep(self, _: stages.Sleep) -> Acknowledged:
        """Let go of the weights."""
        if self.workload.items or self.workload.reservations:
            raise Refused("busy", f"{self.name} has work in hand")
        self._turn(awake=False)
        return Acknowledged()

    async def wake(self, _: stages.Wake) -> Acknowledged:
        """Bring the weights back."""
        self._turn(awake=True)
        return Acknowledged()

    async def spares_wanted(self, _: SparesWanted) -> None:
        """Give back the slots that are kept ready: some arrival has no room.

        What the head has sent into one of them meanwhile is not taken, and is sent again.
        """
        for slot in self._give_up_spares():
            self._client.release(slot)

    def _give_up_spares(self) -> tuple[LeaseRef, ...]:
        spares = tuple(self._spares.clear())
        self._offer()
        return spares

    async def in_hand(self, message: WorkQuery) -> WorkInHand:
        """Claim work, and with it what its slots are written for."""
        load = self.workload
        return WorkInHand(tuple(work for work in message.works if work in load.items or work in load.reservations))

    async def cancel(self, message: StageCancel) -> None:
        """Stop a piece of work within one step."""
        self.log.info("cancelled", work=str(message.work), reason=message.reason)
        self._drop(message.work)

    # -- from the stream worker

    async def panel_started(self, message: device.PanelStarted) -> None:
        """Pass on that a panel runs."""
        self._carry_out(self.workload.panel_started(message.work, message.panel, time.monotonic()))

    async def panel_stepped(self, message: device.PanelStepped) -> None:
        """Pass on that a step is done."""
        now = time.monotonic()
        self._carry_out(self.workload.panel_stepped(message.work, message.step, message.total_steps, now))

    async def panel_finished(self, message: device.PanelFinished) -> None:
        """Go on with a panel's outputs."""
        self._carry_out(self.workload.panel_finished(message.work, message.seconds, seedless=message.seedless))

    async def panel_failed(self, message: device.PanelFailed) -> None:
        """End a piece of work; with a lost device, this process as well."""
        self._carry_out(
            self.workload.panel_failed(message.work, message.error, at_fault=message.at_fault, certain=message.certain)
        )
        if message.device_lost:
            self._draining = True
            self._carry_out(self.workload.hand_back(None))
            self.spawn(self._end(message.error), name="end")

    async def panel_cancelled(self, message: device.PanelCancelled) -> None:
        """End a piece of work that was stopped."""
        self._carry_out(self.workload.panel_cancelled(message.work))

    async def weights_turned(self, message: device.WeightsTurned) -> None:
        """Tell the head that the weights are there, or are not any more."""
        here = self.premises
        self._turning = None
        self.reporter.add(
            stages.InstanceAwake(
                self.name,
                self.generation,
                message.awake,
                here.signature,
                here.weights,
                message.seconds,
                message.trouble,
            )
        )
        if not self._away.is_set():
            self._show_weights()

    # -- from the transfer actor

    async def state_loaded(self, message: device.StateLoaded) -> None:
        """Run the panel on what was loaded."""
        self._carry_out(self.workload.state_loaded(message.work, message.seconds))

    async def state_staged(self, message: device.StateStaged) -> None:
        """End a piece of work: its outputs are at rest."""
        self._carry_out(self.workload.state_staged(message.work, message.staged))

    async def artifact_saved(self, message: device.ArtifactSaved) -> None:
        """End a piece of work: its picture is on disk."""
        self._carry_out(self.workload.artifact_saved(message.work, message.artifact))

    async def state_failed(self, message: device.StateFailed) -> None:
        """End a piece of work: its tensors could not be moved."""
        self._carry_out(
            self.workload.state_failed(
                message.work, message.reason, source_gone=message.source_gone, retryable=message.retryable
            )
        )

    # -- carrying out

    def _carry_out(self, effects: tuple[do.Effect, ...]) -> None:
        for effect in effects:
            self._carry_out_one(effect)
        if not self.workload.items:
            self._idle.set()

    def _carry_out_one(self, effect: do.Effect) -> None:
        match effect:
            case do.Begin(work, inputs, seed, renewal):
                self.premises.workspace.begin(work, dict(inputs), seed, renewal)
            case do.Clear(work):
                self.premises.workspace.clear(work)
            case do.Report(message):
                self.reporter.add(message)
            case do.Mention(message):
                self._mention(message)
            case do.Release(lease):
                self._client.release(lease)
            case _:
                self._tell_neighbour(effect)

    def _tell_neighbour(self, effect: do.Effect) -> None:
        stream, transfer = self.reference(self._stream), self.reference(self._transfer)
        match effect:
            case do.Run(work, panel):
                stream.tell(device.RunPanel(work, panel))
            case do.StopPanel(work):
                stream.tell(device.CancelPanel(work))
            case do.Load(work, source, target, deadline):
                transfer.tell(device.LoadState(work, source, target, deadline))
            case do.Stage(work, deadline):
                transfer.tell(device.StageState(work, deadline))
            case do.Save(work, output, deadline):
                transfer.tell(device.SaveArtifact(work, output, deadline))
            case do.StopTransfer(work):
                transfer.tell(device.CancelState(work))

    def _mention(self, message: Message) -> None:
        if self._away.is_set():
            return
        try:
            self.reference("head").tell(message)
        except MailboxFull:  # the next one makes up for it
            self.log.debug("not told", message=type(message).__name__)

    def _drop(self, work: Work) -> None:
        self._carry_out(self.workload.cancel(work))
        self._client.settle(work)

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise Refused("draining", f"{self.name} takes no more work")
        if self._turning is not None or not self.premises.awake:
            raise Refused("asleep", f"{self.name} has no weights in memory")

    def _turn(self, *, awake: bool) -> None:
        """Have the stream worker bring the weights, or let go of them; nothing where it does already."""
        if awake == (self.premises.awake if self._turning is None else self._turning):
            return
        self._turning = awake
        if not awake:
            for slot in self._give_up_spares():
                self._client.release(slot)
        self.set_state(WAKING if awake else ASLEEP)
        self.reference(self._stream).tell(device.TurnWeights(awake))

    async def _allocate(self, message: TransferAlloc) -> TransferAllocated | TransferRejected:
        work = message.work
        if not self.workload.can_reserve(work):
            return TransferRejected(work, f"every slot of {self.name} is in use", True)
        try:
            answer = await self._client.lease(work, message.nbytes, incoming=True)
        except BusError as error:
            return TransferRejected(work, f"{self.component.pool}: {error}", True)
        if isinstance(answer, PoolFull):
            return TransferRejected(work, why_full(self.component.pool, answer), answer.needed <= answer.largest)
        try:
            self._carry_out(self.workload.reserve(work, answer))
        except NotTaken as reason:
            self._client.release(answer)
            raise Refused(reason.code, str(reason)) from reason
        for small in self._spares.learn(message.nbytes):
            self._client.release(small)
        self.spawn(self._replenish(), name="replenish")
        return TransferAllocated(work, answer)

    async def _replenish(self) -> None:
        """Lease slots ahead of time, as many as there is room for, and tell the head."""
        async with self._replenishing:
            while self._spares.wanted and not self._draining:
                work = self._spares.next_work()
                try:
                    answer = await self._client.lease(work, self._spares.nbytes, incoming=True)
                except BusError as error:
                    self._client.settle(work)
                    self.log.info("no spare slot", error=str(error))
                    break
                if isinstance(answer, PoolFull):
                    break
                self._spares.add(answer)
            self._offer()

    def _offer(self) -> None:
        self._mention(SlotsOffered(self.name, self.generation, tuple(self._spares.slots)))

    async def _drained(self) -> None:
        while self.workload.items:
            self._idle.clear()
            await self._idle.wait()
        await self.reporter.flushed()

    async def _end(self, error: str) -> None:
        """End this process once the head knows why, and has back what else was in hand."""
        try:
            async with asyncio.timeout(LAST_REPORTS_S):
                await self._drained()
        except TimeoutError:
            self.log.warning("the head was not told of the lost device", error=error)
        raise DeviceLost(f"{self.component.device} cannot be used by this process any more: {error}")

    # -- the head

    async def _deliver(self, report: Message) -> None:
        await self.reference("head").ask(report, Acknowledged, timeout_s=ANSWER_S)

    async def _attend(self) -> None:
        """Be in the books of whichever head there is, for ever."""
        head = self.reference("head")
        while True:
            # Watched before it is greeted, so that a death right after the welcome is not missed.
            lost = self.spawn(head.down(), name="head down")
            welcome = await self._greet(head)
            for work in welcome.unknown:
                self._drop(work)
            self.reporter.resume()
            self._away.clear()
            self._offer()
            self._show_weights()
            self.log.info("joined", unknown=len(welcome.unknown))
            await self._stay(head, lost)
            self._away.set()
            self.reporter.pause()
            self._show(JOINING, "waiting for the head")
            self._client.settle_all()
            self._carry_out(self.workload.forget_reservations())

    async def _greet(self, head: Reference) -> InstanceWelcome:
        attempt = 0
        while True:
            try:
                return await head.ask(self._hello(), InstanceWelcome, timeout_s=ANSWER_S)
            except BusError as error:
                if is_fence(error):
                    raise Fenced(f"the head has given this incarnation up ({error})") from error
                self.log.info("not joined yet", error=str(error))
            await asyncio.sleep(pause_s(attempt, random.random()))  # noqa: S311  jitter
            attempt += 1

    def _hello(self) -> InstanceHello:
        load = self.workload
        return InstanceHello(
            name=self.name,
            kind=self.component.kind,
            generation=self.generation,
            pid=os.getpid(),
            slots=load.slots,
            issued=load.issued,
            taken=load.taken,
            pool=self.component.pool,
            signature=self.premises.signature,
            # What has ended, but not to the head's knowledge, counts as in hand: it need not be done again.
            running=tuple(dict.fromkeys((*load.in_hand, *self.reporter.works))),
            leaving=self._leaving,
            model=self.premises.model,
            awake=self.premises.awake and self._turning is None,
            device=self.premises.device,
            weights=self.premises.weights,
        )

    async def _stay(self, head: Reference, lost: asyncio.Task[None]) -> None:
        """Say that this instance lives, until the head does not any more."""
        while True:
            await asyncio.wait({lost}, timeout=self._alive_every_s)
            if lost.done():
                return
            try:
                alive = InstanceAlive(self.name, self.generation, self.premises.trouble)
                await head.ask(alive, Acknowledged, timeout_s=ANSWER_S)
            except RemoteFailure as error:
                if is_fence(error):
                    raise Fenced(f"the head has given this incarnation up ({error})") from error
                if error.code == "unknown":
                    lost.cancel()
                    return
                self.log.warning("heartbeat not taken", error=str(error))
            except BusError as error:
                self.log.info("heartbeat not answered", error=str(error))

    def _show_weights(self) -> None:
        turning = None if self._turning is None else WAKING if self._turning else ASLEEP
        self._show(turning or (READY if self.premises.awake else ASLEEP))

    def _show(self, state: str, detail: str = "") -> None:
        if not self._draining:
            self.set_state(state, detail)
