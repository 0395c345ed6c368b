"""Run the schedulers' effects: what they want done outside becomes messages, and what comes of it goes back to them.

Nothing is decided here: which message an attempt takes, and what a failure means, the scheduler says.
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
from triptych.roles.head.effects import (
    Assign,
    Cancel,
    Effect,
    NotifyWaiters,
    ReleaseLeases,
    RestartInstance,
    TurnInstance,
)
from triptych.roles.head.scheduler import JobScheduler, SourceGoneError, SupersededError
from triptych.roles.head.served_models import ServedModels
from triptych.roles.messages import pool as pools
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.stages import INSTANCE_ANSWER_S

R = TypeVar("R", bound=Message)


class _PoolFullError(Exception):
    """The receiver's pool never gives a block of that size."""


class EffectRunner:
    """Runs every effect as a task of an actor.

    Args:
        actor: Runs the tasks and sends the messages.
        models: Whose schedulers are told what came of an effect.
        notify: Tells those who wait for requests, by id, that they have ended.
        on_outcome: Called after a scheduler was told something, so that what it decides then takes effect.
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
        for effect in effects:
            match effect:
                case Assign(instance, job_id):
                    attempt = self._models.scheduler_of(instance).jobs[job_id].current_attempt
                    self._actor.spawn(self._assign(instance, attempt), name=f"assign {attempt}")
                case Cancel(instance, attempt, reason):
                    self._cancel(instance, attempt, reason)
                case ReleaseLeases(leases):
                    self._actor.spawn(self.release(leases), name="release")
                case NotifyWaiters(request_id):
                    ended.append(request_id)
                case RestartInstance(instance):
                    self._actor.spawn(self._restart(instance), name=f"restart {instance}")
                case TurnInstance(instance, awake):
                    self._actor.spawn(self._turn(instance, awake=awake), name=f"turn {instance}")
        self._notify(ended)

    # -- assigning

    async def _assign(self, instance: str, attempt: Attempt) -> None:
        scheduler = self._models.scheduler_of(instance)
        sent_to = scheduler.registry.generation(instance)
        try:
            source = scheduler.source_of(attempt, instance)
            target = None
            if source and scheduler.registry.needs_block(instance, source.lease):
                target = await self._target(scheduler, instance, attempt, source)
            message = scheduler.message_for(attempt, source, target)
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
            self._cancel(instance, attempt, "it is too long to be sent")  # a block may be reserved for it
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
        """Ask an instance about an attempt until it answers: silence is no death, and an attempt is taken once.

        Raises:
            SupersededError: the job was cancelled or sent elsewhere meanwhile.
            UnreachableError, RemoteError, MessageTooLongError: as `Reference.ask`.
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
        """Return a block of the receiver's pool for stored tensors.

        Raises:
            _PoolFullError: they never fit.
            And what `_ask` raises.
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
            if isinstance(answer, stages.TransferRejected) and not answer.retryable:
                raise _PoolFullError(answer.reason)
            await asyncio.sleep(backoff_s(tries))
            tries += 1

    def _cancel(self, instance: str, attempt: Attempt, reason: str) -> None:
        try:
            self._actor.reference(instance).tell(stages.StageCancel(attempt, reason))
        except UnknownNameError:  # an earlier topology's: its process has ended
            self._actor.log.info("no instance to cancel it", instance=instance, attempt=str(attempt))
        except MailboxFullError:
            # Its result will be stale and changes nothing; only the instance's time is lost.
            self._actor.log.warning("cancel not delivered", instance=instance, attempt=str(attempt))

    # -- instances

    async def _restart(self, instance: str) -> None:
        """Have an instance end in order; its supervisor starts it anew."""
        try:
            await self._actor.reference(instance).ask(
                Shutdown("the model has changed"), ShuttingDown, timeout_s=INSTANCE_ANSWER_S
            )
        except BusError as error:
            # It has ended already, which is as good, or will be fenced for its silence.
            self._actor.log.warning("not told to restart", instance=instance, error=str(error))

    async def _turn(self, instance: str, *, awake: bool) -> None:
        """Have an instance sleep or wake; where it was not told, or would not, that is decided anew."""
        scheduler = self._models.scheduler_of(instance)
        generation = scheduler.registry.generation(instance)
        message = stages.Wake() if awake else stages.Sleep()
        try:
            await self._actor.reference(instance).ask(message, stages.Acknowledged, timeout_s=INSTANCE_ANSWER_S)
        except BusError as error:
            self._actor.log.info("not turned", instance=instance, awake=awake, error=str(error))
            scheduler.wake_change_failed(instance, generation)

    # -- blocks

    async def release(self, leases: Iterable[LeaseRef]) -> None:
        """Give blocks back to their pools."""
        leases = tuple(leases)
        for pool in {lease.pool for lease in leases}:
            message = pools.ReleaseBlocks(tuple(lease for lease in leases if lease.pool == pool))
            try:
                await self._actor.reference(pool).ask(message, pools.BlocksReleased, timeout_s=pools.POOL_ANSWER_S)
            except (BusError, UnknownNameError) as error:
                # A pool that died, or is of an earlier topology, has no leases any more; one that was slow is looked
                # through again by `Monitor.reclaim`.
                self._actor.log.info("release put off", pool=pool, error=str(error))
