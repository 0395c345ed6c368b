"""Run the schedulers' effects: send the messages that they stand for, and report the results to the schedulers.

`attempt_messages.py` has the message that an attempt needs; the scheduler decides what a failure means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from triptych.actors import Actor
from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.system_messages import Shutdown, ShuttingDown
from triptych.backoff import backoff_s
from triptych.bus import (
    AskTimeoutError,
    BusError,
    MailboxFullError,
    Message,
    MessageTooLongError,
    RemoteError,
    UnreachableError,
)
from triptych.roles.head.attempt_messages import SourceGoneError, SupersededError, message_for, source_of
from triptych.roles.head.effects import (
    Assign,
    AssignPreview,
    Cancel,
    Effect,
    NotifyWaiters,
    Park,
    ReleaseLeases,
    RestartInstance,
    SetInstanceAwake,
)
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.head.served_models import ServedModels
from triptych.roles.messages import pool as pools
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.stages import INSTANCE_ANSWER_S
from triptych.roles.previews import is_preview

R = TypeVar("R", bound=Message)


class _PoolFullError(Exception):
    """The instance's pool can never lease a block of that size, or cannot now for a preview."""


class EffectRunner:
    """Runs every effect as a task of an actor.

    Args:
        actor: Runs the tasks and sends the messages.
        models: Their schedulers are told the results of effects.
        notify: Tells the waiters of requests, given by id, that the requests have ended.
        on_outcome: Called after a scheduler was told a result, so that its decisions take effect.
    """

    def __init__(
        self,
        actor: Actor,
        models: ServedModels,
        *,
        notify: Callable[[Iterable[str]], None],
        on_outcome: Callable[[], None],
    ) -> None:
        self._actor = actor
        self._models = models
        self._notify = notify
        self._on_outcome = on_outcome

    def run(self, effects: Iterable[Effect]) -> None:
        """Start every effect."""
        ended: list[str] = []
        # What a stage waits for is sent before memory is released that nothing waits for.
        for effect in sorted(effects, key=lambda effect: isinstance(effect, ReleaseLeases)):
            match effect:
                case Assign(instance, job_id):
                    attempt = self._models.scheduler_of(instance).jobs[job_id].current_attempt
                    self._actor.spawn(self._assign(instance, attempt), name=f"assign {attempt}")
                case AssignPreview(instance, attempt):
                    self._actor.spawn(self._assign(instance, attempt), name=f"assign {attempt}")
                case Cancel(instance, attempt, reason):
                    self._tell(instance, stages.StageCancel(attempt, reason))
                case Park(instance, attempt):
                    self._tell(instance, stages.StagePark(attempt))
                case ReleaseLeases(leases):
                    self._actor.spawn(self.release(leases), name="release")
                case NotifyWaiters(request_id):
                    ended.append(request_id)
                case RestartInstance(instance):
                    self._actor.spawn(self._restart(instance), name=f"restart {instance}")
                case SetInstanceAwake(instance, awake):
                    self._actor.spawn(self._turn(instance, awake=awake), name=f"turn {instance}")
        self._notify(ended)

    # -- assigning

    async def _assign(self, instance: str, attempt: Attempt) -> None:
        scheduler, served = self._models.scheduler_of(instance), self._models.of(instance)
        sent_to = scheduler.registry.generation(instance)
        try:
            source = source_of(scheduler, attempt, instance)
            target = None
            if source and scheduler.registry.needs_block(instance, source.lease):
                target = await self._target(scheduler, instance, attempt, source)
            message = message_for(scheduler, attempt, source, target, served.name if served else "")
            await self._ask(scheduler, instance, attempt, message, stages.StageTaken)
        except SupersededError:
            scheduler.registry.refund(instance, sent_to)
        except SourceGoneError as error:
            scheduler.attempt_refused(instance, attempt, "cancelled", str(error), time.time())
        except _PoolFullError as error:
            scheduler.registry.refund(instance, sent_to)
            scheduler.give_up(attempt, instance, str(error), time.time())
        except MessageTooLongError as error:
            scheduler.registry.refund(instance, sent_to)
            scheduler.give_up(attempt, instance, f"it is too long to be sent: {error}", time.time())
            # A block may be reserved for it.
            self._tell(instance, stages.StageCancel(attempt, "it is too long to be sent"))
        except RemoteError as error:
            scheduler.attempt_refused(instance, attempt, error.code, error.detail, time.time())
        except UnreachableError:
            if scheduler.connection_lost(instance, sent_to, time.time()):
                self._actor.log.warning("instance down", instance=instance)
        else:
            return
        self._on_outcome()

    async def _ask(
        self, scheduler: JobScheduler, instance: str, attempt: Attempt, message: Message, *replies: type[R]
    ) -> R:
        """Ask an instance about an attempt until it answers; an instance takes an attempt only once.

        Raises:
            SupersededError: The job was cancelled or assigned to another instance meanwhile.
            UnreachableError, RemoteError, MessageTooLongError: As `Reference.ask`.
        """
        tries = 0
        while scheduler.is_current(attempt, instance):
            try:
                return await self._actor.reference(instance).ask(message, *replies, timeout_s=INSTANCE_ANSWER_S)
            except (AskTimeoutError, MailboxFullError) as error:
                self._actor.log.info("asked again", instance=instance, attempt=str(attempt), error=str(error))
            await asyncio.sleep(backoff_s(tries))
            tries += 1
        raise SupersededError

    async def _target(
        self, scheduler: JobScheduler, instance: str, attempt: Attempt, source: StoredPayload
    ) -> LeaseRef:
        """Return a block of the instance's pool for stored tensors.

        Raises:
            _PoolFullError: They never fit, or do not now and are a preview.
            SupersededError, UnreachableError, RemoteError, MessageTooLongError: As `_ask`.
        """
        if preallocated := scheduler.registry.take_preallocated(instance, source.nbytes):
            return preallocated
        message = stages.TransferAlloc(attempt, source.nbytes)
        tries = 0
        while True:
            answer = await self._ask(
                scheduler, instance, attempt, message, stages.TransferAllocated, stages.TransferRejected
            )
            if isinstance(answer, stages.TransferAllocated):
                return answer.target
            if isinstance(answer, stages.TransferRejected) and (not answer.retryable or is_preview(attempt)):
                raise _PoolFullError(answer.reason)
            await asyncio.sleep(backoff_s(tries))
            tries += 1

    def _tell(self, instance: str, message: stages.StageCancel | stages.StagePark) -> None:
        facts = {"message": type(message).__name__, "instance": instance, "attempt": str(message.attempt)}
        try:
            self._actor.reference(instance).tell(message)
        except UnknownNameError:  # of an earlier topology; its process has ended
            self._actor.log.info("no instance to tell", **facts)
        except MailboxFullError:
            # What was cancelled is stale and is ignored; what was to be parked goes on. Only time is lost.
            self._actor.log.warning("not delivered", **facts)

    # -- instances

    async def _restart(self, instance: str) -> None:
        """Shut an instance down; its supervisor restarts it."""
        try:
            await self._actor.reference(instance).ask(
                Shutdown("the model has changed"), ShuttingDown, timeout_s=INSTANCE_ANSWER_S
            )
        except BusError as error:
            # It has ended already, which serves as well, or will be fenced for its silence.
            self._actor.log.warning("not told to restart", instance=instance, error=str(error))

    async def _turn(self, instance: str, *, awake: bool) -> None:
        """Tell an instance to sleep or wake; if it cannot be told or refuses, the residency decides again."""
        scheduler = self._models.scheduler_of(instance)
        generation = scheduler.registry.generation(instance)
        message = stages.Wake() if awake else stages.Sleep()
        try:
            await self._actor.reference(instance).ask(message, stages.Acknowledged, timeout_s=INSTANCE_ANSWER_S)
        except BusError as error:
            self._actor.log.info("sleep or wake failed", instance=instance, awake=awake, error=str(error))
            scheduler.wake_change_failed(instance, generation)

    # -- blocks

    async def release(self, leases: Iterable[LeaseRef]) -> None:
        """Release blocks of any pools."""
        leases = tuple(leases)
        for pool in {lease.pool for lease in leases}:
            message = pools.ReleaseBlocks(tuple(lease for lease in leases if lease.pool == pool))
            try:
                await self._actor.reference(pool).ask(message, pools.BlocksReleased, timeout_s=pools.POOL_ANSWER_S)
            except (BusError, UnknownNameError) as error:
                # A pool that has ended, or is of an earlier topology, has no leases any more; blocks of a slow one are
                # released by `Monitor.reclaim`.
                self._actor.log.info("release postponed", pool=pool, error=str(error))
