"""What the head has to go out for: sending work, giving blocks back, watching instances and pools."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from triptych.actors import Actor
from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.system_messages import Shutdown, ShuttingDown
from triptych.bus import (
    AskTimeoutError,
    BusError,
    MailboxFullError,
    Message,
    MessageTooLongError,
    RemoteError,
    UnreachableError,
)
from triptych.engines.partition.stages import Stage
from triptych.roles.head.effects import (
    Assign,
    Cancel,
    Effect,
    NotifyWaiters,
    ReleaseLeases,
    RestartInstance,
    TurnInstance,
)
from triptych.roles.head.job import UPSTREAM, Job
from triptych.roles.head.served_models import ServedModels
from triptych.roles.messages import pool as pools
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt, LeaseRef, Rebind, StoredPayload
from triptych.roles.worker.reporter import backoff_s

R = TypeVar("R", bound=Message)

ANSWER_S = 5.0
"""An actor that takes longer than this to say yes or no is asked again."""


class _PoolFullError(Exception):
    """The receiver's pool will never have a block of that size."""


class _SupersededError(Exception):
    """The attempt that a block was wanted for no longer counts."""


class _SourceGoneError(Exception):
    """The tensors that the attempt starts from were lost before it was sent."""


class EffectRunner:
    """Runs the schedulers' effects as tasks of the head; what comes back goes into the scheduler of the instance."""

    def __init__(self, head: Actor, models: ServedModels, commit: Callable[[], None], pools: tuple[str, ...]) -> None:
        self._head = head
        self._models = models
        self._commit = commit
        self._expected_pools = pools
        self._pools: dict[str, int] = {}

    def carry_out(self, effects: Iterable[Effect]) -> list[str]:
        """Start every effect; returns the ids of requests that have ended."""
        ended: list[str] = []
        for effect in effects:
            match effect:
                case Assign(instance, job_id):
                    job = self._models.scheduler_of(instance).jobs[job_id]
                    self._head.spawn(
                        self._assign(instance, job, job.current_attempt), name=f"assign {job.current_attempt}"
                    )
                case Cancel(instance, attempt, reason):
                    self._cancel(instance, attempt, reason)
                case ReleaseLeases(leases):
                    self._head.spawn(self._release(leases), name="release")
                case NotifyWaiters(request_id):
                    ended.append(request_id)
                case RestartInstance(instance):
                    self._head.spawn(self._restart(instance), name=f"restart {instance}")
                case TurnInstance(instance, awake):
                    self._head.spawn(self._set_awake(instance, awake=awake), name=f"turn {instance}")
        return ended

    # -- sending work

    async def _assign(self, instance: str, job: Job, attempt: Attempt) -> None:
        scheduler = self._models.scheduler_of(instance)
        sent_to = scheduler.registry.generation(instance)
        try:
            message = await self._order(instance, job, attempt)
            await self._ask(instance, job, attempt, message, stages.StageTaken)
        except _SupersededError:
            self._refund(instance, sent_to)
        except _SourceGoneError:
            scheduler.attempt_refused(instance, attempt, "cancelled", "its stored tensors are gone", time.time())
        except _PoolFullError as error:
            self._refund(instance, sent_to)
            scheduler.give_up(attempt, instance, str(error), time.time())
        except MessageTooLongError as error:
            self._refund(instance, sent_to)
            scheduler.give_up(attempt, instance, f"it is too long to be sent: {error}", time.time())
            self._cancel(instance, attempt, "it is too long to be sent")  # a block may be reserved for it
        except RemoteError as error:
            scheduler.attempt_refused(instance, attempt, error.code, error.detail, time.time())
        except UnreachableError:
            self._lost(instance, sent_to)
        else:
            return
        self._commit()

    def _refund(self, instance: str, sent_to: int) -> None:
        registry = self._models.scheduler_of(instance).registry
        if registry.generation(instance) == sent_to:  # a later incarnation has not been charged
            registry.refund(instance)

    async def _ask(self, instance: str, job: Job, attempt: Attempt, message: Message, *replies: type[R]) -> R:
        """Ask an instance about work until it answers: silence alone is no death, and work is taken once.

        Raises:
            _OvertakenError: the job was cancelled or sent elsewhere meanwhile.
            Unreachable, RemoteError, MessageTooLongError: as `Reference.ask`.
        """
        tries = 0
        while job.current_attempt == attempt and job.instance == instance:
            try:
                return await self._head.reference(instance).ask(message, *replies, timeout_s=ANSWER_S)
            except (AskTimeoutError, MailboxFullError) as error:
                self._head.log.info("asked again", instance=instance, attempt=str(attempt), error=str(error))
            await asyncio.sleep(backoff_s(tries, random.random()))  # noqa: S311  jitter
            tries += 1
        raise _SupersededError

    async def _order(self, instance: str, job: Job, attempt: Attempt) -> stages.StageAssign | stages.TransferPush:
        """What to send.

        Raises:
            _SourceGoneError: the pool that held its tensors has died.
            And what `_target` raises.
        """
        if job.current_attempt != attempt or job.instance != instance:
            raise _SupersededError
        request = self._models.scheduler_of(instance).requests[job.request_id]
        stage = job.stage
        if stage is None or stage is Stage.ENCODER:
            return stages.StageAssign(attempt, request.inputs, job.seed, request.output, job.left_s)
        if UPSTREAM[stage] not in job.stored:
            raise _SourceGoneError
        source = job.stored[UPSTREAM[stage]]
        target = await self._target(instance, source, job, attempt)
        rebind = Rebind(request.inputs, job.seed) if job.borrows and stage is Stage.DENOISER else None
        return stages.TransferPush(attempt, source, target, request.output, job.left_s, rebind)

    async def _target(self, instance: str, source: StoredPayload, job: Job, attempt: Attempt) -> LeaseRef | None:
        """A block in the receiver's pool; none is needed where it maps the source's own.

        Raises:
            _NoRoomError: the tensors can never fit.
            And what `_ask` raises.
        """
        registry = self._models.scheduler_of(instance).registry
        receiver = registry.instances.get(instance)
        if receiver is None or receiver.pool == source.lease.pool:
            return None
        if preallocated := registry.take_preallocated(instance, source.nbytes):
            return preallocated
        tries = 0
        while True:
            message = stages.TransferAlloc(attempt, source.nbytes)
            answer = await self._ask(instance, job, attempt, message, stages.TransferAllocated, stages.TransferRejected)
            if isinstance(answer, stages.TransferAllocated):
                return answer.target
            if isinstance(answer, stages.TransferRejected) and not answer.retryable:
                raise _PoolFullError(answer.reason)
            await asyncio.sleep(backoff_s(tries, random.random()))  # noqa: S311  jitter
            tries += 1

    async def _restart(self, instance: str) -> None:
        """Have an instance end in order; its supervisor starts it anew."""
        try:
            await self._head.reference(instance).ask(
                Shutdown("the model has changed"), ShuttingDown, timeout_s=ANSWER_S
            )
        except BusError as error:
            # It has ended already, which is as good, or will be fenced for its silence.
            self._head.log.warning("not told to restart", instance=instance, error=str(error))

    async def _set_awake(self, instance: str, *, awake: bool) -> None:
        """Have an instance sleep or wake; where it was not told, or would not, that is decided anew."""
        scheduler = self._models.scheduler_of(instance)
        generation = scheduler.registry.generation(instance)
        message = stages.Wake() if awake else stages.Sleep()
        try:
            await self._head.reference(instance).ask(message, stages.Acknowledged, timeout_s=ANSWER_S)
        except BusError as error:
            self._head.log.info("not turned", instance=instance, awake=awake, error=str(error))
            scheduler.wake_change_failed(instance, generation)

    def _cancel(self, instance: str, attempt: Attempt, reason: str) -> None:
        try:
            self._head.reference(instance).tell(stages.StageCancel(attempt, reason))
        except UnknownNameError:  # an earlier topology's: its process has ended
            self._head.log.info("nobody to cancel it", instance=instance, attempt=str(attempt))
        except MailboxFullError:
            # Its result will be stale and changes nothing; only the instance's time is lost.
            self._head.log.warning("cancel not delivered", instance=instance, attempt=str(attempt))

    # -- blocks

    async def _release(self, leases: tuple[LeaseRef, ...]) -> None:
        for pool in {lease.pool for lease in leases}:
            message = pools.ReleaseBlocks(tuple(lease for lease in leases if lease.pool == pool))
            try:
                await self._head.reference(pool).ask(message, pools.BlocksReleased, timeout_s=ANSWER_S)
            except (BusError, UnknownNameError) as error:
                # A pool that died, or is of an earlier topology, has no leases any more; one that was slow is looked
                # through again by `reclaim`.
                self._head.log.info("release put off", pool=pool, error=str(error))

    async def reclaim(self) -> None:
        """Release blocks that no request needs: of attempts that no longer count, or that no instance claims."""
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
                self._head.log.info("reclaimed", pool=pool, blocks=len(unneeded))
                await self._release(unneeded)

    def _unneeded(self, view: pools.LeaseView) -> bool:
        if view.state != "sealed" or any(
            scheduler.stored_outputs.holds(view.lease) for scheduler in self._models.schedulers
        ):
            return False
        # What the present attempt has sealed may be about to be reported.
        return self._overtaken(view.attempt)

    def _overtaken(self, attempt: Attempt) -> bool:
        found = (scheduler.jobs.get(attempt.job_id) for scheduler in self._models.schedulers)
        job = next((job for job in found if job), None)
        return job is None or attempt.number < job.attempt

    async def _unclaimed(self, views: Iterable[pools.LeaseView]) -> tuple[LeaseRef, ...]:
        """Slots being written for work that no longer counts, and of which their living owners know nothing."""
        suspects: dict[str, list[pools.LeaseView]] = {}
        for view in views:
            served = self._models.of(view.owner)
            known = served and served.scheduler.registry.incarnation(view.owner, view.owner_generation)
            # What is kept ready is for no job; what a dead owner was writing, the pool takes back itself.
            if view.state == "writing" and view.attempt.job_id and known and self._overtaken(view.attempt):
                suspects.setdefault(view.owner, []).append(view)
        unclaimed: list[LeaseRef] = []
        for owner, asked_about in suspects.items():
            query = stages.AttemptQuery(tuple(view.attempt for view in asked_about))
            try:
                claimed = await self._head.reference(owner).ask(query, stages.AttemptsAssigned, timeout_s=ANSWER_S)
            except BusError as error:
                self._head.log.info("reclaim put off", owner=owner, error=str(error))
                continue
            unclaimed += [view.lease for view in asked_about if view.attempt not in claimed.attempts]
        return tuple(unclaimed)

    # -- watching

    async def watch_instance(self, name: str, generation: int) -> None:
        """Until its process ends; then its work goes to others."""
        await self._head.reference(name).down()
        self._lost(name, generation)
        self._commit()

    def _lost(self, name: str, generation: int) -> None:
        """The connection to an instance's process was lost; of a later one, nothing is known."""
        if self._models.scheduler_of(name).connection_lost(name, generation, time.time()):
            self._head.log.warning("instance down", instance=name)

    def watch_pools(self) -> None:
        """Start to watch every pool of the topology."""
        for name in self._expected_pools:
            self._head.spawn(self._watch_pool(name), name=f"watch {name}")

    async def _watch_pool(self, name: str) -> None:
        """For ever: notices when a pool, and all that was stored in it, is gone."""
        reference = self._head.reference(name)
        tries = 0
        while True:
            # Watched before it is asked, so that a death right after the answer is not missed.
            lost = self._head.spawn(reference.down(), name=f"down {name}")
            try:
                found = await reference.ask(pools.PoolQuery(), pools.PoolDescription, timeout_s=ANSWER_S)
            except BusError as error:  # not there yet, or not open
                lost.cancel()
                self._head.log.info("pool does not answer", pool=name, error=str(error))
                await asyncio.sleep(backoff_s(tries, random.random()))  # noqa: S311  jitter
                tries += 1
                continue
            tries = 0
            self._pools[name] = found.generation
            self._pool_down(name, found.generation)
            self._commit()
            await lost
            del self._pools[name]
            self._head.log.warning("pool down", pool=name)
            self._pool_down(name, found.generation + 1)
            self._commit()

    def _pool_down(self, name: str, older_than: int) -> None:
        for scheduler in self._models.schedulers:
            scheduler.pool_down(name, older_than, time.time())

    def pools_missing(self) -> list[str]:
        """Pools that have not answered."""
        return [name for name in self._expected_pools if name not in self._pools]
