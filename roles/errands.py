"""What the head has to go out for: sending work, giving slots back, watching instances and pools."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from triptych.actors import Actor
from triptych.actors.errors import UnknownName
from triptych.actors.system import Shutdown, ShuttingDown
from triptych.bus import AskTimeout, BusError, MailboxFull, Message, MessageTooLong, RemoteFailure, Unreachable
from triptych.engines.panels import Panel
from triptych.roles.effects import Assign, Cancel, Effect, Release, Restart, Settle, Turn
from triptych.roles.messages import pool as pools
from triptych.roles.messages import stages
from triptych.roles.messages.work import LeaseRef, Renewal, Staged, Work
from triptych.roles.models import Models
from triptych.roles.reporter import pause_s
from triptych.roles.request import UPSTREAM, Unit

R = TypeVar("R", bound=Message)

ANSWER_S = 5.0
"""An actor that takes longer than this to say yes or no is asked again."""


class _NoRoomError(Exception):
    """The receiver's pool will never have a slot of that size."""


class _OvertakenError(Exception):
    """The work that a slot was wanted for no longer counts."""


class _SourceGoneError(Exception):
    """The tensors that the work starts from were lost before it was sent."""


class Errands:
    """Runs the ledgers' effects as tasks of the head; what comes back goes into the ledger of the instance."""

    def __init__(self, head: Actor, models: Models, settle: Callable[[], None], pools: tuple[str, ...]) -> None:
        self._head = head
        self._models = models
        self._settle = settle
        self._expected_pools = pools
        self._pools: dict[str, int] = {}

    def carry_out(self, effects: Iterable[Effect]) -> list[str]:
        """Start every effect; returns the ids of requests that have ended."""
        ended: list[str] = []
        for effect in effects:
            match effect:
                case Assign(instance, unit_id):
                    unit = self._models.books_of(instance).units[unit_id]
                    self._head.spawn(self._assign(instance, unit, unit.work), name=f"assign {unit.work}")
                case Cancel(instance, work, reason):
                    self._cancel(instance, work, reason)
                case Release(leases):
                    self._head.spawn(self._release(leases), name="release")
                case Settle(request_id):
                    ended.append(request_id)
                case Restart(instance):
                    self._head.spawn(self._restart(instance), name=f"restart {instance}")
                case Turn(instance, awake):
                    self._head.spawn(self._turn(instance, awake=awake), name=f"turn {instance}")
        return ended

    # -- sending work

    async def _assign(self, instance: str, unit: Unit, work: Work) -> None:
        ledger = self._models.books_of(instance)
        sent_to = ledger.fleet.generation(instance)
        try:
            message = await self._order(instance, unit, work)
            await self._ask(instance, unit, work, message, stages.StageTaken)
        except _OvertakenError:
            self._refund(instance, sent_to)
        except _SourceGoneError:
            ledger.not_taken(instance, work, "cancelled", "its staged tensors are gone", time.time())
        except _NoRoomError as error:
            self._refund(instance, sent_to)
            ledger.give_up(work, instance, str(error), time.time())
        except MessageTooLong as error:
            self._refund(instance, sent_to)
            ledger.give_up(work, instance, f"it is too long to be sent: {error}", time.time())
            self._cancel(instance, work, "it is too long to be sent")  # a slot may be reserved for it
        except RemoteFailure as error:
            ledger.not_taken(instance, work, error.code, error.detail, time.time())
        except Unreachable:
            self._lost(instance, sent_to)
        else:
            return
        self._settle()

    def _refund(self, instance: str, sent_to: int) -> None:
        fleet = self._models.books_of(instance).fleet
        if fleet.generation(instance) == sent_to:  # a later incarnation has not been charged
            fleet.refund(instance)

    async def _ask(self, instance: str, unit: Unit, work: Work, message: Message, *replies: type[R]) -> R:
        """Ask an instance about work until it answers: silence alone is no death, and work is taken once.

        Raises:
            _OvertakenError: the unit was cancelled or sent elsewhere meanwhile.
            Unreachable, RemoteFailure, MessageTooLong: as `Reference.ask`.
        """
        attempt = 0
        while unit.work == work and unit.instance == instance:
            try:
                return await self._head.reference(instance).ask(message, *replies, timeout_s=ANSWER_S)
            except (AskTimeout, MailboxFull) as error:
                self._head.log.info("asked again", instance=instance, work=str(work), error=str(error))
            await asyncio.sleep(pause_s(attempt, random.random()))  # noqa: S311  jitter
            attempt += 1
        raise _OvertakenError

    async def _order(self, instance: str, unit: Unit, work: Work) -> stages.StageAssign | stages.TransferPush:
        """What to send.

        Raises:
            _SourceGoneError: the pool that held its tensors has died.
            And what `_target` raises.
        """
        if unit.work != work or unit.instance != instance:
            raise _OvertakenError
        request = self._models.books_of(instance).requests[unit.request_id]
        panel = unit.panel
        if panel is None or panel is Panel.ENCODER:
            return stages.StageAssign(work, request.inputs, unit.seed, request.output, unit.left_s)
        if UPSTREAM[panel] not in unit.staged:
            raise _SourceGoneError
        source = unit.staged[UPSTREAM[panel]]
        target = await self._target(instance, source, unit, work)
        renewal = Renewal(request.inputs, unit.seed) if unit.borrows and panel is Panel.DENOISER else None
        return stages.TransferPush(work, source, target, request.output, unit.left_s, renewal)

    async def _target(self, instance: str, source: Staged, unit: Unit, work: Work) -> LeaseRef | None:
        """A slot in the receiver's pool; none is needed where it maps the source's own.

        Raises:
            _NoRoomError: the tensors can never fit.
            And what `_ask` raises.
        """
        fleet = self._models.books_of(instance).fleet
        receiver = fleet.instances.get(instance)
        if receiver is None or receiver.pool == source.lease.pool:
            return None
        if spare := fleet.take_spare(instance, source.nbytes):
            return spare
        attempt = 0
        while True:
            message = stages.TransferAlloc(work, source.nbytes)
            answer = await self._ask(instance, unit, work, message, stages.TransferAllocated, stages.TransferRejected)
            if isinstance(answer, stages.TransferAllocated):
                return answer.target
            if isinstance(answer, stages.TransferRejected) and not answer.retryable:
                raise _NoRoomError(answer.reason)
            await asyncio.sleep(pause_s(attempt, random.random()))  # noqa: S311  jitter
            attempt += 1

    async def _restart(self, instance: str) -> None:
        """Have an instance end in order; its supervisor starts it anew."""
        try:
            await self._head.reference(instance).ask(
                Shutdown("the model has changed"), ShuttingDown, timeout_s=ANSWER_S
            )
        except BusError as error:
            # It has ended already, which is as good, or will be fenced for its silence.
            self._head.log.warning("not told to restart", instance=instance, error=str(error))

    async def _turn(self, instance: str, *, awake: bool) -> None:
        """Have an instance sleep or wake; where it was not told, or would not, that is decided anew."""
        ledger = self._models.books_of(instance)
        generation = ledger.fleet.generation(instance)
        message = stages.Wake() if awake else stages.Sleep()
        try:
            await self._head.reference(instance).ask(message, stages.Acknowledged, timeout_s=ANSWER_S)
        except BusError as error:
            self._head.log.info("not turned", instance=instance, awake=awake, error=str(error))
            ledger.not_turned(instance, generation)

    def _cancel(self, instance: str, work: Work, reason: str) -> None:
        try:
            self._head.reference(instance).tell(stages.StageCancel(work, reason))
        except UnknownName:  # an earlier topology's: its process has ended
            self._head.log.info("nobody to cancel it", instance=instance, work=str(work))
        except MailboxFull:
            # Its result will be stale and changes nothing; only the instance's time is lost.
            self._head.log.warning("cancel not delivered", instance=instance, work=str(work))

    # -- slots

    async def _release(self, leases: tuple[LeaseRef, ...]) -> None:
        for pool in {lease.pool for lease in leases}:
            message = pools.ReleaseSlots(tuple(lease for lease in leases if lease.pool == pool))
            try:
                await self._head.reference(pool).ask(message, pools.SlotsReleased, timeout_s=ANSWER_S)
            except (BusError, UnknownName) as error:
                # A pool that died, or is of an earlier topology, has no leases any more; one that was slow is looked
                # through again by `reclaim`.
                self._head.log.info("release put off", pool=pool, error=str(error))

    async def reclaim(self) -> None:
        """Release slots that no request needs: what was made for work that no longer counts, and what nobody claims."""
        for pool in tuple(self._pools):  # one that ends meanwhile leaves them
            try:
                await self._reclaim_from(pool)
            except BusError as error:
                self._head.log.info("reclaim put off", pool=pool, error=str(error))

    async def _reclaim_from(self, pool: str) -> None:
        """Release what lies in a pool without need, page by page. Raises BusError."""
        query: pools.LeaseQuery | None = pools.LeaseQuery()
        while query:
            report = await self._head.reference(pool).ask(query, pools.LeaseReport, timeout_s=ANSWER_S)
            query = pools.LeaseQuery(report.leases[-1].lease.lease_id) if report.more else None
            unneeded = tuple(v.lease for v in report.leases if self._unneeded(v))
            unneeded += await self._unclaimed(report.leases)
            if unneeded:
                self._head.log.info("reclaimed", pool=pool, slots=len(unneeded))
                await self._release(unneeded)

    def _unneeded(self, view: pools.LeaseView) -> bool:
        if view.state != "sealed" or any(ledger.staging.holds(view.lease) for ledger in self._models.ledgers):
            return False
        # What the present attempt has sealed may be about to be reported.
        return self._overtaken(view.work)

    def _overtaken(self, work: Work) -> bool:
        found = (ledger.units.get(work.unit_id) for ledger in self._models.ledgers)
        unit = next((unit for unit in found if unit), None)
        return unit is None or work.attempt < unit.attempt

    async def _unclaimed(self, views: Iterable[pools.LeaseView]) -> tuple[LeaseRef, ...]:
        """Slots being written for work that no longer counts, and of which their living owners know nothing."""
        suspects: dict[str, list[pools.LeaseView]] = {}
        for view in views:
            served = self._models.of(view.owner)
            known = served and served.ledger.fleet.incarnation(view.owner, view.owner_generation)
            # What is kept ready is for no unit; what a dead owner was writing, the pool takes back itself.
            if view.state == "writing" and view.work.unit_id and known and self._overtaken(view.work):
                suspects.setdefault(view.owner, []).append(view)
        unclaimed: list[LeaseRef] = []
        for owner, asked_about in suspects.items():
            query = stages.WorkQuery(tuple(view.work for view in asked_about))
            try:
                claimed = await self._head.reference(owner).ask(query, stages.WorkInHand, timeout_s=ANSWER_S)
            except BusError as error:
                self._head.log.info("reclaim put off", owner=owner, error=str(error))
                continue
            unclaimed += [view.lease for view in asked_about if view.work not in claimed.works]
        return tuple(unclaimed)

    # -- watching

    async def watch_instance(self, name: str, generation: int) -> None:
        """Until its process ends; then its work goes to others."""
        await self._head.reference(name).down()
        self._lost(name, generation)
        self._settle()

    def _lost(self, name: str, generation: int) -> None:
        """The connection to an instance's process was lost; of a later one, nothing is known."""
        if self._models.books_of(name).connection_lost(name, generation, time.time()):
            self._head.log.warning("instance down", instance=name)

    def watch_pools(self) -> None:
        """Start to watch every pool of the topology."""
        for name in self._expected_pools:
            self._head.spawn(self._watch_pool(name), name=f"watch {name}")

    async def _watch_pool(self, name: str) -> None:
        """For ever: notices when a pool, and all that was staged in it, is gone."""
        reference = self._head.reference(name)
        attempt = 0
        while True:
            # Watched before it is asked, so that a death right after the answer is not missed.
            lost = self._head.spawn(reference.down(), name=f"down {name}")
            try:
                found = await reference.ask(pools.PoolQuery(), pools.PoolDescription, timeout_s=ANSWER_S)
            except BusError as error:  # not there yet, or not open
                lost.cancel()
                self._head.log.info("pool does not answer", pool=name, error=str(error))
                await asyncio.sleep(pause_s(attempt, random.random()))  # noqa: S311  jitter
                attempt += 1
                continue
            attempt = 0
            self._pools[name] = found.generation
            self._pool_down(name, found.generation)
            self._settle()
            await lost
            del self._pools[name]
            self._head.log.warning("pool down", pool=name)
            self._pool_down(name, found.generation + 1)
            self._settle()

    def _pool_down(self, name: str, older_than: int) -> None:
        for ledger in self._models.ledgers:
            ledger.pool_down(name, older_than, time.time())

    def pools_missing(self) -> list[str]:
        """Pools that have not answered."""
        return [name for name in self._expected_pools if name not in self._pools]
